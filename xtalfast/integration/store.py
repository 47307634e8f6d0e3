"""`ShoeboxStore`: the counts and masks of all reflections of a data set on disk, gathered by row without loading it.

A store is a directory: `store.json`, shards `counts-00000.npy` and `mask-00000.npy` (voxels in the order z, y, x), one
`.npy` per metadata column and, for boxes of several sizes, `ptr.npy`. Everything can be read with numpy alone. Shards
appear whole or not at all, so that an interrupted extraction goes on where it stopped; `store.json` is written last.
"""

from __future__ import annotations

import enum
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtalfast.errors import InputError
from xtalfast.io.files import remove_partial, replacing, write_text
from xtalfast.masks import used_pixels

Rows = NDArray[np.int64]

SHARD_VOXELS = 1 << 21  # 6 MB of counts and mask: small beside memory, large beside a seek
_OPEN_SHARDS = 24  # mapped at once; mapped pages count as resident memory
_FORMAT = "xtalfast shoebox store"


class Reason(enum.IntFlag):
    """Why a row of a store is not an ordinary shoebox; 0 for one that is."""

    NoExperiment = 1  # id -1: not indexed
    NotFinite = 2  # the position is NaN or infinite
    OffPanel = 4  # the position lies outside its panel
    OutOfScan = 8  # the position lies outside the scan
    Truncated = 16  # part of the box lies outside the panel or the scan
    SmallBox = 32  # the box holds less than 95 % of the modelled spot
    Overloaded = 64  # a pixel of the spot is at or above the trusted maximum
    NoPixels = 128  # not one valid pixel


# Of rows that no intensity can be had from.
NO_SPOT = Reason.NoExperiment | Reason.NotFinite | Reason.OffPanel | Reason.OutOfScan | Reason.NoPixels


