"""Geometry of unit cells that the density ops share."""

from __future__ import annotations

import torch
from torch import Tensor

from xtalfast import _native


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


def volumes(cells: Tensor) -> Tensor:
    """Volumes of the cells, [B], A^3, float64: the product of the diagonal of an upper triangular matrix."""
    return torch.diagonal(orthogonalization(cells), dim1=1, dim2=2).prod(1)


def _first_impossible(cells: Tensor) -> int:
    """Index of the first cell that cannot be one (heights must exceed 1e-3 A), or -1."""
    cells = cells.to("cpu", torch.float64).contiguous()
    if _native.C is not None:
        return _native.C.find_impossible_cell(cells.data_ptr(), len(cells))
    heights = torch.diagonal(orthogonalization(cells), dim1=1, dim2=2)
    bad = ~((cells[:, :3] > 0).all(1) & (heights > 1e-3).all(1) & torch.isfinite(volumes(cells)))
    return int(bad.nonzero()[0]) if bool(bad.any()) else -1


def check_cells(cells: Tensor, n_maps: int) -> None:
    """Raise TypeError or ValueError unless `cells` holds `n_maps` possible unit cells, [B, 6]."""
    if not isinstance(cells, Tensor) or not cells.dtype.is_floating_point:
        raise TypeError("cells must be a floating tensor [B, 6] of a, b, c (A), alpha, beta, gamma (deg)")
    if cells.ndim != 2 or cells.shape[0] != n_maps or cells.shape[1] != 6:
        raise ValueError(f"cells must be [B, 6] with B={n_maps}, got {list(cells.shape)}")
    if torch.compiler.is_compiling():
        return
    bad = _first_impossible(cells)
    if bad >= 0:
        raise ValueError(f"cells must be possible unit cells, got {cells[bad].tolist()} (cell {bad}); check its angles")
