"""The compiled extension `xtalfast._C`, or a clear word on why it is not there."""

from __future__ import annotations

import torch  # noqa: F401  (first, so that torch's OpenMP runtime is the only one loaded)

__all__ = ["C", "require", "why"]

try:
    from xtalfast import _C as C
except ImportError as error:
    C = None
    why = str(error)
else:
    why = ""


def require(what: str):
    """The extension, or an ImportError that says which function needs it and how to build it."""
    if C is None:
        raise ImportError(f"{what} needs the compiled extension ({why}); reinstall with `pip install .`")
    return C
