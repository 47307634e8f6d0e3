"""Small pictures of arrays as PNG data URIs, in colour maps that survive colour blindness and print."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

# Anchors of colour maps, light to dark so that weak signal looks like paper; both are safe for colour-blind eyes.
SEQUENTIAL = ("#ffffff", "#d6e9f5", "#8ec3e2", "#2f86bd", "#0b4f8a", "#06264d")
DIVERGING = ("#0b4f8a", "#5ba3cf", "#ffffff", "#e9965a", "#8f3300")
MASKED = "#c9c9c9"


def _rgb(color: str) -> NDArray[np.float64]:
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)], float)


def colored(
    values: NDArray, low: float, high: float, anchors: tuple[str, ...] = SEQUENTIAL, mask: NDArray | None = None
) -> NDArray[np.uint8]:
    """Values [Y, X] to RGB [Y, X, 3]; clipped to low..high; NaN and pixels where `mask` is False come out grey."""
    values = np.asarray(values, float)
    span = high - low if high > low else 1.0
    hidden = ~np.isfinite(values) if mask is None else ~np.isfinite(values) | ~np.asarray(mask, bool)
    position = np.clip((np.where(hidden, low, values) - low) / span, 0, 1) * (len(anchors) - 1)
    table = np.stack([_rgb(color) for color in anchors])
    rgb = np.stack([np.interp(position, np.arange(len(anchors)), table[:, c]) for c in range(3)], axis=-1)
    rgb[hidden] = _rgb(MASKED)
    return np.round(rgb).astype(np.uint8)


def tile(slices: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Slices [Z, Y, X, 3] side by side, one white column between them."""
    z, y, x, _ = slices.shape
    out = np.full((y, z * (x + 1) - 1, 3), 255, np.uint8)
    for i in range(z):
        out[:, i * (x + 1) : i * (x + 1) + x] = slices[i]
    return out


def png(rgb: NDArray[np.uint8]) -> bytes:
    """An RGB image [Y, X, 3] as PNG (ISO/IEC 15948, 8 bit truecolour, no filter)."""
    height, width, _ = rgb.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = np.concatenate([np.zeros((height, 1), np.uint8), rgb.reshape(height, -1)], axis=1)  # filter byte 0 per row
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def data_uri(rgb: NDArray[np.uint8]) -> str:
    """The image as a URI that can stand in `src` or `href`."""
    return "data:image/png;base64," + base64.b64encode(png(rgb)).decode()
