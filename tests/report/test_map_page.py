"""The page with the map: one file, fetches nothing, and holds the map that was given."""

import base64
import re

import gemmi
import numpy as np
import pytest

from xtalfast.cli import main
from xtalfast.io.mtz_phases import write_phases
from xtalfast.report.map_page import MapPage, ccp4_bytes, coarsened, render_map_page

CELL = gemmi.UnitCell(12, 14, 16, 90, 100, 90)


def smooth_map(shape):
    x, y, z = np.meshgrid(*(np.arange(n) / n for n in shape), indexing="ij")
    return (np.cos(2 * np.pi * x) + np.sin(2 * np.pi * (2 * y + z)) + 0.3 * np.cos(2 * np.pi * 3 * z)).astype("f4")


def embedded_map(html, folder):
    text = re.search(r'<script type="text/plain" id="ccp4">([^<]*)</script>', html)[1]
    (folder / "embedded.ccp4").write_bytes(base64.b64decode(text))
    read = gemmi.read_ccp4_map(str(folder / "embedded.ccp4"))
    read.setup(0.0)
    return read


def fetches(html):
    """What a browser would fetch: addresses in attributes and style sheets that are not within the page."""
    page = re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    found = re.findall(r'(?:src|href)="([^"]*)"', page) + re.findall(r"<script[^>]*src=", html)
    return [address for address in found if not address.startswith(("data:", "#"))] + re.findall(r"url\(|@import", page)


def test_map_in_the_page_is_the_map(tmp_path):
    values = smooth_map((8, 10, 12))
    page = MapPage("a < b", "Map", values, CELL, "Density", 1.5, (0.5, 0.5, 0.5), {"R": "0.1"}, {"seed": "1"})
    html = render_map_page(page)
    assert fetches(html) == [] and "a &lt; b" in html and "UglyMol" in html
    read = embedded_map(html, tmp_path)
    assert read.grid.unit_cell.parameters == pytest.approx(CELL.parameters)
    assert read.header_float(55) == pytest.approx(values.std(), rel=1e-5)
    # gemmi reads the bytes as they are; the viewer scales -128 .. 127 to the extremes in the header.
    low, high = read.header_float(20), read.header_float(21)
    scaled = (np.array(read.grid) + 128) / 255 * (high - low) + low
    assert np.abs(scaled - values).max() <= 0.51 * (high - low) / 255


def test_a_constant_map_is_shown():
    assert len(ccp4_bytes(np.ones((4, 4, 4), np.float32), CELL)) == 1024 + 64


def test_a_large_map_is_shown_on_a_coarser_grid():
    values = smooth_map((24, 30, 32))
    coarse = coarsened(values, 6000)
    assert coarse.size <= 6000
    assert coarse == pytest.approx(smooth_map(coarse.shape), abs=1e-5)
    assert coarsened(values, values.size) is values


def test_page_of_a_patterson_map(tmp_path, capsys):
    """From the command line: the map written and the map shown are one, and its peaks are listed."""
    group = gemmi.SpaceGroup("P 21")
    hkl = np.array(gemmi.make_miller_array(CELL, group, 2.0))
    x = np.array([[0.1, 0.2, 0.3], [0.4, 0.1, 0.7]])
    atoms = np.concatenate([x, np.stack([-x[:, 0], x[:, 1] + 0.5, -x[:, 2]], 1)])
    f = 26 * np.exp(2j * np.pi * hkl @ atoms.T).sum(1) * np.exp(-5 * CELL.calculate_1_d2_array(hkl))
    write_phases(tmp_path / "f.mtz", hkl, f, cell=CELL, space_group=group, observed=abs(f))
    command = ["patterson", str(tmp_path / "f.mtz"), "-o", str(tmp_path / "p.ccp4"), "--labels", "FP"]
    assert main([*command, "--report", str(tmp_path / "p.html")]) == 0
    html = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert fetches(html) == [] and "P 1 21 1" in html and "length, Å" in html
    shown, written = embedded_map(html, tmp_path), gemmi.read_ccp4_map(str(tmp_path / "p.ccp4"))
    written.setup(0.0)
    assert (shown.grid.nu, shown.grid.nv, shown.grid.nw) == (written.grid.nu, written.grid.nv, written.grid.nw)
