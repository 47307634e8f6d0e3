"""Reflections on the half spectrum of a grid: the one place where lists of indices meet torch's transforms.

A spectrum here is what `torch.fft.rfftn` of a map gives, scaled by 1 / number of voxels. With the project's signs,
F(h) = sum f exp(+2 pi i h.x) and map = (1/V) sum F exp(-2 pi i h.x), it holds conj(F) / V.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import gemmi
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtalfast.errors import InputError

_AXES = (-3, -2, -1)


def usable_cell(cell: gemmi.UnitCell | tuple[float, ...]) -> gemmi.UnitCell:
    """The cell (A, degrees), checked.

    Raises:
        InputError: a length that is not positive, or angles that enclose no volume.
    """
    parameters = tuple(float(x) for x in (cell.parameters if isinstance(cell, gemmi.UnitCell) else cell))
    if len(parameters) != 6 or not all(math.isfinite(x) and x > 0 for x in parameters):
        raise InputError(f"cell must be six positive numbers (a b c alpha beta gamma; A, degrees), got {parameters}")
    cosines = np.cos(np.radians(parameters[3:]))
    # The squared volume of a cell with unit edges.
    if max(parameters[3:]) >= 180 or 1 + 2 * cosines.prod() - (cosines**2).sum() <= 1e-6:
        raise InputError(f"cell angles {parameters[3:]} enclose no volume; check the order a b c alpha beta gamma")
    return gemmi.UnitCell(*parameters)


def fft_size(at_least: int, multiple_of: int = 1) -> int:
    """Smallest multiple of `multiple_of` from `at_least` on that has no prime factor above 5."""
    size = max(at_least, 1)
    while True:
        size += -size % multiple_of
        rest = size
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return size
        size += 1


def paired_fft_size(at_least: int, multiple_of: int = 1) -> int:
    """The same for the fastest axis of complex transforms: MKL takes 2-3 times longer over other sizes than these."""
    size = fft_size(at_least, math.lcm(multiple_of, 4))
    while size % 8 and (size % 12 or size < 36):
        size = fft_size(size + 1, math.lcm(multiple_of, 4))
    return size


def fractionalisation(cell: gemmi.UnitCell) -> NDArray[np.float64]:
    """Matrix [3, 3] from cartesian (A) to fractional coordinates; h @ matrix is the reciprocal vector of h (1/A)."""
    return np.array(cell.frac.mat.tolist())


def inverse_d_squared(hkl: NDArray, cell: gemmi.UnitCell) -> NDArray[np.float64]:
    """1/d^2 of the indices [N, 3], in 1/A^2, [N]."""
    return ((np.asarray(hkl, np.float64) @ fractionalisation(cell)) ** 2).sum(-1)


@dataclass(frozen=True)
class FourierGrid:
    """A periodic grid over one cell in P1, and the reflections up to d_min on its half spectrum.

    Attributes:
        cell: of the crystal.
        shape: voxels along a, b, c (X, Y, Z).
        d_min: resolution limit, A.
        inside: reflections with d >= d_min on the half spectrum [X, Y, Z // 2 + 1], F000 included.
        s2: 1/d^2, [X, Y, Z // 2 + 1], 1/A^2.
        weights: how often each element of the half spectrum stands in the whole one (1 or 2).
    """

    cell: gemmi.UnitCell
    shape: tuple[int, int, int]
    d_min: float
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    inside: Tensor = field(init=False)
    s2: Tensor = field(init=False)
    weights: Tensor = field(init=False)

    def __post_init__(self) -> None:
        X, Y, Z = self.shape
        hkl = np.stack(
            np.meshgrid(np.fft.fftfreq(X, 1 / X), np.fft.fftfreq(Y, 1 / Y), np.arange(Z // 2 + 1), indexing="ij"), -1
        )
        s2 = inverse_d_squared(hkl, self.cell)
        weights = np.full(s2.shape, 2.0)
        weights[:, :, 0] = 1
        if Z % 2 == 0:
            weights[:, :, -1] = 1
        for name, array in (
            ("inside", s2 <= 1 / self.d_min**2 * (1 + 1e-6)),
            ("s2", s2.astype(np.float32)),
            ("weights", weights.astype(np.float32)),
        ):
            object.__setattr__(self, name, torch.from_numpy(array).to(self.device))

    @classmethod
    def for_resolution(
        cls,
        cell: gemmi.UnitCell,
        d_min: float,
        *,
        rate: float = 3.0,
        multiple_of: int = 1,
        paired: bool = False,
        device: torch.device | str = "cpu",
    ) -> FourierGrid:
        """The smallest FFT-friendly grid with spacing <= d_min / rate (rate 2 is the least that holds the sphere).

        With `paired`, one whose complex transforms are fast.
        """
        # |h| of a reflection at d >= d_min is at most a / d_min, whatever the angles.
        x, y, z = (
            size(max(2 * math.floor(edge / d_min) + 1, math.ceil(edge / d_min * rate)), multiple_of)
            for edge, size in (
                (cell.a, fft_size),
                (cell.b, fft_size),
                (cell.c, paired_fft_size if paired else fft_size),
            )
        )
        return cls(cell, (x, y, z), d_min, torch.device(device))

    @property
    def n_voxels(self) -> int:
        """Voxels of the cell."""
        return math.prod(self.shape)

    def to_spectrum(self, maps: Tensor) -> Tensor:
        """Maps [..., X, Y, Z] -> spectra [..., X, Y, Z // 2 + 1], conj(F) / V."""
        return torch.fft.rfftn(maps, dim=_AXES, norm="forward")

    def to_map(self, spectrum: Tensor) -> Tensor:
        """Spectra -> maps; density in e/A^3 when the spectrum came from structure factors in e."""
        return torch.fft.irfftn(spectrum, s=self.shape, dim=_AXES, norm="forward")

    def scatter(self, hkl: NDArray, values: Tensor) -> tuple[Tensor, Tensor]:
        """Structure factors of a list that is complete for P1 up to Friedel mates -> spectrum and which are known.

        Args:
            hkl: indices [N, 3]; of two Friedel mates either or both may be listed.
            values: structure factors [N], complex, e; gradients flow through.

        Returns:
            spectrum [X, Y, Z // 2 + 1], conj(F) / V; 0 where nothing is known; and a bool mask of the known.
        """
        hkl = np.asarray(hkl, np.int64)
        X, Y, Z = self.shape
        scaled = values.to(self.device) / self.cell.volume
        spectrum = torch.zeros((X, Y, Z // 2 + 1), dtype=values.dtype, device=self.device)
        known = torch.zeros(spectrum.shape, dtype=torch.bool, device=self.device)
        fits = (abs(hkl) * 2 < np.array(self.shape)).all(1)
        for sign, listed in ((-1, scaled), (1, scaled.conj())):
            rows = np.flatnonzero((sign * hkl[:, 2] >= 0) & fits)
            place = self._place(sign * hkl[rows])
            spectrum = spectrum.index_put(place, listed[torch.from_numpy(rows)])
            known[place] = True
        return spectrum, known

    def gather(self, spectrum: Tensor, hkl: NDArray) -> Tensor:
        """Structure factors (e) [..., N] of indices [N, 3] out of spectra [..., X, Y, Z // 2 + 1]; differentiable."""
        hkl = np.asarray(hkl, np.int64)
        mirrored = hkl[:, 2] < 0
        values = spectrum[(..., *self._place(np.where(mirrored[:, None], -hkl, hkl)))]
        return torch.where(torch.from_numpy(mirrored).to(self.device), values, values.conj()) * self.cell.volume

    def _place(self, hkl: NDArray) -> tuple[Tensor, Tensor, Tensor]:
        """Indices into the half spectrum of reflections [N, 3] with l >= 0."""
        sizes = np.array([self.shape[0], self.shape[1], self.shape[2] + 1])
        x, y, z = torch.from_numpy(np.ascontiguousarray((hkl % sizes).T)).to(self.device)
        return x, y, z
