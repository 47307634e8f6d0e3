"""`xtalfast simulate`: a rotation data set with known truth."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, get_args

import typer

from xtalfast.cli.common import DebugOption, OutputOption, ProgressBars, QuietOption, SeedOption
from xtalfast.errors import InputError
from xtalfast.integration.simulate_config import PRESETS, SimulationConfig


def _numbers(name: str, text: str, n: int, kind: type = float) -> tuple:
    wanted = "a number" if n == 1 else f"{n} numbers"
    try:
        values = tuple(kind(part) for part in text.replace(",", " ").split())
    except ValueError as error:
        raise InputError(f"{name} wants {wanted}, got {text!r}") from error
    if len(values) != n:
        raise InputError(f"{name} wants {wanted}, got {text!r}")
    return values


def _parse_settings(settings: list[str]) -> dict[str, object]:
    """`name=value` for any field of SimulationConfig, typed as its default is."""
    known = {f.name: f for f in fields(SimulationConfig)}
    parsed: dict[str, object] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if name not in known or not equals:
            raise InputError(f"--set wants NAME=VALUE with NAME one of {', '.join(known)}, got {setting!r}")
        default = known[name].default
        if isinstance(default, tuple) or name in ("orientation_deg", "beam_centre_px"):
            n = len(default) if isinstance(default, tuple) else {"orientation_deg": 3, "beam_centre_px": 2}[name]
            kind = int if isinstance(default, tuple) and isinstance(default[0], int) else float
            parsed[name] = _numbers(name, text, n, kind)
        elif isinstance(default, int | float):
            parsed[name] = _numbers(name, text, 1, type(default))[0]
        else:
            parsed[name] = Path(text) if Path in get_args(known[name].type) or name == "structure" else text
    return parsed


def simulate(
    output: OutputOption,
    seed: SeedOption = 0,
    preset: Annotated[
        str, typer.Option(metavar="NAME", help=f"What the other options start from: {', '.join(PRESETS)}.")
    ] = "demo",
    cell: Annotated[str | None, typer.Option(metavar='"a b c al be ga"', help="Unit cell, A and deg.")] = None,
    space_group: Annotated[str | None, typer.Option(metavar="SYMBOL", help="Such as 'P 43 21 2'.")] = None,
    structure: Annotated[
        Path | None, typer.Option(metavar="FILE", help="PDB or mmCIF: its intensities, cell and space group.")
    ] = None,
    d_min: Annotated[float | None, typer.Option(metavar="A", help="No reflection beyond this resolution.")] = None,
    images: Annotated[int | None, typer.Option(metavar="N", help="Number of images.")] = None,
    oscillation: Annotated[float | None, typer.Option(metavar="DEG", help="Rotation per image.")] = None,
    photons: Annotated[
        float | None, typer.Option(metavar="N", help="Mean photons of a full reflection (dose).")
    ] = None,
    background: Annotated[float | None, typer.Option(metavar="N", help="Mean photons per pixel and image.")] = None,
    dose: Annotated[
        float, typer.Option(metavar="X", help="Exposure: multiplies the photons of spots, background and ice rings.")
    ] = 1.0,
    ice: Annotated[
        float | None, typer.Option(metavar="N", help="Ice rings: photons per pixel at the strongest.")
    ] = None,
    zingers: Annotated[float | None, typer.Option(metavar="N", help="Zingers per image.")] = None,
    second_lattice: Annotated[
        float | None, typer.Option(metavar="X", help="Overlaps: relative weight of a second crystal.")
    ] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Six small images, for a quick look.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other setting (repeat it); a wrong name lists them all."),
    ] = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Simulate a rotation data set with known truth.

    Writes `images/*.cbf` (PILATUS miniCBF, ready for `dials.import`), `models.expt` (the true models), `predicted.refl`
    and the true intensities. Defaults are a small protein crystal on a PILATUS 300K.

    Example: `xtalfast simulate -o wedge --seed 3 --photons 40 --ice 5`, or a tenth of the dose on another crystal:
    `xtalfast simulate -o weak --preset monoclinic --dose 0.1`
    """
    from xtalfast.integration.simulate import simulate as run

    chosen: dict[str, object] = {
        "cell": None if cell is None else _numbers("--cell", cell, 6),
        "space_group": space_group,
        "structure": structure,
        "d_min": d_min,
        "n_images": images,
        "oscillation_deg": oscillation,
        "photons_mean": photons,
        "background_photons": background,
        "ice_ring_photons": ice,
        "zingers_per_image": zingers,
        "second_lattice_fraction": second_lattice,
        "seed": seed,
    }
    changes = {name: value for name, value in chosen.items() if value is not None} | _parse_settings(settings or [])
    if tiny and preset != "demo":
        raise InputError("--tiny is a preset of its own: leave --preset out")
    config = SimulationConfig.tiny(**changes) if tiny else SimulationConfig.preset(preset, **changes)
    config = config.with_dose(dose)
    with ProgressBars(quiet) as progress:
        result = run(output, config, progress=progress)
    if quiet:
        return
    for path in (result.expt, result.refl, result.truth):
        typer.echo(f"wrote {path}")
    typer.echo(f"next: xtalfast integrate {result.expt} {result.refl} -o {output / 'integrated'}")
