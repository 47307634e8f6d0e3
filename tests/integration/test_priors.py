"""Wilson and background priors from noisy estimates."""

from __future__ import annotations

import gemmi
import numpy as np
import pytest
import torch

from xtalfast.errors import InputError
from xtalfast.integration.priors import BackgroundPrior, WilsonPrior, centric_and_epsilon


def shells(n: int, seed: int = 0):
    """Intensities that fall by a Wilson B of 30 A^2, with noise larger than most of them at the edge."""
    rng = np.random.default_rng(seed)
    d = rng.uniform(1 / 10**3, 1 / 1.6**3, n) ** (-1 / 3)
    mean = 400 * np.exp(-2 * 30 / (4 * d**2))
    sigma = np.full(n, 10.0)
    return d, mean, mean * rng.exponential(1.0, n) + sigma * rng.standard_normal(n), sigma**2


def test_shell_means_follow_the_fall_off_through_the_noise() -> None:
    d, mean, intensity, variance = shells(20000)
    found = WilsonPrior.fit(intensity, variance, d).mean(d)
    assert np.abs(np.log(found / mean))[(d > 1.75) & (d < 5)].max() < 0.25
    assert np.median(np.abs(np.log(found / mean))) < 0.06


def test_a_shell_without_signal_has_a_positive_mean_below_its_noise() -> None:
    rng = np.random.default_rng(1)
    d = rng.uniform(1.5, 1.6, 400)
    intensity = -30.0 + 10 * rng.standard_normal(400)  # an over-subtracted background
    prior = WilsonPrior.fit(intensity, np.full(400, 100.0), d)
    shape, rate = prior.gamma(d)
    assert torch.isfinite(rate).all() and (rate > 0).all() and (shape == 1).all()
    assert prior.mean(d).max() < 1.0  # a tenth of a standard deviation


def test_one_wild_value_does_not_move_its_shell() -> None:
    d, _, intensity, variance = shells(4000)
    clean = WilsonPrior.fit(intensity, variance, d)
    strongest = np.argmax(d)
    intensity[strongest] = 1e9
    assert WilsonPrior.fit(intensity, variance, d).log_mean == pytest.approx(clean.log_mean, abs=0.15)


def test_lorentz_factor_and_epsilon_scale_the_prior_of_each_reflection() -> None:
    rng = np.random.default_rng(2)
    n = 20000
    d, lp, epsilon = rng.uniform(2.9, 3.1, n), rng.uniform(0.2, 2.0, n), rng.choice([1.0, 2.0, 4.0], n)
    intensity = 50 * epsilon / lp * rng.exponential(1.0, n)
    prior = WilsonPrior.fit(intensity, np.ones(n), d, epsilon, lp)
    assert np.exp(prior.log_mean).mean() == pytest.approx(50, rel=0.03)
    assert np.mean(intensity / prior.mean(d, epsilon, lp)) == pytest.approx(1, abs=0.03)


def test_centric_reflections_have_shape_one_half_and_the_same_mean() -> None:
    prior = WilsonPrior(np.array([0.1, 0.2]), np.log([100.0, 50.0]))
    shape, rate = prior.gamma(np.full(2, 0.15**-0.5), np.array([True, False]))
    assert shape.tolist() == [0.5, 1.0]
    assert torch.allclose(shape / rate, torch.full((2,), np.sqrt(5000.0), dtype=torch.float64))  # linear in the log
    assert prior.mean(np.array([100.0, 1.0])) == pytest.approx([100.0, 50.0])  # constant beyond the shells


@pytest.mark.parametrize("name", ["P 43 21 2", "C 1 2 1", "F 2 3", "P 1"])
def test_centric_flags_and_epsilon_are_those_of_gemmi_one_by_one(name: str) -> None:
    group = gemmi.SpaceGroup(name)
    hkl = np.array(list(np.ndindex(5, 5, 5)))[1:] - [2, 2, 0]
    centric, epsilon = centric_and_epsilon(hkl, group)
    operations = group.operations()
    assert centric.tolist() == [operations.is_reflection_centric(h) for h in hkl.tolist()]
    assert epsilon.tolist() == [operations.epsilon_factor_without_centering(h) for h in hkl.tolist()]


def test_background_prior_has_the_spread_of_the_backgrounds_not_of_their_errors() -> None:
    rng = np.random.default_rng(3)
    n = 20000
    d = rng.uniform(1.8, 20, n)
    truth = rng.gamma(25.0, 2.0 / 25.0, n)  # mean 2, 20 %
    variance = np.full(n, 0.09)
    prior = BackgroundPrior.fit(truth + 0.3 * rng.standard_normal(n), variance, d)
    shape, rate = prior.gamma(d)
    assert float((shape / rate).mean()) == pytest.approx(2.0, rel=0.02)
    assert float((shape**-0.5).mean()) == pytest.approx(0.2, rel=0.1)
    shape, _ = BackgroundPrior.fit(np.full(10, 1.0), np.full(10, 0.5), np.full(10, 2.0)).gamma(np.array([2.0]))
    assert float(shape) == pytest.approx(400.0)  # no spread measured: 5 %


def test_nothing_to_fit_is_said() -> None:
    nothing = np.array([np.nan])
    with pytest.raises(InputError, match="Wilson prior"):
        WilsonPrior.fit(nothing, np.ones(1), np.ones(1))
    with pytest.raises(InputError, match="background prior"):
        BackgroundPrior.fit(nothing, np.ones(1), np.ones(1))
    assert np.isfinite(WilsonPrior.fit(np.array([0.0]), np.array([1.0]), np.array([2.0])).log_mean).all()
