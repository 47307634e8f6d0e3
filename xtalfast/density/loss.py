"""What the density network is trained on: squared error, and correlations of maps and of their amplitudes."""

from __future__ import annotations

import torch
from torch import Tensor

_AXES = (-3, -2, -1)
_TINY = 1e-12  # keeps a flat map's correlation at 0; far below what any map has


def pearson(x: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
    """Correlation [...] of maps [..., X, Y, Z] over their voxels, of weights [..., X, Y, Z] if given.

    Ref: the density paper, equation 7.
    """
    w = torch.ones_like(x) if weights is None else weights.to(x.dtype).expand_as(x)
    total = w.sum(_AXES, keepdim=True)
    x, y = (values - (w * values).sum(_AXES, keepdim=True) / total for values in (x, y))
    power = (w * x.square()).sum(_AXES) * (w * y.square()).sum(_AXES)
    return (w * x * y).sum(_AXES) / (power + _TINY**2).sqrt()


def amplitude_pearson(x: Tensor, y: Tensor) -> Tensor:
    """Correlation [...] of the amplitudes of the Fourier transforms of maps [..., X, Y, Z], over all coefficients."""
    n = x.shape[-1]
    twice = torch.full((n // 2 + 1,), 2.0, dtype=x.dtype, device=x.device)
    twice[0] = 1  # on the half spectrum these stand for themselves alone, the others for their Friedel mates too
    if n % 2 == 0:
        twice[-1] = 1
    return pearson(torch.fft.rfftn(x, dim=_AXES).abs(), torch.fft.rfftn(y, dim=_AXES).abs(), twice)


def density_loss(
    predicted: Tensor,
    density: Tensor,
    *,
    mse: float = 0.9999,
    pc: float = 5e-5,
    amplitude_pc: float = 5e-5,
    mask: Tensor | None = None,
) -> Tensor:
    """Loss of each example: mse x squared error + pc (1 - PC) + amplitude_pc (1 - PC of the amplitudes).

    Args:
        predicted, density: [B, ..., X, Y, Z].
        mse, pc, amplitude_pc: weights; the paper's by default.
        mask: voxels that count, like `density`; None counts all. Others are zero to the Fourier transform.

    Returns:
        [B].

    Ref: the density paper, equation 8, with 1 - PC for -PC.
    """
    predicted = predicted.to(density.dtype)
    w = torch.ones_like(density) if mask is None else mask.to(density.dtype)
    squared = (w * (predicted - density).square()).flatten(1).sum(1) / w.flatten(1).sum(1)
    correlation = pearson(predicted, density, None if mask is None else w).view(len(density), -1).mean(1)
    loss = mse * squared + pc * (1 - correlation)
    if amplitude_pc:
        loss = loss + amplitude_pc * (1 - amplitude_pearson(predicted * w, density * w).view(len(w), -1).mean(1))
    return loss
