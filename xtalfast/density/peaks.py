"""Peaks of periodic maps: of a Patterson map the vectors between heavy or many atoms, of a density its atoms."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import gemmi
import numpy as np
from numpy.typing import ArrayLike, NDArray

from xtalfast.errors import InputError

# Of each grid point's 26 neighbours one of every opposite pair.
_HALF = [n for n in itertools.product((-1, 0, 1), repeat=3) if n > (0, 0, 0)]


@dataclass(frozen=True)
class Peak:
    """A local maximum.

    Attributes:
        fractional: place in the cell, each from 0 to 1.
        height: of the parabola through the neighbouring points, in the map's unit.
        length: distance from the nearest lattice point, A: of a Patterson peak the length of the vector.
    """

    fractional: tuple[float, float, float]
    height: float
    length: float


def find_peaks(values: ArrayLike, cell: gemmi.UnitCell, n: int = 30, *, inversion: bool = False) -> list[Peak]:
    """The `n` highest local maxima of a map over the whole cell, strongest first.

    Args:
        values: [X, Y, Z], at least 3 points along each axis, finite.
        cell: unit cell.
        n: how many at most.
        inversion: the map is its own mirror image, as a Patterson map: of u and -u one is listed, the origin not.

    Raises:
        InputError: a map of another shape or with values that are not finite.
    """
    values = np.asarray(values, float)
    if values.ndim != 3 or min(values.shape) < 3:
        raise InputError(f"wanted a map [X, Y, Z] with 3 points or more along each axis, got {list(values.shape)}")
    if not np.isfinite(values).all():
        raise InputError(f"{int((~np.isfinite(values)).sum())} points of the map are not finite")
    shape = np.array(values.shape)
    top = np.ones(values.shape, bool)
    for step in _HALF:
        # Of equal neighbours the first counts, so that a flat top is one peak.
        top &= values > np.roll(values, step, (0, 1, 2))
        top &= values >= np.roll(values, [-s for s in step], (0, 1, 2))
    points = np.argwhere(top)
    heights = values[tuple(points.T)]
    peaks: list[Peak] = []
    seen: set[tuple[int, ...]] = set()
    for i in np.argsort(-heights, kind="stable").tolist():
        if len(peaks) == n:
            break
        point = points[i]
        if inversion:
            if not point.any() or tuple(-point % shape) in seen:
                continue
            seen.add(tuple(point.tolist()))
        offset, height = _parabola(values, point)
        fractional = (point + offset) / shape % 1
        peaks.append(Peak(tuple(fractional.tolist()), height, _shortest(fractional, cell)))  # type: ignore[arg-type]
    return sorted(peaks, key=lambda peak: -peak.height)


def _parabola(values: NDArray, point: NDArray) -> tuple[NDArray[np.float64], float]:
    """Offset of the top from a grid point, in steps, and its height; along each axis through three points."""
    middle = float(values[tuple(point)])
    offset, height = np.zeros(3), middle
    for axis in range(3):
        around = []
        for step in (-1, 1):
            neighbour = point.copy()
            neighbour[axis] = (neighbour[axis] + step) % values.shape[axis]
            around.append(float(values[tuple(neighbour)]))
        slope, curvature = (around[1] - around[0]) / 2, around[0] - 2 * middle + around[1]
        if curvature < 0:
            offset[axis] = -slope / curvature
            height -= slope**2 / (2 * curvature)
    return offset, height


def _shortest(fractional: NDArray, cell: gemmi.UnitCell) -> float:
    """Distance to the nearest lattice point, A."""
    orth = np.array(cell.orth.mat.tolist())
    shifts = np.array(list(itertools.product((-1, 0, 1), repeat=3)))
    return float(np.linalg.norm((fractional - np.round(fractional) + shifts) @ orth.T, axis=1).min())
