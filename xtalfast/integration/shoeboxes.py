"""Images or a `shoebox` column -> `ShoeboxStore`: one pass over the images, each read once, in bounded memory.

Reflections are stored in the order in which the images complete them, so that a shard is finished and written soon
after its last image; what was finished before an interruption is not extracted again, and the result is the same bytes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtalfast.errors import InputError
from xtalfast.integration.shoebox_rows import Box, fingerprint, prepare_rows, shard_bounds, volumes
from xtalfast.integration.shoebox_stream import Extraction, Progress, Spots, open_sweeps
from xtalfast.integration.store import Reason, ShoeboxStore, StoreWriter
from xtalfast.io import ReflectionTable, ShoeboxColumn
from xtalfast.masks import OVERLAPPED, VALID
from xtalfast.models import Experiment

__all__ = ["Reason", "ShoeboxStore", "extract_store", "store_from_shoebox_column"]

logger = logging.getLogger("xtalfast")


def _order(columns: dict[str, NDArray], images: NDArray[np.int64]) -> NDArray[np.int64]:
    """The order of the store: by the image that completes a box, then by place on the detector (for the caches)."""
    bbox = columns["bbox"]
    return np.lexsort((bbox[:, 0], bbox[:, 2], columns["panel"], images[:, 0], images[:, 1]))


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
    Memory: a few images and shards, and 0.8 kB per reflection. Called again after an interruption it goes on where it
    stopped; a finished store is opened.

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
    columns, work, core, size = prepare_rows(table, experiments, box)
    request = fingerprint(columns, experiments, size)
    index = columns["id"]
    writer = StoreWriter(out_dir, request)
    if (writer.path / "store.json").is_file():
        (writer.path / "journal.json").unlink(missing_ok=True)
        logger.info("shoebox store %s is complete", out_dir)
        return ShoeboxStore.open(out_dir)
    sweeps = open_sweeps(experiments, np.unique(index[index >= 0]), image_dir)
    images = np.zeros((len(index), 2), np.int64)
    for sweep in sweeps:
        rows = np.flatnonzero(np.isin(index, sweep.members))
        images[rows] = np.clip(columns["bbox"][rows, 4:] - sweep.z_first, 0, len(sweep.reader)) + sweep.first
    images[(columns["reason"] & np.uint8(Reason.NotFinite)) != 0] = 0
    order = _order(columns, images)
    ptr = np.concatenate([[0], np.cumsum(volumes(columns["bbox"][order]))])
    spots = Spots(
        {name: values[order] for name, values in columns.items()},
        np.asarray(work["xyzcal.px"])[order],
        np.asarray(work["xyzcal.mm"])[order],
        np.asarray(work["s1"])[order],
        core[order],
        ptr,
        images[order],
    )
    del columns, work, core  # `spots` has them in the order of the store
    Extraction(writer, spots, experiments, sweeps, size, threads).run(verify, progress)
    for sweep in sweeps:
        sweep.reader.close()
    store = writer.finish(spots.columns, box=size, ptr=None if size else ptr)
    counted = {name: n for name, n in store.statistics["reasons"].items() if n}
    logger.info("extracted %d shoeboxes to %s; not ordinary: %s", store.n, out_dir, counted or "none")
    return store


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
    columns, _, _, size = prepare_rows(work, experiments, box)
    writer = StoreWriter(out_dir, fingerprint({**columns, "shoebox": source.data}, experiments, size))
    bbox = columns["bbox"]
    ptr = np.concatenate([[0], np.cumsum(volumes(bbox))])
    counts, mask = np.zeros(ptr[-1], np.int32), np.zeros(ptr[-1], np.uint8)
    for i in range(len(work)):  # tens of microseconds each; tables with shoeboxes are small
        if source.ptr[i + 1] > source.ptr[i]:
            _paste(source, i, bbox[i], counts[ptr[i] : ptr[i + 1]], mask[ptr[i] : ptr[i + 1]])
    reason = np.zeros(len(work), np.uint8)
    has_pixels = np.array([mask[a:b].any() for a, b in pairwise(ptr)], bool)
    reason[~has_pixels] |= np.uint8(Reason.NoPixels)
    for k, (a, b) in enumerate(pairwise(shard_bounds(ptr).tolist())):
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
