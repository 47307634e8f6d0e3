"""What the three intensity ops check and unpack at their door: counts, mask, ragged offsets, profile, background."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtalfast import _native
from xtalfast.masks import OVERLAPPED, VALID
from xtalfast.ops.gamma import GammaPair, TensorPair
from xtalfast.ops.profiles import LowRankProfile, MVNProfile, Profile, SoftmaxProfile, materialise, segment_sum

SMALLEST_RATE = 1e-25  # photons; rates below are taken for it, so that p = 0 with y > 0 stays finite
MOST_PIXELS = 1 << 24  # of one box: what a thread keeps of it must fit into memory
_HAS_TRITON = find_spec("triton") is not None
_COUNT_DTYPES = (torch.uint8, torch.uint16, torch.int16, torch.int32, torch.int64)


def used_pixels(mask: Tensor) -> Tensor:
    """Pixels that enter the likelihood: a bool mask as it is; DIALS bits: Valid (1) and not Overlapped (32)."""
    if mask.dtype == torch.bool:
        return mask
    return (mask & (VALID | OVERLAPPED)) == VALID


@dataclass(frozen=True)
class Boxes:
    """Shoeboxes of N reflections, unpacked: flat pixel arrays [M] and row offsets `ptr` [N + 1]."""

    counts: Tensor  # [M], float
    used: Tensor  # [M], bool
    profile: Tensor  # [M]
    background: Tensor  # [M]
    ptr: Tensor  # int64 [N + 1]
    row: Tensor  # int64 [M]

    def __len__(self) -> int:
        return len(self.ptr) - 1

    def total(self, values: Tensor) -> Tensor:
        """Sum over the pixels of each box, [M, ...] -> [N, ...]."""
        return segment_sum(values, self.ptr)

    def where(self, keep: Tensor) -> Boxes:
        """Only the pixels with `keep` [M]; every box stays, if empty."""
        kept = torch.nonzero(keep).squeeze(1)
        n_kept = segment_sum(keep.to(torch.float64), self.ptr).to(torch.int64)
        ptr = torch.cat([n_kept.new_zeros(1), n_kept.cumsum(0)])
        counts, used, profile, background, row = (
            t.index_select(0, kept) for t in (self.counts, self.used, self.profile, self.background, self.row)
        )
        return Boxes(counts, used, profile, background, ptr, row)


def check_boxes(
    counts: Tensor, mask: Tensor | None, profile: Profile, ptr: Tensor | None, background: Tensor | None
) -> int:
    """Check shapes, kinds and devices of the pixel arguments, and return N.

    Raises:
        TypeError: wrong kind or dtype.
        ValueError: wrong shape, device or range.
    """
    if counts.dtype not in _COUNT_DTYPES and not counts.is_floating_point():
        raise TypeError(f"counts must be an integer or floating tensor, got {counts.dtype}")
    if ptr is None:
        if counts.ndim != 2:
            raise ValueError(f"counts must be [N, P], or [M] with ptr [N + 1], got {list(counts.shape)} without ptr")
        n, wanted = counts.shape[0], "[N, P]"
    else:
        if ptr.dtype != torch.int64 or ptr.ndim != 1 or len(ptr) == 0:
            raise ValueError(f"ptr must be int64 [N + 1], got {ptr.dtype} {list(ptr.shape)}")
        if counts.ndim != 1:
            raise ValueError(f"counts must be [M] when ptr is given, got {list(counts.shape)}")
        n, wanted = ptr.shape[0] - 1, "[M]"
        if not torch.compiler.is_compiling() and (ptr[0] != 0 or ptr[-1] != len(counts) or (ptr.diff() < 0).any()):
            raise ValueError(f"ptr must rise from 0 to M={len(counts)}, got {ptr[0].item()} to {ptr[-1].item()}")
    longest = counts.shape[1] if ptr is None else 0
    if ptr is not None and not torch.compiler.is_compiling() and n:
        longest = int(ptr.diff().max())
    if longest > MOST_PIXELS:
        raise ValueError(f"a box must hold at most {MOST_PIXELS} pixels, got one of {longest}")
    if mask is not None:
        if mask.is_floating_point() or mask.is_complex():
            raise TypeError(f"mask must be bool, or integer DIALS mask bits, got {mask.dtype}")
        if mask.shape != counts.shape:
            raise ValueError(f"mask must have the shape of counts {list(counts.shape)}, got {list(mask.shape)}")
    if background is not None and background.shape not in (counts.shape, counts.shape[-1:]):
        wanted_b = "[P] or [N, P]" if ptr is None else "[M]"
        raise ValueError(f"background must be {wanted_b} for counts {list(counts.shape)}, got {list(background.shape)}")
    _check_profile(profile, counts, n, ptr, wanted)
    if background is not None and background.device == counts.device:
        _check_not_negative("background", background)
    for name, tensor in (("mask", mask), ("ptr", ptr), ("background", background)):
        if tensor is not None and tensor.device != counts.device:
            raise ValueError(f"{name} is on {tensor.device}, counts on {counts.device}: move them to one device")
    return n


def _check_profile(profile: Profile, counts: Tensor, n: int, ptr: Tensor | None, wanted: str) -> None:
    pixels = counts.shape[-1]
    if isinstance(profile, SoftmaxProfile | Tensor):
        name = "profile" if isinstance(profile, Tensor) else "profile.logits"
        tensor = profile if isinstance(profile, Tensor) else profile.logits
        expected = {name: (tensor, tuple(counts.shape))}
    elif isinstance(profile, MVNProfile):
        expected = {
            "profile.mean": (profile.mean, (n, 3)),
            "profile.scale_tril": (profile.scale_tril, (n, 3, 3)),
            "profile.grid": (profile.grid, (pixels, 3)),
        }
    elif isinstance(profile, LowRankProfile):
        if ptr is not None:
            raise ValueError("a LowRankProfile belongs to boxes of one size: give counts as [N, P] without ptr")
        rank = profile.basis.shape[0]
        expected = {
            "profile.latent": (profile.latent, (n, rank)),
            "profile.basis": (profile.basis, (rank, pixels)),
            "profile.bias": (profile.bias, (pixels,)),
        }
    else:
        raise TypeError(
            "profile must be a tensor, SoftmaxProfile, MVNProfile or LowRankProfile, got " + type(profile).__name__
        )
    for name, (tensor, shape) in expected.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, got {tensor.dtype}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)} for counts {wanted}, got {list(tensor.shape)}")
        if tensor.device != counts.device:
            raise ValueError(f"{name} is on {tensor.device}, counts on {counts.device}: move them to one device")
    if isinstance(profile, Tensor):
        _check_not_negative("profile", profile)


def _check_not_negative(name: str, values: Tensor) -> None:
    if not torch.compiler.is_compiling() and values.numel():
        lowest = values.detach().amin()
        if not lowest >= 0:  # also catches NaN, which amin hands on
            raise ValueError(f"{name} must be finite and not negative, its smallest value is {lowest.item()}")


def check_photons(counts: Tensor, mask: Tensor | None) -> None:
    """Check that the used pixels hold photon counts: a Poisson likelihood is not defined below 0.

    Raises:
        ValueError: a count of a used pixel is negative or not a number.
    """
    if counts.dtype in (torch.uint8, torch.uint16) or torch.compiler.is_compiling() or not counts.numel():
        return
    lowest = counts.amin()
    if not lowest >= 0 and mask is not None:
        lowest = torch.where(used_pixels(mask), counts, 0).amin()
    if not lowest >= 0:
        raise ValueError(f"counts of used pixels must not be negative or NaN, got {lowest.item()}: mask such pixels")


def profile_dtype(profile: Profile) -> torch.dtype:
    """Floating type of a profile's parameters."""
    if isinstance(profile, Tensor):
        return profile.dtype
    if isinstance(profile, SoftmaxProfile):
        return profile.logits.dtype
    return profile.mean.dtype if isinstance(profile, MVNProfile) else profile.latent.dtype


