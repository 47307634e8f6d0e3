"""The share of the spot in the photons of a box: its most likely value, and its likelihood on quadrature nodes.

One program per box does all that touches pixels, with the stages and tolerances of the reference; sums over pixels are
taken in the precision of the profile, all else in double. Newton and the nodes pass over the box some ten times, all
but the first in cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtalfast.kernels._shoebox import SMALLEST_RATE, box_extent, load_pixels, log_factorial, tile_configs

NODE_BLOCK = tl.constexpr(8)  # nodes taken in one pass over the pixels
MOST_STEPS = tl.constexpr(80)  # of the search for the mode
FARTHEST = tl.constexpr(36.0)  # |logit X| at which it ends: 1 - X is still above 0 in double precision


@triton.jit
def load_rates(
    counts,
    mask,
    background,
    profile,
    first,
    j,
    inside,
    to_one,
    to_zero,
    BITS: tl.constexpr,
    BACKGROUND_ROWS: tl.constexpr,
):
    """Counts, and rates at share 1 and 0, of the pixels j of a box (0 and the background where not used)."""
    dtype: tl.constexpr = profile.dtype.element_ty
    y, used, b = load_pixels(counts, mask, background, first, j, inside, BITS, BACKGROUND_ROWS, dtype)
    p = tl.where(used, tl.load(profile + first + j, mask=inside, other=0.0), 0.0)
    return y, used, p * to_one, b * to_zero


@triton.jit
def share_slopes(
    counts,
    mask,
    background,
    profile,
    first,
    size,
    to_one,
    to_zero,
    scale,
    share,
    BITS: tl.constexpr,
    BACKGROUND_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sum y r^k for k = 1, 2, 3 with r = d log(rate) / dX, and sum y log(scale rate), at share X; double."""
    dtype: tl.constexpr = profile.dtype.element_ty
    x, rest = share.to(dtype), (1.0 - share).to(dtype)
    firsts, seconds = tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype)
    thirds, log_rates = tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype)
    for start in range(0, size, BLOCK):
        j = start + tl.arange(0, BLOCK)
        y, _, u, v = load_rates(
            counts, mask, background, profile, first, j, j < size, to_one, to_zero, BITS, BACKGROUND_ROWS
        )
        rate = tl.maximum(x * u + rest * v, SMALLEST_RATE)
        ratio = (u - v) / rate
        weighted = y * ratio
        firsts += weighted
        seconds += weighted * ratio
        thirds += weighted * ratio * ratio
        log_rates += y * tl.log(scale * rate)  # near 0 for most pixels: rounding is not repeated
    return (
        tl.sum(firsts, 0).to(tl.float64),
        tl.sum(seconds, 0).to(tl.float64),
        tl.sum(thirds, 0).to(tl.float64),
        tl.sum(log_rates, 0).to(tl.float64),
    )


@triton.jit
def first_share(a, c, p_total, q_total, pp, pb, bb, py, by, photons):
    """Least squares of the counts on profile and background as a share, from sums by lane; kept off 0 and 1."""
    spp, spb, sbb = tl.sum(pp, 0).to(tl.float64), tl.sum(pb, 0).to(tl.float64), tl.sum(bb, 0).to(tl.float64)
    spy, sby = tl.sum(py, 0).to(tl.float64), tl.sum(by, 0).to(tl.float64)
    spot, rest = p_total * (sbb * spy - spb * sby), q_total * (spp * sby - spb * spy)
    n = a + c + photons + 1.0
    low, high = (a + 0.5) / n, 1.0 - (c + 0.5) / n
    at_end = tl.where(rest > 0.0, low, tl.where(spot > 0.0, high, 0.5))
    inside = (spot > 0.0) & (rest > 0.0)
    share = tl.where(inside, spot / tl.where(inside, spot + rest, 1.0), at_end)
    return tl.minimum(tl.maximum(share, low), high)


@triton.jit
def heavy_tail(slope, curvature, skew, heavy, TAIL: tl.constexpr):
    """Distance at which a log-density with these derivatives has fallen by TAIL: Gamma-like if heavy, else Gaussian."""
    n = tl.where(heavy, 4.0 * curvature * curvature * curvature / (skew * skew), 1e12)
    n = tl.minimum(tl.maximum(n, 1.0), 1e12)
    unit = tl.sqrt(n / curvature)
    rise = tl.maximum(-slope, 0.0) * unit
    quadratic, linear = n - 2.0 * rise, 2.0 * TAIL + 2.0 * rise
    ends = quadratic > 0.0
    quadratic = tl.where(ends, quadratic, 1.0)
    d = unit * (linear + tl.sqrt(linear * linear + 8.0 * TAIL * quadratic)) / (2.0 * quadratic)
    for _ in range(6):  # convex: Newton from outside stays outside
        w = d / unit
        near = w * w * (0.5 - w * (1 / 3 - w * (0.25 - w * (0.2 - w * (1 / 6)))))
        fall = slope * d + n * tl.where(w < 0.01, near, w - tl.log(1.0 + w))
        d -= (fall - TAIL) / (slope + n / unit * w / (1.0 + w))
    return tl.where(ends, d, 1.0)


