"""Intensities against known truth: what a simulated data set can say that no real one can."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtalfast.errors import InputError
from xtalfast.io import Flag, ReflectionTable

Array = NDArray[np.float64]

# Edges of the expected I/sigma in which pulls are reported.
PULL_EDGES = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)


@dataclass(frozen=True)
class PullBin:
    """Pulls (I - truth) / sigma of the reflections whose expected I/sigma lies in [low, high)."""

    low: float
    high: float
    n: int
    mean: float
    sd: float
    robust_sd: float  # 1.4826 x median absolute deviation


@dataclass(frozen=True)
class TruthComparison:
    """Agreement of n intensities with truth on one scale."""

    n: int
    scale: float  # I = scale * truth
    r: float  # sum |I - k T| / sum k T
    cc: float  # Pearson correlation of I and T
    log_slope: float  # of log I on log k T where k T > 10 sigma (least squares)
    log_correlation: float
    n_log: int
    mean_at_zero: float  # mean I where T = 0
    error_at_zero: float  # its standard error
    pulls: tuple[PullBin, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare_with_truth(
    intensity: Array, variance: Array, truth: Array, *, scale: float | None = None, strong: float = 10.0
) -> TruthComparison:
    """Compare intensities with the true ones.

    Args:
        intensity: [N] estimated intensities (any sign).
        variance: [N] their variances, > 0.
        truth: [N] true intensities, >= 0, on a scale proportional to `intensity`.
        scale: intensity per unit of truth; None fits the one constant that makes the median ratio of the strong
            reflections 1, 1.0 for truth in photons.
        strong: slope and correlation of the logarithms use reflections with truth above `strong` sigma.

    Raises:
        InputError: shapes differ, or no finite reflection is left.
    """
    arrays = np.broadcast_arrays(np.asarray(intensity, float), np.asarray(variance, float), np.asarray(truth, float))
    i, v, t = (a[np.isfinite(arrays).all(axis=0) & (arrays[1] > 0)] for a in arrays)
    if i.size == 0:
        raise InputError(f"no reflection has finite intensity, truth and a positive variance (of {arrays[0].size})")
    sigma = np.sqrt(v)
    if scale is None:
        sure = i > strong * sigma
        sure = sure if sure.any() else i > np.median(i)
        scale = float(np.median(i[sure] / np.maximum(t[sure], np.finfo(float).tiny)))
    t = scale * t
    z = (i - t) / sigma
    expected = t / sigma
    high = (expected > strong) & (i > 0)
    slope = correlation = np.nan
    if high.sum() > 2:
        x, y = np.log(t[high]), np.log(i[high])
        slope = float(np.cov(x, y)[0, 1] / np.var(x, ddof=1))
        correlation = float(np.corrcoef(x, y)[0, 1])
    zero = t == 0
    n_zero = int(zero.sum())
    pulls = []
    for low, top in zip((-np.inf, *PULL_EDGES), (*PULL_EDGES, np.inf)):
        q = z[(expected >= low) & (expected < top)]
        if q.size > 1:
            robust = 1.4826 * float(np.median(np.abs(q - np.median(q))))
            pulls.append(PullBin(low, top, q.size, float(q.mean()), float(q.std(ddof=1)), robust))
    return TruthComparison(
        n=i.size,
        scale=scale,
        r=float(np.abs(i - t).sum() / t.sum()) if t.sum() > 0 else float("nan"),
        cc=float(np.corrcoef(i, t)[0, 1]) if i.size > 1 and t.std() > 0 else float("nan"),
        log_slope=slope,
        log_correlation=correlation,
        n_log=int(high.sum()),
        mean_at_zero=float(i[zero].mean()) if n_zero else float("nan"),
        error_at_zero=float(i[zero].std(ddof=1) / np.sqrt(n_zero)) if n_zero > 1 else float("nan"),
        pulls=tuple(pulls),
    )


def load_truth(path: str | os.PathLike, n_rows: int) -> dict[str, NDArray]:
    """The truth table that `xtalfast simulate` wrote, row by row with its predicted.refl.

    Raises:
        InputError: no such file, no truth table, or one of another data set.
    """
    try:
        with np.load(path) as archive:
            truth = dict(archive)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"cannot read the truth table {path}: {error}") from error
    if not {"photons", "fraction_recorded"} <= set(truth):
        raise InputError(f"{path}: wanted the arrays photons and fraction_recorded, got {', '.join(sorted(truth))}")
    if len(truth["photons"]) != n_rows:
        raise InputError(f"{path} has {len(truth['photons'])} reflections, the table {n_rows}: not of one simulation")
    return truth


def compare_channels(
    table: ReflectionTable, path: str | os.PathLike, channels: Sequence[str] = ("prf", "sum", "vi")
) -> dict[str, TruthComparison]:
    """Intensity channels of a table against the true photons, for reflections that were fully recorded."""
    truth = load_truth(path, len(table))
    whole = truth["fraction_recorded"] > 0.99
    found = {}
    for channel in channels:
        flag = Flag.IntegratedSum if channel == "sum" else Flag.IntegratedPrf
        if f"intensity.{channel}.value" in table:
            rows = whole & table.has_flags(Flag.Integrated) & table.has_flags(flag)
            found[channel] = compare_with_truth(
                table[f"intensity.{channel}.value"][rows],
                table[f"intensity.{channel}.variance"][rows],
                truth["photons"][rows],
                scale=1.0,
            )
    return found


def truth_table(table: ReflectionTable, path: str | os.PathLike) -> str:
    """Aligned text: how far each channel is from the truth."""
    names = {"prf": "profile fit", "sum": "summation", "vi": "posterior mean"}
    lines = [
        "against the true photons of fully recorded reflections",
        f"{'':<15}{'n':>7}{'R':>8}{'CC':>9}{'log slope':>11}{'log CC':>9}"
        f"{'pull sd, I/sigma < 2':>22}{'2-20':>8}{'mean I of I = 0':>20}",
    ]
    for channel, c in compare_channels(table, path).items():
        weak = [b for b in c.pulls if b.high <= 2]
        middle = [b for b in c.pulls if 2 <= b.low and b.high <= 20]

        def pooled(bins: list[PullBin]) -> float:
            n = sum(b.n for b in bins)
            return float(np.sqrt(sum(b.n * b.sd**2 for b in bins) / n)) if n else float("nan")

        lines.append(
            f"{names[channel]:<15}{c.n:>7}{c.r:>8.4f}{c.cc:>9.5f}{c.log_slope:>11.4f}{c.log_correlation:>9.5f}"
            f"{pooled(weak):>22.2f}{pooled(middle):>8.2f}{c.mean_at_zero:>12.2f} +- {c.error_at_zero:.2f}"
        )
    return "\n".join(lines)
