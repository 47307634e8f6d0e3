"""Tight P1 cells around a molecule: grown until no atom meets a copy of another, as the density paper does.

Cells are rows (a, b, c, alpha, beta, gamma) in A and degrees; Cartesian axes as everywhere: a along x, b in the x-y
plane. Ref: RecCrysFormer paper, Appendix B.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xtalfast import _native

Array = NDArray[np.float64]

MIN_CONTACT = 3.45  # A between atoms of different copies
ANGLES = np.array([90.0, 100.0, 110.0, 120.0])  # deg
ANGLE_PROBABILITIES = np.array([1 / 3, 1 / 3, 2 / 9, 1 / 9])
PROTEIN_VOLUME = 1.23  # A^3 per Da (Matthews)
_GROWTH_STEP = 0.5  # A
_MAX_GROWTH = 25.0  # A beyond the extents of the molecule


@dataclass(frozen=True)
class Placement:
    """A molecule in its cell.

    Attributes:
        cell: a <= b <= c in A, the angles between them in deg, [6].
        coords: Cartesian A, [M, 3], the centre of mass at the centre of the cell.
        rotation: proper rotation [3, 3] from the coordinates given to those returned (the centring apart).
    """

    cell: Array
    coords: Array
    rotation: Array


def orthogonalization(cell: ArrayLike) -> Array:
    """Fractional -> Cartesian matrices [..., 3, 3] of cells [..., 6]; columns are a, b, c."""
    cell = np.asarray(cell, float)
    a, b, c = cell[..., 0], cell[..., 1], cell[..., 2]
    cos_alpha, cos_beta, cos_gamma = np.moveaxis(np.cos(np.radians(cell[..., 3:])), -1, 0)
    sin_gamma = np.sqrt(1 - cos_gamma**2)
    y = (cos_alpha - cos_beta * cos_gamma) / sin_gamma
    zero = np.zeros_like(a)
    rows = [
        [a, b * cos_gamma, c * cos_beta],
        [zero, b * sin_gamma, c * y],
        [zero, zero, c * np.sqrt(np.maximum(1 - cos_beta**2 - y**2, 0))],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def volume(cell: ArrayLike) -> Array:
    """Volumes [...] of cells [..., 6], A^3."""
    return np.linalg.det(orthogonalization(cell))


def random_rotation(rng: np.random.Generator) -> Array:
    """A rotation matrix [3, 3] uniform over all orientations (a normal quaternion)."""
    w, x, y, z = (q := rng.normal(size=4)) / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def draw_angles(rng: np.random.Generator) -> tuple[Array, int]:
    """Cell angles [3] (deg) as the paper draws them, and how many triples that close no cell were thrown away."""
    redrawn = 0
    while True:
        angles = rng.choice(ANGLES, size=3, p=ANGLE_PROBABILITIES)
        if angles.sum() < 360 - 1e-9:  # obtuse angles meet only if they leave a gap; 120, 120, 120 is flat
            return angles, redrawn
        redrawn += 1


@lru_cache(maxsize=256)
def _half_lattice(n_a: int, n_b: int, n_c: int) -> Array:
    """Lattice translations up to sign, fractional: of n and -n the one that comes last in order."""
    ranges = (range(-n, n + 1) for n in (n_a, n_b, n_c))
    return np.array([n for n in itertools.product(*ranges) if n > (0, 0, 0)], float).reshape(-1, 3)


def has_contact(coords: Array, orth: Array, distance: float) -> bool:
    """Whether an atom of `coords` [M, 3] lies within `distance` (A) of a lattice copy of itself or another atom."""
    coords, orth = np.ascontiguousarray(coords, float), np.ascontiguousarray(orth, float)
    if _native.C is None:
        return has_contact_reference(coords, orth, distance)
    return _native.C.has_contact(coords.ctypes.data, len(coords), orth.ctypes.data, distance)


def has_contact_reference(coords: Array, orth: Array, distance: float) -> bool:
    """The definition of `has_contact`, in numpy."""
    if np.linalg.norm(orth, axis=0).min() <= distance:
        return True  # each atom meets its own copy
    # In fractions of the cell: copies further away than the molecule is long and the distance wide are out of reach.
    frac = np.linalg.inv(orth)
    reach = np.ptp(coords @ frac.T, axis=0) + distance * np.linalg.norm(frac, axis=1)
    shifts = _half_lattice(*np.floor(reach).astype(int).tolist()) @ orth.T
    length = np.linalg.norm(shifts, axis=1)
    # Along a translation the molecule must be longer than the gap it leaves; the far ends alone can meet.
    along = coords @ (shifts / length[:, None]).T
    low, high = along.min(axis=0), along.max(axis=0)
    gap = length - distance
    reachable = np.flatnonzero(high - low >= gap)
    for i in reachable[np.argsort(length[reachable])].tolist():  # a contact is likeliest with the nearest copies
        head = coords[along[:, i] >= low[i] + gap[i]]
        tail = coords[along[:, i] <= high[i] - gap[i]] + shifts[i]
        between = head[:, None] - tail[None]
        if np.einsum("ijk,ijk->ij", between, between).min(initial=np.inf) <= distance**2:
            return True
    return False


def tight_cell(
    coords: Array, mass: Array, angles: Array, *, min_contact: float = MIN_CONTACT, step: float = _GROWTH_STEP
) -> Placement | None:
    """The P1 cell of given angles in which copies of a molecule keep their distance.

    All edges start at the molecule's extents along x, y, z and grow together by `step` until no two atoms of different
    copies are within `min_contact`. The axes are then sorted by length (the handedness is kept) and the centre of mass
    is put at the cell's centre.

    Args:
        coords: Cartesian, A, [M, 3], M >= 1.
        mass: weights of the centre of mass [M].
        angles: alpha, beta, gamma in deg [3].
        min_contact: A.
        step: A.

    Returns:
        None if contacts remain when the edges have grown by 25 A.
    """
    coords = np.ascontiguousarray(coords, float)
    extents = np.ptp(coords, axis=0)
    directions = np.ascontiguousarray(orthogonalization([1, 1, 1, *angles]))
    growth = _growth(coords, directions, extents, min_contact, step)
    if growth < 0:
        return None
    return _standard_setting(coords, mass, np.concatenate([extents + growth, angles]))


def _growth(coords: Array, directions: Array, extents: Array, min_contact: float, step: float) -> float:
    """What to add to the edges until there is no contact, A; -1 if nothing helps."""
    if _native.C is not None:
        addresses = (array.ctypes.data for array in (directions, extents))
        return _native.C.tight_cell_growth(coords.ctypes.data, len(coords), *addresses, min_contact, step, _MAX_GROWTH)
    for i in range(1, math.floor(_MAX_GROWTH / step + 0.5) + 1):
        if not has_contact_reference(coords, directions * (extents + i * step), min_contact):
            return i * step
    return -1.0


def _standard_setting(coords: Array, mass: Array, cell: Array) -> Placement:
    """Sort the axes and centre the molecule."""
    order = np.argsort(cell[:3], kind="stable")
    # An odd permutation of the axes alone would invert the molecule: then all three are reversed too, which keeps the
    # angles between them.
    parity = np.linalg.det(np.eye(3)[order])
    basis = orthogonalization(cell)[:, order] * parity
    sorted_cell = np.concatenate([cell[:3][order], cell[3:][order]])
    orth = orthogonalization(sorted_cell)
    rotation = orth @ np.linalg.inv(basis)
    centre = mass @ coords / mass.sum()
    return Placement(sorted_cell, (coords - centre) @ rotation.T + orth @ np.full(3, 0.5), rotation)


def solvent_fraction(mass: ArrayLike, cell: ArrayLike) -> Array:
    """Part of the cell that holds no protein: mass [...] in Da, cell [..., 6]."""
    return 1 - PROTEIN_VOLUME * np.asarray(mass, float) / volume(cell)
