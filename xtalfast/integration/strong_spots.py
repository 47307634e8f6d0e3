"""The strong spots of a store, which teach the spot model."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xtalfast.errors import InputError
from xtalfast.integration.background import robust_background
from xtalfast.masks import used_pixels
from xtalfast.models import Array

MAX_STRONG = 2000  # spots used; more do not improve the shape


class StrongSpots(NamedTuple):
    """Strong spots of a store with their background."""

    rows: NDArray[np.int64]
    background: Array  # [N] counts per pixel
    intensity: Array  # [N] counts above the background


def central_pixels(box: tuple[int, int, int], half: int) -> NDArray[np.bool_]:
    """Pixels within `half` of the box centre along y and x, all images, bool [P]."""
    inside = np.zeros(box, bool)
    _, n_y, n_x = box
    inside[:, max(n_y // 2 - half, 0) : n_y // 2 + half + 1, max(n_x // 2 - half, 0) : n_x // 2 + half + 1] = True
    return inside.ravel()


def select_strong(store: Any, *, n_max: int = MAX_STRONG, i_over_sigma: float = 10.0, chunk: int = 4096) -> StrongSpots:
    """The spots that teach the profile: strong, with their centre unmasked, evenly taken from the whole store.

    The signal is the sum of the central 9 x 9 pixels (fewer in a small box) above the robust mean of those around them.

    Args:
        store: ShoeboxStore with one size of box.
        n_max: at most this many.
        i_over_sigma: signal over its standard deviation must exceed this.
        chunk: rows read at a time.

    Raises:
        InputError: the store has boxes of several sizes.
    """
    if store.box is None:
        raise InputError("reference profiles need boxes of one size: extract the store with box=(z, y, x), not 'bbox'")
    half = max(min(4, min(store.box[1:]) // 2 - 1), 1)
    near, core = central_pixels(store.box, half), central_pixels(store.box, min(half, 2))
    found = []
    for start in range(0, store.n, chunk):
        rows = np.arange(start, min(start + chunk, store.n))
        counts = store.counts(rows)
        used = used_pixels(store.mask(rows))
        background = robust_background(counts, used & ~near)
        inside = used & near
        n = inside.sum(axis=1)
        signal = np.einsum("np,np->n", counts, inside, dtype=np.float64) - n * background.mean
        enough = background.n_used >= 10
        spread = np.where(enough, background.variance, 0.0)
        sigma = np.sqrt(np.maximum(signal, 1) + n * background.mean + n**2 * spread)
        good = enough & (signal > i_over_sigma * sigma) & used[:, core].all(axis=1)
        found.append((rows[good], background.mean[good], signal[good]))
    if not found:
        return StrongSpots(np.zeros(0, np.int64), np.zeros(0), np.zeros(0))
    rows, mean, signal = (np.concatenate(column) for column in zip(*found))
    keep = np.unique(np.linspace(0, len(rows) - 1, min(n_max, len(rows))).round().astype(np.int64))
    return StrongSpots(rows[keep], mean[keep], signal[keep])


def select_brightest(store: Any, *, n_max: int = MAX_STRONG, min_photons: int = 50, chunk: int = 4096) -> StrongSpots:
    """The spots with the most photons, background taken as 0: for boxes without pixels around the spot.

    Shoeboxes of spot finding are such. Widths that come from them are rough, but better than none.

    Args:
        store: ShoeboxStore with one size of box.
        n_max: at most this many.
        min_photons: a spot has at least this many.
        chunk: rows read at a time.
    """
    photons = np.zeros(store.n)
    for start in range(0, store.n, chunk):
        rows = np.arange(start, min(start + chunk, store.n))
        photons[rows] = np.einsum("np,np->n", store.counts(rows), used_pixels(store.mask(rows)), dtype=np.float64)
    rows = np.argsort(-photons, kind="stable")[:n_max]
    rows = np.sort(rows[photons[rows] >= min_photons])
    return StrongSpots(rows, np.zeros(len(rows)), photons[rows])
