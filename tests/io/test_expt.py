"""Experiment lists: every block in and out, with and without DIALS, and every kind of bad file."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xtalfast.errors import InputError
from xtalfast.io import ExperimentList, read_expt, write_expt
from xtalfast.models import Beam, Crystal, Detector, Experiment, Goniometer, Panel, Scan, rotation_matrix

WRITE_HARD_FILE = """
import sys, json
from scitbx.array_family import flex
from dxtbx.model import (Beam, Crystal, Detector, Experiment, ExperimentList, MultiAxisGoniometer,
                         ParallaxCorrectedPxMmStrategy, Scan)
detector = Detector()
root = detector.hierarchy()
root.set_frame((0.8, 0.6, 0), (-0.6, 0.8, 0), (1, 2, -100))
for i in range(2):
    group = root.add_group()
    group.set_local_frame((1, 0, 0), (0, 0.96, 0.28), (10 * i, 0, 3))
    for j in range(2):
        panel = group.add_panel()
        panel.set_local_frame((0.6, 0.8, 0), (-0.8, 0.6, 0), (-20 * j, 5, 1))
        panel.set_pixel_size((0.1, 0.2)); panel.set_image_size((100, 50)); panel.set_trusted_range((0, 1000))
        panel.set_name("p%d%d" % (i, j)); panel.set_gain(1.5); panel.set_pedestal(2)
        panel.set_thickness(0.3); panel.set_mu(2.5); panel.set_material("Si")
        panel.set_px_mm_strategy(ParallaxCorrectedPxMmStrategy(2.5, 0.3))
        panel.add_mask(1, 2, 3, 4)
goniometer = MultiAxisGoniometer(
    flex.vec3_double([(1, 0, 0), (0.8, 0, 0.6), (0, 1, 0)]), flex.double([20, 30, 40]),
    flex.std_string(["phi", "kappa", "omega"]), 1)
scan = Scan((3, 5), (10, 0.5)); scan.set_batch_offset(100); scan.set_exposure_times(flex.double([0.2] * 3))
crystal = Crystal((30, 0, 0), (1, 40, 0), (2, 3, 50), space_group_symbol="P 1")
crystal.set_A_at_scan_points([crystal.get_A()] * 4)
beam = Beam((0, 0, 1), 1.1)
e = Experiment(beam=beam, detector=detector, goniometer=goniometer, scan=scan, crystal=crystal, identifier="first")
still = Experiment(beam=beam, detector=detector, crystal=crystal, identifier="second")
el = ExperimentList([e, still])
el.as_file(sys.argv[1])
print(json.dumps({
    "frames": [[p.get_origin(), p.get_fast_axis(), p.get_slow_axis()] for p in detector],
    "px": [p.millimeter_to_pixel((4.0, 3.0)) for p in detector],
    "axis": goniometer.get_rotation_axis(), "fixed": goniometer.get_fixed_rotation(),
    "setting": goniometer.get_setting_rotation(), "A": crystal.get_A(),
}))
"""

READ_BACK = """
import sys, json
from dxtbx.model.experiment_list import ExperimentListFactory
el = ExperimentListFactory.from_json_file(sys.argv[1], check_format=False)
out = []
for e in el:
    out.append({
        "identifier": e.identifier, "wavelength": e.beam.get_wavelength(), "s0": e.beam.get_s0(),
        "frames": [[p.get_origin(), p.get_fast_axis(), p.get_slow_axis()] for p in e.detector],
        "gains": [p.get_gain() for p in e.detector], "masks": [[tuple(m) for m in p.get_mask()] for p in e.detector],
        "images": e.scan.get_image_range() if e.scan else None,
        "axis": e.goniometer.get_rotation_axis() if e.goniometer else None,
        "A": e.crystal.get_A(), "points": e.crystal.num_scan_points,
        "profile": e.profile.to_dict() if e.profile else None,
        "template": e.imageset.get_template() if e.scan and e.imageset else None,
        "shared": e.beam is el[0].beam,
    })
