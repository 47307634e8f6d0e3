"""Gamma distributions as `(shape, rate)` pairs: parameters for a network's head, and the divergence between two."""

from __future__ import annotations

import math

import torch
from torch import Tensor

GammaPair = tuple[Tensor | float, Tensor | float]
TensorPair = tuple[Tensor, Tensor]


def gamma_from_log_mean_cv(log_mean: Tensor, log_cv: Tensor) -> tuple[Tensor, Tensor]:
    """Gamma with a given mean and coefficient of variation (sd / mean): shape = cv^-2, rate = shape / mean.

    Optimising in these coordinates reaches the right width for strong reflections, where (shape, rate) stalls.

    Args:
        log_mean: logarithm of the mean, any shape.
        log_cv: logarithm of sd / mean, the same shape.

    Returns:
        shape and rate, each of the shape of the input.

    Example:
        >>> shape, rate = gamma_from_log_mean_cv(torch.tensor([3.0]), torch.tensor([-1.0]))
        >>> bool(torch.allclose(shape / rate, torch.tensor([3.0]).exp()))
        True
    """
    return torch.exp(-2 * log_cv), torch.exp(-2 * log_cv - log_mean)


def excess_of_logarithm(x: Tensor) -> Tensor:
    """x - 1 - log(x) without cancellation at x = 1 (float64)."""
    delta = x - 1
    near = delta.abs() < 0.02
    small = torch.where(near, delta, 0.0)
    series = torch.zeros_like(x)
    for power in range(9, 1, -1):  # delta^2/2 - delta^3/3 + ..., by Horner; the rest is below 0.02^10
        series = small * series + (-1) ** power / power
    far = torch.where(near, 2.0, x)
    return torch.where(near, small * small * series, far - 1 - torch.log(far))


def binet(x: Tensor) -> Tensor:
    """Stirling's remainder of lgamma: lgamma(x) - (x - 1/2) log(x) + x - log(2 pi)/2 (float64)."""
    large = x > 12
    exact = torch.where(large, 12.0, x)
    asymptotic = torch.where(large, x, 12.0)
    inverse = 1 / asymptotic
    square = inverse * inverse
    series = inverse * (1 / 12 + square * (-1 / 360 + square * (1 / 1260 + square * (-1 / 1680 + square / 1188))))
    direct = torch.lgamma(exact) - (exact - 0.5) * torch.log(exact) + exact - 0.5 * math.log(2 * math.pi)
    return torch.where(large, series, direct)


def binet_derivative(x: Tensor) -> Tensor:
    """Derivative of `binet`: digamma(x) - log(x) + 1 / (2 x) (float64)."""
    large = x > 12
    exact = torch.where(large, 12.0, x)
    asymptotic = torch.where(large, x, 12.0)
    square = 1 / (asymptotic * asymptotic)
    series = -square * (1 / 12 + square * (-1 / 120 + square * (1 / 252 + square * (-1 / 240 + square / 132))))
    return torch.where(large, series, torch.digamma(exact) - torch.log(exact) + 0.5 / exact)


def gamma_kl(q: GammaPair, prior: GammaPair) -> Tensor:
    """Kullback-Leibler divergence KL(q || prior) of two Gamma distributions; shape 1 is the exponential.

    With q = (k, r), prior = (a, b) and Stirling's remainder mu, three terms that are never negative:

        KL = a g(k b / (a r)) + g(a / k) / 2 + [mu(a) - mu(k) - (a - k) mu'(k)],   g(x) = x - 1 - log x

    so nothing cancels for large shapes. Computed in float64 and returned in the precision of q.

    Args:
        q: shape and rate of the first, [...] or numbers.
        prior: shape and rate of the second, broadcast against it.

    Returns:
        KL in nats, [...].
    """
    tensors = [t for t in (*q, *prior) if isinstance(t, Tensor)]
    dtype = torch.result_type(tensors[0], tensors[0]) if tensors else torch.float64
    device = tensors[0].device if tensors else None
    k, r, a, b = (torch.as_tensor(t, device=device).to(torch.float64) for t in (*q, *prior))
    bregman = binet(a) - binet(k) - (a - k) * binet_derivative(k)
    kl = a * excess_of_logarithm(k * b / (a * r)) + 0.5 * excess_of_logarithm(a / k) + bregman
    return kl.to(dtype)
