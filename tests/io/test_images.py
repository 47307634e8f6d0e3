"""Images of an experiment: every way a .expt names them, panels, masks, threads, and what is wrong with them."""

from __future__ import annotations

import threading
from pathlib import Path

import fabio
import h5py
import numpy as np
import pytest

from xtalfast.errors import CorruptImageError, InputError
from xtalfast.io.cbf import MiniCbfHeader, write_cbf
from xtalfast.io.images import open_images, read_image
from xtalfast.models import Beam, Detector, Experiment, Goniometer, Panel, Scan

HEADER = MiniCbfHeader(pixel_size=(0.1, 0.1), wavelength=1.0, distance=100.0, beam_xy=(30.0, 20.0))
SHAPE = (20, 31)


def panel(size=SHAPE[::-1], offset=(0, 0), mask=()) -> Panel:
    return Panel(
        origin=np.array([-1.0, 1.0, -100.0]),
        fast=np.array([1.0, 0.0, 0.0]),
        slow=np.array([0.0, -1.0, 0.0]),
        pixel_size=(0.1, 0.1),
        image_size=size,
        raw_image_offset=offset,
        mask=list(mask),
    )


def experiment(imageset: dict, n_images: int = 5, first: int = 1, panels=None, still: bool = False) -> Experiment:
    return Experiment(
        beam=Beam(direction=np.array([0.0, 0.0, 1.0]), wavelength=1.0),
        detector=Detector(panels or [panel()]),
        goniometer=None if still else Goniometer(axis=np.array([1.0, 0.0, 0.0])),
        scan=None if still else Scan((first, first + n_images - 1), (0.0, 0.1)),
        imageset=imageset,
    )


def image(seed: int, shape=SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).poisson(3, shape).astype(np.int32)


@pytest.fixture
def cbf_dir(tmp_path) -> Path:
    for number in range(1, 8):
        write_cbf(tmp_path / f"run2_{number:04d}.cbf", image(number), HEADER)
    return tmp_path


def write_h5(path: Path, n: int = 5, mask: np.ndarray | None = None) -> np.ndarray:
    images = np.stack([image(i) for i in range(n)]).astype(np.uint16)
    with h5py.File(path, "w") as file:
        file["entry/data/data"] = images
        if mask is not None:
            file["entry/instrument/detector/pixel_mask"] = mask
    return images


@pytest.mark.parametrize("first", [1, 3])
def test_template(cbf_dir, first):
    with open_images(experiment({"template": str(cbf_dir / "run2_####.cbf")}, first=first)) as reader:
        assert len(reader) == 5
        assert reader.path(0).name == f"run2_{first:04d}.cbf"
        for i in range(5):
            (pixels,) = reader.read(i, verify=True)
            assert pixels.dtype == np.int32
            assert np.array_equal(pixels, image(first + i))


def test_image_dir_replaces_the_directory(cbf_dir):
    reader = open_images(experiment({"template": "/gone/run2_####.cbf"}), image_dir=cbf_dir)
    assert np.array_equal(reader.read(2)[0], image(3))


def test_list_of_stills(cbf_dir):
    names = [str(cbf_dir / f"run2_{k:04d}.cbf") for k in (6, 2)]
    reader = open_images(experiment({"images": names}, still=True))
    assert [np.array_equal(reader.read(i)[0], image(k)) for i, k in enumerate((6, 2))] == [True, True]


def test_hdf5_by_scan_and_by_index(tmp_path):
    images = write_h5(tmp_path / "x_master.h5", 8)
    by_scan = open_images(experiment({"template": str(tmp_path / "x_master.h5")}, first=3))
    assert np.array_equal(by_scan.read(0)[0], images[2])
    block = {"template": str(tmp_path / "x_master.h5"), "single_file_indices": [7, 6, 5, 4, 3]}
    by_index = open_images(experiment(block))
    assert [np.array_equal(by_index.read(i)[0], images[7 - i]) for i in range(5)] == [True] * 5
    block = {"images": [str(tmp_path / "x_master.h5")] * 2, "single_file_indices": [1, 4]}
    stills = open_images(experiment(block, still=True))
    assert np.array_equal(stills.read(1)[0], images[4])


