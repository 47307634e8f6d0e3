"""The command line: one file per verb, each adds its options and calls the library."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from xtalfast.errors import InputError, MissingExtraError

_RESUMABLE = ("integrate", "extract", "train")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; `--debug` shows the trace of an error.

    Returns:
        Exit status: 0 done, 2 bad input (one line on stderr), 130 interrupted.
    """
    # Before torch loads its OpenMP runtime: spinning threads make a shared machine ten times slower than sleeping ones.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        try:
            from xtalfast.cli.app import run
        except ModuleNotFoundError as error:
            if error.name not in ("typer", "rich", "click"):
                raise
            raise MissingExtraError(error.name, "cli", "the command line") from error
        return run(arguments)
    except (InputError, MissingExtraError, OSError) as error:
        if "--debug" in arguments:
            raise
        print(f"xtalfast: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        advice = "; the same command resumes where it stopped" if arguments[0] in _RESUMABLE else ""
        print(f"xtalfast: interrupted{advice}", file=sys.stderr)
        return 130
