"""How good phases are: mean phase error and map correlation per resolution shell, weighted and not."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import gemmi
import numpy as np
from numpy.typing import ArrayLike, NDArray

RANDOM_PHASE_ERROR = 90.0
"""Mean |delta phi| of random phases against the truth, degrees, when no origin is searched for."""


@dataclass(frozen=True)
class PhaseShell:
    """Agreement of two sets of phases over the reflections with d_min <= d <= d_max (A). Phase errors in degrees."""

    d_max: float
    d_min: float
    n: int
    phase_error: float  # mean |delta phi|
    phase_error_weighted: float  # the same, weighted by |F| of the truth
    map_cc: float  # sum |F1||F2| cos(delta phi) / sqrt(sum |F1|^2 sum |F2|^2)
    fom: float  # mean figure of merit given, NaN if none
    cos_error: float  # mean cos(delta phi): what an honest figure of merit equals


@dataclass(frozen=True)
class PhaseStatistics:
    """Overall and per-shell agreement of phases with the truth, after what was done to bring them to one origin.

    Attributes:
        shift: fractions of the cell by which the second map was moved.
        inverted: whether the second map was turned into its mirror image through the origin.
        floor: mean phase error of random phases under the same search; NaN if it was not measured.
    """

    overall: PhaseShell
    shells: list[PhaseShell]
    shift: tuple[float, float, float] = (0.0, 0.0, 0.0)
    inverted: bool = False
    floor: float = math.nan
    notes: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values; NaN becomes null."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: plain(v) for k, v in value.items()}
            if isinstance(value, list | tuple):
                return [plain(v) for v in value]
            return None if isinstance(value, float) and not math.isfinite(value) else value

        return plain(asdict(self))

    def table(self) -> str:
        """The shells as text, the whole range last."""
        lines = [f"{'d (A)':>15} {'n':>8} {'error':>8} {'weighted':>9} {'map CC':>8} {'FOM':>7} {'<cos>':>7}"]
        for shell in [*self.shells, self.overall]:
            fom = "-" if math.isnan(shell.fom) else f"{shell.fom:.3f}"
            lines.append(
                f"{shell.d_max:7.2f}-{shell.d_min:7.2f} {shell.n:8d} {shell.phase_error:8.2f}"
                f" {shell.phase_error_weighted:9.2f} {shell.map_cc:8.4f} {fom:>7} {shell.cos_error:7.3f}"
            )
        moved = ", ".join(f"{x:.4f}" for x in self.shift)
        lines.append(f"moved by ({moved}) of the cell{', hand inverted' if self.inverted else ''}; errors in degrees")
        if not math.isnan(self.floor):
            lines.append(f"random phases under the same search: {self.floor:.2f}")
        return "\n".join(lines)


def phase_difference(F1: ArrayLike, F2: ArrayLike) -> NDArray[np.float64]:
    """|phi1 - phi2| in degrees, 0 to 180, of two complex arrays."""
    return np.degrees(np.abs(np.angle(np.asarray(F1) * np.conj(np.asarray(F2)))))


def _shell(F1: NDArray, F2: NDArray, d: NDArray, fom: NDArray | None) -> PhaseShell:
    difference = phase_difference(F1, F2)
    a, b = abs(F1), abs(F2)
    cosine = np.cos(np.radians(difference))
    power = math.sqrt((a**2).sum() * (b**2).sum())
    return PhaseShell(
        d_max=float(d.max()),
        d_min=float(d.min()),
        n=len(d),
        phase_error=float(difference.mean()),
        phase_error_weighted=float((difference * a).sum() / a.sum()) if a.any() else math.nan,
        map_cc=float((a * b * cosine).sum() / power) if power > 0 else math.nan,
        fom=math.nan if fom is None else float(fom.mean()),
        cos_error=float(cosine.mean()),
    )


def phase_statistics(
    F1: ArrayLike,
    F2: ArrayLike,
    hkl: ArrayLike,
    cell: gemmi.UnitCell,
    *,
    n_shells: int = 10,
    fom: ArrayLike | None = None,
) -> PhaseStatistics:
    """Phase error and map correlation of two sets of structure factors as they stand (no origin search: see `match`).

    Args:
        F1: structure factors of the truth, complex [N]; F000 left out.
        F2: those to judge, complex [N].
        hkl: indices, [N, 3].
        cell: of the crystal.
        n_shells: resolution shells, with equal numbers of reflections.
        fom: figures of merit of F2, [N].

    Ref: the quantities of CCP4's cphasematch.
    """
    first, second = np.asarray(F1, np.complex128), np.asarray(F2, np.complex128)
    d = np.asarray(cell.calculate_d_array(np.ascontiguousarray(hkl, np.int32)))
    merit = None if fom is None else np.asarray(fom, np.float64)
    order = np.argsort(-d, kind="stable")
    shells = [
        _shell(first[rows], second[rows], d[rows], None if merit is None else merit[rows])
        for rows in np.array_split(order, min(n_shells, len(order)))
        if len(rows)
    ]
    return PhaseStatistics(_shell(first, second, d, merit), shells)
