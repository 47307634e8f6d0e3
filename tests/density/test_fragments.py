"""Cutting: which residues, which windows, which names; every rejection counted under its reason."""

import gemmi
import numpy as np
import pytest

from xtalfast.density.cells import MIN_CONTACT, has_contact, orthogonalization
from xtalfast.density.conformers import conformers
from xtalfast.density.fragments import BREAK, COPY, INCOMPLETE, NON_STANDARD, FragmentSettings, Tally, cut_structure
from xtalfast.errors import InputError
from xtalfast.io.structure import StructureFile

LONG = "MKVLAADEGHWTRSIFNPQCYEALKRVTDAEGLWKHI"  # 37 residues


def cut(text, name="1abc", is_cif=False, **settings):
    tally = Tally()
    file = StructureFile(name, f"{name}.pdb", text.encode(), is_cif)
    return cut_structure(file, FragmentSettings(**settings), tally), tally


def sequences(fragments):
    return [fragment.sequence for fragment in fragments]


def test_windows_ids_and_geometry(build):
    """37 residues give windows at 1, 11 and 21; coordinates are a rigid motion of those in the file."""
    residues = build.peptide(LONG)
    fragments, tally = cut(build.pdb_text(residues), "4AZ3")
    assert [fragment.id for fragment in fragments] == ["4AZ3_1.pd_1", "4AZ3_1.pd_11", "4AZ3_1.pd_21"]
    assert sequences(fragments) == [LONG[0:15], LONG[10:25], LONG[20:35]]
    assert tally.accepted == 3 and not tally.rejected_fragments
    for fragment, start in zip(fragments, (0, 10, 20)):
        original = np.concatenate([coords for _, _, coords in residues[start : start + 15]])
        turn, shift = rigid(original, fragment.coords)
        assert np.linalg.det(turn) == pytest.approx(1)
        assert np.abs(original @ turn.T + shift - fragment.coords).max() < 2e-3  # three decimals in the file
        assert fragment.element.tolist() == [z for i in fragment.residue_ids for z in conformers()[i].element.tolist()]
        assert not has_contact(fragment.coords.astype(float), orthogonalization(fragment.cell), MIN_CONTACT - 1e-4)
        middle = orthogonalization(fragment.cell) @ np.full(3, 0.5)
        assert fragment.element @ fragment.coords / fragment.element.sum() == pytest.approx(middle, abs=1e-3)


def rigid(moving, fixed):
    fixed = np.asarray(fixed, float)
    u, _, vt = np.linalg.svd((moving - moving.mean(0)).T @ (fixed - fixed.mean(0)))
    turn = (u @ vt).T
    return turn, fixed.mean(0) - turn @ moving.mean(0)


def test_a_fragment_never_spans_a_break(build):
    """TER, or a peptide bond over 1.6 A without TER, ends a fragment; the search starts anew behind it."""
    residues = build.peptide(LONG)
    by_ter, tally = cut(build.pdb_text(residues[:20], residues[20:]))
    assert sequences(by_ter) == [LONG[:15], LONG[20:35]]
    assert [fragment.id for fragment in by_ter] == ["1abc_1.pd_1", "1abc_1.pd_21"]
    assert tally.rejected_fragments == {BREAK: 1}
    gap = residues[:20] + [(name, atoms, coords + np.array([0, 0, 1.0])) for name, atoms, coords in residues[20:]]
    by_distance, tally = cut(build.pdb_text(gap))
    assert sequences(by_distance) == sequences(by_ter) and tally.rejected_fragments == {BREAK: 1}


def test_unusable_residues_are_cut_around(build):
    residues = build.peptide(LONG)
    name, atoms, coords = residues[16]
    for bad, reason in (
        (("TPO", atoms, coords), NON_STANDARD),
        ((name, atoms[:-1], coords[:-1]), INCOMPLETE),
        ((name, atoms, np.full_like(coords, np.nan)), INCOMPLETE),
    ):
        found, tally = cut(build.pdb_text([*residues[:16], bad, *residues[17:]]))
        assert sequences(found) == [LONG[:15], LONG[17:32]], reason
        assert tally.rejected_fragments == {reason: 1}


def test_atoms_with_no_occupancy_were_not_seen(build):
    lines = build.pdb_lines(build.peptide(LONG[:15]))
    lines[40] = lines[40][:54] + "  0.00" + lines[40][60:]
    found, tally = cut("\n".join(lines))
    assert not found and tally.rejected_fragments == {INCOMPLETE: 1}


