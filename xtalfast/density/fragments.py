"""Fragments of protein structures in tight P1 cells: the examples of the density paper, cut without CCP4 or pdbfixer.

Ref: RecCrysFormer paper, Appendix B (data generation) and C (ids).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import gemmi
import numpy as np
from numpy.typing import NDArray

from xtalfast.density.cells import MIN_CONTACT, draw_angles, random_rotation, tight_cell
from xtalfast.density.conformers import RESIDUE_ID, conformers, element_of
from xtalfast.density.store import Fragment
from xtalfast.errors import InputError
from xtalfast.io.structure import StructureFile

_MAX_PEPTIDE_BOND = 1.6  # A
_N, _C = 0, 2  # places of these atoms in every residue
_MIN_OCCUPANCY = 1e-3  # below it an atom is written but was not seen

# Reasons for rejection, as reported.
BREAK = "chain break inside"
NON_STANDARD = "non-standard residue"
INCOMPLETE = "missing atoms"
NO_CELL = "no cell without contacts"
UNREADABLE = "structure unreadable"
REPEATED_NAME = "structure of the same name seen before"
COPY = "copy of a chain already cut"
NO_PROTEIN = "no protein chain"


@dataclass(frozen=True)
class FragmentSettings:
    """How fragments are cut.

    Attributes:
        length: residues in a fragment.
        overlap: residues that consecutive fragments may share.
        min_contact: A between atoms of different copies.
        rotate: turn each fragment at random before its cell is made (else it stays as deposited).
        copies: cut every copy of an entity, not only the first.
        criteria: the paper's curation: X-ray, deposited after 1995, length >= 40, resolution <= 2.75 A, R-free <= .28.
        test_fraction: of the parent structures.
        seed: of angles and rotations; each fragment draws from (seed, id), whatever else is in the set.
    """

    length: int = 15
    overlap: int = 5
    min_contact: float = MIN_CONTACT
    rotate: bool = False
    copies: bool = False
    criteria: bool = False
    test_fraction: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.length <= 1000:
            raise InputError(f"length must be 1 to 1000 residues, got {self.length}")
        if not 0 <= self.overlap < self.length:
            raise InputError(f"overlap must be 0 to length - 1 = {self.length - 1} residues, got {self.overlap}")
        if not 0 < self.min_contact <= 20:
            raise InputError(f"min_contact must be above 0 and at most 20 A, got {self.min_contact:g}")
        if not 0 <= self.test_fraction <= 1:
            raise InputError(f"test_fraction must be 0 to 1, got {self.test_fraction:g}")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> FragmentSettings:
        """`paper` (15 residues, overlap 5) or `dipeptide` (2 residues, overlap 0), with changes."""
        presets = {"paper": cls(), "dipeptide": cls(length=2, overlap=0)}
        if name not in presets:
            raise InputError(f"preset must be one of {', '.join(presets)}, got {name!r}")
        return replace(presets[name], **changes)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Tally:
    """What became of the structures and of the windows looked at.

    Attributes:
        structures: files read.
        accepted: fragments made.
        rejected_structures, rejected_fragments: numbers by reason.
        absent: criteria of `FragmentSettings.criteria` that files do not state, by name; they pass.
        redrawn_angles: triples of cell angles that close no cell.
    """

    structures: int = 0
    accepted: int = 0
    rejected_structures: Counter[str] = field(default_factory=Counter)
    rejected_fragments: Counter[str] = field(default_factory=Counter)
    absent: Counter[str] = field(default_factory=Counter)
    redrawn_angles: int = 0

    def add(self, other: Tally) -> None:
        self.structures += other.structures
        self.accepted += other.accepted
        self.rejected_structures += other.rejected_structures
        self.rejected_fragments += other.rejected_fragments
        self.absent += other.absent
        self.redrawn_angles += other.redrawn_angles

    def as_dict(self) -> dict[str, Any]:
        return {name: dict(sorted(v.items())) if isinstance(v, Counter) else v for name, v in vars(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Tally:
        tally = cls()
        for name, value in values.items():
            setattr(tally, name, Counter(value) if isinstance(value, dict) else value)
        return tally


@dataclass(frozen=True)
class Residue:
    """One residue of a chain, or the reason why it cannot be used.

    Attributes:
        id: residue id; -1 if unusable.
        problem: "" or a reason for rejection.
        coords: heavy atoms in the order of `conformers()`, A, [n, 3].
        b_iso: A^2, [n].
        bonded: both it and the residue before are usable, and the peptide bond between them is whole.
    """

    id: int
    problem: str
    coords: NDArray[np.float64]
    b_iso: NDArray[np.float64]
    bonded: bool


_NOTHING = np.empty((0, 3)), np.empty(0)


def _read_residue(residue: gemmi.Residue) -> tuple[int, str, NDArray, NDArray]:
    """(id, problem, coords, b_iso) of the heavy atoms; MSE counts as MET, OXT is passed over."""
    selenium = residue.name == "MSE"
    number = RESIDUE_ID.get("MET" if selenium else residue.name, -1)
    if number < 0:
        return -1, NON_STANDARD, *_NOTHING
    found = {}
    for atom in residue:
        if atom.occ >= _MIN_OCCUPANCY:
            found["SD" if selenium and atom.name == "SE" else atom.name] = atom
    names = conformers()[number].atoms
    if any(name not in found for name in names):
        return -1, INCOMPLETE, *_NOTHING
    atoms = [found[name] for name in names]
    coords = np.array([atom.pos.tolist() for atom in atoms])
    if not np.isfinite(coords).all():
        return -1, INCOMPLETE, *_NOTHING
    return number, "", coords, np.array([atom.b_iso for atom in atoms])


def _residues(parts: list[gemmi.ResidueSpan]) -> list[Residue]:
    """Modelled residues of a chain; its parts are separated by TER."""
    residues = []
    for part in parts:
        carbon = None
        for residue in part.first_conformer():
            number, problem, coords, b_iso = _read_residue(residue)
            bonded = carbon is not None and not problem and np.linalg.norm(coords[_N] - carbon) <= _MAX_PEPTIDE_BOND
            residues.append(Residue(number, problem, coords, b_iso, bool(bonded)))
            carbon = None if problem else coords[_C]
    return residues


def protein_chains(
    structure: gemmi.Structure, tally: Tally, *, copies: bool = False
) -> Iterator[tuple[str, list[Residue]]]:
    """(entity, residues) of the protein chains of the first model; of equal chains the first only, unless `copies`.

    The entity is the number an mmCIF file gives; in PDB files different sequences are counted in order. With `copies`
    the chain's name follows (`1A`).
    """
    parts: dict[str, list[gemmi.ResidueSpan]] = {}
    for chain in structure[0]:
        polymer = chain.get_polymer()
        if len(polymer) and polymer.check_polymer_type() in (gemmi.PolymerType.PeptideL, gemmi.PolymerType.PeptideD):
            parts.setdefault(chain.name, []).append(polymer)
    entities: dict[str, str] = {}
    seen = set()
    for name, spans in parts.items():
        sequence = "-".join(residue.name for span in spans for residue in span.first_conformer())
        entity = spans[0][0].entity_id if structure.input_format == gemmi.CoorFormat.Mmcif else ""
        entity = entity or entities.setdefault(sequence, str(len(entities) + 1))
        if entity in seen and not copies:
            tally.rejected_structures[COPY] += 1
            continue
        seen.add(entity)
        yield f"{entity}{name}" if copies else entity, _residues(spans)
    if not parts:
        tally.rejected_structures[NO_PROTEIN] += 1


def windows(residues: list[Residue], length: int, overlap: int, tally: Tally) -> Iterator[int]:
    """Starts of runs of `length` sound, bonded residues; neighbours share at most `overlap`.

    A window with a defect is counted under the first one and the search goes on behind it, so that as many fragments
    as possible are found.
    """
    start = 0
    while start + length <= len(residues):
        for i in range(start, start + length):
            problem = residues[i].problem or (BREAK if i > start and not residues[i].bonded else "")
            if problem:
                tally.rejected_fragments[problem] += 1
                start = i + 1 if residues[i].problem else i
                break
        else:
            yield start
            start += length - overlap


def random_source(seed: int, name: str, *further: int) -> np.random.Generator:
    """Random numbers that belong to (seed, name, ...) alone."""
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "little"), *further])


def cut_structure(file: StructureFile, settings: FragmentSettings, tally: Tally) -> list[Fragment]:
    """All fragments of one structure, each in its cell; what is rejected is counted in `tally`.

    Raises:
        InputError: the file is not readable.
    """
    structure = file.parse()
    tally.structures += 1
    if settings.criteria:
        failed = failed_criterion(structure, tally)
        if failed:
            tally.rejected_structures[failed] += 1
            return []
    structure.remove_alternative_conformations()
    parent = file.parent(structure)
    fragments = []
    for entity, residues in protein_chains(structure, tally, copies=settings.copies):
        for start in windows(residues, settings.length, settings.overlap, tally):
            name = f"{file.name}_{entity}.pd_{start + 1}"
            fragment = place_fragment(name, parent, residues[start : start + settings.length], settings, tally)
            if fragment is not None:
                fragments.append(fragment)
    tally.accepted += len(fragments)
    return fragments


def place_fragment(
    name: str, parent: str, residues: list[Residue], settings: FragmentSettings, tally: Tally
) -> Fragment | None:
    """Put sound residues into a tight cell with angles drawn from (seed, name); None if no cell is found."""
    ids = np.array([residue.id for residue in residues], np.uint8)
    coords = np.concatenate([residue.coords for residue in residues])
    rng = random_source(settings.seed, name)
    angles, redrawn = draw_angles(rng)
    tally.redrawn_angles += redrawn
    if settings.rotate:
        coords = coords @ random_rotation(rng).T
    element = element_of(ids)
    placement = tight_cell(coords, element.astype(float), angles, min_contact=settings.min_contact)
    if placement is None:
        tally.rejected_fragments[NO_CELL] += 1
        return None
    b_iso = np.concatenate([residue.b_iso for residue in residues])
    return Fragment(
        name, parent, placement.coords.astype(np.float32), element, b_iso.astype(np.float32), ids, placement.cell
    )


def failed_criterion(structure: gemmi.Structure, tally: Tally) -> str:
    """Which of the paper's curation criteria a structure fails, "" if none; a value the file does not state passes.

    Values that are absent are counted in `tally.absent`, never guessed.
    """
    info = structure.info
    method = info["_exptl.method"].upper() if "_exptl.method" in info else ""
    date_key = "_pdbx_database_status.recvd_initial_deposition_date"
    date = info[date_key] if date_key in info else ""
    year = int(date[:4]) if date[:4].isdigit() else 0
    r_free = [r.r_free for r in structure.meta.refinement if np.isfinite(r.r_free) and r.r_free > 0]
    chains = [chain.get_polymer() for chain in structure[0]]
    lengths = [len(structure.get_entity_of(p).full_sequence) or len(p) for p in chains if len(p)]
    checks: list[tuple[str, bool, bool]] = [
        ("method", bool(method), "X-RAY" in method),
        ("deposition year", bool(year), year > 1995),
        ("resolution", structure.resolution > 0, structure.resolution <= 2.75),
        ("R-free", bool(r_free), bool(r_free) and min(r_free) <= 0.28),
        ("length", bool(lengths), bool(lengths) and max(lengths) >= 40),
    ]
    for name, stated, _ in checks:
        if not stated:
            tally.absent[name] += 1
    return next((f"paper criteria: {name}" for name, stated, passed in checks if stated and not passed), "")
