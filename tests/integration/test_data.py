"""The loader: every row once an epoch, the same order from the same seed, equal shares, true values, errors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from xtalfast.errors import InputError
from xtalfast.integration.data import CachedProfiles, ShoeboxLoader, common_box, join_batches, read_batch
from xtalfast.integration.splits import held_out, mixed_keys, thin_photons


@pytest.mark.parametrize("n, batch", [(1, 1), (50, 7), (3000, 128), (5000, 5000)])
def test_an_epoch_holds_every_row_at_most_once(spots, n, batch):
    loader = ShoeboxLoader([spots(n, (1, 2, 2))], np.arange(n), batch)
    rows = np.concatenate([loader.step_rows(step) for step in range(loader.steps_per_epoch)])
    assert len(rows) == n // batch * batch
    assert len(np.unique(rows)) == len(rows)


def test_order_follows_seed_and_epoch_and_mixes_near_rows(spots):
    store = spots(40_000, (1, 1, 1))
    rows = np.arange(store.n)
    first, again, other = (ShoeboxLoader([store], rows, 100, seed=s) for s in (1, 1, 2))
    assert np.array_equal(first.order(3), again.order(3))
    assert not np.array_equal(first.order(3), first.order(4))
    assert not np.array_equal(first.order(3), other.order(3))
    assert np.array_equal(np.sort(first.order(0)), rows)
    span = np.ptp(first.order(0)[: 4 * 4096].reshape(-1, 64), axis=1)
    assert np.median(span) > 5000  # a batch is not one stretch of the scan


def test_steps_are_read_in_order_and_from_any_step(spots):
    store = spots(700)
    loader = ShoeboxLoader([store], np.arange(700), 50, ahead=3)
    seen = [b.xyzcal_px for b in loader.steps(0, 20)]
    assert len(seen) == 20
    for step, xyz in enumerate(seen):
        assert np.array_equal(xyz.numpy(), store.metadata["xyzcal_px"][loader.step_rows(step)])
    later = [b.xyzcal_px for b in loader.steps(13, 20)]
    assert all(torch.equal(a, b) for a, b in zip(later, seen[13:]))


def test_several_stores_are_one_list_of_rows(spots):
    a, b = spots(30, seed=1), spots(20, seed=2)
    b.values = b.values.astype(np.int32)
    loader = ShoeboxLoader([a, b], np.arange(50), 16)
    batch = loader.read(np.array([0, 29, 30, 49]))
    expected = np.concatenate([a.values[[0, 29]].astype(np.int32), b.values[[0, 19]]])
    assert np.array_equal(batch.counts.numpy(), expected)
    assert np.array_equal(batch.bbox.numpy()[2:], b.metadata["bbox"][[0, 19]])
    chunks = list(loader.chunks(np.arange(50)))
    assert [len(c) for c in chunks] == [16, 16, 16, 2]
    assert torch.equal(join_batches(chunks).counts, loader.read(np.arange(50)).counts)


def test_processes_share_a_batch_without_overlap(spots):
    store = spots(100)
    whole = ShoeboxLoader([store], np.arange(100), 33)
    shares = [ShoeboxLoader([store], np.arange(100), 33, rank=r, world=4) for r in range(4)]
    for step in range(5):
        parts = [share.step_rows(step) for share in shares]
        assert np.array_equal(np.concatenate(parts), whole.step_rows(step))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(InputError, match="too few for 4 processes"):
        ShoeboxLoader([store], np.arange(3), 33, world=4)


def test_held_out_is_a_property_of_the_row(spots):
    store = spots(20_000, (1, 1, 1))
    kept = held_out([store], 0.1, 0)
    assert 0.09 < kept.mean() < 0.11
    assert not np.array_equal(kept, held_out([store], 0.1, 1))
    order = np.random.default_rng(0).permutation(store.n)
    shuffled = replace(store, metadata={"row": order})
    assert np.array_equal(held_out([shuffled], 0.1, 0), kept[order])
    both = held_out([store, store], 0.1, 0)
    assert np.array_equal(both[: store.n], kept) and not np.array_equal(both[store.n :], kept)
    assert not held_out([store], 0.0, 0).any()


def test_used_voxels_are_valid_and_not_overlapped(spots):
    store = spots(20)
    batch = read_batch(store, np.arange(20))
    assert np.array_equal(batch.used.numpy(), store.bits == 1)
    boolean = replace(batch, mask=batch.used)
    assert torch.equal(boolean.used, batch.used)


def test_offset_is_the_centroid_in_the_box(spots):
    store = spots(200, (3, 15, 15), intensity=1e5)
    batch = read_batch(store, np.arange(200))
    grid = np.stack(np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in store.box), indexing="ij"), -1).reshape(-1, 3)
    centre = store.profile @ grid
    assert np.abs(batch.offset.numpy()).max() <= 0.5
    assert batch.offset.numpy()[:, 1:] == pytest.approx(centre[:, 1:], abs=0.05)


def test_cached_profiles_are_those_of_the_source(spots, tmp_path):
    store = spots(2500, (1, 5, 5))
    path = tmp_path / "profiles.npy"
    cached = CachedProfiles(store, store, path)
    rows = np.array([2499, 0, 1024])
    assert torch.allclose(cached.profiles(rows), store.profiles(rows), rtol=1e-3, atol=1e-7)
    stamp = path.stat().st_mtime_ns
    CachedProfiles(store, store, path)
    assert path.stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match="remove the file"):
        CachedProfiles(spots(10, (1, 5, 5)), spots(10, (1, 5, 5)), path)


def test_an_error_while_reading_reaches_the_caller(spots):
    store = spots(100)
    store.counts = lambda rows: 1 / 0
    with pytest.raises(ZeroDivisionError):
        list(ShoeboxLoader([store], np.arange(100), 10).steps(0, 5))


def test_stores_must_share_one_box(spots):
    assert common_box([spots(3), spots(4)]) == (3, 9, 9)
    ragged = replace(spots(3), box=None)
    for stores in ([], [spots(0)], [spots(3), spots(3, (1, 9, 9))], [ragged], [spots(3), ragged]):
        with pytest.raises(InputError, match="store"):
            common_box(stores)


@pytest.mark.parametrize("photons", [0, 1, 2, 31, 32, 33, 1000])
def test_half_of_the_photons_is_binomial(photons):
    """Mean n/2 and variance n/4, each to four standard errors of its estimate."""
    n = 400_000
    half = thin_photons(
        np.full((n // 100, 100), photons, np.uint16), mixed_keys(3, 1, np.arange(n // 100, dtype=np.uint64))
    )
    assert half.min() >= 0 and half.max() <= photons and half.dtype == np.uint16
    rounding = 1 / 12 if photons > 32 else 0
    assert abs(half.mean() - photons / 2) <= 4 * np.sqrt(photons / 4 / n)
    assert abs(half.var() - photons / 4 - rounding) <= 4 * photons / 4 * np.sqrt(2 / n)


def test_the_two_halves_of_poisson_counts_are_independent():
    rng = np.random.default_rng(0)
    counts = rng.poisson(3.0, (4000, 100)).astype(np.uint16)
    half = thin_photons(counts, mixed_keys(0, 0, np.arange(4000, dtype=np.uint64))).astype(float)
    rest = counts - half
    assert abs(np.corrcoef(half.ravel(), rest.ravel())[0, 1]) < 4 / np.sqrt(counts.size)
    neighbours = np.corrcoef(half[:, 1:].ravel(), half[:, :-1].ravel())[0, 1]
    assert abs(neighbours) < 4 / np.sqrt(counts.size)


def test_photons_are_split_anew_each_epoch_and_alike_in_any_process(spots):
    store = spots(64)
    rows = np.arange(64)
    whole = ShoeboxLoader([store], rows, 64, thin=True)
    first, second = whole.read_step(0).seen, whole.read_step(1).seen
    assert not torch.equal(first, second)
    shares = [ShoeboxLoader([store], rows, 64, thin=True, rank=rank, world=2).read_step(1).seen for rank in (0, 1)]
    assert torch.equal(torch.cat(shares), second)
    assert ShoeboxLoader([store], rows, 64).read(rows).seen is None


def test_steps_read_blocks_once_an_epoch(spots):
    """Rows of a large store come out right although only a few of its blocks are held."""
    store = spots(100_000, (1, 1, 1))
    asked = []
    read = store.counts
    store.counts = lambda rows: asked.append(len(rows)) or read(rows)
    loader = ShoeboxLoader([store], np.arange(store.n), 500)
    for step in range(loader.steps_per_epoch):
        rows = loader.step_rows(step)
        assert np.array_equal(loader.read_step(step).counts.numpy(), store.values[rows])
    assert sum(asked) == store.n
