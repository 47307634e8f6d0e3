"""`xtalfast modify`: density modification of given phases."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xtalfast.cli.common import DebugOption, QuietOption, logging_to


def modify(
    data: Annotated[Path, typer.Argument(metavar="DATA.mtz", help="Merged amplitudes.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Output directory, made if needed.")],
    phases: Annotated[
        Path | None, typer.Option(metavar="PHASES.mtz", help="Phases to start from. [those in DATA.mtz]")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(metavar="F,SIGF", help="Amplitude columns, when not found by their types.")
    ] = None,
    phase_labels: Annotated[
        str | None, typer.Option(metavar="F,PHI,FOM", help="Columns of the phases, when not found by their types.")
    ] = None,
    d_min: Annotated[float | None, typer.Option(metavar="A", help="Resolution limit. [that of the data]")] = None,
    solvent: Annotated[
        float | None, typer.Option(metavar="FRACTION", help="Of the cell. [chosen by held-out amplitudes]")
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            metavar="imposed|weighted|both",
            help="Full amplitudes and empty solvent, weighted phases and level solvent, or one after the other."
            " [chosen by held-out amplitudes]",
        ),
    ] = None,
    cycles: Annotated[int, typer.Option(metavar="N", help="Cycles with full amplitudes.")] = 60,
    flip: Annotated[
        float, typer.Option(metavar="X", help="Solvent is multiplied by -X in the first half of these.")
    ] = 0.5,
    histogram: Annotated[float, typer.Option(metavar="W", help="Weight of histogram matching, 0 to 1.")] = 0.5,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Improve phases by flat solvent, positive protein and the histogram of protein density.

    Figures of merit in the phase file say how far the starting phases are to be trusted (0.5 without).

    Writes modified.mtz (FWT PHWT FOM), map.ccp4 and modify.json into DIR.

    Example: `xtalfast modify data.mtz --phases start.mtz -o modified --solvent 0.6`
    """
    from xtalfast.io.mtz_phases import read_amplitudes, read_phases, shared_reflections
    from xtalfast.phasing import ModifyOptions, density_modify
    from xtalfast.phasing.output import write_modified

    read = read_amplitudes(data, labels.split(",") if labels else None)
    start = read_phases(phases or data, phase_labels.split(",") if phase_labels else None)
    read, start = shared_reflections(read, start)
    with logging_to(None, quiet):
        modified = density_modify(
            read.F,
            start.phases,
            read.hkl,
            read.cell,
            read.space_group,
            d_min,
            fom=start.fom,
            solvent=solvent,
            options=ModifyOptions(scheme=scheme, cycles=cycles, flip=flip, histogram=histogram),
        )
    files = write_modified(output, modified, read)
    typer.echo(
        f"{modified.scheme}: R {modified.r:.3f}, mean FOM {modified.fom.mean():.3f}, solvent {modified.solvent:.2f},"
        f" phases moved by {modified.change:.1f} degrees"
    )
    typer.echo(f"wrote {', '.join(map(str, files))}")
