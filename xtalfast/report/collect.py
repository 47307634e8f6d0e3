"""From the results of `integrate` to what the report shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xtalfast.integration.store import ShoeboxStore
from xtalfast.io import Flag
from xtalfast.masks import used_pixels
from xtalfast.metrics import MergingStatistics
from xtalfast.metrics.truth import load_truth
from xtalfast.report.data import Comparison, ReportData, ShoeboxExample, example_rows, mean_profiles

if TYPE_CHECKING:
    from xtalfast.integration.outputs import RunResults

_SHOWN_FLAGS = (
    Flag.IntegratedPrf,
    Flag.IntegratedSum,
    Flag.FailedDuringProfileFitting,
    Flag.FailedDuringSummation,
    Flag.Overloaded,
    Flag.ForegroundIncludesBadPixels,
)
_N_PROFILES = 2000  # reflections averaged for the profiles over the detector
_N_OUTLIERS = 20


def report_data(
    record: Mapping[str, Any],
    defaults: Mapping[str, Any],
    run: RunResults,
    statistics: Sequence[MergingStatistics],
    files: Sequence[Path],
) -> ReportData:
    """Everything the report of one integration shows.

    Args:
        record: the content of xtalfast.json.
        defaults: of the parameters; those that differ are marked.
        run: the integration.
        statistics: merging statistics to show.
        files: what was written.
    """
    store, estimates = run.store, run.estimates
    columns = estimates.columns
    value, variance = columns["intensity.prf.value"], columns["intensity.prf.variance"]
    fitted = estimates.integrated_prf
    sigma = np.sqrt(np.where(variance > 0, variance, np.nan))
    misfit = _misfit(columns, fitted)
    examples = {
        group: np.flatnonzero(fitted)[rows]
        for group, rows in example_rows(value[fitted], sigma[fitted], misfit[fitted]).items()
    }
    shoeboxes = [s for group, rows in examples.items() for s in _shoeboxes(run, group, rows)]
    shown = np.flatnonzero(fitted)[:: max(1, int(fitted.sum()) // _N_PROFILES)]
    grid = None
    if len(shown):
        rows, view, source = next(run.by_size(shown))  # the most frequent size
        dense = source.profiles(np.arange(len(rows))).numpy().reshape(-1, *view.box)
        grid = mean_profiles(dense, view.metadata["xyzcal_px"][:, :2], run.experiments[0].detector[0].image_size)
    counts = record["counts"]
    history = record["history"]
    return ReportData(
        title="Integration of " + Path(str(record["parameters"]["reflections"])).name,
        key_figures={
            "reflections": f"{counts['reflections']:,}",
            "profile-fitted": f"{counts['integrated_prf']:,}",
            "engine": str(record["parameters"].get("combination", record["parameters"]["engine"])).upper(),
            "median I/σ": f"{np.nanmedian(value[fitted] / sigma[fitted]):.2f}" if fitted.any() else "-",
            "σ_B": f"{record['estimates']['sigma_b_deg']:.4f}°",
            "σ_M": f"{record['estimates']['sigma_m_deg']:.4f}°",
        },
        parameters=dict(record["parameters"]),
        changed=[name for name, default in defaults.items() if record["parameters"].get(name) != default],
        versions=dict(record["versions"]) | {"device": str(record["device"])},
        seconds=dict(record["seconds"]),
        files=[f.name for f in files],
        warnings=list(record["warnings"]),
        flags={str(flag.name): int(run.table.has_flags(flag).sum()) for flag in _SHOWN_FLAGS},
        history={name: [row[name] for row in history] for name in ("epoch", "train_loss", "val_loss")}
        if history
        else {},
        statistics=statistics,
        profiles=grid,
        shoeboxes=shoeboxes,
        comparisons=_comparisons(run, record["parameters"]["truth"]),
        calibrations=run.calibrations,
        intensities={"profile fit": (value[fitted], sigma[fitted])},
        outliers=_outliers(store, columns, misfit, fitted),
    )


def _misfit(columns: Mapping[str, NDArray], fitted: NDArray[np.bool_]) -> NDArray[np.float64]:
    """How far profile fit and summation disagree, in sigmas: large where the profile is wrong."""
    partiality = columns.get("partiality", np.ones(len(fitted)))
    scatter = np.sqrt(np.maximum(columns["intensity.sum.variance"], 1.0))
    difference = np.abs(columns["intensity.sum.value"] - partiality * columns["intensity.prf.value"]) / scatter
    return np.where(fitted & (columns["intensity.sum.variance"] > 0), difference, np.nan)


def _shoeboxes(run: RunResults, group: str, rows: NDArray[np.int64]) -> list[ShoeboxExample]:
    columns = run.estimates.columns
    found = {}
    for here, view, source in run.by_size(rows):
        every = np.arange(len(here))
        counts, used = view.counts(every), used_pixels(view.mask(every))
        shape = source.profiles(every).numpy()
        for k, row in enumerate(here):
            intensity, background = columns["intensity.prf.value"][row], columns["background.mean"][row]
            model = max(intensity, 0.0) * shape[k] + background
            h, m, l = (int(i) for i in view.metadata["hkl"][k])
            x, y, z = (float(i) for i in view.metadata["xyzcal_px"][k])
            found[int(row)] = ShoeboxExample(
                group=group,
                hkl=(h, m, l),
                xyz_px=(x, y, z),
                d=float(view.metadata["d"][k]),
                intensity=float(intensity),
                sigma=float(np.sqrt(max(columns["intensity.prf.variance"][row], 0.0))),
                background=float(background),
                counts=counts[k].reshape(view.box),
                model=model.reshape(view.box),
                mask=used[k].reshape(view.box),
            )
    return [found[int(row)] for row in rows]


def _comparisons(run: RunResults, truth: Path | None) -> list[Comparison]:
    """Our profile fit against truth, our summation, and the intensities that the input table came with."""
    source, table = run.source, run.table
    ours = table["intensity.prf.value"]
    variance = table["intensity.prf.variance"]
    good = table.has_flags(Flag.IntegratedPrf)
    sigma = np.sqrt(np.where(variance > 0, variance, np.nan))
    both = good & table.has_flags(Flag.IntegratedSum)
    partiality = table["partiality"] if "partiality" in table else np.ones(len(table))
    whole = both & (partiality > 0.95)
    found = []
    if truth is not None:
        true = load_truth(truth, len(table))
        rows = good & (true["fraction_recorded"] > 0.99)
        found.append(Comparison("truth", true["photons"][rows], ours[rows], sigma[rows], is_truth=True))
    found.append(Comparison("our summation", table["intensity.sum.value"][whole], ours[whole], sigma[whole]))
    for channel, flag, name in (
        ("intensity.prf", Flag.IntegratedPrf, "the input's profile fit"),
        ("intensity.sum", Flag.IntegratedSum, "the input's summation"),
    ):
        if f"{channel}.value" in source and "flags" in source:
            rows = good & source.has_flags(flag)
            if rows.any():
                found.append(Comparison(name, source[f"{channel}.value"][rows], ours[rows], sigma[rows]))
    return found


def _outliers(
    store: ShoeboxStore, columns: Mapping[str, NDArray], misfit: NDArray[np.float64], fitted: NDArray[np.bool_]
) -> list[dict[str, Any]]:
    """The reflections whose profile fit and summation disagree most."""
    order = np.argsort(np.where(np.isfinite(misfit), -misfit, np.inf), kind="stable")[:_N_OUTLIERS]
    return [
        {
            "row": int(store.metadata["row"][row]),
            "h k l": " ".join(str(int(i)) for i in store.metadata["hkl"][row]),
            "x, y, z (px, px, image)": ", ".join(f"{v:.1f}" for v in store.metadata["xyzcal_px"][row]),
            "d (Å)": f"{store.metadata['d'][row]:.2f}",
            "profile fit": f"{columns['intensity.prf.value'][row]:.0f}",
            "summation": f"{columns['intensity.sum.value'][row]:.0f}",
            "correlation": f"{columns['profile.correlation'][row]:.3f}",
            "difference / sigma": f"{misfit[row]:.1f}",
        }
        for row in order
        if fitted[row] and np.isfinite(misfit[row]) and misfit[row] > 5
    ]
