"""Where networks and fits run: the `--device` of the command line, checked before any work is done."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Literal

import torch

from xtalfast.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from lightning.fabric import Fabric

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


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


def launch(precision: Precision, device: str) -> Fabric:
    """Lightning Fabric on a device of `choose_device`: this process alone, or one of those torchrun started."""
    try:
        from lightning.fabric import Fabric
    except ImportError as error:
        raise MissingExtraError("lightning", "train", "training") from error
    chosen = choose_device(device)
    # torchrun sets these; started alone, this is the one process.
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    fabric = Fabric(
        accelerator=chosen.type,
        devices=local if chosen.index is None else [chosen.index],
        num_nodes=world // local,
        precision=precision,
        strategy="ddp" if world > 1 else "auto",
    )
    fabric.launch()
    return fabric
