"""Boxes that follow the spot model: covariances against the simulator's voxels, sizes, and stores of several sizes."""

from dataclasses import replace

import numpy as np
import pytest

from xtalfast.integration.boxes import MAX_IMAGES, spot_boxes, spot_covariance
from xtalfast.integration.gaussian_rs import ReferenceProfiles, SpotShape
from xtalfast.integration.predict import predict
from xtalfast.integration.shoeboxes import extract_store
from xtalfast.integration.simulate import Simulation, SimulationConfig, simulate
from xtalfast.integration.simulate_spots import voxel_shares
from xtalfast.integration.store import ShoeboxStore
from xtalfast.io import read_expt, read_refl

# A crystal without beam divergence, bandwidth and sensor depth is what SpotShape describes exactly.
PLAIN = dict(divergence_deg=0.0, bandwidth=0.0, oblique_depth_mm=0.0, n_images=40, mosaicity_deg=0.2)


@pytest.fixture(scope="module")
def simulation():
    return Simulation(SimulationConfig.tiny(**PLAIN))


@pytest.fixture(scope="module")
def shape(simulation):
    config = simulation.config
    lattice = 0.9 / config.block_size_a / np.sqrt(8 * np.log(2))
    return SpotShape((config.psf_px**2, 0.0, config.psf_px**2), np.radians(config.mosaicity_deg), lattice)


def test_covariance_is_that_of_the_simulated_voxels(simulation, shape):
    """Second moments of the simulated shares of well recorded spots, pixel widths (1/12) taken off."""
    spots = simulation.predictions
    covariance = spot_covariance(simulation.experiment, shape, spots.panel, spots.s1)
    np.testing.assert_allclose(covariance, simulation.truth()["covariance"], rtol=1e-9, atol=1e-12)
    z = spots.xyz_px[:, 2]
    row = int(np.argmin(np.abs(z - 20) + 100 * (covariance[:, 2, 2] > 4)))
    shares = voxel_shares(spots.xyz_px[row : row + 1], covariance[row : row + 1], (40, 200, 200), 0)
    at = np.stack(np.unravel_index(shares.voxel, (40, 200, 200)))[::-1] + 0.5
    mean = at @ shares.share
    moments = (at - mean[:, None]) * shares.share @ (at - mean[:, None]).T - np.eye(3) / 12
    np.testing.assert_allclose(moments, covariance[row], atol=0.03)


def test_boxes_hold_the_spot(simulation, shape):
    spots = simulation.predictions
    covariance = spot_covariance(simulation.experiment, shape, spots.panel, spots.s1)
    bbox = spot_boxes(covariance, spots.xyz_px)
    shares = voxel_shares(spots.xyz_px, covariance, (40, 200, 200), 0)
    z, y, x = np.unravel_index(shares.voxel, (40, 200, 200))
    inside = np.ones(len(shares.row), bool)
    for axis, at in enumerate((x, y, z)):
        inside &= (at >= bbox[shares.row, 2 * axis]) & (at < bbox[shares.row, 2 * axis + 1])
    total, held = (np.bincount(shares.row, shares.share * w, len(spots)) for w in (1.0, inside))
    length = bbox[:, 5] - bbox[:, 4]
    assert (held[length < MAX_IMAGES] > 0.997 * total[length < MAX_IMAGES]).all()
    assert length.max() > 3 * length.min()  # low zeta, long boxes
    size = (bbox[:, 1::2] - bbox[:, ::2])[:, ::-1]
    assert len(np.unique(size, axis=0)) < 40
    assert ((bbox[:, ::2] <= spots.xyz_px) & (spots.xyz_px < bbox[:, 1::2])).all()
    reach = 3.5 * np.sqrt(covariance[:, :2, :2].diagonal(axis1=1, axis2=2))
    for k in range(2):
        assert (spots.xyz_px[:, k] - reach[:, k] - bbox[:, 2 * k] >= 4).all()  # background on both sides
        assert (bbox[:, 2 * k + 1] - spots.xyz_px[:, k] - reach[:, k] >= 4).all()


def test_box_grows_with_each_width(simulation, shape):
    spots = simulation.predictions

    def volume(**changes):
        wide = replace(shape, **changes)
        boxes = spot_boxes(spot_covariance(simulation.experiment, wide, spots.panel, spots.s1), spots.xyz_px)
        return (boxes[:, 1::2] - boxes[:, ::2]).prod(axis=1).mean()

    usual = volume()
    assert usual < volume(mosaicity=2 * shape.mosaicity)
    assert usual < volume(psf=(4.0, 0.0, 4.0))
    assert usual < volume(lattice=0.003)


