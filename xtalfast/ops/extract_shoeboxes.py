"""Cut the pixels around predicted spots (shoeboxes) out of a stack of images.

Voxel (z, y, x) of the box x0, x1, y0, y1, z0, z1 (end excluded) is pixel [z0 + z, y0 + y, x0 + x] of the stack. It is
Valid when it lies inside the stack, its mask is set and low <= value < high; every other voxel has count 0 and mask 0,
so that it can be added to sums without harm and is left out by every likelihood.

Bytes: each voxel is read once (4 or 2 bytes, in rows of a box's width) and written once (2 or 4 bytes and 1 of mask).
No arithmetic to speak of: the floor is memory bandwidth. No gradient: counts are data.

Example:
    >>> images = torch.poisson(torch.full((10, 100, 120), 2.0)).int()
    >>> bbox = torch.tensor([[50, 71, 40, 61, 3, 6]], dtype=torch.int32)
    >>> counts, mask, ptr = extract_shoeboxes(images, bbox)
    >>> counts.shape, counts.dtype
    (torch.Size([1323]), torch.uint16)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from xtalfast import _native
from xtalfast.ops._boxes import MOST_PIXELS

__all__ = ["Shoeboxes", "extract_shoeboxes", "extract_shoeboxes_reference"]

UINT16_MAX = 65534  # 65535 is what a saturated count becomes
INT32_MAX = 2**31 - 1
_NO_LIMIT = (0, INT32_MAX)
_NUMPY = {torch.int32: np.int32, torch.uint16: np.uint16, torch.uint8: np.uint8}


class Shoeboxes(NamedTuple):
    """Pixels of N boxes one after the other, each in the order z, y, x (x fastest)."""

    counts: Tensor  # [M] uint16, or int32 when a count exceeds 65534
    mask: Tensor  # [M] uint8 DIALS bits: Valid 1
    ptr: Tensor  # [N + 1] int64, box i holds ptr[i] to ptr[i + 1]

    def dense(self, box: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """Views of counts and mask as [N, z, y, x], for boxes that all have the size `box` (z, y, x).

        Raises:
            ValueError: the boxes do not have this size.
        """
        n, volume = len(self.ptr) - 1, box[0] * box[1] * box[2]
        if self.counts.numel() != n * volume:
            raise ValueError(f"box must hold {self.counts.numel()} / {n} voxels, got {box}; boxes may differ in size")
        return self.counts.view(n, *box), self.mask.view(n, *box)


def extract_shoeboxes_reference(
    images: Tensor, bbox: Tensor, mask: Tensor | None = None, *, low: int = 0, high: int = INT32_MAX
) -> Shoeboxes:
    """What `extract_shoeboxes` computes, box by box; counts are int32."""
    n_z, n_y, n_x = images.shape
    valid = torch.ones_like(images, dtype=torch.bool) if mask is None else mask.bool().expand(images.shape)
    images = images.int()
    valid = valid & (images >= low) & (images < high)  # low <= value < high
    counts, masks = [], []
    for x0, x1, y0, y1, z0, z1 in bbox.tolist():
        size = (max(z1 - z0, 0), max(y1 - y0, 0), max(x1 - x0, 0))
        box = torch.zeros(size, dtype=torch.int32, device=images.device)
        box_mask = torch.zeros(size, dtype=torch.uint8, device=images.device)
        inside = (slice(max(z0, 0), min(z1, n_z)), slice(max(y0, 0), min(y1, n_y)), slice(max(x0, 0), min(x1, n_x)))
        if all(s.start < s.stop for s in inside):
            here = tuple(slice(s.start - first, s.stop - first) for s, first in zip(inside, (z0, y0, x0)))
            box[here] = images[inside] * valid[inside]  # masked pixels count 0
            box_mask[here] = valid[inside].to(torch.uint8)
        counts.append(box.reshape(-1))
        masks.append(box_mask.reshape(-1))
    empty = [torch.zeros(0, dtype=torch.int32, device=images.device)]
    return Shoeboxes(torch.cat(counts or empty), torch.cat(masks or [empty[0].to(torch.uint8)]), _box_pointers(bbox))


def _box_pointers(bbox: Tensor) -> Tensor:
    """First voxel of each box, and the end: int64 [N + 1]."""
    sides = (bbox[:, 1::2].long() - bbox[:, ::2].long()).clamp(min=0)
    if not torch.compiler.is_compiling() and bbox.shape[0]:
        largest = float(sides.double().prod(1).max())  # the product itself may overflow
        if largest > MOST_PIXELS:
            raise ValueError(f"bbox must hold at most {MOST_PIXELS} voxels a box, got one of {largest:.0f}")
    volume = sides.prod(1)
    return torch.nn.functional.pad(volume.cumsum(0), (1, 0))


_library = torch.library.Library("xtalfast", "FRAGMENT")
_library.define(
    "extract_shoeboxes(Tensor images, Tensor bbox, Tensor ptr, Tensor? mask, SymInt n_voxels, bool wide, "
    "int low, int high) -> (Tensor counts, Tensor mask, Tensor peak)"
)


@torch.library.register_fake("xtalfast::extract_shoeboxes", lib=_library)
def _(images, bbox, ptr, mask, n_voxels, wide, low, high):
    counts = images.new_empty(n_voxels, dtype=torch.int32 if wide else torch.uint16)
    return counts, images.new_empty(n_voxels, dtype=torch.uint8), bbox.new_empty(bbox.shape[0], dtype=torch.int32)


def _empty(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory; on the CPU numpy's, which asks for huge pages: page faults cost more than the cutting."""
    if device.type != "cpu":
        return torch.empty(n, dtype=dtype, device=device)
    return torch.from_numpy(np.empty(n, _NUMPY[dtype]))


