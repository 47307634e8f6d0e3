"""Triton's Nystrom attention, interpreted on the CPU, against the reference: output, gradients, masks, splits."""

import pytest
import torch

from xtalfast.ops.nystrom_attention import nystrom_attention_reference, token_counts
from xtalfast.testing import assert_within_twin_error

SCALE, ITERATIONS, TAPS = 0.3, 6, 5


def problem(n_queries, n_keys, m, *, depth=8, seed=0):
    """q, k, v [1, 2, n, D], residual, gate, pinv_scale; float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = (normal(1, n, 2, depth).transpose(1, 2) for n in (n_queries, n_keys, n_keys))
    return [q, k, v, normal(2, TAPS), normal(2, m, m), torch.tensor([[1.3, 1.1]], dtype=torch.float64)]


def uninitialised(like, *shape):
    return torch.full(shape or like.shape, torch.nan, dtype=like.dtype)


def kernel(interpret, tensors, upstream, m, masks=(None, None), share=None):
    """Output and gradients by q, k, v, residual, gate, pinv_scale, as the kernels leave them."""
    q, k = tensors[:2]
    real = torch.promote_types(q.dtype, torch.float32)
    landmarks = [torch.full((1, 2, m, q.shape[3]), torch.nan, dtype=real) for _ in range(4)]
    qm, km, w, u = landmarks
    inputs = (*tensors, *masks)
    settings = (ITERATIONS, SCALE, "tf32x3")
    out, *saved = interpret(
        *("nystrom_attention", "nystrom_attention", *inputs, *settings),
        *(uninitialised(q), qm, km, w, torch.full((1, 2, m), torch.nan, dtype=real), u, share),
    )[-7:-1]
    counts = tuple(token_counts(n.shape[2], m, mask, qm) for n, mask in ((q, masks[0]), (k, masks[1])))
    by = [torch.empty(0) if t is None else uninitialised(t) for t in tensors]
    left = interpret(
        *("nystrom_attention", "nystrom_attention_backward", upstream, *saved, *inputs, counts, *settings, *by, share)
    )
    return [out, *(g for g, t in zip(left[-7:-1], tensors) if t is not None)]


def reference(tensors, upstream, m, masks=(None, None)):
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    *given, pinv_scale = leaves
    out = nystrom_attention_reference(
        *given,
        landmarks=m,
        iterations=ITERATIONS,
        scale=SCALE,
        pinv_scale=pinv_scale,
        query_mask=masks[0],
        key_mask=masks[1],
    )
    return [out.detach(), *torch.autograd.grad(out, [t for t in leaves if t is not None], upstream)]


def upstream_of(q):
    return torch.linspace(-1, 1, q.numel(), dtype=torch.float64).view_as(q)


CASES = {
    # queries, keys, landmarks, what is not given, keys of a program
    "everything, in shares": ((70, 133, 12), (), 64),
    "no option": ((9, 5, 4), (3, 4, 5), None),
    "scale of the matrix, gate": ((33, 64, 16), (3, 5), None),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_double_precision_equals_the_reference(interpret, case):
    (n_queries, n_keys, m), absent, share = case
    tensors = [None if i in absent else t for i, t in enumerate(problem(n_queries, n_keys, m))]
    upstream = upstream_of(tensors[0])
    found, wanted = kernel(interpret, tensors, upstream, m, share=share), reference(tensors, upstream, m)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])  # bfloat16: no numpy has it
def test_accuracy_is_that_of_the_reference_in_the_same_precision(interpret, dtype):
    exact = [t.to(dtype).double() for t in problem(40, 70, 8)]
    given = [t.to(dtype) for t in exact[:4]] + [t.float() for t in exact[4:]]
    upstream = upstream_of(exact[0]).to(dtype)
    found = kernel(interpret, given, upstream, 8)
    twin, wanted = (reference([t.to(d) for t in exact], upstream.to(d), 8) for d in (dtype, torch.float64))
    for a, b, c in zip(found, twin, wanted, strict=True):
        assert_within_twin_error(a.to(dtype), b, c, 16 * float(c.abs().max()))


def test_masks(interpret):
    tensors = problem(40, 70, 8)
    generator = torch.Generator().manual_seed(1)
    masks = [torch.rand(1, n, generator=generator) < 0.7 for n in (40, 70)]
    for t in tensors[1:3]:
        t *= masks[1][:, None, :, None]  # as the op hands them on
    upstream = upstream_of(tensors[0])
    found, wanted = kernel(interpret, tensors, upstream, 8, masks), reference(tensors, upstream, 8, masks)
    for name, a, b in zip(("out", "q", "k", "v", "residual", "gate", "scale"), found, wanted, strict=True):
        if name == "v":  # by masked values the residual has a gradient here, which the op takes away
            a, b = (t * masks[1][:, None, :, None] for t in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
