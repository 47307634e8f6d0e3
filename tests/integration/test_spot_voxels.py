"""The compiled forward model against the plain one, and what both must fulfil."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xtalfast import _native
from xtalfast.integration import spot_voxels
from xtalfast.integration.kabsch import box_edges, direction_coordinates
from xtalfast.integration.spot_shape import spot_geometry, whiten
from xtalfast.integration.spot_voxels import DensityModel, SpotPixels, gaussian_voxels, gaussian_voxels_reference

SHAPE = (torch.tensor([[0.8, 0.15], [0.15, 0.5]]), torch.tensor(2.6e-3), torch.tensor(3e-4))


@pytest.fixture(params=[(3, 11, 13), (5, 8, 9), (1, 1, 1)], ids=lambda box: "x".join(map(str, box)))
def spots(request, traced):
    store = traced(20, box=request.param, edge=True)
    return store, whiten(spot_geometry(store, [store.experiment], np.arange(store.n)), *SHAPE)


@pytest.fixture
def plain(monkeypatch):
    """Switches the extension off when called."""
    return lambda: monkeypatch.setattr(_native, "C", None)


def random_density(cells: int = 2) -> torch.Tensor:
    density = torch.rand(cells, 5, 7, 7, generator=torch.Generator().manual_seed(1))
    return density / density.sum(dim=(1, 2, 3), keepdim=True)


def model_of(at) -> DensityModel:
    cell = torch.rand(len(at.pixels), 2, generator=torch.Generator().manual_seed(2))
    return DensityModel(at, cell / cell.sum(dim=1, keepdim=True), (5, 7, 7))


def test_gaussian_shares(spots) -> None:
    _, at = spots
    share, expected = gaussian_voxels(at), gaussian_voxels_reference(at)
    assert share.shape == (20, *at.pixels.box)
    # sums of nine exponentials of up to |u|^2 / 2 = 50 in single precision
    assert torch.allclose(share, expected, rtol=2e-5, atol=1e-8)


def test_density_shares_and_their_transpose(spots, plain) -> None:
    _, at = spots
    model, density = model_of(at), random_density()
    share = model.voxels(density)
    assert torch.allclose(share, model.voxels_reference(density), rtol=1e-5, atol=1e-7)
    factors = (torch.rand_like(share), torch.rand_like(share) - 0.5)
    found = model.transpose(factors)
    for total, factor in zip(found, factors):  # <factor, A density> = <A^T factor, density>
        assert float((total * density).sum()) == pytest.approx(
            float((factor * share).double().sum()), rel=1e-4, abs=1e-6
        )
    plain()
    for total, expected in zip(found, model.transpose(factors)):
        assert torch.allclose(total, expected, rtol=1e-4, atol=1e-6)


def test_directions_and_foreground(spots, plain) -> None:
    store, at = spots
    pixels = at.pixels
    rotation = np.linspace(0, 0.9, store.n * store.box[0], dtype=np.float32).reshape(store.n, -1)
    directions, inside = pixels.directions(), pixels.foreground(4e-3, rotation)
    s1 = np.asarray(store.metadata["s1"], float)
    x, y, _ = box_edges(store.metadata["bbox"])
    kabsch = direction_coordinates(store.experiment, store.metadata["panel"], s1, x[:, :-1] + 0.5, y[:, :-1] + 0.5)
    assert np.abs(directions.numpy() - kabsch).max() < 1e-6  # rad; float32 of s1
    plain()
    assert torch.allclose(directions, pixels.directions(), atol=1e-8)
    differ = inside != pixels.foreground(4e-3, rotation)
    assert differ.mean() < 1e-3  # only voxels on the edge
    assert inside.any() and (store.box == (1, 1, 1) or not inside.all())


def test_a_window_looks_at_the_same_pixels(traced) -> None:
    store = traced(5, box=(3, 11, 13))
    rows = np.arange(5)
    columns = {name: store.metadata[name][rows] for name in ("id", "panel", "bbox", "xyzcal_px")}
    columns["xyzcal_px"] = columns["xyzcal_px"].astype(float)
    pixels, _ = SpotPixels.of_rows(
        [store.experiment], columns["id"], columns["panel"], columns["bbox"], columns["xyzcal_px"], store.box
    )
    part = pixels.window(slice(2, 9), slice(3, 12))
    assert part.box == (3, 7, 9)
    assert torch.equal(part.directions(), pixels.directions()[:, 2:9, 3:12])


def test_threads_and_zero_boxes(spots) -> None:
    _, at = spots
    threads = torch.get_num_threads()
    try:
        found = []
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append((gaussian_voxels(at), model_of(at).voxels(random_density())))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found))
    none = at.select(slice(0, 0))
    assert gaussian_voxels(none).shape == (0, *at.pixels.box)
    assert spot_voxels.DensityModel(none, torch.zeros(0, 2), (5, 7, 7)).voxels(random_density()).shape[0] == 0
