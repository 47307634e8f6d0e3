"""Gauss-Legendre quadrature as constants that torch.compile may keep."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def _constant_to_compilers(function):
    """What torch.compiler.assume_constant_result does, without its import of Dynamo, which takes a second."""
    function._dynamo_marked_constant = True
    return function


@_constant_to_compilers
def _rule(nodes: int) -> tuple[list[float], list[float]]:
    points, weights = np.polynomial.legendre.leggauss(nodes)
    return points.tolist(), weights.tolist()


@_constant_to_compilers
def _interpolation_rows(coarse: int, fine: int) -> list[list[float]]:
    (x, w), (y, _) = (np.polynomial.legendre.leggauss(n) for n in (coarse, fine))
    barycentric = (-1.0) ** np.arange(coarse) * np.sqrt((1 - x**2) * w)
    terms = barycentric[:, None] / (y - x[:, None])
    return (terms / terms.sum(0)).tolist()


def gauss_legendre(nodes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Points on (-1, 1) and weights, [nodes] float64."""
    points, weights = (torch.tensor(t, dtype=torch.float64, device=device) for t in _rule(nodes))
    return points, weights


def interpolation(coarse: int, fine: int, device: torch.device) -> Tensor:
    """Matrix [coarse, fine] of the polynomial interpolation from Gauss-Legendre nodes to finer ones (barycentric)."""
    return torch.tensor(_interpolation_rows(coarse, fine), dtype=torch.float64, device=device)
