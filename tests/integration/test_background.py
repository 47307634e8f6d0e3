"""The robust Poisson mean of integration/background.py."""

from __future__ import annotations

import numpy as np
import pytest

from xtalfast.integration.background import robust_background


@pytest.mark.parametrize("mean", [0.02, 0.7, 20.0])
def test_the_mean_is_unbiased_and_its_variance_honest(mean: float) -> None:
    counts = np.random.default_rng(0).poisson(mean, (4000, 200))
    found = robust_background(counts, np.ones(counts.shape, bool))
    pull = (found.mean - mean) / np.sqrt(mean / 200)
    assert abs(pull.mean()) < 4 / np.sqrt(4000) + 0.05  # the cut tail is 1e-4 of the pixels: at most 0.05 sd here
    assert 0.93 < pull.std() < 1.05
    assert np.allclose(found.variance, np.maximum(found.mean, 1 / found.n_used) / found.n_used)
    assert found.dispersion.mean() == pytest.approx(1.0, abs=0.03)


def test_zingers_are_left_out_and_named() -> None:
    counts = np.random.default_rng(1).poisson(1.0, (100, 300))
    counts[:, 7], counts[:, 100] = 60, 4000
    found = robust_background(counts, np.ones(counts.shape, bool))
    assert found.outlier[:, [7, 100]].all()
    assert found.outlier.sum() < 210
    assert found.mean.mean() == pytest.approx(1.0, abs=0.03)


def test_only_the_pixels_named_are_used_and_none_is_no_information() -> None:
    counts = np.array([[5, 5, 900], [0, 0, 0], [3, 3, 3]], np.uint16)
    use = np.array([[True, True, False], [True, True, True], [False, False, False]])
    found = robust_background(counts, use)
    assert found.mean.tolist() == [5.0, 0.0, 0.0]
    assert found.n_used.tolist() == [2, 3, 0]
    assert found.variance[1] == pytest.approx(1 / 9)  # nothing seen on three pixels
    assert np.isinf(found.variance[2]) and found.dispersion[2] == 1.0
    assert len(robust_background(counts[:0], use[:0]).mean) == 0
