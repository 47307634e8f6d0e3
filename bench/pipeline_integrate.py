"""The integration half end to end on the shared data and on our own simulation, with DIALS beside it."""

from __future__ import annotations

import gzip
import json
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtalfast.integration import fit
from xtalfast.integration.columns import add_derived_columns
from xtalfast.integration.evaluate import evaluate
from xtalfast.integration.integrate import IntegrateOptions, IntegrationResult, integrate, prepare
from xtalfast.integration.simulate import SimulationConfig, simulate
from xtalfast.integration.splits import held_out
from xtalfast.io import Flag, ReflectionTable, read_expt, read_refl, write_refl
from xtalfast.metrics import MergingStatistics, stats_for_file
from xtalfast.metrics.equivalents import canonical_index
from xtalfast.metrics.truth import TruthComparison, compare_channels, compare_with_truth, load_truth

logger = logging.getLogger("results")

COMBINATIONS = ("fc/mvn", "cnn/mvn", "cnn/softmax", "cnn/dials", "cnn/lowrank")
CHANNEL_NAMES = {"prf": "profile fit", "sum": "summation", "vi": "posterior mean", "q": "network q(I)"}


@dataclass(frozen=True)
class Run:
    """One combination trained and applied."""

    combination: str
    result: IntegrationResult
    scores: dict[str, Any]
    seconds: float


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def run_combinations(
    expt: Path, refl: Path, work: Path, *, preset: str = "default", d_min: float | None = None
) -> list[Run]:
    """Every combination of the paper and low-rank on one extraction, with held-out scores."""
    runs = []
    for combination in COMBINATIONS:
        encoder, profile = combination.split("/")
        options = IntegrateOptions(preset=preset, encoder=encoder, profile=profile, d_min=d_min)
        start = time.perf_counter()
        result = integrate(expt, refl, work, options)
        seconds = time.perf_counter() - start
        prepared = prepare(expt, refl, work, options)
        model = fit.load_checkpoint(result.checkpoint)
        rows = np.flatnonzero(held_out([prepared.store], model.config.train.held_out, options.seed))
        reference = [prepared.profiles] if profile == "dials" else None
        scores = evaluate(model, [prepared.store], rows, reference_profiles=reference)
        keep = work / combination.replace("/", "-")
        keep.mkdir(exist_ok=True)
        for path in result.files:
            shutil.copy(path, keep / path.name)
        logger.info("%s: %.0f s, %s", combination, seconds, scores["thinned"])
        runs.append(Run(combination, result, scores, seconds))
    return runs


def score_table(runs: Sequence[Run]) -> str:
    """Held-out log-likelihood a photon."""
    head = ("combination", "held out", "epochs", "training s", "model", "mean profile", "background only", "shuffled")
    text = ""
    for kind, title in (
        ("log_likelihood", "Seen and scored on all photons of the held-out reflection, nats per photon:"),
        ("thinned", "Network and fit see one random half of its photons, the other half is scored, nats per photon:"),
    ):
        rows = []
        for run_ in runs:
            s, training = run_.scores[kind], run_.result.record["training"]
            values = [f"{s[name]:.5f}" for name in ("model", "mean_profile", "background", "shuffled")]
            epochs, seconds = f"{training['epochs']:.0f}", f"{training['seconds']:.0f}"
            rows.append((run_.combination.upper(), run_.scores["n"], epochs, seconds, *values))
        text += f"{title}\n\n{table(head, rows)}\n"
    return text


def truth_rows(name: str, c: TruthComparison) -> tuple[str, ...]:
    """One line of a truth table."""
    pulls = {(b.low, b.high): b.sd for b in c.pulls}
    bins = [(0.5, 1.0), (1.0, 2.0), (2.0, 5.0), (5.0, 10.0), (10.0, 20.0), (20.0, 50.0)]
    return (
        name,
        str(c.n),
        f"{c.r:.4f}",
        f"{c.cc:.5f}",
        f"{c.log_slope:.4f}",
        f"{c.log_correlation:.5f}",
        " ".join(f"{pulls.get(b, float('nan')):.2f}" for b in bins),
    )


