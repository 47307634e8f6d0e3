"""`make results`: docs/results.md from the shared data, DIALS beside us. Fails when the data or DIALS are missing."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import pipeline_integrate

ROOT = Path(__file__).parents[1]
HEADER = """# Results

Written by `make results` on {date} ({machine}, {cores} cores, torch {torch}); do not edit. Every figure was
measured in that run. Quality is judged on held-out reflections or against truth that no setting was fitted with.

**No real rotation images were available**: rotation data are `nanobragg-dev` (images by nanoBragg, an independent
physical simulator, with known truth) and our own simulator; real images are six PILATUS stills; real rotation data
enter only as spot-finder shoeboxes (quartz, electron diffraction).
"""


def main() -> int:
    """Run all pipelines and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="directory with nanobragg-dev, thaumatin-stills, ...")
    parser.add_argument("--work", type=Path, help="where to keep the runs [a temporary directory]")
    parser.add_argument("--epochs", type=int, help="passes over the reflections [preset]")
    arguments = parser.parse_args()
    missing = [name for name in pipeline_integrate.DATA_SETS if not (arguments.data / name).is_dir()]
    if missing:
        print(
            f"make results needs {', '.join(missing)} in {arguments.data}; set DATA=... to where they are",
            file=sys.stderr,
        )
        return 2
    if shutil.which("dials.scale") is None:
        print("make results compares with DIALS: install it (make system)", file=sys.stderr)
        return 2
    cores = len(os.sched_getaffinity(0))
    header = HEADER.format(date=date.today(), machine=platform.machine(), cores=cores, torch=torch.__version__)
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        sections = pipeline_integrate.run(arguments.data, work, arguments.epochs)
    page = "\n".join([header, *sections])
    (ROOT / "docs" / "results.md").write_text(page)
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
