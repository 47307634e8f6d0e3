"""Exact posteriors of paper boxes (3 x 21 x 21), one background photon a pixel, against the torch reference."""

from __future__ import annotations

import torch

from xtalfast.ops import intensity_posterior
from xtalfast.ops.intensity_posterior import intensity_posterior_reference


def test_intensity_posterior(paired):
    generator = torch.Generator().manual_seed(0)
    profile = torch.softmax(torch.randn(512, 3 * 21 * 21, generator=generator), 1)
    counts = torch.poisson(100 * profile + 1, generator=generator).to(torch.uint16)
    prior = ((1.0, 0.01), (1.0, 0.1))
    paired(
        lambda: intensity_posterior(counts, None, profile, *prior),
        lambda: intensity_posterior_reference(counts, None, profile, *prior),
        at_least=8,
        rounds=10,
    )
