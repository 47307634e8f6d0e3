"""Spot prediction: the diffraction condition itself, a brute-force search over phi, and dials.predict."""

import subprocess
from dataclasses import replace

import numpy as np
import pytest

from xtalfast.cli import main
from xtalfast.errors import InputError
from xtalfast.integration.predict import (
    detector_d_min,
    diffraction_angles,
    miller_indices,
    predict,
    predict_experiments,
    predict_hkl,
    still_width,
)
from xtalfast.integration.simulate import Simulation, SimulationConfig
from xtalfast.io import read_expt, read_refl, write_expt
from xtalfast.models import Detector, Goniometer, Scan, rotation_matrix

D_MIN = 2.6


@pytest.fixture(scope="module")
def experiment():
    return Simulation(SimulationConfig.tiny(n_images=40)).experiment


def tilted(experiment):
    """The same with a goniometer that has fixed and setting rotations and an axis off x."""
    axis = np.array([0.9, 0.3, -0.2])
    goniometer = Goniometer(
        axis / np.linalg.norm(axis),
        fixed=rotation_matrix(np.array([0.0, 1.0, 0.2]), 0.4),
        setting=rotation_matrix(np.array([0.3, 0.1, 1.0]), -0.2),
    )
    return replace(experiment, goniometer=goniometer)


def drifting(experiment, drift_deg=0.5):
    """The same with a crystal that turns and swells during the scan."""
    crystal, n = experiment.crystal, experiment.scan.n_images
    turns = rotation_matrix(np.array([0.2, 1.0, -0.5]), np.radians(drift_deg) * np.arange(n + 1) / n)
    points = turns @ crystal.A / (1 + 0.002 * np.arange(n + 1) / n)[:, None, None]
    return replace(experiment, crystal=replace(crystal, A_at_scan_points=points))


@pytest.mark.parametrize("make", [lambda e: e, tilted, drifting], ids=["plain", "tilted-goniometer", "scan-varying"])
def test_every_spot_obeys_the_diffraction_condition(experiment, make):
    experiment = make(experiment)
    spots = predict(experiment, D_MIN)
    assert len(spots) > 200
    z = spots.xyz_px[:, 2]
    A = experiment.crystal.A_at(z, experiment.scan)
    q = np.einsum("nij,njk,nk->ni", experiment.goniometer.rotation(experiment.scan.phi_from_z(z)), A, spots.hkl)
    s0 = experiment.beam.s0
    np.testing.assert_allclose(np.linalg.norm(s0 + q, axis=1), np.linalg.norm(s0), rtol=1e-10)
    np.testing.assert_allclose(spots.s1, s0 + q, atol=1e-12)
    np.testing.assert_allclose(spots.xyz_mm[:, 2], experiment.scan.phi_from_z(z))
    ray = experiment.detector[0].lab_from_px(spots.xyz_px[:, :2])
    np.testing.assert_allclose(np.cross(ray, spots.s1), 0, atol=1e-10)
    np.testing.assert_allclose(1 / spots.d, np.linalg.norm(q, axis=1))


@pytest.mark.parametrize("make", [lambda e: e, tilted], ids=["plain", "tilted-goniometer"])
def test_against_a_search_over_phi(experiment, make):
    """Crossings of the Ewald sphere found by stepping through the scan are exactly the predicted ones."""
    experiment = make(experiment)
    hkl = miller_indices(experiment.crystal, 7.0)
    z = np.linspace(*experiment.scan.array_range, 2001)
    q = np.einsum(
        "kij,jl,nl->nki", experiment.goniometer.rotation(experiment.scan.phi_from_z(z)), experiment.crystal.A, hkl
    )
    outside = np.linalg.norm(q + experiment.beam.s0, axis=2) - 1 / experiment.beam.wavelength
    row, step = np.nonzero(outside[:, :-1] * outside[:, 1:] < 0)
    before, after = outside[row, step], outside[row, step + 1]
    found = z[step] + (z[1] - z[0]) * before / (before - after)

    wide = [
        replace(p, origin=p.origin - 5000 * (p.fast + p.slow), image_size=(60000, 60000)) for p in experiment.detector
    ]
    spots = predict_hkl(replace(experiment, detector=Detector(wide)), hkl)
    forward = spots.s1[:, 2] < 0
    found_s1 = q[row, step] + experiment.beam.s0
    kept = found_s1[:, 2] < -0.2  # rays that meet even a 10 m detector
    expected = sorted(zip(map(tuple, hkl[row[kept]].tolist()), found[kept], before[kept] > 0))
    forward &= spots.s1[:, 2] < -0.2
    got = sorted(zip(map(tuple, spots.hkl[forward].tolist()), spots.xyz_px[forward, 2], spots.entering[forward]))
    assert [g[0] for g in got] == [e[0] for e in expected] and len(got) > 30
    np.testing.assert_allclose([g[1] for g in got], [e[1] for e in expected], atol=2e-3)
    assert [g[2] for g in got] == [e[2] for e in expected]