def test_what_does_not_count(build):
    """Selenomethionine is methionine; hydrogens, OXT, second conformations, water and ligands are passed over."""
    residues = build.peptide(LONG[:15])
    plain, _ = cut(build.pdb_text(residues))
    _, atoms, coords = residues[0]
    selenium = ("MSE", tuple("SE" if atom == "SD" else atom for atom in atoms), coords)
    lines = build.pdb_lines([selenium, *residues[1:]])
    extra = lines[-1][:12] + " OXT" + lines[-1][16:30] + "  99.000" + lines[-1][38:76] + " O"
    hydrogen = lines[30][:12] + " HA " + lines[30][16:76] + " H"
    second = lines[31][:16] + "B" + lines[31][17:30] + "  99.000" + lines[31][38:]
    lines[31] = lines[31][:16] + "A" + lines[31][17:]
    water = "HETATM  999  O   HOH A 201      50.000  50.000  50.000  1.00 20.00           O"
    found, tally = cut("\n".join([*lines[:31], hydrogen, lines[31], second, *lines[32:], extra, "TER", water]))
    assert sequences(found) == [LONG[:15]] and not tally.rejected_fragments
    assert found[0].coords == pytest.approx(plain[0].coords)
    assert (found[0].element == plain[0].element).all()


def test_copies_of_a_chain_are_cut_once(build):
    residues = build.peptide(LONG[:15])
    other = build.peptide(LONG[10:25])
    shifted = [(name, atoms, coords + 40) for name, atoms, coords in residues]
    text = "".join(
        build.pdb_text(part, chain=chain).replace("END\n", "")
        for chain, part in (("A", residues), ("B", shifted), ("C", other))
    )
    once, tally = cut(text)
    assert [fragment.id for fragment in once] == ["1abc_1.pd_1", "1abc_2.pd_1"]
    assert tally.rejected_structures == {COPY: 1}
    both, _ = cut(text, copies=True)
    assert [fragment.id for fragment in both] == ["1abc_1A.pd_1", "1abc_1B.pd_1", "1abc_2C.pd_1"]


def test_mmcif_gives_the_same_fragments(build):
    text = build.pdb_text(build.peptide(LONG))
    structure = gemmi.read_pdb_string(text)
    structure.setup_entities()
    structure.assign_label_seq_id()
    cif = structure.make_mmcif_document().as_string()
    assert [vars_of(f) for f in cut(cif, is_cif=True)[0]] == [vars_of(f) for f in cut(text)[0]]


def vars_of(fragment):
    return fragment.id.split(".pd_")[1], fragment.sequence, fragment.coords.shape


def test_random_draws_belong_to_the_fragment(build):
    """The same fragment gets the same cell whatever else is in the file; another seed, another cell."""
    residues = build.peptide(LONG)
    whole, _ = cut(build.pdb_text(residues), rotate=True)
    alone, _ = cut(build.pdb_text(residues[:15]), rotate=True)
    assert (whole[0].cell == alone[0].cell).all() and (whole[0].coords == alone[0].coords).all()
    reseeded, _ = cut(build.pdb_text(residues), rotate=True, seed=1)
    assert not np.allclose(whole[0].cell, reseeded[0].cell)


def test_dipeptides(build):
    settings = FragmentSettings.preset("dipeptide")
    tally = Tally()
    file = StructureFile("1abc", "1abc.pdb", build.pdb_text(build.peptide(LONG[:7])).encode(), False)
    found = cut_structure(file, settings, tally)
    assert sequences(found) == [LONG[0:2], LONG[2:4], LONG[4:6]]
    with pytest.raises(InputError, match="preset must be one of paper, dipeptide"):
        FragmentSettings.preset("tripeptide")


HEADER = """\
HEADER    HYDROLASE                               {date}   4AZ3
EXPDTA    {method}
REMARK   2
REMARK   2 RESOLUTION.    {resolution} ANGSTROMS.
REMARK   3
REMARK   3 REFINEMENT.
REMARK   3   PROGRAM     : REFMAC 5.6
REMARK   3  DATA USED IN REFINEMENT.
REMARK   3   RESOLUTION RANGE HIGH (ANGSTROMS) : {resolution}
REMARK   3  FIT TO DATA USED IN REFINEMENT.
REMARK   3   FREE R VALUE                     : {r_free}
"""
GOOD = {"date": "20-JUN-12", "method": "X-RAY DIFFRACTION", "resolution": "2.04", "r_free": "0.214"}


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ({}, None),
        ({"date": "20-JUN-95"}, "deposition year"),
        ({"method": "SOLUTION NMR"}, "method"),
        ({"resolution": "2.80"}, "resolution"),
        ({"r_free": "0.290"}, "R-free"),
    ],
)
def test_the_papers_criteria(build, change, failed):
    text = HEADER.format(**GOOD | change) + build.pdb_text(build.peptide(LONG + "AGA"))
    found, tally = cut(text, criteria=True)
    assert tally.rejected_structures == ({f"paper criteria: {failed}": 1} if failed else {})
    assert bool(found) == (failed is None) and not tally.absent


def test_criteria_that_a_file_does_not_state_are_counted(build):
    found, tally = cut(build.pdb_text(build.peptide(LONG + "AGA")), criteria=True)
    assert found and tally.absent == {"method": 1, "deposition year": 1, "resolution": 1, "R-free": 1}
    short, tally = cut(build.pdb_text(build.peptide(LONG)), criteria=True)
    assert not short and tally.rejected_structures == {"paper criteria: length": 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "length"),
        ({"overlap": 15}, "overlap"),
        ({"min_contact": 0}, "min_contact"),
        ({"test_fraction": 2}, "test_fraction"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(InputError, match=message):
        FragmentSettings(**settings)
