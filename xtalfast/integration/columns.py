"""What `dials.scale` and the integrator need of a reflection, computed from its Miller index, position and experiment.

A table with `miller_index` and `xyzcal.px` is enough: everything else follows from the beam, the detector, the
goniometer, the scan, the crystal and the profile block of the `.expt` file. The scattered vector is that of the
position, so a scan-varying crystal needs no second prediction; `d` is that of the static cell, as in DIALS.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from xtalfast.errors import InputError
from xtalfast.models import Array, Beam, Detector, Experiment, Panel

if TYPE_CHECKING:
    from xtalfast.io import ReflectionTable

Rows = NDArray[np.int64]

# Kinds of numpy's dtype and shape of a row, for the columns that are read here.
_COLUMN_KINDS: dict[str, tuple[str, tuple[int, ...]]] = {
    "miller_index": ("iu", (3,)),
    "xyzcal.px": ("f", (3,)),
    "id": ("iu", ()),
    "panel": ("iu", ()),
    "flags": ("iu", ()),
    "bbox": ("iu", (6,)),
    "s1": ("f", (3,)),
    "xyzcal.mm": ("f", (3,)),
    **{name: ("f", ()) for name in ("d", "zeta", "lp", "qe", "partiality")},
}
PREDICTED = 1  # DIALS flag of a row that comes from a prediction
FIXED_BOX = (3, 21, 21)  # z, y, x: the box of a reflection without a profile model
SIGMA_B_MULTIPLIER = 2.0  # DIALS doubles the spot's extent on the detector to hold its background


def experiment_index(table: ReflectionTable, experiments: Sequence[Experiment]) -> NDArray[np.int64]:
    """Which experiment each row belongs to, [N]; -1 for rows without one (id -1: spots that were not indexed).

    The identifiers of the table decide when both files have them, else `id` is the position in the file.

    Raises:
        InputError: no `id` but several experiments, or an id that no experiment has.
    """
    if "id" not in table:
        if len(experiments) != 1:
            raise InputError(f"no column 'id', but {len(experiments)} experiments: say which row belongs to which")
        return np.zeros(len(table), np.int64)
    ids = np.asarray(table["id"]).astype(np.int64)
    position = {e.identifier: i for i, e in enumerate(experiments) if e.identifier}
    lookup = {i: i for i in range(len(experiments))}
    if position and table.identifiers:
        unknown = [i for i, name in table.identifiers.items() if name not in position and np.any(ids == i)]
        if unknown:
            raise InputError(
                f"experiment identifier {table.identifiers[unknown[0]]!r} (id {unknown[0]}) of the reflections is not "
                "in the experiments; give the .expt and .refl of one job"
            )
        lookup |= {i: position[name] for i, name in table.identifiers.items() if name in position}
    index = np.full(len(ids), -1, np.int64)
    for i in np.unique(ids):
        if i >= 0:
            if int(i) not in lookup:
                raise InputError(
                    f"id {i} in the reflections, but there are {len(experiments)} experiments; "
                    "give the .expt and .refl of one job"
                )
            index[ids == i] = lookup[int(i)]
    return index


def rows_of_experiments(table: ReflectionTable, experiments: Sequence[Experiment]) -> Iterator[tuple[Experiment, Rows]]:
    """Each experiment that has reflections, with their rows."""
    index = experiment_index(table, experiments)
    for i, experiment in enumerate(experiments):
        rows = np.flatnonzero(index == i)
        if len(rows):
            yield experiment, rows


def mm_at_px(panel: Panel, xy_px: Array) -> Array:
    """Where the ray recorded at xy_px [N, 2] enters the panel, mm [N, 2]: the exact inverse of `Panel.px_from_mm`.

    The parallax shift belongs to the entry point, which is what is sought: fixed-point iteration, whose contraction is
    (shift / distance), below 1e-2 for any real sensor, so four steps reach double precision from the recorded point.
    """
    xy_px = np.asarray(xy_px, float)
    xy_mm = panel.mm_from_px(xy_px)
    if panel.parallax:
        for _ in range(4):
            xy_mm = xy_mm + (xy_px - panel.px_from_mm(xy_mm)) * np.asarray(panel.pixel_size)
    return xy_mm


def rotation_axis(experiment: Experiment) -> Array | None:
    """Unit rotation axis in the laboratory frame, or None for a still."""
    if experiment.goniometer is None or experiment.is_still:
        return None
    axis = experiment.goniometer.lab_axis
    return axis / np.linalg.norm(axis)


def zeta_factor(s0: Array, s1: Array, axis: Array) -> Array:
    """Path through the Ewald sphere: axis . (s1 x s0) / |s1 x s0|, [N] (Kabsch 2010, Acta Cryst. D66, 133-144)."""
    e1 = np.cross(s1, s0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return e1 @ axis / np.linalg.norm(e1, axis=-1)


def lorentz_polarization(beam: Beam, s1: Array, axis: Array | None) -> Array:
    """Factor [N] by which dials.scale multiplies an intensity: Lorentz (1 for stills) over polarization.

    Ref: Kahn et al. (1982), J. Appl. Cryst. 15, 330-337, with the polarization fraction of the beam model.
    """
    unit = s1 / np.linalg.norm(s1, axis=1, keepdims=True)
    incident = beam.s0 / np.linalg.norm(beam.s0)
    normal = beam.polarization_normal / np.linalg.norm(beam.polarization_normal)
    lorentz = np.abs(unit @ np.cross(axis, incident)) if axis is not None else np.ones(len(s1))
    fraction = beam.polarization_fraction
    out_of_plane = (1 - 2 * fraction) * (1 - (unit @ normal) ** 2)
    return lorentz / (out_of_plane + fraction * (1 + (unit @ incident) ** 2))


def quantum_efficiency(detector: Detector, panel: NDArray, s1: Array) -> Array:
    """Share of the photons absorbed in the sensor, [N]; 1 where thickness or attenuation are unknown."""
    qe = np.ones(len(s1))
    for p, model in enumerate(detector):
        rows = np.flatnonzero(panel == p)
        if model.thickness > 0 and model.mu > 0 and len(rows):
            cosine = np.abs(s1[rows] @ model.normal) / np.linalg.norm(s1[rows], axis=1)
            qe[rows] = -np.expm1(-model.mu * model.thickness / cosine)
    return qe


def spot_sigmas(experiment: Experiment) -> tuple[float, float] | None:
    """(sigma_b, sigma_m) in rad from the profile block, or None when there is none (or no beam divergence in it)."""
    profile = experiment.profile or {}
    sigma_b, sigma_m = profile.get("sigma_b"), profile.get("sigma_m")
    if not isinstance(sigma_b, int | float) or not isinstance(sigma_m, int | float) or sigma_b <= 0:
        return None
    return float(np.radians(sigma_b)), float(np.radians(sigma_m))


def partiality(z0: NDArray, z1: NDArray, z: Array, zeta: Array, sigma_m: float, width: float) -> Array:
    """Share of the rocking curve between z0 and z1 (images), a Gaussian of sigma_m / |zeta| about z, [N].

    Args:
        z0, z1, z: [N], images.  zeta: [N].  sigma_m: rad.  width: rotation per image, rad.
    """
    scale = np.abs(zeta) * width / (np.sqrt(2) * sigma_m)
    upper, lower = (torch.special.erf(torch.from_numpy(scale * (edge - z))).numpy() for edge in (z1, z0))
    return 0.5 * (upper - lower)


def _directions(s0: Array, s1: Array, offset: tuple[float, float]) -> Array:
    """Scattered vectors [N, 3] on the Ewald sphere at angles `offset` (rad) along Kabsch's e1, e2 from s1 [N, 3]."""
    length = np.linalg.norm(s1, axis=1, keepdims=True)
    unit = s1 / length
    e1 = np.cross(s1, s0)
    e1 /= np.linalg.norm(e1, axis=1, keepdims=True)
    tangent = offset[0] * e1 + offset[1] * np.cross(unit, e1)
    return length * (tangent + unit * np.sqrt(1 - offset[0] ** 2 - offset[1] ** 2))


