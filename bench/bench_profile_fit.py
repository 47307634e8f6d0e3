"""Linear profile fits of paper boxes (3 x 21 x 21), one background photon a pixel, against the torch reference."""

from __future__ import annotations

import torch

from xtalfast.ops import profile_fit
from xtalfast.ops.profile_fit import profile_fit_reference


def test_profile_fit(paired):
    generator = torch.Generator().manual_seed(0)
    profile = torch.softmax(torch.randn(512, 3 * 21 * 21, generator=generator), 1)
    counts = torch.poisson(100 * profile + 1, generator=generator).to(torch.uint16)
    paired(
        lambda: profile_fit(counts, None, profile, at=(100.0, 1.0)),
        lambda: profile_fit_reference(counts, None, profile, at=(100.0, 1.0)),
        at_least=8,
        rounds=20,
    )
