"""The training loop of integration networks: who trains on what, optimiser steps, validation, stops."""

from __future__ import annotations

import logging
import math
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from xtalfast.errors import InputError, MissingExtraError
from xtalfast.integration.checkpoint import FORMAT, Run, save_checkpoint
from xtalfast.integration.config import IntegrationConfig, TrainConfig
from xtalfast.integration.data import ProfileSource, ShoeboxLoader, ShoeboxSource
from xtalfast.integration.model import IntegrationModel
from xtalfast.integration.splits import held_out
from xtalfast.integration.statistics import DataStatistics
from xtalfast.integration.store import NO_SPOT
from xtalfast.io.files import write_text

if TYPE_CHECKING:
    from lightning.fabric import Fabric

Progress = Callable[[str, int, int], None]
logger = logging.getLogger("xtalfast")

_SAMPLE = 4096  # reflections from which the statistics of the data are taken
_CHECK_EVERY = 50  # steps between two looks at the loss for NaN


@dataclass
class TrainingData:
    """The reflections of a training, split."""

    loader: ShoeboxLoader  # of those trained on
    validation: NDArray[np.int64]  # this process' share of the held-out rows
    split_record: dict[str, int]  # for the checkpoint: a resumed run must find the same

    @classmethod
    def split(
        cls,
        fabric: Fabric,
        stores: Sequence[ShoeboxSource],
        config: IntegrationConfig,
        seed: int,
        profiles: Sequence[ProfileSource] | None,
    ) -> TrainingData:
        kept = held_out(stores, config.train.held_out, seed)
        usable = np.concatenate([_usable(store) for store in stores])
        rows, aside = np.flatnonzero(usable & ~kept), np.flatnonzero(usable & kept)
        if not len(rows):
            raise InputError(f"none of {len(kept)} reflections can be trained on: held out or outside the images")
        loader = ShoeboxLoader(
            stores, rows, config.train.batch, seed=seed, rank=fabric.global_rank, world=fabric.world_size,
            profiles=profiles, thin=config.train.thin and config.profile.kind != "dials",
        )  # fmt: skip
        validation = _spread(aside, config.train.max_validation)[fabric.global_rank :: fabric.world_size]
        digest = zlib.crc32(np.packbits(kept).tobytes())
        return cls(loader, validation, {"n_train": len(rows), "n_held_out": len(aside), "held_out_crc32": digest})


