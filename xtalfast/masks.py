"""DIALS' mask bits of shoebox pixels, and which pixels count."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

VALID, BACKGROUND, FOREGROUND, OVERLAPPED = 1, 2, 4, 32


def used_pixels(mask: NDArray) -> NDArray[np.bool_]:
    """Pixels that belong to the reflection and hold photons: Valid and not Overlapped. (Tensors: `xtalfast.ops`.)"""
    return (mask & (VALID | OVERLAPPED)) == VALID
