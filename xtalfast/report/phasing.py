"""The pages of `xtalfast solve` and `xtalfast patterson`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import gemmi
import numpy as np
from numpy.typing import NDArray

from xtalfast.density.peaks import find_peaks
from xtalfast.io.mtz_phases import ReflectionData
from xtalfast.phasing.output import density as density_of
from xtalfast.phasing.solve import Solution
from xtalfast.report.map_page import MapPage, write_map_page
from xtalfast.report.svg import Axis, Figure, Series, line_chart

_TRIALS_DRAWN = 12
_SHELLS = 20
_PEAKS = 30
_REACH = 5.0  # A, over which density is averaged to find the molecule


def write_solution_page(path: str | os.PathLike, found: Solution, title: str) -> None:
    """The page of a solution: its map, R of the trials, figures of merit by resolution.

    Args:
        path: the HTML file.
        found: the solution.
        title: of the page.

    Raises:
        MissingExtraError: jinja2 is not installed.
        InputError: the file cannot be written.
    """
    density = density_of(found.hkl, found.F * found.fom, found.cell, found.space_group, found.d_min)
    facts = found.to_json()
    parameters = facts.pop("parameters", {})
    warnings = []
    if not found.solved:
        warnings.append("Not solved: R_free of the best trial is too high. Do not use this map or these phases.")
    if found.hand.choice == "undecided":
        warnings.append("The hand is open: phased_inverse.mtz holds the mirror image, which fits the data as well.")
    key_figures = {
        "verdict": "solved" if found.solved else "not solved",
        "R": f"{found.r:.3f}",
        "R_free": f"{found.r_free:.3f}",
        "mean FOM": f"{found.fom.mean():.2f}",
        "resolution": f"{found.d_min:.2f} Å",
        "hand": f"{found.hand.choice} ({found.hand.confidence:.2f})",
        "starts": str(found.n_starts),
        "time": f"{found.seconds:.0f} s",
    }
    write_map_page(
        path,
        MapPage(
            title,
            "Phases from amplitudes",
            density,
            found.cell,
            "Density, FOM-weighted",
            1.5,
            densest_point(density, found.cell),
            key_figures,
            _plain({**parameters, **facts}),
            [figure for figure in (_r_curves(found), _fom_curve(found)) if figure is not None],
            warnings=warnings,
        ),
    )


def write_patterson_page(
    path: str | os.PathLike, patterson: NDArray, data: ReflectionData, title: str, facts: Mapping[str, Any]
) -> None:
    """The page of a Patterson map with its highest peaks apart from the origin.

    Args:
        path: the HTML file.
        patterson: [X, Y, Z] over the whole cell.
        data: the amplitudes it was made of.
        title: of the page.
        facts: how it was made.

    Raises:
        MissingExtraError: jinja2 is not installed.
        InputError: the file cannot be written.
    """
    peaks = find_peaks(patterson, data.cell, _PEAKS, inversion=True)
    origin = float(patterson[0, 0, 0])
    note = "Vectors between atoms, above the rms of the map; of u and −u one is listed, and the origin is not."
    if origin > patterson.std():
        note += f" The origin peak is {origin:.4g} high."
    write_map_page(
        path,
        MapPage(
            title,
            "Patterson map",
            patterson,
            data.cell,
            "Patterson map",
            3.0,
            (0.0, 0.0, 0.0),
            {
                "amplitudes": f"{len(data.hkl)}",
                "resolution": f"{data.d_min:.2f} Å",
                "space group": data.space_group.xhm(),
                "grid": " × ".join(map(str, patterson.shape)),
            },
            _plain({"cell": list(data.cell.parameters), "columns": ", ".join(data.labels), **facts}),
            [_intensity_curve(data)],
            [peak for peak in peaks if peak.height > patterson.std()],
            note,
        ),
    )


def densest_point(density: NDArray, cell: gemmi.UnitCell) -> tuple[float, float, float]:
    """Where the squared density, averaged over some 5 A, is highest: inside the molecule. Fractional."""
    squared = np.fft.rfftn(np.square(density))
    sizes = density.shape
    frequencies = (np.fft.fftfreq(sizes[0], 1 / sizes[0]), np.fft.fftfreq(sizes[1], 1 / sizes[1]))
    h = np.stack(np.meshgrid(*frequencies, np.arange(sizes[2] // 2 + 1), indexing="ij"), -1)
    s2 = ((h @ np.array(cell.frac.mat.tolist())) ** 2).sum(-1)
    averaged = np.fft.irfftn(squared * np.exp(-2 * (np.pi * _REACH / 2) ** 2 * s2), s=sizes, axes=(0, 1, 2))
    x, y, z = (np.array(np.unravel_index(int(averaged.argmax()), sizes)) / sizes).tolist()
    return x, y, z


def _plain(facts: Mapping[str, Any]) -> dict[str, str]:
    def text(value: Any) -> str:
        return value if isinstance(value, str) else f"{value:.4g}" if isinstance(value, float) else json.dumps(value)

    return {name.replace("_", " "): text(value) for name, value in facts.items()}


def _r_curves(found: Solution) -> Figure | None:
    """R against iteration of the trials that came furthest; the best in the strongest colour."""
    trials: dict[int, list[tuple[int, float]]] = {}
    for _, trial, iteration, _, r in found.history:
        trials.setdefault(trial, []).append((iteration, r))
    if not trials:
        return None
    best = sorted(trials, key=lambda trial: min(r for _, r in trials[trial]))[:_TRIALS_DRAWN]
    series = []
    for place, trial in reversed(list(enumerate(best))):
        points = np.array(sorted(trials[trial]))
        label, color = ("best", "#8f3300") if place == 0 else ("others" if place == 1 else "", "#9ab4c8")
        series.append(Series(points[:, 0], points[:, 1], label, markers=True, color=color))
    caption = f"R between the amplitudes of the modified map and the data, for {len(best)} of {len(trials)} trials"
    return line_chart(series, Axis("iteration"), Axis("R", limits=(0.0, None)), caption)


def _shells(hkl: NDArray, cell: gemmi.UnitCell) -> tuple[NDArray, list[NDArray]]:
    """Mean 1/d^2 of shells of equally many reflections, and the rows of each."""
    s2 = cell.calculate_1_d2_array(np.ascontiguousarray(hkl, np.int32))
    order = np.argsort(s2)
    rows = np.array_split(order, max(1, min(_SHELLS, len(order) // 20)))
    return np.array([s2[part].mean() for part in rows]), rows


def _resolution_axis() -> Axis:
    ticks = [(d**-2, f"{d:g}") for d in (10, 5, 4, 3, 2.5, 2, 1.8, 1.6, 1.5, 1.4, 1.2, 1.0, 0.9, 0.8)]
    return Axis("resolution, Å", ticks=ticks)


def _fom_curve(found: Solution) -> Figure:
    s2, rows = _shells(found.hkl, found.cell)
    fom = np.array([found.fom[part].mean() for part in rows])
    return line_chart(
        [Series(s2, fom)],
        _resolution_axis(),
        Axis("mean figure of merit", limits=(0.0, 1.0)),
        "Figures of merit by resolution; honest where the solution is right, too high where it is wrong",
    )


def _intensity_curve(data: ReflectionData) -> Figure:
    s2, rows = _shells(data.hkl, data.cell)
    mean = np.array([np.square(np.abs(data.F[part])).mean() for part in rows])
    positive = mean > 0
    return line_chart(
        [Series(s2[positive], np.log(mean[positive]))],
        _resolution_axis(),
        Axis("ln ⟨F²⟩"),
        "Mean intensity by resolution (Wilson plot)",
    )
