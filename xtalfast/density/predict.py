"""Measured amplitudes and a sequence -> phases by a trained network, beside what needs no network."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gemmi
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from xtalfast.density.calculate import prepare_patterson
from xtalfast.density.cells import solvent_fraction
from xtalfast.density.conformers import element_of, ids_from_sequence, mass_of
from xtalfast.density.scale import AmplitudeScale
from xtalfast.density.trained import Trained
from xtalfast.errors import InputError
from xtalfast.io.ccp4 import write_ccp4
from xtalfast.io.mtz_phases import ReflectionData
from xtalfast.phasing.data import measured, sim_weights
from xtalfast.phasing.fourier import FourierGrid
from xtalfast.phasing.modify import Modified, density_modify
from xtalfast.phasing.output import write_json, write_modified, write_mtz, write_solution
from xtalfast.phasing.search import Progress
from xtalfast.phasing.solve import Solution, solve

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Phased:
    """Phases from a network, before and after density modification, and from no network.

    Attributes:
        density: as predicted, e/A^3, [X, Y, Z].
        projected: measured amplitudes with the network's phases; its `r` compares the network's amplitudes with them.
        modified: the same after density modification.
        solution: of the solver without a network, in the time the network took; None if it was not asked for.
        outside: what of the data lies outside the network's training, in words.
        seconds: of prediction and density modification.
        recycles: done.
    """

    density: NDArray[np.float32]
    projected: Modified
    modified: Modified
    solution: Solution | None
    outside: list[str]
    seconds: float
    recycles: int

    def to_json(self) -> dict[str, Any]:
        """Figures as plain values."""

        def of(found: Modified) -> dict[str, float]:
            return {"R": found.r, "mean_fom": float(found.fom.mean()), "solvent": found.solvent}

        return {
            "outside_domain": self.outside,
            "recycles": self.recycles,
            "seconds": round(self.seconds, 3),
            "n_reflections": len(self.projected.hkl),
            "d_min": self.projected.d_min,
            "network": of(self.projected),
            "density_modification": of(self.modified) | {"mean_phase_change": self.modified.change},
            "solver": None if self.solution is None else self.solution.to_json(),
        }


def phase(
    F: ArrayLike,
    hkl: ArrayLike,
    cell: gemmi.UnitCell | tuple[float, ...],
    spacegroup: gemmi.SpaceGroup | str,
    sequence: str,
    trained: Trained,
    d_min: float | None = None,
    *,
    amplitude_scale: AmplitudeScale | None = None,
    recycles: int | None = None,
    force: bool = False,
    with_solver: bool = False,
    progress: Progress | None = None,
) -> Phased:
    """Phase measured amplitudes with a trained network.

    Args:
        F: amplitudes [N], any scale.
        hkl: indices [N, 3], each reflection of the asymmetric unit once.
        cell: A, degrees.
        spacegroup: gemmi's or a Hermann-Mauguin name.
        sequence: one letter a residue, of one asymmetric unit.
        trained: the network.
        d_min: A; that of the data if not given. Data finer than the network's training are cut.
        amplitude_scale: of F, when it is known; else from Wilson statistics.
        recycles: as many as the network was made for, if not given.
        force: go on outside the network's training.
        with_solver: also solve without a network, for as many seconds.
        progress: of the solver.

    Raises:
        InputError: data, cell, sequence or settings that cannot be used; or (without force) that lie outside what the
            network was trained on, which is named.
    """
    data = measured(F, hkl, cell, spacegroup, d_min)
    domain = trained.domain
    if data.d_min < domain.d_min[0] - 1e-3:
        logger.info("data to %.2f A are cut at %.2f A, where the network's training ends", data.d_min, domain.d_min[0])
        data = measured(F, hkl, cell, spacegroup, domain.d_min[0])
    residues = ids_from_sequence(sequence)
    if len(residues) == 0:
        raise InputError("the sequence is empty; one letter a residue, such as AG")
    group = data.space_group.xhm()
    outside = domain.outside(group, len(residues), data.d_min, data.cell.parameters)
    if outside and not force:
        raise InputError(f"outside what the network was trained on: {'; '.join(outside)}; --force goes on all the same")
    for problem in outside:
        logger.warning("outside what the network was trained on: %s", problem)
    started = time.monotonic()
    patterson = prepare_patterson(
        data.hkl, data.F, data.cell, element_of(residues), scale=trained.scale, amplitude_scale=amplitude_scale,
        space_group=data.space_group, d_min=data.d_min, rate=float(np.mean(domain.rate)),
        multiple=max(4, trained.networks[0].config.patch),
    )  # fmt: skip
    limit = trained.networks[0].config.n_residues
    if len(residues) > limit:
        raise InputError(f"the network takes {limit} residues at most, got {len(residues)}")
    ids = torch.from_numpy(residues.astype(np.int64))[None]
    cells = torch.tensor([data.cell.parameters], dtype=torch.float64)
    predicted = trained.predict(patterson[None], ids, cells, data.d_min, recycles=recycles)[0] * trained.scale.density
    x, y, z = predicted.shape
    grid = FourierGrid(data.cell, (x, y, z), data.d_min)
    model = grid.gather(grid.to_spectrum(predicted.double()), data.hkl).numpy().astype(np.complex128)
    d = np.asarray(data.cell.calculate_d_array(np.ascontiguousarray(data.hkl, np.int32)))
    fom = sim_weights(data.F, abs(model), d)
    k = (abs(model) @ data.F) / max(float(abs(model) @ abs(model)), 1e-30)
    n_copies = len(data.space_group.operations())
    solvent = float(np.clip(solvent_fraction(n_copies * mass_of(residues), data.cell.parameters), 0.05, 0.97))
    projected = Modified(
        hkl=data.hkl, F=data.F * np.exp(1j * np.angle(model)), fom=fom, rows=data.rows,
        r=float(abs(k * abs(model) - data.F).sum() / data.F.sum()), solvent=solvent, scheme="network", cell=data.cell,
        space_group=data.space_group, d_min=data.d_min, change=0.0,
    )  # fmt: skip
    phases = np.zeros(np.shape(F))
    phases[data.rows] = np.degrees(np.angle(model))
    merits = np.zeros(np.shape(F))
    merits[data.rows] = fom
    modified = density_modify(F, phases, hkl, data.cell, data.space_group, data.d_min, fom=merits, solvent=solvent)
    seconds = time.monotonic() - started
    found = None
    if with_solver:
        found = solve(
            F, hkl, data.cell, data.space_group, data.d_min, solvent=solvent, max_seconds=seconds, progress=progress
        )
    done = len(trained.networks) - 1 if recycles is None else recycles
    return Phased(predicted.numpy(), projected, modified, found, outside, seconds, done)


def write_phased(directory: str | os.PathLike, phased: Phased, data: ReflectionData) -> list[Path]:
    """Write network.ccp4 (as predicted), phased.mtz (FWT PHWT FOM: measured amplitudes with its phases), phase.json;
    modified/ (after density modification) and, if there is one, solver/.

    Args:
        directory: made if needed.
        phased: of these data.
        data: the file that was phased.

    Returns:
        the files written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    found = phased.projected
    files = [directory / name for name in ("network.ccp4", "phased.mtz", "phase.json")]
    write_ccp4(files[0], phased.density, found.cell, gemmi.SpaceGroup("P 1"))
    sigmas = None if data.sigF is None else data.sigF[found.rows]
    write_mtz(files[1], found, found.F, found.fom, data.F[found.rows], sigmas)
    write_json(files[2], phased.to_json())
    files += write_modified(directory / "modified", phased.modified, data)
    if phased.solution is not None:
        files += write_solution(directory / "solver", phased.solution, data)
    return files
