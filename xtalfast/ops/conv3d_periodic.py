"""3-D convolution of few channels on a periodic map, with the BatchNorm before and the statistics for the one after.

With h = a relu(x) + b (a, b [C]: a BatchNorm behind its ReLU; both optional), continued by wrapping or by zeros,

    y_o(r) = bias_o + sum_(c,d) w_oc(d) h_c(r + d - k // 2),

and, on request, mean and variance of relu(y_o) over all voxels of all maps: what the next BatchNorm needs. Zeros are
put around h, not around x.

Work: k^3 C O multiply-adds a voxel. Bytes: x read and y written once; h and relu(y) are never stored.

Ref: Brock et al., BigGAN, arXiv 1809.11096 (the block in which it is used); Pan et al. (the density paper), decoder.

Example:
    >>> x, w = torch.randn(1, 10, 8, 6, 4), torch.randn(10, 10, 5, 5, 5)
    >>> y = conv3d_periodic(x, w)
    >>> torch.allclose(conv3d_periodic(x.roll(3, 2), w), y.roll(3, 2), atol=1e-4)  # no corner is special
    True
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from xtalfast.ops.patch_embed import check_convolution

Padding = Literal["wrap", "zeros"]


def conv3d_periodic_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    padding: Padding = "wrap",
    channel_scale: Tensor | None = None,
    channel_shift: Tensor | None = None,
    relu: bool = False,
    statistics: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """The definition, in plain torch; arguments as in `conv3d_periodic`."""
    h = torch.relu(x) if relu else x
    if channel_scale is not None:
        h = h * channel_scale.view(-1, 1, 1, 1)
    if channel_shift is not None:
        h = h + channel_shift.view(-1, 1, 1, 1)
    half = weight.shape[2] // 2
    around = functional.pad(h, [half] * 6, mode="circular" if padding == "wrap" else "constant")
    y = functional.conv3d(around, weight, bias)
    if not statistics:
        return y
    lit = torch.relu(y).to(torch.promote_types(y.dtype, torch.float32))
    return y, lit.mean((0, 2, 3, 4)), lit.var((0, 2, 3, 4), correction=0)


def conv3d_periodic(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    padding: Padding = "wrap",
    channel_scale: Tensor | None = None,
    channel_shift: Tensor | None = None,
    relu: bool = False,
    statistics: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Convolve periodic maps; the map keeps its size.

    Args:
        x: maps, [B, C, X, Y, Z], float; each size at least k // 2.
        weight: [O, C, k, k, k], k odd.
        bias: [O] or None.
        padding: what lies beyond the faces of the map: "wrap", the map again; "zeros".
        channel_scale, channel_shift: a and b, [C]; None: 1 and 0.
        relu: whether a and b act on relu(x).
        statistics: whether to return mean and variance of relu(y) too.

    Returns:
        y, [B, O, X, Y, Z]; with statistics also mean and biased variance of relu(y), [O] each.

    Raises:
        TypeError: wrong kind or dtype of an argument.
        ValueError: wrong shape, device or name.
    """
    check_convolution(x, weight)
    if padding not in ("wrap", "zeros"):
        raise ValueError(f"padding must be 'wrap' or 'zeros', got {padding!r}")
    half = weight.shape[2] // 2
    if padding == "wrap" and any(n < half for n in x.shape[2:]):
        raise ValueError(f"x must be [B, C, X, Y, Z] with sizes of at least k // 2 = {half}, got {list(x.shape)}")
    for name, tensor, size in (
        ("bias", bias, weight.shape[0]),
        ("channel_scale", channel_scale, x.shape[1]),
        ("channel_shift", channel_shift, x.shape[1]),
    ):
        if tensor is not None and tensor.shape != (size,):
            raise ValueError(f"{name} must be [{size}], got {list(tensor.shape)}")
    return conv3d_periodic_reference(
        x,
        weight,
        bias,
        padding=padding,
        channel_scale=channel_scale,
        channel_shift=channel_shift,
        relu=relu,
        statistics=statistics,
    )
