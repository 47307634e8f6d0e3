"""The three channels against traced photons with known intensities."""

from __future__ import annotations

import numpy as np
import pytest

from xtalfast.errors import InputError
from xtalfast.integration.estimate import estimate
from xtalfast.integration.gaussian_rs import CellGrid, ReferenceProfiles, SpotShape, SpotWidths
from xtalfast.integration.kabsch import kabsch_coordinates
from xtalfast.integration.summation import foreground, label_foreground
from xtalfast.io import Flag

WIDTHS = SpotWidths(1.6e-3, float(np.radians(0.17)))


def true_profiles(store) -> ReferenceProfiles:
    shape = SpotShape((0.8, 0.15, 0.5), float(np.radians(0.15)), 3e-4)
    cells = CellGrid((-1.0, -1.0, 0.0), (1.0, 1.0, 60.0), (1, 1, 1))
    return ReferenceProfiles(store, [store.experiment], WIDTHS, shape, cells)


@pytest.fixture(scope="module")
def mixed(traced):
    """Weak and strong spots, some of no intensity at all, and their estimates."""
    rng = np.random.default_rng(5)
    intensity = rng.exponential(150.0, 800) * (rng.random(800) > 0.1)
    store = traced(800, intensity=intensity, background=1.5, edge=True, seed=6)
    return store, estimate(store, true_profiles(store), [store.experiment])


def test_likelihood_channel_is_unbiased_with_honest_sigmas(mixed) -> None:
    store, found = mixed
    good = found.integrated_prf
    value, variance = (found.columns[f"intensity.prf.{kind}"][good] for kind in ("value", "variance"))
    truth = store.intensity[good]
    pull = (value - truth) / np.sqrt(variance)
    assert good.mean() > 0.9
    assert abs(pull.mean()) < 4 / np.sqrt(good.sum())
    assert 0.92 < pull.std() < 1.08
    assert (value < 0).any()  # nothing is clipped
    weak = truth < 20
    assert abs(pull[weak].mean()) < 4 / np.sqrt(weak.sum()) and 0.85 < pull[weak].std() < 1.15


def test_profile_fitting_beats_summation(mixed) -> None:
    store, found = mixed
    both = found.integrated_prf & found.integrated_sum & (found.columns["partiality"] > 0.9)
    truth = store.intensity[both]
    error = np.abs(found.columns["intensity.prf.value"][both] - truth).sum()
    sums = found.columns["intensity.sum.value"][both] / found.columns["partiality"][both]
    assert error < 0.85 * np.abs(sums - truth).sum()


def test_summation_is_recorded_counts_with_honest_sigmas(mixed) -> None:
    store, found = mixed
    good = found.integrated_sum
    expected = store.intensity[good] * found.columns["partiality"][good]
    pull = (found.columns["intensity.sum.value"][good] - expected) / np.sqrt(
        found.columns["intensity.sum.variance"][good]
    )
    assert abs(pull.mean()) < 4 / np.sqrt(good.sum()) + 0.1  # a percent of the spot is outside the foreground
    assert 0.9 < pull.std() < 1.1
    assert found.columns["background.mean"] == pytest.approx(1.5, abs=0.4)


def test_posterior_channel_is_positive_and_covers(mixed) -> None:
    store, found = mixed
    good = found.integrated_prf
    value, variance = (found.columns[f"intensity.vi.{kind}"][good] for kind in ("value", "variance"))
    assert (value > 0).all() and (variance > 0).all()
    inside = np.abs(value - store.intensity[good]) < np.sqrt(variance)
    assert 0.6 < inside.mean() < 0.8
    prf = found.columns["intensity.prf.value"][good]
    assert np.square(value - store.intensity[good]).sum() < np.square(prf - store.intensity[good]).sum()


def test_no_intensity_is_neither_nan_nor_huge(mixed) -> None:
    store, found = mixed
    nothing = (store.intensity == 0) & found.integrated_prf
    for name, column in found.columns.items():
        assert np.isfinite(column).all(), name
    prf = found.columns["intensity.prf.value"][nothing]
    assert np.abs(prf).max() < 6 * np.sqrt(found.columns["intensity.prf.variance"][nothing].max())


def test_correlation_is_high_for_strong_spots(mixed) -> None:
    _, found = mixed
    correlation = found.columns["profile.correlation"]
    strong = found.columns["intensity.prf.value"] > 20 * np.sqrt(np.abs(found.columns["intensity.prf.variance"]))
    assert np.abs(correlation).max() <= 1 + 1e-9
    assert np.median(correlation[strong]) > 0.9


def test_columns_flags_and_diagnostics_are_complete(mixed) -> None:
    store, found = mixed
    for channel in ("sum", "prf", "vi"):
        for kind in ("value", "variance"):
            assert found.columns[f"intensity.{channel}.{kind}"].shape == (store.n,)
    assert found.diagnostics["n_integrated_prf"] == found.integrated_prf.sum()
    failed = (found.flags & np.uint64(Flag.FailedDuringProfileFitting)) != 0
    assert np.array_equal(failed, ~found.integrated_prf)
    assert (found.columns["intensity.prf.variance"][failed] == -1).all()
    assert (found.columns["intensity.prf.value"][failed] == 0).all()


