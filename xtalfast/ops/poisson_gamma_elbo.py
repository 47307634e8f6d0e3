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
from torch.nn import Parameter
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
    has_kernel,
    profile_dtype,
    unpack,
)
from xtalfast.ops._random import standard_gamma_reference
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


def nodes_needed(shape_i: Tensor, shape_bg: Tensor, photons: Tensor) -> Tensor:
    """Nodes that `nodes="auto"` takes for each reflection, int64 [N]: 96 for a shape below 1, else from 12 to 40.

    With a the smaller shape, K nodes err by at most 600 (1 + 2 / a) / a exp(-2.5 sqrt(K)) thousandths of a nat a
    photon, whatever the ratio of spot to background: so many are taken that the box errs by less than one thousandth.
    """
    smallest = torch.minimum(shape_i, shape_bg)
    root = torch.log(torch.clamp(600 * photons * (1 + 2 / smallest) / smallest, min=1.0)) / 2.5
    needed = torch.clamp(torch.ceil(root**2 / 4) * 4, 12, 40).to(torch.int64)
    return torch.where(smallest >= 1, needed, _MOST_NODES)


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
    photons = lit.total(lit.counts).to(torch.float64)
    needed = torch.full_like(lit.ptr[1:], nodes) if nodes else nodes_needed(q[0], q[2], photons)
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
    first_row: int = 0,
) -> Tensor:
    """The definition, in plain torch; arguments as in `poisson_gamma_elbo`. Memory grows with pixels x nodes."""
    boxes = unpack(counts, mask, profile, ptr, background)
    values = (*q_i, *q_bg, *prior_i, *prior_bg, kappa_i, kappa_bg)
    gammas = _gamma_table(len(boxes), counts.device, values)
    draws = None
    if estimator == "mc":
        draws = monte_carlo_draws(gammas[:4], samples, _seed(seed, counts.device), first_row)
    loss = expected_loss(boxes, gammas[:4], 0 if nodes == "auto" else nodes, draws)
    return _combine(loss, gammas).to(boxes.counts.dtype)


def _combine(loss: Tensor, gammas: Tensor) -> Tensor:
    divergence = divergences(gammas[:4], gammas[4:8])
    return loss + gammas[8] * divergence[0] + gammas[9] * divergence[1]


def _gamma_table(n: int, device: torch.device, values: tuple[Tensor | float, ...]) -> Tensor:
    """Shape and rate of q(I), q(B) and of their priors, and the two kappas, [10, N] float64."""
    return torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device).expand(n) for value in values])


def _seed(seed: int | None, device: torch.device) -> Tensor:
    if seed is None:  # drawn from torch's generator out here, where torch.compile and checkpointing see it
        return torch.randint(2**63 - 1, (), device=device)
    return torch.tensor(seed, device=device)


def monte_carlo_draws(q: Tensor, samples: int, seed: Tensor, first: int = 0) -> Tensor:
    """Draws of I and B, [2, N, samples], with implicit-reparameterisation gradients in the shapes."""
    standard = torch.ops.xtalfast.standard_gamma(q[0::2], samples, seed, first)
    return standard / q[1::2, :, None]


_library = torch.library.Library("xtalfast", "FRAGMENT")
_library.define("standard_gamma(Tensor shape, int samples, Tensor seed, int first) -> Tensor")
_library.define("standard_gamma_backward(Tensor shape, Tensor draws) -> Tensor")
# profile: pixel values or logits (kind 0, 1), the mean of a Gaussian (kind 2) with scale_tril and grid, or the latent
# of a low-rank profile (kind 3) with its basis and bias in the places of scale_tril and grid.
# gammas: [10, N], rows as in `_gamma_table`. With a seed: Monte Carlo. Returns the loss [N], and its gradients by box
# (empty unless asked for) by profile (kind 3: by its logits), scale_tril and gammas.
_library.define(
    "poisson_gamma_elbo(Tensor counts, Tensor? mask, Tensor? ptr, Tensor? background, int kind, Tensor profile, "
    "Tensor? scale_tril, Tensor? grid, Tensor gammas, Tensor? seed, int samples, int first_row, int nodes, "
    "bool gradients) -> (Tensor loss, Tensor by_profile, Tensor by_scale, Tensor by_gammas)"
)


@torch.library.register_fake("xtalfast::standard_gamma", lib=_library)
def _(shape, samples, seed, first):
    return shape.new_empty((*shape.shape, samples))


