"""Trials in pairs: every pass of the compiled kernels against plain torch on single maps."""

from __future__ import annotations

import gemmi
import pytest
import torch

from xtalfast import _native
from xtalfast.phasing import paired
from xtalfast.phasing.data import measured
from xtalfast.phasing.fourier import FourierGrid, paired_fft_size
from xtalfast.phasing.mask import protein_mask
from xtalfast.phasing.paired import PairedAmplitudes
from xtalfast.phasing.projections import flatten_solvent
from xtalfast.phasing.updates import UPDATES

SHAPES = [(11, 12, 13), (12, 15, 16), (16, 16, 24)]


@pytest.fixture(params=SHAPES, ids=lambda s: "x".join(map(str, s)))
def amplitudes(request, make_crystal):
    crystal = make_crystal(0, n_atoms=12, cell=(11, 12, 13, 80, 95, 105), d_min=2.4)
    data = measured(abs(crystal.F), crystal.hkl, crystal.cell, "P 1", None)
    grid = FourierGrid(crystal.cell, request.param, 2.4)
    return data.amplitudes(grid, data.hold_out(0.1, 0))


@pytest.fixture(params=["compiled", "torch"])
def route(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(paired, "_on_cpu", lambda tensor: False)
    elif _native.C is None:
        pytest.fail("the compiled extension is missing")
    return request.param


def maps_of(amplitudes, n: int) -> torch.Tensor:
    return torch.randn((n, *amplitudes.grid.shape), generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("n", [0, 2, 6])
def test_projection(amplitudes, route, n):
    maps = maps_of(amplitudes, n)
    pairs = paired.join(maps)
    assert torch.equal(paired.split(pairs), maps)
    found = paired.split(PairedAmplitudes(amplitudes, 3.0).project(pairs))
    wanted = amplitudes.project(maps.double()) if n else maps
    assert float((found - wanted).abs().sum()) <= 1e-5 * float(wanted.abs().sum())


def test_projection_of_nothing_and_of_equal_members(amplitudes, route):
    """A map of zeros has no phases to keep; two members that are equal have a mirrored spectrum that cancels."""
    data = PairedAmplitudes(amplitudes, 3.0)
    empty = data.project(torch.zeros((1, *amplitudes.grid.shape, 2)))
    assert torch.isfinite(empty).all()
    one = maps_of(amplitudes, 1)
    found = paired.split(data.project(paired.join(torch.cat([one, one]))))
    wanted = amplitudes.project(one).expand(2, -1, -1, -1)
    assert float((found - wanted).norm()) < 1e-5 * float(wanted.norm())


def test_mask(amplitudes, route):
    maps, solvent = maps_of(amplitudes, 4), torch.tensor([0.3, 0.5, 0.6, 0.9])
    found = paired.split(PairedAmplitudes(amplitudes, 3.0).protein_mask(paired.join(maps), solvent))
    wanted = protein_mask(maps, amplitudes.grid, solvent, 3.0)
    # Voxels at the threshold may fall to either side.
    assert float((found != wanted).float().mean()) < 2 / amplitudes.grid.n_voxels


def test_update_and_flattening(amplitudes, route):
    maps, projected = maps_of(amplitudes, 4), maps_of(amplitudes, 4).flip(0)
    protein = maps.roll(1, 1) > 0
    wanted = UPDATES["hio"][0](maps, projected, protein, amplitudes, 0.5)
    pairs = [paired.join(array) for array in (maps, projected, protein)]
    torch.testing.assert_close(paired.split(paired.hio_(*pairs, amplitudes, 0.5)), wanted)
    for flip in (0.0, 0.5):
        found = paired.split(paired.flatten_(paired.join(maps), pairs[2], flip))
        torch.testing.assert_close(found, flatten_solvent(maps, protein, flip))


@pytest.mark.parametrize("method", sorted(UPDATES))
def test_all_methods_take_pairs(amplitudes, method):
    maps = maps_of(amplitudes, 2)
    update, beta = UPDATES[method]
    data = PairedAmplitudes(amplitudes, 3.0)
    projected, protein = amplitudes.project(maps), maps > 0.3
    wanted = update(maps, projected, protein, amplitudes, beta)
    found = update(paired.join(maps), paired.join(projected), paired.join(protein), data, beta)
    torch.testing.assert_close(paired.split(found), wanted, rtol=1e-4, atol=1e-4)


def test_grid_sizes():
    assert [paired_fft_size(n) for n in (1, 17, 25, 33, 41, 49, 61)] == [8, 24, 32, 36, 48, 60, 64]
    for n in range(1, 200):
        size = paired_fft_size(n)
        assert size >= n and size % 4 == 0
        assert paired_fft_size(n, 12) % 12 == 0
    cell = gemmi.UnitCell(20, 20, 20, 90, 90, 90)
    assert FourierGrid.for_resolution(cell, 2.0, rate=2.0, paired=True).shape == (24, 24, 24)
