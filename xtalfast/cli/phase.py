"""`xtalfast phase` and `xtalfast evaluate`: a trained network on data, and judged on what it has not seen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xtalfast.cli.common import DebugOption, DeviceOption, ProgressBars, QuietOption, SeedOption, logging_to

WeightsOption = Annotated[Path, typer.Option(metavar="FILE", help="Checkpoint of xtalfast train density.")]


def phase(
    data: Annotated[Path, typer.Argument(metavar="DATA.mtz", help="Merged amplitudes.")],
    sequence: Annotated[str, typer.Option(metavar="LETTERS", help="Residues of the asymmetric unit, such as AG.")],
    weights: WeightsOption,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Output directory, made if needed.")],
    labels: Annotated[
        str | None, typer.Option(metavar="F,SIGF", help="Columns, when not found by their types.")
    ] = None,
    d_min: Annotated[float | None, typer.Option(metavar="A", help="Resolution limit. [that of the data]")] = None,
    scale: Annotated[
        str | None, typer.Option(metavar="K,B", help="Scale and B (A^2) of the amplitudes. [Wilson statistics]")
    ] = None,
    recycles: Annotated[
        int | None, typer.Option(metavar="N", help="Recycling steps. [as many as the network was made for]")
    ] = None,
    solver: Annotated[
        bool, typer.Option("--solve", help="Also solve without a network, in as much time, to compare.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Go on outside what the network was trained on.")] = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Phase amplitudes of a known sequence with a trained network.

    Writes network.ccp4 (the map as predicted), phased.mtz (FWT PHWT FOM: measured amplitudes with its phases),
    modified/ (after density modification) and phase.json. Data outside what the network was trained on end with exit
    status 2 and are named.

    Example: `xtalfast phase data.mtz --sequence AG --weights run/best.ckpt -o phased`
    """
    from xtalfast.density.predict import phase, write_phased
    from xtalfast.density.scale import AmplitudeScale
    from xtalfast.density.trained import Trained
    from xtalfast.io.mtz_phases import read_amplitudes

    trained = Trained.load(weights)
    read = read_amplitudes(data, labels.split(",") if labels else None)
    with logging_to(None, quiet), ProgressBars(quiet) as progress:
        found = phase(
            read.F, read.hkl, read.cell, read.space_group, sequence, trained, d_min,
            amplitude_scale=AmplitudeScale.parse(scale) if scale else None, recycles=recycles, force=force,
            with_solver=solver, progress=progress,
        )  # fmt: skip
    files = write_phased(output, found, read)
    typer.echo(f"{'map':<28} {'R':>7} {'mean FOM':>9}")
    for name, one in (("network", found.projected), ("after density modification", found.modified)):
        typer.echo(f"{name:<28} {one.r:7.3f} {one.fom.mean():9.3f}")
    if found.solution is not None:
        verdict = "solved" if found.solution.solved else "not solved"
        typer.echo(f"{'solver, no network':<28} {found.solution.r:7.3f} {found.solution.fom.mean():9.3f}  {verdict}")
    typer.echo(f"wrote {', '.join(map(str, files))}")


def evaluate(
    fragments: Annotated[Path, typer.Argument(metavar="SET", help="Directory written by xtalfast fragments.")],
    weights: WeightsOption,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Output directory, made if needed.")],
    limit: Annotated[int | None, typer.Option(metavar="N", help="Test examples at most. [all]")] = None,
    controls: Annotated[
        bool, typer.Option("--controls", help="Also what spoilt input and the mean training density reach.")
    ] = False,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Judge a network on the test structures of a fragment set: correlation, phase error per shell, part refined.

    Writes evaluation.md (the density paper's tables) and evaluation.json. Structures that were trained on are refused.

    Example: `xtalfast evaluate set --weights run/best.ckpt -o evaluated --limit 500 --controls`
    """
    import json

    from xtalfast.density.evaluate import evaluate_density
    from xtalfast.density.fragment_set import FragmentSet
    from xtalfast.density.trained import Trained
    from xtalfast.integration.device import choose_device
    from xtalfast.io.files import write_text

    chosen = choose_device(device)
    trained = Trained.load(weights, chosen)
    opened = FragmentSet.open(fragments)
    with logging_to(None, quiet), ProgressBars(quiet) as progress:
        found = evaluate_density(
            trained, opened, limit=limit, controls=controls, seed=seed, device=chosen, progress=progress
        )
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "evaluation.json", json.dumps(found.to_json(), indent=1) + "\n")
    write_text(output / "evaluation.md", found.table())
    typer.echo(found.table())
    typer.echo(f"wrote {output / 'evaluation.md'}, {output / 'evaluation.json'}")
