"""Loss of variational integration and all its gradients: one program per box, the counts read once from memory.

Launches on the current stream: the photons of every box where they choose the number of nodes, its quadrature rule, the
pass over the pixels, and the divergences, which are added to what that left (rule and divergences in double precision,
many boxes to a program). The gradients by q need no sum per node: they are linear in
log(rate_k / rate at the mean), which each pixel adds up over the nodes before anything is summed over pixels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xtalfast.kernels._shoebox import (
    GAUSSIAN,
    LOW_RANK,
    SMALLEST_RATE,
    VALUES,
    box_extent,
    load_pixels,
    load_profile,
    log_factorial,
    softmax_range,
    stirling,
    tile_configs,
    whiten,
)
from xtalfast.ops._random import ATTEMPTS

MOST_NODES = 96  # of the automatic choice
_RULE_ROWS = 2  # boxes a program
_DIVERGENCE_ROWS = 128
_DRAWS = 128
_PIXELS = 512
# rows of the table of a rule: intensity, background, weight, and the weights of the gradients by the two shapes
INTENSITY, BACKGROUND, WEIGHT, BY_SHARE, BY_REST = (tl.constexpr(k) for k in range(5))
_TABLES = 5


@triton.jit
def digamma_excess(x):
    """digamma(x) - log(x) + 1 / (2 x): recurrence up to x > 12, then the asymptotic series."""
    far = x
    shift = x * 0.0
    for _ in range(13):
        near = far <= 12.0
        shift -= tl.where(near, 1.0 / far, 0.0)
        far += tl.where(near, 1.0, 0.0)
    s = 1.0 / (far * far)
    series = s * (1 / 12 + s * (-1 / 120 + s * (1 / 252 + s * (-1 / 240 + s * (1 / 132)))))
    return shift + tl.log(far / x) + (0.5 / x - 0.5 / far) - series


@triton.jit
def trigamma(x):
    """Derivative of digamma: recurrence up to x > 12, then the asymptotic series."""
    shift = x * 0.0
    for _ in range(13):
        near = x <= 12.0
        shift += tl.where(near, 1.0 / (x * x), 0.0)
        x += tl.where(near, 1.0, 0.0)
    i = 1.0 / x
    s = i * i
    return shift + i + 0.5 * s + i * s * (1 / 6 + s * (-1 / 30 + s * (1 / 42 + s * (-1 / 30 + s * (5 / 66)))))


@triton.jit
def binet(x):
    """Stirling's remainder of log Gamma: lgamma(x) - (x - 1/2) log(x) + x - log(2 pi) / 2."""
    far = x
    product = x * 0.0 + 1.0
    for _ in range(13):
        product *= tl.where(far <= 12.0, far, 1.0)
        far += tl.where(far <= 12.0, 1.0, 0.0)
    i = 1.0 / far
    s = i * i
    series = i * (1 / 12 + s * (-1 / 360 + s * (1 / 1260 + s * (-1 / 1680 + s * (1 / 1188)))))
    near = stirling(far) - tl.log(product) - (x - 0.5) * tl.log(x) + x - 0.9189385332046727
    return tl.where(x > 12.0, series, near)


@triton.jit
def excess_of_logarithm(x):
    """x - 1 - log(x) without cancellation at x = 1."""
    d = x - 1.0
    near = tl.abs(d) < 0.02
    small = tl.where(near, d, 0.0)
    series = x * 0.0
    for i in tl.static_range(8):  # d^2/2 - d^3/3 + ... - d^9/9, by Horner
        series = small * series + (1 if i % 2 else -1) / (9 - i)
    return tl.where(near, small * small * series, d - tl.log(tl.where(near, 2.0, x)))


