"""X-ray diffraction integration by variational inference, as compiled kernels under thin PyTorch modules."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from xtalfast.errors import CorruptImageError, InputError, MissingExtraError

if TYPE_CHECKING:
    from xtalfast.integration.integrate import integrate
    from xtalfast.integration.simulate import simulate

__version__ = "0.1.0"
__all__ = ["CorruptImageError", "InputError", "MissingExtraError", "__version__", "integrate", "simulate"]

_LAZY = {"integrate": "xtalfast.integration.integrate", "simulate": "xtalfast.integration.simulate"}


def __getattr__(name: str):
    # Loaded on first use: `import xtalfast` must pull in nothing but the required packages.
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'xtalfast' has no attribute '{name}'")
