"""Small crystals made from nothing: blobs of atoms as dense as protein, and structure factors by direct summation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import gemmi
import numpy as np
import pytest
from numpy.typing import NDArray

from xtalfast.density.cells import tight_cell
from xtalfast.density.conformers import RESIDUES


@dataclass
class Crystal:
    """Atoms of the asymmetric unit and all reflections to d_min."""

    cell: gemmi.UnitCell
    space_group: gemmi.SpaceGroup
    hkl: NDArray[np.int64]
    F: NDArray[np.complex128]
    coords: NDArray[np.float64]

    def structure_factors(self, hkl: NDArray) -> NDArray[np.complex128]:
        """F(h) = sum f exp(2 pi i h.x) over atoms and operations, one by one."""
        s2 = self.cell.calculate_1_d2_array(np.ascontiguousarray(hkl, np.int32))
        total = np.zeros(len(hkl), complex)
        for op in self.space_group.operations():
            rotation, translation = np.array(op.rot) / op.DEN, np.array(op.tran) / op.DEN
            mates = self.coords @ rotation.T + translation
            total += np.exp(2j * np.pi * (hkl @ mates.T)).sum(1)
        return 6.5 * total * np.exp(-28.0 / 4 * s2)


def blob(n_atoms: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Coordinates (A) of atoms at least 1.4 A apart in an ellipsoid, as dense as protein; hydrogens not counted."""
    axes = np.array([1.35, 1.0, 0.75]) * (3 * n_atoms * 17.0 / (4 * np.pi)) ** (1 / 3)
    atoms = [np.zeros(3)]
    while len(atoms) < n_atoms:
        trial = axes * rng.uniform(-1, 1, 3)
        if ((trial / axes) ** 2).sum() < 1 and min(np.linalg.norm(trial - atom) for atom in atoms) > 1.4:
            atoms.append(trial)
    return np.array(atoms)


@pytest.fixture
def make_crystal() -> Callable[..., Crystal]:
    """`make_crystal(seed, space_group, cell, d_min, ...)`: a blob of n_atoms unless coords are given, a loose cell."""

    def make(
        seed: int = 0,
        space_group: str = "P 1",
        cell: tuple[float, ...] | None = None,
        d_min: float = 2.0,
        n_atoms: int = 80,
        solvent: float = 0.72,
        coords: NDArray | None = None,
        centre: tuple[float, float, float] | None = None,
    ) -> Crystal:
        rng = np.random.default_rng(seed)
        group = gemmi.SpaceGroup(space_group)
        atoms = blob(n_atoms, rng) if coords is None else coords
        if cell is None:
            edges = np.ptp(atoms, axis=0) + 2
            angles = rng.choice([90, 100, 110], 3)
            volume = len(atoms) * 17.0 / (1 - solvent)
            edges *= (volume / gemmi.UnitCell(*edges, *angles).volume) ** (1 / 3)
            cell = (*edges, *angles)
        unit_cell = gemmi.UnitCell(*cell)
        fractional = atoms @ np.array(unit_cell.frac.mat.tolist()).T + (rng.random(3) if centre is None else centre)
        hkl = np.array(gemmi.make_miller_array(unit_cell, group, d_min), np.int64)
        hkl = hkl[~group.operations().systematic_absences(hkl.astype(np.int32))]
        crystal = Crystal(unit_cell, group, hkl, np.zeros(len(hkl), complex), fractional)
        crystal.F = crystal.structure_factors(hkl)
        return crystal

    return make


@pytest.fixture
def make_fragment() -> Callable[..., Crystal]:
    """`make_fragment(seed, d_min)`: 15 residues of a random sequence and fold in a tight P1 cell, B = 20."""
    spec = spec_from_file_location("peptides", Path(__file__).parents[1] / "density" / "conftest.py")
    assert spec is not None and spec.loader is not None
    peptides = module_from_spec(spec)
    spec.loader.exec_module(peptides)
    folds = ((-57, -47), (-120, 130), (-75, 145), (-65, -40), (-49, -26))
    letters = "".join(gemmi.find_tabulated_residue(name).one_letter_code.upper() for name in RESIDUES)

    def make(seed: int, d_min: float = 2.0) -> Crystal:
        rng = np.random.default_rng(seed)
        residues = peptides.peptide("".join(rng.choice(list(letters), 15)), *folds[seed % len(folds)])
        coords = np.concatenate([part[2] for part in residues])
        elements = [gemmi.Element(name[0]) for part in residues for name in part[1]]
        placed = tight_cell(coords, np.array([e.weight for e in elements]), rng.choice([90.0, 100.0, 110.0], 3))
        cell = gemmi.UnitCell(*placed.cell)
        group = gemmi.SpaceGroup("P 1")
        hkl = np.array(gemmi.make_miller_array(cell, group, d_min), np.int64)
        s2 = cell.calculate_1_d2_array(hkl.astype(np.int32))
        fractional = placed.coords @ np.array(cell.frac.mat.tolist()).T
        F = np.zeros(len(hkl), complex)
        for element, position in zip(elements, fractional):
            form_factor = np.array([element.it92.calculate_sf(s / 4) for s in s2])
            F += form_factor * np.exp(2j * np.pi * (hkl @ position))
        return Crystal(cell, group, hkl, F * np.exp(-20.0 / 4 * s2), fractional)

    return make
