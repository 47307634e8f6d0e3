"""`xtalfast demo`: the main job on data it makes itself, compared with the truth."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from xtalfast.cli.common import DebugOption, ProgressBars, QuietOption, SeedOption, logging_to
from xtalfast.cli.integrate import make_output


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where to write.")] = Path("demo"),
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Simulate a rotation data set, integrate it, and compare with the true intensities.

    Takes a few minutes on two cores and ends with a table and `DIR/integrated/report.html`.
    """
    from xtalfast.integration.integrate import IntegrateOptions, integrate
    from xtalfast.integration.simulate import SimulationConfig, simulate
    from xtalfast.metrics.truth import truth_table

    start = time.perf_counter()
    make_output(output)
    with logging_to(output / "xtalfast.log", quiet), ProgressBars(quiet) as progress:
        simulated = simulate(output / "data", SimulationConfig.demo(seed=seed), progress=progress)
        result = integrate(
            simulated.expt,
            simulated.refl,
            output / "integrated",
            IntegrateOptions(seed=seed, truth=simulated.truth),
            progress=progress,
        )
    typer.echo(result.summary())
    typer.echo(truth_table(result.table, simulated.truth))
    for path in result.files:
        typer.echo(f"wrote {path}")
    typer.echo(f"demo done in {time.perf_counter() - start:.0f} s")
