"""Trials in pairs: two real maps are the real and the imaginary part of one complex map, and share its transforms.

On CPUs a complex transform of a pair takes about a third of the time of two real ones, and the passes in between
(`csrc/dual_space.cpp`) read and write every voxel once. Elsewhere they are plain torch, which is also their definition.

A map of pairs is [P, X, Y, Z, 2]: voxel by voxel the two members. What acts on voxels alone (flattening, `UPDATES`)
takes it as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xtalfast import _native
from xtalfast.phasing.fourier import FourierGrid
from xtalfast.phasing.mask import sampling_step, smoothing
from xtalfast.phasing.projections import Amplitudes, flatten_solvent
from xtalfast.phasing.updates import Projector, hio

_AXES = (1, 2, 3)


def join(maps: Tensor) -> Tensor:
    """Maps [2 P, X, Y, Z] -> pairs [P, X, Y, Z, 2], contiguous; maps 2 i and 2 i + 1 make a pair."""
    return torch.stack([maps[0::2], maps[1::2]], -1)


def split(pairs: Tensor) -> Tensor:
    """Pairs [P, X, Y, Z, 2] -> maps [2 P, X, Y, Z]."""
    return pairs.permute(0, 4, 1, 2, 3).flatten(0, 1).contiguous()


def full_spectrum(half: Tensor, n_z: int) -> Tensor:
    """A real function of the reflections, equal at h and -h, on the half spectrum -> on the whole one, [X, Y, Z]."""
    rest = half[..., 1 : (n_z + 1) // 2].flip((-3, -2, -1)).roll((1, 1), (-3, -2))
    return torch.cat([half, rest], -1)


def impose_reference(spectrum: Tensor, target: Tensor) -> Tensor:
    """Spectra of pairs [P, X, Y, Z] with the modulus `target` given to both members where it is not negative.

    With C(h) = conj S(-h) the members are F1 = (S + C) / 2 and F2 = (S - C) / 2i.
    """
    mirrored = spectrum.flip(_AXES).roll((1, 1, 1), _AXES).conj()
    parts = []
    for member in ((spectrum + mirrored) / 2, (spectrum - mirrored) / 2):
        squared = member.real.square() + member.imag.square()
        parts.append(torch.where(target < 0, member, member * (target * squared.clamp_min(2.5e-31).rsqrt())))
    return parts[0] + parts[1]


def _on_cpu(tensor: Tensor) -> bool:
    return _native.C is not None and tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.complex64)


class PairedAmplitudes:
    """What a search asks of `Amplitudes` and of masks, for pairs.

    Attributes:
        amplitudes: the same for single maps.
        grid: theirs.
    """

    def __init__(self, amplitudes: Amplitudes, radius: float) -> None:
        """`radius` is that of the local density, A."""
        self.amplitudes = amplitudes
        self.grid: FourierGrid = amplitudes.grid
        n_z = self.grid.shape[2]
        half = torch.where(amplitudes.bound, amplitudes.values, -self.grid.inside.to(amplitudes.values.dtype))
        half = torch.where(half == 0, torch.where(amplitudes.bound, 1e-20, half), half)  # -0 and 0 alike: outside
        self._target = full_spectrum(half, n_z).contiguous()
        self._smooth = full_spectrum(smoothing(self.grid, radius), n_z).contiguous()

    def project(self, pairs: Tensor) -> Tensor:
        """The nearest pairs with the measured amplitudes."""
        if len(pairs) == 0:  # which MKL refuses
            return pairs
        spectrum = torch.fft.fftn(torch.view_as_complex(pairs), dim=_AXES, norm="forward")
        if _on_cpu(spectrum):
            _native.C.impose_on_pairs(
                values=spectrum.data_ptr(),
                target=self._target.data_ptr(),
                n_pairs=len(spectrum),
                n=self.grid.shape,
                n_threads=torch.get_num_threads(),
            )
        else:
            spectrum = impose_reference(spectrum, self._target)
        return torch.view_as_real(torch.fft.ifftn(spectrum, dim=_AXES, norm="forward"))

    def protein_mask(self, pairs: Tensor, solvent: Tensor) -> Tensor:
        """True in the protein, as `mask.protein_mask` has it; pairs [P, X, Y, Z, 2], solvent fractions [2 P]."""
        fast = _on_cpu(pairs)
        if fast:
            pairs = pairs.contiguous()
            squared = torch.empty_like(pairs)
            _native.C.square_positive(
                input=pairs.data_ptr(), out=squared.data_ptr(), n=pairs.numel(), n_threads=torch.get_num_threads()
            )
        else:
            squared = pairs.clamp_min(0).square()
        spectrum = torch.fft.fftn(torch.view_as_complex(squared), dim=_AXES, norm="forward")
        torch.view_as_real(spectrum).mul_(self._smooth[..., None])
        density = torch.view_as_real(torch.fft.ifftn(spectrum, dim=_AXES, norm="forward"))
        step = sampling_step(self.grid.n_voxels)
        if fast:
            fractions = solvent.to(torch.float32).contiguous()
            protein = torch.empty(density.shape, dtype=torch.bool)
            _native.C.threshold_pairs(
                density=density.data_ptr(),
                solvent=fractions.data_ptr(),
                protein=protein.data_ptr(),
                n_pairs=len(density),
                n_voxels=self.grid.n_voxels,
                step=step,
                n_threads=torch.get_num_threads(),
            )
            return protein
        sample = density.flatten(1, 3)[:, ::step]
        ranks = (solvent * sample.shape[1]).long().clamp(1, sample.shape[1]).view(-1, 2)
        thresholds = sample.sort(1).values.gather(1, (ranks - 1).to(sample.device)[:, None])[:, 0]
        return density > thresholds.view(-1, 1, 1, 1, 2)


def hio_(pairs: Tensor, projected: Tensor, protein: Tensor, amplitudes: Projector, beta: float) -> Tensor:
    """`updates.hio`, in place of `pairs`."""
    if not _on_cpu(pairs):
        return hio(pairs, projected, protein, amplitudes, beta)
    _native.C.hio_update(
        maps=pairs.data_ptr(),
        projected=projected.data_ptr(),
        protein=protein.data_ptr(),
        beta=beta,
        n=pairs.numel(),
        n_threads=torch.get_num_threads(),
    )
    return pairs


def flatten_(pairs: Tensor, protein: Tensor, flip: float = 0.0) -> Tensor:
    """`projections.flatten_solvent`, in place of `pairs`."""
    if not _on_cpu(pairs):
        return flatten_solvent(pairs, protein, flip)
    _native.C.flatten_pairs(
        maps=pairs.data_ptr(),
        protein=protein.data_ptr(),
        flip=flip,
        n=pairs.numel(),
        n_threads=torch.get_num_threads(),
    )
    return pairs
