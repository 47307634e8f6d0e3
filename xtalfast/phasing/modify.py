"""Density modification: improve given phases by what is known of protein density, and say how good they became."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import gemmi
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from xtalfast.errors import InputError
from xtalfast.phasing.data import Measured, measured, sim_weights
from xtalfast.phasing.fourier import FourierGrid
from xtalfast.phasing.histogram import match_histogram, reference_quantiles
from xtalfast.phasing.mask import protein_mask
from xtalfast.phasing.projections import Amplitudes, flatten_solvent
from xtalfast.phasing.symmetry import expand_to_p1
from xtalfast.phasing.weights import concentration, figure_of_merit, phase_concentration, shell_numbers

logger = logging.getLogger(__name__)

MODIFY_RATE = 2.5
HELD_OUT = 0.05
SOLVENT_TRIALS = (0.40, 0.50, 0.60, 0.70, 0.80)
TRIAL_CYCLES = 10
# Between the R_free of fragments that are right (0.25 at most) and of those that are not (0.39 at least).
R_FREE_TRUSTED = 0.3
SCHEMES = ("imposed", "weighted", "both")


@dataclass(frozen=True)
class ModifyOptions:
    """What is done to the density in every cycle.

    Attributes:
        scheme: "imposed", "weighted", "both" (the first after the second), or None: what held-out amplitudes
            speak for. "imposed" takes full amplitudes and empty solvent, and leads to nearly perfect phases where
            that is true and there is much of it; "weighted" takes amplitudes times figure of merit, solvent at its
            mean level, and combines new phases with the starting ones.
        cycles, weighted_cycles: of the two schemes.
        radius: of the local density that the mask is drawn from, A; in the weighted scheme at the end.
        first_radius: of the weighted scheme at the start, A: an envelope of poor phases must be smoother.
        flip: imposed: the solvent is multiplied by -flip in the first half of the cycles, and by 0 in the second.
        histogram: imposed: match the protein's density to `reference_quantiles` in every cycle, by this weight.
        trust: weighted: part of what a cycle claims to know that is taken as independent of the cycles before it.
        default_fom: of starting phases that come without figures of merit, in the weighted scheme.
    """

    scheme: str | None = None
    cycles: int = 60
    weighted_cycles: int = 30
    radius: float = 3.0
    first_radius: float = 6.0
    flip: float = 0.5
    histogram: float = 0.5
    trust: float = 0.7
    default_fom: float = 0.5


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
        scheme: which of `SCHEMES` was used, or what else the phases come from.
        cell, space_group, d_min: of the data used.
        change: mean |change of phase| from the start, degrees.
    """

    hkl: NDArray[np.int64]
    F: NDArray[np.complex128]
    fom: NDArray[np.float64]
    rows: NDArray[np.int64]
    r: float
    solvent: float
    scheme: str
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
    quantiles: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cycles that impose full amplitudes: batched, on any device, differentiable (the mask is held constant).

    Args:
        spectrum: starting map coefficients [B, X, Y, Z // 2 + 1], conj(F) / V.
        amplitudes: the measured ones.
        solvent: fraction of the cell, [B].
        options: of the cycles.
        quantiles: of protein density in units of its standard deviation [Q], for histogram matching.

    Returns:
        the final spectrum with measured amplitudes, and the spectrum of the last modified map; both like `spectrum`.
    """
    grid = amplitudes.grid
    current = modified = amplitudes.impose(spectrum)
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
    return current, modified


def modify_weighted(
    spectrum: Tensor,
    amplitudes: Amplitudes,
    solvent: Tensor,
    options: ModifyOptions,
    *,
    fom: Tensor,
    centric: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cycles that weight every phase by its figure of merit and never forget the starting ones; otherwise the same.

    Solvent is set to its mean level, protein below that level raised to it, and what the new map inherits from the old
    one (gamma times it) is taken out, so that the rest is independent of the starting phases and can be combined with
    them.

    Args:
        spectrum: starting phases [B, X, Y, Z // 2 + 1]; only phases count.
        amplitudes, solvent, options: as for `modify_spectrum`.
        fom: figures of merit of the starting phases, [X, Y, Z // 2 + 1].
        centric: bool [X, Y, Z // 2 + 1].

    Returns:
        the final spectrum (measured amplitudes), the last independent spectrum, and figures of merit [B, ...].

    Ref: Abrahams (1997) Acta Cryst. D53, 371 (gamma correction); Read (1986) Acta Cryst. A42, 140.
    """
    grid = amplitudes.grid
    weights = grid.weights * amplitudes.bound
    shells = shell_numbers(grid.s2, amplitudes.bound)
    start = _phases(spectrum) * concentration(fom, centric)
    combined, merit = start, fom.expand_as(spectrum.real)
    independent = spectrum
    for cycle in range(options.weighted_cycles):
        maps = grid.to_map(_phases(combined) * (merit * amplitudes.values))
        share = cycle / max(options.weighted_cycles - 1, 1)
        radius = options.first_radius + share * (options.radius - options.first_radius)
        protein = protein_mask(maps.detach(), grid, solvent, radius)
        level = ((maps * ~protein).sum((1, 2, 3)) / (~protein).sum((1, 2, 3)).clamp_min(1)).view(-1, 1, 1, 1)
        passed = protein & (maps > level)
        gamma = passed.to(maps.dtype).mean((1, 2, 3)).view(-1, 1, 1, 1)
        independent = grid.to_spectrum((torch.where(passed, maps, level) - gamma * maps) / (1 - gamma))
        calculated = independent.real.square().add(independent.imag.square()).clamp_min(1e-30).sqrt()
        worth = options.trust * phase_concentration(amplitudes.values, calculated, weights, shells, centric)
        combined = start + _phases(independent) * worth
        merit = figure_of_merit(combined.abs(), centric) * amplitudes.bound
    return _phases(combined) * amplitudes.values, independent, merit


def _phases(spectrum: Tensor) -> Tensor:
    """The same with all moduli 1 (0 where there is nothing)."""
    squared = spectrum.real.square() + spectrum.imag.square()
    return spectrum * squared.clamp_min(1e-30).rsqrt()


@dataclass(frozen=True)
class _Start:
    """Starting phases on a grid: spectrum, figures of merit, centric reflections, quantiles of protein density."""

    spectrum: Tensor
    fom: Tensor
    centric: Tensor
    quantiles: Tensor | None


def _run(
    scheme: str, start: _Start, amplitudes: Amplitudes, fractions: Tensor, options: ModifyOptions
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Final and modified spectra [B, ...] of a scheme with B solvent fractions; its own figures of merit, if any."""
    spectra = torch.where(amplitudes.bound, start.spectrum, 0).expand(len(fractions), *start.spectrum.shape)
    merit = None
    if scheme != "imposed":
        fom = start.fom * amplitudes.bound
        final, modified, merit = modify_weighted(
            spectra, amplitudes, fractions, options, fom=fom, centric=start.centric
        )
        if scheme == "weighted":
            return final, modified, merit
        spectra = torch.where(amplitudes.bound, final, 0)
    return *modify_spectrum(spectra, amplitudes, fractions, options, quantiles=start.quantiles), None


def choose(
    start: _Start, amplitudes: Amplitudes, options: ModifyOptions, solvent: float | None
) -> tuple[str, float, float]:
    """The scheme and solvent fraction after which held-out amplitudes are predicted best, and their R_free.

    Full amplitudes are imposed only if that ends in a low R_free: wrong phases look better under it than they are.

    Args:
        start: what to start from.
        amplitudes: with some held out.
        options: of the cycles; its scheme, if not None, is the only one tried.
        solvent: the only fraction tried, if not None.
    """
    schemes = SCHEMES if options.scheme is None else (options.scheme,)
    fractions = {scheme: solvent for scheme in schemes}

    def predicted(scheme: str, fraction: float, cycles: ModifyOptions) -> float:
        _, modified, _ = _run(scheme, start, amplitudes, torch.tensor([fraction]), cycles)
        return float(amplitudes.r_factors(amplitudes.grid.to_map(modified))[1])

    if solvent is None:
        short = replace(options, cycles=TRIAL_CYCLES, weighted_cycles=TRIAL_CYCLES)
        for scheme in schemes:
            fractions[scheme] = min((predicted(scheme, trial, short), trial) for trial in SOLVENT_TRIALS)[1]
    results = [(predicted(s, f, options), s, f) for s, f in fractions.items() if f is not None]
    trusted = [result for result in results if result[0] < R_FREE_TRUSTED]
    weighted = [result for result in results if result[1] == "weighted"]
    r_free, scheme, fraction = min(trusted or weighted or results)
    return scheme, fraction, r_free


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
    if chosen.scheme is not None and chosen.scheme not in SCHEMES:
        raise InputError(f"scheme must be one of {', '.join(SCHEMES)}, got {chosen.scheme!r}")
    merits = np.full(len(data.F), chosen.default_fom) if fom is None else np.asarray(fom, np.float64)[data.rows]
    phases_given = data.F * np.exp(1j * np.radians(angles[data.rows]))
    grid = data.grid(data.d_min, MODIFY_RATE, device)
    centric = data.space_group.operations().centric_flag_array(np.ascontiguousarray(data.hkl, np.int32))
    start = _Start(
        _on_grid(data, grid, phases_given),
        _on_grid(data, grid, merits).real * data.cell.volume,
        _on_grid(data, grid, np.asarray(centric, np.float64)).real > 0,
        reference_quantiles(data.d_min).to(device) if chosen.histogram > 0 else None,
    )
    with torch.no_grad():
        scheme, fraction, r_free = choose(start, data.amplitudes(grid, data.hold_out(HELD_OUT, 0)), chosen, solvent)
        amplitudes = data.amplitudes(grid)
        final, flat, merit = _run(scheme, start, amplitudes, torch.tensor([fraction]), chosen)
    r, _ = amplitudes.r_factors(grid.to_map(flat))
    found, model = (grid.gather(s[0], data.hkl).cpu().numpy().astype(np.complex128) for s in (final, flat))
    new = data.F * np.exp(1j * np.angle(found))
    d = np.asarray(data.cell.calculate_d_array(np.ascontiguousarray(data.hkl, np.int32)))
    change = float(np.degrees(abs(np.angle(new * phases_given.conj()))).mean())
    logger.info(
        "density modification: %s, solvent %.2f, R %.3f, R_free of the choice %.3f, phases moved by %.1f degrees",
        scheme,
        fraction,
        float(r[0]),
        r_free,
        change,
    )
    if merit is None:
        weights = sim_weights(data.F, abs(model), d)
    else:
        weights = grid.gather(merit[0].to(torch.complex64), data.hkl).real.cpu().numpy() / data.cell.volume
    return Modified(
        hkl=data.hkl,
        F=new,
        fom=weights,
        rows=data.rows,
        r=float(r[0]),
        solvent=fraction,
        scheme=scheme,
        cell=data.cell,
        space_group=data.space_group,
        d_min=data.d_min,
        change=change,
    )


def _on_grid(data: Measured, grid: FourierGrid, values: NDArray) -> Tensor:
    """Structure factors [N] of the asymmetric unit, expanded to P1, on the half spectrum."""
    hkl, expanded, _ = expand_to_p1(data.hkl, values, data.space_group)
    return grid.scatter(hkl, torch.from_numpy(expanded).to(torch.complex64))[0]
