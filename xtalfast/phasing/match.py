"""Bring two sets of phases to one origin and one hand, as the space group allows, and compare them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import gemmi
import numpy as np
from numpy.typing import ArrayLike, NDArray

from xtalfast.errors import InputError
from xtalfast.metrics.phasing import PhaseStatistics, phase_statistics
from xtalfast.phasing.fourier import fft_size, usable_cell
from xtalfast.phasing.symmetry import centrings, climb, expand_to_p1, operations


@dataclass(frozen=True)
class Match:
    """How the second set was moved, and how well it then agrees.

    Attributes:
        shift: fractions of the cell by which the second density is moved, [3].
        inverted: whether it was inverted through the origin first (the other hand).
        map_cc: correlation of the two maps after that.
        other_hand_cc: the same for the best shift of the other hand; NaN when the space group does not allow it.
        F2: the second structure factors as moved, complex [N].
        statistics: phase errors per shell.
    """

    shift: tuple[float, float, float]
    inverted: bool
    map_cc: float
    other_hand_cc: float
    F2: NDArray[np.complex128]
    statistics: PhaseStatistics


def allowed_shifts(space_group: gemmi.SpaceGroup, shape: tuple[int, int, int], inverted: bool) -> NDArray[np.bool_]:
    """Grid points by which a density may be moved (after inversion) and still obey the space group, bool [X, Y, Z].

    Moved by s, x -> R x + t becomes x -> R x + t + (1 - R) s; inverted as well, x -> R x - t + (1 - R) s.
    """
    X, Y, Z = shape
    points = np.stack(np.meshgrid(np.arange(X) / X, np.arange(Y) / Y, np.arange(Z) / Z, indexing="ij"), -1)
    allowed = np.ones(shape, bool)
    lattice = centrings(space_group)
    for rotation, translation in operations(space_group)[1:]:
        change = points @ (np.eye(3) - rotation).T - (2 * translation if inverted else 0)
        ok = np.zeros(shape, bool)
        for centring in lattice:
            rest = change - centring
            ok |= (abs(rest - np.round(rest)) < 1e-6).all(-1)
        allowed &= ok
    return allowed


def _free_directions(space_group: gemmi.SpaceGroup) -> NDArray[np.float64]:
    """Orthonormal basis [3, K] of the directions along which the origin is not fixed (polar axes; all three in P1)."""
    stacked = np.concatenate([np.zeros((1, 3)), *(np.eye(3) - rotation for rotation, _ in operations(space_group))])
    _, sizes, rows = np.linalg.svd(stacked)
    return rows[sizes < 1e-9].T


def match(
    F1: ArrayLike,
    F2: ArrayLike,
    hkl: ArrayLike,
    cell: gemmi.UnitCell | tuple[float, ...],
    space_group: gemmi.SpaceGroup | str = "P 1",
    *,
    weights: ArrayLike | None = None,
    fom: ArrayLike | None = None,
    hand: bool = True,
    n_shells: int = 10,
) -> Match:
    """Find the shift and hand, among those the space group allows, that bring F2 closest to F1; judge the phases then.

    Maximises m(s) = sum w |F1||F2| cos(phi1 - phi2(s)) by one Fourier transform per hand, refined between grid points.

    Args:
        F1: structure factors of the truth, complex [N], e.
        F2: those to move, complex [N]; any scale.
        hkl: indices, [N, 3], each reflection once; F000 is left out.
        cell: A, degrees.
        space_group: gemmi's or a Hermann-Mauguin name.
        weights: of the reflections in the search, [N]; 1 if not given.
        fom: figures of merit of F2, [N], for the statistics.
        hand: also try the inverted F2, where the space group allows that.
        n_shells: resolution shells of the statistics.

    Returns:
        the Match; its `shift` s says new F2(h) = (conj F2 or F2)(h) exp(2 pi i h.s).

    Raises:
        InputError: arrays of unequal length, nothing to compare, or values that are not finite.

    Ref: the search of CCP4's cphasematch, by FFT.
    """
    unit_cell = usable_cell(cell)
    group = space_group if isinstance(space_group, gemmi.SpaceGroup) else gemmi.SpaceGroup(space_group)
    index = np.asarray(hkl, np.int64)
    first, second = np.asarray(F1, np.complex128), np.asarray(F2, np.complex128)
    if index.ndim != 2 or index.shape[1] != 3 or first.shape != (len(index),) or second.shape != (len(index),):
        raise InputError(
            f"F1, F2 must be [N] and hkl [N, 3], got {list(first.shape)}, {list(second.shape)} and {list(index.shape)}"
        )
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise InputError("F1 and F2 must be finite; leave out reflections without phases")
    keep = np.asarray(index.any(1))
    if not keep.any() or not abs(first[keep]).any() or not abs(second[keep]).any():
        raise InputError("F1 and F2 must hold a reflection that is not zero besides F000")
    merit = None if fom is None else np.asarray(fom)[keep]
    index, first, second = index[keep], first[keep], second[keep]
    w = np.ones(len(index)) if weights is None else np.asarray(weights, np.float64)[keep]

    p1_hkl, p1_first, rows = expand_to_p1(index, first, group)
    # Multiples of 24 hold the origins that symmetry fixes; P1 has none.
    fixed = len(operations(group)) > 1
    x, y, z = (fft_size(int(2.5 * n) + 3, 24 if fixed else 1) for n in abs(p1_hkl).max(0))
    shape = (x, y, z)
    found: list[tuple[float, NDArray, bool, NDArray]] = []
    for inverted in (False, True) if hand else (False,):
        candidate = second.conj() if inverted else second
        # Inverted after the expansion: the inverted density has translations -t until the shift brings t back.
        p1_second = expand_to_p1(index, second, group)[1]
        product = w[rows] * p1_first * (p1_second if inverted else p1_second.conj())
        allowed = allowed_shifts(group, shape, inverted) if fixed else None
        if allowed is not None and not allowed.any():
            continue
        half = np.zeros((x, y, z // 2 + 1), np.complex128)
        for sign, value in ((1, product), (-1, product.conj())):
            chosen = sign * p1_hkl[:, 2] >= 0
            h = sign * p1_hkl[chosen]
            # irfftn sums exp(+2 pi i h.s); the search wants exp(-2 pi i h.s), so the conjugate goes in.
            half[h[:, 0] % x, h[:, 1] % y, h[:, 2]] = value[chosen].conj()
        overlap = np.fft.irfftn(half, s=shape, axes=(0, 1, 2))
        if allowed is not None:
            overlap = np.where(allowed, overlap, -np.inf)
        start = np.array(np.unravel_index(overlap.argmax(), shape)) / np.array(shape)
        shift = climb(start, product, p1_hkl, _free_directions(group))
        phased = candidate * np.exp(2j * np.pi * (index @ shift))
        found.append((float((product * np.exp(-2j * np.pi * (p1_hkl @ shift))).real.sum()), shift, inverted, phased))
    found.sort(key=lambda item: -item[0])
    ccs = []
    for _, _, _, phased in found:
        p1_phased = expand_to_p1(index, phased, group)[1]
        power = (abs(p1_first) ** 2).sum() * (abs(p1_phased) ** 2).sum()
        ccs.append(float((p1_first * p1_phased.conj()).real.sum() / np.sqrt(power)))
    _, shift, inverted, phased = found[0]
    a, b, c = (shift - np.floor(shift)).tolist()
    statistics = phase_statistics(first, phased, index, unit_cell, n_shells=n_shells, fom=merit)
    result = np.zeros(len(keep), np.complex128)
    result[keep] = phased
    return Match(
        shift=(a, b, c),
        inverted=inverted,
        map_cc=ccs[0],
        other_hand_cc=ccs[1] if len(ccs) > 1 else float("nan"),
        F2=result,
        statistics=replace(statistics, shift=(a, b, c), inverted=inverted),
    )


def random_floor(
    F1: ArrayLike,
    hkl: ArrayLike,
    cell: gemmi.UnitCell | tuple[float, ...],
    space_group: gemmi.SpaceGroup | str = "P 1",
    *,
    trials: int = 5,
    seed: int = 0,
) -> float:
    """Mean phase error, degrees, of random phases after the same search: what `match` finds in nothing at all.

    Args:
        F1, hkl, cell, space_group: as for `match`.
        trials: sets of random phases.
        seed: of them.
    """
    generator = np.random.default_rng(seed)
    first = np.asarray(F1, np.complex128)
    errors = []
    for _ in range(trials):
        random = abs(first) * np.exp(2j * np.pi * generator.random(len(first)))
        errors.append(match(first, random, hkl, cell, space_group, n_shells=1).statistics.overall.phase_error)
    return float(np.mean(errors))
