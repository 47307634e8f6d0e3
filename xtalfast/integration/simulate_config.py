"""What a simulated data set is made of: every knob of `xtalfast simulate`, with units in the names."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import isfinite
from pathlib import Path
from typing import Any

import gemmi

from xtalfast.errors import InputError

# PILATUS: modules of 487 x 195 pixels of 0.172 mm with 7 and 17 dead pixels between them.
PILATUS_MODULE_PX = (487, 195)
PILATUS_GAP_PX = (7, 17)

# Data sets that ours and other integrators are compared on: they differ in cell, symmetry, spot widths and background.
PRESETS: dict[str, dict[str, Any]] = {
    "demo": {},
    "monoclinic": dict(  # spots of half a pixel on one image: undersampled; low multiplicity
        cell=(46.0, 38.0, 68.0, 90.0, 104.0, 90.0),
        space_group="P 1 21 1",
        mosaicity_deg=0.05,
        block_size_a=5000.0,
        divergence_deg=0.01,
        psf_px=0.55,
        photons_mean=150.0,
        background_photons=1.0,
        n_images=60,
        start_deg=20.0,
    ),
    "cubic": dict(  # wide spots over several images
        cell=(78.0, 78.0, 78.0, 90.0, 90.0, 90.0),
        space_group="I 21 3",
        d_min=2.0,
        mosaicity_deg=0.3,
        block_size_a=1500.0,
        psf_px=0.9,
        oblique_depth_mm=0.3,
        photons_mean=300.0,
        background_photons=3.0,
        n_images=60,
        oscillation_deg=0.4,
        distance_mm=120.0,
    ),
    "ice": dict(  # high background, water and ice rings
        cell=(62.0, 62.0, 92.0, 90.0, 90.0, 120.0),
        space_group="P 61 2 2",
        d_min=2.0,
        mosaicity_deg=0.15,
        background_photons=12.0,
        ice_ring_photons=25.0,
        n_images=40,
        distance_mm=115.0,
    ),
    "overlap": dict(  # a long axis and wide spots: neighbours share 30 % of their profiles
        cell=(60.0, 60.0, 250.0, 90.0, 90.0, 90.0),
        space_group="P 41 21 2",
        orientation_deg=(20.0, 60.0, 10.0),
        d_min=2.6,
        mosaicity_deg=0.2,
        psf_px=1.2,
        photons_mean=500.0,
        n_images=20,
        distance_mm=150.0,
    ),
}


@dataclass(frozen=True)
class SimulationConfig:
    """A rotation data set with known truth; the defaults are those of a small protein crystal on a PILATUS 300K.

    Widths are standard deviations. Photon numbers are per image for the background and per fully recorded reflection
    for the spots.
    """

    # crystal
    cell: tuple[float, float, float, float, float, float] = (42.0, 42.0, 64.0, 90.0, 90.0, 90.0)  # A, deg
    space_group: str = "P 43 21 2"
    orientation_deg: tuple[float, float, float] | None = None  # turns about x, y, z; None: drawn from the seed
    structure: Path | None = None  # PDB or mmCIF: its F^2 instead of Wilson's; it brings cell and space group
    d_min: float = 1.9  # A; no reflection exists beyond
    wilson_b_a2: float = 15.0  # fall-off of Wilson intensities, A^2
    zero_fraction: float = 0.02  # of the unique reflections have F^2 = 0: they show an integrator's bias
    anomalous_ratio: float = 0.05  # <|F+ - F-|> / <F> of acentric reflections
    # spots
    mosaicity_deg: float = 0.12
    block_size_a: float = 3000.0  # FWHM of the spot in reciprocal space is 0.9 / block size
    divergence_deg: float = 0.02  # of the beam
    bandwidth: float = 2e-4  # of the wavelength, relative
    psf_px: float = 0.75  # point spread of the detector
    oblique_depth_mm: float = 0.15  # depth over which the sensor absorbs: spots grow by depth * tan(2 theta), outwards
    photons_mean: float = 250.0  # mean of the fully recorded reflections
    scale_amplitude: float = 0.05  # slow change of beam and crystal over the scan, relative
    second_lattice_fraction: float = 0.0  # intensity of a second lattice relative to the first
    second_lattice_angle_deg: float = 2.5  # misset of the second lattice
    # experiment
    wavelength_a: float = 0.9792
    polarization_fraction: float = 0.999
    n_images: int = 50
    start_deg: float = 0.0
    oscillation_deg: float = 0.5
    distance_mm: float = 110.0
    pixel_size_mm: float = 0.172
    image_size_px: tuple[int, int] = (487, 619)  # fast, slow
    beam_centre_px: tuple[float, float] | None = None  # fast, slow; None: a little off the middle
    module_size_px: tuple[int, int] = PILATUS_MODULE_PX
    module_gap_px: tuple[int, int] = PILATUS_GAP_PX
    trusted_max: int = 1048500  # counts; larger ones are recorded as this
    # background
    background_photons: float = 2.0  # mean per pixel and image
    water_ring: float = 1.0  # height of the water ring relative to the air scatter
    ice_ring_photons: float = 0.0  # peak of the strongest ice ring, per pixel and image
    zingers_per_image: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("cell", "orientation_deg", "beam_centre_px", "image_size_px", "module_size_px", "module_gap_px"):
            value, length = getattr(self, name), {"cell": 6, "orientation_deg": 3}.get(name, 2)
            if value is not None and len(value) != length:
                raise InputError(f"simulation {name} must have {length} numbers, got {value}")
        for f in fields(self):
            value = getattr(self, f.name)
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int | float) and not isfinite(number):
                    raise InputError(f"simulation {f.name} must be finite, got {value}")
        positive = (
            "d_min block_size_a psf_px photons_mean wavelength_a n_images distance_mm pixel_size_mm trusted_max"
        ).split()
        for name in positive:
            if not getattr(self, name) > 0:
                raise InputError(f"simulation {name} must be positive, got {getattr(self, name)}")
        not_negative = (
            "zero_fraction anomalous_ratio mosaicity_deg divergence_deg bandwidth oblique_depth_mm scale_amplitude "
            "second_lattice_fraction background_photons water_ring ice_ring_photons zingers_per_image seed"
        ).split()
        for name in not_negative:
            if getattr(self, name) < 0:
                raise InputError(f"simulation {name} must not be negative, got {getattr(self, name)}")
        if self.n_images > 9999:
            raise InputError(f"simulation n_images must be at most 9999 (files are sim_####.cbf), got {self.n_images}")
        if not 0 < self.oscillation_deg <= 10:
            raise InputError(f"simulation oscillation_deg must be above 0 and up to 10 deg, got {self.oscillation_deg}")
        if self.zero_fraction >= 1:
            raise InputError(f"simulation zero_fraction must be below 1, got {self.zero_fraction}")
        if self.scale_amplitude >= 1:
            raise InputError(f"simulation scale_amplitude must be below 1, got {self.scale_amplitude}")
        if not 0 <= self.polarization_fraction <= 1:
            raise InputError(f"simulation polarization_fraction must be in 0..1, got {self.polarization_fraction}")
        if min(*self.image_size_px, *self.module_size_px) < 1 or min(self.module_gap_px) < 0:
            raise InputError("simulation image and module sizes must be at least 1 px and gaps not negative")
        if self.d_min <= self.wavelength_a / 2:
            raise InputError(
                f"simulation d_min must exceed half the wavelength ({self.wavelength_a / 2} A), got {self.d_min}"
            )
        self._check_symmetry()

    def _check_symmetry(self) -> None:
        group = gemmi.find_spacegroup_by_name(self.space_group)
        if group is None:
            raise InputError(f"simulation space_group must be a Hermann-Mauguin symbol, got {self.space_group!r}")
        if min(self.cell) <= 0 or not gemmi.UnitCell(*self.cell).volume > 0:
            raise InputError(f"simulation cell must be three lengths (A) and three angles (deg), got {self.cell}")
        if self.structure is None and not gemmi.UnitCell(*self.cell).is_compatible_with_spacegroup(group):
            raise InputError(f"simulation cell {self.cell} does not have the symmetry of {self.space_group}")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> SimulationConfig:
        """One of `PRESETS`: demo, monoclinic, cubic, ice, overlap."""
        if name not in PRESETS:
            raise InputError(f"simulation preset must be one of {', '.join(PRESETS)}, got {name!r}")
        return replace(cls(), **(PRESETS[name] | changes))

    def with_dose(self, factor: float) -> SimulationConfig:
        """The same crystal exposed `factor` times as long: photons of spots, background and ice rings."""
        if not factor > 0:
            raise InputError(f"simulation dose must be positive, got {factor}")
        names = ("photons_mean", "background_photons", "ice_ring_photons")
        return replace(self, **{name: getattr(self, name) * factor for name in names})

    @classmethod
    def demo(cls, **changes: Any) -> SimulationConfig:
        """The demonstration wedge: 50 images, about 5,000 full reflections over a broad range of I / sigma."""
        return replace(cls(), **changes)

    @classmethod
    def tiny(cls, **changes: Any) -> SimulationConfig:
        """Six images of 200 x 200 pixels with a few hundred spots, in well under a second: for tests."""
        small: dict[str, Any] = dict(
            image_size_px=(200, 200),
            module_size_px=(97, 92),
            module_gap_px=(6, 16),
            n_images=6,
            distance_mm=60.0,
            d_min=2.6,
        )
        return replace(cls(), **(small | changes))
