"""Small proteins made from ideal geometry."""

from __future__ import annotations

import numpy as np
import pytest

from xtalfast.cli import main
from xtalfast.density.conformers import RESIDUES, conformers, ids_from_sequence
from xtalfast.density.fragment_set import make_fragments
from xtalfast.density.fragments import FragmentSettings

BOND = {"N-CA": 1.458, "CA-C": 1.525, "C-N": 1.329}
ANGLE = {"N-CA-C": 111.0, "CA-C-N": 117.2, "C-N-CA": 121.7}


def place(a, b, c, distance, angle_deg, torsion_deg):
    """The point `distance` from c with the given angle b-c-point and torsion a-b-c-point."""
    angle, torsion = np.radians(angle_deg), np.radians(torsion_deg)
    bc = (c - b) / np.linalg.norm(c - b)
    n = np.cross(b - a, bc)
    n /= np.linalg.norm(n)
    frame = np.stack([bc, np.cross(n, bc), n], axis=1)
    return c + frame @ (
        distance * np.array([-np.cos(angle), np.sin(angle) * np.cos(torsion), np.sin(angle) * np.sin(torsion)])
    )


def superpose(moving, fixed):
    """Rotation and translation that bring `moving` [n, 3] onto `fixed` [n, 3]."""
    u, _, vt = np.linalg.svd((moving - moving.mean(0)).T @ (fixed - fixed.mean(0)))
    turn = (u @ np.diag([1, 1, np.linalg.det(u @ vt)]) @ vt).T
    return turn, fixed.mean(0) - turn @ moving.mean(0)


def peptide(sequence, phi=-57.0, psi=-47.0):
    """[(residue name, atom names, coords)] of a helix (or another fold) with the package's own conformers."""
    n, ca = np.zeros(3), np.array([BOND["N-CA"], 0, 0])
    c = place(np.array([0.0, 1.0, 0.0]), n, ca, BOND["CA-C"], ANGLE["N-CA-C"], 60.0)
    residues = []
    for i in ids_from_sequence(sequence):
        conformer = conformers()[i]
        turn, shift = superpose(conformer.coords[:3], np.stack([n, ca, c]))
        coords = conformer.coords @ turn.T + shift
        coords[:3] = n, ca, c
        next_n = place(n, ca, c, BOND["C-N"], ANGLE["CA-C-N"], psi)
        next_ca = place(ca, c, next_n, BOND["N-CA"], ANGLE["C-N-CA"], 180.0)
        coords[3] = place(ca, next_n, c, 1.231, 123.0, 180.0)
        residues.append((conformer.name, conformer.atoms, coords))
        n, ca, c = next_n, next_ca, place(c, next_n, next_ca, BOND["CA-C"], ANGLE["N-CA-C"], phi)
    return residues


def pdb_lines(residues, chain="A", first=1, b=20.0):
    """ATOM records."""
    lines = []
    for number, (name, atoms, coords) in enumerate(residues, first):
        for atom, (x, y, z) in zip(atoms, coords):
            element = "SE" if name == "MSE" and atom == "SE" else atom[0]
            label = f"{atom:<4}" if len(element) == 2 else f" {atom:<3}"
            record = "HETATM" if name not in RESIDUES else "ATOM  "
            lines.append(
                f"{record}{len(lines) % 99999 + 1:5d} {label} {name:>3} {chain}{number:4d}    "
                f"{x:8.3f}{y:8.3f}{z:8.3f}{1:6.2f}{b:6.2f}          {element:>2}"
            )
    return lines


def pdb_text(*parts, chain="A"):
    """A PDB file of one chain; its parts are separated by TER."""
    lines = []
    first = 1
    for part in parts:
        lines += [*pdb_lines(part, chain, first), "TER"]
        first += len(part) + 1
    return "\n".join([*lines, "END", ""])


@pytest.fixture(scope="session")
def build():
    """The functions of this file."""

    class Build:
        peptide = staticmethod(peptide)
        pdb_lines = staticmethod(pdb_lines)
        pdb_text = staticmethod(pdb_text)

    return Build


SEQUENCE = "MKVLAADEGHWTRSIFNPQCYEALKRVTDAEGLWKHI"


@pytest.fixture(scope="session")
def structures(tmp_path_factory):
    """A directory of eight small structures, 37 residues each, all different."""
    folder = tmp_path_factory.mktemp("structures")
    rng = np.random.default_rng(5)
    for i in range(8):
        sequence = "".join(rng.permutation(list(SEQUENCE)))
        torsions = [(-57, -47), (-120, 130), (-75, 145), (-65, -40)][i % 4]
        (folder / f"{i + 1}xa{i}.pdb").write_text(pdb_text(peptide(sequence, *torsions)))
    return folder


@pytest.fixture(scope="session")
def dipeptides(structures, tmp_path_factory):
    """A set of dipeptides of the eight structures, both splits filled."""
    settings = FragmentSettings.preset("dipeptide", test_fraction=0.3)
    return make_fragments([structures], tmp_path_factory.mktemp("dipeptides"), settings)


@pytest.fixture(scope="session")
def weights(dipeptides, tmp_path_factory):
    """Checkpoint of a tiny network after two steps."""
    run = tmp_path_factory.mktemp("weights")
    small = ("dim=8", "depth=1", "heads=2", "dim_head=4", "ff_dim=16", "batch=4", "max_validation=4")
    changes = [text for change in small for text in ("--set", change)]
    command = ["train", "density", str(dipeptides.path), "-o", str(run), "--preset", "dipeptide-small", "--quiet"]
    assert main([*command, "--steps", "2", "--device", "cpu", *changes]) == 0
    return run / "best.ckpt"
