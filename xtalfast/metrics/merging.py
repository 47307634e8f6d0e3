"""How well equivalent observations agree: CC1/2, R factors, <I/sigI>, completeness, multiplicity; by shell and overall.

Merged intensities are weighted by 1 / sigI^2, R factors and the sigma-tau CC1/2 follow gemmi (and so Aimless), CC1/2
and CC_anom correlate unweighted means of random half sets as cctbx does. Everything is array arithmetic: millions of
observations take seconds.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import gemmi
import numpy as np
from numpy.typing import ArrayLike

from xtalfast.errors import InputError
from xtalfast.metrics.equivalents import Array, GroupMeans, Ints, UniqueReflections, half_set_means
from xtalfast.metrics.observations import Observations, heading, load_observations, select_observations

if TYPE_CHECKING:
    from xtalfast.io import ReflectionTable


@dataclass(frozen=True)
class ShellStatistics:
    """Statistics of the reflections with d_min <= d <= d_max (A); NaN where a quantity is not defined.

    `_anom` of an R factor: I(+) and I(-) merged apart. Fractions, not per cent.
    """

    d_max: float
    d_min: float
    n_obs: int
    n_unique: int
    n_possible: int
    completeness: float
    multiplicity: float
    mean_I: float  # of merged intensities
    mean_I_over_sigma: float  # of merged intensities
    r_merge: float
    r_meas: float
    r_pim: float
    r_merge_anom: float
    r_meas_anom: float
    r_pim_anom: float
    cc_half: float  # random half sets
    cc_half_sigma_tau: float  # Assmann, Brehm & Diederichs (2016) J. Appl. Cryst. 49, 1021
    n_half: int  # unique reflections with two or more observations
    cc_anom: float
    n_anom: int  # acentric reflections with two or more observations of each Friedel mate
    anom_completeness: float
    anom_multiplicity: float


@dataclass(frozen=True)
class MergingStatistics:
    """Overall and per-shell statistics of one set of observations."""

    overall: ShellStatistics
    shells: list[ShellStatistics]
    source: str
    channel: str
    scaling: str  # scaled, unscaled or as in file
    merged: bool
    cell: tuple[float, ...]
    space_group: str
    n_absent: int  # observations of systematically absent reflections, left out
    rejected: dict[str, int] = field(default_factory=dict)
    seed: int = 0

    @property
    def label(self) -> str:
        """For headings: source, channel, scaling."""
        return heading(self.source, self.channel, self.scaling)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, NaN as None."""

        def plain(shell: ShellStatistics) -> dict[str, Any]:
            values = asdict(shell)
            return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}

        rest = {k: v for k, v in vars(self).items() if k not in ("overall", "shells")}
        return {**rest, "overall": plain(self.overall), "shells": [plain(shell) for shell in self.shells]}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    def table(self) -> str:
        """Aligned text: one line a shell, the whole set last."""
        rows = [[title for title, _, _ in SHELL_COLUMNS]]
        rows += [[format_value(shell, name, spec) for _, name, spec in SHELL_COLUMNS] for shell in self.shells]
        rows += [[format_value(self.overall, name, spec) for _, name, spec in SHELL_COLUMNS]]
        lines = _align(rows)
        lines.insert(len(lines) - 1, "-" * len(lines[0]))
        cell = " ".join(f"{x:.2f}" for x in self.cell)
        head = [f"{self.label}, {self.space_group}, cell {cell}"]
        if self.scaling == "unscaled":
            head.append("unscaled: agreement is before any scaling and improves when the data are scaled")
        left_out = {**self.rejected, "systematically absent": self.n_absent}
        head.append("left out: " + (", ".join(f"{n} {why}" for why, n in left_out.items() if n) or "nothing"))
        return "\n".join(head + lines)


