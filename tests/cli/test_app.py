"""The command line as a whole: fixed names, usage errors in one line, --debug."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer

import xtalfast
from xtalfast.cli import main
from xtalfast.cli.app import app
from xtalfast.errors import InputError

# Names that scripts rely on: they may be joined by others, never removed.
FIXED = {
    "demo": {"-o", "--seed"},
    "simulate": {"-o", "--output", "--seed"},
    "integrate": {"-o", "--output", "--engine", "--preset", "--encoder", "--profile", "--image-dir", "--seed",
                  "--weights", "--box", "--publish", "--d-min", "--epochs", "--device", "--verify", "--restart",
                  "--calibrate", "--truth", "--quiet"},
    "predict": {"-o", "--output", "--d-min"},
    "extract": {"-o", "--output", "--box", "--d-min", "--image-dir", "--verify"},
    "train integration": {"-o", "--output", "--preset", "--encoder", "--profile", "--epochs", "--seed", "--device"},
    "stats": {"--expt", "--channel", "--bins", "--d-min", "--json"},
    "doctor": set(),
}  # fmt: skip


def command(verb: str):
    found = typer.main.get_command(app)
    for part in verb.split():
        found = found.commands[part]
    return found


@pytest.mark.parametrize("verb", FIXED)
def test_fixed_names(verb):
    options = {name for parameter in command(verb).params for name in parameter.opts}
    assert FIXED[verb] <= options


@pytest.mark.parametrize("verb", [verb for verb in FIXED if verb != "doctor"])
def test_every_verb_has_debug_and_a_help_text(verb):
    found = command(verb)
    assert "--debug" in {name for parameter in found.params for name in parameter.opts}
    assert found.help
    for parameter in found.params:
        assert getattr(parameter, "help", None), f"{verb} {parameter.name} is not explained"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no command given (see xtalfast --help)"),
        (["intergrate"], "No such command 'intergrate'"),
        (["train"], "no command given (see xtalfast train --help)"),
        (["integrate"], "Missing argument 'MODELS.expt'. (see xtalfast integrate --help)"),
        (["integrate", "a.expt", "b.refl"], "Missing option '-o' / '--output'."),
        (["simulate", "-o", "x", "--images", "many"], "Invalid value for '--images'"),
        (["stats", "--bogus"], "No such option: --bogus"),
    ],
)
def test_usage_errors_take_one_line(capsys, arguments, message):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("xtalfast: error: ") and error.count("\n") == 1
    assert message in error


def test_debug_shows_the_trace(tmp_path):
    missing = [str(tmp_path / "no.expt"), str(tmp_path / "no.refl"), "-o", str(tmp_path / "out")]
    assert main(["integrate", *missing]) == 2
    with pytest.raises(InputError, match=r"cannot read .*no\.expt: No such file or directory"):
        main(["integrate", *missing, "--debug"])


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"xtalfast {xtalfast.__version__}\n"
    for arguments in (["--help"], ["-h"], ["train", "integration", "--help"]):
        assert main(arguments) == 0
        assert "Usage: xtalfast" in capsys.readouterr().out


def test_program_ends_with_the_status_of_its_command():
    """The installed entry point and `python -m` both pass the status on."""
    done = subprocess.run([sys.executable, "-m", "xtalfast.cli", "stats", "no.mtz"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("xtalfast: error: no.mtz")


def test_interrupt_of_a_verb_that_does_not_resume(monkeypatch, capsys, tmp_path):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("xtalfast.integration.simulate.simulate", interrupt)
    assert main(["simulate", "-o", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "xtalfast: interrupted\n"