@triton.jit
def share_from_s(s, a, c):
    """X = s^(1/a) / (s^(1/a) + (1-s)^(1/c)); the identity for a = c = 1."""
    bent = 1.0 / (1.0 + tl.exp(tl.log(tl.maximum(1.0 - s, 1e-300)) / c - tl.log(s) / a))
    return tl.where((a == 1.0) & (c == 1.0), s, bent)


@triton.jit
def s_from_share(x, a, c):
    """Inverse of `share_from_s`, by bisection (0 and 1 map to themselves)."""
    low, high = x * 0.0, x * 0.0 + 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        below = share_from_s(middle, a, c) < x
        low, high = tl.where(below, middle, low), tl.where(below, high, middle)
    inner = tl.where((a == 1.0) & (c == 1.0), x, 0.5 * (low + high))
    return tl.where((x <= 0.0) | (x >= 1.0), x, inner)


@triton.autotune(configs=tile_configs((128, 4), (256, 8)), key=["pixels", "nodes"])
@triton.jit(do_not_specialize=["n", "pixels", "nodes"])
def _share_likelihood_kernel(
    counts,
    mask,
    ptr,
    background,
    profile,
    prior,
    node,
    summary,
    log_rates,
    n,
    pixels,
    nodes,
    TOLERANCE: tl.constexpr,
    TAIL: tl.constexpr,
    BITS: tl.constexpr,
    BACKGROUND_ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = profile.dtype.element_ty
    first, size = box_extent(ptr, row, pixels)
    unit = tl.full([], 1.0, dtype)

    profile_sums, background_sums = tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype)
    photons, factorials = tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype)
    pp, pb, bb = tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype)
    py, by = tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype)
    for start in range(0, size, BLOCK):
        j = start + tl.arange(0, BLOCK)
        y, used, p, b = load_rates(
            counts, mask, background, profile, first, j, j < size, unit, unit, BITS, BACKGROUND_ROWS
        )
        profile_sums += p
        b = tl.where(used, b, 0.0)
        background_sums += b
        pp += p * p
        pb += p * b
        bb += b * b
        py += p * y
        by += b * y
        photons += y
        factorials += log_factorial(y, WHOLE)
    a, c = tl.load(prior + row), tl.load(prior + 2 * n + row)
    p_total = tl.sum(profile_sums, 0).to(tl.float64) + tl.load(prior + n + row)
    q_total = tl.sum(background_sums, 0).to(tl.float64) + tl.load(prior + 3 * n + row)
    to_one = (1.0 / tl.where(p_total > 0.0, p_total, 1.0)).to(dtype)
    to_zero = (1.0 / tl.where(q_total > 0.0, q_total, 1.0)).to(dtype)
    scale = tl.where(q_total > 0.0, q_total, 1.0).to(dtype)
    tl.store(summary + row, p_total)
    tl.store(summary + n + row, q_total)
    tl.store(summary + 2 * n + row, tl.sum(photons, 0).to(tl.float64))
    tl.store(summary + 3 * n + row, tl.sum(factorials, 0).to(tl.float64))

    mode = first_share(a, c, p_total, q_total, pp, pb, bb, py, by, tl.sum(photons, 0).to(tl.float64))
    # maximum of a log X + c log(1 - X) + sum y log(rate): Newton in t = logit X inside a bracket; the last step is only
    # looked at, so that one copy of the loop over the pixels serves all
    zero = mode * 0.0
    low, high = zero - FARTHEST, zero + FARTHEST
    slope, curvature, skew, log_rate = zero, zero, zero, zero
    step = 0
    while step <= MOST_STEPS:
        slope, curvature, skew, log_rate = share_slopes(
            counts, mask, background, profile, first, size, to_one, to_zero, scale, mode, BITS, BACKGROUND_ROWS, BLOCK
        )
        rise = slope + a / mode - c / (1.0 - mode)
        bend = curvature + a / (mode * mode) + c / ((1.0 - mode) * (1.0 - mode))
        t = tl.log(mode / (1.0 - mode))
        low, high = tl.where(rise > 0.0, t, low), tl.where(rise > 0.0, high, t)
        newton = t + rise / (bend * mode * (1.0 - mode) - (1.0 - 2.0 * mode) * rise)
        t = tl.where((newton > low) & (newton < high), newton, 0.5 * (low + high))
        mode = tl.where(step < MOST_STEPS, 1.0 / (1.0 + tl.exp(-t)), mode)
        near = tl.abs(rise) <= TOLERANCE * tl.sqrt(bend)
        step = tl.where((step < MOST_STEPS) & near, MOST_STEPS, step + 1)

    # ends of the quadrature, lower and upper; a positive third derivative makes the upper tail the heavy one, the other
    # falls at least as a Gaussian does
    upper = tl.arange(0, 2) == 1
    sign = tl.where(upper, zero + 1.0, zero - 1.0)
    reach = heavy_tail(-sign * slope, tl.maximum(curvature, 1e-30), skew, sign * skew > 0.0, TAIL)
    a_low, c_low = tl.minimum(a, 1.0), tl.minimum(c, 1.0)
    ends = s_from_share(tl.minimum(tl.maximum(mode + sign * reach, 0.0), 1.0), a_low, c_low)
    s_low, s_high = tl.sum(tl.where(upper, 0.0, ends), 0), tl.sum(tl.where(upper, ends, 0.0), 0)
    log_rate -= tl.sum(photons, 0).to(tl.float64) * tl.log(scale.to(tl.float64))
    tl.store(summary + 4 * n + row, log_rate)
    tl.store(summary + 5 * n + row, s_low)
    tl.store(summary + 6 * n + row, s_high)

    x, rest = mode.to(dtype), (1.0 - mode).to(dtype)
    below_one = tl.full([], 1 - 2**-53, tl.float64)
    for lowest in range(0, nodes, NODE_BLOCK):
        k = lowest + tl.arange(0, NODE_BLOCK)
        s = s_low + (s_high - s_low) * (0.5 + 0.5 * tl.load(node + k, mask=k < nodes, other=0.0))
        s = tl.minimum(tl.maximum(s, 1e-300), below_one)
        distance = (share_from_s(s, a_low, c_low) - mode).to(dtype)
        totals = tl.zeros([NODE_BLOCK, BLOCK], dtype)
        for start in range(0, size, BLOCK):
            j = start + tl.arange(0, BLOCK)
            y, _, u, v = load_rates(
                counts, mask, background, profile, first, j, j < size, to_one, to_zero, BITS, BACKGROUND_ROWS
            )
            ratio = (u - v) / tl.maximum(x * u + rest * v, SMALLEST_RATE)
            # log(rate_k / rate at the mode) = log(1 + (X_k - mode) ratio): nothing large cancels
            totals += y[None, :] * tl.log(tl.maximum(1.0 + distance[:, None] * ratio[None, :], 1e-7))
        tl.store(log_rates + row * nodes + k, tl.sum(totals, 1).to(tl.float64), mask=k < nodes)