TRUTH_HEAD = ("intensities", "n", "R", "CC", "log slope", "log CC", "pull sd at I/σ .5-1, 1-2, 2-5, 5-10, 10-20, 20-50")


DERIVED = ("d", "s1", "zeta", "lp", "qe", "partiality", "xyzcal.mm", "bbox")


def formats_section(data: Path, work: Path) -> str:
    """Round trips of every `.refl`, and derived columns dropped and computed again."""
    files = sorted(data.rglob("*.refl"))
    copy = work / "copy.refl"
    same = 0
    for path in files:
        write_refl(copy, read_refl(path))
        same += copy.read_bytes() == path.read_bytes()
    copy.unlink()
    rows = []
    for name in ("nanobragg-dev", "thaumatin-stills", "dials-real/quartz"):
        experiments, theirs = (
            read(data / name / f"integrated.{s}") for read, s in ((read_expt, "expt"), (read_refl, "refl"))
        )
        ours = theirs.copy()
        dropped = [column for column in DERIVED if column in ours]
        for column in dropped:
            del ours[column]
        add_derived_columns(ours, experiments)
        found = []
        for column in dropped:
            difference = np.abs(np.asarray(ours[column], float) - theirs[column]).reshape(len(theirs), -1).max(axis=1)
            n_apart = int((difference > 1e-3).sum())
            close = difference[difference <= 1e-3]
            found.append(f"{column} {close.max():.0e}" + (f" ({n_apart} rows apart)" if n_apart else ""))
        rows.append((name, len(theirs), ", ".join(found)))
    return (
        f"\n## File formats\n\n{same} of {len(files)} `.refl` files of the shared data come back byte for byte from "
        "`read_refl` and `write_refl`. Columns dropped from DIALS' integrated.refl and computed again by "
        "`add_derived_columns`, largest absolute difference from DIALS; the rows apart are those that DIALS split at "
        "the edges of its processing blocks, each part with a box and partiality of its own:\n\n"
        + table(("data", "rows", "largest difference"), rows)
    )


def simulated_section(data: Path, work: Path) -> str:
    """Figure 5 of the paper on the demonstration wedge."""
    simulated = simulate(work / "data", SimulationConfig.demo())
    runs = run_combinations(simulated.expt, simulated.refl, work / "runs")
    truth = load_truth(simulated.truth, len(read_refl(simulated.refl)))
    whole = truth["fraction_recorded"] > 0.99
    rows, zeros = [], []
    for run_ in runs:
        channels = ("prf", "q", "vi") if run_.combination != COMBINATIONS[-1] else ("prf", "q", "vi", "sum")
        t = run_.result.table
        for channel, c in compare_channels(t, simulated.truth, channels).items():
            name = "our summation" if channel == "sum" else f"{run_.combination.upper()}, {CHANNEL_NAMES[channel]}"
            rows.append(truth_rows(name, c))
            flag = Flag.IntegratedSum if channel == "sum" else Flag.IntegratedPrf
            nothing = whole & t.has_flags(flag) & (truth["photons"] == 0)
            largest = np.abs(t[f"intensity.{channel}.value"][nothing]).max()
            zeros.append((name, f"{c.mean_at_zero:.2f} ± {c.error_at_zero:.2f}", f"{largest:.1f}"))
    return (
        "\n## Simulated wedge, true photons known (the paper's Fig. 5)\n\n"
        f"`xtalfast simulate`, 50 images, {len(truth['photons'])} reflections; fully recorded ones are compared, "
        "scale 1. "
        "Slope and correlation are those of log I on log truth where the truth exceeds 10 σ.\n\n"
        + table(TRUTH_HEAD, rows)
        + "\nReflections whose true intensity is 0:\n\n"
        + table(("intensities", "mean I ± standard error", "largest abs(I)"), zeros)
        + "\n"
        + score_table(runs)
    )


