"""density_map against its definition, gemmi, finite differences, and what a user may hand it."""

import gemmi
import numpy as np
import pytest
import torch

from xtalfast import _native
from xtalfast.ops import density_map, it92_form_factors
from xtalfast.ops.density_map import density_map_reference
from xtalfast.testing import assert_within_twin_error

CELLS = {
    "orthogonal": (9.0, 10.5, 12.0, 90.0, 90.0, 90.0),
    "triclinic": (9.0, 10.5, 12.0, 100.0, 110.0, 95.0),
    "acute": (9.0, 10.5, 12.0, 60.0, 70.0, 80.0),
    "hexagonal": (11.0, 11.0, 9.0, 90.0, 90.0, 120.0),
    "smaller than an atom": (4.0, 5.0, 3.5, 100.0, 95.0, 105.0),
}
GRID = (18, 21, 24)
cells_by_name = pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)


def make_atoms(n, cell, *, b=(5.0, 60.0), seed=0, dtype=torch.float64):
    """coords, element, b_iso, occupancy of n atoms in and around the cell."""
    rng = np.random.default_rng(seed)
    unit_cell = gemmi.UnitCell(*cell)
    fractional = rng.uniform(-0.5, 1.5, (n, 3))
    coords = [unit_cell.orthogonalize(gemmi.Fractional(*f)).tolist() for f in fractional]
    element = rng.choice([6, 7, 8, 16, 26], n, p=[0.5, 0.2, 0.2, 0.05, 0.05])
    return (
        torch.tensor(coords, dtype=dtype).reshape(n, 3),
        torch.tensor(element),
        torch.tensor(rng.uniform(*b, n), dtype=dtype),
        torch.tensor(rng.uniform(0.2, 1.0, n), dtype=dtype),
    )


def to_float64(atoms):
    return tuple(values.double() if values.is_floating_point() else values for values in atoms)


def as_maps(atoms, cell, grid=GRID):
    return (*atoms, torch.tensor([0, len(atoms[0])]), torch.tensor([cell], dtype=torch.float64), grid)


def reference(atoms, cell, grid=GRID, cutoff=1e-5, blur=0.0):
    *tensors, ptr, cells, _ = as_maps(atoms, cell, grid)
    return density_map_reference(*tensors, ptr, cells, list(grid), it92_form_factors(), cutoff, blur).view(1, *grid)


def gemmi_model(atoms, cell, space_group="P 1"):
    structure = gemmi.Structure()
    structure.cell, structure.spacegroup_hm = gemmi.UnitCell(*cell), space_group
    residue = gemmi.Residue()
    for xyz, element, b_iso, occupancy in zip(*(values.tolist() for values in atoms)):
        atom = gemmi.Atom()
        atom.element, atom.pos = gemmi.Element(element), gemmi.Position(*xyz)
        atom.b_iso, atom.occ = b_iso, occupancy
        residue.add_atom(atom)
    chain, model = gemmi.Chain("A"), gemmi.Model("1")
    chain.add_residue(residue)
    model.add_chain(chain)
    structure.add_model(model)
    structure.setup_cell_images()
    return structure