def unpack(
    counts: Tensor, mask: Tensor | None, profile: Profile, ptr: Tensor | None, background: Tensor | None
) -> Boxes:
    """Flat pixel arrays in the precision of the profile (at least float32)."""
    values = materialise(profile, ptr)
    dtype = torch.promote_types(values.dtype, torch.float32)
    values = values.to(dtype)
    if ptr is None:
        n, pixels = counts.shape
        ptr = torch.arange(n + 1, device=counts.device) * pixels
    row = torch.repeat_interleave(torch.arange(len(ptr) - 1, device=ptr.device), ptr.diff())
    shape = torch.ones_like(counts, dtype=dtype) if background is None else background.to(dtype).expand(counts.shape)
    used = torch.ones_like(counts, dtype=torch.bool) if mask is None else used_pixels(mask)
    return Boxes(
        counts.to(dtype).reshape(-1), used.reshape(-1), values.reshape(-1), shape.reshape(-1), ptr=ptr, row=row
    )


def check_rows(n: int, **values: Tensor | float | GammaPair) -> None:
    """Check that every value, or both of a (shape, rate) pair, is a number or a tensor [N].

    Raises:
        TypeError: no number, tensor or pair of them.
        ValueError: a tensor of another shape.
    """
    for name, value in values.items():
        parts = value if isinstance(value, tuple | list) else (value,)
        if len(parts) != 2 and parts is value:
            raise ValueError(f"{name} must be a pair, got {len(parts)} values")
        for part in parts:
            if not isinstance(part, Tensor | int | float):
                raise TypeError(f"{name} must hold numbers or tensors, got {type(part).__name__}")
            if isinstance(part, Tensor) and (part.ndim > 1 or (part.ndim == 1 and not _fits(part.shape[0], n))):
                raise ValueError(f"{name} must hold numbers or [N] with N={n}, got {list(part.shape)}")