@torch.library.register_fake("xtalfast::standard_gamma_backward", lib=_library)
def _(shape, draws):
    return torch.empty_like(draws)


def _standard_gamma(shape, samples, seed, first):
    if _native.C is None:
        return standard_gamma_reference(shape, samples, seed, first)
    shape = shape.contiguous()
    streams, n = shape.shape
    draws = shape.new_empty(streams, n, samples)
    _native.C.standard_gamma(
        shape.data_ptr(), streams, n, samples, first, int(seed), draws.data_ptr(), torch.get_num_threads()
    )
    return draws


def _standard_gamma_on_gpu(shape, samples, seed, first):
    from xtalfast.kernels.poisson_gamma_elbo import standard_gamma as launch

    draws = shape.new_empty((*shape.shape, samples))
    with torch.cuda.device(shape.device):
        launch(shape.contiguous(), seed, first, draws)
    return draws


def _standard_gamma_backward(shape, draws):
    return torch._standard_gamma_grad(shape[..., None].expand_as(draws), draws)


def _setup_draws(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output)


def _backward_draws(ctx, grad):
    _refuse_double_backward()
    return (grad * torch.ops.xtalfast.standard_gamma_backward(*ctx.saved_tensors)).sum(-1), None, None, None


@torch.library.register_fake("xtalfast::poisson_gamma_elbo", lib=_library)
def _(
    counts, mask, ptr, background, kind, profile, scale_tril, grid, gammas, seed, samples, first_row, nodes, gradients
):
    return profile.new_empty(gammas.shape[1]), *_gradients_like(kind, profile, scale_tril, gammas, gradients)


def _gradients_like(kind, profile, scale_tril, gammas, gradients):
    """Uninitialised gradients; empty where there is nothing to differentiate."""
    by_profile, by_scale = profile.new_empty(0), profile.new_empty(0)
    if gradients and kind == _LOW_RANK:
        by_profile = profile.new_empty(profile.shape[0], scale_tril.shape[1])
    elif gradients:
        by_profile = torch.empty_like(profile, memory_format=torch.contiguous_format)
    if gradients and kind == _GAUSSIAN:
        by_scale = torch.empty_like(scale_tril, memory_format=torch.contiguous_format)
    return by_profile, by_scale, gammas.new_empty(10, gammas.shape[1] if gradients else 0)


def _draws_and_slopes(gammas, seed, samples, first_row, gradients):
    """Standard draws [2, N, S] and their derivatives by the shape; None for the quadrature, or what is not wanted."""
    if seed is None:
        return None, None
    shapes = gammas[0:4:2]
    sampler = _standard_gamma_on_gpu if gammas.is_cuda else _standard_gamma
    draws = sampler(shapes, samples, seed, first_row)
    return draws, _standard_gamma_backward(shapes, draws).contiguous() if gradients else None


def _elbo(
    counts, mask, ptr, background, kind, profile, scale_tril, grid, gammas, seed, samples, first_row, nodes, gradients
):
    kernel = _native.require("poisson_gamma_elbo on the CPU")
    if kind == _LOW_RANK:  # a matrix product of the whole batch
        kind, profile, scale_tril, grid = _LOGITS, torch.addmm(grid, profile, scale_tril), None, None
    boxes = KernelBoxes(counts, mask, ptr, background, profile.dtype)
    gammas, profile, scale_tril, grid = contiguous(gammas, profile, scale_tril, grid)
    by_profile = empty_pixels(profile) if gradients else profile.new_empty(0)
    by_scale = torch.empty_like(scale_tril) if gradients and kind == _GAUSSIAN else profile.new_empty(0)
    by_gammas = gammas.new_empty(10, gammas.shape[1] if gradients else 0)
    loss = gammas.new_empty(gammas.shape[1])
    draws, slopes = _draws_and_slopes(gammas, seed, samples, first_row, gradients)
    tensors = {
        "profile": profile,
        "mean": profile,
        "scale_tril": scale_tril,
        "grid": grid,
        "gammas": gammas,
        "draws": draws,
        "slopes": slopes,
        "loss": loss,
        "grad_profile": by_profile,
        "grad_mean": by_profile,
        "grad_scale": by_scale,
        "grad_gammas": by_gammas,
    }
    arguments = {name: 0 if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()}
    kernel.poisson_gamma_elbo(
        boxes.arguments,
        arguments
        | {"gradients": gradients, "profile_kind": kind, "nodes": nodes, "samples": 0 if draws is None else samples},
    )
    return loss.to(profile.dtype), by_profile, by_scale, by_gammas


