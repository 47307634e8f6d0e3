"""How a density network is trained: the paper's schedules, and one that a laptop finishes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from xtalfast.density.model_config import RecCrysFormerConfig
from xtalfast.errors import InputError
from xtalfast.integration.device import Precision


@dataclass(frozen=True)
class DensityTrainConfig:
    """Optimiser, schedule, loss and data; the defaults are those of the paper's first run.

    Attributes:
        epochs: passes over the fragments.
        batch: examples of one grid that go through the network together.
        min_batch: smaller batches are left out; at least one example for each process.
        accumulate: such batches in one optimiser step.
        max_voxels: of a batch; larger grids come in smaller batches. None for no limit.
        lr: the largest learning rate; it starts at lr / div and ends at lr / (div x final_div).
        warmup: part of the steps until the largest.
        div, final_div: see lr.
        weight_decay: of AdamW, on everything.
        beta2: of AdamW.
        clip_norm: of the gradient.
        mse, pc, amplitude_pc: weights of the loss.
        ema: decay of the averaged weights that are validated and published; 0 takes the weights themselves.
        precision: "32-true" or "bf16-mixed"; single precision uses TF32 on a GPU, as the paper did.
        compile: torch.compile the network.
        rotate: turn every fragment anew in each epoch.
        variable_resolution: the paper's second data set, 1.6 to 2.25 A.
        held_out: part of the training structures that only validate.
        max_validation: fragments validated on, at most.
        validate_every: steps between validations and checkpoints.
        template: with `recycle`: how templates are mixed, "original" or "modified" (see `recycle`).
    """

    epochs: int = 110
    batch: int = 10
    min_batch: int = 1
    accumulate: int = 4
    max_voxels: int | None = None
    lr: float = 1.4e-3
    warmup: float = 0.3
    div: float = 2.8
    final_div: float = 40.0
    weight_decay: float = 3e-2
    beta2: float = 0.999
    clip_norm: float | None = 1.0
    mse: float = 0.9999
    pc: float = 5e-5
    amplitude_pc: float = 5e-5
    ema: float = 0.0
    precision: Precision = "32-true"
    compile: bool = False
    rotate: bool = False
    variable_resolution: bool = False
    held_out: float = 0.02
    max_validation: int = 512
    validate_every: int = 1000
    template: Literal["original", "modified"] = "modified"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "min_batch", "accumulate", "max_validation", "validate_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("warmup", "ema", "held_out"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be from 0 to below 1, got {getattr(self, name)}")
        for name in ("lr", "div", "final_div"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be above 0, got {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DensityTrainConfig:
        """The inverse of `to_dict`. Raises InputError for names this version does not know."""
        unknown = sorted(set(values) - {item.name for item in fields(cls)})
        if unknown:
            raise InputError(f"unknown training settings {', '.join(unknown)}")
        return cls(**values)

    def learning_rate(self, step: int, total: int) -> float:
        """OneCycle with cosines: up over `warmup` of the steps, then down. Ref: Smith & Topin (2017)."""
        start, end = self.lr / self.div, self.lr / (self.div * self.final_div)
        peak = self.warmup * total - 1
        if step <= peak:
            low, high, part = start, self.lr, step / max(peak, 1)
        else:
            low, high, part = self.lr, end, (step - peak) / max(total - 1 - peak, 1)
        return high + (low - high) / 2 * (1 + math.cos(math.pi * min(part, 1.0)))


SMALL_NETWORK: dict[str, Any] = {
    "dim": 128, "depth": 3, "heads": 4, "dim_head": 32, "ff_dim": 384, "n_residues": 2, "max_grid": (64, 64, 64),
    "decoder_blocks": 0, "dropout": 0.0, "emb_dropout": 0.0,
}  # fmt: skip


def density_preset(name: str) -> tuple[RecCrysFormerConfig, DensityTrainConfig]:
    """Network and training of a name: see `PRESETS`.

    Raises:
        InputError: another name.
    """
    paper = DensityTrainConfig()
    if name == "paper":
        return RecCrysFormerConfig.paper(), paper
    if name == "paper-recycle":
        recycling = replace(paper, epochs=80, lr=8e-4, div=3.2)
        return RecCrysFormerConfig.paper(recycle=True), recycling
    if name == "fast":
        faster = replace(paper, precision="bf16-mixed", compile=True, ema=0.999, rotate=True, max_voxels=2_000_000)
        return RecCrysFormerConfig.fast(), faster
    if name == "dipeptide":
        return RecCrysFormerConfig.dipeptide(), replace(paper, batch=40, accumulate=1, precision="bf16-mixed")
    if name == "dipeptide-small":
        small = replace(
            paper, epochs=1, batch=16, accumulate=1, lr=1.5e-3, warmup=0.05, div=25, beta2=0.98, weight_decay=1e-2,
            mse=1.0, pc=5e-3, precision="bf16-mixed", ema=0.99, max_validation=128, validate_every=100,
        )  # fmt: skip
        return RecCrysFormerConfig.fast(**SMALL_NETWORK), small
    raise InputError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")


PRESETS = ("paper", "paper-recycle", "fast", "dipeptide", "dipeptide-small")


def changed_settings(
    network: RecCrysFormerConfig, training: DensityTrainConfig, changes: Sequence[str]
) -> tuple[RecCrysFormerConfig, DensityTrainConfig]:
    """Both configurations with `NAME=VALUE` changes from the command line; values are JSON, or words.

    Raises:
        InputError: a name that neither has, or a value that does not fit.
    """
    of_network, of_training = network.to_dict(), training.to_dict()
    for change in changes:
        name, _, text = change.partition("=")
        settings = of_network if name in of_network else of_training
        if name not in settings or not text:
            raise InputError(
                f"--set wants NAME=VALUE, NAME one of {', '.join([*of_network, *of_training])}; got {change!r}"
            )
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        old = settings[name]
        if old is not None and not isinstance(value, (int, float) if isinstance(old, float) else type(old) | list):
            raise InputError(f"--set {name} wants a value like {old!r}, got {text!r}")
        settings[name] = value
    return RecCrysFormerConfig.from_dict(of_network), DensityTrainConfig.from_dict(of_training)
