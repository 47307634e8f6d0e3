"""Pixels of a batch of reflections: foreground, background and the sum of the counts above it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from xtalfast.integration.background_shapes import Kind, RadialBackground, ShapedBackground, choose_background
from xtalfast.integration.spot_shape import SpotWidths, images_in_scan, rotation_edges
from xtalfast.integration.spot_voxels import SpotPixels
from xtalfast.integration.strong_spots import boxes_by_size
from xtalfast.masks import BACKGROUND, FOREGROUND, used_pixels
from xtalfast.models import Experiment

RADIAL_ROWS = 6000  # boxes whose background pixels make the radial background of a data set


def foreground(
    store: Any, experiments: Sequence[Experiment], widths: SpotWidths, rows: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Voxels that the ellipsoid of `n_sigma` widths about the predicted position touches.

    (epsilon1^2 + epsilon2^2) / (n sigma_b)^2 + epsilon3^2 / (n sigma_m)^2 <= 1 at the nearest point of the voxel.

    Args:
        store: ShoeboxStore with one size of box.
        experiments: one per `id` of the store.
        widths: sigma_b, sigma_m (rad) and n_sigma.
        rows: rows of the store, [B].

    Returns:
        bool [B, P].
    """
    metadata = {name: np.asarray(store.metadata[name][rows]) for name in ("id", "panel", "xyzcal_px", "bbox")}
    xyz = metadata["xyzcal_px"].astype(float)
    pixels, _ = SpotPixels.of_rows(experiments, metadata["id"], metadata["panel"], metadata["bbox"], xyz, store.box)
    rotation = np.zeros((len(rows), store.box[0]), np.float32)
    edges, _ = rotation_edges(store, experiments, rows)
    if edges.shape[1] and widths.sigma_m > 0:
        low, high = edges[:, :-1], edges[:, 1:]
        nearest = np.where(low * high <= 0, 0.0, np.minimum(np.abs(low), np.abs(high)))
        rotation = (nearest / (widths.n_sigma * widths.sigma_m)) ** 2
    return pixels.foreground(widths.n_sigma * widths.sigma_b, rotation).reshape(len(rows), -1)


def label_foreground(
    store: Any,
    experiments: Sequence[Experiment],
    sigma_b: float,
    sigma_m: float,
    n_sigma: float = 3.0,
    rows: NDArray[np.int64] | None = None,
) -> NDArray[np.uint8]:
    """Mask of some rows with the bits Foreground (4) and Background (2) set from the widths of the spots.

    Args:
        store: ShoeboxStore with one size of box; it is not changed.
        experiments: one per `id` of the store.
        sigma_b: width along epsilon1 and epsilon2, rad.
        sigma_m: width along epsilon3, rad; 0 for stills.
        n_sigma: size of the foreground in widths.
        rows: rows of the store, [B]; None: all.

    Returns:
        DIALS mask bits uint8 [B, P]. Voxels that are not Valid, or are Overlapped, are labelled too.
    """
    rows = np.arange(store.n) if rows is None else np.asarray(rows, np.int64)
    inside = foreground(store, experiments, SpotWidths(sigma_b, sigma_m, n_sigma), rows)
    mask = np.asarray(store.mask(rows), np.uint8) & np.uint8(255 - FOREGROUND - BACKGROUND)
    return mask | np.where(inside, np.uint8(FOREGROUND), np.uint8(BACKGROUND))


@dataclass(frozen=True)
class Batch:
    """Pixels of some rows."""

    rows: NDArray[np.int64]
    box: tuple[int, int, int]
    counts: NDArray  # [B, P]
    used: NDArray[np.bool_]  # [B, P]
    inside: NDArray[np.bool_]  # [B, P] foreground
    in_scan: NDArray[np.bool_]  # [B, P]

    @property
    def outside(self) -> NDArray[np.bool_]:
        return self.used & ~self.inside


@dataclass(frozen=True)
class Reader:
    """Reads batches of a store and models their background."""

    experiments: Sequence[Experiment]
    widths: SpotWidths
    radial: RadialBackground | None = None
    dispersion: float = 1.0  # variance / mean of the counts

    def read(self, view: Any, rows: NDArray[np.int64]) -> Batch:
        """Rows of a store, or view, with boxes of one size."""
        in_scan = np.repeat(images_in_scan(view, self.experiments, rows), view.n_pixels // view.box[0], axis=1)
        used = used_pixels(view.mask(rows)) & in_scan
        inside = foreground(view, self.experiments, self.widths, rows)
        return Batch(rows, view.box, view.counts(rows), used, inside, in_scan)

    def background(self, view: Any, batch: Batch) -> ShapedBackground:
        """Shape and height of the background of each box of a batch of this view."""
        template = None if self.radial is None else self.radial.template(view, batch.rows)
        return choose_background(batch.counts, batch.outside, batch.box, template=template, dispersion=self.dispersion)

    def with_radial(self, store: Any) -> Reader:
        """The same with the radial background of a store, from a sample of its boxes."""
        radial = RadialBackground(self.experiments)
        step = max(store.n // RADIAL_ROWS, 1)
        for _, view in boxes_by_size(store):
            rows = np.arange(0, view.n, step)
            for start in range(0, len(rows), 2048):
                batch = self.read(view, rows[start : start + 2048])
                radial.add(view, batch.rows, batch.counts, batch.outside)
        return Reader(self.experiments, self.widths, radial, self.dispersion)


def background_tensor(background: ShapedBackground) -> Tensor | None:
    """The shapes for the ops, or None where all are flat."""
    return None if (background.kind == Kind.Flat).all() else from_numpy(background.shape)


def summation(
    batch: Batch, background: ShapedBackground, dispersion: float = 1.0
) -> tuple[dict[str, NDArray], NDArray[np.bool_]]:
    """Summation and background columns, and which sums are complete.

    Variance as in DIALS: the counts expected in the foreground, |I| + sum b, and the error of the background under it.
    """
    pixels = batch.used & batch.inside
    n = pixels.sum(axis=1)
    total = np.einsum("np,np->n", batch.counts, pixels, dtype=np.float64)
    under = np.einsum("np,np->n", background.shape, pixels, dtype=np.float64)  # background pixels, each by its shape
    value = total - under * background.mean
    has_background = background.n_used > 0
    spread = np.where(has_background, background.variance, 0.0)
    variance = np.maximum(dispersion * (np.abs(value) + under * background.mean) + under**2 * spread, 1.0)
    something = (n > 0) & has_background
    complete = something & ~(batch.inside & batch.in_scan & ~batch.used).any(axis=1)
    columns = {
        "intensity.sum.value": np.where(something, value, 0.0),
        "intensity.sum.variance": np.where(something, variance, -1.0),
        "background.mean": background.mean,
        "background.variance": np.where(has_background, background.variance, -1.0),
        "background.dispersion": background.dispersion,
        "background.kind": background.kind.astype(np.int32),
        "num_pixels.valid": batch.used.sum(axis=1).astype(np.int32),
        "num_pixels.foreground": n.astype(np.int32),
        "num_pixels.background": batch.outside.sum(axis=1).astype(np.int32),
        "num_pixels.background_used": background.n_used.astype(np.int32),
    }
    return columns, complete
