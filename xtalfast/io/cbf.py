"""CBF images (miniCBF and full CBF, x-CBF_BYTE_OFFSET): read with every size checked, and written as PILATUS miniCBF.

A CBF holds a text header, a MIME block that states the sizes and an MD5 sum, a 4-byte tag, the byte-offset stream, zero
padding and a closing boundary. A file is accepted only if all of these agree with each other and with the file's end.
"""

from __future__ import annotations

import base64
import bz2
import gzip
import hashlib
import math
import os
import re
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xtalfast import _native
from xtalfast.errors import CorruptImageError, InputError
from xtalfast.io.files import write_bytes

__all__ = [
    "CbfHeader",
    "MiniCbfHeader",
    "decode_byte_offset",
    "encode_byte_offset",
    "is_cbf",
    "read_bytes",
    "read_cbf",
    "read_cbf_header",
    "write_cbf",
]

_MAGIC = b"###CBF"
_SECTION = b"--CIF-BINARY-FORMAT-SECTION--"
_BOUNDARY = b"--CIF-BINARY-FORMAT-SECTION----"
_START = b"\x0c\x1a\x04\xd5"
_MIME_FIELD = re.compile(r"^([\w-]+):[ \t]*(.*(?:\r?\n[ \t].*)*)", re.MULTILINE)
_INTEGER_ELEMENT = re.compile(r'"?(?:un)?signed (?:8|16|32|64)-bit integer"?')
_PADDING = 4095
_TRUNCATED, _TRAILING, _OVERFLOW = 1, 2, 3  # ByteOffsetStatus of csrc/byte_offset.hpp


def decode_byte_offset(stream: bytes | memoryview, n_pixels: int, *, isa: int | None = None) -> NDArray[np.int32]:
    """Pixels of a CBF byte-offset stream, which must hold exactly `n_pixels`.

    Args:
        stream: the compressed bytes, without tag or padding.
        n_pixels: pixels of the image.
        isa: 0 portable code, 1 AVX2; None takes the best that this processor has.

    Returns:
        int32 [n_pixels].

    Raises:
        CorruptImageError: the stream is too short or too long, or a pixel is beyond int32.
    """
    C = _native.require("decode_byte_offset")
    # A pixel takes at least one byte. Checked before allocating, since a damaged header can ask for any size.
    if n_pixels > len(stream):
        raise CorruptImageError(f"{len(stream)} bytes cannot hold {n_pixels} pixels")
    source = np.frombuffer(stream, np.uint8)
    pixels = np.empty(n_pixels, np.int32)
    isa = C.byte_offset_best_isa() if isa is None else isa
    status, done, used = C.byte_offset_decode(source.ctypes.data, source.size, pixels.ctypes.data, n_pixels, isa)
    if status == _TRUNCATED:
        raise CorruptImageError(f"the stream of {len(stream)} bytes ends after {done} of {n_pixels} pixels")
    if status == _TRAILING:
        raise CorruptImageError(f"{n_pixels} pixels take {used} bytes but the stream has {len(stream)}")
    if status == _OVERFLOW:
        raise CorruptImageError(f"pixel {done} of {n_pixels} is beyond the range of int32")
    return pixels


def encode_byte_offset(pixels: NDArray[np.int32]) -> bytes:
    """The CBF byte-offset stream of int32 pixels, each difference in its shortest form."""
    C = _native.require("encode_byte_offset")
    pixels = np.ascontiguousarray(pixels, np.int32)
    stream = np.empty(C.byte_offset_encoded_size(pixels.ctypes.data, pixels.size), np.uint8)
    C.byte_offset_encode(pixels.ctypes.data, pixels.size, stream.ctypes.data)
    return stream.tobytes()


@dataclass(frozen=True)
class CbfHeader:
    """What a CBF file says about itself: the text before the binary section and the fields of its MIME block."""

    text: str
    mime: dict[str, str]
    offset: int  # of the stream in the (uncompressed) file, bytes
    size: int  # of the stream, bytes
    padding: int  # zeros after the stream, bytes
    newline: bytes
    shape: tuple[int, int]  # px, (slow, fast)

    @cached_property
    def fields(self) -> dict[str, str]:
        """The `# Name value` lines of a PILATUS header, units kept: {'Wavelength': '0.96859 A', ...}."""
        fields = {}
        for line in self.text.splitlines():
            if not line.startswith("# "):
                continue
            words = line[2:].replace("=", " ").split(maxsplit=1)
            if re.match(r"\d{4}[-/]\w+[-/]\d+[T ]\d", line[2:]):
                fields["timestamp"] = line[2:].strip()
            elif words:
                fields[words[0].rstrip(":")] = words[1].strip() if len(words) > 1 else ""
        return fields


