"""How much a phase is worth: probability distributions of phases, their figures of merit, and their combination.

A distribution exp(X cos(phi - phi0)) is carried as the complex number X exp(i phi0), so that combining two independent
sources is adding two numbers (Hendrickson & Lattman 1970, Acta Cryst. B26, 136; the terms A and B of theirs).
"""

from __future__ import annotations

import torch
from torch import Tensor

# A correlation of amplitudes above this is not believed: the modified density was made from the same amplitudes.
MAX_SQUARED_SIGMA_A = 0.98
# Beyond this figure of merit a starting phase would never move.
MAX_FOM = 0.999


def figure_of_merit(concentration: Tensor, centric: Tensor) -> Tensor:
    """<cos(phi - phi0)> of exp(X cos(phi - phi0)): I1(X) / I0(X), tanh(X) for centric reflections."""
    ratio = torch.special.i1e(concentration) / torch.special.i0e(concentration)
    return torch.where(centric, torch.tanh(concentration), ratio)


def concentration(fom: Tensor, centric: Tensor) -> Tensor:
    """X that has this figure of merit, by bisection."""
    wanted = fom.clamp(0, MAX_FOM)
    low, high = torch.zeros_like(wanted), torch.full_like(wanted, 1000.0)
    for _ in range(40):
        middle = (low + high) / 2
        below = figure_of_merit(middle, centric) < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def shell_numbers(s2: Tensor, used: Tensor, per_shell: int = 100, most: int = 20) -> Tensor:
    """Shell of every reflection by 1/d^2, about equal counts of `used` ones in each, int64; unused ones get one too."""
    sorted_s2 = s2[used].sort().values
    n_shells = max(1, min(most, len(sorted_s2) // per_shell))
    edges = (
        sorted_s2[[len(sorted_s2) * i // n_shells for i in range(1, n_shells)]] if len(sorted_s2) else s2.new_zeros(0)
    )
    return torch.bucketize(s2, edges, right=True)


def _shell_means(values: Tensor, weights: Tensor, shells: Tensor) -> Tensor:
    """Weighted means of [B, ...] in each shell [...], put back in the place of every reflection."""
    n_shells = int(shells.max()) + 1
    index = shells.flatten()
    flat = (values * weights).flatten(1)
    sums = flat.new_zeros((len(flat), n_shells)).index_add(1, index, flat)
    counts = flat.new_zeros(n_shells).index_add(0, index, weights.flatten().to(flat.dtype)).clamp_min(1e-30)
    return (sums / counts)[:, index].view(values.shape)


def phase_concentration(
    observed: Tensor, calculated: Tensor, weights: Tensor, shells: Tensor, centric: Tensor
) -> Tensor:
    """X = 2 sigmaA Eo Ec / (1 - sigmaA^2), half of it for centric reflections, of amplitudes [B, ...].

    sigmaA^2 is the correlation of the intensities in a shell.

    Args:
        observed: measured amplitudes [...].
        calculated: those of independent information, [B, ...], any scale.
        weights: how often a reflection counts, 0 for those not measured, [...].
        shells: its shell, [...].
        centric: [...].

    Ref: Srinivasan (1966) Acta Cryst. 20, 143; Read (1986) Acta Cryst. A42, 140.
    """
    eo2, ec2 = (
        square / _shell_means(square, weights, shells).clamp_min(1e-30)
        for square in (observed.square().expand_as(calculated), calculated.square())
    )
    do, dc = eo2 - 1, ec2 - 1
    variances = _shell_means(do.square(), weights, shells) * _shell_means(dc.square(), weights, shells)
    correlation = _shell_means(do * dc, weights, shells) * variances.clamp_min(1e-12).rsqrt()
    squared = correlation.clamp(1e-6, MAX_SQUARED_SIGMA_A)
    acentric = 2 * (squared * eo2 * ec2).clamp_min(1e-20).sqrt() / (1 - squared)
    return torch.where(centric, acentric / 2, acentric)
