"""Bad input through the command line: one line on stderr that says what to do, exit status 2, and nothing lost."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xtalfast.cli import main
from xtalfast.integration.simulate import SimulationResult
from xtalfast.io import Flag, RawColumn, ReflectionTable, read_expt, read_refl, write_expt, write_refl

EARLIER = b"of an earlier run"


def integrate(data: SimulationResult, out: Path, *more: str) -> int:
    return main(["integrate", str(data.expt), str(data.refl), "-o", str(out), "--epochs", "3", "--quiet", *more])


def refused(capsys: pytest.CaptureFixture[str], data: SimulationResult, *more: str) -> str:
    """The message of an integration that must fail, without touching what an earlier one left in the directory."""
    out = data.directory / "out"
    out.mkdir()
    for name in ("integrated.refl", "unmerged.mtz"):
        (out / name).write_bytes(EARLIER)
    capsys.readouterr()
    status = integrate(data, out, *more)
    captured = capsys.readouterr()
    assert status == 2, captured.err
    assert captured.out == ""
    assert captured.err.startswith("xtalfast: error: ") and captured.err.count("\n") == 1, captured.err
    assert (out / "integrated.refl").read_bytes() == (out / "unmerged.mtz").read_bytes() == EARLIER
    assert not list(out.rglob(".*.part"))
    return captured.err


def edit_expt(data: SimulationResult, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(data.expt.read_text())
    change(content)
    data.expt.write_text(json.dumps(content))


def edit_refl(data: SimulationResult, change: Callable[[ReflectionTable], ReflectionTable | None]) -> None:
    table = read_refl(data.refl)
    changed = change(table)
    write_refl(data.refl, table if changed is None else changed)


# What is done to image 4 of 6, and what is said about it.


def overwrite(path: Path, at: int, bits: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= bits
    path.write_bytes(content)


IMAGES = {
    "missing": (lambda path: path.unlink(), r"is missing \(1 of 6 files\); put it back, or .* --image-dir"),
    "empty": (lambda path: path.write_bytes(b""), "got an empty file; fetch it again"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:9000]), "the file is truncated, fetch it again"),
    "longer": (lambda path: path.write_bytes(path.read_bytes().replace(b"Size: 4", b"Size: 3", 1)), "bytes"),
    "corrupt": (lambda path: overwrite(path, 20_000, 0x80), "the bytes are damaged, fetch the file again"),
    "no image": (lambda path: path.write_bytes(b"not a CBF" * 1000), "wanted a CBF image"),
    "directory": (lambda path: (path.unlink(), path.mkdir()), "is missing"),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_bad_image(tiny_copy, capsys, kind):
    spoil, message = IMAGES[kind]
    spoil(tiny_copy.images[3])
    error = refused(capsys, tiny_copy)
    assert str(tiny_copy.images[3]) in error
    assert re.search(message, error), error


def test_changed_pixel_is_found_with_verify(tiny_copy, capsys):
    overwrite(tiny_copy.images[3], 20_000, 0x01)  # a valid stream of other counts
    error = refused(capsys, tiny_copy, "--verify")
    assert str(tiny_copy.images[3]) in error and "MD5" in error


def test_repaired_image_gives_the_result_of_a_run_without_trouble(tiny_run, tiny_copy, capsys):
    content = tiny_copy.images[3].read_bytes()
    tiny_copy.images[3].unlink()
    refused(capsys, tiny_copy)
    tiny_copy.images[3].write_bytes(content)
    out = tiny_copy.directory / "out"
    assert integrate(tiny_copy, out) == 0
    assert (out / "integrated.refl").read_bytes() == (tiny_run.directory / "integrated.refl").read_bytes()


def test_fewer_images_than_the_scan(tiny_copy, capsys):
    edit_expt(tiny_copy, lambda content: content["scan"][0].update(image_range=[1, 9]))
    assert "sim_0007.cbf is missing (3 of 9 files)" in refused(capsys, tiny_copy)


def test_wrong_detector(tiny_copy, capsys):
    edit_expt(tiny_copy, lambda content: content["detector"][0]["panels"][0].update(image_size=[487, 619]))
    assert "wanted 487 x 619 pixels (fast x slow) as in the .expt, got 200 x 200" in refused(capsys, tiny_copy)


def test_images_are_not_where_image_dir_says(tiny_copy, capsys):
    assert "(6 of 6 files)" in refused(capsys, tiny_copy, "--image-dir", str(tiny_copy.directory / "elsewhere"))


def test_gain_without_whole_photons(tiny_copy, capsys):
    edit_expt(tiny_copy, lambda content: content["detector"][0]["panels"][0].update(gain=1.7))
    assert "gain 1.7 and pedestal 0 do not give whole photons" in refused(capsys, tiny_copy)


def put(name: str, values: Any) -> Callable[[ReflectionTable], None]:
    def change(table: ReflectionTable) -> None:
        table.columns[name] = np.broadcast_to(values, (len(table), *np.shape(values))).copy()

    return change


def drop(name: str) -> Callable[[ReflectionTable], None]:
    return lambda table: table.columns.__delitem__(name)


def shift(table: ReflectionTable) -> None:
    table["xyzcal.px"][:, 2] += 100


def rename(table: ReflectionTable) -> None:
    table.identifiers[0] = "a-stranger"


TABLES: dict[str, tuple[Callable[[ReflectionTable], ReflectionTable | None], str]] = {
    "no miller_index": (drop("miller_index"), "no column 'miller_index'; present: id, panel, .*xtalfast predict"),
    "no xyzcal.px": (drop("xyzcal.px"), "no column 'xyzcal.px'; present: miller_index, .*xtalfast predict"),
    "empty": (lambda table: table.select(np.zeros(0, np.int64)), "the table is empty; predict reflections first"),
    "all NaN": (put("xyzcal.px", [np.nan] * 3), r"none .* can be integrated \(249 with a position that is not finite"),
    "out of the scan": (shift, r"none of the 249 .* \(249 outside the scan"),
    "not indexed": (put("id", np.int32(-1)), r"none of the 249 .* \(249 not indexed \(id -1\)"),
    "id unknown": (put("id", np.int32(3)), "id 3 in the reflections, but there are 1 experiments"),
    "panel unknown": (put("panel", np.uint64(3)), "panel 3 in the reflections, but the detector .* has 1 panels"),
    "identifier unknown": (rename, "identifier a-stranger is not in .*models.expt"),
    "scalar positions": (
        put("xyzcal.px", 1.0),
        r"'xyzcal.px' must be real numbers \[N, 3\], got float64 \[249\]",
    ),
    "real Miller indices": (put("miller_index", [1.0, 2.0, 3.0]), r"'miller_index' must be integers \[N, 3\]"),
    "real ids": (put("id", 0.0), r"column 'id' must be integers \[N\], got float64 \[249\]"),
}


@pytest.mark.parametrize("kind", TABLES)
def test_bad_reflections(tiny_copy, capsys, kind):
    change, message = TABLES[kind]
    edit_refl(tiny_copy, change)
    error = refused(capsys, tiny_copy)
    assert re.search(message, error), error


FILES = {
    "missing": (lambda path: path.unlink(), "No such file"),
    "empty": (lambda path: path.write_bytes(b""), "an empty file|no json"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "truncated|no json"),
    "something else": (lambda path: path.write_bytes(b"\x93NUMPY"), "something else|no json"),
    "directory": (lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("name", ["expt", "refl"])
def test_bad_file(tiny_copy, capsys, name, kind):
    spoil, message = FILES[kind]
    path = getattr(tiny_copy, name)
    spoil(path)
    error = refused(capsys, tiny_copy)
    assert str(path) in error
    assert re.search(message, error), error


def test_files_in_the_wrong_order(tiny_copy, capsys):
    swapped = SimulationResult(tiny_copy.directory, tiny_copy.images, tiny_copy.refl, tiny_copy.expt, tiny_copy.truth)
    assert f"{tiny_copy.refl}: wanted a DIALS experiment list" in refused(capsys, swapped)


OPTIONS = {
    "--preset x": "preset must be one of default, paper or a .toml file, got x",
    "--preset x.toml": "preset: no file x.toml",
    "--encoder x": "encoder.kind must be 'cnn' or 'fc', got 'x'",
    "--profile x": "profile.kind must be 'mvn' or 'softmax' or 'lowrank' or 'dials', got 'x'",
    "--publish x": "publish must be one of likelihood, posterior, got 'x'",
    "--box 3,21": "--box wants three numbers z,y,x such as 3,21,21, got '3,21'",
    "--box 0,21,21": "box must be three positive sizes z, y, x, got (0, 21, 21)",
    "--box 3,999,21": "box 3 x 999 x 21 (z, y, x) is larger than the largest panel, 200 x 200 (slow x fast)",
    "--d-min 0": "d_min must be a positive resolution in A, got 0.0",
    "--d-min 50": "d_min 50.0 A leaves no reflection; the best resolution in the table is 2.60 A",
    "--epochs 0": "epochs must be at least 1, got 0",
    "--epochs x": "Invalid value for '--epochs'",
    "--seed -1": "seed must be from 0 to 2^63 - 1, got -1",
    "--device x": "device must be auto, cpu, cuda or cuda:N, got 'x'",
    "--device cuda:99": "device 'cuda:99': torch sees",
    "--truth x.npz": "truth: no file x.npz; give the truth.npz that `xtalfast simulate` wrote",
    "--weights x.ckpt": "weights: no file x.ckpt; give the .ckpt that `xtalfast train integration` wrote",
    "--wrong": "No such option: --wrong",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_bad_option(tiny_copy, capsys, option):
    assert OPTIONS[option] in refused(capsys, tiny_copy, *option.split())


def test_weights_that_are_none(tiny_copy, capsys):
    for name, content in (("text", b"not a checkpoint"), ("empty", b"")):
        file = tiny_copy.directory / f"{name}.ckpt"
        file.write_bytes(content)
        arguments = ["integrate", str(tiny_copy.expt), str(tiny_copy.refl), "-o", str(tiny_copy.directory / "out")]
        assert main([*arguments, "--quiet", "--weights", str(file)]) == 2
        assert f"{file}: not a checkpoint" in capsys.readouterr().err


def test_settings_of_the_network_contradict_given_weights(tiny_run, tiny_copy, capsys):
    checkpoint = next(tiny_run.directory.glob("training/*/best.ckpt"))
    error = refused(capsys, tiny_copy, "--weights", str(checkpoint))  # with --epochs
    assert "--epochs is part of the trained network: leave it out with --weights" in error


def test_directory_of_another_job(tiny_run, tmp_path, capsys):
    """Neither shoeboxes nor training of another job are taken for those of this one; --restart replaces them."""
    out = tmp_path / "out"
    arguments = tiny_run.arguments(out)
    assert main([*arguments, "--d-min", "4"]) == 0
    first = (out / "integrated.refl").read_bytes()
    capsys.readouterr()
    assert main(arguments) == 2
    assert "holds the store of another job (other reflections, models or box)" in capsys.readouterr().err
    assert main([*arguments, "--d-min", "4", "--seed", "5"]) == 2
    error = capsys.readouterr().err
    assert "last.ckpt is of a run with another seed; start anew with --restart" in error
    assert (out / "integrated.refl").read_bytes() == first
    assert main([*arguments, "--restart"]) == 0
    assert (out / "integrated.refl").read_bytes() == (tiny_run.directory / "integrated.refl").read_bytes()


DAMAGED = {
    "shoeboxes/store.json": b'{"format": ',
    "shoeboxes/counts-00000.npy": b"\x93NUMPY\x01\x00",
    "shoeboxes/meta-bbox.npy": b"",
    "profiles.npz": b"PK\x03\x04 cut short",
    "training/default-cnn-dials/last.ckpt": b"PK\x03\x04 cut short",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_intermediate_files(tiny_run, tmp_path, capsys, name):
    out = tmp_path / "out"
    shutil.copytree(tiny_run.directory, out)
    (out / name).write_bytes(DAMAGED[name])
    assert main(tiny_run.arguments(out)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(out / name).removesuffix("/meta-bbox.npy") in error
    assert (out / "integrated.refl").read_bytes() == (tiny_run.directory / "integrated.refl").read_bytes()


# Input that is unusual, not wrong: integrated as far as it goes, and marked.


@pytest.mark.filterwarnings("error")
def test_nan_rows_are_kept_and_not_integrated(tiny_run, tiny_copy):
    bad = np.array([3, 77, 150])

    def spoil(table):
        table["xyzcal.px"][bad] = [[np.nan] * 3, [10.0, np.inf, 2.5], [10.0, 10.0, np.nan]]
        table["s1"][200] = np.nan  # computed again from the position

    edit_refl(tiny_copy, spoil)
    out = tiny_copy.directory / "out"
    assert integrate(tiny_copy, out) == 0
    table, clean = read_refl(out / "integrated.refl"), read_refl(tiny_run.directory / "integrated.refl")
    assert len(table) == len(clean)
    flags = table["flags"][bad]
    assert not (flags & np.uint64(Flag.Integrated)).any()
    rest = np.setdiff1d(np.arange(len(table)), bad)
    for channel in ("prf", "sum", "vi"):
        assert np.isfinite(table[f"intensity.{channel}.value"][rest]).all()
        assert not table[f"intensity.{channel}.value"][bad].any()
    lost = table.has_flags(Flag.IntegratedPrf)[rest] != clean.has_flags(Flag.IntegratedPrf)[rest]
    assert not lost.any()


def test_panel_without_reflections(tiny_run, tiny_copy):
    """Two panels of one image, all reflections on the first: what is on it does not notice."""
    edge = 100  # the slow pixel where the detector is divided, between two modules

    def divide(content):
        panels = content["detector"][0]["panels"]
        second = json.loads(json.dumps(panels[0]))
        height = panels[0]["image_size"][1] - edge
        step = edge * panels[0]["pixel_size"][1]
        second["origin"] = [o + step * a for o, a in zip(second["origin"], second["slow_axis"])]
        second.update(image_size=[panels[0]["image_size"][0], height], raw_image_offset=[0, edge], name="second")
        second["mask"] = []
        panels[0]["image_size"][1] = edge
        panels[0]["mask"] = []
        panels.append(second)
        children = content["detector"][0].get("hierarchy", {}).get("children")
        if children is not None:
            children.append({"panel": 1})

    edit_expt(tiny_copy, divide)
    edit_refl(tiny_copy, lambda table: table.select(table["xyzcal.px"][:, 1] < edge))
    assert len(read_expt(tiny_copy.expt)[0].detector) == 2
    out = tiny_copy.directory / "out"
    assert integrate(tiny_copy, out) == 0
    table, clean = read_refl(out / "integrated.refl"), read_refl(tiny_run.directory / "integrated.refl")
    clean = clean.select(clean["xyzcal.px"][:, 1] < edge)
    np.testing.assert_array_equal(table["miller_index"], clean["miller_index"])
    inside = (clean["bbox"][:, 3] <= edge - 16) & clean.has_flags(Flag.IntegratedSum)  # clear of the divided edge
    assert inside.sum() > 20 and table.has_flags(Flag.IntegratedSum)[inside].all()


def test_column_of_unknown_type_is_carried_along(tiny_copy):
    column = RawColumn("std::complex<float>", len(read_refl(tiny_copy.refl)), bytes(range(249)) * 8)
    edit_refl(tiny_copy, lambda table: table.columns.update(strange=column))
    assert integrate(tiny_copy, tiny_copy.directory / "out") == 0
    assert read_refl(tiny_copy.directory / "out" / "integrated.refl").columns["strange"] == column


def test_one_reflection_is_enough(tiny_copy):
    edit_refl(tiny_copy, lambda table: table.select(np.array([100])))
    out = tiny_copy.directory / "out"
    assert integrate(tiny_copy, out) == 0
    assert len(read_refl(out / "integrated.refl")) == 1


def test_models_without_a_crystal_give_no_mtz_and_say_so(tiny_copy):
    """Indexed reflections with the models of an import: nothing says what cell they have."""
    experiments = read_expt(tiny_copy.expt)
    experiments[0].crystal = None
    bare = type(experiments).from_experiments(experiments)
    write_expt(tiny_copy.expt, bare)
    edit_refl(tiny_copy, lambda table: table.identifiers.clear())
    out = tiny_copy.directory / "out"
    assert integrate(tiny_copy, out) == 0
    assert not (out / "unmerged.mtz").exists()
    assert "no unmerged.mtz: the models have no crystal" in (out / "xtalfast.log").read_text()
