"""Spot prediction: the diffraction condition itself, a brute-force search over phi, and dials.predict."""

import subprocess
from dataclasses import replace

import numpy as np
import pytest

from xtalfast.errors import InputError
from xtalfast.integration.predict import diffraction_angles, miller_indices, predict, predict_hkl
from xtalfast.integration.simulate import Simulation, SimulationConfig, simulate
from xtalfast.io import read_expt, read_refl
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


def test_bad_input(experiment):
    with pytest.raises(InputError, match="rotation experiment"):
        predict(replace(experiment, scan=None), D_MIN)
    with pytest.raises(InputError, match="crystal"):
        predict(replace(experiment, crystal=None), D_MIN)
    with pytest.raises(InputError, match="d_min"):
        predict(experiment, 0.0)


@pytest.mark.dials
def test_against_dials(tmp_path):
    result = simulate(tmp_path, SimulationConfig.tiny())
    subprocess.run(
        ["dials.predict", result.expt, f"d_min={D_MIN}", "output=dials.refl"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    experiment = read_expt(result.expt)[0]
    theirs, ours = read_refl(tmp_path / "dials.refl"), predict(experiment, D_MIN)

    def key(hkl, entering):
        return [(*index, bool(flag)) for index, flag in zip(hkl.tolist(), entering)]

    where = {k: row for row, k in enumerate(key(theirs["miller_index"], theirs["entering"]))}
    rows = np.array([where.pop(k) for k in key(ours.hkl, ours.entering)])
    # dials.predict keeps some reflections on screw axes that are absent
    symmetry = experiment.crystal.space_group.operations()
    assert all(symmetry.is_systematically_absent(list(k[:3])) for k in where)
    np.testing.assert_allclose(ours.xyz_px, theirs["xyzcal.px"][rows], atol=1e-6)
    np.testing.assert_allclose(ours.xyz_mm, theirs["xyzcal.mm"][rows], atol=1e-6)
    np.testing.assert_allclose(ours.s1, theirs["s1"][rows], atol=1e-9)
