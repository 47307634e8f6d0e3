"""The Triton side of the exact posterior, interpreted on the CPU, against the reference."""

import numpy as np
import pytest
import torch

from xtalfast.ops._boxes import unpack
from xtalfast.ops.intensity_posterior import _MODE_TOLERANCE, _TAIL_LOG, posterior_from_share, share_likelihood

FLAT, WEAK = (1.0, 0.0, 1.0, 0.0), (0.5, 0.01, 2.0, 0.3)


def problem(n, pixels, seed=3):
    """Counts, DIALS mask bits, float64 profile of boxes from weak to strong."""
    generator = torch.Generator().manual_seed(seed)
    logits = -(torch.linspace(-4, 4, pixels, dtype=torch.float64) ** 2)
    profile = torch.softmax(logits.expand(n, -1), 1).contiguous()
    intensity = torch.logspace(0, 3, n, dtype=torch.float64)[:, None]
    counts = torch.poisson(intensity * profile + 0.6, generator=generator).to(torch.uint16)
    mask = torch.where(torch.rand(n, pixels, generator=generator) < 0.9, 1 | 4, 1 | 32).to(torch.uint8)
    return counts, mask, profile


def kernel(interpret, counts, mask, profile, prior, nodes=12, ptr=None):
    n = prior.shape[1]
    node = torch.from_numpy(np.polynomial.legendre.leggauss(nodes)[0])
    out = torch.full((7, n), float("nan")).double(), torch.full((n, nodes), float("nan")).double()
    boxes = (counts, mask, ptr, None, profile)
    settings = (prior, node, _MODE_TOLERANCE, _TAIL_LOG)
    return interpret("intensity_posterior", "share_likelihood", *boxes, *settings, *out)[-2:]


def rows(prior, n):
    return torch.tensor(prior, dtype=torch.float64)[:, None].expand(4, n).contiguous()


@pytest.mark.parametrize("prior", [FLAT, WEAK], ids=["flat", "weak"])
def test_stages_equal_those_of_the_reference(interpret, prior):
    """A number of nodes that is no multiple of those taken at once, and boxes of more than one tile."""
    counts, mask, profile = problem(2, 300)
    prior = rows(prior, 2)
    summary, log_rates = kernel(interpret, counts, mask, profile, prior)
    exact, exact_log_rates = share_likelihood(unpack(counts, mask, profile, None, None), prior, 12)
    torch.testing.assert_close(summary, exact, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(log_rates, exact_log_rates, rtol=0, atol=1e-8)


def test_single_precision_posterior_is_that_of_double(interpret):
    counts, mask, profile = problem(3, 25)
    prior = rows(FLAT, 3)
    found, exact = (
        posterior_from_share(*stages, prior, ())
        for stages in (
            kernel(interpret, counts, mask, profile.float(), prior, nodes=24),
            share_likelihood(unpack(counts, mask, profile, None, None), prior, 24),
        )
    )
    sd = exact.var_i.sqrt()
    assert float(((found.mean_i - exact.mean_i) / sd).abs().max()) < 1e-4
    assert float((found.var_i / exact.var_i - 1).abs().max()) < 1e-4


def test_flat_prior_gives_the_counts_plus_two(interpret):
    """Physical identity: E[sum of the rates] = sum y + 2; a box without used pixels gives back a proper prior."""
    counts, _, profile = problem(2, 25)
    mask = torch.tensor([[True], [False]]).expand(2, 25).contiguous()
    prior = torch.tensor([[1.0, 2.0], [0.0, 0.5], [1.0, 3.0], [0.0, 4.0]], dtype=torch.float64)
    posterior = posterior_from_share(*kernel(interpret, counts, mask, profile, prior, nodes=24), prior, ())
    total = posterior.mean_i[0] + 25 * posterior.mean_bg[0]
    torch.testing.assert_close(total, counts[0].double().sum() + 2, rtol=1e-12, atol=0)
    expected = torch.tensor([2 / 0.5, 2 / 0.5**2, 3 / 4, 3 / 4**2], dtype=torch.float64)
    moments = (posterior.mean_i, posterior.var_i, posterior.mean_bg, posterior.var_bg)
    torch.testing.assert_close(torch.stack([t[1] for t in moments]), expected, rtol=1e-5, atol=0)


def test_ragged_boxes_equal_the_boxes_taken_alone(interpret):
    parts = [problem(1, pixels, seed) for seed, pixels in enumerate((9, 30))]
    counts, mask, profile = (torch.cat([part[k].reshape(-1) for part in parts]) for k in range(3))
    prior = rows(WEAK, 3)
    ptr = torch.tensor([0, 9, 9, 39])
    summary, log_rates = kernel(interpret, counts, mask, profile, prior, ptr=ptr)
    for row, part in ((0, parts[0]), (2, parts[1])):
        one = slice(row, row + 1)
        exact, exact_log_rates = share_likelihood(unpack(*part, None, None), prior[:, one], 12)
        torch.testing.assert_close(summary[:, one], exact, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(log_rates[one], exact_log_rates, rtol=0, atol=1e-8)
    assert bool((log_rates[1] == 0).all())
