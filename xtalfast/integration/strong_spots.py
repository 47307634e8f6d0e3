"""The strong spots of a store, which teach the spot model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xtalfast.integration.background import robust_background
from xtalfast.integration.background_shapes import RadialBackground
from xtalfast.masks import used_pixels
from xtalfast.models import Array, Experiment

UNEVEN = 1.3  # a background that rises by this much within a spot is not flat enough to learn from the spot
MIN_RADIAL = 100  # boxes that make a radial background
MAX_STRONG = 2000  # spots used; more do not improve the shape


class StrongSpots(NamedTuple):
    """Strong spots of a store with their background."""

    rows: NDArray[np.int64]
    background: Array  # [N] counts per pixel
    intensity: Array  # [N] counts above the background


def boxes_by_size(store: Any) -> Iterator[tuple[NDArray[np.int64], Any]]:
    """The rows of each size of box, and a store of them."""
    if store.box is not None:
        yield np.arange(store.n), store
        return
    for view in store.by_size():
        yield view.rows, view


class PaddedBoxes:
    """Some rows of a store in memory, their boxes padded with pixels that are not valid to one size.

    The longest tenth along the rotation is cut to the length of the others: those spots hardly move from image to
    image, and would fill the memory.
    """

    def __init__(self, store: Any, rows: NDArray[np.int64]) -> None:
        bbox = np.asarray(store.metadata["bbox"])[rows].astype(np.int64)
        size = (bbox[:, 1::2] - bbox[:, ::2])[:, ::-1]
        largest = size.max(axis=0)
        largest[0] = np.quantile(size[:, 0], 0.9, method="higher")
        z, y, x = largest.tolist()
        self.box, self.n, self.n_pixels = (z, y, x), len(rows), z * y * x
        self._counts = np.zeros((self.n, z, y, x), store.dtype)
        self._mask = np.zeros((self.n, z, y, x), np.uint8)
        self.metadata = {name: np.asarray(values[rows]) for name, values in store.metadata.items()}
        place = {row: i for i, row in enumerate(rows.tolist())}
        for view in store.by_size(rows):
            at = np.array([place[row] for row in view.rows.tolist()])
            every = np.arange(view.n)
            into, out_of = [at], [every]
            for wanted, given in zip(self.box, view.box):
                shift = (wanted - given) // 2
                into.append(np.arange(max(shift, 0), max(shift, 0) + min(wanted, given)))
                out_of.append(np.arange(max(-shift, 0), max(-shift, 0) + min(wanted, given)))
            shape = (view.n, *view.box)
            self._counts[np.ix_(*into)] = view.counts(every).reshape(shape)[np.ix_(*out_of)]
            self._mask[np.ix_(*into)] = view.mask(every).reshape(shape)[np.ix_(*out_of)]
        low = bbox[:, ::2] - ((largest - size) // 2)[:, ::-1]
        self.metadata["bbox"] = np.stack([low, low + largest[::-1]], axis=2).reshape(-1, 6).astype(np.int32)

    def counts(self, rows: NDArray[np.int64]) -> NDArray:
        """Photons, [B, P]."""
        return self._counts[rows].reshape(len(rows), -1)

    def mask(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """DIALS mask bits, [B, P]."""
        return self._mask[rows].reshape(len(rows), -1)


def central_pixels(box: tuple[int, int, int], half: int) -> NDArray[np.bool_]:
    """Pixels within `half` of the box centre along y and x, all images, bool [P]."""
    inside = np.zeros(box, bool)
    _, n_y, n_x = box
    inside[:, max(n_y // 2 - half, 0) : n_y // 2 + half + 1, max(n_x // 2 - half, 0) : n_x // 2 + half + 1] = True
    return inside.ravel()


def select_strong(
    store: Any,
    experiments: Sequence[Experiment] | None = None,
    *,
    n_max: int = MAX_STRONG,
    i_over_sigma: float = 10.0,
    chunk: int = 4096,
) -> StrongSpots:
    """The spots that teach the profile: strong, with their centre unmasked, evenly taken from the whole store.

    The signal is the sum of the central 9 x 9 pixels (fewer in a small box) above the robust mean of those around them.

    Args:
        store: ShoeboxStore.
        experiments: one per `id`: the signal is looked at again above the radial background of the data set, so that
            ice rings are not taken for spots. None: not looked at.
        n_max: at most this many.
        i_over_sigma: signal over its standard deviation must exceed this.
        chunk: rows read at a time.
    """
    found = []
    radial = None if experiments is None or store.n < MIN_RADIAL else RadialBackground(experiments)
    for rows_of, view in boxes_by_size(store):
        half = max(min(4, min(view.box[1:]) // 2 - 1), 1)
        near, core = central_pixels(view.box, half), central_pixels(view.box, min(half, 2))
        for start in range(0, view.n, chunk):
            at = np.arange(start, min(start + chunk, view.n))
            counts = view.counts(at)
            used = used_pixels(view.mask(at))
            background = robust_background(counts, used & ~near)
            inside = used & near
            if radial is not None:
                radial.add(view, at, counts, used & ~near)
            n = inside.sum(axis=1)
            signal = np.einsum("np,np->n", counts, inside, dtype=np.float64) - n * background.mean
            enough = background.n_used >= 10
            spread = np.where(enough, background.variance, 0.0)
            sigma = np.sqrt(np.maximum(signal, 1) + n * background.mean + n**2 * spread)
            good = enough & (signal > i_over_sigma * sigma) & used[:, core].all(axis=1)
            found.append((rows_of[at][good], background.mean[good], signal[good]))
    if not found:
        return StrongSpots(np.zeros(0, np.int64), np.zeros(0), np.zeros(0))
    rows, mean, signal = (np.concatenate(column) for column in zip(*found))
    order = np.argsort(rows, kind="stable")
    if radial is not None:
        order = order[_above_rings(store, radial, rows[order], i_over_sigma)]
    rows, mean, signal = rows[order], mean[order], signal[order]
    keep = np.unique(np.linspace(0, len(rows) - 1, min(n_max, len(rows))).round().astype(np.int64))
    return StrongSpots(rows[keep], mean[keep], signal[keep])


def _above_rings(
    store: Any, radial: RadialBackground, rows: NDArray[np.int64], i_over_sigma: float
) -> NDArray[np.bool_]:
    """Which of some rows are strong above the mean background of the data set, and do not lie on a steep part of it."""
    result = np.zeros(len(rows), bool)
    place = np.full(store.n, -1)
    place[rows] = np.arange(len(rows))
    for rows_of, view in boxes_by_size(store):
        at = np.flatnonzero(place[rows_of] >= 0)
        if not len(at):
            continue
        half = max(min(4, min(view.box[1:]) // 2 - 1), 1)
        near = central_pixels(view.box, half)
        counts, used = view.counts(at), used_pixels(view.mask(at))
        template = np.repeat(radial.template(view, at)[:, None], view.box[0], axis=1).reshape(len(at), -1)
        outside, inside = used & ~near, used & near
        height = (counts * outside).sum(axis=1) / np.maximum((template * outside).sum(axis=1), 1e-9)
        under = height * (template * inside).sum(axis=1)
        signal = (counts * inside).sum(axis=1) - under
        low, high = (np.where(near, template, fill) for fill in (np.inf, 0.0))
        even = high.max(axis=1) < UNEVEN * np.maximum(low.min(axis=1), 1e-9)
        # Where nothing is known of the background, the flat one has decided.
        known = template.min(axis=1) > 0
        strong = signal > i_over_sigma * np.sqrt(np.maximum(signal, 1) + under)
        result[place[rows_of[at]]] = ~known | (even & strong)
    return result


def select_brightest(store: Any, *, n_max: int = MAX_STRONG, min_photons: int = 50, chunk: int = 4096) -> StrongSpots:
    """The spots with the most photons, background taken as 0: for boxes without pixels around the spot.

    Shoeboxes of spot finding are such. Widths that come from them are rough, but better than none.

    Args:
        store: ShoeboxStore.
        n_max: at most this many.
        min_photons: a spot has at least this many.
        chunk: rows read at a time.
    """
    photons = np.zeros(store.n)
    for rows_of, view in boxes_by_size(store):
        for start in range(0, view.n, chunk):
            at = np.arange(start, min(start + chunk, view.n))
            used = used_pixels(view.mask(at))
            photons[rows_of[at]] = np.einsum("np,np->n", view.counts(at), used, dtype=np.float64)
    rows = np.argsort(-photons, kind="stable")[:n_max]
    rows = np.sort(rows[photons[rows] >= min_photons])
    return StrongSpots(rows, np.zeros(len(rows)), photons[rows])