@dataclass(frozen=True)
class MiniCbfHeader:
    """The miniCBF header of an image from a flat detector normal to the beam, as DIALS reads it.

    With PILATUS in the detector's name the convention is PILATUS_1.2 and DIALS looks for the module gaps; with any
    other name it is GENERIC_MINI, and the image may have any number of pixels.
    """

    pixel_size: tuple[float, float]  # mm, (fast, slow)
    wavelength: float  # A
    distance: float  # mm
    beam_xy: tuple[float, float]  # px, (fast, slow)
    start_angle: float = 0.0  # deg, of this image
    angle_increment: float = 0.0  # deg
    exposure_time: float = 0.1  # s
    exposure_period: float | None = None  # s; None: the exposure time
    detector: str = ""  # empty: simulated PILATUS if the image has the size of one, else simulated detector
    timestamp: str = "2000-01-01T00:00:00.000"
    sensor: str = "Silicon"  # or CdTe; written when the thickness is positive
    sensor_thickness: float = 0.0  # mm; positive makes DIALS correct the parallax
    tau: float = 0.0  # s
    count_cutoff: int = 1048500  # counts
    threshold: float | None = None  # eV; None: half the photon energy
    polarization: float = 0.999
    oscillation_axis: str = "X, CW"

    def text(self, shape: tuple[int, int]) -> str:
        """Convention and contents of the header of an image [slow, fast]: one `# Name value unit` line each.

        Raises:
            InputError: the detector is called PILATUS, but the image is not made of its modules.
        """
        slow, fast = shape
        # DIALS fails on a PILATUS that is not a whole number of 487 x 195 modules with gaps of 7 and 17.
        modular = (fast + 7) % (487 + 7) == 0 and (slow + 17) % (195 + 17) == 0
        detector = self.detector or ("PILATUS, simulated" if modular else "simulated detector")
        pilatus = "PILATUS" in detector.upper()
        if pilatus and not modular:
            raise InputError(
                f"image of {detector!r} must have the size of PILATUS modules (487 x 195 px, gaps 7 and 17), "
                f"got {fast} x {slow}; give another size or another detector name"
            )
        period = self.exposure_time if self.exposure_period is None else self.exposure_period
        threshold = 12398.4198 / self.wavelength / 2 if self.threshold is None else self.threshold
        lines = [
            f"Detector: {detector}",
            self.timestamp,
            f"Pixel_size {self.pixel_size[0] * 1e3:.9g}e-6 m x {self.pixel_size[1] * 1e3:.9g}e-6 m",
            f"Exposure_time {self.exposure_time:.7f} s",
            f"Exposure_period {period:.7f} s",
            f"Tau = {self.tau:.9g} s",
            f"Count_cutoff {self.count_cutoff} counts",
            f"Threshold_setting: {threshold:.0f} eV",
            f"Wavelength {self.wavelength:.8f} A",
            f"Detector_distance {self.distance / 1e3:.8f} m",
            f"Beam_xy ({self.beam_xy[0]:.4f}, {self.beam_xy[1]:.4f}) pixels",
            f"Start_angle {self.start_angle:.6f} deg.",
            f"Angle_increment {self.angle_increment:.6f} deg.",
            "Detector_2theta 0.0000 deg.",
            f"Polarization {self.polarization:.4f}",
            f"Phi {self.start_angle:.6f} deg.",
            f"Oscillation_axis {self.oscillation_axis}",
        ]
        if self.sensor_thickness > 0:
            lines.insert(3, f"{self.sensor} sensor, thickness {self.sensor_thickness / 1e3:.6f} m")
        contents = "".join(f"# {line}\r\n" for line in lines)
        return (
            f'_array_data.header_convention "{"PILATUS_1.2" if pilatus else "GENERIC_MINI"}"\r\n'
            f"_array_data.header_contents\r\n;\r\n{contents};\r\n\r\n"
        )


