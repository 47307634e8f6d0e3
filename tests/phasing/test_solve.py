"""The dual-space solver on crystals made here: what it finds, what it says about it, what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xtalfast.errors import InputError
from xtalfast.phasing import SearchOptions, match, solve
from xtalfast.phasing.data import measured
from xtalfast.phasing.hand import chirality, helix, rotations
from xtalfast.phasing.mask import protein_mask
from xtalfast.phasing.projections import Amplitudes, flatten_solvent
from xtalfast.phasing.search import random_maps
from xtalfast.phasing.updates import UPDATES


def amplitudes_of(crystal, rate: float = 2.2, missing: float = 0.0) -> Amplitudes:
    data = measured(abs(crystal.F), crystal.hkl, crystal.cell, crystal.space_group, None)
    left_free = np.random.default_rng(0).random(len(data.hkl)) < missing
    return data.amplitudes(data.grid(data.d_min, rate), left_free=left_free)


def truth_map(crystal, amplitudes: Amplitudes) -> torch.Tensor:
    spectrum, _ = amplitudes.grid.scatter(crystal.hkl, torch.from_numpy(crystal.F).to(torch.complex64))
    maps = amplitudes.grid.to_map(spectrum)
    return (maps * (amplitudes.values.norm() / amplitudes.grid.to_spectrum(maps).abs().norm()))[None]


def test_ten_fragments(make_fragment):
    """The benchmark in small: 15-residue peptides in tight P1 cells, amplitudes and nothing else.

    Nine of ten at least are recovered, those called solved are right, and amplitudes of the same cell in random order
    (the same values at the same resolution, no density behind them) are not called solved.
    """
    outcomes = []
    for seed in range(10):
        crystal = make_fragment(seed)
        found = solve(abs(crystal.F), crystal.hkl, crystal.cell, starts=64, max_seconds=600, seed=seed)
        cc = match(crystal.F, found.F, crystal.hkl, crystal.cell, n_shells=1).map_cc
        outcomes.append((found.solved, cc > 0.8))
        order = np.argsort(crystal.cell.calculate_1_d2_array(crystal.hkl.astype(np.int32)), kind="stable")
        shells = np.array_split(order, 20)
        shuffled = abs(crystal.F)
        for shell in shells:
            shuffled[shell] = np.random.default_rng(seed).permutation(shuffled[shell])
        if seed < 2:
            assert not solve(shuffled, crystal.hkl, crystal.cell, starts=16, max_seconds=600).solved
    assert all(recovered for solved, recovered in outcomes if solved)
    assert sum(recovered for _, recovered in outcomes) >= 9


def test_amplitudes_of_nothing_are_not_solved(make_crystal):
    """Wilson-distributed random amplitudes: no density has them and is flat."""
    crystal = make_crystal(0, n_atoms=40, d_min=2.5)
    rng = np.random.default_rng(1)
    noise = abs(rng.standard_normal(len(crystal.hkl)) + 1j * rng.standard_normal(len(crystal.hkl)))
    found = solve(noise, crystal.hkl, crystal.cell, starts=4, max_seconds=600)
    assert not found.solved
    assert found.r_free > 0.3
    assert found.n_starts == 4


def test_same_seed_same_phases(make_crystal):
    crystal = make_crystal(3, n_atoms=30, d_min=2.5)
    runs = [
        solve(abs(crystal.F), crystal.hkl, crystal.cell, starts=4, max_seconds=600, seed=seed) for seed in (5, 5, 6)
    ]
    assert np.array_equal(runs[0].F, runs[1].F)
    assert not np.array_equal(runs[0].F, runs[2].F)
    np.testing.assert_allclose(abs(runs[0].F), abs(crystal.F), rtol=1e-12)
    np.testing.assert_allclose(abs(runs[0].F_inverse), abs(crystal.F), rtol=1e-12)


def test_space_group_with_symmetry(make_crystal):
    crystal = make_crystal(1, "P 21", (21, 22, 23, 90, 95, 90), n_atoms=50, centre=(0.2, 0.25, 0.12))
    found = solve(abs(crystal.F), crystal.hkl, crystal.cell, "P 21", starts=16, max_seconds=600)
    assert found.solved
    assert found.symmetry_score > 0.8
    matched = match(crystal.F, found.F, crystal.hkl, crystal.cell, crystal.space_group)
    assert matched.map_cc > 0.8


def test_molecule_in_the_middle_of_the_cell(make_crystal):
    crystal = make_crystal(2, n_atoms=40, solvent=0.78, d_min=2.5)
    found = solve(abs(crystal.F), crystal.hkl, crystal.cell, starts=32, max_seconds=600)
    assert found.solved
    middle = np.mean(crystal.coords, axis=0)
    matched = match(crystal.F, found.F, crystal.hkl, crystal.cell)
    centre = middle - np.array(matched.shift)
    centre = -centre if matched.inverted else centre
    rest = centre - 0.5
    assert abs(rest - np.round(rest)).max() < 0.1


def test_projection_onto_amplitudes(make_crystal):
    crystal = make_crystal(0, n_atoms=40)
    amplitudes = amplitudes_of(crystal)
    maps = torch.randn((2, *amplitudes.grid.shape), generator=torch.Generator().manual_seed(0))
    once = amplitudes.project(maps)
    twice = amplitudes.project(once)
    assert (twice - once).abs().max() < 1e-5 * once.abs().max()
    modulus = amplitudes.grid.to_spectrum(once).abs()
    assert (modulus - amplitudes.values)[:, amplitudes.bound].abs().max() < 1e-5 * amplitudes.values.max()
    assert float(amplitudes.r_factors(once)[0].max()) < 1e-5


def test_unmeasured_reflections_stay_free(make_crystal):
    """The true map is a fixed point although a third of the data is missing; forcing those to zero would move it."""
    crystal = make_crystal(0, n_atoms=40)
    amplitudes = amplitudes_of(crystal, missing=0.33)
    truth = truth_map(crystal, amplitudes)
    free = amplitudes.grid.inside & ~amplitudes.bound
    spectrum = amplitudes.grid.to_spectrum(truth)
    projected = amplitudes.impose(spectrum)
    assert torch.equal(projected[:, free], spectrum[:, free])
    assert not projected[:, ~amplitudes.grid.inside].any()
    forced = torch.where(free, 0, spectrum)
    assert float((forced - spectrum).norm() / spectrum.norm()) > 0.3


@pytest.mark.parametrize("method", sorted(set(UPDATES) - {"charge-flipping"}))
def test_the_truth_is_where_methods_with_a_mask_rest(make_crystal, method):
    """From the true density none runs away: R stays far below that of random phases."""
    crystal = make_crystal(4, n_atoms=40)
    amplitudes = amplitudes_of(crystal)
    update, beta = UPDATES[method]
    solvent = torch.tensor([0.6])

    def r_after(maps: torch.Tensor, n: int) -> float:
        for _ in range(n):
            projected = amplitudes.project(maps)
            protein = protein_mask(projected, amplitudes.grid, solvent, 3.0)
            maps = update(maps, projected, protein, amplitudes, beta)
        projected = amplitudes.project(maps)
        protein = protein_mask(projected, amplitudes.grid, solvent, 3.0)
        return float(amplitudes.r_factors(flatten_solvent(projected, protein))[0])

    random = random_maps(amplitudes, 1, torch.Generator().manual_seed(0))
    assert r_after(truth_map(crystal, amplitudes), 20) < 0.6 * r_after(random, 1)


def test_mask_takes_the_fraction_it_is_given(make_crystal):
    crystal = make_crystal(0, n_atoms=40, d_min=2.5)
    amplitudes = amplitudes_of(crystal)
    maps = truth_map(crystal, amplitudes).expand(3, -1, -1, -1)
    fractions = torch.tensor([0.3, 0.6, 0.9])
    inside = protein_mask(maps, amplitudes.grid, fractions, 3.0)
    np.testing.assert_allclose(1 - inside.float().mean((1, 2, 3)), fractions, atol=0.01)
    # Atoms lie in the protein.
    places = np.round((crystal.coords % 1) * np.array(amplitudes.grid.shape)).astype(int) % amplitudes.grid.shape
    assert inside[1][tuple(places.T)].float().mean() > 0.95


def test_hand_of_a_helix(make_crystal):
    """L-alanine in a right-handed helix, away from the template's orientation and length; and its mirror image."""
    _, coords = helix(9)
    turned = coords @ rotations(50)[17].T
    crystal = make_crystal(0, coords=turned, cell=(18, 19, 20, 90, 100, 90))
    assert chirality(crystal.F, crystal.hkl, crystal.cell, 2.0).choice == "as found"
    assert chirality(crystal.F.conj(), crystal.hkl, crystal.cell, 2.0).choice == "inverted"


