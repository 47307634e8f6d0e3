"""The 20 standard residues: names, ids, atoms in a fixed order, and one conformer each.

A residue is known everywhere by its id, its place in `RESIDUES`. The conformers are the ideal coordinates of the wwPDB
Chemical Component Dictionary (CC0; `tools/make_conformers.py`), without hydrogens and OXT.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import gemmi
import numpy as np
from numpy.typing import ArrayLike, NDArray

from xtalfast.errors import InputError

RESIDUES = (
    *("ALA", "ARG", "ASN", "ASP", "CYS", "GLN", "GLU", "GLY", "HIS", "ILE"),
    *("LEU", "LYS", "MET", "PHE", "PRO", "SER", "THR", "TRP", "TYR", "VAL"),
)
RESIDUE_ID = {name: i for i, name in enumerate(RESIDUES)}
_LETTERS = "ARNDCQEGHILKMFPSTWYV"
_WATER = 18.015  # Da, lost with each peptide bond


@dataclass(frozen=True)
class Conformer:
    """One residue: its heavy atoms in the order in which every fragment stores them.

    Attributes:
        name: three letters.
        atoms: atom names [n], PDB nomenclature.
        element: atomic numbers [n], uint8.
        coords: A, [n, 3], float64.
        mass: of the free amino acid with its hydrogens, Da.
    """

    name: str
    atoms: tuple[str, ...]
    element: NDArray[np.uint8]
    coords: NDArray[np.float64]
    mass: float


@cache
def conformers() -> tuple[Conformer, ...]:
    """The 20 residues, numbered by residue id."""
    table = json.loads(files("xtalfast.density").joinpath("conformers.json").read_text(encoding="utf-8"))
    return tuple(
        Conformer(
            name,
            tuple(table[name]["atoms"]),
            np.array([gemmi.Element(symbol).atomic_number for symbol in table[name]["elements"]], np.uint8),
            np.array(table[name]["coords"]),
            gemmi.find_tabulated_residue(name).weight,
        )
        for name in RESIDUES
    )


def element_of(residue_ids: ArrayLike) -> NDArray[np.uint8]:
    """Atomic numbers of the heavy atoms of a chain of residues, in storage order."""
    table = conformers()
    return np.concatenate([np.empty(0, np.uint8), *(table[i].element for i in np.asarray(residue_ids).tolist())])


def mass_of(residue_ids: ArrayLike) -> float:
    """Mass of the peptide of these residues, hydrogens and both ends included, Da."""
    ids = np.asarray(residue_ids).tolist()
    return sum(conformers()[i].mass for i in ids) - _WATER * max(len(ids) - 1, 0)


def ids_from_sequence(sequence: str) -> NDArray[np.uint8]:
    """Residue ids of a one-letter sequence such as "ACDEF".

    Raises:
        InputError: a letter that is none of the 20 standard residues.
    """
    unknown = sorted(set(sequence.upper()) - set(_LETTERS))
    if unknown:
        raise InputError(f"sequence wants letters out of {_LETTERS}, got {', '.join(unknown)}")
    return np.array([_LETTERS.index(letter) for letter in sequence.upper()], np.uint8)


def sequence_of(residue_ids: ArrayLike) -> str:
    """One-letter sequence of residue ids."""
    return "".join(_LETTERS[i] for i in np.asarray(residue_ids).tolist())