def _elbo_on_gpu(
    counts, mask, ptr, background, kind, profile, scale_tril, grid, gammas, seed, samples, first_row, nodes, gradients
):
    from xtalfast.kernels.poisson_gamma_elbo import poisson_gamma_elbo as launch

    out = _gradients_like(kind, profile, scale_tril, gammas, gradients)
    loss = gammas.new_empty(gammas.shape[1])
    counts, mask, ptr, background = contiguous(counts, mask, ptr, background)
    profile, scale_tril, grid, gammas = contiguous(profile, scale_tril, grid, gammas)
    draws, slopes = _draws_and_slopes(gammas, seed, samples, first_row, gradients)
    with torch.cuda.device(counts.device):
        launch(
            counts, mask, ptr, background, kind, profile, scale_tril, grid, gammas, draws, slopes, nodes, gradients,
            loss, *out,
        )  # fmt: skip
    return loss.to(profile.dtype), *out


_library.impl("standard_gamma", _standard_gamma, "CPU")
_library.impl("standard_gamma", _standard_gamma_on_gpu, "CUDA")
_library.impl("poisson_gamma_elbo", _elbo, "CPU")
_library.impl("poisson_gamma_elbo", _elbo_on_gpu, "CUDA")
for _device in ("CPU", "CUDA"):
    _library.impl("standard_gamma_backward", _standard_gamma_backward, _device)


def _setup_elbo(ctx, inputs, output):
    _, by_profile, by_scale, by_gammas = output
    ctx.set_materialize_grads(False)  # no zeros for the outputs that only carry gradients
    ctx.mark_non_differentiable(by_profile, by_scale, by_gammas)
    ctx.kind = inputs[4]
    latent, basis = inputs[5:7] if ctx.kind == _LOW_RANK else (None, None)
    ctx.save_for_backward(inputs[2], latent, basis, by_profile, by_scale, by_gammas)


def _backward_elbo(ctx, by_loss, *_):
    _refuse_double_backward()
    if by_loss is None:
        return (None,) * 14
    ptr, latent, basis, by_profile, by_scale, by_gammas = ctx.saved_tensors
    grads = *_profile_gradients(ctx.kind, latent, basis, by_profile, by_scale, by_loss, ptr), by_gammas * by_loss
    return *[None] * 5, *grads, *[None] * 5


def _profile_gradients(kind, latent, basis, by_profile, by_scale, by_loss, ptr):
    """Gradients by profile, scale_tril and grid, or by latent, basis and bias."""
    grad_profile = _weighted(by_profile, by_loss, ptr)
    grad_scale = by_scale * by_loss[:, None, None] if kind == _GAUSSIAN else None
    if kind == _LOW_RANK:
        return grad_profile @ basis.T, latent.T @ grad_profile, grad_profile.sum(0)
    return grad_profile, grad_scale, None


def _weighted(by_profile: Tensor, by_loss: Tensor, ptr: Tensor | None) -> Tensor:
    """The gradients of every box times its weight: in place, or as they are, when no other backward pass will come.

    So one array of the size of the counts serves both passes, and is not even read again for the sum of the losses.
    """
    last = type(by_profile) is Tensor and not torch.compiler.is_compiling() and not _graph_is_kept()
    if last and by_loss.device.type == "cpu" and bool((by_loss == 1).all()):
        return by_profile
    if ptr is not None and by_profile.ndim == 1:
        weight = torch.repeat_interleave(by_loss, ptr.diff(), output_size=by_profile.shape[0])
    else:
        weight = by_loss[:, None]
    return by_profile.mul_(weight) if last else by_profile * weight


# what torch's own compiler asks before it reuses a saved tensor; without it every pass takes a copy
_graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("poisson_gamma_elbo has no gradient of its gradient: call backward without create_graph")


torch.library.register_autograd("xtalfast::standard_gamma", _backward_draws, setup_context=_setup_draws, lib=_library)
torch.library.register_autograd("xtalfast::poisson_gamma_elbo", _backward_elbo, setup_context=_setup_elbo, lib=_library)


_REAL = (torch.float32, torch.float64)


def _address(row: Tensor) -> tuple[int, bool, int]:
    """Address, whether double, and stride of a tensor [N] or of one value, which counts for all."""
    return row.data_ptr(), row.dtype == torch.float64, row.stride(0) if row.numel() > 1 else 0