def spot_positions(experiment: Experiment, panel: NDArray, s1: Array, offset: tuple[float, float]) -> Array:
    """Pixels [N, 2] hit by the rays at the angles `offset` (rad) along e1, e2 from s1, on the plane of their panel."""
    ray = _directions(experiment.beam.s0, s1, offset)
    xy = np.full((len(s1), 2), np.nan)
    for p, model in enumerate(experiment.detector):
        rows = np.flatnonzero(panel == p)
        xy[rows] = model.px_from_mm(model.intersect(ray[rows])[0])
    return xy


def bounding_boxes(experiment: Experiment, panel: NDArray, s1: Array, z: Array, zeta: Array) -> NDArray[np.int32]:
    """Boxes [N, 6] that hold n_sigma of the spot and as much background around it, cut at the ends of the scan.

    As in DIALS they may reach past the panel, and hold one image even where the spot lies outside the scan. Without a
    profile model: 3 images of 21 x 21 pixels about the position (1 image for a still).
    """
    sigmas = spot_sigmas(experiment)
    first, last = experiment.scan.array_range if experiment.scan is not None else (0, 1)
    if sigmas is None:
        xy = spot_positions(experiment, panel, s1, (0.0, 0.0))
        depth = 1 if experiment.is_still else FIXED_BOX[0]
        box = fixed_boxes(np.column_stack([xy, z]), (depth, *FIXED_BOX[1:]))
    else:
        n_sigma = float((experiment.profile or {}).get("n_sigma", 3.0))
        angle = n_sigma * sigmas[0] * SIGMA_B_MULTIPLIER
        corners = [(-angle, -angle), (-angle, angle), (angle, -angle), (angle, angle)]
        xy = np.stack([spot_positions(experiment, panel, s1, corner) for corner in corners])
        low, high = np.floor(xy.min(0)), np.ceil(xy.max(0))
        if experiment.is_still or experiment.scan is None:
            z0 = np.floor(z)
            z1 = z0 + 1
        else:
            half = n_sigma * sigmas[1] / np.abs(zeta) / np.radians(abs(experiment.scan.oscillation[1]))
            z0, z1 = np.floor(z - half), np.ceil(z + half)
        box = _int_boxes(np.column_stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1], z0, z1]))
    box[:, 4] = np.clip(box[:, 4], first, last - 1)
    box[:, 5] = np.clip(box[:, 5], box[:, 4] + 1, last)
    return box


