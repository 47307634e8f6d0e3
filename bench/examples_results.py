"""The section of docs/results.md on training examples: fragments of the shared structures, the loader, known models."""

from __future__ import annotations

import time
from pathlib import Path

import gemmi
import numpy as np
import torch

from xtalfast.density.calculate import (
    bulk_solvent_structure_factors,
    calculate_structure_factors,
    map_of_structure_factors,
    prepare_patterson,
)
from xtalfast.density.dataset import Augmentation, ExampleDataset, GridBatches
from xtalfast.density.fragment_set import FragmentSet, make_fragments
from xtalfast.io.mtz_phases import read_amplitudes
from xtalfast.io.structure import Atoms, read_atoms
from xtalfast.phasing import density_modify, match

N_EXAMPLES, N_PREPARED = 10_000, 50
SOLVENT = {"k": 0.35, "b": 46.0}  # of the simulated crystal, see its README


def examples_section(data: Path, work: Path) -> str:
    """Fragments, loader speed, prepared Patterson maps, and the simulated crystal through sfcalc."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = time.process_time(), time.perf_counter()
        made = make_fragments([data / "structures"], work / "set", jobs=1)
        spent = time.process_time() - start[0], time.perf_counter() - start[1]
        return "\n".join(
            [
                "## Training examples",
                "",
                *_fragments(made, *spent),
                *_loader(made),
                *_prepared(made),
                *_known_model(data / "nanobragg-dev" / "truth"),
            ]
        )
    finally:
        torch.set_num_threads(before)


def _fragments(made: FragmentSet, cpu: float, wall: float) -> list[str]:
    statistics = made.statistics
    bins = statistics["grids_at_1.5"]["multiple_of_4"]
    low, median, high = statistics["solvent_5_50_95"]
    rejected = ", ".join(f"{n} {reason}" for reason, n in made.tally.rejected_fragments.most_common())
    return [
        "| what | measured |",
        "|---|---|",
        f"| `xtalfast fragments` on the shared structures | {sum(statistics['fragments'].values())} fragments of "
        f"{sum(statistics['parents'].values())} structures in {cpu:.0f} s of one core ({wall:.0f} s on the clock) |",
        f"| train / test | {statistics['fragments']['train']} / {statistics['fragments']['test']} |",
        f"| rejected | {rejected} |",
        f"| on disk | {statistics['bytes_per_fragment']} bytes a fragment, the same for any number of rotations |",
        f"| solvent content, 5 / 50 / 95 % | {low:.0%} / {median:.0%} / {high:.0%} (the density paper: about 80 %) |",
        f"| grids at 1.5 A | {bins['bins']} sizes; {bins['in_bins_of_20']:.1%} of the examples in bins of 20 or more |",
    ]


def _loader(made: FragmentSet) -> list[str]:
    """An epoch with a fresh rotation, fresh cell angles and so a fresh cell for every example."""
    store = made["train"].select(np.arange(min(N_EXAMPLES, len(made["train"]))))
    dataset = ExampleDataset(store, made.scale, Augmentation(rotate=True))
    start = time.process_time()
    planned = GridBatches(dataset, 40)
    requests = list(planned)
    plan = time.process_time() - start
    n = sum(len(dataset[request].rows) for request in requests)
    spent = time.process_time() - start
    return [
        f"| loader, {n} examples, each newly rotated into a new cell | {n / spent:.0f} examples a second and core "
        f"({1e3 * plan / n:.2f} ms for the cell, {1e3 * (spent - plan) / n:.2f} ms for the maps) |"
    ]


def _prepared(made: FragmentSet) -> list[str]:
    """How much F x 1000 and a further B of 15 change what the network is given."""
    store, largest = made["test"], {"F x 1000": 0.0, "B + 15": 0.0}
    for row in np.linspace(0, len(store) - 1, N_PREPARED).astype(int).tolist():
        fragment = store[row]
        n, cell = len(fragment.element), gemmi.UnitCell(*fragment.cell.tolist())
        element = fragment.element.astype(np.int64)
        atoms = Atoms(
            fragment.coords.astype(float), element, np.full(n, 20.0), np.ones(n), cell, gemmi.SpaceGroup("P 1")
        )
        hkl, f = calculate_structure_factors(atoms, 1.5)
        blur = np.exp(-15 / 4 * cell.calculate_1_d2_array(hkl))
        plain = prepare_patterson(hkl, abs(f), cell, element, scale=made.scale)
        for name, changed in (("F x 1000", 1000 * abs(f)), ("B + 15", abs(f) * blur)):
            other = prepare_patterson(hkl, changed, cell, element, scale=made.scale)
            largest[name] = max(largest[name], float((other - plain).abs().max() / plain.abs().max()))
    return [
        f"| largest change of a prepared Patterson map, {N_PREPARED} fragments | "
        + ", ".join(f"{name}: {value:.1e}" for name, value in largest.items())
        + " of its largest value |"
    ]


def _known_model(truth: Path) -> list[str]:
    """Map of the true amplitudes of the simulated crystal with the model's phases, against the map of the model."""
    atoms = read_atoms(truth / "model_1a8o.cif")
    measured = read_amplitudes(truth / "truth.mtz", ["F"])
    hkl, dry = calculate_structure_factors(atoms, measured.d_min)
    place = {tuple(h): i for i, h in enumerate(measured.hkl.tolist())}
    rows = np.array([place.get(tuple(h), -1) for h in hkl.tolist()])
    hkl, dry, f = hkl[rows >= 0], dry[rows >= 0], measured.F[rows[rows >= 0]]
    wet = dry + bulk_solvent_structure_factors(atoms, hkl, measured.d_min, **SOLVENT)
    fine = atoms.cell.calculate_1_d2_array(hkl) > 1 / 36
    results = []
    for name, model, used in (
        ("with its bulk solvent", wet, np.ones(len(hkl), bool)),
        ("without", dry, np.ones(len(hkl), bool)),
        ("without, d < 6 A", dry, fine),
    ):
        maps = [
            map_of_structure_factors(
                hkl[used], values[used], atoms.cell, d_min=measured.d_min, space_group=atoms.space_group
            ).numpy()
            for values in (f * np.exp(1j * np.angle(model)), model)
        ]
        results.append(f"{np.corrcoef(maps[0].ravel(), maps[1].ravel())[0, 1]:.4f} {name}")
    return [
        f"| map CC, true amplitudes of nanobragg-dev (P43212, {len(hkl)} reflections) and its model through `sfcalc` | "
        + "; ".join(results)
        + " |",
        _modified(hkl, f * np.exp(1j * np.angle(wet)), atoms),
    ]


