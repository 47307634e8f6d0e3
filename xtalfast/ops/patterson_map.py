"""Patterson map: what amplitudes say about the vectors between atoms, without phases.

    P(u) = (1/V) sum_h |F(h)|^2 cos(2 pi h.u) = integral over the cell of rho(x) rho(x + u) dx

Density paper, eq. 3-4. P has its origin at the cell corner and P(u) = P(-u).

Example:
    >>> density, cells = torch.rand(1, 20, 24, 24), torch.tensor([[10.0, 11.0, 12.0, 90.0, 100.0, 90.0]])
    >>> patterson_map(density, cells, d_min=1.5).shape
    torch.Size([1, 20, 24, 24])
"""

from __future__ import annotations

import torch
from torch import Tensor

from xtalfast.ops._cells import orthogonalization, volumes
from xtalfast.ops.structure_factors import (
    Maps,
    by_grid,
    check_maps,
    inverse_d2,
    sphere,
    structure_factors,
)

__all__ = ["patterson_map", "patterson_map_reference"]


def patterson_map_reference(intensity: Tensor, volume: Tensor, n_z: int) -> Tensor:
    """P(u) = (1/V) sum_h I(h) cos(2 pi h.u) of a half spectrum of intensities [B, X, Y, Z // 2 + 1]."""
    shape = (intensity.shape[1], intensity.shape[2], n_z)
    spectrum = (intensity / volume[:, None, None, None]).to(intensity.dtype)
    return torch.fft.irfftn(spectrum.to(intensity.dtype.to_complex()), s=shape, dim=(1, 2, 3), norm="forward")


def _shell_means(intensity: Tensor, s2: Tensor, used: Tensor, n_z: int) -> Tensor:
    """Mean intensity of the reflections of the same resolution, for every reflection: shells of equal volume."""
    weight = torch.full((intensity.shape[-1],), 2.0, dtype=torch.float64, device=intensity.device)
    weight[0] = 1  # the plane l = 0 holds h and -h, the others only h
    if n_z % 2 == 0:
        weight[-1] = 1
    means = torch.zeros_like(intensity)
    for i in range(len(intensity)):
        radius3 = s2[i, used[i]] ** 1.5
        if radius3.numel() == 0:
            continue
        weights = weight.expand_as(s2[i])[used[i]]
        n_shells = max(1, min(20, int(weights.sum()) // 200))
        # Knots at the mid-volumes of the shells, straight lines between them.
        position = (radius3 / radius3.max() * n_shells - 0.5).clamp(0, n_shells - 1)
        left = position.floor().clamp(max=max(n_shells - 2, 0)).long()
        right, share = (left + 1).clamp(max=n_shells - 1), position - left
        shell = (radius3 / radius3.max() * n_shells).long().clamp(max=n_shells - 1)
        total = torch.zeros(n_shells, dtype=torch.float64, device=s2.device)
        values = intensity[i, used[i]].double()
        sums = total.index_add(0, shell, weights * values)
        counts = total.index_add(0, shell, weights)
        mean = sums / counts.clamp(min=1)
        means[i] = means[i].masked_scatter(used[i], ((1 - share) * mean[left] + share * mean[right]).to(means.dtype))
    return means


def patterson_map(
    density_or_f: Maps,
    cells: Tensor,
    *,
    d_min: float | None = None,
    remove_origin: bool = False,
    sharpen: bool = False,
    f000: bool = False,
    n_z: int | None = None,
) -> Maps:
    """Patterson maps of density maps or of structure factors.

    Args:
        density_or_f: density, e/A^3, [B, X, Y, Z] real, or its half spectrum F, e, [B, X, Y, Z // 2 + 1] complex (only
            amplitudes matter); or a list of B of them, of any sizes.
        cells: a, b, c (A), alpha, beta, gamma (deg), [B, 6].
        d_min: resolution limit, A. None: all that is there.
        remove_origin: subtract from |F|^2 its mean at the same resolution: what is left of the origin peak is small.
        sharpen: replace |F|^2 by E^2, |F|^2 over its mean at the same resolution, scaled to the same sum.
        f000: keep F(000), which lifts the map by a constant.
        n_z: Z of the maps when structure factors are given and it is odd.

    Returns:
        P(u), e^2/A^3 for F in e, origin at the cell corner, Z fastest: [B, X, Y, Z], or a list.

    Raises:
        TypeError: neither real nor complex maps.
        ValueError: wrong shape or range, or a grid too coarse for d_min.
    """
    first = density_or_f if isinstance(density_or_f, Tensor) else density_or_f[0] if density_or_f else None
    given_f = first is not None and first.dtype.is_complex
    check_maps("density_or_f", density_or_f, cells, complex_=given_f)

    def transform(batch: Tensor, batch_cells: Tensor) -> Tensor:
        orth = orthogonalization(batch_cells.to(batch.device))
        if given_f:
            z = 2 * (batch.shape[3] - 1) if n_z is None else n_z
            if z // 2 + 1 != batch.shape[3]:
                raise ValueError(f"n_z must be {2 * batch.shape[3] - 2} or {2 * batch.shape[3] - 1}, got {n_z}")
            f = batch
        else:
            z, f = batch.shape[3], structure_factors(batch, batch_cells)
        s2 = inverse_d2(orth, (batch.shape[1], batch.shape[2], z))
        used = s2 <= sphere(batch_cells, (batch.shape[1], batch.shape[2], z), d_min)
        if not f000:
            used[:, 0, 0, 0] = False
        intensity = torch.where(used, f.real**2 + f.imag**2, 0.0)
        if sharpen or remove_origin:
            means = _shell_means(intensity.detach(), s2, used, z)
            if sharpen:
                total = intensity.detach().sum((1, 2, 3), keepdim=True)
                squared_e = torch.where(means > 0, intensity / means, 0.0)
                scale = total / squared_e.detach().sum((1, 2, 3), keepdim=True).clamp(min=1e-30)
                intensity, means = squared_e * scale, used * scale
            if remove_origin:
                intensity = intensity - means
        return patterson_map_reference(intensity, volumes(orth), z)

    return by_grid(density_or_f, cells, transform)
