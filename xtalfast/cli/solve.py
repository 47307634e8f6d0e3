"""`xtalfast solve`: amplitudes -> phases, with nothing else known."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from xtalfast.cli.common import (
    DebugOption,
    ProgressBars,
    QuietOption,
    SeedOption,
    logging_to,
    report_if_possible,
)


class Engine(StrEnum):
    """What searches for phases."""

    xtalfast = "xtalfast"
    shelx = "shelx"


def solve(
    data: Annotated[Path, typer.Argument(metavar="DATA.mtz", help="Merged amplitudes.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Output directory, made if needed.")],
    labels: Annotated[
        str | None, typer.Option(metavar="F,SIGF", help="Columns, when not found by their types.")
    ] = None,
    d_min: Annotated[float | None, typer.Option(metavar="A", help="Resolution limit. [that of the data]")] = None,
    solvent: Annotated[float | None, typer.Option(metavar="FRACTION", help="Of the cell. [several are tried]")] = None,
    starts: Annotated[int | None, typer.Option(metavar="N", help="Trials at most. [as time allows]")] = None,
    max_seconds: Annotated[float, typer.Option(metavar="S", help="Time at most.")] = 60.0,
    method: Annotated[
        str, typer.Option(metavar="NAME", help="hio, raar, difference-map, charge-flipping or solvent-flipping.")
    ] = "hio",
    engine: Annotated[
        Engine, typer.Option(help="shelx runs SHELXD and SHELXE, when they are on PATH.")
    ] = Engine.xtalfast,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Find phases from amplitudes alone, in any space group, where much of the cell is solvent (60 % or more).

    Writes phased.mtz (FWT PHWT FOM), map.ccp4, solve.json and report.html, which shows the map, into DIR. `solved` is
    called without knowing the truth, from amplitudes that were held out. Both hands are written unless the space group
    or the density decides.

    Example: `xtalfast solve data.mtz -o solved --max-seconds 120`
    """
    from xtalfast.io.mtz_phases import read_amplitudes
    from xtalfast.phasing import SearchOptions, solve, solve_with_shelx
    from xtalfast.phasing.output import write_solution
    from xtalfast.report.phasing import write_solution_page

    read = read_amplitudes(data, labels.split(",") if labels else None)
    with logging_to(None, quiet), ProgressBars(quiet) as progress:
        if engine is Engine.shelx:
            found = solve_with_shelx(
                read.F,
                read.hkl,
                read.cell,
                read.space_group,
                d_min,
                sigF=read.sigF,
                solvent=solvent,
                starts=starts,
                max_seconds=max_seconds,
                seed=seed,
            )
        else:
            found = solve(
                read.F,
                read.hkl,
                read.cell,
                read.space_group,
                d_min,
                sigF=read.sigF,
                solvent=solvent,
                starts=starts,
                max_seconds=max_seconds,
                seed=seed,
                options=SearchOptions(method=method),
                progress=progress,
            )
    files = write_solution(output, found, read)
    page = output / "report.html"
    with report_if_possible(page):
        write_solution_page(page, found, data.name)
        files.append(page)
    verdict = "solved" if found.solved else "NOT solved: do not use these phases"
    typer.echo(
        f"{verdict} (R {found.r:.3f}, R_free {found.r_free:.3f}, {found.n_starts} starts, {found.seconds:.1f} s)"
    )
    hand = found.hand
    typer.echo(f"hand: {hand.choice}, by {hand.decided_by}, probability {hand.confidence:.2f}")
    typer.echo(f"wrote {', '.join(map(str, files))}")
