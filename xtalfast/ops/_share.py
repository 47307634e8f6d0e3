"""The share of the spot in the photons of a box: the one variable to which intensity and background reduce.

With P = sum p and Q = sum b over the used pixels (plus the rates of Gamma priors), I = S X / P and B = S (1 - X) / Q,
the Poisson likelihood of a box separates into S^(sum y) e^-S and a function of the share X alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xtalfast.ops._boxes import SMALLEST_RATE, Boxes

_STEPS = 80
_FARTHEST = 36.0  # |logit X| at which the search ends: 1 - X is still above 0 in double precision


def share_rate(share: Tensor, at_one: Tensor, at_zero: Tensor) -> Tensor:
    """X at_one + (1 - X) at_zero per pixel, kept above 0 so that p = 0 with y > 0 stays finite."""
    return torch.clamp(share * at_one + (1 - share) * at_zero, min=SMALLEST_RATE)


def first_share(boxes: Boxes, a: Tensor, c: Tensor, p_total: Tensor, q_total: Tensor) -> Tensor:
    """Where the search for the share starts: unweighted least squares of the counts on profile and background.

    It is kept off 0 and 1 by as much as half a photon says; 1/2 where least squares leaves it open.
    """

    def total(values: Tensor) -> Tensor:
        return boxes.total(torch.where(boxes.used, values, 0.0)).to(torch.float64)

    p, b, y = boxes.profile, boxes.background, boxes.counts
    pp, pb, bb, py, by = total(p * p), total(p * b), total(b * b), total(p * y), total(b * y)
    spot, rest = p_total * (bb * py - pb * by), q_total * (pp * by - pb * py)
    n = a + c + total(y) + 1
    low, high = (a + 0.5) / n, 1 - (c + 0.5) / n
    at_end = torch.where(rest > 0, low, torch.where(spot > 0, high, 0.5))
    share = torch.where((spot > 0) & (rest > 0), spot / (spot + rest), at_end)
    return torch.minimum(torch.maximum(share, low), high)


def most_likely_share(
    lit: Boxes, at_one: Tensor, at_zero: Tensor, a: Tensor, c: Tensor, start: Tensor, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum over X of the concave a log X + c log(1 - X) + sum_j y_j log(X at_one_j + (1 - X) at_zero_j).

    Newton in t = logit X, kept inside the bracket that the sign of the slope gives, halving it where it steps outside.

    Args:
        lit: the pixels with counts.
        at_one, at_zero: rates at X = 1 and X = 0, [M].
        a, c: float64 [N], not negative; where both are 0 the maximum may lie at X = 0 or 1, which is then returned.
        start: X at which the search starts, inside (0, 1), float64 [N].
        tolerance: distance from the maximum, in units of the width of its peak.

    Returns:
        X float64 [N], iterations int64 [N], and whether the tolerance was reached, bool [N].
    """

    def derivatives(x: Tensor) -> tuple[Tensor, Tensor]:
        ratio = (at_one - at_zero) / share_rate(x.to(at_one.dtype)[lit.row], at_one, at_zero)
        weighted = lit.counts * ratio
        return lit.total(weighted).to(torch.float64), lit.total(weighted * ratio).to(torch.float64)

    free = (a == 0) & (c == 0)
    at_low = free & (derivatives(torch.zeros_like(a))[0] <= 0)
    at_high = free & (derivatives(torch.ones_like(a))[0] >= 0) & ~at_low
    x = start
    low, high = torch.full_like(x, -_FARTHEST), torch.full_like(x, _FARTHEST)
    done = at_low | at_high
    iterations = torch.zeros_like(x, dtype=torch.int64)
    for _ in range(_STEPS):
        if bool(done.all()):
            break
        slope, curvature = derivatives(x)
        slope = slope + a / x - c / (1 - x)
        curvature = curvature + a / x**2 + c / (1 - x) ** 2
        t = torch.logit(x)
        low, high = torch.where(slope > 0, t, low), torch.where(slope > 0, high, t)
        newton = t + slope / (curvature * x * (1 - x) - (1 - 2 * x) * slope)
        moved = torch.sigmoid(torch.where((newton > low) & (newton < high), newton, 0.5 * (low + high)))
        iterations = iterations + (~done).to(torch.int64)
        x = torch.where(done, x, moved)
        done = done | (slope.abs() <= tolerance * curvature.sqrt())
    return torch.where(at_low, 0.0, torch.where(at_high, 1.0, x)), iterations, done
