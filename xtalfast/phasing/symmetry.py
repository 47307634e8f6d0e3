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


def _values_at(hkl: NDArray, values: NDArray, wanted: NDArray) -> NDArray[np.complex128]:
    """Structure factors of `wanted` [M, 3] out of a list with one of each Friedel pair; 0 where there is none."""
    lookup = {tuple(h): f for h, f in zip(np.asarray(hkl).tolist(), np.asarray(values).tolist())}
    lookup |= {(-h, -k, -l): f.conjugate() for (h, k, l), f in list(lookup.items())}
    return np.array([lookup.get((h, k, l), 0j) for h, k, l in wanted.tolist()])


def locate_origin(hkl: NDArray, values: NDArray, space_group: gemmi.SpaceGroup) -> tuple[NDArray[np.float64], float]:
    """Where the symmetry elements lie in a density found in P1.

    Moved by s, the density obeys the group as far as sum over operations and reflections of
    Re F(hR) F*(h) exp(2 pi i (h.t + (hR - h).s)) comes near sum |F(hR)||F(h)|.

    Args:
        hkl, values: structure factors of the density, one of each Friedel pair, [N, 3] and [N].
        space_group: to look for; not P1.

    Returns:
        the shift s (fractions of the cell) [3], and the ratio of the two sums: 1 for perfect symmetry.
    """
    hkl = np.asarray(hkl, np.int64)
    differences, products = [], []
    total = 0.0
    for rotation, translation in operations(space_group)[1:]:
        mates = hkl @ rotation
        of_mates = _values_at(hkl, values, mates)
        products.append(of_mates * np.conj(values) * np.exp(2j * np.pi * (hkl @ translation)))
        differences.append(mates - hkl)
        total += float((abs(of_mates) * abs(values)).sum())
    difference, product = np.concatenate(differences), np.concatenate(products)
    shape = tuple(fft_size(int(n)) for n in 2 * abs(difference).max(0) + 1)
    coefficients = np.zeros(shape, np.complex128)
    np.add.at(coefficients, tuple((difference % np.array(shape)).T), product)
    scores = np.fft.ifftn(coefficients).real
    start = np.array(np.unravel_index(scores.argmax(), shape)) / np.array(shape)
    shift = climb(start, product, -difference, np.eye(3))
    score = (product * np.exp(2j * np.pi * (difference @ shift))).real.sum() / max(total, 1e-300)
    return shift, float(score)


def climb(shift: NDArray, product: NDArray, hkl: NDArray, directions: NDArray, n_steps: int = 5) -> NDArray[np.float64]:
    """Newton steps on sum Re product exp(-2 pi i h.s) from `shift` [3] along `directions` [3, K]; never downhill."""
    if directions.shape[1] == 0:
        return shift
    along = hkl @ directions

    def terms(s: NDArray) -> NDArray:
        return product * np.exp(-2j * np.pi * (hkl @ s))

    value = terms(shift)
    for _ in range(n_steps):
        gradient = 2 * np.pi * (value.imag @ along)
        curvature = (2 * np.pi) ** 2 * (along * value.real[:, None]).T @ along
        moved = shift + directions @ np.linalg.lstsq(curvature, gradient, rcond=1e-10)[0]
        new = terms(moved)
        if new.real.sum() <= value.real.sum():
            break
        shift, value = moved, new
    return shift


def impose_symmetry(
    hkl: NDArray, values: NDArray, space_group: gemmi.SpaceGroup, asu_hkl: NDArray
) -> NDArray[np.complex128]:
    """Structure factors [M] of the reflections `asu_hkl` [M, 3], averaged over their symmetry mates in P1."""
    asu_hkl = np.asarray(asu_hkl, np.int64)
    total = np.zeros(len(asu_hkl), np.complex128)
    for rotation, translation in operations(space_group):
        total += _values_at(hkl, values, asu_hkl @ rotation) * np.exp(2j * np.pi * (asu_hkl @ translation))
    return total / len(operations(space_group))
