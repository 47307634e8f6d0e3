"""One Gaussian spot model for all reflections of a crystal: its widths, its five parameters, and their fits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtalfast.errors import InputError
from xtalfast.integration.kabsch import box_edges, rotation_coordinates
from xtalfast.integration.spot_voxels import SpotPixels, Whitened, gaussian_voxels, sub_pixel_offsets
from xtalfast.integration.strong_spots import StrongSpots, central_pixels
from xtalfast.masks import used_pixels
from xtalfast.models import Array, Experiment

logger = logging.getLogger("xtalfast")

SPOT_PHOTONS = 1000.0  # a spot counts as at most this many photons, so that no single one decides the shape
MIN_ZETA = 0.02  # the shear of spots nearer to the rotation axis is that of this zeta
SHAPE_STEPS = 30
SHAPE_DIFFERENCE = 2e-3  # of a parameter: single precision gives derivatives to 1e-3
MIN_STRONG = 30  # spots needed to fit the shape


@dataclass(frozen=True)
class SpotWidths:
    """Isotropic widths of all spots, as in the profile block of an `.expt` file (there in deg).

    `sigma_b` is the standard deviation along each of epsilon1 and epsilon2 (Kabsch's sigma_D), rad; DIALS' own fit
    gives the two-dimensional root mean square instead, which is larger by sqrt(2). `sigma_m` is that of epsilon3, rad
    (0 for stills).
    """

    sigma_b: float
    sigma_m: float
    n_sigma: float = 3.0

    @classmethod
    def from_profile(cls, profile: dict[str, Any] | None) -> SpotWidths | None:
        """The widths of a gaussian_rs block, the mean of scan-varying ones; None when there is no usable block."""
        if not profile or "sigma_b" not in profile:
            return None
        sigma_b = float(np.radians(np.mean(profile["sigma_b"])))
        sigma_m = float(np.radians(np.mean(profile.get("sigma_m", 0.0))))
        if not (np.isfinite(sigma_b) and sigma_b > 0 and np.isfinite(sigma_m) and sigma_m >= 0):
            return None
        return cls(sigma_b, sigma_m, float(profile.get("n_sigma", 3.0)))

    def to_profile(self) -> dict[str, Any]:
        """The block for an `.expt` file."""
        return {
            "__id__": "gaussian_rs",
            "n_sigma": self.n_sigma,
            "sigma_b": float(np.degrees(self.sigma_b)),
            "sigma_m": float(np.degrees(self.sigma_m)),
        }


@dataclass(frozen=True)
class SpotShape:
    """Gaussian spot model common to all reflections."""

    psf: tuple[float, float, float]  # covariance of the point spread: xx, xy, yy, px^2
    mosaicity: float  # rad, standard deviation
    lattice: float  # 1/A, standard deviation of a reciprocal-lattice point (the inverse size of a mosaic block)


class Geometry(NamedTuple):
    """What the profile of each reflection of a batch needs."""

    pixels: SpotPixels
    jacobian: Tensor  # [N, 2, 2] d epsilon / d (x, y), rad / px
    rotation: Tensor  # [N, z + 1] epsilon3 at image boundaries, rad; [N, 0] for stills
    shear: Tensor  # [N] d epsilon1 / d epsilon3 along the spot, 0 for stills
    two_sin_theta: Tensor  # [N]
    d: Tensor  # [N] A
    wavelength: Tensor  # [N] A

    def select(self, rows: Any) -> Geometry:
        """Some of the reflections."""
        return Geometry(self.pixels.select(rows), *(field[rows] for field in self[1:]))


def spot_geometry(store: Any, experiments: Sequence[Experiment], rows: NDArray[np.int64]) -> Geometry:
    """Coordinates of the voxels of some rows of a store with one size of box."""
    metadata = {name: np.asarray(store.metadata[name][rows]) for name in ("id", "panel", "xyzcal_px", "bbox")}
    ids, xyz = metadata["id"], metadata["xyzcal_px"].astype(float)
    still = experiments[0].is_still if experiments else True
    pixels, s1 = SpotPixels.of_rows(experiments, ids, metadata["panel"], metadata["bbox"], xyz, store.box)
    step = np.array([-0.5, 0.5])
    around = pixels.directions_at(xyz[:, :1] + step, xyz[:, 1:2] + step)
    jacobian = np.stack(
        [(around[:, :, 1] - around[:, :, 0]).mean(axis=1), (around[:, 1] - around[:, 0]).mean(axis=1)], axis=-1
    )
    rotation = np.empty((len(rows), 0 if still else store.box[0] + 1), np.float32)
    shear, two_sin_theta, wavelength = (np.zeros(len(rows), np.float32) for _ in range(3))
    for number in np.unique(ids):
        at = np.flatnonzero(ids == number)
        experiment = experiments[int(number)]
        s0 = experiment.beam.s0
        two_sin_theta[at] = np.linalg.norm(s1[at] - s0, axis=1) * experiment.beam.wavelength
        wavelength[at] = experiment.beam.wavelength
        if not still and experiment.goniometer is not None:
            rotation[at] = rotation_coordinates(experiment, s1[at], xyz[at, 2], box_edges(metadata["bbox"][at])[2])
            axis = experiment.goniometer.lab_axis / np.linalg.norm(experiment.goniometer.lab_axis)
            along = (s1[at] + s0) @ axis / np.linalg.norm(s1[at] + s0, axis=1)
            zeta = pixels.axes[at, :3] @ axis
            zeta = np.where(np.abs(zeta) < MIN_ZETA, np.copysign(MIN_ZETA, zeta), zeta)
            shear[at] = -two_sin_theta[at] * along / zeta
    return Geometry(
        pixels=pixels,
        jacobian=torch.from_numpy(jacobian.astype(np.float32)),
        rotation=torch.from_numpy(rotation),
        shear=torch.from_numpy(shear),
        two_sin_theta=torch.from_numpy(two_sin_theta),
        d=torch.from_numpy(wavelength / np.maximum(two_sin_theta, 1e-6)),
        wavelength=torch.from_numpy(wavelength),
    )


def rotation_edges(store: Any, experiments: Sequence[Experiment], rows: NDArray[np.int64]) -> tuple[Array, Array]:
    """epsilon3 at the image boundaries of each box, [N, z + 1] rad ([N, 0] for stills), and resolution d [N], A."""
    ids, s1 = np.asarray(store.metadata["id"][rows]), np.asarray(store.metadata["s1"][rows], float)
    bbox, z_cal = store.metadata["bbox"][rows], np.asarray(store.metadata["xyzcal_px"][rows], float)[:, 2]
    still = experiments[0].is_still if experiments else True
    edges, d = np.empty((len(rows), 0 if still else store.box[0] + 1)), np.empty(len(rows))
    for number in np.unique(ids):
        at = np.flatnonzero(ids == number)
        experiment = experiments[int(number)]
        d[at] = 1 / np.maximum(np.linalg.norm(s1[at] - experiment.beam.s0, axis=1), 1e-6)
        if not still:
            edges[at] = rotation_coordinates(experiment, s1[at], z_cal[at], box_edges(bbox[at])[2])
    return edges, d


def images_in_scan(store: Any, experiments: Sequence[Experiment], rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which images of each box exist, [N, z] (all for stills)."""
    ids, low = np.asarray(store.metadata["id"][rows]), np.asarray(store.metadata["bbox"][rows])[:, 4]
    z = low[:, None] + np.arange(store.box[0])
    inside = np.ones(z.shape, bool)
    for number in np.unique(ids):
        scan = experiments[int(number)].scan
        if scan is not None and not experiments[int(number)].is_still:
            at = ids == number
            inside[at] = (z[at] >= scan.array_range[0]) & (z[at] < scan.array_range[1])
    return inside


def whiten(geometry: Geometry, psf: Tensor, mosaicity: Tensor, lattice: Tensor) -> Whitened:
    """Put the voxels of each spot in units of its own Gaussian: centre and covariance image by image."""
    covariance = geometry.jacobian @ psf @ geometry.jacobian.mT
    block = (lattice * geometry.wavelength) ** 2
    across = block + (mosaicity * geometry.two_sin_theta) ** 2
    sigma = torch.sqrt(mosaicity**2 + (lattice * geometry.d) ** 2)
    edges = geometry.rotation / sigma[:, None]
    if edges.shape[1] == 0:
        images = torch.ones_like(sigma)[:, None]
        shift, spread = torch.zeros_like(images), torch.zeros_like(images)
    else:
        share = torch.special.ndtr(edges).diff(dim=1)
        images = share.abs()
        # Mean and variance of the normal law within each image; far out, where it has none, those of its nearer edge.
        safe = torch.where(images > 1e-6, share, torch.ones_like(share))
        density = torch.exp(-0.5 * edges**2) / (2 * torch.pi) ** 0.5
        inside = images > 1e-6
        nearest = torch.where(edges[:, :-1].abs() < edges[:, 1:].abs(), edges[:, :-1], edges[:, 1:])
        mean = torch.where(inside, -density.diff(dim=1) / safe, nearest)
        variance = torch.where(inside, 1 - (edges * density).diff(dim=1) / safe - mean**2, 0.0).clamp(0, 1)
        slope = (geometry.shear * sigma)[:, None]
        shift, spread = slope * mean, slope**2 * variance
    a = covariance[:, None, 0, 0] + across[:, None] + spread
    b = covariance[:, None, 0, 1].expand_as(a)
    c = covariance[:, None, 1, 1] + block[:, None]
    # inverse of the Cholesky factor [[p, 0], [q, r]] of [[a, b], [b, c]]
    p = a.sqrt()
    q = b / p
    r = (c - q**2).clamp(min=1e-16).sqrt()
    inverse = torch.stack([1 / p, -q / (p * r), 1 / r], dim=-1)
    centre = torch.stack([shift / p, -q * shift / (p * r)], dim=-1)
    nodes = geometry.jacobian @ sub_pixel_offsets().T  # [N, 2, K] rad
    first, second = nodes[:, None, 0], nodes[:, None, 1]
    low, cross, high = (inverse[..., k, None] for k in range(3))
    steps = torch.stack([low * first, cross * first + high * second], dim=-1).contiguous()
    area = torch.linalg.det(geometry.jacobian).abs()[:, None] / (p * r)
    return Whitened(geometry.pixels, inverse, centre, steps, area, images, edges)


def fit_widths(store: Any, experiments: Sequence[Experiment], strong: StrongSpots, n_sigma: float = 3.0) -> SpotWidths:
    """sigma_b from the second moments, sigma_m by maximum likelihood from the images of strong spots.

    sigma_m maximises the probability of the observed share of each image among those of its box,
    log(R_j / sum R) with R_j the share of a Gaussian of epsilon3 in image j, as in Kabsch (2010) equation 9 but with
    the observed counts as weights; every spot weighs at most as SPOT_PHOTONS photons.

    Raises:
        InputError: fewer than MIN_STRONG strong spots.
    """
    if len(strong.rows) < MIN_STRONG:
        raise InputError(
            f"spot widths need at least {MIN_STRONG} strong unmasked spots, got {len(strong.rows)}: "
            "give sigma_b and sigma_m in the profile block of the .expt"
        )
    geometry = spot_geometry(store, experiments, strong.rows)
    shape = (len(strong.rows), *store.box)
    used = used_pixels(store.mask(strong.rows))
    net = np.where(used, store.counts(strong.rows) - strong.background[:, None], 0.0).reshape(shape)
    weight = np.minimum(1, SPOT_PHOTONS / strong.intensity) / strong.intensity
    square = (geometry.pixels.directions().double() ** 2).sum(dim=-1).numpy()  # [N, y, x]
    radius = float(np.median(np.sqrt(square.reshape(len(square), -1).max(axis=1)))) / np.sqrt(2)
    sigma_b = 0.0
    for _ in range(10):  # the window follows the width until it stands still
        inside = square < radius**2
        plane = np.where(inside, net.sum(axis=1), 0.0)
        mass = weight @ plane.sum(axis=(1, 2))
        moment = weight @ (plane * square).sum(axis=(1, 2))
        previous, sigma_b = sigma_b, float(np.sqrt(max(moment / mass, 1e-16) / 2))
        radius = min(radius, 4 * sigma_b)
        if abs(sigma_b - previous) < 1e-3 * sigma_b:
            break
    if geometry.rotation.shape[1] == 0 or store.box[0] == 1:
        return SpotWidths(sigma_b, 0.0, n_sigma)
    observed = torch.from_numpy(np.maximum(np.where(inside[:, None], net, 0.0).sum(axis=(2, 3)), 0.0))
    observed *= torch.from_numpy(weight)[:, None]
    edges = geometry.rotation.double()

    def log_likelihood(sigma: float) -> float:
        share = torch.special.ndtr(edges / sigma).diff(dim=1).abs().clamp(min=1e-12)
        return float((observed * (share / share.sum(dim=1, keepdim=True)).log()).sum())

    low, high = np.log(np.radians(0.003)), np.log(np.radians(5.0))
    return SpotWidths(sigma_b, float(np.exp(_golden_section(lambda t: log_likelihood(np.exp(t)), low, high))), n_sigma)


def _golden_section(function: Callable[[float], float], low: float, high: float, tolerance: float = 1e-4) -> float:
    """Where a function with one maximum between low and high has it."""
    ratio = (np.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = function(left), function(right)
    while high - low > tolerance:
        if at_left > at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = function(right)
    return 0.5 * (low + high)


def isotropic_shape(geometry: Geometry, widths: SpotWidths) -> SpotShape:
    """The shape that has the given widths: all of sigma_b in the point spread, all of sigma_m in the mosaicity."""
    scale = float(torch.linalg.det(geometry.jacobian).abs().sqrt().median())
    variance = (widths.sigma_b / scale) ** 2
    return SpotShape((variance, 0.0, variance), widths.sigma_m, 0.0)


def fit_shape(store: Any, experiments: Sequence[Experiment], strong: StrongSpots, start: SpotShape) -> SpotShape:
    """Maximum-likelihood Gaussian spot model of the strong spots, integrated over their voxels.

    The background of each spot is its robust mean, its intensity that which the profile then gives; point spread,
    mosaicity and lattice width are common to all. Fisher scoring with halved steps: deterministic.
    """
    data = spot_data(store, experiments, strong, half=7)
    weight = (SPOT_PHOTONS / data.intensity).clamp(max=1.0)[:, None, None, None] * data.used
    root, mosaicity = np.log(start.psf[0]) / 2, max(start.mosaicity, 1e-5)
    # log of the Cholesky diagonal of the point spread, its off-diagonal element, log mosaicity, log lattice width
    at = np.array([root, 0.0, root, np.log(mosaicity), np.log(mosaicity / 10)])

    def rate_at(values: Array) -> Tensor:
        spots = whiten(data.geometry, *_shape_tensors(values))
        return data.rate(gaussian_voxels(spots))[0]

    def score(rate: Tensor) -> float:
        return float((weight * (data.counts * rate.log() - rate)).sum(dtype=torch.float64))

    rate = rate_at(at)
    best, damping = score(rate), 1e-3
    for _ in range(SHAPE_STEPS):
        # the changes of the rates with each parameter, and from them slope and Fisher information
        change = torch.stack([(rate_at(at + step) - rate) / SHAPE_DIFFERENCE for step in SHAPE_DIFFERENCE * np.eye(5)])
        change = change.flatten(1)
        scaled = change * (weight / rate).flatten()
        slope = (scaled @ (data.counts - rate).flatten()).double().numpy()
        information = (scaled @ change.T).double().numpy()
        information += damping * np.diag(np.diag(information) + 1e-3)
        move = np.clip(np.linalg.solve(information, slope), -1.0, 1.0)
        for _ in range(6):
            trial = rate_at(at + move)
            found = score(trial)
            if found > best:
                break
            move /= 2
        else:
            break
        at, rate, gain, best = at + move, trial, found - best, found
        if gain < 0.05:  # nats: far below a standard error
            break
    psf, mosaicity_fit, lattice = _shape_tensors(at)
    shape = SpotShape((float(psf[0, 0]), float(psf[0, 1]), float(psf[1, 1])), float(mosaicity_fit), float(lattice))
    values = np.array([*shape.psf, shape.mosaicity, shape.lattice])
    if not np.isfinite(values).all() or max(shape.psf[0], shape.psf[2]) > max(store.box[1:]) ** 2:
        logger.warning("the fit of the spot shape did not converge; using the isotropic widths")
        return start
    return shape


def _shape_tensors(values: Array) -> tuple[Tensor, Tensor, Tensor]:
    """Point spread [2, 2], mosaicity and lattice width of the parameters that `fit_shape` moves."""
    low, cross, high, mosaicity, lattice = torch.as_tensor(values, dtype=torch.float32)
    zero = torch.zeros(())
    factor = torch.stack([low.exp(), zero, cross, high.exp()]).reshape(2, 2)
    return factor @ factor.T, mosaicity.exp(), lattice.exp()


class SpotData(NamedTuple):
    """Central pixels of strong spots as tensors."""

    geometry: Geometry
    counts: Tensor  # [N, z, y, x]
    used: Tensor  # [N, z, y, x] 0 or 1
    background: Tensor  # [N]
    intensity: Tensor  # [N]

    def select(self, rows: Tensor) -> SpotData:
        return SpotData(self.geometry.select(rows), *(field[rows] for field in self[1:]))

    def rate(self, profile: Tensor) -> tuple[Tensor, Tensor]:
        """Expected counts [N, z, y, x] and intensity [N] of the profile given the background."""
        net = ((self.counts - self.background[:, None, None, None]) * self.used).sum(dim=(1, 2, 3))
        intensity = net.clamp(min=1.0) / (profile * self.used).sum(dim=(1, 2, 3)).clamp(min=1e-3)
        return intensity[:, None, None, None] * profile + self.background.clamp(min=1e-3)[
            :, None, None, None
        ], intensity

    def log_likelihood(self, profile: Tensor, weight: Tensor) -> Tensor:
        """Weighted Poisson log-likelihood, per photon."""
        rate, _ = self.rate(profile)
        spot = (self.used * (self.counts * rate.log() - rate)).sum(dim=(1, 2, 3))
        return (weight * spot).sum() / (weight * self.intensity).sum()


def spot_data(store: Any, experiments: Sequence[Experiment], strong: StrongSpots, half: int) -> SpotData:
    """The pixels within `half` of the box centre."""
    geometry = spot_geometry(store, experiments, strong.rows)
    shape = (len(strong.rows), *store.box)
    window = central_pixels(store.box, half).reshape(store.box)
    y, x = (np.flatnonzero(window[0].any(axis=axis)) for axis in (1, 0))
    y_x = np.ix_(np.arange(shape[0]), np.arange(shape[1]), y, x)
    counts = torch.from_numpy(store.counts(strong.rows).reshape(shape)[y_x].astype(np.float32))
    used = torch.from_numpy(used_pixels(store.mask(strong.rows)).reshape(shape)[y_x].astype(np.float32))
    pixels = geometry.pixels.window(slice(int(y[0]), int(y[-1]) + 1), slice(int(x[0]), int(x[-1]) + 1))
    mean, signal = (torch.from_numpy(v.astype(np.float32)) for v in (strong.background, strong.intensity))
    return SpotData(geometry._replace(pixels=pixels), counts, used, mean, signal)
