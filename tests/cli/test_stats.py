"""`xtalfast stats`."""

from __future__ import annotations

import json
import re

import pytest

from xtalfast.cli import main


def test_refl_and_mtz_agree(tiny_run, tmp_path, capsys):
    out = tiny_run.directory
    files = [str(out / "integrated.refl"), str(out / "unmerged.mtz")]
    arguments = ["stats", *files, "--expt", str(out / "integrated.expt"), "--bins", "3"]
    assert main([*arguments, "--json", str(tmp_path / "stats.json")]) == 0
    text = capsys.readouterr().out
    for word in ("CC1/2", "CCanom", "Rmerge", "Rmeas", "Rpim", "<I/sigI>", "compl", "mult", "P 43 21 2"):
        assert word in text
    assert "unscaled" in text
    refl, mtz = (json.loads((tmp_path / "stats.json").read_text())[name] for name in files)
    assert len(refl["shells"]) == len(mtz["shells"]) == 3
    assert mtz["overall"]["n_unique"] == pytest.approx(refl["overall"]["n_unique"], rel=0.05)


def test_models_beside_the_table_are_found(tiny_run, capsys):
    """`integrated.refl` has its `integrated.expt` in the same directory."""
    assert main(["stats", str(tiny_run.directory / "integrated.refl"), "--bins", "2"]) == 0
    assert "CC1/2" in capsys.readouterr().out


@pytest.mark.parametrize("channel", ["prf", "sum", "vi", "q"])
def test_every_channel(tiny_run, capsys, channel):
    assert main(["stats", str(tiny_run.directory / "integrated.refl"), "--channel", channel, "--bins", "1"]) == 0
    assert f"({channel}, unscaled)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.refl"], "no.refl: no such file"),
        (["no.mtz"], "no.mtz"),
        (["{out}/xtalfast.json"], "want a .refl or .mtz file, got '.json'"),
        (["{out}/integrated.refl", "--channel", "x"], "channel must be one of scale, prf, vi, q, sum, got 'x'"),
        (["{out}/integrated.refl", "--channel", "scale"], "intensity.scale"),
        (["{out}/integrated.refl", "--bins", "0"], "n_bins must be at least 1, got 0"),
        (["{out}/integrated.refl", "--d-min", "50"], "d_min 50 A"),
        (["{data}/predicted.refl"], "give the models with --expt"),
        (["{data}/predicted.refl", "--expt", "{data}/models.expt"], "intensity"),
    ],
)
def test_bad_input(tiny_run, capsys, arguments, message):
    filled = [part.format(out=tiny_run.directory, data=tiny_run.data.directory) for part in arguments]
    assert main(["stats", *filled]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"xtalfast: error: [^\n]+\n", error)
    assert message in error


def test_damaged_mtz(tmp_path, capsys):
    file = tmp_path / "damaged.mtz"
    file.write_bytes(b"MTZ " + bytes(40))
    assert main(["stats", str(file)]) == 2
    error = capsys.readouterr().err
    assert str(file) in error and error.count("\n") == 1
