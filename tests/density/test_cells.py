"""Tight cells: no contacts by brute force, tight, centred, right-handed, axes sorted."""

import itertools

import gemmi
import numpy as np
import pytest

from xtalfast import _native
from xtalfast.density import cells


def brute_force_contact(coords, orth):
    """Shortest distance between an atom and an atom of another copy, by trying many translations."""
    shortest = np.inf
    for n in itertools.product(range(-4, 5), repeat=3):
        if n != (0, 0, 0):
            shifted = coords + orth @ np.array(n)
            shortest = min(shortest, np.linalg.norm(coords[:, None] - shifted[None], axis=-1).min())
    return shortest


@pytest.fixture(scope="module")
def molecules():
    rng = np.random.default_rng(0)
    helix = np.stack([2.3 * np.cos(np.arange(60) * 0.6), 2.3 * np.sin(np.arange(60) * 0.6), np.arange(60) * 0.37], 1)
    return [rng.normal(size=(30, 3)) * [3, 5, 8], helix, np.outer(np.arange(12), [2.0, 1.0, 0.5]), np.zeros((1, 3))]


@pytest.mark.parametrize("angles", [(90, 90, 90), (120, 110, 120), (120, 90, 100), (110, 120, 120)])
def test_cell_keeps_copies_apart_and_is_tight(molecules, angles):
    for coords in molecules:
        placement = cells.tight_cell(coords, np.ones(len(coords)), np.array(angles, float))
        orth = cells.orthogonalization(placement.cell)
        assert brute_force_contact(placement.coords, orth) > cells.MIN_CONTACT
        smaller = placement.cell - [0.5, 0.5, 0.5, 0, 0, 0]
        # One step before there was a contact: this is the first cell without.
        assert brute_force_contact(placement.coords, cells.orthogonalization(smaller)) <= cells.MIN_CONTACT + 1e-9


def test_has_contact_against_brute_force():
    rng = np.random.default_rng(1)
    seen = set()
    for _ in range(60):
        coords = rng.normal(size=(rng.integers(1, 15), 3)) * rng.uniform(0.5, 6, 3)
        cell = np.array([*rng.uniform(4, 25, 3), *rng.choice([90, 100, 110, 119], 3)])
        orth = cells.orthogonalization(cell)
        distance = rng.uniform(1, 6)
        found = cells.has_contact(coords, orth, distance)
        assert found == cells.has_contact_reference(coords, orth, distance)
        assert found == (brute_force_contact(coords, orth) <= distance)
        seen.add(found)
    assert seen == {True, False}


def test_cells_are_the_same_without_the_extension(molecules, monkeypatch):
    rng = np.random.default_rng(7)
    turned = [(coords @ cells.random_rotation(rng).T, cells.draw_angles(rng)[0]) for coords in molecules * 3]
    with_it = [cells.tight_cell(coords, np.ones(len(coords)), angles) for coords, angles in turned]
    monkeypatch.setattr(_native, "C", None)
    for (coords, angles), one in zip(turned, with_it):
        assert cells.tight_cell(coords, np.ones(len(coords)), angles).cell == pytest.approx(one.cell, abs=1e-9)


def test_placement_is_a_proper_motion_to_the_centre(molecules):
    rng = np.random.default_rng(2)
    for coords in molecules[:3]:
        mass = rng.uniform(1, 30, len(coords))
        for _ in range(6):
            placement = cells.tight_cell(coords, mass, cells.draw_angles(rng)[0])
            a, b, c = placement.cell[:3]
            assert a <= b <= c
            assert np.linalg.det(placement.rotation) == pytest.approx(1)
            centre = mass @ coords / mass.sum()
            middle = cells.orthogonalization(placement.cell) @ np.full(3, 0.5)
            assert placement.coords == pytest.approx((coords - centre) @ placement.rotation.T + middle)
            assert mass @ placement.coords / mass.sum() == pytest.approx(middle)


def test_orthogonalization_and_volume_against_gemmi():
    for parameters in ((20, 25, 31, 90, 90, 90), (18, 22, 27, 100, 110, 120), (30, 30, 10, 70, 80, 95)):
        cell = gemmi.UnitCell(*parameters)
        assert cells.orthogonalization(parameters) == pytest.approx(np.array(cell.orth.mat.tolist()), abs=1e-12)
        assert cells.volume(parameters) == pytest.approx(cell.volume)
    assert cells.volume(np.tile(parameters, (2, 3, 1))).shape == (2, 3)


def test_angles_follow_the_paper():
    """Frequencies 1/3, 1/3, 2/9, 1/9 within 4 sd; three times 120 is redrawn, at 1 in 729 draws."""
    rng = np.random.default_rng(3)
    drawn, redrawn = zip(*(cells.draw_angles(rng) for _ in range(4000)))
    drawn = np.array(drawn)
    for angle, probability in zip(cells.ANGLES, cells.ANGLE_PROBABILITIES):
        expected = 12000 * probability
        assert abs((drawn == angle).sum() - expected) < 4 * np.sqrt(expected)
    assert not (drawn == 120).all(axis=1).any()
    assert 0 < sum(redrawn) < 20
    assert (cells.volume(np.concatenate([np.full((4000, 3), 10), drawn], axis=1)) > 100).all()


def test_rotations_are_uniform():
    """Mean of uniform rotation matrices is 0, each entry has variance 1/3."""
    rng = np.random.default_rng(4)
    turns = np.array([cells.random_rotation(rng) for _ in range(3000)])
    assert np.allclose(turns @ turns.transpose(0, 2, 1), np.eye(3)) and (np.linalg.det(turns) > 0).all()
    assert abs(turns.mean(0)).max() < 4 * np.sqrt(1 / 3 / 3000)
    assert turns.var(0) == pytest.approx(np.full((3, 3), 1 / 3), abs=0.03)


def test_no_cell_is_said_so():
    """A plate as large as the edges may grow, in a cell so flat that its copies cut through it."""
    x, y = np.meshgrid(np.arange(0, 60, 3.0), np.arange(0, 60, 3.0))
    plate = np.stack([x.ravel(), y.ravel(), 20 * np.sin(x.ravel() / 6)], axis=1)
    assert cells.tight_cell(plate, np.ones(len(plate)), np.array([120.0, 119.0, 120.0])) is None


def test_solvent_fraction_of_lysozyme():
    """Tetragonal hen egg-white lysozyme: 14.3 kDa, 8 molecules in 79.1 x 79.1 x 37.9 A, about 40 % solvent."""
    assert cells.solvent_fraction(8 * 14313, [79.1, 79.1, 37.9, 90, 90, 90]) == pytest.approx(0.41, abs=0.02)
