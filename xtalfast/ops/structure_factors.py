"""Structure factors of density maps, and maps of structure factors, on the half spectrum.

    F(h) = integral over the cell of rho(x) exp(+2 pi i h.x) dx = V/N sum_x rho(x) exp(+2 pi i h.x)
    rho(x) = (1/V) sum_h F(h) exp(-2 pi i h.x)

rho is real, so F(-h) = conj F(h) and the last index runs from 0 to Z // 2 only: entry [i, j, l] is h = i or i - X,
k = j or j - Y (the smaller in size, `torch.fft.fftfreq`), l.

On the CPU the transforms are our own (csrc/fourier.cpp): one map a thread, and without the lines that the sphere of
resolution leaves empty, which are a third to a half of the work. Where a gradient is wanted, on the GPU, and for odd or
awkward sizes torch.fft transforms, and one pass of ours conjugates (torch transforms with the other sign), scales, cuts
the sphere and takes out the blur. Maps of one size are a batch; maps of other sizes follow, batch after batch.

Example:
    >>> density, cells = torch.rand(1, 20, 24, 24), torch.tensor([[10.0, 11.0, 12.0, 90.0, 100.0, 90.0]])
    >>> torch.allclose(map_from_structure_factors(structure_factors(density, cells), cells), density, atol=1e-5)
    True
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from xtalfast import _native
from xtalfast.ops._cells import check_cells, orthogonalization, volumes

__all__ = ["filter_spectrum_reference", "limit_resolution", "map_from_structure_factors", "structure_factors"]

Maps = Tensor | list[Tensor]


def inverse_d2(cells: Tensor, n_x: int, n_y: int, n_z: int) -> Tensor:
    """1/d^2 (1/A^2) of every entry of the half spectrum of maps [B, X, Y, Z], [B, X, Y, Z // 2 + 1], float64."""
    axes = torch.linalg.inv(orthogonalization(cells))  # rows: a*, b*, c*
    h, k = (torch.fft.fftfreq(n, 1 / n, dtype=torch.float64, device=cells.device) for n in (n_x, n_y))
    l = torch.arange(n_z // 2 + 1, dtype=torch.float64, device=cells.device)
    vector = h[:, None, None, None] * axes[:, None, None, None, 0] + k[:, None, None] * axes[:, None, None, None, 1]
    return ((vector + l[:, None] * axes[:, None, None, None, 2]) ** 2).sum(-1)


def inside_sphere(cells: Tensor, n: tuple[int, int, int], inverse_d2_max: float, f000: bool) -> Tensor:
    """Entries of the half spectrum up to a resolution, without F(000) unless wanted; bool."""
    inside = inverse_d2(cells, *n) <= inverse_d2_max
    if not f000:
        inside[:, 0, 0, 0] = False
    return inside


def filter_spectrum_reference(
    spectrum: Tensor,
    cells: Tensor,
    n_z: int,
    scale: float,
    volume_power: int,
    inverse_d2_max: float,
    f000: bool,
    blur: float,
) -> Tensor:
    """scale x V^volume_power x conj(spectrum) x exp(blur s^2 / 4) for s^2 <= inverse_d2_max, 0 beyond; s = 1/d."""
    n = (spectrum.shape[1], spectrum.shape[2], n_z)
    factor = (scale * volumes(cells) ** volume_power)[:, None, None, None]
    if blur != 0:
        factor = factor * torch.exp(blur / 4 * inverse_d2(cells, *n))
    factor = torch.where(inside_sphere(cells, n, inverse_d2_max, f000), factor, 0.0)
    return spectrum.conj() * factor.to(spectrum.real.dtype)


_library = torch.library.Library("xtalfast", "FRAGMENT")
_library.define(
    "filter_spectrum(Tensor spectrum, Tensor cells, SymInt n_z, float scale, int volume_power, float inverse_d2_max, "
    "bool f000, float blur) -> Tensor"
)


@torch.library.register_fake("xtalfast::filter_spectrum", lib=_library)
def _(spectrum, cells, n_z, scale, volume_power, inverse_d2_max, f000, blur):
    return torch.empty_like(spectrum, memory_format=torch.contiguous_format)


def has_kernel(device: torch.device) -> bool:
    """True where the compiled kernels can run."""
    return _native.C is not None and (device.type == "cpu" or _native.C.with_cuda)


def has_transform(maps: Tensor, n: tuple[int, ...]) -> bool:
    """True where the compiled Fourier transforms take `maps`, which are, or become, maps of sizes `n`."""
    return has_kernel(maps.device) and maps.device.type == "cpu" and len(maps) > 0 and _native.C.can_transform(n)


def wants_gradient(maps: Tensor) -> bool:
    """True where only differentiable operations will do."""
    return torch.compiler.is_compiling() or (torch.is_grad_enabled() and maps.requires_grad)


def run_kernel(function: Callable[..., int], device: torch.device, **arguments) -> None:
    """Call a kernel of the extension on the current stream of `device`."""
    on_cuda = device.type == "cuda"
    with torch.cuda.device(device) if on_cuda else contextlib.nullcontext():
        stream = torch.cuda.current_stream(device).cuda_stream if on_cuda else 0
        status = function(**arguments, on_cuda=on_cuda, stream=stream, n_threads=torch.get_num_threads())
    if status != 0:
        raise RuntimeError(f"{function.__name__}: kernel launch failed with CUDA error {status}")


def kernel_spectra(
    spectrum: Tensor, cells: Tensor, n_z: int, scale: float, volume_power: int, inverse_d2_max: float, f000: bool
) -> dict:
    """Half spectra as the kernels take them; `spectrum` and `cells` are contiguous and outlive the call."""
    return {
        "cells": cells.data_ptr(),
        "n_maps": spectrum.shape[0],
        "n": (spectrum.shape[1], spectrum.shape[2], n_z),
        "inverse_d2_max": inverse_d2_max,
        "scale": scale,
        "volume_power": volume_power,
        "f000": f000,
        "wide": spectrum.dtype == torch.complex128,
    }


def _filter_spectrum(spectrum, cells, n_z, scale, volume_power, inverse_d2_max, f000, blur):
    if not has_kernel(spectrum.device):
        return filter_spectrum_reference(spectrum, cells, n_z, scale, volume_power, inverse_d2_max, f000, blur)
    spectrum, cells = spectrum.resolve_conj().contiguous(), cells.contiguous()
    out = torch.empty_like(spectrum)
    run_kernel(
        _native.C.filter_spectrum,
        spectrum.device,
        spectra=kernel_spectra(spectrum, cells, n_z, scale, volume_power, inverse_d2_max, f000),
        blur=blur,
        input=spectrum.data_ptr(),
        out=out.data_ptr(),
    )
    return out


_library.impl("filter_spectrum", _filter_spectrum, "CPU")
_library.impl("filter_spectrum", _filter_spectrum, "CUDA")


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])
    ctx.rest = inputs[2:]


