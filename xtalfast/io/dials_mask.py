"""Pixel masks of `dials.generate_mask` and `dials.apply_mask`: pickles of flex.bool, read without DIALS."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtalfast.errors import InputError

__all__ = ["read_dials_mask"]


class _FlexGrid:
    """Stands for scitbx flex.grid: first and last index of each dimension, the last excluded when `is_open`."""

    def __init__(self, first: tuple[int, ...] = (), last: tuple[int, ...] = (), is_open: bool = True) -> None:
        self.shape = tuple(b - a + (not is_open) for a, b in zip(first, last))

    def __setstate__(self, focus: tuple[int, ...]) -> None:
        """The focus, which differs from the shape only in padded grids; masks have none."""


class _FlexBool:
    """Stands for scitbx flex.bool, pickled as its grid and bytes: a header, then '0' or '1' for each pixel."""

    mask: NDArray[np.bool_]

    def __setstate__(self, state: tuple[_FlexGrid, bytes]) -> None:
        grid, data = state
        n = int(np.prod(grid.shape))
        pixels = np.frombuffer(data, np.uint8)[max(len(data) - n, 0) :]
        if len(grid.shape) != 2 or len(pixels) != n or not np.isin(pixels, (ord("0"), ord("1"))).all():
            raise pickle.UnpicklingError(f"its flex.bool of shape {grid.shape} has {len(data)} bytes")
        self.mask = (pixels == ord("1")).reshape(grid.shape)


class _MaskUnpickler(pickle.Unpickler):
    """Builds nothing but masks: any other class in the file is refused, so a pickle from elsewhere cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode(encoding)
        if module == "scitbx_array_family_flex_ext" and name in ("bool", "grid"):
            return _FlexBool if name == "bool" else _FlexGrid
        raise pickle.UnpicklingError(f"it holds a {module}.{name}")


def read_dials_mask(path: str | os.PathLike) -> list[NDArray[np.bool_]]:
    """The masks of a DIALS mask file, one per panel: bool [slow, fast], True = use the pixel.

    Raises:
        InputError: the file cannot be read, or holds anything but masks.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read mask {path}: {error.strerror or error}") from error
    try:
        masks = _MaskUnpickler(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError, TypeError, ValueError, IndexError, AttributeError, KeyError) as error:
        raise InputError(f"{path}: wanted a DIALS mask (pickled tuple of flex.bool), but {error}") from error
    masks = masks if isinstance(masks, tuple | list) else (masks,)
    if not masks or not all(isinstance(mask, _FlexBool) for mask in masks):
        raise InputError(f"{path}: wanted a DIALS mask (pickled tuple of flex.bool), got something else")
    return [mask.mask for mask in masks]
