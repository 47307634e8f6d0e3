"""Background shapes: each model recovers what it describes, unbiased under the spot, safe against zingers."""

from dataclasses import replace

import numpy as np
import pytest

from xtalfast.integration.background import robust_background
from xtalfast.integration.background_shapes import Kind, RadialBackground, choose_background, inverse_resolution
from xtalfast.integration.shoeboxes import extract_store
from xtalfast.integration.simulate import SimulationConfig, simulate
from xtalfast.integration.strong_spots import select_strong
from xtalfast.io import read_expt, read_refl
from xtalfast.masks import used_pixels

BOX, N = (3, 17, 17), 600
Y, X = np.meshgrid(np.linspace(-1, 1, 17), np.linspace(-1, 1, 17), indexing="ij")
RING = np.exp(-0.5 * ((8 * X + 2 * Y - 1) / 1.2) ** 2)
SPOT = np.zeros(BOX, bool)
SPOT[:, 5:12, 5:12] = True


def draw(rate, seed=0):
    counts = np.random.default_rng(seed).poisson(np.broadcast_to(rate, (N, *BOX))).reshape(N, -1)
    return counts, np.broadcast_to(~SPOT.ravel(), counts.shape)


def under_the_spot(found, rate):
    """Mean and standard error of the background given to the pixels of the spot, minus the true one, per pixel."""
    error = (found.shape * found.mean[:, None])[:, SPOT.ravel()].mean(1) - np.broadcast_to(rate, BOX)[SPOT].mean()
    return error.mean(), error.std() / np.sqrt(len(error))


@pytest.mark.parametrize(
    ("rate", "template", "kind"),
    [
        (np.full((17, 17), 0.05), None, Kind.Flat),
        (np.full((17, 17), 6.0), None, Kind.Flat),
        (8 * (1 + 0.3 * X - 0.2 * Y), None, Kind.Plane),
        (3 * np.exp(0.8 * X), None, Kind.LogLinear),
        (4 + 12 * RING, 4 + 12 * RING, Kind.Radial),
        (4 + 5 * RING, 4 + 12 * RING, Kind.Radial),  # the ring is weaker here than in the mean of the data set
        (np.full((17, 17), 4.0), 4 + 12 * RING, Kind.Radial),  # and here there is none
    ],
    ids=["flat-0.05", "flat-6", "plane", "log-linear", "ring", "weak-ring", "no-ring"],
)
def test_each_shape_is_found_and_unbiased_under_the_spot(rate, template, kind):
    counts, use = draw(rate)
    given = None if template is None else np.broadcast_to(template, (N, 17, 17))
    found = choose_background(counts, use, BOX, template=given)
    assert (found.kind == kind).mean() > (0.9 if kind != Kind.Plane else 0.7)
    mean, error = under_the_spot(found, rate)
    assert abs(mean) < max(3 * error, 0.004 * rate.mean())
    np.testing.assert_allclose(found.shape.mean(axis=1), 1, atol=1e-5)
    pull = (found.mean - rate.mean()) / np.sqrt(found.variance)
    assert 0.9 < pull.std() < 1.1
    assert found.dispersion.mean() == pytest.approx(1, abs=0.02)
    assert found.outlier.mean() < 2e-4


def test_a_ring_without_its_template_would_bias_a_flat_background():
    """The control: what the radial model is for."""
    rate = 4 + 12 * RING
    counts, use = draw(rate)
    flat = robust_background(counts, use)
    assert flat.mean.mean() < 0.7 * rate[5:12, 5:12].mean()
    found = choose_background(counts, use, BOX, template=np.broadcast_to(rate, (N, 17, 17)))
    assert abs(under_the_spot(found, rate)[0]) < 0.01 * rate.mean()


def test_zingers_and_a_neighbours_tail_are_left_out():
    rate = 2 * np.exp(0.5 * X)
    counts, use = draw(rate)
    clean, _ = under_the_spot(choose_background(counts, use, BOX), rate)
    counts = counts.copy()
    counts[:, 3] += 400
    counts[:, 40:43] += 25
    found = choose_background(counts, use, BOX)
    assert found.outlier[:, [3, 40, 41, 42]].all() and found.outlier.sum() < 4.2 * N
    mean, error = under_the_spot(found, rate)
    assert abs(mean - clean) < 2 * error < 0.01


def test_counts_of_a_charge_integrating_detector():
    """Counts that scatter 6 times as much as photons: no false slopes, honest variance, the dispersion as measured."""
    rng = np.random.default_rng(1)
    counts = np.rint(6 * rng.poisson(5.0, (N, np.prod(BOX))))
    use = np.broadcast_to(~SPOT.ravel(), counts.shape)
    found = choose_background(counts, use, BOX, dispersion=6.0)
    assert (found.kind == Kind.Flat).mean() > 0.97
    assert found.dispersion.mean() == pytest.approx(6, rel=0.03)
    assert ((found.mean - 30) / np.sqrt(found.variance)).std() == pytest.approx(1, abs=0.08)
    assert (choose_background(counts, use, BOX).kind == Kind.Flat).mean() < 0.8  # taken for photons


