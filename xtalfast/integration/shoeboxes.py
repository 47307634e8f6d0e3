"""Images or a `shoebox` column -> `ShoeboxStore`: one pass over the images, each read once, in bounded memory.

Reflections are stored in the order in which the images complete them, so that a shard is finished and written soon
after its last image; what was finished before an interruption is not extracted again, and the result is the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from xtalfast import _native
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
from xtalfast.integration.overlaps import PanelSpots, mark_overlaps
from xtalfast.integration.store import OVERLAPPED, SHARD_VOXELS, VALID, Reason, ShoeboxStore, StoreWriter
from xtalfast.io import ImageReader, ReflectionTable, ShoeboxColumn, open_images
from xtalfast.models import Array, Experiment, Panel
from xtalfast.ops.extract_shoeboxes import UINT16_MAX, extract_shoeboxes_reference

__all__ = ["Reason", "ShoeboxStore", "extract_store", "store_from_shoebox_column"]

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
Box = tuple[int, int, int]

MIN_BOX_FRACTION = 0.95
CORE_SIGMAS = 3.0  # pixels this near to the centre belong to the spot


@dataclass
class _Spots:
    """All reflections in the order of the store."""

    columns: dict[str, NDArray]  # metadata
    xyz_px: Array  # [N, 3] float64
    xyz_mm: Array  # [N, 3]
    s1: Array  # [N, 3]
    core: NDArray[np.int32]  # [N, 6] box of the spot itself, inside bbox
    ptr: NDArray[np.int64]  # [N + 1]
    images: NDArray[np.int64]  # [N, 2] first and last + 1 image of the stream that the box meets

    @property
    def bbox(self) -> NDArray[np.int32]:
        return self.columns["bbox"]


@dataclass
class _Sweep:
    """Experiments that share images; their images are numbers first ... first + n of the stream."""

    experiment: Experiment
    members: list[int]
    reader: ImageReader
    first: int
    masks: list[NDArray[np.uint8]]

    @property
    def z_first(self) -> int:
        return self.experiment.scan.array_range[0] if self.experiment.scan is not None else 0


def _open_sweeps(
    experiments: Sequence[Experiment], used: NDArray[np.int64], image_dir: str | os.PathLike | None
) -> list[_Sweep]:
    groups: dict[str, list[int]] = {}
    for i in used.tolist():
        e = experiments[i]
        scan = None if e.scan is None else e.scan.image_range
        groups.setdefault(json.dumps([e.imageset, scan], sort_keys=True, default=str), []).append(i)
    sweeps: list[_Sweep] = []
    first = 0
    for members in groups.values():
        reader = open_images(experiments[members[0]], image_dir)
        masks = [np.ascontiguousarray(mask).view(np.uint8) for mask in reader.static_mask()]
        sweeps.append(_Sweep(experiments[members[0]], members, reader, first, masks))
        first += len(reader)
    return sweeps


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
    return fixed_boxes(np.asarray(work["xyzcal.px"]), box), box


def _prepare(
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


def _order(columns: dict[str, NDArray], images: NDArray[np.int64]) -> NDArray[np.int64]:
    """The order of the store: by the image that completes a box, then by place on the detector (for the caches)."""
    bbox = columns["bbox"]
    return np.lexsort((bbox[:, 0], bbox[:, 2], columns["panel"], images[:, 0], images[:, 1]))


def _volume(bbox: NDArray[np.int32]) -> NDArray[np.int64]:
    return np.maximum(bbox[:, 1::2].astype(np.int64) - bbox[:, ::2], 0).prod(1)


def _shard_bounds(ptr: NDArray[np.int64]) -> NDArray[np.int64]:
    """First row of each shard, and the end."""
    shard = ptr[:-1] // SHARD_VOXELS
    return np.concatenate([[0], np.flatnonzero(np.diff(shard)) + 1, [len(shard)]])


def _fingerprint(columns: dict[str, NDArray], experiments: Sequence[Experiment], size: Box | None) -> str:
    """What the bytes of a store depend on, apart from the pixel values."""
    digest = hashlib.sha256(json.dumps(["store 1", size]).encode())
    for name, values in sorted(columns.items()):
        digest.update(name.encode() + np.ascontiguousarray(values).tobytes())
    for e in experiments:
        crystal = None if e.crystal is None else (e.crystal.A.tolist(), e.crystal.hall_symbol)
        text = [e.imageset, crystal, [vars(panel) for panel in e.detector], e.beam.s0.tolist()]
        digest.update(json.dumps(text, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def extract_store(
    table: ReflectionTable,
    experiments: Sequence[Experiment],
    out_dir: str | os.PathLike,
    *,
    box: Box | str | None = None,
    image_dir: str | os.PathLike | None = None,
    threads: int = 2,
    verify: bool = False,
    progress: Progress | None = None,
) -> ShoeboxStore:
    """Cut the shoeboxes of all reflections out of their images.

    Every row of the table gets a row of the store, in another order (`metadata["row"]`): those off the panel or the
    scan, with NaN positions or without an experiment too, with a `Reason` and no valid pixels where there are none.
    Called again after an interruption it goes on where it stopped; a finished store is opened.

    Args:
        table: at least `miller_index` and `xyzcal.px`; what else is needed is computed (`add_derived_columns`).
        experiments: as in the .expt file.
        out_dir: directory of the store.
        box: size (z, y, x) of boxes centred on the pixel that holds `xyzcal.px`; None: (3, 21, 21), for stills
            (1, 21, 21); "bbox": the box of each reflection.
        image_dir: directory of the images, if not where the .expt says.
        threads: images read ahead at once, and threads that cut boxes.
        verify: compare the checksums of the images.
        progress: called as progress("extract", images done, images in all).

    Returns:
        The store.

    Raises:
        InputError: a column, id or image is missing or wrong, the counts are not photons (gain, pedestal), or
            `out_dir` holds the store of another job.
    """
    columns, work, core, size = _prepare(table, experiments, box)
    request = _fingerprint(columns, experiments, size)
    index = columns["id"]
    writer = StoreWriter(out_dir, request)
    if (writer.path / "store.json").is_file():
        (writer.path / "journal.json").unlink(missing_ok=True)
        logger.info("shoebox store %s is complete", out_dir)
        return ShoeboxStore.open(out_dir)
    sweeps = _open_sweeps(experiments, np.unique(index[index >= 0]), image_dir)
    images = np.zeros((len(index), 2), np.int64)
    for sweep in sweeps:
        rows = np.flatnonzero(np.isin(index, sweep.members))
        images[rows] = np.clip(columns["bbox"][rows, 4:] - sweep.z_first, 0, len(sweep.reader)) + sweep.first
    order = _order(columns, images)
    ptr = np.concatenate([[0], np.cumsum(_volume(columns["bbox"][order]))])
    spots = _Spots(
        {name: values[order] for name, values in columns.items()},
        np.asarray(work["xyzcal.px"])[order],
        np.asarray(work["xyzcal.mm"])[order],
        np.asarray(work["s1"])[order],
        core[order],
        ptr,
        images[order],
    )
    _Extraction(writer, spots, experiments, sweeps, size, threads).run(verify, progress)
    for sweep in sweeps:
        sweep.reader.close()
    store = writer.finish(spots.columns, box=size, ptr=None if size else ptr)
    counted = {name: n for name, n in store.statistics["reasons"].items() if n}
    logger.info("extracted %d shoeboxes to %s; not ordinary: %s", store.n, out_dir, counted or "none")
    return store


@dataclass
class _Shard:
    """Buffers of the rows start ... stop until their last image has been seen."""

    start: int
    stop: int
    counts: NDArray  # uint16, or int32 from the first count beyond 65534 on
    mask: NDArray[np.uint8]
    reason: NDArray[np.uint8]


class _Extraction:
    """The pass over the images."""

    def __init__(
        self,
        writer: StoreWriter,
        spots: _Spots,
        experiments: Sequence[Experiment],
        sweeps: list[_Sweep],
        size: Box | None,
        threads: int,
    ) -> None:
        self.writer, self.spots, self.experiments, self.sweeps = writer, spots, experiments, sweeps
        self.size, self.threads = size, max(threads, 1)
        bounds = _shard_bounds(spots.ptr)
        self.rows = list(zip(bounds[:-1].tolist(), bounds[1:].tolist()))
        self.open: dict[int, _Shard] = {}

    def _span(self, k: int) -> tuple[int, int]:
        """First and last + 1 image that shard k needs; equal when it needs none."""
        images = self.spots.images[slice(*self.rows[k])]
        images = images[images[:, 1] > images[:, 0]]
        return (int(images[:, 0].min()), int(images[:, 1].max())) if len(images) else (0, 0)

    def run(self, verify: bool, progress: Progress | None) -> None:
        pending = {k: self._span(k) for k in range(len(self.rows)) if not self.writer.is_done(k)}
        for k, (first, last) in pending.items():
            if first == last:
                self._finish(k)
        pending = {k: span for k, span in pending.items() if span[0] < span[1]}
        wanted = sorted({i for span in pending.values() for i in range(*span)})
        total = sum(len(sweep.reader) for sweep in self.sweeps)
        for done, (i, sweep, panels) in enumerate(self._images(wanted, verify), start=total - len(wanted) + 1):
            for k, (first, last) in pending.items():
                if first <= i < last:
                    self._cut(k, i, sweep, panels)
                    if i + 1 == last:
                        self._finish(k)
            if progress is not None:
                progress("extract", done, total)

    def _images(self, wanted: list[int], verify: bool) -> Iterator[tuple[int, _Sweep, list[NDArray]]]:
        """The wanted images in order, a few of them read ahead."""
        starts = [sweep.first for sweep in self.sweeps]
        ahead: deque[tuple[int, _Sweep, Future]] = deque()
        todo = iter(wanted)
        with ThreadPoolExecutor(self.threads) as pool:
            try:
                while True:
                    while len(ahead) <= self.threads and (i := next(todo, None)) is not None:
                        sweep = self.sweeps[int(np.searchsorted(starts, i, side="right")) - 1]
                        ahead.append((i, sweep, pool.submit(sweep.reader.read, i - sweep.first, verify=verify)))
                    if not ahead:
                        return
                    i, sweep, future = ahead.popleft()
                    yield i, sweep, future.result()
            finally:
                for _, _, future in ahead:
                    future.cancel()

    def _shard(self, k: int) -> _Shard:
        if k not in self.open:
            start, stop = self.rows[k]
            n = int(self.spots.ptr[stop] - self.spots.ptr[start])
            zeros = np.zeros(stop - start, np.uint8)
            self.open[k] = _Shard(start, stop, np.zeros(n, np.uint16), np.zeros(n, np.uint8), zeros)
        return self.open[k]

    def _cut(self, k: int, i: int, sweep: _Sweep, panels: list[NDArray]) -> None:
        """Fill what image i holds of the boxes of shard k."""
        shard, spots = self._shard(k), self.spots
        images = spots.images[shard.start : shard.stop]
        inside = np.flatnonzero((images[:, 0] <= i) & (i < images[:, 1]))
        z = i - sweep.first + sweep.z_first
        for p, raw in enumerate(panels):
            rows = shard.start + inside[spots.columns["panel"][shard.start + inside] == p]
            if not len(rows):
                continue
            model = sweep.experiment.detector[p]
            image, mask, low, high = _photons(raw, sweep.masks[p], model, sweep.reader.path(i - sweep.first))
            bbox = spots.bbox[rows].copy()
            plane = (bbox[:, 1] - bbox[:, 0]).astype(np.int64) * (bbox[:, 3] - bbox[:, 2])
            offset = spots.ptr[rows] - spots.ptr[shard.start] + (z - bbox[:, 4]) * plane
            bbox[:, 4], bbox[:, 5] = 0, 1
            peak, overloads = _cut_plane(image, mask, low, high, bbox, offset, shard, self.threads)
            if shard.counts.dtype == np.uint16 and (peak > UINT16_MAX).any():
                shard.counts = shard.counts.astype(np.int32)
                _cut_plane(image, mask, low, high, bbox, offset, shard, self.threads)
            for row in rows[overloads > 0].tolist():
                x0, x1, y0, y1, z0, z1 = np.maximum(spots.core[row], 0).tolist()
                if z0 <= z < z1 and ((image[y0:y1, x0:x1] >= high) & (mask[y0:y1, x0:x1] != 0)).any():
                    shard.reason[row - shard.start] |= np.uint8(Reason.Overloaded)

    def _finish(self, k: int) -> None:
        """Mark overlaps and empty boxes, write the shard, drop its buffers."""
        shard, spots = self._shard(k), self.spots
        rows = np.arange(shard.start, shard.stop)
        start = spots.ptr[rows] - spots.ptr[shard.start]
        bad = np.uint8(Reason.NoExperiment | Reason.NotFinite)
        good = (spots.columns["reason"][rows] & bad) == 0
        n_valid = np.add.reduceat(np.append(shard.mask, 0), start, dtype=np.int64) if len(rows) else start
        empty = (n_valid == 0) | (np.diff(spots.ptr[shard.start : shard.stop + 1]) == 0)
        shard.reason[empty] |= np.uint8(Reason.NoPixels)
        ids, panels = spots.columns["id"][rows], spots.columns["panel"][rows]
        for e in np.unique(ids[good]).tolist():
            if self.experiments[e].crystal is None:
                continue
            for p in np.unique(panels[good & (ids == e)]).tolist():
                here = np.flatnonzero(good & (ids == e) & (panels == p))
                at = rows[here]
                group = PanelSpots(
                    spots.columns["hkl"][at], spots.s1[at], spots.xyz_px[at], spots.xyz_mm[at], spots.bbox[at]
                )
                mark_overlaps(self.experiments[e], p, group, shard.mask, start[here], self.threads)
        shape = (-1,) if self.size is None else (len(rows), int(np.prod(self.size)))
        self.writer.write_shard(k, shard.counts.reshape(shape), shard.mask.reshape(shape), shard.reason)
        del self.open[k]


def _photons(
    raw: NDArray[np.int32], mask: NDArray[np.uint8], panel: Panel, path: object
) -> tuple[NDArray[np.int32], NDArray[np.uint8], int, int]:
    """Photons of an image, which pixels may be used, and the range low <= photons < high that is valid.

    Raises:
        InputError: (value - pedestal) / gain is not an integer.
    """
    if raw.shape != panel.image_size[::-1]:
        raise InputError(
            f"{path}: wanted {panel.image_size[0]} x {panel.image_size[1]} pixels (fast x slow), "
            f"got {raw.shape[1]} x {raw.shape[0]}; use the .expt of these images"
        )
    limit = 2**31 - 1
    low = max(int(np.ceil(panel.trusted_range[0])), 0)
    high = int(min(np.ceil(panel.trusted_range[1]), limit))
    if panel.gain == 1 and panel.pedestal == 0:
        return raw, mask, low, high
    counts = (raw - panel.pedestal) / panel.gain
    photons = np.rint(counts)
    trusted = (mask != 0) & (raw >= low) & (raw < high)
    if not np.array_equal(photons[trusted], counts[trusted]):
        raise InputError(
            f"{path}: gain {panel.gain:g} and pedestal {panel.pedestal:g} do not give whole photons, which the Poisson "
            "likelihood needs; convert the images to photons, or set the true gain and pedestal in the .expt"
        )
    overloaded = (mask != 0) & (raw >= high)
    usable = ((trusted & (photons >= 0)) | overloaded).astype(np.uint8)
    return np.where(overloaded, limit, np.clip(photons, 0, limit - 1)).astype(np.int32), usable, 0, limit


def _cut_plane(
    image: NDArray[np.int32],
    mask: NDArray[np.uint8],
    low: int,
    high: int,
    bbox: NDArray[np.int32],
    offset: NDArray[np.int64],
    shard: _Shard,
    n_threads: int,
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Cut rectangles of one image into the shard, each from its `offset` on -> (largest count, overloads) [N]."""
    n = len(bbox)
    if _native.C is None:
        boxes = extract_shoeboxes_reference(
            torch.from_numpy(image)[None], torch.from_numpy(bbox), torch.from_numpy(mask), low=low, high=high
        )
        every = extract_shoeboxes_reference(
            torch.from_numpy(image)[None], torch.from_numpy(bbox), torch.from_numpy(mask)
        )
        counts, valid, ptr = (part.numpy() for part in boxes)
        size = np.diff(ptr)
        to = np.repeat(offset - ptr[:-1], size) + np.arange(ptr[-1])
        shard.counts[to], shard.mask[to] = np.minimum(counts, np.iinfo(shard.counts.dtype).max), valid
        peak, overloads = np.zeros(n, np.int32), np.zeros(n, np.int32)
        box_of = np.repeat(np.arange(n), size)
        np.maximum.at(peak, box_of, counts)
        np.add.at(overloads, box_of, (every.counts.numpy() >= high).astype(np.int32))
        return peak, overloads
    peak, overloads = np.empty(n, np.int32), np.empty(n, np.int32)
    image, bbox = np.ascontiguousarray(image), np.ascontiguousarray(bbox)
    _native.C.extract_shoeboxes(
        pixels=image.ctypes.data,
        wide_pixels=True,
        mask=mask.ctypes.data,
        mask_stride=0,
        n_z=1,
        n_y=image.shape[0],
        n_x=image.shape[1],
        low=low,
        high=high,
        bbox=bbox.ctypes.data,
        offset=offset.ctypes.data,
        n=n,
        counts=shard.counts.ctypes.data,
        wide_counts=shard.counts.dtype == np.int32,
        valid=shard.mask.ctypes.data,
        peak=peak.ctypes.data,
        overloads=overloads.ctypes.data,
        on_cuda=False,
        stream=0,
        n_threads=n_threads,
    )
    return peak, overloads


