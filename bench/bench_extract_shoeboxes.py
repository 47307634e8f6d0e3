"""Extraction of the paper's boxes (3 x 21 x 21) against the best numpy version, one thread, on PILATUS 6M images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xtalfast.ops import extract_shoeboxes

BOX = (3, 21, 21)
N = 15_000


@pytest.fixture(scope="module")
def stack() -> tuple[np.ndarray, np.ndarray]:
    """Eight images with masked pixels, and boxes sorted as the store sorts them."""
    rng = np.random.default_rng(0)
    images = rng.poisson(1.0, (8, 2527, 2463)).astype(np.int32)
    images[:, 195:212] = -1
    low = np.stack([rng.integers(0, s - b, N) for s, b in zip((2463, 2527, 8), BOX[::-1])], axis=1)
    low = low[np.lexsort(low.T)]
    return images, np.stack([low, low + BOX[::-1]], axis=2).reshape(N, 6).astype(np.int32)


def numpy_boxes(images: np.ndarray, bbox: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts with masked pixels at 0, and the Valid bit: all that `extract_shoeboxes` returns but the narrow type."""
    windows = np.lib.stride_tricks.sliding_window_view(images, BOX)
    counts = windows[bbox[:, 4], bbox[:, 2], bbox[:, 0]]
    valid = counts >= 0
    np.maximum(counts, 0, out=counts)
    return counts, valid


@pytest.mark.parametrize(("dtype", "at_least"), [(torch.uint16, 2.0), (torch.int32, 1.5)], ids=["u16", "i32"])
def test_extract(paired, stack, dtype, at_least):
    images, bbox = stack
    pixels, boxes = torch.from_numpy(images), torch.from_numpy(bbox)
    counts, mask = extract_shoeboxes(pixels, boxes, box=BOX, dtype=dtype).dense(BOX)
    want, valid = numpy_boxes(images, bbox)
    assert np.array_equal(counts.int().numpy(), want) and np.array_equal(mask.bool().numpy(), valid)
    paired(
        lambda: extract_shoeboxes(pixels, boxes, box=BOX, dtype=dtype),
        lambda: numpy_boxes(images, bbox),
        at_least=at_least,
        rounds=10,
    )
