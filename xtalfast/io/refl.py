"""DIALS reflection tables (`.refl`) without DIALS: every column comes back as numpy and goes out as the same bytes.

A file is one msgpack value, `["dials::af::reflection_table", 1, {identifiers, nrows, data}]`, its columns packed as
little-endian arrays under a type name. A column of a type that is not known here is carried through untouched.
`std::string` is one of them: DIALS 3.12 writes the memory of its string objects, pointers included, so that the text
itself is not in the file.
"""

from __future__ import annotations

import enum
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xtalfast.errors import InputError, MissingExtraError
from xtalfast.io.files import write_bytes
from xtalfast.io.shoebox_column import ShoeboxColumn

logger = logging.getLogger(__name__)

_MAGIC = "dials::af::reflection_table"
_MAX_COLUMN_BYTES = 2**32 - 1  # msgpack's bin 32
_SHOEBOX = "Shoebox<>"

# DIALS type -> (dtype in the file, shape of one row)
_TYPES: dict[str, tuple[np.dtype, tuple[int, ...]]] = {
    "bool": (np.dtype("?"), ()),
    "int": (np.dtype("<i4"), ()),
    "std::size_t": (np.dtype("<u8"), ()),
    "double": (np.dtype("<f8"), ()),
    "vec2<double>": (np.dtype("<f8"), (2,)),
    "vec3<double>": (np.dtype("<f8"), (3,)),
    "mat3<double>": (np.dtype("<f8"), (3, 3)),
    "int6": (np.dtype("<i4"), (6,)),
    "cctbx::miller::index<>": (np.dtype("<i4"), (3,)),
}
_TYPE_OF = {layout: name for name, layout in _TYPES.items()}
# Where the values alone do not tell the type: whole numbers given for these columns are stored as DIALS stores them.
_SIZE_T_COLUMNS = frozenset({"flags", "panel", "partial_id", "original_index"})
_DOUBLE_PREFIXES = ("xyz", "s1", "rlp", "intensity.", "background.", "inverse_scale_factor")


class Flag(enum.IntFlag):
    """Bits of the column `flags`, under the names DIALS gives them."""

    Predicted = 1 << 0
    Observed = 1 << 1
    Indexed = 1 << 2
    UsedInRefinement = 1 << 3
    Strong = 1 << 5
    ReferenceSpot = 1 << 6
    DontIntegrate = 1 << 7
    IntegratedSum = 1 << 8
    IntegratedPrf = 1 << 9
    Integrated = IntegratedSum | IntegratedPrf
    Overloaded = 1 << 10
    OverlappedBg = 1 << 11
    OverlappedFg = 1 << 12
    InPowderRing = 1 << 13
    ForegroundIncludesBadPixels = 1 << 14
    BackgroundIncludesBadPixels = 1 << 15
    IncludesBadPixels = ForegroundIncludesBadPixels | BackgroundIncludesBadPixels
    BadShoebox = Overloaded | OverlappedBg | OverlappedFg | InPowderRing | IncludesBadPixels
    BadSpot = BadShoebox
    UsedInModelling = 1 << 16
    CentroidOutlier = 1 << 17
    FailedDuringBackgroundModelling = 1 << 18
    FailedDuringSummation = 1 << 19
    FailedDuringProfileFitting = 1 << 20
    BadReference = 1 << 21
    UserExcludedInScaling = 1 << 22
    OutlierInScaling = 1 << 23
    ExcludedForScaling = 1 << 24
    BadForScaling = UserExcludedInScaling | OutlierInScaling | ExcludedForScaling
    ExcludedForRefinement = 1 << 25
    BadForRefinement = CentroidOutlier | ExcludedForRefinement
    Scaled = 1 << 26


@dataclass(frozen=True)
class RawColumn:
    """A column of a type that is not known here, kept as the bytes of the file."""

    dials_type: str
    n_rows: int
    packed: bytes

    def __len__(self) -> int:
        return self.n_rows


Column = NDArray | ShoeboxColumn | RawColumn


