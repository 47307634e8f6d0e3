"""Shoebox stores: every voxel by brute force, odd rows, overlaps, resuming, memory; images are written by the test."""

import hashlib
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from xtalfast import _native
from xtalfast.errors import InputError
from xtalfast.integration import shoebox_rows, store
from xtalfast.integration.overlaps import PanelSpots, mark_overlaps, mark_overlaps_reference
from xtalfast.integration.predict import predict
from xtalfast.integration.shoeboxes import Reason, ShoeboxStore, extract_store, store_from_shoebox_column
from xtalfast.io import ImageReader, MiniCbfHeader, ReflectionTable, ShoeboxColumn, write_cbf
from xtalfast.models import Beam, Crystal, Detector, Experiment, Goniometer, Panel, Scan, rotation_matrix

SHAPE = (90, 150)  # of the image; panels of 70 columns with a gap of 10
N_IMAGES = 8
HEADER = MiniCbfHeader((0.5, 0.5), 1.0, 100.0, (75.0, 45.0))


def make_experiment(directory, *, hall=" P 1", cell=60.0, n_images=N_IMAGES, **panel):
    panels = [
        Panel(
            np.array([-37.5 + 0.5 * x, 22.5, -100.0]),
            np.array([1.0, 0, 0]),
            np.array([0, -1.0, 0]),
            (0.5, 0.5),
            (70, 90),
            mask=[(30, 0, 33, 90)],
            raw_image_offset=(x, 0),
            name=f"p{x}",
            **{"trusted_range": (0, 5000.0), **panel},
        )
        for x in (0, 80)
    ]
    A = rotation_matrix(np.array([1.0, 2, 3]), 0.4) / cell
    return Experiment(
        Beam(np.array([0, 0, 1.0]), 1.0),
        Detector(panels),
        Goniometer(np.array([1.0, 0, 0])),
        Scan((1, n_images), (0.0, 1.0)),
        Crystal(A, hall),
        {"__id__": "gaussian_rs", "n_sigma": 3.0, "sigma_b": 0.15, "sigma_m": 0.2},
        {"__id__": "ImageSequence", "template": str(directory / "image_####.cbf")},
    )


def make_images(directory, n_images=N_IMAGES, high=3000):
    images = np.random.default_rng(0).integers(-2, high, (n_images, *SHAPE)).astype(np.int32)
    for i, image in enumerate(images, 1):
        write_cbf(directory / f"image_{i:04d}.cbf", image, HEADER)
    return images


def make_table(experiment):
    found = predict(experiment, 3.3)
    columns = {"miller_index": found.hkl, "xyzcal.px": found.xyz_px, "panel": found.panel.astype(np.uint64)}
    return ReflectionTable.from_columns(columns)


@pytest.fixture
def data(tmp_path):
    experiment = make_experiment(tmp_path)
    return experiment, make_table(experiment), make_images(tmp_path)


def brute_force(experiment, images, panel, box):
    """Counts and validity of one box, voxel by voxel from the definitions."""
    x0, x1, y0, y1, z0, z1 = box
    counts, valid = [], []
    model = experiment.detector[panel]
    for z in range(z0, z1):
        for y in range(y0, y1):
            for x in range(x0, x1):
                value = -1
                inside = 0 <= z < len(images) and 0 <= y < 90 and 0 <= x < 70 and not 30 <= x < 33
                if inside:
                    value = int(images[z, y, x + model.raw_image_offset[0]])
                good = 0 <= value < model.trusted_range[1]
                counts.append(value if good else 0)
                valid.append(good)
    return np.array(counts), np.array(valid)


@pytest.mark.parametrize("box", [(3, 11, 13), "bbox"], ids=str)
def test_every_voxel(data, tmp_path, box):
    experiment, table, images = data
    made = extract_store(table, [experiment], tmp_path / "store", box=box)
    rows = np.arange(made.n)
    assert len(table) > 100 and sorted(made.metadata["row"].tolist()) == list(range(len(table)))
    if box == "bbox":
        values, ptr = made.counts(rows)
        bits, _ = made.mask(rows)
        assert made.box is None
    else:
        values, bits = made.counts(rows).ravel(), made.mask(rows).ravel()
        ptr = np.arange(made.n + 1) * 3 * 11 * 13
    for i in range(made.n):
        counts, valid = brute_force(experiment, images, made.metadata["panel"][i], made.metadata["bbox"][i])
        np.testing.assert_array_equal(values[ptr[i] : ptr[i + 1]], counts)
        np.testing.assert_array_equal((bits[ptr[i] : ptr[i + 1]] & 1) == 1, valid)
    used = (bits & 33) == 1
    assert made.statistics["photons"] == values[used].astype(np.int64).sum()
    assert made.statistics["n_voxels"] == used.sum()
    np.testing.assert_allclose(made.statistics["variance"], values[used].astype(float).var())
    np.testing.assert_allclose(made.statistics["anscombe_mean"], (2 * np.sqrt(values[used] + 0.375)).mean())


def test_rows_in_any_order(data, tmp_path, monkeypatch):
    experiment, table, _ = data
    monkeypatch.setattr(shoebox_rows, "SHARD_VOXELS", 20000)
    for box in ((3, 5, 7), "bbox"):
        made = extract_store(table, [experiment], tmp_path / str(box), box=box)
        assert len(list(made.path.glob("counts-*.npy"))) > 2
        rows = np.random.default_rng(0).integers(0, made.n, 50)
        if box == "bbox":
            values, ptr = made.counts(rows)
            for i, row in enumerate(rows):
                np.testing.assert_array_equal(values[ptr[i] : ptr[i + 1]], made.counts(np.array([row]))[0])
        else:
            np.testing.assert_array_equal(made.counts(rows), made.counts(np.arange(made.n))[rows])
        assert len(made.counts(np.zeros(0, np.int64))) in (0, 2)


def test_metadata_follow_the_table(data, tmp_path):
    experiment, table, _ = data
    made = extract_store(table, [experiment], tmp_path / "store", box=(3, 5, 5))
    row = made.metadata["row"]
    np.testing.assert_array_equal(made.metadata["hkl"], table["miller_index"][row])
    np.testing.assert_allclose(made.metadata["xyzcal_px"], table["xyzcal.px"][row], rtol=1e-6)
    middle = made.metadata["bbox"][:, ::2] + [2, 2, 1]
    np.testing.assert_array_equal(middle, np.floor(table["xyzcal.px"][row]))
    assert made.metadata["s1"].dtype == np.float32 and (made.metadata["flags"] & 1).all()
    assert "s1" not in table, "the caller's table is left as it is"


def test_odd_rows_are_kept_and_flagged(data, tmp_path):
    experiment, table, _ = data
    position = table["xyzcal.px"].copy()
    position[0] = np.nan
    position[1, 0], position[2, 2], position[3, 2], position[4, 2] = -40.0, 30.0, 0.2, -1.2
    table["xyzcal.px"] = position
    table["id"] = np.where(np.arange(len(table)) == 5, -1, 0).astype(np.int32)
    made = extract_store(table, [experiment], tmp_path / "store", box=(3, 5, 5))
    at = np.argsort(made.metadata["row"])
    reason = [Reason(int(r)) for r in made.metadata["reason"][at]]
    assert reason[0] == Reason.NotFinite | Reason.NoPixels
    assert Reason.OffPanel | Reason.Truncated | Reason.NoPixels in reason[1]
    assert Reason.OutOfScan | Reason.NoPixels in reason[2]
    assert Reason.Truncated in reason[3] and Reason.OutOfScan not in reason[3]
    assert Reason.OutOfScan | Reason.Truncated in reason[4]
    assert Reason.NoExperiment | Reason.NoPixels in reason[5]
    assert made.n == len(table) and made.statistics["reasons"]["NotFinite"] == 1
    assert not (made.mask(at[[0, 1, 2, 5]]) & 1).any()
    assert all(np.isfinite(made.metadata[name][at[0]]).all() for name in ("xyzcal_px", "s1", "d", "zeta"))


