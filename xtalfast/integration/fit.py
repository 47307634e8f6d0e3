"""Training of integration networks: one process or several under torchrun, interrupted and resumed at will.

Everything random follows from (seed, step): the order of the reflections, the Monte-Carlo draws and the split. So a
checkpoint needs no generator state, and a run that is killed and started again with the same arguments ends with the
same weights, bit for bit on a CPU.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from xtalfast.errors import InputError
from xtalfast.integration.checkpoint import Run, load_checkpoint, resume_run
from xtalfast.integration.config import IntegrationConfig
from xtalfast.integration.data import CachedProfiles, ProfileSource, ShoeboxSource, common_box
from xtalfast.integration.device import launch
from xtalfast.integration.evaluate import evaluate
from xtalfast.integration.trainer import Progress, Trainer, TrainingData

if TYPE_CHECKING:
    from lightning.fabric import Fabric

__all__ = ["TrainResult", "evaluate", "load_checkpoint", "train"]

logger = logging.getLogger("xtalfast")

_FILES = ("last.ckpt", "best.ckpt", "history.csv")
_PROFILES = "reference_profiles_{}.npy"


@dataclass
class TrainResult:
    """Outcome of a training run.

    Args:
        checkpoint: file with the weights of the lowest held-out loss.
        history: one row a validation: step, epoch, train_loss, val_loss (nats a reflection), lr, seconds.
        steps: optimiser steps made, earlier sessions included.
        seconds: time spent training, earlier sessions included.
        n_train: reflections trained on.
        n_held_out: reflections kept from training.
        stopped_early: whether the held-out loss ended the run.
    """

    checkpoint: Path
    history: list[dict[str, float]]
    steps: int
    seconds: float
    n_train: int
    n_held_out: int
    stopped_early: bool


def train(
    stores: Sequence[ShoeboxSource],
    config: IntegrationConfig,
    run_dir: str | os.PathLike,
    *,
    seed: int = 0,
    epochs: int | None = None,
    max_steps: int | None = None,
    resume: bool = True,
    reference_profiles: Sequence[ProfileSource] | None = None,
    progress: Progress | None = None,
    device: str = "auto",
) -> TrainResult:
    """Train an integration network on the shoeboxes of one or several stores.

    Writes `last.ckpt` (to resume), `best.ckpt` (lowest held-out loss), `history.csv` and TensorBoard logs to `run_dir`.
    Under `torchrun` each process takes its share of every batch; the result is that of one process.

    Args:
        stores: opened stores of one fixed box, which replaces that of `config`.
        config: network, loss and optimiser, e.g. `IntegrationConfig.preset("default")`.
        run_dir: output directory.
        seed: of weights, order, split and Monte-Carlo draws.
        epochs: instead of `config.train.epochs`.
        max_steps: stop there; the learning-rate schedule ends there as well.
        resume: continue from `last.ckpt`; False starts anew.
        reference_profiles: one source a store, needed by the profile model "dials".
        progress: called as progress("train", step, steps).
        device: "cpu", "cuda", "cuda:N" or "auto".

    Raises:
        InputError: unusable stores, a run of other settings in `run_dir`, or a loss that is no longer finite.
        MissingExtraError: lightning or tensorboard is not installed.
    """
    if not 0 <= seed < 2**63:
        raise InputError(f"seed must be from 0 to 2^63 - 1, got {seed}")
    run_dir = Path(run_dir)
    config = replace(config, box=common_box(stores))
    if epochs is not None:
        config = replace(config, train=replace(config.train, epochs=epochs))
    if config.profile.kind != "dials":
        reference_profiles = None
    elif reference_profiles is None or len(reference_profiles) != len(stores):
        raise InputError('profile "dials" needs one source of reference_profiles for each store')
    fabric = launch(config.train.precision, device)
    if fabric.is_global_zero:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not resume:
            for path in (*(run_dir / name for name in _FILES), *run_dir.glob(_PROFILES.format("*"))):
                path.unlink(missing_ok=True)
    fabric.barrier()
    if reference_profiles is not None:
        reference_profiles = _cache_profiles(fabric, stores, reference_profiles, run_dir)

    trainer = Trainer(
        fabric, TrainingData.split(fabric, stores, config, seed, reference_profiles), config, seed, max_steps
    )
    if (run_dir / "last.ckpt").is_file():
        saved = resume_run(run_dir / "last.ckpt", trainer.identity, trainer.network, trainer.optimizer)
        trainer.run = Run(**saved["run"])
        logger.info("training resumes at step %d of %d", trainer.run.step, trainer.total)
    fabric.barrier()
    trainer.fit(run_dir, progress)
    return TrainResult(
        checkpoint=run_dir / "best.ckpt",
        history=trainer.run.history,
        steps=trainer.run.step,
        seconds=trainer.run.seconds,
        n_train=trainer.data.split_record["n_train"],
        n_held_out=trainer.data.split_record["n_held_out"],
        stopped_early=trainer.run.step < trainer.total,
    )


def _cache_profiles(
    fabric: Fabric, stores: Sequence[ShoeboxSource], sources: Sequence[ProfileSource], run_dir: Path
) -> list[ProfileSource]:
    cached: list[ProfileSource] = []
    for turn in (fabric.is_global_zero, not fabric.is_global_zero):
        if turn:  # the first process writes the files, then the others open them
            for number, (source, store) in enumerate(zip(sources, stores)):
                cached.append(CachedProfiles(source, store, run_dir / _PROFILES.format(number)))
        fabric.barrier()
    return cached