def _as_column(name: str, values: ArrayLike, previous: Column | None = None) -> NDArray:
    """`values` as the one numpy layout that DIALS has for this column; raises InputError when there is none."""
    array = np.asarray(values)
    if array.ndim == 2 and array.shape[1] == 9 and array.dtype.kind == "f":
        array = array.reshape(-1, 3, 3)
    dtype: np.dtype[Any]
    if array.dtype.kind == "b":
        dtype = np.dtype("?")
    elif array.dtype.kind in "iu":
        if isinstance(previous, np.ndarray) and previous.dtype.kind in "iuf" and previous.ndim == array.ndim:
            dtype = previous.dtype
        elif name.startswith(_DOUBLE_PREFIXES):
            dtype = np.dtype("<f8")
        elif array.ndim == 1 and (name in _SIZE_T_COLUMNS or array.dtype == np.uint64):
            dtype = np.dtype("<u8")
        else:
            dtype = np.dtype("<i4")
        if dtype.kind != "f" and array.size:
            low, high = int(array.min()), int(array.max())
            if low < np.iinfo(dtype).min or high > np.iinfo(dtype).max:
                raise InputError(f"column {name} must fit {dtype.name}, got values from {low} to {high}")
    else:
        dtype = np.dtype("<f8")
    layout = (dtype, array.shape[1:])
    if array.dtype.kind not in "biuf" or layout not in _TYPE_OF or array.ndim == 0:
        wanted = ", ".join(f"{t.name} [N{''.join(f', {s}' for s in shape)}]" for t, shape in _TYPES.values())
        raise InputError(f"column {name} must be one of {wanted}, got {array.dtype} {list(array.shape)}")
    return np.ascontiguousarray(array, dtype)