@triton.jit
def _gamma_divergence_kernel(gammas, loss, by_gammas, n, GRADIENTS: tl.constexpr, ROWS: tl.constexpr):
    """Add kappa times the KL of I and of B, Gamma(k, r) from Gamma(a, b), to the loss and to its gradients."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    n = rows * 0 + n  # in 64 bits
    total = tl.load(loss + rows, mask=inside, other=0.0)
    for which in tl.static_range(2):
        q, prior, kappa_row = 2 * which * n + rows, (4 + 2 * which) * n + rows, (8 + which) * n + rows
        k = tl.load(gammas + q, mask=inside, other=1.0)
        r = tl.load(gammas + q + n, mask=inside, other=1.0)
        a = tl.load(gammas + prior, mask=inside, other=1.0)
        b = tl.load(gammas + prior + n, mask=inside, other=1.0)
        kappa = tl.load(gammas + kappa_row, mask=inside, other=1.0)
        slope = digamma_excess(k)
        value = a * excess_of_logarithm(k * b / (a * r)) + 0.5 * excess_of_logarithm(a / k)
        value += binet(a) - binet(k) - (a - k) * slope
        total += kappa * value
        if GRADIENTS:
            digamma_k = slope + tl.log(k) - 0.5 / k
            digamma_a = digamma_excess(a) + tl.log(a) - 0.5 / a
            by_k = tl.load(by_gammas + q, mask=inside, other=0.0)
            by_r = tl.load(by_gammas + q + n, mask=inside, other=0.0)
            tl.store(by_gammas + q, by_k + kappa * ((k - a) * trigamma(k) + b / r - 1.0), mask=inside)
            tl.store(by_gammas + q + n, by_r + kappa * (a / r - k * b / (r * r)), mask=inside)
            tl.store(by_gammas + prior, kappa * (digamma_a - digamma_k + tl.log(r / b)), mask=inside)
            tl.store(by_gammas + prior + n, kappa * (k / r - a / b), mask=inside)
            tl.store(by_gammas + kappa_row, value, mask=inside)
    tl.store(loss + rows, total, mask=inside)


@triton.jit
def _photons_kernel(counts, mask, ptr, photons, pixels, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Photons in the used pixels of each box, one program a box."""
    row = tl.program_id(0).to(tl.int64)
    first, size = box_extent(ptr, row, pixels)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        y, _, _ = load_pixels(counts, mask, None, first, at, at < size, BITS, False, tl.float32)
        total += y
    tl.store(photons + row, tl.sum(total, 0).to(tl.float64))


@triton.jit
def nodes_needed(k_i, k_b, photons, nodes: tl.constexpr):
    """Nodes of the rule; when `nodes` is 0, chosen as by the reference."""
    smallest = tl.minimum(k_i, k_b)
    x = 600.0 * photons * (1.0 + 2.0 / smallest) / smallest
    root = tl.log(tl.where(x > 1.0, x, 1.0)) / 2.5
    quads = tl.ceil(root * root * 0.25)
    quads = tl.where(quads < 3.0, 3.0, tl.where(quads > 10.0, 10.0, quads))
    chosen = tl.where(smallest >= 1.0, (4.0 * quads).to(tl.int32), 96)
    return chosen if nodes == 0 else chosen * 0 + nodes


@triton.jit
def tail_reach(slope, other, sd, level):
    """Distance d at which slope d + n log(other/n + slope/n e^-d) = level; Newton from outside is monotone."""
    n = slope + other
    d = sd * tl.sqrt(2.0 * level) + level / slope + 1.0
    for _ in range(5):
        decay = tl.exp(-d) * slope
        d -= (slope * d + n * tl.log((other + decay) / n) - level) / (slope - n * decay / (other + decay))
    return d


@triton.jit
def tanh(x):
    decay = tl.exp(-2.0 * x)
    return (1.0 - decay) / (1.0 + decay)


