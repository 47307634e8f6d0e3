"""Exact posterior of spot intensity and background of a shoebox with a known profile, by one-dimensional quadrature.

Counts y_j ~ Poisson(I p_j + B b_j), priors I ~ Gamma(a, alpha) and B ~ Gamma(c, beta). With P = alpha + sum p and
Q = beta + sum b over the used pixels, I = S X / P and B = S (1 - X) / Q, the posterior factorises exactly:

    S ~ Gamma(a + c + sum y, 1)
    h(X) proportional to X^(a-1) (1 - X)^(c-1) prod_j (X p_j / P + (1 - X) b_j / Q)^y_j       on 0 < X < 1

so all moments of (I, B) follow from those of the share X, whose log-density is a sum of concave terms in one variable.
A flat prior on (I, B) >= 0 is a = c = 1, alpha = beta = 0; then E[sum_j rate_j] = E[S] = sum y + 2 exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xtalfast import _native
from xtalfast.ops._boxes import (
    Boxes,
    KernelBoxes,
    box_chunks,
    check_boxes,
    check_photons,
    check_prior,
    check_rows,
    contiguous,
    gamma_rows,
    has_kernel,
    unpack,
)
from xtalfast.ops._quadrature import gauss_legendre, interpolation
from xtalfast.ops._share import first_share, most_likely_share, share_rate
from xtalfast.ops.gamma import GammaPair
from xtalfast.ops.profiles import Profile, materialise

_QUANTILE_STEPS = 40
_QUANTILE_TOLERANCE = 1e-6  # probability
_QUANTILE_NODES = 96
_MODE_TOLERANCE = 1e-2  # sd: the quadrature need not be centred
_TAIL_LOG = 16.0  # fall of log h from its maximum to the ends of the quadrature


@dataclass(frozen=True)
class IntensityPosterior:
    """Posterior summaries of N reflections, float64 [N]; `quantiles_i` is [N, Q].

    `shape_i`, `rate_i` are the Gamma with the posterior's mean and variance. `log_evidence` is log p(counts); an
    improper prior (rate 0) enters it as the density I^(shape - 1).
    """

    mean_i: Tensor
    var_i: Tensor
    mean_bg: Tensor
    var_bg: Tensor
    shape_i: Tensor
    rate_i: Tensor
    quantiles_i: Tensor
    log_evidence: Tensor


def _heavy_tail(slope: Tensor, curvature: Tensor, skew: Tensor) -> Tensor:
    """Distance at which a log-density that starts with these derivatives has fallen by _TAIL_LOG: Gamma-like tail.

    The fall at distance d is slope d + n (w - log(1 + w)), w = d sqrt(curvature / n), with n from the third derivative.
    """
    n = torch.clamp(4 * curvature**3 / skew**2, min=1.0, max=1e12)
    unit = torch.sqrt(n / curvature)
    # w - log(1 + w) >= w^2 / (2 (1 + w)) gives a start outside, or no end before the boundary of X
    rise = torch.clamp(-slope, min=0.0) * unit
    quadratic, linear = n - 2 * rise, 2 * _TAIL_LOG + 2 * rise
    ends = quadratic > 0
    quadratic = torch.where(ends, quadratic, 1.0)
    d = unit * (linear + torch.sqrt(linear**2 + 8 * _TAIL_LOG * quadratic)) / (2 * quadratic)
    for _ in range(6):  # convex: Newton from outside stays outside
        w = d / unit
        fall = slope * d + n * (w - torch.log1p(w))
        d = d - (fall - _TAIL_LOG) / (slope + n / unit * w / (1 + w))
    return torch.where(ends, d, 1.0)


def _share_from_s(s: Tensor, a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """X = s^(1/a) / (s^(1/a) + (1-s)^(1/c)) and log[dX/ds / (X (1 - X))]; the identity for a = c = 1.

    It takes the singularities X^(a-1) and (1-X)^(c-1) of shapes below 1 out of the integrand.
    """
    logit = torch.log(s) / a - torch.log1p(-s) / c
    return torch.sigmoid(logit), torch.log(1 / (a * s) + 1 / (c * (1 - s)))


def _s_from_share(x: Tensor, a: Tensor, c: Tensor) -> Tensor:
    """Inverse of `_share_from_s`, by bisection (0 and 1 map to themselves)."""
    if bool(((a == 1) & (c == 1)).all()):
        return x
    low, high = torch.zeros_like(x), torch.ones_like(x)
    for _ in range(60):
        middle = 0.5 * (low + high)
        below = _share_from_s(middle, a, c)[0] < x
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return torch.where((x == 0) | (x == 1), x, 0.5 * (low + high))


@dataclass(frozen=True)
class _Rule:
    """Gauss-Legendre quadrature of X^(a-1) (1 - X)^(c-1) f(X) dX in the variable s between two ends."""

    s_low: Tensor
    s_high: Tensor
    a: Tensor
    c: Tensor

    def at(self, nodes: int) -> tuple[Tensor, Tensor]:
        """Shares X and log measures, [N, nodes] each."""
        point, gauss_weight = gauss_legendre(nodes, self.a.device)
        width = (self.s_high - self.s_low)[:, None]
        s = torch.clamp(self.s_low[:, None] + width * (0.5 + 0.5 * point), 1e-300, 1 - 2**-53)
        a, c = self.a[:, None], self.c[:, None]
        x, log_jacobian = _share_from_s(s, a.clamp(max=1.0), c.clamp(max=1.0))
        log_measure = a * torch.log(x) + c * torch.log1p(-x) + log_jacobian + torch.log(0.5 * gauss_weight * width)
        return x, log_measure


def share_likelihood(boxes: Boxes, prior: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """All that the posterior takes from the pixels.

    Args:
        prior: shape and rate of I, shape and rate of B, [4, N] float64.
        nodes: Gauss-Legendre nodes in s.

    Returns:
        [7, N] float64: P, Q, sum y, sum log y!, sum y log(rate) at the mode of X, and the two ends of s; and
        [N, nodes] float64: sum y log(rate) at the nodes less that at the mode.
    """
    a, alpha, c, beta = prior
    used = boxes.used
    p_total = boxes.total(torch.where(used, boxes.profile, 0.0)).to(torch.float64) + alpha
    q_total = boxes.total(torch.where(used, boxes.background, 0.0)).to(torch.float64) + beta
    lit = boxes.where(used & (boxes.counts > 0))
    dtype = lit.profile.dtype
    at_one = lit.profile / _positive(p_total).to(dtype)[lit.row]
    at_zero = lit.background / _positive(q_total).to(dtype)[lit.row]

    start = first_share(boxes, a, c, p_total, q_total)
    mode, _, _ = most_likely_share(lit, at_one, at_zero, a, c, start, _MODE_TOLERANCE)
    rate = share_rate(mode.to(dtype)[lit.row], at_one, at_zero)
    ratio = (at_one - at_zero) / rate
    weighted = lit.counts * ratio
    first = lit.total(weighted).to(torch.float64)
    second = torch.clamp(lit.total(weighted * ratio).to(torch.float64), min=1e-30)
    third = lit.total(weighted * ratio * ratio).to(torch.float64)

    # A positive third derivative makes the right tail the heavy one; the other falls at least as a Gaussian does.
    light = torch.full_like(third, 1e-150)
    right = _heavy_tail(-first, second, torch.where(third > 0, third, light))
    left = _heavy_tail(first, second, torch.where(third < 0, third, light))
    a_low, c_low = torch.clamp(a, max=1.0), torch.clamp(c, max=1.0)
    s_low = _s_from_share(torch.clamp(mode - left, min=0.0), a_low, c_low)
    s_high = _s_from_share(torch.clamp(mode + right, max=1.0), a_low, c_low)

    x, _ = _Rule(s_low, s_high, a, c).at(nodes)
    distance = (x - mode[:, None]).to(dtype)
    # log(rate_k / rate_mode) = log(1 + (X_k - X_mode) ratio): nothing cancels in single precision
    per_node = [
        lit.total(lit.counts * torch.log1p(torch.clamp(d[lit.row] * ratio, min=-1 + 1e-7))) for d in distance.unbind(1)
    ]
    sums = (lit.counts, torch.lgamma(lit.counts + 1), lit.counts * torch.log(rate))
    photons, factorials, at_mode = (lit.total(t).to(torch.float64) for t in sums)
    summary = torch.stack([p_total, q_total, photons, factorials, at_mode, s_low, s_high])
    return summary, torch.stack(per_node, 1).to(torch.float64)


def posterior_from_share(
    summary: Tensor, log_rates: Tensor, prior: Tensor, quantiles: Sequence[float]
) -> IntensityPosterior:
    """Moments, evidence and quantiles of I and B from what `share_likelihood` found."""
    a, alpha, c, beta = prior
    p_total, q_total, photons, factorials, at_mode, s_low, s_high = summary
    infinite_i, infinite_b = p_total <= 0, q_total <= 0  # flat prior and nothing measured
    p_total, q_total = _positive(p_total), _positive(q_total)
    rule = _Rule(s_low, s_high, a, c)
    x, log_measure = rule.at(log_rates.shape[1])
    log_integral = torch.logsumexp(log_rates + log_measure, 1)
    weight = torch.exp(log_rates + log_measure - log_integral[:, None])

    n_s = photons + a + c
    mean_x = (weight * x).sum(1)
    var_x = (weight * (x - mean_x[:, None]) ** 2).sum(1)
    mean_i = n_s * mean_x / p_total
    mean_b = n_s * (1 - mean_x) / q_total
    # law of total variance: Var = E[Var(S)] X^2 + (E S)^2 Var X
    var_i = (n_s * (var_x + mean_x**2) + n_s**2 * var_x) / p_total**2
    var_b = (n_s * (var_x + (1 - mean_x) ** 2) + n_s**2 * var_x) / q_total**2

    log_evidence = at_mode + log_integral + torch.lgamma(n_s) - a * torch.log(p_total) - c * torch.log(q_total)
    log_evidence = log_evidence - factorials + _log_prior_norm(a, alpha) + _log_prior_norm(c, beta)

    quantiles_i = mean_i.new_empty(mean_i.shape[0], len(quantiles))
    if quantiles:
        # a mixture needs nodes closer than the width of S: the smooth part of log h is interpolated to more of them
        nodes = log_rates.shape[1]
        n_fine = _QUANTILE_NODES + (nodes == _QUANTILE_NODES)  # never on the coarse nodes
        x, log_measure = rule.at(n_fine)
        fine = torch.softmax(log_rates @ interpolation(nodes, n_fine, log_rates.device) + log_measure, 1)
        for column, probability in enumerate(quantiles):
            rates = p_total[:, None] / x
            quantiles_i[:, column] = _mixture_quantiles(probability, fine, rates, n_s, mean_i, var_i)
    shape_i, rate_i = mean_i**2 / var_i, mean_i / var_i
    mean_i, var_i = (torch.where(infinite_i, torch.inf, t) for t in (mean_i, var_i))
    mean_b, var_b = (torch.where(infinite_b, torch.inf, t) for t in (mean_b, var_b))
    rate_i = torch.where(infinite_i, 0.0, rate_i)
    return IntensityPosterior(mean_i, var_i, mean_b, var_b, shape_i, rate_i, quantiles_i, log_evidence)


def _positive(total: Tensor) -> Tensor:
    return torch.where(total > 0, total, 1.0)


def _log_prior_norm(shape: Tensor, rate: Tensor) -> Tensor:
    proper = shape * torch.log(torch.clamp(rate, min=1e-300)) - torch.lgamma(shape)
    return torch.where(rate > 0, proper, 0.0)


def _mixture_quantiles(
    probability: float, weight: Tensor, rate: Tensor, shape: Tensor, mean: Tensor, var: Tensor
) -> Tensor:
    """Quantile [N] of sum_k w_k Gamma(shape, rate_k): Newton inside a bracket from a Wilson-Hilferty start."""
    k = mean**2 / var
    z = math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * probability - 1, dtype=torch.float64)))
    x = mean * torch.clamp(1 - 1 / (9 * k) + z / (3 * torch.sqrt(k)), min=0.05) ** 3
    low, high = torch.zeros_like(x), mean + 60 * var.sqrt()
    shape = shape[:, None]
    for _ in range(_QUANTILE_STEPS):
        scaled = x[:, None] * rate
        above = (weight * torch.special.gammainc(shape.expand_as(scaled), scaled)).sum(1) - probability
        density = (weight * torch.exp(shape * torch.log(scaled) - scaled - torch.lgamma(shape))).sum(1) / x
        low, high = torch.where(above < 0, x, low), torch.where(above < 0, high, x)
        newton = x - above / density
        # a row that has arrived stays, while others still move
        x = torch.where((newton >= low) & (newton <= high), newton, 0.5 * (low + high))
        if not torch.compiler.is_compiling() and bool((above.abs() < _QUANTILE_TOLERANCE).all()):
            break
    return x


def intensity_posterior_reference(
    counts: Tensor,
    mask: Tensor | None,
    profile: Profile,
    prior_i: GammaPair,
    prior_bg: GammaPair,
    *,
    ptr: Tensor | None = None,
    background: Tensor | None = None,
    quantiles: Sequence[float] = (),
    nodes: int = 24,
) -> IntensityPosterior:
    """The definition, in plain torch; arguments as in `intensity_posterior`."""
    boxes = unpack(counts, mask, profile, ptr, background)
    prior = _prior_rows(prior_i, prior_bg, len(boxes), counts)
    return posterior_from_share(*share_likelihood(boxes, prior, nodes), prior, quantiles)


def _prior_rows(prior_i: GammaPair, prior_bg: GammaPair, n: int, like: Tensor) -> Tensor:
    return torch.stack([*gamma_rows(prior_i, n, like), *gamma_rows(prior_bg, n, like)])


_library = torch.library.Library("xtalfast", "FRAGMENT")
_library.define(
    "share_likelihood(Tensor counts, Tensor? mask, Tensor? ptr, Tensor? background, Tensor profile, Tensor prior, "
    "int nodes) -> (Tensor summary, Tensor log_rates)"
)


@torch.library.register_fake("xtalfast::share_likelihood", lib=_library)
def _(counts, mask, ptr, background, profile, prior, nodes):
    return prior.new_empty(7, prior.shape[1]), prior.new_empty(prior.shape[1], nodes)


def _share_likelihood(counts, mask, ptr, background, profile, prior, nodes):
    boxes = KernelBoxes(counts, mask, ptr, background, profile.dtype)
    profile, prior = profile.contiguous(), prior.contiguous()
    node, _ = gauss_legendre(nodes, counts.device)
    summary, log_rates = prior.new_empty(7, prior.shape[1]), prior.new_empty(prior.shape[1], nodes)
    _native.require("intensity_posterior on the CPU").intensity_posterior(
        boxes.arguments,
        {
            "profile": profile.data_ptr(),
            "prior": prior.data_ptr(),
            "node": node.data_ptr(),
            "nodes": nodes,
            "tolerance": _MODE_TOLERANCE,
            "tail": _TAIL_LOG,
            "summary": summary.data_ptr(),
            "log_rates": log_rates.data_ptr(),
        },
    )
    return summary, log_rates


def _share_likelihood_on_gpu(counts, mask, ptr, background, profile, prior, nodes):
    from xtalfast.kernels.intensity_posterior import share_likelihood as launch

    node, _ = gauss_legendre(nodes, counts.device)
    summary, log_rates = prior.new_empty(7, prior.shape[1]), prior.new_empty(prior.shape[1], nodes)
    boxes = contiguous(counts, mask, ptr, background, profile, prior)
    with torch.cuda.device(counts.device):
        launch(*boxes, node, _MODE_TOLERANCE, _TAIL_LOG, summary, log_rates)
    return summary, log_rates


_library.impl("share_likelihood", _share_likelihood, "CPU")
_library.impl("share_likelihood", _share_likelihood_on_gpu, "CUDA")


@torch.no_grad()
def intensity_posterior(
    counts: Tensor,
    mask: Tensor | None,
    profile: Profile,
    prior_i: GammaPair,
    prior_bg: GammaPair,
    *,
    ptr: Tensor | None = None,
    background: Tensor | None = None,
    quantiles: Sequence[float] = (),
    nodes: int = 24,
) -> IntensityPosterior:
    """Exact posterior mean and variance of the intensity and the background of every shoebox.

    Args:
        counts: photons, [N, P] or ragged [M]; any integer or floating type.
        mask: pixels to use, like counts: bool, or DIALS bits (used = Valid and not Overlapped); None uses all.
        profile: spot shape that sums to 1 over the box, as for `poisson_gamma_elbo`.
        prior_i: (shape, rate) of the Gamma prior of I, [N] or numbers; (1, 0) is flat on I >= 0.
        prior_bg: (shape, rate) of the Gamma prior of B, mean photons per pixel.
        ptr: row offsets int64 [N + 1] when counts are ragged.
        background: shape of the background with mean 1 over the box, [P], [N, P] or [M]; None is flat.
        quantiles: probabilities at which to give quantiles of I.
        nodes: Gauss-Legendre nodes.

    Returns:
        IntensityPosterior, float64. A box without used pixels gives the prior back, infinite moments if that is
        improper. No gradient is recorded.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, device or range.

    Example:
        >>> counts, profile = torch.tensor([[0, 3, 1]]), torch.tensor([[0.2, 0.6, 0.2]])
        >>> flat = intensity_posterior(counts, None, profile, (1.0, 0.0), (1.0, 0.0))
        >>> float(flat.mean_i + 3 * flat.mean_bg)  # the counts + 2
        6.0
    """
    n = check_boxes(counts, mask, profile, ptr, background)
    check_photons(counts, mask)
    check_rows(n, prior_i=prior_i, prior_bg=prior_bg)
    check_prior("prior_i", prior_i)
    check_prior("prior_bg", prior_bg)
    if any(not 0 < q < 1 for q in quantiles):
        raise ValueError(f"quantiles must be between 0 and 1, got {tuple(quantiles)}")
    if nodes < 2:
        raise ValueError(f"nodes must be at least 2, got {nodes}")
    prior = _prior_rows(prior_i, prior_bg, n, counts)
    if has_kernel(counts.device):
        values = materialise(profile, ptr)
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        shape = None if background is None else background.to(values.dtype)
        summary, log_rates = torch.ops.xtalfast.share_likelihood(counts, mask, ptr, shape, values, prior, nodes)
    else:
        parts = [
            share_likelihood(unpack(*chunk), prior[:, rows], nodes)
            for rows, chunk in box_chunks(counts, mask, profile, ptr, background, n)
        ]
        summary, log_rates = torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts])
    return posterior_from_share(summary, log_rates, prior, quantiles)