@dataclass
class ReflectionTable:
    """Columns of reflections, one row each, and which experiment identifier belongs to which value of `id`.

    Example:
        >>> table = read_refl("integrated.refl")
        >>> good = table.select((table["flags"] & Flag.IntegratedPrf) != 0)
        >>> good["intensity.prf.value"] = good["intensity.prf.value"] * 2
        >>> write_refl("doubled.refl", good)
    """

    columns: dict[str, Column] = field(default_factory=dict)
    identifiers: dict[int, str] = field(default_factory=dict)

    @classmethod
    def from_columns(cls, columns: dict[str, Any], identifiers: dict[int, str] | None = None) -> ReflectionTable:
        """A table of arrays, each converted as by `table[name] = array`."""
        table = cls(identifiers=dict(identifiers or {}))
        for name, values in columns.items():
            table[name] = values
        return table

    def __len__(self) -> int:
        return next((len(column) for column in self.columns.values()), 0)

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __getitem__(self, name: str) -> Any:
        self.require(name)
        return self.columns[name]

    def __setitem__(self, name: str, values: Any) -> None:
        if not isinstance(values, ShoeboxColumn | RawColumn):
            values = _as_column(name, values, self.columns.get(name))
        others = [column for other, column in self.columns.items() if other != name]
        if others and len(values) != len(others[0]):
            raise InputError(
                f"column {name} must have {len(others[0])} rows like the rest of the table, got {len(values)}"
            )
        self.columns[name] = values

    def __delitem__(self, name: str) -> None:
        self.require(name)
        del self.columns[name]

    def require(self, *names: str) -> None:
        """Raises InputError that names the columns that are missing and those that are there."""
        missing = [name for name in names if name not in self.columns]
        if missing:
            present = ", ".join(self.columns) or "none"
            raise InputError(f"reflection table has no column {', '.join(map(repr, missing))}; present: {present}")

    def has_flags(self, flags: int) -> NDArray[np.bool_]:
        """Rows that have any of the bits in `flags` set [N]."""
        return (self["flags"] & np.uint64(flags)) != 0

    def select(self, rows: ArrayLike) -> ReflectionTable:
        """Rows by number [K] or by a bool mask [N], copied; a column of unknown type cannot be cut and is left out."""
        rows = np.asarray(rows)
        n = len(self)
        if rows.dtype == bool:
            if rows.shape != (n,):
                raise InputError(f"rows must be a bool mask [{n}], got {list(rows.shape)}")
            rows = np.flatnonzero(rows)
        elif rows.size == 0:
            rows = rows.astype(np.int64).reshape(0)
        elif rows.dtype.kind not in "iu" or rows.ndim != 1 or rows.max() >= n or rows.min() < -n:
            raise InputError(f"rows must be integers [K] from {-n} to {n - 1}, got {rows.dtype} {list(rows.shape)}")
        rows = rows.astype(np.int64)
        rows = np.where(rows < 0, rows + n, rows)
        selected: dict[str, Column] = {}
        for name, column in self.columns.items():
            if isinstance(column, RawColumn):
                logger.warning(
                    "column %s is left out of the selection: its type %s is unknown", name, column.dials_type
                )
            else:
                selected[name] = column.select(rows) if isinstance(column, ShoeboxColumn) else column[rows]
        return ReflectionTable(selected, dict(self.identifiers))

    def copy(self) -> ReflectionTable:
        """An independent copy."""
        columns = {n: c if isinstance(c, RawColumn) else c.copy() for n, c in self.columns.items()}
        return ReflectionTable(columns, dict(self.identifiers))

    @staticmethod
    def concat(tables: Sequence[ReflectionTable]) -> ReflectionTable:
        """The rows of all tables; `id` is renumbered where two tables use one number for different experiments.

        Raises:
            InputError: the tables do not have the same columns, or one has a column of unknown type.
        """
        if not tables:
            return ReflectionTable()
        names = list(tables[0].columns)
        for i, table in enumerate(tables):
            odd = sorted(set(names) ^ set(table.columns))
            raw = [name for name, column in table.columns.items() if isinstance(column, RawColumn)]
            if odd or raw:
                what = f"only one of them has {', '.join(odd)}" if odd else f"type of {', '.join(raw)} is unknown"
                raise InputError(f"tables 0 and {i} cannot be joined: {what}; delete these columns first")
        joined = ReflectionTable()
        for name in names:
            parts: list[Any] = [table[name] for table in tables]
            joined[name] = ShoeboxColumn.concat(parts) if isinstance(parts[0], ShoeboxColumn) else np.concatenate(parts)
        if "id" in names:
            joined["id"], joined.identifiers = _join_ids(tables)
        return joined


def _join_ids(tables: Iterable[ReflectionTable]) -> tuple[NDArray, dict[int, str]]:
    """Column `id` of the joined tables and its identifiers, one number per experiment (-1, not indexed, is kept)."""
    identifiers: dict[int, str] = {}
    number_of: dict[str, int] = {}
    ids = []
    for table in tables:
        old = table["id"]
        new = old.copy()
        for number in sorted(set(np.unique(old).tolist()) | set(table.identifiers)):
            if number < 0:
                continue
            identifier = table.identifiers.get(number, "")
            if identifier in number_of:
                target = number_of[identifier]
            else:
                target = number if number not in identifiers else max(identifiers) + 1
                identifiers[target] = identifier
                if identifier:
                    number_of[identifier] = target
            new[old == number] = target
        ids.append(new)
    return np.concatenate(ids), {number: name for number, name in identifiers.items() if name}


def _import_msgpack() -> Any:
    try:
        import msgpack
    except ImportError as error:
        raise MissingExtraError("msgpack", "io", "reading and writing .refl files") from error
    return msgpack


