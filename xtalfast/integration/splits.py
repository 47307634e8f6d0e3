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

    Up to 32 photons by counting random bits, above by the normal of the same mean and variance, rounded.

    Args:
        counts: integers [N, P].
        keys: one a reflection [N]; the same key gives the same draw wherever the reflection is read.

    Returns:
        [N, P] of the type of `counts`.
    """
    half = np.empty_like(counts)
    pixel = np.arange(counts.shape[1], dtype=np.uint32) * np.uint32(0x9E3779B1)
    for start in range(0, len(counts), 16):  # a piece at a time stays in the cache
        rows = slice(start, start + 16)
        bits = _mix32((keys[rows, None] >> np.uint64(32)).astype(np.uint32) + pixel)
        bits ^= keys[rows, None].astype(np.uint32)
        bits = _mix32(bits)
        y = counts[rows]
        # The lowest y bits, of which about half are set; 32 are two shifts, as a shift by the whole word is undefined.
        low = np.minimum(y, counts.dtype.type(32)).astype(np.uint32)
        first = low >> np.uint32(1)
        kept = bits & (((np.uint32(1) << first) << (low - first)) - np.uint32(1))
        # Number of set bits, in parallel within the word.
        kept -= (kept >> np.uint32(1)) & np.uint32(0x55555555)
        kept = (kept & np.uint32(0x33333333)) + ((kept >> np.uint32(2)) & np.uint32(0x33333333))
        kept = (kept + (kept >> np.uint32(4))) & np.uint32(0x0F0F0F0F)
        half[rows] = (kept * np.uint32(0x01010101)) >> np.uint32(24)
        bright = np.flatnonzero(y.reshape(-1) > 32)
        photons = y.reshape(-1)[bright].astype(np.float64)
        u, v = ((_mix32(bits.reshape(-1)[bright] + np.uint32(k)) + 0.5) / 2.0**32 for k in (1, 2))
        normal = np.sqrt(-2 * np.log(u)) * np.cos(2 * np.pi * v)
        drawn = np.rint(0.5 * (photons + np.sqrt(photons) * normal))
        half[rows].reshape(-1)[bright] = np.clip(drawn, 0, photons)
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


def _mix32(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """A 32-bit mixer with low bias (two multiplications, as vector instructions have them)."""
    x = x ^ (x >> np.uint32(16))
    x *= np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    x ^= x >> np.uint32(16)
    return x
