"""Features, masking and invariances of the shoebox encoders."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from xtalfast.integration.config import EncoderConfig
from xtalfast.integration.data import read_batch
from xtalfast.integration.encoders import CNNEncoder, InputTransform, VoxelFeatures, make_encoder
from xtalfast.integration.statistics import DataStatistics

KINDS = ("fc", "cnn")
BOXES = pytest.mark.parametrize("box", [(3, 9, 9), (1, 7, 11), (5, 4, 6)], ids=lambda b: "x".join(map(str, b)))


def batch_of(store, n=None):
    return read_batch(store, np.arange(store.n if n is None else n))


@BOXES
def test_axes_are_the_distances_of_voxel_centres(spots, box):
    store = spots(4, box)
    batch = batch_of(store)
    axes = VoxelFeatures("none").axes(batch)
    x, y, z = store.metadata["bbox"][:, 0::2].T
    for row in range(4):
        for iz, iy, ix in [(0, 0, 0), (box[0] - 1, box[1] - 1, box[2] - 1), (box[0] // 2, 1, 2)]:
            centre = np.array([x[row] + ix, y[row] + iy, z[row] + iz]) + 0.5
            distance = [axes[name].expand(-1, *box)[row, iz, iy, ix] for name in ("dx", "dy", "dz")]
            assert 4 * torch.stack(distance).numpy() == pytest.approx(
                centre - store.metadata["xyzcal_px"][row], abs=2e-4
            )
            position = [axes[name].expand(-1, *box)[row, iz, iy, ix] for name in ("x", "y", "z")]
            assert 1000 * torch.stack(position).numpy() == pytest.approx(centre, rel=1e-6)


@BOXES
@pytest.mark.parametrize("kind", KINDS)
def test_any_box_gives_a_latent_vector(spots, box, kind):
    encoder = make_encoder(EncoderConfig(kind=kind), box)
    latent = encoder(batch_of(spots(5, box)))
    assert latent.shape == (5, 64)
    latent.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters())


def test_channels_of_the_paper_and_of_stills(spots):
    config = EncoderConfig(position=False)
    for box, channels in (((3, 21, 21), 6), ((1, 21, 21), 4)):
        encoder = CNNEncoder(config, box)
        assert encoder.planes(batch_of(spots(2, box))).shape == (2, channels, 21, 21)
    every = replace(config, channels=("counts", "mask", "x", "y", "z", "dx", "dy", "dz"))
    assert CNNEncoder(every, (3, 9, 9)).planes(batch_of(spots(2))).shape == (2, 12, 9, 9)


def test_planes_are_counts_then_distances(spots):
    batch = batch_of(spots(12))
    planes = CNNEncoder(EncoderConfig(transform="none"), (3, 9, 9)).planes(batch)
    counts = (batch.counts.float() * batch.used).view(-1, 3, 9, 9)
    assert torch.equal(planes[:, :3], counts)
    steps = planes[:, 3].diff(dim=2), planes[:, 4].diff(dim=1)
    assert all(torch.allclose(step, torch.full_like(step, 0.25), atol=1e-4) for step in steps)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_voxels_are_not_seen(spots, kind):
    batch = batch_of(spots(20))
    garbage = replace(batch, counts=torch.where(batch.used, batch.counts.int(), 60000))
    assert not torch.equal(garbage.counts, batch.counts.int())
    encoder = make_encoder(EncoderConfig(kind=kind), batch.box)
    assert torch.equal(encoder(garbage), encoder(batch))


@pytest.mark.parametrize("kind", KINDS)
def test_whole_pixel_shifts_change_nothing_without_position(spots, kind):
    config = EncoderConfig(kind=kind, position=False, channels=("counts", "dx", "dy", "dz"))
    batch = batch_of(spots(6))
    moved = replace(batch, bbox=batch.bbox + 8, xyzcal_px=batch.xyzcal_px + 8)
    torch.manual_seed(0)
    encoder = make_encoder(config, batch.box)
    if kind == "fc":  # sees x, y, z: take their weights away
        with torch.no_grad():
            encoder.stem.weight.view(-1, 7, 3 * 81)[:, 1:4] = 0
    scale = encoder(batch).abs().max()
    assert (encoder(moved) - encoder(batch)).abs().max() < 1e-3 * scale  # float32 coordinates near 1000


@pytest.mark.parametrize("kind", KINDS)
def test_a_reflection_does_not_depend_on_its_batch(spots, kind):
    store = spots(8)
    encoder = make_encoder(EncoderConfig(kind=kind), store.box).double()
    batch = batch_of(store)
    double = replace(batch, xyzcal_px=batch.xyzcal_px.double())
    alone = replace(double, **{k: getattr(double, k)[3:4] for k in ("counts", "mask", "xyzcal_px", "bbox")})

    def run(b):
        encoder.features.transform.forward = lambda c: c.counts.double() * c.used
        return encoder(b)

    assert torch.allclose(run(alone)[0], run(double)[3], rtol=1e-10, atol=1e-12)


def test_anscombe_standardises_and_none_leaves(spots):
    batch = batch_of(spots(400))
    statistics = DataStatistics.of(batch)
    transform = InputTransform("anscombe")
    transform.set_statistics(statistics)
    values = transform(batch)[batch.used]
    assert float(values.mean()) == pytest.approx(0, abs=1e-4)
    assert float(values.std()) == pytest.approx(1, abs=1e-4)
    raw = InputTransform("none")
    raw.set_statistics(statistics)
    assert torch.equal(raw(batch)[batch.used], batch.counts.float()[batch.used])
    assert not transform(batch)[~batch.used].any() and not raw(batch)[~batch.used].any()


def test_a_batch_without_a_used_voxel_is_finite(spots):
    batch = batch_of(spots(3))
    blind = replace(batch, mask=torch.zeros_like(batch.mask))
    for kind in KINDS:
        assert torch.isfinite(make_encoder(EncoderConfig(kind=kind), batch.box)(blind)).all()
