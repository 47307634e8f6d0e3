"""Shoeboxes from memory-mapped stores to batches: seeded order, shares of several processes, read ahead in a thread."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtalfast.errors import InputError
from xtalfast.integration.splits import mixed_keys, thin_photons
from xtalfast.ops._boxes import used_pixels

_BLOCK = 4096  # rows read from one place of a store
_POOL = 4  # blocks shuffled together: 43 MB of counts of the paper's box, so a cold disk is read nearly in order


class ShoeboxSource(Protocol):
    """What is needed of a `ShoeboxStore`: equal boxes of n_pixels voxels, gathered by row number."""

    n: int
    metadata: Any

    @property
    def box(self) -> tuple[int, int, int] | None: ...

    def counts(self, rows: NDArray[np.int64]) -> NDArray: ...

    def mask(self, rows: NDArray[np.int64]) -> NDArray: ...


class ProfileSource(Protocol):
    """Anything that knows the spot shape of the reflections of one store, e.g. `gaussian_rs.ReferenceProfiles`."""

    def profiles(self, rows: NDArray[np.int64]) -> Tensor: ...


@runtime_checkable
class MovableProfiles(ProfileSource, Protocol):
    """Spot shapes that can be had for the reflections of another store too."""

    def on(self, store: Any) -> ProfileSource: ...


@dataclass
class ShoeboxBatch:
    """Equal shoeboxes and where they lie.

    Args:
        counts: photons [B, P], uint8, uint16, int32 or float; voxels in z, y, x order.
        mask: voxels to use [B, P] bool, or DIALS mask bits uint8 (used: Valid and not Overlapped).
        xyzcal_px: predicted centroid [B, 3] float32, px, px, images.
        bbox: x0, x1, y0, y1, z0, z1, end excluded [B, 6] int32.
        box: z, y, x size.
        profile: given spot shape [B, P] float32, for the profile model "dials".
        seen: a random half of the photons [B, P], shown to the encoder in training; None: it sees them all.
    """

    counts: Tensor
    mask: Tensor
    xyzcal_px: Tensor
    bbox: Tensor
    box: tuple[int, int, int]
    profile: Tensor | None = None
    seen: Tensor | None = None

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def used(self) -> Tensor:
        """Voxels that enter likelihood and features [B, P] bool."""
        return used_pixels(self.mask)

    @property
    def offset(self) -> Tensor:
        """Predicted centroid from the centre of the box [B, 3], z, y, x (images, px, px)."""
        centre = 0.5 * (self.bbox[:, 0::2] + self.bbox[:, 1::2])
        return (self.xyzcal_px - centre).flip(1)

    def to(self, device: torch.device | str) -> ShoeboxBatch:
        """The same batch on `device`."""
        moved: dict[str, Any] = {name: v.to(device) for name, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def read_batch(store: ShoeboxSource, rows: NDArray[np.int64], profiles: ProfileSource | None = None) -> ShoeboxBatch:
    """Those rows of a store as one batch."""
    return ShoeboxBatch(
        counts=torch.from_numpy(store.counts(rows)),
        mask=torch.from_numpy(store.mask(rows)),
        xyzcal_px=torch.from_numpy(np.asarray(store.metadata["xyzcal_px"][rows], np.float32)),
        bbox=torch.from_numpy(np.asarray(store.metadata["bbox"][rows], np.int32)),
        box=common_box([store]),
        profile=None if profiles is None else profiles.profiles(rows).float(),
    )


def join_batches(batches: Sequence[ShoeboxBatch]) -> ShoeboxBatch:
    """Batches of the same box one after the other; counts of different types become int32."""
    if len(batches) == 1:
        return batches[0]
    wide = len({b.counts.dtype for b in batches}) > 1
    names = [name for name, value in vars(batches[0]).items() if isinstance(value, Tensor)]
    joined: dict[str, Any] = {
        name: torch.cat([getattr(b, name) for b in batches]) for name in names if name != "counts"
    }
    counts = torch.cat([b.counts.to(torch.int32) if wide else b.counts for b in batches])
    return replace(batches[0], counts=counts, **joined)


def common_box(stores: Sequence[ShoeboxSource]) -> tuple[int, int, int]:
    """The box of all stores.

    Raises:
        InputError: no store, no reflection, boxes of different sizes within or between the stores.
    """
    if not stores or not sum(store.n for store in stores):
        raise InputError("training needs a shoebox store with at least one reflection, got none")
    boxes = {store.box for store in stores}
    box = boxes.pop()
    if box is None or boxes:
        raise InputError(f"stores must have one fixed box, got {[box, *boxes]}; extract with the same --box z,y,x")
    return box


class _Blocks:
    """A store read in whole blocks of rows, the last ones kept: shuffled rows at the price of a sequential read."""

    def __init__(self, store: ShoeboxSource, kept: OrderedDict[tuple[int, int], tuple[NDArray, NDArray]]) -> None:
        self.n, self.box, self.metadata = store.n, store.box, store.metadata
        self._store, self._kept = store, kept

    def _block(self, number: int) -> tuple[NDArray, NDArray]:
        key = (id(self._store), number)
        if key not in self._kept:
            rows = np.arange(number * _BLOCK, min((number + 1) * _BLOCK, self.n))
            self._kept[key] = self._store.counts(rows), self._store.mask(rows)
            if len(self._kept) > 4 * _POOL:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _gather(self, which: int, rows: NDArray[np.int64]) -> NDArray:
        numbers, starts = np.unique(rows // _BLOCK, return_index=True)
        parts = zip(numbers, np.split(rows, starts[1:]))
        return np.concatenate([self._block(number)[which][part - number * _BLOCK] for number, part in parts])

    def counts(self, rows: NDArray[np.int64]) -> NDArray:
        return self._gather(0, rows)

    def mask(self, rows: NDArray[np.int64]) -> NDArray:
        return self._gather(1, rows)


class ShoeboxLoader:
    """Batches of one or several stores in an order that follows from (seed, step) alone.

    Rows are shuffled within pools of nearby blocks and the pools among each other, so that a store larger than memory
    is read nearly in order. A step's rows are split evenly over the processes: together they see one batch.

    Args:
        stores: opened stores of one box; rows are numbered through all of them.
        rows: the rows to draw from, int64 [n].
        batch: reflections a step, over all processes.
        seed: of the order.
        rank: this process.
        world: number of processes.
        profiles: spot shapes, one source a store.
        thin: give the encoder half of the photons, another half in each epoch.
        ahead: batches read ahead of the one in use.
    """

    def __init__(
        self,
        stores: Sequence[ShoeboxSource],
        rows: NDArray[np.int64],
        batch: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        profiles: Sequence[ProfileSource] | None = None,
        thin: bool = False,
        ahead: int = 4,
    ) -> None:
        self.stores = stores
        self.rows = np.sort(np.asarray(rows, np.int64))
        self.batch = min(batch, len(self.rows))
        self.seed, self.rank, self.world, self.ahead = seed, rank, world, ahead
        self.profiles = profiles
        self.thin = thin
        self._first = np.concatenate([[0], np.cumsum([store.n for store in stores])])
        kept: OrderedDict[tuple[int, int], tuple[NDArray, NDArray]] = OrderedDict()
        self._blocks = [_Blocks(store, kept) for store in stores]
        self._order: tuple[int, NDArray[np.int64]] | None = None
        if self.batch < world:
            raise InputError(f"{len(self.rows)} reflections and batch {batch} are too few for {world} processes")

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in one pass; the rest, different in each epoch, waits for another epoch."""
        return len(self.rows) // self.batch

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The rows in the order of that epoch."""
        if self._order is None or self._order[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            blocks = np.split(self.rows, np.flatnonzero(np.diff(self.rows // _BLOCK)) + 1)
            blocks = [blocks[i] for i in rng.permutation(len(blocks))]
            pools = [np.concatenate(blocks[i : i + _POOL]) for i in range(0, len(blocks), _POOL)]
            self._order = epoch, np.concatenate([rng.permutation(pool) for pool in pools])
        return self._order[1]

    def step_rows(self, step: int) -> NDArray[np.int64]:
        """The rows of this process at an optimiser step, ascending."""
        epoch, i = divmod(step, self.steps_per_epoch)
        rows = np.sort(self.order(epoch)[i * self.batch : (i + 1) * self.batch])
        return np.array_split(rows, self.world)[self.rank]

    def read(self, rows: NDArray[np.int64]) -> ShoeboxBatch:
        """Ascending rows, numbered through all stores, as one batch."""
        return self._read(self.stores, rows, 0)

    def read_step(self, step: int) -> ShoeboxBatch:
        """The batch of this process at an optimiser step, the photons split anew in each epoch."""
        return self._read(self._blocks, self.step_rows(step), 1 + step // self.steps_per_epoch)

    def _read(self, stores: Sequence[ShoeboxSource], rows: NDArray[np.int64], split: int) -> ShoeboxBatch:
        parts = []
        for s in np.unique(np.searchsorted(self._first, rows, side="right") - 1):
            begin, end = np.searchsorted(rows, self._first[s : s + 2])
            source = None if self.profiles is None else self.profiles[s]
            parts.append(read_batch(stores[s], rows[begin:end] - self._first[s], source))
        batch = join_batches(parts)
        if self.thin:
            keys = mixed_keys(self.seed, split, rows.astype(np.uint64))
            batch.seen = torch.from_numpy(thin_photons(batch.counts.numpy(), keys))
        return batch

    def steps(self, first: int, last: int) -> Iterator[ShoeboxBatch]:
        """The batches of steps first ... last - 1."""
        return self._ahead(self.read_step, iter(range(first, last)))

    def chunks(self, rows: NDArray[np.int64]) -> Iterator[ShoeboxBatch]:
        """Given ascending rows in order, `batch` at a time."""
        return self._ahead(self.read, (rows[i : i + self.batch] for i in range(0, len(rows), self.batch)))

    def _ahead(self, read: Callable[[Any], ShoeboxBatch], parts: Iterator[Any]) -> Iterator[ShoeboxBatch]:
        with ThreadPoolExecutor(1, thread_name_prefix="shoeboxes") as reader:
            waiting = deque(reader.submit(read, part) for part in islice(parts, self.ahead))
            while waiting:
                ready = waiting.popleft()
                waiting.extend(reader.submit(read, part) for part in islice(parts, 1))
                yield ready.result()


class CachedProfiles:
    """A profile source computed once into a float16 file: reference profiles cost more to map than to read.

    Args:
        source: the source to cache.
        store: the store it belongs to.
        path: of the .npy file; a finished one is used as it is.
    """

    def __init__(self, source: ProfileSource, store: ShoeboxSource, path: Path) -> None:
        from xtalfast.io.files import replacing

        shape = (store.n, int(np.prod(common_box([store]))))
        if not path.is_file():
            with replacing(path) as temporary:
                out = np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
                for start in range(0, store.n, _BLOCK):
                    rows = np.arange(start, min(start + _BLOCK, store.n))
                    out[rows] = source.profiles(rows).numpy()
                out.flush()
        self._values = np.load(path, mmap_mode="r")
        if self._values.shape != shape:
            raise InputError(f"{path}: profiles of {self._values.shape} for a store of {shape}; remove the file")

    def profiles(self, rows: NDArray[np.int64]) -> Tensor:
        """Spot shapes of those rows [B, P] float32."""
        return torch.from_numpy(self._values[rows].astype(np.float32))
