"""Training examples made on the fly from a fragment store: batches of one grid, nothing but coordinates on disk.

    fragments = FragmentSet.open("set")
    dataset = ExampleDataset(fragments["train"], fragments.scale, Augmentation(rotate=True))
    loader = DataLoader(dataset, sampler=GridBatches(dataset, 40), batch_size=None, num_workers=4)
    for batch in loader: ...  # batch.patterson, batch.density [B, X, Y, Z], batch.residue_ids [B, R], batch.cells

Everything random is drawn from (seed, epoch, fragment id): the same whatever the batches, workers or ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from xtalfast.density.cells import MIN_CONTACT, draw_angles, orthogonalization, random_rotation, tight_cell
from xtalfast.density.fragments import random_source
from xtalfast.density.grids import grid_size
from xtalfast.density.maps import (
    B_STANDARD,
    D_MIN,
    RATE,
    AtomBatch,
    atoms_of_rows,
    inverse_d2,
    maps_of_spectrum,
    spectrum_of_atoms,
)
from xtalfast.density.scale import MapScale, count_outside
from xtalfast.density.store import FragmentStore
from xtalfast.errors import InputError

Range = tuple[float, float]
_CACHED_VOXELS = 1 << 18
_PLACE, _CHANGE = 0, 1  # streams of random numbers: what the grid depends on, and the rest


@dataclass(frozen=True)
class Augmentation:
    """What is varied from one look at a fragment to the next; ranges are uniform, equal ends fix a value.

    Attributes:
        rotate: a new orientation and new cell angles, so a new cell: a new example in every epoch.
        origin: move the molecule to a random place in its cell; the Patterson does not change.
        b_iso: overall B, A^2; None keeps the deposited B factors.
        d_min: resolution of density and Patterson, A.
        rate: grid points per d_min.
        noise: relative error of measured amplitudes, standard deviation.
        missing: part of the reflections not measured, at random.
        missing_low: reflections with d above this are not measured, A; None measures all.
        data_d_min: resolution of the measured amplitudes where it is worse than d_min, A; None for equal.
    """

    rotate: bool = False
    origin: bool = False
    b_iso: Range | None = (B_STANDARD, B_STANDARD)
    d_min: Range = (D_MIN, D_MIN)
    rate: Range = (RATE, RATE)
    noise: Range = (0.0, 0.0)
    missing: Range = (0.0, 0.0)
    missing_low: Range | None = None
    data_d_min: Range | None = None

    def __post_init__(self) -> None:
        limits = {"b_iso": (0, 500), "d_min": (0.5, 20), "rate": (2.0, 10), "noise": (0, 1), "missing": (0, 0.99)}
        limits |= {"missing_low": (1, 1e4), "data_d_min": (0.5, 20)}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, bool) or value is None:
                continue
            low, high = limits[item.name]
            if len(value) != 2 or not low <= value[0] <= value[1] <= high:
                raise InputError(f"{item.name} must be (from, to) within {low:g} to {high:g}, got {value}")

    @classmethod
    def paper_variable(cls) -> Augmentation:
        """The density paper's second data set: d_min 1.6 to 2.25 A, 2.305 to 2.745 grid points per d_min."""
        return cls(d_min=(1.6, 2.25), rate=(2.305, 2.745))

    @property
    def changes_data(self) -> bool:
        """Whether measured amplitudes differ from the true ones."""
        return self.noise[1] > 0 or self.missing[1] > 0 or self.missing_low is not None or self.data_d_min is not None


@dataclass(frozen=True)
class Request:
    """One batch to be made: fragments that share a grid, and how each lies in its cell.

    Attributes:
        epoch: what random numbers are drawn from.
        rows: in the store [B].
        grid: X, Y, Z.
        cells: [B, 6].
        rotations: proper rotations from the stored coordinates, about the centre of mass, [B, 3, 3].
        d_min: A, [B].
    """

    epoch: int
    rows: NDArray[np.int64]
    grid: tuple[int, int, int]
    cells: NDArray[np.float64]
    rotations: NDArray[np.float64]
    d_min: NDArray[np.float64]

    def part(self, rows: slice) -> Request:
        """The same for some of its rows."""
        return Request(self.epoch, self.rows[rows], self.grid, self.cells[rows], self.rotations[rows], self.d_min[rows])


