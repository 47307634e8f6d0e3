"""The reciprocal-space frame of integration/kabsch.py against its definition and against DIALS."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from xtalfast.errors import InputError
from xtalfast.integration.kabsch import (
    box_edges,
    direction_coordinates,
    kabsch_coordinates,
    kabsch_frame,
    rotation_coordinates,
)
from xtalfast.models import Beam, Detector, Experiment, Goniometer, Panel, Scan, rotation_matrix

DIALS_SCRIPT = """
import json
import sys
import numpy as np
from scitbx import matrix
from dxtbx.model import Panel, ParallaxCorrectedPxMmStrategy
from dials.algorithms.profile_model.gaussian_rs import CoordinateSystem
given = np.load(sys.argv[1])
rows = []
for n in range(len(given["s1"])):
    p = int(given["panel"][n])
    panel = Panel()
    panel.set_frame(*(tuple(map(float, given[k][p])) for k in ("fast", "slow", "origin")))
    panel.set_pixel_size((0.172, 0.172))
    panel.set_image_size((500, 400))
    panel.set_thickness(0.45)
    panel.set_mu(float(given["mu"]))
    panel.set_px_mm_strategy(ParallaxCorrectedPxMmStrategy(float(given["mu"]), 0.45))
    s0 = matrix.col(tuple(map(float, given["s0"])))
    frame = CoordinateSystem(
        tuple(map(float, given["axis"])), s0.elems, tuple(map(float, given["s1"][n])), float(given["phi"][n])
    )
    x0, x1, y0, y1, z0, z1 = (int(v) for v in given["bbox"][n])
    for z in range(z0, z1):
        phi = float(given["start"]) + (z + 0.5) * float(given["width"])
        for y in range(y0, y1):
            for x in range(x0, x1):
                ray = matrix.col(panel.get_pixel_lab_coord((x + 0.5, y + 0.5))).normalize() * s0.length()
                rows.append(frame.from_beam_vector_and_rotation_angle(ray.elems, phi))
print(json.dumps(rows))
"""


def two_panels(*, parallax: bool) -> Detector:
    """Two panels tilted against each other, so that nothing is aligned with an axis."""
    panels = []
    for tilt, shift in ((0.05, -90.0), (-0.35, 5.0)):
        turn = rotation_matrix(np.array([0.1, 1.0, 0.05]), tilt)
        panels.append(
            Panel(
                origin=turn @ np.array([shift, -40.0, -150.0]),
                fast=turn @ np.array([1.0, 0, 0]),
                slow=turn @ np.array([0, 1.0, 0]),
                pixel_size=(0.172, 0.172),
                image_size=(500, 400),
                thickness=0.45,
                mu=3.9,
                parallax=parallax,
            )
        )
    return Detector(panels)


def experiment(*, parallax: bool = False, still: bool = False) -> Experiment:
    return Experiment(
        beam=Beam(np.array([0.01, -0.02, 1.0]), 0.98),
        detector=two_panels(parallax=parallax),
        goniometer=None if still else Goniometer(np.array([0.9, 0.1, -0.1]), setting=rotation_matrix([0, 0, 1.0], 0.2)),
        scan=None if still else Scan((1, 60), (10.0, 0.4)),
    )


def reflections(expt: Experiment, n: int, seed: int = 0):
    """Predicted positions at random places on both panels, and boxes of 3 x 5 x 7 (z, y, x) about them."""
    rng = np.random.default_rng(seed)
    panel = rng.integers(0, 2, n)
    xyz = np.stack([rng.uniform(10, 490, n), rng.uniform(10, 390, n), rng.uniform(2, 58, n)], axis=1)
    s1 = expt.detector.s1_from_px(panel, xyz[:, :2], expt.beam.wavelength)
    low = np.floor(xyz).astype(int) - [3, 2, 1]
    bbox = np.stack([low, low + np.array([7, 5, 3])], axis=2).reshape(n, 6)
    return panel, s1, xyz, bbox


def test_frame_is_orthonormal_and_zeta_is_the_projection_of_the_axis() -> None:
    expt = experiment()
    _, s1, _, _ = reflections(expt, 50)
    axis = expt.goniometer.lab_axis
    e1, e2, zeta = kabsch_frame(expt.beam.s0, s1, 3.0 * axis)  # any length of axis
    basis = np.stack([e1, e2, s1 / np.linalg.norm(s1, axis=1, keepdims=True)], axis=1)
    assert np.allclose(basis @ basis.transpose(0, 2, 1), np.eye(3), atol=1e-12)
    assert np.allclose(e1 @ expt.beam.s0, 0, atol=1e-12)
    assert np.allclose(zeta, e1 @ axis / np.linalg.norm(axis))


@pytest.mark.parametrize("parallax", [False, True])
def test_the_predicted_position_is_the_origin(parallax: bool) -> None:
    expt = experiment(parallax=parallax)
    panel, s1, xyz, _ = reflections(expt, 40)
    at = direction_coordinates(expt, panel, s1, xyz[:, :1], xyz[:, 1:2])
    assert np.abs(at).max() < 1e-9
    assert np.abs(rotation_coordinates(expt, s1, xyz[:, 2], xyz[:, 2:])).max() == 0


def test_small_angles_are_the_distance_between_rays() -> None:
    """epsilon1^2 + epsilon2^2 is sin^2 of the angle between the rays."""
    expt = experiment(parallax=True)
    panel, s1, xyz, bbox = reflections(expt, 30)
    epsilon = kabsch_coordinates(expt, panel, s1, xyz, bbox)
    assert epsilon.shape == (30, 3, 5, 7, 3) and epsilon.dtype == np.float32
    centre = bbox[:, [0, 2]] + [2.5, 4.5]  # x index 2, y index 4
    ray = expt.detector.s1_from_px(panel, centre, expt.beam.wavelength)
    sine = np.linalg.norm(np.cross(ray, s1), axis=1) / np.linalg.norm(s1, axis=1) / np.linalg.norm(ray, axis=1)
    assert np.allclose(np.hypot(*epsilon[:, 0, 4, 2, :2].T), sine, rtol=1e-5)


def test_epsilon3_is_the_rotation_of_the_lattice_point_along_the_shortest_path() -> None:
    """For a small rotation the lattice point leaves the Ewald sphere's tangent e3-plane by epsilon3 |q| (Kabsch)."""
    expt = experiment()
    _, s1, xyz, _ = reflections(expt, 30)
    s0, axis = expt.beam.s0, expt.goniometer.lab_axis
    q = s1 - s0
    step = 1e-5  # images; small enough for the linear form
    angle = np.radians(expt.scan.oscillation[1] * step)
    moved = q @ rotation_matrix(axis, angle).T - q
    e3 = (s1 + s0) / np.linalg.norm(s1 + s0, axis=1, keepdims=True)
    expected = np.einsum("ni,ni->n", e3, moved) / np.linalg.norm(q, axis=1)
    epsilon3 = rotation_coordinates(expt, s1, xyz[:, 2], xyz[:, 2:] + step)[:, 0]
    assert np.allclose(epsilon3, expected, rtol=1e-3)