def test_scan_points_that_do_not_change_give_the_static_answer(experiment):
    crystal = experiment.crystal
    points = np.repeat(crystal.A[None], experiment.scan.n_images + 1, axis=0)
    varying = predict(replace(experiment, crystal=replace(crystal, A_at_scan_points=points)), D_MIN)
    static = predict(experiment, D_MIN)
    np.testing.assert_array_equal(varying.hkl, static.hkl)
    np.testing.assert_allclose(varying.xyz_px, static.xyz_px, atol=1e-9)


def test_two_turns_repeat_the_first(experiment):
    def turns(n):
        return replace(experiment, scan=Scan((1, 90 * n), (-10.0, 4.0)))

    one, two = predict(turns(1), D_MIN), predict(turns(2), D_MIN)
    assert len(two) == 2 * len(one)
    second = two.select(two.xyz_px[:, 2] >= 90)
    np.testing.assert_allclose(np.sort(second.xyz_px[:, 2]), np.sort(one.xyz_px[:, 2]) + 90, atol=1e-9)


def test_padding_adds_only_spots_outside_the_scan(experiment):
    inner, outer = predict(experiment, D_MIN), predict(experiment, D_MIN, padding=2.5)
    z = outer.xyz_px[:, 2]
    inside = (z >= 0) & (z < experiment.scan.n_images)
    np.testing.assert_array_equal(outer.select(inside).hkl, inner.hkl)
    assert (~inside).any() and z.min() >= -2.5 and z.max() < experiment.scan.n_images + 2.5


def test_panels_share_the_spots(experiment):
    """One panel cut into two sees the same rays at the same places."""
    whole = experiment.detector[0]
    width, height = whole.image_size
    left = replace(whole, image_size=(80, height))
    right = replace(whole, origin=whole.origin + 80 * whole.pixel_size[0] * whole.fast, image_size=(width - 80, height))
    spots, cut = predict(experiment, D_MIN), predict(replace(experiment, detector=Detector([left, right])), D_MIN)
    np.testing.assert_array_equal(cut.hkl, spots.hkl)
    assert set(cut.panel) == {0, 1}
    np.testing.assert_allclose(cut.xyz_px[:, 0] + 80 * cut.panel, spots.xyz_px[:, 0], atol=1e-9)


def test_absent_and_out_of_range_reflections_are_not_predicted(experiment):
    hkl = predict(experiment, D_MIN).hkl
    assert not experiment.crystal.space_group.operations().systematic_absences(hkl).any()
    assert experiment.crystal.d(hkl).min() >= D_MIN


def test_a_vector_along_the_axis_or_too_long_never_diffracts(experiment):
    s0_length = 1 / experiment.beam.wavelength
    q = np.array([[0.1, 0.0, 0.0], [0.0, 2.5 * s0_length, 0.0]])
    assert np.isnan(diffraction_angles(q, experiment.beam, experiment.goniometer)).all()


def test_no_reflections(experiment):
    spots = predict_hkl(experiment, np.empty((0, 3), np.int32))
    assert len(spots) == 0 and spots.s1.shape == (0, 3)