def _extract(images, bbox, ptr, mask, n_voxels, wide, low, high):
    device = images.device
    if _native.C is None or (device.type == "cuda" and not _native.C.with_cuda):
        boxes = extract_shoeboxes_reference(images, bbox, mask, low=low, high=high)
        counts = boxes.counts if wide else boxes.counts.clamp(max=65535).to(torch.uint16)
        of_box = torch.repeat_interleave(torch.arange(len(bbox), device=device), ptr.diff())
        peak = torch.zeros(len(bbox), dtype=torch.int32, device=device)
        return counts, boxes.mask, peak.scatter_reduce(0, of_box, boxes.counts, "amax")
    counts = _empty(n_voxels, torch.int32 if wide else torch.uint16, device)
    valid = _empty(n_voxels, torch.uint8, device)
    peak, overloads = torch.empty((2, len(bbox)), dtype=torch.int32, device=device)
    images, bbox, ptr = images.contiguous(), bbox.contiguous(), ptr.contiguous()
    mask = None if mask is None else mask.contiguous()
    stream = 0
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device).cuda_stream
    with torch.cuda.device_of(images):
        status = _native.C.extract_shoeboxes(
            pixels=images.data_ptr(),
            wide_pixels=images.dtype == torch.int32,
            mask=0 if mask is None else mask.data_ptr(),
            mask_stride=0 if mask is None or mask.ndim == 2 else mask.stride(0),
            n_z=images.shape[0],
            n_y=images.shape[1],
            n_x=images.shape[2],
            low=low,
            high=high,
            bbox=bbox.data_ptr(),
            offset=ptr.data_ptr(),
            n=len(bbox),
            counts=counts.data_ptr(),
            wide_counts=wide,
            valid=valid.data_ptr(),
            peak=peak.data_ptr(),
            overloads=overloads.data_ptr(),
            on_cuda=device.type == "cuda",
            stream=stream,
            n_threads=torch.get_num_threads(),
        )
    if status != 0:
        raise RuntimeError(f"extract_shoeboxes: kernel launch failed with CUDA error {status}")
    return counts, valid, peak


_library.impl("extract_shoeboxes", _extract, "CPU")
_library.impl("extract_shoeboxes", _extract, "CUDA")


