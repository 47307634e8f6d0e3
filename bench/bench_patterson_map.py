"""Patterson maps against torch's general transform of |F|^2, one thread."""

from __future__ import annotations

import pytest
import torch

from xtalfast.ops import patterson_map, structure_factors

D_MIN = 1.5


@pytest.mark.parametrize("n_maps", [1, 16])
@pytest.mark.parametrize("grid", [(36, 48, 60), (64, 64, 64)], ids=lambda g: "x".join(map(str, g)))
def test_patterson(paired, grid, n_maps):
    cells = torch.tensor([[n * 0.5 for n in grid] + [100.0, 105.0, 95.0]], dtype=torch.float64).expand(n_maps, 6)
    volume = structure_factors(torch.ones(n_maps, *grid), cells)[:, :1, :1, :1].real
    density = torch.rand(n_maps, *grid, generator=torch.Generator().manual_seed(0))
    f = structure_factors(density, cells, d_min=D_MIN, f000=False)

    def plain():
        return torch.fft.irfftn(f.abs() ** 2 / volume, s=grid, dim=(1, 2, 3), norm="forward")

    ours = patterson_map(f, cells, d_min=D_MIN)
    assert (ours - plain()).abs().max() < 1e-5 * ours.max()
    paired(lambda: patterson_map(f, cells, d_min=D_MIN), plain, at_least=1 / 0.6)
