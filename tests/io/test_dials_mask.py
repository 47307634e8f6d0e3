"""DIALS mask files: as DIALS writes them, and what else may be in a pickle."""

from __future__ import annotations

import os
import pickle
import subprocess

import numpy as np
import pytest

from xtalfast.errors import InputError
from xtalfast.io.cbf import MiniCbfHeader, write_cbf
from xtalfast.io.dials_mask import read_dials_mask

# pickle.dumps((m, m)) of flex.bool(flex.grid(3, 4), True) with element 1 set False, protocol 2
TWO_PANELS = (
    b"\x80\x02cscitbx_array_family_flex_ext\nbool\nq\x00)Rq\x01cscitbx_array_family_flex_ext\ngrid\nq\x02K\x00K\x00\x86q\x03"
    b"K\x03K\x04\x86q\x04\x88\x87q\x05Rq\x06K\x03K\x04\x86q\x07bc_codecs\nencode\nq\x08X\x0e\x00\x00\x00\x02\x0c101111111111"
    b"q\tX\x06\x00\x00\x00latin1q\n\x86q\x0bRq\x0c\x86q\rbh\x01\x86q\x0e."
)


def test_mask_of_two_panels(tmp_path):
    (tmp_path / "pixels.mask").write_bytes(TWO_PANELS)
    masks = read_dials_mask(tmp_path / "pixels.mask")
    expected = np.ones((3, 4), bool)
    expected[0, 1] = False
    assert len(masks) == 2 and all(np.array_equal(mask, expected) for mask in masks)


class Intruder:
    def __reduce__(self):
        return os.mkdir, ("intruder",)


BAD = {
    "code": (pickle.dumps((Intruder(),)), "but it holds a posix.mkdir"),
    "list": (pickle.dumps([True, False]), "got something else"),
    "empty": (b"", "wanted a DIALS mask"),
    "cut": (TWO_PANELS[:-20], "wanted a DIALS mask"),
    "text": (b"hello", "wanted a DIALS mask"),
    "short": (
        TWO_PANELS.replace(b"K\x03K\x04\x86q\x04", b"K\x05K\x04\x86q\x04"),
        r"flex.bool of shape \(5, 4\) has 14 bytes",
    ),
}


@pytest.mark.parametrize("data, message", BAD.values(), ids=BAD.keys())
def test_other_pickles_are_refused_and_never_run(tmp_path, monkeypatch, data, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pixels.mask").write_bytes(data)
    with pytest.raises(InputError, match=message):
        read_dials_mask("pixels.mask")
    assert not (tmp_path / "intruder").exists()


def test_missing_mask(tmp_path):
    with pytest.raises(InputError, match="cannot read mask"):
        read_dials_mask(tmp_path / "none.mask")


@pytest.mark.dials
def test_mask_made_by_dials(tmp_path):
    header = MiniCbfHeader(pixel_size=(0.1, 0.1), wavelength=1.0, distance=100.0, beam_xy=(30.0, 20.0))
    write_cbf(tmp_path / "a_0001.cbf", np.zeros((200, 300), np.int32), header)
    for command in (
        ["dials.import", "a_0001.cbf"],
        ["dials.generate_mask", "imported.expt", "untrusted.rectangle=7,10,5,9"],
    ):
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    (mask,) = read_dials_mask(tmp_path / "pixels.mask")
    expected = np.ones((200, 300), bool)
    expected[5:9, 7:10] = False
    assert np.array_equal(mask, expected)
