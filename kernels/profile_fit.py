"""Linear fits of intensity and background with weights at a reference: one program per box.

The counts are read once from memory: the second pass, for the correlation, finds them in cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtalfast.kernels._shoebox import SMALLEST_RATE, box_extent, load_pixels, tile_configs

# 1 - (cosine between profile and background)^2, as in the reference, in double and single precision
SINGULAR = tl.constexpr(1e-12)
SINGULAR_SINGLE = tl.constexpr(1e-6)


@triton.autotune(configs=tile_configs((256, 4), (128, 2)), key=["pixels"])
@triton.jit(do_not_specialize=["n", "pixels"])
def _profile_fit_kernel(
    counts,
    mask,
    ptr,
    background,
    profile,
    at,
    fit,
    solvable,
    n,
    pixels,
    BITS: tl.constexpr,
    BACKGROUND_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = profile.dtype.element_ty
    first, size = box_extent(ptr, row, pixels)
    i_ref, b_ref = tl.load(at + row).to(dtype), tl.load(at + n + row).to(dtype)

    pp, pb, bb = tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype)
    py, by = tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype)
    used_sums, photons = tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype)
    profile_sums, background_sums = tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype)
    for start in range(0, size, BLOCK):
        j = start + tl.arange(0, BLOCK)
        inside = j < size
        y, used, b = load_pixels(counts, mask, background, first, j, inside, BITS, BACKGROUND_ROWS, dtype)
        p = tl.where(used, tl.load(profile + first + j, mask=inside, other=0.0), 0.0)
        weight = tl.where(used, 1.0 / tl.maximum(i_ref * p + b_ref * b, SMALLEST_RATE), 0.0)
        wp, wb = weight * p, weight * b
        pp += wp * p
        pb += wp * b
        bb += wb * b
        py += wp * y
        by += wb * y
        used_sums += used.to(dtype)
        photons += y
        profile_sums += p
        background_sums += tl.where(used, b, 0.0)

    a, c, d = tl.sum(pp, 0).to(tl.float64), tl.sum(pb, 0).to(tl.float64), tl.sum(bb, 0).to(tl.float64)
    e, f = tl.sum(py, 0).to(tl.float64), tl.sum(by, 0).to(tl.float64)
    determinant = a * d - c * c
    solved = determinant > (SINGULAR if dtype == tl.float64 else SINGULAR_SINGLE) * a * d
    inverse = 1.0 / tl.where(solved, determinant, 1.0)
    i = tl.where(solved, (d * e - c * f) * inverse, 0.0)
    b_fit = tl.where(solved, (a * f - c * e) * inverse, 0.0)

    n_used = tl.maximum(tl.sum(used_sums, 0), 1.0)
    i_model, b_model = i.to(dtype), b_fit.to(dtype)
    mean_counts = tl.sum(photons, 0) / n_used
    mean_rate = (i_model * tl.sum(profile_sums, 0) + b_model * tl.sum(background_sums, 0)) / n_used
    cross, rates_2, counts_2 = tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype)
    for start in range(0, size, BLOCK):
        j = start + tl.arange(0, BLOCK)
        inside = j < size
        y, used, b = load_pixels(counts, mask, background, first, j, inside, BITS, BACKGROUND_ROWS, dtype)
        p = tl.where(used, tl.load(profile + first + j, mask=inside, other=0.0), 0.0)
        u = tl.where(used, i_model * p + b_model * b - mean_rate, 0.0)
        v = tl.where(used, y - mean_counts, 0.0)
        cross += u * v
        rates_2 += u * u
        counts_2 += v * v
    norm = tl.sqrt(tl.sum(rates_2, 0).to(tl.float64) * tl.sum(counts_2, 0).to(tl.float64))
    correlation = tl.where(norm > 0.0, tl.sum(cross, 0).to(tl.float64) / tl.where(norm > 0.0, norm, 1.0), 0.0)

    tl.store(fit + row, i)
    tl.store(fit + n + row, tl.where(solved, d * inverse, float("inf")))
    tl.store(fit + 2 * n + row, b_fit)
    tl.store(fit + 3 * n + row, tl.where(solved, a * inverse, float("inf")))
    tl.store(fit + 4 * n + row, tl.where(solved, -c * inverse, 0.0))
    tl.store(fit + 5 * n + row, correlation)
    tl.store(solvable + row, solved)


def profile_fit(
    counts: Tensor,
    mask: Tensor | None,
    ptr: Tensor | None,
    background: Tensor | None,
    profile: Tensor,
    at: Tensor,
    fit: Tensor,
    solvable: Tensor,
) -> None:
    """Write the fit of every box; all tensors contiguous.

    Args:
        counts, mask, ptr, background: as for `poisson_gamma_elbo`.
        profile: values like counts, float32 or float64.
        at: I and B of the weights, not negative, [2, N] float64.
        fit: I, var I, B, var B, cov(I, B), correlation, [6, N] float64.
        solvable: whether the box determines I and B, bool [N].
    """
    n = at.shape[1]
    if n == 0:
        return
    _profile_fit_kernel[(n,)](
        counts,
        mask,
        ptr,
        background,
        profile,
        at,
        fit,
        solvable,
        n,
        counts.shape[-1],
        BITS=mask is not None and mask.dtype != torch.bool,
        BACKGROUND_ROWS=background is not None and background.shape == counts.shape,
    )
