"""Line charts, histograms and density plots as inline SVG.

Drawn here and not by a plotting library: an interactive one would add megabytes of script to every report, and what a
report needs is axes with units, a few lines and tooltips. The text scales with the page and prints sharply.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from xml.etree import ElementTree

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xtalfast.report.images import colored, data_uri

# Okabe & Ito's colours that are legible on white, in the order in which series use them.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#6b6b6b", "#b58900")
_WIDTH, _HEIGHT = 460, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 14, 12, 46
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Series:
    """One line: points [n], a name, and how it is drawn. NaN leaves a gap."""

    x: ArrayLike
    y: ArrayLike
    label: str = ""
    dashed: bool = False
    markers: bool = False
    steps: bool = False
    color: str = ""


@dataclass(frozen=True)
class Axis:
    """What an axis shows, with its unit in the label. `ticks`: positions with their texts, else chosen."""

    label: str
    log: bool = False
    limits: tuple[float | None, float | None] = (None, None)
    ticks: Sequence[tuple[float, str]] | None = None


@dataclass(frozen=True)
class Figure:
    """A drawing with caption and legend (colour, dashed, name)."""

    svg: str
    caption: str = ""
    legend: list[tuple[str, bool, str]] = field(default_factory=list)


@dataclass(frozen=True)
class _Scale:
    """Data to drawing units along one axis."""

    low: float
    high: float
    log: bool
    start: float
    stop: float

    def __call__(self, values: ArrayLike) -> NDArray[np.float64]:
        at: NDArray[np.float64] = np.asarray(values, float)
        low, high = self.low, self.high
        if self.log:
            with np.errstate(divide="ignore", invalid="ignore"):
                at, low, high = np.log10(at), math.log10(low), math.log10(high)
        return self.start + (at - low) / (high - low) * (self.stop - self.start)


def number(value: float) -> str:
    """A tick label: short, powers of ten when far from one."""
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)) + 1e-9)
    if -4 < exponent < 5:
        return f"{value:.10g}".replace("-", "−")
    mantissa = value / 10.0**exponent
    power = "10" + str(exponent).translate(_SUPERSCRIPT)
    return power if abs(mantissa - 1) < 1e-9 else f"{mantissa:.3g}".replace("-", "−") + "·" + power


def linear_ticks(low: float, high: float, n: int = 5) -> list[float]:
    """About n round numbers between low and high."""
    raw = (high - low) / n
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, n: int = 6) -> list[float]:
    """Powers of ten between low and high, with 2 and 5 when there are few, every k-th when there are many."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    if last - first >= 2:
        stride = max(1, math.ceil((last - first + 1) / n))
        return [10.0**k for k in range(first, last + 1, stride)]
    ticks = [m * 10.0**k for k in range(first - 1, last + 1) for m in (1, 2, 5)]
    return [t for t in ticks if low * (1 - 1e-9) <= t <= high * (1 + 1e-9)]


def _limits(axis: Axis, values: Sequence[ArrayLike]) -> tuple[float, float]:
    data = np.concatenate([np.ravel(np.asarray(v, float)) for v in values]) if values else np.empty(0)
    data = data[np.isfinite(data) & ((data > 0) if axis.log else True)]
    low, high = (float(data.min()), float(data.max())) if len(data) else (1.0, 10.0)
    fixed_low, fixed_high = axis.limits
    if axis.log:
        low, high = (low, high) if high > low * (1 + 1e-9) else (low / 2, high * 2)
    elif not high > low:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    else:
        pad = 0.04 * (high - low)
        low, high = low - pad, high + pad
    low = low if fixed_low is None else fixed_low
    high = high if fixed_high is None else fixed_high
    return (low, high) if high > low else (low, low + 1)


class _Canvas:
    """An empty pair of axes; y grows upwards."""

    def __init__(self, x: Axis, y: Axis, x_values: Sequence[ArrayLike], y_values: Sequence[ArrayLike], title: str):
        self.root = ElementTree.Element(
            "svg", {"viewBox": f"0 0 {_WIDTH} {_HEIGHT}", "role": "img", "aria-label": title, "class": "chart"}
        )
        self.x = _Scale(*_limits(x, x_values), x.log, _LEFT, _WIDTH - _RIGHT)
        self.y = _Scale(*_limits(y, y_values), y.log, _HEIGHT - _BOTTOM, _TOP)
        self._draw_axes(x, y)

    def add(self, tag: str, text: str = "", **attributes: object) -> ElementTree.Element:
        values = {
            k.rstrip("_").replace("_", "-"): f"{v:.2f}" if isinstance(v, float) else str(v)
            for k, v in attributes.items()
        }
        element = ElementTree.SubElement(self.root, tag, values)
        element.text = text or None
        return element

    def _draw_axes(self, x: Axis, y: Axis) -> None:
        bottom, top, left, right = _HEIGHT - _BOTTOM, _TOP, _LEFT, _WIDTH - _RIGHT
        for value, text in _ticks(x, self.x):
            at = float(self.x(value))
            self.add("line", class_="grid", x1=at, x2=at, y1=top, y2=bottom)
            self.add("text", text, class_="tick", x=at, y=bottom + 16, text_anchor="middle")
        for value, text in _ticks(y, self.y):
            at = float(self.y(value))
            self.add("line", class_="grid", x1=left, x2=right, y1=at, y2=at)
            self.add("text", text, class_="tick", x=left - 6, y=at + 4, text_anchor="end")
        self.add("path", class_="axis", d=f"M{left} {top}V{bottom}H{right}")
        self.add("text", x.label, class_="label", x=(left + right) / 2, y=_HEIGHT - 8, text_anchor="middle")
        middle = (top + bottom) / 2
        self.add(
            "text", y.label, class_="label", x=14, y=middle, text_anchor="middle", transform=f"rotate(-90 14 {middle})"
        )

    def line(self, series: Series, color: str) -> None:
        x, y = np.asarray(series.x, float), np.asarray(series.y, float)
        if series.steps:  # edges [n + 1] and heights [n]
            x, y = np.repeat(x, 2)[1:-1], np.repeat(y, 2)
        px, py = self.x(x), np.clip(self.y(y), _TOP - 2, _HEIGHT - _BOTTOM)
        shown = np.isfinite(px) & np.isfinite(py)
        path, pen_down = [], False
        for a, b, ok in zip(px, py, shown):
            if ok:
                path.append(f"{'L' if pen_down else 'M'}{a:.1f} {b:.1f}")
            pen_down = bool(ok)
        style = {"stroke_dasharray": "5 4"} if series.dashed else {}
        self.add("path", class_="line", d="".join(path) or "M0 0", stroke=color, **style)
        if series.markers:
            for i in np.flatnonzero(shown):
                dot = self.add("circle", cx=float(px[i]), cy=float(py[i]), r=3, fill=color)
                ElementTree.SubElement(dot, "title").text = f"{series.label}: {number(float(f'{y[i]:.4g}'))}"

    def text(self) -> str:
        return ElementTree.tostring(self.root, encoding="unicode")