def test_a_still_has_two_coordinates_equal_to_those_of_the_rotation() -> None:
    still, rotation = experiment(still=True), experiment()
    panel, s1, xyz, bbox = reflections(rotation, 20)
    bbox[:, 5] = bbox[:, 4] + 1
    two = kabsch_coordinates(still, panel, s1, xyz, bbox)
    assert two.shape == (20, 1, 5, 7, 2)
    assert np.array_equal(two, kabsch_coordinates(rotation, panel, s1, xyz, bbox)[..., :2])
    with pytest.raises(InputError, match="still"):
        rotation_coordinates(still, s1, xyz[:, 2], xyz[:, 2:])


def test_no_reflections_and_unequal_boxes() -> None:
    expt = experiment()
    panel, s1, xyz, bbox = reflections(expt, 4)
    assert kabsch_coordinates(expt, panel[:0], s1[:0], xyz[:0], bbox[:0]).shape == (0, 0, 0, 0, 3)
    bbox[1, 1] += 1
    with pytest.raises(InputError, match="one size"):
        box_edges(bbox)


def test_a_ray_along_the_beam_has_no_frame() -> None:
    expt = experiment()
    e1, _, zeta = kabsch_frame(expt.beam.s0, expt.beam.s0[None], expt.goniometer.lab_axis)
    assert np.isnan(e1).all() and np.isnan(zeta).all()


@pytest.mark.dials
def test_against_the_coordinate_system_of_dials(tmp_path: Path, run_dials) -> None:
    expt = experiment(parallax=True)
    panel, s1, xyz, bbox = reflections(expt, 12)
    given = {
        "s1": s1,
        "panel": panel,
        "bbox": bbox,
        "phi": expt.scan.phi_from_z(xyz[:, 2]),
        "s0": expt.beam.s0,
        "axis": expt.goniometer.lab_axis,
        "start": np.radians(expt.scan.oscillation[0]),
        "width": np.radians(expt.scan.oscillation[1]),
        "mu": expt.detector[0].mu,
        **{name: np.stack([getattr(p, name) for p in expt.detector]) for name in ("fast", "slow", "origin")},
    }
    np.savez(tmp_path / "given.npz", **given)
    ours = kabsch_coordinates(expt, panel, s1, xyz, bbox)
    theirs = np.array(run_dials(DIALS_SCRIPT, tmp_path / "given.npz")).reshape(ours.shape)
    assert np.abs(ours - theirs).max() < 1e-6 * np.abs(theirs).max()