def _modified(hkl: np.ndarray, truth: np.ndarray, atoms: Atoms) -> str:
    """Density modification of that crystal from phases that are wrong by 60 degrees on average; default options."""
    # Normal errors; the sd is what gives this mean |error|. Centric phases are either right or wrong.
    rng = np.random.default_rng(0)
    error = np.radians(60 * np.sqrt(np.pi / 2)) * rng.standard_normal(len(truth))
    centric = atoms.space_group.operations().centric_flag_array(hkl)
    error = np.where(centric, np.where(rng.random(len(truth)) < 1 / 3, np.pi, 0), error)
    start = truth * np.exp(1j * error)
    found = density_modify(abs(truth), np.degrees(np.angle(start)), hkl, atoms.cell, atoms.space_group)
    before, after = (
        match(truth[rows], values, hkl[rows], atoms.cell, atoms.space_group, hand=False).statistics.overall
        for values, rows in ((start, np.arange(len(hkl))), (found.F, found.rows))
    )
    return (
        f"| the same crystal, `density_modify` from phases 60 degrees wrong, solvent and figures of merit not given | "
        f"phase error {before.phase_error:.1f} -> {after.phase_error:.1f} degrees, "
        f"map CC {before.map_cc:.3f} -> {after.map_cc:.3f} ({found.scheme}) |"
    )
