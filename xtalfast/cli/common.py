"""What the verbs share: options, progress bars, the log file."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from xtalfast.errors import InputError, MissingExtraError

OutputOption = Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Output directory, made if needed.")]
DeviceOption = Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu or cuda[:N].")]
SeedOption = Annotated[int, typer.Option("--seed", metavar="N", help="Same seed, same result (CPU: same bits).")]
ImageDirOption = Annotated[
    Path | None,
    typer.Option("--image-dir", metavar="DIR", help="Where the images are, when not where the .expt says."),
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the Python trace of an error.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress bars and no messages.")]

console = Console(stderr=True, highlight=False)


class ProgressBars:
    """One bar a stage; on a stream that is no terminal, one line every ten seconds."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._bars: dict[str, Any] = {}
        self._last = 0.0
        self._progress = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or not console.is_terminal,
        )

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._bars:
            self._bars[stage] = self._progress.add_task(stage, total=total)
            self._last = 0.0
        self._progress.update(self._bars[stage], completed=done, total=total)
        now = time.monotonic()
        if not self._quiet and not console.is_terminal and (now - self._last > 10 or done >= total):
            console.print(f"{stage}: {done}/{total}")
            self._last = now

    def __enter__(self) -> ProgressBars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


class _LogFile(logging.FileHandler):
    """A log file that stays silent when it cannot be written: the error to read is the one of the output file."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with suppress(OSError):
            super().close()


@contextmanager
def logging_to(log: Path | None, quiet: bool) -> Iterator[None]:
    """Send the package's messages to the terminal (unless quiet) and, with times, to the file `log`."""
    logger = logging.getLogger("xtalfast")
    logger.setLevel(logging.INFO)
    handlers: list[logging.Handler] = []
    if not quiet:
        handlers.append(RichHandler(console=console, show_time=False, show_level=False, show_path=False))
    if log is not None:
        try:
            handlers.append(_LogFile(log, mode="w", encoding="utf-8"))
        except OSError as error:
            raise InputError(f"cannot write {log}: {error.strerror}; choose another directory with -o") from error
        handlers[-1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


@contextmanager
def report_if_possible(path: Path) -> Iterator[None]:
    """Write a report that nobody asked for; without jinja2 say so and go on, and leave none of an earlier run."""
    try:
        yield
    except MissingExtraError as error:
        path.unlink(missing_ok=True)
        console.print(f"no {path.name}: {error}")
