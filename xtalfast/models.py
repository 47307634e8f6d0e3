"""The experiment as DIALS describes it: beam, detector, goniometer, scan, crystal; plain numpy, float64, vectorised.

Words and frames are those of dxtbx: laboratory frame in mm, `s0` along the beam with |s0| = 1 / wavelength, pixel
coordinates with (0, 0) at the outer corner of the first pixel, z of `xyzcal.px` counted so that image number n of the
scan covers n - 1 <= z < n. `xtalfast.io.read_expt` fills these from a `.expt` file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gemmi
import numpy as np
from numpy.typing import NDArray

from xtalfast.errors import InputError

Array = NDArray[np.float64]


def rotation_matrix(axis: Array, angle: float | Array) -> Array:
    """Rotation by `angle` (rad, [...]) about the unit vector `axis` [3] -> [..., 3, 3] (Rodrigues)."""
    angle = np.asarray(angle, float)[..., None, None]
    x, y, z = np.asarray(axis, float) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * (cross @ cross)


@dataclass
class Beam:
    """Monochromatic beam. `direction` points from the sample to the source, as in the file."""

    direction: Array  # [3]
    wavelength: float  # A
    divergence: float = 0.0  # deg, as in the file
    sigma_divergence: float = 0.0  # deg
    polarization_normal: Array = field(default_factory=lambda: np.array([0.0, 1.0, 0.0]))
    polarization_fraction: float = 0.999

    @property
    def s0(self) -> Array:
        """Incident wave vector [3], 1/A."""
        return -self.direction / np.linalg.norm(self.direction) / self.wavelength


@dataclass
class Panel:
    """One flat detector panel, its hierarchy already applied: origin, fast and slow are in the laboratory frame."""

    origin: Array  # [3] mm, outer corner of pixel (0, 0)
    fast: Array  # [3] unit vector
    slow: Array  # [3] unit vector
    pixel_size: tuple[float, float]  # mm, (fast, slow)
    image_size: tuple[int, int]  # px, (fast, slow)
    trusted_range: tuple[float, float] = (0.0, 2.0**31)
    gain: float = 1.0
    pedestal: float = 0.0
    thickness: float = 0.0  # mm
    mu: float = 0.0  # 1/mm
    material: str = ""
    parallax: bool = False
    mask: list[tuple[int, int, int, int]] = field(default_factory=list)  # x0, y0, x1, y1 rectangles, end excluded
    raw_image_offset: tuple[int, int] = (0, 0)  # of this panel in the image array, px (fast, slow)
    name: str = "Panel"

    @property
    def normal(self) -> Array:
        return np.cross(self.fast, self.slow)

    def lab_from_mm(self, xy_mm: Array) -> Array:
        """Points on the panel [..., 2] (mm) -> laboratory frame [..., 3] (mm)."""
        return self.origin + xy_mm[..., :1] * self.fast + xy_mm[..., 1:] * self.slow

    def lab_from_px(self, xy_px: Array) -> Array:
        """Pixel coordinates [..., 2] -> laboratory frame [..., 3] (mm), parallax corrected."""
        return self.lab_from_mm(self.mm_from_px(xy_px))

    def _parallax_shift(self, xy_mm: Array) -> Array:
        """How far along the panel a photon that enters at xy_mm is absorbed on average, [..., 2] mm."""
        ray = self.lab_from_mm(xy_mm)
        ray = ray / np.linalg.norm(ray, axis=-1, keepdims=True)
        cos_t = np.abs(ray @ self.normal)
        depth = 1 / self.mu - (self.thickness / cos_t + 1 / self.mu) * np.exp(-self.mu * self.thickness / cos_t)
        return depth[..., None] * np.stack([ray @ self.fast, ray @ self.slow], axis=-1)

    def px_from_mm(self, xy_mm: Array) -> Array:
        """Where the ray that enters at xy_mm [..., 2] is recorded, in pixels [..., 2]."""
        xy_mm = np.asarray(xy_mm, float)
        shift = self._parallax_shift(xy_mm) if self.parallax else 0.0
        return (xy_mm + shift) / np.asarray(self.pixel_size)

    def mm_from_px(self, xy_px: Array) -> Array:
        """Inverse of `px_from_mm` (the shift taken at the recorded point, as dxtbx does)."""
        xy_mm = np.asarray(xy_px, float) * np.asarray(self.pixel_size)
        return xy_mm - self._parallax_shift(xy_mm) if self.parallax else xy_mm

    def intersect(self, s1: Array) -> tuple[Array, NDArray[np.bool_]]:
        """Rays s1 [..., 3] from the origin -> (mm on the panel [..., 2], hits the panel's rectangle [...])."""
        to_panel = np.linalg.inv(np.stack([self.fast, self.slow, self.origin], axis=1))
        u = np.asarray(s1, float) @ to_panel.T
        with np.errstate(divide="ignore", invalid="ignore"):
            xy = u[..., :2] / u[..., 2:]
        size = np.asarray(self.pixel_size) * np.asarray(self.image_size)
        return xy, (u[..., 2] > 0) & np.all((xy >= 0) & (xy < size), axis=-1)

    def valid_pixels(self) -> NDArray[np.bool_]:
        """False in the panel's mask rectangles: [slow, fast]."""
        valid = np.ones(self.image_size[::-1], bool)
        for x0, y0, x1, y1 in self.mask:
            valid[y0:y1, x0:x1] = False
        return valid


class Detector(list[Panel]):
    """The panels in file order."""

    def s1_from_px(self, panel: NDArray, xy_px: Array, wavelength: float) -> Array:
        """Scattered wave vectors [N, 3] (1/A) of pixel positions [N, 2] on panels [N]."""
        s1 = np.empty((len(panel), 3))
        for p, model in enumerate(self):
            rows = panel == p
            s1[rows] = model.lab_from_px(xy_px[rows])
        return s1 / np.linalg.norm(s1, axis=1, keepdims=True) / wavelength


@dataclass
class Goniometer:
    """Rotation: x_lab = setting @ R(axis, phi) @ fixed @ x_crystal."""

    axis: Array  # [3], in the frame before `setting`
    fixed: Array = field(default_factory=lambda: np.eye(3))
    setting: Array = field(default_factory=lambda: np.eye(3))

    @property
    def lab_axis(self) -> Array:
        return self.setting @ self.axis

    def rotation(self, phi: float | Array) -> Array:
        """Crystal-to-laboratory rotation at phi (rad, [...]) -> [..., 3, 3]."""
        return self.setting @ rotation_matrix(self.axis, phi) @ self.fixed


@dataclass
class Scan:
    """Equal-width images about one axis."""

    image_range: tuple[int, int]  # first and last image number, both included
    oscillation: tuple[float, float]  # start of the first image and width of each, deg
    batch_offset: int = 0
    exposure_time: float = 0.0  # s

    @property
    def n_images(self) -> int:
        return self.image_range[1] - self.image_range[0] + 1

    @property
    def array_range(self) -> tuple[int, int]:
        """First and last z of the scan, in images: (first - 1, last)."""
        return self.image_range[0] - 1, self.image_range[1]

    def phi_from_z(self, z: float | Array) -> Array:
        """z (images) -> rotation angle in rad."""
        return np.radians(self.oscillation[0] + (np.asarray(z, float) - self.array_range[0]) * self.oscillation[1])

    def z_from_phi(self, phi: float | Array) -> Array:
        """Rotation angle in rad -> z (images); no wrap-around."""
        return (np.degrees(phi) - self.oscillation[0]) / self.oscillation[1] + self.array_range[0]


@dataclass
class Crystal:
    """Lattice and orientation. `A` maps Miller indices to reciprocal space at phi = 0 (before `Goniometer.fixed`)."""

    A: Array  # [3, 3], 1/A: rows x, y, z; columns a*, b*, c*
    hall_symbol: str = " P 1"
    A_at_scan_points: Array | None = None  # [n_images + 1, 3, 3]
    half_mosaicity_deg: float | None = None  # of a still, as fitted by dials.stills_process
    domain_size_a: float | None = None  # likewise: size of a mosaic block, A

    @classmethod
    def from_cell(cls, cell: gemmi.UnitCell, U: Array | None = None, hall_symbol: str = " P 1") -> Crystal:
        """The crystal with this cell, turned by U [3, 3]; without U, a lies along x and b in the x-y plane."""
        B = np.array(cell.frac.mat.tolist()).T
        return cls(B if U is None else U @ B, hall_symbol)

    @property
    def operations(self) -> gemmi.GroupOps:
        """Symmetry operations, of any setting. Raises InputError for a Hall symbol that cannot be parsed."""
        try:
            return gemmi.symops_from_hall(self.hall_symbol.strip())
        except RuntimeError as error:
            raise InputError(f"space_group_hall_symbol {self.hall_symbol!r} is no Hall symbol ({error})") from error

    @property
    def space_group(self) -> gemmi.SpaceGroup:
        """The tabulated setting. Raises InputError for one that is in no table (`operations` still has it)."""
        group = gemmi.find_spacegroup_by_ops(self.operations)
        if group is None:
            raise InputError(f"space_group_hall_symbol {self.hall_symbol!r} is no tabulated setting; reindex to one")
        return group

    @property
    def cell(self) -> gemmi.UnitCell:
        a, b, c = np.linalg.inv(self.A)

        def angle(u: Array, v: Array) -> float:
            return float(np.degrees(np.arccos(np.clip(u @ v / np.linalg.norm(u) / np.linalg.norm(v), -1, 1))))

        lengths = [float(np.linalg.norm(v)) for v in (a, b, c)]
        return gemmi.UnitCell(lengths[0], lengths[1], lengths[2], angle(b, c), angle(a, c), angle(a, b))

    @property
    def B(self) -> Array:
        """Orthogonalisation of reciprocal space [3, 3]: A = U B, U a rotation."""
        return np.array(self.cell.frac.mat.tolist()).T

    @property
    def U(self) -> Array:
        return self.A @ np.linalg.inv(self.B)

    def A_at(self, z: Array, scan: Scan) -> Array:
        """Setting matrices [N, 3, 3] at z [N] (images): scan-varying by linear interpolation, else constant."""
        z = np.asarray(z, float)
        if self.A_at_scan_points is None:
            return np.broadcast_to(self.A, (*z.shape, 3, 3))
        t = np.clip(z - scan.array_range[0], 0, len(self.A_at_scan_points) - 1)
        i = np.minimum(t.astype(np.int64), len(self.A_at_scan_points) - 2)
        w = (t - i)[..., None, None]
        return (1 - w) * self.A_at_scan_points[i] + w * self.A_at_scan_points[i + 1]

    def d(self, hkl: NDArray) -> Array:
        """Resolution (A) of Miller indices [N, 3] with the static cell."""
        with np.errstate(divide="ignore"):
            return 1 / np.linalg.norm(np.asarray(hkl, float) @ self.A.T, axis=1)


@dataclass
class Experiment:
    """One crystal, one sweep or still."""

    beam: Beam
    detector: Detector
    goniometer: Goniometer | None = None
    scan: Scan | None = None
    crystal: Crystal | None = None
    profile: dict[str, Any] | None = None  # raw block; gaussian_rs: n_sigma, and sigma_b, sigma_m in deg
    imageset: dict[str, Any] | None = None  # raw block; `template` or `images` already resolved to absolute paths
    identifier: str = ""

    @property
    def is_still(self) -> bool:
        return self.goniometer is None or self.scan is None or self.scan.oscillation[1] == 0.0
