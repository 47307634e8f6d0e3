"""The intensity at which the weights of a reflection's fit are taken, from its symmetry mates and not from itself.

A fit weighted at its own noisy estimate, or with a variance taken there, is too light when the estimate came out high
and too heavy when it came out low, and merging with 1/V then is biased. The intensity expected from the *other*
observations of the same reflection has no part in this observation's noise: the estimate is unbiased for any true
value, and its variance independent of its error. Friedel mates count as equivalent here: their difference is small
beside what weights need.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from xtalfast.models import Array

KNOT_IMAGES_DEG = 5.0  # distance of the knots of the scale along the rotation
SCALE_STEPS = 20
MODEL_ERROR = 0.05  # relative error of predicting one observation from another: strong reflections do not rule scales


class Observations(NamedTuple):
    """Prior-free intensities of a data set, and what relates them."""

    intensity: Array  # [N] counts
    variance: Array  # [N]; not positive where there is none
    unique: NDArray[np.int64]  # [N] number of the unique reflection, Friedel mates together
    plus: NDArray[np.bool_]  # [N] I(+) rather than I(-)
    correction: Array  # [N] factor that makes equivalents equal but for the scale (lp)
    group: NDArray[np.int64]  # [N] experiment
    phi: Array  # [N] deg


def relative_scales(data: Observations) -> Array:
    """Counts per unit of corrected intensity of each observation, [N], from the agreement of equivalents.

    For each experiment the logarithm of the scale is piecewise linear in phi. Alternating least squares, its average
    kept at 1; observations without equivalents have no say.
    """
    if not len(data.phi):
        return np.ones(0)
    good = (data.variance > 0) & np.isfinite(data.intensity)
    first, second, share, n_knots = _knots(data)
    log_scale = np.zeros(n_knots)
    unique, correction = data.unique, np.where(data.correction > 0, data.correction, 1.0)
    intensity = np.where(good, data.intensity, 0.0)
    variance = np.where(good, data.variance, np.inf)
    for _ in range(SCALE_STEPS):
        scale = np.exp(log_scale[first] * (1 - share) + log_scale[second] * share) / correction
        weight = scale**2 / (variance + (MODEL_ERROR * intensity) ** 2)
        total = np.bincount(unique, weight)[unique]
        mean = np.bincount(unique, weight * intensity / scale)[unique] / np.maximum(total, 1e-300)
        others = (total - weight) / np.maximum(total, 1e-300)  # an observation alone predicts itself: no weight
        expected = np.maximum(mean, 0.0) * scale
        weight = others / (variance + (MODEL_ERROR * expected) ** 2)
        seen, modelled = weight * expected * intensity, weight * expected**2
        up, down = (
            np.bincount(first, value * (1 - share), n_knots) + np.bincount(second, value * share, n_knots)
            for value in (seen, modelled)
        )
        known = (down > 0) & (up > 0)
        move = np.where(known, np.log(np.where(known, up, 1.0) / np.where(known, down, 1.0)), 0.0)
        log_scale += np.clip(move, -1.0, 1.0)
        log_scale -= log_scale.mean()
        if np.abs(move).max(initial=0.0) < 1e-3:
            break
    return np.exp(log_scale[first] * (1 - share) + log_scale[second] * share) / correction


def _knots(data: Observations) -> tuple[NDArray[np.int64], NDArray[np.int64], Array, int]:
    """The knots before and after each observation [N], the share of the second, and how many there are."""
    first, second, share = np.zeros(len(data.phi), np.int64), np.zeros(len(data.phi), np.int64), np.zeros(len(data.phi))
    n = 0
    for number in np.unique(data.group):
        at = np.flatnonzero(data.group == number)
        phi = np.nan_to_num(data.phi[at])
        low, high = phi.min(), phi.max()
        intervals = int((high - low) // KNOT_IMAGES_DEG)
        place = (phi - low) / max(high - low, 1e-9) * intervals
        first[at] = n + np.minimum(place.astype(np.int64), max(intervals - 1, 0))
        second[at] = np.minimum(first[at] + 1, n + intervals)
        share[at] = place - (first[at] - n)
        n += intervals + 1
    return first, second, share, n


def leave_one_out(data: Observations, scale: Array, wilson: Array) -> tuple[Array, NDArray[np.bool_]]:
    """Intensity of each observation expected from its equivalents, counts, and whether there are any, [N] each.

    The weighted mean of the others and its variance meet Wilson's exponential law of mean `wilson` [N] (counts): the
    result is the mean of the normal law of that mean and variance, shifted by the exponential, above zero.
    """
    good = (data.variance > 0) & np.isfinite(data.intensity)
    value = np.where(good, data.intensity, 0.0) / scale
    weight = np.where(good, scale**2 / np.where(good, data.variance, 1.0), 0.0)
    total = np.bincount(data.unique, weight)[data.unique]
    rest = total - weight
    known = rest > 1e-9 * total
    rest = np.where(known, rest, 1.0)
    mean = (np.bincount(data.unique, weight * value)[data.unique] - weight * value) / rest * scale
    sigma = scale / np.sqrt(rest)
    centre = torch.from_numpy(np.clip((mean - sigma**2 / wilson) / sigma, -30.0, None))
    hazard = torch.exp(-0.5 * centre**2 - torch.special.log_ndtr(centre)) / np.sqrt(2 * np.pi)
    return np.where(known, sigma * (centre + hazard).numpy(), 0.0), known
