"""The experiment models against dxtbx, and the identities that hold without it."""

from __future__ import annotations

import json

import gemmi
import numpy as np
import pytest

from xtalfast.errors import InputError
from xtalfast.io import ExperimentList, read_expt, write_expt
from xtalfast.models import Beam, Crystal, Detector, Experiment, Goniometer, Panel, Scan, rotation_matrix

DXTBX_VALUES = """
import sys, json
from dxtbx.model.experiment_list import ExperimentListFactory
e = ExperimentListFactory.from_json_file(sys.argv[1], check_format=False)[0]
px, z, angle = json.loads(sys.argv[2])
panels = []
for p in e.detector:
    mm = [p.pixel_to_millimeter(tuple(x)) for x in px]
    lab = [p.get_pixel_lab_coord(tuple(x)) for x in px]
    panels.append({
        "frame": [p.get_origin(), p.get_fast_axis(), p.get_slow_axis(), p.get_normal()],
        "mm": mm, "lab": lab, "px": [p.millimeter_to_pixel(x) for x in mm],
        "ray": [p.get_ray_intersection(x) for x in lab],
    })
g, s, c = e.goniometer, e.scan, e.crystal
from scitbx import matrix
R = matrix.col(g.get_rotation_axis_datum()).axis_and_angle_as_r3_rotation_matrix(angle)
S, F = matrix.sqr(g.get_setting_rotation()), matrix.sqr(g.get_fixed_rotation())
print(json.dumps({
    "s0": e.beam.get_s0(), "panels": panels, "axis": g.get_rotation_axis(), "rotation": (S * R * F).elems,
    "phi": [s.get_angle_from_array_index(x, deg=False) for x in z],
    "z": [s.get_array_index_from_angle(s.get_angle_from_array_index(x, deg=False), deg=False) for x in z],
    "A": c.get_A(), "U": c.get_U(), "B": c.get_B(), "cell": c.get_unit_cell().parameters(),
    "d": c.get_unit_cell().d((1, -2, 3)), "group": c.get_space_group().type().number(),
    "points": [c.get_A_at_scan_point(i) for i in range(c.num_scan_points)],
}))
"""

HALL_SYMBOLS = """
import json
from cctbx import sgtbx
groups = [(s.hall(), s.number()) for s in sgtbx.space_group_symbol_iterator()]
groups += [(sgtbx.space_group_info(group=sgtbx.space_group(h)).type().hall_symbol(), n) for h, n in groups]
print(json.dumps([(h, n, len(sgtbx.space_group(h))) for h, n in groups]))
"""


def tilted(angles: tuple[float, float, float]) -> np.ndarray:
    return (
        rotation_matrix([1, 0, 0], angles[0])
        @ rotation_matrix([0, 1, 0], angles[1])
        @ rotation_matrix([0, 0, 1], angles[2])
    )


def difficult_experiment() -> Experiment:
    """Two tilted panels with a thick sensor, an oblique goniometer that rotates either way, a triclinic crystal."""
    panels = []
    for i, angles in enumerate([(0.1, -0.2, 0.3), (-0.3, 0.1, 2.0)]):
        frame = tilted(angles) @ np.diag([1.0, -1.0, -1.0])
        origin = frame @ np.array([-60.0, -55.0, 150.0 + 20 * i])
        panels.append(
            Panel(
                origin=origin,
                fast=frame[:, 0],
                slow=frame[:, 1],
                pixel_size=(0.172, 0.1),
                image_size=(500, 700),
                thickness=0.45,
                mu=3.83,
                material="Si",
                parallax=True,
                name=f"panel {i}",
            )
        )
    axis = np.array([0.8, 0.0, 0.6])
    A = tilted((0.4, 1.1, -0.7)) @ Crystal.from_cell(gemmi.UnitCell(31.1, 42.2, 53.3, 81, 95, 102)).A
    points = np.stack([tilted((1e-3 * i, 0, 2e-3 * i)) @ A for i in range(6)])
    return Experiment(
        beam=Beam(direction=np.array([0.01, -0.02, 1.0]) / np.linalg.norm([0.01, -0.02, 1.0]), wavelength=0.976),
        detector=Detector(panels),
        goniometer=Goniometer(axis, fixed=tilted((0.2, 0.1, -0.5)), setting=tilted((-0.1, 0.3, 0.2))),
        scan=Scan(image_range=(4, 8), oscillation=(-33.0, 0.25), exposure_time=0.1),
        crystal=Crystal(A=A, hall_symbol=" P 1", A_at_scan_points=points),
        identifier="difficult",
    )


