"""Training of density networks: one process or several under torchrun, interrupted and resumed at will.

Examples, dropout and templates follow from (seed, step) alone, so a run that is killed and started again with the same
arguments ends with the same weights, bit for bit on a CPU. Several processes share every batch and its batch-norm
statistics: the result is that of one process with the whole batch, up to rounding.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from xtalfast.density.dataset import Augmentation, ExampleBatch, ExampleDataset, GridBatches, Request
from xtalfast.density.fragment_set import FragmentSet
from xtalfast.density.loss import density_loss, pearson
from xtalfast.density.maps import residue_maps
from xtalfast.density.model import RecCrysFormer
from xtalfast.density.model_config import RecCrysFormerConfig
from xtalfast.density.recycle import mixed_templates, transferred_weights
from xtalfast.density.split import split_of
from xtalfast.density.train_config import DensityTrainConfig
from xtalfast.density.trained import TRAIN_VERB, Trained, domain_of, published, refined_or_none, write_published
from xtalfast.errors import InputError
from xtalfast.integration.checkpoint import FORMAT, Run, resume_run, save_checkpoint
from xtalfast.integration.device import launch
from xtalfast.integration.trainer import csv_text, tensorboard
from xtalfast.io.files import write_text

if TYPE_CHECKING:
    from lightning.fabric import Fabric

logger = logging.getLogger("xtalfast")

Progress = Callable[[str, int, int], None]
_FILES = ("last.ckpt", "best.ckpt", "history.csv", "failed.ckpt")


@dataclass
class Position(Run):
    """Where a run stands: `Run`, and the place in the data."""

    epoch: int = 0
    batch: int = 0  # of this epoch, next


@dataclass(frozen=True)
class DensityTrainResult:
    """Outcome of a training run.

    Attributes:
        checkpoint: file with the weights of the highest validation PC.
        history: one row a validation: step, epoch, loss, train_pc, val_pc, lr, seconds.
        steps: optimiser steps made, earlier sessions included.
        seconds: spent training, earlier sessions included.
    """

    checkpoint: Path
    history: list[dict[str, float]]
    steps: int
    seconds: float


def train_density(
    fragments: FragmentSet,
    model_config: RecCrysFormerConfig,
    config: DensityTrainConfig,
    run_dir: str | os.PathLike,
    *,
    seed: int = 0,
    max_steps: int | None = None,
    recycle_from: str | os.PathLike | None = None,
    resume: bool = True,
    device: str = "auto",
    progress: Progress | None = None,
) -> DensityTrainResult:
    """Train a network on the training split of a fragment set.

    Writes `last.ckpt` (to resume), `best.ckpt` (highest PC on validation structures), `history.csv` and TensorBoard
    logs to `run_dir`. Under `torchrun` each process takes its share of every batch.

    Args:
        fragments: an opened set; its test split is never looked at.
        model_config: of the network.
        config: of the training.
        run_dir: output directory.
        seed: of weights, order, dropout, augmentation and templates.
        max_steps: end there; the learning-rate schedule ends there too.
        recycle_from: checkpoint whose predictions become templates; needs `model_config.recycle`.
        resume: continue from `last.ckpt`; False starts anew.
        device: "cpu", "cuda", "cuda:N" or "auto".
        progress: called as progress("train", step, steps).

    Raises:
        InputError: settings that contradict each other, a run of other settings in `run_dir`, or a loss that is not
            finite (`failed.ckpt` holds the state before that step).
        MissingExtraError: lightning is not installed.
    """
    if model_config.recycle != (recycle_from is not None):
        wanted = "needs the checkpoint it recycles from" if model_config.recycle else "takes no template"
        raise InputError(f"this network {wanted} (recycle_from, --recycle-from)")
    run_dir = Path(run_dir)
    fabric = launch(config.precision, device)
    torch.set_float32_matmul_precision("high")
    if fabric.is_global_zero:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not resume:
            for name in _FILES:
                (run_dir / name).unlink(missing_ok=True)
    fabric.barrier()
    trainer = DensityTrainer(fabric, fragments, model_config, config, seed, max_steps, recycle_from)
    if (run_dir / "last.ckpt").is_file():
        trainer.resume(run_dir / "last.ckpt")
        logger.info("training resumes at step %d of %d", trainer.run.step, trainer.total)
    fabric.barrier()
    trainer.fit(run_dir, progress)
    run = trainer.run
    return DensityTrainResult(run_dir / "best.ckpt", run.history, run.step, run.seconds)


class DensityTrainer:
    """Network, optimiser and data of one process, and the loop over them."""

    def __init__(
        self,
        fabric: Fabric,
        fragments: FragmentSet,
        model_config: RecCrysFormerConfig,
        config: DensityTrainConfig,
        seed: int,
        max_steps: int | None,
        recycle_from: str | os.PathLike | None,
    ) -> None:
        self.fabric, self.config, self.seed, self.fragments = fabric, config, seed, fragments
        store = fragments["train"]
        groups = np.array([split_of(f"{name}/validation", test_fraction=config.held_out) for name in store.parents])
        held_out = groups[store.arrays["parent"]] == "test"
        if not (~held_out).any():
            raise InputError("no fragment is left to train on; lower held_out or add structures")
        augmentation = Augmentation.paper_variable() if config.variable_resolution else Augmentation()
        options: dict[str, Any] = {"multiple": max(model_config.patch, 4), "device": fabric.device, "seed": seed}
        changed = augmentation if not config.rotate else Augmentation(**{**vars(augmentation), "rotate": True})
        self.dataset = ExampleDataset(store.select(np.flatnonzero(~held_out)), fragments.scale, changed, **options)
        if config.min_batch < fabric.world_size:
            raise InputError(f"min_batch must be at least the number of processes, {fabric.world_size}")
        limits: dict[str, Any] = {"min_batch": config.min_batch, "max_voxels": config.max_voxels}
        self.batches = GridBatches(self.dataset, config.batch, **limits)
        rows = np.flatnonzero(held_out)
        picked = rows[:: max(1, len(rows) // config.max_validation)][: config.max_validation]
        self.validation: tuple[ExampleDataset, GridBatches] | None = None
        if len(picked):
            aside = ExampleDataset(store.select(picked), fragments.scale, augmentation, **options)
            self.validation = aside, GridBatches(aside, config.batch, shuffle=False)
        torch.manual_seed(seed)
        maps = residue_maps() / fragments.scale.density
        self.teacher: Trained | None = None
        self.network = RecCrysFormer(model_config, maps)
        if recycle_from is not None:
            self.teacher = Trained.load(recycle_from, fabric.device)
            self._start_from(self.teacher)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=config.lr, betas=(0.9, config.beta2), weight_decay=config.weight_decay
        )
        self.steps_per_epoch = max(1, len(self.batches) // config.accumulate)
        self.total = min(config.epochs * self.steps_per_epoch, max_steps or config.epochs * self.steps_per_epoch)
        self.run = Position()
        self.average = {name: value.clone() for name, value in published(self.network).items()} if config.ema else None
        self.identity = {
            "format": FORMAT, "kind": "density", "network": model_config.to_dict(), "train": config.to_dict(),
            "seed": seed, "total": self.total, "scale": fragments.scale.as_dict(),
            "parents": sorted({store.parents[i] for i in np.unique(store.arrays["parent"])}),
        }  # fmt: skip

    def _start_from(self, teacher: Trained) -> None:
        """Transfer weights in the scheme "modified"; "original" trains from scratch."""
        if self.config.template == "modified":
            earlier = published(teacher.networks[-1])
            generator = torch.Generator().manual_seed(self.seed)
            self.network.load_state_dict(transferred_weights(earlier, published(self.network), generator))
        if teacher.scale != self.fragments.scale:
            raise InputError("recycle_from was trained with another scale; use the fragment set of that run")

    def resume(self, path: Path) -> None:
        """Continue where a checkpoint stands."""
        saved = resume_run(path, self.identity, self.network, self.optimizer, TRAIN_VERB)
        self.run = Position(**saved["run"])
        if self.average is not None:
            self.average = dict(saved["published"])

    def fit(self, run_dir: Path, progress: Progress | None) -> None:
        """Train from where `run` stands to the end, with a checkpoint at each stop."""
        config, run = self.config, self.run
        network: Any = torch.compile(self.network, dynamic=True) if config.compile else self.network
        self.model, self.optimizer = self.fabric.setup(network, self.optimizer)
        board = tensorboard(run_dir) if self.fabric.is_global_zero else None
        started = time.monotonic() - run.seconds
        sums = torch.zeros(3, dtype=torch.float64, device=self.fabric.device)
        for requests in self._requests():
            if run.step >= self.total:
                break
            rate = config.learning_rate(run.step, self.total)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            sums += self.step(requests, run_dir)
            run.step += 1
            if progress is not None:
                progress("train", run.step, self.total)
            if run.step % config.validate_every and run.step < self.total:
                continue
            loss, train_pc, n = self.over_processes(sums).tolist()
            sums.zero_()
            val_pc = self.validate() if self.validation else train_pc / n
            run.seconds = time.monotonic() - started
            row = {
                "step": run.step, "epoch": run.epoch + run.batch / len(self.batches), "loss": loss / n,
                "train_pc": train_pc / n, "val_pc": val_pc, "lr": rate, "seconds": run.seconds,
            }  # fmt: skip
            run.history.append(row)
            better = -val_pc < run.best
            run.best = min(run.best, -val_pc)
            logger.info("step %d of %d: PC %.4f, validation %.4f", run.step, self.total, train_pc / n, val_pc)
            if board is None:
                continue
            for name in ("best.ckpt", "last.ckpt") if better else ("last.ckpt",):
                self.save(run_dir / name, whole=name == "last.ckpt")
            write_text(run_dir / "history.csv", csv_text(run.history))
            board.log_metrics({name: value for name, value in row.items() if name != "step"}, step=run.step)
        if board is not None:
            board.finalize("success")
        self.fabric.barrier()

    def _requests(self) -> Iterator[list[Request]]:
        """The batches of each step, this process' part of them, from where `run` stands."""
        run, fabric = self.run, self.fabric
        while True:
            self.batches.set_epoch(run.epoch)
            plan, rows = self.batches.whole()
            while run.batch < len(rows):
                taken = rows[run.batch : run.batch + self.config.accumulate]
                run.batch += len(taken)
                yield [
                    self.dataset.request(batch[fabric.global_rank :: fabric.world_size], plan, run.epoch)
                    for batch in taken
                ]
            run.epoch, run.batch = run.epoch + 1, 0

    def step(self, requests: list[Request], run_dir: Path) -> Tensor:
        """One optimiser step; sums of loss and PC over this process' examples, and their number."""
        run, config, fabric = self.run, self.config, self.fabric
        torch.manual_seed(int(np.random.SeedSequence([self.seed, run.step, fabric.global_rank]).generate_state(1)[0]))
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        n = self.over_processes(torch.tensor(float(sum(len(request.rows) for request in requests)))).item()
        sums = torch.zeros(3, dtype=torch.float64, device=fabric.device)
        for number, request in enumerate(requests):
            batch = self.dataset[request]
            with fabric.no_backward_sync(self.model, enabled=number < len(requests) - 1):
                predicted = self.predict(batch, torch.Generator().manual_seed(torch.initial_seed() % 2**63))
                losses = density_loss(
                    predicted, batch.density, mse=config.mse, pc=config.pc, amplitude_pc=config.amplitude_pc
                )
                # Each process sums its share and divides by the whole step; `world` undoes DDP's mean.
                fabric.backward(losses.sum() * (fabric.world_size / n))
            correlation = pearson(predicted.detach().float(), batch.density)
            sums += torch.stack(
                [losses.detach().sum().double(), correlation.sum().double(), sums.new_tensor(len(losses))]
            )
        if not math.isfinite(self.over_processes(sums[:1].clone()).item()):
            self._failed(requests, run_dir)
        if config.clip_norm is not None:
            fabric.clip_gradients(self.model, self.optimizer, max_norm=config.clip_norm, error_if_nonfinite=False)
        self.optimizer.step()
        self._update_average()
        return sums

    def _failed(self, requests: list[Request], run_dir: Path) -> None:
        """Save the state before a step whose loss is not finite, and stop."""
        names = [self.dataset.store.id(row) for request in requests for row in request.rows.tolist()]
        if self.fabric.is_global_zero:
            self.save(run_dir / "failed.ckpt", whole=True)
        raise InputError(
            f"the loss is not finite at step {self.run.step + 1} (fragments {', '.join(names[:8])}"
            f"{', ...' if len(names) > 8 else ''}); failed.ckpt holds the state before it. "
            "Lower the learning rate or use precision 32-true"
        )

    def predict(self, batch: ExampleBatch, generator: torch.Generator | None) -> Tensor:
        """The network's densities [B, X, Y, Z]; templates are random with a generator, the test's without."""
        template = None
        if self.teacher is not None:
            d_min = float(batch.d_min.max())
            raw = self.teacher.predict(batch.patterson, batch.residue_ids, batch.cells, d_min)
            rows = zip(raw, batch.patterson, batch.residue_ids, batch.cells)
            refined = [refined_or_none(*row, d_min, self.teacher.scale) for row in rows]
            template = mixed_templates(raw, refined, self.config.template, generator)[:, None]
        return self.model(batch.patterson[:, None], batch.residue_ids, template, batch.cells.float())[:, 0]

    @torch.no_grad()
    def _update_average(self) -> None:
        if self.average is None:
            return
        # At the start the average follows closely; its memory grows with the run.
        decay = min(self.config.ema, (1 + self.run.step) / (10 + self.run.step))
        for name, value in self.network.state_dict().items():
            kept = self.average[name] = self.average[name].to(value.device)
            if value.is_floating_point():
                kept.lerp_(value, 1 - decay)
            else:
                kept.copy_(value)

    @torch.no_grad()
    def validate(self) -> float:
        """Mean PC over the validation structures, of the averaged weights where there are any."""
        assert self.validation is not None
        dataset, batches = self.validation
        own = {name: value.clone() for name, value in self.network.state_dict().items()}
        self.network.load_state_dict(self.average or own)
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.fabric.device)
        for number, request in enumerate(batches):
            if number % self.fabric.world_size == self.fabric.global_rank:
                batch = dataset[request]
                sums[0] += pearson(self.predict(batch, None).float(), batch.density).sum()
                sums[1] += len(batch.density)
        self.network.load_state_dict(own)
        total, n = self.over_processes(sums).tolist()
        return total / n

    def save(self, path: Path, *, whole: bool) -> None:
        """Write a checkpoint: to use, or (whole) to go on from as well."""
        weights = published(self.network) if self.average is None else {k: v.cpu() for k, v in self.average.items()}
        facts = {
            "published": weights, "step": self.run.step,
            "chain": [] if self.teacher is None else self.teacher.chain(),
            "domain": vars(domain_of(self.dataset)),
        }  # fmt: skip
        if whole:
            save_checkpoint(path, self.identity, self.network, self.optimizer, self.run, **facts)
        else:
            write_published(path, self.identity | facts)

    def over_processes(self, values: Tensor) -> Tensor:
        """Sum over all processes."""
        total = self.fabric.all_reduce(values.to(self.fabric.device), reduce_op="sum")
        assert isinstance(total, Tensor)
        return total
