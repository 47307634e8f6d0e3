"""Layers of RecCrysFormer around the modules of `xtalfast.nn`: batch norm over processes, residual blocks."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xtalfast.density.model_config import RecCrysFormerConfig
from xtalfast.nn import CircularPatchEmbed3d, NystromAttention, PeriodicConv3d
from xtalfast.nn.periodic import fold_batch_norm, update_batch_norm
from xtalfast.ops.patch_embed import stem_statistics


def joined_statistics(mean: Tensor, var: Tensor, n: Tensor | int) -> tuple[Tensor, Tensor, Tensor | int]:
    """Mean, biased variance and number of values over all processes of a distributed run; the same alone."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return mean, var, n
    from torch.distributed.nn.functional import all_reduce

    number = torch.as_tensor(n, dtype=mean.dtype, device=mean.device)
    sums = all_reduce(torch.cat([mean * number, number[None]]))
    total = sums[-1].detach()
    joined = sums[:-1] / total
    # About the joined mean, not about zero: no digits are lost.
    spread = all_reduce((var + (mean - joined).square()) * number) / total
    return joined, spread, total


class PatchEmbed(CircularPatchEmbed3d):
    """`CircularPatchEmbed3d` whose batch norm sees the maps of all processes."""

    def _statistics(self, x: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        if not self.training:
            return super()._statistics(x, counts)
        n = (len(x) if counts is None else counts.sum()) * x[0, 0].numel()
        mean, var, n = joined_statistics(*stem_statistics(x, self.conv_weight, counts), n)
        update_batch_norm(self.batch_norm, mean, var, n)
        return mean, var


def from_patches(tokens: Tensor, patch: int, grid: tuple[int, int, int]) -> Tensor:
    """Tokens [B, tokens, channels patch^3], channels last, -> maps [B, channels, X, Y, Z] of `grid` voxels."""
    sizes = [n // patch for n in grid]
    blocks = tokens.view(len(tokens), *sizes, patch, patch, patch, -1)
    return blocks.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(len(tokens), -1, *grid)


def make_attention(config: RecCrysFormerConfig) -> NystromAttention:
    """The attention of one layer."""
    exact = config.uses_exact_attention
    return NystromAttention(
        config.dim, config.heads, config.dim_head, landmarks=config.landmarks, iterations=config.pinv_iterations,
        residual_taps=config.conv_taps, gate=config.sim_gate and not exact, mask_padding=config.mask_padding,
        pinv=config.pinv, pinv_scale=config.pinv_scale, attention="exact" if exact else "nystrom",
        dropout=config.dropout,
    )  # fmt: skip


class FeedForward(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, config: RecCrysFormerConfig) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(config.dim, config.ff_dim),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.ff_dim, config.dim),
            nn.Dropout(config.dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class ResidualBlock(nn.Module):
    """Four convolutions, each behind ReLU and batch norm: 1, 5, 5 and 1 voxels wide. Ref: BigGAN."""

    def __init__(self, config: RecCrysFormerConfig) -> None:
        super().__init__()
        self.legacy_skip = config.legacy_inplace_skip
        c = config.channels
        self.norms = nn.ModuleList(nn.BatchNorm3d(c) for _ in _WIDTHS)
        self.convs = nn.ModuleList(
            PeriodicConv3d(c, c, width, padding=config.decoder_padding, bias=number == len(_WIDTHS) - 1)
            for number, width in enumerate(_WIDTHS)
        )

    def forward(self, x: Tensor) -> Tensor:
        y, statistics = x, None
        if self.training:
            lit = torch.relu(x)
            statistics = lit.mean((0, 2, 3, 4)), lit.var((0, 2, 3, 4), correction=0)
        n = math.prod(x.shape) // x.shape[1]
        for norm, conv in zip(self.norms, self.convs):
            assert isinstance(norm, nn.BatchNorm3d)
            out = conv(y, *affine(norm, statistics, n), relu=True, statistics=self.training)
            y, statistics = (out[0], out[1:]) if self.training else (out, None)
        return y + (torch.relu(x) if self.legacy_skip else x)


_WIDTHS = (1, 5, 5, 1)


def affine(norm: nn.BatchNorm3d, statistics: tuple[Tensor, Tensor] | None, n: int) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm: by the statistics of n values of a batch, or (None) by the running ones."""
    if statistics is None:
        assert norm.running_mean is not None and norm.running_var is not None
        return fold_batch_norm(norm, norm.running_mean, norm.running_var)
    mean, var, total = joined_statistics(*statistics, n)
    update_batch_norm(norm, mean, var, total)
    return fold_batch_norm(norm, mean, var)
