"""`xtalfast extract`: images -> shoebox store, for training apart from integrating."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xtalfast.cli.common import DebugOption, ImageDirOption, ProgressBars, QuietOption, logging_to
from xtalfast.cli.integrate import make_output, parse_box


def extract(
    models: Annotated[Path, typer.Argument(metavar="MODELS.expt", help="Refined DIALS models.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="The run directory, made if needed.")],
    reflections: Annotated[
        Path | None,
        typer.Argument(
            metavar="[REFLECTIONS.refl]",
            help="Predicted reflections. Left out: all that the models predict.",
            show_default=False,
        ),
    ] = None,
    box: Annotated[str | None, typer.Option(metavar="Z,Y,X", help="Shoebox. [3,21,21; stills 1,21,21]")] = None,
    d_min: Annotated[float | None, typer.Option(metavar="A", help="Leave out what lies beyond.")] = None,
    image_dir: ImageDirOption = None,
    verify: Annotated[bool, typer.Option("--verify", help="Check the MD5 sum of every CBF image.")] = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Cut the shoeboxes of a data set into a memory-mapped store, with spot widths and reference profiles.

    The store is what `xtalfast train integration` reads; several data sets can train one network.
    """
    from xtalfast.integration.integrate import IntegrateOptions, prepare

    options = IntegrateOptions(engine="network", box=parse_box(box), d_min=d_min, image_dir=image_dir, verify=verify)
    make_output(output)
    with logging_to(output / "xtalfast.log", quiet), ProgressBars(quiet) as progress:
        prepared = prepare(models, reflections, output, options, progress=progress)
    if quiet:
        return
    typer.echo(f"wrote {prepared.store.path}: {prepared.store.n} shoeboxes")
    typer.echo(f"next: xtalfast train integration {output} -o run")