class ShoeboxStore:
    """Shoeboxes of N reflections, memory-mapped; open one with `ShoeboxStore.open`.

    Attributes:
        path: the directory.
        n: number of reflections.
        box: size (z, y, x) of every box, or None when they differ.
        n_pixels: voxels of one box, or of all boxes when they differ.
        dtype: of the counts, uint16, or int32 when some count exceeds 65534.
        metadata: columns [N, ...]: `row` (in the .refl), `bbox`, `xyzcal_px`, `panel`, `id` (experiment), `s1`, `d`,
            `hkl`, `zeta`, `lp`, `flags`, `reason` (`Reason` bits), `box_fraction` and what else was given.
        statistics: n_voxels (used), photons, mean and variance of the used counts and of their Anscombe transform
            2 sqrt(y + 3/8), reasons (rows per `Reason`).
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.n: int = header["n"]
        self.box: tuple[int, int, int] | None = tuple(header["box"]) if header["box"] else None
        self.statistics: dict[str, Any] = header["statistics"]
        self.request: str = header["request"]
        self.dtype = np.dtype(np.int32 if any(s["dtype"] == "int32" for s in header["shards"]) else np.uint16)
        self._first = np.cumsum([0] + [s["n"] for s in header["shards"]])
        self._maps: OrderedDict[tuple[str, int], NDArray] = OrderedDict()
        self._ptr = None if self.box else np.load(path / "ptr.npy", mmap_mode="r")
        self.n_pixels = int(np.prod(self.box)) if self.box else int(self._ptr[-1]) if self._ptr is not None else 0
        self.metadata: dict[str, NDArray] = {
            name: np.load(path / f"meta-{name}.npy", mmap_mode="r") for name in header["metadata"]
        }

    @classmethod
    def open(cls, path: str | os.PathLike) -> ShoeboxStore:
        """Open a finished store.

        Raises:
            InputError: there is none, or the extraction that makes it was interrupted.
        """
        path = Path(path)
        try:
            header = json.loads((path / "store.json").read_text())
        except OSError as error:
            unfinished = (path / "journal.json").is_file()
            what = "is unfinished; run the same extraction again to complete it" if unfinished else "does not exist"
            raise InputError(f"shoebox store {path} {what}") from error
        except ValueError as error:
            raise InputError(f"{path / 'store.json'} is damaged ({error}); extract the store again") from error
        if header.get("format") != _FORMAT:
            raise InputError(f"{path} is no shoebox store: format {header.get('format')!r} in store.json")
        try:
            return cls(path, header)
        except (OSError, EOFError, ValueError, KeyError) as error:
            raise InputError(f"shoebox store {path} is damaged ({error}); remove it and extract it again") from error

    @classmethod
    def create(
        cls,
        path: str | os.PathLike,
        counts: NDArray | Iterable[tuple[NDArray, NDArray]],
        mask: NDArray | None,
        metadata: Mapping[str, NDArray],
        *,
        box: tuple[int, int, int],
    ) -> ShoeboxStore:
        """Write a store of boxes of one size that are made, not extracted.

        Args:
            path: directory that does not hold a store yet.
            counts: photons [N, P], integers; or blocks of (counts, mask), which need not fit into memory together
                (then `mask` is None).
            mask: DIALS bits [N, P], uint8.
            metadata: columns of N rows; `row` is added if missing.
            box: z, y, x size with P voxels.

        Raises:
            InputError: shapes that do not fit together, counts that are not integers or beyond int32.
        """
        volume = int(np.prod(box))
        if isinstance(counts, np.ndarray):
            if mask is None or counts.shape != mask.shape:
                raise InputError(
                    f"mask must be uint8 {list(counts.shape)} like counts, got {getattr(mask, 'shape', None)}"
                )
            step = max(SHARD_VOXELS // volume, 1)
            blocks: Iterable[tuple[NDArray, NDArray]] = (
                (counts[i : i + step], mask[i : i + step]) for i in range(0, len(counts), step)
            )
        else:
            blocks = counts
        writer = StoreWriter(path, request="")
        n = 0
        for k, (block, block_mask) in enumerate(blocks):
            if block.ndim != 2 or block.shape[1] != volume or block.dtype.kind not in "iu":
                raise InputError(
                    f"counts must be integers [N, {volume}] for box {box}, got {block.dtype} {list(block.shape)}"
                )
            writer.write_shard(k, block, block_mask, np.zeros(len(block), np.uint8))
            n += len(block)
        lengths = {name: len(values) for name, values in metadata.items() if len(values) != n}
        if lengths:
            raise InputError(f"metadata must have {n} rows like counts, got {lengths}")
        return writer.finish({"row": np.arange(n, dtype=np.int64), **metadata}, box=box)

    def __len__(self) -> int:
        return self.n

    def by_size(self, rows: Rows | None = None) -> Iterator[StoreView]:
        """The rows of each size of box as a `StoreView`, the most frequent size first; empty boxes are left out.

        Args:
            rows: rows of the store to share out, [B]; None: all.
        """
        rows = np.arange(self.n) if rows is None else np.asarray(rows, np.int64)
        bbox = np.asarray(self.metadata["bbox"][rows]) if self.box is None else np.zeros((len(rows), 6), np.int64)
        size = (bbox[:, 1::2] - bbox[:, ::2])[:, ::-1] if self.box is None else np.tile(self.box, (len(rows), 1))
        sizes, group, count = np.unique(size, axis=0, return_inverse=True, return_counts=True)
        for k in np.argsort(-count, kind="stable"):
            if (sizes[k] > 0).all():
                z, y, x = sizes[k].tolist()
                yield StoreView(self, rows[group.ravel() == k], (z, y, x))

    def _shard(self, kind: str, k: int) -> NDArray:
        key = (kind, k)
        if key not in self._maps:
            file = self.path / f"{kind}-{k:05d}.npy"
            try:
                self._maps[key] = np.load(file, mmap_mode="r")
            except (OSError, EOFError, ValueError) as error:
                raise InputError(f"{file} is damaged ({error}); remove {self.path} and extract it again") from error
            if len(self._maps) > 2 * _OPEN_SHARDS:
                self._maps.popitem(last=False)
        self._maps.move_to_end(key)
        return self._maps[key]

    def _gather(self, kind: str, rows: Rows, dtype: np.dtype) -> Any:
        rows = np.asarray(rows, np.int64)
        shard_of = np.searchsorted(self._first, rows, side="right") - 1
        if self.box is not None:
            out = np.empty((len(rows), self.n_pixels), dtype)
            for k in np.unique(shard_of):
                here = np.flatnonzero(shard_of == k)
                out[here] = self._shard(kind, k)[rows[here] - self._first[k]]
            return out
        assert self._ptr is not None
        start, size = self._ptr[rows], self._ptr[rows + 1] - self._ptr[rows]
        ptr = np.concatenate([[0], np.cumsum(size)])
        values = np.empty(ptr[-1], dtype)
        for k in np.unique(shard_of):
            here = np.flatnonzero(shard_of == k)
            within = np.arange(size[here].sum()) - np.repeat(np.cumsum(size[here]) - size[here], size[here])
            source = np.repeat(start[here] - self._ptr[self._first[k]], size[here]) + within
            values[np.repeat(ptr[here], size[here]) + within] = self._shard(kind, k)[source]
        return values, ptr

    def counts(self, rows: Rows) -> Any:
        """Photons of rows [B]: [B, P] uint16 or int32; boxes of several sizes: (values [M], ptr int64 [B + 1])."""
        return self._gather("counts", rows, self.dtype)

    def mask(self, rows: Rows) -> Any:
        """DIALS mask bits (Valid 1, Overlapped 32) of the given rows, uint8, laid out as `counts`."""
        return self._gather("mask", rows, np.dtype(np.uint8))


class StoreView:
    """Some rows of a store, all with boxes of one size, used like a store of these rows alone.

    Attributes:
        rows: of the whole store, int64 [n].
        n, box, n_pixels, dtype, metadata, counts(), mask(): as in `ShoeboxStore`; counts and masks are [B, P].
    """

    def __init__(self, store: ShoeboxStore, rows: Rows, box: tuple[int, int, int]) -> None:
        self.store, self.rows, self.box = store, rows, box
        self.n, self.n_pixels, self.dtype = len(rows), int(np.prod(box)), store.dtype
        self.metadata = {name: np.asarray(values[rows]) for name, values in store.metadata.items()}

    def __len__(self) -> int:
        return self.n

    def _gather(self, values: Any) -> NDArray:
        return values if self.store.box is not None else values[0].reshape(-1, self.n_pixels)

    def counts(self, rows: Rows) -> NDArray:
        """Photons of rows [B] of this view, [B, P]."""
        return self._gather(self.store.counts(self.rows[rows]))

    def mask(self, rows: Rows) -> NDArray[np.uint8]:
        """DIALS mask bits of rows [B] of this view, [B, P]."""
        return self._gather(self.store.mask(self.rows[rows]))


class StoreWriter:
    """Writes a store shard by shard; what was finished before an interruption is found again.

    Args:
        path: directory, made if it does not exist.
        request: fingerprint of what is to be stored. A directory with another one is refused.
    """

    def __init__(self, path: str | os.PathLike, request: str) -> None:
        self.path = Path(path)
        self.request = request
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the store {path}: {error.strerror or error}") from error
        for name in ("store.json", "journal.json"):
            file = self.path / name
            if file.is_file() and _request_of(file) != request:
                raise InputError(
                    f"{self.path} holds the store of another job (other reflections, models or box); choose another "
                    "directory, or remove it (`xtalfast integrate --restart` does)"
                )
        remove_partial(self.path)
        write_text(self.path / "journal.json", json.dumps({"request": request}))

    def is_done(self, k: int) -> bool:
        """The shard has been written."""
        return (self.path / f"shard-{k:05d}.json").is_file()

    def _save(self, name: str, values: NDArray) -> None:
        with replacing(self.path / name) as temporary, temporary.open("wb") as handle:
            np.save(handle, np.ascontiguousarray(values))

    def write_shard(self, k: int, counts: NDArray, mask: NDArray, reason: NDArray[np.uint8]) -> None:
        """Write shard k: counts and mask [n, P] (or [M] for boxes of several sizes), reason [n]."""
        if counts.size and (counts.min() < 0 or counts.max() > 2**31 - 1):
            raise InputError(f"counts must be photons from 0 to 2^31 - 1, got {counts.min()} to {counts.max()}")
        dtype = np.dtype(np.uint16 if not counts.size or counts.max() <= 65534 else np.int32)
        self._save(f"counts-{k:05d}.npy", counts.astype(dtype, copy=False))
        self._save(f"mask-{k:05d}.npy", mask.astype(np.uint8, copy=False))
        self._save(f"reason-{k:05d}.npy", reason)
        done = {"n": len(reason), "dtype": dtype.name, "moments": _moments(counts.ravel(), mask.ravel())}
        write_text(self.path / f"shard-{k:05d}.json", json.dumps(done))

    def finish(
        self,
        metadata: Mapping[str, NDArray],
        *,
        box: tuple[int, int, int] | None,
        ptr: NDArray | None = None,
    ) -> ShoeboxStore:
        """Write metadata and header, drop the journal and open the store; `ptr` [N + 1] for boxes of several sizes."""
        names = sorted(self.path.glob("shard-*.json"))
        shards = [json.loads(name.read_text()) for name in names]
        reasons = sorted(self.path.glob("reason-*.npy"))
        reason = np.concatenate([np.load(name) for name in reasons] or [np.zeros(0, np.uint8)])
        columns = dict(metadata)
        columns["reason"] = reason | np.asarray(columns.get("reason", 0), np.uint8)
        if "flags" in columns:
            overloaded = (columns["reason"] & np.uint8(Reason.Overloaded)) != 0
            columns["flags"] = columns["flags"] | np.where(overloaded, np.uint32(1 << 10), np.uint32(0))
        for name, values in columns.items():
            self._save(f"meta-{name}.npy", values)
        if ptr is not None:
            self._save("ptr.npy", ptr)
        header = {
            "format": _FORMAT,
            "version": 1,
            "n": len(reason),
            "box": list(box) if box is not None else None,
            "request": self.request,
            "shards": [{"n": s["n"], "dtype": s["dtype"]} for s in shards],
            "metadata": sorted(columns),
            "statistics": _statistics([s["moments"] for s in shards], columns["reason"]),
        }
        write_text(self.path / "store.json", json.dumps(header, indent=1))
        for leftover in [*names, *reasons, self.path / "journal.json"]:
            leftover.unlink(missing_ok=True)
        return ShoeboxStore.open(self.path)


def _request_of(file: Path) -> str:
    try:
        return json.loads(file.read_text())["request"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is damaged ({error}); remove {file.parent} and extract the store again") from error


def _moments(counts: NDArray, mask: NDArray) -> list[float]:
    """Number, sum and sum of squares of the used counts, sum and sum of squares of their Anscombe transform."""
    moments = np.zeros(5)
    for start in range(0, len(counts), 1 << 18):
        piece = slice(start, start + (1 << 18))
        used = used_pixels(mask[piece])
        y = counts[piece][used].astype(float)
        squared = 4 * (y + 0.375)  # of the transform
        moments += len(y), y.sum(), (y * y).sum(), np.sqrt(squared).sum(), squared.sum()
    return moments.tolist()


def _statistics(moments: list[list[float]], reason: NDArray[np.uint8]) -> dict[str, Any]:
    n, total, squares, anscombe, anscombe_squares = np.sum(moments, axis=0) if moments else np.zeros(5)
    mean, anscombe_mean = total / max(n, 1), anscombe / max(n, 1)
    return {
        "n_voxels": int(n),
        "photons": int(total),
        "mean": float(mean),
        "variance": float(squares / max(n, 1) - mean**2),
        "anscombe_mean": float(anscombe_mean),
        "anscombe_variance": float(anscombe_squares / max(n, 1) - anscombe_mean**2),
        "reasons": {bit.name: int(np.count_nonzero(reason & np.uint8(bit))) for bit in Reason},
    }