def share_likelihood(
    counts: Tensor,
    mask: Tensor | None,
    ptr: Tensor | None,
    background: Tensor | None,
    profile: Tensor,
    prior: Tensor,
    node: Tensor,
    tolerance: float,
    tail: float,
    summary: Tensor,
    log_rates: Tensor,
) -> None:
    """Write all that the posterior takes from the pixels of every box; all tensors contiguous.

    Args:
        counts, mask, ptr, background: as for `poisson_gamma_elbo`.
        profile: values like counts, float32 or float64.
        prior: shape and rate of I, shape and rate of B, [4, N] float64.
        node: Gauss-Legendre nodes on (-1, 1), [K] float64.
        tolerance: of the mode, in units of its width.
        tail: fall of the log-density to the ends of the quadrature.
        summary: P, Q, photons, sum of log y!, sum of y log(rate) at the mode, and the two ends of s, [7, N] float64.
        log_rates: sum of y log(rate) at the nodes less that at the mode, [N, K] float64.
    """
    n = prior.shape[1]
    if n == 0:
        return
    _share_likelihood_kernel[(n,)](
        counts,
        mask,
        ptr,
        background,
        profile,
        prior,
        node,
        summary,
        log_rates,
        n,
        counts.shape[-1],
        len(node),
        TOLERANCE=tolerance,
        TAIL=tail,
        BITS=mask is not None and mask.dtype != torch.bool,
        BACKGROUND_ROWS=background is not None and background.shape == counts.shape,
        WHOLE=not counts.is_floating_point(),
    )