print(json.dumps(out))
"""


def rotation_experiment(folder: Path | str = "/data") -> Experiment:
    panel = Panel(
        origin=np.array([-10.0, 10.0, -100.0]),
        fast=np.array([1.0, 0, 0]),
        slow=np.array([0, -1.0, 0]),
        pixel_size=(0.1, 0.1),
        image_size=(200, 210),
        trusted_range=(0.0, 65535.0),
        mask=[(0, 100, 200, 110)],
    )
    return Experiment(
        beam=Beam(np.array([0, 0, 1.0]), 1.0),
        detector=Detector([panel]),
        goniometer=Goniometer(np.array([1.0, 0, 0])),
        scan=Scan((1, 3), (0.0, 0.1), exposure_time=0.5),
        crystal=Crystal(np.diag([1 / 30, 1 / 40, 1 / 50]), " P 2 2"),
        profile={"__id__": "gaussian_rs", "n_sigma": 3.0, "sigma_b": 0.02, "sigma_m": 0.1},
        imageset={"__id__": "ImageSequence", "template": f"{folder}/images/x_####.cbf"},
        identifier="abc",
    )


def raw_file(tmp_path: Path) -> dict[str, Any]:
    """The json of a file in tmp_path with relative image names and a block that only DIALS knows."""
    write_expt(tmp_path / "base.expt", [rotation_experiment(tmp_path)])
    raw = json.loads((tmp_path / "base.expt").read_text())
    raw["imageset"][0].update(template="images/x_####.cbf", mask="pixels.mask", params={"multi_panel": False})
    raw["crystal"][0]["B_covariance"] = [1.0]
    raw["scaling_model"] = [{"__id__": "physical", "scale": [1, 2]}]
    raw["experiment"][0]["scaling_model"] = 0
    raw["history"] = ["unknown to us"]
    return raw


def read_raw(tmp_path: Path, raw: dict[str, Any], **options: Any) -> ExperimentList:
    (tmp_path / "raw.expt").write_text(json.dumps(raw, indent=2))
    return read_expt(tmp_path / "raw.expt", **options)


@pytest.mark.dials
def test_hierarchy_parallax_and_motors_are_those_of_dxtbx(tmp_path, run_dials):
    theirs = run_dials(WRITE_HARD_FILE, tmp_path / "hard.expt")
    first, second = read_expt(tmp_path / "hard.expt")
    assert len(first.detector) == 4
    for panel, frame, px in zip(first.detector, theirs["frames"], theirs["px"]):
        np.testing.assert_allclose([panel.origin, panel.fast, panel.slow], frame, atol=1e-13)
        np.testing.assert_allclose(panel.px_from_mm(np.array([4.0, 3.0])), px, rtol=1e-13)
        assert (panel.gain, panel.pedestal, panel.material) == (1.5, 2.0, "Si")
        assert panel.mask == [(1, 2, 3, 4)] and panel.image_size == (100, 50) and panel.trusted_range == (0, 1000)
    assert [p.name for p in first.detector] == ["p00", "p01", "p10", "p11"]
    np.testing.assert_allclose(first.goniometer.lab_axis, theirs["axis"], atol=1e-15)
    np.testing.assert_allclose(first.goniometer.fixed.ravel(), theirs["fixed"], atol=1e-15)
    np.testing.assert_allclose(first.goniometer.setting.ravel(), theirs["setting"], atol=1e-15)
    assert first.scan == Scan((3, 5), (10.0, 0.5), batch_offset=100, exposure_time=0.2)
    np.testing.assert_allclose(first.crystal.A.ravel(), theirs["A"], atol=1e-16)
    assert first.crystal.A_at_scan_points.shape == (4, 3, 3)
    assert second.scan is None and second.goniometer is None and second.is_still
    assert second.beam is first.beam and second.detector is first.detector

    # Moving one panel of a hierarchy, dxtbx finds it where we put it and the others where they were.
    second.crystal = Crystal(first.crystal.A)
    step = np.array([0.5, -0.25, 1.0])
    first.detector[3].origin = first.detector[3].origin + step
    raw = json.loads((tmp_path / "hard.expt").read_text())
    write_expt(tmp_path / "moved.expt", ExperimentList([first, second], None, raw))
    moved = run_dials(READ_BACK, tmp_path / "moved.expt")
    theirs["frames"][3][0] = (np.array(theirs["frames"][3][0]) + step).tolist()
    np.testing.assert_allclose(moved[0]["frames"], theirs["frames"], atol=1e-12)
    assert moved[0]["points"] == 4 and moved[1]["points"] == 0


@pytest.mark.dials
def test_dxtbx_loads_a_list_made_from_scratch(tmp_path, run_dials):
    first = rotation_experiment()
    second = copy.copy(first)
    second.identifier, second.crystal = "def", Crystal(rotation_matrix([0, 0, 1], 0.3) @ first.crystal.A, " P 1")
    write_expt(tmp_path / "new.expt", ExperimentList.from_experiments([first, second]))
    a, b = run_dials(READ_BACK, tmp_path / "new.expt")
    assert (a["identifier"], b["identifier"]) == ("abc", "def") and b["shared"]
    np.testing.assert_allclose(a["s0"], [0, 0, -1])
    np.testing.assert_allclose(a["frames"], [[[-10, 10, -100], [1, 0, 0], [0, -1, 0]]])
    assert a["masks"] == [[[0, 100, 200, 110]]] and a["images"] == [1, 3]
    np.testing.assert_allclose(a["A"], first.crystal.A.ravel(), atol=1e-15)
    np.testing.assert_allclose(b["A"], second.crystal.A.ravel(), atol=1e-15)
    assert a["profile"]["sigma_m"] == 0.1 and a["template"] == "/data/images/x_####.cbf"


def test_from_scratch_and_back(tmp_path):
    experiment = rotation_experiment(tmp_path)
    experiment.crystal.A_at_scan_points = np.stack([experiment.crystal.A * (1 + 1e-4 * i) for i in range(4)])
    write_expt(tmp_path / "a.expt", [experiment])
    again = read_expt(tmp_path / "a.expt")[0]
    assert again.scan == experiment.scan and again.profile == experiment.profile
    assert again.imageset == experiment.imageset and again.identifier == "abc"
    np.testing.assert_array_equal(again.beam.s0, experiment.beam.s0)
    np.testing.assert_allclose(again.crystal.A, experiment.crystal.A, rtol=1e-15)
    np.testing.assert_array_equal(again.crystal.A_at_scan_points, experiment.crystal.A_at_scan_points)
    for name in ("origin", "fast", "slow"):
        np.testing.assert_array_equal(getattr(again.detector[0], name), getattr(experiment.detector[0], name))


def test_an_untouched_file_is_written_as_it_was(tmp_path):
    raw = raw_file(tmp_path)
    experiments = read_raw(tmp_path, raw)
    write_expt(tmp_path / "copy.expt", experiments)
    assert (tmp_path / "copy.expt").read_text() == (tmp_path / "raw.expt").read_text()


def test_only_what_was_changed_is_written_anew(tmp_path):
    raw = raw_file(tmp_path)
    experiments = read_raw(tmp_path, raw)
    experiments[0].identifier = "new"
    experiments[0].profile["sigma_b"] = 0.5
    experiments[0].detector[0].gain = 2.0
    write_expt(tmp_path / "copy.expt", experiments)
    expected = copy.deepcopy(raw)
    expected["experiment"][0]["identifier"] = "new"
    expected["profile"][0]["sigma_b"] = 0.5
    expected["detector"][0]["panels"][0]["gain"] = 2.0
    assert json.loads((tmp_path / "copy.expt").read_text()) == expected


def test_a_changed_crystal_loses_the_covariance_of_the_old_one(tmp_path):
    experiments = read_raw(tmp_path, raw_file(tmp_path))
    experiments[0].crystal.A = experiments[0].crystal.A * 1.01
    write_expt(tmp_path / "copy.expt", experiments)
    block = json.loads((tmp_path / "copy.expt").read_text())["crystal"][0]
    assert "B_covariance" not in block and block["real_space_a"][0] == pytest.approx(30 / 1.01)


def test_a_goniometer_with_motors_is_replaced_as_a_whole(tmp_path):
    raw = raw_file(tmp_path)
    raw["goniometer"] = [{"axes": [[1, 0, 0], [0, 1, 0]], "angles": [90, 5], "names": ["a", "b"], "scan_axis": 1}]
    experiments = read_raw(tmp_path, raw)
    goniometer = experiments[0].goniometer
    np.testing.assert_allclose(goniometer.fixed, rotation_matrix([1, 0, 0], np.pi / 2), atol=1e-15)
    np.testing.assert_allclose(goniometer.axis, [0, 1, 0])
    goniometer.setting = rotation_matrix([0, 0, 1], 0.1)
    write_expt(tmp_path / "copy.expt", experiments)
    again = read_expt(tmp_path / "copy.expt")[0].goniometer
    np.testing.assert_allclose(again.setting, goniometer.setting)
    np.testing.assert_allclose(again.fixed, goniometer.fixed)


def test_image_names_follow_the_file_and_the_image_dir(tmp_path):
    raw = raw_file(tmp_path)
    imageset = read_raw(tmp_path, raw)[0].imageset
    assert imageset["template"] == str(tmp_path / "images/x_####.cbf")
    assert imageset["mask"] == str(tmp_path / "pixels.mask")

    moved = tmp_path / "elsewhere"
    (moved / "images").mkdir(parents=True)
    assert read_raw(tmp_path, raw, image_dir=moved)[0].imageset["template"] == str(moved / "images/x_####.cbf")
    flat = tmp_path / "flat"
    flat.mkdir()
    experiments = read_raw(tmp_path, raw, image_dir=flat)
    assert experiments[0].imageset["template"] == str(flat / "x_####.cbf")

    (tmp_path / "out").mkdir()
    write_expt(tmp_path / "out" / "a.expt", read_raw(tmp_path, raw))
    written = json.loads((tmp_path / "out" / "a.expt").read_text())["imageset"][0]
    assert written["template"] == "../images/x_####.cbf" and written["mask"] == "../pixels.mask"
    assert read_expt(tmp_path / "out" / "a.expt")[0].imageset["template"] == str(tmp_path / "images/x_####.cbf")
    write_expt(tmp_path / "out" / "b.expt", experiments)
    assert read_expt(tmp_path / "out" / "b.expt")[0].imageset["template"] == str(flat / "x_####.cbf")


def test_image_lists_and_variables_in_names(tmp_path, monkeypatch):
    monkeypatch.setenv("XTALFAST_TEST_IMAGES", "/somewhere")
    raw = raw_file(tmp_path)
    raw["imageset"][0] = {"__id__": "ImageSet", "images": ["a.cbf", "/abs/b.cbf", "$XTALFAST_TEST_IMAGES/c.cbf"]}
    experiments = read_raw(tmp_path, raw)
    assert experiments[0].imageset["images"] == [str(tmp_path / "a.cbf"), "/abs/b.cbf", "/somewhere/c.cbf"]
    write_expt(tmp_path / "copy.expt", experiments)
    assert (tmp_path / "copy.expt").read_text() == (tmp_path / "raw.expt").read_text()


def test_scans_of_the_newer_layout(tmp_path):
    raw = raw_file(tmp_path)
    raw["scan"][0] = {
        "image_range": [5, 7],
        "batch_offset": 2,
        "properties": {"oscillation": [1.0, 1.5, 2.0], "exposure_time": [0.1] * 3, "epochs": [0.0] * 3},
        "valid_image_ranges": {},
    }
    experiments = read_raw(tmp_path, raw)
    assert experiments[0].scan == Scan((5, 7), (1.0, 0.5), batch_offset=2, exposure_time=0.1)
    write_expt(tmp_path / "copy.expt", experiments)
    assert (tmp_path / "copy.expt").read_text() == (tmp_path / "raw.expt").read_text()

    raw["scan"][0] = {"image_range": [5, 5], "properties": {"oscillation": [1.0], "oscillation_width": [0.5]}}
    assert read_raw(tmp_path, raw)[0].scan.oscillation == (1.0, 0.5)
    raw["scan"][0] = {"image_range": [1, 3], "properties": {"oscillation": [1.0, 1.5, 4.0]}}
    with pytest.raises(InputError, match="scan 0: images must be of equal width"):
        read_raw(tmp_path, raw)
    raw["scan"][0] = {"image_range": [1, 3], "exposure_time": [], "oscillation": [0, 0.1], "batch_offset": 0}
    assert read_raw(tmp_path, raw)[0].scan.exposure_time == 0.0


def test_select_keeps_the_blocks_and_a_changed_length_is_refused(tmp_path):
    raw = raw_file(tmp_path)
    raw["experiment"].append({**raw["experiment"][0], "identifier": "second"})
    experiments = read_raw(tmp_path, raw)
    assert experiments[0].beam is experiments[1].beam
    write_expt(tmp_path / "one.expt", experiments.select([1]))
    one = read_expt(tmp_path / "one.expt")
    assert [e.identifier for e in one] == ["second"] and one.raw["history"] == ["unknown to us"]
    del experiments[0]
    with pytest.raises(InputError, match="read with 2 experiments and now has 1"):
        write_expt(tmp_path / "bad.expt", experiments)


def test_a_model_replaced_in_one_experiment_leaves_the_other_alone(tmp_path):
    raw = raw_file(tmp_path)
    raw["experiment"].append({**raw["experiment"][0], "identifier": "second"})
    experiments = read_raw(tmp_path, raw)
    experiments[0].beam = Beam(np.array([0, 0, 1.0]), 2.0)
    experiments[1].crystal = None
    write_expt(tmp_path / "copy.expt", experiments)
    first, second = read_expt(tmp_path / "copy.expt")
    assert (first.beam.wavelength, second.beam.wavelength) == (2.0, 1.0)
    assert first.crystal is not None and second.crystal is None


def test_missing_optional_models_are_none(tmp_path):
    raw = raw_file(tmp_path)
    raw["experiment"][0] = {"__id__": "Experiment", "identifier": "", "beam": 0, "detector": 0, "profile": None}
    raw["crystal"] = [None]
    raw["experiment"][0]["crystal"] = 0
    experiment = read_raw(tmp_path, raw)[0]
    assert experiment.scan is experiment.goniometer is experiment.crystal is experiment.imageset is None
    assert experiment.is_still


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("__id__",), "DataBlock", "'__id__': 'ExperimentList'), got 'DataBlock'"),
        (("experiment",), [], "at least one experiment, got none"),
        (("experiment", 0, "beam"), None, "experiment 0 has no beam; wanted one"),
        (("experiment", 0, "detector"), 3, "experiment 0 names detector 3, the file has 1"),
        (("experiment", 0, "crystal"), "crystal.json", "names crystal 'crystal.json'"),
        (("beam", 0), {"__id__": "polychromatic"}, "beam 0: wanted a monochromatic beam, got polychromatic"),
        (("beam", 0, "wavelength"), -1.0, "beam 0: wavelength must be positive, got -1.0"),
        (("beam", 0, "direction"), [0, 0, 0], "beam 0: direction must have a direction"),
        (("beam", 0, "direction"), [0, 1], "beam 0: direction must be 3 finite numbers, got [0, 1]"),
        (("detector", 0, "panels"), [], "detector 0: wanted at least one panel"),
        (("detector", 0, "panels", 0, "origin"), "far", "detector 0 panel 0: origin must be 3 finite numbers"),
        (("detector", 0, "panels", 0, "pixel_size"), [0, 1], "panel 0: pixel_size and image_size must be positive"),
        (("detector", 0, "panels", 0, "gain"), "high", "panel 0: gain must be a number, got 'high'"),
        (
            ("detector", 0, "panels", 0, "px_mm_strategy"),
            {"type": "ParallaxCorrectedPxMmStrategy"},
            "parallax correction needs mu > 0 and thickness > 0, got 0.0 and 0.0",
        ),
        (("detector", 0, "panels", 0, "px_mm_strategy"), {"type": "Odd"}, "px_mm_strategy 'Odd' is unknown"),
        (("detector", 0, "hierarchy"), {"panel": 7}, "hierarchy names panel 7, there are 1 panels"),
        (("goniometer", 0, "rotation_axis"), [0, 0, 0], "goniometer 0: rotation_axis must have a direction"),
        (("goniometer", 0), {"axes": [[1, 0, 0]], "angles": [0], "scan_axis": 1}, "scan_axis must number one of 1"),
        (("scan", 0, "image_range"), [3, 1], "scan 0: image_range must hold an image, got 3 to 1"),
        (("scan", 0), {"oscillation": [0, 1]}, "scan 0: wanted the key 'image_range', got oscillation"),
        (("crystal", 0, "real_space_a"), [0, 0, 0], "crystal 0: real_space_a, b, c must span space"),
        (("crystal", 0, "A_at_scan_points"), [[1.0] * 9] * 3, "one point more than images, got 3 and 3 images"),
        (("crystal", 0, "A_at_scan_points"), [[1.0] * 8] * 4, "must be [n_images + 1, 9], got [4, 8]"),
        (("crystal", 0), 5, "crystal must be a list of blocks, got [5]"),
        (("imageset", 0, "template"), 5, "imageset 0 is malformed"),
        (("detector", 0, "panels", 0, "mask"), [[1, 2]], "detector 0 is malformed"),
    ],
)
def test_bad_blocks_say_where_and_what(tmp_path, path, value, message):
    raw = raw_file(tmp_path)
    *parents, key = path
    block: Any = raw
    for parent in parents:
        block = block[parent]
    block[key] = value
    with pytest.raises(InputError) as caught:
        read_raw(tmp_path, raw)
    assert message in str(caught.value) and "raw.expt" in str(caught.value) and "\n" not in str(caught.value)


def test_bad_files_say_what_they_are(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*: No such file"):
        read_expt(tmp_path / "none.expt")
    for content in (b"", b"{", b"\x93\xbbdials::af", b"[]"):
        (tmp_path / "bad.expt").write_bytes(content)
        with pytest.raises(InputError, match=r"bad.expt: wanted a DIALS experiment list"):
            read_expt(tmp_path / "bad.expt")
