"""Patterson map: what amplitudes say about the vectors between atoms, without phases.

    P(u) = (1/V) sum_h |F(h)|^2 cos(2 pi h.u) = integral over the cell of rho(x) rho(x + u) dx

P has its origin at the cell corner and P(u) = P(-u): the transforms start from real intensities and run over half of
the map, the other half is copied. That is half the work of a general transform. The transforms are torch.fft's, see
`structure_factors`; a C++ or CUDA pass before them squares and limits the spectrum, one after them mirrors.

Ref: Patterson, Phys. Rev. 46, 372 (1934), doi:10.1103/PhysRev.46.372.

Example:
    >>> density, cells = torch.rand(1, 20, 24, 24), torch.tensor([[10.0, 11.0, 12.0, 90.0, 100.0, 90.0]])
    >>> patterson_map(density, cells, d_min=1.5).shape
    torch.Size([1, 20, 24, 24])
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from xtalfast import _native
from xtalfast.ops._cells import volumes
from xtalfast.ops.structure_factors import (
    Maps,
    by_grid,
    check_maps,
    full_n_z,
    has_kernel,
    has_transform,
    inside_sphere,
    inverse_d2,
    kernel_spectra,
    run_kernel,
    sphere,
)

__all__ = ["patterson_map", "patterson_map_reference", "spectrum_intensity_reference"]


def spectrum_intensity_reference(
    spectrum: Tensor,
    cells: Tensor,
    n_z: int,
    scale: float,
    volume_power: int,
    inverse_d2_max: float,
    f000: bool,
    n_kept: int,
) -> Tensor:
    """I(h) = scale x V^volume_power x |spectrum(h)|^2 for 1/d^2 <= inverse_d2_max, 0 beyond; l < n_kept only."""
    inside = inside_sphere(cells, (spectrum.shape[1], spectrum.shape[2], n_z), inverse_d2_max, f000)
    factor = torch.where(inside, (scale * volumes(cells) ** volume_power)[:, None, None, None], 0.0)
    return ((spectrum.real**2 + spectrum.imag**2) * factor.to(spectrum.real.dtype))[..., :n_kept].contiguous()


def patterson_map_reference(intensity: Tensor, n_z: int) -> Tensor:
    """P(u) = sum_h I(h) cos(2 pi h.u) over the full spectrum; `intensity` [B, X, Y, L] is half, and 0 for l >= L."""
    shape = (intensity.shape[1], intensity.shape[2], n_z)
    return torch.fft.irfftn(
        torch.complex(intensity, torch.zeros_like(intensity)), s=shape, dim=(1, 2, 3), norm="forward"
    )


_library = torch.library.Library("xtalfast", "FRAGMENT")
_library.define(
    "spectrum_intensity(Tensor spectrum, Tensor cells, SymInt n_z, float scale, int volume_power, "
    "float inverse_d2_max, bool f000, SymInt n_kept) -> Tensor"
)
_library.define("patterson_map(Tensor intensity, SymInt n_z) -> Tensor")


@torch.library.register_fake("xtalfast::spectrum_intensity", lib=_library)
def _(spectrum, cells, n_z, scale, volume_power, inverse_d2_max, f000, n_kept):
    return spectrum.new_empty((*spectrum.shape[:3], n_kept), dtype=spectrum.real.dtype)


@torch.library.register_fake("xtalfast::patterson_map", lib=_library)
def _(intensity, n_z):
    return intensity.new_empty((*intensity.shape[:3], n_z))


def _spectrum_intensity(spectrum, cells, n_z, scale, volume_power, inverse_d2_max, f000, n_kept):
    if not has_kernel(spectrum.device):
        return spectrum_intensity_reference(spectrum, cells, n_z, scale, volume_power, inverse_d2_max, f000, n_kept)
    spectrum, cells = spectrum.resolve_conj().contiguous(), cells.contiguous()
    intensity = spectrum.new_empty((*spectrum.shape[:3], n_kept), dtype=spectrum.real.dtype)
    run_kernel(
        _native.C.spectrum_intensity,
        spectrum.device,
        spectra=kernel_spectra(spectrum, cells, n_z, scale, volume_power, inverse_d2_max, f000),
        input=spectrum.data_ptr(),
        intensity=intensity.data_ptr(),
        n_kept=n_kept,
    )
    return intensity


def _patterson_map(intensity, n_z):
    if not has_kernel(intensity.device) or intensity.numel() == 0:
        return patterson_map_reference(intensity, n_z)
    n_maps, n_x, n_y = intensity.shape[:3]
    patterson = intensity.new_empty((n_maps, n_x, n_y, n_z))
    if n_y % 2 == 0 and has_transform(intensity, (n_x, n_y, n_z)):
        intensity = intensity.contiguous()
        _native.C.intensities_to_pattersons(
            n_maps=n_maps,
            n=(n_x, n_y, n_z),
            n_l=intensity.shape[3],
            wide=intensity.dtype == torch.float64,
            input=intensity.data_ptr(),
            out=patterson.data_ptr(),
            n_threads=torch.get_num_threads(),
        )
        return patterson
    # Over x from real values, so that planes 0 .. X / 2 are all there is to know; then y and z on those planes.
    half = torch.fft.ihfft(intensity, dim=1, norm="forward")
    half = torch.fft.ifft(half, dim=2, norm="forward")
    half = torch.fft.irfft(half, n=n_z, dim=3, norm="forward").contiguous()
    run_kernel(
        _native.C.mirror_map,
        intensity.device,
        n_maps=n_maps,
        n=(n_x, n_y, n_z),
        wide=intensity.dtype == torch.float64,
        half=half.data_ptr(),
        map=patterson.data_ptr(),
    )
    return patterson


for _device in ("CPU", "CUDA"):
    _library.impl("spectrum_intensity", _spectrum_intensity, _device)
    _library.impl("patterson_map", _patterson_map, _device)


def _intensity_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.rest = inputs[2:]


def _intensity_backward(ctx, grad):  # I = c |x|^2: dL/dx = 2 c x dL/dI; the filter conjugates
    spectrum, cells = ctx.saved_tensors
    *rest, n_kept = ctx.rest
    grad = torch.nn.functional.pad(grad, (0, spectrum.shape[3] - n_kept))
    return torch.ops.xtalfast.filter_spectrum((2 * grad * spectrum).conj(), cells, *rest, 0.0), *[None] * 7


def _patterson_context(ctx, inputs, output):
    ctx.n_z, ctx.n_kept = inputs[1], inputs[0].shape[3]


def _patterson_backward(ctx, grad):  # P is linear in I: dL/dI = sum_u dL/dP cos(2 pi h.u), twice where -h is not stored
    by_intensity = torch.fft.rfftn(grad, dim=(1, 2, 3)).real
    last = (ctx.n_z + 1) // 2
    doubled = torch.cat([by_intensity[..., :1], 2 * by_intensity[..., 1:last], by_intensity[..., last:]], -1)
    return doubled[..., : ctx.n_kept].contiguous(), None


torch.library.register_autograd(
    "xtalfast::spectrum_intensity", _intensity_backward, setup_context=_intensity_context, lib=_library
)
torch.library.register_autograd(
    "xtalfast::patterson_map", _patterson_backward, setup_context=_patterson_context, lib=_library
)


def _multiplicity(intensity: Tensor, n_z: int) -> Tensor:
    """Reflections that each plane l of a half spectrum stands for: 1 where it holds h and -h, else 2; float64."""
    weight = torch.full((intensity.shape[-1],), 2.0, dtype=torch.float64, device=intensity.device)
    weight[0] = 1
    if intensity.shape[-1] == n_z / 2 + 1:
        weight[-1] = 1
    return weight


def _shell_means(intensity: Tensor, s2: Tensor, used: Tensor, n_z: int) -> Tensor:
    """Mean intensity of the reflections of the same resolution, for every reflection: shells of equal volume."""
    weight = _multiplicity(intensity, n_z)
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
        remove_origin: subtract from |F|^2 its mean at the same resolution, which takes the origin peak away: P(0) = 0.
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
        if given_f:
            z, spectrum, scale, power = full_n_z(batch, n_z), batch, 1.0, -1  # |F|^2 / V
        else:
            z, spectrum = batch.shape[3], torch.fft.rfftn(batch, dim=(1, 2, 3))
            scale, power = 1 / math.prod(batch.shape[1:]) ** 2, 1  # |V / N x sum|^2 / V
        n = (batch.shape[1], batch.shape[2], z)
        limit = sphere(batch_cells, n, d_min)
        n_kept = z // 2 + 1
        if d_min is not None and not torch.compiler.is_compiling():  # what lies beyond the sphere is not transformed
            n_kept = min(n_kept, int(batch_cells[:, 2].max() / d_min) + 1) if len(batch) else n_kept
        op = torch.ops.xtalfast.spectrum_intensity
        intensity = op(spectrum, batch_cells, z, scale, power, limit, f000, n_kept)
        if sharpen or remove_origin:
            intensity = _normalise(intensity, batch_cells, n, limit, f000, sharpen, remove_origin)
        return torch.ops.xtalfast.patterson_map(intensity, z)

    return by_grid(density_or_f, cells, transform)


def _normalise(intensity, cells, n, limit, f000, sharpen, remove_origin) -> Tensor:
    """Intensities over, or less, their mean at the same resolution; the means are taken as constants."""
    n_kept = intensity.shape[3]
    inside = inside_sphere(cells, n, limit, f000)[..., :n_kept]
    weight = _multiplicity(intensity, n[2])

    def total(values: Tensor) -> Tensor:
        return (values.detach() * weight).sum((1, 2, 3), keepdim=True)

    def scaled_to(wanted: Tensor, values: Tensor) -> Tensor:
        sums = total(values)
        return values * torch.where(sums > 0, total(wanted) / sums, 0.0).to(values.dtype)

    means = _shell_means(intensity.detach(), inverse_d2(cells, *n)[..., :n_kept], inside, n[2])
    if sharpen:
        squared_e = torch.where(means > 0, intensity / torch.where(means > 0, means, 1.0), 0.0)
        intensity, means = scaled_to(intensity, squared_e), inside.to(intensity.dtype)
    return intensity - scaled_to(intensity, means) if remove_origin else intensity  # their sums agree: P(0) is 0
