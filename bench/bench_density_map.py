"""Densities, and whole training examples made of them, against gemmi on one thread: a 15-residue fragment's worth."""

from __future__ import annotations

import gemmi
import numpy as np
import pytest
import torch

from xtalfast.ops import density_map, map_from_structure_factors, patterson_map, structure_factors

N_ATOMS = 118  # the median fragment, its cell and its grid
CELL = (17.4, 21.5, 27.2, 100.0, 110.0, 95.0)
GRID = (36, 48, 60)
D_MIN = 1.5


def model(b_iso: float | None):
    """Random atoms in protein proportions: as arguments of `density_map`, and as a gemmi structure."""
    rng = np.random.default_rng(0)
    structure = gemmi.Structure()
    structure.cell, structure.spacegroup_hm = gemmi.UnitCell(*CELL), "P 1"
    residue = gemmi.Residue()
    for symbol in rng.choice(["C", "N", "O", "S"], N_ATOMS, p=[0.62, 0.17, 0.2, 0.01]):
        atom = gemmi.Atom()
        atom.element = gemmi.Element(symbol)
        atom.pos = structure.cell.orthogonalize(gemmi.Fractional(*rng.uniform(0, 1, 3)))
        atom.b_iso = b_iso if b_iso is not None else rng.uniform(10, 60)
        residue.add_atom(atom)
    chain, first = gemmi.Chain("A"), gemmi.Model("1")
    chain.add_residue(residue)
    first.add_chain(chain)
    structure.add_model(first)
    atoms = list(structure[0][0][0])
    return structure, (
        torch.tensor([atom.pos.tolist() for atom in atoms], dtype=torch.float32),
        torch.tensor([atom.element.atomic_number for atom in atoms]),
        torch.tensor([atom.b_iso for atom in atoms], dtype=torch.float32),
        torch.ones(N_ATOMS),
        torch.tensor([0, N_ATOMS]),
        torch.tensor([CELL], dtype=torch.float64),
        GRID,
    )


def gemmi_calculator(structure: gemmi.Structure) -> gemmi.DensityCalculatorX:
    calculator = gemmi.DensityCalculatorX()
    calculator.cutoff = 1e-5
    calculator.set_grid_cell_and_spacegroup(structure)
    calculator.grid.set_size(*GRID)
    return calculator


@pytest.mark.parametrize("b_iso", [20.0, None], ids=["one-B", "own-B"])
def test_density(paired, b_iso):
    structure, arguments = model(b_iso)
    calculator = gemmi_calculator(structure)

    def theirs():
        calculator.grid.fill(0)
        calculator.add_model_density_to_grid(structure[0])
        return np.array(calculator.grid, copy=False)

    difference = density_map(*arguments)[0].numpy() - theirs()
    assert np.sqrt(np.mean(difference**2)) < 1e-4 * theirs().std()
    paired(lambda: density_map(*arguments), theirs, at_least=2.0)


def test_whole_example(paired):
    """Atoms -> density -> F to 1.5 A without F000 -> density and Patterson map, one example a call."""
    structure, arguments = model(20.0)
    calculator = gemmi_calculator(structure)
    cells = arguments[5]

    def ours():
        f = structure_factors(density_map(*arguments), cells, d_min=D_MIN, f000=False)
        return map_from_structure_factors(f, cells), patterson_map(f, cells, d_min=D_MIN)

    def theirs():
        calculator.grid.fill(0)
        calculator.add_model_density_to_grid(structure[0])
        f = gemmi.transform_map_to_f_phi(calculator.grid, half_l=True).prepare_asu_data(dmin=D_MIN)
        density = f.transform_f_phi_to_map(exact_size=GRID)
        values = f.value_array
        values[:] = np.abs(values) ** 2
        return np.array(density, copy=False), np.array(f.transform_f_phi_to_map(exact_size=GRID), copy=False)

    for mine, other in zip(ours(), theirs()):
        assert np.sqrt(np.mean((mine[0].numpy() - other) ** 2)) < 1e-4 * other.std()
    paired(ours, theirs, at_least=3.0)


def test_gradient(paired):
    """Density and the gradient of a loss to the atoms, against the density alone by gemmi, which has no gradient."""
    structure, arguments = model(20.0)
    calculator = gemmi_calculator(structure)
    coords = arguments[0].requires_grad_()

    def ours():
        return torch.autograd.grad(density_map(coords, *arguments[1:]).square().sum(), coords)

    paired(ours, lambda: calculator.add_model_density_to_grid(structure[0]))
