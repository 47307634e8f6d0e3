"""Structure factors of density maps, and maps of structure factors, on the half spectrum.

    F(h) = integral over the cell of rho(x) exp(+2 pi i h.x) dx = V/N sum_x rho(x) exp(+2 pi i h.x)
    rho(x) = (1/V) sum_h F(h) exp(-2 pi i h.x)

rho is real, so F(-h) = conj F(h) and the last index runs from 0 to Z // 2 only: entry [i, j, l] is h = i or i - X,
k = j or j - Y (the smaller in size, `torch.fft.fftfreq`), l. The transforms are torch.fft's.

Example:
    >>> density, cells = torch.rand(1, 20, 24, 24), torch.tensor([[10.0, 11.0, 12.0, 90.0, 100.0, 90.0]])
    >>> torch.allclose(map_from_structure_factors(structure_factors(density, cells), cells), density, atol=1e-5)
    True
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from xtalfast.ops._cells import check_cells, orthogonalization, volumes

__all__ = ["limit_resolution", "map_from_structure_factors", "structure_factors"]

Maps = Tensor | list[Tensor]


def inverse_d2(orth: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """1/d^2 (1/A^2) of every structure factor of a half spectrum.

    Args:
        orth: Cartesian = orth x fractional, [B, 3, 3], A, float64.
        shape: X, Y, Z of the map.

    Returns:
        [B, X, Y, Z // 2 + 1], float64.
    """
    fractional = torch.linalg.inv(orth)  # rows: reciprocal axes a*, b*, c*
    indices = [torch.fft.fftfreq(n, 1 / n, dtype=torch.float64, device=orth.device) for n in shape[:2]]
    indices.append(torch.arange(shape[2] // 2 + 1, dtype=torch.float64, device=orth.device))
    h, k, l = (index.view(-1, *(1,) * (2 - axis), 1) for axis, index in enumerate(indices))
    vector = h * fractional[:, None, None, None, 0] + k * fractional[:, None, None, None, 1]
    return ((vector + l * fractional[:, None, None, None, 2]) ** 2).sum(-1)


def filter_spectrum_reference(
    spectrum: Tensor, orth: Tensor, n_z: int, scale: Tensor, inverse_d2_max: float, f000: bool, blur: float
) -> Tensor:
    """scale x conj(spectrum) x exp(blur s^2 / 4) within the sphere s^2 <= inverse_d2_max, 0 beyond; s = 1/d."""
    s2 = inverse_d2(orth, (spectrum.shape[1], spectrum.shape[2], n_z))
    factor = scale[:, None, None, None] * torch.exp(blur / 4 * s2)  # what the blur of the atoms took away comes back
    factor = torch.where(s2 <= inverse_d2_max, factor, 0.0)
    if not f000:
        factor[:, 0, 0, 0] = 0
    return spectrum.conj() * factor.to(spectrum.real.dtype)


def by_grid(maps: Maps, cells: Tensor, transform: Callable[[Tensor, Tensor], Tensor]) -> Maps:
    """Apply `transform` to a batch, or to a list of maps in batches of equal shape."""
    if isinstance(maps, Tensor):
        return transform(maps, cells)
    shapes: dict[tuple[int, ...], list[int]] = {}
    for i, one in enumerate(maps):
        shapes.setdefault(tuple(one.shape), []).append(i)
    results: list[Tensor | None] = [None] * len(maps)
    for rows in shapes.values():
        for i, result in zip(rows, transform(torch.stack([maps[i] for i in rows]), cells[rows])):
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
        orth = orthogonalization(batch_cells.to(batch.device))
        shape = batch.shape[1:]
        scale = volumes(orth) / math.prod(shape)
        limit = sphere(batch_cells, tuple(shape), d_min)
        spectrum = torch.fft.rfftn(batch, dim=(1, 2, 3))  # signs: exp(-2 pi i h.x), so the conjugate is F
        return filter_spectrum_reference(spectrum, orth, shape[2], scale, limit, f000, blur)

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
        orth = orthogonalization(batch_cells.to(batch.device))
        z = 2 * (batch.shape[3] - 1) if n_z is None else n_z
        if z // 2 + 1 != batch.shape[3]:
            raise ValueError(f"n_z must be {2 * batch.shape[3] - 2} or {2 * batch.shape[3] - 1}, got {n_z}")
        spectrum = filter_spectrum_reference(batch, orth, z, 1 / volumes(orth), math.inf, True, 0.0)
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
    f = structure_factors(density, cells, d_min=d_min, f000=f000, blur=blur)
    if isinstance(density, Tensor):
        return map_from_structure_factors(f, cells, n_z=density.shape[-1])
    even = [one.shape[-1] % 2 == 0 for one in density]
    if all(even):
        return map_from_structure_factors(f, cells)
    return [
        map_from_structure_factors(one[None], cells[i : i + 1], n_z=density[i].shape[-1])[0] for i, one in enumerate(f)
    ]


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
    return 1 / d_min**2
