"""The rows of a shoebox store: box, reason and metadata of every reflection, before any pixel is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from xtalfast.errors import InputError
from xtalfast.integration.columns import (
    FIXED_BOX,
    add_derived_columns,
    check_panels,
    experiment_index,
    fixed_boxes,
    spot_positions,
    spot_sigmas,
)
from xtalfast.integration.store import SHARD_VOXELS, Reason
from xtalfast.io import ReflectionTable
from xtalfast.models import Array, Experiment

Box = tuple[int, int, int]

MIN_BOX_FRACTION = 0.95
CORE_SIGMAS = 3.0  # pixels this near to the centre belong to the spot


def _spot_extent(experiment: Experiment, panel: NDArray, s1: Array, zeta: Array) -> Array | None:
    """Standard deviation of the modelled spot along x, y (px) and z (images), [N, 3]; None without a profile model."""
    sigmas = spot_sigmas(experiment)
    if sigmas is None:
        return None
    sigma_b, sigma_m = sigmas
    steps = [
        (spot_positions(experiment, panel, s1, plus) - spot_positions(experiment, panel, s1, minus)) / 2
        for plus, minus in (((sigma_b, 0.0), (-sigma_b, 0.0)), ((0.0, sigma_b), (0.0, -sigma_b)))
    ]
    extent = np.zeros((len(s1), 3))
    extent[:, :2] = np.hypot(*steps)
    if not experiment.is_still and experiment.scan is not None:
        with np.errstate(divide="ignore"):
            extent[:, 2] = sigma_m / np.abs(zeta) / np.radians(abs(experiment.scan.oscillation[1]))
    return extent


def _fraction_inside(bbox: NDArray[np.int32], xyz: Array, extent: Array) -> Array:
    """Share [N] of a Gaussian spot of standard deviation `extent` [N, 3] about `xyz` that lies in the box."""
    share = np.ones(len(xyz))
    for axis in range(3):
        sigma = extent[:, axis]
        wide = sigma > 0  # a spot without depth (stills) is inside
        scale = np.where(wide, np.sqrt(2) * sigma, 1.0)
        upper, lower = ((bbox[:, 2 * axis + side] - xyz[:, axis]) / scale for side in (1, 0))
        part = 0.5 * (torch.special.erf(torch.from_numpy(upper)) - torch.special.erf(torch.from_numpy(lower))).numpy()
        share *= np.where(wide, part, 1.0)
    return share


def _boxes(
    work: ReflectionTable, experiments: Sequence[Experiment], box: Box | str | None
) -> tuple[NDArray, Box | None]:
    """Boxes [N, 6] of all rows and their common size."""
    if isinstance(box, str):
        if box != "bbox":
            raise InputError(f"box must be (z, y, x), None or 'bbox', got {box!r}")
        return np.asarray(work["bbox"], np.int32), None
    if box is None:
        box = (1 if all(e.is_still for e in experiments) else FIXED_BOX[0], *FIXED_BOX[1:])
    if len(box) != 3 or any(int(n) != n or n < 1 for n in box):
        raise InputError(f"box must be (z, y, x) with sizes of at least 1, got {box}")
    fast, slow = np.max([panel.image_size for e in experiments for panel in e.detector], axis=0).tolist()
    if box[1] > slow or box[2] > fast:
        raise InputError(
            f"box {' x '.join(map(str, box))} (z, y, x) is larger than the largest panel, {slow} x {fast} (slow x fast)"
        )
    return fixed_boxes(np.asarray(work["xyzcal.px"]), box), box


def prepare_rows(
    table: ReflectionTable, experiments: Sequence[Experiment], box: Box | str | None
) -> tuple[dict[str, NDArray], ReflectionTable, NDArray, Box | None]:
    """Metadata columns in the order of the table, the completed table, core boxes, and the common box size."""
    if not len(table):
        raise InputError("no reflections to extract: the table is empty")
    work = add_derived_columns(ReflectionTable(dict(table.columns), dict(table.identifiers)), experiments)
    bbox, size = _boxes(work, experiments, box)
    n, xyz, s1 = len(work), np.asarray(work["xyzcal.px"]), np.asarray(work["s1"])
    index = experiment_index(work, experiments)
    panel = np.asarray(work["panel"]).astype(np.int32)
    zeta = np.asarray(work["zeta"]) if "zeta" in work else np.ones(n)
    reason = np.zeros(n, np.uint8)
    fraction, core = np.full(n, np.nan), bbox.copy()
    finite = np.isfinite(xyz).all(1)
    reason[index < 0] |= np.uint8(Reason.NoExperiment)
    reason[~finite] |= np.uint8(Reason.NotFinite)
    for i, experiment in enumerate(experiments):
        check_panels(panel[index == i], experiment)
        rows = np.flatnonzero((index == i) & finite)
        if not len(rows):
            continue
        first, last = experiment.scan.array_range if experiment.scan is not None else (0, 1)
        limit = np.array([(*experiment.detector[p].image_size, 0) for p in panel[rows]])
        limit[:, 2] = last
        low = np.array([0, 0, first])
        outside = (xyz[rows] < low) | (xyz[rows] >= limit)
        reason[rows[outside[:, :2].any(1)]] |= np.uint8(Reason.OffPanel)
        reason[rows[outside[:, 2]]] |= np.uint8(Reason.OutOfScan)
        cut = ((bbox[rows, ::2] < low) | (bbox[rows, 1::2] > limit)).any(1)
        reason[rows[cut]] |= np.uint8(Reason.Truncated)
        extent = _spot_extent(experiment, panel[rows], s1[rows], zeta[rows])
        if extent is not None:
            fraction[rows] = _fraction_inside(bbox[rows], xyz[rows], extent)
            reach = np.nan_to_num(CORE_SIGMAS * extent, posinf=1e6)
            core[rows, ::2] = np.maximum(bbox[rows, ::2], np.floor(xyz[rows] - reach))
            core[rows, 1::2] = np.minimum(bbox[rows, 1::2], np.floor(xyz[rows] + reach) + 1)
    reason[fraction < MIN_BOX_FRACTION] |= np.uint8(Reason.SmallBox)

    def finite_or(name: str, value: float) -> NDArray[np.float32]:
        values = np.asarray(work[name], np.float32) if name in work else np.full(n, value, np.float32)
        return np.where(np.isfinite(values), values, np.float32(value))

    columns: dict[str, NDArray] = {
        "row": np.arange(n, dtype=np.int64),
        "bbox": bbox,
        "xyzcal_px": finite_or("xyzcal.px", 0.0),
        "panel": panel,
        "id": index.astype(np.int32),
        "s1": finite_or("s1", 0.0),
        "d": finite_or("d", np.inf),
        "hkl": np.asarray(work["miller_index"], np.int32),
        "zeta": finite_or("zeta", 1.0),
        "lp": finite_or("lp", 1.0),
        "partiality": finite_or("partiality", 0.0),
        "flags": (np.asarray(work["flags"]) & 0xFFFFFFFF).astype(np.uint32),
        "reason": reason,
        "box_fraction": fraction.astype(np.float32),
    }
    return columns, work, core, size


def volumes(bbox: NDArray[np.int32]) -> NDArray[np.int64]:
    return np.maximum(bbox[:, 1::2].astype(np.int64) - bbox[:, ::2], 0).prod(1)


def shard_bounds(ptr: NDArray[np.int64]) -> NDArray[np.int64]:
    """First row of each shard, and the end."""
    shard = ptr[:-1] // SHARD_VOXELS
    return np.concatenate([[0], np.flatnonzero(np.diff(shard)) + 1, [len(shard)]])


def fingerprint(columns: dict[str, NDArray], experiments: Sequence[Experiment], size: Box | None) -> str:
    """What the bytes of a store depend on, apart from the pixel values."""
    digest = hashlib.sha256(json.dumps(["store 1", size]).encode())
    for name, values in sorted(columns.items()):
        digest.update(name.encode() + np.ascontiguousarray(values).tobytes())
    for e in experiments:
        crystal = None if e.crystal is None else (e.crystal.A.tolist(), e.crystal.hall_symbol)
        text = [e.imageset, crystal, [vars(panel) for panel in e.detector], e.beam.s0.tolist()]
        digest.update(json.dumps(text, sort_keys=True, default=str).encode())
    return digest.hexdigest()
