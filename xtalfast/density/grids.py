"""Grids for maps: sizes an FFT likes, a whole number of patches along each axis, never a change of the cell."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xtalfast.errors import InputError

MAX_SIZE = 4096


@lru_cache
def _sizes(multiple: int, largest_factor: int) -> NDArray[np.int64]:
    """All multiples of `multiple` up to MAX_SIZE with no prime factor above `largest_factor`."""

    def smooth(n: int) -> bool:
        for p in range(2, largest_factor + 1):
            while n % p == 0:
                n //= p
        return n == 1

    return np.array([n for n in range(multiple, MAX_SIZE + 1, multiple) if smooth(n)])


def grid_size(
    cell: ArrayLike, d_min: ArrayLike, *, rate: ArrayLike = 3.0, multiple: int = 4, paper: bool = False
) -> NDArray[np.int64]:
    """Grid points along a, b, c: the smallest allowed sizes with a spacing of at most d_min / rate along each axis.

    Allowed are multiples of `multiple` with prime factors 2, 3 and 5, so that patches tile the cell and periodicity is
    exact; with `paper`, even numbers with prime factors up to 19, as CCP4's `fft` takes them.

    Args:
        cell: a, b, c, ... in A (further columns are not looked at), [..., 3 or 6].
        d_min: resolution limit in A, [...].
        rate: grid points per d_min, [...]; above 2, else reflections at d_min would fold over.
        multiple: 4, the patch of the network, or 8 for fewer different grids.
        paper: the paper's sizes instead.

    Returns:
        int64 [..., 3].

    Raises:
        InputError: rate, d_min or cell out of range, or more than 4096 points along an axis.
    """
    lengths = np.asarray(cell, float)[..., :3]
    resolution, rate = np.asarray(d_min, float), np.asarray(rate, float)
    if not (np.isfinite(resolution) & (resolution > 0)).all():
        raise InputError(f"d_min must be above 0 A, got {np.min(resolution):g}")
    if not (rate > 2).all():
        raise InputError(f"rate must be above 2 grid points per d_min, got {np.min(rate):g}")
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        raise InputError(f"cell edges must be above 0 A, got {np.min(lengths):g}")
    sizes = _sizes(2, 19) if paper else _sizes(multiple, 5)
    wanted = lengths * (rate / resolution)[..., None]
    if wanted.max(initial=0) > sizes[-1]:
        raise InputError(f"a grid of {math.ceil(wanted.max())} points along an axis; at most {sizes[-1]}, raise d_min")
    # A hair of slack: 48.0000001 points come from rounding, not from the cell.
    return sizes[np.searchsorted(sizes, wanted * (1 - 1e-9))]


def bin_statistics(grids: ArrayLike, minimum: int = 20) -> tuple[int, float]:
    """Number of different grids among [N, 3], and the part of them that at least `minimum` examples share."""
    grids = np.asarray(grids)
    if len(grids) == 0:
        return 0, 0.0
    _, counts = np.unique(grids, axis=0, return_counts=True)
    return len(counts), float(counts[counts >= minimum].sum() / len(grids))
