"""`xtalfast integrate`: its files, and what each option does to them."""

from __future__ import annotations

import json
import subprocess

import gemmi
import numpy as np
import pytest

from xtalfast.cli import main
from xtalfast.io import Flag, read_expt, read_refl


def test_files(tiny_run):
    names = {"integrated.refl", "integrated.expt", "unmerged.mtz", "xtalfast.json", "report.html", "xtalfast.log"}
    assert names <= {path.name for path in tiny_run.directory.iterdir()}
    assert "integrated.expt" in (tiny_run.directory / "report.html").read_text()


def test_log_names_the_stages_with_times(tiny_run):
    text = (tiny_run.directory / "xtalfast.log").read_text()
    for stage in ("extracted 249 shoeboxes", "shoeboxes and profiles:", "step 3 of 3", "estimates:"):
        assert stage in text
    assert all(line[:2] == "20" for line in text.splitlines())  # each begins with its date


def test_record_tells_what_was_done(tiny_run):
    record = json.loads((tiny_run.directory / "xtalfast.json").read_text())
    assert record["parameters"]["epochs"] == 3 and record["parameters"]["seed"] == 0
    assert record["parameters"]["reflections"] == str(tiny_run.data.refl)
    assert record["versions"].keys() >= {"xtalfast", "torch", "numpy", "gemmi", "python"}
    assert "CPU" in record["device"] or record["device"]
    assert len(record["history"]) == 3
    assert set(record["files"]) <= {path.name for path in tiny_run.directory.iterdir()}


def test_unmerged_mtz_has_the_labels_that_programs_ask_for(tiny_run):
    mtz = gemmi.read_mtz_file(str(tiny_run.directory / "unmerged.mtz"))
    labels = "H K L M/ISYM BATCH I SIGI BG SIGBG XDET YDET ROT LP".split()
    assert [column.label for column in mtz.columns][: len(labels)] == labels
    table = read_refl(tiny_run.directory / "integrated.refl")
    fitted = table.has_flags(Flag.IntegratedPrf) & (table["intensity.prf.variance"] > 0)
    assert 0 < mtz.nreflections <= fitted.sum()
    crystal = read_expt(tiny_run.directory / "integrated.expt")[0].crystal
    assert mtz.spacegroup == crystal.space_group
    assert mtz.get_cell().parameters == pytest.approx(crystal.cell.parameters, rel=1e-6)
    assert {batch.number for batch in mtz.batches} == set(range(1, 7))


def integrate(run, out, *options):
    """An integration whose network takes one step."""
    data = [str(run.data.expt), str(run.data.refl)]
    assert main(["integrate", *data, "-o", str(out), "--quiet", *options]) == 0
    return read_refl(out / "integrated.refl")


def test_publish_posterior_puts_the_network_into_prf(tiny_run, tmp_path):
    checkpoint = str(next(tiny_run.directory.glob("training/*/best.ckpt")))
    usual = read_refl(tiny_run.directory / "integrated.refl")
    table = integrate(tiny_run, tmp_path, "--weights", checkpoint, "--publish", "posterior")
    for part in ("value", "variance"):
        # The network given as weights is the one that was trained: the same estimates.
        np.testing.assert_array_equal(table[f"intensity.q.{part}"], usual[f"intensity.q.{part}"])
        np.testing.assert_array_equal(table[f"intensity.prf.{part}"], usual[f"intensity.q.{part}"])
        np.testing.assert_array_equal(table[f"intensity.sum.{part}"], usual[f"intensity.sum.{part}"])
    fitted = table.has_flags(Flag.IntegratedPrf)
    assert (table["intensity.prf.value"][fitted] > 0).all()  # a mean under a positive prior
    assert not (tmp_path / "training").exists()


