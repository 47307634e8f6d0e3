"""Likelihood-only intensity of a shoebox with a known profile: what scaling should see, free to be negative.

Counts y_j have mean I p_j + B b_j and, at a reference (I_ref, B_ref), variance v_j = max(I_ref, 0) p_j + B_ref b_j. The
weighted normal equations

    [sum p p / v   sum p b / v] [I]   [sum p y / v]
    [sum p b / v   sum b b / v] [B] = [sum b y / v]

give an estimate that is linear in the counts: unbiased for every true I, with the inverse matrix as its covariance when
the reference is the truth. Weights at the estimate itself would be correlated with its error and bias merged means.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from xtalfast import _native
from xtalfast.ops._boxes import (
    Boxes,
    KernelBoxes,
    box_chunks,
    check_boxes,
    check_photons,
    check_rows,
    contiguous,
    has_kernel,
    pair_rows,
    per_reflection,
    unpack,
)
from xtalfast.ops._share import first_share, most_likely_share
from xtalfast.ops.intensity_posterior import intensity_posterior
from xtalfast.ops.profiles import Profile, materialise

Method = Literal["linear", "ml"]

_MIN_BACKGROUND = 1e-6  # photons per pixel: keeps v > 0 where the profile is 0 and no background was seen
# 1 - (cosine between profile and background)^2 below which the two cannot be told apart
_SINGULAR = {torch.float64: 1e-12, torch.float32: 1e-6}
_ML_TOLERANCE = 1e-4  # sd from the maximum at the last but one step


@dataclass(frozen=True)
class ProfileFit:
    """Fit of N reflections, [N] each; float64 but for `iterations` (int64) and `converged` (bool).

    `correlation` is Pearson's between the counts and the fitted rate over the used pixels (0 where either is constant).
    Not `converged`: the box does not determine I and B (`var_i`, `var_bg` infinite, `i`, `bg` 0), or the search stopped
    early.
    """

    i: Tensor
    var_i: Tensor
    bg: Tensor
    var_bg: Tensor
    cov_i_bg: Tensor
    correlation: Tensor
    iterations: Tensor
    converged: Tensor


@dataclass(frozen=True)
class _Normal:
    """Weighted normal equations of every box, float64 [N]."""

    pp: Tensor
    pb: Tensor
    bb: Tensor
    py: Tensor
    by: Tensor
    singular: float

    @classmethod
    def at(cls, boxes: Boxes, i: Tensor, b: Tensor) -> _Normal:
        dtype = boxes.profile.dtype
        rate = i.to(dtype)[boxes.row] * boxes.profile + b.to(dtype)[boxes.row] * boxes.background
        weight = torch.where(boxes.used, 1 / torch.clamp(rate, min=torch.finfo(dtype).tiny ** 0.5), 0.0)
        wp, wb = weight * boxes.profile, weight * boxes.background
        products = (
            wp * boxes.profile,
            wp * boxes.background,
            wb * boxes.background,
            wp * boxes.counts,
            wb * boxes.counts,
        )
        pp, pb, bb, py, by = (boxes.total(t).to(torch.float64) for t in products)
        return cls(pp, pb, bb, py, by, _SINGULAR[dtype])

    @property
    def determinant(self) -> Tensor:
        return self.pp * self.bb - self.pb**2

    @property
    def solvable(self) -> Tensor:
        return self.determinant > self.singular * self.pp * self.bb


def _correlation(boxes: Boxes, i: Tensor, b: Tensor) -> Tensor:
    dtype = boxes.profile.dtype
    model = i.to(dtype)[boxes.row] * boxes.profile + b.to(dtype)[boxes.row] * boxes.background
    n = torch.clamp(boxes.total(boxes.used.to(dtype)), min=1)
    centred = []
    for values in (model, boxes.counts):
        mean = boxes.total(torch.where(boxes.used, values, 0.0)) / n
        centred.append(torch.where(boxes.used, values - mean[boxes.row], 0.0))
    cross, model_2, counts_2 = (
        boxes.total(u * v).to(torch.float64)
        for u, v in ((centred[0], centred[1]), (centred[0], centred[0]), (centred[1], centred[1]))
    )
    norm = torch.sqrt(model_2 * counts_2)
    return torch.where(norm > 0, cross / torch.where(norm > 0, norm, 1.0), 0.0)


def _covariance(normal: _Normal) -> tuple[Tensor, Tensor, Tensor]:
    solvable = normal.solvable
    inverse = 1 / torch.where(solvable, normal.determinant, 1.0)
    var_i, var_b = (torch.where(solvable, t * inverse, torch.inf) for t in (normal.bb, normal.pp))
    return var_i, var_b, torch.where(solvable, -normal.pb * inverse, 0.0)


def _linear(boxes: Boxes, i_ref: Tensor, b_ref: Tensor) -> ProfileFit:
    normal = _Normal.at(boxes, torch.clamp(i_ref, min=0.0), torch.clamp(b_ref, min=_MIN_BACKGROUND))
    solvable = normal.solvable
    var_i, var_b, cov = _covariance(normal)
    inverse = 1 / torch.where(solvable, normal.determinant, 1.0)
    i = torch.where(solvable, (normal.bb * normal.py - normal.pb * normal.by) * inverse, 0.0)
    b = torch.where(solvable, (normal.pp * normal.by - normal.pb * normal.py) * inverse, 0.0)
    ones = torch.ones_like(i, dtype=torch.int64)
    return ProfileFit(i, var_i, b, var_b, cov, _correlation(boxes, i, b), ones, solvable)


def _maximum_likelihood(boxes: Boxes) -> ProfileFit:
    """Maximum over I, B >= 0: the rates sum to the counts there, so that only the share of the spot is searched."""
    p_total, b_total = (
        boxes.total(torch.where(boxes.used, t, 0.0)).to(torch.float64) for t in (boxes.profile, boxes.background)
    )
    lit = boxes.where(boxes.used & (boxes.counts > 0))
    dtype = lit.profile.dtype
    solvable = _Normal.at(boxes, torch.ones_like(p_total), torch.ones_like(p_total)).solvable
    p_total, b_total = torch.where(solvable, p_total, 1.0), torch.where(solvable, b_total, 1.0)
    at_one, at_zero = lit.profile / p_total.to(dtype)[lit.row], lit.background / b_total.to(dtype)[lit.row]
    zero = torch.zeros_like(p_total)
    start = first_share(boxes, zero, zero, p_total, b_total)
    share, iterations, converged = most_likely_share(lit, at_one, at_zero, zero, zero, start, _ML_TOLERANCE)
    total = torch.where(solvable, lit.total(lit.counts).to(torch.float64), 0.0)
    i, b = total * share / p_total, total * (1 - share) / b_total
    var_i, var_b, cov = _covariance(_Normal.at(boxes, i, torch.clamp(b, min=_MIN_BACKGROUND)))
    return ProfileFit(i, var_i, b, var_b, cov, _correlation(boxes, i, b), iterations, converged & solvable)


def _flat_reference(counts, mask, profile, ptr, background) -> tuple[Tensor, Tensor]:
    """Posterior means of I and B under a flat prior."""
    flat = intensity_posterior(counts, mask, profile, (1.0, 0.0), (1.0, 0.0), ptr=ptr, background=background)
    # a box that says nothing about I or B has an infinite mean: any reference will do, it is reported unsolvable
    return torch.nan_to_num(flat.mean_i, posinf=1.0), torch.nan_to_num(flat.mean_bg, posinf=1.0)


def profile_fit_reference(
    counts: Tensor,
    mask: Tensor | None,
    profile: Profile,
    *,
    ptr: Tensor | None = None,
    background: Tensor | None = None,
    at: tuple[Tensor | float, Tensor | float] | None = None,
    method: Method = "linear",
) -> ProfileFit:
    """The definition, in plain torch; arguments as in `profile_fit`."""
    boxes = unpack(counts, mask, profile, ptr, background)
    if method == "ml":
        return _maximum_likelihood(boxes)
    if at is None:
        at = _flat_reference(counts, mask, profile, ptr, background)
    i_ref, b_ref = (per_reflection(t, len(boxes), boxes.counts) for t in at)
    return _linear(boxes, i_ref, b_ref)


_library = torch.library.Library("xtalfast", "FRAGMENT")
_library.define(
    "profile_fit(Tensor counts, Tensor? mask, Tensor? ptr, Tensor? background, Tensor profile, Tensor at) -> "
    "(Tensor fit, Tensor solvable)"
)
_library.define(
    "profile_fit_ml(Tensor counts, Tensor? mask, Tensor? ptr, Tensor? background, Tensor profile) -> "
    "(Tensor fit, Tensor iterations, Tensor converged)"
)


@torch.library.register_fake("xtalfast::profile_fit", lib=_library)
def _(counts, mask, ptr, background, profile, at):
    return at.new_empty(6, at.shape[1]), at.new_empty(at.shape[1], dtype=torch.bool)


@torch.library.register_fake("xtalfast::profile_fit_ml", lib=_library)
def _(counts, mask, ptr, background, profile):
    n = counts.shape[0] if ptr is None else ptr.shape[0] - 1
    outputs = ((6, n), torch.float64), ((n,), torch.int64), ((n,), torch.bool)
    return tuple(profile.new_empty(shape, dtype=dtype) for shape, dtype in outputs)


def _run_kernel(counts, mask, ptr, background, profile, at):
    boxes = KernelBoxes(counts, mask, ptr, background, profile.dtype)
    n = boxes.arguments["n"]
    profile, at = contiguous(profile, at)
    fit = torch.empty(6, n, dtype=torch.float64)
    iterations, converged = torch.empty(n, dtype=torch.int64), torch.empty(n, dtype=torch.bool)
    _native.require("profile_fit on the CPU").profile_fit(
        boxes.arguments,
        {
            "profile": profile.data_ptr(),
            "at": 0 if at is None else at.data_ptr(),
            "tolerance": _ML_TOLERANCE,
            "least_background": _MIN_BACKGROUND,
            "fit": fit.data_ptr(),
            "iterations": iterations.data_ptr(),
            "converged": converged.data_ptr(),
        },
    )
    return fit, iterations, converged


def _profile_fit(counts, mask, ptr, background, profile, at):
    fit, _, solvable = _run_kernel(counts, mask, ptr, background, profile, at)
    return fit, solvable


def _profile_fit_ml(counts, mask, ptr, background, profile):
    return _run_kernel(counts, mask, ptr, background, profile, None)


def _profile_fit_on_gpu(counts, mask, ptr, background, profile, at):
    from xtalfast.kernels.profile_fit import profile_fit as launch

    fit, solvable = at.new_empty(6, at.shape[1]), at.new_empty(at.shape[1], dtype=torch.bool)
    with torch.cuda.device(counts.device):
        launch(*contiguous(counts, mask, ptr, background, profile, at), fit, solvable)
    return fit, solvable


def _profile_fit_ml_by_reference(counts, mask, ptr, background, profile):
    fit = _maximum_likelihood(unpack(counts, mask, profile, ptr, background))
    values = (fit.i, fit.var_i, fit.bg, fit.var_bg, fit.cov_i_bg, fit.correlation)
    return torch.stack(values), fit.iterations, fit.converged


_library.impl("profile_fit", _profile_fit, "CPU")
_library.impl("profile_fit", _profile_fit_on_gpu, "CUDA")
_library.impl("profile_fit_ml", _profile_fit_ml, "CPU")
_library.impl("profile_fit_ml", _profile_fit_ml_by_reference, "CUDA")


def _check_finite(at: tuple[Tensor | float, Tensor | float]) -> None:
    if torch.compiler.is_compiling():
        return
    for name, value in zip(("I_ref", "B_ref"), at):
        values = torch.as_tensor(value).reshape(-1)
        bad = values[~torch.isfinite(values)]
        if len(bad):
            raise ValueError(f"at must be finite, got {name} = {bad[0].item()}")


@torch.no_grad()
def profile_fit(
    counts: Tensor,
    mask: Tensor | None,
    profile: Profile,
    *,
    ptr: Tensor | None = None,
    background: Tensor | None = None,
    at: tuple[Tensor | float, Tensor | float] | None = None,
    method: Method = "linear",
) -> ProfileFit:
    """Fit intensity and background of every shoebox to its counts alone, without a prior.

    Args:
        counts: photons, [N, P] or ragged [M]; any integer or floating type.
        mask: pixels to use, like counts: bool, or DIALS bits (used = Valid and not Overlapped); None uses all.
        profile: spot shape that sums to 1 over the box, as for `poisson_gamma_elbo`.
        ptr: row offsets int64 [N + 1] when counts are ragged.
        background: shape of the background with mean 1 over the box, [P], [N, P] or [M]; None is flat.
        at: (I_ref, B_ref), [N] or numbers: where weights and variances are taken (B_ref at least 1e-6). None takes the
            posterior mean under a flat prior on I, B >= 0, never the estimate itself.
        method: "linear", one solve at the reference, I may be negative; or "ml", the maximum of the Poisson likelihood
            over I, B >= 0 with the inverse Fisher information there (`at` is not used).

    Returns:
        ProfileFit; `var_i` includes the uncertainty of the background. No gradient is recorded.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, device or range.

    Example:
        >>> counts, profile = torch.tensor([[1, 6, 1]]), torch.tensor([[0.2, 0.6, 0.2]])
        >>> fit = profile_fit(counts, None, profile, at=(10.0, 1.0))
        >>> round(float(fit.i + 3 * fit.bg), 4)  # the counts
        8.0
    """
    n = check_boxes(counts, mask, profile, ptr, background)
    if at is not None:
        check_rows(n, at=at)
        _check_finite(at)
    if method not in ("linear", "ml"):
        raise ValueError(f"method must be 'linear' or 'ml', got {method!r}")
    if method == "ml":
        check_photons(counts, mask)
    if has_kernel(counts.device) and (method == "linear" or counts.device.type == "cpu"):
        values = materialise(profile, ptr)
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        shape = None if background is None else background.to(values.dtype)
        if method == "ml":
            fit, iterations, converged = torch.ops.xtalfast.profile_fit_ml(counts, mask, ptr, shape, values)
        else:
            i_ref, b_ref = _flat_reference(counts, mask, profile, ptr, background) if at is None else at
            i_ref, b_ref = per_reflection(i_ref, n, counts), per_reflection(b_ref, n, counts)
            references = torch.stack([torch.clamp(i_ref, min=0.0), torch.clamp(b_ref, min=_MIN_BACKGROUND)])
            fit, converged = torch.ops.xtalfast.profile_fit(counts, mask, ptr, shape, values, references)
            iterations = torch.ones_like(converged, dtype=torch.int64)
        i, var_i, bg, var_bg, cov, correlation = fit
        return ProfileFit(i, var_i, bg, var_bg, cov, correlation, iterations, converged)
    pieces = [
        profile_fit_reference(
            *boxes[:3], ptr=boxes[3], background=boxes[4], at=None if at is None else pair_rows(at, rows), method=method
        )
        for rows, boxes in box_chunks(counts, mask, profile, ptr, background, n)
    ]
    return ProfileFit(*(torch.cat(column) for column in zip(*(vars(piece).values() for piece in pieces))))