def store_from_shoebox_column(
    table: ReflectionTable,
    experiments: Sequence[Experiment],
    out_dir: str | os.PathLike,
    *,
    box: Box | str | None = None,
) -> ShoeboxStore:
    """A store of the pixels in the column `shoebox`, for reflections whose images are gone.

    Voxels of the box that the column does not hold are not Valid. Spot-finder output (no `xyzcal.px`, no
    `miller_index`) is taken at its observed centroids, with Miller index 0.

    Args:
        table: reflections with a `shoebox` column.
        experiments, out_dir, box: as for `extract_store`; box "bbox" keeps the boxes of the column.

    Raises:
        InputError: no such column, or its valid data are not whole photons.
    """
    table.require("shoebox")
    source: Any = table["shoebox"]
    if not isinstance(source, ShoeboxColumn):
        raise InputError("column 'shoebox' must hold shoeboxes; write the reflections again with DIALS")
    work = ReflectionTable(dict(table.columns), dict(table.identifiers))
    if "xyzcal.px" not in work:
        work["xyzcal.px"] = work["xyzobs.px.value"]
    if "miller_index" not in work:
        work["miller_index"] = np.zeros((len(work), 3), np.int32)
    work["bbox"] = source.bbox
    columns, _, _, size = _prepare(work, experiments, box)
    writer = StoreWriter(out_dir, _fingerprint({**columns, "shoebox": source.data}, experiments, size))
    bbox = columns["bbox"]
    ptr = np.concatenate([[0], np.cumsum(_volume(bbox))])
    counts, mask = np.zeros(ptr[-1], np.int32), np.zeros(ptr[-1], np.uint8)
    for i in range(len(work)):  # tens of microseconds each; tables with shoeboxes are small
        if source.ptr[i + 1] > source.ptr[i]:
            _paste(source, i, bbox[i], counts[ptr[i] : ptr[i + 1]], mask[ptr[i] : ptr[i + 1]])
    reason = np.zeros(len(work), np.uint8)
    has_pixels = np.array([mask[a:b].any() for a, b in pairwise(ptr)], bool)
    reason[~has_pixels] |= np.uint8(Reason.NoPixels)
    for k, (a, b) in enumerate(pairwise(_shard_bounds(ptr).tolist())):
        shape = (-1,) if size is None else (b - a, int(np.prod(size)))
        voxels = slice(ptr[a], ptr[b])
        writer.write_shard(k, counts[voxels].reshape(shape), mask[voxels].reshape(shape), reason[a:b])
    return writer.finish(columns, box=size, ptr=None if size else ptr)


