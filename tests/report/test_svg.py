"""Charts: ticks fall where they should, lines where the data are."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest

from xtalfast.report.svg import Axis, Series, density_plot, histogram, line_chart, linear_ticks, log_ticks, number


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-4, 16, [0, 5, 10, 15]), (0.97, 1.0, [0.97, 0.98, 0.99, 1.0])],
)
def test_linear_ticks_are_round(low, high, expected):
    ticks = linear_ticks(low, high)
    assert set(np.round(expected, 9)) <= set(np.round(ticks, 9))
    assert 2 <= len(ticks) <= 11
    assert all(low - 1e-9 <= t <= high + 1e-9 for t in ticks)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(1, 1000, [1, 10, 100, 1000]), (3, 60, [5, 10, 20, 50]), (1e-6, 1e6, [1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6])],
)
def test_log_ticks(low, high, expected):
    np.testing.assert_allclose(log_ticks(low, high, 7), expected)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.25, "0.25"), (-3, "−3"), (1e5, "10⁵"), (2e-5, "2·10⁻⁵"), (1000, "1000")]
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def points(figure) -> list[list[tuple[float, float]]]:
    root = ElementTree.fromstring(figure.svg)
    paths = [e.get("d") for e in root.iter("path") if e.get("class") == "line"]
    return [[tuple(map(float, p.split())) for p in d.replace("M", "|").replace("L", "|").split("|")[1:]] for d in paths]


def test_a_straight_line_is_straight_on_each_scale():
    x = np.geomspace(1, 1000, 7)
    for y, log in ((x**2, True), (x, False)):
        xy = np.array(points(line_chart([Series(x, y)], Axis("x", log=log), Axis("y", log=log)))[0])
        residual = xy[:, 1] - np.polyval(np.polyfit(*xy.T, 1), xy[:, 0])
        assert np.abs(residual).max() <= 0.1  # drawn with one decimal
        assert np.all(np.diff(xy[:, 1]) < 0)  # up is up


def test_a_gap_in_the_data_is_a_gap_in_the_line():
    figure = line_chart([Series([1, 2, 3, 4, 5], [1, 2, np.nan, 4, 5])], Axis("x"), Axis("y"))
    path = next(e.get("d") for e in ElementTree.fromstring(figure.svg).iter("path") if e.get("class") == "line")
    assert path.count("M") == 2


def test_histogram_is_a_density():
    n = 100_000
    rng = np.random.default_rng(0)
    figure = histogram({"a": rng.standard_normal(n)}, Axis("x", limits=(-5, 5)), n_bins=50, normal=True)
    steps, normal = (np.array(p) for p in points(figure))
    middle = (steps[0::2] + steps[1::2]) / 2
    floor = normal[:, 1].max()
    curve = floor - np.interp(middle[:, 0], normal[:, 0], normal[:, 1])
    # The drawn density is 0.399 high at the top of the normal curve; counting noise of bins of width 0.2.
    probability = 0.2 * 0.3989 * curve / curve.max()
    noise = curve.max() / 0.3989 * np.sqrt(probability / n) / 0.2
    assert np.all(np.abs(floor - middle[:, 1] - curve) < 4 * noise + 1)  # 1: a bin's mean is not its middle


def test_axis_labels_with_units_and_legend():
    figure = line_chart(
        [Series([1, 2], [1, 2], "ours"), Series([1, 2], [2, 1], "DIALS")], Axis("d (Å)"), Axis("I (counts)")
    )
    texts = [e.text for e in ElementTree.fromstring(figure.svg).iter("text")]
    assert "d (Å)" in texts and "I (counts)" in texts
    assert [name for _, _, name in figure.legend] == ["ours", "DIALS"]
    assert len({color for color, _, _ in figure.legend}) == 2


@pytest.mark.parametrize("values", [[], [3.0], [np.nan], [-1.0, 0.0]])
def test_degenerate_values_still_draw(values):
    for log in (False, True):
        ElementTree.fromstring(line_chart([Series(values, values)], Axis("x", log=log), Axis("y", log=log)).svg)
        ElementTree.fromstring(density_plot(values, values, Axis("x", log=log), Axis("y", log=log)).svg)
        ElementTree.fromstring(histogram({"a": values}, Axis("x", log=log)).svg)
