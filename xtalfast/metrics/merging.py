"""How well equivalent observations agree: CC1/2, R factors, <I/sigI>, completeness, multiplicity; by shell and overall.

Merged intensities are weighted by 1 / sigI^2, R factors and the sigma-tau CC1/2 follow gemmi (and so Aimless), CC1/2
and CC_anom correlate unweighted means of random half sets as cctbx does. Everything is array arithmetic: millions of
observations take seconds.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import TYPE_CHECKING

import gemmi
import numpy as np
from numpy.typing import ArrayLike

from xtalfast.errors import InputError
from xtalfast.metrics.equivalents import Array, GroupMeans, Ints, MergedData
from xtalfast.metrics.observations import Observations, load_observations, select_observations
from xtalfast.metrics.shells import MergingStatistics, ShellStatistics

if TYPE_CHECKING:
    from xtalfast.io import ReflectionTable


def merging_statistics(
    data: Observations | ReflectionTable,
    cell: gemmi.UnitCell | None = None,
    space_group: gemmi.SpaceGroup | None = None,
    n_bins: int = 10,
    d_min: float | None = None,
    channel: str | None = "prf",
    seed: int = 0,
) -> MergingStatistics:
    """Agreement of symmetry-equivalent observations, in shells of equal volume in reciprocal space and overall.

    Args:
        data: observations, or a reflection table together with `cell` and `space_group`
        cell, space_group: of a reflection table; they override those of `data` when given
        n_bins: number of resolution shells
        d_min: high-resolution limit, A; the limit of the data when not given
        channel: which intensity of a reflection table (None: the best present)
        seed: of the random half sets of CC1/2 and CC_anom

    Raises:
        InputError: nothing left within the limits, or a table without cell or space group.
    """
    if not isinstance(data, Observations):
        if cell is None or space_group is None:
            raise InputError("cell and space_group are needed with a reflection table, got None: take the crystal's")
        data = select_observations(data, cell, space_group, channel)
    data = replace(data, cell=cell or data.cell, space_group=space_group or data.space_group)
    if n_bins < 1:
        raise InputError(f"n_bins must be at least 1, got {n_bins}")
    if d_min is not None and not d_min > 0:
        raise InputError(f"d_min must be a positive resolution in A, got {d_min}")
    if not len(data):
        raise InputError(f"{data.label}: no observations to merge")

    merged = MergedData.of(data, d_min, seed)
    unique = merged.unique
    overall, *shells = _statistics(merged, unique.shells(1)) + _statistics(merged, unique.shells(n_bins))
    if data.merged:
        nan = math.nan
        overall, *shells = (
            replace(shell, multiplicity=nan, anom_completeness=nan, anom_multiplicity=nan)
            for shell in [overall, *shells]
        )
    return MergingStatistics(
        overall=overall,
        shells=shells,
        source=data.source,
        channel=data.channel,
        scaling=data.scaling,
        merged=data.merged,
        cell=tuple(data.cell.parameters),
        space_group=data.space_group.xhm(),
        n_absent=unique.n_absent,
        rejected=data.rejected | ({"beyond d_min": unique.n_beyond} if unique.n_beyond else {}),
        seed=seed,
    )


def stats_for_file(
    path: str | os.PathLike,
    expt: str | os.PathLike | None = None,
    channel: str | None = None,
    n_bins: int = 10,
    d_min: float | None = None,
) -> MergingStatistics:
    """Merging statistics of a `.refl` or MTZ file; arguments as for `load_observations` and `merging_statistics`."""
    return merging_statistics(load_observations(path, expt, channel), n_bins=n_bins, d_min=d_min)


def _statistics(merged: MergedData, edges: Array) -> list[ShellStatistics]:
    mean, friedel, centric = merged.mean, merged.friedel, merged.unique.centric
    n_shells = len(edges) - 1
    shell = np.clip(np.searchsorted(-edges, -merged.unique.d, side="right") - 1, 0, n_shells - 1)

    def total(values: ArrayLike) -> Array:
        return np.bincount(shell, values, n_shells).astype(float)

    seen = mean.n > 0
    n_obs, n_seen, n_possible = total(mean.n), total(seen), total(np.ones(len(shell)))
    n_mates: Ints = np.count_nonzero(friedel.n.reshape(-1, 2), axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        columns: dict[str, Array] = {
            "completeness": n_seen / n_possible,
            "multiplicity": n_obs / n_seen,
            "mean_I": total(np.where(seen, mean.mean, 0)) / n_seen,
            "mean_I_over_sigma": total(np.where(seen, mean.mean / mean.sigma, 0)) / n_seen,
            "cc_half": _correlation(merged.half, shell, n_shells),
            "cc_half_sigma_tau": _sigma_tau(mean, shell, n_shells),
            "cc_anom": _correlation(merged.anomalous, shell, n_shells),
            "anom_completeness": total(~centric & (n_mates == 2)) / total(~centric),
            "anom_multiplicity": n_obs / total(n_mates),
        }
    n_half, n_anom = total(mean.n > 1), total(np.isfinite(merged.anomalous).all(axis=1))
    for suffix, means, shell_of in (("", mean, shell), ("_anom", friedel, np.repeat(shell, 2))):
        for name, values in _r_factors(means, shell_of, n_shells).items():
            columns[name + suffix] = values
    return [
        ShellStatistics(
            d_max=float(edges[i]),
            d_min=float(edges[i + 1]),
            n_obs=int(n_obs[i]),
            n_unique=int(n_seen[i]),
            n_possible=int(n_possible[i]),
            n_half=int(n_half[i]),
            n_anom=int(n_anom[i]),
            **{name: float(values[i]) for name, values in columns.items()},
        )
        for i in range(n_shells)
    ]


def _r_factors(means: GroupMeans, shell: Ints, n_shells: int) -> dict[str, Array]:
    """R_merge, R_meas, R_pim of the groups with two or more observations, [n_shells] each.

    Ref: Diederichs & Karplus (1997) Nat. Struct. Biol. 4, 269; Weiss (2001) J. Appl. Cryst. 34, 130.
    """
    rows = means.n > 1
    n, deviation, shell = means.n[rows], means.abs_deviation[rows], shell[rows]
    factor = {"r_merge": np.ones(len(n)), "r_meas": np.sqrt(n / (n - 1)), "r_pim": np.sqrt(1 / (n - 1))}
    with np.errstate(divide="ignore", invalid="ignore"):
        denominator = np.bincount(shell, n * means.mean[rows], n_shells)
        return {name: np.bincount(shell, f * deviation, n_shells) / denominator for name, f in factor.items()}


def _correlation(pairs: Array, shell: Ints, n_shells: int) -> Array:
    """Pearson correlation of pairs [U, 2] in each shell, rows with a NaN left out; NaN for fewer than three rows."""
    rows = np.isfinite(pairs).all(axis=1)
    shell, n = shell[rows], np.bincount(shell[rows], minlength=n_shells)
    with np.errstate(divide="ignore", invalid="ignore"):
        x, y = (v - (np.bincount(shell, v, n_shells) / n)[shell] for v in pairs[rows].T)
        xy, xx, yy = (np.bincount(shell, v, n_shells) for v in (x * y, x * x, y * y))
        return np.where(n > 2, xy / np.sqrt(xx * yy), np.nan)


def _sigma_tau(means: GroupMeans, shell: Ints, n_shells: int) -> Array:
    """CC1/2 without splitting: (var_y - var_e / 2) / (var_y + var_e / 2), [n_shells]."""
    rows = means.n > 1
    shell, mean = shell[rows], means.mean[rows]
    n = np.bincount(shell, minlength=n_shells)
    with np.errstate(divide="ignore", invalid="ignore"):
        centred = mean - (np.bincount(shell, mean, n_shells) / n)[shell]
        var_y = np.bincount(shell, centred**2, n_shells) / (n - 1)
        half_var_e = np.bincount(shell, means.variance[rows] / (means.n[rows] - 1), n_shells) / n
        return np.where(n > 1, (var_y - half_var_e) / (var_y + half_var_e), np.nan)
