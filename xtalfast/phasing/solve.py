"""Phases from amplitudes alone: trials at moderate resolution, extension to all data, origin and hand by symmetry.

`solved` is called without truth, by R_free: the R between the amplitudes of the flattened density and a held-out part
of the measured ones. `recovered` (map CC > 0.8 to a known truth) and `refined` (density modification succeeded) are
other words for other things; see docs/phasing.md.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import gemmi
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from xtalfast.errors import InputError
from xtalfast.phasing.data import Measured, measured
from xtalfast.phasing.fourier import FourierGrid
from xtalfast.phasing.hand import Hand
from xtalfast.phasing.mask import protein_mask
from xtalfast.phasing.place import place
from xtalfast.phasing.projections import Amplitudes, flatten_solvent
from xtalfast.phasing.search import Clock, Progress, SearchOptions, SearchResult, Trial, polish, search
from xtalfast.phasing.updates import UPDATES

logger = logging.getLogger(__name__)

# Trials cost less at moderate resolution, where the envelope is what they search for; the hard cases, with little
# solvent, need more data. Fewer still (2.5 A) find less.
SEARCH_D_MIN, LATER_D_MIN = 2.0, 1.75
# Below two samples per d_min the sphere of reflections does not fit on the grid.
SEARCH_RATE, FULL_RATE = 2.0, 2.5
HELD_OUT = 0.05
LAST_CYCLES = 10


@dataclass(frozen=True)
class Solution:
    """Phases found, and how far they are to be believed.

    Attributes:
        hkl: reflections phased, [N, 3]: those of the data with d >= d_min.
        F: measured amplitudes with the phases found, complex [N].
        F_inverse: the same for the other hand.
        fom: figures of merit [N].
        rows: where the reflections stand in the arrays given, [N].
        cell, space_group, d_min: of the data used.
        solved: called without truth.
        r, r_free: R between the amplitudes of the flattened density and the measured ones, in the search and held out.
        hand: which hand F has, how that was decided and how sure it is.
        symmetry_score: how well the P1 density obeys the space group, 1 at best; NaN in P1.
        solvent: fraction of the cell taken as solvent.
        n_starts, iterations, seconds: what it cost.
        history: (seconds, trial, iteration, solvent, R) for every look at a trial.
        parameters: all settings.
    """

    hkl: NDArray[np.int64]
    F: NDArray[np.complex128]
    F_inverse: NDArray[np.complex128]
    fom: NDArray[np.float64]
    rows: NDArray[np.int64]
    cell: gemmi.UnitCell
    space_group: gemmi.SpaceGroup
    d_min: float
    solved: bool
    r: float
    r_free: float
    hand: Hand
    symmetry_score: float
    solvent: float
    n_starts: int
    iterations: int
    seconds: float
    history: list[tuple[float, int, int, float, float]] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The verdict, figures and settings as plain values (no arrays)."""
        return {
            "solved": self.solved,
            "R": self.r,
            "R_free": self.r_free,
            "hand": {
                "choice": self.hand.choice,
                "decided_by": self.hand.decided_by,
                "confidence": self.hand.confidence,
            },
            "symmetry_score": None if np.isnan(self.symmetry_score) else self.symmetry_score,
            "solvent": self.solvent,
            "mean_fom": float(self.fom.mean()),
            "n_reflections": len(self.hkl),
            "d_min": self.d_min,
            "cell": list(self.cell.parameters),
            "space_group": self.space_group.xhm(),
            "n_starts": self.n_starts,
            "iterations": self.iterations,
            "seconds": round(self.seconds, 3),
            "parameters": self.parameters,
            "history": [dict(zip(("seconds", "start", "iteration", "solvent", "R"), row)) for row in self.history],
        }


