"""Merging statistics against gemmi, against the formulas written out, and against what noise theory says."""

from __future__ import annotations

import json

import gemmi
import numpy as np
import pytest

from xtalfast.errors import InputError
from xtalfast.metrics import Observations, merging_statistics, side_by_side, stats_for_file
from xtalfast.metrics.equivalents import canonical_index, half_set_means

CELL = {
    "P 1": (20, 23, 27, 80, 95, 105),
    "P 1 21 1": (20, 23, 27, 90, 100, 90),
    "P 43 21 2": (30, 30, 50, 90, 90, 90),
    "P 31 2 1": (25, 25, 30, 90, 90, 120),
    "I 2 3": (40, 40, 40, 90, 90, 90),
    "R 3:H": (40, 40, 50, 90, 90, 120),
}


def simulate(name: str, n_obs: int = 4000, d_min: float = 3.0, relative_noise: float = 0.1, seed: int = 0):
    """Observations of Wilson-distributed intensities, in random symmetry-equivalent settings, with Gaussian noise."""
    rng = np.random.default_rng(seed)
    group, cell = gemmi.SpaceGroup(name), gemmi.UnitCell(*CELL[name])
    unique = gemmi.make_miller_array(cell, group, d_min)
    pick = rng.integers(len(unique), size=n_obs)
    rotations = np.array([np.array(op.rot) // gemmi.Op.DEN for op in group.operations().sym_ops])
    hkl = np.einsum("ni,nij->nj", unique[pick], rotations[rng.integers(len(rotations), size=n_obs)])
    hkl *= rng.choice([-1, 1], size=(n_obs, 1))
    truth = rng.exponential(100, len(unique))[pick]
    sigma = relative_noise * rng.uniform(0.5, 2, n_obs) * 100
    return Observations(hkl.astype(np.int32), truth + sigma * rng.standard_normal(n_obs), sigma, cell, group)


def gemmi_statistics(data: Observations, kind: gemmi.DataType) -> gemmi.MergingStats:
    intensities = gemmi.Intensities()
    intensities.set_data(data.cell, data.space_group, data.hkl, data.I, data.sigI)
    intensities.remove_systematic_absences()
    intensities.prepare_for_merging(kind)
    return intensities.calculate_merging_stats(None)[0]


@pytest.mark.parametrize("name", CELL)
def test_overall_equals_gemmi(name):
    data = simulate(name)
    ours = merging_statistics(data).overall
    mean = gemmi_statistics(data, gemmi.DataType.Mean)
    friedel = gemmi_statistics(data, gemmi.DataType.Anomalous)
    assert (ours.n_obs, ours.n_unique, ours.n_half) == (mean.all_refl, mean.unique_refl, mean.stats_refl)
    for theirs, suffix in ((mean, ""), (friedel, "_anom")):
        for quantity in ("r_merge", "r_meas", "r_pim"):
            assert getattr(ours, quantity + suffix) == pytest.approx(getattr(theirs, quantity)(), rel=1e-6)
    assert ours.cc_half_sigma_tau == pytest.approx(mean.cc_half(), abs=1e-6)


def test_shells_equal_gemmi_in_the_same_shells():
    data = simulate("P 43 21 2")
    result = merging_statistics(data, n_bins=7)
    for i, shell in enumerate(result.shells):
        # Reflections on the two outermost edges belong to the data, whatever the rounding of 1 / d^3.
        low = np.inf if i == 0 else shell.d_max
        high = 0.0 if i == len(result.shells) - 1 else shell.d_min
        rows = (data.d <= low) & (data.d > high)
        part = Observations(data.hkl[rows], data.I[rows], data.sigI[rows], data.cell, data.space_group)
        theirs = gemmi_statistics(part, gemmi.DataType.Mean)
        assert (shell.n_obs, shell.n_unique) == (theirs.all_refl, theirs.unique_refl)
        assert shell.r_meas == pytest.approx(theirs.r_meas(), rel=1e-6)
        assert shell.cc_half_sigma_tau == pytest.approx(theirs.cc_half(), abs=1e-6)


def test_shells_share_out_the_whole():
    result = merging_statistics(simulate("P 31 2 1"), n_bins=6)
    for name in ("n_obs", "n_unique", "n_possible", "n_half", "n_anom"):
        assert sum(getattr(shell, name) for shell in result.shells) == getattr(result.overall, name)
    edges = [shell.d_max for shell in result.shells] + [result.shells[-1].d_min]
    assert np.all(np.diff(edges) < 0)
    np.testing.assert_allclose(np.diff(np.power(edges, -3.0)), np.mean(np.diff(np.power(edges, -3.0))))


@pytest.mark.parametrize("name", CELL)
def test_canonical_index_joins_equivalents_and_nothing_else(name):
    group, cell = gemmi.SpaceGroup(name), gemmi.UnitCell(*CELL[name])
    hkl = gemmi.make_miller_array(cell, group, 4.0, unique=False)
    key, plus = canonical_index(hkl, group)
    asu, operations = gemmi.ReciprocalAsu(group), group.operations()
    expected = [tuple(asu.to_asu(list(map(int, row)), operations)[0]) for row in hkl]
    assert len(set(expected)) == len(set(key)) == len(set(zip(expected, key)))
    inverted_key, inverted_plus = canonical_index(-hkl, group)
    np.testing.assert_array_equal(key, inverted_key)
    centric = operations.centric_flag_array(hkl)
    assert np.all(plus[centric])
    np.testing.assert_array_equal(plus[~centric], ~inverted_plus[~centric])


@pytest.mark.parametrize("name", ["P 1 21 1", "P 43 21 2"])
def test_a_whole_sphere_is_complete(name):
    group, cell = gemmi.SpaceGroup(name), gemmi.UnitCell(*CELL[name])
    hkl = gemmi.make_miller_array(cell, group, 2.95, unique=False)  # no reflection at just this resolution
    ones = np.ones(len(hkl))
    result = merging_statistics(Observations(hkl, ones, ones, cell, group))
    assert all(shell.completeness == 1 for shell in [*result.shells, result.overall])
    assert all(shell.anom_completeness == 1 for shell in result.shells)
    assert result.overall.n_possible == gemmi.count_reflections(cell, group, 2.95)
    half = merging_statistics(Observations(hkl[::7], ones[::7], ones[::7], cell, group), d_min=2.0).overall
    assert half.n_possible == gemmi.count_reflections(cell, group, 2.0) - np.count_nonzero(
        cell.calculate_d_array(gemmi.make_miller_array(cell, group, 2.0)) > cell.calculate_d_array(hkl[::7]).max()
    )


def test_cc_half_is_what_the_noise_makes_it():
    """With signal variance S and noise variance N per observation, n each: CC1/2 = S / (S + 2 N / n)."""
    rng = np.random.default_rng(3)
    group, cell = gemmi.SpaceGroup("P 43 21 2"), gemmi.UnitCell(60, 60, 90, 90, 90, 90)
    unique = gemmi.make_miller_array(cell, group, 2.5)
    signal, noise, n = 100.0, 150.0, 4
    truth = rng.exponential(signal, len(unique))
    hkl = np.repeat(unique, n, axis=0)
    I = np.repeat(truth, n) + noise * rng.standard_normal(len(hkl))
    result = merging_statistics(Observations(hkl, I, np.full(len(hkl), noise), cell, group)).overall
    expected = signal**2 / (signal**2 + 2 * noise**2 / n)
    tolerance = 4 * (1 - expected**2) / np.sqrt(len(unique))  # four standard errors of a correlation
    assert result.cc_half == pytest.approx(expected, abs=tolerance)
    assert result.cc_half_sigma_tau == pytest.approx(expected, abs=tolerance)
    assert result.mean_I_over_sigma == pytest.approx(np.sqrt(n) * signal / noise, rel=0.1)
    assert result.multiplicity == n
    assert abs(
        merging_statistics(Observations(hkl, rng.permutation(I), np.full(len(hkl), noise), cell, group)).overall.cc_half
    ) < 4 / np.sqrt(len(unique))


def test_cc_anom_sees_anomalous_differences_only():
    rng = np.random.default_rng(5)
    group, cell = gemmi.SpaceGroup("P 43 21 2"), gemmi.UnitCell(60, 60, 90, 90, 90, 90)
    unique = gemmi.make_miller_array(cell, group, 3.0)
    hkl = np.concatenate([np.repeat(unique, 4, axis=0), -np.repeat(unique, 4, axis=0)])
    truth = np.tile(np.repeat(rng.exponential(100, len(unique)), 4), 2)
    difference = np.repeat(10 * rng.standard_normal(len(unique)), 4)
    noise = 5 * rng.standard_normal(len(hkl))
    sigma = np.full(len(hkl), 5.0)
    with_signal = Observations(hkl, truth + np.concatenate([difference, -difference]) + noise, sigma, cell, group)
    without = Observations(hkl, truth + noise, sigma, cell, group)
    acentric = np.count_nonzero(~group.operations().centric_flag_array(unique))
    result = merging_statistics(with_signal).overall
    # dI = 2 x 10 g of signal, noise variance 2 x 25 / 2 in each half.
    expected = 400 / (400 + 25)
    assert result.n_anom == acentric
    assert result.cc_anom == pytest.approx(expected, abs=4 * (1 - expected**2) / np.sqrt(acentric))
    assert abs(merging_statistics(without).overall.cc_anom) < 4 / np.sqrt(acentric)
    assert result.r_meas > 1.2 * result.r_meas_anom


def test_half_sets_are_even_random_and_seeded():
    group = np.repeat(np.arange(500), 3)
    value = np.tile([0.0, 3.0, 6.0], 500)
    first = half_set_means(group, 501, value, seed=1)
    np.testing.assert_array_equal(first, half_set_means(group, 501, value, seed=1))
    assert np.any(first[:500] != half_set_means(group, 501, value, seed=2)[:500])
    assert np.isnan(first[500]).all()
    # One half is a single observation, the other the mean of the two that remain; which is which is a coin toss.
    single_first = np.isin(first[:500, 0], [0.0, 3.0, 6.0]) & np.isclose(first[:500] @ [1, 2], 9)
    single_second = np.isin(first[:500, 1], [0.0, 3.0, 6.0]) & np.isclose(first[:500] @ [2, 1], 9)
    assert np.all(single_first | single_second)
    assert abs(np.mean(single_first[first[:500, 0] != 3]) - 0.5) < 4 * 0.5 / np.sqrt(300)


def test_absences_are_dropped_and_counted():
    group, cell = gemmi.SpaceGroup("P 43 21 2"), gemmi.UnitCell(30, 30, 50, 90, 90, 90)
    hkl = np.array([[0, 0, 4], [0, 0, 4], [0, 0, 5], [1, 2, 3], [2, 1, 3]], np.int32)
    result = merging_statistics(Observations(hkl, np.arange(5.0), np.ones(5), cell, group))
    assert (result.n_absent, result.overall.n_obs, result.overall.n_unique) == (1, 4, 2)
    assert "1 systematically absent" in result.table()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_handful_of_observations(n):
    data = simulate("P 1", n_obs=n)
    result = merging_statistics(data, n_bins=3)
    assert result.overall.n_obs == n
    assert np.isnan(result.overall.cc_half)
    json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert "-" in result.table()


def test_json_and_text_hold_the_same_numbers():
    result = merging_statistics(simulate("P 31 2 1"), n_bins=4)
    values = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert len(values["shells"]) == 4
    assert values["overall"]["r_pim"] == result.overall.r_pim
    last = result.table().splitlines()[-1].split()
    assert last[2:4] == [str(result.overall.n_obs), str(result.overall.n_unique)]
    assert f"{result.overall.r_pim:.3f}" in last
    both = side_by_side({"first": result, "second": merging_statistics(simulate("P 1"))})
    assert both.split()[:2] == ["first", "second"]
    line = next(line for line in both.splitlines() if line.startswith("Rpim(I) "))
    assert f"{result.overall.r_pim:.3f} ({result.shells[-1].r_pim:.3f})" in line


def test_bad_input():
    data = simulate("P 1", n_obs=10)
    with pytest.raises(InputError, match="n_bins must be at least 1"):
        merging_statistics(data, n_bins=0)
    with pytest.raises(InputError, match="d_min must be a positive resolution"):
        merging_statistics(data, d_min=-1)
    with pytest.raises(InputError, match="none of 10 observations is left with d_min 90 A"):
        merging_statistics(data, d_min=90)
    with pytest.raises(InputError, match=r"I must be \[N\] with N=10"):
        Observations(data.hkl, data.I[:5], data.sigI, data.cell, data.space_group)
    with pytest.raises(InputError, match="no such file"):
        stats_for_file("nowhere.refl")
    empty = Observations(data.hkl[:0], data.I[:0], data.sigI[:0], data.cell, data.space_group)
    with pytest.raises(InputError, match="no observations"):
        merging_statistics(empty)
