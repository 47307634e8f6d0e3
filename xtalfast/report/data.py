"""What a report can show, and helpers that choose it: every part is optional."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xtalfast.metrics import MergingStatistics

if TYPE_CHECKING:
    from xtalfast.integration.calibrate import Calibration


@dataclass(frozen=True)
class ProfileGrid:
    """Mean profiles over the detector: summed over z, rows from the top of the detector to its bottom."""

    profiles: NDArray  # [R, C, y, x], each sums to 1; NaN where there is none
    n: NDArray  # [R, C] reflections behind each


@dataclass(frozen=True)
class ShoeboxExample:
    """One reflection with its pixels: counts, fitted model (I p + B), used pixels; all [z, y, x]."""

    group: str  # e.g. strong, medium, weak, outlier
    hkl: tuple[int, int, int]
    xyz_px: tuple[float, float, float]
    d: float  # A
    intensity: float  # counts
    sigma: float
    background: float  # counts per pixel
    counts: NDArray
    model: NDArray
    mask: NDArray  # True = used
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """Intensities of the same reflections from elsewhere, on the scale of ours.

    With `is_truth` the pulls (value - reference) / sigma are shown too, by true I/sigma.
    """

    name: str  # of the reference, e.g. truth, DIALS profile fit, summation
    reference: NDArray  # [N], counts
    value: NDArray  # [N], counts
    sigma: NDArray  # [N]
    is_truth: bool = False


@dataclass
class ReportData:
    """All that a report can show; every field but the title may be left empty."""

    title: str
    created: str = ""  # date and time; now when empty
    key_figures: Mapping[str, str] = field(default_factory=dict)  # short name -> value with unit
    parameters: Mapping[str, Any] = field(default_factory=dict)
    changed: Collection[str] = ()  # names of the parameters that differ from their default
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)  # stage -> wall time
    files: Sequence[str] = ()  # outputs
    warnings: Sequence[str] = ()
    flags: Mapping[str, int] = field(default_factory=dict)  # flag -> reflections that carry it
    history: Mapping[str, Sequence[float]] = field(default_factory=dict)  # `epoch` or `step`, then loss columns
    statistics: Sequence[MergingStatistics] = ()
    profiles: ProfileGrid | None = None
    shoeboxes: Sequence[ShoeboxExample] = ()
    comparisons: Sequence[Comparison] = ()
    intensities: Mapping[str, tuple[NDArray, NDArray]] = field(default_factory=dict)  # channel -> I, sigma [N]
    pulls: Mapping[str, NDArray] = field(default_factory=dict)  # e.g. thinned halves -> (I1 - I2) / sigma
    calibrations: Sequence[Calibration] = ()
    outliers: Sequence[Mapping[str, Any]] = ()  # one mapping a row, all with the same keys


def mean_profiles(
    profiles: NDArray, xy_px: NDArray, image_size: tuple[int, int], grid: tuple[int, int] = (3, 3)
) -> ProfileGrid:
    """Average profiles by region of the detector, for `ReportData.profiles`.

    Args:
        profiles: [N, z, y, x], each sums to 1
        xy_px: where they were predicted, [N, 2], px (fast, slow)
        image_size: of the detector, px (fast, slow)
        grid: rows and columns of regions
    """
    n_rows, n_columns = grid
    xy_px = np.asarray(xy_px, float)
    column = np.clip(xy_px[:, 0] / image_size[0] * n_columns, 0, n_columns - 1).astype(np.int64)
    row = np.clip(xy_px[:, 1] / image_size[1] * n_rows, 0, n_rows - 1).astype(np.int64)
    region = row * n_columns + column
    flat = np.asarray(profiles, float).sum(axis=1)
    total = np.zeros((n_rows * n_columns, *flat.shape[1:]))
    np.add.at(total, region, flat)
    n = np.bincount(region, minlength=n_rows * n_columns)
    with np.errstate(invalid="ignore"):
        total /= n[:, None, None]
    return ProfileGrid(total.reshape(n_rows, n_columns, *flat.shape[1:]), n.reshape(grid))


def example_rows(
    intensity: NDArray, sigma: NDArray, misfit: NDArray | None = None, *, n_each: int = 3, seed: int = 0
) -> dict[str, NDArray[np.int64]]:
    """Rows worth looking at: random strong (I > 20 sigma), medium (3-10), weak (below 1), and the worst misfits."""
    rng = np.random.default_rng(seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.asarray(intensity, float) / np.asarray(sigma, float)
    ranges = {"strong": (20, math.inf), "medium": (3, 10), "weak": (-math.inf, 1)}
    chosen = {}
    for name, (low, high) in ranges.items():
        rows = np.flatnonzero((ratio > low) & (ratio < high))
        chosen[name] = np.sort(rng.permutation(rows)[:n_each])
    if misfit is not None:
        worst = np.argsort(np.where(np.isfinite(misfit), -np.asarray(misfit, float), math.inf), kind="stable")
        chosen["outlier"] = worst[:n_each]
    return {name: rows for name, rows in chosen.items() if len(rows)}
