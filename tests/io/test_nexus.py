"""NeXus/Eiger: Dectris and NXmx layouts, compressions, masked values, and what is wrong with a file."""

from __future__ import annotations

import threading
from pathlib import Path

import h5py
import hdf5plugin
import numpy as np
import pytest

from xtalfast.errors import CorruptImageError, InputError
from xtalfast.io.nexus import NexusImages

COMPRESSION = {
    "plain": {},
    "gzip": {"compression": "gzip"},
    "bitshuffle-lz4": hdf5plugin.Bitshuffle(cname="lz4"),
    "bitshuffle-zstd": hdf5plugin.Bitshuffle(cname="zstd"),
    "lz4": hdf5plugin.LZ4(),
}


def counts(n=5, shape=(12, 17), dtype=np.uint16) -> np.ndarray:
    return np.random.default_rng(1).poisson(3, (n, *shape)).astype(dtype)


def write_data(path: Path, images: np.ndarray, compression: dict | None = None) -> None:
    with h5py.File(path, "w") as file:
        options = {"chunks": (1, *images.shape[1:]), **compression} if compression else {}
        file.create_dataset("entry/data/data", data=images, **options)


def write_master(path: Path, files: list[str], pixel_mask: np.ndarray | None = None) -> None:
    """A master as the Dectris filewriter makes it: links to the data files beside it."""
    with h5py.File(path, "w") as file:
        for i, name in enumerate(files, 1):
            file[f"entry/data/data_{i:06d}"] = h5py.ExternalLink(name, "/entry/data/data")
        detector = file.create_group("entry/instrument/detector/detectorSpecific")
        detector["countrate_correction_count_cutoff"] = np.array([43210], np.uint32)
        if pixel_mask is not None:
            detector["pixel_mask"] = pixel_mask


@pytest.mark.parametrize("compression", COMPRESSION.values(), ids=COMPRESSION.keys())
def test_linked_data_files(tmp_path, compression):
    images = counts()
    write_data(tmp_path / "x_data_000001.h5", images[:3], compression)
    write_data(tmp_path / "x_data_000002.h5", images[3:], compression)
    write_master(tmp_path / "x_master.h5", ["x_data_000001.h5", "x_data_000002.h5"])
    with NexusImages(tmp_path / "x_master.h5") as file:
        assert (len(file), file.shape, file.saturation) == (5, (12, 17), 43210)
        for i in (4, 0, 2, 3):
            assert file.read(i).dtype == np.int32
            assert np.array_equal(file.read(i), images[i])


def test_one_dataset_one_image_and_virtual_dataset(tmp_path):
    images = counts()
    write_data(tmp_path / "stack.h5", images)
    write_data(tmp_path / "single.h5", images[2])
    layout = h5py.VirtualLayout(images.shape, images.dtype)
    layout[:] = h5py.VirtualSource(tmp_path / "stack.h5", "entry/data/data", images.shape)
    with h5py.File(tmp_path / "virtual.nxs", "w") as file:
        file.create_virtual_dataset("entry/data/data", layout)
    assert np.array_equal(NexusImages(tmp_path / "stack.h5").read(4), images[4])
    assert np.array_equal(NexusImages(tmp_path / "single.h5").read(0), images[2])
    assert len(NexusImages(tmp_path / "single.h5")) == 1
    assert np.array_equal(NexusImages(tmp_path / "virtual.nxs").read(1), images[1])
    (tmp_path / "stack.h5").unlink()  # HDF5 would now read zeros
    with pytest.raises(InputError, match=r"data file .*stack\.h5 is missing"):
        NexusImages(tmp_path / "virtual.nxs")


@pytest.mark.parametrize(
    "dtype, stored, read",
    [
        (np.uint8, [0, 7, 254, 255], [0, 7, 254, -1]),
        (np.uint16, [0, 7, 65534, 65535], [0, 7, 65534, -1]),
        (np.uint32, [7, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1], [7, 2**31 - 1, 2**31 - 1, 2**31 - 1, -1]),
        (np.uint64, [7, 2**40, 2**64 - 1], [7, 2**31 - 1, -1]),
        (np.int32, [-2, -1, 2**31 - 1], [-2, -1, 2**31 - 1]),
        (np.int64, [-2, 2**40], [-2, 2**31 - 1]),
        (np.float32, [-1.0, 0.0, 12.0], [-1, 0, 12]),
    ],
)
def test_values_of_every_type(tmp_path, dtype, stored, read):
    write_data(tmp_path / "a.h5", np.array([[stored]], dtype))
    assert NexusImages(tmp_path / "a.h5").read(0).tolist() == [read]


