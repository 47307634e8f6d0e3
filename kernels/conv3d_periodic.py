"""Convolution of few channels on periodic or zero-padded maps: forward, by its input, by its weight.

A tile of voxels meets the k^2 rows of taps one after another: k taps along Z of all channels are one product of
[voxels, k C] with [k C, O], gathered with wrapped indices. The ReLU and BatchNorm before are applied on loading; the
statistics of the one after, or the way back through the one before, when the tile is finished. Sums over tiles are
left to the caller, in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

VOXELS = 64  # in a tile
OPTIONS = {"num_warps": 8, "num_stages": 1}
OUT = 16  # output channels, padded
_WEIGHT_PROGRAMS = 16  # shares of the voxels, for each row of taps
PLAIN, STATISTICS, CHAIN = (tl.constexpr(n) for n in range(3))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, summed in single precision at least."""
    if a.dtype == tl.float64:
        acc += tl.dot(a, b, input_precision="ieee", out_dtype=tl.float64)
    else:
        acc += tl.dot(a, b, input_precision=PRECISION)
    return acc


@triton.jit
def wrapped(at, n, WRAP: tl.constexpr):
    """Index along an axis, and whether it is inside; at is less than n outside of the axis if it wraps."""
    inside = (at >= 0) & (at < n)
    if WRAP:
        at = tl.where(at < 0, at + n, at)
        at = tl.where(at >= n, at - n, at)
        inside = (at >= 0) & (at < n)
    return tl.where(inside, at, 0), inside


