"""Checkpoints of a training: plain tensors and numbers, written whole or not at all, read without running code."""

from __future__ import annotations

import io
import math
import os
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from xtalfast.errors import InputError
from xtalfast.integration.config import IntegrationConfig
from xtalfast.integration.model import IntegrationModel
from xtalfast.io.files import write_bytes

FORMAT = 1
_WORDS = {
    "format": "another version of xtalfast",
    "config": "other network settings",
    "seed": "another seed",
    "total": "another number of epochs or steps",
    "split": "other reflections",
}


@dataclass
class Run:
    """What changes during training beside weights and optimiser; the checkpoint holds it."""

    step: int = 0
    seconds: float = 0.0
    best: float = math.inf
    stale: int = 0  # validations since the best
    history: list[dict[str, float]] = field(default_factory=list)


_VERB = "xtalfast train integration"


def load_checkpoint(path: str | os.PathLike, device: str = "cpu") -> IntegrationModel:
    """The trained network of a checkpoint, with the statistics of its data, ready to evaluate.

    Raises:
        InputError: no file, or not a checkpoint of this program.
    """
    saved = read_checkpoint(Path(path), _VERB)
    model = IntegrationModel(IntegrationConfig.from_dict(saved["config"]))
    model.load_state_dict(saved["model"])
    return model.to(device).eval()


def save_checkpoint(
    path: Path,
    identity: dict[str, Any],
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    run: Run,
    **facts: Any,
) -> None:
    """Write all that `resume_run` needs, and further facts; `identity` says which run it is."""
    state = identity | {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "run": vars(run)} | facts
    content = io.BytesIO()  # torch.save to a full disk raises no OSError
    torch.save(state, content)
    write_bytes(path, content.getvalue())


def read_checkpoint(path: Path, verb: str) -> dict[str, Any]:
    """What `save_checkpoint` wrote. Raises InputError naming the command `verb` that writes such files."""
    if not path.is_file():
        raise InputError(f"no checkpoint {path}; `{verb}` writes best.ckpt")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, ImportError, AttributeError) as error:
        raise InputError(
            f"{path}: not a checkpoint, or a damaged one; `{verb}` writes one, --restart a new one"
        ) from error
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise InputError(f"{path}: not an xtalfast checkpoint of format {FORMAT}")
    if ("kind" in saved) != (verb != _VERB):
        raise InputError(f"{path}: a checkpoint of another network; `{verb}` writes the one wanted")
    return saved


def resume_run(
    path: Path,
    identity: dict[str, Any],
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    verb: str = _VERB,
) -> dict[str, Any]:
    """Put network and optimiser into the state of a checkpoint; returns all it holds, the `Run`'s fields in "run".

    Raises:
        InputError: the checkpoint is of a run with another configuration, seed, length or data.
    """
    saved = read_checkpoint(path, verb)
    for name, wanted in identity.items():
        if saved.get(name) != wanted:
            raise InputError(
                f"{path} is of a run with {_WORDS.get(name, name)}; "
                "start anew with --restart (resume=False), or choose another directory"
            )
    network.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved
