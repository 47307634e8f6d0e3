"""Loss of variational integration: Poisson counts from a spot and a background, each with a Gamma posterior.

Model of pixel j of a shoebox: y_j ~ Poisson(I p_j + B b_j), with q(I), q(B) and their priors Gamma distributions.

    loss = -E_q[sum_j y_j log(I p_j + B b_j) - (I p_j + B b_j) - log y_j!] + kappa_i KL(q_I) + kappa_bg KL(q_B)

The expectation over both I and B is one integral, not two. With I = S X / r_i and B = S (1 - X) / r_b, the sum S is
Gamma(k_i + k_b, 1) and the share X is Beta(k_i, k_b), independent of each other, so

    E log(I p + B b) = digamma(k_i + k_b) + E_X log(X p / r_i + (1 - X) b / r_b)

and the last term is smooth in t = logit X whatever the ratio of spot to background: a trapezoidal rule on a stretched
grid in t converges geometrically (`share_nodes`).

Ref: integration paper, eq. 4; Bezanson-style trapezoidal convergence: Trefethen & Weideman, SIAM Rev. 56 (2014) 385.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint

from xtalfast.ops._boxes import (
    Boxes,
    Chunk,
    box_chunks,
    check_boxes,
    check_rows,
    gamma_rows,
    pair_rows,
    per_reflection,
    unpack,
    value_rows,
)
from xtalfast.ops.gamma import GammaPair, TensorPair, gamma_kl
from xtalfast.ops.profiles import Profile

Nodes = int | Literal["auto"]
Estimator = Literal["quadrature", "mc"]

_MOST_NODES = 96
_CHUNK = 1 << 22  # pixels x nodes held at once: 16 MB an array in float32


def share_nodes(shape_i: Tensor, shape_bg: Tensor, n_nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes in t = logit X and measures dt for X ~ Beta(shape_i, shape_bg), both [N, K] float64, without gradient.

    The density exp(k_i t) / (1 + e^t)^(k_i + k_b) is log-concave. The grid spans the t at which it has fallen by
    exp(-2.5 sqrt(K)), at most exp(-16), is equidistant in u with t = t_mode + s sinh(kappa u + eta), as fine at the
    mode as a Gaussian of the same curvature needs (0.7 sd, never above 0.8), and lumps the mass of the exponential
    tails into the end nodes. These constants minimise the largest error over shapes 0.01 to 1e3 and boxes of 100 to
    13,000 photons.
    """
    with torch.no_grad():
        a, b = shape_i.to(torch.float64), shape_bg.to(torch.float64)
        n = a + b
        sd = torch.sqrt(n / (a * b))
        level = min(2.5 * math.sqrt(n_nodes), 16.0)

        def reach(slope: Tensor, other: Tensor) -> Tensor:
            # distance d at which slope d + n log(other/n + slope/n e^-d) = level; Newton from outside is monotone
            d = sd * math.sqrt(2 * level) + level / slope + 1
            for _ in range(8):
                decay = torch.exp(-d) * slope
                d = d - (slope * d + n * torch.log((other + decay) / n) - level) / (slope - n * decay / (other + decay))
            return d

        left, right = reach(a, b), reach(b, a)
        spacing = torch.clamp(0.7 * sd, max=0.8) * (n_nodes - 1) / 2
        # s and eta follow from the two ends; kappa from the spacing at the mode: s kappa = spacing
        skew = (right - left) / (right + left)
        stretch = torch.clamp(0.5 * (left + right) / spacing, min=1.0 + 1e-9)
        kappa = torch.log(2 * stretch) + 1
        for _ in range(12):
            kappa = torch.asinh(stretch * kappa * torch.sqrt(1 - (skew * torch.tanh(kappa)) ** 2))
        kappa = torch.clamp(kappa, min=1e-3)
        eta = torch.atanh(skew * torch.tanh(kappa))
        scale = right / torch.sinh(kappa + eta)

        u = torch.linspace(-1, 1, n_nodes, dtype=torch.float64, device=a.device)
        angle = kappa[:, None] * u + eta[:, None]
        t = torch.log(a / b)[:, None] + scale[:, None] * torch.sinh(angle)
        measure = (2 / (n_nodes - 1)) * (scale * kappa)[:, None] * torch.cosh(angle)
        measure[:, 0] = 0.5 * measure[:, 0] + 1 / (a - n * torch.sigmoid(t[:, 0]))
        measure[:, -1] = 0.5 * measure[:, -1] + 1 / (n * torch.sigmoid(t[:, -1]) - a)
    return t, measure


