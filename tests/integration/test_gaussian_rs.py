"""Reciprocal-space profiles against photons that were traced one by one through a mosaic crystal."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from xtalfast.errors import InputError
from xtalfast.integration.gaussian_rs import CellGrid, ReferenceProfiles, SpotShape, SpotWidths, select_strong
from xtalfast.integration.spot_shape import fit_widths, spot_geometry
from xtalfast.models import Goniometer

TRUE = SpotShape((0.8, 0.15, 0.5), float(np.radians(0.15)), 3e-4)
WIDTHS = SpotWidths(1.5e-3, float(np.radians(0.15)))


def gaussian(store, shape: SpotShape = TRUE) -> ReferenceProfiles:
    cells = CellGrid((-1.0, -1.0, 0.0), (1.0, 1.0, 60.0), (1, 1, 1))
    return ReferenceProfiles(store, [store.experiment], WIDTHS, shape, cells)


def deviance_per_voxel(store, profiles: ReferenceProfiles) -> float:
    """Poisson deviance of spots without background against the model, per voxel with an expectation above 1."""
    rows = np.arange(store.n)
    profile, coverage = (t.numpy().astype(float) for t in profiles.profiles_and_coverage(rows))
    rate = store.intensity[:, None] * coverage[:, None] * profile
    counts, rate = store.values[rate > 1].astype(float), rate[rate > 1]
    return float(
        2 * np.mean(np.where(counts > 0, counts * np.log(np.maximum(counts, 1) / rate), 0.0) - (counts - rate))
    )


class WithoutShear(ReferenceProfiles):
    """The frame as Kabsch has it: spots do not move from image to image."""

    def _whitened(self, geometry):
        return super()._whitened(geometry._replace(shear=torch.zeros_like(geometry.shear)))


def test_the_gaussian_model_is_the_distribution_of_the_traced_photons(traced) -> None:
    """With the true parameters the deviance is that of Poisson noise: 1, and up to 1.15 for voxels of a few counts."""
    store = traced(100, intensity=4000.0, background=0.0)
    assert 0.9 < deviance_per_voxel(store, gaussian(store)) < 1.25


def test_spots_move_from_image_to_image(traced) -> None:
    """The tenth of the spots with the largest shear needs it: without it the deviance is no longer that of noise."""
    wide = replace(TRUE, mosaicity=float(np.radians(0.4)))
    store = traced(200, intensity=2000.0, background=0.0, mosaicity=wide.mosaicity, box=(5, 15, 15))
    shear = spot_geometry(store, [store.experiment], np.arange(store.n)).shear.abs().numpy()
    store = store.select(np.argsort(-shear)[:20])
    profiles = gaussian(store, wide)
    without = WithoutShear(store, [store.experiment], WIDTHS, wide, profiles.cells)
    assert deviance_per_voxel(store, profiles) < 1.15 < deviance_per_voxel(store, without)


def test_coverage_and_partiality_are_the_shares_of_photons(traced) -> None:
    store = traced(200, intensity=5000.0, background=0.0, box=(3, 11, 11), edge=True)
    profiles = gaussian(store)
    rows = np.arange(store.n)
    error = 4 * 0.5 / np.sqrt(5000.0)  # four standard errors of a share
    assert np.abs(profiles.coverage(rows).numpy() - store.held).max() < error
    assert np.abs(profiles.partiality(rows).numpy() - store.recorded).max() < error
    assert store.recorded.min() < 0.8  # the scan does cut some of them


def test_profiles_sum_to_one_and_do_not_depend_on_the_chunk(traced) -> None:
    store = traced(50, edge=True)
    for profiles in (gaussian(store), ReferenceProfiles.fit(traced(100), [store.experiment])):
        profiles.store = store
        rows = np.array([3, 49, 0, 7, 7])
        profile = profiles.profiles(rows)
        assert profile.shape == (5, store.n_pixels) and profile.dtype == torch.float32
        assert (profile >= 0).all()
        assert torch.allclose(profile.sum(dim=1), torch.ones(5), atol=1e-5)
        assert torch.allclose(profile, profiles.profiles(rows, chunk=2), atol=1e-7)
        assert profiles.profiles(rows[:0]).shape == (0, store.n_pixels)


def test_the_shape_is_recovered_from_the_spots(traced) -> None:
    store = traced(300, intensity=1500.0, background=1.0)
    fitted = ReferenceProfiles.fit(store, [store.experiment], learn=False)
    assert fitted.shape.mosaicity == pytest.approx(TRUE.mosaicity, rel=0.05)
    assert fitted.shape.psf == pytest.approx(TRUE.psf, rel=0.1)
    assert fitted.shape.lattice == pytest.approx(TRUE.lattice, rel=0.25)


def test_widths_are_the_moments_of_the_spots(traced) -> None:
    """sigma_b from the true second moments; sigma_m from a crystal whose rocking width is the mosaicity alone."""
    store = traced(200, intensity=2000.0, background=0.2, lattice=1e-6, box=(5, 15, 15))
    widths = fit_widths(store, [store.experiment], select_strong(store))
    assert widths.sigma_m == pytest.approx(TRUE.mosaicity, rel=0.05)
    geometry = spot_geometry(store, [store.experiment], np.arange(store.n))
    psf = torch.tensor([[0.8, 0.15], [0.15, 0.5]]) + torch.eye(2) / 12
    spread = geometry.jacobian @ psf @ geometry.jacobian.mT
    square = torch.diagonal(spread, dim1=1, dim2=2).sum(dim=1) + (TRUE.mosaicity * geometry.two_sin_theta) ** 2
    # rays that diffract early or late are displaced too, so the true moment is a little larger than this
    assert float((square.mean() / 2).sqrt()) < widths.sigma_b * 1.02 < 1.15 * float((square.mean() / 2).sqrt())


def test_learning_improves_on_the_gaussian_only_where_spots_are_none(traced) -> None:
    """Split spots are learned; the learned density predicts new spots better than the Gaussian."""
    store = traced(250, intensity=1500.0, split=4.0, seed=1, box=(3, 13, 13))
    learned = ReferenceProfiles.fit(store, [store.experiment])
    assert learned.density is not None
    assert max(learned.history) > learned.history[0] + 0.01
    assert torch.allclose(learned.density.sum(dim=(1, 2, 3)), torch.ones(learned.cells.n), atol=1e-4)
    fresh = traced(50, intensity=4000.0, background=0.0, split=4.0, seed=2, box=(3, 13, 13))
    flat = ReferenceProfiles(fresh, [fresh.experiment], learned.widths, learned.shape, learned.cells)
    better = replace_store(learned, fresh)
    assert deviance_per_voxel(fresh, better) < 0.7 * deviance_per_voxel(fresh, flat)


def replace_store(profiles: ReferenceProfiles, store) -> ReferenceProfiles:
    return ReferenceProfiles(
        store, [store.experiment], profiles.widths, profiles.shape, profiles.cells, profiles.density, profiles.history
    )


def test_too_few_spots_fall_back_on_the_profile_block_or_say_so(traced) -> None:
    store = traced(20)
    with pytest.raises(InputError, match="at least 30 strong"):
        ReferenceProfiles.fit(store, [store.experiment])
    block = {"n_sigma": 4.0, "sigma_b": 0.08, "sigma_m": 0.2}
    profiles = ReferenceProfiles.fit(store, [replace(store.experiment, profile=block)])
    assert profiles.density is None and profiles.n_strong == 20
    assert profiles.widths == SpotWidths(np.radians(0.08), np.radians(0.2), 4.0)
    assert profiles.shape.mosaicity == pytest.approx(np.radians(0.2))
    assert float(profiles.profiles(np.arange(20)).sum()) == pytest.approx(20, rel=1e-5)


def test_a_still_has_no_rotation_part(traced) -> None:
    store = traced(200, box=(1, 15, 15), still=True, lattice=1e-6, mosaicity=1e-6)
    profiles = ReferenceProfiles.fit(store, [store.experiment])
    assert profiles.widths.sigma_m == 0.0
    assert profiles.shape.psf == pytest.approx(TRUE.psf, rel=0.15)
    assert float(profiles.partiality(np.arange(5)).min()) == 1.0


def test_saved_profiles_come_back_and_other_files_are_refused(traced, tmp_path) -> None:
    store = traced(100)
    profiles = ReferenceProfiles.fit(store, [store.experiment])
    profiles.save(tmp_path / "profiles.npz")
    again = ReferenceProfiles.load(tmp_path / "profiles.npz", store, [store.experiment])
    rows = np.arange(store.n)
    assert torch.equal(again.profiles(rows), profiles.profiles(rows))
    assert (again.widths, again.shape, again.cells) == (profiles.widths, profiles.shape, profiles.cells)
    assert again.history == profiles.history and again.n_strong == profiles.n_strong
    (tmp_path / "other.npz").write_bytes(b"no")
    with pytest.raises(InputError, match="holds no reference profiles"):
        ReferenceProfiles.load(tmp_path / "other.npz", store, [store.experiment])


def test_strong_spots_are_strong_and_their_centres_unmasked(traced) -> None:
    strength = np.where(np.arange(120) % 2 == 0, 2000.0, 5.0)
    store = traced(120, intensity=strength)
    store.bits = store.bits.reshape(120, 3, 15, 15)
    store.bits[:20, 1, 7, 7] |= 32
    store.bits = store.bits.reshape(120, -1)
    strong = select_strong(store)
    assert set(strong.rows) == set(range(20, 120, 2))
    assert strong.background == pytest.approx(0.5, abs=0.2)
    assert len(select_strong(store, n_max=10).rows) == 10


def test_cells_share_every_reflection_and_blocks_follow_the_rotation() -> None:
    cells = CellGrid((-1.0, -1.0, 0.0), (1.0, 1.0, 60.0), (3, 3, 2))
    at = np.array([[-1, -1, 0], [1, 1, 60], [0, 0, 15], [0, 0, 30], [5, 0, 15]], float)
    weights = cells.weights(at)
    assert weights.shape == (5, 18)
    assert torch.allclose(weights.sum(dim=1), torch.ones(5))
    assert weights[0].argmax() == 0 and weights[1].argmax() == 17  # corner cells
    assert weights[2, 4 * 2] == 1  # middle cell, first block
    assert weights[3, 8] == weights[3, 9] == 0.5  # between the blocks


def test_the_profile_block_survives_its_round_trip() -> None:
    assert SpotWidths.from_profile(None) is None
    assert SpotWidths.from_profile({"__id__": "ellipsoid"}) is None
    assert SpotWidths.from_profile({"sigma_b": 0.0, "sigma_m": 0.1}) is None
    varying = SpotWidths.from_profile({"sigma_b": [0.1, 0.3], "sigma_m": [0.2, 0.2], "n_sigma": 3})
    assert varying.sigma_b == pytest.approx(np.radians(0.2))
    again = SpotWidths.from_profile(varying.to_profile())
    assert (again.sigma_b, again.sigma_m, again.n_sigma) == pytest.approx((varying.sigma_b, varying.sigma_m, 3.0))


def test_every_reflection_uses_its_own_experiment(traced) -> None:
    store = traced(40)
    other = replace(store.experiment, goniometer=Goniometer(np.array([0.0, 1.0, 0.0])))
    alone = gaussian(store).profiles(np.arange(40))
    store.metadata["id"] = np.arange(40) % 2
    profiles = ReferenceProfiles(store, [store.experiment, other], WIDTHS, TRUE, gaussian(store).cells)
    both = profiles.profiles(np.arange(40))
    assert torch.equal(both[::2], alone[::2])
    assert not torch.allclose(both[1::2], alone[1::2])
