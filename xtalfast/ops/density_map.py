"""Electron density of atoms on the grid of their unit cell.

Each atom adds occupancy x rho(r) to the voxels within its radius R, through all faces of the cell, with

    rho(r) = sum_m a_m (4 pi / w_m)^(3/2) exp(-4 pi^2 r^2 / w_m),    w_m = b_m + B + blur,

the transform of the scattering factor f(s) = sum_m a_m exp(-b_m s^2 / 4) of IT92 (five terms, b_5 = 0) times
exp(-B s^2 / 4), s = 1/d. R is where rho, interpolated between radii half an angstrom apart, falls to the cutoff at full
occupancy. That is gemmi's DensityCalculatorX. Gradients are those of the sum with the radii held.

Work: about 4/3 pi R^3 / (volume of a voxel) voxels an atom (2000 for carbon at B = 20 on a 0.5 A grid), five
exponentials each. Bytes: each map is written once; an atom's voxels stay in cache. The CPU sums each voxel in one
thread, over the atoms in order, and the GPU too: the same input gives the same bits.

Example:
    >>> coords, element = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([6])
    >>> ptr, cells = torch.tensor([0, 1]), torch.tensor([[10.0, 11.0, 12.0, 90.0, 100.0, 90.0]])
    >>> density = density_map(coords, element, torch.tensor([20.0]), torch.ones(1), ptr, cells, (20, 24, 24))
    >>> density.shape
    torch.Size([1, 20, 24, 24])
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import gemmi
import torch
from torch import Tensor

from xtalfast import _native
from xtalfast.ops._cells import check_cells, orthogonalization

__all__ = ["density_map", "density_map_reference", "it92_form_factors"]

LAST_ELEMENT = 98  # californium, the last of IT92


def _it92() -> Tensor:
    table = torch.zeros(LAST_ELEMENT + 1, 10, dtype=torch.float64)
    for z in range(1, LAST_ELEMENT + 1):
        *ab, c = gemmi.Element(z).it92.get_coefs()
        table[z] = torch.tensor([*ab[:4], c, *ab[4:], 0.0], dtype=torch.float64)
    return table


_IT92 = _it92()


def it92_form_factors() -> Tensor:
    """The five-Gaussian scattering factors of the International Tables (1992), neutral atoms.

    Returns:
        a1, a2, a3, a4, c, b1, b2, b3, b4, 0 in row Z, [99, 10], float64; row 0 is empty. b in A^2. Not a copy.
    """
    return _IT92


def _atom_terms(form_factor: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and decay of the five terms of rho(r) = sum_m weight_m exp(-decay_m r^2)."""
    width = form_factor[5:] + b
    return form_factor[:5] * (4 * math.pi / width) ** 1.5, 4 * math.pi**2 / width


def _radius(weight: Tensor, decay: Tensor, b: float, cutoff: float) -> float:
    """Distance (A) at which the density of an atom falls to `cutoff`, interpolated between radii 0.5 A apart."""

    def density(r: float) -> float:
        return float((weight * torch.exp(-decay * r**2)).sum())

    inner = outer = (8.5 + 0.075 * b) / (2.4 + 0.0045 * b)  # gemmi's guess: atoms end where its atoms end
    while density(inner) < cutoff:
        inner, outer = inner - 0.5, inner
        if inner <= 0:
            return 0.0
    while density(outer) >= cutoff:
        inner, outer = outer, outer + 0.5
    return inner + (outer - inner) * (density(inner) - cutoff) / (density(inner) - density(outer))


