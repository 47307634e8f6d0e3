"""Is this checkout slower than another? `make bench-compare BASE=main` runs every bench of ours in both, in turns.

The other checkout is built into a folder of its own. For each bench two processes hold the same problem, one with each
package, and time it one after the other, each going first every second round; the figure is the median of the ratios
of process CPU time. Benches that the other checkout cannot run are named. Exit status 1 if one got slower by more than
the tolerance in two measurements.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from multiprocessing.connection import Connection, Listener
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOLERANCE = float(os.environ.get("XTALFAST_BENCH_TOLERANCE", "1.15"))


def build(base: str, folder: Path) -> Path:
    """Install the package of commit `base` into a folder; returns it. A folder built before is taken as it is."""
    commit = subprocess.run(
        ["git", "rev-parse", "--verify", f"{base}^{{commit}}"], cwd=ROOT, capture_output=True, text=True
    )
    if commit.returncode:
        sys.exit(f"error: BASE must be a commit, branch or tag of this repository, got {base!r}")
    name = commit.stdout.strip()
    site = folder / name
    if not site.exists():
        with tempfile.TemporaryDirectory() as source:
            archive = subprocess.run(["git", "archive", name], cwd=ROOT, capture_output=True, check=True)
            subprocess.run(["tar", "-x", "-C", source], input=archive.stdout, check=True)
            pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-build-isolation"]
            subprocess.run([*pip, "--no-deps", "--target", f"{site}.part", source], check=True)
        Path(f"{site}.part").rename(site)
    return site


def benches(arguments: list[str]) -> list[str]:
    """Node ids of the benches that pytest would run."""
    command = [sys.executable, "-m", "pytest", "bench", "--collect-only", "-q", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if "::" in line]


def worker(bench: str, address: str, site: Path | None) -> subprocess.Popen:
    """A process that holds one bench and times it when asked (`paired` in conftest.py)."""
    python = [sys.executable]
    environment = os.environ | {"XTALFAST_BENCH_PEER": address, "OMP_NUM_THREADS": "1"}
    if site is not None:  # without the editable installation of this checkout
        python += ["-S", "-P"]
        environment["PYTHONPATH"] = os.pathsep.join([str(site), sysconfig.get_path("purelib")])
    command = [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider", bench]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def median_ratio(ours: Connection, base: Connection, rounds: int) -> float:
    """Median of (time of ours / time of base), the two taking turns to go first."""
    ratios = []
    for i in range(rounds):
        seconds = {}
        for side in (ours, base) if i % 2 else (base, ours):
            side.send("time")
            seconds[id(side)] = side.recv()
        ratios.append(seconds[id(ours)] / seconds[id(base)])
    return statistics.median(ratios)


def compare(bench: str, site: Path) -> float | None:
    """Ratio of this checkout to the base, measured once more if it is above the tolerance; None if one cannot run."""
    sides: list[Connection] = []
    processes = []
    with tempfile.TemporaryDirectory() as directory:
        for name, place in (("ours", None), ("base", site)):
            with Listener(f"{directory}/{name}") as listener:
                process = worker(bench, listener.address, place)
                processes.append(process)
                listener._listener._socket.settimeout(1.0)  # a worker that failed never calls
                while process.poll() is None:
                    try:
                        sides.append(listener.accept())
                        break
                    except TimeoutError:
                        continue
        ratio = None
        try:
            if len(sides) == 2:
                rounds = min(side.recv() for side in sides)
                ratio = median_ratio(*sides, rounds)
                if ratio > TOLERANCE:
                    ratio = median_ratio(*sides, 3 * rounds)
                for side in sides:
                    side.send("done")
        except EOFError:
            ratio = None
        for side in sides:
            side.close()
        for process in processes:
            process.wait()
    return ratio


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", help="commit, branch or tag")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench-base", help="where bases are built")
    arguments, for_pytest = parser.parse_known_args()
    site = build(arguments.base, arguments.folder.resolve())
    slower = 0
    for bench in benches(for_pytest):
        ratio = compare(bench, site)
        slower += ratio is not None and ratio > TOLERANCE
        verdict = "cannot run in both" if ratio is None else f"{ratio:6.3f} x the time of {arguments.base}"
        print(f"{bench:70} {verdict}{'  SLOWER' if ratio and ratio > TOLERANCE else ''}", flush=True)
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