def extract_shoeboxes(
    images: Tensor,
    bbox: Tensor,
    mask: Tensor | None = None,
    *,
    box: tuple[int, int, int] | None = None,
    trusted_range: tuple[int, int] = _NO_LIMIT,
    dtype: torch.dtype | None = None,
) -> Shoeboxes:
    """Cut the pixels of N boxes out of a stack of images, with DIALS' Valid bit.

    Args:
        images: pixel values, [Z, Y, X], int32 or uint16, photons. Negative values are invalid pixels.
        bbox: x0, x1, y0, y1, z0, z1 in pixels of `images`, end excluded, [N, 6], int32. Boxes may reach past the
            stack; an inverted box is empty.
        mask: pixels that may be used, [Y, X] or [Z, Y, X], bool or uint8.
        box: the size (z, y, x) of every box, when it is known to be one. Checked except under `torch.compile`, where
            it makes the shape of the result static; there it is needed.
        trusted_range: pixels with low <= value < high are valid.
        dtype: torch.uint16 or torch.int32 of the counts. None: uint16 if every count is at most 65534, else int32;
            under `torch.compile`, where a type cannot depend on data, int32. With uint16 given, counts beyond it
            become 65535.

    Returns:
        Shoeboxes(counts [M], mask [M], ptr [N + 1]).

    Raises:
        TypeError: wrong kind or dtype of an argument.
        ValueError: wrong shape or device, `box` is not the size of every box, a box of more than 2^24 voxels, or an
            empty trusted range.
    """
    _check(images, bbox, mask, trusted_range, dtype)
    ptr = _box_pointers(bbox)
    compiling = torch.compiler.is_compiling()
    if box is None:
        if compiling:
            raise ValueError("box must be the size (z, y, x) of all boxes under torch.compile, got None")
        n_voxels = int(ptr[-1])
    else:
        n_voxels = bbox.shape[0] * box[0] * box[1] * box[2]
        if not compiling and not bool((bbox[:, 1::2] - bbox[:, ::2] == bbox.new_tensor(box[::-1])).all()):
            raise ValueError(f"box must be the size of all boxes, got {tuple(box)} and boxes of other sizes")
    low, high = max(int(trusted_range[0]), 0), min(int(trusted_range[1]), INT32_MAX)
    wide = compiling if dtype is None else dtype == torch.int32
    op = torch.ops.xtalfast.extract_shoeboxes
    counts, valid, peak = op(images, bbox, ptr, mask, n_voxels, wide, low, high)
    if dtype is None and not compiling and bool((peak > UINT16_MAX).any()):
        counts, valid, peak = op(images, bbox, ptr, mask, n_voxels, True, low, high)
    return Shoeboxes(counts, valid, ptr)


def _check(images, bbox, mask, trusted_range, dtype) -> None:
    if images.dtype not in (torch.int32, torch.uint16):
        raise TypeError(f"images must be int32 or uint16 [Z, Y, X], got {images.dtype}; convert photons with .int()")
    if images.ndim != 3:
        raise ValueError(f"images must be [Z, Y, X], got {list(images.shape)}; use images[None] for one image")
    if bbox.dtype != torch.int32:
        raise TypeError(f"bbox must be int32 [N, 6], got {bbox.dtype}; convert with .int()")
    if bbox.ndim != 2 or bbox.shape[1] != 6:
        raise ValueError(f"bbox must be int32 [N, 6], got {list(bbox.shape)}")
    if bbox.device != images.device:
        raise ValueError(f"bbox must be on the device of images, {images.device}, got {bbox.device}")
    if dtype not in (None, torch.uint16, torch.int32):
        raise TypeError(f"dtype must be torch.uint16, torch.int32 or None, got {dtype}")
    if not trusted_range[0] < trusted_range[1] or trusted_range[1] <= 0:
        raise ValueError(f"trusted_range must be (low, high) with low < high and high > 0, got {trusted_range}")
    if mask is not None:
        if mask.dtype not in (torch.bool, torch.uint8):
            raise TypeError(f"mask must be bool or uint8, got {mask.dtype}; use mask != 0")
        if mask.shape not in (images.shape, images.shape[1:]):
            raise ValueError(
                f"mask must be [Y, X] = {list(images.shape[1:])} or [Z, Y, X] = {list(images.shape)}, "
                f"got {list(mask.shape)}"
            )
        if mask.device != images.device:
            raise ValueError(f"mask must be on the device of images, {images.device}, got {mask.device}")
