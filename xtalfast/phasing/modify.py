"""Density modification: improve given phases by what is known of protein density, and say how good they became."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import gemmi
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from xtalfast.errors import InputError
from xtalfast.phasing.data import Measured, measured, sim_weights
from xtalfast.phasing.fourier import FourierGrid
from xtalfast.phasing.mask import protein_mask
from xtalfast.phasing.projections import Amplitudes, flatten_solvent
from xtalfast.phasing.symmetry import expand_to_p1

logger = logging.getLogger(__name__)

MODIFY_RATE = 2.5
HELD_OUT = 0.05
SOLVENT_TRIALS = (0.45, 0.55, 0.65, 0.75)
TRIAL_CYCLES = 10
N_QUANTILES = 64


@dataclass(frozen=True)
class ModifyOptions:
    """What is done to the density in every cycle.

    Attributes:
        cycles: of modification and recombination.
        radius: of the local density that the mask is drawn from, A.
        flip: the solvent is multiplied by -flip in the first half of the cycles, and by 0 in the second.
        histogram: match the protein's density to `reference_quantiles` in every cycle, by this weight (0 for none).
        recombine: weight of the starting phases (by their figures of merit) in the new ones.
    """

    cycles: int = 60
    radius: float = 3.0
    flip: float = 0.5
    histogram: float = 0.5
    recombine: float = 0.0


@dataclass(frozen=True)
class Modified:
    """Phases after density modification.

    Attributes:
        hkl: reflections, [N, 3].
        F: measured amplitudes with the new phases, complex [N].
        fom: figures of merit [N].
        rows: where the reflections stand in the arrays given, [N].
        r: R between the amplitudes of the last modified density and the measured ones.
        solvent: fraction of the cell taken as solvent.
        cell, space_group, d_min: of the data used.
        change: mean |change of phase| from the start, degrees.
    """

    hkl: NDArray[np.int64]
    F: NDArray[np.complex128]
    fom: NDArray[np.float64]
    rows: NDArray[np.int64]
    r: float
    solvent: float
    cell: gemmi.UnitCell
    space_group: gemmi.SpaceGroup
    d_min: float
    change: float


def modify_spectrum(
    spectrum: Tensor,
    amplitudes: Amplitudes,
    solvent: Tensor,
    options: ModifyOptions,
    *,
    fom: Tensor | None = None,
    quantiles: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The cycles themselves: batched, on any device, differentiable in the spectrum (the mask is held constant).

    Args:
        spectrum: starting map coefficients [B, X, Y, Z // 2 + 1], conj(F) / V.
        amplitudes: the measured ones.
        solvent: fraction of the cell, [B].
        options: of the cycles.
        fom: how far the starting phases are trusted in the recombination, [X, Y, Z // 2 + 1]; 1 if not given.
        quantiles: of protein density in units of its standard deviation [Q], for histogram matching.

    Returns:
        the final spectrum with measured amplitudes, and the spectrum of the last modified map; both like `spectrum`.
    """
    grid = amplitudes.grid
    start = amplitudes.impose(spectrum)
    if fom is not None:
        start = start * fom
    current = start
    modified = start
    for cycle in range(options.cycles):
        maps = grid.to_map(current)
        protein = protein_mask(maps.detach(), grid, solvent, options.radius)
        flip = options.flip if cycle < options.cycles // 2 else 0.0
        flat = flatten_solvent(maps, protein, flip)
        if quantiles is not None and options.histogram > 0:
            matched = match_histogram(maps, protein, quantiles)
            flat = torch.where(protein, (1 - options.histogram) * flat + options.histogram * matched, flat)
        modified = grid.to_spectrum(flat)
        current = amplitudes.impose(modified)
        if options.recombine > 0:
            current = amplitudes.impose(current + options.recombine * start)
    return current, modified


def match_histogram(maps: Tensor, protein: Tensor, quantiles: Tensor) -> Tensor:
    """Give the density inside the mask the distribution `quantiles` [Q] (at (i + 1/2) / Q), keeping its rms.

    Ref: Zhang & Main (1990) Acta Cryst. A46, 41.
    """
    result = maps
    for i, (density, inside) in enumerate(zip(maps, protein)):
        values = density[inside]
        ranks = values.detach().argsort().argsort().to(values.dtype)
        position = ((ranks + 0.5) / max(len(values), 1) * len(quantiles) - 0.5).clamp(0, len(quantiles) - 1)
        low = position.floor().long().clamp(max=len(quantiles) - 2)
        target = torch.lerp(quantiles[low], quantiles[low + 1], position - low)
        # Straight-through: the value of the target, the gradient of the density.
        scaled = target * (values.detach().square().mean().sqrt() / target.square().mean().sqrt())
        replaced = density.masked_scatter(inside, values + (scaled - values).detach())
        result = torch.cat([result[:i], replaced[None], result[i + 1 :]])
    return result


