"""`xtalfast predict`: which reflections the models put on the detector, and where."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xtalfast.cli.common import DebugOption, QuietOption


def predict(
    models: Annotated[Path, typer.Argument(metavar="MODELS.expt", help="Refined DIALS models, rotation or stills.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE.refl", help="The table, as dials.predict writes it.")
    ] = Path("predicted.refl"),
    d_min: Annotated[
        float | None, typer.Option(metavar="A", help="Resolution limit. [what the corners of the detector record]")
    ] = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Predict all reflections of refined models: positions, s1, entering, d; for stills delpsical.rad.

    `xtalfast integrate` does this by itself when it is given no reflections; use this verb to choose among them, or to
    look at them in dials.image_viewer.

    Example: `xtalfast predict refined.expt --d-min 1.8 -o predicted.refl`
    """
    from xtalfast.integration.predict import predict_experiments
    from xtalfast.io import read_expt, write_refl

    table = predict_experiments(read_expt(models), d_min)
    write_refl(output, table)
    if not quiet:
        typer.echo(f"{len(table)} reflections to {table['d'].min():.2f} A")
        typer.echo(f"wrote {output}")
