"""The integration network: shoebox -> q(I), q(Bg) and spot shape, and its loss.

    counts ~ Poisson(I p + Bg),  q(I), q(Bg) Gamma,
    loss = -E_q log p(counts) + kappa_1 KL(q(I) || p(I)) + kappa_2 KL(q(Bg) || p(Bg))

Nothing here knows a file format: everything is an `nn.Module` on tensors, importable from `xtalfast.nn`.

Ref: integration paper, sections 3 and 4, equations 1 and 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xtalfast.integration.config import IntegrationConfig, LossConfig
from xtalfast.integration.data import MovableProfiles, ProfileSource, ShoeboxBatch, ShoeboxSource, read_batch
from xtalfast.integration.encoders import make_encoder
from xtalfast.integration.profiles import GammaHead, make_profile_head, moments_start, quadratic_modes
from xtalfast.integration.statistics import DataStatistics
from xtalfast.ops import poisson_gamma_elbo
from xtalfast.ops.profiles import Profile, materialise

__all__ = [
    "IntegrationConfig",
    "IntegrationModel",
    "NetworkProfiles",
    "PoissonGammaELBO",
    "Posterior",
    "ShoeboxBatch",
]

Gamma = tuple[Tensor, Tensor]  # shape, rate, each [B]


@dataclass
class Posterior:
    """Variational posterior of a batch: Gammas of intensity and background, and the spot shape."""

    q_i: Gamma
    q_bg: Gamma
    profile: Profile


class PoissonGammaELBO(nn.Module):
    """Negative evidence lower bound of shoeboxes (equation 4), one number a reflection.

    Args:
        config: priors, kappas and the estimator; a prior rate of None is 1 until `set_statistics`.
    """

    prior_i: Tensor
    prior_bg: Tensor

    def __init__(self, config: LossConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or LossConfig()
        self.register_buffer("prior_i", torch.tensor([config.prior_i_shape, config.prior_i_rate or 1.0]))
        self.register_buffer("prior_bg", torch.tensor([config.prior_bg_shape, config.prior_bg_rate or 1.0]))

    def set_statistics(self, statistics: DataStatistics) -> None:
        """Scale the priors whose rate is not given to the mean intensity and background of the data."""
        if self.config.prior_i_rate is None:
            self.prior_i[1] = self.config.prior_i_shape / statistics.intensity
        if self.config.prior_bg_rate is None:
            self.prior_bg[1] = self.config.prior_bg_shape / statistics.background

    def forward(self, counts: Tensor, mask: Tensor, posterior: Posterior, seed: int | None = None) -> Tensor:
        """Loss [B]; `seed` of the Monte-Carlo estimator."""
        config = self.config
        return poisson_gamma_elbo(
            counts, mask, posterior.profile, posterior.q_i, posterior.q_bg,
            (self.prior_i[0], self.prior_i[1]), (self.prior_bg[0], self.prior_bg[1]),
            kappa_i=config.kappa_i, kappa_bg=config.kappa_bg, estimator=config.estimator,
            nodes=config.nodes, samples=config.samples, seed=seed,
        )  # fmt: skip


class IntegrationModel(nn.Module):
    """Encoder, parameter heads and loss of one combination, e.g. "cnn/softmax".

    Args:
        config: what to build; the box must be that of the shoeboxes.
    """

    mean_profile: Tensor
    log_scale: Tensor

    def __init__(self, config: IntegrationConfig) -> None:
        super().__init__()
        self.config = config
        latent = config.encoder.latent
        self.encoder = make_encoder(config.encoder, config.box, 0.5 if config.train.thin else 1.0)
        self.profile = make_profile_head(config.profile, latent, config.box)
        self.intensity, self.background = GammaHead(latent + 2), GammaHead(latent + 2)
        self.loss = PoissonGammaELBO(config.loss)
        n_pixels = config.box[0] * config.box[1] * config.box[2]
        self.register_buffer("mean_profile", torch.full((n_pixels,), 1.0 / n_pixels))
        self.register_buffer("log_scale", torch.zeros(2))  # log mean intensity and background of the data

    @property
    def n_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.parameters())

    def set_statistics(self, statistics: DataStatistics) -> None:
        """Start from the data: input scales, mean spot, intensity and background scale. Saved with the weights."""
        self.encoder.features.set_statistics(statistics)
        self.profile.set_statistics(statistics)
        self.loss.set_statistics(statistics)
        self.mean_profile.copy_(statistics.profile)
        self.log_scale.copy_(torch.tensor([statistics.intensity, statistics.background]).log())

    def forward(self, batch: ShoeboxBatch) -> Posterior:
        """q(I), q(Bg) and spot shape of each shoebox.

        The heads see, beside the latent vector, how much intensity and background a linear fit finds: normalisation
        takes the amplitude out of the encoder.
        """
        latent = self.encoder(batch)
        profile = self.profile(latent, batch)
        log_i, log_cv_i, log_bg, log_cv_bg = moments_start(batch, materialise(profile))
        amplitude = torch.stack([log_i, log_bg], 1) - self.log_scale
        features = torch.cat([latent, amplitude], 1)
        if self.config.posterior.start == "constant":
            log_i, log_bg = self.log_scale.expand(len(batch), 2).unbind(1)
            log_cv_i = log_cv_bg = torch.zeros_like(log_i)
        return Posterior(
            q_i=self.intensity(features, log_i, log_cv_i),
            q_bg=self.background(features, log_bg, log_cv_bg),
            profile=profile,
        )

    def _hidden_share(self, profile: Profile, batch: ShoeboxBatch) -> Tensor:
        """How far the share of each spot under its mask is from that of the mean spot [B]: a Bernoulli divergence.

        The likelihood says nothing of hidden voxels: any share of the intensity could go there.
        """
        shifts, _ = quadratic_modes(self.mean_profile, self.config.box)
        mean = torch.softmax(self.mean_profile.log() + batch.offset @ shifts, 1)
        used = batch.used
        wanted, share = ((shape * used).sum(1).clamp(1e-4, 1 - 1e-4) for shape in (mean, materialise(profile).float()))
        return wanted * (wanted / share).log() + (1 - wanted) * ((1 - wanted) / (1 - share)).log()

    def losses(self, batch: ShoeboxBatch, seed: int | None = None) -> Tensor:
        """Loss of each shoebox [B], in nats.

        Equation 4, and when the encoder has seen only half of the photons (`batch.seen`), what the spot shape gains by
        copying their noise is taken off: sum (seen - unseen) log rate at the mean of q, which is 0 on average for a
        shape that copies nothing. In value and gradient the shape is then scored on the photons it has not seen.
        Without this an encoder learns to copy, and finds intensity in empty boxes.
        """
        posterior = self(batch)
        losses = self.loss(batch.counts, batch.mask, posterior, seed)
        if self.config.loss.kappa_hidden and not isinstance(posterior.profile, Tensor):
            losses = losses + self.config.loss.kappa_hidden * self._hidden_share(posterior.profile, batch)
        if batch.seen is None:
            return losses
        (shape_i, rate_i), (shape_bg, rate_bg) = posterior.q_i, posterior.q_bg
        mean_i, mean_bg = (shape_i / rate_i).detach(), (shape_bg / rate_bg).detach()
        rate = mean_i[:, None] * materialise(posterior.profile).float() + mean_bg[:, None]
        surplus = (2 * batch.seen.to(torch.float32) - batch.counts.to(torch.float32)) * batch.used
        return losses + (surplus * rate.log()).sum(1)


class NetworkProfiles:
    """A trained network as a source of spot shapes, and of its own q(I), q(Bg), for the rows of a store.

    Args:
        model: trained; used in evaluation mode.
        store: whose rows are asked for.
        reference_profiles: the store's given spot shapes, for the profile model "dials".
        batch: reflections evaluated at once.
    """

    def __init__(
        self,
        model: IntegrationModel,
        store: ShoeboxSource,
        *,
        reference_profiles: ProfileSource | None = None,
        batch: int = 1024,
    ) -> None:
        self.model = model.eval()
        self.store = store
        self.reference_profiles = reference_profiles
        self.batch = batch

    def on(self, store: ShoeboxSource) -> NetworkProfiles:
        """The same network for the reflections of another store."""
        given = self.reference_profiles
        moved = given.on(store) if isinstance(given, MovableProfiles) else given
        return NetworkProfiles(self.model, store, reference_profiles=moved, batch=self.batch)

    @torch.no_grad()
    def posteriors(self, rows: NDArray[np.int64]) -> list[Posterior]:
        """Posteriors of those rows, `batch` at a time, on the CPU."""
        device = self.model.mean_profile.device
        found = []
        for start in range(0, len(rows), self.batch):
            shoeboxes = read_batch(self.store, rows[start : start + self.batch], self.reference_profiles)
            q = self.model(shoeboxes.to(device))
            q_i, q_bg = ((shape.cpu(), rate.cpu()) for shape, rate in (q.q_i, q.q_bg))
            found.append(Posterior(q_i, q_bg, materialise(q.profile).cpu()))
        return found

    def profiles(self, rows: NDArray[np.int64]) -> Tensor:
        """Spot shapes [B, P] float32."""
        if not len(rows):
            return torch.zeros(0, len(self.model.mean_profile))
        return torch.cat([materialise(q.profile) for q in self.posteriors(rows)])

    def moments(self, rows: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        """Mean and variance under q of intensity (`mean_i`, `var_i`) and background (`mean_bg`, `var_bg`), each [B]."""
        result: dict[str, NDArray[np.float64]] = {}
        found = self.posteriors(rows)
        for name in ("i", "bg"):
            shape, rate = (
                torch.cat([getattr(q, f"q_{name}")[k] for q in found]).double().numpy() if found else np.zeros(0)
                for k in (0, 1)
            )
            result[f"mean_{name}"], result[f"var_{name}"] = shape / rate, shape / rate**2
        return result
