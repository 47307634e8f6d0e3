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

from xtalfast.ops._triton import PRECISION, allows_tensor_cores, autocast_dtype
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


_library = torch.library.Library("xtalfast", "FRAGMENT")
_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, bool relu, bool wrap, bool statistics"
_library.define(f"conv3d_periodic({_INPUTS}) -> (Tensor y, Tensor mean, Tensor var)")
_library.define(
    f"conv3d_periodic_backward(Tensor? by_y, Tensor? by_mean, Tensor? by_var, Tensor y, Tensor mean, {_INPUTS}) -> "
    "(Tensor x, Tensor weight, Tensor bias, Tensor scale, Tensor shift)"
)


def _real(x: Tensor) -> torch.dtype:
    """Type of sums and of what belongs to a channel."""
    return torch.promote_types(x.dtype, torch.float32)


def _empty_results(x, weight, statistics):
    channel = x.new_empty(len(weight) if statistics else 0, dtype=_real(x))
    return x.new_empty(len(x), len(weight), *x.shape[2:]), channel, torch.empty_like(channel)


def _empty_gradients(x, weight, bias, scale, shift):
    """Gradients by x, weight, bias, scale and shift; empty ones for what was not given."""
    return *map(torch.empty_like, (x, weight)), *(
        x.new_empty(0) if t is None else torch.empty_like(t) for t in (bias, scale, shift)
    )


@torch.library.register_fake("xtalfast::conv3d_periodic", lib=_library)
def _(x, weight, bias, scale, shift, relu, wrap, statistics):
    return _empty_results(x, weight, statistics)


@torch.library.register_fake("xtalfast::conv3d_periodic_backward", lib=_library)
def _(by_y, by_mean, by_var, y, mean, x, weight, bias, scale, shift, relu, wrap, statistics):
    return _empty_gradients(x, weight, bias, scale, shift)


def _forward(x, weight, bias, scale, shift, relu, wrap, statistics):
    options = {"padding": "wrap" if wrap else "zeros", "relu": relu, "statistics": statistics}
    scale, shift = (None if t is None else t.to(x.dtype) for t in (scale, shift))
    result = conv3d_periodic_reference(x, weight, bias, channel_scale=scale, channel_shift=shift, **options)
    if not statistics:
        return result, *_empty_results(x, weight, False)[1:]
    return result[0].contiguous(), *(t.to(_real(x)) for t in result[1:])


def _total_gradient(by_y, by_mean, by_var, y, mean):
    """Gradient by y of y itself and of the statistics of relu(y), of whose n values each takes its part."""
    total = torch.zeros_like(y) if by_y is None else by_y.contiguous()
    if by_mean is None and by_var is None:
        return total
    n = y.numel() / max(y.shape[1], 1)
    slope = torch.zeros_like(mean) if by_var is None else 2 * by_var / n
    offset = -slope * mean if by_mean is None else by_mean / n - slope * mean
    by_lit = (offset.view(-1, 1, 1, 1) + slope.view(-1, 1, 1, 1) * y).to(y.dtype)
    return total + torch.where(y > 0, by_lit, 0.0)


def _backward(by_y, by_mean, by_var, y, mean, x, weight, bias, scale, shift, relu, wrap, statistics):
    gradients = _empty_gradients(x, weight, bias, scale, shift)
    given = [t for t in (x, weight, bias, scale, shift) if t is not None]
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in given]
        rest = iter(leaves)
        arguments = [None if t is None else next(rest) for t in (x, weight, bias, scale, shift)]
        again = _forward(*arguments, relu, wrap, False)[0]
    found = torch.autograd.grad(again, leaves, _total_gradient(by_y, by_mean, by_var, y, mean))
    for target, value in zip([g for g, t in zip(gradients, arguments) if t is not None], found):
        target.copy_(value)
    return gradients


def _channel_values(x, scale, shift):
    """Scale and shift as the kernels take them: both or none."""
    if scale is None and shift is None:
        return None, None
    channels, real = x.shape[1], _real(x)
    scale = x.new_ones(channels, dtype=real) if scale is None else scale.to(real).contiguous()
    return scale, x.new_zeros(channels, dtype=real) if shift is None else shift.to(real).contiguous()