def test_edges():
    counts, use = draw(np.full((17, 17), 1.0))
    nothing = choose_background(counts[:2], np.zeros((2, counts.shape[1]), bool), BOX)
    assert nothing.mean.tolist() == [0, 0] and np.isinf(nothing.variance).all() and (nothing.shape == 1).all()
    empty = choose_background(np.zeros((2, counts.shape[1])), use[:2], BOX)
    assert (empty.mean == 0).all() and (empty.variance > 0).all() and (empty.shape == 1).all()
    assert len(choose_background(counts[:0], use[:0], BOX).mean) == 0
    huge = choose_background(np.full((1, counts.shape[1]), 2**20, np.int32), use[:1], BOX)
    assert huge.mean[0] == pytest.approx(2**20)
    few = np.zeros(counts.shape[1], bool)
    few[:5] = True
    assert choose_background(counts[:3], np.tile(few, (3, 1)), BOX).kind.tolist() == [0, 0, 0]
    one = choose_background(counts[:4, :1], np.ones((4, 1), bool), (1, 1, 1))
    np.testing.assert_allclose(one.mean, counts[:4, 0])


@pytest.fixture(scope="module")
def icy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ice")
    config = SimulationConfig.tiny(
        cell=(20.0, 20.0, 28.0, 90.0, 90.0, 90.0),  # small, so that the boxes are not full of neighbours
        photons_mean=1e-6,
        ice_ring_photons=10.0,
        background_photons=3.0,
        n_images=100,
        oscillation_deg=1.5,
    )
    data = simulate(folder / "data", config)
    experiments = read_expt(data.expt)
    store = extract_store(read_refl(data.refl), experiments, folder / "store", box=(3, 17, 17))
    return store, experiments, np.load(data.truth)


def test_radial_background_of_a_data_set(icy):
    """Simulated ice rings without spots: the template is the true background, boxes across the rings are unbiased."""
    store, experiments, truth = icy
    rows = np.arange(store.n)
    counts, used = store.counts(rows), used_pixels(store.mask(rows))
    use = used & ~SPOT.ravel()
    radial = RadialBackground(experiments)
    for half in (rows[::2], rows[1::2]):
        radial.add(store, half, counts[half], use[half])
    template = radial.template(store, rows)
    centre = template[:, 8, 8]
    good = used[:, SPOT.ravel()].sum(axis=1) > 60
    expected = (truth["background"] / truth["scale"])[store.metadata["row"]]  # at the pixel of the spot
    on_ring = expected > 1.3 * np.median(expected)
    assert on_ring[good].sum() > 20
    assert np.corrcoef(centre[good], expected[good])[0, 1] > 0.97
    found = choose_background(counts, use, BOX, template=template)
    flat = robust_background(counts, use)
    below = np.einsum("np,np->n", counts, SPOT.ravel() & used)
    given = np.einsum("np,np->n", found.shape * found.mean[:, None], SPOT.ravel() & used)
    given_flat = flat.mean * (SPOT.ravel() & used).sum(axis=1)
    pull = (below - given) / np.sqrt(np.maximum(given, 1))
    pull_flat = (below - given_flat) / np.sqrt(np.maximum(given_flat, 1))
    near = good & (np.ptp(template.reshape(store.n, -1), axis=1) > 2)
    assert near.sum() > 40
    assert abs(pull[near].mean()) < 3 / np.sqrt(near.sum())
    assert 0.9 < pull[near].std() < 1.35 and pull_flat[near].std() > 1.5 * pull[near].std()


def test_inverse_resolution_is_braggs_law(icy):
    experiment = icy[1][0]
    panel, beam = experiment.detector[0], experiment.beam
    s = inverse_resolution(panel, beam.s0, beam.wavelength)
    at = np.array([[10.5, 150.5], [100.5, 3.5]])
    s1 = experiment.detector.s1_from_px(np.zeros(2, int), at, beam.wavelength)
    np.testing.assert_allclose(s[[150, 3], [10, 100]], np.linalg.norm(s1 - beam.s0, axis=1), rtol=1e-5)
    moved = replace(panel, origin=panel.origin * 2)
    assert inverse_resolution(moved, beam.s0, beam.wavelength).max() < s.max()


def test_ice_is_not_taken_for_strong_spots(icy):
    """Not a spot is in these images; rings look like some where the background of the data set is not known."""
    store, experiments, _ = icy
    assert len(select_strong(store, i_over_sigma=4.0).rows) > 0
    assert len(select_strong(store, experiments, i_over_sigma=4.0).rows) == 0
