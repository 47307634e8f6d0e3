"""`xtalfast train`: networks apart from using them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xtalfast.cli.common import (
    DebugOption,
    DeviceOption,
    OutputOption,
    ProgressBars,
    QuietOption,
    SeedOption,
    logging_to,
)
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
    device: DeviceOption = "auto",
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


def density(
    fragments: Annotated[Path, typer.Argument(metavar="SET", help="Directory written by xtalfast fragments.")],
    output: OutputOption,
    preset: Annotated[
        str, typer.Option(metavar="NAME", help="paper, paper-recycle, fast, dipeptide or dipeptide-small.")
    ] = "paper",
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Change one setting of network or training; may be repeated."),
    ] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Optimiser steps. [epochs of the preset]")] = None,
    recycle_from: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Network whose predictions become templates.")
    ] = None,
    device: DeviceOption = "auto",
    restart: Annotated[bool, typer.Option("--restart", help="Ignore the checkpoints of an interrupted run.")] = False,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a network that turns Patterson maps into density; the same command resumes an interrupted run.

    Example: `xtalfast fragments structures.tar.xz -o set --preset dipeptide`, then
    `xtalfast train density set -o run --preset dipeptide-small`, then
    `xtalfast phase data.mtz --sequence AG --weights run/best.ckpt -o phased`.
    Under `torchrun --nproc-per-node N -m xtalfast.cli train ...` each process takes its part of every batch.
    """
    from xtalfast.density.fragment_set import FragmentSet
    from xtalfast.density.train_config import changed_settings, density_preset
    from xtalfast.density.training import train_density

    network, training = changed_settings(*density_preset(preset), setting or [])
    opened = FragmentSet.open(fragments)
    make_output(output)
    with logging_to(output / "xtalfast.log", quiet), ProgressBars(quiet) as progress:
        result = train_density(
            opened, network, training, output, seed=seed, max_steps=steps, recycle_from=recycle_from,
            resume=not restart, device=device, progress=progress,
        )  # fmt: skip
    if quiet:
        return
    best = max(result.history, key=lambda row: row["val_pc"])
    typer.echo(f"{result.steps} steps in {result.seconds:.0f} s, best validation PC {best['val_pc']:.4f}")
    typer.echo(f"wrote {result.checkpoint}")
