"""Limiting the resolution of maps against the same in plain torch with a ready-made mask, one thread."""

from __future__ import annotations

import pytest
import torch

from xtalfast.ops import limit_resolution
from xtalfast.ops.structure_factors import inside_sphere

GRID = (36, 48, 60)


@pytest.mark.parametrize("n_maps", [1, 16])
def test_limit_resolution(paired, n_maps):
    cells = torch.tensor([[17.4, 21.5, 27.2, 100.0, 110.0, 95.0]], dtype=torch.float64).repeat(n_maps, 1)
    density = torch.rand(n_maps, *GRID, generator=torch.Generator().manual_seed(0))
    mask = inside_sphere(cells, GRID, 1 / 1.5**2, False)

    def plain():
        return torch.fft.irfftn(torch.fft.rfftn(density, dim=(1, 2, 3)) * mask, s=GRID, dim=(1, 2, 3))

    assert torch.allclose(limit_resolution(density, cells, 1.5), plain(), atol=1e-5)
    paired(lambda: limit_resolution(density, cells, 1.5), plain)
