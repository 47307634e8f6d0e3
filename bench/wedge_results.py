"""Wedges of our own simulator: the exact engine, DIALS, and the same estimator with the simulator's spot shapes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gemmi
import numpy as np
import torch
from exact_results import (
    MERGED_HEAD,
    UNMERGED_HEAD,
    Judged,
    bar,
    judge,
    merged_rows,
    ours,
    rows_of,
    run_timed,
    unmerged_rows,
)
from numpy.typing import NDArray
from pipeline_integrate import table
from scipy.spatial import cKDTree

from xtalfast.integration.estimate import estimate
from xtalfast.integration.integrate import open_prepared
from xtalfast.integration.outputs import fill_table
from xtalfast.integration.simulate import SimulationConfig, simulate
from xtalfast.integration.simulate_spots import voxel_shares
from xtalfast.io import Flag, ReflectionTable, read_refl, write_refl
from xtalfast.metrics.truth import load_truth

WEDGES = {"monoclinic": (0,), "cubic": (0,), "ice": (0, 1)}  # preset -> seeds


def wedges_section(data: Path, work: Path) -> str:
    """Three presets of our simulator, DIALS from its own spot finding on, and the oracle's profiles."""
    del data
    unmerged, merged, bars = [], [], []
    for preset, seeds in WEDGES.items():
        for seed in seeds:
            judged = wedge(SimulationConfig.preset(preset, seed=seed), work.resolve() / f"{preset}-{seed}")
            name = f"{preset}, seed {seed}" if len(seeds) > 1 else preset
            unmerged += [(f"{name}: {row[0]}", *row[1:]) for row in unmerged_rows(judged)]
            merged += [(f"{name}: {row[0]}", *row[1:]) for row in merged_rows(judged.true_scale)]
            theirs, own = judged.true_scale["DIALS"], judged.true_scale["exact"]
            least = 0.88 if preset == "ice" else 0.92
            bars.append(bar(f"{name}: R(F), {100 * (1 - least):.0f} % below DIALS", own.r_f, least * theirs.r_f))
            most = 0.90 if preset == "ice" else 1.0
            bars.append(bar(f"{name}: Rpim, {most:.2f} x DIALS", own.r_pim, most * theirs.r_pim))
            margin = 0.005 if preset == "ice" else -0.0005
            bars.append(bar(f"{name}: CC, outer shell", own.cc[-1], theirs.cc[-1] + margin, below=False))
            sd = [b[2] for b in judged.unmerged["exact"][2][0][:-1] if b[0] > 100]
            bars.append(bar(f"{name}: largest pull sd of bins to 50 with over 100", max(sd), 1.05))
            bars.append(bar(f"{name}: smallest", min(sd), 0.95, below=False))
    return (
        "\n## Simulated wedges, DIALS and oracle profiles beside the exact engine\n\n"
        "`xtalfast simulate --preset NAME --seed N`; DIALS finds spots on the images and integrates with the true "
        "models; `xtalfast integrate` has the models alone; the oracle has the simulator's spot widths. Truth: photons "
        "of fully recorded reflections without overlap.\n\n"
        + table(UNMERGED_HEAD, unmerged)
        + "\nMerged with the true scales:\n\n"
        + table(MERGED_HEAD, merged)
        + "\n"
        + table(("bar", "wanted", "measured", ""), bars)
    )


def wedge(config: SimulationConfig, work: Path) -> Judged:
    """Simulate, integrate with both, and with the true spot shapes."""
    files = simulate(work / "data", config)
    truth = load_truth(files.truth, len(read_refl(files.refl)))
    base = read_refl(files.refl)
    ours(files.expt, work / "ours", config.d_min)
    cores = len(os.sched_getaffinity(0))
    run_timed(["dials.find_spots", files.expt, f"nproc={cores}"], work / "dials")
    strong = with_indices(read_refl(work / "dials" / "strong.refl"), base)
    write_refl(work / "dials" / "indexed.refl", strong)
    run_timed(
        ["dials.integrate", files.expt, "indexed.refl", f"prediction.d_min={config.d_min}", f"nproc={cores}"],
        work / "dials",
    )
    oracle(files.expt, work / "ours", truth, base, work / "oracle.refl")
    whole = (truth["fraction_recorded"] > 0.99) & (truth["shared"] < 0.01) & (truth["photons"] > 0)
    photons = np.where(whole, truth["photons"], np.nan)
    names = {"DIALS": work / "dials" / "integrated.refl", "exact": work / "ours" / "integrated.refl"}
    names["oracle profile"] = work / "oracle.refl"
    group = gemmi.SpaceGroup(config.space_group)
    sets: dict[str, tuple[Path, Path | None]] = {name: (path, None) for name, path in names.items()}
    return judge(sets, base, photons, truth["intensity"], group, work)


def with_indices(strong: ReflectionTable, predicted: ReflectionTable) -> ReflectionTable:
    """Spots with the Miller index and position of the nearest prediction within three pixels and images."""
    seen, known = strong["xyzobs.px.value"], predicted["xyzcal.px"]
    distance, nearest = cKDTree(known).query(seen)
    strong = strong.select(np.flatnonzero(distance < 3))
    nearest = nearest[distance < 3]
    for name in ("miller_index", "xyzcal.px", "xyzcal.mm", "s1", "entering"):
        if name in predicted:
            strong[name] = predicted[name][nearest]
    strong["id"] = np.zeros(len(strong), np.int32)
    strong["flags"] = strong["flags"] | np.uint64(Flag.Indexed | Flag.UsedInRefinement)
    strong.identifiers = dict(predicted.identifiers)
    return strong


def oracle(expt: Path, prepared: Path, truth: dict[str, NDArray], base: ReflectionTable, path: Path) -> None:
    """The estimator with the simulator's own spot shapes, on the boxes of our run."""
    run = open_prepared(prepared)
    table_ = read_refl(prepared / "integrated.refl")
    row = np.full(len(table_), -1)
    matched = rows_of(base, table_)
    row[matched[matched >= 0]] = np.flatnonzero(matched >= 0)
    found = estimate(
        run.store,
        TrueProfiles(run.store, truth, row[run.rows]),
        run.experiments,
        reference=None,
        widths=run.profiles.widths,
    )
    write_refl(path, fill_table(table_, run.store, run.rows, found))


class TrueProfiles:
    """The simulator's shares of every spot in the voxels of its box; rows without truth have none."""

    def __init__(self, store: Any, truth: dict[str, NDArray], row: NDArray[np.int64]) -> None:
        self.store, self.truth, self.row = store, truth, row

    def on(self, view: Any) -> TrueProfiles:
        return TrueProfiles(view, self.truth, self.row[view.rows])

    def profiles(self, rows: NDArray[np.int64]) -> torch.Tensor:
        z, y, x = self.store.box
        profile = np.zeros((len(rows), z * y * x), np.float32)
        at = self.row[rows]
        known = np.flatnonzero(at >= 0)
        corner = np.asarray(self.store.metadata["bbox"])[rows][:, ::2].astype(float)
        for k in known:
            centre = self.truth["xyz_px"][at[k]] - corner[k]
            shares = voxel_shares(centre[None], self.truth["covariance"][at[k]][None], (z, y, x), 0)
            profile[k, shares.voxel] = shares.share
        return torch.from_numpy(profile)
