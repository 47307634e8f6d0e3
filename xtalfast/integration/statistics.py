"""What a network is told about its data before the first step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xtalfast.integration.data import ShoeboxBatch


def voxel_grid(box: tuple[int, int, int]) -> Tensor:
    """Voxel centres from the centre of the box [P, 3], z, y, x."""
    axes = [torch.arange(n) - (n - 1) / 2 for n in box]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)


@dataclass
class DataStatistics:
    """Scales of the inputs, mean spot, mean intensity and background of a data set; saved with the weights.

    Args:
        counts: mean and standard deviation of the counts of used voxels.
        anscombe: the same of 2 sqrt(counts + 3/8).
        position: mean and half-range of xyzcal.px, [2, 3].
        profile: mean spot shape over the box [P], sum 1.
        intensity: mean intensity, counts.
        background: mean background, counts per voxel.
    """

    counts: tuple[float, float]
    anscombe: tuple[float, float]
    position: Tensor
    profile: Tensor
    intensity: float
    background: float

    @classmethod
    def of(cls, batch: ShoeboxBatch) -> DataStatistics:
        """Statistics of a sample of reflections.

        The mean profile is that of the strongest quarter (signal over noise above 5), background subtracted, each
        voxel from the spots in which it is used; with fewer than 16 such spots it is a centred Gaussian with a sixth
        of the box as standard deviation.
        """
        used = batch.used
        y = batch.counts.to(torch.float32)
        root = 2 * torch.sqrt(y + 0.375)
        ellipsoid = (voxel_grid(batch.box) / (torch.tensor(batch.box) / 6)).square()
        gauss = torch.exp(-0.5 * ellipsoid.sum(1))
        profile = gauss / gauss.sum()

        disc = ellipsoid[:, 1:].sum(1) <= 5  # three quarters of the half-width, in every image; background from beyond
        corners, inside = used & ~disc, used & disc
        background = (y * corners).sum(1) / corners.sum(1).clamp(min=1)
        net = (y - background[:, None]) * used
        signal = (net * inside).sum(1)
        ratio = signal / torch.sqrt((y * inside).sum(1) + 1)
        # Neighbours take the corners of nearly every box, so only the centre has to be whole.
        whole = used[:, ellipsoid.sum(1) <= 1].all(1) & (corners.sum(1) >= 20)
        strong = (ratio > 5) & (ratio >= ratio.quantile(0.75)) & whole
        if int(strong.sum()) >= 16:
            # sqrt(signal) weights: neither the noise of the weaker nor the one brightest spot decides.
            weight = (1 / signal[strong].sqrt())[:, None]
            seen = (weight * signal[strong, None] * used[strong]).sum(0).clamp(min=1e-6)
            mean = (weight * net[strong]).sum(0) / seen
            noise = (weight.square() * y[strong] * used[strong]).sum(0).sqrt() / seen
            mean = torch.where(mean > 3 * noise, mean, 0.0)
            profile = 0.99 * mean / mean.sum() + 0.01 * profile  # no voxel is impossible
        values, roots = y[used], root[used]
        low, high = batch.xyzcal_px.amin(0), batch.xyzcal_px.amax(0)
        return cls(
            counts=(float(values.mean()), float(values.std())),
            anscombe=(float(roots.mean()), float(roots.std())),
            position=torch.stack([(low + high) / 2, ((high - low) / 2).clamp(min=1.0)]),
            profile=profile,
            intensity=max(float(signal.mean()), 1.0),
            background=max(float(background.mean()), 1e-3),
        )
