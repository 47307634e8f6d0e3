"""The merging statistics as values, as JSON and as text tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from xtalfast.metrics.observations import heading


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

    def to_json(self) -> dict[str, Any]:
        """Plain values that `json.dumps` takes; NaN as None."""

        def plain(shell: ShellStatistics) -> dict[str, Any]:
            values = asdict(shell)
            return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}

        rest = {k: v for k, v in vars(self).items() if k not in ("overall", "shells")}
        return {**rest, "overall": plain(self.overall), "shells": [plain(shell) for shell in self.shells]}

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


def side_by_side(statistics: Mapping[str, MergingStatistics]) -> str:
    """Text table of several sets by name, one column each: the whole set and, in brackets, its outermost shell."""
    rows = [
        ["", *statistics],
        ["intensity", *(f"{s.channel}, {s.scaling}" for s in statistics.values())],
        *([title, *(_whole_and_outer(s, name, spec) for s in statistics.values())] for title, name, spec in _COMPARED),
    ]
    return "\n".join(_align(rows))


def _whole_and_outer(statistics: MergingStatistics, name: str, spec: str) -> str:
    return f"{format_value(statistics.overall, name, spec)} ({format_value(statistics.shells[-1], name, spec)})"


def format_value(shell: ShellStatistics, name: str, spec: str) -> str:
    """One value as text; a dash where it is not defined."""
    value = getattr(shell, name)
    return "-" if isinstance(value, float) and not math.isfinite(value) else format(value, spec)


def _align(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]) for row in rows]
