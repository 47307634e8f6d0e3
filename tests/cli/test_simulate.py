"""`xtalfast simulate`."""

from __future__ import annotations

import numpy as np
import pytest

from xtalfast.cli import main
from xtalfast.io import read_expt, read_image, read_refl


def test_same_seed_same_bytes(tmp_path, capsys):
    names = ("models.expt", "predicted.refl", "images/sim_0003.cbf")
    made = {}
    for seed, where in ((3, "a"), (3, "b"), (4, "c")):
        arguments = ["simulate", "-o", str(tmp_path / where), "--seed", str(seed), "--tiny", "--images", "3"]
        assert main(arguments) == 0
        made[where] = [(tmp_path / where / name).read_bytes() for name in names]
    assert made["a"] == made["b"]
    assert all(a != c for a, c in zip(made["a"], made["c"]))
    lines = capsys.readouterr().out.splitlines()
    wrote = [f"{tmp_path}/a/{name}" for name in ("models.expt", "predicted.refl", "truth.npz")]
    assert lines[:3] == [f"wrote {path}" for path in wrote]
    assert lines[3] == f"next: xtalfast integrate {wrote[0]} {wrote[1]} -o {tmp_path}/a/integrated"


def test_quiet_is_quiet(tmp_path, capsys):
    assert main(["simulate", "-o", str(tmp_path), "--tiny", "--images", "1", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_options_reach_the_models(tmp_path):
    options = ["--cell", "50 50 70 90 90 90", "--space-group", "P 41 21 2", "--images", "2", "--oscillation", "0.25"]
    more = ["--d-min", "3", "--set", "distance_mm=80", "--set", "beam_centre_px=90,95", "--set", "trusted_max=5000"]
    assert main(["simulate", "-o", str(tmp_path), "--tiny", "--quiet", *options, *more]) == 0
    experiment = read_expt(tmp_path / "models.expt")[0]
    assert experiment.crystal.cell.parameters == pytest.approx((50, 50, 70, 90, 90, 90))
    assert experiment.crystal.space_group.xhm() == "P 41 21 2"
    assert experiment.scan.n_images == 2 and experiment.scan.oscillation[1] == 0.25
    assert experiment.detector[0].trusted_range[1] == pytest.approx(5000, abs=1)
    assert read_refl(tmp_path / "predicted.refl")["d"].min() >= 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cell", "1 2"], "--cell wants 6 numbers, got '1 2'"),
        (["--space-group", "Q 1"], "space_group must be a Hermann-Mauguin symbol, got 'Q 1'"),
        (["--set", "fog=1"], "--set wants NAME=VALUE with NAME one of cell, space_group,"),
        (["--set", "n_images=x"], "n_images wants a number, got 'x'"),
        (["--structure", "none.pdb"], "none.pdb"),
        (["--images", "0"], "n_images must be positive, got 0"),
        (["--seed", "-1"], "seed must not be negative, got -1"),
    ],
)
def test_bad_options(tmp_path, capsys, options, message):
    assert main(["simulate", "-o", str(tmp_path / "out"), "--tiny", "--quiet", *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_preset_and_dose(tmp_path):
    """`--preset ice --dose 0.5` keeps the preset's rings and halves every count; an option beats the preset."""
    small = ["--images", "1", "--set", "image_size_px=160,160", "--set", "beam_centre_px=20,20", "--quiet"]
    mean = {}
    for name, options in {"ice": [], "half": ["--dose", "0.5"], "no ice": ["--ice", "0"]}.items():
        assert main(["simulate", "-o", str(tmp_path / name), "--preset", "ice", *options, *small]) == 0
        mean[name] = np.maximum(read_image(tmp_path / name / "images" / "sim_0001.cbf"), 0).mean()
    assert mean["half"] == pytest.approx(0.5 * mean["ice"], rel=0.05)
    assert mean["no ice"] < 0.99 * mean["ice"]
    assert main(["simulate", "-o", str(tmp_path), "--preset", "ice", "--tiny"]) == 2
    assert main(["simulate", "-o", str(tmp_path), "--preset", "nothing"]) == 2
