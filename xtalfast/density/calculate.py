"""From a structure or from measured amplitudes to structure factors and maps of a whole cell, in any space group."""

from __future__ import annotations

import math

import gemmi
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from xtalfast.density.grids import grid_size
from xtalfast.density.maps import B_STANDARD, RATE
from xtalfast.density.scale import AmplitudeScale, MapScale, fit_wilson
from xtalfast.errors import InputError
from xtalfast.io.structure import Atoms, check_cell
from xtalfast.ops import density_map, patterson_map, structure_factors
from xtalfast.phasing.fourier import FourierGrid
from xtalfast.phasing.symmetry import check_amplitude_symmetry, expand_to_p1


def calculate_structure_factors(
    atoms: Atoms, d_min: float, *, rate: float = RATE
) -> tuple[NDArray[np.int32], NDArray[np.complex128]]:
    """Structure factors of a structure, IT92 form factors, by way of its density on a grid.

    Sharp atoms are blurred until the grid resolves them and the blur is taken out again, as gemmi does.

    Args:
        atoms: of the asymmetric unit.
        d_min: resolution limit, A.
        rate: grid points per d_min.

    Returns:
        Indices of the asymmetric unit [N, 3] and F [N] in e, without F(000).

    Raises:
        InputError: d_min or rate out of range, or no reflection within d_min.
    """
    cell = atoms.cell
    x, y, z = grid_size(cell.parameters, d_min, rate=rate, multiple=2).tolist()
    hkl = gemmi.make_miller_array(cell, atoms.space_group, d_min)
    if len(hkl) == 0:
        raise InputError(f"no reflection of this cell has d above {d_min:g} A; choose a smaller d_min")
    every = atoms.expand_to_p1()
    blur = max(8 * math.pi**2 / 1.1 * (d_min / rate) ** 2 - float(every.b_iso.min()), 0.0)
    cells = torch.tensor([cell.parameters], dtype=torch.float64)
    density = density_map(
        torch.from_numpy(every.coords),
        torch.from_numpy(every.element),
        torch.from_numpy(every.b_iso),
        torch.from_numpy(every.occupancy),
        torch.tensor([0, len(every)]),
        cells,
        (x, y, z),
        blur=blur,
    )
    f = structure_factors(density, cells, d_min=d_min, f000=False, blur=blur)
    # Indices with l < 0 are found at their Friedel mates.
    mirrored = hkl[:, 2] < 0
    h, k, l = (np.where(mirrored[:, None], -hkl, hkl) % [x, y, z + 1]).T
    values = f[0].numpy()[h, k, l]
    return hkl, np.where(mirrored, values.conj(), values)


def bulk_solvent_structure_factors(
    atoms: Atoms, hkl: ArrayLike, d_min: float, *, k: float = 0.35, b: float = 46.0, rate: float = RATE
) -> NDArray[np.complex128]:
    """Structure factors of a flat solvent around a structure: k exp(-b s^2 / 4) F_mask, to be added to those of atoms.

    The mask is gemmi's, with Refmac's radii: 1 where no atom is near. Without the solvent calculated amplitudes below
    about 6 A are several times too large. Ref: Jiang & Bruenger, J. Mol. Biol. 243, 100 (1994),
    doi:10.1006/jmbi.1994.1633.

    Args:
        atoms: of the asymmetric unit.
        hkl: indices [N, 3] within d_min.
        d_min: resolution limit, A.
        k: density of the solvent, e/A^3.
        b: A^2; how blurred the surface is.
        rate: grid points per d_min.

    Returns:
        complex [N], e.
    """
    residue, chain, model = gemmi.Residue(), gemmi.Chain("A"), gemmi.Model(1)
    for position, number, occupancy in zip(atoms.coords.tolist(), atoms.element.tolist(), atoms.occupancy.tolist()):
        atom = gemmi.Atom()
        atom.pos, atom.element, atom.occ = gemmi.Position(*position), gemmi.Element(number), occupancy
        residue.add_atom(atom)
    chain.add_residue(residue)
    model.add_chain(chain)
    grid = gemmi.FloatGrid()
    grid.set_unit_cell(atoms.cell)
    grid.spacegroup = atoms.space_group
    grid.set_size_from_spacing(d_min / rate, gemmi.GridSizeRounding.Up)
    gemmi.SolventMasker(gemmi.AtomicRadiiSet.Refmac).put_mask_on_float_grid(grid, model)
    index = np.ascontiguousarray(hkl, np.int32)
    mask = gemmi.transform_map_to_f_phi(grid).get_value_by_hkl(index)
    return (k * np.exp(-b / 4 * atoms.cell.calculate_1_d2_array(index)) * mask).astype(np.complex128)


