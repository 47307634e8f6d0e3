"""CBF: the byte-offset code against a plain Python one and fabio, headers, damage of every kind, DIALS as reader."""

from __future__ import annotations

import base64
import bz2
import dataclasses
import gzip
import hashlib
import json
import re
import struct
import subprocess

import fabio
import numpy as np
import pytest

from xtalfast._native import C
from xtalfast.errors import CorruptImageError, InputError
from xtalfast.io.cbf import (
    MiniCbfHeader,
    decode_byte_offset,
    encode_byte_offset,
    read_cbf,
    read_cbf_header,
    write_cbf,
)

INT32 = np.iinfo(np.int32)
ISAS = [0, 1] if C.byte_offset_best_isa() == 1 else [0]
HEADER = MiniCbfHeader(pixel_size=(0.172, 0.172), wavelength=0.9792, distance=135.0, beam_xy=(40.3, 20.7))


def encode_slowly(pixels: np.ndarray) -> bytes:
    """The definition of the code, one pixel at a time."""
    stream, before = b"", 0
    for value in pixels.ravel().tolist():
        delta, before = value - before, value
        if abs(delta) < 2**7:
            stream += struct.pack("<b", delta)
        elif abs(delta) < 2**15:
            stream += b"\x80" + struct.pack("<h", delta)
        elif abs(delta) < 2**31:
            stream += b"\x80\x00\x80" + struct.pack("<i", delta)
        else:
            stream += b"\x80\x00\x80\x00\x00\x00\x80" + struct.pack("<q", delta)
    return stream


