"""Outputs appear whole or not at all: write to a temporary name in the same directory, then rename."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from xtalfast.errors import InputError


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside `path`; when the block ends well it takes the name `path`, else it is removed.

    Raises:
        InputError: the directory cannot be written, or the disk is full.
    """
    path = Path(path)
    temporary = None
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        temporary = Path(name)
        os.close(descriptor)
        yield temporary
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except OSError as error:
        # numpy says only how much it could write.
        reason = error.strerror or f"{error}; the disk is full"
        raise InputError(f"cannot write {path}: {reason}; make room or choose another directory") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def remove_partial(directory: str | os.PathLike) -> None:
    """Remove what a process that was killed while it wrote has left below `directory`."""
    for leftover in Path(directory).rglob(".*.part"):
        leftover.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write `data` to `path` whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` (UTF-8) to `path` whole or not at all."""
    write_bytes(path, text.encode())