def nanobragg_truth(directory: Path, t: ReflectionTable) -> NDArray[np.float64]:
    """True intensity of each row on the scale of recorded photons: F^2 x image scale / lp."""
    archive = np.load(directory / "truth" / "truth_p1.npz")
    key = {tuple(h): i for i, h in enumerate(archive["hkl"].tolist())}
    rows = np.array([key.get(tuple(h), -1) for h in t["miller_index"].tolist()])
    intensity = np.where(rows >= 0, archive["I"][rows], np.nan)
    scale = np.array(json.loads((directory / "truth" / "truth_geometry.json").read_text())["per_image_scale"])
    z = np.clip(t["xyzcal.px"][:, 2] - 0.5, 0, len(scale) - 1)
    return intensity * np.interp(z, np.arange(len(scale)), scale) / t["lp"]


def merged_against_truth(directory: Path, mtz: Path) -> dict[str, float]:
    """R and CC of merged I+ and I- against the truth, one fitted scale."""
    import gemmi

    truth: dict[tuple[int, int, int], tuple[float, float]] = {}
    with gzip.open(directory / "truth" / "truth_asu.csv.gz", "rt") as handle:
        names = handle.readline().strip().split(",")
        for line in handle:
            row = dict(zip(names, line.strip().split(",")))
            truth[int(row["h"]), int(row["k"]), int(row["l"])] = float(row["I_plus"]), float(row["I_minus"])
    found = gemmi.read_mtz_file(str(mtz))
    hkl = found.make_miller_array()
    pairs = []
    for column, side in (("I(+)", 0), ("I(-)", 1)):
        values = found.column_with_label(column).array
        pairs += [
            (v, truth[tuple(h)][side]) for h, v in zip(hkl.tolist(), values) if np.isfinite(v) and tuple(h) in truth
        ]
    i, t = np.array(pairs).T
    k = float(i @ t / (t @ t))
    f, ft = np.sqrt(np.maximum(i / k, 0)), np.sqrt(t)
    return {
        "n": len(i),
        "r_i": float(np.abs(i - k * t).sum() / (k * t).sum()),
        "r_f": float(np.abs(f - ft).sum() / ft.sum()),
        "cc": float(np.corrcoef(i, t)[0, 1]),
    }


