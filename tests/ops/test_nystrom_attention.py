"""Nystrom attention against its definition and exact attention, gradients, edges, bad input."""

import pytest
import torch

from xtalfast.ops import nystrom_attention
from xtalfast.ops.nystrom_attention import (
    batch_pinv_scale,
    landmark_means,
    legacy_padding,
    nystrom_attention_reference,
    segments,
)
from xtalfast.testing import assert_within_twin_error

OPTIONS = {
    "nystrom": {},
    "ridge": {"pinv": "ridge"},
    "exact": {"attention": "exact"},
    "3 iterations": {"iterations": 3, "scale": 0.2},
}
SHAPES = {"S70-T193-m16": (70, 193, 16), "S5-T9-m64": (5, 9, 64), "S64-T64-m64": (64, 64, 64), "S1-T1-m4": (1, 1, 4)}
SHAPES |= {"S130-T40-m8": (130, 40, 8), "S65-T127-m64": (65, 127, 64)}


def problem(n_queries, n_keys, landmarks, *, n_batch=2, heads=3, depth=8, seed=0):
    """q, k, v, residual, gate; float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = (normal(n_batch, heads, n, depth) for n in (n_queries, n_keys, n_keys))
    return q, k, v, 0.2 * normal(heads, 33), normal(heads, landmarks, landmarks)


def gradients(function, tensors, **options):
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = function(*leaves, **options)
    upstream = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).to(out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream, materialize_grads=True)]


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_output_and_gradients_equal_the_definition(shape, options, masked):
    tensors = problem(*shape)
    generator = torch.Generator().manual_seed(1)
    masks = {name: torch.rand(2, n, generator=generator) < 0.7 for name, n in zip(("query_mask", "key_mask"), shape)}
    masks["key_mask"][:, 0] = True
    options = {**options, **(masks if masked else {}), "landmarks": shape[2]}
    found = gradients(nystrom_attention, tensors, **options)
    wanted = gradients(nystrom_attention_reference, tensors, **options)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_accuracy_is_that_of_the_definition_in_the_same_precision(dtype):
    tensors = problem(70, 193, 16)
    single = [t.to(dtype) for t in tensors]
    twin, exact = (
        gradients(nystrom_attention_reference, t, landmarks=16) for t in (single, [t.double() for t in single])
    )
    for found, a, b in zip(gradients(nystrom_attention, single, landmarks=16), twin, exact, strict=True):
        assert_within_twin_error(found, a, b, 16 * float(b.abs().max()))


def test_gradcheck():
    tensors = [t.requires_grad_() for t in problem(5, 7, 3, n_batch=1, heads=2, depth=4)]
    scale = torch.full((1, 2), 1.3, dtype=torch.float64, requires_grad=True)

    def attend(q, k, v, residual, gate, scale):
        return nystrom_attention(q, k, v, residual, gate, landmarks=3, pinv_scale=scale)

    torch.autograd.gradcheck(attend, (*tensors, scale))


@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
def test_opcheck(gated):
    q, k, v, residual, gate = (t.float().requires_grad_() for t in problem(9, 12, 4))
    optional = (residual, gate, torch.ones(2, 3, requires_grad=True)) if gated else (None, None, None)
    arguments = (q, k, v, *optional, None, None, 4, 3, 0.0, 0.3)
    torch.library.opcheck(torch.ops.xtalfast.nystrom_attention.default, arguments)


def test_compiles_as_one_graph():
    tensors = [t.float() for t in problem(20, 30, 4)]
    compiled = torch.compile(nystrom_attention, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled, tensors, landmarks=4), gradients(nystrom_attention, tensors, landmarks=4)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_every_token_its_own_landmark_gives_exact_attention():
    """A is then the whole matrix: A A^+ A = A, once the iteration has converged."""
    q, _, v, _, _ = problem(12, 12, 12)
    exact = nystrom_attention(q, 6 * q, v, attention="exact")
    errors = [
        float((nystrom_attention(q, 6 * q, v, landmarks=12, iterations=n) - exact).abs().max()) for n in (6, 12, 40)
    ]
    assert errors[0] > 1e-3 > errors[1] and errors[2] < 1e-13


def test_examples_of_a_batch_do_not_see_each_other_unless_the_scale_is_the_batch_s():
    q, k, v, residual, gate = problem(33, 65, 8, n_batch=3)
    k[1] *= 4
    whole = nystrom_attention(q, k, v, residual, gate, landmarks=8)
    alone = nystrom_attention(q[:1], k[:1], v[:1], residual, gate, landmarks=8)
    torch.testing.assert_close(whole[:1], alone, rtol=1e-13, atol=1e-13)
    scale = batch_pinv_scale(q, k, gate, 8)
    mixed = nystrom_attention(q, k, v, residual, gate, landmarks=8, pinv_scale=scale)
    assert float((mixed - whole).abs().max()) > 1e-6
    one = nystrom_attention(q[1:2], k[1:2], v[1:2], residual, gate, landmarks=8, pinv_scale=scale[1:2])
    torch.testing.assert_close(mixed[1:2], one, rtol=1e-13, atol=1e-13)


def test_landmarks_are_means_of_consecutive_tokens():
    tokens = problem(10, 23, 4)[1]
    assert [s.stop - s.start for s in segments(23, 4)] == [6, 6, 6, 5]
    wanted = torch.stack([tokens[:, :, s].mean(2) for s in segments(23, 4)], 2)
    torch.testing.assert_close(landmark_means(tokens, 4), wanted)


@pytest.mark.parametrize("n_tokens, n_context, padding", [(1350, 3240, (58, 24)), (64, 0, (0, 0)), (1, 63, (63, 1))])
def test_legacy_padding_makes_both_counts_multiples(n_tokens, n_context, padding):
    assert legacy_padding(n_tokens, n_context) == padding
    assert (n_tokens + padding[0]) % 64 == 0 and (n_tokens + n_context + sum(padding)) % 64 == 0


def test_masked_tokens_may_hold_anything():
    q, k, v, residual, _ = problem(20, 30, 4)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[:, 25:] = False
    wanted = nystrom_attention(q, k, v, residual, landmarks=4, key_mask=mask)
    k[:, :, 25:], v[:, :, 25:] = torch.nan, torch.nan
    torch.testing.assert_close(nystrom_attention(q, k, v, residual, landmarks=4, key_mask=mask), wanted)
    assert bool(torch.isfinite(wanted).all())


def test_empty_batches_and_no_query():
    for n_batch, n_queries in ((0, 5), (2, 0)):
        out = nystrom_attention(torch.zeros(n_batch, 2, n_queries, 4), *[torch.zeros(n_batch, 2, 6, 4)] * 2)
        assert out.shape == (n_batch, 2, n_queries, 4)


def test_auto_takes_nystrom_for_long_sequences_only():
    q, k, v, _, _ = problem(8, 16, 4, n_batch=1)
    exact = nystrom_attention(q, k, v, attention="exact")
    assert torch.equal(nystrom_attention(q, k, v, landmarks=4, attention="auto"), exact)
    q, k, v, _, _ = problem(1200, 2400, 4, n_batch=1, heads=1, depth=2)
    nystrom = nystrom_attention(q, k, v, landmarks=4)
    assert torch.equal(nystrom_attention(q, k, v, landmarks=4, attention="auto"), nystrom)


def test_bad_input():
    q, k, v, residual, gate = problem(5, 9, 4)
    for message, arguments, options in (
        (r"q must be floating point \[B, H, S, D\], got torch.int64", (q.long(), k, v), {}),
        ("k must be torch.float64 like q, got torch.float32", (q, k.float(), v), {}),
        (r"k must be \[B=2, H=3, T > 0, D=8\], got \[2, 3, 9, 4\]", (q, k[..., :4], v), {}),
        (r"residual must be \[H=3, odd number of taps\], got \[3, 32\]", (q, k, v, residual[:, 1:]), {}),
        (r"gate must be \[H=3, 64, 64\], got \[3, 4, 4\]", (q, k, v, None, gate), {}),
        ("attention must be one of nystrom, exact, auto, got 'flash'", (q, k, v), {"attention": "flash"}),
        ("pinv must be one of iterative, ridge, got 'svd'", (q, k, v), {"pinv": "svd"}),
        (r"key_mask must be bool \[B=2, 9\]", (q, k, v), {"key_mask": torch.ones(2, 8, dtype=torch.bool)}),
        ("landmarks must be positive, got 0", (q, k, v), {"landmarks": 0}),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            nystrom_attention(*arguments, **options)
