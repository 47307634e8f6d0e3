"""The 20 residues: complete, left-handed, with the bond lengths chemistry gives them."""

import gemmi
import numpy as np
import pytest

from xtalfast.density.conformers import (
    RESIDUE_ID,
    RESIDUES,
    conformers,
    element_of,
    ids_from_sequence,
    mass_of,
    sequence_of,
)
from xtalfast.errors import InputError


def test_every_residue_has_the_heavy_atoms_of_its_formula():
    """gemmi's tabulated masses (free amino acids with hydrogens) leave exactly these heavy atoms, one oxygen lost."""
    weights = {number: gemmi.Element(number).weight for number in (1, 6, 7, 8, 16)}
    for conformer in conformers():
        tabulated = gemmi.find_tabulated_residue(conformer.name)
        heavy = sum(weights[z] for z in conformer.element.tolist()) + weights[8]  # OXT
        hydrogens = (tabulated.weight - heavy) / weights[1]
        assert hydrogens == pytest.approx(tabulated.hydrogen_count, abs=1.2)  # charged forms differ by a proton
        assert conformer.atoms[:4] == ("N", "CA", "C", "O")
        assert len(set(conformer.atoms)) == len(conformer.atoms) == len(conformer.coords) == len(conformer.element)


def test_residues_are_l_amino_acids():
    """Seen from hydrogen, CO, R, N run clockwise: the triple product of N, C and CB about CA is positive."""
    for conformer in conformers():
        if conformer.name == "GLY":
            continue
        at = dict(zip(conformer.atoms, conformer.coords))
        n, c, cb = (at[name] - at["CA"] for name in ("N", "C", "CB"))
        assert np.dot(np.cross(n, c), cb) > 0, conformer.name


def test_bond_lengths():
    for conformer in conformers():
        distance = np.linalg.norm(conformer.coords[:, None] - conformer.coords[None], axis=-1)
        np.fill_diagonal(distance, np.inf)
        nearest = distance.min(axis=1)
        assert (nearest > 1.15).all() and (nearest < 1.85).all(), conformer.name


def test_sequences_and_ids():
    ids = ids_from_sequence("acdefghiklmnpqrstvwy")
    assert sequence_of(ids) == "ACDEFGHIKLMNPQRSTVWY"
    assert [RESIDUES[i] for i in ids_from_sequence("WKM")] == ["TRP", "LYS", "MET"]
    assert [gemmi.find_tabulated_residue(name).one_letter_code for name in RESIDUES] == list(sequence_of(range(20)))
    assert RESIDUE_ID["VAL"] == 19
    with pytest.raises(InputError, match=r"got B, X"):
        ids_from_sequence("AXB")


def test_mass_and_composition_of_a_peptide():
    """Glycylglycine is C4 H8 N2 O3, 132.12 Da; its stored atoms lack hydrogens and the terminal oxygen."""
    assert mass_of(ids_from_sequence("GG")) == pytest.approx(132.12, abs=0.02)
    assert sorted(element_of(ids_from_sequence("GG")).tolist()) == [6, 6, 6, 6, 7, 7, 8, 8]
    assert len(element_of([])) == 0 and mass_of([]) == 0
