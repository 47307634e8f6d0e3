"""Maps of an example: density and Patterson of one truncated set of structure factors, and the 20 residue maps."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtalfast.density.cells import orthogonalization
from xtalfast.density.conformers import conformers
from xtalfast.density.store import FragmentStore
from xtalfast.ops import density_map, limit_resolution, map_from_structure_factors, patterson_map, structure_factors

B_STANDARD = 20.0  # A^2, the B of every atom in the paper's data
D_MIN, RATE = 1.5, 3.0  # A; grid points per d_min
RESIDUE_BOX, RESIDUE_GRID = 12.0, 24  # A and points along each axis of a residue map


class AtomBatch(NamedTuple):
    """Atoms of several maps, as `density_map` takes them."""

    coords: Tensor
    element: Tensor
    b_iso: Tensor
    occupancy: Tensor
    ptr: Tensor
    cells: Tensor


def atoms_of_rows(
    store: FragmentStore,
    rows: NDArray[np.int64],
    *,
    b_iso: float | None = B_STANDARD,
    dtype: torch.dtype = torch.float32,
) -> AtomBatch:
    """The atoms of fragments `rows` [B]; `b_iso` None keeps the deposited B factors."""
    selected = store.select(np.asarray(rows)).arrays
    n = len(selected["coords"])
    deposited = torch.from_numpy(selected["b_iso"]).to(dtype)
    return AtomBatch(
        torch.from_numpy(selected["coords"]).to(dtype),
        torch.from_numpy(selected["element"].astype(np.int64)),
        deposited if b_iso is None else torch.full((n,), b_iso, dtype=dtype),
        torch.ones(n, dtype=dtype),
        torch.from_numpy(selected["ptr"]),
        torch.from_numpy(selected["cells"]),
    )


def spectrum_of_atoms(
    coords: Tensor,
    element: Tensor,
    b_iso: Tensor,
    occupancy: Tensor,
    ptr: Tensor,
    cells: Tensor,
    grid: tuple[int, int, int],
    d_min: float | None,
) -> Tensor:
    """Structure factors of atoms up to d_min (None: all that the grid holds), F(000) = 0, on the half spectrum.

    Args:
        coords: Cartesian A, [M, 3]; element [M] int64; b_iso A^2 [M]; occupancy [M]; atoms of map i are
            ptr[i] to ptr[i+1], int64 [B+1].
        cells: [B, 6].
        grid: X, Y, Z of all maps.
        d_min: A.

    Returns:
        Complex [B, X, Y, Z // 2 + 1], e.
    """
    density = density_map(coords, element, b_iso, occupancy, ptr, cells, grid)
    assert isinstance(density, Tensor)  # one grid for all
    f = structure_factors(density, cells, d_min=d_min, f000=False)
    assert isinstance(f, Tensor)
    return f


def maps_of_spectrum(f: Tensor, cells: Tensor, f_patterson: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(Patterson, density) [B, X, Y, Z] of structure factors on the half spectrum of an even grid.

    `f_patterson` takes the place of `f` in the Patterson: what was measured may differ from the truth.
    """
    density = map_from_structure_factors(f, cells)
    patterson = patterson_map(f if f_patterson is None else f_patterson, cells)
    assert isinstance(density, Tensor) and isinstance(patterson, Tensor)
    return patterson, density


def inverse_d2(cells: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """1/d^2 (1/A^2) of the half spectrum [B, X, Y, Z // 2 + 1], float64; cells [B, 6]."""
    reciprocal = torch.linalg.inv(torch.from_numpy(orthogonalization(cells.cpu().numpy()))).to(cells.device)
    h, k = (torch.fft.fftfreq(n, 1 / n, dtype=torch.float64, device=cells.device) for n in grid[:2])
    l = torch.arange(grid[2] // 2 + 1, dtype=torch.float64, device=cells.device)
    metric = (reciprocal @ reciprocal.mT)[:, :, :, None, None, None]
    h, k = h[:, None, None], k[:, None]
    in_plane = metric[:, 0, 0] * h**2 + 2 * metric[:, 0, 1] * h * k + metric[:, 1, 1] * k**2
    return in_plane + 2 * (metric[:, 0, 2] * h + metric[:, 1, 2] * k) * l + metric[:, 2, 2] * l**2


@cache
def residue_maps() -> Tensor:
    """Density of the 20 standard conformers, float32 [20, 24, 24, 24], e/A^3: the known parts the network is given.

    Each stands alone in a cubic P1 cell of 12 A, centre of mass at the centre, B = 20 A^2, structure factors to 1.5 A,
    grid points every 0.5 A. Numbered by residue id; never a function of the example.
    """
    parts = []
    for conformer in conformers():
        mass = conformer.element.astype(float)
        parts.append(conformer.coords - mass @ conformer.coords / mass.sum() + RESIDUE_BOX / 2)
    element = torch.from_numpy(np.concatenate([c.element for c in conformers()]).astype(np.int64))
    ptr = torch.from_numpy(np.cumsum([0, *(len(c.element) for c in conformers())]))
    cells = torch.tensor([[RESIDUE_BOX] * 3 + [90.0] * 3] * len(conformers()), dtype=torch.float64)
    coords = torch.from_numpy(np.concatenate(parts))
    b_iso, occupancy = torch.full((len(coords),), B_STANDARD, dtype=torch.float64), torch.ones(len(coords)).double()
    density = density_map(coords, element, b_iso, occupancy, ptr, cells, (RESIDUE_GRID,) * 3)
    maps = limit_resolution(density, cells, D_MIN)
    assert isinstance(maps, Tensor)
    return maps.float()
