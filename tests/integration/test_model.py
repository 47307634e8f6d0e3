"""Presets, the assembled network, its loss and the split-photon correction, and its use on a store."""

from __future__ import annotations

import tomllib
from dataclasses import replace

import numpy as np
import pytest
import torch

from xtalfast.errors import InputError
from xtalfast.integration.config import PRESETS, IntegrationConfig, LossConfig
from xtalfast.integration.data import ShoeboxLoader, read_batch
from xtalfast.integration.model import IntegrationModel, NetworkProfiles, PoissonGammaELBO, Posterior
from xtalfast.integration.statistics import DataStatistics
from xtalfast.ops import poisson_gamma_elbo
from xtalfast.ops.profiles import materialise

COMBINATIONS = ("fc/mvn", "cnn/mvn", "cnn/softmax", "cnn/lowrank", "cnn/dials")
NAMES = ("paper", "default")


def model_and_batch(store, combination="cnn/softmax", preset="default"):
    config = replace(IntegrationConfig.preset(preset).combined(combination), box=store.box)
    torch.manual_seed(0)
    model = IntegrationModel(config)
    batch = read_batch(store, np.arange(store.n), store if combination.endswith("dials") else None)
    model.set_statistics(DataStatistics.of(batch))
    return model, batch


@pytest.mark.parametrize("preset", NAMES)
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_parameter_counts_are_those_in_the_preset_file(preset, combination):
    stated = tomllib.loads((PRESETS / f"{preset}.toml").read_text())["parameters"]
    model = IntegrationModel(IntegrationConfig.preset(preset).combined(combination))
    assert model.n_parameters == stated[combination]


def test_paper_preset_is_table_1():
    config = IntegrationConfig.preset("paper")
    assert config.box == (3, 21, 21)
    assert IntegrationModel(config).encoder.stages[0].in_channels == 6
    assert (config.train.batch, config.train.epochs, config.train.lr) == (128, 10, 1e-3)
    loss = config.loss
    assert (loss.prior_i_shape, loss.prior_i_rate, loss.prior_bg_shape, loss.prior_bg_rate) == (1, 1, 1, 1)
    assert (loss.kappa_i, loss.kappa_bg) == (1e-4, 1e-4)
    assert (loss.estimator, config.encoder.latent, config.encoder.transform) == ("mc", 64, "none")
    assert not config.train.thin


@pytest.mark.parametrize("preset", NAMES)
def test_presets_survive_a_checkpoint(preset):
    config = IntegrationConfig.preset(preset, encoder="fc", profile="mvn")
    assert config.combination == "fc/mvn"
    assert IntegrationConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "values, message",
    [
        ({"train": {"learning_rate": 1.0}}, "unknown setting train.learning_rate; known: train.batch"),
        ({"encoder": {"kind": "vit"}}, "setting encoder.kind must be 'cnn' or 'fc', got 'vit'"),
        ({"train": {"lr": "fast"}}, "setting train.lr must be float, got 'fast'"),
        ({"encoder": {"channels": ["counts", "q"]}}, "encoder.channels must be of counts, mask"),
        ({"train": {"held_out": 1.0}}, "train.held_out must be a fraction"),
        ({"train": {"batch": 0}}, "train.batch must be positive, got 0"),
        ({"profile": {"kind": "lowrank", "rank": 2}}, "profile.rank must be at least 3"),
    ],
)
def test_bad_settings_say_what_is_wanted(values, message):
    with pytest.raises(InputError, match=message):
        IntegrationConfig.from_dict(values)


def test_a_preset_may_be_a_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[train]\nlr = 1\n")
    config = IntegrationConfig.preset(path, profile="mvn")
    assert (config.name, config.train.lr, config.profile.kind) == ("mine", 1.0, "mvn")
    path.write_text("[train\n")
    for name, message in ((path, "not valid TOML"), ("papr", "preset must be one of default, paper")):
        with pytest.raises(InputError, match=message):
            IntegrationConfig.preset(name)


@pytest.mark.parametrize("box", [(3, 9, 9), (1, 9, 9)], ids=["3x9x9", "still"])
@pytest.mark.parametrize("preset", NAMES)
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_one_step_lowers_the_loss(spots, combination, preset, box):
    model, batch = model_and_batch(spots(64, box), combination, preset)
    noisy = model.losses(batch, seed=1)
    assert noisy.shape == (64,) and torch.isfinite(noisy).all()
    model.loss.config = replace(model.loss.config, estimator="quadrature")  # Monte-Carlo draws jump with the weights
    before = model.losses(batch).double().sum()
    before.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    square = sum(float(p.grad.square().sum()) for p in model.parameters())
    expected = 2e-5 * float(before.detach())  # decrease to first order
    with torch.no_grad():
        for p in model.parameters():
            p -= expected / square * p.grad
        decrease = float(before - model.losses(batch).double().sum())
    assert 0.5 * expected < decrease < 1.5 * expected


