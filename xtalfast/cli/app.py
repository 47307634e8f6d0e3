"""The tree of commands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

import xtalfast
from xtalfast.cli import (
    demo,
    doctor,
    extract,
    fragments,
    integrate,
    modify,
    patterson,
    phase,
    phase_error,
    predict,
    sfcalc,
    simulate,
    solve,
    stats,
    train,
)
from xtalfast.errors import InputError

_INTERRUPTED = 130  # what typer makes of Ctrl-C

app = typer.Typer(
    name="xtalfast",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
app.command()(demo.demo)
app.command()(simulate.simulate)
app.command()(predict.predict)
app.command()(integrate.integrate)
app.command()(extract.extract)
app.command()(stats.stats)
app.command()(fragments.fragments)
app.command()(sfcalc.sfcalc)
app.command()(patterson.patterson)
app.command()(solve.solve)
app.command()(modify.modify)
app.command()(phase.phase)
app.command()(phase.evaluate)
app.command("phase-error")(phase_error.phase_error)
app.command()(doctor.doctor)
train_app = typer.Typer(no_args_is_help=True, help="Train a network.")
train_app.command("integration")(train.integration)
train_app.command("density")(train.density)
app.add_typer(train_app, name="train")


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"xtalfast {xtalfast.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """From X-ray diffraction images to reflection intensities with honest uncertainties, by variational inference.

    Start with `xtalfast demo`. On your own data, after indexing and refinement with DIALS:

    `xtalfast integrate refined.expt -o integrated`
    """


def run(arguments: Sequence[str]) -> int:
    """Run one command line; usage errors become InputError."""
    command = typer.main.get_command(app)
    try:
        status = command.main(list(arguments), prog_name="xtalfast", standalone_mode=False)
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    except typer.Exit as error:
        return error.exit_code
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "xtalfast"
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        message = message or "no command given"  # the help has been printed
        raise InputError(f"{message} (see {path} --help)") from error
    if status == _INTERRUPTED:
        raise KeyboardInterrupt
    return status if isinstance(status, int) else 0
