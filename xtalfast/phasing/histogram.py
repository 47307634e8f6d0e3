"""The distribution of protein density: what it is, and how a map is given it."""

from __future__ import annotations

import gemmi
import numpy as np
import torch
from torch import Tensor

from xtalfast.phasing.fourier import FourierGrid
from xtalfast.phasing.mask import protein_mask

N_QUANTILES = 64


def match_histogram(maps: Tensor, protein: Tensor, quantiles: Tensor) -> Tensor:
    """Give the density inside the mask the distribution `quantiles` [Q] (at (i + 1/2) / Q), keeping its rms.

    Ref: Zhang & Main (1990) Acta Cryst. A46, 41.
    """
    result = maps
    for i, (density, inside) in enumerate(zip(maps, protein)):
        values = density[inside]
        ranks = values.detach().argsort().argsort().to(values.dtype)
        position = ((ranks + 0.5) / max(len(values), 1) * len(quantiles) - 0.5).clamp(0, len(quantiles) - 1)
        low = position.floor().long().clamp(max=len(quantiles) - 2)
        target = torch.lerp(quantiles[low], quantiles[low + 1], position - low)
        # Straight-through: the value of the target, the gradient of the density.
        scaled = target * (values.detach().square().mean().sqrt() / target.square().mean().sqrt())
        replaced = density.masked_scatter(inside, values + (scaled - values).detach())
        result = torch.cat([result[:i], replaced[None], result[i + 1 :]])
    return result


def reference_quantiles(d_min: float, rate: float = 2.5, radius: float = 3.0, b_iso: float = 20.0) -> Tensor:
    """Quantiles [N_QUANTILES] of protein density at d_min (A): the 20 residues, each in a cell half full."""
    from xtalfast.density.conformers import conformers

    samples = []
    for residue in conformers():
        extent = np.ptp(residue.coords, axis=0) + 4.0
        a, b, c = extent.tolist()
        cell = gemmi.UnitCell(a, b, c, 90, 90, 90)
        grid = FourierGrid.for_resolution(cell, d_min, rate=rate)
        hkl = np.array(gemmi.make_miller_array(cell, gemmi.SpaceGroup("P 1"), d_min))
        s2 = torch.from_numpy(1 / cell.calculate_d_array(hkl) ** 2)
        phase = 2 * np.pi * torch.from_numpy(hkl @ (residue.coords / extent).T)
        electrons = torch.from_numpy(residue.element.astype(np.float64))
        # Point atoms with a Gaussian fall-off: the shape of the distribution is all that is used. 8 A^2 for the atom.
        F = (torch.exp(1j * phase) @ electrons.to(torch.complex128)) * torch.exp(-(b_iso + 8.0) / 4 * s2)
        maps = grid.to_map(grid.scatter(hkl, F.to(torch.complex64))[0])[None]
        inside = protein_mask(maps, grid, torch.tensor([0.5]), radius)
        values = maps[inside].clamp_min(0)
        samples.append(values / values.square().mean().sqrt())
    values = torch.cat(samples)
    at = (torch.arange(N_QUANTILES) + 0.5) / N_QUANTILES
    return torch.quantile(values, at)