def test_start_is_near_the_truth(spots):
    """Untrained, from moments: intensities of strong spots within their stated errors, background within 5 %."""
    store = spots(800, (3, 15, 15), intensity=2000.0)
    model, batch = model_and_batch(store)
    q = model(batch)
    mean, var = q.q_i[0] / q.q_i[1], q.q_i[0] / q.q_i[1] ** 2
    strong = torch.from_numpy(store.intensity > 200)
    log_ratio = (mean / torch.from_numpy(store.intensity)).log()[strong]
    assert abs(log_ratio.mean()) < 0.05 and log_ratio.std() < 0.15
    assert (var > 0).all()
    background = (q.q_bg[0] / q.q_bg[1]).detach().numpy()
    assert np.median(background / store.background) == pytest.approx(1, abs=0.05)


def test_loss_is_the_op_with_the_configured_priors(spots):
    store = spots(30)
    batch = read_batch(store, np.arange(30))
    config = LossConfig(prior_i_shape=2.0, prior_i_rate=0.1, prior_bg_shape=1.0, kappa_i=0.5, kappa_bg=0.25)
    loss = PoissonGammaELBO(config)
    loss.set_statistics(DataStatistics.of(batch))
    mean_bg = DataStatistics.of(batch).background
    q = Posterior((torch.full((30,), 9.0), torch.full((30,), 0.1)), (torch.full((30,), 30.0), torch.full((30,), 30.0)),
                  store.profiles(np.arange(30)))  # fmt: skip
    expected = poisson_gamma_elbo(
        batch.counts, batch.used, q.profile, q.q_i, q.q_bg, (2.0, 0.1), (1.0, 1 / mean_bg), kappa_i=0.5, kappa_bg=0.25
    )
    assert torch.allclose(loss(batch.counts, batch.mask, q), expected, rtol=1e-5)


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_a_dark_box_is_finite_everywhere(spots, combination):
    model, batch = model_and_batch(spots(12), combination)
    batch.counts[:] = 0
    batch.mask[:6] = 0
    losses = model.losses(batch)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    q = model(batch)
    assert (q.q_i[0] / q.q_i[1] < 1e3).all()


def test_split_photons_score_the_shape_on_what_it_has_not_seen(spots):
    """A shape that copies its noise gains by equation 4 and nothing when the photons are split."""
    store = spots(400)
    rows = np.arange(400)
    model, _ = model_and_batch(store)
    batch = ShoeboxLoader([store], rows, 400, thin=True).read(rows)
    truth = store.profiles(rows)
    smooth = 0.5 * truth + 0.5 * (batch.seen + 0.05) / (batch.seen + 0.05).sum(1, keepdim=True)
    strength, level = torch.from_numpy(store.intensity).float(), torch.from_numpy(store.background).float()

    def loss(profile, seen):
        q = Posterior((torch.full((400,), 1e3), 1e3 / strength), (torch.full((400,), 1e3), 1e3 / level), profile)
        model.forward = lambda _: q
        return float(model.losses(replace(batch, seen=seen)).mean())

    assert loss(smooth, None) < loss(truth, None)
    assert loss(smooth, batch.seen) > loss(truth, batch.seen)
    # The correction is 0 on average for a shape that has seen nothing.
    assert abs(loss(truth, batch.seen) - loss(truth, None)) < 0.02 * abs(loss(truth, None))


def test_all_photons_are_shown_at_the_exposure_of_the_training(spots):
    model, batch = model_and_batch(spots(20))
    twice = replace(batch, counts=2 * batch.counts.int())
    shown = replace(twice, seen=batch.counts)
    assert torch.allclose(model.encoder(twice), model.encoder(shown))


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_network_as_a_source_of_profiles_and_moments(spots, combination):
    store = spots(50)
    model, batch = model_and_batch(store, combination)
    source = NetworkProfiles(model, store, reference_profiles=store, batch=16)
    rows = np.array([49, 3, 3, 20, *range(30)])
    p, moments = source.profiles(rows), source.moments(rows)
    q = model(batch)
    assert p.shape == (34, 243) and p.dtype == torch.float32
    if combination.endswith("dials"):
        assert torch.equal(p, store.profiles(rows))
    else:
        assert torch.allclose(p, materialise(q.profile)[rows], rtol=1e-4, atol=1e-7)
    assert np.allclose(moments["mean_i"], (q.q_i[0] / q.q_i[1]).detach().numpy()[rows], rtol=1e-4)
    assert np.allclose(moments["var_bg"], (q.q_bg[0] / q.q_bg[1] ** 2).detach().numpy()[rows], rtol=1e-4)
    assert source.profiles(np.zeros(0, np.int64)).shape == (0, 243)
    assert source.moments(np.zeros(0, np.int64))["mean_i"].shape == (0,)
