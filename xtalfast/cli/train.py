"""`xtalfast train integration`: a network from one or several shoebox stores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xtalfast.cli.common import DebugOption, OutputOption, ProgressBars, QuietOption, SeedOption, logging_to
from xtalfast.cli.integrate import make_output


def integration(
    stores: Annotated[list[Path], typer.Argument(metavar="STORE...", help="Directories written by xtalfast extract.")],
    output: OutputOption,
    preset: Annotated[str, typer.Option(metavar="NAME", help="`default`, `paper` or a .toml file.")] = "default",
    encoder: Annotated[str | None, typer.Option(metavar="cnn|fc", help="Encoder. [preset]")] = None,
    profile: Annotated[
        str | None, typer.Option(metavar="softmax|mvn|lowrank|dials", help="Spot shape. [preset]")
    ] = None,
    epochs: Annotated[int | None, typer.Option(metavar="N", help="Passes over the reflections. [preset]")] = None,
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu or cuda[:N].")] = "auto",
    restart: Annotated[bool, typer.Option("--restart", help="Ignore the checkpoints of an interrupted run.")] = False,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Train an integration network; the same command resumes an interrupted run.

    Example: `xtalfast train integration crystal1 crystal2 -o run --encoder cnn --profile softmax`, then
    `xtalfast integrate new.expt new.refl -o DIR --weights run/best.ckpt`.
    Under `torchrun --nproc-per-node N -m xtalfast.cli train ...` each process takes its part of every batch.
    """
    from xtalfast.integration.config import IntegrationConfig
    from xtalfast.integration.fit import train
    from xtalfast.integration.integrate import open_prepared

    prepared = [open_prepared(store) for store in stores]
    config = IntegrationConfig.preset(preset, encoder=encoder, profile=profile)
    make_output(output)
    with logging_to(output / "xtalfast.log", quiet), ProgressBars(quiet) as progress:
        result = train(
            [p.store for p in prepared],
            config,
            output,
            seed=seed,
            epochs=epochs,
            resume=not restart,
            reference_profiles=[p.profiles for p in prepared] if config.profile.kind == "dials" else None,
            progress=progress,
            device=device,
        )
    if quiet:
        return
    typer.echo(
        f"{config.combination}: {result.steps} steps on {result.n_train} reflections in {result.seconds:.0f} s, "
        f"held-out loss {min(row['val_loss'] for row in result.history):.4f} nats a reflection ({result.n_held_out})"
    )
    typer.echo(f"wrote {result.checkpoint}")