def test_spots_on_the_rotation_axis_are_finite_and_cut(simulation, shape):
    """zeta = 0: the spot lasts for ever, its box as long as allowed."""
    beam, axis = simulation.experiment.beam, simulation.experiment.goniometer.lab_axis
    s1 = beam.s0 + 0.2 * axis
    s1 *= np.linalg.norm(beam.s0) / np.linalg.norm(s1)
    panel = np.zeros(1, np.int64)
    covariance = spot_covariance(simulation.experiment, shape, panel, s1[None])
    assert np.isfinite(covariance).all() and covariance[0, 2, 2] > 100
    bbox = spot_boxes(covariance, np.array([[100.0, 100.0, 10.0]]), max_images=24)
    assert bbox[0, 5] - bbox[0, 4] == 24 and bbox[0, 4] <= 10 < bbox[0, 5]
    nowhere = spot_boxes(covariance, np.array([[np.nan, 100.0, 10.0]]))
    assert (nowhere[0, 1::2] > nowhere[0, ::2]).all()


def test_stills_have_boxes_of_one_image(simulation, shape):
    still = replace(simulation.experiment, goniometer=None, scan=None)
    spots = predict(still, 2.6)
    covariance = spot_covariance(still, shape, spots.panel, spots.s1)
    assert covariance.shape == (len(spots), 2, 2)
    assert (np.linalg.eigvalsh(covariance) >= shape.psf[0] - 1e-9).all()
    bbox = spot_boxes(covariance, spots.xyz_px)
    assert (bbox[:, 5] - bbox[:, 4] == 1).all()


@pytest.fixture(scope="module")
def ragged(tmp_path_factory, shape):
    """A store with boxes of several sizes, and one of the largest size, of the same reflections."""
    folder = tmp_path_factory.mktemp("ragged")
    files = simulate(folder / "data", SimulationConfig.tiny(**PLAIN))
    experiments, table = read_expt(files.expt), read_refl(files.refl)
    covariance = spot_covariance(experiments[0], shape, table["panel"], table["s1"])
    table["bbox"] = spot_boxes(covariance, table["xyzcal.px"])
    store = extract_store(table, experiments, folder / "ragged", box="bbox")
    return store, experiments


def test_views_share_out_the_rows(ragged):
    store, _ = ragged
    views = list(store.by_size())
    assert len(views) > 3 and [v.n for v in views] == sorted((v.n for v in views), reverse=True)
    np.testing.assert_array_equal(np.sort(np.concatenate([v.rows for v in views])), np.arange(store.n))
    for view in views:
        bbox = view.metadata["bbox"]
        np.testing.assert_array_equal(bbox[:, 1::2] - bbox[:, ::2], np.tile(view.box[::-1], (view.n, 1)))
        rows = np.arange(view.n)[::-1]
        counts = store.counts(view.rows[rows])[0]
        np.testing.assert_array_equal(view.counts(rows), counts.reshape(view.n, -1))
        np.testing.assert_array_equal(view.mask(rows).ravel(), store.mask(view.rows[rows])[0])
        assert view.counts(rows).shape == (len(view), view.n_pixels)
    some = list(store.by_size(np.arange(0, store.n, 7)))
    np.testing.assert_array_equal(np.sort(np.concatenate([v.rows for v in some])), np.arange(0, store.n, 7))


def test_a_store_of_one_size_is_one_view(tmp_path):
    counts = np.arange(24, dtype=np.int32).reshape(2, 12)
    bbox = np.tile([0, 2, 0, 3, 0, 2], (2, 1))
    store = ShoeboxStore.create(tmp_path / "s", counts, np.ones((2, 12), np.uint8), {"bbox": bbox}, box=(2, 3, 2))
    (view,) = store.by_size()
    assert view.box == (2, 3, 2)
    np.testing.assert_array_equal(view.counts(np.array([1])), counts[1:])


def test_profiles_of_views_sum_to_one_and_cover_the_spot(ragged, shape):
    """What works on a store of one size works on each view: low-zeta spots are held by their long boxes."""
    store, experiments = ragged
    coverage = np.zeros(store.n)
    learned = ReferenceProfiles.fit(next(store.by_size()), experiments, learn=False)
    for view in store.by_size():
        profiles = ReferenceProfiles(view, experiments, learned.widths, shape, learned.cells)
        shares, held = profiles.profiles_and_coverage(np.arange(view.n))
        np.testing.assert_allclose(shares.sum(dim=1), 1, atol=1e-5)
        coverage[view.rows] = held
    z, zeta = store.metadata["xyzcal_px"][:, 2], np.abs(store.metadata["zeta"][:])
    inside = (z > 8) & (z < 32) & (zeta > 0.1)
    assert inside.sum() > 200 and (coverage[inside] > 0.995).all()
