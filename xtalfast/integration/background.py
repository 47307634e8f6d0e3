"""Mean background of each shoebox from its background pixels, safe against zingers and the tails of neighbours."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from xtalfast.models import Array

# Upper tail probability of about 1e-4: a clean box of a thousand pixels loses 0.1 of them, and its mean 1e-4.
TAIL_SIGMA = 3.72
ITERATIONS = 5


class Background(NamedTuple):
    """Flat background of each shoebox."""

    mean: Array  # [N] counts per pixel
    variance: Array  # [N] of the mean
    dispersion: Array  # [N] variance / mean of the pixels used; 1 for Poisson
    n_used: NDArray[np.int64]  # [N] pixels
    outlier: NDArray[np.bool_]  # [N, P] pixels of `use` that were rejected


def robust_background(counts: NDArray, use: NDArray[np.bool_]) -> Background:
    """Poisson mean of the pixels in `use`, without those in the far upper tail of that Poisson law.

    A symmetric trimming would bias the mean of rare counts; a tail of known probability does not.

    Args:
        counts: photons, [N, P], any real dtype.
        use: pixels that are background, bool [N, P].

    Returns:
        Mean, its variance mean / n, dispersion and number of pixels used, [N] each, and the rejected pixels [N, P]. A
        box without background pixels has mean 0, variance inf, dispersion 1.
    """
    counts = np.asarray(counts, np.float32)
    keep = np.asarray(use, bool)
    for _ in range(ITERATIONS):
        n = np.maximum(keep.sum(axis=1, dtype=np.int64), 1)
        mean = np.einsum("np,np->n", counts, keep, dtype=np.float64) / n
        # Cornish-Fisher quantile of the Poisson law, skewness term included
        limit = np.ceil(mean + TAIL_SIGMA * np.sqrt(mean) + (TAIL_SIGMA**2 - 1) / 6)
        previous = keep
        keep = use & (counts <= limit[:, None].astype(np.float32))
        if np.array_equal(keep, previous):
            break
    n = keep.sum(axis=1, dtype=np.int64)
    some = np.maximum(n, 1)
    mean = np.einsum("np,np->n", counts, keep, dtype=np.float64) / some
    square = np.einsum("np,np,np->n", counts, counts, keep, dtype=np.float64) / some
    with np.errstate(divide="ignore", invalid="ignore"):
        dispersion = np.where((n > 1) & (mean > 0), (square - mean**2) / mean, 1.0)
        # A box of n empty pixels bounds the rate at about 1 / n; its variance is never zero.
        variance = np.where(n > 0, np.maximum(mean, 1.0 / some) / some, np.inf)
    return Background(np.where(n > 0, mean, 0.0), variance, dispersion, n, use & ~keep)
