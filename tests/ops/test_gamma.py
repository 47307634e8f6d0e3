"""Gamma pairs: the parametrisation and the divergence, against scipy and mpmath-free float64 identities."""

import math

import pytest
import torch
from scipy import integrate, stats

from xtalfast.ops import gamma_from_log_mean_cv, gamma_kl
from xtalfast.ops.gamma import binet, excess_of_logarithm

SHAPES = [0.01, 0.3, 1.0, 5.0, 11.9, 12.1, 300.0, 1e6]


def test_mean_and_cv_are_those_asked_for():
    log_mean, log_cv = torch.tensor([-2.0, 0.0, 9.0]), torch.tensor([1.0, -1.0, -4.0])
    shape, rate = gamma_from_log_mean_cv(log_mean, log_cv)
    torch.testing.assert_close(shape / rate, log_mean.exp())
    torch.testing.assert_close(shape.rsqrt(), log_cv.exp())


@pytest.mark.parametrize("prior", [(1.0, 1.0), (1.0, 0.01), (2.5, 0.3)])
@pytest.mark.parametrize("q", [(0.7, 0.2), (3.0, 0.1), (40.0, 8.0)])
def test_kl_is_the_integral(q, prior):
    q_dist, p_dist = stats.gamma(q[0], scale=1 / q[1]), stats.gamma(prior[0], scale=1 / prior[1])
    value, _ = integrate.quad(
        lambda x: q_dist.pdf(x) * (q_dist.logpdf(x) - p_dist.logpdf(x)), 0, q_dist.ppf(1 - 1e-15), limit=400
    )
    kl = gamma_kl((torch.tensor(q[0], dtype=torch.float64), q[1]), prior)
    assert float(kl) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ratio", [0.5, 0.999, 1.001, 3.0])
def test_kl_in_float32_is_good_to_1e_6(shape, ratio):
    # torch's own closed form in float64 is the oracle where it does not cancel: far from equality or small shapes
    a = torch.tensor(shape)
    q = (a * ratio, torch.tensor(2.0))
    prior = (a, torch.tensor(1.3))
    p64 = [torch.distributions.Gamma(s.double(), r.double()) for s, r in (q, prior)]
    exact = torch.distributions.kl_divergence(*p64)
    rounding = 1e-15 * shape * (1 + abs(math.log(shape)))  # of that closed form
    assert abs(float(gamma_kl(q, prior).double() - exact)) <= 1e-6 * float(exact) + rounding


def test_kl_of_a_distribution_from_itself_is_zero_and_grows_quadratically():
    shape = torch.tensor(SHAPES, dtype=torch.float64)
    rate = torch.full_like(shape, 0.7)
    assert bool((gamma_kl((shape, rate), (shape, rate)) == 0).all())
    # Fisher information of log rate is the shape
    step = 1e-4
    torch.testing.assert_close(
        gamma_kl((shape, rate * math.exp(step)), (shape, rate)) / (shape * step**2 / 2),
        torch.ones_like(shape),
        rtol=1e-3,
        atol=0,
    )


def test_kl_gradient():
    shape = torch.tensor([0.2, 1.0, 14.0], dtype=torch.float64, requires_grad=True)
    rate = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, r: gamma_kl((s, r), (1.5, 0.4)), (shape, rate))


def test_helpers_are_continuous_where_their_branches_meet():
    edge = torch.tensor([12.0, math.nextafter(12.0, 13.0)], dtype=torch.float64)
    low, high = binet(edge)
    assert abs(low - high) < 1e-13
    near = torch.tensor([1.02, 1.0199999], dtype=torch.float64)
    torch.testing.assert_close(excess_of_logarithm(near), near - 1 - torch.log(near), rtol=1e-10, atol=0)
