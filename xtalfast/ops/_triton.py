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


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The type to which autocast would take a tensor before a convolution or a Linear."""
    enabled = x.is_cuda and torch.is_autocast_enabled("cuda")
    return torch.get_autocast_dtype("cuda") if enabled else x.dtype
