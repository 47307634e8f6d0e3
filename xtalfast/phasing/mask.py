"""Where the protein is: local density, the solvent mask drawn from it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from xtalfast.phasing.fourier import FourierGrid


def local_density(maps: Tensor, grid: FourierGrid, radius: float) -> Tensor:
    """Positive density squared, smoothed by a Gaussian: high in the protein, low in flat solvent.

    Args:
        maps: density [..., X, Y, Z].
        grid: of the maps.
        radius: two standard deviations of the Gaussian, A.

    Returns:
        [..., X, Y, Z].

    Ref: Abrahams (1997) Acta Cryst. D53, 371 (local variance); here of the positive part alone.
    """
    return grid.to_map(grid.to_spectrum(maps.clamp_min(0).square()) * smoothing(grid, radius))


def smoothing(grid: FourierGrid, radius: float) -> Tensor:
    """Transform of the Gaussian of `local_density` on the half spectrum, [X, Y, Z // 2 + 1]."""
    return torch.exp(-2 * (math.pi * radius / 2) ** 2 * grid.s2)


def lowest_fraction(values: Tensor, fraction: Tensor) -> Tensor:
    """Threshold of each map [B, X, Y, Z] below which the given fraction [B] of its voxels lies; [B, 1, 1, 1].

    Large maps are judged by every n-th voxel: the threshold moves by less than 1 % of the voxels.
    """
    flat = values.flatten(1)
    sample = flat[:, :: sampling_step(flat.shape[1])]
    ranks = (fraction * sample.shape[1]).long().clamp(1, sample.shape[1])
    thresholds = [row.kthvalue(int(rank)).values for row, rank in zip(sample, ranks)]
    return torch.stack(thresholds).view(-1, 1, 1, 1)


def sampling_step(n_voxels: int) -> int:
    """Of every how many voxels one is looked at; shares no factor with the sizes of FFT grids: all rows are visited."""
    return 1 if n_voxels < 7_000 else 7


def protein_mask(maps: Tensor, grid: FourierGrid, solvent: Tensor, radius: float) -> Tensor:
    """True in the protein: all but the fraction `solvent` [B] of the voxels of [B, X, Y, Z], flattest first."""
    density = local_density(maps, grid, radius)
    return density > lowest_fraction(density, solvent)
