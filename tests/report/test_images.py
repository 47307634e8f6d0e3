"""PNG pictures decode to the pixels that went in."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
import pytest

from xtalfast.report.images import DIVERGING, MASKED, SEQUENTIAL, colored, data_uri, png, tile


def decode(data: bytes) -> np.ndarray:
    """The PNG standard's structure, checksums included."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        chunks[kind], at = body, at + 12 + length
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    width, height, depth, color, *_ = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (depth, color) == (8, 2)
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + 3 * width)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, 3)


@pytest.mark.parametrize("shape", [(1, 1), (21, 65), (3, 200)])
def test_png_round_trip(shape):
    rgb = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    np.testing.assert_array_equal(decode(png(rgb)), rgb)
    assert base64.b64decode(data_uri(rgb).removeprefix("data:image/png;base64,")) == png(rgb)


def hex_of(pixel: np.ndarray) -> str:
    return "#" + "".join(f"{v:02x}" for v in pixel)


def test_colours_at_the_ends_outside_and_where_masked():
    values = np.array([[-9.0, 0.0, 10.0, 99.0, np.nan, 5.0]])
    rgb = colored(values, 0, 10, mask=np.array([[True] * 5 + [False]]))[0]
    assert [hex_of(p) for p in rgb] == [SEQUENTIAL[0], SEQUENTIAL[0], SEQUENTIAL[-1], SEQUENTIAL[-1], MASKED, MASKED]
    assert hex_of(colored(np.zeros((1, 1)), -4, 4, DIVERGING)[0, 0]) == "#ffffff"


def test_sequential_map_darkens_steadily():
    rgb = colored(np.linspace(0, 1, 50)[None], 0, 1)[0].astype(float)
    luminance = rgb @ [0.2126, 0.7152, 0.0722]
    assert np.all(np.diff(luminance) < 0)


def test_tile_keeps_slices_apart():
    slices = np.zeros((3, 4, 5, 3), np.uint8)
    out = tile(slices)
    assert out.shape == (4, 17, 3)
    assert (out[:, [5, 11]] == 255).all()
    assert not out[:, :5].any()
