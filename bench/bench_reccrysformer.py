"""The network of the density paper, forward and backward at its sizes, against itself written out densely.

    pytest bench/bench_reccrysformer.py -s

60 x 40 x 36 voxels, 15 residues, batch norm in training mode, one thread; peak memory is that of fresh processes.
Prints the share of each stage of ours.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

import dense_reccrysformer

from xtalfast.density import RecCrysFormer, RecCrysFormerConfig

GRID = (60, 40, 36)


def network() -> RecCrysFormer:
    torch.manual_seed(0)
    return RecCrysFormer(RecCrysFormerConfig.paper(dropout=0.0, emb_dropout=0.0)).train()


def examples(batch: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, 1, *GRID) * 0.05, torch.randint(0, 20, (batch, 15))


def step(forward, model: RecCrysFormer, patterson: Tensor, ids: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    forward(model, patterson, ids).square().mean().backward()


FORWARD = {"ours": lambda model, *given: model(*given), "dense": dense_reccrysformer.forward}


def measured(name: str, batch: int) -> tuple[float, float]:
    """CPU seconds of a step, and MB of memory it needs beyond weights and input, in a fresh process."""
    command = [sys.executable, __file__, name, str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, megabytes = map(float, done.stdout.split())
    return seconds, megabytes


@pytest.mark.parametrize("batch", [2, 4])
def test_forward_and_backward(batch):
    """At batch 4, 1.6 times as fast and with a third less memory."""
    (seconds, memory), (dense_seconds, dense_memory) = (measured(name, batch) for name in FORWARD)
    print(
        f"\nbatch {batch}: {dense_seconds / seconds:.2f}x the dense network ({seconds:.1f} s against"
        f" {dense_seconds:.1f}); {memory:.0f} MB against {dense_memory:.0f}"
    )
    if batch == 4:
        assert dense_seconds / seconds >= 1.6 and memory <= dense_memory * 2 / 3


def test_stages():
    for name, seconds in stages(4).items():
        print(f"{name:<32} {seconds:6.2f} s")


def stages(batch: int) -> dict[str, float]:
    """CPU seconds of each stage of one forward pass."""
    model, given = network(), examples(batch)
    spent: dict[str, float] = defaultdict(float)
    started: dict[str, float] = {}
    parts = {"patch embedding": [model.embed], "residues": [model.residues], "head": [model.head]}
    parts |= {"residual blocks": list(model.blocks), "last convolution": [model.last]}
    for kind in ("attention", "feed_forward"):
        parts[kind.replace("_", " ")] = [getattr(one, kind) for one in model.layers]
    parts["layers (all)"] = list(model.layers)
    for name, modules in parts.items():
        for module in modules:
            module.register_forward_pre_hook(lambda *_, n=name: started.__setitem__(n, time.process_time()))
            module.register_forward_hook(
                lambda *_, n=name: spent.__setitem__(n, spent[n] + time.process_time() - started[n])
            )
    start = time.process_time()
    model(*given)
    total = time.process_time() - start
    known = spent["layers (all)"] - spent["attention"] - spent["feed forward"]
    return {**spent, "keys and values of residues": known, "forward": total}


if __name__ == "__main__":
    torch.set_num_threads(1)
    model, given = network(), examples(int(sys.argv[2]))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    step(FORWARD[sys.argv[1]], model, *given)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(time.process_time() - start, (after - before) / 1024)