@pytest.mark.dials
def test_geometry_is_that_of_dxtbx(tmp_path, run_dials):
    experiment = difficult_experiment()
    write_expt(tmp_path / "x.expt", [experiment])
    px = np.random.default_rng(1).uniform((0, 0), (500, 700), (20, 2))
    z, angle = [3.0, 3.3, 7.9], 0.7
    theirs = run_dials(DXTBX_VALUES, tmp_path / "x.expt", json.dumps([px.tolist(), z, angle]))

    def same(ours, name, values):
        np.testing.assert_allclose(ours, np.reshape(values, np.shape(ours)), rtol=1e-12, atol=1e-12, err_msg=name)

    same(experiment.beam.s0, "s0", theirs["s0"])
    for panel, values in zip(experiment.detector, theirs["panels"]):
        same([panel.origin, panel.fast, panel.slow, panel.normal], "frame", values["frame"])
        mm = panel.mm_from_px(px)
        same(mm, "mm", values["mm"])
        same(panel.px_from_mm(mm), "px", values["px"])
        lab = panel.lab_from_px(px)
        same(lab, "lab", values["lab"])
        xy, hit = panel.intersect(lab)
        same(xy, "ray", values["ray"])
        assert hit.all()
    same(experiment.goniometer.lab_axis, "axis", theirs["axis"])
    same(experiment.goniometer.rotation(angle), "rotation", theirs["rotation"])
    same(experiment.scan.phi_from_z(z), "phi", theirs["phi"])
    same(experiment.scan.z_from_phi(np.array(theirs["phi"])), "z", theirs["z"])
    crystal = experiment.crystal
    for name in ("A", "U", "B"):
        same(getattr(crystal, name), name, theirs[name])
    same(crystal.cell.parameters, "cell", theirs["cell"])
    same(crystal.d([[1, -2, 3]]), "d", [theirs["d"]])
    same(crystal.A_at_scan_points, "points", theirs["points"])
    assert crystal.space_group.number == theirs["group"]


@pytest.mark.dials
def test_hall_symbols_as_dials_spells_them(run_dials):
    for hall, number, order in run_dials(HALL_SYMBOLS):
        crystal = Crystal(np.eye(3), hall)
        assert crystal.space_group.number == number, hall
        assert len(crystal.operations) == order, hall


def test_hall_symbols_of_gemmi_with_the_blank_of_dials():
    for group in gemmi.spacegroup_table_itb():
        found = Crystal(np.eye(3), f" {group.hall}").space_group
        assert found.operations() == group.operations()


def test_a_setting_in_no_table_still_has_its_operations():
    crystal = Crystal(np.eye(3), " C 2y (x-y,x+y,z)")
    assert len(crystal.operations) == 2
    with pytest.raises(InputError, match="no tabulated setting; reindex"):
        crystal.space_group  # noqa: B018
    with pytest.raises(InputError, match="'rubbish' is no Hall symbol"):
        Crystal(np.eye(3), "rubbish").space_group  # noqa: B018


def test_cell_and_orientation_put_the_crystal_together_again():
    cell = gemmi.UnitCell(31.1, 42.2, 53.3, 81, 95, 102)
    rotation = tilted((0.4, 1.1, -0.7))
    crystal = Crystal.from_cell(cell, rotation, " P 1")
    np.testing.assert_allclose(crystal.cell.parameters, cell.parameters, rtol=1e-13)
    np.testing.assert_allclose(crystal.U, rotation, atol=1e-13)
    hkl = np.array([[1, 0, 0], [0, 2, 0], [3, -1, 5]])
    np.testing.assert_allclose(crystal.d(hkl), [cell.calculate_d(h) for h in hkl.tolist()], rtol=1e-13)
    assert np.isinf(crystal.d([[0, 0, 0]])).all()


def test_rotation_is_right_handed_and_composes():
    np.testing.assert_allclose(rotation_matrix([0, 0, 2], np.pi / 2) @ [1, 0, 0], [0, 1, 0], atol=1e-15)
    axis = [0.3, -0.5, 0.2]
    many = rotation_matrix(axis, np.array([0.2, 0.5]))
    np.testing.assert_allclose(many[0] @ many[1], rotation_matrix(axis, 0.7), atol=1e-15)
    np.testing.assert_allclose(many @ many.swapaxes(1, 2), np.broadcast_to(np.eye(3), (2, 3, 3)), atol=1e-15)


