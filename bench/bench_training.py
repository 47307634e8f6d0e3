"""Training at full scale: a generated store of 1.9 million paper boxes, its loader, memory and step time.

The store (5 GB of counts, 2.5 GB of mask) goes to `XTALFAST_BENCH_DIR` or the temporary directory and is removed
afterwards; without the space the bench is skipped. `XTALFAST_BENCH_BOXES` makes it smaller.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from xtalfast.integration.config import IntegrationConfig
from xtalfast.integration.data import ShoeboxLoader
from xtalfast.integration.fit import train
from xtalfast.integration.model import IntegrationModel
from xtalfast.integration.statistics import DataStatistics
from xtalfast.integration.store import ShoeboxStore

N = int(os.environ.get("XTALFAST_BENCH_BOXES", "1900000"))
BOX = (3, 21, 21)
STEPS = 200
BLOCK = 3000


def private_bytes() -> int:
    """Resident memory of this process that no file backs; maps of a store count as the system's cache."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024


def boxes(
    n: int, rng: np.random.Generator, bbox: np.ndarray, xyz: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Poisson counts of Gaussian spots on a flat background; the noise is drawn once and rolled between blocks."""
    noise = rng.poisson(1.0, (BLOCK, np.prod(BOX))).astype(np.uint16)
    mask = np.ones(noise.shape, np.uint8)
    for start in range(0, n, BLOCK):
        rows = slice(start, min(start + BLOCK, n))
        size = rows.stop - start
        axes = [
            np.exp(-0.5 * ((bbox[rows, 2 * a, None] + np.arange(BOX[2 - a]) + 0.5 - xyz[rows, a, None]) / w) ** 2)
            for a, w in enumerate((1.4, 1.4, 0.7))
        ]
        spot = np.einsum("nz,ny,nx->nzyx", axes[2], axes[1], axes[0]).reshape(size, -1)
        spot *= (rng.exponential(300.0, size) / spot.sum(1))[:, None]
        signal = rng.poisson(spot) if start == 0 else np.rint(spot)
        yield np.roll(noise, start // BLOCK, axis=0)[:size] + signal.astype(np.uint16), mask[:size]


@pytest.fixture(scope="module")
def store() -> Iterator[ShoeboxStore]:
    parent = Path(os.environ.get("XTALFAST_BENCH_DIR", tempfile.gettempdir()))
    needed = int(N * np.prod(BOX) * 3 * 1.1)
    free = shutil.disk_usage(parent).free
    if free < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB in {parent}, {free / 1e9:.0f} GB are free")
    directory = Path(tempfile.mkdtemp(dir=parent, prefix="xtalfast-bench-"))
    rng = np.random.default_rng(0)
    xyz = rng.uniform([50, 50, 2], [2400, 2400, 1438], (N, 3)).astype(np.float32)
    xyz = xyz[np.argsort(xyz[:, 2])]
    size = np.array(BOX[::-1])
    low = np.floor(xyz).astype(np.int32) - size // 2
    bbox = np.stack([low, low + size], 2).reshape(N, 6).astype(np.int32)
    try:
        yield ShoeboxStore.create(
            directory / "store", boxes(N, rng, bbox, xyz), None, {"bbox": bbox, "xyzcal_px": xyz}, box=BOX
        )
    finally:
        shutil.rmtree(directory)


def config(combination: str) -> IntegrationConfig:
    return IntegrationConfig.preset("default").combined(combination)


def test_full_scale_training(store: ShoeboxStore, tmp_path: Path, capsys) -> None:
    """200 steps; private memory of the data path below 1 GB."""
    before = private_bytes()
    loader = ShoeboxLoader([store], np.arange(N), 128, thin=True)
    peak = before
    for number, _ in enumerate(loader.steps(0, STEPS)):
        if number % 20 == 0:
            peak = max(peak, private_bytes())
    start = time.process_time()
    result = train([store], config("cnn/softmax"), tmp_path, max_steps=STEPS, device="cpu")
    seconds = time.process_time() - start
    with capsys.disabled():
        print(
            f"\n{store.n} boxes, {result.steps} steps: {1e6 * seconds / (result.steps * 128):.0f} us of CPU time a"
            f" reflection, start and validation included; private memory of the loader {(peak - before) / 1e6:.0f} MB;"
            f" held-out loss {result.history[0]['val_loss']:.2f}"
        )
    assert result.steps == STEPS and np.isfinite(result.history[-1]["val_loss"])
    assert peak - before < 1e9


@pytest.mark.parametrize("combination", ["cnn/softmax", "cnn/mvn", "fc/mvn"])
def test_loader_keeps_ahead_of_the_model(store: ShoeboxStore, combination: str, capsys) -> None:
    """CPU time a reflection, one thread: reading is at least ten times cheaper than a training step."""
    loader = ShoeboxLoader([store], np.arange(N), 128, thin=True)
    batches = [loader.read_step(step) for step in range(4)]
    model = IntegrationModel(config(combination))
    model.set_statistics(DataStatistics.of(batches[0]))
    optimizer = torch.optim.AdamW(model.parameters())

    step = iter(range(4, 10**6))

    def read() -> None:
        for _ in range(64):
            loader.read_step(next(step))

    def learn() -> None:
        for batch in batches:
            optimizer.zero_grad()
            model.losses(batch).mean().backward()
            optimizer.step()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        read(), learn()
        reading, learning = [], []
        for _ in range(7):
            for function, times, n in ((read, reading, 64), (learn, learning, 4)):
                start = time.process_time()
                function()
                times.append((time.process_time() - start) / n / 128 * 1e6)
    finally:
        torch.set_num_threads(threads)
    ratio = float(np.median(np.array(learning) / np.array(reading)))
    with capsys.disabled():
        print(
            f"\n{combination}: loader {np.median(reading):.1f} us a reflection,"
            f" training step {np.median(learning):.0f}: {ratio:.1f}x"
        )
    assert ratio >= 10
