"""Measured amplitudes, checked once, and what phasing needs of them: P1 expansion, a held-out set, figures of merit."""

from __future__ import annotations

from dataclasses import dataclass

import gemmi
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from xtalfast.errors import InputError
from xtalfast.phasing.fourier import FourierGrid, usable_cell
from xtalfast.phasing.projections import Amplitudes
from xtalfast.phasing.symmetry import check_amplitude_symmetry, expand_to_p1, operations

MIN_REFLECTIONS = 50


@dataclass(frozen=True)
class Measured:
    """Amplitudes of the asymmetric unit, and the same expanded to P1.

    Attributes:
        hkl: indices [N, 3], without F000 and what lies beyond d_min.
        F: amplitudes [N].
        rows: where these stand in the arrays given, [N].
        cell, space_group: of the crystal.
        d_min: resolution limit, A.
        p1_hkl, p1_rows: all symmetry mates, one of each Friedel pair, [M, 3], and the row of `hkl` of each, [M].
    """

    hkl: NDArray[np.int64]
    F: NDArray[np.float64]
    rows: NDArray[np.int64]
    cell: gemmi.UnitCell
    space_group: gemmi.SpaceGroup
    d_min: float
    p1_hkl: NDArray[np.int64]
    p1_rows: NDArray[np.int64]

    @property
    def multiple_of(self) -> int:
        """Grid sizes that are multiples of this are mapped onto themselves by the symmetry."""
        return 12 if len(operations(self.space_group)) > 1 else 1

    def grid(
        self, d_min: float, rate: float, device: torch.device | str = "cpu", *, paired: bool = False
    ) -> FourierGrid:
        """The grid for reflections to d_min (A) with spacing <= d_min / rate; `paired` for trials in pairs."""
        return FourierGrid.for_resolution(
            self.cell, d_min, rate=rate, multiple_of=self.multiple_of, paired=paired, device=device
        )

    def amplitudes(
        self, grid: FourierGrid, held_out: NDArray[np.bool_] | None = None, left_free: NDArray[np.bool_] | None = None
    ) -> Amplitudes:
        """The amplitudes on a grid, in units of their root mean square.

        Args:
            grid: which may end at a lower resolution than the data.
            held_out: reflections [N] that are not imposed but kept for R_free.
            left_free: reflections [N] too weak to be imposed.
        """
        spectrum, known = grid.scatter(self.p1_hkl, torch.from_numpy(self.F[self.p1_rows]).to(torch.complex64))
        known &= grid.inside
        values = torch.where(known, spectrum.real, 0)
        values = values / values[known].square().mean().sqrt()
        out = self._chosen(grid, held_out) & known
        return Amplitudes(grid, values, known & ~out & ~self._chosen(grid, left_free), out)

    def _chosen(self, grid: FourierGrid, chosen: NDArray[np.bool_] | None) -> Tensor:
        """Where the chosen reflections [N] and their mates stand on the half spectrum."""
        if chosen is None:
            return torch.zeros_like(grid.inside)
        mates = self.p1_hkl[chosen[self.p1_rows]]
        return grid.scatter(mates, torch.zeros(len(mates)))[1]

    def hold_out(self, fraction: float, seed: int) -> NDArray[np.bool_]:
        """A random part of the reflections, bool [N]; symmetry mates stay together."""
        return np.random.default_rng(seed).random(len(self.hkl)) < fraction


def measured(
    F: ArrayLike,
    hkl: ArrayLike,
    cell: gemmi.UnitCell | tuple[float, ...],
    space_group: gemmi.SpaceGroup | str,
    d_min: float | None,
) -> Measured:
    """Check amplitudes [N] and indices [N, 3], cut them at d_min, and expand them.

    Raises:
        InputError: shapes, values that are negative or not finite or all zero, repeated reflections, a cell or absences
            that contradict the space group, d_min finer than the data, too few reflections.
    """
    unit_cell = usable_cell(cell)
    try:
        group = space_group if isinstance(space_group, gemmi.SpaceGroup) else gemmi.SpaceGroup(space_group)
    except ValueError as error:
        raise InputError(
            f"unknown space group {space_group!r}; give a Hermann-Mauguin name such as 'P 21 21 21'"
        ) from error
    values, index = np.asarray(F, np.float64), np.asarray(hkl, np.int64)
    if values.ndim != 1 or index.shape != (len(values), 3):
        raise InputError(f"F must be [N] and hkl [N, 3], got {list(values.shape)} and {list(index.shape)}")
    if not np.isfinite(values).all():
        count = int((~np.isfinite(values)).sum())
        raise InputError(
            f"{count} of {len(values)} amplitudes are not finite; leave unmeasured reflections out of the list"
        )
    if (values < 0).any():
        raise InputError(
            f"{int((values < 0).sum())} of {len(values)} amplitudes are negative; wanted F, not I or F - mean"
        )
    if not values.any():
        raise InputError("all amplitudes are 0; choose another column")
    d = np.full(len(index), np.inf)
    d[index.any(1)] = unit_cell.calculate_d_array(np.ascontiguousarray(index[index.any(1)], np.int32))
    finest = float(d.min())
    limit = finest if d_min is None else d_min
    if not limit > 0 or limit < finest * 0.98:
        raise InputError(f"d_min must not go beyond the data, which end at {finest:.3f} A; got {limit} A")
    rows = np.flatnonzero(index.any(1) & (d >= limit * (1 - 1e-6)))
    index, values = index[rows], values[rows]
    if len(index) < MIN_REFLECTIONS or not values.any():
        raise InputError(
            f"{len(index)} reflections to {limit:.2f} A are too few to phase; wanted {MIN_REFLECTIONS} at least"
        )
    check_amplitude_symmetry(index, unit_cell, group)
    asu = gemmi.ReciprocalAsu(group)
    reduced = np.array([asu.to_asu(h, group.operations())[0] for h in index.tolist()])
    if len(np.unique(reduced, axis=0)) < len(reduced):
        raise InputError(
            "hkl must name each reflection of the asymmetric unit once; merge symmetry mates and Friedel pairs"
        )
    p1_hkl, _, p1_rows = expand_to_p1(index, values, group)
    return Measured(index, values, rows, unit_cell, group, max(limit, finest), p1_hkl, p1_rows)


def sim_weights(observed: NDArray, calculated: NDArray, d: NDArray, n_shells: int = 10) -> NDArray[np.float64]:
    """Figures of merit [N] from how well the amplitudes of the modified density agree with the measured ones.

    Per shell, Fc is scaled to Fo by least squares and fom = I1(X) / I0(X), X = 2 Fo Fc / <|Fo^2 - Fc^2|>.

    Ref: Sim (1959) Acta Cryst. 12, 813; Bricogne (1976) Acta Cryst. A32, 832 for the denominator.
    """
    fom = np.zeros(len(observed))
    for rows in np.array_split(np.argsort(-d, kind="stable"), min(n_shells, len(d))):
        fo, fc = observed[rows], calculated[rows]
        fc = fc * ((fo * fc).sum() / max((fc**2).sum(), 1e-300))
        x = torch.from_numpy(2 * fo * fc / max(abs(fo**2 - fc**2).mean(), 1e-300))
        fom[rows] = (torch.special.i1e(x) / torch.special.i0e(x)).numpy()
    return fom
