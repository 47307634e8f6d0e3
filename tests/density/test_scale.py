"""Scales: map constants of a set, and Wilson scaling that follows any change of scale or B exactly."""

import gemmi
import numpy as np
import pytest
import torch

from xtalfast.density.calculate import patterson_of_amplitudes, prepare_patterson
from xtalfast.density.conformers import RESIDUES, conformers, element_of, ids_from_sequence
from xtalfast.density.fragment_set import make_fragments
from xtalfast.density.fragments import FragmentSettings
from xtalfast.density.maps import atoms_of_rows, inverse_d2, maps_of_spectrum, residue_maps, spectrum_of_atoms
from xtalfast.density.scale import (
    AmplitudeScale,
    MapScale,
    count_outside,
    fit_scale,
    fit_wilson,
    sum_of_squares,
)
from xtalfast.errors import InputError

P1 = gemmi.SpaceGroup("P 1")


@pytest.fixture(scope="module")
def store(structures, tmp_path_factory):
    return make_fragments([structures], tmp_path_factory.mktemp("set"), FragmentSettings(test_fraction=0))["train"]


def amplitudes(store, row, d_min=1.5, b_iso=20.0):
    """Exact amplitudes of a fragment by gemmi's direct summation."""
    fragment = store[row]
    cell = gemmi.UnitCell(*fragment.cell)
    hkl = gemmi.make_miller_array(cell, P1, d_min)
    frac = fragment.coords @ np.array(cell.frac.mat.tolist()).T
    stol2 = cell.calculate_1_d2_array(hkl) / 4
    f = np.zeros(len(hkl), complex)
    for z in np.unique(fragment.element).tolist():
        c = gemmi.Element(z).it92
        form = np.exp(-np.outer(stol2, c.b)) @ np.array(c.a) + c.c
        f += form * np.exp(2j * np.pi * hkl @ frac[fragment.element == z].T).sum(axis=1)
    return hkl, np.abs(f * np.exp(-b_iso * stol2)), cell, fragment


def test_maps_of_the_set_lie_within_the_scale(store):
    scale = fit_scale(store, sample=1000)
    for row in range(0, len(store), 5):
        atoms = atoms_of_rows(store, np.array([row]))
        patterson, density = maps_of_spectrum(spectrum_of_atoms(*atoms, (64, 64, 100), 1.5), atoms.cells)
        assert float(patterson.abs().max()) <= scale.patterson * 1.05
        assert float(density.abs().max()) <= scale.density * 1.05
    # The origin peak of the Patterson is the sum of |F|^2 over the volume.
    _, f, cell, _ = amplitudes(store, row)
    assert float(patterson.max()) == pytest.approx(2 * (f**2).sum() / cell.volume, rel=1e-3)
    with pytest.raises(InputError, match="is empty"):
        fit_scale(store.select(np.array([], np.int64)), sample=10)


def test_values_outside_are_counted_not_clipped():
    assert count_outside(torch.tensor([[0.5, -1.5], [1.0, 3.0]])) == 2
    with pytest.raises(InputError, match="scale density must be above 0"):
        MapScale(patterson=1.0, density=float("nan"))


def test_wilson_fit_on_wilson_data():
    """Amplitudes drawn from Wilson's distribution give k and B back within 4 standard errors, centric ones included."""
    rng = np.random.default_rng(0)
    cell, group = gemmi.UnitCell(40, 50, 60, 90, 90, 90), gemmi.SpaceGroup("P 21 21 21")
    hkl = gemmi.make_miller_array(cell, group, 2.0)
    element = element_of(ids_from_sequence("ACDEFGHIKLMNPQRSTVWY" * 4))
    ops, s2 = group.operations(), cell.calculate_1_d2_array(hkl)
    mean = 2.5**2 * 4 * ops.epsilon_factor_array(hkl) * sum_of_squares(element, s2) * np.exp(-35 * s2 / 2)
    centric = ops.centric_flag_array(hkl)
    draws = np.where(centric, rng.chisquare(1, len(hkl)), rng.exponential(1, len(hkl)))
    fitted = fit_wilson(hkl, np.sqrt(mean * draws), cell, element, space_group=group)
    n = (s2 > 1 / 16).sum()
    assert fitted.b == pytest.approx(35, abs=4 * 2 / np.sqrt(n) / s2.std())
    assert fitted.k == pytest.approx(2.5, rel=0.1)