def quadrature_draws(q_i: TensorPair, q_bg: TensorPair, n_nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Effective intensities, backgrounds and weights [N, K] with E_q log(I p + B b) = sum_k w_k log(I_k p + B_k b)."""
    (k_i, r_i), (k_b, r_b) = q_i, q_bg
    t, measure = share_nodes(k_i, k_b, n_nodes)
    log_share, log_rest = -softplus(-t), -softplus(t)
    weight = torch.softmax(k_i[:, None] * log_share + k_b[:, None] * log_rest + torch.log(measure), dim=1)
    log_sum = torch.digamma(k_i + k_b)[:, None]
    i_k = torch.exp(log_share + log_sum) / r_i[:, None]
    b_k = torch.exp(log_rest + log_sum) / r_b[:, None]
    return i_k, b_k, weight


def monte_carlo_draws(
    q_i: TensorPair, q_bg: TensorPair, samples: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """`samples` joint draws of (I, B), [N, S], with implicit-reparameterisation gradients, and weights 1 / S."""
    draws = [
        torch._standard_gamma(shape[:, None].expand(-1, samples), generator) / rate[:, None]
        for shape, rate in (q_i, q_bg)
    ]
    return draws[0], draws[1], torch.full_like(draws[0], 1 / samples)


def nodes_needed(shape_i: Tensor, shape_bg: Tensor) -> Tensor:
    """Nodes that `nodes="auto"` takes for each reflection, int64 [N]: 24 where both shapes are above 10, 40 above 1."""
    smallest = torch.minimum(shape_i, shape_bg)
    return torch.where(smallest >= 10, 24, torch.where(smallest >= 1, 40, _MOST_NODES))


def poisson_gamma_elbo_reference(
    counts: Tensor,
    mask: Tensor | None,
    profile: Profile,
    q_i: GammaPair,
    q_bg: GammaPair,
    prior_i: GammaPair,
    prior_bg: GammaPair,
    *,
    ptr: Tensor | None = None,
    background: Tensor | None = None,
    kappa_i: Tensor | float = 1.0,
    kappa_bg: Tensor | float = 1.0,
    estimator: Estimator = "quadrature",
    nodes: Nodes = "auto",
    samples: int = 1,
    seed: int | None = None,
) -> Tensor:
    """The definition, in plain torch; arguments as in `poisson_gamma_elbo`. Memory grows with pixels x nodes."""
    boxes = unpack(counts, mask, profile, ptr, background)
    n = len(boxes)
    (k_i, r_i), (k_b, r_b) = gamma_rows(q_i, n, boxes.counts), gamma_rows(q_bg, n, boxes.counts)
    kl_i = gamma_kl((k_i, r_i), gamma_rows(prior_i, n, boxes.counts))
    kl_bg = gamma_kl((k_b, r_b), gamma_rows(prior_bg, n, boxes.counts))

    used = boxes.used
    profile_sum = boxes.total(torch.where(used, boxes.profile, 0.0)).to(torch.float64)
    background_sum = boxes.total(torch.where(used, boxes.background, 0.0)).to(torch.float64)
    lit = boxes.where(used & (boxes.counts > 0))  # y log(rate) and log y! are 0 elsewhere
    factorials = lit.total(torch.lgamma(lit.counts + 1)).to(torch.float64)

    if estimator == "mc":
        generator = torch.Generator(counts.device).manual_seed(_seed(seed))
        i_k, b_k, weight = monte_carlo_draws((k_i, r_i), (k_b, r_b), samples, generator)
        # the same draws in both terms: near the optimum their first-order noise cancels
        per_draw = _log_rates(lit, i_k, b_k) - i_k * profile_sum[:, None] - b_k * background_sum[:, None]
        log_likelihood = (weight * per_draw).sum(1) - factorials
    else:
        needed = nodes_needed(k_i, k_b) if nodes == "auto" else torch.full_like(lit.ptr[1:], nodes)
        log_likelihood = -k_i / r_i * profile_sum - k_b / r_b * background_sum - factorials
        for count in torch.unique(needed).tolist():
            group = needed == count
            i_k, b_k, weight = quadrature_draws((k_i, r_i), (k_b, r_b), count)
            per_node = _log_rates(lit.where(group[lit.row]), i_k, b_k)
            log_likelihood = log_likelihood + torch.where(group, (weight * per_node).sum(1), 0.0)

    kappa_i = per_reflection(kappa_i, n, boxes.counts)
    kappa_bg = per_reflection(kappa_bg, n, boxes.counts)
    return (kappa_i * kl_i + kappa_bg * kl_bg - log_likelihood).to(boxes.counts.dtype)


def _log_rates(lit: Boxes, i_k: Tensor, b_k: Tensor) -> Tensor:
    """sum_j y_j log(I_k p_j + B_k b_j) for every node or draw, [N, K] float64."""
    dtype = lit.profile.dtype
    tiny = torch.finfo(dtype).tiny
    sums = []
    for i, b in zip(i_k.to(dtype).unbind(1), b_k.to(dtype).unbind(1)):
        rate = i[lit.row] * lit.profile + b[lit.row] * lit.background
        # p = 0 with y > 0 stays finite
        sums.append(lit.total(lit.counts * torch.log(torch.clamp(rate, min=tiny))))
    return torch.stack(sums, 1).to(torch.float64)


def _seed(seed: int | None) -> int:
    return int(torch.randint(2**63 - 1, ()).item()) if seed is None else seed


def poisson_gamma_elbo(
    counts: Tensor,
    mask: Tensor | None,
    profile: Profile,
    q_i: GammaPair,
    q_bg: GammaPair,
    prior_i: GammaPair,
    prior_bg: GammaPair,
    *,
    ptr: Tensor | None = None,
    background: Tensor | None = None,
    kappa_i: Tensor | float = 1.0,
    kappa_bg: Tensor | float = 1.0,
    estimator: Estimator = "quadrature",
    nodes: Nodes = "auto",
    samples: int = 1,
    seed: int | None = None,
) -> Tensor:
    """Negative evidence lower bound of every shoebox, differentiable in the profile and in both Gammas.

    Args:
        counts: photons, [N, P] or ragged [M]; any integer or floating type.
        mask: pixels to use, like counts: bool, or DIALS bits (used = Valid and not Overlapped); None uses all.
        profile: spot shape that sums to 1 over the box: a tensor like counts, SoftmaxProfile, MVNProfile or
            LowRankProfile.
        q_i, q_bg: (shape, rate) of q(I), photons, and of q(B), mean photons per pixel; [N] or numbers.
        prior_i, prior_bg: (shape, rate) of the priors, [N] or numbers; shape 1 is the exponential.
        ptr: row offsets int64 [N + 1] when counts are ragged.
        background: shape of the background with mean 1 over the box, [P], [N, P] or [M]; None is flat.
        kappa_i, kappa_bg: weights of the two divergences, [N] or numbers.
        estimator: "quadrature" (deterministic) or "mc" (Monte Carlo, the paper's).
        nodes: quadrature nodes, or "auto": 24, 40 or 96 by the smaller of the two shapes, good to 1e-3 nats for shapes
            of 1 or more and to 1e-2 down to 0.01. 12 to 16 do for training.
        samples: Monte-Carlo draws a reflection.
        seed: of the draws; None takes one from torch's generator.

    Returns:
        loss in nats, [N], float32 or float64 like the profile (float32 for half types). A box without used pixels gives
        the divergences alone. Gradients with respect to the shapes are the quadrature of the derivative.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, device or range.

    Ref: integration paper, eq. 4.

    Example:
        >>> counts, profile = torch.tensor([[0, 3, 1]]), torch.tensor([[0.2, 0.6, 0.2]])
        >>> loss = poisson_gamma_elbo(counts, None, profile, (2.0, 1.0), (2.0, 4.0), (1.0, 0.1), (1.0, 1.0))
        >>> loss.shape
        torch.Size([1])
    """
    n = check_boxes(counts, mask, profile, ptr, background)
    check_rows(n, q_i=q_i, q_bg=q_bg, prior_i=prior_i, prior_bg=prior_bg, kappa_i=kappa_i, kappa_bg=kappa_bg)
    if estimator not in ("quadrature", "mc"):
        raise ValueError(f"estimator must be 'quadrature' or 'mc', got {estimator!r}")
    if nodes != "auto" and (not isinstance(nodes, int) or nodes < 4):
        raise ValueError(f"nodes must be 'auto' or an integer of at least 4, got {nodes!r}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")

    width = samples if estimator == "mc" else _MOST_NODES if nodes == "auto" else nodes
    seeds = _seed(seed)
    pieces: list[Tensor] = []
    for rows, boxes in box_chunks(counts, mask, profile, ptr, background, n, _CHUNK // width):

        def piece(rows: slice = rows, boxes: Chunk = boxes, seed: int = (seeds + len(pieces)) % 2**63) -> Tensor:
            return poisson_gamma_elbo_reference(
                *boxes[:3],
                pair_rows(q_i, rows),
                pair_rows(q_bg, rows),
                pair_rows(prior_i, rows),
                pair_rows(prior_bg, rows),
                ptr=boxes[3],
                background=boxes[4],
                kappa_i=value_rows(kappa_i, rows),
                kappa_bg=value_rows(kappa_bg, rows),
                estimator=estimator,
                nodes=nodes,
                samples=samples,
                seed=seed,
            )

        # recomputed in the backward pass, so that no array of pixels x nodes outlives its run of reflections
        pieces.append(checkpoint(piece, use_reentrant=False) if torch.is_grad_enabled() else piece())
    return torch.cat(pieces)