def reference_quantiles(d_min: float, b_iso: float = 20.0) -> Tensor:
    """Quantiles [N_QUANTILES] of protein density at d_min (A): the 20 residues, each in a cell half full."""
    from xtalfast.density.conformers import conformers

    samples = []
    for residue in conformers():
        extent = np.ptp(residue.coords, axis=0) + 4.0
        a, b, c = extent.tolist()
        cell = gemmi.UnitCell(a, b, c, 90, 90, 90)
        grid = FourierGrid.for_resolution(cell, d_min, rate=MODIFY_RATE)
        hkl = np.array(gemmi.make_miller_array(cell, gemmi.SpaceGroup("P 1"), d_min))
        s2 = torch.from_numpy(1 / cell.calculate_d_array(hkl) ** 2)
        phase = 2 * np.pi * torch.from_numpy(hkl @ (residue.coords / extent).T)
        electrons = torch.from_numpy(residue.element.astype(np.float64))
        # Point atoms with a Gaussian fall-off: the shape of the distribution is all that is used. 8 A^2 for the atom.
        F = (torch.exp(1j * phase) @ electrons.to(torch.complex128)) * torch.exp(-(b_iso + 8.0) / 4 * s2)
        maps = grid.to_map(grid.scatter(hkl, F.to(torch.complex64))[0])[None]
        inside = protein_mask(maps, grid, torch.tensor([0.5]), ModifyOptions().radius)
        values = maps[inside].clamp_min(0)
        samples.append(values / values.square().mean().sqrt())
    values = torch.cat(samples)
    at = (torch.arange(N_QUANTILES) + 0.5) / N_QUANTILES
    return torch.quantile(values, at)


def estimate_solvent(spectrum: Tensor, amplitudes: Amplitudes, options: ModifyOptions) -> float:
    """The solvent fraction after which held-out amplitudes are predicted best, out of SOLVENT_TRIALS and midway."""
    short = ModifyOptions(cycles=TRIAL_CYCLES, radius=options.radius, flip=options.flip)
    fractions = torch.tensor(SOLVENT_TRIALS)
    spectra = torch.where(amplitudes.bound, spectrum, 0).expand(len(fractions), *spectrum.shape)
    with torch.no_grad():
        _, modified = modify_spectrum(spectra, amplitudes, fractions, short)
    _, r_free = amplitudes.r_factors(amplitudes.grid.to_map(modified))
    return float(fractions[int(r_free.argmin())])


def density_modify(
    F: ArrayLike,
    phases: ArrayLike,
    hkl: ArrayLike,
    cell: gemmi.UnitCell | tuple[float, ...],
    spacegroup: gemmi.SpaceGroup | str = "P 1",
    d_min: float | None = None,
    *,
    fom: ArrayLike | None = None,
    solvent: float | None = None,
    options: ModifyOptions | None = None,
    device: torch.device | str = "cpu",
) -> Modified:
    """Improve phases by flat solvent, positive protein and, if wanted, the histogram of protein density.

    Args:
        F: measured amplitudes [N], any scale.
        phases: to start from, degrees [N].
        hkl: indices [N, 3], each reflection of the asymmetric unit once.
        cell: A, degrees.
        spacegroup: gemmi's or a Hermann-Mauguin name.
        d_min: resolution limit, A; all data if not given.
        fom: figures of merit of the starting phases [N]; 1 if not given.
        solvent: fraction of the cell; chosen by R_free if not given.
        options: of the cycles.
        device: where to compute.

    Returns:
        Modified: measured amplitudes with new phases, and figures of merit.

    Raises:
        InputError: data, cell, symmetry or settings that cannot be used.

    Ref: Wang (1985) Methods Enzymol. 115, 90 (solvent flattening); Abrahams & Leslie (1996) Acta Cryst. D52, 30.
    """
    chosen = options or ModifyOptions()
    data = measured(F, hkl, cell, spacegroup, d_min)
    angles = np.asarray(phases, np.float64)
    if angles.shape != np.shape(F) or not np.isfinite(angles[data.rows]).all():
        raise InputError(f"phases must be [{len(np.asarray(F))}] and finite, in degrees, got {list(angles.shape)}")
    if solvent is not None and not 0.05 <= solvent <= 0.97:
        raise InputError(f"solvent must be a fraction of the cell between 0.05 and 0.97, got {solvent}")
    merits = np.ones(len(data.F)) if fom is None else np.asarray(fom, np.float64)[data.rows]
    start = data.F * np.exp(1j * np.radians(angles[data.rows]))
    grid = data.grid(data.d_min, MODIFY_RATE, device)
    spectrum, _ = _on_grid(data, grid, start)
    if solvent is None:
        solvent = estimate_solvent(spectrum, data.amplitudes(grid, data.hold_out(HELD_OUT, 0)), chosen)
    amplitudes = data.amplitudes(grid)
    weight, _ = _on_grid(data, grid, merits)
    quantiles = reference_quantiles(data.d_min).to(device) if chosen.histogram > 0 else None
    with torch.no_grad():
        final, flat = modify_spectrum(
            spectrum[None],
            amplitudes,
            torch.tensor([solvent]),
            chosen,
            fom=weight.real * data.cell.volume,
            quantiles=quantiles,
        )
    r, _ = amplitudes.r_factors(grid.to_map(flat))
    found, model = (grid.gather(s[0], data.hkl).cpu().numpy().astype(np.complex128) for s in (final, flat))
    new = data.F * np.exp(1j * np.angle(found))
    d = np.asarray(data.cell.calculate_d_array(np.ascontiguousarray(data.hkl, np.int32)))
    change = float(np.degrees(abs(np.angle(new * start.conj()))).mean())
    logger.info(
        "density modification: solvent %.2f, R %.3f, phases moved by %.1f degrees", solvent, float(r[0]), change
    )
    return Modified(
        hkl=data.hkl,
        F=new,
        fom=sim_weights(data.F, abs(model), d),
        rows=data.rows,
        r=float(r[0]),
        solvent=solvent,
        cell=data.cell,
        space_group=data.space_group,
        d_min=data.d_min,
        change=change,
    )


def _on_grid(data: Measured, grid: FourierGrid, values: NDArray) -> tuple[Tensor, Tensor]:
    """Structure factors [N] of the asymmetric unit, expanded to P1, on the half spectrum."""
    hkl, expanded, _ = expand_to_p1(data.hkl, values, data.space_group)
    return grid.scatter(hkl, torch.from_numpy(expanded).to(torch.complex64))
