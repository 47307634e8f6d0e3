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

from xtalfast import _native
from xtalfast.ops._boxes import (
    SMALLEST_RATE,
    Boxes,
    Chunk,
    KernelBoxes,
    box_chunks,
    check_boxes,
    check_rows,
    contiguous,
    empty_pixels,
    gamma_rows,
    has_kernel,
    profile_dtype,
    unpack,
)
from xtalfast.ops.gamma import GammaPair, gamma_kl
from xtalfast.ops.profiles import LowRankProfile, MVNProfile, Profile, SoftmaxProfile

Nodes = int | Literal["auto"]
Estimator = Literal["quadrature", "mc"]

_MOST_NODES = 96
_REFERENCE_PIXELS = 1 << 22  # pixels x nodes that the reference holds at once: 16 MB an array in float32
_VALUES, _LOGITS, _GAUSSIAN, _LOW_RANK = range(4)  # forms of a profile; the first three are ProfileKind of the kernel
_KINDS = {SoftmaxProfile: _LOGITS, MVNProfile: _GAUSSIAN, LowRankProfile: _LOW_RANK}


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
            for _ in range(5):
                decay = torch.exp(-d) * slope
                d = d - (slope * d + n * torch.log((other + decay) / n) - level) / (slope - n * decay / (other + decay))
            return d

        left, right = reach(a, b), reach(b, a)
        spacing = torch.clamp(0.7 * sd, max=0.8) * (n_nodes - 1) / 2
        # s and eta follow from the two ends; kappa from the spacing at the mode: s kappa = spacing
        skew = (right - left) / (right + left)
        stretch = torch.clamp(0.5 * (left + right) / spacing, min=1.0 + 1e-9)
        kappa = torch.log(2 * stretch) + 1
        for _ in range(6):
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