def map_of_structure_factors(
    hkl: ArrayLike,
    f: ArrayLike,
    cell: gemmi.UnitCell,
    *,
    d_min: float,
    space_group: gemmi.SpaceGroup | None = None,
    rate: float = RATE,
) -> Tensor:
    """Density of structure factors over the whole cell.

    Args:
        hkl: indices [N, 3] of the asymmetric unit; f: complex [N], e.
        cell: unit cell; space_group: P 1 when not given.
        d_min: resolution limit, A.
        rate: grid points per d_min.

    Returns:
        float32 [X, Y, Z], e/A^3.
    """
    every, values, _ = expand_to_p1(np.asarray(hkl), np.asarray(f), space_group or gemmi.SpaceGroup("P 1"))
    x, y, z = grid_size(cell.parameters, d_min, rate=rate, multiple=2).tolist()
    grid = FourierGrid(cell, (x, y, z), d_min)
    spectrum, _ = grid.scatter(every, torch.from_numpy(values).to(torch.complex64))
    return grid.to_map(spectrum)


def patterson_of_amplitudes(
    hkl: ArrayLike,
    f: ArrayLike,
    cell: gemmi.UnitCell,
    *,
    space_group: gemmi.SpaceGroup | None = None,
    d_min: float | None = None,
    rate: float = RATE,
    multiple: int = 4,
    paper_grid: bool = False,
    remove_origin: bool = False,
    sharpen: bool = False,
) -> Tensor:
    """Patterson map of a list of amplitudes; what was not measured counts as 0.

    Args:
        hkl: indices [N, 3]; each reflection of the asymmetric unit once.
        f: amplitudes [N].
        cell: unit cell.
        space_group: P 1 when not given.
        d_min: resolution limit, A; that of the data when not given.
        rate, multiple, paper_grid: see `grid_size`.
        remove_origin, sharpen: see `patterson_map`.

    Returns:
        float32 [X, Y, Z], the square of the amplitudes' unit per A^3.

    Raises:
        InputError: amplitudes that are missing, not finite, all zero or do not fit the space group, an impossible cell,
            or d_min beyond the data.
    """
    index, amplitudes = np.asarray(hkl, np.int64), np.asarray(f, float)
    group = space_group or gemmi.SpaceGroup("P 1")
    check_cell(cell, "cell")
    if index.ndim != 2 or index.shape[1] != 3 or len(index) != len(amplitudes) or len(index) == 0:
        raise InputError(f"wanted hkl [N, 3] and amplitudes [N], got {list(index.shape)} and {list(amplitudes.shape)}")
    if not np.isfinite(amplitudes).all():
        raise InputError(f"{int((~np.isfinite(amplitudes)).sum())} amplitudes are not finite; leave them out")
    if not amplitudes.any():
        raise InputError("all amplitudes are zero; a Patterson map needs data")
    check_amplitude_symmetry(index, cell, group)
    d = cell.calculate_d_array(np.ascontiguousarray(index, np.int32))
    finest = float(d[index.any(axis=1)].min(initial=np.inf))
    limit = finest if d_min is None else d_min
    if limit < finest - 0.05:
        raise InputError(
            f"d_min {limit:g} A is beyond the data, which end at {finest:.3f} A; choose {finest:.2f} or more"
        )
    # A hair below the limit, so that the reflection that defines it is inside the sphere.
    limit *= 1 - 1e-6
    every, values, _ = expand_to_p1(index, amplitudes, group)
    x, y, z = grid_size(cell.parameters, limit, rate=rate, multiple=multiple, paper=paper_grid).tolist()
    grid = FourierGrid(cell, (x, y, z), limit)
    spectrum, _ = grid.scatter(every, torch.from_numpy(values).to(torch.complex64))
    cells = torch.tensor([cell.parameters], dtype=torch.float64)
    patterson = patterson_map(
        spectrum[None] * cell.volume, cells, d_min=limit, remove_origin=remove_origin, sharpen=sharpen
    )
    return patterson[0]


def prepare_patterson(
    hkl: ArrayLike,
    f: ArrayLike,
    cell: gemmi.UnitCell,
    element: ArrayLike,
    *,
    scale: MapScale,
    amplitude_scale: AmplitudeScale | None = None,
    space_group: gemmi.SpaceGroup | None = None,
    b: float = B_STANDARD,
    **grid_options: float | bool | None,
) -> Tensor:
    """Measured amplitudes as the network's input: on the absolute scale, B = 20, divided by the training set's scale.

    Args:
        hkl, f, cell, space_group: as in `patterson_of_amplitudes`.
        element: atomic numbers of the atoms in the asymmetric unit [M]; they tell the scale.
        scale: of the training set.
        amplitude_scale: when it is known; else fitted by `fit_wilson`.
        b: overall B of the training set, A^2.
        grid_options: further arguments of `patterson_of_amplitudes`.

    Returns:
        float32 [X, Y, Z], about within [-1, 1].

    Raises:
        InputError: as `patterson_of_amplitudes` and `fit_wilson`.
    """
    amplitude_scale = amplitude_scale or fit_wilson(hkl, f, cell, element, space_group=space_group)
    index = np.ascontiguousarray(hkl, np.int32)
    absolute = amplitude_scale.apply(f, cell.calculate_1_d2_array(index), b=b)
    patterson = patterson_of_amplitudes(index, absolute, cell, space_group=space_group, **grid_options)  # type: ignore[arg-type]
    return patterson / scale.patterson