# Heading, attribute, format of the columns of a table of shells.
SHELL_COLUMNS = [
    ("d_max", "d_max", ".2f"),
    ("d_min", "d_min", ".2f"),
    ("n_obs", "n_obs", "d"),
    ("n_uniq", "n_unique", "d"),
    ("mult", "multiplicity", ".1f"),
    ("compl", "completeness", ".1%"),
    ("<I>", "mean_I", ".4g"),
    ("<I/sigI>", "mean_I_over_sigma", ".1f"),
    ("Rmerge", "r_merge", ".3f"),
    ("Rmeas", "r_meas", ".3f"),
    ("Rpim", "r_pim", ".3f"),
    ("CC1/2", "cc_half", ".3f"),
    ("CCanom", "cc_anom", ".3f"),
]
_COMPARED = [
    ("high resolution (A)", "d_min", ".2f"),
    ("low resolution (A)", "d_max", ".2f"),
    ("observations", "n_obs", "d"),
    ("unique", "n_unique", "d"),
    ("completeness", "completeness", ".1%"),
    ("multiplicity", "multiplicity", ".1f"),
    ("<I/sigI>", "mean_I_over_sigma", ".1f"),
    ("Rmerge(I)", "r_merge", ".3f"),
    ("Rmerge(I+/-)", "r_merge_anom", ".3f"),
    ("Rmeas(I)", "r_meas", ".3f"),
    ("Rmeas(I+/-)", "r_meas_anom", ".3f"),
    ("Rpim(I)", "r_pim", ".3f"),
    ("Rpim(I+/-)", "r_pim_anom", ".3f"),
    ("CC1/2", "cc_half", ".3f"),
    ("CC1/2 sigma-tau", "cc_half_sigma_tau", ".3f"),
    ("CC anomalous", "cc_anom", ".3f"),
    ("anomalous completeness", "anom_completeness", ".1%"),
    ("anomalous multiplicity", "anom_multiplicity", ".1f"),
]


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

    unique = UniqueReflections.of(data, d_min)
    both = [unique.shells(n_bins), unique.shells(1)]
    per_shell, overall = ([*_statistics(unique, data, edges, seed)] for edges in both)
    return MergingStatistics(
        overall=overall[0],
        shells=per_shell,
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


def side_by_side(statistics: Sequence[MergingStatistics]) -> str:
    """Text table of several sets, one column each: the whole set and, in brackets, its outermost shell."""
    rows = [["", *(s.label for s in statistics)]]
    for title, name, spec in _COMPARED:
        rows.append(
            [title]
            + [f"{format_value(s.overall, name, spec)} ({format_value(s.shells[-1], name, spec)})" for s in statistics]
        )
    return "\n".join(_align(rows))


def format_value(shell: ShellStatistics, name: str, spec: str) -> str:
    """One value as text; a dash where it is not defined."""
    value = getattr(shell, name)
    return "-" if isinstance(value, float) and not math.isfinite(value) else format(value, spec)


def _align(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]) for row in rows]


