"""The Triton profile fit, interpreted on the CPU, against the reference."""

import pytest
import torch

from xtalfast.ops.profile_fit import profile_fit_reference
from xtalfast.testing import assert_within_twin_error

# one box larger than a tile; then a box of one pixel and one without, which determine nothing
SIZES = (25, 300, 1, 0)


def problem():
    """Ragged counts, bool mask, float64 profile, background, ptr, and reference (I, B) of the weights."""
    generator = torch.Generator().manual_seed(2)
    ptr = torch.tensor([0, *SIZES]).cumsum(0)
    profile = torch.cat([torch.softmax(torch.randn(n, generator=generator, dtype=torch.float64), 0) for n in SIZES])
    background = 0.5 + torch.rand(len(profile), generator=generator, dtype=torch.float64)
    mask = torch.rand(len(profile), generator=generator) < 0.9
    counts = torch.poisson(200 * profile + 2 * background, generator=generator).to(torch.int32)
    at = torch.tensor([[150.0, 0.0, 1.0, 1.0], [2.0, 1.5, 1.0, 1.0]], dtype=torch.float64)
    return counts, mask, profile, background, ptr, at


def kernel(interpret, counts, mask, profile, background, ptr, at):
    n = at.shape[1]
    fit = torch.full((6, n), float("nan"), dtype=torch.float64)
    boxes = (counts, mask, ptr, background, profile)
    return interpret("profile_fit", "profile_fit", *boxes, at, fit, torch.zeros(n, dtype=torch.bool))[-2:]


def reference(counts, mask, profile, background, ptr, at):
    fit = profile_fit_reference(counts, mask, profile, background=background, ptr=ptr, at=(at[0], at[1]))
    return torch.stack([fit.i, fit.var_i, fit.bg, fit.var_bg, fit.cov_i_bg, fit.correlation]), fit.converged


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_fit_against_the_reference(interpret, dtype):
    counts, mask, profile, background, ptr, at = problem()
    fit, solvable = kernel(interpret, counts, mask, profile.to(dtype), background.to(dtype), ptr, at)
    exact, exact_solvable = reference(counts, mask, profile, background, ptr, at)
    assert solvable.tolist() == exact_solvable.tolist() == [True, True, False, False]
    if dtype == torch.float64:
        torch.testing.assert_close(fit, exact, rtol=1e-10, atol=1e-12)
        return
    twin, _ = reference(counts, mask, profile.float(), background.float(), ptr, at)
    for result, a, b in zip(fit.float(), twin.float(), exact):
        # sums of weighted products, and the determinant in which they cancel
        assert_within_twin_error(result, a, b, 4 * float(b[torch.isfinite(b)].abs().max()))


def test_counts_that_are_the_model_are_fitted_exactly(interpret):
    profile = torch.softmax(torch.linspace(-3, 1, 20, dtype=torch.float64), 0)[None]
    at = torch.tensor([[5.0], [1.0]], dtype=torch.float64)
    fit, _ = kernel(interpret, -7.0 * profile + 3.0, None, profile, None, None, at)
    torch.testing.assert_close(fit[0], torch.tensor([-7.0], dtype=torch.float64), rtol=1e-11, atol=0)
    torch.testing.assert_close(fit[2], torch.tensor([3.0], dtype=torch.float64), rtol=1e-11, atol=0)
    torch.testing.assert_close(fit[5], torch.ones(1, dtype=torch.float64), rtol=1e-11, atol=0)