def density_map_reference(
    coords: Tensor,
    element: Tensor,
    b_iso: Tensor,
    occupancy: Tensor,
    ptr: Tensor,
    cells: Tensor,
    grid: Sequence[int],
    form_factors: Tensor,
    cutoff: float,
    blur: float,
) -> Tensor:
    """What `density_map` computes, atom by atom; `grid` holds three sizes a map, the maps come one after the other."""
    maps = []
    orth = orthogonalization(cells)
    for i in range(len(ptr) - 1):
        n = torch.tensor(grid[3 * i : 3 * i + 3], device=coords.device)
        to_cartesian = orth[i].to(coords.dtype) / n  # columns: one step of the grid, A
        steps_per_angstrom = torch.linalg.inv(orth[i] / n)
        density = coords.new_zeros(int(n.prod()))
        for atom in range(int(ptr[i]), int(ptr[i + 1])):
            weight, decay = _atom_terms(form_factors[element[atom]], b_iso[atom] + blur)
            b = b_iso[atom].detach().double() + blur
            radius = _radius(*_atom_terms(form_factors[element[atom]], b), float(b), cutoff)
            centre = steps_per_angstrom @ coords[atom].detach().double()
            reach = radius * torch.linalg.vector_norm(steps_per_angstrom, dim=1)
            low, high = torch.ceil(centre - reach).long(), torch.floor(centre + reach).long()
            points = torch.cartesian_prod(*(torch.arange(a, b + 1, device=n.device) for a, b in zip(low, high)))
            r2 = ((points.to(coords.dtype) @ to_cartesian.T - coords[atom]) ** 2).sum(1)  # distance^2 of each point
            near = r2 <= radius**2
            # rho(r) = sum_m a_m (4 pi / w_m)^(3/2) exp(-4 pi^2 r^2 / w_m)
            rho = (weight.to(r2.dtype) * torch.exp(-decay.to(r2.dtype) * r2[near, None])).sum(1)
            x, y, z = torch.remainder(points[near], n).unbind(1)  # through the faces of the cell
            density = density.index_add(0, (x * n[1] + y) * n[2] + z, occupancy[atom] * rho)
        maps.append(density)
    return torch.cat(maps) if maps else coords.new_zeros(0)


_library = torch.library.Library("xtalfast", "FRAGMENT")
_ATOMS = (
    "Tensor coords, Tensor element, Tensor b_iso, Tensor occupancy, Tensor ptr, Tensor cells, SymInt[] grid, "
    "Tensor form_factors, float cutoff, float blur"
)
_library.define(f"density_map({_ATOMS}) -> Tensor")
_library.define(f"density_map_backward(Tensor grad, {_ATOMS}) -> (Tensor coords, Tensor b_iso, Tensor occupancy)")


def _n_voxels(grid):
    return sum(grid[i] * grid[i + 1] * grid[i + 2] for i in range(0, len(grid), 3))


@torch.library.register_fake("xtalfast::density_map", lib=_library)
def _(coords, element, b_iso, occupancy, ptr, cells, grid, form_factors, cutoff, blur):
    return coords.new_empty(_n_voxels(grid))


@torch.library.register_fake("xtalfast::density_map_backward", lib=_library)
def _(grad, coords, element, b_iso, occupancy, ptr, cells, grid, form_factors, cutoff, blur):
    return torch.empty_like(coords), torch.empty_like(b_iso), torch.empty_like(occupancy)


def _has_kernel(device: torch.device) -> bool:
    return _native.C is not None and (device.type == "cpu" or _native.C.with_cuda)


class _AtomMaps:
    """The arguments as the kernels take them; keeps the tensors alive."""

    def __init__(self, coords, element, b_iso, occupancy, ptr, cells, grid, form_factors, cutoff, blur):
        device = coords.device
        sizes = torch.tensor(grid, dtype=torch.int64).view(-1, 3)
        self.tensors = {
            "coords": coords,
            "element": element,
            "b_iso": b_iso,
            "occupancy": occupancy,
            "form_factors": form_factors,
            "ptr": ptr,
            "cells": cells,
            "grid": sizes.to(device),
            "offset": torch.nn.functional.pad(sizes.prod(1).cumsum(0), (1, 0)).to(device),
        }
        self.tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        self.arguments = {name: tensor.data_ptr() for name, tensor in self.tensors.items()} | {
            "n_maps": len(sizes),
            "n_atoms": len(coords),
            "cutoff": cutoff,
            "blur": blur,
            "wide": coords.dtype == torch.float64,
        }
        self.sizes = sizes