def test_small_boxes_are_flagged_by_the_modelled_share(data, tmp_path):
    """The share of the spot in the box, against the sum of a sampled Gaussian in pixels."""
    experiment, table, _ = data
    made = extract_store(table, [experiment], tmp_path / "store", box=(3, 3, 3))
    wide = extract_store(table, [experiment], tmp_path / "wide", box=(15, 41, 41))
    share = made.metadata["box_fraction"]
    flagged = (made.metadata["reason"] & Reason.SmallBox.value) != 0
    np.testing.assert_array_equal(flagged, share < 0.95)
    assert flagged.any() and made.statistics["reasons"]["SmallBox"] == flagged.sum()
    assert (wide.metadata["box_fraction"] > 0.999).mean() > 0.9
    i = int(np.argmin(np.abs(made.metadata["xyzcal_px"][:, 0] - 60)))
    sigma = np.radians(0.15) * 100 / 0.5  # px at normal incidence; the spot is longer by 1/cos along its radius
    draws = np.random.default_rng(0).normal(0, 1, (200000, 3))
    depth = np.radians(0.2) / abs(made.metadata["zeta"][i]) / np.radians(1.0)
    at = made.metadata["xyzcal_px"][i] + draws * [sigma, sigma, depth]
    box = made.metadata["bbox"][i]
    inside = np.mean(np.all((at >= box[::2]) & (at < box[1::2]), axis=1))
    assert share[i] == pytest.approx(inside, abs=0.06)


def test_overloads(data, tmp_path):
    experiment, table, images = data
    image = int(table["xyzcal.px"][0, 2])
    x, y = (int(v) for v in table["xyzcal.px"][0, :2])
    images[image, y, x + experiment.detector[int(table["panel"][0])].raw_image_offset[0]] = 5000
    write_cbf(tmp_path / f"image_{image + 1:04d}.cbf", images[image], HEADER)
    made = extract_store(table, [experiment], tmp_path / "store", box=(3, 11, 11))
    at = int(np.flatnonzero(made.metadata["row"] == 0)[0])
    assert made.metadata["reason"][at] & Reason.Overloaded and made.metadata["flags"][at] & 1024
    others = np.flatnonzero(made.metadata["row"] != 0)
    far = np.abs(made.metadata["xyzcal_px"][others, :2] - [x, y]).max(1) > 4
    assert not (made.metadata["reason"][others][far] & Reason.Overloaded.value).any()
    assert not made.mask(np.array([at])).reshape(3, 11, 11)[1, 5, 5] & 1


def test_counts_beyond_uint16(tmp_path):
    experiment = make_experiment(tmp_path, trusted_range=(0, 1e9))
    images = make_images(tmp_path, high=200000)
    table = make_table(experiment)
    made = extract_store(table, [experiment], tmp_path / "store", box=(3, 7, 7))
    assert made.dtype == np.int32
    for i in range(0, made.n, 10):
        counts, _ = brute_force(experiment, images, made.metadata["panel"][i], made.metadata["bbox"][i])
        np.testing.assert_array_equal(made.counts(np.array([i]))[0], counts)


def test_gain_and_pedestal(tmp_path):
    photons = np.random.default_rng(0).poisson(30, (N_IMAGES, *SHAPE)).astype(np.int32)
    for i, image in enumerate(photons, 1):
        write_cbf(tmp_path / f"image_{i:04d}.cbf", image * 3 + 10, HEADER)
    experiment = make_experiment(tmp_path, gain=3.0, pedestal=10.0)
    made = extract_store(make_table(experiment), [experiment], tmp_path / "store", box=(3, 7, 7))
    i = int(np.flatnonzero(made.metadata["reason"] == 0)[0])
    counts, _ = brute_force(experiment, photons, made.metadata["panel"][i], made.metadata["bbox"][i])
    np.testing.assert_array_equal(made.counts(np.array([i]))[0], counts)
    wrong = make_experiment(tmp_path, gain=2.0)
    with pytest.raises(InputError, match="gain 2 and pedestal 0 do not give whole photons"):
        extract_store(make_table(wrong), [wrong], tmp_path / "wrong", box=(3, 7, 7))