def _unpack(path: Path, packed: bytes) -> tuple[dict[int, str], int, dict[str, Any]]:
    """Identifiers, number of rows and packed columns; raises InputError with what the file seems to be instead."""
    msgpack = _import_msgpack()
    wanted = f"{path}: wanted a DIALS reflection table (.refl)"
    if packed[:4] == b"\x89HDF":
        raise InputError(f"{wanted}, got HDF5; write it as .refl with DIALS")
    if packed[:1] == b"\x80":
        raise InputError(f"{wanted}, got a pickle of an old DIALS; convert it with DIALS")
    if _MAGIC.encode() not in packed[:64]:
        raise InputError(f"{wanted}, got {'an empty file' if not packed else 'something else'}")
    try:
        content = msgpack.unpackb(packed, raw=False, strict_map_key=False)
        magic, version, table = content
        identifiers, n, data = table["identifiers"], table["nrows"], table["data"]
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
        raise InputError(f"{path}: truncated or damaged reflection table ({error}); copy or make it again") from error
    if magic != _MAGIC or version != 1:
        raise InputError(f"{wanted} of version 1, got version {version!r}")
    if not (isinstance(identifiers, dict) and isinstance(n, int) and isinstance(data, dict)):
        raise InputError(f"{path}: truncated or damaged reflection table; copy or make it again")
    return identifiers, n, data


def read_refl(path: str | os.PathLike) -> ReflectionTable:
    """Read the reflections of a DIALS `.refl` file.

    Args:
        path: the file.

    Returns:
        Columns in the order of the file: bool, int32 (int), uint64 (std::size_t), float64 (double) [N], float64 [N, 2]
        and [N, 3] (vec2, vec3), [N, 3, 3] (mat3), int32 [N, 6] (int6) and [N, 3] (Miller index), `ShoeboxColumn`,
        and `RawColumn` for every other type. No rows and no columns are legal.

    Raises:
        InputError: no such file, not a reflection table, truncated, or a column whose length is not the table's.
    """
    path = Path(path)
    try:
        packed = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    identifiers, n, columns = _unpack(path, packed)
    table = ReflectionTable(identifiers=identifiers)
    for name, entry in columns.items():
        match entry:
            case [str(dials_type), [int(n_rows), bytes(data)]]:
                pass
            case _:
                raise InputError(f"{path}: column {name} is damaged; copy or make the file again")
        if n_rows != n:
            raise InputError(f"{path}: column {name} must have {n} rows like the table, got {n_rows}")
        if dials_type == _SHOEBOX:
            table.columns[name] = ShoeboxColumn.from_bytes(n, data)
        elif dials_type in _TYPES:
            dtype, shape = _TYPES[dials_type]
            wanted = n * dtype.itemsize * int(np.prod(shape))
            if len(data) != wanted:
                raise InputError(f"{path}: column {name} ({dials_type}) must have {wanted} bytes, got {len(data)}")
            table.columns[name] = np.frombuffer(bytearray(data), dtype).reshape(n, *shape)
        else:
            table.columns[name] = RawColumn(dials_type, n, data)
    return table


def _pack_column(name: str, column: Column) -> tuple[str, bytes]:
    if isinstance(column, RawColumn):
        return column.dials_type, column.packed
    if isinstance(column, ShoeboxColumn):
        return _SHOEBOX, column.to_bytes()
    array = _as_column(name, column)
    return _TYPE_OF[array.dtype, array.shape[1:]], array.tobytes()


def write_refl(path: str | os.PathLike, table: ReflectionTable) -> None:
    """Write a `.refl` file that DIALS reads; a table just read gives the bytes of its file.

    Args:
        path: the file; it appears whole or not at all.
        table: every column as long as the table.

    Raises:
        InputError: columns of unequal length, a column over 4 GiB, or a place that cannot be written.
    """
    msgpack = _import_msgpack()
    n = len(table)
    data = {}
    for name, column in table.columns.items():
        if len(column) != n:
            raise InputError(f"column {name} must have {n} rows like the rest of the table, got {len(column)}")
        dials_type, packed = _pack_column(name, column)
        if len(packed) > _MAX_COLUMN_BYTES:
            raise InputError(
                f"column {name} takes {len(packed)} bytes, the format ends at 4 GiB; write fewer rows a file"
            )
        data[name] = [dials_type, [n, packed]]
    content = {"identifiers": table.identifiers, "nrows": n, "data": data}
    write_bytes(path, msgpack.packb([_MAGIC, 1, content], use_bin_type=True))