def _backward(ctx, grad):  # y = c conj(x), c real: the gradient goes the same way
    (cells,) = ctx.saved_tensors
    return torch.ops.xtalfast.filter_spectrum(grad, cells, *ctx.rest), *[None] * 7


torch.library.register_autograd("xtalfast::filter_spectrum", _backward, setup_context=_setup_context, lib=_library)


def by_grid(maps: Maps, cells: Tensor, transform: Callable[[Tensor, Tensor], Tensor]) -> Maps:
    """Apply `transform` to a batch, or to a list of maps in batches of equal shape."""
    cells = cells.to(torch.float64)
    if isinstance(maps, Tensor):
        if maps.shape[0] == 0:  # MKL transforms no empty batch: the shape of the result comes from one map
            cells = cells.new_tensor([[1.0, 1.0, 1.0, 90.0, 90.0, 90.0]], device=maps.device)
            return transform(maps.new_zeros((1, *maps.shape[1:])), cells)[:0]
        return transform(maps, cells.to(maps.device))
    shapes: dict[tuple[int, ...], list[int]] = {}
    for i, one in enumerate(maps):
        shapes.setdefault(tuple(one.shape), []).append(i)
    results: list[Tensor | None] = [None] * len(maps)
    for rows in shapes.values():
        for i, result in zip(
            rows, transform(torch.stack([maps[i] for i in rows]), cells[rows].to(maps[rows[0]].device))
        ):
            results[i] = result
    return [result for result in results if result is not None]