@pytest.mark.parametrize("hall", [" P 1", " C 2y", " P 2ac 2ab", " I 4bd 2c 3"], ids=str.strip)
def test_overlaps_match_brute_force(tmp_path, hall):
    """Crowded lattice: nearest index of every voxel with numpy, absences by gemmi."""
    experiment = make_experiment(tmp_path, hall=hall)
    found = predict(experiment, 3.3)
    rows = np.flatnonzero(found.panel == 0)[::5]
    low = np.floor(found.xyz_px[rows]).astype(np.int32) - [5, 5, 1]
    size = np.array([11, 11, 3])
    bbox = np.stack([low, low + size], axis=2).reshape(-1, 6).astype(np.int32)
    spots = PanelSpots(found.hkl[rows], found.s1[rows], found.xyz_px[rows], found.xyz_mm[rows], bbox)
    offset = np.arange(len(rows)) * 363
    got, want = np.ones(len(rows) * 363, np.uint8), np.ones(len(rows) * 363, np.uint8)
    mark_overlaps(experiment, 0, spots, got, offset)
    mark_overlaps_reference(experiment, 0, spots, want, offset)
    np.testing.assert_array_equal(got, want)
    assert 0.05 < (want & 32).astype(bool).mean() < 0.95
    centre = want.reshape(-1, 3, 11, 11)[:, 1, 5, 5]
    assert not (centre & 32).any(), "a reflection owns its own position"


def test_the_same_without_the_extension(data, tmp_path, monkeypatch):
    experiment, table, _ = data
    table = table.select(np.arange(0, len(table), 8))
    extract_store(table, [experiment], tmp_path / "fast", box=(3, 7, 7))
    monkeypatch.setattr(_native, "C", None)
    monkeypatch.setattr(ImageReader, "read", lambda self, i, **_: [image.copy() for image in self.test_images[i]])
    images = data[2]
    split = [[np.ascontiguousarray(image[:, :70]), np.ascontiguousarray(image[:, 80:])] for image in images]
    monkeypatch.setattr(ImageReader, "test_images", split, raising=False)
    extract_store(table, [experiment], tmp_path / "slow", box=(3, 7, 7))
    assert contents(tmp_path / "fast") == contents(tmp_path / "slow")


def test_each_image_is_read_once(data, tmp_path, monkeypatch):
    """Two lattices on the same images."""
    experiment, table, _ = data
    other = make_experiment(tmp_path, cell=55.0)
    tables = [table, make_table(other)]
    for i, part in enumerate(tables):
        part["id"] = np.full(len(part), i, np.int32)
    reads = []
    original = ImageReader.read
    monkeypatch.setattr(ImageReader, "read", lambda self, i, **kw: reads.append(i) or original(self, i, **kw))
    made = extract_store(ReflectionTable.concat(tables), [experiment, other], tmp_path / "store")
    assert sorted(reads) == list(range(N_IMAGES))
    assert made.box == (3, 21, 21) and set(made.metadata["id"].tolist()) == {0, 1}


def test_stills(tmp_path):
    experiment = make_experiment(tmp_path)
    images = make_images(tmp_path, n_images=2)
    table = make_table(experiment)
    position = table["xyzcal.px"].copy()
    position[:, 2] = 0
    table["xyzcal.px"] = position
    table["id"] = np.arange(len(table), dtype=np.int32) % 2
    stills = [
        Experiment(
            experiment.beam,
            experiment.detector,
            crystal=experiment.crystal,
            imageset={"__id__": "ImageSet", "images": [str(tmp_path / f"image_{i:04d}.cbf")]},
        )
        for i in (1, 2)
    ]
    made = extract_store(table, stills, tmp_path / "store")
    assert made.box == (1, 21, 21)
    for i in range(0, made.n, 5):
        here = images[made.metadata["id"][i]][None]
        counts, _ = brute_force(experiment, here, made.metadata["panel"][i], made.metadata["bbox"][i])
        np.testing.assert_array_equal(made.counts(np.array([i]))[0], counts)


def contents(path):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir())}


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_shoeboxes as t
directory = Path(sys.argv[2])
t.shoebox_rows.SHARD_VOXELS = 20000
experiment = t.make_experiment(directory)
def die(stage, done, total):
    if done == 5:
        os.kill(os.getpid(), signal.SIGKILL)
