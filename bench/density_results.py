"""Sections of docs/results.md about the density network: dipeptides of unseen structures, beside controls."""

from __future__ import annotations

import csv
from pathlib import Path

import torch

from xtalfast.density.evaluate import evaluate_density
from xtalfast.density.fragment_set import make_fragments
from xtalfast.density.fragments import FragmentSettings
from xtalfast.density.train_config import density_preset
from xtalfast.density.trained import Trained
from xtalfast.density.training import train_density

STEPS, EXAMPLES = 500, 400


def dipeptide_section(data: Path, work: Path) -> str:
    """Train the small dipeptide network and judge it on test structures; finished parts in `work` are used again."""
    torch.set_num_threads(1)
    settings = FragmentSettings.preset("dipeptide", overlap=1)
    fragments = make_fragments([data / "structures" / "dev_chains.tar.xz"], work / "set", settings)
    network, training = density_preset("dipeptide-small")
    result = train_density(fragments, network, training, work / "run", max_steps=STEPS, device="cpu")
    trained = Trained.load(result.checkpoint)
    found = evaluate_density(trained, fragments, limit=EXAMPLES, controls=True)
    pc = sum(found.stages[0].pc) / len(found.ids)
    n_parents = {split: len(fragments[split].parents) for split in ("train", "test")}
    with (work / "run" / "history.csv").open() as lines:
        history = list(csv.DictReader(lines))
    curve = [
        "| optimiser steps (16 examples each) | " + " | ".join(row["step"] for row in history) + " |",
        "|---" * (len(history) + 1) + "|",
        "| PC, training | " + " | ".join(f"{float(row['train_pc']):.3f}" for row in history) + " |",
        "| PC, validation structures | " + " | ".join(f"{float(row['val_pc']):.3f}" for row in history) + " |",
    ]
    best_name, best = max(found.controls.items(), key=lambda item: item[1])
    verdict = "above" if pc - best >= 0.10 else "NOT 0.10 above"
    n_weights = sum(p.numel() for p in trained.networks[0].parameters())
    return f"""## Dipeptides: density from Patterson maps

{len(fragments["train"])} dipeptides of {n_parents["train"]} chains to train on, test dipeptides of {n_parents["test"]}
others, 1.5 A, tight P1 cells. The `dipeptide-small` network ({n_weights:,} parameters, {STEPS} steps,
{result.seconds:.0f} s on one busy core) predicts the density with a mean PC of **{pc:.3f}**.

{chr(10).join(curve)}

{found.table()}
The best control is "{best_name}" with {best:.3f}: the network is {pc - best:+.3f} from it ({verdict} as wanted).
"""
