"""Periodic convolution against its definition and torch, periodicity, edges, bad input."""

import pytest
import torch

from xtalfast.ops import conv3d_periodic
from xtalfast.ops.conv3d_periodic import conv3d_periodic_reference
from xtalfast.testing import assert_within_twin_error

SHAPES = {"B2-10x10-6x5x9-k5": (2, 10, 10, (6, 5, 9), 5), "B1-10x1-4x4x3-k3": (1, 10, 1, (4, 4, 3), 3)}
SHAPES |= {"B1-3x4-5x1x2-k1": (1, 3, 4, (5, 1, 2), 1), "B0-2x3-4x4x4-k3": (0, 2, 3, (4, 4, 4), 3)}
SHAPES |= {"B2-10x10-2x3x2-k5": (2, 10, 10, (2, 3, 2), 5)}


def problem(n_batch, channels, out, grid, kernel, seed=0):
    """Map, kernels, bias, channel scale and shift; float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, w = normal(n_batch, channels, *grid), normal(out, channels, kernel, kernel, kernel) / kernel**1.5
    return [x, w, normal(out), 1 + 0.2 * normal(channels), 0.3 * normal(channels)]


def convolve(function, tensors, **options):
    x, w, bias, scale, shift = tensors
    return function(x, w, bias, channel_scale=scale, channel_shift=shift, **options)


def gradients(function, tensors, **options):
    leaves = [t.clone().requires_grad_() for t in tensors]
    y, mean, var = convolve(function, leaves, statistics=True, **options)
    upstream = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).to(y.dtype).view_as(y)
    n = y.shape[1]
    by = [torch.linspace(*ends, n, dtype=torch.float64).to(y.dtype) * y[:, 0].numel() for ends in ((-1, 2), (2, 1))]
    return [t.detach() for t in (y, mean, var)] + list(torch.autograd.grad([y, mean, var], leaves, [upstream, *by]))


@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize("padding", ["wrap", "zeros"])
@pytest.mark.parametrize("shape", [s for s in SHAPES.values() if s[0]], ids=[k for k, s in SHAPES.items() if s[0]])
def test_output_statistics_and_gradients_equal_the_definition(shape, padding, relu):
    tensors = problem(*shape)
    options = {"padding": padding, "relu": relu}
    found, wanted = (gradients(f, tensors, **options) for f in (conv3d_periodic, conv3d_periodic_reference))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_accuracy_in_single_precision_is_that_of_the_definition():
    exact = problem(2, 10, 10, (6, 5, 9), 5)
    single = [t.float() for t in exact]
    results = [
        gradients(f, t, relu=True)
        for f, t in ((conv3d_periodic, single), (conv3d_periodic_reference, single), (conv3d_periodic_reference, exact))
    ]
    for found, twin, wanted in zip(*results, strict=True):
        assert_within_twin_error(found, twin, wanted, 64 * float(wanted.abs().max()))


@pytest.mark.parametrize("padding", ["wrap", "zeros"])
def test_gradcheck(padding):
    tensors = [t.requires_grad_() for t in problem(1, 2, 2, (3, 2, 2), 3)]
    torch.autograd.gradcheck(
        lambda *t: convolve(conv3d_periodic, t, padding=padding, relu=True, statistics=True), tensors
    )


@pytest.mark.parametrize("statistics", [False, True], ids=["", "statistics"])
def test_opcheck(statistics):
    tensors = [t.float().requires_grad_() for t in problem(1, 2, 3, (3, 2, 4), 3)]
    torch.library.opcheck(torch.ops.xtalfast.conv3d_periodic.default, (*tensors, True, True, statistics))


def test_the_registered_op_equals_the_definition():
    """What a GPU runs is this op; here with the CPU's kernel."""
    tensors = problem(2, 3, 2, (3, 4, 2), 3)

    def registered(x, weight, bias, *, channel_scale, channel_shift, statistics):
        return torch.ops.xtalfast.conv3d_periodic(
            x, weight, bias, channel_scale, channel_shift, False, False, statistics
        )

    found, wanted = gradients(registered, tensors), gradients(conv3d_periodic_reference, tensors, padding="zeros")
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_no_map_gives_no_map():
    tensors = problem(*SHAPES["B0-2x3-4x4x4-k3"])
    assert convolve(conv3d_periodic, tensors).shape == (0, 3, 4, 4, 4)


def test_compiles_as_one_graph():
    tensors = [t.float() for t in problem(1, 2, 3, (4, 4, 4), 3)]
    compiled = torch.compile(lambda *t: convolve(conv3d_periodic, t, relu=True), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), convolve(conv3d_periodic, tensors, relu=True))


@pytest.mark.parametrize("padding, same", [("wrap", True), ("zeros", False)])
def test_wrapping_makes_every_voxel_alike(padding, same):
    tensors = problem(1, 3, 2, (6, 5, 4), 5)
    y = convolve(conv3d_periodic, tensors, padding=padding)
    tensors[0] = tensors[0].roll((2, 1, 3), (2, 3, 4))
    moved = convolve(conv3d_periodic, tensors, padding=padding)
    assert torch.allclose(moved, y.roll((2, 1, 3), (2, 3, 4)), rtol=1e-12, atol=1e-12) == same


def test_zeros_lie_around_the_scaled_map():
    """A map of zeros with a shift is not zero, and its edge shows."""
    one = torch.ones(1, dtype=torch.float64)
    weight = torch.ones(1, 1, 3, 3, 3, dtype=torch.float64)
    y = conv3d_periodic(torch.zeros(1, 1, 4, 4, 4, dtype=torch.float64), weight, padding="zeros", channel_shift=one)
    assert y[0, 0, 1, 1, 1] == 27 and y[0, 0, 0, 0, 0] == 8


def test_bad_input():
    x, w, bias, scale, _ = problem(1, 3, 2, (6, 5, 4), 5)
    for message, arguments, options in (
        (r"weight must be \[O, C=2, k, k, k\] with odd k", (x[:, 1:], w), {}),
        ("padding must be 'wrap' or 'zeros', got 'same'", (x, w), {"padding": "same"}),
        ("sizes of at least k // 2 = 2", (x[..., :1], w), {}),
        (r"bias must be \[2\], got \[1\]", (x, w, bias[1:]), {}),
        (r"channel_scale must be \[3\], got \[2\]", (x, w), {"channel_scale": scale[1:]}),
    ):
        with pytest.raises(ValueError, match=message):
            conv3d_periodic(*arguments, **options)