def test_panels_are_cut_from_the_raw_image(cbf_dir):
    panels = [panel((15, 20)), panel((15, 8), (16, 0)), panel((15, 10), (16, 10))]
    reader = open_images(experiment({"template": str(cbf_dir / "run2_####.cbf")}, panels=panels))
    a, b, c = reader.read(0)
    raw = image(1)
    assert np.array_equal(a, raw[:, :15])
    assert np.array_equal(b, raw[:8, 16:31])
    assert np.array_equal(c, raw[10:, 16:31])
    assert [m.shape for m in reader.static_mask()] == [(20, 15), (8, 15), (10, 15)]


def test_panels_without_offsets_are_refused(cbf_dir):
    panels = [panel((15, 20)), panel((15, 20))]
    with pytest.raises(InputError, match="different raw_image_offset"):
        open_images(experiment({"template": str(cbf_dir / "run2_####.cbf")}, panels=panels))


def test_static_mask_joins_rectangles_and_pixel_mask(tmp_path):
    bad = np.zeros(SHAPE, np.uint32)
    bad[4, 5] = 8
    write_h5(tmp_path / "x.h5", mask=bad)
    block = {"template": str(tmp_path / "x.h5"), "mask": None}
    (mask,) = open_images(experiment(block, panels=[panel(mask=[(10, 0, 12, 20)])])).static_mask()
    expected = bad == 0
    expected[:, 10:12] = False
    assert np.array_equal(mask, expected)


def write_dials_mask(path: Path, mask: np.ndarray) -> None:
    """The pickle (protocol 0 opcodes) that DIALS makes of a tuple of one flex.bool."""
    flex = b"cscitbx_array_family_flex_ext\n"
    rows, columns = mask.shape
    last = b"(I%d\nI%d\nt" % (rows, columns)
    grid = flex + b"grid\n((I0\nI0\nt" + last + b"I01\ntR" + last + b"b"
    data = b"header" + b"".join(b"1" if use else b"0" for use in mask.ravel())
    path.write_bytes(b"(" + flex + b"bool\n(tR(" + grid + b"B" + len(data).to_bytes(4, "little") + data + b"tbt.")


def test_mask_file_of_the_imageset(cbf_dir):
    use = np.random.default_rng(0).random(SHAPE) < 0.9
    write_dials_mask(cbf_dir / "pixels.mask", use)
    block = {"template": str(cbf_dir / "run2_####.cbf"), "mask": str(cbf_dir / "pixels.mask")}
    assert np.array_equal(open_images(experiment(block)).static_mask()[0], use)
    write_dials_mask(cbf_dir / "pixels.mask", use.T)
    with pytest.raises(
        InputError, match=r"pixels\.mask: wanted \(slow, fast\) \[\(20, 31\)\] for the panels, got \[\(31, 20\)\]"
    ):
        open_images(experiment(block)).static_mask()


def test_first_missing_image_is_named(cbf_dir):
    for number in (3, 4):
        (cbf_dir / f"run2_{number:04d}.cbf").unlink()
    with pytest.raises(InputError, match=r"image .*run2_0003\.cbf is missing \(2 of 7 files\); .*--image-dir"):
        open_images(experiment({"template": str(cbf_dir / "run2_####.cbf")}, n_images=7))


def test_wrong_number_of_images(cbf_dir, tmp_path):
    names = [str(cbf_dir / f"run2_{k:04d}.cbf") for k in (1, 2, 3)]
    with pytest.raises(InputError, match=r"wanted 5 images \(scan 1 to 5\), got a list of 3"):
        open_images(experiment({"images": names}))
    write_h5(tmp_path / "x.h5", 4)
    with pytest.raises(InputError, match=r"x\.h5: wanted an image index of 0 to 3, got 4"):
        open_images(experiment({"template": str(tmp_path / "x.h5")}))
    with pytest.raises(InputError, match="wanted 5 images of the scan, got 2 in the imageset"):
        open_images(experiment({"template": str(tmp_path / "x.h5"), "single_file_indices": [0, 1]}))


def test_wrong_detector(cbf_dir):
    reader = open_images(experiment({"template": str(cbf_dir / "run2_####.cbf")}, panels=[panel((32, 20))]))
    with pytest.raises(InputError, match=r"run2_0001\.cbf: wrong detector: wanted 32 x 20 pixels .* got 31 x 20"):
        reader.read(0)
    reader = open_images(experiment({"template": str(cbf_dir / "run2_####.cbf")}, panels=[panel((30, 20))]))
    with pytest.raises(InputError, match="wrong detector"):
        reader.read(0)