def _tiles(x, voxels):
    return -(-x.shape[2:].numel() // voxels)


def _forward_on_gpu(x, weight, bias, scale, shift, relu, wrap, statistics):
    from xtalfast.kernels import conv3d_periodic as kernels

    y, mean, var = _empty_results(x, weight, statistics)
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    shape = (len(x), _tiles(x, kernels.VOXELS), 2, len(weight))
    sums = x.new_empty(shape, dtype=_real(x)) if statistics else None
    with torch.cuda.device(x.device):
        channel = _channel_values(x, scale, shift)
        kernels.conv3d_periodic(x, weight, bias, *channel, relu, wrap, PRECISION, y, sums)
    return (y, mean, var) if sums is None else (y, *joint_statistics(sums, x.shape[2:].numel(), kernels.VOXELS))


def joint_statistics(sums: Tensor, n_voxels: int, tile: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of all maps from mean and sum of squared deviations of tiles, [B, tiles, 2, O]."""
    n = torch.full((sums.shape[1], 1), tile, dtype=torch.float64, device=sums.device)
    n[-1] = n_voxels - tile * (sums.shape[1] - 1)
    total = n.sum() * len(sums)
    means, squares = sums.double().unbind(2)
    mean = (n * means).sum((0, 1)) / total
    var = (squares + n * (means - mean) ** 2).sum((0, 1)) / total
    return mean.to(sums.dtype), var.to(sums.dtype)


def _backward_on_gpu(by_y, by_mean, by_var, y, mean, x, weight, bias, scale, shift, relu, wrap, statistics):
    from xtalfast.kernels import conv3d_periodic as kernels

    by_x, by_weight, by_bias, by_scale, by_shift = _empty_gradients(x, weight, bias, scale, shift)
    x, real, precision = x.contiguous(), _real(x), PRECISION
    by_x = torch.empty_like(x)
    grad = _total_gradient(by_y, by_mean, by_var, y, mean)
    channel = _channel_values(x, scale, shift)
    sums = x.new_empty(len(x), _tiles(x, kernels.VOXELS), 2, x.shape[1], dtype=real)
    weights = torch.empty(weight.shape, dtype=real, device=x.device)
    with torch.cuda.device(x.device):
        kernels.conv3d_periodic_by_input(grad, x, weight, channel[0], relu, wrap, precision, by_x, sums)
        kernels.conv3d_periodic_by_weight(grad, x, *channel, weight.shape[2], relu, wrap, precision, weights)
    by_weight.copy_(weights)
    if bias is not None:
        by_bias.copy_(grad.sum((0, 2, 3, 4), dtype=real))
    for target, given, value in zip((by_scale, by_shift), (scale, shift), sums.sum((0, 1))):
        if given is not None:
            target.copy_(value)
    return by_x, by_weight, by_bias, by_scale, by_shift


_library.impl("conv3d_periodic", _forward, "CPU")
_library.impl("conv3d_periodic", _forward_on_gpu, "CUDA")
_library.impl("conv3d_periodic_backward", _backward, "CPU")
_library.impl("conv3d_periodic_backward", _backward_on_gpu, "CUDA")


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[:2], *inputs[:5])
    ctx.options = inputs[5:]


def _autograd_backward(ctx, by_y, by_mean, by_var):
    if not ctx.options[2]:
        by_mean = by_var = None
    if by_y is None and by_mean is None and by_var is None:
        return (None,) * 8
    gradients = torch.ops.xtalfast.conv3d_periodic_backward(by_y, by_mean, by_var, *ctx.saved_tensors, *ctx.options)
    given = ctx.saved_tensors[2:]
    return *(by if t is not None else None for by, t in zip(gradients, given)), None, None, None


torch.library.register_autograd(
    "xtalfast::conv3d_periodic", _autograd_backward, setup_context=_setup_context, lib=_library
)


def _has_kernel(x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the Triton kernels take these arguments: few channels, and products that torch too would round."""
    return max(weight.shape[:2]) <= 16 and weight.shape[2] <= 7 and x.numel() > 0 and allows_tensor_cores(dtype)


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
    dtype = autocast_dtype(x)
    if x.is_cuda and _has_kernel(x, weight, dtype):
        given = (None if t is None else t.to(dtype) for t in (x, weight, bias))
        rest = (channel_scale, channel_shift, relu, padding == "wrap", statistics)
        y, mean, var = torch.ops.xtalfast.conv3d_periodic(*given, *rest)
        return (y, mean, var) if statistics else y
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
