"""find_peaks against known maxima, on densities and Patterson maps."""

import gemmi
import numpy as np
import pytest
import torch

from xtalfast.density.peaks import find_peaks
from xtalfast.errors import InputError
from xtalfast.ops import density_map, patterson_map

CELL = (14.0, 15.5, 17.0, 100.0, 95.0, 110.0)
ATOMS = np.array([[0.1, 0.2, 0.3], [0.42, 0.25, 0.61], [0.75, 0.8, 0.15]])


@pytest.fixture(scope="module")
def density():
    cell = gemmi.UnitCell(*CELL)
    coords = [cell.orthogonalize(gemmi.Fractional(*x)).tolist() for x in ATOMS.tolist()]
    values = torch.ones(3)
    return density_map(
        torch.tensor(coords).float(), torch.tensor([26, 16, 8]), 20 * values, values, torch.tensor([0, 3]),
        torch.tensor([CELL], dtype=torch.float64), (40, 48, 48),
    )  # fmt: skip


def distance(first, second):
    """To the nearest of all lattice copies, A."""
    shifts = np.stack(np.meshgrid(*[np.arange(-3, 4)] * 3), -1).reshape(-1, 3)
    orth = np.array(gemmi.UnitCell(*CELL).orth.mat.tolist())
    return np.linalg.norm((np.asarray(first) - second + shifts) @ orth.T, axis=1).min()


def test_peaks_of_a_density_are_its_atoms(density):
    peaks = find_peaks(density[0].numpy(), gemmi.UnitCell(*CELL), 3)
    assert all(distance(peak.fractional, atom) < 0.05 for peak, atom in zip(peaks, ATOMS))  # iron, sulphur, oxygen
    assert peaks[0].height > peaks[1].height > peaks[2].height


def test_peaks_of_a_patterson_map_are_the_vectors_between_atoms(density):
    patterson = patterson_map(density, torch.tensor([CELL], dtype=torch.float64), d_min=1.0)[0].numpy()
    peaks = find_peaks(patterson, gemmi.UnitCell(*CELL), 3, inversion=True)
    wanted = [(ATOMS[i] - ATOMS[j], i, j) for i, j in ((0, 1), (0, 2), (1, 2))]  # by the product of their electrons
    for peak, (vector, i, j) in zip(peaks, wanted):
        assert min(distance(peak.fractional, sign * vector) for sign in (1, -1)) < 0.08
        assert peak.length == pytest.approx(distance(ATOMS[i], ATOMS[j]), abs=0.08)


def test_a_flat_top_is_one_peak_and_a_flat_map_has_none():
    values = np.zeros((6, 7, 8))
    assert find_peaks(values, gemmi.UnitCell(*CELL)) == []
    values[2, 3, 4:6] = 1
    (peak,) = find_peaks(values, gemmi.UnitCell(*CELL))
    assert peak.fractional[2] == pytest.approx(4.5 / 8)


def test_bad_input():
    cell = gemmi.UnitCell(*CELL)
    with pytest.raises(InputError, match="3 points or more"):
        find_peaks(np.zeros((2, 5, 5)), cell)
    with pytest.raises(InputError, match="1 points of the map are not finite"):
        find_peaks(np.where(np.arange(125) == 7, np.nan, 0).reshape(5, 5, 5), cell)
