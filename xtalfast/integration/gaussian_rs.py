"""Spot profiles in reciprocal space: an analytic Gaussian fitted to the strong spots, and reference profiles on top.

This is `profile="dials"`: what DIALS and XDS do with the frame of Kabsch (2010), written from the papers, in three
layers of which each is the starting point of the next.

1. `SpotWidths`: sigma_b (beam divergence) and sigma_m (mosaicity), from the `.expt` profile block or from the second
   moments and the observed image fractions of strong spots. They set the size of the foreground.
2. `SpotShape`: five parameters for all spots of a crystal: the detector's point spread P, the mosaicity m and the
   width s of the reciprocal-lattice points. A spot has in (epsilon1, epsilon2) the covariance
   J P J^T + s^2 lambda^2 + (2 m sin theta)^2 e1 e1^T and in epsilon3 the variance m^2 + (s d)^2, with J from pixels to
   epsilon: low orders rock more widely than high ones, which one sigma_m cannot express.
3. `ReferenceProfiles`: in coordinates whitened by the shape, a density on a grid of tent functions for each cell of a
   3 x 3 grid over the detector and of blocks of rotation, learned by expectation maximisation from the strong spots
   themselves, with the Gaussian as prior: a cell with few spots keeps the Gaussian.

A mosaic block that diffracts early or late diffracts elsewhere along epsilon1, by -2 sin theta (m2 . e3) / zeta
times its epsilon3 (Kabsch leaves this out): the spot moves from image to image, most where zeta is small. The forward
model is integrated over voxels (sub-pixel nodes across the detector, exactly across images), so pixels do not broaden
the profiles. Angles are in rad here, in deg in the `.expt` file.

Ref: W. Kabsch, Acta Cryst. D66, 133-144 (2010), https://doi.org/10.1107/S0907444909047374.
"""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtalfast.errors import InputError
from xtalfast.integration.background import robust_background
from xtalfast.integration.kabsch import box_edges, direction_coordinates, kabsch_frame, rotation_coordinates
from xtalfast.io.files import replacing
from xtalfast.masks import used_pixels
from xtalfast.models import Array, Experiment

logger = logging.getLogger("xtalfast")
Progress = Callable[[str, int, int], None]


SUB_PIXELS = 3  # nodes per pixel edge: exact to 1e-3 of the profile for widths above half a pixel
GRID = 13  # tent functions along epsilon1 and epsilon2
GRID_ROTATION = 11  # and along epsilon3
GRID_EXTENT = 4.5  # half width of the grid, in standard deviations
PRIOR_PHOTONS = 2000.0  # weight of the Gaussian against the photons of the spots of a cell
SPOT_PHOTONS = 1000.0  # a spot counts as at most this many photons, so that no single one decides the shape
EM_STEPS = 40
MIN_ZETA = 0.02  # the shear of spots nearer to the rotation axis is that of this zeta
MIN_STRONG = 30  # spots needed to fit the shape
MAX_STRONG = 2000  # spots used; more do not improve the shape


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


class StrongSpots(NamedTuple):
    """Strong spots of a store with their background."""

    rows: NDArray[np.int64]
    background: Array  # [N] counts per pixel
    intensity: Array  # [N] counts above the background


class _Geometry(NamedTuple):
    """What the profile of each reflection of a batch needs."""

    epsilon: Tensor  # [N, y, x, 2] rad, at pixel centres
    jacobian: Tensor  # [N, 2, 2] d epsilon / d (x, y), rad / px
    rotation: Tensor  # [N, z + 1] epsilon3 at image boundaries, rad; [N, 0] for stills
    shear: Tensor  # [N] d epsilon1 / d epsilon3 along the spot, 0 for stills
    two_sin_theta: Tensor  # [N]
    d: Tensor  # [N] A
    wavelength: Tensor  # [N] A