class Trainer:
    """Network, optimiser and data of one process, and the loop over them."""

    def __init__(
        self, fabric: Fabric, data: TrainingData, config: IntegrationConfig, seed: int, max_steps: int | None
    ) -> None:
        self.fabric, self.data, self.config, self.seed = fabric, data, config.train, seed
        torch.manual_seed(seed)
        self.network = IntegrationModel(config)
        self.network.set_statistics(DataStatistics.of(data.loader.read(_spread(data.loader.rows, _SAMPLE))))
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=config.train.lr, weight_decay=config.train.weight_decay
        )
        self.total = min(config.train.epochs * data.loader.steps_per_epoch, max_steps or sys.maxsize)
        self.run = Run()
        self.identity = {
            "format": FORMAT, "config": config.to_dict(), "seed": seed, "total": self.total, "split": data.split_record,
        }  # fmt: skip

    def fit(self, run_dir: Path, progress: Progress | None) -> None:
        """Train from where `run` stands to the end, with a checkpoint at each stop."""
        run, loader = self.run, self.data.loader
        self.model, self.optimizer = self.fabric.setup(self.network, self.optimizer)
        self.model.mark_forward_method("losses")
        board = tensorboard(run_dir) if self.fabric.is_global_zero else None
        started = time.monotonic() - run.seconds
        while run.step < self.total and run.stale < (self.config.patience or self.total):
            last = min(_next_stop(run.step, loader.steps_per_epoch, self.config.checkpoint_every), self.total)
            train_loss = self.segment(last, progress)
            val_loss = self.validate() if self.data.split_record["n_held_out"] else train_loss
            run.seconds = time.monotonic() - started
            row = {
                "step": run.step,
                "epoch": run.step / loader.steps_per_epoch,
                "train_loss": train_loss,
                "val_loss": val_loss,
                "lr": self.optimizer.param_groups[0]["lr"],
                "seconds": run.seconds,
            }
            run.history.append(row)
            better = val_loss < run.best
            run.best, run.stale = (val_loss, 0) if better else (run.best, run.stale + 1)
            logger.info("step %d of %d: loss %.3f, held out %.3f", run.step, self.total, train_loss, val_loss)
            if board is None:
                continue
            for name in ("best.ckpt", "last.ckpt") if better else ("last.ckpt",):
                save_checkpoint(run_dir / name, self.identity, self.network, self.optimizer, run)
            write_text(run_dir / "history.csv", csv_text(run.history))
            board.log_metrics({name: value for name, value in row.items() if name != "step"}, step=run.step)
        if board is not None:
            board.finalize("success")
        self.fabric.barrier()

    def segment(self, last: int, progress: Progress | None) -> float:
        """Optimiser steps up to `last`; the mean training loss of a reflection on the way."""
        run, loader, first = self.run, self.data.loader, self.run.step
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.fabric.device)
        for batch in loader.steps(first, last):
            for group in self.optimizer.param_groups:
                group["lr"] = _learning_rate(self.config, run.step, self.total)
            self.optimizer.zero_grad(set_to_none=True)
            losses = self.model.losses(batch.to(self.fabric.device), seed=self.draw(0, run.step))
            # Each process sums its share and divides by the whole batch; `world` undoes DDP's mean over processes.
            self.fabric.backward(losses.sum() * (loader.world / loader.batch))
            if self.config.clip_norm is not None:
                self.fabric.clip_gradients(
                    self.model, self.optimizer, max_norm=self.config.clip_norm, error_if_nonfinite=False
                )
            self.optimizer.step()
            loss_sum += losses.detach().sum()
            run.step += 1
            if (run.step % _CHECK_EVERY == 0 or run.step == last) and not math.isfinite(loss_sum.item()):
                raise InputError(
                    f"the loss is not finite at step {run.step}: lower train.lr (now {self.config.lr:g}) or use"
                    " precision 32-true; last.ckpt holds the last good state"
                )
            if progress is not None:
                progress("train", run.step, self.total)
        return self.over_processes(loss_sum).item() / (loader.batch * (last - first))

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss of a held-out reflection, always with the same draws."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.fabric.device)
        for number, batch in enumerate(self.data.loader.chunks(self.data.validation)):
            losses = self.model.losses(batch.to(self.fabric.device), seed=self.draw(1, number))
            sums[0] += losses.sum()
            sums[1] += len(losses)
        loss, n = self.over_processes(sums)
        return (loss / n).item()

    def draw(self, purpose: int, number: int) -> int:
        """Seed of Monte-Carlo draws, another for each purpose, batch and process."""
        return int(np.random.SeedSequence([self.seed, purpose, number, self.fabric.global_rank]).generate_state(1)[0])

    def over_processes(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all processes."""
        total = self.fabric.all_reduce(values, reduce_op="sum")
        assert isinstance(total, torch.Tensor)
        return total


def tensorboard(run_dir: Path) -> Any:
    """Logger of scalars below `run_dir`."""
    try:
        from lightning.fabric.loggers import TensorBoardLogger

        return TensorBoardLogger(root_dir=run_dir, name="tensorboard", version="")
    except ImportError as error:
        raise MissingExtraError("tensorboard", "train", "logging a training") from error


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
    """Rows with a spot in the images; a store without the `reason` column has no others."""
    if "reason" not in store.metadata:
        return np.ones(store.n, bool)
    return (np.asarray(store.metadata["reason"]) & NO_SPOT) == 0


def csv_text(history: list[dict[str, float]]) -> str:
    """One line a row under the names of the first."""
    return "\n".join([",".join(history[0]), *(",".join(f"{v:.9g}" for v in row.values()) for row in history), ""])
