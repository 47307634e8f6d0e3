"""Rewrite docs/cli.md, the help text of every verb. `--check` only says whether it is up to date."""

from __future__ import annotations

import io
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

# Read when typer and rich are imported.
os.environ |= {"COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1", "TERM": "dumb"}

import typer

from xtalfast.cli.app import app, run

TARGET = Path(__file__).parent / "cli.md"


def verbs() -> list[tuple[str, ...]]:
    """Every command of the program, groups before their members."""
    found: list[tuple[str, ...]] = []

    def walk(command: Any, path: tuple[str, ...]) -> None:
        members = getattr(command, "commands", {})
        if path == () or not members:
            found.append(path)
        for name, member in members.items():
            walk(member, (*path, name))

    walk(typer.main.get_command(app), ())
    return found


def help_text(verb: tuple[str, ...]) -> str:
    """What `xtalfast VERB --help` prints on a terminal of 100 columns without colours."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        if run([*verb, "--help"]) != 0:
            raise RuntimeError(f"no help for {verb}")
    return "\n".join(line.rstrip() for line in printed.getvalue().strip().splitlines())


def page() -> str:
    """The whole page."""
    parts = ["# Command line\n\nWritten by `make docs` from the program's own help; do not edit.\n"]
    for verb in verbs():
        parts.append(f"## {' '.join(('xtalfast', *verb))}\n\n```\n{help_text(verb)}\n```\n")
    return "\n".join(parts)


def main() -> int:
    """Write the page, or compare with it."""
    text = page()
    if "--check" in sys.argv:
        if not TARGET.is_file() or TARGET.read_text() != text:
            print(f"docs/{TARGET.name} is out of date: run `make docs`", file=sys.stderr)
            return 1
        return 0
    TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