def _paste(source: ShoeboxColumn, i: int, to: NDArray, counts: NDArray[np.int32], mask: NDArray[np.uint8]) -> None:
    """Copy what box i of the column and the box `to` [6] have in common."""
    box = source.bbox[i]
    voxels = slice(source.ptr[i], source.ptr[i + 1])
    shape = tuple((box[1::2] - box[::2])[::-1])
    bits, data = source.mask[voxels].reshape(shape), source.data[voxels].reshape(shape)
    valid = ((bits & VALID) != 0) & (data >= 0)
    photons = np.rint(data)
    if not np.array_equal(photons[valid], data[valid]):
        raise InputError(
            f"shoebox of row {i}: counts must be whole photons, got {data[valid][photons[valid] != data[valid]][0]}"
        )
    low, high = np.maximum(box[::2], to[::2])[::-1], np.minimum(box[1::2], to[1::2])[::-1]  # z, y, x
    if (high <= low).any():
        return
    here = tuple(slice(a, b) for a, b in zip(low - box[::2][::-1], high - box[::2][::-1]))
    there = tuple(slice(a, b) for a, b in zip(low - to[::2][::-1], high - to[::2][::-1]))
    size = tuple((to[1::2] - to[::2])[::-1])
    counts.reshape(size)[there] = np.where(valid, photons, 0)[here].astype(np.int32)
    mask.reshape(size)[there] = (np.where(valid, VALID, 0) | (bits & OVERLAPPED))[here].astype(np.uint8)