@triton.jit
def load_taps(
    x,
    scale,
    shift,
    voxel,
    row,
    size_x,
    size_y,
    size_z,
    CHANNELS: tl.constexpr,
    K: tl.constexpr,
    TAPS: tl.constexpr,
    WRAP: tl.constexpr,
    RELU: tl.constexpr,
    real: tl.constexpr,
):
    """Values that the K taps of a row (of K^2) see at each voxel, for all channels, [voxels, TAPS]."""
    plane = size_y * size_z
    px, inside_x = wrapped(voxel // plane + row // K - K // 2, size_x, WRAP)
    py, inside_y = wrapped((voxel % plane) // size_z + row % K - K // 2, size_y, WRAP)
    tap = tl.arange(0, TAPS)
    channel = tap % CHANNELS
    pz, inside_z = wrapped((voxel % size_z)[:, None] + (tap // CHANNELS - K // 2)[None, :], size_z, WRAP)
    inside = inside_z & (inside_x & inside_y & (voxel < size_x * plane))[:, None] & (tap < K * CHANNELS)[None, :]
    offset = (px * plane + py * size_z)[:, None] + pz + (channel * size_x * plane)[None, :]
    values = tl.load(x + offset, mask=inside, other=0.0)
    if RELU:
        values = tl.maximum(values, 0.0)
    if scale is not None:
        factor = tl.load(scale + channel)[None, :]
        values = values.to(real) * factor + tl.load(shift + channel)[None, :]
        values = tl.where(inside, values, 0.0)
    return values


@triton.jit
def _convolve_kernel(
    x,
    weight,
    bias,
    scale,
    shift,
    y,
    before,
    before_scale,
    sums,
    out,
    size_x,
    size_y,
    size_z,
    CHANNELS: tl.constexpr,
    K: tl.constexpr,
    TAPS: tl.constexpr,
    WRAP: tl.constexpr,
    RELU: tl.constexpr,
    EPILOGUE: tl.constexpr,
    BEFORE_RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    real: tl.constexpr,
    BLOCK: tl.constexpr,
    O: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    given: tl.constexpr = x.dtype.element_ty
    voxels = size_x * size_y * size_z
    voxel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o, tap = tl.arange(0, O), tl.arange(0, TAPS)
    maps = x + batch * CHANNELS * voxels
    acc = tl.zeros([BLOCK, O], real)
    for row in range(K * K):
        values = load_taps(maps, scale, shift, voxel, row, size_x, size_y, size_z, CHANNELS, K, TAPS, WRAP, RELU, real)
        taps = tl.load(weight + (row * TAPS + tap)[:, None] * O + o[None, :])
        acc = dot(values.to(given), taps, acc, PRECISION)
    if bias is not None:
        acc += tl.load(bias + o, mask=o < out, other=0.0).to(real)[None, :]
    there = (voxel < voxels)[:, None] & (o < out)[None, :]
    offset = (batch * out + o)[None, :] * voxels + voxel[:, None]
    if EPILOGUE == CHAIN:  # acc is the gradient by scale x relu(before) + shift
        lit = tl.load(before + offset, mask=there, other=0.0).to(real)
        positive = tl.full(lit.shape, 1.0, real)
        if BEFORE_RELU:
            positive = tl.where(lit > 0.0, 1.0, 0.0).to(real)
            lit = tl.maximum(lit, 0.0)
        acc = tl.where(there, acc, 0.0)
        first, second = tl.sum(acc * lit, 0), tl.sum(acc, 0)
        acc = acc * positive
        if before_scale is not None:
            acc = acc * tl.load(before_scale + o, mask=o < out, other=0.0).to(real)[None, :]
    result = acc.to(given)
    tl.store(y + offset, result, mask=there)
    if EPILOGUE == STATISTICS:  # mean, and sum of squared deviations, of the tile
        lit = tl.where(there, tl.maximum(result, 0.0).to(real), 0.0)
        n = tl.minimum(voxels - tl.program_id(0) * BLOCK, BLOCK)
        first = tl.sum(lit, 0) / n
        deviation = tl.where(there, lit - first[None, :], 0.0)
        second = tl.sum(deviation * deviation, 0)
    if EPILOGUE != PLAIN:
        target = sums + (batch * tl.num_programs(0) + tl.program_id(0)) * 2 * out
        tl.store(target + o, first, mask=o < out)
        tl.store(target + out + o, second, mask=o < out)


@triton.jit
def _weight_kernel(
    x,
    scale,
    shift,
    grad,
    sums,
    n_maps,
    tiles,
    out,
    size_x,
    size_y,
    size_z,
    CHANNELS: tl.constexpr,
    K: tl.constexpr,
    TAPS: tl.constexpr,
    WRAP: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    real: tl.constexpr,
    BLOCK: tl.constexpr,
    O: tl.constexpr,
):
    """Gradient by the weights of one row of taps, from every so manieth tile."""
    row, part = tl.program_id(0), tl.program_id(1)
    given: tl.constexpr = x.dtype.element_ty
    voxels = size_x * size_y * size_z
    o, tap = tl.arange(0, O), tl.arange(0, TAPS)
    acc = tl.zeros([TAPS, O], real)
    for tile in range(part, n_maps * tiles, tl.num_programs(1)):
        batch = (tile // tiles).to(tl.int64)
        voxel = (tile % tiles) * BLOCK + tl.arange(0, BLOCK)
        maps = x + batch * CHANNELS * voxels
        values = load_taps(maps, scale, shift, voxel, row, size_x, size_y, size_z, CHANNELS, K, TAPS, WRAP, RELU, real)
        there = (voxel < voxels)[:, None] & (o < out)[None, :]
        upstream = tl.load(grad + (batch * out + o)[None, :] * voxels + voxel[:, None], mask=there, other=0.0)
        acc = dot(tl.trans(values.to(given)), upstream, acc, PRECISION)
    target = sums + ((part * K * K + row) * TAPS + tap)[:, None] * O + o[None, :]
    tl.store(target, acc)


def _sizes(x: Tensor, kernel: int, wrap: bool, relu: bool, precision: str) -> dict:
    """Constants of the kernels."""
    real = {torch.float64: tl.float64}.get(x.dtype, tl.float32)
    taps = max(16, triton.next_power_of_2(kernel * x.shape[1]))
    sizes = {
        "CHANNELS": x.shape[1],
        "K": kernel,
        "TAPS": taps,
        "WRAP": wrap,
        "RELU": relu,
        "PRECISION": precision,
        "real": real,
    }
    return sizes | {"BLOCK": VOXELS, "O": OUT} | OPTIONS


def _pack(weight: Tensor, taps: int) -> Tensor:
    """[O, C, k, k, k] -> [k k, taps, 16]: for each row the taps along Z, channels fastest."""
    out, channels, kernel = weight.shape[:3]
    packed = weight.new_zeros(kernel**2, taps, OUT)
    packed[:, : kernel * channels, :out] = weight.permute(2, 3, 4, 1, 0).reshape(kernel**2, kernel * channels, out)
    return packed


def conv3d_periodic(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    wrap: bool,
    precision: str,
    y: Tensor,
    sums: Tensor | None,
) -> None:
    """Write the convolution and, if wanted, the statistics of its tiles; tensors contiguous.

    Args:
        x, weight, bias: [B, C, X, Y, Z], [O, C, k, k, k], [O], of one type; at most 16 channels O.
        scale, shift: both or none, [C], float32 (float64 with x).
        precision: of products of float32, as `tl.dot` names it.
        y: [B, O, X, Y, Z].
        sums: mean of relu(y) and sum of squared deviations from it, of each tile, [B, tiles, 2, O], like scale.
    """
    n_maps, _, *grid = x.shape
    sizes = _sizes(x, weight.shape[2], wrap, relu, precision)
    epilogue = PLAIN if sums is None else STATISTICS
    _convolve_kernel[(triton.cdiv(y[0, 0].numel(), VOXELS), n_maps)](
        *(x, _pack(weight, sizes["TAPS"]), bias, scale, shift, y, None, None, sums, y.shape[1], *grid),
        EPILOGUE=epilogue,
        BEFORE_RELU=False,
        **sizes,
    )


def conv3d_periodic_by_input(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    relu: bool,
    wrap: bool,
    precision: str,
    by_x: Tensor,
    sums: Tensor,
) -> None:
    """Write the gradient by x, and for each tile what adds up to those by scale and shift, sums [B, tiles, 2, C]."""
    n_maps, channels, *grid = x.shape
    turned = weight.flip(2, 3, 4).transpose(0, 1)
    sizes = _sizes(grad, weight.shape[2], wrap, False, precision)
    _convolve_kernel[(triton.cdiv(x[0, 0].numel(), VOXELS), n_maps)](
        *(grad, _pack(turned, sizes["TAPS"]), None, None, None, by_x, x, scale, sums, channels, *grid),
        EPILOGUE=CHAIN,
        BEFORE_RELU=relu,
        **sizes,
    )


def conv3d_periodic_by_weight(
    grad: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    kernel: int,
    relu: bool,
    wrap: bool,
    precision: str,
    by_weight: Tensor,
) -> None:
    """Write the gradient by the weight, [O, C, k, k, k] in single precision at least."""
    n_maps, channels, *grid = x.shape
    out = grad.shape[1]
    sizes = _sizes(x, kernel, wrap, relu, precision)
    tiles = triton.cdiv(x[0, 0].numel(), VOXELS)
    parts = max(1, min(_WEIGHT_PROGRAMS, n_maps * tiles))
    sums = by_weight.new_empty(parts, kernel**2, sizes["TAPS"], OUT)
    _weight_kernel[(kernel**2, parts)](
        *(x, scale, shift, grad, sums, n_maps, tiles, out, *grid),
        **sizes,
    )
    taps = sums.sum(0)[:, : kernel * channels, :out].view(kernel, kernel, kernel, channels, out)
    by_weight.copy_(taps.permute(4, 3, 0, 1, 2))
