"""When the Triton kernels of the phasing network may stand for torch."""

from __future__ import annotations

import importlib.util

import torch

PRECISION = "tf32"  # of products of float32 in the kernels, as Triton names it
_PRESENT = importlib.util.find_spec("triton") is not None


def allows_tensor_cores(dtype: torch.dtype) -> bool:
    """Whether products of this type may be rounded as tensor cores do.

    float32 only where the user said so (`torch.set_float32_matmul_precision("high")`), float64 never.
    """
    if dtype == torch.float32:
        return _PRESENT and torch.get_float32_matmul_precision() != "highest"
    return _PRESENT and dtype in (torch.float16, torch.bfloat16)


def as_autocast(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The tensors as autocast would hand them to a convolution or a Linear."""
    if not torch.is_autocast_enabled("cuda"):
        return list(tensors)
    dtype = torch.get_autocast_dtype("cuda")
    return [None if t is None else t.to(dtype) for t in tensors]
