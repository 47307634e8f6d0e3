"""Batches of trials from random phases in P1: the loop of the dual-space solver, and its truth-free call of success."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from xtalfast.phasing import paired
from xtalfast.phasing.paired import PairedAmplitudes
from xtalfast.phasing.projections import Amplitudes
from xtalfast.phasing.updates import UPDATES

Clock = Callable[[], float]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SearchOptions:
    """How trials are run; the defaults were chosen on fragments that are in no test set.

    Attributes:
        method: one of `UPDATES`.
        beta: its relaxation; None for the usual one.
        solvent: fractions of the cell that trials take as solvent, one after the other.
        radius: of the local density, A.
        iterations, short_trials, later_iterations: the first trials are short and find what is easy, at moderate
            resolution; the later ones are longer and, when there are data, go further.
        batch: trials that run together.
        check_every: iterations between two looks at R.
        mask_every: iterations between two masks.
        polish: cycles of solvent flipping and flattening after a trial.
        r_promising: a trial whose R falls below this fraction of the R of random phases is polished at once.
        r_free_solved, r_solved: a polished map is called solved when its R_free is below the one, and its R below the
            other times the R of trials that have not converged. R_free alone rests on a hundred reflections in small
            cells, and thousands of trials look at them.
    """

    method: str = "hio"
    beta: float | None = None
    solvent: tuple[float, ...] = (0.65, 0.60, 0.70, 0.75, 0.65, 0.60, 0.55, 0.65)
    radius: float = 3.0
    iterations: int = 300
    short_trials: int = 64
    later_iterations: int = 800
    batch: int = 8
    check_every: int = 50
    mask_every: int = 8
    polish: int = 20
    r_promising: float = 0.7
    r_free_solved: float = 0.28
    r_solved: float = 0.8


@dataclass
class Trial:
    """A map [X, Y, Z] with the measured amplitudes and what is known about it without truth."""

    map: Tensor
    protein: Tensor
    r: float
    r_free: float
    solvent: float
    solved: bool = False


@dataclass
class SearchResult:
    """The best trial, and how the search went.

    Attributes:
        best: the trial with the lowest R_free after polishing.
        n_starts: trials begun.
        iterations: of all trials together.
        seconds: wall time.
        history: one row a look: seconds, trial, iteration, solvent, R.
    """

    best: Trial
    n_starts: int
    iterations: int
    seconds: float
    history: list[tuple[float, int, int, float, float]] = field(default_factory=list)


def random_maps(amplitudes: Amplitudes, n: int, generator: torch.Generator) -> Tensor:
    """Maps [n, X, Y, Z] with the measured amplitudes and uniformly random phases."""
    noise = torch.randn((n, *amplitudes.grid.shape), generator=generator).to(amplitudes.values.device)
    spectrum = amplitudes.grid.to_spectrum(noise)
    return amplitudes.grid.to_map(torch.where(amplitudes.bound, amplitudes.impose(spectrum), 0))


def polish(
    amplitudes: Amplitudes,
    maps: Tensor,
    solvent: Tensor,
    options: SearchOptions,
) -> list[Trial]:
    """Solvent flipping, then flattening until nothing moves; the trials with their R and R_free."""
    data = PairedAmplitudes(amplitudes, options.radius)
    n = len(maps)
    if n % 2:
        maps, solvent = torch.cat([maps, maps[-1:]]), torch.cat([solvent, solvent[-1:]])
    pairs = paired.join(maps)
    for cycle in range(options.polish):
        protein = data.protein_mask(pairs, solvent)
        flip = 0.5 if cycle < options.polish // 2 else 0.0
        pairs = data.project(paired.flatten_(pairs, protein, flip))
    protein = data.protein_mask(pairs, solvent)
    maps, inside = paired.split(pairs), paired.split(protein)
    r, r_free = amplitudes.r_factors(paired.split(paired.flatten_(pairs, protein)))
    return [
        Trial(
            maps[i],
            inside[i],
            float(r[i]),
            float(r_free[i]),
            float(solvent[i]),
            bool(r_free[i] < options.r_free_solved and r[i] < options.r_solved * reference_r(solvent[i])),
        )
        for i in range(n)
    ]


def search(
    amplitudes: Amplitudes,
    options: SearchOptions,
    *,
    starts: int | None,
    max_seconds: float,
    seed: int,
    clock: Clock = time.monotonic,
    progress: Progress | None = None,
) -> SearchResult:
    """Run trials until one is solved, `starts` are used up, or the time is.

    Args:
        amplitudes: the measured data; a held-out part is what success is called by.
        options: how trials are run.
        starts: trials at most; None for as many as the time allows.
        max_seconds: wall time at most; the trial in flight stops at its next look.
        clock: what seconds are counted by.
        seed: of the random phases. With `starts` and enough time the result depends on nothing else.
        progress: called as progress("starts", done, total).
    """
    data = PairedAmplitudes(amplitudes, options.radius)
    update, usual_beta = UPDATES[options.method]
    if options.method == "hio":
        update = paired.hio_
    beta = usual_beta if options.beta is None else options.beta
    generator = torch.Generator().manual_seed(seed)
    begin = clock()
    best: Trial | None = None
    history: list[tuple[float, int, int, float, float]] = []
    n_starts = iterations = 0

    def consider(trials: Sequence[Trial]) -> None:
        nonlocal best
        for trial in trials:
            if best is None or trial.r_free < best.r_free:
                best = trial

    def out_of_time() -> bool:
        return clock() - begin > max_seconds

    while (best is None or not best.solved) and not out_of_time() and (starts is None or n_starts < starts):
        n = options.batch if starts is None else min(options.batch, starts - n_starts)
        fractions = [options.solvent[(n_starts + i) % len(options.solvent)] for i in range(n)]
        # An odd trial gets a companion that is not looked at.
        solvent = torch.tensor(fractions + fractions[-1:] * (n % 2))
        pairs = paired.join(random_maps(amplitudes, len(solvent), generator))
        tried = torch.zeros(n, dtype=torch.bool)
        for iteration in range(options.iterations):
            projected = data.project(pairs)
            if iteration % options.mask_every == 0:
                protein = data.protein_mask(projected, solvent)
            if (iteration + 1) % options.check_every == 0:
                maps = paired.split(projected)[:n]
                flat = paired.split(paired.flatten_(projected.clone(), protein))[:n]
                r = amplitudes.r_factors(flat)[0].cpu()
                elapsed = clock() - begin
                history += [(elapsed, n_starts + i, iteration + 1, fractions[i], float(r[i])) for i in range(n)]
                # R falls with the fraction taken as protein, so a trial is held against trials of its own kind.
                promising = torch.nonzero((r < options.r_promising * reference_r(solvent[:n])) & ~tried)[:, 0]
                if len(promising):
                    tried[promising] = True
                    consider(polish(amplitudes, maps[promising], solvent[promising], options))
                if (best is not None and best.solved) or out_of_time():
                    break
            pairs = update(pairs, projected, protein, data, beta)
        iterations += n * (iteration + 1)
        n_starts += n
        if best is None or not best.solved:
            consider(polish(amplitudes, paired.split(data.project(pairs))[:n], solvent[:n], options))
        if progress is not None:
            progress("starts", n_starts, n_starts if starts is None else starts)
    assert best is not None  # the loop runs at least once
    return SearchResult(best, n_starts, iterations, clock() - begin, history)


def reference_r(solvent: Tensor) -> Tensor:
    """R of trials that have not converged, as it was found to depend on the fraction taken as solvent."""
    return 0.115 + 0.65 * (solvent - 0.55)