def per_reflection(value: Tensor | float, n: int, like: Tensor) -> Tensor:
    """A number or tensor [N] as a float64 tensor [N] on the device of `like`."""
    return torch.as_tensor(value, device=like.device).to(torch.float64).expand(n)


def _fits(rows: int, n: int) -> bool:
    return bool(rows == 1) or bool(rows == n)


def check_prior(name: str, pair: GammaPair) -> None:
    """Check the range of the prior of I or B: shape above 0, rate not below (0 is improper, and allowed).

    Raises:
        ValueError: outside, or not a number.
    """
    if torch.compiler.is_compiling():
        return
    shape, rate = (torch.as_tensor(value) for value in pair)
    if not (bool((shape > 0).all()) and bool((rate >= 0).all())):
        raise ValueError(f"{name} must have shape > 0 and rate >= 0, got {pair[0]} and {pair[1]}")


def gamma_rows(pair: GammaPair, n: int, like: Tensor) -> TensorPair:
    """(shape, rate) as two float64 tensors [N]."""
    return per_reflection(pair[0], n, like), per_reflection(pair[1], n, like)


def pair_rows(pair: tuple, rows: slice) -> tuple:
    """The rows of a (shape, rate) pair; numbers stay numbers."""
    return tuple(value_rows(value, rows) for value in pair)


def value_rows(value: Tensor | float, rows: slice) -> Tensor | float:
    """The rows of a tensor [N]; a number or a tensor of one value stays as it is."""
    return value[rows] if isinstance(value, Tensor) and value.ndim == 1 and len(value) > 1 else value


def _profile_rows(profile: Profile, rows: slice, pixels: slice, ragged: bool) -> Profile:
    if isinstance(profile, Tensor):
        return profile[pixels]
    if isinstance(profile, SoftmaxProfile):
        return SoftmaxProfile(profile.logits[pixels])
    if isinstance(profile, MVNProfile):
        return MVNProfile(
            profile.mean[rows], profile.scale_tril[rows], profile.grid[pixels] if ragged else profile.grid
        )
    return LowRankProfile(profile.latent[rows], profile.basis, profile.bias)


Chunk = tuple[Tensor, Tensor | None, Profile, Tensor | None, Tensor | None]


