"""The `Shoebox<>` column of a `.refl` file: pixels of every reflection in flat arrays, parsed only when looked at."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from xtalfast.errors import InputError

_HEADER = struct.Struct("<I6iB")  # panel, bbox, has_data; then V float32 data, V int32 mask, V float32 background
_HEADER_DTYPE = np.dtype([("panel", "<u4"), ("bbox", "<i4", 6), ("has_data", "u1")])
_BYTES_PER_VOXEL = 12


def _volume(bbox: NDArray) -> NDArray[np.int64]:
    """Voxels of boxes [N, 6], also of the inverted ones that no software should write (0)."""
    size = (bbox[:, 1::2].astype(np.int64) - bbox[:, ::2]).clip(min=0)
    return size.prod(axis=1)


class ShoeboxColumn:
    """Pixels of N reflections; box i holds voxels ptr[i] to ptr[i + 1], in the order z, y, x (x fastest).

    A box without pixels (DIALS: not allocated) has ptr[i] == ptr[i + 1] and keeps its bbox. A column read from a file
    stays packed until one of its arrays is asked for, and is written back as the same bytes.

    Args:
        panel: [N].
        bbox: x0, x1, y0, y1, z0, z1, end excluded, [N, 6].
        data: counts, [V].
        mask: DIALS mask bits, [V].
        background: modelled background, counts per voxel, [V].
        has_data: which boxes own voxels, bool [N]; None: all of them.

    Raises:
        InputError: the number of voxels is not what `bbox` and `has_data` say.
    """

    def __init__(
        self,
        panel: NDArray,
        bbox: NDArray,
        data: NDArray,
        mask: NDArray,
        background: NDArray,
        has_data: NDArray | None = None,
    ) -> None:
        self._packed = b""
        self._n = len(panel)
        volume = _volume(np.asarray(bbox))
        if has_data is not None:
            volume = np.where(has_data, volume, 0)
        ptr = np.concatenate([[0], np.cumsum(volume)]).astype(np.int64)
        if not len(bbox) == self._n or not len(data) == len(mask) == len(background) == ptr[-1]:
            raise InputError(
                f"shoebox: {self._n} panels, {len(bbox)} boxes of {ptr[-1]} voxels in all, got data [{len(data)}], "
                f"mask [{len(mask)}], background [{len(background)}]; the lengths must agree"
            )
        self._unpacked: tuple[NDArray, ...] | None = (
            np.ascontiguousarray(panel, np.uint32),
            np.ascontiguousarray(bbox, np.int32),
            ptr,
            np.ascontiguousarray(data, np.float32),
            np.ascontiguousarray(mask, np.int32),
            np.ascontiguousarray(background, np.float32),
        )

    @classmethod
    def from_bytes(cls, n: int, packed: bytes) -> ShoeboxColumn:
        """A column of `n` boxes that is parsed when first used."""
        column = cls.__new__(cls)
        column._packed, column._n, column._unpacked = packed, n, None
        return column

    def __len__(self) -> int:
        return self._n

    @property
    def _arrays(self) -> tuple[NDArray, ...]:
        if self._unpacked is None:
            self._unpacked = self._parse()
        return self._unpacked

    def _parse(self) -> tuple[NDArray, ...]:
        packed = memoryview(self._packed)
        starts, sizes = [0] * self._n, [0] * self._n
        offset = 0
        try:
            for i in range(self._n):  # each record tells where the next one starts, so this loop cannot be vectorised
                _, x0, x1, y0, y1, z0, z1, has_data = _HEADER.unpack_from(packed, offset)
                starts[i] = offset
                sizes[i] = (x1 - x0) * (y1 - y0) * (z1 - z0) if has_data else 0
                offset += _HEADER.size + _BYTES_PER_VOXEL * sizes[i]
        except struct.error:
            offset = -1
        if offset != len(packed) or min(sizes, default=0) < 0:
            raise InputError(
                f"column shoebox: {len(packed)} bytes are not {self._n} shoeboxes; flattened or damaged shoeboxes "
                "cannot be read, integrate from the images or write the file again"
            )
        size = _HEADER.size
        raw_header = b"".join([packed[s : s + size] for s in starts])
        header = np.frombuffer(raw_header, _HEADER_DTYPE)
        ptr = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

        def gather(plane: int, dtype: str) -> NDArray:
            begin = [s + size + 4 * plane * v for s, v in zip(starts, sizes)]
            joined = bytearray().join([packed[b : b + 4 * v] for b, v in zip(begin, sizes)])
            return np.frombuffer(joined, dtype)

        return (
            header["panel"].copy(),
            header["bbox"].copy(),
            ptr,
            gather(0, "<f4"),
            gather(1, "<i4"),
            gather(2, "<f4"),
        )

    @property
    def panel(self) -> NDArray[np.uint32]:
        """Panel of each box [N]."""
        return self._arrays[0]

    @property
    def bbox(self) -> NDArray[np.int32]:
        """x0, x1, y0, y1, z0, z1, end excluded [N, 6]."""
        return self._arrays[1]

    @property
    def ptr(self) -> NDArray[np.int64]:
        """First voxel of each box, and the end [N + 1]."""
        return self._arrays[2]

    @property
    def data(self) -> NDArray[np.float32]:
        """Counts [V]."""
        return self._arrays[3]

    @property
    def mask(self) -> NDArray[np.int32]:
        """DIALS mask bits [V]: Valid 1, Background 2, Foreground 4, Strong 8, BackgroundUsed 16, Overlapped 32."""
        return self._arrays[4]

    @property
    def background(self) -> NDArray[np.float32]:
        """Modelled background [V], counts per voxel."""
        return self._arrays[5]

    @property
    def has_data(self) -> NDArray[np.bool_]:
        """Boxes that own voxels [N]."""
        return np.diff(self.ptr) > 0

    def to_bytes(self) -> bytes:
        """The records as DIALS stores them; the very bytes of the file if nothing has asked for the arrays."""
        if self._unpacked is None:
            return self._packed
        header = np.empty(self._n, _HEADER_DTYPE)
        header["panel"], header["bbox"], header["has_data"] = self.panel, self.bbox, self.has_data
        headers = memoryview(header.tobytes())
        planes = [memoryview(a.tobytes()) for a in (self.data, self.mask, self.background)]
        size, ptr = _HEADER.size, (4 * self.ptr).tolist()
        pieces: list[memoryview] = []
        for i in range(self._n):
            pieces.append(headers[i * size : (i + 1) * size])
            pieces.extend(plane[ptr[i] : ptr[i + 1]] for plane in planes)
        return b"".join(pieces)

    def select(self, rows: NDArray) -> ShoeboxColumn:
        """The boxes `rows` (int64 [K], already checked), copied."""
        sizes = np.diff(self.ptr)[rows]
        first = np.concatenate([[0], np.cumsum(sizes)])
        voxels = np.repeat(self.ptr[rows] - first[:-1], sizes) + np.arange(first[-1])
        return ShoeboxColumn(
            self.panel[rows],
            self.bbox[rows],
            self.data[voxels],
            self.mask[voxels],
            self.background[voxels],
            has_data=self.has_data[rows],
        )

    def copy(self) -> ShoeboxColumn:
        """An independent copy."""
        if self._unpacked is None:
            return ShoeboxColumn.from_bytes(self._n, self._packed)
        return self.select(np.arange(self._n))

    @staticmethod
    def concat(columns: Sequence[ShoeboxColumn]) -> ShoeboxColumn:
        """The boxes of all `columns`, one after the other."""

        def join(name: str) -> NDArray:
            return np.concatenate([getattr(column, name) for column in columns])

        return ShoeboxColumn(*map(join, ("panel", "bbox", "data", "mask", "background", "has_data")))