@pytest.mark.parametrize("block", [{}, {"template": ""}, {"images": []}])
def test_experiment_without_images(block):
    with pytest.raises(InputError, match="names no images"):
        open_images(experiment(block))


def test_template_needs_a_scan(cbf_dir):
    with pytest.raises(InputError, match="needs a scan"):
        open_images(experiment({"template": str(cbf_dir / "run2_####.cbf")}, still=True))


def test_truncated_image_of_a_scan(cbf_dir):
    path = cbf_dir / "run2_0002.cbf"
    path.write_bytes(path.read_bytes()[:1500])
    reader = open_images(experiment({"template": str(cbf_dir / "run2_####.cbf")}))
    reader.read(0)
    with pytest.raises(CorruptImageError, match=r"run2_0002\.cbf"):
        reader.read(1)


def write_smv(path: Path, pixels: np.ndarray) -> None:
    """An ADSC image: 512 bytes of header, little-endian uint16."""
    header = (
        "{\nHEADER_BYTES=  512;\nDIM=2;\nBYTE_ORDER=little_endian;\nTYPE=unsigned_short;\n"
        f"SIZE1={pixels.shape[1]};\nSIZE2={pixels.shape[0]};\nPIXEL_SIZE=0.1;\n}}"
    )
    path.write_bytes(header.ljust(512).encode() + pixels.astype("<u2").tobytes())


def test_smv_rows_are_not_turned(tmp_path):
    pixels = image(1)
    pixels[0, 0] = 65535  # an overload stays an overload
    write_smv(tmp_path / "a_001.img", pixels)
    assert np.array_equal(read_image(tmp_path / "a_001.img"), pixels)


def test_tiff_through_fabio(tmp_path):
    fabio.tifimage.TifImage(data=image(1)).write(str(tmp_path / "a.tif"))
    assert np.array_equal(read_image(tmp_path / "a.tif"), image(1))


@pytest.mark.parametrize("size", [0, 100, 512, 700, -1])
def test_truncated_smv(tmp_path, size):
    write_smv(tmp_path / "a_001.img", image(1))
    data = (tmp_path / "a_001.img").read_bytes()
    (tmp_path / "a_001.img").write_bytes(data[:size])
    with pytest.raises(CorruptImageError, match=r"a_001\.img: no readable image") as error:
        read_image(tmp_path / "a_001.img")
    assert "\n" not in str(error.value)


def test_read_image_by_content(tmp_path):
    images = write_h5(tmp_path / "x.dat")
    assert np.array_equal(read_image(tmp_path / "x.dat", frame=3), images[3])
    write_cbf(tmp_path / "a.cbf.gz", image(1), HEADER)
    (tmp_path / "a.cbf.gz").rename(tmp_path / "b.dat")
    assert np.array_equal(read_image(tmp_path / "b.dat", verify=True), image(1))


def test_read_image_refuses(tmp_path):
    (tmp_path / "junk.cbf").write_text("hello")
    with pytest.raises(InputError, match="wanted a CBF image"):
        read_image(tmp_path / "junk.cbf")
    (tmp_path / "junk.dat").write_text("hello")
    with pytest.raises(CorruptImageError, match="no readable image"):
        read_image(tmp_path / "junk.dat")
    with pytest.raises(InputError, match=r"cannot read image .*none\.cbf: No such file"):
        read_image(tmp_path / "none.cbf")
    with pytest.raises(InputError, match="Is a directory"):
        read_image(tmp_path)
    write_cbf(tmp_path / "a.cbf", image(1), HEADER)
    with pytest.raises(InputError, match="wanted frame 1, but a CBF file holds one image"):
        read_image(tmp_path / "a.cbf", frame=1)
    write_smv(tmp_path / "a_001.img", image(1))
    with pytest.raises(InputError, match="wanted frame 2, got a file of 1"):
        read_image(tmp_path / "a_001.img", frame=2)


def test_threads_read_the_same(cbf_dir):
    reader = open_images(experiment({"template": str(cbf_dir / "run2_####.cbf")}, n_images=7))
    right = []

    def work(start: int) -> None:
        for k in range(21):
            i = (start + k) % 7
            right.append(np.array_equal(reader.read(i)[0], image(i + 1)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(right) == 84 and all(right)
