"""Triton's periodic convolution, interpreted on the CPU, against the reference: output, statistics, gradients."""

import pytest
import torch

from xtalfast.ops.conv3d_periodic import conv3d_periodic_reference, joint_statistics
from xtalfast.testing import assert_within_twin_error

VOXELS = 64


def problem(n_maps, channels, out, grid, kernel, seed=0):
    """Map, kernels, bias, channel scale and shift, upstream gradient; float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, w = normal(n_maps, channels, *grid), normal(out, channels, kernel, kernel, kernel) / kernel
    return [x, w, normal(out), 1 + 0.2 * normal(channels), 0.3 * normal(channels)], normal(n_maps, out, *grid)


def kernels(interpret, tensors, upstream, relu, wrap):
    """y, mean, var; gradients by x, weight, scale, shift."""
    x, weight, bias, scale, shift = tensors
    real = torch.promote_types(x.dtype, torch.float32)
    scale, shift = scale.to(real), shift.to(real)
    tiles = -(-x.shape[2:].numel() // VOXELS)
    options = (relu, wrap, "tf32")

    def empty(*shape, dtype=real):
        return torch.full(shape, torch.nan, dtype=dtype)

    def run(function, *arguments):
        return interpret("conv3d_periodic", function, *arguments)

    sums = empty(len(x), tiles, 2, len(weight))
    y, sums = run(
        "conv3d_periodic", *(x, weight, bias, scale, shift), *options, torch.full_like(upstream, torch.nan), sums
    )[-2:]
    by_sums = empty(len(x), tiles, 2, x.shape[1])
    by_x, by_sums = run(
        "conv3d_periodic_by_input", *(upstream, x, weight, scale), *options, torch.full_like(x, torch.nan), by_sums
    )[-2:]
    by_weight = run(
        "conv3d_periodic_by_weight", *(upstream, x, scale, shift, weight.shape[2]), *options, empty(*weight.shape)
    )[-1]
    return [y, *joint_statistics(sums, x.shape[2:].numel(), VOXELS), by_x, by_weight, *by_sums.sum((0, 1))]


def reference(tensors, upstream, relu, wrap):
    x, weight, bias, scale, shift = (t.clone().requires_grad_() for t in tensors)
    y, mean, var = conv3d_periodic_reference(
        *(x, weight, bias),
        padding="wrap" if wrap else "zeros",
        channel_scale=scale,
        channel_shift=shift,
        relu=relu,
        statistics=True,
    )
    gradients = torch.autograd.grad(y, [x, weight, scale, shift], upstream)
    return [t.detach() for t in (y, mean, var)] + list(gradients)


CASES = {
    # maps, channels, out, grid, edge of the kernel; wrap
    "k5-two-tiles-wrap": ((1, 10, 10, (5, 3, 9), 5), True),
    "k3-zeros": ((2, 3, 1, (4, 1, 3), 3), False),
    "k5-small-zeros": ((1, 2, 4, (2, 2, 3), 5), False),
    "k1-wrap": ((1, 4, 3, (3, 2, 1), 1), True),
}


@pytest.mark.parametrize("shape, wrap", CASES.values(), ids=CASES)
def test_double_precision_equals_the_reference(interpret, shape, wrap):
    tensors, upstream = problem(*shape)
    relu = shape[-1] == 5
    found, wanted = kernels(interpret, tensors, upstream, relu, wrap), reference(tensors, upstream, relu, wrap)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
def test_accuracy_is_that_of_the_reference_in_the_same_precision(interpret, dtype):
    tensors, upstream = problem(1, 10, 10, (4, 5, 3), 3)
    exact, upstream = [t.to(dtype).double() for t in tensors], upstream.to(dtype)
    found = kernels(interpret, [t.to(dtype) for t in exact], upstream, True, True)
    twin, wanted = (reference([t.to(d) for t in exact], upstream.to(d), True, True) for d in (dtype, torch.float64))
    for a, b, c in zip(found, twin, wanted, strict=True):
        assert_within_twin_error(a.to(dtype), b, c, 16 * float(c.abs().max()))