def _density_map(coords, element, b_iso, occupancy, ptr, cells, grid, form_factors, cutoff, blur):
    arguments = (coords, element, b_iso, occupancy, ptr, cells, grid, form_factors, cutoff, blur)
    if not _has_kernel(coords.device):
        return density_map_reference(*arguments)
    maps = _AtomMaps(*arguments)
    density = coords.new_empty(_n_voxels(grid))
    if coords.device.type == "cpu":
        _native.C.density_map(maps.arguments, density.data_ptr(), torch.get_num_threads())
        return density
    with torch.cuda.device_of(coords):
        size = _native.C.density_brick
        bricks = ((maps.sizes + size - 1) // size).prod(1)
        brick_ptr = torch.nn.functional.pad(bricks.cumsum(0), (1, 0)).to(coords.device)
        workspace = coords.new_empty(_native.C.density_map_workspace(maps.arguments), dtype=torch.uint8)
        status = _native.C.density_map_cuda(
            maps=maps.arguments,
            brick_ptr=brick_ptr.data_ptr(),
            n_bricks=int(bricks.sum()),
            workspace=workspace.data_ptr(),
            density=density.data_ptr(),
            stream=torch.cuda.current_stream(coords.device).cuda_stream,
        )
    if status != 0:
        raise RuntimeError(f"density_map: kernel launch failed with CUDA error {status}")
    return density


def _density_map_backward(grad, coords, element, b_iso, occupancy, ptr, cells, grid, form_factors, cutoff, blur):
    arguments = (coords, element, b_iso, occupancy, ptr, cells, grid, form_factors, cutoff, blur)
    if not _has_kernel(coords.device):
        inputs = [tensor.detach().requires_grad_() for tensor in (coords, b_iso, occupancy)]
        with torch.enable_grad():
            density = density_map_reference(inputs[0], element, inputs[1], inputs[2], *arguments[4:])
        if density.requires_grad:
            gradients = torch.autograd.grad(density, inputs, grad, materialize_grads=True)
        else:  # no atom at all
            gradients = [torch.zeros_like(tensor) for tensor in inputs]
        return tuple(gradients)
    maps = _AtomMaps(*arguments)
    out = torch.empty_like(coords), torch.empty_like(b_iso), torch.empty_like(occupancy)
    grad = grad.contiguous()
    on_cuda = coords.device.type == "cuda"
    with torch.cuda.device_of(coords):
        status = _native.C.density_map_backward(
            maps=maps.arguments,
            grad=grad.data_ptr(),
            coords=out[0].data_ptr(),
            b_iso=out[1].data_ptr(),
            occupancy=out[2].data_ptr(),
            on_cuda=on_cuda,
            stream=torch.cuda.current_stream(coords.device).cuda_stream if on_cuda else 0,
            n_threads=torch.get_num_threads(),
        )
    if status != 0:
        raise RuntimeError(f"density_map: kernel launch failed with CUDA error {status}")
    return out


for _device in ("CPU", "CUDA"):
    _library.impl("density_map", _density_map, _device)
    _library.impl("density_map_backward", _density_map_backward, _device)


def _setup_context(ctx, inputs, output):
    coords, element, b_iso, occupancy, ptr, cells, grid, form_factors, cutoff, blur = inputs
    ctx.save_for_backward(coords, element, b_iso, occupancy, ptr, cells, form_factors)
    ctx.rest = (grid, cutoff, blur)


def _backward(ctx, grad):
    coords, element, b_iso, occupancy, ptr, cells, form_factors = ctx.saved_tensors
    grid, cutoff, blur = ctx.rest
    by_coords, by_b, by_occupancy = torch.ops.xtalfast.density_map_backward(
        grad, coords, element, b_iso, occupancy, ptr, cells, grid, form_factors, cutoff, blur
    )
    return by_coords, None, by_b, by_occupancy, None, None, None, None, None, None


torch.library.register_autograd("xtalfast::density_map", _backward, setup_context=_setup_context, lib=_library)


def density_map(
    coords: Tensor,
    element: Tensor,
    b_iso: Tensor,
    occupancy: Tensor,
    ptr: Tensor,
    cells: Tensor,
    grid: Sequence[int] | Sequence[Sequence[int]] | Tensor,
    *,
    cutoff: float = 1e-5,
    blur: float = 0.0,
) -> Tensor | list[Tensor]:
    """Electron density of batches of atoms, in any unit cell, with gradients to positions, B and occupancies.

    Args:
        coords: Cartesian coordinates, [M, 3], A, float32 or float64; anywhere, also outside the cell. All atoms of the
            cell must be there: symmetry is not applied.
        element: atomic numbers, [M], int64, 1 to 98.
        b_iso: isotropic B, [M], A^2, like coords. B + blur must be positive: a point nucleus has no density on a grid.
        occupancy: [M], like coords.
        ptr: atoms ptr[i] to ptr[i + 1] make up map i, [B + 1], int64.
        cells: a, b, c (A), alpha, beta, gamma (deg), [B, 6].
        grid: sizes X, Y, Z of all maps, or of each, [B, 3].
        cutoff: density (e/A^3) at which an atom ends; gemmi's default.
        blur: A^2, added to every B so that sharp atoms suit a coarse grid; `structure_factors` takes it out again.

    Returns:
        Density, e/A^3, origin at the cell corner, Z fastest: [B, X, Y, Z] when all grids are equal, else a list of
        [X, Y, Z]. A map without atoms is 0.

    Raises:
        TypeError: wrong kind or dtype of an argument.
        ValueError: wrong shape, device or range.
    """
    sizes = _check(coords, element, b_iso, occupancy, ptr, cells, grid, cutoff, blur)
    cells = cells.to(coords.device, torch.float64)
    flat = [n for size in sizes for n in size]
    form_factors = _IT92.to(coords.device)
    density = torch.ops.xtalfast.density_map(
        coords, element, b_iso, occupancy, ptr, cells, flat, form_factors, float(cutoff), float(blur)
    )
    if not sizes:
        return density.view(0, *(grid_sizes(grid, 1)[0] if len(grid) == 3 else (1, 1, 1)))
    if all(size == sizes[0] for size in sizes):
        return density.view(len(sizes), *sizes[0])
    parts = density.split([math.prod(size) for size in sizes])
    return [part.view(size) for part, size in zip(parts, sizes)]


def _check(coords, element, b_iso, occupancy, ptr, cells, grid, cutoff, blur) -> list[tuple[int, int, int]]:
    if coords.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"coords must be float32 or float64 [M, 3], got {coords.dtype}")
    if coords.ndim != 2 or coords.shape[1] != 3:
        raise ValueError(f"coords must be [M, 3], got {list(coords.shape)}")
    n_atoms = coords.shape[0]
    for name, tensor, dtype in (
        ("element", element, torch.int64),
        ("b_iso", b_iso, coords.dtype),
        ("occupancy", occupancy, coords.dtype),
    ):
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype} [M], got {tensor.dtype}")
        if tensor.shape != (n_atoms,):
            raise ValueError(f"{name} must be [M] with M={n_atoms} from coords, got {list(tensor.shape)}")
        if tensor.device != coords.device:
            raise ValueError(f"{name} must be on the device of coords, {coords.device}, got {tensor.device}")
    if ptr.dtype != torch.int64:
        raise TypeError(f"ptr must be int64 [B + 1], got {ptr.dtype}")
    if ptr.ndim != 1 or len(ptr) == 0:
        raise ValueError(f"ptr must be [B + 1], got {list(ptr.shape)}")
    if ptr.device != coords.device:
        raise ValueError(f"ptr must be on the device of coords, {coords.device}, got {ptr.device}")
    n_maps = ptr.shape[0] - 1
    check_cells(cells, n_maps)
    sizes = grid_sizes(grid, n_maps)
    if not cutoff > 0:
        raise ValueError(f"cutoff must be positive (e/A^3), got {cutoff}")
    if torch.compiler.is_compiling():
        return sizes
    if int(ptr[0]) != 0 or int(ptr[-1]) != n_atoms or bool((ptr.diff() < 0).any()):
        raise ValueError(f"ptr must grow from 0 to M={n_atoms}, got {ptr[0]} to {ptr[-1]}")
    if n_atoms == 0:
        return sizes
    low, high = (int(v) for v in torch.aminmax(element))
    if low < 1 or high > LAST_ELEMENT:
        raise ValueError(f"element must be an atomic number from 1 to {LAST_ELEMENT}, got {low if low < 1 else high}")
    lowest_b = float(b_iso.detach().min()) + blur
    if not lowest_b > 0 or not math.isfinite(float(b_iso.detach().max())):
        raise ValueError(f"b_iso + blur must be positive and finite, got {lowest_b:g}; raise blur")
    if not bool(torch.isfinite(coords.detach()).all()):
        raise ValueError("coords must be finite; remove the atoms without a position")
    return sizes


def grid_sizes(grid, n_maps: int) -> list[tuple[int, int, int]]:
    """Sizes of the grid of each map, from one for all or one for each."""
    values = grid.tolist() if isinstance(grid, Tensor) else list(grid)
    rows = [values] * n_maps if len(values) == 3 and not isinstance(values[0], (list, tuple, Tensor)) else values
    if len(rows) != n_maps or any(len(row) != 3 for row in rows):
        raise ValueError(f"grid must be (X, Y, Z) or [B, 3] with B={n_maps}, got {values}")
    if any(n < 1 for row in rows for n in row):
        raise ValueError("grid must hold positive sizes")
    return [(row[0], row[1], row[2]) for row in rows]