@dataclass
class ExampleBatch:
    """A batch of examples; maps are scaled to about [-1, 1].

    Attributes:
        patterson: network input, float32 [B, X, Y, Z], origin at the cell's corner.
        density: what is to be found, float32 [B, X, Y, Z].
        residue_ids: places in `conformers.RESIDUES`, int64 [B, R].
        cells: A and deg, float64 [B, 6].
        d_min: A, float64 [B].
        rows: in the store, int64 [B].
        outside: voxels of both maps beyond [-1, 1].
    """

    patterson: Tensor
    density: Tensor
    residue_ids: Tensor
    cells: Tensor
    d_min: Tensor
    rows: Tensor
    outside: int

    def _apply(self, change) -> ExampleBatch:
        moved = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ExampleBatch:
        return self._apply(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ExampleBatch:
        return self._apply(Tensor.pin_memory)


@dataclass(frozen=True)
class Plan:
    """How every fragment is looked at in one epoch: cells, rotations, resolutions and grids [N, ...]."""

    cells: NDArray[np.float64]
    rotations: NDArray[np.float64]
    d_min: NDArray[np.float64]
    grids: NDArray[np.int64]


class ExampleDataset(Dataset[ExampleBatch]):
    """Makes the batch a `Request` describes.

    Args:
        store: fragments.
        scale: of the training set.
        augmentation: none when not given.
        multiple: of the grid sizes, 4, or 8 for fewer different grids.
        paper_grids: the paper's grid sizes; patches of 4 do not tile them.
        device: where maps are made. On a GPU nothing but coordinates crosses the bus.
        seed: of everything random.
    """

    def __init__(
        self,
        store: FragmentStore,
        scale: MapScale,
        augmentation: Augmentation | None = None,
        *,
        multiple: int = 4,
        paper_grids: bool = False,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        if len(store) == 0:
            raise InputError("no fragment to make examples of; the split is empty")
        if multiple not in (2, 4, 8, 16):
            raise InputError(f"multiple must be 2, 4, 8 or 16, got {multiple}")
        self.store, self.scale = store, scale
        self.augmentation = augmentation or Augmentation()
        self.multiple, self.paper_grids = multiple, paper_grids
        self.device, self.seed = torch.device(device), seed

    def __len__(self) -> int:
        return len(self.store)

    def _random(self, row: int, epoch: int, stream: int) -> np.random.Generator:
        return random_source(self.seed, self.store.id(row), epoch, stream)

    def plan(self, epoch: int = 0) -> Plan:
        """Cells, orientations, resolutions and grids of all fragments in an epoch (about 2 ms each with `rotate`)."""
        n, augmentation = len(self.store), self.augmentation
        cells = np.array(self.store.arrays["cells"])
        rotations = np.broadcast_to(np.eye(3), (n, 3, 3)).copy()
        d_min, rate = np.full(n, augmentation.d_min[0]), np.full(n, augmentation.rate[0])
        fixed = np.ptp(augmentation.d_min) == 0 and np.ptp(augmentation.rate) == 0
        if augmentation.rotate or not fixed:
            for row in range(n):
                rng = self._random(row, epoch, _PLACE)
                d_min[row], rate[row] = rng.uniform(*augmentation.d_min), rng.uniform(*augmentation.rate)
                if augmentation.rotate:
                    cells[row], rotations[row] = self._new_cell(row, rng)
        grids = grid_size(cells, d_min, rate=rate, multiple=self.multiple, paper=self.paper_grids)
        return Plan(cells, rotations, d_min, grids)

    def _new_cell(self, row: int, rng: np.random.Generator) -> tuple[NDArray, NDArray]:
        """A random orientation and the cell it gets; the stored ones in the rare case that no cell is found."""
        atoms = slice(*self.store.arrays["ptr"][row : row + 2].tolist())
        coords = np.asarray(self.store.arrays["coords"][atoms], float)
        mass = self.store.arrays["element"][atoms].astype(float)
        turn = random_rotation(rng)
        placement = tight_cell(coords @ turn.T, mass, draw_angles(rng)[0], min_contact=MIN_CONTACT)
        if placement is None:
            return self.store.arrays["cells"][row], np.eye(3)
        return placement.cell, placement.rotation @ turn

    def request(self, rows: NDArray[np.int64], plan: Plan, epoch: int = 0) -> Request:
        """The batch of fragments `rows`, which must share a grid."""
        sizes = np.unique(plan.grids[rows], axis=0)
        if len(sizes) != 1:
            raise ValueError(f"rows of one batch must share a grid, got {len(sizes)} grids")
        x, y, z = sizes[0].tolist()
        return Request(epoch, rows, (x, y, z), plan.cells[rows], plan.rotations[rows], plan.d_min[rows])

    def __getitem__(self, request: Request) -> ExampleBatch:
        n = len(request.rows)
        # On a CPU a few maps at a time stay in its cache, which is worth more than large transforms.
        step = n if self.device.type != "cpu" else max(1, _CACHED_VOXELS // math.prod(request.grid))
        patterson = torch.empty(n, *request.grid, device=self.device)
        density = torch.empty_like(patterson)
        outside = 0
        for start in range(0, n, step):
            part = slice(start, start + step)
            made = self._maps(request.part(part))
            for values, scale, out in zip(made, (self.scale.patterson, self.scale.density), (patterson, density)):
                values /= scale
                outside += count_outside(values)
                out[part] = values
        return ExampleBatch(
            patterson,
            density,
            torch.from_numpy(self.store.arrays["residue_ids"][request.rows].astype(np.int64)).to(self.device),
            torch.from_numpy(request.cells).to(self.device),
            torch.from_numpy(request.d_min).to(self.device),
            torch.from_numpy(request.rows).to(self.device),
            outside,
        )

    def _maps(self, request: Request) -> tuple[Tensor, Tensor]:
        """(Patterson, density) [B, X, Y, Z] of a request, not yet scaled."""
        augmentation, rows = self.augmentation, request.rows
        generators = [self._random(row, request.epoch, _CHANGE) for row in rows.tolist()]
        atoms = self._atoms(request, generators)
        one_limit = np.ptp(request.d_min) == 0
        f = spectrum_of_atoms(*atoms, request.grid, float(request.d_min[0]) if one_limit else None)
        if one_limit and not augmentation.changes_data:
            return maps_of_spectrum(f, atoms.cells)
        s2 = inverse_d2(atoms.cells, request.grid)
        if not one_limit:
            limit = torch.from_numpy(request.d_min).to(self.device) ** -2
            f = f * (s2 <= limit.view(-1, 1, 1, 1))
        measured = f * self._errors(s2, generators).to(f.real.dtype) if augmentation.changes_data else None
        return maps_of_spectrum(f, atoms.cells, measured)

    def _atoms(self, request: Request, generators: list[np.random.Generator]) -> AtomBatch:
        """The atoms as they lie in this request, on the device."""
        rows, b_iso = request.rows, self.augmentation.b_iso
        atoms = atoms_of_rows(self.store, rows, b_iso=None if b_iso is None else B_STANDARD)
        lengths = torch.diff(atoms.ptr)
        places = np.full((len(rows), 3), 0.5)
        if self.augmentation.origin:
            places = np.stack([rng.uniform(size=3) for rng in generators])
        if b_iso is not None and b_iso != (B_STANDARD, B_STANDARD):
            drawn = torch.tensor([rng.uniform(*b_iso) for rng in generators], dtype=atoms.coords.dtype)
            atoms = atoms._replace(b_iso=drawn.repeat_interleave(lengths))
        old = orthogonalization(self.store.arrays["cells"][rows]) @ np.full(3, 0.5)
        new = np.einsum("bij,bj->bi", orthogonalization(request.cells), places)

        def per_atom(values: NDArray) -> Tensor:
            return torch.from_numpy(values.astype(np.float32)).repeat_interleave(lengths, 0)

        coords = torch.einsum("mij,mj->mi", per_atom(request.rotations), atoms.coords - per_atom(old)) + per_atom(new)
        atoms = atoms._replace(coords=coords, cells=torch.from_numpy(request.cells))
        return AtomBatch(*(tensor.to(self.device) for tensor in atoms))

    def _errors(self, s2: Tensor, generators: list[np.random.Generator]) -> Tensor:
        """What each true amplitude is multiplied with to become a measured one; 0 where nothing was measured."""
        augmentation = self.augmentation
        factor = torch.ones_like(s2)
        for i, rng in enumerate(generators):
            noise, missing = rng.uniform(*augmentation.noise), rng.uniform(*augmentation.missing)
            source = torch.Generator(self.device).manual_seed(int(rng.integers(2**62)))
            if noise:
                normal = torch.randn(s2.shape[1:], generator=source, dtype=s2.dtype, device=self.device)
                factor[i] = (1 + noise * normal).abs()
            if missing:
                uniform = torch.rand(s2.shape[1:], generator=source, dtype=s2.dtype, device=self.device)
                factor[i] *= uniform >= missing
            if augmentation.missing_low is not None:
                factor[i] *= s2[i] >= rng.uniform(*augmentation.missing_low) ** -2
            if augmentation.data_d_min is not None:
                factor[i] *= s2[i] <= rng.uniform(*augmentation.data_d_min) ** -2
        # The plane l = 0 holds Friedel mates, which are measured as one: the first of each pair counts.
        plane = factor[..., 0]
        mates = plane.flip((1, 2)).roll((1, 1), (1, 2))
        n_x, n_y = plane.shape[1:]
        number = torch.arange(n_x * n_y, device=self.device).view(n_x, n_y)
        first = number <= number.flip((0, 1)).roll((1, 1), (0, 1))
        factor[..., 0] = torch.where(first, plane, mates)
        return factor


class GridBatches(Sampler[Request]):
    """Batches of fragments that share a grid, in random order, for `DataLoader(dataset, sampler=..., batch_size=None)`.

    Every rank gets the same number of batches; together they are one pass over the fragments (a few batches twice when
    the number does not divide). Call `set_epoch` before each epoch.

    Args:
        dataset: what the requests are for.
        batch_size: examples in a batch, at most.
        min_batch: smaller batches are left out, as the paper does; 1 keeps every example.
        max_voxels: of a batch; larger grids come in smaller batches, down to min_batch examples.
        shuffle: random order and random batches.
        rank, world_size: of this process.
    """

    def __init__(
        self,
        dataset: ExampleDataset,
        batch_size: int,
        *,
        min_batch: int = 1,
        max_voxels: int | None = None,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 1 <= min_batch <= batch_size:
            raise InputError(f"wanted 1 <= min_batch <= batch_size, got {min_batch} and {batch_size}")
        if not 0 <= rank < world_size:
            raise InputError(f"rank must be 0 to {world_size - 1}, got {rank}")
        self.dataset, self.batch_size, self.min_batch, self.shuffle = dataset, batch_size, min_batch, shuffle
        self.max_voxels = max_voxels
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self._made: tuple[int, Plan, list[NDArray[np.int64]]] | None = None

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def whole(self) -> tuple[Plan, list[NDArray[np.int64]]]:
        """The plan of this epoch and the rows of all its batches, the same on every rank."""
        if self._made is None or self._made[0] != self.epoch:
            plan = self.dataset.plan(self.epoch)
            rng = np.random.default_rng([self.dataset.seed, self.epoch])
            rows = rng.permutation(len(self.dataset)) if self.shuffle else np.arange(len(self.dataset))
            grids = plan.grids[rows]
            order = np.lexsort(grids.T)  # stable: rows of one grid stay shuffled
            changes = np.flatnonzero((np.diff(grids[order], axis=0) != 0).any(axis=1)) + 1
            batches = []
            for run in np.split(rows[order], changes):
                size = self.batch_size
                if self.max_voxels is not None:
                    size = min(size, max(self.min_batch, self.max_voxels // int(plan.grids[run[0]].prod())))
                batches += np.split(run, range(size, len(run), size))
            batches = [batch for batch in batches if len(batch) >= self.min_batch]
            if self.shuffle:
                batches = [batches[i] for i in rng.permutation(len(batches))]
            self._made = self.epoch, plan, batches
        return self._made[1], self._made[2]

    def __len__(self) -> int:
        return math.ceil(len(self.whole()[1]) / self.world_size)

    def __iter__(self) -> Iterator[Request]:
        plan, batches = self.whole()
        for i in range(len(self)):
            rows = batches[(i * self.world_size + self.rank) % len(batches)]
            yield self.dataset.request(rows, plan, self.epoch)
