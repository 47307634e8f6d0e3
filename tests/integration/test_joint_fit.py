"""Overlapping spots fitted together: against truth, beside the mask of the nearest owner, and left alone when apart."""

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from xtalfast.integration.boxes import spot_boxes
from xtalfast.integration.gaussian_rs import CellGrid, ReferenceProfiles
from xtalfast.integration.joint_fit import joint_fit, wilson_mean
from xtalfast.integration.shoeboxes import extract_store
from xtalfast.integration.simulate import SimulationConfig, simulate
from xtalfast.integration.spot_shape import SpotShape, SpotWidths
from xtalfast.io import read_expt, read_refl
from xtalfast.masks import used_pixels
from xtalfast.ops import profile_fit

# What SpotShape describes exactly: no beam divergence, bandwidth or depth of the sensor.
PLAIN = dict(divergence_deg=0.0, bandwidth=0.0, oblique_depth_mm=0.0, n_images=8, scale_amplitude=0.0)


class Integrated:
    """A simulated data set, its store, and every reflection fitted alone in what the nearest owner leaves it."""

    def __init__(self, folder, config, box=None):
        data = simulate(folder / "data", config)
        self.experiments, table = read_expt(data.expt), read_refl(data.refl)
        truth = np.load(data.truth)
        lattice = 0.9 / config.block_size_a / np.sqrt(8 * np.log(2))
        self.shape = SpotShape((config.psf_px**2, 0.0, config.psf_px**2), np.radians(config.mosaicity_deg), lattice)
        table["bbox"] = spot_boxes(truth["covariance"], table["xyzcal.px"], background_px=3)
        self.store = extract_store(table, self.experiments, folder / "store", box="bbox")
        row = self.store.metadata["row"][:]
        self.truth = {name: truth[name][row] for name in ("photons", "fraction_recorded", "shared", "background")}
        n = self.store.n
        self.i, self.var, self.bg, self.coverage = np.zeros(n), np.full(n, -1.0), np.zeros(n), np.ones(n)
        for view in self.store.by_size():
            at = np.arange(view.n)
            profile, self.coverage[view.rows] = (v.numpy() for v in self.profiles(view).profiles_and_coverage(at))
            counts, use = view.counts(at).astype(np.int32), used_pixels(view.mask(at))
            fit = profile_fit(torch.from_numpy(counts), torch.from_numpy(use), torch.from_numpy(profile))
            self.i[view.rows], self.var[view.rows], self.bg[view.rows] = fit.i, fit.var_i, fit.bg

    def profiles(self, view):
        widths = SpotWidths.from_profile(self.experiments[0].profile)
        cells = CellGrid((-1, -1, 0), (1, 1, 9), (1, 1, 1))
        return ReferenceProfiles(view, self.experiments, widths, self.shape, cells)

    def joint(self, **options):
        sigma = np.where(np.isfinite(self.var) & (self.var > 0), np.sqrt(np.abs(self.var)), np.nan)
        return joint_fit(
            self.store, self.experiments, self.profiles, np.maximum(self.i, 0), sigma, np.maximum(self.bg, 0), **options
        )


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    wide = dict(cell=(60.0, 60.0, 320.0, 90.0, 90.0, 90.0), psf_px=1.5, photons_mean=500.0)
    config = SimulationConfig.preset("overlap", image_size_px=(300, 300), d_min=3.0, **(PLAIN | wide))
    return Integrated(tmp_path_factory.mktemp("crowded"), config)