def structure_factors(
    density: Maps, cells: Tensor, *, d_min: float | None = None, f000: bool = True, blur: float = 0.0
) -> Maps:
    """Structure factors of density maps: F(h) = V/N sum_x rho(x) exp(+2 pi i h.x).

    Args:
        density: e/A^3, [B, X, Y, Z], or a list of B maps [X, Y, Z] of any sizes; float32 or float64.
        cells: a, b, c (A), alpha, beta, gamma (deg), [B, 6].
        d_min: resolution limit, A; structure factors beyond it are 0. None: all that the grid holds.
        f000: keep F(000), the number of electrons; False makes it 0.
        blur: A^2, the blur that `density_map` was given, taken out again.

    Returns:
        Half spectrum, e, [B, X, Y, Z // 2 + 1] complex, or a list.

    Raises:
        TypeError: density is not real.
        ValueError: wrong shape or range, or a grid too coarse for d_min.
    """
    check_maps("density", density, cells, complex_=False)

    def transform(batch: Tensor, batch_cells: Tensor) -> Tensor:
        shape = batch.shape[1:]
        limit = sphere(batch_cells, shape, d_min)
        if not wants_gradient(batch) and has_transform(batch, tuple(shape)):
            batch, batch_cells = batch.detach().contiguous(), batch_cells.contiguous()
            out = batch.new_empty((*batch.shape[:3], shape[2] // 2 + 1), dtype=batch.dtype.to_complex())
            _native.C.maps_to_spectra(
                spectra=kernel_spectra(out, batch_cells, shape[2], 1 / math.prod(shape), 1, limit, f000),
                n_z=shape[2],
                blur=float(blur),
                input=batch.data_ptr(),
                out=out.data_ptr(),
                n_threads=torch.get_num_threads(),
            )
            return out
        spectrum = torch.fft.rfftn(batch, dim=(1, 2, 3))
        return torch.ops.xtalfast.filter_spectrum(
            spectrum, batch_cells, shape[2], 1 / math.prod(shape), 1, limit, f000, float(blur)
        )

    return by_grid(density, cells, transform)


def map_from_structure_factors(f: Maps, cells: Tensor, *, n_z: int | None = None) -> Maps:
    """Map of structure factors: rho(x) = (1/V) sum_h F(h) exp(-2 pi i h.x).

    Args:
        f: half spectrum, [B, X, Y, Z // 2 + 1] complex, or a list of B of any sizes, as from `structure_factors`.
            The plane l = 0 holds h and -h, which must be conjugates.
        cells: a, b, c (A), alpha, beta, gamma (deg), [B, 6].
        n_z: Z of the maps, when it is odd; else it is 2 (f.shape[-1] - 1).

    Returns:
        Density, e/A^3 for F in e, [B, X, Y, Z], or a list.

    Raises:
        TypeError: f is not complex.
        ValueError: wrong shape or range.
    """
    check_maps("f", f, cells, complex_=True)

    def transform(batch: Tensor, batch_cells: Tensor) -> Tensor:
        z = full_n_z(batch, n_z)
        if not wants_gradient(batch) and has_transform(batch, (*batch.shape[1:3], z)):
            batch, batch_cells = batch.detach().resolve_conj().contiguous(), batch_cells.contiguous()
            maps = batch.new_empty((*batch.shape[:3], z), dtype=batch.dtype.to_real())
            _native.C.spectra_to_maps(
                spectra=kernel_spectra(batch, batch_cells, z, 1.0, -1, math.inf, True),
                n_z=z,
                input=batch.data_ptr(),
                out=maps.data_ptr(),
                n_threads=torch.get_num_threads(),
            )
            return maps
        spectrum = torch.ops.xtalfast.filter_spectrum(batch, batch_cells, z, 1.0, -1, math.inf, True, 0.0)
        return torch.fft.irfftn(spectrum, s=(batch.shape[1], batch.shape[2], z), dim=(1, 2, 3), norm="forward")

    return by_grid(f, cells, transform)


def limit_resolution(density: Maps, cells: Tensor, d_min: float, *, f000: bool = False, blur: float = 0.0) -> Maps:
    """The map of the structure factors of `density` up to a resolution limit.

    Args:
        density: e/A^3, [B, X, Y, Z], or a list of B maps [X, Y, Z] of any sizes.
        cells: a, b, c (A), alpha, beta, gamma (deg), [B, 6].
        d_min: resolution limit, A.
        f000: keep F(000); without it the mean of the map is 0, as in experimental maps.
        blur: A^2, the blur that `density_map` was given, taken out again.

    Returns:
        Density, e/A^3, like `density`.

    Raises:
        TypeError: density is not real.
        ValueError: wrong shape or range, or a grid too coarse for d_min.
    """
    check_maps("density", density, cells, complex_=False)

    def transform(batch: Tensor, batch_cells: Tensor) -> Tensor:
        f = structure_factors(batch, batch_cells, d_min=d_min, f000=f000, blur=blur)
        return map_from_structure_factors(f, batch_cells, n_z=batch.shape[3])  # type: ignore[return-value]

    return by_grid(density, cells, transform)


def full_n_z(f: Tensor, n_z: int | None) -> int:
    """Z of the maps of a half spectrum, which must be one of two."""
    even = 2 * (f.shape[3] - 1)
    if n_z not in (None, even, even + 1):
        raise ValueError(f"n_z must be {even} or {even + 1}, got {n_z}")
    return even if n_z is None else n_z


def check_maps(name: str, maps: Maps, cells: Tensor, *, complex_: bool) -> None:
    """Raise unless `maps` is [B, X, Y, Z] or a list of B [X, Y, Z], real or complex, and `cells` is [B, 6]."""
    batch = isinstance(maps, Tensor)
    for one in [maps] if isinstance(maps, Tensor) else maps:
        kinds = (torch.complex64, torch.complex128) if complex_ else (torch.float32, torch.float64)
        if one.dtype not in kinds:
            raise TypeError(f"{name} must be {kinds[0]} or {kinds[1]}, got {one.dtype}")
        if one.ndim != 3 + batch:
            raise ValueError(f"{name} must be [B, X, Y, Z] or a list of [X, Y, Z], got {list(one.shape)}")
    check_cells(cells, len(maps))


def sphere(cells: Tensor, shape: tuple[int, ...], d_min: float | None) -> float:
    """1/d_min^2, or infinity; raises ValueError when a grid of this shape cannot hold all indices up to d_min."""
    if d_min is None:
        return math.inf
    if not d_min > 0:
        raise ValueError(f"d_min must be positive (A), got {d_min}")
    if not torch.compiler.is_compiling() and cells.shape[0]:
        highest = (cells[:, :3].max(0).values / d_min).floor().tolist()  # |h| <= a / d_min
        if any(2 * h + 1 > n for h, n in zip(highest, shape)):
            wanted = [2 * int(h) + 1 for h in highest]
            raise ValueError(f"grid must be at least {wanted} for d_min={d_min} A, got {list(shape)}; raise d_min")
    return (1 + 1e-9) / d_min**2  # a reflection at d_min itself is inside, whatever the rounding
