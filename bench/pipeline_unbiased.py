"""Prediction beside DIALS, averages of nothing (absences, I = 0) across ice rings, and overlapping spots."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtalfast.integration.estimate import estimate
from xtalfast.integration.integrate import IntegrationResult, integrate, open_prepared
from xtalfast.integration.predict import predict_experiments
from xtalfast.integration.simulate import SimulationConfig, simulate
from xtalfast.io import Flag, ReflectionTable, read_expt, read_refl

ROTATIONS = (
    "nanobragg-dev/refined",
    "dials-real/quartz/indexed",
    "dials-real/quartz/refined",
    "dials-real/l_cysteine_narrow_wedge/11_integrated",
    "dials-real/l_cysteine_narrow_wedge/23_integrated",
)
STILLS = ("thaumatin-stills/integrated",)
DIALS = """
import sys
from dials.array_family import flex
from dxtbx.model.experiment_list import ExperimentListFactory
experiments = ExperimentListFactory.from_json_file(sys.argv[1], check_format=False)
flex.reflection_table.from_predictions_multi(experiments).as_file(sys.argv[2])
"""


def prediction_section(data: Path, work: Path) -> str:
    """Every reflection of the shared models against DIALS' predictor."""
    lines = []
    for name in (*ROTATIONS, *STILLS):
        models, target = data / f"{name}.expt", work / (name.replace("/", "_") + ".refl")
        subprocess.run(["/usr/bin/python3", "-c", DIALS, models, target], check=True, capture_output=True)
        experiments, theirs = read_expt(models), read_refl(target)
        start = time.process_time()
        ours = predict_experiments(experiments)
        seconds = time.process_time() - start
        known, places = _keys(theirs), _keys(ours)
        common = [k for k in known if k in places]
        a, b = np.array([places[k] for k in common]), np.array([known[k] for k in common])
        apart = np.abs(ours["xyzcal.px"][a] - theirs["xyzcal.px"][b]).max(axis=0)
        crystal = experiments[0].crystal
        kind = "still" if experiments[0].is_still else "static" if crystal.A_at_scan_points is None else "varying"
        lines.append(
            f"| {name} | {kind} | {len(theirs)} | {len(known) - len(common)} / {len(places) - len(common)} | "
            f"{apart[0]:.5f} {apart[1]:.5f} {apart[2]:.5f} | {seconds:.2f} |"
        )
    return "\n".join(
        [
            "## Prediction",
            "`xtalfast predict` against DIALS' predictor, to the corners of the detector.",
            "",
            "| models | crystal | DIALS predicts | only DIALS / only ours | largest difference, px px images | CPU s |",
            "|---|---|---|---|---|---|",
            *lines,
            "",
            "Ours alone in the stills: absences of a screw axis, which DIALS leaves out of stills, not of rotations.",
            "Its scan-varying predictor takes the path of a point over one image as straight; ours solves the angle.",
        ]
    )


def _keys(table: ReflectionTable) -> dict[tuple[int, ...], int]:
    values = np.column_stack([table["id"], table["miller_index"], table["entering"]]).tolist()
    return {tuple(v): row for row, v in enumerate(values)}


