"""`xtalfast integrate`: images, models and predictions -> intensities."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from xtalfast.cli.common import (
    DebugOption,
    DeviceOption,
    ImageDirOption,
    OutputOption,
    ProgressBars,
    QuietOption,
    SeedOption,
    logging_to,
)
from xtalfast.errors import InputError


def parse_box(text: str | None) -> tuple[int, int, int] | None:
    """`3,21,21` -> (3, 21, 21)."""
    if text is None:
        return None
    try:
        z, y, x = (int(part) for part in text.replace("x", ",").split(","))
    except ValueError as error:
        raise InputError(f"--box wants three numbers z,y,x such as 3,21,21, got {text!r}") from error
    return z, y, x


def make_output(directory: Path) -> Path:
    """Make the output directory and see that it can be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot make the output directory {directory}: {error.strerror}; choose another one with -o"
        ) from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise InputError(f"cannot write into {directory}: it is read-only for you; choose another directory with -o")
    return directory


def integrate(
    models: Annotated[Path, typer.Argument(metavar="MODELS.expt", help="Refined DIALS models.")],
    output: OutputOption,
    reflections: Annotated[
        Path | None,
        typer.Argument(
            metavar="[REFLECTIONS.refl]",
            help="Any table with miller_index and xyzcal.px: predicted, refined, indexed or integrated. "
            "Left out: every reflection that the models predict.",
            show_default=False,
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="exact|network",
            help="`exact`: spot model and exact posterior, nothing is trained; `network`: the paper's amortised "
            "inference, refined by the same estimator. [exact; network when one of its options is given: --preset, "
            "--encoder, --profile, --weights, --epochs]",
            show_default=False,
        ),
    ] = None,
    preset: Annotated[
        str, typer.Option(metavar="NAME", help="`default`, `paper` (Table 1 of the paper) or a .toml file.")
    ] = "default",
    encoder: Annotated[str | None, typer.Option(metavar="cnn|fc", help="Encoder. [preset: cnn]")] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="softmax|mvn|lowrank|dials",
            help="Spot shape of the network engine: learned, or `dials`: reference profiles from strong spots. "
            "[preset: dials]",
        ),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Use this trained network (.ckpt) instead of training one.")
    ] = None,
    box: Annotated[
        str | None,
        typer.Option(
            metavar="Z,Y,X",
            help="Shoebox, images and px. [exact: as large as each spot; network 3,21,21; stills 1,21,21]",
        ),
    ] = None,
    publish: Annotated[
        str,
        typer.Option(
            metavar="likelihood|posterior",
            help="What intensity.prf.* holds: the likelihood-only estimate, for scaling, or the posterior mean, as in "
            "the paper.",
        ),
    ] = "likelihood",
    d_min: Annotated[
        float | None, typer.Option(metavar="A", help="Do not integrate beyond this resolution. [detector corners]")
    ] = None,
    epochs: Annotated[int | None, typer.Option(metavar="N", help="Passes over the reflections. [preset]")] = None,
    image_dir: ImageDirOption = None,
    verify: Annotated[bool, typer.Option("--verify", help="Check the MD5 sum of every CBF image.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Ignore what an interrupted run left behind.")] = False,
    device: DeviceOption = "auto",
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Judge the sigmas by simulation from the fitted model, thinned photons and symmetry mates; reported, "
            "never applied.",
        ),
    ] = False,
    truth: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="truth.npz of simulated data: shown in the report, used for nothing else."),
    ] = None,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Integrate diffraction images: shoeboxes, spot model, exact posteriors; or the paper's networks.

    Example: `xtalfast integrate refined.expt -o integrated --d-min 1.8`, then
    `dials.scale integrated/integrated.refl integrated/integrated.expt`

    Writes into DIR: `integrated.refl` (rows in the order of the input), `integrated.expt`, `unmerged.mtz`,
    `report.html`, `xtalfast.json` (every parameter, version and count) and `xtalfast.log`. After an interruption the
    same command goes on where it stopped. Without images, the `shoebox` column is used if there is one.
    """
    from xtalfast.integration.integrate import IntegrateOptions
    from xtalfast.integration.integrate import integrate as run

    options = IntegrateOptions(
        engine=engine,
        preset=preset,
        encoder=encoder,
        profile=profile,
        weights=weights,
        box=parse_box(box),
        publish=publish,
        d_min=d_min,
        epochs=epochs,
        image_dir=image_dir,
        verify=verify,
        resume=not restart,
        device=device,
        calibrate=calibrate,
        truth=truth,
        seed=seed,
    )
    make_output(output)
    with logging_to(output / "xtalfast.log", quiet), ProgressBars(quiet) as progress:
        result = run(models, reflections, output, options, progress=progress)
    if not quiet:
        changed = [f.name for f in fields(options) if getattr(options, f.name) != f.default]
        typer.echo(result.summary())
        for name in changed:
            typer.echo(f"changed: {name} = {getattr(options, name)}")
        for path in result.files:
            typer.echo(f"wrote {path}")
