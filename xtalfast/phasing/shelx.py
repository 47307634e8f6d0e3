"""SHELXD and SHELXE, when they are on PATH, in place of our own search; their phases are judged and finished by ours.

SHELX is free for academic users but not ours to distribute: https://shelx.uni-goettingen.de
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import gemmi
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from xtalfast.errors import InputError
from xtalfast.phasing.data import Measured, measured
from xtalfast.phasing.search import SearchOptions, Trial, polish
from xtalfast.phasing.solve import FULL_RATE, HELD_OUT, Solution, conclude
from xtalfast.phasing.symmetry import centrings, expand_to_p1, operations

logger = logging.getLogger(__name__)

_NAME = "phasing"
_WAVELENGTH = 1.0
_LATT = {"P": 1, "I": 2, "R": 3, "F": 4, "A": 5, "B": 6, "C": 7}
_ELECTRONS = {"C": 6, "N": 7, "O": 8, "S": 16}
# An atom of protein takes about this much of the cell, hydrogens included, A^3.
_ATOM_VOLUME = 17.0
_DEFAULT_SOLVENT = 0.7
_E_CYCLES = 30


def _program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise InputError(
            f"engine shelx needs the program {name} on PATH (https://shelx.uni-goettingen.de); or use --engine xtalfast"
        )
    return path


def instructions(data: Measured, n_atoms: int, starts: int, seed: int) -> str:
    """The .ins file of SHELXD: cell, symmetry, content and how hard to try."""
    cell = " ".join(f"{x:.4f}" for x in data.cell.parameters)
    group = data.space_group
    lattice = _LATT[group.hm[0]] * (1 if group.is_centrosymmetric() else -1)
    symmetry = [f"SYMM {gemmi.Op(op.triplet()).triplet().upper()}" for op in group.operations().sym_ops[1:]]
    copies = len(operations(group)) * len(centrings(group))
    counts = [round(n_atoms * copies * part) for part in (0.63, 0.17, 0.2)]
    return "\n".join(
        [
            "TITL xtalfast",
            f"CELL {_WAVELENGTH} {cell}",
            f"ZERR {copies} 0 0 0 0 0 0",
            f"LATT {lattice}",
            *symmetry,
            "SFAC C N O",
            "UNIT " + " ".join(map(str, counts)),
            f"FIND {n_atoms}",
            "MIND 1.0 -0.1",
            f"NTRY {starts}",
            f"SEED {seed + 1}",
            "HKLF 3",
            "END",
            "",
        ]
    )


def hkl_file(data: Measured, sigmas: NDArray[np.float64]) -> str:
    """Amplitudes as HKLF 3: 3I4, 2F8.2, ended by a line of zeros."""
    factor = 9999.0 / max(data.F.max(), sigmas.max())
    rows = [
        f"{h:4d}{k:4d}{l:4d}{F * factor:8.2f}{max(s * factor, 0.01):8.2f}"
        for (h, k, l), F, s in zip(data.hkl.tolist(), data.F, sigmas)
    ]
    return "\n".join([*rows, f"{0:4d}{0:4d}{0:4d}{0:8.2f}{0:8.2f}", ""])


def read_res(text: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Atoms of a .res file: fractional coordinates [N, 3] and weights [N] (electrons times occupancy)."""
    elements: list[str] = []
    coords, weights = [], []
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["SFAC"]:
            elements = [w.upper() for w in words[1:]]
        elif words[:1] in (["HKLF"], ["END"]):
            break
        elif len(words) >= 6 and words[1].isdigit() and 1 <= int(words[1]) <= len(elements):
            try:
                x, y, z, occupancy = (float(w) for w in words[2:6])
            except ValueError:
                continue  # an instruction whose second word is a number
            coords.append([x, y, z])
            # 11.0 means an occupancy of 1 that is not refined.
            weights.append(
                _ELECTRONS.get(elements[int(words[1]) - 1], 6) * (occupancy - 10 if occupancy > 9 else occupancy)
            )
    if not coords:
        raise InputError("SHELXD wrote no atoms; give it more --starts or more time")
    return np.array(coords), np.array(weights)


def phi_file(data: Measured, F: NDArray[np.complex128]) -> str:
    """Starting phases for SHELXE (.phi): h k l F FOM phi."""
    return "".join(
        f"{h:4d}{k:4d}{l:4d}{amplitude:9.2f}{1.0:8.4f}{phase:8.1f}\n"
        for (h, k, l), amplitude, phase in zip(data.hkl.tolist(), data.F, np.degrees(np.angle(F)))
    )


