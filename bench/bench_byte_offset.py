"""CBF byte-offset against fabio, one thread, on a generated PILATUS 6M image: decoder, encoder, whole file."""

from __future__ import annotations

import numpy as np
import pytest
from fabio.cbfimage import CbfImage
from fabio.ext import byte_offset as fabio_byte_offset

from xtalfast._native import C
from xtalfast.io.cbf import MiniCbfHeader, decode_byte_offset, encode_byte_offset, read_cbf, write_cbf

SHAPE = (2527, 2463)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    """Background of one count, 2000 spots, module gaps of -1."""
    rng = np.random.default_rng(0)
    pixels = rng.poisson(1.0, SHAPE).astype(np.int32)
    for y, x in zip(rng.integers(0, SHAPE[0] - 5, 2000), rng.integers(0, SHAPE[1] - 5, 2000)):
        pixels[y : y + 5, x : x + 5] += rng.poisson(rng.exponential(300), (5, 5)).astype(np.int32)
    for x in range(487, SHAPE[1], 494):
        pixels[:, x : x + 7] = -1
    for y in range(195, SHAPE[0], 212):
        pixels[y : y + 17] = -1
    return pixels


@pytest.mark.parametrize("isa, at_least", [(0, 0.0), (1, 2.5)], ids=["portable", "avx2"])
def test_decode(paired, image, isa, at_least):
    if isa > C.byte_offset_best_isa():
        pytest.skip("this processor has no AVX2")
    stream = encode_byte_offset(image)
    assert np.array_equal(fabio_byte_offset.dec_cbf32(stream, image.size), decode_byte_offset(stream, image.size))
    paired(
        lambda: decode_byte_offset(stream, image.size, isa=isa),
        lambda: fabio_byte_offset.dec_cbf32(stream, image.size),
        at_least=at_least,
    )


def test_encode(paired, image):
    paired(lambda: encode_byte_offset(image), lambda: fabio_byte_offset.comp_cbf32(image.ravel()), rounds=20)


def test_read_file(paired, image, tmp_path):
    """File to image in which negative pixels are masked; neither side computes the MD5 sum."""
    path = tmp_path / "a_0001.cbf"
    write_cbf(path, image, MiniCbfHeader((0.172, 0.172), 0.98, 350.0, (1261.6, 1307.0)))
    assert np.array_equal(CbfImage().read(str(path)).data, read_cbf(path))
    paired(lambda: read_cbf(path), lambda: CbfImage().read(str(path), check_MD5=False), rounds=30)