def test_half_the_error_of_the_nearest_owner(crowded):
    """Neighbours that share 30 % of their profiles: R against the true photons at most half of that of masking."""
    found, truth = crowded.joint(), crowded.truth
    assert 0.2 < np.median(truth["shared"]) < 0.4
    good = (truth["fraction_recorded"][found.rows] > 0.97) & (found.var_i > 0) & (crowded.var[found.rows] > 0)
    good &= np.isfinite(crowded.var[found.rows])
    z = crowded.store.metadata["xyzcal_px"][found.rows, 2]
    good &= (z > 1.5) & (z < 6.5)  # no spot from beyond the scan, which nobody predicted, leaks in here
    rows = found.rows[good]
    assert len(rows) > 200
    true, held = truth["photons"][rows], crowded.coverage[rows]
    error = {"joint": found.i[good] / held - true, "masked": crowded.i[rows] / held - true}
    r = {name: np.abs(e).sum() / true.sum() for name, e in error.items()}
    assert r["joint"] < 0.5 * r["masked"]
    pull = error["joint"] * held / np.sqrt(found.var_i[good])
    assert abs(pull.mean()) < 3 / np.sqrt(len(pull)) and 0.9 < pull.std() < 1.1
    weak = true < 0.2 * np.median(true)
    assert weak.sum() > 30
    assert abs(error["joint"][weak].mean()) < 3 * error["joint"][weak].std() / np.sqrt(weak.sum())
    assert error["masked"][weak].mean() > 3 * abs(error["joint"][weak].mean())  # what leaks in stays in
    assert (found.n_neighbours[good] > 0).all() and (found.shared[good] > 0).all()
    np.testing.assert_allclose(found.bg[good].mean(), truth["background"][rows].mean(), rtol=0.05)


def test_slabs_and_batches_do_not_matter(crowded, monkeypatch):
    whole = crowded.joint()
    monkeypatch.setattr("xtalfast.integration.joint_fit.SLAB", 100)
    parts = crowded.joint(batch=7)
    a, b = np.argsort(whole.rows), np.argsort(parts.rows)
    np.testing.assert_array_equal(whole.rows[a], parts.rows[b])
    np.testing.assert_array_equal(whole.n_neighbours[a], parts.n_neighbours[b])
    np.testing.assert_allclose(whole.i[a], parts.i[b], rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(whole.var_i[a], parts.var_i[b], rtol=1e-3)


def test_pixels_left_out_and_background_shapes_are_obeyed(crowded):
    usual = crowded.joint()

    def nothing(view, rows):
        return np.ones((len(rows), view.n_pixels), np.float32), np.ones((len(rows), view.n_pixels), bool)

    def flat(view, rows):
        return np.ones((len(rows), view.n_pixels), np.float32), np.zeros((len(rows), view.n_pixels), bool)

    def tilted(view, rows):
        shape = np.linspace(0.5, 1.5, view.n_pixels, dtype=np.float32)
        return np.tile(shape, (len(rows), 1)), np.zeros((len(rows), view.n_pixels), bool)

    empty = crowded.joint(background_of=nothing)
    assert (empty.var_i == -1).all() and (empty.i == 0).all()
    np.testing.assert_array_equal(usual.i, crowded.joint(background_of=flat).i)
    assert np.abs(crowded.joint(background_of=tilted).i - usual.i).max() > 1


def test_only_candidates_are_looked_at(crowded):
    candidates = np.arange(crowded.store.n) % 2 == 0
    found = crowded.joint(candidates=candidates)
    assert candidates[found.rows].all() and len(crowded.joint(candidates=np.zeros(crowded.store.n, bool)).rows) == 0


def test_spots_that_stand_apart_are_left_alone(tmp_path):
    small = dict(cell=(20.0, 20.0, 28.0, 90.0, 90.0, 90.0), distance_mm=100.0)
    apart = Integrated(tmp_path, SimulationConfig.tiny(**(PLAIN | small)))
    assert len(apart.joint().rows) == 0


def test_wilson_mean_is_the_posterior_mean():
    i, sd = np.array([-5.0, 3.0, 200.0, 0.5]), np.array([4.0, 2.0, 15.0, 3.0])
    shape, rate = np.array([1.0, 1.0, 1.0, 0.5]), np.array([0.1, 0.0, 0.005, 0.02])
    mean, var = wilson_mean(i, sd**2, shape, rate)
    for k in range(4):

        def weight(x, power, k=k):
            return x ** (power + shape[k] - 1) * np.exp(-rate[k] * x) * stats.norm.pdf(x, i[k], sd[k])

        moment = [integrate.quad(weight, 0, 400, (m,), points=[1e-3, max(i[k], 1)], limit=500)[0] for m in range(3)]
        assert mean[k] == pytest.approx(moment[1] / moment[0], rel=2e-3)
        assert var[k] == pytest.approx(moment[2] / moment[0] - (moment[1] / moment[0]) ** 2, rel=5e-3)