def fixed_boxes(xyz_px: Array, box: tuple[int, int, int]) -> NDArray[np.int32]:
    """Boxes [N, 6] of one size (z, y, x) whose middle voxel holds the position [N, 3]; at 0 where it is not finite."""
    size = np.array(box)[::-1]
    good = np.all(np.abs(xyz_px) < 2**30, axis=1)
    low = np.floor(np.where(good[:, None], xyz_px, size // 2)) - size // 2
    return np.stack([low, low + size], axis=-1).reshape(-1, 6).astype(np.int32)


def _int_boxes(box: Array) -> NDArray[np.int32]:
    good = np.all(np.abs(box) < 2**30, axis=1)
    return np.where(good[:, None], box, 0).astype(np.int32)


def _guess_panels(experiment: Experiment, hkl: NDArray, xyz_px: Array) -> NDArray[np.uint64]:
    """The panel whose predicted spot lies nearest to xyz_px [N, 3]: for tables of several panels without the column."""
    if experiment.crystal is None:
        raise InputError("no column 'panel', several panels and no crystal model to find the panel from")
    z = np.nan_to_num(xyz_px[:, 2])
    if experiment.scan is None or experiment.goniometer is None:
        q = hkl @ experiment.crystal.A.T
    else:
        rotation = experiment.goniometer.rotation(experiment.scan.phi_from_z(z))
        q = np.einsum("nij,njk,nk->ni", rotation, experiment.crystal.A_at(z, experiment.scan), hkl.astype(float))
    ray = experiment.beam.s0 + q
    distance = np.full((len(experiment.detector), len(hkl)), np.inf)
    for p, model in enumerate(experiment.detector):
        xy, _ = model.intersect(ray)
        distance[p] = np.nan_to_num(np.linalg.norm(model.px_from_mm(xy) - xyz_px[:, :2], axis=1), nan=np.inf)
    return distance.argmin(0).astype(np.uint64)


def check_panels(panel: NDArray, experiment: Experiment) -> None:
    """Raise InputError for a panel number that the detector does not have."""
    if len(panel) and int(panel.max()) >= len(experiment.detector):
        raise InputError(
            f"panel {int(panel.max())} in the reflections, but the detector of their experiment has "
            f"{len(experiment.detector)} panels; give the .expt and .refl of one job"
        )


def _check_columns(table: ReflectionTable) -> None:
    """Raise InputError for a column whose type is not that of DIALS' column of this name."""
    for name, (kinds, shape) in _COLUMN_KINDS.items():
        if name not in table:
            continue
        values = table.columns[name]
        if not isinstance(values, np.ndarray) or values.dtype.kind not in kinds or values.shape[1:] != shape:
            wanted = f"{'real numbers' if kinds == 'f' else 'integers'} [N{''.join(f', {size}' for size in shape)}]"
            got = f"{values.dtype} {list(values.shape)}" if isinstance(values, np.ndarray) else type(values).__name__
            raise InputError(f"column {name!r} must be {wanted}, got {got}; make the table again with dials.predict")


def add_derived_columns(
    table: ReflectionTable, experiments: Sequence[Experiment], *, recompute: bool = False
) -> ReflectionTable:
    """Complete a table that has `miller_index` and `xyzcal.px`, in place: what is missing or NaN is computed.

    Computed: id, panel, s1, xyzcal.mm, d, zeta, lp, qe, partiality, partial_id, bbox, xyzobs.px.value (the predicted
    position: nothing was observed yet) and flags (predicted). Rows whose position is not finite, or that belong to no
    experiment, stay: their values are NaN, their box is empty, their partiality 0. Without a profile block the
    partiality is 1 and the box is the fixed one. Stills have no zeta and a Lorentz factor of 1.

    Args:
        table: reflections of all experiments.
        experiments: as in the .expt file.
        recompute: compute every column but id and panel anew, also those that the table has.

    Returns:
        The table.

    Raises:
        InputError: a needed column is missing, or an id or panel is not in the experiments.
    """
    table.require("miller_index", "xyzcal.px")
    _check_columns(table)
    n = len(table)
    index = experiment_index(table, experiments)
    position = np.asarray(table["xyzcal.px"], float)
    hkl = np.asarray(table["miller_index"])
    new: dict[str, NDArray] = {
        "panel": np.zeros(n, np.uint64),
        "s1": np.full((n, 3), np.nan),
        "xyzcal.mm": np.full((n, 3), np.nan),
        "d": np.full(n, np.nan),
        "zeta": np.full(n, np.nan),
        "lp": np.full(n, np.nan),
        "qe": np.full(n, np.nan),
        "partiality": np.zeros(n),
        "bbox": np.zeros((n, 6), np.int32),
    }
    for i, experiment in enumerate(experiments):
        rows = np.flatnonzero(index == i)
        if not len(rows):
            continue
        if "panel" in table:
            panel = np.asarray(table["panel"])[rows]
        elif len(experiment.detector) == 1:
            panel = np.zeros(len(rows), np.uint64)
        else:
            panel = _guess_panels(experiment, hkl[rows], position[rows])
        check_panels(panel, experiment)
        new["panel"][rows] = panel
        if experiment.crystal is not None:
            new["d"][rows] = experiment.crystal.d(hkl[rows])
        finite = np.all(np.isfinite(position[rows]), axis=1)
        rows, panel = rows[finite], panel[finite]
        given = () if recompute else tuple(name for name in ("s1", "zeta", "bbox") if name in table)
        known = {name: np.asarray(table[name])[rows] for name in given}
        for name, values in _derive(experiment, position[rows], panel, known).items():
            new[name][rows] = values
    new["id"] = index.astype(np.int32)
    new["partial_id"] = np.arange(n, dtype=np.uint64)
    new["xyzobs.px.value"] = position.copy()
    still = np.array([e.is_still for e in experiments] + [False])[index]  # the last one is for rows of no experiment
    new["xyzobs.px.value"][still, 2] = np.floor(position[still, 2]) + 0.5
    new["flags"] = np.full(n, PREDICTED, np.uint64)
    if all(e.is_still for e in experiments):
        del new["zeta"]
    keep = {"id", "panel", "flags", "partial_id", "xyzobs.px.value"}  # not functions of the model alone
    for name, values in new.items():
        if name not in table or (recompute and name not in keep):
            table[name] = values
        elif values.dtype.kind == "f":
            table[name] = _where_finite(table[name], values)
    return table


def _where_finite(given: NDArray | None, computed: Array) -> Array:
    """The given values, and computed ones where those are missing or not finite."""
    return computed if given is None else np.where(np.isfinite(given), given, computed)


def _derive(experiment: Experiment, position: Array, panel: NDArray, known: dict[str, NDArray]) -> dict[str, NDArray]:
    """The derived columns of one experiment's rows at finite positions [N, 3]; s1, zeta, bbox are used where known."""
    new: dict[str, NDArray] = {}
    beam, detector, scan = experiment.beam, experiment.detector, experiment.scan
    xyz_mm = np.zeros((len(position), 3))
    s1 = np.empty((len(position), 3))
    for p, model in enumerate(detector):
        on = np.flatnonzero(panel == p)
        xyz_mm[on, :2] = mm_at_px(model, position[on, :2])
        s1[on] = model.lab_from_mm(xyz_mm[on, :2])
    s1 *= 1 / beam.wavelength / np.linalg.norm(s1, axis=1, keepdims=True)
    s1 = _where_finite(known.get("s1"), s1)
    if experiment.crystal is None:  # not indexed: the resolution of the place
        with np.errstate(divide="ignore"):
            new["d"] = 1 / np.linalg.norm(s1 - beam.s0, axis=1)
    if scan is not None:
        xyz_mm[:, 2] = scan.phi_from_z(position[:, 2])
    new["s1"], new["xyzcal.mm"] = s1, xyz_mm
    axis = rotation_axis(experiment)
    zeta = np.ones(len(position))
    if axis is not None:
        zeta = _where_finite(known.get("zeta"), zeta_factor(beam.s0, s1, axis))
        new["zeta"] = zeta
    new["lp"] = lorentz_polarization(beam, s1, axis)
    new["qe"] = quantum_efficiency(detector, panel, s1)
    box = known["bbox"] if "bbox" in known else bounding_boxes(experiment, panel, s1, position[:, 2], zeta)
    new["bbox"] = box
    sigmas = spot_sigmas(experiment)
    if sigmas is not None and sigmas[1] > 0 and axis is not None and scan is not None:
        width = np.radians(abs(scan.oscillation[1]))
        new["partiality"] = partiality(box[:, 4], box[:, 5], position[:, 2], zeta, sigmas[1], width)
    else:
        new["partiality"] = np.ones(len(position))
    return new
