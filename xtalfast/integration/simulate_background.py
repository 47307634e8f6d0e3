"""What lies between the spots: air and water scatter, ice rings, module gaps and zingers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from xtalfast.integration.simulate_config import SimulationConfig
from xtalfast.models import Array, Beam, Panel

# Rings as (d in A, width in 1/A, height). Water: the diffuse rings of the liquid; ice: hexagonal, powder heights.
_WATER_RINGS = ((3.2, 0.045, 1.0), (2.1, 0.06, 0.35))
_ICE_RINGS = (
    (3.895, 0.0018, 1.00),
    (3.661, 0.0018, 0.60),
    (3.438, 0.0018, 0.80),
    (2.667, 0.0020, 0.25),
    (2.249, 0.0022, 0.55),
    (2.068, 0.0024, 0.40),
    (1.947, 0.0026, 0.20),
    (1.916, 0.0026, 0.35),
)
_AIR_SCATTER_LENGTH = 0.25  # 1/A: fall of the air scatter along 1/d
_BAND = 128  # rows
_TILT = 0.1  # relative change of the background from the left to the right edge


def _rings(s: Array, rings: tuple[tuple[float, float, float], ...]) -> Array:
    return sum((height * np.exp(-0.5 * ((s - 1 / d) / width) ** 2) for d, width, height in rings), np.zeros_like(s))


def expected_background(beam: Beam, panel: Panel, config: SimulationConfig) -> Array:
    """Mean background photons per pixel and image, [slow, fast].

    Its mean over the panel, ice rings aside, is `background_photons`.
    """
    width, height = panel.image_size
    smooth, ice = np.empty((height, width)), np.empty((height, width))
    for top in range(0, height, _BAND):  # in bands, since the rays of a large detector take gigabytes
        rows = slice(top, min(top + _BAND, height))
        smooth[rows], ice[rows] = _scatter(beam, panel, config, np.arange(rows.start, rows.stop))
    return config.background_photons * smooth / smooth.mean() + config.ice_ring_photons * ice


def _scatter(beam: Beam, panel: Panel, config: SimulationConfig, rows: NDArray) -> tuple[Array, Array]:
    """Air and water scatter, and ice rings, on some rows of the panel; both on scales of their own."""
    x, y = np.meshgrid(np.arange(panel.image_size[0]) + 0.5, rows + 0.5)
    ray = panel.lab_from_px(np.stack([x, y], axis=-1))
    distance = np.linalg.norm(ray, axis=-1)
    out = ray / distance[..., None]
    incident = beam.s0 / np.linalg.norm(beam.s0)
    cos_2theta = out @ incident
    s = np.sqrt(np.maximum(2 - 2 * cos_2theta, 0)) / beam.wavelength
    normal = beam.polarization_normal / np.linalg.norm(beam.polarization_normal)
    p = beam.polarization_fraction
    polarization = (1 - 2 * p) * (1 - (out @ normal) ** 2) + p * (1 + cos_2theta**2)
    solid_angle = (np.abs(panel.origin @ panel.normal) / distance) ** 3
    smooth = np.exp(-s / _AIR_SCATTER_LENGTH) + 0.5 * config.water_ring * _rings(s, _WATER_RINGS)
    return smooth * polarization * solid_angle * (1 + _TILT * (x / panel.image_size[0] - 0.5)), _rings(s, _ICE_RINGS)


def module_gaps(config: SimulationConfig) -> list[tuple[int, int, int, int]]:
    """Dead rectangles between the detector modules: x0, y0, x1, y1, end excluded."""
    (width, height), (module_x, module_y), (gap_x, gap_y) = (
        config.image_size_px,
        config.module_size_px,
        config.module_gap_px,
    )
    columns = [(x, 0, min(x + gap_x, width), height) for x in range(module_x, width, module_x + gap_x)]
    rows = [(0, y, width, min(y + gap_y, height)) for y in range(module_y, height, module_y + gap_y)]
    return (columns if gap_x else []) + (rows if gap_y else [])


def add_zingers(counts: NDArray[np.int64], mean_number: float, rng: np.random.Generator) -> None:
    """Single hot pixels of 10 to 10,000 counts (uniform in the logarithm) at random places, in place."""
    number = rng.poisson(mean_number)
    at = rng.integers(0, counts.size, number)
    np.add.at(counts.reshape(-1), at, (10 ** rng.uniform(1, 4, number)).astype(np.int64))
