"""The solver's iteration against the same written plainly in numpy and scipy, one trial after the other, one thread."""

from __future__ import annotations

import gemmi
import numpy as np
import pytest
import scipy.fft
import torch

from xtalfast.phasing.data import measured
from xtalfast.phasing.mask import sampling_step, smoothing
from xtalfast.phasing.paired import PairedAmplitudes, hio_, join
from xtalfast.phasing.search import SearchOptions, random_maps

CELL = gemmi.UnitCell(17.4, 21.5, 27.2, 100, 110, 95)  # of the median fragment
N_ATOMS, D_MIN, SOLVENT, BETA = 118, 2.0, 0.65, 0.5
OPTIONS = SearchOptions()


@pytest.fixture
def amplitudes():
    hkl = np.array(gemmi.make_miller_array(CELL, gemmi.SpaceGroup("P 1"), D_MIN))
    atoms = np.random.default_rng(0).random((N_ATOMS, 3)) * 0.6
    F = abs(np.exp(2j * np.pi * (hkl @ atoms.T)).sum(1))
    data = measured(F, hkl, CELL, "P 1", None)
    return data.amplitudes(data.grid(D_MIN, 2.0, paired=True), data.hold_out(0.05, 0))


def plain(maps: np.ndarray, values: np.ndarray, bound: np.ndarray, inside: np.ndarray, smooth: np.ndarray, n: int):
    """n iterations of hybrid input-output on maps [B, X, Y, Z], as anyone would write them."""
    results = []
    for density in maps:
        for iteration in range(n):
            spectrum = scipy.fft.rfftn(density, norm="forward")
            phased = values * np.exp(1j * np.angle(spectrum))
            spectrum = np.where(bound, phased, np.where(inside, spectrum, 0))
            projected = scipy.fft.irfftn(spectrum, s=density.shape, norm="forward")
            if iteration % OPTIONS.mask_every == 0:
                local = scipy.fft.irfftn(scipy.fft.rfftn(np.maximum(projected, 0) ** 2) * smooth, s=density.shape)
                sample = local.ravel()[:: sampling_step(local.size)]
                rank = int(SOLVENT * len(sample)) - 1
                protein = local > np.partition(sample, rank)[rank]
            density = np.where(protein & (projected > 0), projected, density - BETA * projected)
        results.append(density)
    return np.stack(results)


def test_iterations(paired, amplitudes):
    grid, n = amplitudes.grid, OPTIONS.mask_every
    maps = random_maps(amplitudes, OPTIONS.batch, torch.Generator().manual_seed(0))
    data = PairedAmplitudes(amplitudes, OPTIONS.radius)
    solvent = torch.full((OPTIONS.batch,), SOLVENT)
    arrays = [t.numpy() for t in (amplitudes.values, amplitudes.bound, grid.inside, smoothing(grid, OPTIONS.radius))]

    def ours():
        pairs = join(maps)
        for iteration in range(n):
            projected = data.project(pairs)
            if iteration % OPTIONS.mask_every == 0:
                protein = data.protein_mask(projected, solvent)
            pairs = hio_(pairs, projected, protein, data, BETA)
        return pairs

    def theirs():
        return plain(maps.numpy(), *arrays, n)

    # Rounding may put a voxel at the threshold on the other side.
    found, wanted = ours().permute(0, 4, 1, 2, 3).flatten(0, 1).numpy(), theirs()
    assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 0.97
    paired(ours, theirs, at_least=5.0, rounds=20)