class _EagerElbo(torch.autograd.Function):
    """The operator for plain CPU tensors, without the dispatcher and a graph of conversions: half of its overhead."""

    @staticmethod
    def forward(ctx, counts, mask, ptr, background, kind, options, gradients, profile, scale_tril, grid, *values):
        n = len(counts) if ptr is None else len(ptr) - 1
        gammas = torch.empty(10, n, dtype=torch.float64)
        rows = [value.double() if isinstance(value, Tensor) and value.dtype not in _REAL else value for value in values]
        _native.C.gamma_table([_address(row) if isinstance(row, Tensor) else row for row in rows], n, gammas.data_ptr())
        loss, by_profile, by_scale, by_gammas = _elbo(
            counts, mask, ptr, background, kind, profile, scale_tril, grid, gammas, *options, gradients
        )
        if gradients:
            ctx.kind = kind
            ctx.like = [(v.shape, v.dtype) if isinstance(v, Tensor) else None for v in values]
            latent, basis = (profile, scale_tril) if kind == _LOW_RANK else (None, None)
            ctx.save_for_backward(ptr, latent, basis, by_profile, by_scale, by_gammas)
        return loss

    @staticmethod
    def backward(ctx, by_loss):
        _refuse_double_backward()
        ptr, latent, basis, by_profile, by_scale, by_gammas = ctx.saved_tensors
        wanted = ctx.needs_input_grad[7:]
        grads = [None] * 3
        if any(wanted[:3]):
            grads = _profile_gradients(ctx.kind, latent, basis, by_profile, by_scale, by_loss, ptr)
        rows = (by_gammas * by_loss).unbind() if any(wanted[3:]) else ()
        for needed, like, row in zip(wanted[3:], ctx.like, rows):
            if not needed:
                grads = (*grads, None)
            else:
                shape, dtype = like
                grads = (*grads, (row if row.shape == shape else row.sum().reshape(shape)).to(dtype))
        return *[None] * 7, *grads, *[None] * (len(wanted) - len(grads))


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
    first_row: int = 0,
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
        nodes: quadrature nodes, or "auto": 12 to 40 by photons and the smaller of the two shapes, good to 1e-3 nats for
            shapes of 1 or more; 96 below, good to 1e-2 down to 0.01. 12 do for training.
        samples: Monte-Carlo draws a reflection.
        seed: of the draws; None takes one from torch's generator. Same seed, same bits, on one backend.
        first_row: number of the first reflection, for batches cut from a larger one: with the same seed the draws are
            those of the whole.

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
    if first_row < 0:
        raise ValueError(f"first_row must not be negative, got {first_row}")

    values = (*q_i, *q_bg, *prior_i, *prior_bg, kappa_i, kappa_bg)
    seeded = _seed(seed, counts.device) if estimator == "mc" else None
    n_nodes = 0 if nodes == "auto" else nodes
    if has_kernel(counts.device):
        return _fused(counts, mask, profile, ptr, background, n, values, (seeded, samples, first_row, n_nodes))
    gammas = _gamma_table(n, counts.device, values)
    draws = None if seeded is None else monte_carlo_draws(gammas[:4], samples, seeded, first_row)
    loss = _in_runs(counts, mask, profile, ptr, background, gammas[:4], draws, n_nodes)
    return _combine(loss, gammas).to(torch.promote_types(profile_dtype(profile), torch.float32))


def _fused(counts, mask, profile, ptr, background, n, values, options) -> Tensor:
    """Loss [N] by the compiled kernel."""
    kind = _KINDS.get(type(profile), _VALUES)
    tensors = [profile] if isinstance(profile, Tensor) else list(vars(profile).values())
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    parameters = ([t.to(dtype) for t in tensors] + [None, None])[:3]
    learned = [t for t in (*parameters, *values) if isinstance(t, Tensor)]
    gradients = torch.is_grad_enabled() and any(t.requires_grad for t in learned)
    shape = None if background is None else background.to(dtype)
    plain = counts.device.type == "cpu" and all(type(t) in (Tensor, Parameter) for t in learned)
    if plain and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
        return _EagerElbo.apply(counts, mask, ptr, shape, kind, options, gradients, *parameters, *values)
    gammas = _gamma_table(n, counts.device, values)
    return torch.ops.xtalfast.poisson_gamma_elbo(
        counts, mask, ptr, shape, kind, *parameters, gammas, *options, gradients
    )[0]


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
