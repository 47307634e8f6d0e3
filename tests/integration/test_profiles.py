"""Spot-shape heads: normalised, centred at the start, with gradients; the moments they start from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from xtalfast.errors import InputError
from xtalfast.integration.config import ProfileConfig
from xtalfast.integration.data import read_batch
from xtalfast.integration.profiles import GammaHead, GivenProfile, make_profile_head, moments_start, quadratic_modes
from xtalfast.integration.statistics import DataStatistics, voxel_grid
from xtalfast.ops.profiles import materialise

LEARNED = ("softmax", "lowrank", "mvn")


def head_and_batch(spots, kind, box=(3, 9, 9), n=200):
    batch = read_batch(store := spots(n, box), np.arange(n))
    torch.manual_seed(1)
    head = make_profile_head(ProfileConfig(kind=kind), 64, box)
    head.set_statistics(DataStatistics.of(batch))
    return store, batch, head


@pytest.mark.parametrize("box", [(3, 9, 9), (1, 9, 9)], ids=["3x9x9", "1x9x9"])
@pytest.mark.parametrize("kind", LEARNED)
def test_sums_to_one_over_the_whole_box(spots, kind, box):
    _, batch, head = head_and_batch(spots, kind, box)
    p = materialise(head(torch.randn(len(batch), 64), batch))
    assert p.shape == batch.counts.shape
    assert (p >= 0).all()
    assert torch.allclose(p.sum(1), torch.ones(len(batch)), atol=1e-5)


@pytest.mark.parametrize("kind", LEARNED)
def test_starts_at_a_spot_on_the_predicted_centroid(spots, kind):
    """Nearer to the true shapes than the one mean shape is, and its centre of mass follows the centroid."""
    store, batch, head = head_and_batch(spots, kind, n=600)
    mean = DataStatistics.of(batch).profile
    p = materialise(head(torch.zeros(len(batch), 64), batch)).detach()
    truth = torch.from_numpy(store.profile)
    assert (p - truth).abs().sum() < 0.8 * (mean - truth).abs().sum()
    centre = p @ voxel_grid(batch.box)
    slope = (centre * batch.offset).sum(0) / batch.offset.square().sum(0)
    assert (slope[1:] > 0.7).all() and (slope[1:] < 1.3).all()


@pytest.mark.parametrize("kind", LEARNED)
def test_every_parameter_gets_a_gradient(spots, kind):
    store, batch, head = head_and_batch(spots, kind)
    latent = torch.randn(len(batch), 64, requires_grad=True)
    loss = -(torch.from_numpy(store.profile) * materialise(head(latent, batch)).clamp(min=1e-12).log()).sum()
    loss.backward()
    for name, p in head.named_parameters():
        assert torch.isfinite(p.grad).all() and p.grad.abs().max() > 0, name
    assert latent.grad.abs().max() > 0


def test_mvn_is_the_normal_density(spots):
    _, batch, head = head_and_batch(spots, "mvn")
    profile = head(torch.randn(len(batch), 64), batch)
    covariance = profile.scale_tril @ profile.scale_tril.mT
    normal = torch.distributions.MultivariateNormal(profile.mean[:, None], covariance[:, None])
    expected = torch.softmax(normal.log_prob(profile.grid), 1)
    assert torch.allclose(materialise(profile), expected, rtol=1e-3, atol=1e-7)


def test_quadratic_modes_are_what_shift_and_width_do_to_a_gaussian():
    box, sd = (3, 21, 21), torch.tensor([0.8, 1.5, 2.0])
    grid = voxel_grid(box)

    def gauss(shift, sd):
        return torch.log_softmax(-0.5 * (((grid - shift) / sd) ** 2).sum(1), 0)

    # as a sub-voxel centroid spread over +-1/2 widens the mean spot
    widened = torch.sqrt(sd**2 + 1 / 12)
    mean = gauss(torch.zeros(3), widened).exp()
    shifts, _ = quadratic_modes(mean, box)
    near = (grid / sd).square().sum(1) < 2
    for axis in (1, 2):
        step = torch.zeros(3)
        step[axis] = 0.1
        change = (gauss(step, sd) - gauss(torch.zeros(3), sd))[near] / 0.1
        assert torch.allclose(shifts[axis][near], change, atol=0.15 * float(change.abs().max()))


def test_still_boxes_do_not_shift_along_z(spots):
    store = spots(50, (1, 9, 9))
    shifts, widths = quadratic_modes(DataStatistics.of(read_batch(store, np.arange(50))).profile, (1, 9, 9))
    assert not shifts[0].any() and torch.isfinite(widths).all()


def test_mean_profile_is_that_of_the_strong_spots(spots):
    store = spots(2000, intensity=3000.0)
    found = DataStatistics.of(read_batch(store, np.arange(2000))).profile
    truth = torch.from_numpy(store.profile.mean(0))
    assert (found - truth).abs().sum() / 2 < 0.05
    assert float(found.sum()) == pytest.approx(1, abs=1e-5) and float(found.min()) > 0


def test_weak_data_start_at_a_centred_gaussian(spots):
    batch = read_batch(spots(200, intensity=0.1), np.arange(200))
    profile = DataStatistics.of(batch).profile.view(3, 9, 9)
    assert torch.allclose(profile, profile.flip(0, 1, 2)) and profile.argmax() == 1 * 81 + 4 * 9 + 4


def test_given_profile_must_be_given(spots):
    batch = read_batch(spots(3), np.arange(3))
    with pytest.raises(InputError, match="reference_profiles"):
        GivenProfile()(torch.zeros(3, 64), batch)


def test_moments_find_intensity_and_background(spots):
    """Least squares with the true shape: unbiased, and the standard deviation it states is its error."""
    store = spots(3000, (3, 15, 15))
    batch = read_batch(store, np.arange(store.n), store)
    log_i, log_cv, log_bg, _ = (t.double().numpy() for t in moments_start(batch, batch.profile))
    strong = store.intensity > 300
    pull = (np.exp(log_i) - store.intensity)[strong] / np.exp(log_i + log_cv)[strong]
    assert abs(pull.mean()) < 0.15 and 0.9 < pull.std() < 1.2
    assert np.exp(log_bg).mean() == pytest.approx(store.background.mean(), rel=0.03)


def test_moments_of_empty_and_blind_boxes_are_finite(spots):
    batch = read_batch(spots(20), np.arange(20))
    mean = DataStatistics.of(batch).profile
    empty = replace(batch, counts=torch.zeros_like(batch.counts))
    blind = replace(batch, mask=torch.zeros_like(batch.mask))
    for case in (empty, blind):
        for value in moments_start(case, mean):
            assert torch.isfinite(value).all()
    log_i, *_ = moments_start(empty, mean)
    assert (log_i.exp() < 10).all()


def test_gamma_head_starts_where_it_is_told_and_stays_finite():
    head = GammaHead(66)
    log_mean, log_cv = torch.tensor([0.0, 5.0, 10.0]), torch.tensor([0.0, -1.0, -4.0])
    shape, rate = head(torch.zeros(3, 66), log_mean, log_cv)
    assert torch.allclose((shape / rate).log(), log_mean, atol=1e-4)
    assert torch.allclose(-0.5 * shape.log(), log_cv, atol=1e-5)
    for extreme in (-1e6, 1e6):
        shape, rate = head(torch.full((1, 66), extreme), torch.tensor([extreme]), torch.tensor([extreme]))
        assert torch.isfinite(shape).all() and torch.isfinite(rate).all() and (rate > 0).all()
