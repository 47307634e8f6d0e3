"""Forward and all gradients of the ELBO on paper boxes (3 x 21 x 21) against ordinary and compiled torch, one thread.

A box holds 1323 pixels. The least that memory must move for one sample with softmax logits is 2 bytes of counts, 4 of
logits and 4 of their gradient a pixel, 13 kB a reflection.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.distributions import Gamma, Poisson, kl_divergence

from xtalfast.ops import MVNProfile, SoftmaxProfile, poisson_gamma_elbo

PIXELS = 3 * 21 * 21
PRIOR_I, PRIOR_B = (1.0, 0.01), (1.0, 1.0)


def problem(n: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Counts, logits that require a gradient, and shape and rate of q(I) and q(B)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, PIXELS, generator=generator)
    counts = torch.poisson(50 * torch.softmax(logits, 1) + 1, generator=generator)
    q = [torch.full((n,), value) for value in (8.0, 0.16, 30.0, 30.0)]
    return counts, logits.requires_grad_(), [t.requires_grad_() for t in q]


def step(loss: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> Callable[[], object]:
    """Forward and backward of the summed loss."""
    return lambda: torch.autograd.grad(loss().sum(), leaves)


def ours(counts, logits, q, **options) -> Callable[[], object]:
    packed = counts.to(torch.uint16)
    return step(
        lambda: poisson_gamma_elbo(packed, None, SoftmaxProfile(logits), q[:2], q[2:], PRIOR_I, PRIOR_B, **options),
        [logits, *q],
    )


def ordinary(counts, logits, q, samples: int) -> Callable[[], object]:
    """What one writes first: torch.distributions throughout."""

    def loss() -> torch.Tensor:
        q_i, q_b = Gamma(q[0], q[1]), Gamma(q[2], q[3])
        i, b = q_i.rsample((samples,)), q_b.rsample((samples,))
        rate = i[..., None] * torch.softmax(logits, 1) + b[..., None]
        log_p = Poisson(rate, validate_args=False).log_prob(counts).sum(-1).mean(0)
        return (
            kl_divergence(q_i, Gamma(*map(torch.tensor, PRIOR_I)))
            + kl_divergence(q_b, Gamma(*map(torch.tensor, PRIOR_B)))
            - log_p
        )

    return step(loss, [logits, *q])


def tidy_compiled(counts, logits, q) -> Callable[[], object]:
    """The likelihood alone, without log y!, KL or sampler, by torch.compile: a floor for any torch version."""

    @torch.compile
    def loss(logits, i, b):
        rate = i[:, None] * torch.softmax(logits, 1) + b[:, None]
        return (rate - counts * torch.log(rate)).sum()

    i, b = (q[0] / q[1]).detach().requires_grad_(), (q[2] / q[3]).detach().requires_grad_()
    return lambda: torch.autograd.grad(loss(logits, i, b), [logits, i, b])


@pytest.mark.parametrize(("n", "at_least"), [(1024, 4.0), (8192, 8.0)], ids=["N1024", "N8192"])
def test_one_sample_against_torch_distributions(paired, n, at_least):
    arguments = problem(n)
    paired(ours(*arguments, estimator="mc"), ordinary(*arguments, samples=1), at_least=at_least, rounds=10)


@pytest.mark.parametrize("n", [1024, 8192], ids=["N1024", "N8192"])
def test_one_sample_against_torch_compile(paired, n):
    arguments = problem(n)
    paired(ours(*arguments, estimator="mc"), tidy_compiled(*arguments), rounds=10)


def test_default_quadrature_against_a_hundred_samples(paired):
    arguments = problem(64)
    paired(ours(*arguments), ordinary(*arguments, samples=100), at_least=80, rounds=5)


def test_sixteen_nodes_against_one_sample_of_torch_distributions(paired):
    arguments = problem(1024)
    paired(ours(*arguments, nodes=16), ordinary(*arguments, samples=1), rounds=10)


def test_gaussian_profile_against_the_softmax_of_its_logits(paired):
    counts, logits, q = problem(1024)
    axes = (torch.arange(size) - (size - 1) / 2 for size in (3, 21, 21))
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    mean = torch.zeros(len(counts), 3, requires_grad=True)
    scale = torch.eye(3).repeat(len(counts), 1, 1).requires_grad_()
    packed = counts.to(torch.uint16)
    gaussian = step(
        lambda: poisson_gamma_elbo(
            packed, None, MVNProfile(mean, scale, grid), q[:2], q[2:], PRIOR_I, PRIOR_B, nodes=8
        ),
        [mean, scale, *q],
    )
    paired(gaussian, ours(counts, logits, q, nodes=8), rounds=20)
