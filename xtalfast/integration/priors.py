"""What a data set says before a reflection is looked at: Wilson's law of intensities, the spread of backgrounds.

Both are fitted to prior-free estimates of the same data and to nothing else, certainly never to known truth.

- Intensity: Wilson statistics, exponential for acentric and Gamma(1/2) for centric reflections, with mean
  epsilon Sigma(d) / c, where Sigma is the shell mean of c I / epsilon, smooth in 1/d^2, and c the Lorentz and
  polarisation correction.
- Background: a Gamma law whose mean and spread follow the resolution.

Ref: A. J. C. Wilson, Acta Cryst. 2, 318 (1949); S. French & K. Wilson, Acta Cryst. A34, 517 (1978).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import gemmi
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtalfast.errors import InputError
from xtalfast.models import Array

MIN_PER_SHELL = 100
MAX_SHELLS = 20
# A reflection counts as at most this many shell means: Wilson's law puts 6e-6 of acentric intensities above, so a
# shell with a zinger or an ice spot keeps its mean and a clean one loses 1e-5 of it.
CAP = 12.0
MIN_BACKGROUND_CV = 0.05  # no measured spread says that backgrounds are equal to better than this

GammaPair = tuple[Tensor, Tensor]


def centric_and_epsilon(hkl: NDArray, space_group: gemmi.SpaceGroup) -> tuple[NDArray[np.bool_], Array]:
    """Centric flags [N] and multiplicity factors epsilon [N] (centring excluded) of Miller indices [N, 3]."""
    operations = space_group.operations()
    indices = np.ascontiguousarray(hkl, dtype=np.int32).reshape(-1, 3)
    centric = np.asarray(operations.centric_flag_array(indices), bool)
    return centric, np.asarray(operations.epsilon_factor_without_centering_array(indices), float)


def _shells(x: Array) -> list[NDArray[np.int64]]:
    """Rows in shells of equal number along x, at least MIN_PER_SHELL in each where there are so many."""
    n = int(np.clip(len(x) // MIN_PER_SHELL, 1, MAX_SHELLS))
    return np.array_split(np.argsort(x, kind="stable"), n)


def _positive_mean(value: Array, variance: Array) -> float:
    """Mean of a positive quantity from unbiased noisy values, positive whatever the noise made of them.

    Far above its standard error it is the mean itself; below, the mean of the normal law that the mean has, given that
    it is positive.
    """
    centre = float(np.median(value)) / np.log(2)
    noise = float(np.sqrt(np.mean(variance)))
    if centre > 2 * noise:
        value = np.minimum(value, CAP * centre)
    mean = float(value.mean())
    # the scatter of the values already holds their noise; a shell of one value has only the noise
    error = max(float(value.std()), noise, 1e-6) / np.sqrt(len(value))
    t = torch.tensor(mean / error, dtype=torch.float64)
    hazard = torch.exp(-0.5 * t**2 - torch.special.log_ndtr(t)) / np.sqrt(2 * np.pi)
    return error * float((t + hazard).clamp(min=1e-3))


@dataclass(frozen=True)
class WilsonPrior:
    """Prior of the intensity in counts, Gamma, from shell means that are linear in log against 1/d^2 between shells."""

    inverse_d2: Array  # [shells] 1/A^2, mean of each shell, rising
    log_mean: Array  # [shells] log of Sigma, corrected counts

    @classmethod
    def fit(
        cls, intensity: Array, variance: Array, d: Array, epsilon: Array | float = 1.0, correction: Array | float = 1.0
    ) -> WilsonPrior:
        """Shell means of prior-free intensities; values that are not finite are left out.

        Args:
            intensity: likelihood-only intensities, may be negative, [N] counts.
            variance: their variances, [N].
            d: resolution, [N] A.
            epsilon: multiplicity factor of each reflection, [N].
            correction: factor that makes equivalent reflections equal (lp / qe), [N].

        Raises:
            InputError: no finite intensity with a positive variance.
        """
        epsilon, correction = np.broadcast_to(epsilon, len(d)), np.broadcast_to(correction, len(d))
        factor = correction / epsilon
        good = (
            np.isfinite(intensity)
            & np.isfinite(variance)
            & (variance > 0)
            & (d > 0)
            & np.isfinite(factor)
            & (factor > 0)
        )
        if not good.any():
            raise InputError("the Wilson prior needs at least one finite intensity with a positive variance, got none")
        value, noise = (intensity * factor)[good], (variance * factor**2)[good]
        x = 1 / d[good] ** 2
        shells = _shells(x)
        means = [_positive_mean(value[rows], noise[rows]) for rows in shells]
        return cls(np.array([x[rows].mean() for rows in shells]), np.log(means))

    def mean(self, d: Array, epsilon: Array | float = 1.0, correction: Array | float = 1.0) -> Array:
        """Expected intensity [N], counts; beyond the shells it stays as in the outermost one."""
        with np.errstate(divide="ignore"):
            sigma = np.exp(np.interp(1 / np.asarray(d, float) ** 2, self.inverse_d2, self.log_mean))
        factor = np.asarray(correction, float) / np.asarray(epsilon, float)
        return sigma / np.where(np.isfinite(factor) & (factor > 0), factor, 1.0)

    def gamma(
        self,
        d: Array,
        centric: NDArray[np.bool_] | bool = False,
        epsilon: Array | float = 1.0,
        correction: Array | float = 1.0,
    ) -> GammaPair:
        """(shape, rate) of the prior of each reflection, float64 [N]: shape 1 acentric, 1/2 centric."""
        mean = self.mean(d, epsilon, correction)
        shape = np.where(np.broadcast_to(centric, mean.shape), 0.5, 1.0)
        return torch.from_numpy(shape), torch.from_numpy(shape / mean)


@dataclass(frozen=True)
class BackgroundPrior:
    """Prior of the background in counts per pixel, Gamma, mean and relative spread linear against 1/d^2."""

    inverse_d2: Array  # [shells] 1/A^2
    log_mean: Array  # [shells]
    log_cv: Array  # [shells] log of standard deviation / mean

    @classmethod
    def fit(cls, mean: Array, variance: Array, d: Array) -> BackgroundPrior:
        """Population mean and spread of background estimates, their own errors taken off.

        Args:
            mean: background of each reflection, [N] counts per pixel.
            variance: of that mean, [N].
            d: resolution, [N] A.

        Raises:
            InputError: no finite background.
        """
        good = np.isfinite(mean) & np.isfinite(variance) & (mean >= 0) & (d > 0)
        if not good.any():
            raise InputError("the background prior needs at least one finite background, got none")
        value, noise = mean[good], variance[good]
        x = 1 / d[good] ** 2
        shells = _shells(x)
        centres, spreads = [], []
        for rows in shells:
            centre = _positive_mean(value[rows], noise[rows])
            low, high = np.quantile(value[rows], [0.1587, 0.8413])
            spread = max((0.5 * (high - low)) ** 2 - noise[rows].mean(), 0.0)
            centres.append(centre)
            spreads.append(max(np.sqrt(spread) / centre, MIN_BACKGROUND_CV))
        return cls(np.array([x[rows].mean() for rows in shells]), np.log(centres), np.log(spreads))

    def gamma(self, d: Array) -> GammaPair:
        """(shape, rate) of the prior of each reflection, float64 [N]."""
        with np.errstate(divide="ignore"):
            x = 1 / np.asarray(d, float) ** 2
        mean = np.exp(np.interp(x, self.inverse_d2, self.log_mean))
        shape = np.exp(-2 * np.interp(x, self.inverse_d2, self.log_cv))
        return torch.from_numpy(shape), torch.from_numpy(shape / mean)


@dataclass(frozen=True)
class Priors:
    """Both priors of a data set."""

    intensity: WilsonPrior
    background: BackgroundPrior


def space_groups(experiments: Sequence, ids: NDArray) -> list[tuple[NDArray[np.int64], gemmi.SpaceGroup]]:
    """Rows of each space group among the experiments named by `ids` [N]; without a crystal it is P 1."""
    groups: dict[str, tuple[list[NDArray[np.int64]], gemmi.SpaceGroup]] = {}
    for number in np.unique(ids):
        crystal = experiments[int(number)].crystal
        group = crystal.space_group if crystal is not None else gemmi.SpaceGroup("P 1")
        rows, _ = groups.setdefault(group.hall, ([], group))
        rows.append(np.flatnonzero(ids == number))
    return [(np.concatenate(rows), group) for rows, group in groups.values()]