def _geometry(store: Any, experiments: Sequence[Experiment], rows: NDArray[np.int64]) -> _Geometry:
    """Coordinates of the voxels of some rows of a store with one size of box."""
    metadata = {name: np.asarray(store.metadata[name][rows]) for name in ("id", "panel", "s1", "xyzcal_px", "bbox")}
    n_z, n_y, n_x = store.box
    still = experiments[0].is_still if experiments else True
    epsilon = np.empty((len(rows), n_y, n_x, 2), np.float32)
    jacobian = np.empty((len(rows), 2, 2), np.float32)
    rotation = np.empty((len(rows), 0 if still else n_z + 1), np.float32)
    shear, two_sin_theta, wavelength = (np.zeros(len(rows), np.float32) for _ in range(3))
    for number in np.unique(metadata["id"]):
        at = np.flatnonzero(metadata["id"] == number)
        experiment = experiments[int(number)]
        panel = metadata["panel"][at]
        xyz = metadata["xyzcal_px"][at].astype(float)
        # The wave vector of the predicted pixel position, in double precision: a float32 s1 errs by up to 1e-4 px.
        s1 = experiment.detector.s1_from_px(panel, xyz[:, :2], experiment.beam.wavelength)
        x, y, z = box_edges(metadata["bbox"][at])
        epsilon[at] = direction_coordinates(experiment, panel, s1, x[:, :-1] + 0.5, y[:, :-1] + 0.5)
        step = np.array([-0.5, 0.5])
        around = direction_coordinates(experiment, panel, s1, xyz[:, :1] + step, xyz[:, 1:2] + step)
        jacobian[at, :, 0] = (around[:, :, 1] - around[:, :, 0]).mean(axis=1)
        jacobian[at, :, 1] = (around[:, 1] - around[:, 0]).mean(axis=1)
        s0 = experiment.beam.s0
        two_sin_theta[at] = np.linalg.norm(s1 - s0, axis=1) * experiment.beam.wavelength
        wavelength[at] = experiment.beam.wavelength
        if not still and experiment.goniometer is not None:
            rotation[at] = rotation_coordinates(experiment, s1, xyz[:, 2], z)
            axis = experiment.goniometer.lab_axis / np.linalg.norm(experiment.goniometer.lab_axis)
            along = (s1 + s0) @ axis / np.linalg.norm(s1 + s0, axis=1)
            zeta = kabsch_frame(s0, s1, axis).e1 @ axis
            zeta = np.where(np.abs(zeta) < MIN_ZETA, np.copysign(MIN_ZETA, zeta), zeta)
            shear[at] = -two_sin_theta[at] * along / zeta
    return _Geometry(
        epsilon=torch.from_numpy(epsilon),
        jacobian=torch.from_numpy(jacobian),
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


def _sub_pixel_offsets() -> Tensor:
    """Sub-pixel nodes relative to the pixel centre, [K, 2] (x, y), px."""
    line = (torch.arange(SUB_PIXELS) + 0.5) / SUB_PIXELS - 0.5
    return torch.cartesian_prod(line, line)


class _Whitened(NamedTuple):
    """Coordinates in standard deviations of the spot shape, for each image of each spot."""

    u: Tensor  # [N, z, y, x, 2] at pixel centres
    step: Tensor  # [N, z, K, 2] from there to the sub-pixel nodes
    area: Tensor  # [N, z] of a pixel
    images: Tensor  # [N, z] share of the Gaussian spot in each image
    rotation: Tensor  # [N, z + 1] epsilon3 at image boundaries; [N, 0] for stills


def _whiten(geometry: _Geometry, psf: Tensor, mosaicity: Tensor, lattice: Tensor) -> _Whitened:
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
    zero = torch.zeros_like(p)
    inverse = torch.stack([1 / p, zero, -q / (p * r), 1 / r], dim=-1).reshape(*p.shape, 2, 2)
    centre = torch.stack([shift / p, -q * shift / (p * r)], dim=-1)
    u = torch.einsum("nzij,nyxj->nzyxi", inverse, geometry.epsilon) - centre[:, :, None, None]
    step = torch.einsum("nzij,njk,ok->nzoi", inverse, geometry.jacobian, _sub_pixel_offsets())
    area = torch.linalg.det(geometry.jacobian).abs()[:, None] / (p * r)
    return _Whitened(u, step, area, images, edges)


def _gaussian_voxels(at: _Whitened) -> Tensor:
    """Share of the Gaussian spot in each voxel, [N, z, y, x]."""
    total = torch.zeros_like(at.u[..., 0])
    for k in range(at.step.shape[2]):
        total = total + torch.exp(-0.5 * ((at.u + at.step[:, :, k, None, None]) ** 2).sum(dim=-1))
    return total * (at.images * at.area / (2 * torch.pi * at.step.shape[2]))[:, :, None, None]


def _tent_images(at: _Whitened, n_nodes: int) -> Tensor:
    """Share of each tent function of the epsilon3 grid in each image, [N, z, nodes]."""
    if at.rotation.shape[1] == 0:
        return torch.ones(len(at.u), 1, 1)
    spacing = 2 * GRID_EXTENT / (n_nodes - 1)
    node = torch.linspace(-GRID_EXTENT, GRID_EXTENT, n_nodes)
    t = ((at.rotation[..., None] - node) / spacing).clamp(-1, 1)
    integral = 0.5 + t - 0.5 * t * t.abs()  # of a tent of unit area from -1 to t
    return integral.diff(dim=1).abs()


def _tent_voxels(density: Tensor, at: _Whitened) -> Tensor:
    """Share of a density on the grid [N, z nodes, y nodes, x nodes] in each voxel, [N, z, y, x]."""
    plane = torch.einsum("nzk,nkyx->nzyx", _tent_images(at, density.shape[1]), density).flatten(0, 1)[:, None]
    u, step = at.u.flatten(0, 1), at.step.flatten(0, 1)
    total = torch.zeros_like(u[..., 0])
    for k in range(step.shape[1]):
        nodes = (u + step[:, k, None, None]) / GRID_EXTENT
        sampled = torch.nn.functional.grid_sample(plane, nodes, padding_mode="zeros", align_corners=True)
        total = total + sampled[:, 0]
    spacing = 2 * GRID_EXTENT / (density.shape[-1] - 1)
    scale = at.area.flatten()[:, None, None] / (spacing**2 * step.shape[1])
    return (total * scale).reshape(at.u.shape[:-1])


def _central(box: tuple[int, int, int], half: int) -> NDArray[np.bool_]:
    """Pixels within `half` of the box centre along y and x, all images, bool [P]."""
    inside = np.zeros(box, bool)
    _, n_y, n_x = box
    inside[:, max(n_y // 2 - half, 0) : n_y // 2 + half + 1, max(n_x // 2 - half, 0) : n_x // 2 + half + 1] = True
    return inside.ravel()


def select_strong(store: Any, *, n_max: int = MAX_STRONG, i_over_sigma: float = 10.0, chunk: int = 4096) -> StrongSpots:
    """The spots that teach the profile: strong, with their centre unmasked, evenly taken from the whole store.

    The signal is the sum of the central 9 x 9 pixels (fewer in a small box) above the robust mean of those around them.

    Args:
        store: ShoeboxStore with one size of box.
        n_max: at most this many.
        i_over_sigma: signal over its standard deviation must exceed this.
        chunk: rows read at a time.

    Raises:
        InputError: the store has boxes of several sizes.
    """
    if store.box is None:
        raise InputError("reference profiles need boxes of one size: extract the store with box=(z, y, x), not 'bbox'")
    half = max(min(4, min(store.box[1:]) // 2 - 1), 1)
    near, core = _central(store.box, half), _central(store.box, min(half, 2))
    found = []
    for start in range(0, store.n, chunk):
        rows = np.arange(start, min(start + chunk, store.n))
        counts = store.counts(rows)
        used = used_pixels(store.mask(rows))
        background = robust_background(counts, used & ~near)
        inside = used & near
        n = inside.sum(axis=1)
        signal = np.einsum("np,np->n", counts, inside, dtype=np.float64) - n * background.mean
        enough = background.n_used >= 10
        spread = np.where(enough, background.variance, 0.0)
        sigma = np.sqrt(np.maximum(signal, 1) + n * background.mean + n**2 * spread)
        good = enough & (signal > i_over_sigma * sigma) & used[:, core].all(axis=1)
        found.append((rows[good], background.mean[good], signal[good]))
    if not found:
        return StrongSpots(np.zeros(0, np.int64), np.zeros(0), np.zeros(0))
    rows, mean, signal = (np.concatenate(column) for column in zip(*found))
    keep = np.unique(np.linspace(0, len(rows) - 1, min(n_max, len(rows))).round().astype(np.int64))
    return StrongSpots(rows[keep], mean[keep], signal[keep])


def select_brightest(store: Any, *, n_max: int = MAX_STRONG, min_photons: int = 50, chunk: int = 4096) -> StrongSpots:
    """The spots with the most photons, background taken as 0: for boxes without pixels around the spot.

    Shoeboxes of spot finding are such. Widths that come from them are rough, but better than none.

    Args:
        store: ShoeboxStore with one size of box.
        n_max: at most this many.
        min_photons: a spot has at least this many.
        chunk: rows read at a time.
    """
    photons = np.zeros(store.n)
    for start in range(0, store.n, chunk):
        rows = np.arange(start, min(start + chunk, store.n))
        photons[rows] = np.einsum("np,np->n", store.counts(rows), used_pixels(store.mask(rows)), dtype=np.float64)
    rows = np.argsort(-photons, kind="stable")[:n_max]
    rows = np.sort(rows[photons[rows] >= min_photons])
    return StrongSpots(rows, np.zeros(len(rows)), photons[rows])


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
    geometry = _geometry(store, experiments, strong.rows)
    shape = (len(strong.rows), *store.box)
    used = used_pixels(store.mask(strong.rows))
    net = np.where(used, store.counts(strong.rows) - strong.background[:, None], 0.0).reshape(shape)
    weight = np.minimum(1, SPOT_PHOTONS / strong.intensity) / strong.intensity
    square = (geometry.epsilon.double() ** 2).sum(dim=-1).numpy()  # [N, y, x]
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


def isotropic_shape(geometry: _Geometry, widths: SpotWidths) -> SpotShape:
    """The shape that has the given widths: all of sigma_b in the point spread, all of sigma_m in the mosaicity."""
    scale = float(torch.linalg.det(geometry.jacobian).abs().sqrt().median())
    variance = (widths.sigma_b / scale) ** 2
    return SpotShape((variance, 0.0, variance), widths.sigma_m, 0.0)


def fit_shape(store: Any, experiments: Sequence[Experiment], strong: StrongSpots, start: SpotShape) -> SpotShape:
    """Maximum-likelihood Gaussian spot model of the strong spots, integrated over their voxels.

    The background of each spot is its robust mean, its intensity that which the profile then gives; point spread,
    mosaicity and lattice width are common to all. Deterministic (L-BFGS).
    """
    data = _spot_data(store, experiments, strong, half=7)
    root = np.sqrt(start.psf[0])
    # log of the Cholesky diagonal of the point spread, its off-diagonal element, log mosaicity, log lattice width
    mosaicity = max(start.mosaicity, 1e-5)
    parameters = torch.tensor([np.log(root), 0.0, np.log(root), np.log(mosaicity), np.log(mosaicity / 10)])
    parameters = parameters.float().requires_grad_()
    weight = (SPOT_PHOTONS / data.intensity).clamp(max=1.0)

    def widths() -> tuple[Tensor, Tensor, Tensor]:
        zero = torch.zeros(())
        factor = torch.stack([parameters[0].exp(), zero, parameters[1], parameters[2].exp()]).reshape(2, 2)
        return factor @ factor.T, parameters[3].exp(), parameters[4].exp()

    optimizer = torch.optim.LBFGS([parameters], max_iter=40, line_search_fn="strong_wolfe", tolerance_change=1e-7)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -data.log_likelihood(_gaussian_voxels(_whiten(data.geometry, *widths())), weight)
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        psf, mosaicity_fit, lattice = widths()
    shape = SpotShape((float(psf[0, 0]), float(psf[0, 1]), float(psf[1, 1])), float(mosaicity_fit), float(lattice))
    values = np.array([*shape.psf, shape.mosaicity, shape.lattice])
    if not np.isfinite(values).all() or max(shape.psf[0], shape.psf[2]) > max(store.box[1:]) ** 2:
        logger.warning("the fit of the spot shape did not converge; using the isotropic widths")
        return start
    return shape


class _SpotData(NamedTuple):
    """Central pixels of strong spots as tensors."""

    geometry: _Geometry
    counts: Tensor  # [N, z, y, x]
    used: Tensor  # [N, z, y, x] 0 or 1
    background: Tensor  # [N]
    intensity: Tensor  # [N]

    def select(self, rows: Tensor) -> _SpotData:
        return _SpotData(_Geometry(*(field[rows] for field in self.geometry)), *(field[rows] for field in self[1:]))

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


def _spot_data(store: Any, experiments: Sequence[Experiment], strong: StrongSpots, half: int) -> _SpotData:
    """The pixels within `half` of the box centre."""
    geometry = _geometry(store, experiments, strong.rows)
    shape = (len(strong.rows), *store.box)
    window = _central(store.box, half).reshape(store.box)
    y, x = (np.flatnonzero(window[0].any(axis=axis)) for axis in (1, 0))
    y_x = np.ix_(np.arange(shape[0]), np.arange(shape[1]), y, x)
    counts = torch.from_numpy(store.counts(strong.rows).reshape(shape)[y_x].astype(np.float32))
    used = torch.from_numpy(used_pixels(store.mask(strong.rows)).reshape(shape)[y_x].astype(np.float32))
    epsilon = geometry.epsilon[:, y[0] : y[-1] + 1, x[0] : x[-1] + 1]
    mean, signal = (torch.from_numpy(v.astype(np.float32)) for v in (strong.background, strong.intensity))
    return _SpotData(geometry._replace(epsilon=epsilon), counts, used, mean, signal)


@dataclass(frozen=True)
class CellGrid:
    """Cells of the reference profiles: a grid over the directions of diffraction, times blocks of rotation.

    A reflection uses the profiles of the neighbouring cell centres, linearly interpolated.
    """

    low: tuple[float, float, float]  # smallest direction cosines along two axes across the beam, and z in images
    high: tuple[float, float, float]
    size: tuple[int, int, int] = (3, 3, 1)

    @property
    def n(self) -> int:
        return int(np.prod(self.size))

    @staticmethod
    def coordinates(store: Any, experiments: Sequence[Experiment], rows: NDArray[np.int64]) -> Array:
        """Two direction cosines across the beam and z in images, [N, 3]: the same for any number of panels."""
        s1 = np.asarray(store.metadata["s1"][rows], float)
        ids = np.asarray(store.metadata["id"][rows])
        result = np.empty((len(rows), 3))
        result[:, 2] = store.metadata["xyzcal_px"][rows][:, 2]
        for number in np.unique(ids):
            at = ids == number
            beam = experiments[int(number)].beam.s0
            across = np.eye(3)[np.argmin(np.abs(beam))]
            first = np.cross(beam, across)
            first /= np.linalg.norm(first)
            second = np.cross(beam, first) / np.linalg.norm(beam)
            with np.errstate(invalid="ignore"):  # reflections without a position have no direction: NaN
                unit = s1[at] / np.linalg.norm(s1[at], axis=1, keepdims=True)
            result[at, :2] = unit @ np.stack([first, second], axis=1)
        return result

    def weights(self, coordinates: Array) -> Tensor:
        """Share of each cell in the profile of a reflection, [N, cells], rows sum to 1."""
        total = np.ones((len(coordinates), 1))
        for axis, size in enumerate(self.size):
            span = max(self.high[axis] - self.low[axis], 1e-9)
            at = np.clip((coordinates[:, axis] - self.low[axis]) / span * size - 0.5, 0, size - 1)
            share = np.maximum(1 - np.abs(at[:, None] - np.arange(size)), 0)
            total = (total[:, :, None] * share[:, None, :]).reshape(len(coordinates), -1)
        return torch.from_numpy(total.astype(np.float32))


class ReferenceProfiles:
    """Profiles of all reflections of a store, learned from its strong spots in reciprocal space.

    Make one with `ReferenceProfiles.fit` or `ReferenceProfiles.load`.

    Attributes:
        widths: isotropic sigma_b and sigma_m, for the foreground.
        shape: the Gaussian spot model.
        density: learned densities, [cells, epsilon3 nodes, epsilon2 nodes, epsilon1 nodes], each summing to 1, in
            whitened coordinates; None where the Gaussian predicts unseen strong spots at least as well.
        history: held-out log-likelihood per photon of the Gaussian and after each step of learning.
        n_strong: spots learned from.
    """

    def __init__(
        self,
        store: Any,
        experiments: Sequence[Experiment],
        widths: SpotWidths,
        shape: SpotShape,
        cells: CellGrid,
        density: Tensor | None = None,
        history: Sequence[float] = (),
        n_strong: int = 0,
    ) -> None:
        if store.box is None:
            raise InputError(
                "reference profiles need boxes of one size: extract the store with box=(z, y, x), not 'bbox'"
            )
        self.store, self.experiments = store, experiments
        self.widths, self.shape, self.cells = widths, shape, cells
        self.density, self.history, self.n_strong = density, list(history), n_strong

    @classmethod
    def fit(
        cls,
        store: Any,
        experiments: Sequence[Experiment],
        *,
        widths: SpotWidths | None = None,
        learn: bool = True,
        phi_block_deg: float = 30.0,
        n_max: int = MAX_STRONG,
        progress: Progress | None = None,
    ) -> ReferenceProfiles:
        """Learn the profiles of a store from its strong spots.

        Args:
            store: ShoeboxStore with one size of box.
            experiments: one per `id` of the store.
            widths: sigma_b and sigma_m; None takes them from strong spots, or where these are too few from the
                profile block, or without one from the brightest boxes as they are.
            learn: False stops at the Gaussian.
            phi_block_deg: rotation per block of reference profiles, deg.
            n_max: strong spots used at most.
            progress: called as progress("profiles", done, total).

        Raises:
            InputError: too few strong spots and no profile block to fall back on, or boxes of several sizes.
        """
        tell = progress or (lambda stage, done, total: None)
        tell("profiles", 0, EM_STEPS + 2)
        strong = select_strong(store, n_max=n_max)
        given = SpotWidths.from_profile(experiments[0].profile) if experiments else None
        enough = len(strong.rows) >= MIN_STRONG
        if widths is None:
            if enough:
                widths = fit_widths(store, experiments, strong, given.n_sigma if given else 3.0)
            elif given is not None:
                widths = given
            else:
                widths = fit_widths(store, experiments, select_brightest(store, n_max=n_max))
                logger.warning(
                    "only %d strong spots with background around them: the spot widths are rough, from the photons of "
                    "the brightest boxes",
                    len(strong.rows),
                )
        sample = strong.rows if len(strong.rows) else np.arange(min(store.n, 100))
        shape = isotropic_shape(_geometry(store, experiments, sample), widths)
        tell("profiles", 1, EM_STEPS + 2)
        if enough:
            step = max(len(strong.rows) // 500, 1)
            few = StrongSpots(strong.rows[::step], strong.background[::step], strong.intensity[::step])
            shape = fit_shape(store, experiments, few, shape)
        tell("profiles", 2, EM_STEPS + 2)
        cells = _make_cells(store, experiments, len(strong.rows), phi_block_deg)
        result = cls(store, experiments, widths, shape, cells, n_strong=len(strong.rows))
        if learn and enough:
            result._learn(strong, lambda done: tell("profiles", 2 + done, EM_STEPS + 2))
        tell("profiles", EM_STEPS + 2, EM_STEPS + 2)
        logger.info(
            "profiles: %d strong spots, sigma_b %.4f deg, sigma_m %.4f deg, mosaicity %.4f deg, %s",
            len(strong.rows),
            np.degrees(widths.sigma_b),
            np.degrees(widths.sigma_m),
            np.degrees(shape.mosaicity),
            "Gaussian" if result.density is None else f"learned in {cells.n} cells",
        )
        return result

    def _whitened(self, geometry: _Geometry) -> _Whitened:
        xx, xy, yy = self.shape.psf
        psf = torch.tensor([[xx, xy], [xy, yy]], dtype=torch.float32)
        return _whiten(geometry, psf, torch.tensor(self.shape.mosaicity), torch.tensor(self.shape.lattice))

    def _learn(self, strong: StrongSpots, tell: Callable[[int], None]) -> None:
        """Densities by expectation maximisation, kept only as far as they predict spots that they have not seen."""
        data = _spot_data(self.store, self.experiments, strong, half=self._half_width(strong))
        held_out = torch.arange(len(strong.rows)) % 5 == 4
        weight = (SPOT_PHOTONS / data.intensity).clamp(max=1.0)
        cell = self.cells.weights(CellGrid.coordinates(self.store, self.experiments, strong.rows))
        train, test = data.select(~held_out), data.select(held_out)
        at_train, at_test = self._whitened(train.geometry), self._whitened(test.geometry)
        gaussian = _gaussian_density(GRID_ROTATION if data.geometry.rotation.shape[1] else 1)

        def predict(density: Tensor, at: _Whitened, rows: Tensor) -> Tensor:
            return _tent_voxels(torch.einsum("nc,ckyx->nkyx", cell[rows], density), at)

        best = float(test.log_likelihood(_gaussian_voxels(at_test), weight[held_out]))
        history = [best]
        density = gaussian.expand(self.cells.n, -1, -1, -1).clone()
        for done in range(EM_STEPS):
            density.requires_grad_()
            profile = predict(density, at_train, ~held_out)
            rate, intensity = train.rate(profile)
            photons = train.used * weight[~held_out, None, None, None]
            observed = photons * train.counts * rate.detach().reciprocal() * intensity.detach()[:, None, None, None]
            (gain,) = torch.autograd.grad((observed * profile).sum(), density, retain_graph=True)
            (cost,) = torch.autograd.grad((photons * intensity.detach()[:, None, None, None] * profile).sum(), density)
            with torch.no_grad():
                density = (density * gain + PRIOR_PHOTONS * gaussian) / (cost + PRIOR_PHOTONS)
                density /= density.sum(dim=(1, 2, 3), keepdim=True)
                score = float(test.log_likelihood(predict(density, at_test, held_out), weight[held_out]))
            history.append(score)
            tell(done + 1)
            if score > best:
                best, self.density = score, density.clone()
            elif score < max(history[-4:-1]) - 1e-6 and done > 4:
                break
        self.history = history

    def _half_width(self, strong: StrongSpots) -> int:
        """Pixels that hold the whole grid of most spots."""
        at = self._whitened(_geometry(self.store, self.experiments, strong.rows))
        return int(np.ceil(GRID_EXTENT / float(at.area.sqrt().quantile(0.05))))

    def _evaluate(self, rows: NDArray[np.int64]) -> Tensor:
        """Share of the whole spot in each voxel, [N, z, y, x]."""
        at = self._whitened(_geometry(self.store, self.experiments, rows))
        if self.density is None:
            return _gaussian_voxels(at)
        cell = self.cells.weights(CellGrid.coordinates(self.store, self.experiments, rows))
        return _tent_voxels(torch.einsum("nc,ckyx->nkyx", cell, self.density), at)

    def profiles(self, rows: NDArray[np.int64], *, chunk: int = 1024) -> Tensor:
        """Profiles over the whole boxes, masked pixels included.

        Args:
            rows: rows of the store, int64 [B].
            chunk: rows evaluated at a time.

        Returns:
            float32 [B, P], pixel order z, y, x, each row summing to 1. A row without a spot in its box (a wave vector
            along the beam) is all zero.
        """
        return self.profiles_and_coverage(rows, chunk=chunk)[0]

    def coverage(self, rows: NDArray[np.int64], *, chunk: int = 1024) -> Tensor:
        """Share of each modelled spot that its box holds, float32 [B]: divides I of the box to I of the whole spot."""
        return self.profiles_and_coverage(rows, chunk=chunk)[1]

    @torch.no_grad()
    def profiles_and_coverage(self, rows: NDArray[np.int64], *, chunk: int = 1024) -> tuple[Tensor, Tensor]:
        """`profiles` and `coverage` of the same rows in one pass."""
        rows = np.asarray(rows, np.int64)
        profile, coverage = torch.zeros(len(rows), self.store.n_pixels), torch.zeros(len(rows))
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            share = self._evaluate(rows[part]).reshape(len(rows[part]), -1)
            share = torch.nan_to_num(share, nan=0.0)
            total = share.sum(dim=1)
            profile[part] = share / total.clamp(min=1e-20)[:, None]
            coverage[part] = total.clamp(max=1.0)
        return profile, coverage

    @torch.no_grad()
    def partiality(self, rows: NDArray[np.int64], *, chunk: int = 8192) -> Tensor:
        """Share of each modelled spot, along the rotation, on images of its box that exist, float32 [B]."""
        rows = np.asarray(rows, np.int64)
        result = torch.ones(len(rows))
        sigma_of = (self.shape.mosaicity, self.shape.lattice)
        for start in range(0, len(rows), chunk):
            part = rows[start : start + chunk]
            edges, d = rotation_edges(self.store, self.experiments, part)
            if edges.shape[1]:
                sigma = np.hypot(sigma_of[0], sigma_of[1] * d)
                share = torch.special.ndtr(torch.from_numpy(edges / sigma[:, None])).diff(dim=1).abs()
                recorded = torch.from_numpy(images_in_scan(self.store, self.experiments, part))
                result[start : start + chunk] = torch.nan_to_num((share * recorded).sum(dim=1)).float()
        return result

    def save(self, path: str | os.PathLike) -> None:
        """Write everything learned to an .npz file."""
        empty = torch.zeros(0)
        with replacing(path) as temporary, temporary.open("wb") as handle:
            np.savez(
                handle,
                widths=np.array([self.widths.sigma_b, self.widths.sigma_m, self.widths.n_sigma]),
                shape=np.array([*self.shape.psf, self.shape.mosaicity, self.shape.lattice]),
                cells=np.array([self.cells.low, self.cells.high, self.cells.size], float),
                density=(self.density if self.density is not None else empty).numpy(),
                history=np.array(self.history),
                n_strong=np.array(self.n_strong),
            )

    @classmethod
    def load(cls, path: str | os.PathLike, store: Any, experiments: Sequence[Experiment]) -> ReferenceProfiles:
        """Profiles written by `save`, for the reflections of a store (not necessarily the one learned from).

        Raises:
            InputError: not a file written by `save`.
        """
        try:
            with np.load(path) as file:
                content = dict(file)
            shape, cells = content["shape"].tolist(), content["cells"].tolist()
            density = torch.from_numpy(content["density"]) if content["density"].size else None
            widths, history = SpotWidths(*content["widths"].tolist()), content["history"].tolist()
            n_strong = int(content["n_strong"])
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} holds no reference profiles ({error}); remove it to learn them again") from error
        size = tuple(int(v) for v in cells[2])
        grid = CellGrid(tuple(cells[0]), tuple(cells[1]), (size[0], size[1], size[2]))
        return cls(
            store, experiments, widths, SpotShape(tuple(shape[:3]), *shape[3:]), grid, density, history, n_strong
        )


def _make_cells(store: Any, experiments: Sequence[Experiment], n_strong: int, phi_block_deg: float) -> CellGrid:
    """3 x 3 cells over the reflections of a store, times as many blocks of rotation as there are spots for."""
    at = CellGrid.coordinates(store, experiments, np.arange(store.n)) if store.n else np.zeros((1, 3))
    low, high = (tuple(np.nan_to_num(v).tolist()) for v in (np.nanmin(at, axis=0), np.nanmax(at, axis=0)))
    blocks = 1
    if experiments and not experiments[0].is_still and experiments[0].scan is not None:
        degrees = (high[2] - low[2]) * abs(experiments[0].scan.oscillation[1])
        blocks = max(1, min(round(degrees / phi_block_deg), n_strong // (9 * MIN_STRONG)))
    return CellGrid(low, high, (3, 3, blocks))


def _gaussian_density(n_rotation: int) -> Tensor:
    """The unit Gaussian on the grid of tent functions, narrowed by the width of a tent, [z, y, x], sum 1."""

    def line(n: int) -> Tensor:
        if n == 1:
            return torch.ones(1)
        node = torch.linspace(-GRID_EXTENT, GRID_EXTENT, n)
        spacing = 2 * GRID_EXTENT / (n - 1)
        value = torch.exp(-0.5 * node**2 / (1 - spacing**2 / 6))
        return value / value.sum()

    across, along = line(GRID), line(n_rotation)
    return along[:, None, None] * across[None, :, None] * across[None, None, :]