@pytest.mark.parametrize("value", [0.5, np.nan, np.inf])
def test_values_that_are_no_counts_are_refused(tmp_path, value):
    write_data(tmp_path / "a.h5", np.array([[[1.0, value]]], np.float32))
    with pytest.raises(InputError, match="wanted photon counts"):
        NexusImages(tmp_path / "a.h5").read(0)


def test_pixel_mask(tmp_path):
    mask = np.zeros((12, 17), np.uint32)
    mask[3, 4], mask[5:7, 8] = 1, 16
    write_data(tmp_path / "d.h5", counts())
    write_master(tmp_path / "m.h5", ["d.h5"], mask)
    assert np.array_equal(NexusImages(tmp_path / "m.h5").static_mask(), mask == 0)
    assert NexusImages(tmp_path / "d.h5").static_mask().all()
    write_master(tmp_path / "n.h5", ["d.h5"], mask.T)
    with pytest.raises(InputError, match=r"wanted detectorSpecific/pixel_mask \[12, 17\], got \[17, 12\]"):
        NexusImages(tmp_path / "n.h5").static_mask()


def test_missing_data_files(tmp_path):
    write_data(tmp_path / "d1.h5", counts())
    write_master(tmp_path / "m.h5", ["d1.h5", "d2.h5"])
    file = NexusImages(tmp_path / "m.h5")
    assert len(file) == 5
    file.read(4)
    with pytest.raises(InputError, match=r"data file .*d2\.h5 is missing"):
        file.read(5)
    (tmp_path / "d1.h5").rename(tmp_path / "elsewhere.h5")
    with pytest.raises(InputError, match=r"data file .*d1\.h5 is missing"):
        NexusImages(tmp_path / "m.h5")


@pytest.mark.parametrize("index", [-1, 5, 100])
def test_wrong_index(tmp_path, index):
    write_data(tmp_path / "a.h5", counts())
    with pytest.raises(InputError, match=f"wanted an image index of 0 to 4, got {index}"):
        NexusImages(tmp_path / "a.h5").read(index)


def test_files_without_images(tmp_path):
    with h5py.File(tmp_path / "empty.h5", "w") as file:
        file["other/thing"] = 1
    with pytest.raises(InputError, match=r"wanted a NeXus entry .* got \['other'\]"):
        NexusImages(tmp_path / "empty.h5")
    with h5py.File(tmp_path / "group.h5", "w") as file:
        file["entry/data/other"] = 1
    with pytest.raises(InputError, match=r"wanted data or data_000001 in /entry/data, got \['other'\]"):
        NexusImages(tmp_path / "group.h5")
    with h5py.File(tmp_path / "line.h5", "w") as file:
        file["entry/data/data"] = np.arange(4)
    with pytest.raises(InputError, match=r"wanted images \[n, slow, fast\] in data"):
        NexusImages(tmp_path / "line.h5")
    with pytest.raises(InputError, match="no such file"):
        NexusImages(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("no images here")
    with pytest.raises(CorruptImageError, match="not a readable HDF5 file"):
        NexusImages(tmp_path / "text.h5")


def test_sizes_must_agree(tmp_path):
    write_data(tmp_path / "d1.h5", counts())
    write_data(tmp_path / "d2.h5", counts(shape=(12, 18)))
    write_master(tmp_path / "m.h5", ["d1.h5", "d2.h5"])
    with pytest.raises(InputError, match="wanted images of one size"):
        NexusImages(tmp_path / "m.h5")


def test_damaged_chunk(tmp_path):
    images = counts(3, (64, 64))
    path = tmp_path / "a.h5"
    write_data(path, images, COMPRESSION["bitshuffle-lz4"])
    with h5py.File(path) as file:
        chunk = file["entry/data/data"].id.get_chunk_info(1)
    data = bytearray(path.read_bytes())
    data[chunk.byte_offset : chunk.byte_offset + chunk.size] = b"\xff" * chunk.size
    path.write_bytes(data)
    file = NexusImages(path)
    assert np.array_equal(file.read(0), images[0])
    with pytest.raises(CorruptImageError, match=r"a\.h5: cannot read image 1") as error:
        file.read(1)
    assert "\n" not in str(error.value)


def test_threads_read_the_same(tmp_path):
    images = counts(16)
    write_data(tmp_path / "a.h5", images, COMPRESSION["bitshuffle-lz4"])
    file = NexusImages(tmp_path / "a.h5")
    right = []

    def work(start: int) -> None:
        right.extend(np.array_equal(file.read((start + i) % 16), images[(start + i) % 16]) for i in range(16))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(right) == 64 and all(right)
