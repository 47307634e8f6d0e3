"""Training examples as the loader makes them, newly turned and in a new cell, against gemmi and scipy, one thread."""

from __future__ import annotations

import itertools

import gemmi
import numpy as np
import pytest
from scipy.spatial import cKDTree

from xtalfast.density import cells
from xtalfast.density.conformers import element_of
from xtalfast.density.dataset import Augmentation, ExampleDataset
from xtalfast.density.scale import PAPER_SCALE
from xtalfast.density.store import Fragment, FragmentStore

N_RESIDUES, N_FRAGMENTS, D_MIN = 15, 4, 1.5


def walk(rng: np.random.Generator, n: int) -> np.ndarray:
    """n points as dense as protein: a random walk that keeps its distance from itself, compact."""
    points = [np.zeros(3)]
    while len(points) < n:
        step = rng.normal(size=3)
        trial = points[rng.integers(len(points))] + 1.5 * step / np.linalg.norm(step)
        if np.linalg.norm(trial / [5.0, 6.0, 8.0]) < 1 and min(np.linalg.norm(trial - p) for p in points) > 1.3:
            points.append(trial)
    return np.array(points)


@pytest.fixture(scope="module")
def store() -> FragmentStore:
    """Fragments of alanine to tryptophan in a tight cell, atoms anywhere within an ellipsoid."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(N_FRAGMENTS):
        ids = rng.integers(0, 20, N_RESIDUES).astype(np.uint8)
        element = element_of(ids)
        placed = cells.tight_cell(walk(rng, len(element)), element.astype(float), np.full(3, 90.0))
        assert placed is not None
        b_iso = np.full(len(element), 20, np.float32)
        coords = placed.coords.astype(np.float32)
        made.append(Fragment(f"1ABC_1.pd_{i + 1}", "1ABC", coords, element, b_iso, ids, placed.cell))
    return FragmentStore.from_fragments(made, N_RESIDUES)


def scipy_cell(coords: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """The cell of `tight_cell`, by neighbour search in trees."""
    extents, directions = np.ptp(coords, axis=0), cells.orthogonalization([1, 1, 1, *angles])
    half = [n for n in itertools.product((-1, 0, 1), repeat=3) if n > (0, 0, 0)]
    tree = cKDTree(coords)
    for growth in np.arange(0.5, 25, 0.5):
        orth = directions * (extents + growth)
        moved = (coords[None] + (np.array(half) @ orth.T)[:, None]).reshape(-1, 3)
        if not np.isfinite(tree.query(moved, distance_upper_bound=cells.MIN_CONTACT)[0]).any():
            return np.concatenate([extents + growth, angles])
    raise AssertionError("no cell")


def test_cell(paired, store):
    rng = np.random.default_rng(1)
    fragment = store[0]
    coords = fragment.coords.astype(float) @ cells.random_rotation(rng).T
    angles, mass = np.array([100.0, 90.0, 110.0]), fragment.element.astype(float)
    placed = cells.tight_cell(coords, mass, angles)
    assert placed is not None and np.sort(scipy_cell(coords, angles)[:3]) == pytest.approx(placed.cell[:3])
    paired(lambda: cells.tight_cell(coords, mass, angles), lambda: scipy_cell(coords, angles), at_least=3.0)


def test_examples(paired, store):
    """Plan and maps of a few fragments: the goal of 250 a second and core is 4 ms each, gemmi's density alone is 5."""
    dataset = ExampleDataset(store, PAPER_SCALE, Augmentation(rotate=True))
    plan = dataset.plan(0)

    def ours():
        now = dataset.plan(0)
        for row in range(N_FRAGMENTS):
            dataset[dataset.request(np.array([row]), now)]

    def gemmi_maps(coords: np.ndarray, element: np.ndarray, cell: np.ndarray, grid: tuple[int, int, int]):
        residue = gemmi.Residue()
        for xyz, number in zip(coords.tolist(), element.tolist()):
            atom = gemmi.Atom()
            atom.element, atom.pos, atom.b_iso = gemmi.Element(number), gemmi.Position(*xyz), 20.0
            residue.add_atom(atom)
        chain, model = gemmi.Chain("A"), gemmi.Model(1)
        chain.add_residue(residue)
        model.add_chain(chain)
        calculator = gemmi.DensityCalculatorX()
        calculator.cutoff = 1e-5
        calculator.grid.set_unit_cell(gemmi.UnitCell(*cell.tolist()))
        calculator.grid.spacegroup = gemmi.SpaceGroup("P 1")
        calculator.grid.set_size(*grid)
        calculator.add_model_density_to_grid(model)
        f = gemmi.transform_map_to_f_phi(calculator.grid, half_l=True).prepare_asu_data(dmin=D_MIN)
        density = np.array(f.transform_f_phi_to_map(exact_size=grid))
        values = f.value_array
        values[:] = np.abs(values) ** 2
        return density, np.array(f.transform_f_phi_to_map(exact_size=grid))

    def theirs():
        rng = np.random.default_rng(0)
        for row in range(N_FRAGMENTS):
            fragment = store[row]
            coords = fragment.coords.astype(float) @ cells.random_rotation(rng).T
            scipy_cell(coords, cells.draw_angles(rng)[0])
            gemmi_maps(coords, fragment.element, plan.cells[row], tuple(plan.grids[row].tolist()))

    paired(ours, theirs, at_least=2.0, rounds=15)
