"""Origin and hand: every shift and either hand is found back, as far as the space group allows."""

from __future__ import annotations

import gemmi
import numpy as np
import pytest

from xtalfast.errors import InputError
from xtalfast.phasing import match, random_floor
from xtalfast.phasing.match import allowed_shifts

GROUPS = {
    "P 1": (20, 23, 27, 80, 100, 95),
    "P 21": (20, 23, 27, 90, 100, 90),
    "C 2": (30, 23, 27, 90, 100, 90),
    "P 21 21 21": (20, 25, 30, 90, 90, 90),
    "P 63": (25, 25, 30, 90, 90, 120),
    "I 41": (28, 28, 35, 90, 90, 90),
    "R 3 :H": (30, 30, 35, 90, 90, 120),
    "I 21 3": (36, 36, 36, 90, 90, 90),
}


def test_any_shift_and_either_hand(make_crystal):
    """1,000 random trials in P1 with small phase errors."""
    crystal = make_crystal(n_atoms=12, cell=(11, 12, 13, 80, 95, 105), d_min=2.0)
    rng = np.random.default_rng(0)
    for trial in range(1000):
        shift, inverted = rng.random(3), bool(trial % 2)
        moved = (crystal.F.conj() if inverted else crystal.F) * np.exp(2j * np.pi * (crystal.hkl @ shift))
        moved *= np.exp(1j * np.radians(10) * rng.standard_normal(len(moved)))
        found = match(crystal.F, moved, crystal.hkl, crystal.cell, n_shells=1)
        assert found.inverted == inverted
        # The shift found takes the one applied back; after inversion both run the same way.
        rest = np.array(found.shift) - (shift if inverted else -shift)
        assert abs(rest - np.round(rest)).max() < 0.01
        assert found.statistics.overall.phase_error < 11


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("inverted", [False, True], ids=["same", "inverted"])
def test_space_groups(make_crystal, name, inverted):
    crystal = make_crystal(space_group=name, cell=GROUPS[name], d_min=3.0, n_atoms=20)
    allowed = np.argwhere(allowed_shifts(crystal.space_group, (24, 24, 24), inverted)) / 24
    rng = np.random.default_rng(1)
    shift = allowed[rng.integers(len(allowed))]
    moved = (crystal.F.conj() if inverted else crystal.F) * np.exp(2j * np.pi * (crystal.hkl @ shift))
    found = match(crystal.F, moved, crystal.hkl, crystal.cell, crystal.space_group)
    assert found.inverted == inverted
    assert found.map_cc > 1 - 1e-9
    assert found.other_hand_cc < 0.9
    np.testing.assert_allclose(found.F2, crystal.F, atol=1e-5 * abs(crystal.F).max())


def test_shifts_that_the_group_forbids_are_not_found(make_crystal):
    crystal = make_crystal(space_group="P 21 21 21", cell=GROUPS["P 21 21 21"], d_min=3.0)
    moved = crystal.F * np.exp(2j * np.pi * (crystal.hkl @ np.array([0.2, 0.1, 0.3])))
    assert match(crystal.F, moved, crystal.hkl, crystal.cell, crystal.space_group).map_cc < 0.5


def test_enantiomorphic_groups_have_one_hand(make_crystal):
    crystal = make_crystal(space_group="P 43 21 2", cell=(28, 28, 36, 90, 90, 90), d_min=3.5)
    found = match(crystal.F, crystal.F, crystal.hkl, crystal.cell, crystal.space_group)
    assert not found.inverted
    assert np.isnan(found.other_hand_cc)
    assert not allowed_shifts(gemmi.SpaceGroup("P 43 21 2"), (24, 24, 24), True).any()


def test_known_phase_noise_and_its_weighted_error(make_crystal):
    """Normal errors of sd 40 degrees have a mean |error| of 40 sqrt(2 / pi) = 31.9 degrees."""
    crystal = make_crystal(d_min=1.5)
    rng = np.random.default_rng(2)
    noisy = crystal.F * np.exp(1j * np.radians(40) * rng.standard_normal(len(crystal.F)))
    overall = match(crystal.F, noisy, crystal.hkl, crystal.cell).statistics.overall
    spread = 40 * np.sqrt((1 - 2 / np.pi) / len(noisy))
    assert abs(overall.phase_error - 40 * np.sqrt(2 / np.pi)) < 4 * spread


def test_random_phases_give_the_floor(make_crystal):
    crystal = make_crystal(d_min=2.0)
    floor = random_floor(crystal.F, crystal.hkl, crystal.cell)
    assert 84 < floor < 90


@pytest.mark.parametrize(
    "change, message",
    [
        ({"F2": np.ones(3)}, r"must be \[N\]"),
        ({"F2": np.full(10, np.nan)}, "finite"),
        ({"F2": np.zeros(10)}, "not zero"),
        ({"cell": (10, 10, -10, 90, 90, 90)}, "six positive"),
        ({"cell": (10, 10, 10, 120, 120, 120)}, "no volume"),
    ],
)
def test_bad_input(change, message):
    hkl = np.array(gemmi.make_miller_array(gemmi.UnitCell(10, 10, 10, 90, 90, 90), gemmi.SpaceGroup("P 1"), 3.0))[:10]
    arguments = {"F1": np.ones(10), "F2": np.ones(10), "hkl": hkl, "cell": (10, 10, 10, 90, 90, 90), **change}
    with pytest.raises(InputError, match=message):
        match(**arguments)