def poisson_image(shape=(80, 101), seed=0) -> np.ndarray:
    """Background, spots, a module gap and bad pixels: every width of difference but the widest."""
    rng = np.random.default_rng(seed)
    image = rng.poisson(2.0, shape).astype(np.int32)
    for _ in range(12):
        y, x = rng.integers(0, shape[0] - 3), rng.integers(0, shape[1] - 3)
        image[y : y + 3, x : x + 3] += rng.poisson(10 ** rng.uniform(1, 6), (3, 3)).astype(np.int32)
    image[:, shape[1] // 2 : shape[1] // 2 + 7] = -1
    image[rng.integers(0, shape[0], 9), rng.integers(0, shape[1], 9)] = -2
    return image


EXTREMES = {
    "one": [5],
    "int8-edges": [127, 0, -127, 1, -127, 0, 128, 0, -128, 0],
    "int16-edges": [32767, 0, -32767, 1, 32769, 0, -32768, 0],
    "int32-edges": [INT32.max, 0, INT32.min + 1, 0, INT32.min, 0],
    "int64": [INT32.max, INT32.min, INT32.max, -1, INT32.min, INT32.max],
    "climb-to-max": [*range(INT32.max - 70 * 100, INT32.max, 100), INT32.max],
    "fall-to-min": [*range(INT32.min + 70 * 100, INT32.min, -100), INT32.min],
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("values", EXTREMES.values(), ids=EXTREMES.keys())
def test_extreme_values_round_trip(values, isa):
    pixels = np.array(values, np.int32)
    stream = encode_byte_offset(pixels)
    assert stream == encode_slowly(pixels)
    assert np.array_equal(decode_byte_offset(stream, pixels.size, isa=isa), pixels)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", [1, 7, 8, 31, 32, 33, 63, 64, 65, 1000])
def test_escapes_at_every_place_of_a_block(n, isa):
    rng = np.random.default_rng(n)
    for _ in range(20):
        steps = rng.choice([0, 1, -1, 127, -127, 128, -128, 40000, -40000], n, p=[0.3, 0.3, 0.3, *[1 / 60] * 6])
        pixels = np.cumsum(steps).astype(np.int32)
        stream = encode_byte_offset(pixels)
        assert stream == encode_slowly(pixels)
        assert np.array_equal(decode_byte_offset(stream, n, isa=isa), pixels)


@pytest.mark.parametrize("isa", ISAS)
def test_wide_forms_of_small_differences_are_read(isa):
    stream = b"\x80\x05\x00" + b"\x80\x00\x80\xff\xff\xff\xff" + b"\x80\x00\x80\x00\x00\x00\x80" + struct.pack("<q", -3)
    assert decode_byte_offset(stream, 3, isa=isa).tolist() == [5, 4, 1]


@pytest.mark.parametrize("isa", ISAS)
def test_every_cut_of_a_stream_is_found(isa):
    pixels = np.concatenate([np.arange(40), [300, 70000, INT32.max, INT32.min], np.arange(40)]).astype(np.int32)
    stream = encode_byte_offset(pixels)
    for n in range(len(stream)):
        with pytest.raises(CorruptImageError):
            decode_byte_offset(stream[:n], pixels.size, isa=isa)
    with pytest.raises(CorruptImageError, match=f"{pixels.size} pixels take {len(stream)} bytes but the stream has"):
        decode_byte_offset(stream + b"\0", pixels.size, isa=isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("step", [100, -100], ids=["up", "down"])
def test_one_byte_steps_beyond_int32_are_found(step, isa):
    start = INT32.max - 550 if step > 0 else INT32.min + 550
    stream = encode_byte_offset(np.array([start], np.int32)) + struct.pack("<b", step) * 60
    with pytest.raises(CorruptImageError, match="pixel 6 of 61 is beyond the range of int32"):
        decode_byte_offset(stream, 61, isa=isa)


@pytest.mark.parametrize("isa", ISAS)
def test_differences_at_the_end_of_int64_are_found(isa):
    wide = b"\x80\x00\x80\x00\x00\x00\x80"
    for before, delta in ((INT32.max, 2**63 - 1), (INT32.min, -(2**63)), (0, 2**31)):
        stream = encode_byte_offset(np.array([before], np.int32)) + wide + struct.pack("<q", delta)
        with pytest.raises(CorruptImageError, match="beyond the range of int32"):
            decode_byte_offset(stream, 2, isa=isa)


@pytest.mark.parametrize("suffix", [".cbf", ".cbf.gz", ".cbf.bz2"])
def test_written_image_reads_back_here_and_in_fabio(tmp_path, suffix):
    image = poisson_image()
    path = tmp_path / f"a_0001{suffix}"
    write_cbf(path, image, HEADER)
    assert np.array_equal(read_cbf(path, verify=True), image)
    assert np.array_equal(fabio.open(str(path)).data, image)


def test_fabio_written_image_reads_back(tmp_path):
    image = poisson_image()
    path = tmp_path / "a.cbf"
    fabio.cbfimage.CbfImage(data=image).write(str(path))
    assert np.array_equal(read_cbf(path, verify=True), image)


def test_compression_is_told_by_content(tmp_path):
    image = poisson_image((8, 9))
    write_cbf(tmp_path / "a.cbf.gz", image, HEADER)
    (tmp_path / "a.cbf.gz").rename(tmp_path / "a.cbf")
    assert np.array_equal(read_cbf(tmp_path / "a.cbf"), image)


def test_header_fields(tmp_path):
    path = tmp_path / "a.cbf"
    write_cbf(path, poisson_image(), HEADER)
    header = read_cbf_header(path)
    assert header.shape == (80, 101)
    assert header.fields["Wavelength"] == "0.97920000 A"
    assert header.fields["Beam_xy"] == "(40.3000, 20.7000) pixels"
    assert header.fields["Detector"] == "simulated detector"
    assert header.fields["timestamp"] == "2000-01-01T00:00:00.000"
    stream = path.read_bytes()[header.offset : header.offset + header.size]
    assert header.mime["Content-MD5"] == base64.b64encode(hashlib.md5(stream).digest()).decode()


def test_only_images_of_int32_are_written(tmp_path):
    write_cbf(tmp_path / "a.cbf", np.array([[2**31 - 1, 0]], np.int64), HEADER)
    assert read_cbf(tmp_path / "a.cbf").tolist() == [[2**31 - 1, 0]]
    with pytest.raises(InputError, match=r"size of PILATUS modules .* got 101 x 80"):
        write_cbf(tmp_path / "b.cbf", poisson_image(), dataclasses.replace(HEADER, detector="PILATUS 1M"))
    for image in (np.array([[2**31]]), np.zeros((2, 2)), np.zeros(4, int), np.zeros((0, 5), int)):
        with pytest.raises(InputError, match="image must"):
            write_cbf(tmp_path / "b.cbf", image, HEADER)
    assert not (tmp_path / "b.cbf").exists()


def replace_field(data: bytes, name: str, value: str) -> bytes:
    return re.sub(rb"(?m)^" + name.encode() + rb":.*?\r\n", f"{name}: {value}\r\n".encode(), data)


DAMAGE = {
    "truncated": (lambda d: d[:3000], "the file is truncated"),
    "padding-cut": (lambda d: d[:-2000], "no closing boundary"),
    "no-section": (lambda d: d[:400], "no binary section"),
    "pixels": (lambda d: replace_field(d, "X-Binary-Size-Fastest-Dimension", "100"), "8080 pixels but 100 x 80"),
    "size-short": (lambda d: replace_field(d, "X-Binary-Size", "500"), "wanted 4595 bytes of pixels and padding, got"),
    "size-missing": (lambda d: replace_field(d, "X-Binary-Size", ""), "X-Binary-Size must be a whole number, got ''"),
    "bytes-lost": (lambda d: d[:3000] + d[3001:], "bytes of pixels and padding, got"),
    "huge": (
        lambda d: replace_field(
            replace_field(d, "X-Binary-Size-Fastest-Dimension", "1" + 9 * "0"),
            "X-Binary-Number-of-Elements",
            "8" + 10 * "0",
        ),
        "cannot hold 80000000000 pixels",
    ),
}


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_named_with_the_file(tmp_path, damage, message):
    path = tmp_path / "a.cbf"
    write_cbf(path, poisson_image(), HEADER)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CorruptImageError, match=re.escape(message)) as error:
        read_cbf(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_decode_error_says_whether_header_or_bytes_are_damaged(tmp_path):
    path = tmp_path / "a.cbf"
    write_cbf(path, poisson_image(), HEADER)
    good = path.read_bytes()
    header = read_cbf_header(path)
    bad = bytearray(good)
    bad[header.offset + 100] ^= 0x80 ^ bad[header.offset + 100]  # a one-byte difference becomes an escape
    path.write_bytes(bad)
    with pytest.raises(CorruptImageError, match="the MD5 sum is wrong too"):
        read_cbf(path)
    fewer = replace_field(good, "X-Binary-Size-Second-Dimension", "79")
    path.write_bytes(replace_field(fewer, "X-Binary-Number-of-Elements", str(79 * 101)))
    with pytest.raises(CorruptImageError, match="the MD5 sum is right, so the file was written with a wrong header"):
        read_cbf(path)


REFUSED = {
    "packed": (lambda d: d.replace(b"x-CBF_BYTE_OFFSET", b"x-CBF_PACKED"), "got x-CBF_PACKED"),
    "real": (lambda d: d.replace(b"signed 32-bit integer", b"signed 32-bit real IEEE"), "wanted integer pixels"),
    "two-images": (lambda d: d + d[d.index(b"--CIF") :], "wanted one binary section"),
    "no-cbf": (lambda d: b"P5 80 101" + d, "wanted a CBF image"),
}


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED.keys())
def test_other_kinds_of_cbf_are_refused(tmp_path, change, message):
    path = tmp_path / "a.cbf"
    write_cbf(path, poisson_image(), HEADER)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=message):
        read_cbf(path)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress], ids=["gz", "bz2"])