def _ticks(axis: Axis, scale: _Scale) -> list[tuple[float, str]]:
    if axis.ticks is not None:
        return [(value, text) for value, text in axis.ticks if scale.low <= value <= scale.high]
    chosen = (log_ticks if axis.log else linear_ticks)(scale.low, scale.high)
    return [(value, number(float(f"{value:.10g}"))) for value in chosen]


def line_chart(series: Sequence[Series], x: Axis, y: Axis, caption: str = "") -> Figure:
    """Lines over common axes."""
    canvas = _Canvas(x, y, [s.x for s in series], [s.y for s in series], caption or f"{y.label} against {x.label}")
    colors = [s.color or COLORS[i % len(COLORS)] for i, s in enumerate(series)]
    for one, color in zip(series, colors):
        canvas.line(one, color)
    return Figure(canvas.text(), caption, [(c, s.dashed, s.label) for c, s in zip(colors, series) if s.label])


def histogram(
    samples: Mapping[str, ArrayLike], x: Axis, *, n_bins: int = 60, normal: bool = False, caption: str = ""
) -> Figure:
    """Distributions of named samples as fractions per unit of x; `normal` adds the standard normal density.

    Values beyond the limits of `x` are left off the drawing but count in the normalisation.
    """
    low, high = _limits(x, list(samples.values()))
    edges = np.geomspace(low, high, n_bins + 1) if x.log else np.linspace(low, high, n_bins + 1)
    width = np.diff(np.log10(edges)) if x.log else np.diff(edges)
    series = []
    for name, values in samples.items():
        finite = np.asarray(values, float)
        finite = finite[np.isfinite(finite)]
        height = np.histogram(finite, edges)[0] / max(len(finite), 1) / width
        series.append(Series(edges, height, name, steps=True))
    if normal:
        grid = np.linspace(low, high, 121)
        density = np.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi)
        series.append(Series(grid, density, "standard normal", dashed=True, color="#222222"))
    axis = Axis(x.label, x.log, (float(edges[0]), float(edges[-1])), x.ticks)
    per = "per decade" if x.log else "per unit"
    return line_chart(series, axis, Axis(f"fraction {per}", limits=(0.0, None)), caption)


def density_plot(x_values: ArrayLike, y_values: ArrayLike, x: Axis, y: Axis, caption: str = "") -> Figure:
    """Where any number of points lie, as a picture of their (square-root) density; the dashed line is y = x."""
    points = np.stack([np.ravel(np.asarray(x_values, float)), np.ravel(np.asarray(y_values, float))])
    canvas = _Canvas(x, y, [points[0]], [points[1]], caption or f"{y.label} against {x.label}")
    left, right, top, bottom = _LEFT, _WIDTH - _RIGHT, _TOP, _HEIGHT - _BOTTOM
    px, py = canvas.x(points[0]), canvas.y(points[1])
    shown = np.isfinite(px) & np.isfinite(py)
    shape = (int(bottom - top) // 2, int(right - left) // 2)
    counts, _, _ = np.histogram2d(py[shown], px[shown], shape, ((top, bottom), (left, right)))
    # A single point must be visible on white: occupied cells start at a quarter of the scale.
    peak = max(float(counts.max(initial=0)), 1.0)
    shade = np.where(counts > 0, 0.25 + 0.75 * np.sqrt(counts / peak), 0)
    rgb = colored(shade, 0, 1)
    canvas.add(
        "image", href=data_uri(rgb), x=left, y=top, width=right - left, height=bottom - top,
        preserveAspectRatio="none", class_="density",
    )  # fmt: skip
    ends = np.array([max(canvas.x.low, canvas.y.low), min(canvas.x.high, canvas.y.high)])
    if ends[1] > ends[0]:
        canvas.line(Series(ends, ends, dashed=True), "#d55e00")
    return Figure(canvas.text(), caption)
