"""The report: complete, self-contained, safe, and with the numbers it was given."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import gemmi
import numpy as np
import pytest

from xtalfast.errors import InputError
from xtalfast.metrics import Observations, merging_statistics
from xtalfast.metrics.shells import SHELL_COLUMNS, format_value
from xtalfast.report import (
    Comparison,
    ProfileGrid,
    ReportData,
    ShoeboxExample,
    example_rows,
    mean_profiles,
    render_report,
    write_report,
)

pytest.importorskip("jinja2", reason="reports need the extra report")

SECTIONS = {
    "statistics", "comparisons", "pulls", "signal", "profiles", "shoeboxes", "training", "outliers", "flags", "run",
}  # fmt: skip
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Sections, table cells, pictures and every address on the page; checks that tags are closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.sections, self.rows, self.urls, self.tags, self.text = [], [], [], [], []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.sections.append(attributes["id"])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        self.urls += [v for k, v in attributes.items() if k in ("href", "src", "srcset", "action", "data", "poster")]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] in ("td", "th") and self.rows:
            self.rows[-1][-1] += data


def make_statistics(source: str = "ours.refl"):
    rng = np.random.default_rng(0)
    group, cell = gemmi.SpaceGroup("P 43 21 2"), gemmi.UnitCell(30, 30, 50, 90, 90, 90)
    hkl = np.repeat(gemmi.make_miller_array(cell, group, 3.0), 4, axis=0)
    I = np.repeat(rng.exponential(100, len(hkl) // 4), 4) + rng.normal(0, 10, len(hkl))
    data = Observations(hkl, I, np.full(len(hkl), 10.0), cell, group, source=source, channel="prf", scaling="unscaled")
    return merging_statistics(data, n_bins=5)


def make_shoebox(group: str, note: str = "") -> ShoeboxExample:
    rng = np.random.default_rng(1)
    model = np.full((3, 9, 7), 2.0)
    model[1, 4, 3] = 50
    return ShoeboxExample(
        group, (1, -2, 3), (10.0, 20.0, 4.5), 2.5, 48.0, 7.0, 2.0, rng.poisson(model), model, model > 0, note
    )


def full_data(**changes) -> ReportData:
    rng = np.random.default_rng(2)
    truth = rng.exponential(200, 500)
    sigma = np.sqrt(truth + 25)
    values = {
        "title": "lysozyme",
        "key_figures": {"integrated": "500"},
        "parameters": {"seed": 3, "learning_rate": 0.001, "d_min": None},
        "changed": ["seed"],
        "versions": {"xtalfast": "0.1.0"},
        "seconds": {"extract": 1.25},
        "files": ["integrated.refl"],
        "warnings": ["3 reflections reach off the panel"],
        "flags": {"Overloaded": 12345},
        "history": {
            "epoch": [1, 2, 3],
            "train_loss": [9, 5, 4.0],
            "held_out_loss": [np.nan, 6, 5.0],
            "rate": [1, 1, 0.5],
        },
        "statistics": [make_statistics(), make_statistics("dials.refl")],
        "profiles": ProfileGrid(rng.random((3, 3, 9, 9)), np.arange(9).reshape(3, 3)),
        "shoeboxes": [make_shoebox("strong"), make_shoebox("weak")],
        "comparisons": [Comparison("truth", truth, truth + sigma * rng.standard_normal(500), sigma, is_truth=True)],
        "intensities": {"prf": (truth, sigma)},
        "pulls": {"thinned halves": rng.standard_normal(500)},
        "outliers": [{"hkl": (1, 2, 3), "I": 123456.7, "pull": 9.25}],
    }
    return ReportData(**{**values, **changes})


def test_full_report_has_every_section_and_needs_nothing_else():
    html = render_report(full_data())
    page = Page(html)
    assert set(page.sections) == SECTIONS
    assert "left-out" not in html
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert all(url.startswith(("#", "data:image/png;base64,")) for url in page.urls)
    assert not re.search(r"https?:|@import|url\(", html)
    assert len(html) < 2_000_000


@pytest.mark.parametrize(
    ("field", "empty", "section", "named"),
    [
        ("statistics", (), "statistics", "merging statistics"),
        ("profiles", None, "profiles", "profiles"),
        ("shoeboxes", (), "shoeboxes", "example shoeboxes"),
        ("history", {}, "training", "nothing was trained"),
        ("outliers", (), "outliers", "outliers"),
        ("intensities", {}, "signal", "intensities"),
        ("comparisons", (), "comparisons", "intensities to compare with"),
    ],
)
def test_a_missing_part_is_left_out_and_named(field, empty, section, named):
    html = render_report(full_data(**{field: empty}))
    assert set(Page(html).sections) == SECTIONS - {section}
    assert f"#{section}" not in html
    left_out = re.search(r'<p id="left-out">(.*?)</p>', html, re.S)
    assert left_out and named in left_out[1]


def test_pulls_need_truth_or_thinned_halves():
    rng = np.random.default_rng(0)
    other = Comparison("DIALS", rng.random(50) + 1, rng.random(50) + 1, np.ones(50))
    assert "pulls" not in Page(render_report(full_data(comparisons=[other], pulls={}))).sections
    assert "pulls" in Page(render_report(full_data(comparisons=[other]))).sections


def test_empty_report():
    page = Page(render_report(ReportData("nothing")))
    assert page.sections == ["run"]


def test_tables_hold_the_numbers_given():
    data = full_data()
    rows = Page(render_report(data)).rows
    for statistics in data.statistics:
        for shell in [*statistics.shells, statistics.overall]:
            assert [format_value(shell, name, spec) for _, name, spec in SHELL_COLUMNS] in rows
    assert ["Overloaded", "12,345"] in rows
    assert ["extract", "1.2 s"] in rows
    assert ["1 2 3", "123,457", "9.25"] in rows
    # Changed parameters come first; nothing stays a bare None.
    start = rows.index(["seed", "3"])
    assert rows[start + 1 : start + 3] == [["d_min", "–"], ["learning_rate", "0.001"]]


def test_comparison_figures_are_those_of_the_data():
    x = np.geomspace(100, 1e6, 200)
    one = Comparison("truth", x, 2 * x**0.9, np.sqrt(x) / 2, is_truth=True)
    rows = dict(r for r in Page(render_report(ReportData("t", comparisons=[one]))).rows if len(r) == 2)
    assert rows["slope of log I on log I_ref, strong"] == "0.9000"
    assert rows["correlation of log I, strong"] == "1.0000"
    assert rows["reflections"] == "200"


def test_pull_table_sees_sigmas_that_are_twice_too_large():
    rng = np.random.default_rng(4)
    truth = np.full(20000, 30.0)
    value = truth + 5 * rng.standard_normal(20000)
    one = Comparison("truth", truth, value, np.full(20000, 10.0), is_truth=True)
    row = next(r for r in Page(render_report(ReportData("t", comparisons=[one]))).rows if r and r[0] == "2 – 5")
    assert row[1] == "20,000"
    assert abs(float(row[2])) <= 0.01
    assert [float(v) for v in row[3:]] == pytest.approx([0.5, 0.5], abs=0.02)


HOSTILE = "<script>alert('x')</script>\"&"


def test_hostile_strings_are_text():
    statistics = make_statistics(HOSTILE)
    data = full_data(
        title=HOSTILE, key_figures={HOSTILE: HOSTILE}, parameters={HOSTILE: HOSTILE}, changed=[HOSTILE],
        versions={HOSTILE: HOSTILE}, files=[HOSTILE], warnings=[HOSTILE], flags={HOSTILE: 1}, seconds={HOSTILE: 1.0},
        history={"epoch": [1, 2], f"{HOSTILE} loss": [2.0, 1.0], HOSTILE: [1.0, 2.0]},
        statistics=[statistics, statistics],
        shoeboxes=[make_shoebox(HOSTILE, HOSTILE)], outliers=[{HOSTILE: HOSTILE}], pulls={HOSTILE: np.zeros(5)},
        intensities={HOSTILE: (np.ones(3), np.ones(3)), "b": (np.ones(3), np.ones(3))},
        comparisons=[Comparison(HOSTILE, np.ones(5), np.ones(5), np.ones(5), is_truth=True)],
    )  # fmt: skip
    html = render_report(data)
    page = Page(html)
    assert "script" not in page.tags
    assert "<script" not in html
    assert set(page.sections) == SECTIONS
    assert HOSTILE in "".join(page.text)


def test_nan_and_degenerate_input_still_gives_a_page():
    nan = np.full(4, np.nan)
    data = full_data(
        comparisons=[Comparison("truth", nan, nan, nan, is_truth=True), Comparison("none", *[np.empty(0)] * 3)],
        intensities={"prf": (nan, nan), "sum": (-np.ones(4), np.ones(4))},
        pulls={"a": nan},
        profiles=ProfileGrid(np.full((2, 2, 3, 3), np.nan), np.zeros((2, 2), int)),
        history={"epoch": [1], "train_loss": [np.nan], "held_out_loss": [3.0]},
    )
    assert set(Page(render_report(data)).sections) == SECTIONS


def test_write_report_replaces_the_file_whole(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(InputError):
        write_report(path, full_data(profiles=ProfileGrid(np.zeros((3, 3, 2)), np.zeros((3, 3)))))
    assert path.read_text() == "old"
    write_report(path, full_data(created="1 May 2026"))
    assert "1 May 2026" in path.read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_bad_input_is_named():
    with pytest.raises(InputError, match=r"comparison with truth: .* must be \[N\], got \[3\], \[2\], \[3\]"):
        render_report(ReportData("t", comparisons=[Comparison("truth", np.ones(3), np.ones(2), np.ones(3))]))
    box = make_shoebox("weak")
    broken = ShoeboxExample(**{**vars(box), "mask": box.mask[:1]})
    with pytest.raises(InputError, match=r"shoebox \(1, -2, 3\): counts, model and mask"):
        render_report(ReportData("t", shoeboxes=[broken]))
    with pytest.raises(InputError, match="history 'train_loss' must be as long as 'epoch'"):
        render_report(ReportData("t", history={"epoch": [1, 2], "train_loss": [1.0]}))


def test_mean_profiles_puts_each_reflection_in_its_region():
    profiles = np.zeros((4, 2, 3, 3))
    profiles[:, :, 1, 1] = 0.5
    profiles[3] = 1 / 18
    xy = np.array([[5.0, 5], [95, 5], [5, 59.9], [99.9, 59.9]])
    grid = mean_profiles(profiles, xy, (100, 60), grid=(2, 3))
    np.testing.assert_array_equal(grid.n, [[1, 0, 1], [1, 0, 1]])
    assert grid.profiles.shape == (2, 3, 3, 3)
    assert grid.profiles[0, 0, 1, 1] == 1
    np.testing.assert_allclose(grid.profiles[1, 2], 1 / 9)
    assert np.isnan(grid.profiles[0, 1]).all()


def test_example_rows_are_what_they_are_called():
    rng = np.random.default_rng(0)
    intensity, sigma = rng.exponential(300, 400) - 20, np.full(400, 10.0)
    misfit = rng.random(400)
    misfit[7], misfit[9] = 5.0, np.nan
    rows = example_rows(intensity, sigma, misfit, n_each=4, seed=1)
    ratio = intensity / sigma
    assert np.all(ratio[rows["strong"]] > 20)
    assert np.all((ratio[rows["medium"]] > 3) & (ratio[rows["medium"]] < 10))
    assert np.all(ratio[rows["weak"]] < 1)
    assert rows["outlier"][0] == 7 and 9 not in rows["outlier"]
    assert "strong" not in example_rows(-intensity, sigma)
