"""Which observations are of the same reflection, and their means: the array arithmetic under the merging statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass

import gemmi
import numpy as np
from numpy.typing import NDArray

from xtalfast.errors import InputError
from xtalfast.metrics.observations import Observations

Array = NDArray[np.float64]
Ints = NDArray[np.int64]


def canonical_index(hkl: NDArray[np.int32], space_group: gemmi.SpaceGroup) -> tuple[Ints, NDArray[np.bool_]]:
    """One number per set of symmetry-equivalent reflections, Friedel mates included.

    Args:
        hkl: Miller indices [N, 3], |h|, |k|, |l| < 2^20

    Returns:
        key [N], the same for all equivalents; plus [N], True for I(+) and for centric reflections.
    """
    # Reflections are permuted by the rotation parts alone; the key of -h is minus the key of h.
    rotations = {tuple(np.ravel(op.rot) // gemmi.Op.DEN) for op in space_group.operations().sym_ops}
    hkl = np.asarray(hkl, np.int64)
    largest = np.full(len(hkl), np.iinfo(np.int64).min)
    smallest = np.full(len(hkl), np.iinfo(np.int64).max)
    for rotation in rotations:
        h, k, l = (hkl @ np.reshape(rotation, (3, 3))).T
        key = (h << 42) + (k << 21) + l
        np.maximum(largest, key, out=largest)
        np.minimum(smallest, key, out=smallest)
    return np.maximum(largest, -smallest), largest >= -smallest


@dataclass(frozen=True)
class UniqueReflections:
    """The unique reflections that could have been seen, and which of them each observation is."""

    d: Array  # [U] of all possible reflections, A
    centric: NDArray[np.bool_]  # [U]
    index: Ints  # [M] observation -> unique reflection
    rows: Ints  # [M] rows of the observations that are used
    plus: NDArray[np.bool_]  # [M]
    n_absent: int
    n_beyond: int

    @classmethod
    def of(cls, data: Observations, d_min: float | None) -> UniqueReflections:
        key, plus = canonical_index(data.hkl, data.space_group)
        absent = data.space_group.operations().systematic_absences(data.hkl)
        d_observed = data.d
        # A cell that breaks the symmetry a little gives equivalents slightly different d: hence the margin.
        possible = gemmi.make_miller_array(data.cell, data.space_group, 0.99 * min(d_observed.min(), d_min or math.inf))
        possible_key, _ = canonical_index(possible, data.space_group)
        order = np.argsort(possible_key)
        index = order[np.minimum(np.searchsorted(possible_key[order], key), len(order) - 1)]
        d = data.cell.calculate_d_array(possible)
        known = ~absent & (possible_key[index] == key)
        # Rounding of a limit given with a few digits must not cut the reflections on it.
        within = d[index] >= (d_min or 0.0) * (1 - 1e-6)
        used = known & within
        if not used.any():
            raise InputError(
                f"{data.label}: none of {len(data)} observations is left with d_min {d_min or 0:g} A "
                f"({int(absent.sum())} systematically absent in {data.space_group.xhm()})"
            )
        low = d[index[used]].max()
        high = min(d_min or math.inf, d[index[used]].min())
        inside = (d <= low) & (d >= high * (1 - 1e-6))
        renumber = np.cumsum(inside) - 1
        return cls(
            d=d[inside],
            centric=data.space_group.operations().centric_flag_array(possible[inside]),
            index=renumber[index[used]],
            rows=np.flatnonzero(used),
            plus=plus[used],
            n_absent=int(np.count_nonzero(absent)),
            n_beyond=int(np.count_nonzero(known & ~within)),
        )

    def shells(self, n_bins: int) -> Array:
        """Edges in d, low resolution first [n_bins + 1]: equal volumes in reciprocal space."""
        edges = np.linspace(self.d.max() ** -3, self.d.min() ** -3, n_bins + 1)
        return edges ** (-1 / 3)


@dataclass(frozen=True)
class GroupMeans:
    """Weighted means of the observations of each group; groups may be empty."""

    n: Ints
    mean: Array
    sigma: Array
    abs_deviation: Array  # sum of |I - mean|
    variance: Array  # weighted mean of (I - mean)^2

    @classmethod
    def of(cls, group: Ints, n_groups: int, I: Array, sigI: Array) -> GroupMeans:
        def total(values: Array) -> Array:
            return np.bincount(group, values, n_groups).astype(float)

        weight = sigI**-2
        with np.errstate(divide="ignore", invalid="ignore"):
            sum_weight = total(weight)
            mean = total(weight * I) / sum_weight
            deviation = I - mean[group]
            return cls(
                n=np.bincount(group, minlength=n_groups),
                mean=mean,
                sigma=sum_weight**-0.5,
                abs_deviation=total(np.abs(deviation)),
                variance=total(weight * deviation**2) / sum_weight,
            )


def half_set_means(group: Ints, n_groups: int, I: Array, seed: int) -> Array:
    """Means of two random halves of each group, [n_groups, 2]; NaN for groups of fewer than two."""
    rng = np.random.default_rng(seed)
    order = np.argsort(group + rng.random(len(group)))  # by group, in random order within
    count = np.bincount(group, minlength=n_groups)
    rank = np.arange(len(group)) - np.repeat(np.cumsum(count) - count, count)
    # The extra observation of an odd group goes to either half with equal chance.
    half = (rank + np.repeat(rng.integers(0, 2, n_groups), count)) % 2
    slot = 2 * group[order] + half
    with np.errstate(invalid="ignore"):
        means = np.bincount(slot, I[order], 2 * n_groups) / np.bincount(slot, minlength=2 * n_groups)
    means = means.reshape(-1, 2)
    means[count < 2] = np.nan
    return means


@dataclass(frozen=True)
class MergedData:
    """Observations merged in the ways that the statistics need; U unique reflections, seen or not."""

    unique: UniqueReflections
    mean: GroupMeans  # [U], Friedel mates together
    friedel: GroupMeans  # [2 U], I(+) and I(-) alternating
    half: Array  # [U, 2] means of random half sets
    anomalous: Array  # [U, 2] I(+) - I(-) of random half sets; NaN for centric reflections

    @classmethod
    def of(cls, data: Observations, d_min: float | None, seed: int) -> MergedData:
        unique = UniqueReflections.of(data, d_min)
        I, sigI = data.I[unique.rows], data.sigI[unique.rows]
        n, mate = len(unique.d), 2 * unique.index + ~unique.plus
        half_friedel = half_set_means(mate, 2 * n, I, seed).reshape(-1, 2, 2)
        anomalous = half_friedel[:, 0] - half_friedel[:, 1]
        anomalous[unique.centric] = np.nan
        return cls(
            unique=unique,
            mean=GroupMeans.of(unique.index, n, I, sigI),
            friedel=GroupMeans.of(mate, 2 * n, I, sigI),
            half=half_set_means(unique.index, n, I, seed),
            anomalous=anomalous,
        )
