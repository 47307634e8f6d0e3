"""The two constraints of phasing as projections: measured amplitudes, and density that is flat outside the protein."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xtalfast.phasing.fourier import FourierGrid


@dataclass
class Amplitudes:
    """Measured amplitudes on the half spectrum, and which of them bind.

    Attributes:
        grid: grid and resolution limit.
        values: amplitudes [..., X, Y, Z // 2 + 1], 0 where nothing was measured.
        bound: reflections whose amplitude is imposed. The others inside the resolution limit, F000 among them, stay
            free; those outside are 0.
        held_out: measured reflections that are not imposed but predicted, for R_free.
    """

    grid: FourierGrid
    values: Tensor
    bound: Tensor
    held_out: Tensor

    def __post_init__(self) -> None:
        self._free = self.grid.inside & ~self.bound

    def project(self, maps: Tensor) -> Tensor:
        """The nearest maps [..., X, Y, Z] with the measured amplitudes."""
        return self.grid.to_map(self.impose(self.grid.to_spectrum(maps)))

    def impose(self, spectrum: Tensor) -> Tensor:
        """The same of spectra: amplitudes replaced, phases kept."""
        # rsqrt of the squared modulus: torch's complex abs goes through hypot, three times as slow.
        parts = torch.view_as_real(spectrum)
        re, im = parts.unbind(-1)
        scale = torch.addcmul(re * re, im, im).clamp_min(1e-30).rsqrt() * self.values
        scale = torch.where(self.bound, scale, self._free.to(scale.dtype))
        return torch.view_as_complex(parts * scale[..., None])

    def r_factors(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """R = sum |k |F| - |Fobs|| / sum |Fobs| of maps [B, X, Y, Z] over bound and held-out reflections, [B] each.

        The scale k is that of the bound reflections, by least squares. R_free is NaN when nothing was held out.
        """
        modulus = self.grid.to_spectrum(maps).abs()
        weights = self.grid.weights
        fitted = self.bound * weights
        k = (modulus * self.values * fitted).sum((1, 2, 3)) / (modulus.square() * fitted).sum((1, 2, 3)).clamp_min(
            1e-30
        )
        deviation = (k.view(-1, 1, 1, 1) * modulus - self.values).abs() * weights
        work, free = (
            (deviation * chosen).sum((1, 2, 3)) / (self.values * weights * chosen).sum((-3, -2, -1))
            for chosen in (self.bound, self.held_out)
        )
        return work, free


def flatten_solvent(maps: Tensor, protein: Tensor, flip: float = 0.0) -> Tensor:
    """Density that is positive in the protein and zero outside (flip 0), or turned over there (flip 1 at most).

    Ref: Abrahams & Leslie (1996) Acta Cryst. D52, 30 (solvent flipping).
    """
    return torch.where(protein, maps.clamp_min(0), maps * -flip)