def _with_truth(result: IntegrationResult, truth: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of the integrated table and of the truth that are one reflection, profile-fitted and fully recorded."""
    place = {
        (*h, round(z)): k for k, (h, z) in enumerate(zip(truth["hkl"].tolist(), (10 * truth["xyz_px"][:, 2]).tolist()))
    }
    table = result.table
    names = zip(table["miller_index"].tolist(), (10 * table["xyzcal.px"][:, 2]).tolist())
    match = np.array([place.get((*h, round(z)), -1) for h, z in names])
    good = (match >= 0) & table.has_flags(Flag.IntegratedPrf)
    good[good] = truth["fraction_recorded"][match[good]] > 0.98
    return np.flatnonzero(good), match[good]


def _average(name: str, value: NDArray, variance: NDArray) -> str:
    error = np.sqrt(variance.sum()) / len(value)  # by the stated sigmas: a few absences do not show their scatter
    pull = value / np.sqrt(variance)
    return f"| {name} | {len(value)} | {value.mean():.2f} +- {error:.2f} | {pull.std():.2f} |"


def unbiased_section(data: Path, work: Path) -> str:
    """Likelihood-channel means of reflections without intensity: high background, sloping, with ice rings."""
    lines = []
    for preset in ("ice", "monoclinic"):
        config = SimulationConfig.preset(preset, zero_fraction=0.1)
        files = simulate(work / preset / "data", config)
        result = integrate(files.expt, None, work / preset / "run", d_min=config.d_min)
        truth, table = np.load(files.truth), result.table
        rows, at = _with_truth(result, truth)
        value, variance = (table[f"intensity.prf.{name}"] for name in ("value", "variance"))
        nothing = truth["photons"][at] == 0
        lines.append(_average(f"{preset}: I = 0", value[rows[nothing]], variance[rows[nothing]]))
        operations = result.experiments[0].crystal.operations
        absent = operations.systematic_absences(np.ascontiguousarray(table["miller_index"], np.int32))
        absent &= table.has_flags(Flag.IntegratedPrf)
        lines.append(_average(f"{preset}: systematic absences", value[absent], variance[absent]))
        if preset == "ice":
            s, background = 1 / truth["d"][at], truth["background"][at]
            around = np.array([np.median(background[np.abs(s - here) < 0.02]) for here in s])
            ring = nothing & (background > 1.3 * around)
            lines.append(_average("ice: I = 0 on an ice ring", value[rows[ring]], variance[rows[ring]]))
            flank = nothing & ~ring & (np.abs(background / around - 1) > 0.1)
            lines.append(_average("ice: I = 0 on the flank of a ring", value[rows[flank]], variance[rows[flank]]))
    return "\n".join(
        [
            "## Averages of nothing",
            "Simulated presets `ice` (12 photons of sloping background a pixel, ice rings of 25) and `monoclinic`:",
            "a tenth of the reflections without intensity, predicted and integrated from the models alone. Mean of",
            "`intensity.prf.value` in photons with its error by the stated sigmas, and the scatter in units of these.",
            "",
            "| reflections | n | mean | pull sd |",
            "|---|---|---|---|",
            *lines,
        ]
    )


def overlap_section(data: Path, work: Path) -> str:
    """Spots that share 30 % of their profiles: joint fits against the mask of the nearest owner."""
    config = SimulationConfig.preset("overlap")
    lines = []
    for dose in (1.0, 0.5):
        here = work / f"dose-{dose}"
        files = simulate(here / "data", config.with_dose(dose))
        result = integrate(files.expt, files.refl, here / "run")
        truth, prepared = np.load(files.truth), open_prepared(here / "run")
        columns = {}
        for overlaps in (False, True):
            found = estimate(prepared.store, prepared.profiles, prepared.experiments, overlaps=overlaps)
            columns[overlaps] = (found, found.columns)
        match = prepared.rows  # the table is predicted.refl, and truth goes with it row by row
        both = columns[True][0].integrated_prf & columns[False][0].integrated_prf
        both &= (columns[True][1]["overlap.n"] > 0) & (truth["fraction_recorded"][match] > 0.98)
        true = truth["photons"][match][both]
        for overlaps, name in ((False, "nearest owner"), (True, "fitted together")):
            found, values = columns[overlaps]
            value = values["intensity.prf.value"][both]
            pull = (value - true) / np.sqrt(values["intensity.prf.variance"][both])
            lines.append(
                f"| {config.photons_mean * dose:.0f} | {name} | {int(found.integrated_prf.sum())} | {len(true)} | "
                f"{np.abs(value - true).sum() / true.sum():.4f} | {pull.mean():.2f} +- {pull.std():.2f} |"
            )
        assert len(result.table) == len(truth["hkl"])
    return "\n".join(
        [
            "## Overlapping spots",
            f"Preset `overlap`: neighbours share {np.median(truth['shared']):.0%} of their profiles (median).",
            "Own spot model, learned from the same images. R against the true photons of what both ways could fit.",
            "",
            "| mean photons | overlaps | fitted of all | compared | R | pull |",
            "|---|---|---|---|---|---|",
            *lines,
        ]
    )
