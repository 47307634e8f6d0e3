"""`make results`: docs/results.md from the shared data, DIALS beside us. Fails when the data or DIALS are missing.

The page is put together from `bench/results/sections/*.md`, one file a section with the day and machine it was measured
on. `--only NAME ...` (`make results ONLY="NAME ..."`) measures those sections again and leaves the others as they are.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import density_results
import exact_results
import examples_results
import phasing_results
import pipeline_elbo
import pipeline_integrate
import pipeline_unbiased
import wedge_results

from xtalfast.io.files import write_text

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results.md"
STORE = ROOT / "bench" / "results" / "sections"
DATA_SETS = ("nanobragg-dev", "thaumatin-stills", "dials-real", "structures")
HEADER = """# Results

Written by `make results`; do not edit. Every section says when and on what it was measured, and how to do it again.
Quality is judged on held-out reflections or against truth that no setting was fitted with.

**No real rotation images were available**: rotation data are `nanobragg-dev` (images by nanoBragg, an independent
physical simulator, with known truth) and our own simulator; real images are six PILATUS stills; real rotation data
enter only as spot-finder shoeboxes (quartz, electron diffraction).
"""

# Name -> function of (shared data, working directory) that measures the section and returns it as Markdown, starting
# with its "## " heading. The page shows the sections in this order.
SECTIONS: dict[str, Callable[[Path, Path], str]] = {
    "formats": pipeline_integrate.formats_section,
    "prediction": pipeline_unbiased.prediction_section,
    "simulated": pipeline_integrate.simulated_section,
    "exact": exact_results.exact_section,
    "wedges": wedge_results.wedges_section,
    "unbiased": pipeline_unbiased.unbiased_section,
    "overlaps": pipeline_unbiased.overlap_section,
    "nanobragg": pipeline_integrate.nanobragg_section,
    "stills": pipeline_integrate.stills_section,
    "quartz": pipeline_integrate.shoebox_section,
    "examples": examples_results.examples_section,
    "phasing": phasing_results.section,
    "dipeptides": density_results.dipeptide_section,
    "elbo": pipeline_elbo.elbo_section,
}


def measure(name: str, data: Path, work: Path) -> None:
    """Measure one section and store it with the day and the machine."""
    title, body = SECTIONS[name](data, work / name).strip().split("\n", 1)
    machine = f"{platform.machine()} ({len(os.sched_getaffinity(0))} cores), torch {torch.__version__}"
    origin = f"*Measured {date.today()} on {machine}, by `make results ONLY={name}`.*"
    write_text(STORE / f"{name}.md", f"{title}\n\n{origin}\n\n{body.strip()}\n")


def page() -> str:
    """The page from all sections measured so far."""
    stored = [STORE / f"{name}.md" for name in SECTIONS]
    return "\n".join([HEADER, *(path.read_text() for path in stored if path.exists())])


def main() -> int:
    """Measure sections and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with nanobragg-dev, thaumatin-stills, ...")
    parser.add_argument("--work", type=Path, help="where to keep the runs [a temporary directory]")
    parser.add_argument("--only", nargs="*", metavar="NAME", help=f"sections to measure [all]: {', '.join(SECTIONS)}")
    arguments = parser.parse_args()
    names = arguments.only or list(SECTIONS)
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    missing = [name for name in DATA_SETS if not (arguments.data / name).is_dir()]
    if missing:
        print(
            f"make results needs {', '.join(missing)} in {arguments.data}; set DATA=... to where they are",
            file=sys.stderr,
        )
        return 2
    if shutil.which("dials.scale") is None:
        print("make results compares with DIALS: install it (make system)", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    STORE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        for name in names:
            (work / name).mkdir(parents=True, exist_ok=True)
            measure(name, arguments.data, work)
            write_text(PAGE, page())
    print(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
