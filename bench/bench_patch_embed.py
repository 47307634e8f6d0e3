"""Patch embedding of Patterson maps with batch statistics, one thread, forward and backward, against plain torch."""

from __future__ import annotations

import torch
from torch.nn import functional

from xtalfast.nn import CircularPatchEmbed3d
from xtalfast.ops.patch_embed import patchify


def test_patch_embed(paired):
    torch.manual_seed(0)
    embed = CircularPatchEmbed3d(1, 512)
    norm = torch.nn.BatchNorm3d(10)
    x = torch.randn(2, 1, 60, 40, 36)

    def plain() -> torch.Tensor:
        y = functional.conv3d(functional.pad(x, [3] * 6, mode="circular"), embed.conv_weight)
        return embed.norm(embed.projection(embed.patch_norm(patchify(norm(y), 4, embed.order))))

    def step(function) -> None:
        function().sum().backward()
        embed.zero_grad()

    paired(lambda: step(lambda: embed(x)), lambda: step(plain), rounds=5)
