"""What a phasing run leaves behind: MTZ, map and JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import gemmi
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

import xtalfast
from xtalfast.io.ccp4 import write_ccp4
from xtalfast.io.files import write_text
from xtalfast.io.mtz_phases import ReflectionData, write_phases
from xtalfast.phasing.fourier import FourierGrid
from xtalfast.phasing.modify import Modified
from xtalfast.phasing.solve import Solution
from xtalfast.phasing.symmetry import expand_to_p1, operations

MAP_RATE = 3.0


def density(
    hkl: NDArray, F: NDArray, cell: gemmi.UnitCell, space_group: gemmi.SpaceGroup, d_min: float
) -> NDArray[np.float32]:
    """Map [X, Y, Z] of the whole cell from structure factors of the asymmetric unit; spacing d_min / 3."""
    multiple_of = 12 if len(operations(space_group)) > 1 else 1
    grid = FourierGrid.for_resolution(cell, d_min, rate=MAP_RATE, multiple_of=multiple_of)
    p1_hkl, expanded, _ = expand_to_p1(hkl, F, space_group)
    spectrum, _ = grid.scatter(p1_hkl, torch.from_numpy(expanded).to(torch.complex64))
    return grid.to_map(spectrum).numpy()


def write_solution(directory: str | os.PathLike, found: Solution, data: ReflectionData) -> list[Path]:
    """Write phased.mtz (FWT PHWT FOM FP SIGFP), map.ccp4, solve.json, and phased_inverse.mtz if the hand is open.

    The map coefficients are FOM-weighted. FP is as measured, SIGFP when the data have it.

    Args:
        directory: made if needed; of an earlier run nothing is left that does not belong to this one.
        found: the solution.
        data: the file that was solved.

    Returns:
        the files written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    files = [directory / name for name in ("phased.mtz", "map.ccp4", "solve.json")]
    sigmas = None if data.sigF is None else data.sigF[found.rows]
    write_mtz(files[0], found, found.F, found.fom, data.F[found.rows], sigmas)
    inverse = directory / "phased_inverse.mtz"
    inverse.unlink(missing_ok=True)
    if found.hand.choice == "undecided":
        write_mtz(inverse, found, found.F_inverse, found.fom, data.F[found.rows], sigmas)
        files.insert(1, inverse)
    write_ccp4(
        directory / "map.ccp4",
        density(found.hkl, found.F * found.fom, found.cell, found.space_group, found.d_min),
        found.cell,
        found.space_group,
    )
    write_json(directory / "solve.json", {**found.to_json(), "files": [file.name for file in files]})
    return files


def write_modified(directory: str | os.PathLike, modified: Modified, data: ReflectionData) -> list[Path]:
    """Write modified.mtz, map.ccp4 and modify.json."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    files = [directory / name for name in ("modified.mtz", "map.ccp4", "modify.json")]
    sigmas = None if data.sigF is None else data.sigF[modified.rows]
    write_mtz(files[0], modified, modified.F, modified.fom, data.F[modified.rows], sigmas)
    write_ccp4(
        files[1],
        density(modified.hkl, modified.F * modified.fom, modified.cell, modified.space_group, modified.d_min),
        modified.cell,
        modified.space_group,
    )
    facts = {
        "R": modified.r,
        "scheme": modified.scheme,
        "solvent": modified.solvent,
        "mean_fom": float(modified.fom.mean()),
        "mean_phase_change": modified.change,
        "d_min": modified.d_min,
        "n_reflections": len(modified.hkl),
    }
    write_json(files[2], facts)
    return files


def write_mtz(
    path: Path, found: Solution | Modified, F: NDArray, fom: NDArray, observed: ArrayLike, sigmas: ArrayLike | None
) -> None:
    """Write FWT PHWT FOM FP SIGFP: `F` [N] with figures of merit [N], and the measured amplitudes [N]."""
    write_phases(
        path,
        found.hkl,
        F * fom,
        cell=found.cell,
        space_group=found.space_group,
        fom=fom,
        observed=np.abs(observed),
        sigF=sigmas,
    )


def write_json(path: Path, facts: dict[str, Any]) -> None:
    """Write facts with the program's version."""
    write_text(path, json.dumps({"xtalfast": xtalfast.__version__, **facts}, indent=1) + "\n")
