"""Structures in: PDB and mmCIF through gemmi, one by one or from directories and tar archives, plain or compressed."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import gemmi
import numpy as np
from numpy.typing import NDArray

from xtalfast.errors import InputError

Array = NDArray[np.float64]

_SUFFIXES = (".pdb", ".ent", ".cif", ".mmcif")
_DECOMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
}
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
# A PDB code as a word of its own: 1A2K, pdb1ejg; at least one letter, so that years and counters are none.
_PDB_CODE = re.compile(r"(?:^|[^A-Za-z0-9])(?:pdb)?([1-9](?=[0-9]*[A-Za-z])[A-Za-z0-9]{3})(?![A-Za-z0-9])", re.I)


@dataclass
class Atoms:
    """Atoms in a crystal, as arrays.

    Attributes:
        coords: Cartesian, A, [M, 3]; a along x, b in the x-y plane.
        element: atomic numbers [M], int64.
        b_iso: A^2, [M]; of anisotropic atoms the equivalent isotropic B.
        occupancy: [M].
        cell: unit cell.
        space_group: P 1 when the file names none.
    """

    coords: Array
    element: NDArray[np.int64]
    b_iso: Array
    occupancy: Array
    cell: gemmi.UnitCell
    space_group: gemmi.SpaceGroup

    def __len__(self) -> int:
        return len(self.element)

    def expand_to_p1(self) -> Atoms:
        """All atoms of the cell: each operation of the space group applied, nothing merged on special positions."""
        orth, frac = (np.array(m.mat.tolist()) for m in (self.cell.orth, self.cell.frac))
        x = self.coords @ frac.T
        images = []
        for op in self.space_group.operations():
            rotation, translation = np.array(op.rot) / op.DEN, np.array(op.tran) / op.DEN
            images.append((x @ rotation.T + translation) @ orth.T)
        n = len(images)
        return Atoms(
            np.concatenate(images),
            np.tile(self.element, n),
            np.tile(self.b_iso, n),
            np.tile(self.occupancy, n),
            self.cell,
            gemmi.SpaceGroup("P 1"),
        )


@dataclass(frozen=True)
class StructureFile:
    """The bytes of one structure file, wherever they came from.

    Attributes:
        name: file name without directory and suffixes; a PDB code is written in capitals (`pdb4az3.ent.gz` -> `4AZ3`).
        path: where it is, for messages (`archive.tar.xz/member.pdb`).
        data: its bytes, decompressed.
        is_cif: mmCIF, else PDB format.
    """

    name: str
    path: str
    data: bytes
    is_cif: bool

    @property
    def checksum(self) -> int:
        return zlib.crc32(self.data)

    def parse(self) -> gemmi.Structure:
        """The first model of the file, with entities; a PDB chain is split at every TER.

        Raises:
            InputError: not a structure file, or no atoms in it.
        """
        try:
            if self.is_cif:
                structure = gemmi.make_structure_from_block(gemmi.cif.read_string(self.data)[0])
            else:
                structure = gemmi.read_pdb_string(self.data, split_chain_on_ter=True)
        except (RuntimeError, ValueError, IndexError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"{self.path} is no readable {'mmCIF' if self.is_cif else 'PDB'} file ({reason})"
            ) from error
        if len(structure) == 0 or structure[0].count_atom_sites() == 0:
            raise InputError(f"{self.path} holds no atoms")
        structure.setup_entities()
        return structure

    def parent(self, structure: gemmi.Structure) -> str:
        """The PDB entry this comes from, else the file's own name: what must not be spread over two splits.

        It is the entry id inside the file, else a PDB code standing in the file's name as a word of its own
        (`BM5_1A2K_l_u_B` -> `1A2K`), so that chains of one entry in several files stay together.
        """
        entry = structure.info["_entry.id"].strip() if "_entry.id" in structure.info else ""
        if re.fullmatch(r"[1-9][A-Za-z0-9]{3}|pdb_[A-Za-z0-9]{8}", entry):
            return entry.upper()
        code = _PDB_CODE.search(self.name)
        return code.group(1).upper() if code else self.name


def _stem_and_kind(filename: str) -> tuple[str, str, str] | None:
    """(name, structure suffix, compression suffix) of a structure file; None for any other."""
    stem, suffix = os.path.splitext(filename)
    compression = ""
    if suffix.lower() in _DECOMPRESS:
        compression = suffix.lower()
        stem, suffix = os.path.splitext(stem)
    if suffix.lower() not in _SUFFIXES or not stem or stem.startswith("."):
        return None
    code = re.fullmatch(r"(?:pdb)?([1-9][A-Za-z0-9]{3})", stem, re.I)
    return (code.group(1).upper() if code else stem), suffix.lower(), compression


def _file(path: str, data: bytes) -> StructureFile:
    kind = _stem_and_kind(os.path.basename(path))
    assert kind is not None  # the caller chose files by name
    name, suffix, compression = kind
    if compression:
        try:
            data = _DECOMPRESS[compression](data)
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise InputError(f"{path} cannot be decompressed ({error}); fetch it again") from error
    return StructureFile(name, path, data, suffix in (".cif", ".mmcif"))


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def _members(archive: Path) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isfile() and _stem_and_kind(os.path.basename(member.name)) is not None:
                    yield tar, member
    except (tarfile.TarError, OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise InputError(f"{archive} is no readable tar archive ({error})") from error


def _sources(inputs: Sequence[str | os.PathLike]) -> list[Path]:
    """Structure files and archives named by `inputs`, directories searched, in an order that never changes."""
    found: list[Path] = []
    for path in map(Path, inputs):
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.is_file() and (_is_archive(p) or _stem_and_kind(p.name)))
        elif not path.exists():
            raise InputError(f"no such file or directory: {path}")
        elif _is_archive(path) or _stem_and_kind(path.name) is not None:
            found.append(path)
        else:
            kinds = f"{' '.join(_SUFFIXES)} (also {' '.join(_DECOMPRESS)}) or {' '.join(_ARCHIVES)}"
            raise InputError(f"{path}: wanted a structure file {kinds}")
    return found


def _is_archive(path: Path) -> bool:
    return path.name.lower().endswith(_ARCHIVES)


def count_structures(inputs: Sequence[str | os.PathLike]) -> int:
    """How many files `iter_structures` will yield.

    Raises:
        InputError: as `iter_structures`.
    """
    return sum(sum(1 for _ in _members(path)) if _is_archive(path) else 1 for path in _sources(inputs))


def iter_structures(inputs: Sequence[str | os.PathLike]) -> Iterator[StructureFile]:
    """The PDB and mmCIF files among `inputs`: files, directories (searched with their tar archives), tar archives.

    Directories are walked in alphabetical order, archives in their own; other files in them are passed over.

    Raises:
        InputError: a path that does not exist or is neither, a damaged archive or compressed file.
    """
    for path in _sources(inputs):
        if not _is_archive(path):
            yield _file(str(path), _read_bytes(path))
            continue
        for tar, member in _members(path):
            stream = tar.extractfile(member)
            assert stream is not None  # isfile()
            yield _file(f"{path}/{member.name}", stream.read())


def read_atoms(path: str | os.PathLike, *, hydrogens: bool = True) -> Atoms:
    """All atoms of the first model of a PDB or mmCIF file, alternative conformations with their occupancies.

    Args:
        path: .pdb, .ent, .cif or .mmcif, plain or .gz, .bz2, .xz.
        hydrogens: keep them.

    Raises:
        InputError: not a structure file, no atoms, no or an impossible cell, an unknown element, coordinates that are
            not finite.
    """
    path = Path(path)
    if _is_archive(path) or _stem_and_kind(path.name) is None:
        raise InputError(f"{path}: wanted one structure file ({' '.join(_SUFFIXES)}), plain or compressed")
    structure = _file(str(path), _read_bytes(path)).parse()
    cell = structure.cell
    if not cell.is_crystal():
        raise InputError(f"{path} has no unit cell (CRYST1 or _cell); structure factors need one")
    check_cell(cell, str(path))
    group = structure.find_spacegroup()
    if group is None:
        if structure.spacegroup_hm:
            raise InputError(f"{path}: space group {structure.spacegroup_hm!r} is in no table")
        group = gemmi.SpaceGroup("P 1")
    if not cell.is_compatible_with_spacegroup(group):
        raise InputError(f"{path}: cell {cell.parameters} does not fit space group {group.xhm()}")
    atoms = [site.atom for site in structure[0].all() if hydrogens or not site.atom.is_hydrogen()]
    if not atoms:
        raise InputError(f"{path} holds no atoms other than hydrogens")
    unknown = sorted({atom.name for atom in atoms if atom.element.atomic_number == 0})
    if unknown:
        raise InputError(f"{path}: atoms of unknown element: {', '.join(unknown[:5])}; fill in the element column")
    coords = np.array([atom.pos.tolist() for atom in atoms])
    if not np.isfinite(coords).all():
        raise InputError(f"{path}: coordinates that are not finite numbers")
    return Atoms(
        coords,
        np.array([atom.element.atomic_number for atom in atoms]),
        np.array([atom.b_eq() if atom.aniso.nonzero() else atom.b_iso for atom in atoms]),
        np.array([atom.occ for atom in atoms]),
        cell,
        group,
    )


def check_cell(cell: gemmi.UnitCell, where: str) -> None:
    """Raise InputError unless the cell has positive edges and a volume."""
    lengths, angles = cell.parameters[:3], np.radians(cell.parameters[3:])
    c = np.cos(angles)
    squared = 1 - (c**2).sum() + 2 * c.prod()
    if not (np.isfinite(cell.parameters).all() and min(lengths) > 0 and (angles > 0).all() and squared > 1e-6):
        raise InputError(
            f"{where}: cell {' '.join(f'{p:g}' for p in cell.parameters)} encloses no volume; "
            "wanted positive edges (A) and angles (deg) that can meet"
        )