def test_fragments_come_out_near_their_truth(store):
    """k = 1 and B = 20 of computed amplitudes: the mean over fragments is within 5 % and 3 A^2."""
    fits = [fit_wilson(*amplitudes(store, row)[:3], store[row].element) for row in range(0, len(store), 6)]
    assert np.mean([fit.k for fit in fits]) == pytest.approx(1, abs=0.05)
    assert np.mean([fit.b for fit in fits]) == pytest.approx(20, abs=3)


@pytest.mark.parametrize("change", ["x1000", "B15", "both"])
def test_prepared_patterson_ignores_scale_and_b(store, change):
    """Issue 5: F times 1000 or an overall B of 15 leaves a prepared Patterson unchanged within 1 % (here 1e-5)."""
    hkl, f, cell, fragment = amplitudes(store, 0)
    s2 = cell.calculate_1_d2_array(hkl)
    changed = f * (1 if change == "B15" else 1000) * np.exp(-(0 if change == "x1000" else 15) * s2 / 4)
    scale = MapScale(patterson=900, density=4.4)
    plain, other = (prepare_patterson(hkl, x, cell, fragment.element, scale=scale) for x in (f, changed))
    assert float((plain - other).abs().max() / plain.abs().max()) < 1e-5
    assert float((plain - patterson_of_amplitudes(hkl, changed, cell) / 900).abs().max()) > 0.01


def test_a_given_scale_overrides(store):
    hkl, f, cell, fragment = amplitudes(store, 0, b_iso=20.0)
    scale = MapScale(patterson=900, density=4.4)
    given = prepare_patterson(
        hkl, 7 * f, cell, fragment.element, scale=scale, amplitude_scale=AmplitudeScale.parse("7,20")
    )
    assert given.numpy() == pytest.approx(patterson_of_amplitudes(hkl, f, cell).numpy() / 900, abs=1e-5)
    for text in ("7", "a,b", "0,20", "1,nan"):
        with pytest.raises(InputError, match="--scale wants"):
            AmplitudeScale.parse(text)


def test_amplitudes_that_cannot_be_used(store):
    hkl, f, cell, fragment = amplitudes(store, 0, d_min=3)
    for broken, message in (
        (np.where(np.arange(len(f)) == 3, np.nan, f), "1 amplitudes are negative or not finite"),
        (-f, "negative or not finite"),
        (0 * f, "all amplitudes are zero"),
        (f[:0], "wanted amplitudes"),
    ):
        with pytest.raises(InputError, match=message):
            fit_wilson(hkl[: len(broken)] if len(broken) else hkl, broken, cell, fragment.element)
    with pytest.raises(InputError, match="composition is empty"):
        fit_wilson(hkl, f, cell, [])


def test_inverse_d2_against_gemmi():
    cells = torch.tensor([[20.0, 25, 31, 100, 110, 120], [18.0, 18, 18, 90, 90, 90]], dtype=torch.float64)
    ours = inverse_d2(cells, (8, 6, 10))
    assert ours.shape == (2, 8, 6, 6)
    for i, parameters in enumerate(cells.tolist()):
        cell = gemmi.UnitCell(*parameters)
        for place, hkl in (((1, 2, 3), (1, 2, 3)), ((7, 4, 5), (-1, -2, 5)), ((5, 1, 0), (-3, 1, 0))):
            assert float(ours[i][place]) == pytest.approx(cell.calculate_1_d2(hkl))


def test_residue_maps():
    """24^3 points, no mean, peaks at the atoms; the same object every time."""
    maps = residue_maps()
    assert maps.shape == (20, 24, 24, 24) and maps.dtype == torch.float32 and residue_maps() is maps
    assert maps.mean(dim=(1, 2, 3)).abs().max() < 1e-5
    for name, conformer, density in zip(RESIDUES, conformers(), maps.numpy()):
        mass = conformer.element.astype(float)
        points = np.rint((conformer.coords - mass @ conformer.coords / mass.sum() + 6) / 0.5).astype(int)
        assert density[tuple(points.T)].min() > 4 * density.std(), name