def quadrature_draws(q: Tensor, n_nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Effective intensities, backgrounds and weights [N, K] with E_q log(I p + B b) = sum_k w_k log(I_k p + B_k b)."""
    k_i, r_i, k_b, r_b = q
    t, measure = share_nodes(k_i, k_b, n_nodes)
    log_share, log_rest = -softplus(-t), -softplus(t)
    weight = torch.softmax(k_i[:, None] * log_share + k_b[:, None] * log_rest + torch.log(measure), dim=1)
    log_sum = torch.digamma(k_i + k_b)[:, None]
    return torch.exp(log_share + log_sum) / r_i[:, None], torch.exp(log_rest + log_sum) / r_b[:, None], weight


def nodes_needed(shape_i: Tensor, shape_bg: Tensor) -> Tensor:
    """Nodes that `nodes="auto"` takes for each reflection, int64 [N]: 24 where both shapes are above 10, 40 above 1."""
    smallest = torch.minimum(shape_i, shape_bg)
    return torch.where(smallest >= 10, 24, torch.where(smallest >= 1, 40, _MOST_NODES))


def expected_loss(boxes: Boxes, q: Tensor, nodes: int, draws: Tensor | None) -> Tensor:
    """-E_q log p(counts) of every box, [N] float64.

    Args:
        q: shape and rate of q(I), shape and rate of q(B), [4, N] float64.
        nodes: of the quadrature, 0 for the automatic choice.
        draws: Monte-Carlo draws of I and of B, [2, N, S] float64, to use instead of the quadrature.
    """
    used = boxes.used
    profile_sum = boxes.total(torch.where(used, boxes.profile, 0.0)).to(torch.float64)
    background_sum = boxes.total(torch.where(used, boxes.background, 0.0)).to(torch.float64)
    lit = boxes.where(used & (boxes.counts > 0))  # y log(rate) and log y! are 0 elsewhere
    loss = lit.total(torch.lgamma(lit.counts + 1)).to(torch.float64)
    if draws is not None:
        # the same draws in both terms: near the optimum their first-order noise cancels
        rates = draws[0] * profile_sum[:, None] + draws[1] * background_sum[:, None]
        return loss + (rates - _log_rates(lit, *draws)).mean(1)
    loss = loss + q[0] / q[1] * profile_sum + q[2] / q[3] * background_sum
    needed = torch.full_like(lit.ptr[1:], nodes) if nodes else nodes_needed(q[0], q[2])
    for count in torch.unique(needed).tolist():
        group = needed == count
        i_k, b_k, weight = quadrature_draws(q, count)
        log_rates = (weight * _log_rates(lit.where(group[lit.row]), i_k, b_k)).sum(1)
        loss = loss - torch.where(group, log_rates, 0.0)
    return loss


def _log_rates(lit: Boxes, i_k: Tensor, b_k: Tensor) -> Tensor:
    """sum_j y_j log(I_k p_j + B_k b_j) for every node or draw, [N, K] float64."""
    dtype = lit.profile.dtype
    sums = []
    for i, b in zip(i_k.to(dtype).unbind(1), b_k.to(dtype).unbind(1)):
        rate = i[lit.row] * lit.profile + b[lit.row] * lit.background
        sums.append(lit.total(lit.counts * torch.log(torch.clamp(rate, min=SMALLEST_RATE))))
    return torch.stack(sums, 1).to(torch.float64)


def divergences(q: Tensor, prior: Tensor) -> Tensor:
    """KL of q(I) and of q(B) from their priors, [2, N] float64; q and prior [4, N]."""
    return torch.stack([gamma_kl((q[0], q[1]), (prior[0], prior[1])), gamma_kl((q[2], q[3]), (prior[2], prior[3]))])


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
    q = torch.stack([*gamma_rows(q_i, n, boxes.counts), *gamma_rows(q_bg, n, boxes.counts)])
    prior = torch.stack([*gamma_rows(prior_i, n, boxes.counts), *gamma_rows(prior_bg, n, boxes.counts)])
    draws = monte_carlo_draws(q, samples, _seed(seed, counts.device)) if estimator == "mc" else None
    loss = expected_loss(boxes, q, 0 if nodes == "auto" else nodes, draws)
    return _combine(loss, divergences(q, prior), kappa_i, kappa_bg).to(boxes.counts.dtype)


def _combine(loss: Tensor, divergence: Tensor, kappa_i: Tensor | float, kappa_bg: Tensor | float) -> Tensor:
    return loss + kappa_i * divergence[0] + kappa_bg * divergence[1]


def _seed(seed: int | None, device: torch.device) -> Tensor:
    if seed is None:  # drawn from torch's generator out here, where torch.compile and checkpointing see it
        return torch.randint(2**63 - 1, (), device=device)
    return torch.tensor(seed, device=device)


def monte_carlo_draws(q: Tensor, samples: int, seed: Tensor) -> Tensor:
    """Draws of I and B, [2, N, samples], with implicit-reparameterisation gradients in the shapes."""
    standard = torch.ops.xtalfast.standard_gamma(q[0::2], samples, seed)
    return standard / q[1::2, :, None]


_library = torch.library.Library("xtalfast", "FRAGMENT")
_library.define("standard_gamma(Tensor shape, int samples, Tensor seed) -> Tensor")
_library.define("standard_gamma_backward(Tensor shape, Tensor draws) -> Tensor")
# profile: pixel values or logits (kind 0, 1), the mean of a Gaussian (kind 2) with scale_tril and grid, or the latent
# of a low-rank profile (kind 3) with its basis and bias in the places of scale_tril and grid.
# q, prior: [4, N]. Returns the loss [N] and KL [2, N], and their gradients by box (empty unless asked for): of the loss
# by profile (kind 3: by its logits), scale_tril, q and draws; of the two KL by shape, rate, prior shape, prior rate
# [8, N].
_library.define(
    "poisson_gamma_elbo(Tensor counts, Tensor? mask, Tensor? ptr, Tensor? background, int kind, Tensor profile, "
    "Tensor? scale_tril, Tensor? grid, Tensor q, Tensor prior, Tensor? draws, int nodes, bool gradients) -> "
    "(Tensor loss, Tensor divergence, Tensor by_profile, Tensor by_scale, Tensor by_q, Tensor by_draws, "
    "Tensor divergence_by)"
)


@torch.library.register_fake("xtalfast::standard_gamma", lib=_library)
def _(shape, samples, seed):
    return shape.new_empty((*shape.shape, samples))


@torch.library.register_fake("xtalfast::standard_gamma_backward", lib=_library)
def _(shape, draws):
    return torch.empty_like(draws)


def _standard_gamma(shape, samples, seed):
    generator = torch.Generator(shape.device).manual_seed(int(seed))
    return torch._standard_gamma(shape[..., None].expand(*shape.shape, samples).contiguous(), generator)


def _standard_gamma_backward(shape, draws):
    return torch._standard_gamma_grad(shape[..., None].expand_as(draws).contiguous(), draws)


def _setup_draws(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output)


def _backward_draws(ctx, grad):
    _refuse_double_backward()
    return (grad * torch.ops.xtalfast.standard_gamma_backward(*ctx.saved_tensors)).sum(-1), None, None


@torch.library.register_fake("xtalfast::poisson_gamma_elbo", lib=_library)
def _(counts, mask, ptr, background, kind, profile, scale_tril, grid, q, prior, draws, nodes, gradients):
    n = q.shape[1]
    by_profile, by_scale, by_q, by_draws, divergence_by = _gradients_like(
        kind, profile, scale_tril, q, draws, gradients
    )
    return q.new_empty(n), q.new_empty(2, n), by_profile, by_scale, by_q, by_draws, divergence_by


def _gradients_like(kind, profile, scale_tril, q, draws, gradients):
    """Uninitialised gradients; empty where there is nothing to differentiate."""
    n = q.shape[1] if gradients else 0
    by_profile, by_scale = profile.new_empty(0), profile.new_empty(0)
    if gradients and kind == _LOW_RANK:
        by_profile = profile.new_empty(profile.shape[0], scale_tril.shape[1])
    elif gradients:
        by_profile = torch.empty_like(profile, memory_format=torch.contiguous_format)
    if gradients and kind == _GAUSSIAN:
        by_scale = torch.empty_like(scale_tril, memory_format=torch.contiguous_format)
    return (
        by_profile,
        by_scale,
        q.new_empty(4, n),
        torch.empty_like(draws, memory_format=torch.contiguous_format)
        if gradients and draws is not None
        else q.new_empty(0),
        q.new_empty(8, n),
    )


def _elbo(counts, mask, ptr, background, kind, profile, scale_tril, grid, q, prior, draws, nodes, gradients):
    kernel = _native.require("poisson_gamma_elbo on the CPU")
    n = q.shape[1]
    if kind == _LOW_RANK:  # a matrix product of the whole batch
        kind, profile, scale_tril, grid = _LOGITS, torch.addmm(grid, profile, scale_tril), None, None
    by_profile, by_scale, by_q, by_draws, divergence_by = _gradients_like(
        kind, profile, scale_tril, q, draws, gradients
    )
    if gradients:
        by_profile = empty_pixels(profile)
    by_q.zero_()  # Monte Carlo differentiates the draws instead
    loss, divergence = q.new_empty(n), q.new_empty(2, n)
    boxes = KernelBoxes(counts, mask, ptr, background, profile.dtype)
    gaussian = kind == _GAUSSIAN
    tensors = {
        "profile": None if gaussian else profile,
        "mean": profile if gaussian else None,
        "scale_tril": scale_tril,
        "grid": grid,
        "q": q,
        "prior": prior,
        "draws_i": None if draws is None else draws[0],
        "draws_b": None if draws is None else draws[1],
    }
    tensors = {name: None if tensor is None else tensor.contiguous() for name, tensor in tensors.items()}
    outputs = {
        "loss": loss,
        "divergence": divergence,
        "grad_profile": by_profile,
        "grad_mean": by_profile,
        "grad_scale": by_scale,
        "grad_q": by_q,
        "grad_draws_i": by_draws[:1],
        "grad_draws_b": by_draws[1:],
        "grad_divergence": divergence_by,
    }
    arguments = {name: 0 if tensor is None else tensor.data_ptr() for name, tensor in (tensors | outputs).items()}
    samples = 0 if draws is None else draws.shape[2]
    kernel.poisson_gamma_elbo(
        boxes.arguments,
        arguments | {"gradients": gradients, "profile_kind": kind, "nodes": nodes, "samples": samples},
    )
    return loss, divergence, by_profile, by_scale, by_q, by_draws, divergence_by


def _elbo_on_gpu(counts, mask, ptr, background, kind, profile, scale_tril, grid, q, prior, draws, nodes, gradients):
    from xtalfast.kernels.poisson_gamma_elbo import poisson_gamma_elbo as launch

    out = _gradients_like(kind, profile, scale_tril, q, draws, gradients)
    out[2].zero_()  # Monte Carlo differentiates the draws instead
    loss, divergence = q.new_empty(q.shape[1]), q.new_empty(2, q.shape[1])
    counts, mask, ptr, background = contiguous(counts, mask, ptr, background)
    profile, scale_tril, grid, q, prior, draws = contiguous(profile, scale_tril, grid, q, prior, draws)
    with torch.cuda.device(counts.device):
        launch(
            counts, mask, ptr, background, kind, profile, scale_tril, grid, q, prior, draws, nodes, gradients,
            loss, divergence, *out,
        )  # fmt: skip
    return loss, divergence, *out


for _device in ("CPU", "CUDA"):
    _library.impl("standard_gamma", _standard_gamma, _device)
    _library.impl("standard_gamma_backward", _standard_gamma_backward, _device)
_library.impl("poisson_gamma_elbo", _elbo, "CPU")
_library.impl("poisson_gamma_elbo", _elbo_on_gpu, "CUDA")


def _setup_elbo(ctx, inputs, output):
    _, _, by_profile, by_scale, by_q, by_draws, divergence_by = output
    ctx.set_materialize_grads(False)  # no zeros for the outputs that only carry gradients
    ctx.mark_non_differentiable(by_profile, by_scale, by_q, by_draws, divergence_by)
    ctx.kind, ctx.monte_carlo = inputs[4], inputs[10] is not None
    latent, basis = inputs[5:7] if ctx.kind == _LOW_RANK else (None, None)
    ctx.save_for_backward(inputs[2], latent, basis, by_profile, by_scale, by_q, by_draws, divergence_by)


def _backward_elbo(ctx, by_loss, by_divergence, *_):
    _refuse_double_backward()
    ptr, latent, basis, by_profile, by_scale, by_q, by_draws, divergence_by = ctx.saved_tensors
    n = by_q.shape[1]
    by_loss = by_q.new_zeros(n) if by_loss is None else by_loss
    up_i, up_b = by_q.new_zeros(2, n) if by_divergence is None else by_divergence
    weight = by_loss.to(by_profile.dtype)
    if by_profile.ndim == 1:
        per_value = torch.repeat_interleave(weight, ptr.diff(), output_size=by_profile.shape[0])
    else:
        per_value = weight[:, None]
    if torch.compiler.is_compiling():
        grad_profile = by_profile * per_value
    else:
        grad_profile = torch.mul(by_profile, per_value, out=empty_pixels(by_profile))
    grad_q = by_q * by_loss + torch.cat([divergence_by[0:2] * up_i, divergence_by[4:6] * up_b])
    grad_prior = torch.cat([divergence_by[2:4] * up_i, divergence_by[6:8] * up_b])
    grad_scale = by_scale * weight[:, None, None] if ctx.kind == _GAUSSIAN else None
    grad_grid = None
    if ctx.kind == _LOW_RANK:
        by_logits = grad_profile
        grad_profile, grad_scale, grad_grid = by_logits @ basis.T, latent.T @ by_logits, by_logits.sum(0)
    grad_draws = by_draws * by_loss[:, None] if ctx.monte_carlo else None
    return None, None, None, None, None, grad_profile, grad_scale, grad_grid, grad_q, grad_prior, grad_draws, None, None


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("poisson_gamma_elbo has no gradient of its gradient: call backward without create_graph")


torch.library.register_autograd("xtalfast::standard_gamma", _backward_draws, setup_context=_setup_draws, lib=_library)
torch.library.register_autograd("xtalfast::poisson_gamma_elbo", _backward_elbo, setup_context=_setup_elbo, lib=_library)


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

    q = torch.stack([*gamma_rows(q_i, n, counts), *gamma_rows(q_bg, n, counts)])
    prior = torch.stack([*gamma_rows(prior_i, n, counts), *gamma_rows(prior_bg, n, counts)])
    draws = monte_carlo_draws(q, samples, _seed(seed, counts.device)) if estimator == "mc" else None
    n_nodes = 0 if nodes == "auto" else nodes
    dtype = torch.promote_types(profile_dtype(profile), torch.float32)
    if has_kernel(counts.device):
        loss, divergence = _fused(counts, mask, profile, ptr, background, q, prior, draws, n_nodes)
    else:
        loss = _in_runs(counts, mask, profile, ptr, background, q, draws, n_nodes)
        divergence = divergences(q, prior)
    return _combine(loss, divergence, kappa_i, kappa_bg).to(dtype)


def _fused(counts, mask, profile, ptr, background, q, prior, draws, nodes) -> tuple[Tensor, Tensor]:
    """Loss [N] and divergences [2, N] by the compiled kernel."""
    kind = _KINDS.get(type(profile), _VALUES)
    tensors = [profile] if isinstance(profile, Tensor) else list(vars(profile).values())
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    values, scale_tril, grid = ([t.to(dtype) for t in tensors] + [None, None])[:3]
    learned = [t for t in (values, scale_tril, grid, q, prior, draws) if t is not None]
    gradients = torch.is_grad_enabled() and any(t.requires_grad for t in learned)
    shape = None if background is None else background.to(dtype)
    loss, divergence, *_ = torch.ops.xtalfast.poisson_gamma_elbo(
        counts, mask, ptr, shape, kind, values, scale_tril, grid, q, prior, draws, nodes, gradients
    )
    return loss, divergence


def _in_runs(counts, mask, profile, ptr, background, q, draws, nodes) -> Tensor:
    """Loss [N] by the reference, in runs of reflections that bound its memory."""
    width = nodes or _MOST_NODES if draws is None else draws.shape[2]
    pieces: list[Tensor] = []
    for rows, chunk in box_chunks(counts, mask, profile, ptr, background, q.shape[1], _REFERENCE_PIXELS // width):

        def piece(rows: slice = rows, chunk: Chunk = chunk) -> Tensor:
            return expected_loss(unpack(*chunk), q[:, rows], nodes, None if draws is None else draws[:, rows])

        # recomputed in the backward pass, so that no array of pixels x nodes outlives its run
        pieces.append(checkpoint(piece, use_reentrant=False) if torch.is_grad_enabled() else piece())
    return torch.cat(pieces)
