"""Comparison with truth: a perfect estimator scores as one, and each failure shows where it should."""

from __future__ import annotations

import numpy as np
import pytest

from xtalfast.errors import InputError
from xtalfast.metrics.truth import compare_with_truth


@pytest.fixture
def wedge():
    rng = np.random.default_rng(0)
    truth = np.concatenate([np.zeros(500), rng.exponential(10.0 ** rng.uniform(-1, 4, 20000))])
    variance = truth + 25.0
    return truth, variance, truth + rng.normal(size=truth.size) * np.sqrt(variance)


def test_calibrated_unbiased_estimate_has_unit_pulls(wedge):
    truth, variance, intensity = wedge
    result = compare_with_truth(intensity, variance, truth, scale=1.0)
    assert all(abs(b.mean) < 4 / np.sqrt(b.n) and abs(b.sd - 1) < 4 / np.sqrt(2 * b.n) for b in result.pulls)
    assert sum(b.n for b in result.pulls) == result.n == truth.size
    assert abs(result.log_slope - 1) < 0.01 and result.log_correlation > 0.995
    assert abs(result.mean_at_zero) < 4 * result.error_at_zero


def test_scale_is_found_and_divides_out(wedge):
    truth, variance, intensity = wedge
    one = compare_with_truth(intensity, variance, truth, scale=1.0)
    other = compare_with_truth(7.5 * intensity, 7.5**2 * variance, truth)
    assert other.scale == pytest.approx(7.5, rel=0.01)
    assert other.r == pytest.approx(one.r, rel=0.02)


def test_wrong_sigma_and_bias_show(wedge):
    truth, variance, intensity = wedge
    assert min(b.sd for b in compare_with_truth(intensity, variance / 4, truth, scale=1.0).pulls) > 1.8
    biased = compare_with_truth(np.maximum(intensity, 0), variance, truth, scale=1.0)
    assert biased.mean_at_zero > 4 * biased.error_at_zero
    assert compare_with_truth(np.abs(intensity) ** 1.1, variance, truth, scale=1.0).log_slope > 1.05


def test_not_finite_and_failed_reflections_are_left_out(wedge):
    truth, variance, intensity = (a.copy() for a in wedge)
    intensity[:3], variance[3:6] = np.nan, -1.0
    assert compare_with_truth(intensity, variance, truth).n == truth.size - 6
    with pytest.raises(InputError, match="no reflection has finite intensity"):
        compare_with_truth(np.full(3, np.nan), np.ones(3), np.ones(3))
