"""An epoch of training with the fused loss and with ordinary torch in its place: time, and what is learned."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from bench_training import BOX, boxes
from torch import Tensor
from torch.distributions import Gamma, Poisson, kl_divergence

from xtalfast.integration import model
from xtalfast.integration.config import IntegrationConfig
from xtalfast.integration.data import ShoeboxBatch, read_batch
from xtalfast.integration.fit import load_checkpoint, train
from xtalfast.integration.store import ShoeboxStore
from xtalfast.ops import materialise, poisson_gamma_elbo
from xtalfast.ops._boxes import used_pixels

N, HELD_OUT, EPOCHS = 4096, 1024, 3


def ordinary(counts, mask, profile, q_i, q_bg, prior_i, prior_bg, *, kappa_i, kappa_bg, samples, seed, **_) -> Tensor:
    """Equation 4 with torch.distributions throughout, as one writes it first."""
    if seed is not None:
        torch.manual_seed(seed)
    posterior_i, posterior_bg = Gamma(*q_i), Gamma(*q_bg)
    i, b = posterior_i.rsample((samples,)), posterior_bg.rsample((samples,))
    rate = i[..., None] * materialise(profile) + b[..., None]
    log_p = Poisson(rate, validate_args=False).log_prob(counts.to(torch.float32))
    expected = torch.where(used_pixels(mask), log_p, 0.0).sum(-1).mean(0)
    kl_i, kl_bg = kl_divergence(posterior_i, Gamma(*prior_i)), kl_divergence(posterior_bg, Gamma(*prior_bg))
    return kappa_i * kl_i + kappa_bg * kl_bg - expected


@contextmanager
def loss_by(function: Callable[..., Tensor]) -> Iterator[None]:
    """The network's loss computed by another function."""
    before = model.poisson_gamma_elbo
    model.poisson_gamma_elbo = function
    try:
        yield
    finally:
        model.poisson_gamma_elbo = before


def make_store(directory: Path, n: int, seed: int) -> ShoeboxStore:
    """Paper boxes of Gaussian spots on a flat background of one photon a pixel."""
    rng = np.random.default_rng(seed)
    xyz = rng.uniform([50, 50, 2], [2400, 2400, 1438], (n, 3)).astype(np.float32)
    low = np.floor(xyz).astype(np.int32) - np.array(BOX[::-1]) // 2
    bbox = np.stack([low, low + np.array(BOX[::-1])], 2).reshape(n, 6).astype(np.int32)
    return ShoeboxStore.create(directory, boxes(n, rng, bbox, xyz), None, {"bbox": bbox, "xyzcal_px": xyz}, box=BOX)


def held_out_loss(network: model.IntegrationModel, batch: ShoeboxBatch) -> float:
    """Loss of a reflection in nats, by the deterministic quadrature, whatever the network was trained with."""
    with torch.no_grad():
        q = network.eval()(batch)
        priors = [(prior[0], prior[1]) for prior in (network.loss.prior_i, network.loss.prior_bg)]
        return float(poisson_gamma_elbo(batch.counts, batch.mask, q.profile, q.q_i, q.q_bg, *priors).mean())


def elbo_section(data: Path, work: Path) -> str:
    """Epoch time and held-out loss with the fused loss and with ordinary torch, as Markdown."""
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    store, unseen = make_store(work / "store", N, 0), make_store(work / "unseen", HELD_OUT, 1)
    batch = read_batch(unseen, np.arange(HELD_OUT))
    losses = {
        "ordinary torch, 1 sample": (ordinary, "mc", 1),
        "ordinary torch, 100 samples": (ordinary, "mc", 100),
        "`poisson_gamma_elbo`, 1 sample": (poisson_gamma_elbo, "mc", 1),
        "`poisson_gamma_elbo`, 100 samples": (poisson_gamma_elbo, "mc", 100),
        "`poisson_gamma_elbo`, quadrature": (poisson_gamma_elbo, "quadrature", 1),
    }
    rows = []
    for seed in (0, 1):
        for k, (name, (function, estimator, samples)) in enumerate(losses.items()):
            config = IntegrationConfig.preset("paper").combined("fc/softmax")
            config = replace(config, loss=replace(config.loss, estimator=estimator, samples=samples))
            start = time.process_time()
            with loss_by(function):
                result = train([store], config, work / f"run-{k}-{seed}", epochs=EPOCHS, seed=seed, device="cpu")
            seconds = (time.process_time() - start) / EPOCHS
            network = load_checkpoint(result.checkpoint)
            rows.append((name, seconds, held_out_loss(network, batch)))
    lines = ["| loss | CPU s an epoch | times | held-out loss, nats, two seeds |", "|---|---|---|---|"]
    half = len(rows) // 2
    for (name, a, loss_0), (_, b, loss_1) in zip(rows[:half], rows[half:]):
        times = min(rows[0][1], rows[half][1]) / min(a, b)
        lines.append(f"| {name} | {min(a, b):.1f} | {times:.2f} | {loss_0:.2f}, {loss_1:.2f} |")
    table = "\n".join(lines)
    return f"""## Training with the fused loss

`paper` preset, FC/softmax, {N} simulated boxes of {" x ".join(map(str, BOX))}, {EPOCHS} epochs, one thread, CPU time
with start and validation. The loss of {HELD_OUT} other boxes is by quadrature for every row; ordinary torch is
`torch.distributions` throughout. Times are against ordinary torch with one sample.

{table}
"""
