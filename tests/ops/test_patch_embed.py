"""Patch embedding and the statistics of its convolution against their definitions, periodicity, bad input."""

import pytest
import torch

from xtalfast.ops import patch_embed, stem_statistics
from xtalfast.ops.patch_embed import patch_embed_reference, stem_statistics_reference
from xtalfast.testing import assert_within_twin_error

ORDERS = ("(ph pw pd c)", "(c ph pw pd)")
SHAPES = {"B2-C1-8x8x12-k7": (2, 1, (8, 8, 12), 7), "B1-C2-4x8x4-k7": (1, 2, (4, 8, 4), 7)}
SHAPES |= {"B3-C1-4x4x4-k3": (3, 1, (4, 4, 4), 3)}


def problem(n_batch, channels, grid, kernel, *, out=10, patch=4, dim=16, seed=0):
    """Map, kernels, channel scale and shift, LayerNorm of a patch, Linear, LayerNorm of a token; float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    values = out * patch**3
    return [
        normal(n_batch, channels, *grid),
        normal(out, channels, kernel, kernel, kernel) / kernel,
        *(1 + 0.2 * normal(out), 0.3 * normal(out)),
        *(1 + 0.2 * normal(values), 0.3 * normal(values)),
        *(normal(dim, values) / values**0.5, normal(dim)),
        *(1 + 0.2 * normal(dim), 0.3 * normal(dim)),
    ]


def embed(function, tensors, **options):
    x, w, a, b, *rest = tensors
    return function(x, w, a, b, tuple(rest[:2]), rest[2], rest[3], tuple(rest[4:]), **options)


def gradients(function, tensors, **options):
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = embed(function, leaves, **options)
    upstream = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).to(out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_tokens_and_gradients_equal_the_definition(shape, order):
    tensors = problem(*shape)
    found, wanted = (gradients(f, tensors, order=order) for f in (patch_embed, patch_embed_reference))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_accuracy_in_single_precision_is_that_of_the_definition():
    exact = problem(2, 1, (8, 8, 12), 7)
    single = [t.float() for t in exact]
    results = [
        gradients(f, t)
        for f, t in ((patch_embed, single), (patch_embed_reference, single), (patch_embed_reference, exact))
    ]
    for found, twin, wanted in zip(*results, strict=True):
        assert_within_twin_error(found, twin, wanted, 64 * float(wanted.abs().max()))


@pytest.mark.parametrize("counts", [None, (2, 1, 3)], ids=["", "counted"])
@pytest.mark.parametrize("channels", [1, 2])
def test_statistics_equal_those_of_the_convolution(channels, counts):
    x, w = problem(3, channels, (8, 6, 5), 7)[:2]
    counts = counts and torch.tensor(counts)
    leaves = [t.clone().requires_grad_() for t in (x, w)]
    for a, b in zip(stem_statistics(*leaves, counts), stem_statistics_reference(*leaves, counts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
        by_a, by_b = (torch.autograd.grad(t.sum(), leaves, retain_graph=True) for t in (a, b))
        for one, other in zip(by_a, by_b):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


def registered(x, w, a, b, patch_norm, weight, bias, norm, *, patch=4, order="(ph pw pd c)"):
    return torch.ops.xtalfast.patch_embed(x, w, a, b, *patch_norm, weight, bias, *norm, patch, order, 1e-5)


@pytest.mark.parametrize("order", ORDERS)
def test_the_registered_op_equals_the_definition(order):
    """What a GPU runs is this op; here with the CPU's kernel, matrix products of windows."""
    tensors = problem(2, 2, (8, 4, 4), 7)
    for a, b in zip(*(gradients(f, tensors, order=order) for f in (registered, patch_embed_reference)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_opcheck():
    tensors = [t.float().requires_grad_() for t in problem(1, 1, (2, 2, 4), 3, out=2, patch=2, dim=3)]
    torch.library.opcheck(torch.ops.xtalfast.patch_embed.default, (*tensors, 2, "(c ph pw pd)", 1e-5))


def test_no_map_gives_no_token():
    assert embed(patch_embed, problem(0, 1, (8, 4, 4), 5)).shape == (0, 2, 16)


def test_gradcheck():
    tensors = [t.requires_grad_() for t in problem(1, 1, (2, 2, 4), 3, out=2, patch=2, dim=3)]
    torch.autograd.gradcheck(lambda *t: embed(patch_embed, t, patch=2), tensors)
    torch.autograd.gradcheck(stem_statistics, tensors[:2])


def test_compiles_as_one_graph():
    tensors = [t.float() for t in problem(1, 1, (4, 4, 8), 3)]
    compiled = torch.compile(lambda *t: embed(patch_embed, t), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), embed(patch_embed, tensors))


def test_shifting_the_map_by_a_patch_shifts_the_tokens():
    tensors = problem(1, 1, (8, 12, 16), 7)
    tokens = embed(patch_embed, tensors).view(2, 3, 4, -1)
    tensors[0] = tensors[0].roll((4, -4, 8), (2, 3, 4))
    shifted = embed(patch_embed, tensors).view(2, 3, 4, -1)
    torch.testing.assert_close(shifted, tokens.roll((1, -1, 2), (0, 1, 2)), rtol=1e-12, atol=1e-12)


def test_bad_input():
    tensors = problem(1, 1, (8, 8, 8), 7)
    for position, value, message in (
        (0, torch.zeros(1, 1, 8, 8, 6, dtype=torch.float64), "multiples of patch=4"),
        (0, torch.zeros(1, 1, 8, 8, 8, dtype=torch.int64), "x must be floating point"),
        (0, torch.zeros(1, 8, 8, 8, dtype=torch.float64), r"x must be \[B, C, X, Y, Z\], got \[1, 8, 8, 8\]"),
        (1, tensors[1].float(), "weight must be torch.float64 like x, got torch.float32"),
        (1, tensors[1][..., 1:], r"weight must be \[O, C=1, k, k, k\] with odd k"),
        (2, tensors[2][1:], r"channel_scale must be \[10\], got \[9\]"),
        (6, tensors[6][:, 1:], r"weight must be \[16, 640\], got \[16, 639\]"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            embed(patch_embed, [*tensors[:position], value, *tensors[position + 1 :]])
    with pytest.raises(ValueError, match="order must be one of"):
        embed(patch_embed, tensors, order="c ph pw pd")
    with pytest.raises(ValueError, match=r"counts must be \[B=1\]"):
        stem_statistics(*tensors[:2], torch.ones(2))