def read_phs(text: str, hkl: NDArray[np.int64]) -> NDArray[np.complex128]:
    """Structure factors [N] of the indices `hkl` out of a .phs file: h k l F FOM phi sigF; 0 where there is none."""
    table = {}
    for line in text.splitlines():
        words = [line[0:4], line[4:8], line[8:12], *line[12:].split()]
        if len(words) >= 6:
            h, k, l = (int(w) for w in words[:3])
            F = float(words[3]) * float(words[4]) * np.exp(1j * np.radians(float(words[5])))
            table[h, k, l] = F
            table.setdefault((-h, -k, -l), F.conjugate())
    return np.array([table.get(tuple(h), 0j) for h in hkl.tolist()])


def _run(command: list[str], directory: Path, seconds: float, wanted: str) -> str:
    """Run a program in a directory and read the file it was to write; what it wrote by the time limit counts."""
    with (directory / "log").open("w") as log:
        try:
            subprocess.run(command, cwd=directory, stdout=log, stderr=subprocess.STDOUT, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            logger.info("%s stopped after %.0f s", Path(command[0]).name, seconds)
    if not (directory / wanted).is_file():
        last = (directory / "log").read_text(errors="replace").strip().splitlines()[-1:]
        raise InputError(f"{Path(command[0]).name} wrote no {wanted}: {''.join(last) or 'it said nothing'}")
    return (directory / wanted).read_text(errors="replace")


def solve_with_shelx(
    F: ArrayLike,
    hkl: ArrayLike,
    cell: gemmi.UnitCell | tuple[float, ...],
    spacegroup: gemmi.SpaceGroup | str = "P 1",
    d_min: float | None = None,
    *,
    sigF: ArrayLike | None = None,
    solvent: float | None = None,
    starts: int | None = None,
    max_seconds: float = 60.0,
    seed: int = 0,
) -> Solution:
    """Find atoms with SHELXD, improve their phases with SHELXE, judge and finish them as `solve` does its own.

    Args:
        F, hkl, cell, spacegroup, d_min, sigF: as for `solve`.
        solvent: fraction of the cell; 0.7 if not given.
        starts: NTRY of SHELXD; 100 if not given.
        max_seconds: for SHELXD; SHELXE gets as much again.
        seed: of SHELXD.

    Raises:
        InputError: a program that is not on PATH or wrote nothing, or data that cannot be used.
    """
    shelxd, shelxe = _program("shelxd"), _program("shelxe")
    data = measured(F, hkl, cell, spacegroup, d_min)
    sigmas = 0.01 * data.F + 0.01 * data.F.mean() if sigF is None else np.asarray(sigF, np.float64)[data.rows]
    fraction = _DEFAULT_SOLVENT if solvent is None else solvent
    volume = data.cell.volume / (len(operations(data.space_group)) * len(centrings(data.space_group)))
    tries = 100 if starts is None else starts
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="xtalfast-shelx-") as name:
        directory = Path(name)
        (directory / f"{_NAME}.hkl").write_text(hkl_file(data, sigmas))
        n_atoms = max(1, round(volume * (1 - fraction) / _ATOM_VOLUME))
        (directory / f"{_NAME}.ins").write_text(instructions(data, n_atoms, tries, seed))
        atoms, weights = read_res(_run([shelxd, _NAME], directory, max_seconds, f"{_NAME}.res"))
        found = sum(
            (np.exp(2j * np.pi * ((atoms @ rotation.T + translation) @ data.hkl.T)).T @ weights)
            for rotation, translation in operations(data.space_group)
        )
        (directory / f"{_NAME}.phi").write_text(phi_file(data, found))
        command = [shelxe, f"{_NAME}.phi", f"-s{fraction:.2f}", f"-m{_E_CYCLES}"]
        phases = read_phs(_run(command, directory, max_seconds, f"{_NAME}.phs"), data.hkl)
    options = SearchOptions(solvent=(fraction,))
    fine = data.amplitudes(data.grid(data.d_min, FULL_RATE), data.hold_out(HELD_OUT, seed))
    p1_hkl, expanded, _ = expand_to_p1(data.hkl, phases, data.space_group)
    spectrum, _ = fine.grid.scatter(p1_hkl, torch.from_numpy(expanded).to(torch.complex64))
    maps = fine.grid.to_map(torch.where(fine.bound, fine.impose(spectrum), 0))
    best: Trial = polish(fine, maps[None], torch.tensor([fraction]), options)[0]
    return conclude(
        data,
        best,
        fine,
        options,
        n_starts=tries,
        iterations=0,
        seconds=lambda: time.monotonic() - begin,
        history=[],
        parameters={
            "engine": "shelx",
            "starts": tries,
            "max_seconds": max_seconds,
            "seed": seed,
            "solvent_given": solvent,
        },
    )
