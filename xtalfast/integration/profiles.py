"""Heads from the latent vector to the spot shape and to q(I), q(Bg).

A profile head returns what `xtalfast.ops.poisson_gamma_elbo` takes as `profile`; each sums to 1 over the whole box.
Every head starts at the mean spot of the data, so that training begins with a sane centred spot.

Ref: integration paper, section 4.2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from xtalfast.errors import InputError
from xtalfast.integration.config import ProfileConfig
from xtalfast.integration.data import ShoeboxBatch
from xtalfast.integration.statistics import DataStatistics, voxel_grid
from xtalfast.ops.gamma import gamma_from_log_mean_cv
from xtalfast.ops.profiles import LowRankProfile, MVNProfile, SoftmaxProfile

_MIN_SD = 0.3  # voxels: a narrower normal is no longer described by its values at voxel centres


def quadratic_modes(profile: Tensor, box: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """What a shift and a change of width do to the logarithm of a spot.

    Args:
        profile: mean spot [P].
        box: z, y, x.

    Returns:
        the change for a shift of one voxel along z, y, x [3, P], and for each of the six second moments [6, P]; damped
        away from the spot, where they would only amplify noise. Directions without extent (stills) give 0.
    """
    grid = voxel_grid(box)
    # A uniformly spread sub-voxel centroid has widened the mean spot by 1/12.
    variance = ((profile[:, None] * grid**2).sum(0) - 1 / 12).clamp(min=_MIN_SD**2)
    scaled = grid / variance.sqrt()
    damping = torch.exp(-0.02 * scaled.square().sum(1, keepdim=True))
    shifts = damping * grid / variance
    z, y, x = scaled.unbind(1)
    widths = damping.T * torch.stack([z * z, y * y, x * x, z * y, z * x, y * x])
    return shifts.T.contiguous(), widths


class SoftmaxHead(nn.Module):
    """One logit a voxel, from the latent vector and the sub-voxel centroid.

    Starts at the logarithm of the mean spot, shifted to the predicted centroid.

    Args:
        latent: size of the latent vector.
        box: z, y, x.
    """

    def __init__(self, latent: int, box: tuple[int, int, int]) -> None:
        super().__init__()
        self.box = box
        self.logits = nn.Linear(latent + 3, box[0] * box[1] * box[2])
        nn.init.zeros_(self.logits.bias)

    def set_statistics(self, statistics: DataStatistics) -> None:
        """Start at the mean spot."""
        shifts, widths = quadratic_modes(statistics.profile, self.box)
        latent = self.logits.in_features - 3
        modes = torch.cat([shifts, widths])
        with torch.no_grad():
            # Smooth columns: the first updates then move and widen the spot instead of fitting single voxels.
            self.logits.weight[:, :latent] = (torch.randn(latent, len(modes)) @ modes).T * (0.1 / latent)
            self.logits.weight[:, latent:] = shifts.T
            self.logits.bias.copy_(statistics.profile.log())

    def forward(self, latent: Tensor, batch: ShoeboxBatch) -> SoftmaxProfile:
        """Spot shapes of the batch."""
        return SoftmaxProfile(self.logits(torch.cat([latent, batch.offset], 1)))


class LowRankHead(nn.Module):
    """Logits in the span of a learned basis: `rank` numbers a reflection, the basis common to all.

    Starts at the mean spot; the first basis vectors shift it (by the predicted centroid) and change its widths, further
    ones start small and random.

    Args:
        latent: size of the latent vector.
        rank: number of basis vectors, at least 3.
        box: z, y, x.
    """

    def __init__(self, latent: int, rank: int, box: tuple[int, int, int]) -> None:
        super().__init__()
        n_pixels = box[0] * box[1] * box[2]
        self.box = box
        self.coefficients = nn.Linear(latent + 3, rank)
        self.basis = nn.Parameter(0.1 * torch.randn(rank, n_pixels))
        self.bias = nn.Parameter(torch.zeros(n_pixels))
        nn.init.normal_(self.coefficients.weight, std=0.1 / latent)
        nn.init.zeros_(self.coefficients.bias)

    def set_statistics(self, statistics: DataStatistics) -> None:
        """Start at the mean spot."""
        modes = torch.cat(quadratic_modes(statistics.profile, self.box))[: len(self.basis)]
        with torch.no_grad():
            self.basis[: len(modes)] = modes
            self.coefficients.weight[:, -3:] = torch.eye(len(self.basis), 3)
            self.bias.copy_(statistics.profile.log())

    def forward(self, latent: Tensor, batch: ShoeboxBatch) -> LowRankProfile:
        """Spot shapes of the batch."""
        return LowRankProfile(self.coefficients(torch.cat([latent, batch.offset], 1)), self.basis, self.bias)


class MVNHead(nn.Module):
    """A trivariate normal on the voxel grid: shift from the predicted centroid and lower-triangular scale, in voxels.

    Args:
        latent: size of the latent vector.
        box: z, y, x.
    """

    grid: Tensor
    log_sd: Tensor

    def __init__(self, latent: int, box: tuple[int, int, int]) -> None:
        super().__init__()
        self.register_buffer("grid", voxel_grid(box))
        self.register_buffer("log_sd", torch.zeros(3))
        self.parameters_of = nn.Linear(latent, 9)
        nn.init.normal_(self.parameters_of.weight, std=0.1 / math.sqrt(latent))
        nn.init.zeros_(self.parameters_of.bias)

    def set_statistics(self, statistics: DataStatistics) -> None:
        """Start at the second moments of the mean spot."""
        variance = (statistics.profile[:, None] * self.grid**2).sum(0)
        self.log_sd.copy_((variance.sqrt() - _MIN_SD).clamp(min=0.1).log())

    def forward(self, latent: Tensor, batch: ShoeboxBatch) -> MVNProfile:
        """Spot shapes of the batch."""
        shift, log_scale, skew = self.parameters_of(latent).split(3, dim=1)
        sd = _MIN_SD + torch.exp((self.log_sd + log_scale).clamp(max=4.0))
        scale = torch.diag_embed(sd)
        lower = torch.tril_indices(3, 3, -1, device=scale.device)
        scale = scale.index_put((torch.arange(len(scale), device=scale.device)[:, None], *lower[:, None]), skew)
        return MVNProfile(batch.offset + shift, scale, self.grid)


class GivenProfile(nn.Module):
    """The spot shape that comes with the data, e.g. from `gaussian_rs.ReferenceProfiles`."""

    def set_statistics(self, statistics: DataStatistics) -> None:
        """Nothing to start."""

    def forward(self, latent: Tensor, batch: ShoeboxBatch) -> Tensor:
        """Spot shapes of the batch [B, P].

        Raises:
            InputError: the batch has none.
        """
        if batch.profile is None:
            raise InputError('profile "dials" needs reference profiles with the data: pass reference_profiles')
        return batch.profile


ProfileHead = SoftmaxHead | LowRankHead | MVNHead | GivenProfile


def make_profile_head(config: ProfileConfig, latent: int, box: tuple[int, int, int]) -> ProfileHead:
    """The profile head of that name."""
    if config.kind == "softmax":
        return SoftmaxHead(latent, box)
    if config.kind == "lowrank":
        return LowRankHead(latent, config.rank, box)
    return MVNHead(latent, box) if config.kind == "mvn" else GivenProfile()


class GammaHead(nn.Module):
    """Latent vector -> Gamma distribution, as a correction of where it starts, in log mean and log cv.

    (Shape and rate are badly scaled coordinates: an optimiser that takes them stalls at strong reflections.)

    Args:
        features: size of the input.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.correction = nn.Linear(features, 2)
        nn.init.normal_(self.correction.weight, std=1e-2 / math.sqrt(features))
        nn.init.zeros_(self.correction.bias)

    def forward(self, features: Tensor, log_mean: Tensor, log_cv: Tensor) -> tuple[Tensor, Tensor]:
        """(shape, rate), each [B], from the start values log_mean and log_cv [B]."""
        change_mean, change_cv = self.correction(features).unbind(1)
        # Limits far outside any data (exp(-14) ... exp(23) counts; shapes 0.14 ... 1e7) keep a bad step finite.
        log_mean = (log_mean + change_mean).clamp(-14.0, 23.0)
        return gamma_from_log_mean_cv(log_mean, (log_cv + change_cv).clamp(-8.0, 1.0))


