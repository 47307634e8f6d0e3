"""Where tokens are, in the crystal's terms: a position that means the same in every grid and cell."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from xtalfast.density.model_config import RecCrysFormerConfig

_HARMONICS = 4  # of the cell's edges
_WAVELENGTHS = (32.0, 16.0, 8.0, 4.0, 2.0)  # A; a token is about 2 A wide


class MetricPositions(nn.Module):
    """Token positions from harmonics of the fractional coordinates and waves in Cartesian space around the centre.

    The Patterson has its origin at the corner and the molecule its centre at the middle of the cell: harmonics serve
    both; waves in A tell distances, and the network learns them once for all cells.
    """

    def __init__(self, config: RecCrysFormerConfig) -> None:
        super().__init__()
        self.patch = config.patch
        width = 6 * (_HARMONICS + 2 * len(_WAVELENGTHS))
        self.layers = nn.Sequential(nn.Linear(width, config.dim), nn.GELU(), nn.Linear(config.dim, config.dim))

    def forward(self, grid: tuple[int, int, int], cell: Tensor) -> Tensor:
        """[B, tokens, dim]; cell [B, 6]."""
        axes = [(torch.arange(n // self.patch, device=cell.device) + 0.5) * self.patch / n for n in grid]
        fraction = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2).to(cell.dtype)
        orth = orthogonalization(cell)
        centred = (fraction - 0.5) @ orth.mT  # [B, tokens, 3], A
        vector = (fraction - fraction.round()) @ orth.mT  # from the nearest corner, as Patterson vectors are
        turns = fraction[:, :, None] * torch.arange(1, _HARMONICS + 1, device=cell.device)
        waves = torch.tensor(_WAVELENGTHS, dtype=cell.dtype, device=cell.device)
        phases = torch.cat(
            [
                turns.flatten(1).expand(len(cell), -1, -1),
                (centred[..., None] / waves).flatten(2),
                (vector[..., None] / waves).flatten(2),
            ],
            -1,
        )
        angle = (2 * math.pi * phases).to(next(self.layers.parameters()).dtype)
        return self.layers(torch.cat([angle.sin(), angle.cos()], -1))


def orthogonalization(cell: Tensor) -> Tensor:
    """Fractional -> Cartesian (A) matrices [B, 3, 3] of cells [B, 6]; a along x, b in the x-y plane."""
    a, b, c = cell[:, :3].unbind(-1)
    cos_alpha, cos_beta, cos_gamma = torch.cos(torch.deg2rad(cell[:, 3:])).unbind(-1)
    sin_gamma = (1 - cos_gamma**2).sqrt()
    y = (cos_alpha - cos_beta * cos_gamma) / sin_gamma
    z = (1 - cos_beta**2 - y**2).sqrt()
    zero = torch.zeros_like(a)
    rows = ((a, b * cos_gamma, c * cos_beta), (zero, b * sin_gamma, c * y), (zero, zero, c * z))
    return torch.stack([torch.stack(row, -1) for row in rows], -2)