@triton.jit
def _share_rule_kernel(
    q, photons, rule, nodes_of, n, width, NODES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """Tables [n, 5, width] of nodes over the share X ~ Beta(k_i, k_b), and how many: the reference's."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    a = tl.load(q + rows, mask=inside, other=1.0)
    r_i = tl.load(q + n + rows, mask=inside, other=1.0)
    b = tl.load(q + 2 * n + rows, mask=inside, other=1.0)
    r_b = tl.load(q + 3 * n + rows, mask=inside, other=1.0)
    total_photons = a * 0.0
    if NODES == 0:
        total_photons = tl.load(photons + rows, mask=inside, other=1.0)
    count = nodes_needed(a, b, total_photons, NODES)
    tl.store(nodes_of + rows, count, mask=inside)
    steps = (count - 1).to(tl.float64)

    # the grid t = t_mode + s sinh(kappa u + eta): s and eta from its two ends, kappa from the spacing at the mode
    total = a + b
    sd = tl.sqrt(total / (a * b))
    level = tl.minimum(2.5 * tl.sqrt(steps + 1.0), 16.0)
    left, right = tail_reach(a, b, sd, level), tail_reach(b, a, sd, level)
    spacing = tl.where(sd * 0.7 < 0.8, sd * 0.7, sd * 0.0 + 0.8) * steps * 0.5
    skew = (right - left) / (right + left)
    stretch = tl.maximum(0.5 * (left + right) / spacing - 1.0, 1e-9) + 1.0
    kappa = tl.log(2.0 * stretch) + 1.0
    for _ in range(6):
        bent = skew * tanh(kappa)
        x = stretch * kappa * tl.sqrt(1.0 - bent * bent)
        kappa = tl.log(x + tl.sqrt(x * x + 1.0))  # asinh
    kappa = tl.maximum(kappa, 1e-3)
    bent = skew * tanh(kappa)
    eta = 0.5 * tl.log((1.0 + bent) / (1.0 - bent))  # atanh
    scale = right * 2.0 / (tl.exp(kappa + eta) - tl.exp(-kappa - eta))

    node = tl.arange(0, WIDTH)
    exists = node[None, :] < count[:, None]
    u = 2.0 * node[None, :].to(tl.float64) / steps[:, None] - 1.0
    up = tl.exp(tl.where(exists, kappa[:, None] * u + eta[:, None], 0.0))
    t = tl.log(a / b)[:, None] + scale[:, None] * 0.5 * (up - 1.0 / up)
    measure = (2.0 / steps * scale * kappa)[:, None] * 0.5 * (up + 1.0 / up)
    decay = tl.exp(-tl.abs(t))
    soft = tl.log(1.0 + decay)
    log_share, log_rest = tl.minimum(t, 0.0) - soft, tl.minimum(-t, 0.0) - soft
    # half a cell at the ends, and the mass of the exponential tails beyond
    share = tl.where(t > 0.0, 1.0, decay) / (1.0 + decay)
    end = (node[None, :] == 0) | (node[None, :] == count[:, None] - 1)
    slope = tl.abs(a[:, None] - total[:, None] * share)
    measure = tl.where(end, 0.5 * measure + 1.0 / tl.where(end, slope, 1.0), measure)
    log_weight = a[:, None] * log_share + b[:, None] * log_rest + tl.log(measure)
    log_weight = tl.where(exists, log_weight, -float("inf"))
    weight = tl.exp(log_weight - tl.max(log_weight, 1)[:, None])
    weight /= tl.sum(weight, 1)[:, None]
    by_share = weight * (log_share - tl.sum(weight * log_share, 1)[:, None])
    by_rest = weight * (log_rest - tl.sum(weight * log_rest, 1)[:, None])

    log_sum = digamma_excess(total) + tl.log(total) - 0.5 / total
    intensity = tl.exp(log_share + log_sum[:, None]) / r_i[:, None]
    background = tl.exp(log_rest + log_sum[:, None]) / r_b[:, None]
    dtype: tl.constexpr = rule.dtype.element_ty
    out = rule + 5 * width * rows[:, None] + node[None, :]
    stored = inside[:, None] & (node[None, :] < width)
    tl.store(out + INTENSITY * width, intensity.to(dtype), mask=stored)
    tl.store(out + BACKGROUND * width, background.to(dtype), mask=stored)
    tl.store(out + WEIGHT * width, weight.to(dtype), mask=stored)
    tl.store(out + BY_SHARE * width, by_share.to(dtype), mask=stored)
    tl.store(out + BY_REST * width, by_rest.to(dtype), mask=stored)


@triton.jit
def load_node(q, rule, draws, row, k, n, width, dtype: tl.constexpr):
    """Intensity and background of node or draw k, its weight, and its weights in the gradients by the two shapes."""
    if draws is None:
        table = rule + 5 * width * row + k
        i_k = tl.load(table + INTENSITY * width)
        b_k = tl.load(table + BACKGROUND * width)
        weight = tl.load(table + WEIGHT * width)
        by_share = tl.load(table + BY_SHARE * width)
        by_rest = tl.load(table + BY_REST * width)
    else:
        i_k = (tl.load(draws + row * width + k) / tl.load(q + n + row)).to(dtype)
        b_k = (tl.load(draws + (n + row) * width + k) / tl.load(q + 3 * n + row)).to(dtype)
        weight = tl.full([], 1.0, dtype) / width
        by_share = tl.full([], 0.0, dtype)
        by_rest = tl.full([], 0.0, dtype)
    return i_k, b_k, weight, by_share, by_rest


@triton.jit
def mean_rates(q, draws, row, n, width):
    """Means of I and of B under q, or of their draws."""
    if draws is None:
        mean_i, mean_b = tl.load(q + row), tl.load(q + 2 * n + row)
    else:
        mean_i = tl.full([], 0.0, tl.float64)
        mean_b = tl.full([], 0.0, tl.float64)
        for k in range(width):
            mean_i += tl.load(draws + row * width + k) / width
            mean_b += tl.load(draws + (n + row) * width + k) / width
    return mean_i / tl.load(q + n + row), mean_b / tl.load(q + 3 * n + row)


def fitting_configs(configs: list[triton.Config], arguments: dict[str, Tensor], **_: object) -> list[triton.Config]:
    """Double precision takes two registers a value: one pixel a thread, or they spill."""
    double = arguments["profile"].dtype == torch.float64
    return [config for config in configs if not double or config.kwargs["BLOCK"] == 32 * config.num_warps]


@triton.autotune(
    configs=tile_configs((256, 4), (128, 4)),
    key=["pixels", "width", "rank", "KIND", "GRADIENTS"],
    prune_configs_by={"early_config_prune": fitting_configs},
)
@triton.jit(do_not_specialize=["n", "pixels", "width", "rank"])
def _poisson_gamma_elbo_kernel(
    counts,
    mask,
    ptr,
    background,
    profile,
    matrix,
    per_pixel,
    q,
    rule,
    nodes_of,
    draws,
    slopes,
    loss,
    by_profile,
    by_matrix,
    by_q,
    n,
    pixels,
    width,
    rank,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    BACKGROUND_ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
    GRADIENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = profile.dtype.element_ty
    RAGGED: tl.constexpr = ptr is not None
    first, size = box_extent(ptr, row, pixels)
    top, scale = softmax_range(
        profile, matrix, per_pixel, row, first, size, pixels, rank, RAGGED=RAGGED, KIND=KIND, BLOCK=BLOCK
    )

    count = width
    if draws is None:
        count = tl.load(nodes_of + row)
    mean_i, mean_b = mean_rates(q, draws, row, n, width)
    at_i, at_b = mean_i.to(dtype), mean_b.to(dtype)

    log_likelihood = tl.zeros([BLOCK], dtype)  # but for the expected rates
    by_share = tl.zeros([BLOCK], dtype)
    by_rest = tl.zeros([BLOCK], dtype)
    photons = tl.zeros([BLOCK], dtype)
    spot_photons = tl.zeros([BLOCK], dtype)
    profile_sums = tl.zeros([BLOCK], dtype)
    background_sums = tl.zeros([BLOCK], dtype)
    # sums of p g z, p z, p g z z^T and p z z^T over the pixels, g the gradient by p: of the Gaussian alone
    g0, g1, g2 = tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype)
    m0, m1, m2 = tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype)
    g00, g10, g11 = tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype)
    g20, g21, g22 = tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype)
    m00, m10, m11 = tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype)
    m20, m21, m22 = tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], dtype)

    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < size
        y, used, b = load_pixels(counts, mask, background, first, at, inside, BITS, BACKGROUND_ROWS, dtype)
        p = load_profile(
            profile, matrix, per_pixel, row, first, at, inside, pixels, rank, top, scale, RAGGED=RAGGED, KIND=KIND
        )
        p_used = tl.where(used, p, 0.0)
        rate_at_mean = tl.maximum(at_i * p_used + at_b * b, SMALLEST_RATE)
        inverse = 1.0 / rate_at_mean
        log_ratio = tl.zeros([BLOCK], dtype)
        share = tl.zeros([BLOCK], dtype)
        rest = tl.zeros([BLOCK], dtype)
        slope = tl.zeros([BLOCK], dtype)  # of sum_k w_k log(rate_k) by p
        for k in range(count):
            i_k, b_k, weight, weight_share, weight_rest = load_node(q, rule, draws, row, k, n, width, dtype)
            rate = i_k * p_used + b_k * b
            safe = tl.maximum(rate, SMALLEST_RATE)
            logarithm = tl.log(safe * inverse)
            log_ratio += weight * logarithm
            if GRADIENTS:
                share += weight_share * logarithm
                rest += weight_rest * logarithm
                slope += tl.where(rate > SMALLEST_RATE, weight * i_k / safe, 0.0)
        log_likelihood += y * (tl.log(rate_at_mean) + log_ratio) - log_factorial(y, WHOLE)
        profile_sums += p_used
        background_sums += tl.where(used, b, 0.0)
        if GRADIENTS:
            photons += y
            by_share += y * share
            by_rest += y * rest
            spot_photons += y * slope * p_used
            by_p = tl.where(used, at_i - y * slope, 0.0)
            if KIND == GAUSSIAN:
                z0, z1, z2 = whiten(profile, matrix, per_pixel, row, first, at, inside, RAGGED)
                g = p * by_p
                g0, g1, g2 = g0 + g * z0, g1 + g * z1, g2 + g * z2
                m0, m1, m2 = m0 + p * z0, m1 + p * z1, m2 + p * z2
                g00, g10, g11 = g00 + g * z0 * z0, g10 + g * z1 * z0, g11 + g * z1 * z1
                g20, g21, g22 = g20 + g * z2 * z0, g21 + g * z2 * z1, g22 + g * z2 * z2
                m00, m10, m11 = m00 + p * z0 * z0, m10 + p * z1 * z0, m11 + p * z1 * z1
                m20, m21, m22 = m20 + p * z2 * z0, m21 + p * z2 * z1, m22 + p * z2 * z2
            else:
                tl.store(by_profile + (first + at), by_p, mask=inside)

    mean_i, mean_b = mean_rates(q, draws, row, n, width)  # read again rather than kept in registers through the loop
    profile_sum = tl.sum(profile_sums, 0)
    background_sum = tl.sum(background_sums, 0)
    expected = mean_i * profile_sum.to(tl.float64) + mean_b * background_sum.to(tl.float64)
    tl.store(loss + row, expected - tl.sum(log_likelihood, 0).to(tl.float64))

    if GRADIENTS:
        spot = tl.sum(spot_photons, 0)
        if draws is None:  # spot's share of the expected photons, and the background's: together the photons
            k_i, r_i = tl.load(q + row), tl.load(q + n + row)
            k_b, r_b = tl.load(q + 2 * n + row), tl.load(q + 3 * n + row)
            total = tl.sum(photons, 0).to(tl.float64)
            by_sum = trigamma(k_i + k_b) * total
            by_k_i = profile_sum.to(tl.float64) / r_i - tl.sum(by_share, 0).to(tl.float64) - by_sum
            by_k_b = background_sum.to(tl.float64) / r_b - tl.sum(by_rest, 0).to(tl.float64) - by_sum
            tl.store(by_q + row, by_k_i)
            tl.store(by_q + n + row, (spot.to(tl.float64) - mean_i * profile_sum.to(tl.float64)) / r_i)
            tl.store(by_q + 2 * n + row, by_k_b)
            by_r_b = (total - spot.to(tl.float64) - mean_b * background_sum.to(tl.float64)) / r_b
            tl.store(by_q + 3 * n + row, by_r_b)
        else:
            by_k_i = tl.full([], 0.0, tl.float64)
            by_k_b = tl.full([], 0.0, tl.float64)
            by_r_i = tl.full([], 0.0, tl.float64)
            by_r_b = tl.full([], 0.0, tl.float64)
            for k in range(count):
                i_k, b_k, weight, _, _ = load_node(q, rule, draws, row, k, n, width, dtype)
                by_i = tl.zeros([BLOCK], dtype)
                by_b = tl.zeros([BLOCK], dtype)
                for start in range(0, size, BLOCK):
                    at = start + tl.arange(0, BLOCK)
                    inside = at < size
                    y, used, b = load_pixels(counts, mask, background, first, at, inside, BITS, BACKGROUND_ROWS, dtype)
                    p = load_profile(
                        profile, matrix, per_pixel, row, first, at, inside, pixels, rank, top, scale, RAGGED, KIND
                    )
                    rate = i_k * p + b_k * b
                    ratio = tl.where(used & (rate > SMALLEST_RATE), y / tl.maximum(rate, SMALLEST_RATE), 0.0)
                    by_i += ratio * p
                    by_b += ratio * b
                # by the draw itself; the draw is the standard one over the rate
                r_i, r_b = tl.load(q + n + row), tl.load(q + 3 * n + row)
                of_i = (weight * (profile_sum - tl.sum(by_i, 0))).to(tl.float64) / r_i
                of_b = (weight * (background_sum - tl.sum(by_b, 0))).to(tl.float64) / r_b
                by_k_i += of_i * tl.load(slopes + row * width + k)
                by_k_b += of_b * tl.load(slopes + (n + row) * width + k)
                by_r_i -= of_i * tl.load(draws + row * width + k) / r_i
                by_r_b -= of_b * tl.load(draws + (n + row) * width + k) / r_b
            tl.store(by_q + row, by_k_i)
            tl.store(by_q + n + row, by_r_i)
            tl.store(by_q + 2 * n + row, by_k_b)
            tl.store(by_q + 3 * n + row, by_r_b)

        centre = at_i * profile_sum - spot  # sum of p g: what the softmax takes off the gradient by its logits
        if KIND == GAUSSIAN:
            # d logit / d mean = L^-T z and d logit / d L = L^-T z z^T, by back substitution
            l = matrix + 9 * row
            l00, l11, l22 = tl.load(l), tl.load(l + 4), tl.load(l + 8)
            l10, l20, l21 = tl.load(l + 3), tl.load(l + 6), tl.load(l + 7)
            v0 = tl.sum(g0 - centre * m0, 0)
            v1 = tl.sum(g1 - centre * m1, 0)
            v2 = tl.sum(g2 - centre * m2, 0)
            c00 = tl.sum(g00 - centre * m00, 0)
            c10 = tl.sum(g10 - centre * m10, 0)
            c11 = tl.sum(g11 - centre * m11, 0)
            c20 = tl.sum(g20 - centre * m20, 0)
            c21 = tl.sum(g21 - centre * m21, 0)
            c22 = tl.sum(g22 - centre * m22, 0)
            x0, x1, x2 = solve_transposed(l00, l10, l11, l20, l21, l22, v0, v1, v2)
            tl.store(by_profile + 3 * row, x0)
            tl.store(by_profile + 3 * row + 1, x1)
            tl.store(by_profile + 3 * row + 2, x2)
            out = by_matrix + 9 * row
            x0, x1, x2 = solve_transposed(l00, l10, l11, l20, l21, l22, c00, c10, c20)
            tl.store(out, x0)
            tl.store(out + 3, x1)
            tl.store(out + 6, x2)
            x0, x1, x2 = solve_transposed(l00, l10, l11, l20, l21, l22, c10, c11, c21)
            tl.store(out + 1, x0 * 0.0)
            tl.store(out + 4, x1)
            tl.store(out + 7, x2)
            x0, x1, x2 = solve_transposed(l00, l10, l11, l20, l21, l22, c20, c21, c22)
            tl.store(out + 2, x0 * 0.0)
            tl.store(out + 5, x1 * 0.0)
            tl.store(out + 8, x2)
        elif KIND != VALUES:
            tl.debug_barrier()  # the gradients by p, stored above, are read back
            for start in range(0, size, BLOCK):
                at = start + tl.arange(0, BLOCK)
                inside = at < size
                p = load_profile(
                    profile, matrix, per_pixel, row, first, at, inside, pixels, rank, top, scale, RAGGED, KIND
                )
                by_p = tl.load(by_profile + (first + at), mask=inside, other=0.0)
                tl.store(by_profile + (first + at), p * (by_p - centre), mask=inside)


@triton.jit
def solve_transposed(l00, l10, l11, l20, l21, l22, v0, v1, v2):
    """L^-T v."""
    x2 = v2 / l22
    x1 = (v1 - l21 * x2) / l11
    x0 = (v0 - l10 * x1 - l20 * x2) / l00
    return x0, x1, x2


@triton.jit
def _standard_gamma_kernel(
    shape, seed, draws, first, rows, samples, total, ATTEMPTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Draws [streams, rows, samples] of Gamma(shape, 1), `total` of them: `standard_gamma_reference`."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    draw = (at % samples).to(tl.uint32)
    line = at // samples
    row = line % rows + first
    stream = (line // rows).to(tl.uint32)
    a = tl.load(shape + line, mask=inside, other=1.0)
    low = a < 1.0
    d = tl.where(low, a + 1.0, a) - 0.3333333333333333
    c = 1.0 / tl.sqrt(9.0 * d)
    value = d
    boost = d * 0.0 + 1.0
    done = ~inside
    key = tl.load(seed)
    low_row, high_row = row.to(tl.uint32), (row >> 32).to(tl.uint32)
    attempt = 0
    while (attempt < ATTEMPTS) & (tl.min(done.to(tl.int32), 0) == 0):
        w0, w1, w2, w3 = tl.philox(key, draw, low_row, high_row, stream * 65536 + attempt)
        u0 = (w0.to(tl.float64) + 0.5) * 2.3283064365386963e-10
        u1 = (w1.to(tl.float64) + 0.5) * 2.3283064365386963e-10
        u2 = (w2.to(tl.float64) + 0.5) * 2.3283064365386963e-10
        u3 = (w3.to(tl.float64) + 0.5) * 2.3283064365386963e-10
        boost = tl.where(low & (attempt == 0), tl.exp(tl.log(u3) / a), boost)
        x = tl.sqrt(-2.0 * tl.log(u0)) * tl.cos(6.283185307179586 * u1)
        root = 1.0 + c * x
        v = root * root * root
        safe = tl.where(v > 0.0, v, 1.0)
        accepted = (v > 0.0) & (tl.log(u2) < 0.5 * x * x + d - d * safe + d * tl.log(safe))
        value = tl.where(accepted & ~done, d * safe, value)
        done = done | accepted
        attempt += 1
    result = value * boost
    smallest = 2.2250738585072014e-308
    tl.store(draws + at, tl.where(result > smallest, result, smallest), mask=inside)


def standard_gamma(shape: Tensor, seed: Tensor, first: int, draws: Tensor) -> None:
    """Write draws [streams, rows, samples] of Gamma(shape, 1), shape [streams, rows] float64, seed int64."""
    _, rows, samples = draws.shape
    if draws.numel():
        _standard_gamma_kernel[(triton.cdiv(draws.numel(), _DRAWS),)](
            shape, seed, draws, first, rows, samples, draws.numel(), ATTEMPTS=ATTEMPTS, BLOCK=_DRAWS
        )


def share_rule(q: Tensor, photons: Tensor | None, rule: Tensor, nodes_of: Tensor, nodes: int) -> None:
    """Write the quadrature rules of all boxes, [N, 5, nodes], or [N, 5, 96] for the automatic choice, nodes = 0.

    That takes the photons of every box, [N] float64. The number of nodes goes to `nodes_of`, int32 [N].
    """
    n, _, width = rule.shape
    _share_rule_kernel[(triton.cdiv(n, _RULE_ROWS),)](
        q, photons, rule, nodes_of, n, width, NODES=nodes, ROWS=_RULE_ROWS, WIDTH=triton.next_power_of_2(width)
    )


def poisson_gamma_elbo(
    counts: Tensor,
    mask: Tensor | None,
    ptr: Tensor | None,
    background: Tensor | None,
    kind: int,
    profile: Tensor,
    matrix: Tensor | None,
    per_pixel: Tensor | None,
    gammas: Tensor,
    draws: Tensor | None,
    slopes: Tensor | None,
    nodes: int,
    gradients: bool,
    loss: Tensor,
    by_profile: Tensor,
    by_matrix: Tensor,
    by_gammas: Tensor,
) -> None:
    """Write the loss of every box and, if wanted, its gradients; all tensors contiguous.

    Args:
        counts: photons, [N, P] or [M] with `ptr`; any real type.
        mask: bool or DIALS bits, like counts.
        ptr: row offsets, int64 [N + 1].
        background: shape of the background, [P] or like counts, in the type of the profile.
        kind: 0 values, 1 logits, 2 Gaussian, 3 low rank.
        profile, matrix, per_pixel: float32 or float64; values or logits like counts; mean [N, 3], scale_tril [N, 3, 3],
            grid [P or M, 3]; or latent [N, D], basis [D, P], bias [P].
        gammas: shape and rate of q(I), of q(B), of the priors of I and B, and the two kappas, [10, N] float64.
        draws, slopes: for Monte Carlo: standard draws for I and B and their derivatives by the shape (None without
            gradients), [2, N, S] float64.
        nodes: of the quadrature; 0 chooses by shapes and photons.
        loss: [N] float64.
        by_profile, by_matrix, by_gammas: gradients, like what they are by; for kind 3, `by_profile` is by the logits,
            like counts, because that by the shared basis is a matrix product.
    """
    n = gammas.shape[1]
    if n == 0:
        return
    bits = mask is not None and mask.dtype != torch.bool
    rule, nodes_of, photons, width = None, None, None, nodes or MOST_NODES
    if draws is None:
        if nodes == 0:
            photons = torch.empty(n, dtype=torch.float64, device=gammas.device)
            _photons_kernel[(n,)](counts, mask, ptr, photons, counts.shape[-1], BITS=bits, BLOCK=_PIXELS)
        rule = torch.empty(n, _TABLES, width, dtype=profile.dtype, device=gammas.device)
        nodes_of = torch.empty(n, dtype=torch.int32, device=gammas.device)
        share_rule(gammas, photons, rule, nodes_of, nodes)
    else:
        width = draws.shape[2]
    _poisson_gamma_elbo_kernel[(n,)](
        counts,
        mask,
        ptr,
        background,
        profile,
        matrix,
        per_pixel,
        gammas,
        rule,
        nodes_of,
        draws,
        slopes,
        loss,
        by_profile,
        by_matrix,
        by_gammas,
        n,
        counts.shape[-1],
        width,
        profile.shape[1] if kind == LOW_RANK.value else 0,
        KIND=kind,
        BITS=bits,
        BACKGROUND_ROWS=background is not None and background.shape == counts.shape,
        WHOLE=not counts.is_floating_point(),
        GRADIENTS=gradients,
    )
    _gamma_divergence_kernel[(triton.cdiv(n, _DIVERGENCE_ROWS),)](
        gammas, loss, by_gammas, n, GRADIENTS=gradients, ROWS=_DIVERGENCE_ROWS
    )
