"""Where and when each reflection diffracts: spots of rotations, scan-static or scan-varying, and of stills.

A reflection with reciprocal vector q0 at phi = 0 diffracts at the angles phi at which s1 = s0 + R(phi) q0 has the
length of s0. Written in the frame of the rotation axis this is a cos(phi) + b sin(phi) = c, solved in closed form for
all Miller indices at once; a scan-varying crystal is the same equation with the setting matrix of the solution's own
image, solved by iteration. The spot is where the ray s1 meets a panel.

A still records the reciprocal-lattice points that lie near enough to the Ewald sphere for their width: s1 is that of
the point turned onto the sphere along the shortest path, by an angle delpsi.

Ref: W. Kabsch, Acta Cryst. D66, 133-144 (2010), section 2.2; D. G. Waterman et al., Acta Cryst. D72, 558-575 (2016);
N. K. Sauter et al., Acta Cryst. D70, 3299-3309 (2014), for stills.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import gemmi
import numpy as np
from numpy.typing import NDArray

from xtalfast.errors import InputError
from xtalfast.io.refl import Flag, ReflectionTable
from xtalfast.models import Array, Beam, Crystal, Experiment, Goniometer, Scan

# A scan-varying crystal may leave its mean setting by a degree or two: solutions this far off the scan are followed.
_SCAN_VARYING_REACH = np.radians(3.0)
# Each iteration gains the crystal's turn per radian of scan, divided by zeta: six do for nearly all spots.
_SCAN_VARYING_ITERATIONS = 50
_SCAN_VARYING_PRECISION = 1e-11  # rad
# A still without fitted mosaicity records what lies this near to the Ewald sphere, as in DIALS.
_DEFAULT_DELPSI = 0.0015  # rad


@dataclass(frozen=True)
class Predictions:
    """Predicted spots, one row each; hkl appears once for every crossing of the Ewald sphere."""

    hkl: NDArray[np.int32]  # [N, 3]
    panel: NDArray[np.int64]  # [N]
    s1: Array  # [N, 3] 1/A
    xyz_px: Array  # [N, 3] px, px, image
    xyz_mm: Array  # [N, 3] mm, mm, rad
    entering: NDArray[np.bool_]  # [N] True when the reflection moves into the Ewald sphere
    d: Array  # [N] A
    delpsi: Array  # [N] rad: turn that brings a still's point onto the Ewald sphere; 0 for a rotation

    def __len__(self) -> int:
        return len(self.hkl)

    def select(self, rows: NDArray) -> Predictions:
        """The given rows (indices or a mask)."""
        return Predictions(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    @staticmethod
    def concatenate(parts: Sequence[Predictions]) -> Predictions:
        """All spots of several predictions, one after the other."""
        return Predictions(
            **{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Predictions)}
        )

    def to_table(self, identifier: str, experiment_id: int = 0) -> ReflectionTable:
        """The columns that `dials.predict` writes, flagged as predicted, of the experiment with this identifier."""
        n = len(self)
        columns = {
            "miller_index": self.hkl,
            "id": np.full(n, experiment_id, np.int32),
            "panel": self.panel.astype(np.uint64),
            "entering": self.entering,
            "s1": self.s1,
            "xyzcal.px": self.xyz_px,
            "xyzcal.mm": self.xyz_mm,
            "flags": np.full(n, Flag.Predicted, np.uint64),
            "d": self.d,
        }
        return ReflectionTable.from_columns(columns, {experiment_id: identifier})


def rotation_models(experiment: Experiment) -> tuple[Goniometer, Scan]:
    """Goniometer and scan; InputError for a still."""
    if experiment.goniometer is None or experiment.scan is None or experiment.is_still:
        raise InputError("prediction needs a rotation experiment (goniometer and scan with a width), got a still")
    return experiment.goniometer, experiment.scan


def crystal_model(experiment: Experiment) -> Crystal:
    """The crystal; InputError when there is none."""
    if experiment.crystal is None:
        raise InputError("prediction needs a crystal model in the experiment, got none; index the data first")
    return experiment.crystal


def detector_d_min(experiment: Experiment) -> float:
    """The best resolution (A) that a corner of any panel records."""
    d_min = np.inf
    for panel in experiment.detector:
        corners = np.array([[0, 0], [1, 0], [0, 1], [1, 1]]) * np.asarray(panel.image_size, float)
        ray = panel.lab_from_px(corners)
        s1 = ray / np.linalg.norm(ray, axis=1, keepdims=True) / experiment.beam.wavelength
        d_min = min(d_min, 1 / np.linalg.norm(s1 - experiment.beam.s0, axis=1).max())
    return float(d_min)


def miller_indices(crystal: Crystal, d_min: float, *, screw_absences: bool = False) -> NDArray[np.int32]:
    """All Miller indices [N, 3] to `d_min` (A) over the whole sphere, without systematic absences.

    Args:
        screw_absences: keep those that only a screw axis or glide plane extinguishes, as DIALS does: they are no
            spots, but they are measured, and show whether the symmetry is right and the intensities are unbiased.
    """
    if not d_min > 0:
        raise InputError(f"d_min must be a positive resolution in A, got {d_min}")
    operations = crystal.operations
    if screw_absences:
        centring, operations = operations.cen_ops, gemmi.GroupOps([gemmi.Op()])
        operations.cen_ops = centring
    hkl = np.asarray(gemmi.make_miller_array(crystal.cell, gemmi.SpaceGroup("P 1"), d_min, 0.0, False), np.int32)
    return hkl[~operations.systematic_absences(hkl)]


def diffraction_angles(q0: Array, beam: Beam, goniometer: Goniometer) -> Array:
    """The two rotation angles at which reciprocal vectors diffract.

    Args:
        q0: reciprocal vectors at phi = 0, before the goniometer (A @ hkl), [..., 3], 1/A.

    Returns:
        [..., 2] in (-2 pi, 2 pi), rad, nan where the vector never meets the Ewald sphere.
    """
    axis = goniometer.axis / np.linalg.norm(goniometer.axis)
    s0 = np.linalg.solve(goniometer.setting, beam.s0)
    q = q0 @ goniometer.fixed.T
    along = (q @ axis)[..., None] * axis
    across = q - along
    # |s0 + R q|^2 = |s0|^2  <=>  cos(phi) across.s0 + sin(phi) (axis x q).s0 = -q.q / 2 - along.s0
    a, b = across @ s0, np.cross(axis, q) @ s0
    c = -0.5 * np.sum(q * q, axis=-1) - along @ s0
    with np.errstate(invalid="ignore", divide="ignore"):
        half = np.arccos(c / np.hypot(a, b))
    middle = np.arctan2(b, a)
    return np.stack([middle - half, middle + half], axis=-1)


def predict(
    experiment: Experiment, d_min: float | None = None, *, padding: float = 0.0, screw_absences: bool = False
) -> Predictions:
    """Spots of every reflection to `d_min` that diffracts onto the detector during the scan, or in a still.

    Args:
        experiment: beam, detector, crystal and, for a rotation, goniometer and scan; scan-varying when the crystal has
            scan points.
        d_min: resolution limit, A; None: what the corners of the detector record.
        padding: also keep spots whose centre lies up to this many images outside the scan.
        screw_absences: keep reflections that only a screw axis or glide plane extinguishes; see `miller_indices`.

    Returns:
        The spots in the order of their Miller indices.

    Raises:
        InputError: no crystal, or a d_min that is not positive.
    """
    if d_min is None:
        d_min = detector_d_min(experiment)
    hkl = miller_indices(crystal_model(experiment), d_min, screw_absences=screw_absences)
    return predict_hkl(experiment, hkl, padding=padding)


def predict_experiments(experiments: Sequence[Experiment], d_min: float | None = None) -> ReflectionTable:
    """Spots of all experiments as one table, like `dials.predict`: `xtalfast integrate` without a reflection file.

    Args:
        experiments: rotations or stills; every one with a crystal.
        d_min: resolution limit, A; None: what the corners of each detector record.

    Raises:
        InputError: an experiment without a crystal, or not a single spot.
    """
    tables = []
    for number, experiment in enumerate(experiments):
        spots = predict(experiment, d_min, screw_absences=True)
        table = spots.to_table(experiment.identifier, number)
        if any(e.is_still for e in experiments):
            table["delpsical.rad"] = spots.delpsi
        tables.append(table)
    table = ReflectionTable.concat(tables) if tables else ReflectionTable()
    if not len(table):
        raise InputError("no reflection of the models meets the detector; check cell, d_min and the refinement")
    return table


def predict_hkl(experiment: Experiment, hkl: NDArray, *, padding: float = 0.0) -> Predictions:
    """Spots of the given Miller indices [N, 3]; see `predict`."""
    if experiment.is_still:
        return _predict_still(experiment, np.asarray(hkl, np.int32))
    goniometer, scan = rotation_models(experiment)
    beam, crystal = experiment.beam, crystal_model(experiment)
    hkl = np.asarray(hkl, np.int32)
    varying = crystal.A_at_scan_points is not None
    middle = 0.5 * sum(scan.array_range)
    phi = diffraction_angles(hkl @ crystal.A_at(np.array(middle), scan).T, beam, goniometer)
    rows, phi = _within_scan(phi, scan, padding, _SCAN_VARYING_REACH if varying else 0.0)
    if varying:
        for _ in range(_SCAN_VARYING_ITERATIONS):
            q0 = np.einsum("nij,nj->ni", crystal.A_at(scan.z_from_phi(phi), scan), hkl[rows])
            away = (diffraction_angles(q0, beam, goniometer) - phi[:, None] + np.pi) % (2 * np.pi) - np.pi
            nearest = np.argmin(np.where(np.isnan(away), np.inf, np.abs(away)), axis=1)
            step = np.take_along_axis(away, nearest[:, None], axis=1)[:, 0]
            # A vector that the drift moves off the sphere has no solution (nan) and is dropped.
            solved = ~np.isnan(step)
            rows, phi, step = rows[solved], (phi + step)[solved], step[solved]
            if np.max(np.abs(step), initial=0.0) < _SCAN_VARYING_PRECISION:
                break
    z = scan.z_from_phi(phi)
    inside = (z >= scan.array_range[0] - padding) & (z < scan.array_range[1] + padding)
    rows, phi, z = rows[inside], phi[inside], z[inside]

    q0 = np.einsum("nij,nj->ni", crystal.A_at(z, scan), hkl[rows])
    s1 = beam.s0 + np.einsum("nij,nj->ni", goniometer.rotation(phi), q0)
    panel, xy_mm, xy_px = _on_detector(experiment, s1)
    hit = panel >= 0
    return Predictions(
        hkl=hkl[rows][hit],
        panel=panel[hit],
        s1=s1[hit],
        xyz_px=np.column_stack([xy_px, z])[hit],
        xyz_mm=np.column_stack([xy_mm, phi])[hit],
        entering=(s1[hit] @ np.cross(goniometer.lab_axis, beam.s0)) > 0,
        d=1 / np.linalg.norm(q0[hit], axis=1),
        delpsi=np.zeros(int(hit.sum())),
    )


def still_width(crystal: Crystal, d: Array) -> Array:
    """How far (delpsi, rad) from the Ewald sphere a still records points of resolution d [N] (A), as in DIALS.

    Half the angle that mosaicity and the size of the mosaic blocks spread a point over; a constant without these.
    """
    if crystal.half_mosaicity_deg is None or crystal.domain_size_a is None:
        return np.full(len(d), _DEFAULT_DELPSI)
    return d / crystal.domain_size_a + 0.5 * np.radians(crystal.half_mosaicity_deg)


def _predict_still(experiment: Experiment, hkl: NDArray[np.int32]) -> Predictions:
    """Reciprocal-lattice points near the Ewald sphere, turned onto it about the axis across the beam and themselves."""
    beam, crystal = experiment.beam, crystal_model(experiment)
    hkl = hkl[np.any(hkl != 0, axis=1)]
    q = hkl @ crystal.A.T
    square = np.sum(q * q, axis=1)
    incident = beam.s0 * beam.wavelength
    # On the sphere a point of this length has the component -|q|^2 lambda / 2 along the beam.
    along, across = 0.5 * square * beam.wavelength, q - np.outer(q @ incident, incident)
    on_sphere = along**2 < square
    hkl, q, square, along, across = (v[on_sphere] for v in (hkl, q, square, along, across))
    across *= (np.sqrt(square - along**2) / np.linalg.norm(across, axis=1))[:, None]
    turned = across - np.outer(along, incident)
    delpsi = np.arcsin(np.clip(-(q @ incident) / np.sqrt(square), -1, 1)) - np.arcsin(along / np.sqrt(square))
    near = np.abs(delpsi) < still_width(crystal, 1 / np.sqrt(square))
    s1 = beam.s0 + turned[near]
    panel, xy_mm, xy_px = _on_detector(experiment, s1)
    hit = panel >= 0
    z = np.full(int(hit.sum()), 0.0 if experiment.scan is None else float(experiment.scan.array_range[0]))
    return Predictions(
        hkl=hkl[near][hit],
        panel=panel[hit],
        s1=s1[hit],
        xyz_px=np.column_stack([xy_px[hit], z]),
        xyz_mm=np.column_stack([xy_mm[hit], np.zeros(len(z))]),
        entering=np.zeros(len(z), bool),
        d=1 / np.sqrt(square[near][hit]),
        delpsi=delpsi[near][hit],
    )


def _within_scan(phi: Array, scan: Scan, padding: float, reach: float) -> tuple[NDArray[np.int64], Array]:
    """Every turn of phi [N, 2] that falls in the scan: rows into N, and the angle on the scan's own count of turns."""
    ends = np.sort(scan.phi_from_z(np.array([scan.array_range[0] - padding, scan.array_range[1] + padding])))
    first, last = ends[0] - reach, ends[1] + reach
    row = np.broadcast_to(np.arange(len(phi))[:, None], phi.shape)[~np.isnan(phi)]
    angle = phi[~np.isnan(phi)]
    angle = first + (angle - first) % (2 * np.pi)
    turns = np.arange(int(np.ceil((last - first) / (2 * np.pi))))
    angle = angle[:, None] + 2 * np.pi * turns
    row = np.broadcast_to(row[:, None], angle.shape)
    inside = angle <= last
    row, angle = row[inside], angle[inside]
    order = np.argsort(row, kind="stable")
    return row[order], angle[order]


def _on_detector(experiment: Experiment, s1: Array) -> tuple[NDArray[np.int64], Array, Array]:
    """First panel that each ray meets (-1: none), and the place in mm and px."""
    panel = np.full(len(s1), -1)
    xy_mm, xy_px = np.zeros((len(s1), 2)), np.zeros((len(s1), 2))
    for number, model in enumerate(experiment.detector):
        here, hit = model.intersect(s1)
        rows = np.flatnonzero(hit & (panel < 0))
        panel[rows], xy_mm[rows], xy_px[rows] = number, here[rows], model.px_from_mm(here[rows])
    return panel, xy_mm, xy_px
