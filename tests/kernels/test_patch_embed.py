"""Triton's patch embedding, interpreted on the CPU, against the reference."""

import pytest
import torch

from xtalfast.ops.patch_embed import folded, patch_embed_reference
from xtalfast.testing import assert_within_twin_error

EPS = 1e-5


def problem(n_maps, channels, grid, kernel, patch, out=3, dim=12, seed=0):
    """Arguments of the op up to the last LayerNorm, flat; float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    values = out * patch**3
    return [
        normal(n_maps, channels, *grid),
        normal(out, channels, kernel, kernel, kernel) / kernel,
        *(1 + 0.2 * normal(out), 0.3 * normal(out)),
        *(1 + 0.2 * normal(values), 0.3 * normal(values)),
        *(normal(dim, values) / values**0.5, normal(dim)),
        *(1 + 0.2 * normal(dim), 0.3 * normal(dim)),
    ]


def kernel(interpret, tensors, patch, order):
    x, weight = tensors[0], tensors[6]
    tokens = torch.full((len(x), x.shape[2:].numel() // patch**3, len(weight)), torch.nan, dtype=x.dtype)
    return interpret(*("patch_embed", "patch_embed", *folded(*tensors, patch, order), patch, EPS, "tf32", tokens))[-1]


def reference(tensors, patch, order):
    x, w, a, b, w1, b1, weight, bias, w2, b2 = tensors
    return patch_embed_reference(x, w, a, b, (w1, b1), weight, bias, (w2, b2), patch=patch, order=order, eps=EPS)


CASES = {
    "patch 4, kernel 7": ((1, 1, (8, 4, 8), 7, 4), "(ph pw pd c)"),
    "two channels, no bias": ((2, 2, (4, 6, 2), 3, 2), "(c ph pw pd)"),
    "more than a tile": ((2, 1, (6, 6, 8), 3, 2), "(ph pw pd c)"),
}


@pytest.mark.parametrize("shape, order", CASES.values(), ids=CASES)
def test_double_precision_equals_the_reference(interpret, shape, order):
    tensors = problem(*shape)
    if shape[1] == 2:
        tensors[7] = None
    patch = shape[-1]
    torch.testing.assert_close(
        kernel(interpret, tensors, patch, order), reference(tensors, patch, order), rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
def test_accuracy_is_that_of_the_reference_in_the_same_precision(interpret, dtype):
    exact = [t.to(dtype).double() for t in problem(1, 1, (4, 4, 4), 3, 2)]
    given = [t.to(dtype) for t in exact]
    order = "(ph pw pd c)"
    wanted = reference(exact, 2, order)
    assert_within_twin_error(
        kernel(interpret, given, 2, order), reference(given, 2, order), wanted, 16 * float(wanted.abs().max())
    )
