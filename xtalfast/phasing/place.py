"""From a density found in P1 to phases of the crystal: its origin, its hand, its symmetry, its figures of merit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from xtalfast.phasing.data import Measured, sim_weights
from xtalfast.phasing.fourier import FourierGrid
from xtalfast.phasing.hand import Hand, chirality
from xtalfast.phasing.symmetry import impose_symmetry, locate_origin, operations

# Symmetry scores of the two hands this far apart decide between them.
SYMMETRY_MARGIN = 0.1


@dataclass(frozen=True)
class Placed:
    """Structure factors of the asymmetric unit in both hands, complex [N], and what is known about them."""

    F: NDArray[np.complex128]
    F_inverse: NDArray[np.complex128]
    fom: NDArray[np.float64]
    hand: Hand
    symmetry_score: float


def place(data: Measured, grid: FourierGrid, spectrum: Tensor, flat: Tensor) -> Placed:
    """Put the origin where the space group has it (in P1: the molecule in the middle of the cell) and choose the hand.

    Args:
        data: the measured amplitudes.
        grid: of the spectra.
        spectrum: of the final map [X, Y, Z // 2 + 1].
        flat: of the same map with its solvent flattened: the model that figures of merit are judged by.
    """
    found, model = (grid.gather(s, data.p1_hkl).cpu().numpy().astype(np.complex128) for s in (spectrum, flat))
    both = ((found, model), (found.conj(), model.conj()))
    score, hand = float("nan"), None
    if len(operations(data.space_group)) == 1:
        centre = _centre(grid, flat)
        # The inverse has its centre at -centre.
        shifts = [0.5 - centre, 0.5 + centre]
    else:
        located = [locate_origin(data.p1_hkl, f, data.space_group) for f, _ in both]
        shifts, scores = [shift for shift, _ in located], [score for _, score in located]
        score = max(scores)
        if abs(scores[0] - scores[1]) > SYMMETRY_MARGIN:
            hand = Hand("inverted" if scores[1] > scores[0] else "as found", "space group", score)
    if hand is None:
        hand = chirality(found, data.p1_hkl, data.cell, data.d_min)
    candidates = [_symmetric(data, f, m, shift) for (f, m), shift in zip(both, shifts)]
    if hand.choice == "inverted":
        candidates.reverse()
    (F, fom), (F_inverse, _) = candidates
    return Placed(F, F_inverse, fom, hand, score)


def _symmetric(
    data: Measured, found: NDArray, model: NDArray, shift: NDArray
) -> tuple[NDArray[np.complex128], NDArray[np.float64]]:
    """Measured amplitudes [N] with the phases of a P1 density moved by `shift` and averaged over symmetry, and FOMs."""
    moved = np.exp(2j * np.pi * (data.p1_hkl @ shift))
    averaged, calculated = (impose_symmetry(data.p1_hkl, f * moved, data.space_group, data.hkl) for f in (found, model))
    d = np.asarray(data.cell.calculate_d_array(np.ascontiguousarray(data.hkl, np.int32)))
    return data.F * np.exp(1j * np.angle(averaged)), sim_weights(data.F, abs(calculated), d)


def _centre(grid: FourierGrid, flat: Tensor) -> NDArray[np.float64]:
    """Centre of a density on a periodic cell (fractions): the phase of its first harmonic along each axis."""
    first = grid.gather(flat, np.eye(3, dtype=np.int64)).cpu().numpy()
    return np.angle(first) / (2 * np.pi)
