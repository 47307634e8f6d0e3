"""`xtalfast doctor`."""

from __future__ import annotations

import importlib.util

import xtalfast
from xtalfast.cli import main


def test_says_versions_extension_and_extras(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["xtalfast", xtalfast.__version__]
    names = [line.split()[0] for line in lines]
    assert {"python", "torch", "extension", "[io]", "[train]", "[cli]", "[report]", "[gpu]"} <= set(names)


def test_says_how_to_get_what_is_missing(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "h5py" else find(name))
    assert main(["doctor"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("[io]"))
    assert "missing h5py: pip install 'xtalfast[io]'" in line
    assert "msgpack" in line


def test_says_when_the_extension_is_not_there(monkeypatch, capsys):
    from xtalfast import _native

    monkeypatch.setattr(_native, "C", None)
    monkeypatch.setattr(_native, "why", "no such file", raising=False)
    assert main(["doctor"]) == 0
    assert "NOT LOADED (no such file); ops fall back to plain torch" in capsys.readouterr().out