def solvent_ladder(solvent: float | None) -> tuple[float, ...]:
    """Solvent fractions that trials take in turn: around the given one, or over what crystals have.

    The mask that converges best leaves a little more room for the protein than its volume, so the ladder lies below.
    """
    if solvent is None:
        return SearchOptions().solvent
    if not 0.05 <= solvent <= 0.97:
        raise InputError(f"solvent must be a fraction of the cell between 0.05 and 0.97, got {solvent}")
    return tuple(min(0.95, max(0.03, solvent + shift)) for shift in (-0.04, 0.0, -0.08, -0.02))


def solve(
    F: ArrayLike,
    hkl: ArrayLike,
    cell: gemmi.UnitCell | tuple[float, ...],
    spacegroup: gemmi.SpaceGroup | str = "P 1",
    d_min: float | None = None,
    *,
    sigF: ArrayLike | None = None,
    solvent: float | None = None,
    starts: int | None = None,
    max_seconds: float = 60.0,
    seed: int = 0,
    options: SearchOptions | None = None,
    device: torch.device | str = "cpu",
    clock: Clock = time.monotonic,
    progress: Progress | None = None,
) -> Solution:
    """Find phases for measured amplitudes from random starts, with nothing known but the cell and the symmetry.

    Works where a good part of the cell is solvent (above about 60 %) and d_min is 2.5 A or better.

    Args:
        F: amplitudes [N], any scale.
        hkl: indices [N, 3], each reflection of the asymmetric unit once. Reflections inside d_min that are not listed
            are left free.
        cell: A, degrees.
        spacegroup: gemmi's or a Hermann-Mauguin name.
        d_min: resolution limit, A; all data if not given.
        sigF: standard deviations [N]; reflections measured below their own sigma are left free.
        solvent: fraction of the cell; if not given, trials run over a ladder of fractions.
        starts: trials at most; as many as the time allows if not given.
        max_seconds: time at most.
        seed: of the random phases and the held-out set.
        options: settings of the search, for method developers.
        device: where to compute; batches of starts run side by side there.
        clock: what seconds are counted by, e.g. time.process_time on a busy machine.
        progress: called as progress("starts", done, total).

    Returns:
        the Solution; look at `solved` before anything else.

    Raises:
        InputError: data, cell, symmetry or settings that cannot be used.
    """
    amplitudes_given = np.asarray(F, np.float64)
    index = np.asarray(hkl)
    data = measured(amplitudes_given, index, cell, spacegroup, d_min)
    if starts is not None and starts < 1:
        raise InputError(f"starts must be 1 or more, got {starts}")
    if not max_seconds > 0:
        raise InputError(f"max_seconds must be positive, got {max_seconds}")
    chosen = options or SearchOptions()
    if chosen.method not in UPDATES:
        raise InputError(f"method must be one of {', '.join(UPDATES)}, got {chosen.method!r}")
    if options is None or solvent is not None:
        chosen = replace(chosen, solvent=solvent_ladder(solvent))
    held_out = data.hold_out(HELD_OUT, seed)
    weak = None
    if sigF is not None:
        sigmas = np.asarray(sigF, np.float64)
        if sigmas.shape != amplitudes_given.shape or not (sigmas >= 0).all():
            raise InputError(f"sigF must be [{len(amplitudes_given)}] and not negative, got {list(sigmas.shape)}")
        weak = data.F < sigmas[data.rows]

    begin = clock()
    coarse, later = (
        data.amplitudes(data.grid(max(data.d_min, d), SEARCH_RATE, device, paired=True), held_out, weak)
        for d in (SEARCH_D_MIN, LATER_D_MIN)
    )
    fine = data.amplitudes(data.grid(data.d_min, FULL_RATE, device, paired=True), held_out, weak)
    found: SearchResult | None = None
    best: Trial | None = None
    n_starts = iterations = attempt = 0
    history: list[tuple[float, int, int, float, float]] = []
    while best is None or not best.solved:
        left = max_seconds - (clock() - begin)
        remaining = None if starts is None else starts - n_starts
        if found is not None and (left <= 0 or (remaining is not None and remaining <= 0)):
            break
        first = found is None
        amplitudes = coarse if first else later
        short = chosen.short_trials if remaining is None else min(chosen.short_trials, remaining)
        found = search(
            amplitudes,
            chosen if first else replace(chosen, iterations=chosen.later_iterations),
            starts=short if first else remaining,
            max_seconds=left,
            seed=seed + attempt,
            clock=clock,
            progress=progress,
        )
        history += [(s + max_seconds - left, n + n_starts, i, w, r) for s, n, i, w, r in found.history]
        n_starts += found.n_starts
        iterations += found.iterations
        attempt += 1
        extended = extend(found.best, amplitudes.grid, fine, data, chosen)
        if best is None or extended.r_free < best.r_free:
            best = extended
    assert best is not None
    logger.info(
        "%s: R %.3f, R_free %.3f, solvent %.2f, %d starts, %.1f s",
        "solved" if best.solved else "not solved",
        best.r,
        best.r_free,
        best.solvent,
        n_starts,
        clock() - begin,
    )
    return conclude(
        data,
        best,
        fine,
        chosen,
        n_starts=n_starts,
        iterations=iterations,
        seconds=lambda: clock() - begin,
        history=history,
        parameters={"starts": starts, "max_seconds": max_seconds, "seed": seed, "solvent_given": solvent},
    )