def test_template_is_an_l_peptide():
    _, atoms = helix(2)
    n, ca, c, o, cb, n2 = atoms[:6]
    lengths = [np.linalg.norm(a - b) for a, b in ((n, ca), (ca, c), (c, o), (ca, cb), (c, n2))]
    np.testing.assert_allclose(lengths, (1.46, 1.525, 1.23, 1.53, 1.33), atol=0.03)
    assert np.dot(np.cross(n - ca, c - ca), cb - ca) > 2


def test_rotations_are_rotations_spread_evenly():
    turns = rotations(500)
    np.testing.assert_allclose(turns @ turns.transpose(0, 2, 1), np.broadcast_to(np.eye(3), (500, 3, 3)), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(turns), 1)
    assert abs(turns.mean(0)).max() < 0.05


def test_bad_input(make_crystal):
    crystal = make_crystal(0, n_atoms=20, d_min=2.5)
    F, hkl, cell = abs(crystal.F), crystal.hkl, crystal.cell
    cases = [
        ((np.where(np.arange(len(F)) == 3, np.nan, F), hkl, cell), "1 of .* not finite"),
        ((F - F.mean(), hkl, cell), "negative"),
        ((F * 0, hkl, cell), "all amplitudes are 0"),
        ((F[1:], hkl, cell), r"F must be \[N\]"),
        ((F, hkl, cell, "P 1", 1.0), "beyond the data"),
        ((F, hkl, cell, "P 4"), "does not fit"),
        ((F, hkl, cell, "Q 9"), "unknown space group"),
        ((F[:20], hkl[:20], cell), "too few"),
        ((F, np.where(np.arange(len(F))[:, None] == 3, -hkl[4], hkl), cell), "once"),
        ((F, hkl, (10, 10, 10, 90, 90, 200)), "no volume"),
    ]
    for arguments, message in cases:
        with pytest.raises(InputError, match=message):
            solve(*arguments, starts=1)
    for settings, message in (
        ({"solvent": 70.0}, "fraction"),
        ({"starts": 0}, "starts"),
        ({"max_seconds": 0}, "max_seconds"),
        ({"sigF": -F}, "sigF"),
        ({"options": SearchOptions(method="magic")}, "one of hio|method must"),
    ):
        with pytest.raises(InputError, match=message):
            solve(F, hkl, cell, **settings)


def test_systematic_absences_are_refused(make_crystal):
    crystal = make_crystal(0, "P 21", (20, 22, 25, 90, 100, 90), d_min=3.0, n_atoms=20)
    hkl = np.concatenate([crystal.hkl, [[0, 3, 0]]])
    with pytest.raises(InputError, match="absent"):
        solve(np.append(abs(crystal.F), 1.0), hkl, crystal.cell, "P 21", starts=1)
