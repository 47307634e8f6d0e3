"""The fixture of every bench: speed of ours over a reference timed in the same run, held against a baseline.

Times are process CPU time, taken in turns (ours first, reference first, ...), and the figure is the median of the
paired ratios: on a busy machine that moves by a few percent where a plain minimum moves by a third.
`bench/baseline.json` holds one ratio per processor and bench; `XTALFAST_BENCH_RECORD=1` writes it,
`XTALFAST_BENCH_TOLERANCE` (1.15) is the slack. compare.py times ours of two checkouts in turns instead.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Client
from pathlib import Path

import pytest
import torch

BASELINE = Path(__file__).parent / "baseline.json"
TOLERANCE = float(os.environ.get("XTALFAST_BENCH_TOLERANCE", "1.15"))
RECORD = os.environ.get("XTALFAST_BENCH_RECORD") == "1"


def processor() -> str:
    """The processor's name and vector width, by which baselines are kept apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    flags = facts.get("flags", "").split()
    width = next((name for name in ("avx512f", "avx2") if name in flags), "scalar")
    return f"{facts.get('model name', platform.machine())} {width}"


def paired_ratio(ours: Callable[[], object], reference: Callable[[], object], rounds: int = 60) -> float:
    """Median over rounds of (time of ours / time of reference), the two taking turns to go first."""
    ours()
    reference()
    ratios = []
    for i in range(rounds):
        seconds = {}
        for function in (ours, reference) if i % 2 else (reference, ours):
            start = time.process_time()
            function()
            seconds[function] = time.process_time() - start
        ratios.append(seconds[ours] / seconds[reference])
    return statistics.median(ratios)


def timed_on_request(ours: Callable[[], object], rounds: int, address: str) -> None:
    """Time ours whenever compare.py says so."""
    ours()
    with Client(address) as peer:
        peer.send(rounds)
        while peer.recv() == "time":
            start = time.process_time()
            ours()
            peer.send(time.process_time() - start)


@pytest.fixture(autouse=True)
def one_thread():
    """Ratios are of CPU time on one thread, for torch too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def paired(request: pytest.FixtureRequest, benchmark):
    """`paired(ours, reference, at_least=2.5)`: print the speed-up; fail below `at_least` or the baseline."""

    def measure(
        ours: Callable[[], object], reference: Callable[[], object], *, at_least: float = 0.0, rounds: int = 60
    ) -> float:
        if address := os.environ.get("XTALFAST_BENCH_PEER"):
            timed_on_request(ours, rounds, address)
            pytest.skip("timed for compare.py")
        key = f"{Path(request.node.fspath).stem}::{request.node.name}"
        baselines = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
        known = baselines.setdefault(processor(), {})
        allowed = min(known.get(key, float("inf")) * TOLERANCE, 1 / at_least if at_least else float("inf"))
        ratio = paired_ratio(ours, reference, rounds)
        if ratio > allowed:  # once more, longer: a burst of other work is the likelier cause
            ratio = paired_ratio(ours, reference, 3 * rounds)
        benchmark.extra_info["ratio_to_reference"] = round(ratio, 4)
        benchmark.pedantic(ours, rounds=10, warmup_rounds=2)
        print(f"\n{key}: {1 / ratio:.2f}x the reference (at least {at_least}x; baseline {known.get(key)})")
        if at_least:
            assert 1 / ratio >= at_least, f"{key}: {1 / ratio:.2f}x the reference, wanted {at_least}x"
        if RECORD:
            known[key] = round(ratio, 4)
            BASELINE.write_text(json.dumps(baselines, indent=1, sort_keys=True) + "\n")
        elif key in known:
            assert ratio <= known[key] * TOLERANCE, f"{key}: ratio {ratio:.3f}, baseline {known[key]} x {TOLERANCE}"
        return 1 / ratio

    return measure