def moments_start(batch: ShoeboxBatch, profile: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log mean and log cv of intensity and background from a linear fit of one spot shape, each [B].

    The background is the mean of voxels where the shape is below 2 % of its peak, with more weight the lower it is. The
    intensity and its standard deviation s follow by least squares and are made positive as
    (I + sqrt(I^2 + (1.6 s)^2)) / 2, which for I = 0 is the mean of the normal cut at 0. A box without a used voxel
    starts at one count with cv 1.

    Args:
        batch: shoeboxes.
        profile: spot shape [P] or [B, P].
    """
    used = batch.used.to(torch.float32)
    y = batch.counts.to(torch.float32) * used
    p = profile.to(torch.float32).expand_as(y)
    # Linear, not a step: the loss of a network stays continuous in its spot shape.
    rim = used * (1 - p / (0.02 * p.amax(1, keepdim=True))).clamp(min=0)
    n_rim = rim.sum(1)
    background = ((y * rim).sum(1) + 0.5) / (n_rim + 0.5)
    pp = p * p * used
    norm = pp.sum(1).clamp(min=1e-12)
    intensity = ((p * y).sum(1) - background * (p * used).sum(1)) / norm
    variance = background / norm + (pp * p).sum(1) * intensity.clamp(min=0) / norm**2
    sd = torch.sqrt(variance.clamp(min=1e-6))
    mean = 0.5 * (intensity + torch.sqrt(intensity**2 + (1.6 * sd) ** 2))
    # With less than a thousandth of the spot in sight the fit says nothing.
    blind = (norm < 1e-3 * (p * p).sum(1)) | (n_rim < 4)
    log_mean = torch.where(blind, 0.0, mean.clamp(min=1e-3).log())
    log_cv = torch.where(blind, 0.0, (sd / mean.clamp(min=1e-3)).clamp(1e-3, 1.0).log())
    log_cv_bg = -0.5 * torch.log(background * n_rim + 1)
    return log_mean, log_cv, background.log(), log_cv_bg