def test_d_min_leaves_rows_out_of_the_integration_not_of_the_table(tiny_run, tmp_path):
    table = integrate(tiny_run, tmp_path, "--d-min", "4", "--epochs", "1")
    usual = read_refl(tiny_run.directory / "integrated.refl")
    np.testing.assert_array_equal(table["miller_index"], usual["miller_index"])
    beyond = table["d"] < 4
    assert 0 < beyond.sum() < len(table)
    assert not table.has_flags(Flag.Integrated)[beyond].any()
    assert not table["intensity.prf.value"][beyond].any()
    kept = usual.has_flags(Flag.IntegratedSum) & ~beyond
    assert table.has_flags(Flag.IntegratedSum)[kept].all()


def test_network_box_and_seed_reach_the_run(tiny_run, tmp_path):
    options = ["--encoder", "fc", "--profile", "mvn", "--box", "3,15,17", "--seed", "7", "--epochs", "1"]
    table = integrate(tiny_run, tmp_path, *options)
    record = json.loads((tmp_path / "xtalfast.json").read_text())
    assert record["parameters"]["combination"].lower() == "fc/mvn"
    assert record["network"]["box"] == [3, 15, 17]
    size = table["bbox"][:, 1::2] - table["bbox"][:, ::2]
    assert (size == [17, 15, 3]).all()
    # The box of given weights is theirs.
    again = integrate(tiny_run, tmp_path / "again", "--weights", str(next(tmp_path.glob("training/*/best.ckpt"))))
    np.testing.assert_array_equal(again["intensity.prf.value"], table["intensity.prf.value"])


def test_truth_changes_nothing_but_the_report(tiny_run, tmp_path):
    checkpoint = str(next(tiny_run.directory.glob("training/*/best.ckpt")))
    integrate(tiny_run, tmp_path, "--weights", checkpoint, "--truth", str(tiny_run.data.truth))
    assert (tmp_path / "integrated.refl").read_bytes() == (tiny_run.directory / "integrated.refl").read_bytes()
    assert "truth" in (tmp_path / "report.html").read_text()


def test_summary_names_what_was_changed_and_written(tiny_run, tmp_path, capsys):
    checkpoint = str(next(tiny_run.directory.glob("training/*/best.ckpt")))
    data = [str(tiny_run.data.expt), str(tiny_run.data.refl)]
    assert main(["integrate", *data, "-o", str(tmp_path), "--weights", checkpoint]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].startswith("249 reflections: ")
    assert f"changed: weights = {checkpoint}" in lines
    assert f"wrote {tmp_path}/integrated.refl" in lines


@pytest.mark.dials
def test_dials_opens_the_table(tiny_run):
    file = tiny_run.directory / "integrated.refl"
    done = subprocess.run(["dials.show", str(file)], capture_output=True, text=True, cwd=tiny_run.data.directory)
    assert done.returncode == 0, done.stderr
    assert "intensity.prf.variance" in done.stdout and "249" in done.stdout


@pytest.mark.dials
def test_dials_scales_and_merges(tmp_path):
    """A wedge wide enough for equivalents, from our images to a merged MTZ by way of dials.scale."""
    wedge = ["--images", "40", "--oscillation", "1", "--d-min", "3"]
    assert main(["simulate", "-o", str(tmp_path), "--tiny", *wedge, "--quiet"]) == 0
    data = [str(tmp_path / "models.expt"), str(tmp_path / "predicted.refl")]
    assert main(["integrate", *data, "-o", str(tmp_path / "out"), "--epochs", "1", "--quiet"]) == 0
    integrated = ["out/integrated.expt", "out/integrated.refl"]
    for program in (["dials.scale", *integrated], ["dials.merge", "scaled.expt", "scaled.refl"]):
        done = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    mtz = gemmi.read_mtz_file(str(tmp_path / "merged.mtz"))
    assert not mtz.batches and mtz.nreflections > 300
    scaled = read_refl(tmp_path / "scaled.refl")
    assert scaled.has_flags(Flag.Scaled).mean() > 0.5
