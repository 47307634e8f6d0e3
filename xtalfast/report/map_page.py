"""A map as one HTML page: drawn in the browser, cut in sections, with its peaks and the curves of the run that made it.

The page holds the viewer (UglyMol) and the map and fetches nothing.
"""

from __future__ import annotations

import base64
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.resources import files

import gemmi
import numpy as np
from numpy.typing import NDArray

import xtalfast
from xtalfast.density.peaks import Peak
from xtalfast.io.files import write_text
from xtalfast.report.environment import environment
from xtalfast.report.images import DIVERGING, colored, data_uri
from xtalfast.report.svg import Figure

_MOST_VOXELS = 2_000_000  # one byte each in the page
_SECTION_PIXELS = 400
_BRIGHTEST = 99.7  # percent of the map; above it colours no longer change


@dataclass(frozen=True)
class MapPage:
    """What is on the page.

    Attributes:
        title, kind: of the page.
        values: the map over the whole cell [X, Y, Z].
        cell: of the crystal.
        map_title: what the map is.
        level: contour, in rms of the map.
        centre: of the first view, fractional.
        key_figures: name and text, at the top.
        facts: name and text, at the end.
        figures: curves.
        peaks: strongest first; peaks_note: what they are.
        warnings: shown first.
    """

    title: str
    kind: str
    values: NDArray[np.float32]
    cell: gemmi.UnitCell
    map_title: str
    level: float
    centre: tuple[float, float, float]
    key_figures: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    figures: Sequence[Figure] = ()
    peaks: Sequence[Peak] = ()
    peaks_note: str = ""
    warnings: Sequence[str] = ()


def write_map_page(path: str | os.PathLike, page: MapPage) -> None:
    """Write the page; it appears whole or not at all.

    Raises:
        MissingExtraError: jinja2 is not installed.
        InputError: the file cannot be written.
    """
    write_text(path, render_map_page(page))


def render_map_page(page: MapPage) -> str:
    """The page as HTML text."""
    template = environment("A report with the map").get_template("map.html")
    shown = coarsened(page.values, _MOST_VOXELS)
    whole, coarse = (" x ".join(map(str, one.shape)) for one in (page.values, shown))
    note = "" if shown is page.values else f"Shown on a coarser grid, {coarse} for {whole}."
    return template.render(
        data=page,
        created=datetime.now().strftime("%Y-%m-%d %H:%M"),
        version=xtalfast.__version__,
        shown=note,
        rms=float(np.std(page.values)) or 1.0,
        radius=round(min(page.cell.a, page.cell.b, page.cell.c, 40.0) / 2, 1),
        centre=[round(x, 3) for x in page.cell.orthogonalize(gemmi.Fractional(*page.centre)).tolist()],
        slices=_sections(page),
        ccp4=base64.b64encode(ccp4_bytes(shown, page.cell)).decode(),
        uglymol=files("xtalfast.report").joinpath("uglymol", "uglymol.js").read_text(encoding="utf-8"),
    )


def coarsened(values: NDArray[np.float32], most: int) -> NDArray[np.float32]:
    """The map on a grid of at most `most` points: its low-resolution Fourier coefficients."""
    if values.size <= most:
        return values
    factor = (most / values.size) ** (1 / 3)
    x, y, z = (max(2, int(n * factor) // 2 * 2) for n in values.shape)
    spectrum = np.fft.rfftn(values)[:, :, : z // 2]
    for axis, n in ((0, x), (1, y)):
        half = n // 2
        kept = [np.take(spectrum, range(half), axis), np.take(spectrum, range(-half + 1, 0), axis)]
        spectrum = np.insert(np.concatenate(kept, axis), half, 0, axis)
    spectrum = np.concatenate([spectrum, np.zeros((x, y, 1))], axis=2)
    return (np.fft.irfftn(spectrum, s=(x, y, z), axes=(0, 1, 2)) * (x * y * z / values.size)).astype(np.float32)


def ccp4_bytes(values: NDArray[np.float32], cell: gemmi.UnitCell) -> bytes:
    """A CCP4 map of the whole cell in 256 levels, one byte a point (mode 0, scaled as CCP4's mapmode2to0 does)."""
    low, high = float(values.min()), float(values.max())
    step = (high - low) / 255 or 1.0
    levels = np.clip(np.rint((values - 0.5 * (low + high + step)) / step), -128, 127).astype(np.int8)
    x, y, z = values.shape
    words = bytearray(1024)
    struct.pack_into("<10i", words, 0, z, y, x, 0, 0, 0, 0, x, y, z)
    struct.pack_into("<6f3i", words, 40, *cell.parameters, 3, 2, 1)
    struct.pack_into("<3fi", words, 76, low, high, float(values.mean()), 1)
    struct.pack_into("<2i", words, 156, -128, 127)
    words[208:212] = b"MAP "
    struct.pack_into("<I", words, 212, 0x00004144)
    struct.pack_into("<f", words, 216, float(values.std()))
    return bytes(words) + levels.tobytes()


def _sections(page: MapPage) -> list[tuple[str, str]]:
    """Sections through the first view's centre, perpendicular to x, y and z, as pictures."""
    values, pictures = page.values, []
    rms = float(values.std()) or 1.0
    limit = max(float(np.percentile(np.abs(values), _BRIGHTEST)), rms)
    for axis, name in enumerate("xyz"):
        at = round(page.centre[axis] * values.shape[axis]) % values.shape[axis]
        plane = np.take(values, at, axis)
        step = max(1, max(plane.shape) // _SECTION_PIXELS)
        others = [n for n in "xyz" if n != name]
        picture = data_uri(colored(plane[::step, ::step], -limit, limit, DIVERGING))
        place = at / values.shape[axis]
        pictures.append(
            (f"Section {name} = {place:.3f}; {others[0]} down, {others[1]} across; ±{limit / rms:.1f} rms", picture)
        )
    return pictures
