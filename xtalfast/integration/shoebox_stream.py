"""One pass over the images of a data set, each read once, that fills the shards of a shoebox store."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from xtalfast import _native
from xtalfast.errors import InputError
from xtalfast.integration.overlaps import PanelSpots, mark_overlaps
from xtalfast.integration.shoebox_rows import Box, shard_bounds
from xtalfast.integration.store import Reason, StoreWriter
from xtalfast.io import ImageReader, open_images
from xtalfast.models import Array, Experiment, Panel
from xtalfast.ops.extract_shoeboxes import UINT16_MAX, extract_shoeboxes_reference

Progress = Callable[[str, int, int], None]


@dataclass
class Spots:
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
class Sweep:
    """Experiments that share images; their images are numbers first ... first + n of the stream."""

    experiment: Experiment
    members: list[int]
    reader: ImageReader
    first: int
    masks: list[NDArray[np.uint8]]

    @property
    def z_first(self) -> int:
        return self.experiment.scan.array_range[0] if self.experiment.scan is not None else 0


def open_sweeps(
    experiments: Sequence[Experiment], used: NDArray[np.int64], image_dir: str | os.PathLike | None
) -> list[Sweep]:
    groups: dict[str, list[int]] = {}
    for i in used.tolist():
        e = experiments[i]
        scan = None if e.scan is None else e.scan.image_range
        groups.setdefault(json.dumps([e.imageset, scan], sort_keys=True, default=str), []).append(i)
    sweeps: list[Sweep] = []
    first = 0
    for members in groups.values():
        reader = open_images(experiments[members[0]], image_dir)
        masks = [np.ascontiguousarray(mask).view(np.uint8) for mask in reader.static_mask()]
        sweeps.append(Sweep(experiments[members[0]], members, reader, first, masks))
        first += len(reader)
    return sweeps


@dataclass
class _Shard:
    """Buffers of the rows start ... stop until their last image has been seen."""

    start: int
    stop: int
    counts: NDArray  # uint16, or int32 from the first count beyond 65534 on
    mask: NDArray[np.uint8]
    reason: NDArray[np.uint8]


class Extraction:
    """The pass over the images."""

    def __init__(
        self,
        writer: StoreWriter,
        spots: Spots,
        experiments: Sequence[Experiment],
        sweeps: list[Sweep],
        size: Box | None,
        threads: int,
    ) -> None:
        self.writer, self.spots, self.experiments, self.sweeps = writer, spots, experiments, sweeps
        self.size, self.threads = size, max(threads, 1)
        bounds = shard_bounds(spots.ptr)
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

    def _images(self, wanted: list[int], verify: bool) -> Iterator[tuple[int, Sweep, list[NDArray]]]:
        """The wanted images in order, a few of them read ahead."""
        starts = [sweep.first for sweep in self.sweeps]
        ahead: deque[tuple[int, Sweep, Future]] = deque()
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

    def _cut(self, k: int, i: int, sweep: Sweep, panels: list[NDArray]) -> None:
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
            # one thread: a few ms of work, while the others read images
            peak, overloads = _cut_plane(image, mask, low, high, bbox, offset, shard, 1)
            if shard.counts.dtype == np.uint16 and (peak > UINT16_MAX).any():
                shard.counts = shard.counts.astype(np.int32)
                _cut_plane(image, mask, low, high, bbox, offset, shard, 1)
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
        any_valid = np.maximum.reduceat(np.append(shard.mask, np.uint8(0)), start)
        empty = (any_valid == 0) | (np.diff(spots.ptr[shard.start : shard.stop + 1]) == 0)
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
