"""Random choices that follow from keys alone: the same reflection, the same choice, in any batch, order or process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def held_out(stores: Sequence[Any], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which reflections are kept from training, by a hash of seed, store number and row of the .refl: [all rows] bool.

    The choice does not depend on the order, on other reflections or on the number of processes.
    """
    rows = (np.asarray(store.metadata["row"]).astype(np.uint64) for store in stores)
    keys = np.concatenate([mixed_keys(seed, number, row) for number, row in enumerate(rows)])
    return keys < np.uint64(min(int(fraction * 2**64), 2**64 - 1))


def thin_photons(counts: NDArray, keys: NDArray[np.uint64]) -> NDArray:
    """A random half of the photons: Binomial(counts, 1/2), from the keys alone.

    Up to 64 photons by counting random bits, above by the normal of the same mean and variance, rounded.

    Args:
        counts: integers [N, P].
        keys: one a reflection [N]; the same key gives the same draw wherever the reflection is read.

    Returns:
        [N, P] of the type of `counts`.
    """
    with np.errstate(over="ignore"):
        pixel = np.arange(counts.shape[1], dtype=np.uint64)
        bits = _splitmix64(keys[:, None] + pixel * np.uint64(0xD1342543DE82EF95))
        n = np.minimum(counts, 64).astype(np.uint64)
        kept = bits & np.where(n == 0, np.uint64(0), ~np.uint64(0) >> ((np.uint64(64) - n) & np.uint64(63)))
        # Number of set bits, in parallel within the word.
        kept -= (kept >> np.uint64(1)) & np.uint64(0x5555555555555555)
        kept = (kept & np.uint64(0x3333333333333333)) + ((kept >> np.uint64(2)) & np.uint64(0x3333333333333333))
        kept = (kept + (kept >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
        half = ((kept * np.uint64(0x0101010101010101)) >> np.uint64(56)).astype(counts.dtype)
        bright = np.nonzero(counts > 64)
        u, v = (_splitmix64(bits[bright] + np.uint64(k)) / 2.0**64 for k in (1, 2))
    normal = np.sqrt(-2 * np.log(np.maximum(u, 2.0**-64))) * np.cos(2 * np.pi * v)
    y = counts[bright].astype(np.float64)
    half[bright] = np.clip(np.rint(0.5 * (y + np.sqrt(y) * normal)), 0, y).astype(counts.dtype)
    return half


def mixed_keys(seed: int, number: int, rows: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Unrelated 64-bit keys of rows, for each seed and number."""
    with np.errstate(over="ignore"):
        return _splitmix64(rows + _splitmix64(np.uint64(number) + _splitmix64(np.uint64(seed))))


def _splitmix64(x: Any) -> Any:
    """The 64-bit mixer of Steele, Lea & Flood (2014): neighbouring numbers become unrelated ones."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