def scale_and_merge(directory: Path, refl: Path, expt: Path) -> tuple[MergingStatistics, Path]:
    """dials.scale and dials.merge -> statistics of the scaled data, merged MTZ."""
    directory.mkdir(parents=True, exist_ok=True)
    # DIALS has a Python of its own, which must not meet our packages.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    for command in (
        ["dials.scale", refl.resolve(), expt.resolve()],
        ["dials.merge", "scaled.refl", "scaled.expt"],
    ):
        done = subprocess.run(
            [str(c) for c in command], cwd=directory, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{command[0]} failed in {directory}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return stats_for_file(directory / "scaled.refl", directory / "scaled.expt", d_min=1.7), directory / "merged.mtz"


STATISTICS_HEAD = (
    "intensities",
    "observations",
    "unique",
    "CC1/2",
    "outer",
    "Rmeas",
    "Rpim",
    "outer",
    "<I/σ>",
    "outer",
    "CCanom",
)


def statistics_row(name: str, s: MergingStatistics) -> tuple[str, ...]:
    """One line of merging statistics, overall and outermost shell."""
    o, x = s.overall, s.shells[-1]
    row = [name, o.n_obs, o.n_unique, f"{o.cc_half:.4f}", f"{x.cc_half:.3f}", f"{o.r_meas:.4f}", f"{o.r_pim:.4f}"]
    row += [f"{x.r_pim:.3f}", f"{o.mean_I_over_sigma:.1f}", f"{x.mean_I_over_sigma:.2f}", f"{o.cc_anom:.3f}"]
    return tuple(map(str, row))


def nanobragg_section(data: Path, work: Path) -> str:
    """The independent simulator's wedge: ours and DIALS' own integration, unmerged and through dials.scale."""
    directory = data / "nanobragg-dev"
    expt, refl = directory / "integrated.expt", directory / "integrated.refl"
    runs = run_combinations(expt, refl, work, d_min=1.7)
    theirs = read_refl(refl)
    truth = nanobragg_truth(directory, theirs)
    rows, merged, statistics = [], [], []
    # The same reflections for all: those that DIALS and we fitted, fully recorded by DIALS' account.
    common = (theirs["partiality"] > 0.95) & theirs.has_flags(Flag.IntegratedPrf) & np.isfinite(truth)
    for run_ in runs:
        common &= run_.result.table.has_flags(Flag.IntegratedPrf)
    sets = [("DIALS profile fit", theirs, "prf"), ("DIALS summation", theirs, "sum")]
    sets += [(f"{r.combination.upper()}, profile fit", r.result.table, "prf") for r in runs]
    sets += [(f"{r.combination.upper()}, network q(I)", r.result.table, "q") for r in runs]
    sets.append(("our summation", runs[0].result.table, "sum"))
    for name, t, channel in sets:
        use = common & (t[f"intensity.{channel}.variance"] > 0)
        if channel == "sum":  # the recorded part: ours of the box, so rows whose spot the box holds
            use &= t.has_flags(Flag.IntegratedSum) & (t["partiality"] > 0.95)
        value, variance = t[f"intensity.{channel}.value"][use], t[f"intensity.{channel}.variance"][use]
        rows.append(truth_rows(name, compare_with_truth(value, variance, truth[use])))
    inputs = [("DIALS", refl, expt)]
    inputs += [
        (r.combination.upper(), work / r.combination.replace("/", "-") / "integrated.refl", work / "integrated.expt")
        for r in runs
    ]
    for name, table_path, models in inputs:
        s, mtz = scale_and_merge(work / "scaled" / name.replace("/", "-"), table_path, models)
        m = merged_against_truth(directory, mtz)
        statistics.append(statistics_row(name, s))
        merged.append((name, m["n"], f"{m['r_i']:.4f}", f"{m['r_f']:.4f}", f"{m['cc']:.5f}"))
    ours, dials = (
        t["profile.correlation"][common]
        for t in (next(r for r in runs if r.combination == "cnn/dials").result.table, theirs)
    )
    return (
        "\n## nanobragg-dev (independent simulator, 90 images), ours beside DIALS 3.12.1\n\n"
        "`xtalfast integrate integrated.expt integrated.refl --d-min 1.7`, default preset. Unmerged, "
        f"{int(common.sum())} reflections that all of them fitted, against F² × true image scale / lp, one fitted "
        "constant:\n\n"
        + table(TRUTH_HEAD, rows)
        + "\nAfter `dials.scale` with default options (our statistics of the scaled data to 1.7 Å):\n\n"
        + table(STATISTICS_HEAD, statistics)
        + "\nAfter `dials.merge`, I+ and I- against the true ones, one fitted constant:\n\n"
        + table(("intensities", "n", "R(I)", "R(F)", "CC"), merged)
        + f"\n`profile.correlation` of CNN/DIALS: mean {ours.mean():.3f}, of DIALS {dials.mean():.3f}; "
        f"correlation between the two {np.corrcoef(ours, dials)[0, 1]:.3f}.\n\n" + score_table(runs)
    )


def adjacent_image_agreement(
    t: ReflectionTable, channel: str, use: NDArray[np.bool_], key: NDArray[np.int64]
) -> tuple[float, float, float]:
    """Median over adjacent images of CC, CC of the weak reflections (I < 5 sigma), robust pull of the weak ones.

    `key` [N] numbers the unique reflections; the scale of each pair is the median ratio of its strong reflections.
    """
    value, sigma = t[f"intensity.{channel}.value"], np.sqrt(np.abs(t[f"intensity.{channel}.variance"]))
    rows_of = [np.flatnonzero(use & (t["id"] == i)) for i in np.unique(t["id"])]
    found = []
    for first, second in pairwise(rows_of):
        _, p, q = np.intersect1d(key[first], key[second], return_indices=True)
        p, q = first[p], second[q]
        strong = (value[p] > 10 * sigma[p]) & (value[q] > 10 * sigma[q])
        scale = np.median(value[p][strong] / value[q][strong])
        x, y, error = value[p], scale * value[q], np.hypot(sigma[p], scale * sigma[q])
        weak = (x < 5 * sigma[p]) & (value[q] < 5 * sigma[q])
        z = (x - y)[weak] / error[weak]
        robust = 1.4826 * np.median(np.abs(z - np.median(z)))
        found.append((np.corrcoef(x, y)[0, 1], np.corrcoef(x[weak], y[weak])[0, 1], robust))
    cc, cc_weak, pull = np.median(found, axis=0)
    return float(cc), float(cc_weak), float(pull)


def stills_section(data: Path, work: Path) -> str:
    """Six real PILATUS stills: the same reflections measured on every image."""
    directory = data / "thaumatin-stills"
    result = integrate(directory / "integrated.expt", directory / "integrated.refl", work, IntegrateOptions())
    theirs = read_refl(directory / "integrated.refl")
    ours = result.table
    use = ours.has_flags(Flag.IntegratedPrf) & ours.has_flags(Flag.IntegratedSum) & theirs.has_flags(Flag.IntegratedSum)
    use &= theirs["intensity.sum.variance"] > 0
    crystals = [e.crystal for e in result.experiments]
    key, _ = canonical_index(ours["miller_index"], crystals[0].space_group)
    rows = []
    for name, t, channel in (
        ("DIALS summation", theirs, "sum"),
        ("our summation", ours, "sum"),
        ("our profile fit", ours, "prf"),
    ):
        cc, weak, pull = adjacent_image_agreement(t, channel, use, key)
        sigma = float(np.median(np.sqrt(t[f"intensity.{channel}.variance"][use])))
        rows.append((name, int(use.sum()), f"{cc:.3f}", f"{weak:.3f}", f"{pull:.2f}", f"{sigma:.1f}"))
    return (
        "\n## thaumatin-stills (six real PILATUS3 6M images)\n\n"
        "`xtalfast integrate integrated.expt integrated.refl`; adjacent images measure the same reflections, "
        "one scale an image. Weak: I < 5 σ on both.\n\n"
        + table(("intensities", "rows", "median CC", "CC, weak", "robust pull, weak", "median σ, photons"), rows)
    )


def shoebox_section(data: Path, work: Path) -> str:
    """Real shoeboxes of spot finding without images."""
    directory = data / "dials-real" / "quartz"
    result = integrate(directory / "imported.expt", directory / "strong.refl", work, IntegrateOptions())
    theirs, ours = read_refl(directory / "strong.refl"), result.table
    good = ours.has_flags(Flag.IntegratedPrf)
    summed = theirs["intensity.sum.value"]
    both = good & (ours["intensity.prf.value"] > 0)
    log_cc = np.corrcoef(np.log(ours["intensity.prf.value"][both]), np.log(summed[both]))[0, 1]
    return (
        "\n## quartz, 505 real spot-finder shoeboxes, no images\n\n"
        "`xtalfast integrate imported.expt strong.refl`. Such boxes are tight and hold only the pixels that spot "
        "finding called strong, so there is no background to be seen in them: this shows that the route works, not "
        "how good the values are.\n\n"
        + table(
            ("rows", "profile-fitted", "correlation of log I with DIALS' spot-finder sum"),
            [(len(ours), int(good.sum()), f"{log_cc:.3f}")],
        )
    )