def test_screw_absences_are_kept_on_request_but_not_those_of_centring(experiment):
    crystal = replace(experiment.crystal, hall_symbol=" C 2c 2")  # C 2 2 21
    operations = crystal.operations
    usual, all_primitive = miller_indices(crystal, 6.0), miller_indices(crystal, 6.0, screw_absences=True)
    extra = {tuple(h) for h in all_primitive.tolist()} - {tuple(h) for h in usual.tolist()}
    assert extra and all(h == k == 0 and l % 2 for h, k, l in extra)
    assert not ((all_primitive[:, 0] + all_primitive[:, 1]) % 2).any()
    assert operations.systematic_absences(np.array(sorted(extra), np.int32)).all()


def test_default_resolution_is_that_of_the_farthest_corner(experiment):
    panel, wavelength = experiment.detector[0], experiment.beam.wavelength
    corner = panel.lab_from_px(np.array([[0.0, panel.image_size[1]]]))[0]
    angle = np.arccos(corner @ experiment.beam.s0 / np.linalg.norm(corner) * wavelength)
    d_min = detector_d_min(experiment)
    assert d_min <= wavelength / (2 * np.sin(angle / 2)) + 1e-12
    spots = predict(experiment, d_min / 1.2)
    assert len(predict(experiment)) == len(spots) > 400
    assert spots.d.min() >= d_min


def still_of(experiment, half_mosaicity_deg=0.2, domain_size_a=500.0):
    crystal = replace(experiment.crystal, half_mosaicity_deg=half_mosaicity_deg, domain_size_a=domain_size_a)
    return replace(experiment, goniometer=None, scan=None, crystal=crystal, identifier="still")


def test_a_still_records_the_points_near_the_sphere(experiment):
    """Turned by delpsi about the axis across beam and point, every point of the list is on the Ewald sphere."""
    still = still_of(experiment)
    spots, s0 = predict(still, D_MIN), still.beam.s0
    q = spots.hkl @ still.crystal.A.T
    axis = np.cross(q, s0)
    for n in range(len(spots)):
        turned = rotation_matrix(axis[n], spots.delpsi[n]) @ q[n]
        np.testing.assert_allclose(s0 + turned, spots.s1[n], atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(spots.s1, axis=1), np.linalg.norm(s0))
    np.testing.assert_allclose(spots.d, still.crystal.d(spots.hkl))
    assert (np.abs(spots.delpsi) < still_width(still.crystal, spots.d)).all() and len(spots) > 50
    assert (spots.delpsi > 0).any() and (spots.delpsi < 0).any()
    assert set(spots.xyz_px[:, 2]) == {0.0} and (0, 0, 0) not in set(map(tuple, spots.hkl.tolist()))


def test_a_still_agrees_with_a_thin_rotation(experiment):
    """What crosses the sphere within half a degree of phi = 0 lies within half a degree of the sphere at phi = 0."""
    scan = Scan((1, 100), (-0.5, 0.01))
    thin = predict(replace(experiment, scan=scan), D_MIN)
    wide = still_of(experiment, half_mosaicity_deg=1.0, domain_size_a=np.inf)
    still = predict(wide, D_MIN)
    place = {tuple(h): n for n, h in enumerate(still.hkl.tolist())}
    rows = np.array([place.get(tuple(h), -1) for h in thin.hkl.tolist()])
    assert (rows >= 0).mean() > 0.97 and len(rows) > 20  # the others meet the sphere off the detector's edge
    thin, still = thin.select(rows >= 0), still.select(rows[rows >= 0])
    e1 = np.cross(thin.s1, wide.beam.s0)
    zeta = e1 @ experiment.goniometer.lab_axis / np.linalg.norm(e1, axis=1)
    phi = thin.xyz_mm[:, 2]
    assert np.abs(np.abs(still.delpsi) - np.abs(zeta * phi)).max() < 2e-4


def test_more_mosaicity_and_smaller_blocks_record_more(experiment):
    counts = [
        len(predict(still_of(experiment, m, size), D_MIN))
        for m, size in ((0.1, 2000.0), (0.3, 2000.0), (0.3, 300.0), (None, None))
    ]
    assert counts[0] < counts[1] < counts[2] and 0 < counts[3] < counts[1]


