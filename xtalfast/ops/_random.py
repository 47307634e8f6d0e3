"""Counter-based draws of Gamma variables: the value of every draw follows from (seed, row, draw) alone.

So a draw does not depend on how a batch is cut, on the number of threads or on the order of the work. Attempt a of draw
k of row r in stream s takes the four words of Philox4x32-10 with key = seed and counter = (k, r mod 2^32, r div 2^32,
a + 2^16 s): two make a normal variate (Box and Muller), the third decides on acceptance, the fourth carries a shape
below 1 from that above.

Ref: Salmon et al., SC'11 (2011), "Parallel random numbers: as easy as 1, 2, 3"; Marsaglia & Tsang, ACM TOMS 26 (2000)
363; gradients: Figurnov et al., NeurIPS 2018, "Implicit reparameterization gradients".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ATTEMPTS = 16  # each fails with a probability below 0.05
_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
SMALLEST = torch.finfo(torch.float64).tiny


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of counters, each word int64 in 0..2^32 - 1, under the key `seed` (int64)."""

    def multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:  # high and low word of a product of words
        high = ((a >> 16) * b + ((a & 0xFFFF) * b >> 16)) >> 16
        return high & _LOW, (a * b) & _LOW

    c = counter
    key = [seed & _LOW, (seed >> 32) & _LOW]
    for _ in range(_ROUNDS):
        high_0, low_0 = multiply(c[0], _MULTIPLIERS[0])
        high_2, low_2 = multiply(c[2], _MULTIPLIERS[1])
        c = (high_2 ^ c[1] ^ key[0], low_2, high_0 ^ c[3] ^ key[1], low_0)
        key = [(k + w) & _LOW for k, w in zip(key, _WEYL)]
    return c


def standard_gamma_reference(shape: Tensor, samples: int, seed: Tensor, first: int = 0) -> Tensor:
    """Draws of Gamma(shape, 1).

    Args:
        shape: [streams, R] float64.
        samples: draws of each.
        seed: int64, one number.
        first: number of the first row.

    Returns:
        [streams, R, samples] float64, above 0.
    """
    numbers = (torch.arange(size, device=shape.device) for size in (*shape.shape, samples))
    stream, row, draw = torch.meshgrid(*numbers, indexing="ij")
    row = row + first
    a = shape[..., None]
    low = a < 1  # Gamma(a) = Gamma(a + 1) U^(1/a)
    d = torch.where(low, a + 1, a) - 1 / 3
    c = 1 / torch.sqrt(9 * d)
    value = d.expand(draw.shape).clone()  # what is left after the last attempt
    boost = torch.ones_like(value)
    done = torch.zeros_like(value, dtype=torch.bool)
    for attempt in range(ATTEMPTS):
        words = philox((draw, row & _LOW, row >> 32, attempt + (stream << 16)), seed)
        u = [(word.to(torch.float64) + 0.5) * 2.0**-32 for word in words]
        if attempt == 0:
            boost = torch.exp(torch.where(low, torch.log(u[3]) / a, 0.0))
        x = torch.sqrt(-2 * torch.log(u[0])) * torch.cos(2 * math.pi * u[1])
        v = (1 + c * x) ** 3
        safe = torch.where(v > 0, v, 1.0)
        accepted = (v > 0) & (torch.log(u[2]) < 0.5 * x * x + d - d * safe + d * torch.log(safe))
        value = torch.where(accepted & ~done, d * safe, value)
        done = done | accepted
        if bool(done.all()):
            break
    return torch.clamp(value * boost, min=SMALLEST)