def conclude(
    data: Measured,
    best: Trial,
    fine: Amplitudes,
    options: SearchOptions,
    *,
    n_starts: int,
    iterations: int,
    seconds: Callable[[], float],
    history: list[tuple[float, int, int, float, float]],
    parameters: dict[str, Any],
) -> Solution:
    """Last cycles, origin, hand and figures of merit of a trial on the grid of all data."""
    spectrum, flat = last_cycles(data, best, fine.grid, options)
    phased = place(data, fine.grid, spectrum, flat)
    return Solution(
        hkl=data.hkl,
        F=phased.F,
        F_inverse=phased.F_inverse,
        fom=phased.fom,
        rows=data.rows,
        cell=data.cell,
        space_group=data.space_group,
        d_min=data.d_min,
        solved=best.solved,
        r=best.r,
        r_free=best.r_free,
        hand=phased.hand,
        symmetry_score=phased.symmetry_score,
        solvent=best.solvent,
        n_starts=n_starts,
        iterations=iterations,
        seconds=seconds(),
        history=history,
        parameters={**asdict(options), **parameters},
    )


def extend(trial: Trial, grid: FourierGrid, fine: Amplitudes, data: Measured, options: SearchOptions) -> Trial:
    """Carry a trial from the grid of the search to all data: its phases to start with, the rest found by polishing."""
    d = data.cell.calculate_d_array(np.ascontiguousarray(data.p1_hkl, np.int32))
    shared = data.p1_hkl[np.asarray(d) >= grid.d_min]
    spectrum, _ = fine.grid.scatter(shared, grid.gather(grid.to_spectrum(trial.map), shared))
    maps = fine.grid.to_map(torch.where(fine.bound, fine.impose(spectrum), 0))
    return polish(fine, maps[None], torch.tensor([trial.solvent]), options)[0]


def last_cycles(data: Measured, trial: Trial, grid: FourierGrid, options: SearchOptions) -> tuple[Tensor, Tensor]:
    """Cycles with all reflections imposed, the held-out ones too: the final spectrum and that of its flattened map."""
    everything = data.amplitudes(grid)
    maps, solvent = trial.map[None], torch.tensor([trial.solvent])
    for _ in range(LAST_CYCLES):
        protein = protein_mask(maps, grid, solvent, options.radius)
        maps = everything.project(flatten_solvent(maps, protein))
    flat = flatten_solvent(maps, protein_mask(maps, grid, solvent, options.radius))
    return grid.to_spectrum(maps[0]), grid.to_spectrum(flat[0])