def test_masks_take_flags_away_and_an_empty_box_has_no_value(traced) -> None:
    store = traced(40, intensity=3000.0, background=0.0, seed=3)
    box = store.bits.reshape(40, *store.box)
    box[0, 1, 7, 7] = 0  # one dead pixel in the middle
    box[1] = 0  # everything dead
    box[2, :, 7, :] |= 32  # the middle row is a neighbour's
    store.values[3] = 0  # not a photon
    store.bits = box.reshape(40, -1)
    found = estimate(store, true_profiles(store), [store.experiment], priors=None)
    assert not found.integrated_sum[[0, 1, 2]].any() and found.integrated_sum[3:].all()
    assert found.integrated_prf[0] and not found.integrated_prf[1]
    assert found.columns["intensity.prf.value"][0] == pytest.approx(3000, rel=0.1)
    for channel in ("sum", "prf", "vi"):
        assert found.columns[f"intensity.{channel}.value"][1] == 0
        assert found.columns[f"intensity.{channel}.variance"][1] == -1
    assert found.columns["intensity.sum.value"][3] == 0 and found.columns["intensity.sum.variance"][3] == 1
    assert 0 < found.columns["intensity.vi.value"][3] < 3
    assert (found.flags[0] & np.uint64(Flag.ForegroundIncludesBadPixels)) != 0


def test_a_zinger_in_the_background_changes_nothing_much(traced) -> None:
    store = traced(60, intensity=200.0, seed=4)
    profiles = true_profiles(store)
    first = estimate(store, profiles, [store.experiment])
    priors = first.priors
    good, before = first.integrated_prf & first.integrated_sum, first.columns
    store.values.reshape(60, *store.box)[:, 0, 1, 1] = 5000
    after = estimate(store, profiles, [store.experiment], priors=priors).columns
    for channel in ("sum", "prf", "vi"):
        change = after[f"intensity.{channel}.value"] - before[f"intensity.{channel}.value"]
        assert (np.abs(change[good]) < 0.1 * np.sqrt(before[f"intensity.{channel}.variance"][good])).all()


def test_foreground_is_every_voxel_that_the_ellipsoid_touches(traced) -> None:
    store = traced(10)
    rows = np.arange(10)
    inside = foreground(store, [store.experiment], WIDTHS, rows).reshape(10, *store.box)
    s1 = store.experiment.detector.s1_from_px(np.zeros(10, int), store.metadata["xyzcal_px"][:, :2].astype(float), 1.0)
    at = kabsch_coordinates(
        store.experiment, store.metadata["panel"], s1, store.metadata["xyzcal_px"], store.metadata["bbox"]
    )
    radius = 3 * np.array([WIDTHS.sigma_b, WIDTHS.sigma_b, WIDTHS.sigma_m])
    centre = ((at / radius) ** 2).sum(axis=-1) <= 1
    assert inside[centre].all()
    # a voxel is at most one voxel away from a centre that is inside
    grown = centre.copy()
    for axis in (1, 2, 3):
        padded = np.pad(grown, [(1, 1) if k == axis else (0, 0) for k in range(4)])
        n = grown.shape[axis]
        grown = np.logical_or.reduce([np.take(padded, np.arange(n) + shift, axis=axis) for shift in range(3)])
    assert not inside[~grown].any()
    assert inside[:, 1, 7, 7].all() and not inside[:, :, 0].any()


def test_labels_are_added_to_the_bits_of_the_store(traced) -> None:
    store = traced(5)
    store.bits[0, 0] |= 32
    mask = label_foreground(store, [store.experiment], WIDTHS.sigma_b, WIDTHS.sigma_m, 3.0)
    assert np.array_equal(mask & 33, store.bits)
    assert ((mask & 6 == 2) | (mask & 6 == 4)).all()
    assert np.array_equal(mask & 4 != 0, foreground(store, [store.experiment], WIDTHS, np.arange(5)))


def test_a_network_gives_its_own_channel_and_progress_is_told(traced) -> None:
    store = traced(50)

    class Network:
        def profiles(self, rows):
            return true_profiles(store).profiles(rows)

        def moments(self, rows):
            return {"mean_i": rows + 1.0, "var_i": np.full(len(rows), 2.0)}

    seen = []
    found = estimate(
        store,
        Network(),
        [store.experiment],
        widths=WIDTHS,
        network=Network(),
        batch=20,
        progress=lambda *step: seen.append(step),
    )
    assert np.array_equal(found.columns["intensity.q.value"], np.arange(50) + 1.0)
    assert (found.columns["intensity.q.variance"] == 2).all()
    assert "partiality" not in found.columns  # nothing here knows it
    assert seen[-3:] == [("estimate", 20, 50), ("estimate", 40, 50), ("estimate", 50, 50)]


def test_unusable_input_is_said(traced) -> None:
    store = traced(5)
    with pytest.raises(InputError, match="sigma_b"):
        estimate(store, object(), [store.experiment])
