"""`RecCrysFormer`: Patterson map and known residues -> electron density.

    model = RecCrysFormer(RecCrysFormerConfig.dipeptide(dim=64, depth=2))
    density = model(patterson, residue_ids)  # [B, 1, X, Y, Z], int64 [B, R] -> [B, 1, X, Y, Z]

Ref: Pan et al., "RecCrysFormer: Refined Protein Structural Prediction from 3D Patterson Maps via Recycling Training
Runs"; where the paper is silent, as its public implementation computes (docs/density.md lists the differences).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xtalfast.density.maps import residue_maps as standard_residue_maps
from xtalfast.density.model_config import RecCrysFormerConfig
from xtalfast.density.model_layers import FeedForward, PatchEmbed, ResidualBlock, from_patches, make_attention
from xtalfast.density.model_positions import MetricPositions
from xtalfast.density.model_residues import ResidueBranch, ResidueTokens
from xtalfast.density.scale import PAPER_SCALE
from xtalfast.nn import PeriodicConv3d


class Layer(nn.Module):
    """Attention and feed-forward, each on normalised tokens and added to them."""

    def __init__(self, config: RecCrysFormerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim)
        self.norm_residues = nn.LayerNorm(config.dim)
        self.attention = make_attention(config)
        self.norm_ff = nn.LayerNorm(config.dim)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, residues: ResidueTokens) -> Tensor:
        # Residues are asked nothing: their queries, a third of the projection, are never computed.
        weight = self.attention.to_qkv.weight
        known = residues.keys_and_values(self.norm_residues, weight[len(weight) // 3 :])
        k, v = (self.attention.split_heads(part) for part in known.chunk(2, -1))
        x = x + self.attention(self.norm(x), context_kv=(k, v))
        return x + self.feed_forward(self.norm_ff(x))


class RecCrysFormer(nn.Module):
    """The network of the density paper.

    Args:
        config: sizes and options.
        residue_maps: density of the 20 residues on the scale of the training data,
            [20, residue_map_size, residue_map_size, residue_map_size]; the standard conformers on the paper's scale if
            not given.
    """

    def __init__(self, config: RecCrysFormerConfig, residue_maps: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        if residue_maps is None:
            residue_maps = standard_residue_maps() / PAPER_SCALE.density
        self.embed = PatchEmbed(
            2 if config.recycle else 1, config.dim,
            channels=config.channels, kernel=config.stem_kernel, patch=config.patch, order="(ph pw pd c)",
        )  # fmt: skip
        if config.positions == "table":
            self.positions = nn.Parameter(torch.randn(config.max_tokens, config.dim))
        else:
            self.metric_positions = MetricPositions(config)
        self.dropout = nn.Dropout(config.emb_dropout)
        self.residues = ResidueBranch(config, residue_maps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        width = config.channels * config.patch**3
        self.head = nn.Sequential(nn.LayerNorm(config.dim), nn.Linear(config.dim, width), nn.LayerNorm(width))
        self.blocks = nn.ModuleList(ResidualBlock(config) for _ in range(config.decoder_blocks))
        self.last = PeriodicConv3d(config.channels, 1, 3, padding=config.decoder_padding)

    def forward(
        self, patterson: Tensor, residue_ids: Tensor, template: Tensor | None = None, cell: Tensor | None = None
    ) -> Tensor:
        """Predict the density.

        Args:
            patterson: scaled Patterson maps [B, 1, X, Y, Z], origin at the cell's corner. Sizes that are no multiple of
                the patch are padded with zeros around, which breaks the periodicity.
            residue_ids: places in `conformers.RESIDUES`, int64 [B, R], R at most n_residues.
            template: density to start from, like `patterson`; for networks with `recycle`.
            cell: a, b, c, alpha, beta, gamma in A and degrees, [B, 6]; for `positions="metric"`.

        Returns:
            Density [B, 1, X, Y, Z] within -1 to 1; on the scale of the training data.

        Raises:
            ValueError: shapes that do not fit each other or the configuration.
        """
        self._check(patterson, residue_ids, template, cell)
        config = self.config
        x = patterson.to(self.embed.conv_weight.dtype)
        if config.centre_patterson:
            x = x.roll([n // 2 for n in x.shape[2:]], (2, 3, 4))
        x = x if template is None else torch.cat([x, template.to(x.dtype)], 1)
        spare = [-n % config.patch for n in x.shape[:1:-1]]
        x = F.pad(x, [part for n in spare for part in (n // 2, n - n // 2)])
        grid = (x.shape[2], x.shape[3], x.shape[4])
        tokens = self.embed(x)
        if config.positions == "table":
            tokens = tokens + self.positions[: tokens.shape[1]]
        else:
            assert cell is not None
            tokens = tokens + self.metric_positions(grid, cell).to(tokens.dtype)
        tokens = self.dropout(tokens)
        residues = self.residues(residue_ids)
        for layer in self.layers:
            tokens = layer(tokens, residues)
        y = from_patches(self.head(tokens), config.patch, grid)
        for block in self.blocks:
            y = block(y)
        density = torch.tanh(self.last(y))
        for axis, n in enumerate(reversed(spare)):
            density = density.narrow(2 + axis, n // 2, grid[axis] - n)
        return density

    def _check(self, patterson: Tensor, ids: Tensor, template: Tensor | None, cell: Tensor | None) -> None:
        config = self.config
        if patterson.ndim != 5 or patterson.shape[1] != 1:
            raise ValueError(f"patterson must be [B, 1, X, Y, Z], got {list(patterson.shape)}")
        batch = len(patterson)
        if ids.ndim != 2 or len(ids) != batch or not 1 <= ids.shape[1] <= config.n_residues:
            raise ValueError(f"residue_ids must be [{batch}, 1 to {config.n_residues}], got {list(ids.shape)}")
        if (template is not None) != config.recycle:
            wanted = "wants a template, trained with recycle" if config.recycle else "takes no template"
            raise ValueError(f"this network {wanted}")
        if template is not None and template.shape != patterson.shape:
            raise ValueError(f"template must be {list(patterson.shape)} like patterson, got {list(template.shape)}")
        if config.positions == "metric" and (cell is None or cell.shape != (batch, 6)):
            got = None if cell is None else list(cell.shape)
            raise ValueError(f'positions="metric" needs cell [{batch}, 6] in A and degrees, got {got}')
        n_tokens = 1
        for n in patterson.shape[2:]:
            n_tokens *= -(-n // config.patch)
        if config.positions == "table" and n_tokens > config.max_tokens:
            raise ValueError(
                f"a grid of {list(patterson.shape[2:])} has {n_tokens} tokens; max_grid = {config.max_grid} "
                f"allows {config.max_tokens}"
            )
