"""Modules for maps that repeat in all directions: patch embedding and convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xtalfast.ops.conv3d_periodic import Padding, conv3d_periodic
from xtalfast.ops.patch_embed import Order, patch_embed, stem_statistics


class CircularPatchEmbed3d(nn.Module):
    """Circular convolution, BatchNorm, patches, LayerNorm, Linear, LayerNorm: periodic map -> tokens.

    Shifting the map by one patch shifts the tokens. In training mode BatchNorm takes the statistics of the batch, which
    are computed without the convolution's output.

    Args:
        in_channels: of the map.
        dim: width of the tokens.
        channels, kernel: number and edge of the convolution's kernels.
        patch: edge of a patch, voxels.
        order: of the values of a patch, "(ph pw pd c)" or "(c ph pw pd)".

    Shape:
        [B, in_channels, X, Y, Z] -> [B, X Y Z / patch^3, dim]; X, Y, Z multiples of patch.
    """

    def __init__(
        self,
        in_channels: int,
        dim: int,
        *,
        channels: int = 10,
        kernel: int = 7,
        patch: int = 4,
        order: Order = "(ph pw pd c)",
    ) -> None:
        super().__init__()
        self.patch, self.order = patch, order
        convolution = nn.Conv3d(in_channels, channels, kernel, bias=False)  # for torch's initial values
        self.conv_weight = nn.Parameter(convolution.weight.detach())
        self.batch_norm = nn.BatchNorm3d(channels)
        self.patch_norm = nn.LayerNorm(channels * patch**3)
        self.projection = nn.Linear(channels * patch**3, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, counts: Tensor | None = None) -> Tensor:
        """Tokens of maps [B, C, X, Y, Z]; `counts` [B] says how often each occurs in the batch that it stands for."""
        scale, shift = fold_batch_norm(self.batch_norm, *self._statistics(x, counts))
        return patch_embed(
            *(x, self.conv_weight, scale, shift),
            (self.patch_norm.weight, self.patch_norm.bias),
            self.projection.weight,
            self.projection.bias,
            (self.norm.weight, self.norm.bias),
            patch=self.patch,
            order=self.order,
            eps=self.norm.eps,
        )

    def _statistics(self, x: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        running = self.batch_norm.running_mean, self.batch_norm.running_var
        if running[0] is not None and running[1] is not None and not self.training:
            return running[0], running[1]
        mean, var = stem_statistics(x, self.conv_weight, counts)
        n_maps = len(x) if counts is None else counts.sum()
        update_batch_norm(self.batch_norm, mean, var, n_maps * x.shape[2:].numel())
        return mean, var


class PeriodicConv3d(nn.Module):
    """Convolution that keeps the size of the map, wrapping around its faces or seeing zeros there.

    Args:
        in_channels, out_channels: few; the fused kernel is made for up to 16.
        kernel: edge of the kernel, odd.
        padding: "wrap" or "zeros".
        bias: whether there is one.

    Shape:
        [B, in_channels, X, Y, Z] -> [B, out_channels, X, Y, Z].
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, *, padding: Padding = "wrap", bias: bool = True
    ) -> None:
        super().__init__()
        self.padding = padding
        convolution = nn.Conv3d(in_channels, out_channels, kernel, bias=bias)  # for torch's initial values
        self.weight = nn.Parameter(convolution.weight.detach())
        self.bias = nn.Parameter(convolution.bias.detach()) if convolution.bias is not None else None

    def forward(
        self,
        x: Tensor,
        channel_scale: Tensor | None = None,
        channel_shift: Tensor | None = None,
        *,
        relu: bool = False,
        statistics: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Convolve; the other arguments fuse a BatchNorm before and the statistics of one after (see the op).

        The map's dtype decides, so that under autocast the convolution runs in the precision of the layer before.
        """

        def like_x(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(x.dtype)

        return conv3d_periodic(
            *(x, self.weight.to(x.dtype), like_x(self.bias)),
            padding=self.padding,
            channel_scale=like_x(channel_scale),
            channel_shift=like_x(channel_shift),
            relu=relu,
            statistics=statistics,
        )


def fold_batch_norm(norm: nn.BatchNorm3d, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """A BatchNorm with these statistics as scale and shift of each channel."""
    scale = norm.weight * torch.rsqrt(var + norm.eps)
    return scale, norm.bias - mean * scale


@torch.no_grad()
def update_batch_norm(norm: nn.BatchNorm3d, mean: Tensor, var: Tensor, n: Tensor | int) -> None:
    """Take mean and biased variance of n values into the running statistics, as torch's BatchNorm does in training."""
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    norm.num_batches_tracked += 1
    momentum = 1 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
    norm.running_mean += momentum * (mean - norm.running_mean)
    n = n.double() if isinstance(n, Tensor) else n  # torch divides integers in single precision
    norm.running_var += momentum * (var * (n / (n - 1)) - norm.running_var)
