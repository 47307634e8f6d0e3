"""Are the sigmas right? Three answers from the data set itself, by bins of I/sigma.

- simulation: counts drawn from the fitted model (posterior mean, profile, background) go through the same estimator,
  whose estimates are compared with the intensities drawn from: right if the estimator is.
- halves: every photon is thrown into one of two halves, both are integrated and compared: right if counting noise is
  what is claimed, on real pixels.
- mates: observations against the mean of the others of the same reflection, after a smooth scale for each experiment:
  what thinning cannot see, errors of profile, scale and geometry, is in it.

Nothing here changes an intensity or a sigma: `factor` is what sigmas of a bin would have to be multiplied by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtalfast.integration.estimate import Estimates, estimate, symmetry_mates
from xtalfast.integration.references import relative_scales
from xtalfast.models import Array, Experiment

Progress = Callable[[str, int, int], None]

MAX_ROWS = 20000  # reflections, evenly chosen
EDGES = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, np.inf)


@dataclass(frozen=True)
class CalibrationBin:
    """Pulls of the reflections with an expected I/sigma in [low, high)."""

    low: float
    high: float
    n: int
    mean: float
    sd: float
    coverage_68: float  # share within one sigma
    coverage_95: float  # share within 1.96 sigma
    factor: float  # robust sd: what sigmas would have to be multiplied by


@dataclass(frozen=True)
class Calibration:
    """Pulls of one kind."""

    name: str
    pulls: Array
    bins: tuple[CalibrationBin, ...]

    @classmethod
    def of(cls, name: str, pulls: Array, expected: Array) -> Calibration:
        """Sort pulls by expected I/sigma."""
        found = []
        for low, high in pairwise(EDGES):
            z = pulls[(expected >= low) & (expected < high) if low else expected < high]
            if len(z) > 1:
                robust = 1.4826 * float(np.median(np.abs(z - np.median(z))))
                within_1, within_2 = (float(np.mean(np.abs(z) < limit)) for limit in (1.0, 1.96))
                found.append(
                    CalibrationBin(low, high, len(z), float(z.mean()), float(z.std()), within_1, within_2, robust)
                )
        return cls(name, pulls, tuple(found))

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "bins": [asdict(b) for b in self.bins]}


class _OtherCounts:
    """Some rows of a store with other counts, made size by size."""

    box = None

    def __init__(self, store: Any, rows: NDArray[np.int64], make: Callable[[Any], NDArray]) -> None:
        self.n = len(rows)
        self.metadata = {name: np.asarray(values[rows]) for name, values in store.metadata.items()}
        place = np.full(store.n, -1)
        place[rows] = np.arange(len(rows))
        self._views = [_OtherView(view, place[view.rows], make(view)) for view in store.by_size(rows)]

    def by_size(self) -> Iterator[_OtherView]:
        yield from self._views


class _OtherView:
    def __init__(self, view: Any, rows: NDArray[np.int64], counts: NDArray) -> None:
        self.rows, self.box, self.n, self.n_pixels, self.metadata = rows, view.box, view.n, view.n_pixels, view.metadata
        self._view, self._counts, self.dtype = view, counts, counts.dtype

    def counts(self, rows: NDArray[np.int64]) -> NDArray:
        return self._counts[rows]

    def mask(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        return self._view.mask(rows)


def calibrate(
    store: Any,
    source: Any,
    experiments: Sequence[Experiment],
    estimates: Estimates,
    *,
    reference: Any | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Calibration]:
    """Pulls from simulation, photon-thinned halves and symmetry mates.

    Args:
        store, source, experiments, reference: as for `estimate`.
        estimates: what it gave.
        seed: of the simulated counts and the halves.
        progress: called as progress("calibrate", done, total).

    Returns:
        One Calibration each; `mates` only where there are symmetry mates.
    """
    tell = progress or (lambda stage, done, total: None)
    rng = np.random.default_rng(seed)
    good = np.flatnonzero(estimates.integrated_prf)
    rows = good[np.unique(np.linspace(0, max(len(good) - 1, 0), min(len(good), MAX_ROWS)).astype(np.int64))]
    if not len(rows):
        return []
    columns = estimates.columns
    intensity, background = columns["intensity.vi.value"], columns["background.mean"]

    def run(make: Callable[[Any], NDArray]) -> Estimates:
        return estimate(_OtherCounts(store, rows, make), source, experiments, reference=reference)

    def simulated(view: Any) -> NDArray:
        every = np.arange(view.n)
        own = source.on(view)
        if hasattr(own, "profiles_and_coverage"):
            profile, coverage = (t.numpy() for t in own.profiles_and_coverage(every))
        else:
            profile, coverage = own.profiles(every).numpy(), np.ones(view.n)
        rate = (intensity[view.rows] * coverage)[:, None] * profile + background[view.rows, None]
        return rng.poisson(np.maximum(rate, 0)).astype(np.int32)

    tell("calibrate", 0, 4)
    drawn = run(simulated)
    found = [_against("simulation", drawn, intensity[rows])]
    tell("calibrate", 1, 4)
    halves: list[NDArray] = []

    def first(view: Any) -> NDArray:
        halves.append(rng.binomial(view.counts(np.arange(view.n)), 0.5).astype(np.int32))
        return halves[-1]

    remaining = iter(halves)

    def second(view: Any) -> NDArray:
        return view.counts(np.arange(view.n)).astype(np.int32) - next(remaining)

    one = run(first)
    tell("calibrate", 2, 4)
    two = run(second)
    tell("calibrate", 3, 4)
    both = one.integrated_prf & two.integrated_prf
    (i1, v1), (i2, v2) = (
        (e.columns["intensity.prf.value"][both], e.columns["intensity.prf.variance"][both]) for e in (one, two)
    )
    found.append(Calibration.of("halves", (i1 - i2) / np.sqrt(v1 + v2), (i1 + i2) / 2 / np.sqrt((v1 + v2) / 2)))
    mates = _mates(store, experiments, estimates)
    tell("calibrate", 4, 4)
    return found if mates is None else [*found, mates]


def _against(name: str, estimates: Estimates, truth: Array) -> Calibration:
    good = estimates.integrated_prf
    value, sigma = (
        estimates.columns["intensity.prf.value"][good],
        np.sqrt(estimates.columns["intensity.prf.variance"][good]),
    )
    return Calibration.of(name, (value - truth[good]) / sigma, truth[good] / sigma)


def _mates(store: Any, experiments: Sequence[Experiment], estimates: Estimates) -> Calibration | None:
    """Each observation against the weighted mean of its Bijvoet-equivalent others."""
    good = estimates.integrated_prf
    value = estimates.columns["intensity.prf.value"]
    variance = np.where(good, estimates.columns["intensity.prf.variance"], -1.0)
    data = symmetry_mates(store, experiments, value, variance)
    scale = relative_scales(data)
    unique = data.unique * 2 + data.plus
    unique = np.unique(unique, return_inverse=True)[1].ravel()
    corrected = np.where(good, value / scale, 0.0)
    weight = np.where(good, scale**2 / np.where(good, variance, 1.0), 0.0)
    rest = np.bincount(unique, weight)[unique] - weight
    known = good & (rest > 1e-9 * weight) & (rest > 0)
    if np.count_nonzero(known) < 2:
        return None
    mean = (np.bincount(unique, weight * corrected)[unique] - weight * corrected)[known] / rest[known]
    sigma = np.sqrt(1 / weight[known] + 1 / rest[known])
    return Calibration.of("mates", (corrected[known] - mean) / sigma, mean * np.sqrt(weight[known]))
