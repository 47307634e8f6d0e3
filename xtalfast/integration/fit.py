"""Training of integration networks: one process or several under torchrun, interrupted and resumed at will.

Everything random follows from (seed, step): the order of the reflections, the Monte-Carlo draws and the split. So a
checkpoint needs no generator state, and a run that is killed and started again with the same arguments ends with the
same weights, bit for bit on a CPU.
"""

from __future__ import annotations

import logging
import math
import os
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from xtalfast.errors import InputError, MissingExtraError
from xtalfast.integration.checkpoint import FORMAT, Run, load_checkpoint, resume_run, save_checkpoint
from xtalfast.integration.config import IntegrationConfig, TrainConfig
from xtalfast.integration.data import (
    CachedProfiles,
    ProfileSource,
    ShoeboxLoader,
    ShoeboxSource,
    common_box,
    held_out,
)
from xtalfast.integration.evaluate import evaluate
from xtalfast.integration.model import IntegrationModel
from xtalfast.integration.statistics import DataStatistics
from xtalfast.io.files import write_text

if TYPE_CHECKING:
    from lightning.fabric import Fabric

__all__ = ["TrainResult", "evaluate", "load_checkpoint", "train"]

Progress = Callable[[str, int, int], None]
logger = logging.getLogger("xtalfast")

