"""`FragmentStore`: the fragments of one split in one memory-mapped file, about 2 kB each.

The file has the layout of safetensors (8 bytes length, a JSON header with dtype, shape and offsets of each array, then
the arrays), so that any safetensors reader opens it; `__metadata__` holds the names. Nothing is read before it is used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtalfast.density.conformers import sequence_of
from xtalfast.errors import InputError
from xtalfast.io.files import replacing

_DTYPES = {"F32": "<f4", "F64": "<f8", "I32": "<i4", "I64": "<i8", "U8": "|u1"}
_CODES = {np.dtype(code): name for name, code in _DTYPES.items()}
_COLUMNS = {
    "ptr": ("<i8", 1),
    "coords": ("<f4", 2),
    "b_iso": ("<f4", 1),
    "element": ("|u1", 1),
    "residue_ids": ("|u1", 2),
    "cells": ("<f8", 2),
    "parent": ("<i4", 1),
    "first_residue": ("<i4", 1),
    "source": ("<i4", 1),
}
_PER_ATOM = ("coords", "b_iso", "element")


def write_arrays(path: str | os.PathLike, arrays: Mapping[str, NDArray], metadata: Mapping[str, str]) -> None:
    """Write named arrays and strings to one file in safetensors layout; it appears whole or not at all."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    # Widest items first keeps every array aligned without padding, which the format forbids.
    for name in sorted(arrays, key=lambda name: (-arrays[name].itemsize, name)):
        array = arrays[name]
        offsets = [offset, offset + array.nbytes]
        header[name] = {"dtype": _CODES[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
        offset = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, temporary.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for name in header:
            if name != "__metadata__":
                handle.write(np.ascontiguousarray(arrays[name]).data)


def map_arrays(path: str | os.PathLike) -> tuple[dict[str, NDArray], dict[str, str]]:
    """Arrays of a safetensors file, memory-mapped read-only, and its strings.

    Raises:
        InputError: the file is missing, truncated or of another kind.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if length > size:
                raise ValueError("its header is longer than the file")
            header = json.loads(handle.read(length))
        metadata = header.pop("__metadata__", {})
        start = 8 + length
        arrays: dict[str, NDArray] = {}
        for name, entry in header.items():
            dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            if start + end > size:
                raise ValueError("it is truncated")
            empty = 0 in shape  # an empty range cannot be mapped
            arrays[name] = (
                np.empty(shape, dtype) if empty else np.memmap(path, dtype, "r", offset=start + begin, shape=shape)
            )
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no readable fragment file ({error}); make it again") from error
    return arrays, metadata


@dataclass(frozen=True)
class Fragment:
    """One fragment in its cell.

    Attributes:
        id: `<structure>_<entity>.pd_<first residue>`, as in the density paper's Appendix C.
        parent: the structure it was cut from, or that structure's cluster.
        coords: Cartesian A, [M, 3], centre of mass at the cell's centre.
        element: atomic numbers [M].
        b_iso: deposited B factors, A^2, [M].
        residue_ids: places in `conformers.RESIDUES`, [R].
        cell: a <= b <= c in A, angles in deg, [6].
    """

    id: str
    parent: str
    coords: NDArray[np.float32]
    element: NDArray[np.uint8]
    b_iso: NDArray[np.float32]
    residue_ids: NDArray[np.uint8]
    cell: NDArray[np.float64]

    @property
    def sequence(self) -> str:
        return sequence_of(self.residue_ids)


class FragmentStore:
    """The fragments of one file, read as they are asked for.

    Attributes:
        path: the file; None in memory.
        metadata: further strings of the file.
        arrays: `ptr` int64 [N+1] into atoms; `coords` float32 [M, 3]; `b_iso` float32 [M]; `element` uint8 [M];
            `residue_ids` uint8 [N, R]; `cells` float64 [N, 6]; `parent`, `source`, `first_residue` int32 [N].
        parents: the names `parent` counts.
        sources: the names `source` counts, `<structure>_<entity>`.
    """

    def __init__(
        self,
        arrays: dict[str, NDArray],
        parents: Sequence[str],
        sources: Sequence[str],
        path: Path | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.arrays = arrays
        self.parents = tuple(parents)
        self.sources = tuple(sources)
        self.path = path
        self.metadata = dict(metadata or {})

    @classmethod
    def open(cls, path: str | os.PathLike) -> FragmentStore:
        """Map a file made by `xtalfast fragments`. Raises InputError if it is missing, damaged or of another kind."""
        arrays, metadata = map_arrays(path)
        for name, (dtype, ndim) in _COLUMNS.items():
            array = arrays.get(name)
            if array is None or array.dtype != np.dtype(dtype) or array.ndim != ndim:
                raise InputError(f"{path} is no fragment file: no array {name} ({dtype}, {ndim} axes); make it again")
        ptr = arrays["ptr"]
        if len(ptr) == 0 or ptr[-1] != len(arrays["coords"]) or len(arrays["cells"]) != len(ptr) - 1:
            raise InputError(f"{path}: its arrays contradict each other; make it again")
        try:
            parents, sources = (json.loads(metadata.pop(key)) for key in ("parents", "sources"))
        except (KeyError, ValueError) as error:
            raise InputError(f"{path} is no fragment file: no list of parents; make it again") from error
        return cls(arrays, parents, sources, Path(path), metadata)

    @classmethod
    def from_fragments(cls, fragments: Sequence[Fragment], n_residues: int) -> FragmentStore:
        """A store in memory."""
        parents = sorted({fragment.parent for fragment in fragments})
        sources = sorted({fragment.id.rsplit(".pd_", 1)[0] for fragment in fragments})
        parent_number = {name: i for i, name in enumerate(parents)}
        source_number = {name: i for i, name in enumerate(sources)}
        split_ids = [fragment.id.rsplit(".pd_", 1) for fragment in fragments]

        def joined(name: str, empty: NDArray) -> NDArray:
            return np.concatenate([empty, *(getattr(fragment, name) for fragment in fragments)]).astype(empty.dtype)

        arrays = {
            "ptr": np.cumsum([0, *(len(fragment.element) for fragment in fragments)], dtype=np.int64),
            "coords": joined("coords", np.empty((0, 3), np.float32)),
            "b_iso": joined("b_iso", np.empty(0, np.float32)),
            "element": joined("element", np.empty(0, np.uint8)),
            "residue_ids": np.array([f.residue_ids for f in fragments], np.uint8).reshape(-1, n_residues),
            "cells": np.array([f.cell for f in fragments], np.float64).reshape(-1, 6),
            "parent": np.array([parent_number[f.parent] for f in fragments], np.int32),
            "source": np.array([source_number[source] for source, _ in split_ids], np.int32),
            "first_residue": np.array([int(first) for _, first in split_ids], np.int32),
        }
        return cls(arrays, parents, sources)

    @classmethod
    def concatenate(cls, stores: Sequence[FragmentStore]) -> FragmentStore:
        """One store in memory with the fragments of several, in order."""
        parents = sorted({name for store in stores for name in store.parents})
        sources = sorted({name for store in stores for name in store.sources})
        arrays: dict[str, list[NDArray]] = {name: [] for name in _COLUMNS}
        atoms = 0
        for store in stores:
            for name, array in store.arrays.items():
                arrays[name].append(array)
            arrays["ptr"][-1] = store.arrays["ptr"][1:] + atoms
            atoms += len(store.arrays["coords"])
            for column, names, merged in (("parent", store.parents, parents), ("source", store.sources, sources)):
                number = {name: i for i, name in enumerate(merged)}
                lookup = np.array([number[name] for name in names], np.int32)
                arrays[column][-1] = lookup[store.arrays[column]]
        arrays["ptr"].insert(0, np.zeros(1, np.int64))
        return cls({name: np.concatenate(parts) for name, parts in arrays.items()}, parents, sources)

    def select(self, rows: NDArray[np.int64]) -> FragmentStore:
        """The fragments `rows` [n], in memory."""
        ptr = self.arrays["ptr"]
        length = np.diff(ptr)[rows]
        new_ptr = np.concatenate([[0], np.cumsum(length)]).astype(np.int64)
        atoms = np.arange(new_ptr[-1]) + np.repeat(ptr[:-1][rows] - new_ptr[:-1], length)
        arrays = {name: array[rows] for name, array in self.arrays.items() if name not in ("ptr", *_PER_ATOM)}
        arrays |= {name: self.arrays[name][atoms] for name in _PER_ATOM} | {"ptr": new_ptr}
        return FragmentStore(arrays, self.parents, self.sources)

    def write(self, path: str | os.PathLike, metadata: Mapping[str, str] | None = None) -> None:
        """Write to `path`, with further strings; it appears whole or not at all. Names that no row uses are dropped."""
        arrays = dict(self.arrays)
        strings = {"format": "xtalfast fragments 1", **(metadata or {})}
        for column, key, names in (("parent", "parents", self.parents), ("source", "sources", self.sources)):
            used, arrays[column] = np.unique(arrays[column], return_inverse=True)
            arrays[column] = arrays[column].astype(np.int32)
            strings[key] = json.dumps([names[i] for i in used.tolist()])
        write_arrays(path, arrays, strings)

    def __len__(self) -> int:
        return len(self.arrays["cells"])

    def __getitem__(self, row: int) -> Fragment:
        if not 0 <= row < len(self):
            raise IndexError(f"fragment {row} of {len(self)}")
        atoms = slice(*self.arrays["ptr"][row : row + 2].tolist())
        coords, element, b_iso = (np.array(self.arrays[name][atoms]) for name in ("coords", "element", "b_iso"))
        residue_ids, cell = np.array(self.arrays["residue_ids"][row]), np.array(self.arrays["cells"][row])
        parent = self.parents[self.arrays["parent"][row]]
        return Fragment(self.id(row), parent, coords, element, b_iso, residue_ids, cell)

    def id(self, row: int) -> str:
        """Name of a fragment, such as `4AZ3_1.pd_11`."""
        return f"{self.sources[self.arrays['source'][row]]}.pd_{self.arrays['first_residue'][row]}"
