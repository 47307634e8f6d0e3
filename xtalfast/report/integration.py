"""The report of an integration as one HTML file that needs nothing else: no network, no script, no second file.

Whatever `ReportData` does not hold is left out of the page, which says so at its end.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtalfast.errors import InputError
from xtalfast.io.files import write_text
from xtalfast.metrics import MergingStatistics
from xtalfast.metrics.shells import SHELL_COLUMNS, format_value
from xtalfast.metrics.truth import compare_with_truth
from xtalfast.report.data import Comparison, ProfileGrid, ReportData, ShoeboxExample
from xtalfast.report.environment import environment
from xtalfast.report.images import DIVERGING, SEQUENTIAL, colored, data_uri, tile
from xtalfast.report.svg import Axis, Figure, Series, density_plot, histogram, line_chart


@dataclass(frozen=True)
class _Section:
    """A part of the page. `missing` names what has to be given for it to appear."""

    key: str
    title: str
    missing: str
    content: Any = None


def write_report(path: str | os.PathLike, data: ReportData) -> None:
    """Write the report as one HTML file.

    Raises:
        MissingExtraError: jinja2 is not installed.
        InputError: arrays of a section do not fit together, or the file cannot be written.
    """
    write_text(path, render_report(data))


def render_report(data: ReportData) -> str:
    """The report as HTML text."""
    templates = environment("Writing an HTML report")
    templates.filters["plain"] = _plain
    sections = _sections(data)
    return templates.get_template("integration.html").render(
        data=data,
        created=data.created or datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        parameters=sorted(data.parameters.items(), key=lambda item: (item[0] not in data.changed, item[0])),
        sections={section.key: section.content for section in sections if section.content},
        shown=[section for section in sections if section.content],
        missing=[section for section in sections if not section.content],
    )


def _sections(data: ReportData) -> list[_Section]:
    pulls, pull_tables = _pulls(data)
    return [
        _Section("statistics", "Merging statistics", "merging statistics", _statistics(data.statistics)),
        _Section("comparisons", "Intensities compared", "intensities to compare with", _comparisons(data.comparisons)),
        _Section(
            "pulls",
            "Are the sigmas right?",
            "truth or thinned halves to judge the sigmas by",
            pulls and (pulls, pull_tables),
        ),
        _Section("signal", "Signal to noise", "intensities", _signal(data.intensities)),
        _Section("profiles", "Profiles over the detector", "profiles", _profiles(data.profiles)),
        _Section("shoeboxes", "Shoeboxes", "example shoeboxes", _shoeboxes(data.shoeboxes)),
        _Section("training", "Training", "a training history (nothing was trained)", _training(data.history)),
        _Section("outliers", "Outliers", "outliers", _outliers(data.outliers)),
        _Section("flags", "Warnings and flags", "warnings and flag counts", bool(data.warnings or data.flags)),
    ]


def _statistics(sets: Sequence[MergingStatistics]) -> dict[str, Any] | None:
    if not sets:
        return None
    d_all = np.array([[s.d_max, s.d_min] for one in sets for s in one.shells])
    low, high = float(d_all.max() ** -2), float(d_all.min() ** -2)
    ticks = [(s2, f"{s2**-0.5:.2f}") for s2 in np.linspace(low, high, 6)]
    x = Axis("resolution (Å), even in 1/d²", limits=(low, high), ticks=ticks)
    charts = [
        ("cc_half", Axis("CC½ of random half sets", limits=(None, 1.02))),
        ("mean_I_over_sigma", Axis("⟨I/σ(I)⟩ of merged intensities", log=True)),
        ("r_meas", Axis("R meas", limits=(0.0, None))),
        ("r_pim", Axis("R pim", limits=(0.0, None))),
        ("cc_anom", Axis("CC of anomalous differences")),
        ("completeness", Axis("completeness", limits=(0.0, 1.02))),
    ]
    figures = []
    for name, y in charts:
        series = []
        for one in sets:
            middle = [(s.d_max**-2 + s.d_min**-2) / 2 for s in one.shells]
            series.append(Series(middle, [getattr(s, name) for s in one.shells], one.label, markers=True))
        if any(np.isfinite(np.asarray(s.y, float)).any() for s in series):
            figures.append(line_chart(series, x, y))
    heads = [title for title, _, _ in SHELL_COLUMNS]
    tables = []
    for one in sets:
        rows = [[format_value(shell, name, spec) for _, name, spec in SHELL_COLUMNS] for shell in one.shells]
        total = [format_value(one.overall, name, spec) for _, name, spec in SHELL_COLUMNS]
        left_out = {k: v for k, v in {**one.rejected, "systematically absent": one.n_absent}.items() if v}
        tables.append({"set": one, "rows": rows, "total": total, "left_out": left_out})
    return {"figures": figures, "heads": heads, "tables": tables}


def _comparisons(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    out = []
    for one in comparisons:
        x, y, sigma = _compared(one)
        usable = np.isfinite(x) & np.isfinite(y) & (sigma > 0)
        rows = [("reflections", f"{np.count_nonzero(usable):,}")]
        if usable.any():
            found = compare_with_truth(y, sigma**2, x, scale=1.0)
            rows += [
                ("correlation", _fixed(found.cc, 4)),
                ("R = Σ|I − I_ref| / Σ I_ref", _fixed(found.r, 4)),
                ("reflections with I_ref > 10 σ", f"{found.n_log:,}"),
                ("slope of log I on log I_ref, strong", _fixed(found.log_slope, 4)),
                ("correlation of log I, strong", _fixed(found.log_correlation, 4)),
            ]
        positive = usable & (x > 0) & (y > 0)
        hidden = np.count_nonzero(usable & ~positive)
        caption = f"Ours against {one.name}; dashed: equal."
        if hidden:
            caption += f" {hidden:,} reflections with a value at or below zero have no place on log axes."
        figure = density_plot(
            x[positive], y[positive], Axis(f"{one.name} (counts)", log=True), Axis("ours (counts)", log=True), caption
        )
        out.append({"name": one.name, "figure": figure, "rows": rows})
    return out


def _compared(one: Comparison) -> tuple[NDArray, NDArray, NDArray]:
    x, y, sigma = (np.asarray(v, float) for v in (one.reference, one.value, one.sigma))
    if not x.shape == y.shape == sigma.shape or x.ndim != 1:
        shapes = ", ".join(str(list(v.shape)) for v in (x, y, sigma))
        raise InputError(f"comparison with {one.name}: reference, value and sigma must be [N], got {shapes}")
    return x, y, sigma


def _fixed(value: float, digits: int, sign: str = "") -> str:
    return format(value, f"{sign}.{digits}f") if math.isfinite(value) else "–"


def _pulls(data: ReportData) -> tuple[list[Figure], list[dict[str, Any]]]:
    samples = {name: np.asarray(z, float) for name, z in data.pulls.items()}
    tables = []
    for one in data.comparisons:
        if not one.is_truth:
            continue
        x, y, sigma = _compared(one)
        usable = np.isfinite(x) & np.isfinite(y) & (sigma > 0)
        samples[f"against {one.name}"] = (y[usable] - x[usable]) / sigma[usable]
        rows = []
        for part in compare_with_truth(y, sigma**2, x, scale=1.0).pulls if usable.any() else ():
            label = f"below {part.high:g}" if part.low == -math.inf else f"{part.low:g} – {part.high:g}"
            label = f"above {part.low:g}" if part.high == math.inf else label
            values = _fixed(part.mean, 2, "+"), _fixed(part.sd, 2), _fixed(part.robust_sd, 2)
            rows.append([label, f"{part.n:,}", *values])
        tables.append({"name": one.name, "rows": rows})
    for kind in data.calibrations:
        samples[kind.name] = kind.pulls
        rows = []
        for b in kind.bins:
            label = f"above {b.low:g}" if b.high == math.inf else f"{b.low:g} – {b.high:g}"
            rows.append([label, f"{b.n:,}", _fixed(b.mean, 2, "+"), _fixed(b.sd, 2), _fixed(b.factor, 2)])
        tables.append({"name": kind.name, "rows": rows})
    if not samples:
        return [], []
    caption = (
        "Errors in units of the stated sigma. Right sigmas follow the dashed curve; narrower means sigmas too large."
    )
    return [
        histogram(samples, Axis("pull, (I − reference) / σ", limits=(-5.0, 5.0)), normal=True, caption=caption)
    ], tables


def _signal(intensities: Mapping[str, tuple[NDArray, NDArray]]) -> list[Figure]:
    if not intensities:
        return []
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = {name: np.asarray(i, float) / np.asarray(s, float) for name, (i, s) in intensities.items()}
    value = {name: np.asarray(i, float) for name, (i, _) in intensities.items()}
    strong = {name: np.where(v > 0, v, np.nan) for name, v in value.items()}
    positive = any(np.isfinite(v).any() for v in strong.values())
    figures = [histogram(ratio, Axis("I / σ(I)", limits=(-4.0, 16.0)), caption="I/σ(I) of single observations.")]
    if positive:
        caption = "Intensities above zero, logarithmic."
        figures.append(histogram(strong, Axis("I (counts)", log=True), caption=caption))
    return figures


def _profiles(grid: ProfileGrid | None) -> dict[str, Any] | None:
    if grid is None:
        return None
    profiles = np.asarray(grid.profiles, float)
    if profiles.ndim != 4 or np.shape(grid.n) != profiles.shape[:2]:
        raise InputError(
            f"profiles must be [R, C, y, x] with n [R, C], got {list(profiles.shape)} and {list(np.shape(grid.n))}"
        )
    peak = float(np.nanmax(profiles)) if np.isfinite(profiles).any() else 1.0
    cells = [
        [{"uri": data_uri(colored(profiles[r, c], 0, peak)), "n": int(grid.n[r, c])} for c in range(profiles.shape[1])]
        for r in range(profiles.shape[0])
    ]
    return {"cells": cells, "peak": peak, "size": profiles.shape[2:]}


def _shoeboxes(examples: Sequence[ShoeboxExample]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in examples:
        counts, model, mask = np.asarray(one.counts, float), np.asarray(one.model, float), np.asarray(one.mask, bool)
        if counts.ndim != 3 or not counts.shape == model.shape == mask.shape:
            shapes = ", ".join(str(list(a.shape)) for a in (counts, model, mask))
            raise InputError(f"shoebox {one.hkl}: counts, model and mask must be one [z, y, x], got {shapes}")
        top = max(float(counts[mask].max(initial=1)), float(model[mask].max(initial=0)))
        # Poisson noise has the same size everywhere on a square-root scale; so has the colour.
        data_rgb, model_rgb = (
            np.stack([colored(np.sqrt(np.maximum(z, 0)), 0, math.sqrt(top), SEQUENTIAL, m) for z, m in zip(a, mask)])
            for a in (counts, model)
        )
        residual = (counts - model) / np.sqrt(np.maximum(model, 0.1))
        residual_rgb = np.stack([colored(z, -4, 4, DIVERGING, m) for z, m in zip(residual, mask)])
        pictures = [
            ("data", data_uri(tile(data_rgb))),
            ("model", data_uri(tile(model_rgb))),
            ("residual", data_uri(tile(residual_rgb))),
        ]
        n_pixels = max(int(mask.sum()), 1)
        chi2 = float((residual[mask] ** 2).sum() / n_pixels)
        groups.setdefault(one.group, []).append({"box": one, "pictures": pictures, "top": top, "chi2": chi2})
    return groups


def _training(history: Mapping[str, Sequence[float]]) -> list[Figure]:
    at = next((name for name in ("epoch", "step") if name in history), None)
    curves = {name: values for name, values in history.items() if name not in ("epoch", "step")}
    curves = {name: values for name, values in curves.items() if np.isfinite(np.asarray(values, float)).any()}
    figures = []
    for kind in ("loss", ""):  # losses share one chart, everything else has its own
        group = {n: v for n, v in curves.items() if ("loss" in n) == bool(kind)}
        for names in [list(group)] if kind and group else [[n] for n in group]:
            series = []
            for name in names:
                x = history[at] if at else range(1, len(curves[name]) + 1)
                if len(x) != len(curves[name]):
                    raise InputError(f"history {name!r} must be as long as {at!r} ({len(x)}), got {len(curves[name])}")
                keep = np.isfinite(np.asarray(curves[name], float))  # validation is logged less often
                series.append(Series(np.asarray(x, float)[keep], np.asarray(curves[name], float)[keep], name))
            label = "loss per reflection (nats)" if kind else names[0]
            figures.append(line_chart(series, Axis(at or "epoch"), Axis(label)))
    return figures


def _outliers(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not rows:
        return None
    heads = list(rows[0])
    return {"heads": heads, "rows": [[row.get(head) for head in heads] for row in rows]}


def _plain(value: Any) -> str:
    """A value in a table: few digits, a dash for nothing."""
    if isinstance(value, float | np.floating):
        number = float(value)
        if not math.isfinite(number):
            return "–"
        return f"{number:,.0f}" if 1e3 <= abs(number) < 1e9 else f"{number:.4g}"
    if value is None:
        return "–"
    if isinstance(value, tuple | list | np.ndarray):
        return " ".join(_plain(v) for v in value)
    return str(value)