t.extract_store(t.make_table(experiment), [experiment], directory / "killed", box=(3, 7, 7), progress=die)
"""


def test_resume_after_kill_gives_the_same_bytes(data, tmp_path, monkeypatch):
    experiment, table, _ = data
    command = [sys.executable, "-c", KILLED, os.path.dirname(__file__), str(tmp_path)]
    assert subprocess.run(command, timeout=120).returncode == -signal.SIGKILL
    with pytest.raises(InputError, match="is unfinished; run the same extraction again"):
        ShoeboxStore.open(tmp_path / "killed")
    done = list((tmp_path / "killed").glob("shard-*.json"))
    (tmp_path / "killed" / ".counts-00099.npy.x.part").write_bytes(b"half a shard")
    monkeypatch.setattr(shoebox_rows, "SHARD_VOXELS", 20000)
    progress = []
    arguments = {"box": (3, 7, 7), "progress": lambda *step: progress.append(step)}
    extract_store(table, [experiment], tmp_path / "killed", **arguments)
    assert done and len(progress) < N_IMAGES, "finished shards are not extracted again"
    assert progress[-1] == ("extract", N_IMAGES, N_IMAGES)
    extract_store(table, [experiment], tmp_path / "whole", **arguments)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    progress.clear()
    extract_store(table, [experiment], tmp_path / "whole", **arguments)
    assert not progress, "a finished store is opened"
    with pytest.raises(InputError, match="holds the store of another job"):
        extract_store(table, [experiment], tmp_path / "whole", box=(3, 9, 9))


def test_a_broken_image_costs_nothing_that_was_done(data, tmp_path, monkeypatch):
    experiment, table, _ = data
    monkeypatch.setattr(shoebox_rows, "SHARD_VOXELS", 20000)
    path = tmp_path / "image_0007.cbf"
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(InputError, match=r"image_0007\.cbf"):
        extract_store(table, [experiment], tmp_path / "store", box=(3, 7, 7))
    assert list((tmp_path / "store").glob("shard-*.json"))
    path.write_bytes(good)
    assert extract_store(table, [experiment], tmp_path / "store", box=(3, 7, 7)).n == len(table)


MEMORY = """
import resource, sys
import numpy as np
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_shoeboxes as t
directory, n = Path(sys.argv[2]), int(sys.argv[3])
experiment = t.make_experiment(directory, n_images=n)
size = (500, 700)
experiment.detector[:] = [t.Panel(np.array([-250.0, 175.0, -100.0]), np.array([1.0, 0, 0]), np.array([0, -1.0, 0]),
                                  (0.5, 0.5), size, trusted_range=(0, 1e6))]
experiment.imageset = {"__id__": "ImageSequence", "images": [str(directory / "same.cbf")] * n}
rng = np.random.default_rng(0)
position = rng.uniform(0, 1, (20 * n, 3)) * [*size, n]
table = t.ReflectionTable.from_columns({"miller_index": rng.integers(1, 9, (20 * n, 3), dtype=np.int32),
                                        "xyzcal.px": position})
