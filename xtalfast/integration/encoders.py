"""Shoebox encoders: counts and per-voxel features -> a 64-d latent vector.

The features of a voxel are its counts, its position x, y, z on the detector and in the scan, and its distances dx, dy,
dz to the predicted centroid. They are made from `bbox` and `xyzcal_px` when needed and never stored. Masked voxels
are 0 in every feature.

Ref: integration paper, section 4.1; He et al. (2016), Identity Mappings in Deep Residual Networks (pre-activation).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from xtalfast.integration.config import EncoderConfig
from xtalfast.integration.data import ShoeboxBatch
from xtalfast.integration.statistics import DataStatistics

_FINE = 4.0  # px: distances to the centroid are given in units of this


class InputTransform(nn.Module):
    """Counts -> network input: "none" leaves them, "anscombe" is 2 sqrt(y + 3/8), standardised.

    Args:
        kind: "none" or "anscombe".
        exposure: fraction of the photons shown in training; all counts are scaled by it when all are shown.
    """

    moments: Tensor

    def __init__(self, kind: str, exposure: float = 1.0) -> None:
        super().__init__()
        self.kind, self.exposure = kind, exposure
        self.register_buffer("moments", torch.tensor([0.0, 1.0]))

    def set_statistics(self, statistics: DataStatistics) -> None:
        """Take mean and standard deviation from the data; "none" keeps 0 and 1."""
        if self.kind == "anscombe":
            mean, sd = statistics.anscombe
            self.moments.copy_(torch.tensor([mean, max(sd, 1e-3)]))

    def forward(self, batch: ShoeboxBatch) -> Tensor:
        """[B, P] float32, 0 at masked voxels."""
        y = batch.counts.to(torch.float32) * self.exposure if batch.seen is None else batch.seen.to(torch.float32)
        if self.kind == "anscombe":
            y = 2 * torch.sqrt(y + 0.375)
        return ((y - self.moments[0]) / self.moments[1]) * batch.used


class VoxelFeatures(nn.Module):
    """Counts, positions and distances of every voxel, each of order one.

    Positions are scaled by the mean and half-range of the data (raw pixel numbers of thousands stop any training; the
    paper does not say what it does), distances are in units of 4 px or images.
    """

    position: Tensor

    def __init__(self, transform: str, exposure: float = 1.0) -> None:
        super().__init__()
        self.transform = InputTransform(transform, exposure)
        self.register_buffer("position", torch.tensor([[0.0] * 3, [1000.0] * 3]))

    def set_statistics(self, statistics: DataStatistics) -> None:
        """Scales of the data."""
        self.transform.set_statistics(statistics)
        self.position.copy_(statistics.position)

    def axes(self, batch: ShoeboxBatch) -> dict[str, Tensor]:
        """Scaled positions x, y, z and distances dx, dy, dz of the voxel centres, broadcastable to [B, Z, Y, X]."""
        positions, distances = {}, {}
        for axis, (name, size) in enumerate(zip("xyz", reversed(batch.box))):
            steps = torch.arange(size, device=batch.bbox.device) + 0.5
            centre = batch.bbox[:, 2 * axis, None] + steps
            shape = [len(batch), 1, 1, 1]
            shape[3 - axis] = size
            positions[name] = ((centre - self.position[0, axis]) / self.position[1, axis]).view(shape)
            distances["d" + name] = ((centre - batch.xyzcal_px[:, axis, None]) / _FINE).view(shape)
        return positions | distances

    def where(self, batch: ShoeboxBatch) -> Tensor:
        """Centroid in the box and on the detector [B, 6]."""
        scaled = (batch.xyzcal_px - self.position[0]) / self.position[1]
        return torch.cat([2 * batch.offset, scaled], 1)


class FCEncoder(nn.Module):
    """Fully connected encoder: the seven features of all voxels, flattened -> residual blocks -> latent.

    Args:
        config: latent, hidden, blocks, transform, position.
        box: z, y, x size of the shoeboxes.
        exposure: fraction of the photons that the encoder sees in training.
    """

    def __init__(self, config: EncoderConfig, box: tuple[int, int, int], exposure: float = 1.0) -> None:
        super().__init__()
        self.features = VoxelFeatures(config.transform, exposure)
        self.position = config.position
        n_pixels = box[0] * box[1] * box[2]
        self.stem = nn.Linear(7 * n_pixels, config.hidden)
        self.blocks = nn.Sequential(*(_LinearBlock(config.hidden) for _ in range(config.blocks)))
        self.norm = nn.LayerNorm(config.hidden)
        self.latent = nn.Linear(config.hidden + 6 * config.position, config.latent)

    def forward(self, batch: ShoeboxBatch) -> Tensor:
        """Latent vectors [B, latent]."""
        counts = self.features.transform(batch).view(-1, *batch.box)
        planes = [counts, *(feature.expand_as(counts) for feature in self.features.axes(batch).values())]
        features = torch.stack(planes, 1) * batch.used.view(-1, 1, *batch.box)
        hidden = functional.relu(self.norm(self.blocks(self.stem(features.flatten(1)))))
        if self.position:
            hidden = torch.cat([hidden, self.features.where(batch)], 1)
        return self.latent(hidden)


class CNNEncoder(nn.Module):
    """Convolutional encoder: planes [C, H, W] -> residual stages of halved size -> latent.

    `counts` and `mask` give one plane an image; x, y, dx and dy one plane, as they are the same in all images; z and dz
    the plane of the middle image, from which the others differ by whole images. So the default channels of the paper's
    3 x 21 x 21 box are its C = 6, and those of a still are 4.

    Args:
        config: latent, channels, widths, blocks, transform, position.
        box: z, y, x size of the shoeboxes.
        exposure: fraction of the photons that the encoder sees in training.
    """

    def __init__(self, config: EncoderConfig, box: tuple[int, int, int], exposure: float = 1.0) -> None:
        super().__init__()
        self.features = VoxelFeatures(config.transform, exposure)
        self.channels, self.position = config.channels, config.position
        n_channels = sum(box[0] if name in ("counts", "mask") else 1 for name in config.channels)
        width, *widths = config.widths
        stages: list[nn.Module] = [nn.Conv2d(n_channels, width, 3, padding=1)]
        ny, nx = box[1:]
        for out in widths:
            stages += [_ConvBlock(width, out, stride=2), *(_ConvBlock(out, out) for _ in range(config.blocks - 1))]
            width, ny, nx = out, (ny + 1) // 2, (nx + 1) // 2
        self.stages = nn.Sequential(*stages, _norm(width), nn.ReLU(), nn.Flatten())
        self.latent = nn.Linear(width * ny * nx + 6 * config.position, config.latent)

    def planes(self, batch: ShoeboxBatch) -> Tensor:
        """The input channels [B, C, H, W]."""
        used = batch.used.view(-1, *batch.box)
        any_used = used.any(1, keepdim=True)
        axes = self.features.axes(batch)
        planes = []
        for name in self.channels:
            if name == "counts":
                planes.append(self.features.transform(batch).view(-1, *batch.box))
            elif name == "mask":
                planes.append(used.float())
            else:
                middle = axes[name].shape[1] // 2
                planes.append(axes[name][:, middle : middle + 1] * any_used)
        return torch.cat(planes, 1)

    def forward(self, batch: ShoeboxBatch) -> Tensor:
        """Latent vectors [B, latent]."""
        hidden = self.stages(self.planes(batch).contiguous(memory_format=torch.channels_last))
        if self.position:
            hidden = torch.cat([hidden, self.features.where(batch)], 1)
        return self.latent(hidden)


def _norm(width: int) -> nn.GroupNorm:
    # GroupNorm, not BatchNorm: a reflection's result must not depend on which others share its batch or process.
    return nn.GroupNorm(4 if width % 4 == 0 else 1, width)


class _LinearBlock(nn.Module):
    """Pre-activation residual block of two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width),
            nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class _ConvBlock(nn.Module):
    """Pre-activation residual block of two 3 x 3 convolutions; a strided or widening one projects its shortcut."""

    def __init__(self, width: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.start = nn.Sequential(_norm(width), nn.ReLU())
        self.layers = nn.Sequential(
            nn.Conv2d(width, out, 3, stride=stride, padding=1, bias=False),
            _norm(out), nn.ReLU(), nn.Conv2d(out, out, 3, padding=1),
        )  # fmt: skip
        same = stride == 1 and width == out
        self.shortcut = nn.Identity() if same else nn.Conv2d(width, out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        start = self.start(x)
        shortcut = x if isinstance(self.shortcut, nn.Identity) else self.shortcut(start)
        return shortcut + self.layers(start)


def make_encoder(config: EncoderConfig, box: tuple[int, int, int], exposure: float = 1.0) -> FCEncoder | CNNEncoder:
    """The encoder of that name."""
    return (FCEncoder if config.kind == "fc" else CNNEncoder)(config, box, exposure)
