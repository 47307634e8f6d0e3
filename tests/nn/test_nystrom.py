"""NystromAttention as a module: context, legacy padding, masks, state."""

import pytest
import torch
from torch import nn

from xtalfast.nn import NystromAttention


def module(**options):
    torch.manual_seed(0)
    return NystromAttention(24, heads=2, dim_head=8, landmarks=8, residual_taps=5, gate=True, **options).double()


def tokens(n, seed=0):
    return torch.randn(2, n, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_context_may_come_projected():
    attention, x, context = module(), tokens(20), tokens(33, 1)
    torch.testing.assert_close(
        attention(x, context_kv=attention.project_context(context)), attention(x, context), rtol=0, atol=0
    )


def test_legacy_zero_tokens_are_keys_and_landmarks():
    """20 tokens and 33 of context become [4 zeros, 20, 7 zeros, 33]: written out here with the definition's parts."""
    attention, x, context = module(mask_padding=False), tokens(20), tokens(33, 1)
    whole = torch.cat([x.new_zeros(2, 4, 24), x, x.new_zeros(2, 7, 24), context], 1)
    q, k, v = attention.project(whole)
    q = q[:, :, :24] / 8**0.5
    qm, km = q.unflatten(2, (8, 3)).mean(3), k.unflatten(2, (8, 8)).mean(3)
    a = torch.softmax(qm @ km.mT * torch.sigmoid(attention.gate), -1)
    z = a.mT / (a.sum(-1).amax(-1) * a.sum(-2).amax(-1))[..., None, None]
    one = torch.eye(8, dtype=torch.float64)
    for _ in range(6):
        az = a @ z
        z = 0.25 * z @ (13 * one - az @ (15 * one - az @ (7 * one - az)))
    out = torch.softmax(q @ km.mT, -1) @ z @ torch.softmax(qm @ k.mT, -1) @ v
    kernel = attention.residual[:, None, :, None]
    out = out + nn.functional.conv2d(v, kernel, padding=(2, 0), groups=2)[:, :, :24]
    wanted = attention.to_out(out[:, :, 4:].transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, context), wanted, rtol=1e-12, atol=1e-12)


def test_padding_modes_agree_where_nothing_is_padded():
    x, context = tokens(24), tokens(40, 1)
    torch.testing.assert_close(module(mask_padding=False)(x, context), module()(x, context), rtol=1e-13, atol=1e-13)


def test_batch_scale_couples_examples_and_the_other_does_not():
    x = torch.cat([tokens(24), 3 * tokens(24, 1)])
    for scale, same in (("matrix", True), ("batch", False)):
        attention = module(pinv_scale=scale)
        assert torch.allclose(attention(x)[:2], attention(x[:2]), rtol=1e-12, atol=1e-12) == same


def test_masked_tokens_do_not_matter():
    attention, x, context = module(attention="exact"), tokens(20), tokens(33, 1)
    mask, context_mask = torch.ones(2, 20, dtype=torch.bool), torch.ones(2, 33, dtype=torch.bool)
    context_mask[:, 30:] = False
    wanted = attention(x, context[:, :30])
    torch.testing.assert_close(attention(x, context, mask=mask, context_mask=context_mask), wanted)
    context[:, 30:] = 7.0
    torch.testing.assert_close(attention(x, context, context_mask=context_mask), wanted)


def test_trains_in_mixed_precision():
    attention = module().float()
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(tokens(20).float(), tokens(33).float())
    out.float().square().mean().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in attention.parameters())


def test_bad_options():
    with pytest.raises(ValueError, match="pinv_scale must be 'matrix' or 'batch', got 'row'"):
        module(pinv_scale="row")
    with pytest.raises(ValueError, match="residual_taps must be odd"):
        NystromAttention(8, residual_taps=4)
    with pytest.raises(ValueError, match="masks need mask_padding=True"):
        module(mask_padding=False)(tokens(20), mask=torch.ones(2, 20, dtype=torch.bool))
