"""Nystrom attention at the density paper's sizes (grid 60 x 40 x 36, 15 residues), one thread, forward and backward.

The baseline is what one writes from the equations: heads copied, three softmaxes stored, conv2d along the tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from xtalfast.ops import nystrom_attention

HEADS, DEPTH, TOKENS, CONTEXT = 8, 64, 1350, 3240


def obvious(q: Tensor, k: Tensor, v: Tensor, residual: Tensor, m: int = 64, iterations: int = 6) -> Tensor:
    """Equal segments: the token counts are cut to multiples of the landmarks."""
    q, k, v = q.contiguous() * q.shape[3] ** -0.5, k.contiguous(), v.contiguous()
    qm, km = (t.unflatten(2, (m, t.shape[2] // m)).mean(3) for t in (q, k))
    left, a, right = (torch.softmax(s, -1) for s in (q @ km.mT, qm @ km.mT, qm @ k.mT))
    z = a.mT / (a.sum(-1).amax(-1) * a.sum(-2).amax(-1))[..., None, None]
    one = torch.eye(m)
    for _ in range(iterations):
        az = a @ z
        z = 0.25 * z @ (13 * one - az @ (15 * one - az @ (7 * one - az)))
    out = (left @ z) @ (right @ v)
    taps = residual.shape[1]
    return (
        out
        + functional.conv2d(v, residual[:, None, :, None], padding=(taps // 2, 0), groups=len(residual))[
            :, :, : q.shape[2]
        ]
    )


def test_nystrom_attention(paired):
    torch.manual_seed(0)
    n, m = TOKENS // 64 * 64, (TOKENS + CONTEXT) // 64 * 64
    projected = torch.randn(1, m, 3, HEADS, DEPTH, requires_grad=True)
    residual = (0.2 * torch.randn(HEADS, 33)).requires_grad_()

    def step(attention) -> None:
        q, k, v = projected.permute(2, 0, 3, 1, 4)
        out = attention(q[:, :, :n], k, v, residual)
        torch.autograd.grad(out.sum(), [projected, residual])

    paired(lambda: step(nystrom_attention), lambda: step(obvious), rounds=5)
