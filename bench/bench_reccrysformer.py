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

import dense_reccrysformer
import pytest
import torch
from torch import Tensor

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


@pytest.mark.parametrize(("batch", "at_least"), [(2, 0.0), (4, 1.6)])
def test_forward_and_backward(paired, batch, at_least):
    model, given = network(), examples(batch)
    ours, dense = (lambda f=forward: step(f, model, *given) for forward in FORWARD.values())
    paired(ours, dense, at_least=at_least, rounds=1)


def test_memory_and_stages():
    """A third less memory at batch 4; shares of the stages, forward."""
    used = {}
    for name in FORWARD:
        command = [sys.executable, __file__, name]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
        used[name] = float(done.stdout.split()[-1])
    print(f"\npeak beyond weights: ours {used['ours']:.0f} MB, dense {used['dense']:.0f} MB")
    for name, seconds in stages(4).items():
        print(f"{name:<32} {seconds:6.2f} s")
    assert used["ours"] < used["dense"] * 2 / 3


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
    model, given = network(), examples(4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(FORWARD[sys.argv[1]], model, *given)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