def _statistics(unique: UniqueReflections, data: Observations, edges: Array, seed: int) -> Sequence[ShellStatistics]:
    n_shells, n_unique = len(edges) - 1, len(unique.d)
    shell = np.clip(np.searchsorted(-edges, -unique.d, side="right") - 1, 0, n_shells - 1)
    I, sigI = data.I[unique.rows], data.sigI[unique.rows]
    mean = GroupMeans.of(unique.index, n_unique, I, sigI)
    friedel = GroupMeans.of(2 * unique.index + ~unique.plus, 2 * n_unique, I, sigI)
    half = half_set_means(unique.index, n_unique, I, seed)
    half_friedel = half_set_means(2 * unique.index + ~unique.plus, 2 * n_unique, I, seed).reshape(-1, 2, 2)
    anomalous = half_friedel[:, 0] - half_friedel[:, 1]  # [U, 2] I(+) - I(-) of the two halves
    anomalous[unique.centric] = np.nan

    def total(values: ArrayLike) -> Array:
        return np.bincount(shell, values, n_shells).astype(float)

    seen = mean.n > 0
    n_obs, n_seen, n_possible = total(mean.n), total(seen), total(np.ones(n_unique))
    n_mates: Ints = np.count_nonzero(friedel.n.reshape(-1, 2), axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        columns: dict[str, Array] = {
            "completeness": n_seen / n_possible,
            "multiplicity": n_obs / n_seen,
            "mean_I": total(np.where(seen, mean.mean, 0)) / n_seen,
            "mean_I_over_sigma": total(np.where(seen, mean.mean / mean.sigma, 0)) / n_seen,
            "cc_half": _correlation(half, shell, n_shells),
            "cc_half_sigma_tau": _sigma_tau(mean, shell, n_shells),
            "cc_anom": _correlation(anomalous, shell, n_shells),
            "anom_completeness": total(~unique.centric & (n_mates == 2)) / total(~unique.centric),
            "anom_multiplicity": n_obs / total(n_mates),
        }
    n_half, n_anom = total(mean.n > 1), total(np.isfinite(anomalous).all(axis=1))
    for suffix, merged, shell_of in (("", mean, shell), ("_anom", friedel, np.repeat(shell, 2))):
        for name, values in _r_factors(merged, shell_of, n_shells).items():
            columns[name + suffix] = values
    if data.merged:
        for name in ("multiplicity", "anom_completeness", "anom_multiplicity"):
            columns[name] = np.full(n_shells, np.nan)
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


def _r_factors(merged: GroupMeans, shell: Ints, n_shells: int) -> dict[str, Array]:
    """R_merge, R_meas, R_pim of the groups with two or more observations, [n_shells] each.

    Ref: Diederichs & Karplus (1997) Nat. Struct. Biol. 4, 269; Weiss (2001) J. Appl. Cryst. 34, 130.
    """
    rows = merged.n > 1
    n, deviation, shell = merged.n[rows], merged.abs_deviation[rows], shell[rows]
    factor = {"r_merge": np.ones(len(n)), "r_meas": np.sqrt(n / (n - 1)), "r_pim": np.sqrt(1 / (n - 1))}
    with np.errstate(divide="ignore", invalid="ignore"):
        denominator = np.bincount(shell, n * merged.mean[rows], n_shells)
        return {name: np.bincount(shell, f * deviation, n_shells) / denominator for name, f in factor.items()}


def _correlation(pairs: Array, shell: Ints, n_shells: int) -> Array:
    """Pearson correlation of pairs [U, 2] in each shell, rows with a NaN left out; NaN for fewer than three rows."""
    rows = np.isfinite(pairs).all(axis=1)
    shell, n = shell[rows], np.bincount(shell[rows], minlength=n_shells)
    with np.errstate(divide="ignore", invalid="ignore"):
        x, y = (v - (np.bincount(shell, v, n_shells) / n)[shell] for v in pairs[rows].T)
        xy, xx, yy = (np.bincount(shell, v, n_shells) for v in (x * y, x * x, y * y))
        return np.where(n > 2, xy / np.sqrt(xx * yy), np.nan)


def _sigma_tau(merged: GroupMeans, shell: Ints, n_shells: int) -> Array:
    """CC1/2 without splitting: (var_y - var_e / 2) / (var_y + var_e / 2), [n_shells]."""
    rows = merged.n > 1
    shell, mean = shell[rows], merged.mean[rows]
    n = np.bincount(shell, minlength=n_shells)
    with np.errstate(divide="ignore", invalid="ignore"):
        centred = mean - (np.bincount(shell, mean, n_shells) / n)[shell]
        var_y = np.bincount(shell, centred**2, n_shells) / (n - 1)
        half_var_e = np.bincount(shell, merged.variance[rows] / (merged.n[rows] - 1), n_shells) / n
        return np.where(n > 1, (var_y - half_var_e) / (var_y + half_var_e), np.nan)