t.extract_store(table, [experiment], directory / f"store{n}")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """50 and 500 images, read from one file: 630 MB of pixels more. What grows is 0.8 kB a reflection."""
    image = np.random.default_rng(0).poisson(1.0, (700, 500)).astype(np.int32)
    write_cbf(tmp_path / "same.cbf", image, HEADER)
    peak = {}
    for n in (50, 500):
        command = [sys.executable, "-c", MEMORY, os.path.dirname(__file__), str(tmp_path), str(n)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        peak[n] = int(done.stdout)
    assert peak[500] < 1.1 * peak[50], peak


def test_store_from_shoebox_column(tmp_path):
    """Tight boxes go into boxes of one size; what they do not hold is not valid."""
    rng = np.random.default_rng(0)
    experiment = make_experiment(tmp_path)
    position = rng.uniform([8, 8, 2], [60, 80, 6], (20, 3))
    low = np.floor(position).astype(int) - rng.integers(0, 3, (20, 3))
    bbox = np.stack([low, low + rng.integers(1, 6, (20, 3))], axis=2).reshape(20, 6)
    n = (bbox[:, 1::2] - bbox[:, ::2]).prod(1)
    data = rng.poisson(5, n.sum()).astype(np.float32)
    bits = np.where(rng.random(n.sum()) < 0.8, 5, 0)
    column = ShoeboxColumn(np.zeros(20), bbox, data, bits, np.zeros(n.sum()))
    table = ReflectionTable.from_columns({"xyzobs.px.value": position, "panel": np.zeros(20, np.uint64)})
    table["shoebox"] = column
    fixed = store_from_shoebox_column(table, [experiment], tmp_path / "fixed", box=(5, 11, 11))
    for i in range(20):
        counts, mask = fixed.counts(np.array([i])).reshape(5, 11, 11), fixed.mask(np.array([i])).reshape(5, 11, 11)
        x0, _, y0, _, z0, _ = fixed.metadata["bbox"][i].tolist()
        want, valid = np.zeros_like(counts), np.zeros_like(mask)
        a, b, c, d, e, f = bbox[i].tolist()
        voxel = column.ptr[i]
        for z in range(e, f):
            for y in range(c, d):
                for x in range(a, b):
                    at = (z - z0, y - y0, x - x0)
                    if bits[voxel] & 1 and all(0 <= k < s for k, s in zip(at, (5, 11, 11))):
                        want[at], valid[at] = data[voxel], 1
                    voxel += 1
        np.testing.assert_array_equal(counts, want)
        np.testing.assert_array_equal(mask, valid)
    ragged = store_from_shoebox_column(table, [experiment], tmp_path / "ragged", box="bbox")
    values, ptr = ragged.counts(np.arange(20))
    np.testing.assert_array_equal(ptr, column.ptr)
    np.testing.assert_array_equal(values, np.where(bits & 1, data, 0))
    table["shoebox"] = ShoeboxColumn(np.zeros(20), bbox, data + 0.5, bits, np.zeros(n.sum()))
    with pytest.raises(InputError, match="counts must be whole photons"):
        store_from_shoebox_column(table, [experiment], tmp_path / "half", box=(5, 11, 11))


def test_create_from_blocks_and_arrays(tmp_path):
    rng = np.random.default_rng(0)
    counts, mask = rng.poisson(3, (50, 12)).astype(np.int32), rng.integers(0, 2, (50, 12)).astype(np.uint8)
    meta = {"hkl": np.zeros((50, 3), np.int32)}
    whole = ShoeboxStore.create(tmp_path / "a", counts, mask, meta, box=(1, 3, 4))
    parts = ((counts[i : i + 20], mask[i : i + 20]) for i in range(0, 50, 20))
    blocks = ShoeboxStore.create(tmp_path / "b", parts, None, meta, box=(1, 3, 4))
    rows = rng.integers(0, 50, 30)
    for made in (whole, blocks, ShoeboxStore.open(tmp_path / "b")):
        np.testing.assert_array_equal(made.counts(rows), counts[rows])
        np.testing.assert_array_equal(made.mask(rows), mask[rows])
        assert made.n == len(made) == 50 and made.dtype == np.uint16 and made.n_pixels == 12
    assert whole.statistics == blocks.statistics
    with pytest.raises(InputError, match=r"counts must be integers \[N, 8\] for box \(2, 2, 2\)"):
        ShoeboxStore.create(tmp_path / "c", counts, mask, meta, box=(2, 2, 2))
    with pytest.raises(InputError, match="metadata must have 50 rows"):
        ShoeboxStore.create(tmp_path / "d", counts, mask, {"d": np.zeros(7)}, box=(1, 3, 4))


def test_few_shards_are_mapped_at_once(tmp_path):
    """A store larger than memory: mapped pages count as resident, so old maps are dropped."""
    blocks = ((np.full((2, 4), i, np.int32), np.ones((2, 4), np.uint8)) for i in range(100))
    made = ShoeboxStore.create(tmp_path / "a", blocks, None, {}, box=(1, 2, 2))
    rows = np.random.default_rng(0).permutation(200)
    np.testing.assert_array_equal(made.counts(rows)[:, 0], rows // 2)
    made.mask(rows)
    assert len(made._maps) <= 2 * store._OPEN_SHARDS


@pytest.mark.parametrize("box", ["box", (3, 0, 5), (3, 5)], ids=str)
def test_bad_box(data, tmp_path, box):
    with pytest.raises(InputError, match="box must be"):
        extract_store(data[1], [data[0]], tmp_path / "store", box=box)


def test_bad_input(data, tmp_path):
    experiment, table, _ = data
    with pytest.raises(InputError, match="the table is empty"):
        extract_store(table.select(np.zeros(0, int)), [experiment], tmp_path / "a")
    (tmp_path / "image_0003.cbf").unlink()
    with pytest.raises(InputError, match=r"image .*image_0003\.cbf is missing"):
        extract_store(table, [experiment], tmp_path / "b")
    with pytest.raises(InputError, match="does not exist"):
        ShoeboxStore.open(tmp_path / "nothing")