def box_chunks(
    counts: Tensor,
    mask: Tensor | None,
    profile: Profile,
    ptr: Tensor | None,
    background: Tensor | None,
    n: int,
    max_pixels: int = 1 << 19,
) -> Iterator[tuple[slice, Chunk]]:
    """Runs of reflections of about `max_pixels` pixels (at least one run, if empty): rows and their pixel arguments."""
    step = max(1, max_pixels * n // max(1, counts.numel()))
    for start in range(0, max(1, n), step):
        rows = slice(start, min(n, start + step))
        pixels = rows if ptr is None else slice(int(ptr[rows.start]), int(ptr[rows.stop]))
        yield (
            rows,
            (
                counts[pixels],
                None if mask is None else mask[pixels],
                _profile_rows(profile, rows, pixels, ptr is not None),
                None if ptr is None else ptr[rows.start : rows.stop + 1] - ptr[rows.start],
                background[pixels] if background is not None and background.shape == counts.shape else background,
            ),
        )


def has_kernel(device: torch.device) -> bool:
    """Whether the intensity ops have a compiled kernel for tensors on this device."""
    return _HAS_TRITON if device.type == "cuda" else _native.C is not None and device.type == "cpu"


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors as the kernels read them, None for those not given."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


class _Spares:
    """Memory of large arrays that are made anew in every step, kept for the next one.

    The kernel of the operating system clears every page that it hands out: for arrays of megabytes that costs more than
    a pass over them. At most two blocks are kept, and one is used again only when nothing refers to it any more.
    """

    _SMALLEST = 1 << 20  # bytes; below, malloc keeps the memory itself

    def __init__(self) -> None:
        self._blocks: list[NDArray[np.uint8]] = []
        self._lock = Lock()
        probe = np.empty(1, np.uint8)
        self._unused = self._references([probe], 0)
        del probe

    @staticmethod
    def _references(blocks: list[NDArray[np.uint8]], i: int) -> int:
        return sys.getrefcount(blocks[i])

    def empty(self, shape: tuple[int, ...], dtype: type) -> NDArray:
        """Uninitialised array."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size < self._SMALLEST:
            return np.empty(shape, dtype)
        with self._lock:
            for i in range(len(self._blocks)):
                fits = size <= self._blocks[i].nbytes <= 2 * size
                if fits and self._references(self._blocks, i) < self._unused:
                    block = self._blocks[i]
                    break
            else:
                block = np.empty(size, np.uint8)  # numpy asks for huge pages
                self._blocks = [*self._blocks[-1:], block]
            return block[:size].view(dtype).reshape(shape)


_SPARES = _Spares()


def empty_pixels(like: Tensor) -> Tensor:
    """Uninitialised contiguous memory of the shape and type of `like`, on the CPU from the last step's if large."""
    if like.device.type != "cpu" or like.dtype not in _NUMPY_TYPES:
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    return torch.from_numpy(_SPARES.empty(tuple(like.shape), _NUMPY_TYPES[like.dtype]))


_NUMPY_TYPES = {torch.float32: np.float32, torch.float64: np.float64}
_KERNEL_COUNTS = {torch.uint8: 0, torch.uint16: 1, torch.int32: 2, torch.float32: 3, torch.float64: 4}
_KERNEL_MASKS = {torch.bool: 1, torch.uint8: 2, torch.int32: 3}


class KernelBoxes:
    """The pixel arguments as the compiled kernels take them; keeps the tensors alive."""

    def __init__(
        self, counts: Tensor, mask: Tensor | None, ptr: Tensor | None, background: Tensor | None, dtype: torch.dtype
    ) -> None:
        if counts.dtype not in _KERNEL_COUNTS:
            counts = counts.to(dtype)
        if mask is not None and mask.dtype not in _KERNEL_MASKS:
            mask = mask.to(torch.int32)
        self.tensors = {"counts": counts, "mask": mask, "ptr": ptr, "background": background}
        self.tensors = {name: None if t is None else t.contiguous() for name, t in self.tensors.items()}
        self.arguments = {name: 0 if t is None else t.data_ptr() for name, t in self.tensors.items()} | {
            "count_type": _KERNEL_COUNTS[counts.dtype],
            "mask_type": 0 if mask is None else _KERNEL_MASKS[mask.dtype],
            "n": len(counts) if ptr is None else len(ptr) - 1,
            "pixels": counts.shape[-1],
            "background_rows": background is not None and background.shape == counts.shape,
            "wide": dtype == torch.float64,
            "threads": torch.get_num_threads(),
        }
