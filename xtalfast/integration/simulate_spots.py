"""Spot shapes, and the share of each spot that falls into each voxel of an image stack.

A reflection is a Gaussian in reciprocal space. The voxel (x, y, phi) looks at the point q = R(-phi) (s1(x, y) - s0) of
the crystal's reciprocal space, a map that is linear over a spot; a spot is therefore a three-dimensional Gaussian in
pixel units whose shape turns and stretches over the detector. Shares are its integrals over whole voxels: the error
function along the rotation, Gauss-Legendre nodes within a pixel.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from xtalfast.integration.boxes import pixel_steps, reciprocal_covariance
from xtalfast.integration.columns import zeta_factor
from xtalfast.integration.kabsch import experiment_frame
from xtalfast.integration.predict import Predictions, rotation_models
from xtalfast.integration.simulate_config import SimulationConfig
from xtalfast.models import Array, Experiment

REACH = 5.0  # standard deviations; 6e-7 of a spot lies outside along each axis
_NODES_AT_SIGMA = 1.5  # Gauss-Legendre nodes per pixel = this / (smallest width in px): < 0.3 % of the peak voxel
_MAX_NODES = 8
_WORK = 1 << 20  # values of one temporary array


class VoxelShares(NamedTuple):
    """Shares of spots in the voxels of a stack, as a sparse list."""

    row: NDArray[np.int64]  # [K] spot
    voxel: NDArray[np.int64]  # [K] index into the flattened [z, y, x] stack
    share: Array  # [K]


def _outer(v: Array) -> Array:
    return v[..., :, None] * v[..., None, :]


def spot_covariances(experiment: Experiment, spots: Predictions, config: SimulationConfig) -> Array:
    """Covariance of each spot in (x px, y px, image), [N, 3, 3].

    In reciprocal space: block size (isotropic) + mosaicity (across q, growing with |q|) + divergence (across the beam)
    + bandwidth (along q). On the detector: point spread, and the depth of the sensor along the direction of the ray.
    """
    identity = np.eye(3)
    s0 = experiment.beam.s0
    q = spots.s1 - s0
    block = 0.9 / config.block_size_a / np.sqrt(8 * np.log(2))
    reciprocal = (
        reciprocal_covariance(q, block, np.radians(config.mosaicity_deg))
        + np.radians(config.divergence_deg) ** 2 * (s0 @ s0 * identity - _outer(s0))
        + config.bandwidth**2 * _outer(q)
    )
    to_pixels = np.linalg.inv(pixel_steps(experiment, spots.panel, spots.s1))
    covariance = to_pixels @ reciprocal @ to_pixels.transpose(0, 2, 1)
    covariance[:, :2, :2] += config.psf_px**2 * np.eye(2)
    for p, panel in enumerate(experiment.detector):
        rows = np.flatnonzero(spots.panel == p)
        slope = np.stack([spots.s1[rows] @ panel.fast, spots.s1[rows] @ panel.slow], axis=1)
        slope /= (spots.s1[rows] @ panel.normal)[:, None]
        covariance[rows, :2, :2] += _outer(config.oblique_depth_mm * slope / np.asarray(panel.pixel_size))
    return covariance


def profile_block(experiment: Experiment, spots: Predictions, covariance: Array) -> dict[str, str | float]:
    """The `gaussian_rs` block of a `.expt`: sigma_b and sigma_m (deg) as the medians over the spots."""
    frame = experiment_frame(experiment, spots.s1)
    angles = np.stack([frame.e1, frame.e2], axis=1) @ pixel_steps(experiment, spots.panel, spots.s1)[:, :, :2]
    angles *= experiment.beam.wavelength
    spread = angles @ covariance[:, :2, :2] @ angles.transpose(0, 2, 1)
    sigma_b = np.sqrt(0.5 * np.trace(spread, axis1=1, axis2=2))
    goniometer, scan = rotation_models(experiment)
    zeta = zeta_factor(experiment.beam.s0, spots.s1, goniometer.lab_axis)
    sigma_m = np.abs(zeta) * np.sqrt(covariance[:, 2, 2]) * scan.oscillation[1]
    return {
        "__id__": "gaussian_rs",
        "n_sigma": 3.0,
        "sigma_b": float(np.degrees(np.median(sigma_b))),
        "sigma_m": float(np.median(sigma_m)),
    }


def voxel_shares(centre: Array, covariance: Array, stack: tuple[int, int, int], first: int) -> VoxelShares:
    """The part of every spot that falls into each voxel of a stack of images.

    Args:
        centre: x px, y px, image, [N, 3].
        covariance: in the same units, [N, 3, 3].
        stack: images, rows, columns.
        first: z of the first image of the stack: it covers first <= z < first + images.

    Returns:
        The shares in order of spot, then voxel; all voxels within five standard deviations, cut at the stack's faces.
    """
    n_z, n_y, n_x = stack
    reach_z = REACH * np.sqrt(covariance[:, 2, 2])
    near = np.flatnonzero((centre[:, 2] + reach_z > first) & (centre[:, 2] - reach_z < first + n_z))
    centre, covariance = centre[near], covariance[near]
    reach = REACH * np.sqrt(np.diagonal(covariance, axis1=1, axis2=2))
    origin = np.array([0, 0, first])
    low = np.maximum(np.floor(centre - reach).astype(np.int64), origin)
    high = np.minimum(np.floor(centre + reach).astype(np.int64) + 1, origin + np.array([n_x, n_y, n_z]))
    size = np.maximum(high - low, 0)
    nodes = np.ceil(_NODES_AT_SIGMA / np.sqrt(np.linalg.eigvalsh(covariance[:, :2, :2])[:, 0]))
    nodes = np.clip(nodes, 2, _MAX_NODES).astype(np.int64)
    # Spots of like extent go together, since a group shares the largest box among its members.
    rows = np.flatnonzero(size.prod(axis=1) > 0)
    rows = rows[np.lexsort((size[rows, 0], size[rows, 1], size[rows, 2], nodes[rows]))]
    found = [
        _group_shares(centre, covariance, low, high, group, n, stack, first) for group, n in _groups(rows, size, nodes)
    ]
    if not found:
        return VoxelShares(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
    row, voxel, share = (np.concatenate(part) for part in zip(*found))
    order = np.lexsort((voxel, row))
    return VoxelShares(near[row[order]], voxel[order], share[order])


def _groups(rows: NDArray, size: NDArray, nodes: NDArray) -> list[tuple[NDArray, int]]:
    """Rows in their order, cut into groups of one number of nodes whose temporary arrays stay within `_WORK`."""
    groups = []
    start = 0
    while start < len(rows):
        stop, n = start + 1, nodes[rows[start]]
        largest = size[rows[start]]
        while stop < len(rows) and nodes[rows[stop]] == n:
            box = np.maximum(largest, size[rows[stop]])
            if (stop + 1 - start) * (box[2] + 1) * box[0] * box[1] * n**2 > _WORK:
                break
            largest, stop = box, stop + 1
        groups.append((rows[start:stop], int(n)))
        start = stop
    return groups


def _group_shares(
    centre: Array,
    covariance: Array,
    low: NDArray,
    high: NDArray,
    rows: NDArray,
    n_nodes: int,
    stack: tuple[int, int, int],
    first: int,
) -> tuple[NDArray, NDArray, Array]:
    """Row, voxel and share of a few spots on a common box size."""
    mean, start = centre[rows], low[rows]
    n_x, n_y, n_z = (high[rows] - start).max(axis=0)
    node, weight = np.polynomial.legendre.leggauss(n_nodes)
    node, weight = 0.5 * (node + 1), 0.5 * weight

    # The Gaussian as p(x, y) p(z | x, y): z given (x, y) has mean slope . (dx, dy) and a constant width.
    in_plane = covariance[rows][:, :2, :2]
    inverse = np.linalg.inv(in_plane)
    slope = np.einsum("ni,nij->nj", covariance[rows][:, 2, :2], inverse)
    width = np.sqrt(covariance[rows][:, 2, 2] - np.einsum("ni,ni->n", slope, covariance[rows][:, 2, :2]))

    def offsets(axis: int, n: int) -> Array:
        edge = start[:, axis, None] + np.arange(n) - mean[:, axis, None]
        return (edge[:, :, None] + node).reshape(len(rows), -1)

    dx, dy = offsets(0, n_x)[:, None, :], offsets(1, n_y)[:, :, None]
    a, b, c = (inverse[:, i, j, None, None] for i, j in ((0, 0), (0, 1), (1, 1)))
    density = np.exp(-0.5 * (a * dx * dx + 2 * b * dx * dy + c * dy * dy))
    density *= np.tile(weight, n_x) * np.tile(weight, n_y)[:, None]
    density /= 2 * np.pi * np.sqrt(np.linalg.det(in_plane))[:, None, None]

    shift = slope[:, 0, None, None] * dx + slope[:, 1, None, None] * dy
    face = start[:, 2, None] + np.arange(n_z + 1) - mean[:, 2, None]
    at_face = (face[:, :, None, None] - shift[:, None]) / width[:, None, None, None]
    passed = torch.special.ndtr(torch.from_numpy(at_face)).numpy()
    fine = (passed[:, 1:] - passed[:, :-1]) * density[:, None]
    share = fine.reshape(len(rows), n_z, n_y, n_nodes, n_x, n_nodes).sum(axis=(3, 5))

    x, y, z = (start[:, k, None] + np.arange(n) for k, n in enumerate((n_x, n_y, n_z)))
    inside = (
        (z < high[rows, 2, None])[:, :, None, None]
        & (y < high[rows, 1, None])[:, None, :, None]
        & (x < high[rows, 0, None])[:, None, None, :]
    )
    voxel = ((z - first)[:, :, None, None] * stack[1] + y[:, None, :, None]) * stack[2] + x[:, None, None, :]
    row = np.broadcast_to(rows[:, None, None, None], inside.shape)
    return row[inside], voxel[inside], share[inside]