def test_damaged_compression_is_found(tmp_path, compress):
    write_cbf(tmp_path / "a.cbf", poisson_image(), HEADER)
    data = compress((tmp_path / "a.cbf").read_bytes())
    for damaged in (data[:-20], data[: len(data) // 2], data[:200] + bytes(50) + data[250:]):
        (tmp_path / "a.cbf").write_bytes(damaged)
        with pytest.raises(CorruptImageError, match="cannot decompress"):
            read_cbf(tmp_path / "a.cbf")


def test_unreadable_files(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*b\.cbf: No such file"):
        read_cbf(tmp_path / "b.cbf")


def test_random_damage_never_passes_unseen(tmp_path):
    """Whatever is flipped or cut: an error, or pixels that are right, or a decode that verify rejects."""
    path = tmp_path / "a.cbf"
    image = poisson_image((40, 50), seed=3)
    write_cbf(path, image, HEADER)
    good = path.read_bytes()
    header = read_cbf_header(path)
    payload = range(header.offset, header.offset + header.size)
    rng = np.random.default_rng(7)
    seen = {"error": 0, "right": 0, "rejected": 0}
    for trial in range(1500):
        data = bytearray(good)
        if trial % 3 == 0:
            # The closing line after the boundary may go: every size has been checked by then.
            place = int(rng.integers(0, len(data) - 9))
            del data[place : place + int(rng.integers(1, 200)) if trial % 2 else None]
        else:
            places = payload if trial % 3 == 1 else range(len(good))
            for place in rng.choice(places, rng.integers(1, 4)):
                data[place] ^= int(rng.integers(1, 256))
        path.write_bytes(data)
        try:
            pixels = read_cbf(path)
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            seen["error"] += 1
            continue
        if np.array_equal(pixels, image):
            seen["right"] += 1
            continue
        with pytest.raises(CorruptImageError, match="MD5"):
            read_cbf(path, verify=True)
        seen["rejected"] += 1
    assert min(seen.values()) > 50, seen


@pytest.mark.dials
@pytest.mark.parametrize(
    "shape, thickness, detector",
    [((407, 487), 0.32, ""), ((60, 70), 0.0, ""), ((60, 70), 0.45, "lab detector")],
    ids=["pilatus", "any-size", "any-size-thick"],
)
def test_dials_imports_the_geometry_we_wrote(tmp_path, shape, thickness, detector):
    image = poisson_image(shape)
    for number in (1, 2, 3):
        header = MiniCbfHeader(
            pixel_size=(0.172, 0.172),
            wavelength=0.97918,
            distance=135.25,
            beam_xy=(33.25, 21.5),
            start_angle=12 + 0.35 * (number - 1),
            angle_increment=0.35,
            exposure_time=0.05,
            detector=detector,
            sensor_thickness=thickness,
            count_cutoff=99999,
        )
        write_cbf(tmp_path / f"sim_{number:04d}.cbf", image, header)
    command = ["dials.import", "sim_0001.cbf", "sim_0002.cbf", "sim_0003.cbf", "output.experiments=out.expt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (tmp_path / "out.expt").exists(), done.stdout + done.stderr
    models = json.loads((tmp_path / "out.expt").read_text())
    panel, scan = models["detector"][0]["panels"][0], models["scan"][0]
    assert len(models["imageset"]) == 1 and scan["image_range"] == [1, 3]
    assert models["beam"][0]["wavelength"] == pytest.approx(0.97918, abs=1e-8)
    assert scan["oscillation"] == pytest.approx([12, 0.35], abs=1e-6)
    assert panel["image_size"] == list(shape[::-1])
    assert panel["pixel_size"] == pytest.approx([0.172, 0.172], abs=1e-9)
    assert panel["origin"] == pytest.approx([-33.25 * 0.172, 21.5 * 0.172, -135.25], abs=1e-5)
    assert panel["trusted_range"] == [-1, 99999]
    assert panel["mask"] == ([[0, 195, 487, 212]] if shape == (407, 487) else [])
    assert panel["thickness"] == pytest.approx(thickness, abs=1e-9)
