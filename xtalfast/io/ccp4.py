"""CCP4 maps in and out, through gemmi: grids [X, Y, Z] over one unit cell, origin at the cell's corner, Z fastest."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import gemmi
import numpy as np
from numpy.typing import ArrayLike, NDArray

from xtalfast.errors import InputError
from xtalfast.io.files import replacing
from xtalfast.io.structure import check_cell

_FLOATS = 2  # map mode of 32-bit reals


@dataclass
class CrystalMap:
    """A map over the whole unit cell.

    Attributes:
        values: float32 [X, Y, Z].
        cell: unit cell.
        space_group: of the map; the values already obey it.
    """

    values: NDArray[np.float32]
    cell: gemmi.UnitCell
    space_group: gemmi.SpaceGroup


def read_ccp4(path: str | os.PathLike) -> CrystalMap:
    """Read a CCP4/MRC map, plain or .gz, of any axis order; a map of the asymmetric unit is expanded to the cell.

    Raises:
        InputError: missing or damaged file, impossible cell, or a map that leaves part of the cell open.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    try:
        ccp4 = gemmi.read_ccp4_map(str(path))
        ccp4.setup(float("nan"), gemmi.MapSetup.Full)
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f"{path} is no readable CCP4 map ({error})") from error
    check_cell(ccp4.grid.unit_cell, str(path))
    values = np.array(ccp4.grid.array, np.float32, order="C")
    open_points = int(np.isnan(values).sum())
    if open_points:
        raise InputError(
            f"{path} leaves {open_points} of {values.size} grid points of the cell open; "
            "wanted a map of the whole cell or of its asymmetric unit"
        )
    group = ccp4.grid.spacegroup or gemmi.SpaceGroup("P 1")
    return CrystalMap(values, ccp4.grid.unit_cell, group)


def write_ccp4(
    path: str | os.PathLike,
    values: ArrayLike,
    cell: gemmi.UnitCell,
    space_group: gemmi.SpaceGroup | None = None,
) -> None:
    """Write a map over the whole unit cell (CCP4 mode 2, float32, axis order X, Y, Z).

    Args:
        path: the file; it appears whole or not at all.
        values: [X, Y, Z], finite.
        cell: unit cell.
        space_group: for the header; P 1 when not given.

    Raises:
        InputError: values of another shape or not finite, an impossible cell, or a path that cannot be written.
    """
    values = np.asarray(values)
    if values.ndim != 3 or values.size == 0:
        raise InputError(f"a map must be [X, Y, Z], got {list(values.shape)}")
    if not np.isfinite(values).all():
        raise InputError(f"{path}: the map holds {int((~np.isfinite(values)).sum())} values that are not finite")
    check_cell(cell, str(path))
    ccp4 = gemmi.Ccp4Map()
    ccp4.grid = gemmi.FloatGrid(np.asfortranarray(values, np.float32), cell, space_group or gemmi.SpaceGroup("P 1"))
    ccp4.update_ccp4_header(_FLOATS)
    with replacing(path) as temporary:
        ccp4.write_ccp4_map(str(temporary))
