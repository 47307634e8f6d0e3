"""The accuracy rule of every op, in one place."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_twin_error(result: Tensor, twin: Tensor, exact: Tensor, terms: Tensor | float) -> None:
    """Assert that `result` is as accurate as plain torch of the same precision.

    The largest error may be twice that of the twin, plus eps x the largest sum of |terms| that went into one element:
    what rounding alone can do when the twin happens to be exact.

    Args:
        result: what the op returned, any floating type.
        twin: the reference computed in the precision of `result`.
        exact: the reference in float64.
        terms: sums of the absolute values of the terms, like `result`, or one number.

    Raises:
        AssertionError: the error is larger, or `result` is not finite where `exact` is.
    """
    assert result.shape == exact.shape == twin.shape, f"{list(result.shape)} {list(twin.shape)} {list(exact.shape)}"
    finite = torch.isfinite(exact)
    assert bool(torch.isfinite(result[finite]).all()), "result is not finite where the exact value is"
    assert bool((result.double() == exact)[~finite].all()), "result differs from an infinite exact value"
    if not bool(finite.any()):
        return

    def largest(values: Tensor) -> float:
        return float(values.abs().max())

    error = largest(result.double()[finite] - exact[finite])
    twin_error = largest(twin.double()[finite] - exact[finite])
    size = largest(torch.as_tensor(terms, dtype=torch.float64))
    bound = 2 * twin_error + torch.finfo(result.dtype).eps * size
    assert error <= bound, f"error {error:.3g} above {bound:.3g} = 2 x twin {twin_error:.3g} + eps x {size:.3g}"
