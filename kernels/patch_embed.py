"""Tokens of periodic maps: windows gathered with wrapped indices, two matrix products, LayerNorms in between and after.

A tile of tokens keeps its sums in registers. The values of a patch come in columns: [tokens, C window^3] times a banded
matrix (the convolution with its channel scaling) gives some of them, which go at once into the second product. The
LayerNorm between acts afterwards, being linear but for mean and variance of the values.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 32  # in a tile
COLUMNS = 32  # values of a patch at a time
_TAPS = 32  # of the window at a time
OPTIONS = {"num_warps": 8, "num_stages": 1}


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """Product, summed in single precision at least."""
    if a.dtype == tl.float64:
        product = tl.dot(a, b, input_precision="ieee", out_dtype=tl.float64)
    else:
        product = tl.dot(a, b, input_precision=PRECISION)
    return product


@triton.jit(do_not_specialize=["n_tokens"])
def _patch_embed_kernel(
    x,
    band,
    offset,
    weight,
    total,
    bias,
    norm_weight,
    norm_bias,
    tokens,
    n_tokens,
    channels,
    size_x,
    size_y,
    size_z,
    taps,
    values,
    dim,
    eps,
    PATCH: tl.constexpr,
    EDGE: tl.constexpr,
    DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    real: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    TAPS: tl.constexpr,
):
    given: tl.constexpr = x.dtype.element_ty
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = token < n_tokens
    across_y, across_z = size_y // PATCH, size_z // PATCH
    patches = (size_x // PATCH) * across_y * across_z
    patch = token % patches
    voxels = size_x * size_y * size_z
    maps = x + (token // patches).to(tl.int64)[:, None] * (channels * voxels)
    margin: tl.constexpr = (EDGE - PATCH) // 2
    # shifted by whole cells, so that remainders are of what is not negative
    first_x = (patch // (across_y * across_z)) * PATCH - margin + size_x * EDGE
    first_y = (patch // across_z) % across_y * PATCH - margin + size_y * EDGE
    first_z = patch % across_z * PATCH - margin + size_z * EDGE

    d = tl.arange(0, DIM)
    acc = tl.zeros([BLOCK, DIM], real)
    sums, squares = tl.zeros([BLOCK], real), tl.zeros([BLOCK], real)
    for first in range(0, values, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        y = tl.zeros([BLOCK, COLUMNS], real)
        for start in range(0, taps, TAPS):
            tap = start + tl.arange(0, TAPS)
            at_x = (first_x[:, None] + (tap // (EDGE * EDGE) % EDGE)[None, :]) % size_x
            at_y = (first_y[:, None] + (tap // EDGE % EDGE)[None, :]) % size_y
            at_z = (first_z[:, None] + (tap % EDGE)[None, :]) % size_z
            at = (at_x * size_y + at_y) * size_z + at_z + (tap // (EDGE * EDGE * EDGE))[None, :] * voxels
            window = tl.load(maps + at, mask=here[:, None] & (tap < taps)[None, :], other=0.0)
            matrix = tl.load(
                band + tap[:, None] * values + column[None, :],
                mask=(tap < taps)[:, None] & (column < values)[None, :],
                other=0.0,
            )
            y += dot(window, matrix, PRECISION)
        y += tl.load(offset + column, mask=column < values, other=0.0)[None, :]
        y = tl.where((column < values)[None, :], y, 0.0)
        sums += tl.sum(y, 1)
        squares += tl.sum(y * y, 1)
        rows = tl.load(
            weight + column[:, None] * dim + d[None, :],
            mask=(column < values)[:, None] & (d < dim)[None, :],
            other=0.0,
        )
        acc += dot(y.to(given), rows, PRECISION)

    mean = sums / values
    inverse = 1.0 / tl.sqrt(tl.maximum(squares / values - mean * mean, 0.0) + eps)
    inside = d < dim
    result = (acc - mean[:, None] * tl.load(total + d, mask=inside, other=0.0)[None, :]) * inverse[:, None]
    result += tl.load(bias + d, mask=inside, other=0.0)[None, :]
    mean = tl.sum(tl.where(inside[None, :], result, 0.0), 1) / dim
    result = tl.where(inside[None, :], result - mean[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(result * result, 1) / dim + eps)
    result = result * inverse[:, None] * tl.load(norm_weight + d, mask=inside, other=0.0)[None, :]
    result += tl.load(norm_bias + d, mask=inside, other=0.0)[None, :]
    target = tokens + token.to(tl.int64)[:, None] * dim + d[None, :]
    tl.store(target, result.to(given), mask=here[:, None] & inside[None, :])


def patch_embed(
    x: Tensor,
    band: Tensor,
    offset: Tensor,
    weight: Tensor,
    total: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    patch: int,
    eps: float,
    precision: str,
    tokens: Tensor,
) -> None:
    """Write the tokens; all tensors contiguous.

    Args:
        x: [B, C, X, Y, Z].
        band: windows to the values of a patch, channel scaling included, [C window^3, O patch^3], like x.
        offset: channel shift of each value, [O patch^3], float32 (float64 with x), as are those below.
        weight: of the Linear times that of the LayerNorm before it, transposed, [O patch^3, dim], like x.
        total: sums of `weight` (as rounded) over the values, [dim].
        bias: of the Linear plus its product with that of the LayerNorm, [dim].
        norm_weight, norm_bias: of the last LayerNorm, [dim].
        precision: of products of float32, as `tl.dot` names it.
        tokens: [B, patches, dim], like x.
    """
    n_tokens = tokens.shape[0] * tokens.shape[1]
    taps, values = band.shape
    window = round((taps // x.shape[1]) ** (1 / 3))
    dim = tokens.shape[2]
    _patch_embed_kernel[(triton.cdiv(n_tokens, TOKENS),)](
        *(x, band, offset, weight, total, bias, norm_weight, norm_bias, tokens),
        *(n_tokens, *x.shape[1:], taps, values, dim, eps),
        PATCH=patch,
        EDGE=window,
        DIM=max(16, triton.next_power_of_2(dim)),
        PRECISION=precision,
        real={torch.float64: tl.float64}.get(x.dtype, tl.float32),
        BLOCK=TOKENS,
        COLUMNS=COLUMNS,
        TAPS=_TAPS,
        **OPTIONS,
    )
