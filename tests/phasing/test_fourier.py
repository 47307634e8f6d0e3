"""Lists of reflections and grids: gemmi's signs, shifts as phase ramps, round trips."""

from __future__ import annotations

import gemmi
import numpy as np
import pytest
import torch

from xtalfast.errors import InputError
from xtalfast.phasing.fourier import FourierGrid, fft_size, usable_cell
from xtalfast.phasing.symmetry import expand_to_p1, impose_symmetry, locate_origin


def test_map_is_gemmis(make_crystal):
    crystal = make_crystal(d_min=2.5)
    grid = FourierGrid.for_resolution(crystal.cell, 2.5, rate=3)
    ours = grid.to_map(grid.scatter(crystal.hkl, torch.from_numpy(crystal.F).to(torch.complex64))[0]).numpy()
    asu = gemmi.ComplexAsuData(
        crystal.cell, crystal.space_group, crystal.hkl.astype(np.int32), crystal.F.astype(np.complex64)
    )
    theirs = np.array(asu.transform_f_phi_to_map(exact_size=grid.shape))
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * theirs.std())


@pytest.mark.parametrize("rate", [2.0, 3.0])
def test_round_trip(make_crystal, rate):
    crystal = make_crystal(d_min=2.0)
    grid = FourierGrid.for_resolution(crystal.cell, 2.0, rate=rate)
    spectrum, known = grid.scatter(crystal.hkl, torch.from_numpy(crystal.F))
    back = grid.gather(grid.to_spectrum(grid.to_map(spectrum)), crystal.hkl).numpy()
    np.testing.assert_allclose(back, crystal.F, atol=1e-12 * abs(crystal.F).max())
    # Every reflection of the sphere is on the grid, and nothing else but F000.
    assert int((known != grid.inside).sum()) == 1
    assert not known[0, 0, 0]


def test_friedel_mates_may_be_listed_either_way(make_crystal):
    crystal = make_crystal(d_min=3.0)
    grid = FourierGrid.for_resolution(crystal.cell, 3.0)
    flip = np.random.default_rng(0).random(len(crystal.hkl)) < 0.5
    hkl = np.where(flip[:, None], -crystal.hkl, crystal.hkl)
    F = np.where(flip, crystal.F.conj(), crystal.F)
    one, two = (grid.scatter(h, torch.from_numpy(f))[0] for h, f in ((crystal.hkl, crystal.F), (hkl, F)))
    assert torch.equal(one, two)


def test_fft_size():
    assert [fft_size(n) for n in (0, 1, 7, 11, 16, 31)] == [1, 1, 8, 12, 16, 32]
    assert [fft_size(n, 12) for n in (1, 13, 80)] == [12, 24, 96]


@pytest.mark.parametrize(
    "cell", [(10, 10, 0, 90, 90, 90), (10, 10, float("nan"), 90, 90, 90), (10, 10, 10, 60, 60, 150)]
)
def test_impossible_cells(cell):
    with pytest.raises(InputError, match="cell"):
        usable_cell(cell)


@pytest.mark.parametrize(
    "name, cell",
    [
        ("P 21", (20, 23, 27, 90, 100, 90)),
        ("C 2", (30, 23, 27, 90, 100, 90)),
        ("P 43 21 2", (28, 28, 36, 90, 90, 90)),
        ("I 21 3", (36, 36, 36, 90, 90, 90)),
        ("R 3 :H", (30, 30, 35, 90, 90, 120)),
    ],
)
def test_symmetry(make_crystal, name, cell):
    """Expansion equals direct summation; the origin of a shifted P1 density is found; averaging gives the data back."""
    crystal = make_crystal(space_group=name, cell=cell, d_min=3.5, n_atoms=15)
    hkl, F, rows = expand_to_p1(crystal.hkl, crystal.F, crystal.space_group)
    size = abs(crystal.F).max()
    np.testing.assert_allclose(F, crystal.structure_factors(hkl), atol=1e-10 * size)
    np.testing.assert_allclose(abs(F), abs(crystal.F[rows]), atol=1e-10 * size)
    moved = F * np.exp(2j * np.pi * (hkl @ np.array([0.123, 0.456, 0.789])))
    shift, score = locate_origin(hkl, moved, crystal.space_group)
    assert score > 1 - 1e-6
    back = moved * np.exp(2j * np.pi * (hkl @ shift))
    averaged = impose_symmetry(hkl, back, crystal.space_group, crystal.hkl)
    np.testing.assert_allclose(abs(averaged), abs(crystal.F), atol=1e-4 * size)
