"""Shoeboxes that follow the spot: as large as the modelled spot and some background need, long for spots of low zeta.

A spot is a Gaussian in reciprocal space: mosaic blocks of finite size and spread (`SpotShape`), seen by the voxel
(x, y, phi) through the map q = R(-phi) (s1(x, y) - s0), which is linear over a spot, and blurred by the detector. Its
covariance in pixels and images follows for every reflection, and with it the box. Sizes are rounded up to a few, so
that the boxes of one size can be worked on together (`ShoeboxStore.by_size`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from xtalfast.integration.columns import rotation_axis
from xtalfast.models import Array, Experiment

if TYPE_CHECKING:
    from xtalfast.integration.gaussian_rs import SpotShape

N_SIGMA = 3.5  # half width of the box in standard deviations of the spot: 5e-4 of it lies outside along each axis
BACKGROUND_PX = 5  # and this much background around it
MAX_IMAGES = 64
MIN_ZETA = 0.02  # nearer to the rotation axis the map from images to q is no longer linear over a spot
_STEP_PX = 4  # box sizes across: 1 + a multiple of this
_IMAGES = np.array([1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64])


def pixel_steps(experiment: Experiment, panel: NDArray, s1: Array) -> Array:
    """Change of the lattice-fixed q per pixel in x, per pixel in y and per image, as columns: [N, 3, 3], 1/A.

    A still has no third column: [N, 3, 2].
    """
    beam, axis = experiment.beam, rotation_axis(experiment)
    steps = np.empty((len(s1), 3, 2 if axis is None else 3))
    for p, model in enumerate(experiment.detector):
        rows = np.flatnonzero(panel == p)
        unit = s1[rows] * beam.wavelength
        xy, _ = model.intersect(s1[rows])
        length = np.linalg.norm(model.lab_from_mm(xy), axis=1)[:, None]
        for k, (direction, size) in enumerate(((model.fast, model.pixel_size[0]), (model.slow, model.pixel_size[1]))):
            across = direction - unit * (unit @ direction)[:, None]
            steps[rows, :, k] = across * size / length / beam.wavelength
    if axis is not None and experiment.scan is not None:
        steps[:, :, 2] = -np.cross(axis, s1 - beam.s0) * np.radians(experiment.scan.oscillation[1])
    return steps


def reciprocal_covariance(q: Array, block: float, mosaicity: float) -> Array:
    """Covariance [N, 3, 3] (1/A^2) of a reciprocal-lattice point q [N, 3]: block size (isotropic) and mosaicity.

    Args:
        q: reciprocal vectors, 1/A.
        block: standard deviation from the size of the mosaic blocks, 1/A.
        mosaicity: standard deviation, rad; spreads the point across q.
    """
    square = np.sum(q * q, axis=1)[:, None, None]
    return block**2 * np.eye(3) + mosaicity**2 * (square * np.eye(3) - q[:, :, None] * q[:, None, :])


def spot_covariance(experiment: Experiment, shape: SpotShape, panel: NDArray, s1: Array) -> Array:
    """Covariance of every spot in (x px, y px, image), [N, 3, 3]; of a still in (x px, y px), [N, 2, 2].

    Args:
        experiment: beam, detector, and goniometer and scan for a rotation.
        shape: point spread, mosaicity and block size, as fitted by `gaussian_rs.fit_shape`.
        panel: panel number, [N].
        s1: predicted wave vectors, [N, 3], 1/A.
    """
    s1 = np.asarray(s1, float)
    reciprocal = reciprocal_covariance(s1 - experiment.beam.s0, shape.lattice, shape.mosaicity)
    steps = pixel_steps(experiment, panel, s1)
    if steps.shape[2] == 2:  # the Ewald sphere cuts out of the point no more than this projection
        to_pixels = np.linalg.pinv(steps)
    else:
        # Where the axis lies in the plane of s0 and s1 (zeta = 0) the images do not tell q; it is very long there.
        zeta = np.linalg.det(steps)
        limit = MIN_ZETA * np.linalg.norm(steps, axis=1).prod(axis=1)
        flat = np.abs(zeta) < limit
        if flat.any():
            normal = np.cross(steps[flat, :, 0], steps[flat, :, 1])
            normal /= np.linalg.norm(normal, axis=1, keepdims=True)
            length = np.linalg.norm(steps[flat, :, 2], axis=1, keepdims=True)
            steps[flat, :, 2] += MIN_ZETA * length * normal * np.where(zeta[flat] < 0, -1, 1)[:, None]
        to_pixels = np.linalg.inv(steps)
    covariance = to_pixels @ reciprocal @ to_pixels.transpose(0, 2, 1)
    xx, xy, yy = shape.psf
    covariance[:, :2, :2] += np.array([[xx, xy], [xy, yy]])
    return covariance


def spot_boxes(
    covariance: Array,
    xyz_px: Array,
    *,
    n_sigma: float = N_SIGMA,
    background_px: int = BACKGROUND_PX,
    max_images: int = MAX_IMAGES,
) -> NDArray[np.int32]:
    """Boxes [N, 6] (x0, x1, y0, y1, z0, z1, end excluded) that hold the spot and background around it, of few sizes.

    Args:
        covariance: of the spots, [N, 3, 3], or [N, 2, 2] for stills, from `spot_covariance`.
        xyz_px: predicted positions, [N, 3], px, px, images.
        n_sigma: half width of the spot.
        background_px: pixels beyond it on each side; there is no such margin along the rotation.
        max_images: longest box. Spots that need more (zeta near 0) are cut, and their box says so (`Reason.SmallBox`).

    Returns:
        int32 [N, 6]; of a row whose position is not finite the smallest box at 0.
    """
    good = np.asarray(np.isfinite(xyz_px).all(axis=1) & np.isfinite(covariance).all(axis=(1, 2)))
    centre = np.where(good[:, None], xyz_px, 0.0)
    sigma = np.sqrt(np.where(good[:, None], np.diagonal(covariance, axis1=1, axis2=2), 0.0))
    reach = n_sigma * sigma
    half = np.ceil(reach[:, :2] + background_px)
    half = (_STEP_PX // 2) * np.ceil(half / (_STEP_PX // 2))  # size 2 half + 1 about the pixel of the position
    middle = np.floor(centre[:, :2])
    low, high = middle - half, middle + half + 1
    z0 = np.floor(centre[:, 2])
    if sigma.shape[1] == 2:
        z1 = z0 + 1
    else:
        z0, z1 = np.floor(centre[:, 2] - reach[:, 2]), np.ceil(centre[:, 2] + reach[:, 2])
        wanted = np.maximum(z1 - z0, 1)
        size = _IMAGES[np.minimum(np.searchsorted(_IMAGES, wanted), len(_IMAGES) - 1)]
        size = np.minimum(size, max_images)
        # The images to spare, or short of, are shared by both ends; the nearer one gets the odd one.
        spare = size - wanted
        first = np.floor(spare / 2) + (spare % 2) * (centre[:, 2] - np.floor(centre[:, 2]) < 0.5)
        z0 = z0 - first
        z1 = z0 + size
    return np.column_stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1], z0, z1]).astype(np.int32)
