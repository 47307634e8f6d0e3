"""The known residues as keys and values: every map embedded once, whatever the batch.

There are 20 different maps, and a token of them depends on the residue and its slot alone. So convolution and embedding
run over the distinct residues of a batch (batch norm counts how often each occurs), and keys and values over whichever
is fewer: distinct (residue, slot) pairs, or residues and slots apart. The latter is exact because layer norm's centring
is linear: (e + p - mean) = (e - mean e) + (p - mean p), so only the scale 1/sigma belongs to the pair.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xtalfast.density.model_config import RecCrysFormerConfig
from xtalfast.density.model_layers import PatchEmbed


@dataclass
class ResidueTokens:
    """Residue tokens of a batch before the layer norm's affine part, ready for every layer.

    Attributes:
        rows: normalised tokens of distinct pairs [D, P, dim]; or centred ones, of residues and then of slots.
        pair: which of the D each slot of the batch holds [B, R]; None if residues and slots are apart.
        residue: which of the residues each slot holds, [B, R].
        rstd: 1/sigma of each token, [B, R, P, 1], where residues and slots are apart.
        n_distinct: residues.
    """

    rows: Tensor
    residue: Tensor
    pair: Tensor | None = None
    rstd: Tensor | None = None

    def keys_and_values(self, norm: nn.LayerNorm, weight: Tensor) -> Tensor:
        """Linear(LayerNorm(token)) of every token, [B, R * P, outputs]; weight [outputs, dim]."""
        projected = self.rows @ (weight * norm.weight).T
        shift = weight @ norm.bias
        if self.pair is not None:
            return (projected + shift)[self.pair].flatten(1, 2)
        assert self.rstd is not None
        n_slots = self.residue.shape[1]
        by_residue, by_slot = projected[:-n_slots], projected[-n_slots:]
        return _Combine.apply(by_residue, by_slot, self.rstd, shift, self.residue).flatten(1, 2)


class _Combine(torch.autograd.Function):
    """(by_residue[residue] + by_slot) rstd + shift, keeping nothing of the size of the result for the gradient.

    by_residue [U, P, C], by_slot [R, P, C], rstd [B, R, P, 1], shift [C], residue [B, R] -> [B, R, P, C].
    """

    @staticmethod
    def forward(ctx, by_residue, by_slot, rstd, shift, residue):
        ctx.save_for_backward(by_residue, by_slot, rstd, residue)
        return by_residue[residue].add_(by_slot).mul_(rstd.to(by_residue.dtype)).add_(shift)

    @staticmethod
    def backward(ctx, grad):
        by_residue, by_slot, rstd, residue = ctx.saved_tensors
        grad_shift = grad.flatten(0, 2).sum(0)
        sums = by_residue[residue].add_(by_slot).mul_(grad)
        grad_rstd = sums.sum(-1, keepdim=True).to(rstd.dtype)
        scaled = torch.mul(grad, rstd, out=sums) if grad.dtype == rstd.dtype else grad * rstd.to(grad.dtype)
        grad_residue = torch.zeros_like(by_residue).index_add_(0, residue.flatten(), scaled.flatten(0, 1))
        return grad_residue, scaled.sum(0), grad_rstd, grad_shift, None


class ResidueBranch(nn.Module):
    """Residue ids -> tokens: stem and patch embedding of the residues' maps, and learned positions for each slot."""

    def __init__(self, config: RecCrysFormerConfig, residue_maps: Tensor) -> None:
        super().__init__()
        size = config.residue_map_size
        if residue_maps.ndim != 4 or tuple(residue_maps.shape[1:]) != (size,) * 3:
            raise ValueError(f"residue_maps must be [n, {size}, {size}, {size}], got {list(residue_maps.shape)}")
        self.config = config
        self.register_buffer("maps", residue_maps[:, None].clone())
        self.maps: Tensor
        self.embed = PatchEmbed(
            1, config.dim, channels=config.channels, kernel=config.stem_kernel, patch=config.patch, order="(c ph pw pd)"
        )
        kept = config.residue_patches or config.residue_tokens
        self.positions = nn.Parameter(torch.randn(config.n_residues, config.residue_tokens, config.dim))
        self.register_buffer("kept", densest_patches(residue_maps, config.patch, kept), persistent=False)
        self.kept: Tensor

    def forward(self, residue_ids: Tensor) -> ResidueTokens:
        """residue_ids [B, R], R <= n_residues."""
        config = self.config
        n_slots = residue_ids.shape[1]
        distinct, residue, counts = torch.unique(residue_ids, return_inverse=True, return_counts=True)
        embedded = self.embed(self.maps[distinct].to(self.embed.conv_weight.dtype), counts)
        positions = self.positions[:n_slots]
        pairs, pair = torch.unique(
            residue * n_slots + torch.arange(n_slots, device=residue.device), return_inverse=True
        )
        if config.residue_patches is None and len(distinct) + n_slots < len(pairs):
            e = embedded - embedded.mean(-1, keepdim=True)
            p = positions - positions.mean(-1, keepdim=True)
            cross = torch.einsum("upd,rpd->urp", e, p)
            slots = torch.arange(n_slots, device=residue.device)
            power = e.square().sum(-1)[residue] + p.square().sum(-1) + 2 * cross[residue, slots]
            rstd = (power / config.dim + _EPS).rsqrt()[..., None]
            return ResidueTokens(torch.cat([e, p]), residue, rstd=rstd)
        which, slot = pairs // n_slots, pairs % n_slots
        if config.residue_patches is None:
            tokens = embedded[which] + positions[slot]
        else:
            kept = self.kept[distinct[which]]  # [D, K]
            tokens = embedded[which[:, None], kept] + positions[slot[:, None], kept]
        rows = nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=_EPS)
        return ResidueTokens(rows, residue, pair=pair)


_EPS = 1e-5  # of torch's layer norm


def densest_patches(maps: Tensor, patch: int, n: int) -> Tensor:
    """The n patches of each map [M, X, Y, Z] with the largest values, in order of their place, int64 [M, n]."""
    largest = nn.functional.max_pool3d(maps[:, None].abs().float(), patch).flatten(1)
    return largest.topk(n, dim=1).indices.sort(dim=1).values
