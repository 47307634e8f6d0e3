"""Where networks and fits run: the `--device` of the command line, checked before any work is done."""

from __future__ import annotations

import re

import torch

from xtalfast.errors import InputError


def choose_device(name: str) -> torch.device:
    """The torch device of "auto" (a GPU when torch sees one), "cpu", "cuda" or "cuda:N".

    Raises:
        InputError: another name, or a GPU that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    if not re.fullmatch(r"cuda(:\d+)?", name):
        raise InputError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not n_gpus:
        raise InputError(f"device {name!r}: torch sees no GPU here; use --device cpu")
    device = torch.device(name)
    if (device.index or 0) >= n_gpus:
        raise InputError(f"device {name!r}: torch sees {n_gpus} GPUs, the last is cuda:{n_gpus - 1}")
    return device