def gemmi_density(structure, grid, blur=0.0):
    calculator = gemmi.DensityCalculatorX()
    calculator.blur, calculator.cutoff = blur, 1e-5
    calculator.set_grid_cell_and_spacegroup(structure)
    calculator.grid.set_size(*grid)
    calculator.add_model_density_to_grid(structure[0])
    calculator.grid.symmetrize_sum()
    return np.array(calculator.grid, copy=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("b", [(0.5, 4.0), (8.0, 14.0), (20.0, 90.0)], ids=["sharp", "middle", "smooth"])
@cells_by_name
def test_matches_reference(cell, b, dtype):
    """B from 0.5 to 90 takes every route of the CPU kernel: five exponentials, polynomials of degree 27 and 23."""
    narrow = make_atoms(6, cell, b=b, dtype=dtype)
    exact = reference(to_float64(narrow), cell)
    # A point of the grid at the very edge of an atom may fall on either side of it, which is worth the cutoff.
    terms = exact.max() + 1e-5 / torch.finfo(dtype).eps
    assert_within_twin_error(density_map(*as_maps(narrow, cell)), reference(narrow, cell), exact, terms)


@pytest.mark.parametrize("blur", [0.0, 10.0])
@pytest.mark.parametrize("cell", list(CELLS.values())[:-1], ids=list(CELLS)[:-1])
def test_matches_gemmi(cell, blur):
    """The rest is gemmi's own single precision, whose exponential is good to about 1e-5 of the highest density.

    In a cell smaller than an atom gemmi leaves out the second images, which the reference does not.
    """
    atoms = make_atoms(60, cell, b=(20.0, 20.0))
    theirs = gemmi_density(gemmi_model(atoms, cell), GRID, blur)
    ours = density_map(*as_maps(atoms, cell), blur=blur)[0].numpy()
    difference = ours - theirs
    assert np.sqrt(np.mean(difference**2)) < 1e-4 * theirs.std()
    assert np.abs(difference).max() < 1e-5 * theirs.max()


def test_form_factors_are_those_of_gemmi():
    table = it92_form_factors()
    for z in (1, 6, 7, 8, 16, 34, 98):
        for s2 in (0.0, 0.04, 0.3):
            mine = float((table[z, :5] * torch.exp(-table[z, 5:] * s2 / 4)).sum())
            assert mine == pytest.approx(gemmi.Element(z).it92.calculate_sf(s2 / 4), rel=1e-6)


def test_expanding_a_structure_to_p1_gives_the_density_of_its_space_group():
    cell = (12.0, 13.0, 14.0, 90.0, 90.0, 90.0)
    atoms = make_atoms(10, cell, b=(20.0, 20.0))
    group, unit_cell = gemmi.SpaceGroup("P 21 21 21"), gemmi.UnitCell(*cell)
    coords = []
    for op in group.operations():
        for xyz in atoms[0].tolist():
            image = op.apply_to_xyz(unit_cell.fractionalize(gemmi.Position(*xyz)).tolist())
            coords.append(unit_cell.orthogonalize(gemmi.Fractional(*image)).tolist())
    expanded = (torch.tensor(coords, dtype=torch.float64), *(values.repeat(4) for values in atoms[1:]))
    theirs = gemmi_density(gemmi_model(atoms, cell, "P 21 21 21"), (24, 24, 28))
    ours = density_map(*as_maps(expanded, cell, (24, 24, 28)))[0].numpy()
    assert np.sqrt(np.mean((ours - theirs) ** 2)) < 1e-4 * theirs.std()


def test_the_cell_holds_the_electrons_of_its_atoms():
    cell = CELLS["triclinic"]
    atoms = make_atoms(20, cell, b=(20.0, 40.0))
    density = density_map(*as_maps(atoms, cell, (36, 40, 48)), cutoff=1e-9)
    electrons = float((atoms[3] * it92_form_factors()[atoms[1], :5].sum(1)).sum())
    assert float(density.mean()) * gemmi.UnitCell(*cell).volume == pytest.approx(electrons, rel=1e-6)


def test_atoms_moved_by_lattice_vectors_give_the_same_density():
    cell = CELLS["acute"]
    atoms = make_atoms(10, cell)
    shift = torch.tensor(gemmi.UnitCell(*cell).orthogonalize(gemmi.Fractional(3, -2, 5)).tolist())
    moved = (atoms[0] + shift, *atoms[1:])
    one, other = density_map(*as_maps(atoms, cell)), density_map(*as_maps(moved, cell))
    assert (one - other).abs().max() < 2e-5  # rounding may move points at the edge of an atom over it


def test_maps_of_a_batch_do_not_see_each_other():
    names = list(CELLS)
    models = [make_atoms(n, CELLS[name], seed=n) for n, name in zip((7, 0, 12, 3), names)]
    grids = [(16, 18, 20), (12, 12, 12), (18, 20, 16), (15, 17, 13)]
    atoms = [torch.cat(values) for values in zip(*models)]
    ptr = torch.tensor([0, 7, 7, 19, 22])
    cells = torch.tensor([CELLS[name] for name in names[:4]], dtype=torch.float64)
    maps = density_map(*atoms, ptr, cells, grids)
    assert isinstance(maps, list)
    for one, model, name, grid in zip(maps, models, names, grids):
        assert torch.equal(one, density_map(*as_maps(model, CELLS[name], grid))[0])
    assert not maps[1].any()
    equal = density_map(*atoms, ptr, cells, torch.tensor([[16, 18, 20]] * 4))
    assert isinstance(equal, torch.Tensor) and equal.shape == (4, 16, 18, 20)


def test_the_number_of_threads_changes_no_bit():
    atoms = make_atoms(40, CELLS["triclinic"], dtype=torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for n in (1, 4):
            torch.set_num_threads(n)
            coords = atoms[0].clone().requires_grad_()
            density = density_map(*as_maps((coords, *atoms[1:]), CELLS["triclinic"]))
            results.append((density.detach(), *torch.autograd.grad((density**2).sum(), coords)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results))


@pytest.mark.parametrize("n_atoms, n_maps", [(0, 1), (0, 0), (1, 1)])
def test_few_atoms_and_few_maps(n_atoms, n_maps):
    atoms = [values.requires_grad_(values.is_floating_point()) for values in make_atoms(n_atoms, CELLS["acute"])]
    ptr = torch.full((n_maps + 1,), n_atoms)
    ptr[0] = 0
    cells = torch.tensor([CELLS["acute"]] * n_maps, dtype=torch.float64).reshape(n_maps, 6)
    density = density_map(*atoms, ptr, cells, (1, 2, 3))
    assert density.shape == (n_maps, 1, 2, 3)
    density.sum().backward()
    assert atoms[0].grad.shape == (n_atoms, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@cells_by_name
def test_gradients_match_those_of_the_reference(cell, dtype):
    weights = torch.rand(1, *GRID, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    rounded = make_atoms(8, cell, dtype=dtype)

    def gradients(function, dtype):
        atoms = [values.to(dtype) if values.is_floating_point() else values for values in rounded]
        leaves = [atoms[i].requires_grad_() for i in (0, 2, 3)]
        return torch.autograd.grad((function(atoms) * weights.to(dtype)).sum(), leaves)

    exact = gradients(lambda atoms: reference(atoms, cell), torch.float64)
    twin = gradients(lambda atoms: reference(atoms, cell), dtype)
    ours = gradients(lambda atoms: density_map(*as_maps(atoms, cell)), dtype)
    for mine, theirs, true in zip(ours, twin, exact):
        terms = true.abs().max() * 10 + 1e-5 / torch.finfo(dtype).eps  # the edge of an atom again
        assert_within_twin_error(mine, theirs, true, terms)


def test_gradcheck():
    cell, grid = CELLS["triclinic"], (6, 7, 8)
    coords, element, b_iso, occupancy = make_atoms(3, cell, b=(15.0, 40.0))
    *_, ptr, cells, _ = as_maps((coords, element, b_iso, occupancy), cell)

    def function(coords, b_iso, occupancy):  # a cutoff so low that leaving the last points out changes nothing
        return density_map(coords, element, b_iso, occupancy, ptr, cells, grid, cutoff=1e-13)

    assert torch.autograd.gradcheck(function, [v.requires_grad_() for v in (coords, b_iso, occupancy)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_opcheck(dtype):
    *atoms, ptr, cells, grid = as_maps(make_atoms(3, CELLS["acute"], dtype=dtype), CELLS["acute"], (6, 8, 10))
    atoms = [values.requires_grad_(values.is_floating_point()) for values in atoms]
    arguments = (*atoms, ptr, cells, list(grid), it92_form_factors(), 1e-5, 0.0)
    torch.library.opcheck(torch.ops.xtalfast.density_map.default, arguments)
    grad = torch.rand(480, dtype=dtype)
    detached = [value.detach() if isinstance(value, torch.Tensor) else value for value in arguments]
    torch.library.opcheck(torch.ops.xtalfast.density_map_backward.default, (grad, *detached))


def test_compiles_without_a_break():
    *atoms, ptr, cells, grid = as_maps(make_atoms(5, CELLS["acute"]), CELLS["acute"])

    def loss(coords):
        return (density_map(coords, *atoms[1:], ptr, cells, grid) ** 2).sum()

    coords = atoms[0].requires_grad_()
    (eager,) = torch.autograd.grad(loss(coords), coords)
    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(coords), coords)
    assert torch.equal(eager, compiled)


def test_works_without_the_extension(monkeypatch):
    atoms = make_atoms(4, CELLS["acute"])
    results = []
    for extension in (_native.C, None):
        monkeypatch.setattr(_native, "C", extension)
        coords = atoms[0].clone().requires_grad_()
        density = density_map(*as_maps((coords, *atoms[1:]), CELLS["acute"]))
        results.append((density.detach(), *torch.autograd.grad((density**2).sum(), coords)))
    for one, other in zip(*results):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"coords": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "coords must be float32 or float64"),
        ({"coords": torch.zeros(2, 2, dtype=torch.float64)}, ValueError, r"coords must be \[M, 3\]"),
        ({"coords": torch.full((2, 3), torch.nan, dtype=torch.float64)}, ValueError, "coords must be finite"),
        ({"element": torch.tensor([6, 99])}, ValueError, "element must be an atomic number from 1 to 98, got 99"),
        ({"element": torch.tensor([0, 6])}, ValueError, "element must be an atomic number from 1 to 98, got 0"),
        ({"element": torch.tensor([6.0, 6.0])}, TypeError, "element must be torch.int64"),
        (
            {"b_iso": torch.tensor([20.0, 0.0]).double()},
            ValueError,
            "b_iso .* must be positive and finite, got 0; raise",
        ),
        ({"b_iso": torch.tensor([20.0, 1.0])}, TypeError, "b_iso must be torch.float64"),
        ({"occupancy": torch.ones(3).double()}, ValueError, r"occupancy must be \[M\] with M=2"),
        ({"ptr": torch.tensor([0, 3])}, ValueError, "ptr must grow from 0 to M=2"),
        ({"ptr": torch.tensor([0, 2]).int()}, TypeError, "ptr must be int64"),
        ({"cells": torch.tensor([[9.0, 9, 9, 120, 120, 120]])}, ValueError, "cells must be possible unit cells"),
        ({"cells": torch.tensor([[9.0, -9, 9, 90, 90, 90]])}, ValueError, "cells must be possible unit cells"),
        ({"cells": torch.tensor([9.0, 9, 9, 90, 90, 90])}, ValueError, r"cells must be \[B, 6\] with B=1"),
        ({"grid": (4, 5)}, ValueError, "grid must be"),
        ({"grid": (4, 5, 0)}, ValueError, "grid must hold positive sizes"),
        ({"cutoff": 0.0}, ValueError, "cutoff must be positive"),
    ],
)
def test_bad_input(change, error, message):
    names = ("coords", "element", "b_iso", "occupancy", "ptr", "cells", "grid")
    good = dict(zip(names, as_maps(make_atoms(2, CELLS["acute"]), CELLS["acute"])))
    with pytest.raises(error, match=message):
        density_map(**(good | change))
