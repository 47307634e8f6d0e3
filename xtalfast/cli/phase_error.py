"""`xtalfast phase-error`: phases against the truth, whatever origin and hand they were found in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from xtalfast.cli.common import DebugOption
from xtalfast.io.files import write_text


def phase_error(
    truth: Annotated[Path, typer.Argument(metavar="TRUTH.mtz", help="True amplitudes and phases.")],
    phased: Annotated[Path, typer.Argument(metavar="PHASED.mtz", help="Phases to judge.")],
    truth_labels: Annotated[
        str | None, typer.Option(metavar="F,PHI", help="Columns of the truth, when not found by their types.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(metavar="F,PHI,FOM", help="Columns to judge, when not found by their types.")
    ] = None,
    no_hand: Annotated[bool, typer.Option("--no-hand", help="Do not try the other hand.")] = False,
    as_is: Annotated[bool, typer.Option("--as-is", help="Same origin and hand: no search at all.")] = False,
    bins: Annotated[int, typer.Option(metavar="N", help="Resolution shells.")] = 10,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write them as JSON; - for the terminal.")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Print mean phase error (weighted and not), map correlation and figures of merit per resolution shell.

    The second set is first brought to the origin and hand, among those the space group allows, that fit best. Random
    phases under the same search are printed beside it: nothing near that figure means anything.

    Example: `xtalfast phase-error truth.mtz solved/phased.mtz`
    """
    from dataclasses import replace

    from xtalfast.io.mtz_phases import read_phases, shared_reflections
    from xtalfast.metrics.phasing import phase_statistics
    from xtalfast.phasing import match, random_floor

    first, second = shared_reflections(
        read_phases(truth, truth_labels.split(",") if truth_labels else None),
        read_phases(phased, labels.split(",") if labels else None),
    )
    if as_is:
        statistics = phase_statistics(first.F, second.F, first.hkl, first.cell, n_shells=bins, fom=second.fom)
    else:
        found = match(
            first.F,
            second.F,
            first.hkl,
            first.cell,
            first.space_group,
            fom=second.fom,
            hand=not no_hand,
            n_shells=bins,
        )
        floor = random_floor(first.F, first.hkl, first.cell, first.space_group)
        statistics = replace(found.statistics, floor=floor)
    result = json.dumps(statistics.to_json(), indent=1)
    if str(json_file) == "-":
        typer.echo(result)
        return
    typer.echo(statistics.table())
    if json_file is not None:
        write_text(json_file, result + "\n")
        typer.echo(f"wrote {json_file}")
