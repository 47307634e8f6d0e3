"""How a dual-space method goes from one density to the next: RAAR, HIO, difference map, charge or solvent flipping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from xtalfast.phasing.projections import flatten_solvent


class Projector(Protocol):
    """Imposes measured amplitudes on maps: `Amplitudes` on single ones, `PairedAmplitudes` on pairs."""

    def project(self, maps: Tensor, /) -> Tensor:
        """The nearest maps with these amplitudes."""


Update = Callable[[Tensor, Tensor, Tensor, Projector, float], Tensor]


def raar(maps: Tensor, projected: Tensor, protein: Tensor, amplitudes: Projector, beta: float) -> Tensor:
    """Relaxed averaged alternating reflections. Ref: Luke (2005) Inverse Problems 21, 37."""
    reflected = 2 * projected - maps
    flat = flatten_solvent(reflected, protein)
    # beta / 2 (R_S R_M x + x) + (1 - beta) P_M x, with R_S R_M x + x = 2 (P_S R_M x - P_M x + x).
    return beta * (flat + maps) + (1 - 2 * beta) * projected


def hio(maps: Tensor, projected: Tensor, protein: Tensor, amplitudes: Projector, beta: float) -> Tensor:
    """Hybrid input-output. Ref: Fienup (1982) Appl. Opt. 21, 2758."""
    return torch.where(protein & (projected > 0), projected, maps - beta * projected)


def difference_map(maps: Tensor, projected: Tensor, protein: Tensor, amplitudes: Projector, beta: float) -> Tensor:
    """Difference map, gamma = 1/beta (data), -1/beta (density). Ref: Elser (2003) J. Opt. Soc. Am. A 20, 40."""
    flat = flatten_solvent(maps, protein)
    towards_data = projected + (projected - maps) / beta
    towards_flat = flat - (flat - maps) / beta
    return maps + beta * (flatten_solvent(towards_data, protein) - amplitudes.project(towards_flat))


def charge_flipping(maps: Tensor, projected: Tensor, protein: Tensor, amplitudes: Projector, beta: float) -> Tensor:
    """Density below `beta` standard deviations changes its sign. Ref: Oszlanyi & Suto (2004) Acta Cryst. A60, 134."""
    threshold = beta * projected.std((1, 2, 3), keepdim=True)
    return torch.where(projected > threshold, projected, -projected)


def solvent_flipping(maps: Tensor, projected: Tensor, protein: Tensor, amplitudes: Projector, beta: float) -> Tensor:
    """Positive protein, solvent turned over by the factor `beta`. Ref: Abrahams & Leslie (1996) Acta Cryst. D52, 30."""
    return flatten_solvent(projected, protein, flip=beta)


UPDATES: dict[str, tuple[Update, float]] = {
    "raar": (raar, 0.95),
    "hio": (hio, 0.5),
    "difference-map": (difference_map, 0.8),
    "charge-flipping": (charge_flipping, 1.2),
    "solvent-flipping": (solvent_flipping, 0.5),
}
"""Name -> (update, its usual beta)."""