def read_bytes(path: str | os.PathLike) -> bytes:
    """The whole file; gzip and bzip2 are recognised by content, not by name, and undone.

    Raises:
        InputError: the file cannot be read.
        CorruptImageError: the compressed file is truncated or damaged.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        if data.startswith(b"\x1f\x8b"):
            return gzip.decompress(data)
        if data.startswith(b"BZh"):
            return bz2.decompress(data)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise CorruptImageError(f"{path}: cannot decompress ({error}); the file is damaged, fetch it again") from error
    return data


def is_cbf(data: bytes) -> bool:
    """Whether an (uncompressed) file begins as a CBF."""
    return data.startswith(_MAGIC)


def _parse_header(path: str | os.PathLike, data: bytes) -> CbfHeader:
    if not is_cbf(data):
        got = repr(data[:6]) if data else "an empty file"
        raise InputError(f"{path}: wanted a CBF image (###CBF at its start), got {got}; fetch it again")
    section = data.find(_SECTION)
    start = data.find(_START, section)
    if section < 0 or start < 0:
        raise CorruptImageError(f"{path}: no binary section; the file is truncated or holds no image")
    mime = {name: value.strip() for name, value in _MIME_FIELD.findall(data[section:start].decode("latin-1"))}

    def number(name: str, default: int | None = None) -> int:
        value = mime.get(name, "" if default is None else str(default))
        if not re.fullmatch(r"[0-9]{1,15}", value):
            raise CorruptImageError(f"{path}: header field {name} must be a whole number, got {value!r}")
        return int(value)

    conversion = mime.get("Content-Type", "")
    if "x-CBF_BYTE_OFFSET" not in conversion:
        used = re.search(r"x-CBF_\w+", conversion)
        raise InputError(
            f"{path}: wanted x-CBF_BYTE_OFFSET compression, got {used.group() if used else 'none'}; convert the image"
        )
    element = mime.get("X-Binary-Element-Type", "signed 32-bit integer")
    if not _INTEGER_ELEMENT.fullmatch(element):
        raise InputError(f"{path}: wanted integer pixels, got X-Binary-Element-Type {element}")
    fast, slow = number("X-Binary-Size-Fastest-Dimension"), number("X-Binary-Size-Second-Dimension")
    if number("X-Binary-Size-Third-Dimension", 1) > 1:
        raise InputError(f"{path}: wanted one image, got a stack of {mime['X-Binary-Size-Third-Dimension']}")
    elements = number("X-Binary-Number-of-Elements", fast * slow)
    if elements != fast * slow or elements == 0:
        raise CorruptImageError(
            f"{path}: header says {elements} pixels but {fast} x {slow} pixels; the header is damaged"
        )
    return CbfHeader(
        text=data[:section].decode("latin-1"),
        mime=mime,
        offset=start + len(_START),
        size=number("X-Binary-Size"),
        padding=number("X-Binary-Size-Padding", 0),
        newline=b"\r\n" if data.startswith(b"\r\n", section + len(_SECTION)) else b"\n",
        shape=(slow, fast),
    )


def read_cbf_header(path: str | os.PathLike) -> CbfHeader:
    """The header of a CBF image (plain, gzip or bzip2), its pixels left alone.

    Raises:
        InputError: not a CBF of one integer byte-offset image.
        CorruptImageError: the header is incomplete or contradicts itself.
    """
    return _parse_header(path, read_bytes(path))


def _md5_matches(header: CbfHeader, stream: bytes | memoryview) -> bool | None:
    """Whether the stream has the MD5 sum of the header; None if the header has none."""
    if "Content-MD5" not in header.mime:
        return None
    digest = hashlib.md5(stream, usedforsecurity=False).digest()
    return base64.b64encode(digest).decode() == header.mime["Content-MD5"]


def _decode(path: str | os.PathLike, data: bytes, verify: bool) -> NDArray[np.int32]:
    header = _parse_header(path, data)
    end = header.offset + header.size
    if end > len(data):
        raise CorruptImageError(
            f"{path}: wanted {header.size} bytes of pixels (X-Binary-Size), got {len(data) - header.offset}; "
            "the file is truncated, fetch it again"
        )
    boundary = data.find(_BOUNDARY, end)
    if boundary < 0:
        raise CorruptImageError(f"{path}: no closing boundary after the pixels; the file is truncated, fetch it again")
    between = data[end + header.padding : boundary]
    if not between.endswith(header.newline) or between.strip(b"\r\n\0"):
        # Bytes lost inside the stream bring the padding into it, and zeros would decode as pixels.
        raise CorruptImageError(
            f"{path}: wanted {header.size + header.padding} bytes of pixels and padding, got "
            f"{boundary - header.offset - len(header.newline)}; the file is damaged, fetch it again"
        )
    if data.find(_SECTION, boundary + len(_BOUNDARY)) >= 0:
        raise InputError(f"{path}: wanted one binary section, got several; convert it to one image per file")
    stream = memoryview(data)[header.offset : end]
    try:
        pixels = decode_byte_offset(stream, math.prod(header.shape))
    except CorruptImageError as error:
        blame = {
            True: "the MD5 sum is right, so the file was written with a wrong header",
            False: "the MD5 sum is wrong too: the bytes are damaged, fetch the file again",
            None: "there is no MD5 sum to tell whether header or bytes are damaged",
        }[_md5_matches(header, stream)]
        raise CorruptImageError(f"{path}: {error}; {blame}") from error
    if verify:
        match = _md5_matches(header, stream)
        if match is None:
            raise CorruptImageError(f"{path}: no Content-MD5 in the header to verify; read it without verification")
        if not match:
            raise CorruptImageError(
                f"{path}: MD5 sum is not {header.mime['Content-MD5']} as in the header; damaged, fetch it again"
            )
    return pixels.reshape(header.shape)


def read_cbf(path: str | os.PathLike, *, verify: bool = False, data: bytes | None = None) -> NDArray[np.int32]:
    """Read a CBF image, plain or compressed by gzip or bzip2.

    Args:
        path: the file; also names it in errors.
        verify: compare the MD5 sum in the header too (several times slower). Sizes are always checked.
        data: contents of the file, already read and uncompressed.

    Returns:
        int32 [slow, fast], raw values: negative pixels are masked by the detector.

    Raises:
        InputError: the file cannot be read, or is no CBF of one integer byte-offset image.
        CorruptImageError: header, stream, pixel count and file end do not agree, or the MD5 sum is wrong or missing
            when it is to be verified.
    """
    return _decode(path, read_bytes(path) if data is None else data, verify)


def write_cbf(path: str | os.PathLike, image: NDArray[np.integer], header: MiniCbfHeader) -> None:
    """Write one image as miniCBF with its MD5 sum; a name in .gz or .bz2 is compressed.

    Args:
        path: output file.
        image: integers [slow, fast] within int32; negative for masked pixels.
        header: geometry and exposure.

    Raises:
        InputError: the image is not a non-empty 2-D array of integers within int32, or has not the size of a PILATUS
            though the header says so, or the file cannot be written.
    """
    path = Path(path)
    image = np.asarray(image)
    if image.ndim != 2 or image.size == 0 or image.dtype.kind not in "iu":
        raise InputError(f"image must be integers [slow, fast], got {image.dtype} {list(image.shape)}")
    pixels = image.astype(np.int32)
    if image.dtype != np.int32 and not np.array_equal(pixels, image):
        raise InputError(f"image must fit int32, got values {image.min()} to {image.max()}")
    stream = encode_byte_offset(pixels)
    name = path.name.split(".")[0]
    head = (
        "###CBF: VERSION 1.5, xtalfast\r\n"
        f"\r\ndata_{name}\r\n\r\n"
        f"{header.text(image.shape)}"
        "_array_data.data\r\n;\r\n"
        f"{_SECTION.decode()}\r\n"
        "Content-Type: application/octet-stream;\r\n"
        '     conversions="x-CBF_BYTE_OFFSET"\r\n'
        "Content-Transfer-Encoding: BINARY\r\n"
        f"X-Binary-Size: {len(stream)}\r\n"
        "X-Binary-ID: 1\r\n"
        'X-Binary-Element-Type: "signed 32-bit integer"\r\n'
        "X-Binary-Element-Byte-Order: LITTLE_ENDIAN\r\n"
        f"Content-MD5: {base64.b64encode(hashlib.md5(stream, usedforsecurity=False).digest()).decode()}\r\n"
        f"X-Binary-Number-of-Elements: {image.size}\r\n"
        f"X-Binary-Size-Fastest-Dimension: {image.shape[1]}\r\n"
        f"X-Binary-Size-Second-Dimension: {image.shape[0]}\r\n"
        f"X-Binary-Size-Padding: {_PADDING}\r\n\r\n"
    )
    data = head.encode() + _START + stream + bytes(_PADDING) + b"\r\n" + _BOUNDARY + b"\r\n;\r\n\r\n"
    if path.suffix == ".gz":
        data = gzip.compress(data, compresslevel=6, mtime=0)
    elif path.suffix == ".bz2":
        data = bz2.compress(data)
    write_bytes(path, data)
