"""`xtalfast stats`: merging statistics of our files, DIALS' and MTZ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from xtalfast.cli.common import DebugOption
from xtalfast.io.files import write_text


def stats(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help=".refl or .mtz, merged or not.")],
    expt: Annotated[
        Path | None, typer.Option("--expt", metavar="FILE", help="Models of a .refl (cell, symmetry).")
    ] = None,
    channel: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Intensities of a .refl: scale, prf, sum or vi. Default: best there is."),
    ] = None,
    bins: Annotated[int, typer.Option(metavar="N", help="Resolution shells.")] = 10,
    d_min: Annotated[float | None, typer.Option(metavar="A", help="Leave out what lies beyond.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write them as JSON.")] = None,
    debug: DebugOption = False,
) -> None:
    """Print CC1/2, CC_anom, R_merge, R_meas, R_pim, <I/sigI>, completeness and multiplicity per resolution shell.

    Several files are shown one after the other and then side by side. A `.refl` needs its models:

    `xtalfast stats integrated.refl --expt integrated.expt`

    Intensities that have not been scaled are marked so: their R values include the differences between images.
    """
    from xtalfast.metrics import side_by_side, stats_for_file

    results = {str(file): stats_for_file(file, expt=expt, channel=channel, n_bins=bins, d_min=d_min) for file in files}
    for name, result in results.items():
        typer.echo(f"{name}\n{result.table()}\n")
    if len(results) > 1:
        typer.echo(side_by_side(results))
    if json_file is not None:
        write_text(json_file, json.dumps({name: r.to_json() for name, r in results.items()}, indent=1) + "\n")
        typer.echo(f"wrote {json_file}")
