"""The forms in which a spot profile can be given; each sums to 1 over the box, masked pixels included.

A profile is a plain tensor, or one of the three small classes below, which keep the parameters so that a fused kernel
need not hold logits in memory. `materialise` turns any of them into pixel values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SoftmaxProfile:
    """p = softmax(logits) over the pixels of each box.

    Args:
        logits: [N, P] for equal boxes, or [M] for ragged ones.
    """

    logits: Tensor


@dataclass(frozen=True)
class MVNProfile:
    """A Gaussian spot: p proportional to exp(-|L^-1 (x - mean)|^2 / 2) at the pixel centres x, normalised over the box.

    Args:
        mean: centre, [N, 3] in the order of `grid` (z, y, x), pixels.
        scale_tril: lower triangular L with positive diagonal, [N, 3, 3]; covariance L L^T, pixels.
        grid: pixel coordinates, [P, 3] for equal boxes, or [M, 3] for ragged ones.
    """

    mean: Tensor
    scale_tril: Tensor
    grid: Tensor


@dataclass(frozen=True)
class LowRankProfile:
    """p = softmax(latent @ basis + bias): a few numbers per reflection on patterns that all reflections share.

    Args:
        latent: [N, D].
        basis: [D, P].
        bias: [P].
    """

    latent: Tensor
    basis: Tensor
    bias: Tensor


Profile = Tensor | SoftmaxProfile | MVNProfile | LowRankProfile


def segment_sum(values: Tensor, ptr: Tensor) -> Tensor:
    """Sums of values [M, ...] over the rows of a ragged layout, ptr [N + 1] -> [N, ...]."""
    return torch.segment_reduce(values, "sum", offsets=ptr, axis=0, initial=0)


def _segment_softmax(logits: Tensor, ptr: Tensor) -> Tensor:
    row = torch.repeat_interleave(torch.arange(len(ptr) - 1, device=ptr.device), ptr.diff())
    top = torch.segment_reduce(logits.detach(), "max", offsets=ptr, axis=0, initial=float("-inf"))
    weight = torch.exp(logits - top[row])
    return weight / segment_sum(weight, ptr)[row]


def _gaussian_logits(offset: Tensor, scale_tril: Tensor) -> Tensor:
    """-|L^-1 offset|^2 / 2 for offsets [..., 3], by forward substitution."""
    l = scale_tril
    z0 = offset[..., 0] / l[..., 0, 0]
    z1 = (offset[..., 1] - l[..., 1, 0] * z0) / l[..., 1, 1]
    z2 = (offset[..., 2] - l[..., 2, 0] * z0 - l[..., 2, 1] * z1) / l[..., 2, 2]
    return -0.5 * (z0 * z0 + z1 * z1 + z2 * z2)


def materialise(profile: Profile, ptr: Tensor | None = None) -> Tensor:
    """Pixel values of a profile: [N, P], or [M] when `ptr` [N + 1] describes ragged boxes.

    Raises:
        ValueError: a low-rank profile for ragged boxes (its basis belongs to one box size).
    """
    if isinstance(profile, Tensor):
        return profile
    if isinstance(profile, SoftmaxProfile):
        return torch.softmax(profile.logits, -1) if ptr is None else _segment_softmax(profile.logits, ptr)
    if isinstance(profile, MVNProfile):
        if ptr is None:
            offset = profile.grid - profile.mean[:, None]
            return torch.softmax(_gaussian_logits(offset, profile.scale_tril[:, None]), -1)
        row = torch.repeat_interleave(torch.arange(len(ptr) - 1, device=ptr.device), ptr.diff())
        offset = profile.grid - profile.mean[row]
        return _segment_softmax(_gaussian_logits(offset, profile.scale_tril[row]), ptr)
    if ptr is not None:
        raise ValueError("a LowRankProfile belongs to boxes of one size: give counts as [N, P] without ptr")
    return torch.softmax(low_rank_logits(profile), -1)


def low_rank_logits(profile: LowRankProfile) -> Tensor:
    """latent @ basis + bias, [N, P]."""
    return torch.addmm(profile.bias, profile.latent, profile.basis)