def test_all_experiments_in_one_table(experiment):
    second = replace(tilted(experiment), identifier="tilted")
    table = predict_experiments([experiment, second], D_MIN)
    assert table.identifiers == {0: experiment.identifier, 1: "tilted"}
    for number, e in enumerate((experiment, second)):
        spots = predict(e, D_MIN, screw_absences=True)
        np.testing.assert_array_equal(table["miller_index"][table["id"] == number], spots.hkl)
        np.testing.assert_array_equal(table["xyzcal.px"][table["id"] == number], spots.xyz_px)
    assert "delpsical.rad" not in table
    assert "delpsical.rad" in predict_experiments([still_of(experiment)], D_MIN)
    with pytest.raises(InputError, match="no reflection of the models"):
        predict_experiments([experiment], 1e3)


def test_command_line(experiment, tmp_path, capsys):
    write_expt(tmp_path / "models.expt", [experiment])
    target = tmp_path / "out.refl"
    assert main(["predict", str(tmp_path / "models.expt"), "--d-min", "3", "-o", str(target)]) == 0
    table = read_refl(target)
    expected = predict_experiments(read_expt(tmp_path / "models.expt"), 3.0)
    assert capsys.readouterr().out == f"{len(table)} reflections to {expected['d'].min():.2f} A\nwrote {target}\n"
    for name in expected:
        np.testing.assert_array_equal(table[name], expected[name])


def test_bad_input(experiment):
    with pytest.raises(InputError, match="crystal"):
        predict(replace(experiment, crystal=None), D_MIN)
    with pytest.raises(InputError, match="d_min"):
        predict(experiment, 0.0)


DIALS_PREDICT = """
import sys
from dials.array_family import flex
from dxtbx.model.experiment_list import ExperimentListFactory
experiments = ExperimentListFactory.from_json_file(sys.argv[1], check_format=False)
flex.reflection_table.from_predictions_multi(experiments).as_file(sys.argv[2])
"""


@pytest.mark.dials
def test_against_dials(experiment, tmp_path):
    """Static, scan-varying and turned goniometer; stills with and without fitted mosaicity."""
    images = {"__id__": "ImageSequence", "template": "no_####.cbf"}
    rotations = [replace(e, imageset=images) for e in (experiment, drifting(experiment), tilted(experiment))]
    stills = [still_of(experiment), still_of(experiment, None, None)]
    experiments = [replace(e, identifier=str(n)) for n, e in enumerate(rotations + stills)]
    write_expt(tmp_path / "all.expt", experiments)
    command = ["/usr/bin/python3", "-c", DIALS_PREDICT, str(tmp_path / "all.expt"), str(tmp_path / "dials.refl")]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    theirs, ours = read_refl(tmp_path / "dials.refl"), predict_experiments(read_expt(tmp_path / "all.expt"))

    def key(table):
        columns = np.column_stack([table["id"], table["miller_index"], table["entering"]]).tolist()
        return {tuple(values): row for row, values in enumerate(columns)}

    for number, tolerance in enumerate([1e-6, 0.02, 1e-6, 1e-6, 1e-6]):
        mine, other = (t.select(np.flatnonzero(t["id"] == number)) for t in (ours, theirs))
        places, known = key(mine), key(other)
        common = [k for k in known if k in places]
        a, b = np.array([places[k] for k in common]), np.array([known[k] for k in common])
        assert len(common) > (1000 if number < 3 else 10)
        np.testing.assert_allclose(mine["xyzcal.px"][a], other["xyzcal.px"][b], atol=tolerance)
        # DIALS leaves all absences out of stills; a drifting crystal brings spots at the borders in or out.
        unknown = np.array([k[1:4] for k in places.keys() ^ known.keys()], np.int32).reshape(-1, 3)
        absent = experiment.crystal.operations.systematic_absences(unknown)
        assert (~absent).sum() <= (5 if number == 1 else 0) and (number > 2 or not absent.any())
        if number > 2:
            np.testing.assert_allclose(mine["delpsical.rad"][a], other["delpsical.rad"][b], atol=1e-9)