_SAMPLE = 4096  # reflections from which the statistics of the data are taken
_CHECK_EVERY = 50  # steps between two looks at the loss for NaN


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
        device: "cpu", "cuda" or "auto".

    Raises:
        InputError: unusable stores, a run of other settings in `run_dir`, or a loss that is no longer finite.
        MissingExtraError: lightning or tensorboard is not installed.
    """
    run_dir = Path(run_dir)
    config = replace(config, box=common_box(stores))
    if epochs is not None:
        config = replace(config, train=replace(config.train, epochs=epochs))
    fabric = _launch(config.train.precision, device)
    writes = fabric.is_global_zero
    if writes:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not resume:
            for name in ("last.ckpt", "best.ckpt", "history.csv", *_profile_files(stores)):
                (run_dir / name).unlink(missing_ok=True)
    if config.profile.kind != "dials":
        reference_profiles = None
    elif reference_profiles is None or len(reference_profiles) != len(stores):
        raise InputError('profile "dials" needs one source of reference_profiles for each store')
    else:
        for turn in (writes, not writes):  # the first process writes the files, the others then open them
            if turn:
                files = [run_dir / name for name in _profile_files(stores)]
                cached = [CachedProfiles(p, s, f) for p, s, f in zip(reference_profiles, stores, files)]
            fabric.barrier()
        reference_profiles = cached

    kept = held_out(stores, config.train.held_out, seed)
    usable = np.concatenate([_usable(store) for store in stores])
    if not (usable & ~kept).any():
        raise InputError(f"none of {len(kept)} reflections can be trained on: all are held out or outside the images")
    loader = ShoeboxLoader(
        stores, np.flatnonzero(usable & ~kept), config.train.batch, seed=seed, rank=fabric.global_rank,
        world=fabric.world_size, profiles=reference_profiles,
    )  # fmt: skip
    validation = _spread(np.flatnonzero(usable & kept), config.train.max_validation)[
        fabric.global_rank :: fabric.world_size
    ]

    torch.manual_seed(seed)
    network = IntegrationModel(config)
    network.set_statistics(DataStatistics.of(loader.read(_spread(loader.rows, _SAMPLE))))
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.train.lr, weight_decay=config.train.weight_decay)
    total = config.train.epochs * loader.steps_per_epoch
    if max_steps is not None:
        total = min(total, max_steps)
    n_held_out = int((usable & kept).sum())
    split = {
        "n_train": len(loader.rows),
        "n_held_out": n_held_out,
        "held_out_crc32": zlib.crc32(np.packbits(kept).tobytes()),
    }
    identity = {"format": FORMAT, "config": config.to_dict(), "seed": seed, "total": total, "split": split}
    run = Run()
    if (run_dir / "last.ckpt").is_file():
        run = resume_run(run_dir / "last.ckpt", identity, network, optimizer)
        logger.info("training resumes at step %d of %d", run.step, total)
    fabric.barrier()
    model, optimizer = fabric.setup(network, optimizer)
    model.mark_forward_method("losses")
    board = _board(run_dir) if writes else None

    started = time.monotonic() - run.seconds
    patience = config.train.patience or total
    while run.step < total and run.stale < patience:
        last = min(_next_stop(run.step, loader.steps_per_epoch, config.train.checkpoint_every), total)
        train_loss = _segment(fabric, model, optimizer, loader, config.train, run, last, total, seed, progress)
        val_loss = _validate(fabric, model, loader, validation, seed) if config.train.held_out else train_loss
        run.seconds = time.monotonic() - started
        run.history.append({
            "step": run.step, "epoch": run.step / loader.steps_per_epoch, "train_loss": train_loss,
            "val_loss": val_loss, "lr": optimizer.param_groups[0]["lr"], "seconds": run.seconds,
        })  # fmt: skip
        better = val_loss < run.best
        run.best, run.stale = (val_loss, 0) if better else (run.best, run.stale + 1)
        if board is not None:  # the first process
            for name in ("best.ckpt", "last.ckpt") if better else ("last.ckpt",):
                save_checkpoint(run_dir / name, identity, network, optimizer, run)
            write_text(run_dir / "history.csv", _csv(run.history))
            board.log_metrics({k: v for k, v in run.history[-1].items() if k != "step"}, step=run.step)
        logger.info("step %d of %d: loss %.3f, held out %.3f", run.step, total, train_loss, val_loss)
    if board is not None:
        board.finalize("success")
    fabric.barrier()
    return TrainResult(
        checkpoint=run_dir / "best.ckpt",
        history=run.history,
        steps=run.step,
        seconds=run.seconds,
        n_train=len(loader.rows),
        n_held_out=n_held_out,
        stopped_early=run.step < total,
    )


def _launch(precision: Literal["32-true", "bf16-mixed", "16-mixed"], device: str) -> Fabric:
    try:
        from lightning.fabric import Fabric
    except ImportError as error:
        raise MissingExtraError("lightning", "train", "training") from error
    # torchrun sets these; started alone, this is the one process.
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    fabric = Fabric(
        accelerator=device, devices=local, num_nodes=world // local, precision=precision,
        strategy="ddp" if world > 1 else "auto",
    )  # fmt: skip
    fabric.launch()
    return fabric


def _board(run_dir: Path) -> Any:
    try:
        from lightning.fabric.loggers import TensorBoardLogger

        return TensorBoardLogger(root_dir=run_dir, name="tensorboard", version="")
    except ImportError as error:
        raise MissingExtraError("tensorboard", "train", "logging a training") from error


def _segment(
    fabric: Fabric,
    model: Any,
    optimizer: Any,
    loader: ShoeboxLoader,
    config: TrainConfig,
    run: Run,
    last: int,
    total: int,
    seed: int,
    progress: Progress | None,
) -> float:
    """Optimiser steps up to `last`; the mean training loss of a reflection on the way."""
    loss_sum = torch.zeros((), dtype=torch.float64, device=fabric.device)
    first = run.step
    for batch in loader.steps(first, last):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(config, run.step, total)
        optimizer.zero_grad(set_to_none=True)
        # Every process sums its share and divides by the whole batch; DDP's mean over processes is then undone.
        losses = model.losses(batch.to(fabric.device), seed=seed * 1_000_003 + run.step)
        fabric.backward(losses.sum() * (loader.world / loader.batch))
        if config.clip_norm is not None:
            fabric.clip_gradients(model, optimizer, max_norm=config.clip_norm, error_if_nonfinite=False)
        optimizer.step()
        loss_sum += losses.detach().sum()
        run.step += 1
        if (run.step % _CHECK_EVERY == 0 or run.step == last) and not math.isfinite(loss_sum.item()):
            raise InputError(
                f"the loss is not finite at step {run.step}: lower train.lr (now {config.lr:g}) or use precision"
                " 32-true; last.ckpt holds the last good state"
            )
        if progress is not None:
            progress("train", run.step, total)
    return _sum_over_processes(fabric, loss_sum).item() / (loader.batch * (last - first))


@torch.no_grad()
def _validate(fabric: Fabric, model: Any, loader: ShoeboxLoader, rows: NDArray[np.int64], seed: int) -> float:
    sums = torch.zeros(2, dtype=torch.float64, device=fabric.device)
    for number, batch in enumerate(loader.chunks(rows)):
        losses = model.losses(batch.to(fabric.device), seed=seed * 1_000_003 - number - 1)
        sums += torch.stack([losses.sum().double(), losses.new_tensor(len(losses), dtype=torch.float64)])
    loss, n = _sum_over_processes(fabric, sums)
    return (loss / n.clamp(min=1)).item()


def _sum_over_processes(fabric: Fabric, values: torch.Tensor) -> torch.Tensor:
    total = fabric.all_reduce(values, reduce_op="sum")
    assert isinstance(total, torch.Tensor)
    return total


def _learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """Constant, or a linear warm-up followed by half a cosine to zero."""
    if config.schedule == "constant":
        return config.lr
    warmup = config.warmup * total
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def _next_stop(step: int, steps_per_epoch: int, every: int) -> int:
    """The next end of an epoch or multiple of `every`."""
    return min(step + n - step % n for n in (steps_per_epoch, every))


def _spread(rows: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """At most n of the rows, evenly spaced."""
    return rows if len(rows) <= n else rows[np.linspace(0, len(rows) - 1, n).astype(np.int64)]


def _usable(store: ShoeboxSource) -> NDArray[np.bool_]:
    """Rows whose box touches the images; a store without the `reason` column has no others."""
    if "reason" not in store.metadata:
        return np.ones(store.n, bool)
    return np.asarray(store.metadata["reason"]) == 0


def _profile_files(stores: Sequence[ShoeboxSource]) -> list[str]:
    return [f"reference_profiles_{number}.npy" for number in range(len(stores))]


def _csv(history: list[dict[str, float]]) -> str:
    return "\n".join([",".join(history[0]), *(",".join(f"{v:.9g}" for v in row.values()) for row in history), ""])