def test_a_ray_meets_the_panel_where_it_came_from_and_none_behind():
    panel = difficult_experiment().detector[0]
    mm = np.array([[1.0, 2.0], [85.9, 69.9], [-0.1, 3.0]])
    xy, hit = panel.intersect(panel.lab_from_mm(mm))
    np.testing.assert_allclose(xy, mm, atol=1e-12)
    assert hit.tolist() == [True, True, False]
    assert not panel.intersect(-panel.lab_from_mm(mm))[1].any()


def test_parallax_pushes_spots_outwards_by_less_than_the_sensor_allows():
    panel = Panel(
        origin=np.array([-50.0, 50.0, -100.0]),
        fast=np.array([1.0, 0, 0]),
        slow=np.array([0, -1.0, 0]),
        pixel_size=(0.1, 0.1),
        image_size=(1000, 1000),
        thickness=0.5,
        mu=2.0,
        parallax=True,
    )
    mm = np.array([[50.0, 50.0], [90.0, 50.0], [10.0, 50.0]])  # straight ahead, right, left
    shift = panel.px_from_mm(mm) * 0.1 - mm
    tangent = 40 / 100
    np.testing.assert_allclose(shift[0], 0, atol=1e-13)
    assert 0 < shift[1, 0] < 0.5 * tangent and shift[2, 0] == pytest.approx(-shift[1, 0])
    # A weak absorber records half-way through the sensor in proportion to mu, so its mean depth tends to mu t^2 / 2.
    panel.mu = 1e-4
    cos = 1 / np.hypot(1, tangent)
    depth = (panel.px_from_mm(mm) * 0.1 - mm)[1, 0] / (tangent * cos)
    assert depth == pytest.approx(panel.mu * (0.5 / cos) ** 2 / 2, rel=1e-3)


def test_s1_points_at_the_pixel_with_the_length_of_the_beam():
    experiment = difficult_experiment()
    panel, px = np.array([1, 0, 1]), np.array([[3.0, 4.0], [250.0, 350.0], [499.0, 1.0]])
    s1 = experiment.detector.s1_from_px(panel, px, experiment.beam.wavelength)
    np.testing.assert_allclose(np.linalg.norm(s1, axis=1), 1 / 0.976)
    for p, position, ray in zip(panel, px, s1):
        xy, _ = experiment.detector[p].intersect(ray)
        np.testing.assert_allclose(xy, experiment.detector[p].mm_from_px(position), atol=1e-10)


def test_setting_matrices_run_through_the_scan_points():
    experiment = difficult_experiment()
    crystal, scan = experiment.crystal, experiment.scan
    at = crystal.A_at(np.array([3.0, 3.5, 8.0, 9.0]), scan)
    points = crystal.A_at_scan_points
    np.testing.assert_allclose(at[0], points[0])
    np.testing.assert_allclose(at[1], (points[0] + points[1]) / 2)
    np.testing.assert_allclose(at[2:], [points[5], points[5]])  # held constant beyond the scan
    static = Crystal(crystal.A)
    np.testing.assert_array_equal(static.A_at(np.zeros(2), scan), [crystal.A, crystal.A])


def test_z_and_phi_are_inverse_and_count_as_dials_does():
    scan = Scan(image_range=(4, 8), oscillation=(-33.0, 0.25))
    assert scan.n_images == 5 and scan.array_range == (3, 8)
    assert np.degrees(scan.phi_from_z(3.0)) == pytest.approx(-33.0)
    z = np.linspace(3, 8, 11)
    np.testing.assert_allclose(scan.z_from_phi(scan.phi_from_z(z)), z)


def test_masked_rectangles_are_not_valid():
    panel = difficult_experiment().detector[0]
    panel.mask = [(0, 10, 500, 20), (490, 0, 500, 700)]
    valid = panel.valid_pixels()
    assert valid.shape == (700, 500)
    assert not valid[10:20].any() and not valid[:, 490:].any()
    assert valid.sum() == 500 * 700 - 500 * 10 - 10 * 700 + 10 * 10


def test_stills_are_told_from_rotations(tmp_path):
    experiment = difficult_experiment()
    assert not experiment.is_still
    experiment.scan.oscillation = (10.0, 0.0)
    assert experiment.is_still
    experiment.scan = None
    experiment.crystal.A_at_scan_points = None
    write_expt(tmp_path / "still.expt", ExperimentList.from_experiments([experiment]))
    assert read_expt(tmp_path / "still.expt")[0].is_still
