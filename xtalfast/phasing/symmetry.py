"""Space groups over a solver that works in P1: expand the data, then find where the symmetry elements lie.

In a crystal with operations x -> R x + t, F(hR) = F(h) exp(-2 pi i h.t).
"""

from __future__ import annotations

import gemmi
import numpy as np
from numpy.typing import NDArray

from xtalfast.errors import InputError
from xtalfast.phasing.fourier import fft_size


def operations(space_group: gemmi.SpaceGroup) -> list[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Rotations [3, 3] and translations [3] of all operations but those that only centre the lattice."""
    return [
        (np.array(op.rot, np.int64) // gemmi.Op.DEN, np.array(op.tran) / gemmi.Op.DEN)
        for op in space_group.operations().sym_ops
    ]


def centrings(space_group: gemmi.SpaceGroup) -> NDArray[np.float64]:
    """The lattice's centring vectors [C, 3], zero first."""
    return np.array(space_group.operations().cen_ops, np.float64) / gemmi.Op.DEN


def check_amplitude_symmetry(hkl: NDArray, cell: gemmi.UnitCell, space_group: gemmi.SpaceGroup) -> None:
    """Refuse data that cannot belong to the space group.

    Raises:
        InputError: a cell that the symmetry does not allow, indices that repeat, or systematic absences among them.
    """
    if not cell.is_compatible_with_spacegroup(space_group):
        raise InputError(f"cell {cell.parameters} does not fit space group {space_group.xhm()}; give the right one")
    absent = space_group.operations().systematic_absences(np.ascontiguousarray(hkl, np.int32))
    if absent.any():
        first = hkl[np.flatnonzero(absent)[0]].tolist()
        raise InputError(
            f"{int(absent.sum())} of {len(hkl)} reflections, the first {first}, are systematically absent in"
            f" {space_group.xhm()}; leave them out or give the right space group"
        )


def expand_to_p1(
    hkl: NDArray, values: NDArray, space_group: gemmi.SpaceGroup
) -> tuple[NDArray[np.int64], NDArray, NDArray[np.int64]]:
    """All symmetry mates of a list of reflections, one of each Friedel pair.

    Args:
        hkl: indices [N, 3], each reflection of the asymmetric unit once.
        values: structure factors (complex) or amplitudes (real), [N].

    Returns:
        indices [M, 3], values [M] with the phases of the mates, and the row [M] of `hkl` each comes from.
    """
    hkl = np.asarray(hkl, np.int64)
    values = np.asarray(values)
    indices, expanded, rows = [], [], np.arange(len(hkl))
    for rotation, translation in operations(space_group):
        mates = hkl @ rotation
        shifted = values * np.exp(-2j * np.pi * (hkl @ translation)) if np.iscomplexobj(values) else values
        # Of two Friedel mates the one whose last index that is not zero is positive.
        sign = np.sign(mates[:, 2] * 4 + np.sign(mates[:, 1]) * 2 + np.sign(mates[:, 0]))
        sign[sign == 0] = 1
        indices.append(mates * sign[:, None])
        expanded.append(np.where(sign > 0, shifted, np.conj(shifted)))
    every = np.concatenate(indices)
    unique, first = np.unique(every, axis=0, return_index=True)
    return unique, np.concatenate(expanded)[first], np.tile(rows, len(indices))[first]


def origin_map(
    hkl: NDArray, values: NDArray, space_group: gemmi.SpaceGroup
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How well a density in P1 obeys the space group when its origin is moved to s, for all s on a grid.

    The score is sum over operations and reflections of Re F(hR) F*(h) exp(2 pi i (h.t + (hR - h).s)), divided by its
    value for perfect symmetry: 1 where the symmetry elements lie.

    Args:
        hkl, values: structure factors of the density in P1, one of each Friedel pair, [N, 3] and [N].
        space_group: to look for.

    Returns:
        the best shift s (fractions of the cell) [3] and the score map [X, Y, Z].
    """
    hkl = np.asarray(hkl, np.int64)
    both = np.concatenate([hkl, -hkl])
    density = np.concatenate([values, np.conj(values)])
    # hR - h reaches further than h itself; sizes are multiples of 24, where the symmetry elements of all groups lie.
    reach = [hkl @ rotation - hkl for rotation, _ in operations(space_group)]
    sizes = 2 * np.max([abs(r).max(0) for r in reach], axis=0) + 1
    shape = tuple(fft_size(int(size), 24) for size in sizes)
    lookup = {tuple(h): f for h, f in zip(both.tolist(), density.tolist())}
    coefficients = np.zeros(shape, np.complex128)
    total = 0.0
    for rotation, translation in operations(space_group)[1:]:
        mates = both @ rotation
        of_mates = np.array([lookup.get(tuple(h), 0j) for h in mates.tolist()])
        product = of_mates * density.conj() * np.exp(2j * np.pi * (both @ translation))
        np.add.at(coefficients, tuple((mates - both).T % np.array(shape)[:, None]), product)
        total += float((abs(of_mates) * abs(density)).sum())
    scores = np.fft.ifftn(coefficients).real * (np.prod(shape) / max(total, 1e-300))
    best = np.unravel_index(scores.argmax(), shape)
    return np.array(best) / np.array(shape), scores


def impose_symmetry(
    hkl: NDArray, values: NDArray, space_group: gemmi.SpaceGroup, asu_hkl: NDArray
) -> NDArray[np.complex128]:
    """Structure factors [M] of the reflections `asu_hkl` [M, 3], averaged over their symmetry mates in P1."""
    lookup = {tuple(h): f for h, f in zip(np.asarray(hkl).tolist(), np.asarray(values).tolist())}
    lookup |= {tuple(-h for h in key): value.conjugate() for key, value in list(lookup.items())}
    asu_hkl = np.asarray(asu_hkl, np.int64)
    total = np.zeros(len(asu_hkl), np.complex128)
    for rotation, translation in operations(space_group):
        mates = np.array([lookup.get(tuple(h), 0j) for h in (asu_hkl @ rotation).tolist()])
        total += mates * np.exp(2j * np.pi * (asu_hkl @ translation))
    return total / len(operations(space_group))
