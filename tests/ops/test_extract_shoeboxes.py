"""extract_shoeboxes against its plain-torch definition, and what a user may hand it."""

import os

import pytest
import torch

from xtalfast import _native
from xtalfast.ops.extract_shoeboxes import Shoeboxes, extract_shoeboxes, extract_shoeboxes_reference

DTYPES = [torch.int32, torch.uint16]


def make_images(shape, dtype, seed=0, high=2000):
    generator = torch.Generator().manual_seed(seed)
    low = -2 if dtype == torch.int32 else 0
    return torch.randint(low, high, shape, generator=generator, dtype=torch.int32).to(dtype)


def make_boxes(n, shape, size, seed=0, reach=6):
    """Boxes of `size` (z, y, x), some of them past every side of the stack."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.stack([torch.randint(-reach, s, (n,), generator=generator) for s in shape[::-1]], 1)
    return torch.stack([low, low + torch.tensor(size[::-1])], 2).reshape(n, 6).int()


def assert_same(got: Shoeboxes, want: Shoeboxes):
    assert torch.equal(got.counts.int(), want.counts)
    assert torch.equal(got.mask, want.mask)
    assert torch.equal(got.ptr, want.ptr)


@pytest.mark.parametrize("dtype", DTYPES, ids=["i32", "u16"])
@pytest.mark.parametrize("mask_shape", [None, "yx", "zyx"])
@pytest.mark.parametrize("size", [(3, 21, 21), (1, 1, 1), (2, 7, 15), (1, 5, 16), (4, 3, 17), (2, 4, 70)], ids=str)
def test_matches_reference(size, mask_shape, dtype):
    shape = (6, 40, 90)
    images, bbox = make_images(shape, dtype), make_boxes(200, shape, size)
    mask = None
    if mask_shape is not None:
        mask = torch.rand(shape if mask_shape == "zyx" else shape[1:], generator=torch.Generator().manual_seed(1)) > 0.2
    got = extract_shoeboxes(images, bbox, mask, trusted_range=(3, 1500))
    assert_same(got, extract_shoeboxes_reference(images, bbox, mask, low=3, high=1500))
    assert got.counts.dtype == torch.uint16


def test_ragged_boxes_are_laid_one_after_the_other():
    images = make_images((5, 30, 40), torch.int32)
    sizes = [(1, 2, 3), (3, 5, 7), (2, 20, 33), (1, 1, 1)]
    bbox = torch.cat([make_boxes(10, images.shape, size, seed=i) for i, size in enumerate(sizes)])
    got = extract_shoeboxes(images, bbox)
    assert_same(got, extract_shoeboxes_reference(images, bbox))
    assert got.ptr[-1] == 10 * (6 + 105 + 1320 + 1)


def test_every_voxel_is_the_pixel_its_box_says():
    """Brute force from the definition of bbox, independent of slicing."""
    images = torch.arange(4 * 9 * 11, dtype=torch.int32).reshape(4, 9, 11)
    bbox = torch.tensor([[-1, 4, 6, 11, 2, 6]], dtype=torch.int32)
    counts, mask = extract_shoeboxes(images, bbox).dense((4, 5, 5))
    for z in range(4):
        for y in range(5):
            for x in range(5):
                at = (2 + z, 6 + y, -1 + x)
                inside = all(0 <= i < n for i, n in zip(at, images.shape))
                assert mask[0, z, y, x] == inside
                assert int(counts[0, z, y, x]) == (int(images[at]) if inside else 0)


def test_many_threads_give_the_same_bytes():
    images, bbox = make_images((6, 60, 80), torch.int32), make_boxes(1000, (6, 60, 80), (3, 21, 21))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = extract_shoeboxes(images, bbox)
        torch.set_num_threads(max(4, os.cpu_count() or 1))
        assert_same(extract_shoeboxes(images, bbox), Shoeboxes(one.counts.int(), one.mask, one.ptr))
    finally:
        torch.set_num_threads(before)


def test_counts_beyond_uint16_switch_to_int32():
    images = torch.zeros((1, 4, 4), dtype=torch.int32)
    bbox = torch.tensor([[0, 4, 0, 4, 0, 1]], dtype=torch.int32)
    images[0, 1, 2] = 65534
    assert extract_shoeboxes(images, bbox).counts.dtype == torch.uint16
    images[0, 1, 2] = 65535
    wide = extract_shoeboxes(images, bbox)
    assert wide.counts.dtype == torch.int32 and wide.counts.max() == 65535
    images[0, 1, 2] = 2**31 - 2
    assert extract_shoeboxes(images, bbox).counts.max() == 2**31 - 2
    saturated = extract_shoeboxes(images, bbox, dtype=torch.uint16).counts
    assert saturated.dtype == torch.uint16 and int(saturated.int().max()) == 65535
    assert extract_shoeboxes(images, bbox, trusted_range=(0, 1000)).mask.sum() == 15


@pytest.mark.parametrize(
    "bbox",
    [
        torch.zeros((0, 6), dtype=torch.int32),
        torch.tensor([[3, 3, 0, 2, 0, 1]], dtype=torch.int32),
        torch.tensor([[5, 2, 0, 2, 0, 1]], dtype=torch.int32),
        torch.tensor([[-50, -40, 0, 2, 0, 1], [100, 110, 0, 2, 0, 1]], dtype=torch.int32),
        torch.tensor([[0, 4, 0, 4, -9, -7], [0, 4, 0, 4, 7, 9]], dtype=torch.int32),
        torch.tensor([[-(2**31), -(2**31) + 2, 0, 2, 0, 1], [2**31 - 3, 2**31 - 1, 0, 2, 0, 1]], dtype=torch.int32),
    ],
    ids=["no-boxes", "no-voxels", "inverted", "off-the-panel", "out-of-scan", "far-corners"],
)
def test_edge_boxes(bbox):
    images = make_images((2, 8, 9), torch.int32)
    got = extract_shoeboxes(images, bbox)
    assert_same(got, extract_shoeboxes_reference(images, bbox))
    assert not got.mask.any() and not got.counts.int().any()


def test_non_contiguous_arguments():
    images = make_images((4, 30, 40), torch.int32).permute(0, 2, 1)
    bbox = make_boxes(20, images.shape, (1, 5, 5)).repeat(1, 2)[:, :6]
    mask = (torch.rand(30, 40) > 0.5).T
    assert_same(extract_shoeboxes(images, bbox, mask), extract_shoeboxes_reference(images, bbox, mask))


def test_without_the_extension_the_reference_answers(monkeypatch):
    images, bbox = make_images((4, 30, 40), torch.int32), make_boxes(30, (4, 30, 40), (2, 5, 5))
    want = extract_shoeboxes(images, bbox)
    monkeypatch.setattr(_native, "C", None)
    got = extract_shoeboxes(images, bbox)
    assert got.counts.dtype == want.counts.dtype
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_sum_over_disjoint_boxes_is_the_sum_of_the_image():
    """Photons are neither lost nor made: boxes that tile the stack hold exactly its valid counts."""
    images = make_images((4, 40, 60), torch.int32)
    corners = [(x, y, z) for x in range(0, 60, 20) for y in range(0, 40, 8) for z in range(0, 4, 2)]
    bbox = torch.tensor([[x, x + 20, y, y + 8, z, z + 2] for x, y, z in corners], dtype=torch.int32)
    got = extract_shoeboxes(images, bbox)
    assert got.counts.long().sum() == images.clamp(min=0).long().sum()
    assert got.mask.long().sum() == (images >= 0).sum()


@pytest.mark.parametrize("wide", [False, True], ids=["u16", "i32"])
@pytest.mark.parametrize("masked", [False, True], ids=["open", "masked"])
def test_opcheck(wide, masked):
    images, bbox = make_images((3, 20, 30), torch.int32), make_boxes(5, (3, 20, 30), (2, 3, 4))
    mask = torch.ones(20, 30, dtype=torch.bool) if masked else None
    ptr = torch.arange(6) * 24
    torch.library.opcheck(torch.ops.xtalfast.extract_shoeboxes, (images, bbox, ptr, mask, 120, wide, 0, 1000))


def test_compiles_without_graph_breaks():
    images, bbox = make_images((3, 40, 50), torch.int32), make_boxes(30, (3, 40, 50), (3, 5, 7))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def mean_count(images, bbox):
        boxes = extract_shoeboxes(images, bbox, box=(3, 5, 7))
        return boxes.dense((3, 5, 7))[0].float().mean((1, 2, 3))

    want = extract_shoeboxes_reference(images, bbox).counts.reshape(30, 3, 5, 7).float().mean((1, 2, 3))
    assert torch.equal(mean_count(images, bbox), want)


IMAGES = torch.zeros((2, 8, 9), dtype=torch.int32)
BBOX = torch.zeros((3, 6), dtype=torch.int32)


@pytest.mark.parametrize(
    ("kwargs", "kind", "message"),
    [
        ({"images": IMAGES.float()}, TypeError, r"images must be int32 or uint16 \[Z, Y, X\], got torch.float32"),
        ({"images": IMAGES[0]}, ValueError, r"images must be \[Z, Y, X\], got \[8, 9\]"),
        ({"bbox": BBOX.long()}, TypeError, r"bbox must be int32 \[N, 6\], got torch.int64"),
        ({"bbox": BBOX[:, :4]}, ValueError, r"bbox must be int32 \[N, 6\], got \[3, 4\]"),
        (
            {"bbox": torch.tensor([[-(2**31), 2**31 - 1] * 3], dtype=torch.int32)},
            ValueError,
            "bbox must hold at most 16777216 voxels a box, got one of 79228162",
        ),
        ({"bbox": BBOX.to("meta")}, ValueError, "bbox must be on the device of images"),
        ({"mask": torch.ones(8, 9)}, TypeError, "mask must be bool or uint8, got torch.float32"),
        ({"mask": torch.ones(9, 8, dtype=torch.bool)}, ValueError, r"mask must be \[Y, X\] = \[8, 9\]"),
        ({"dtype": torch.int64}, TypeError, "dtype must be torch.uint16, torch.int32 or None"),
        ({"trusted_range": (5, 5)}, ValueError, "trusted_range must be"),
        ({"box": (1, 2, 3)}, ValueError, r"box must be the size of all boxes, got \(1, 2, 3\)"),
    ],
)
def test_bad_input_says_what_to_do(kwargs, kind, message):
    with pytest.raises(kind, match=message):
        extract_shoeboxes(**{"images": IMAGES, "bbox": BBOX, **kwargs})


def test_dense_refuses_a_wrong_box():
    boxes = extract_shoeboxes(IMAGES, torch.tensor([[0, 2, 0, 2, 0, 2]], dtype=torch.int32))
    with pytest.raises(ValueError, match="box must hold 8 / 1 voxels"):
        boxes.dense((2, 2, 3))
