"""Geometry of unit cells that the density ops share."""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonalization(cells: Tensor) -> Tensor:
    """Matrices that take fractional to Cartesian coordinates, a along x and b in the xy plane, as in PDB files.

    Args:
        cells: a, b, c (A), alpha, beta, gamma (deg), [B, 6].

    Returns:
        [B, 3, 3], float64.
    """
    cells = cells.to(torch.float64)
    a, b, c = cells[:, :3].unbind(1)
    # Degrees near 90 go through the sine of what is missing: cos 90 is then 0, not 6e-17.
    cos_alpha, cos_beta, cos_gamma = torch.sin(torch.deg2rad(90 - cells[:, 3:])).unbind(1)
    sin_gamma = torch.sin(torch.deg2rad(cells[:, 5]))
    cz_y = (cos_alpha - cos_beta * cos_gamma) / sin_gamma
    cz_z = torch.sqrt(1 - cos_beta**2 - cz_y**2)
    zero = torch.zeros_like(a)
    rows = [a, b * cos_gamma, c * cos_beta, zero, b * sin_gamma, c * cz_y, zero, zero, c * cz_z]
    return torch.stack(rows, 1).view(-1, 3, 3)


def volumes(orth: Tensor) -> Tensor:
    """Volumes of the cells, [B], A^3: the product of the diagonal of an upper triangular matrix."""
    return torch.diagonal(orth, dim1=1, dim2=2).prod(1)


def check_cells(cells: Tensor, n_maps: int | None = None) -> None:
    """Raise TypeError or ValueError unless `cells` holds possible unit cells, [B, 6]."""
    if not isinstance(cells, Tensor) or not cells.dtype.is_floating_point:
        raise TypeError("cells must be a floating tensor [B, 6] of a, b, c (A), alpha, beta, gamma (deg)")
    if cells.ndim != 2 or cells.shape[1] != 6:
        raise ValueError(f"cells must be [B, 6], got {list(cells.shape)}")
    if n_maps is not None and cells.shape[0] != n_maps:
        raise ValueError(f"cells must be [B, 6] with B={n_maps}, got {list(cells.shape)}")
    if torch.compiler.is_compiling() or cells.shape[0] == 0:
        return
    lengths, diagonal = cells[:, :3], torch.diagonal(orthogonalization(cells), dim1=1, dim2=2)
    good = torch.isfinite(cells).all(1) & (lengths > 0).all(1) & (diagonal > 1e-3).all(1)
    if not bool(good.all()):
        bad = int((~good).nonzero()[0])
        raise ValueError(f"cells must be possible unit cells, got {cells[bad].tolist()} (cell {bad}); check its angles")
