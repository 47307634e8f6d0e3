"""Reciprocal-space coordinates of detector voxels around a reflection: the frame of Kabsch (2010).

In this frame every spot of a crystal has the same shape, whatever its path through the Ewald sphere and wherever the
detector panel stands, so that one profile serves them all. `epsilon1` and `epsilon2` are the two angles between the ray
of a pixel and the predicted ray (they hold the beam divergence and point spread), `epsilon3` is the rotation away
from the diffracting position along the shortest path (it holds the mosaicity). All three are in rad. A still has no
epsilon3.

Ref: W. Kabsch, Acta Cryst. D66, 133-144 (2010), section 2.3 (https://doi.org/10.1107/S0907444909047374).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from xtalfast.errors import InputError
from xtalfast.models import Array, Experiment


class KabschFrame(NamedTuple):
    """Axes of the reciprocal-space frame of each reflection."""

    e1: Array  # [N, 3] unit vectors, along s1 x s0
    e2: Array  # [N, 3] unit vectors, along s1 x e1
    zeta: Array | None  # [N] axis . e1; epsilon3 = zeta (phi - phi_cal); None for a still


def kabsch_frame(s0: Array, s1: Array, axis: Array | None = None) -> KabschFrame:
    """The frame in which every reflection of a crystal has the same shape.

    Args:
        s0: incident wave vector, [3], 1/A.
        s1: predicted diffracted wave vectors, [N, 3], 1/A.
        axis: rotation axis in the laboratory frame, [3], any length; None for a still.

    Returns:
        e1 and e2 [N, 3], and zeta [N] (None for a still), float64. Where s1 is parallel to s0 there is no frame:
        e1, e2 and zeta are nan.

    Ref: Kabsch (2010), equations of section 2.3.
    """
    s0, s1 = np.asarray(s0, float), np.asarray(s1, float)
    with np.errstate(invalid="ignore"):
        e1 = np.cross(s1, s0)
        e1 /= np.linalg.norm(e1, axis=-1, keepdims=True)
        e2 = np.cross(s1, e1)
        e2 /= np.linalg.norm(e2, axis=-1, keepdims=True)
    if axis is None:
        return KabschFrame(e1, e2, None)
    return KabschFrame(e1, e2, e1 @ (np.asarray(axis, float) / np.linalg.norm(axis)))


def experiment_frame(experiment: Experiment, s1: Array) -> KabschFrame:
    """`kabsch_frame` with the beam and rotation axis of an experiment (no zeta for a still)."""
    axis = None if experiment.goniometer is None or experiment.is_still else experiment.goniometer.lab_axis
    return kabsch_frame(experiment.beam.s0, s1, axis)


def direction_coordinates(experiment: Experiment, panel: NDArray, s1: Array, x_px: Array, y_px: Array) -> NDArray:
    """epsilon1 and epsilon2 on a grid of detector positions around each reflection.

    Args:
        experiment: beam and detector; the parallax correction of each panel is applied.
        panel: panel number of each reflection, [N].
        s1: predicted wave vectors, [N, 3], 1/A.
        x_px: fast pixel coordinates of the grid columns of each reflection, [N, nx]; beyond the panel is allowed.
        y_px: slow pixel coordinates of the grid rows of each reflection, [N, ny].

    Returns:
        [N, ny, nx, 2] float32, rad.
    """
    frame = experiment_frame(experiment, s1)
    # e1 . s1 = e2 . s1 = 0, so e . (s' - s1) / |s1| is e . (unit vector of the pixel's ray)
    axes = np.stack([frame.e1, frame.e2], axis=-1)
    result = np.empty((len(axes), y_px.shape[1], x_px.shape[1], 2), np.float32)
    for p in np.unique(panel):
        rows = np.flatnonzero(panel == p)
        x, y = x_px[rows, None, :], y_px[rows, :, None]
        xy = np.stack(np.broadcast_arrays(x, y), axis=-1)
        ray = experiment.detector[int(p)].lab_from_px(xy)
        length = np.sqrt(np.einsum("nyxi,nyxi->nyx", ray, ray))
        flat = ray.reshape(len(rows), -1, 3) @ axes[rows]
        result[rows] = flat.reshape(*length.shape, 2) / length[..., None]
    return result


def rotation_coordinates(experiment: Experiment, s1: Array, z_cal: Array, z_px: Array) -> NDArray:
    """epsilon3 = zeta (phi - phi_cal) at scan positions around each reflection.

    Args:
        experiment: a rotation experiment.
        s1: predicted wave vectors, [N, 3], 1/A.
        z_cal: predicted position of each reflection, [N], images.
        z_px: scan positions, [N, nz], images (image n covers n - 1 <= z < n).

    Returns:
        [N, nz] float32, rad.

    Raises:
        InputError: the experiment is a still.
    """
    zeta = experiment_frame(experiment, s1).zeta
    if zeta is None or experiment.scan is None:
        raise InputError("epsilon3 needs a rotation experiment, got a still: use direction_coordinates alone")
    width = np.radians(experiment.scan.oscillation[1])
    return (zeta[:, None] * width * (z_px - z_cal[:, None])).astype(np.float32)


def box_edges(bbox: NDArray) -> tuple[Array, Array, Array]:
    """Pixel and image boundaries of equally sized boxes.

    Args:
        bbox: x0, x1, y0, y1, z0, z1 (end excluded), int [N, 6], all boxes of one size.

    Returns:
        x [N, nx + 1], y [N, ny + 1], z [N, nz + 1], float64: lower edge of each voxel, and the last upper edge.

    Raises:
        InputError: the boxes differ in size.
    """
    low = np.asarray(bbox, float)[:, 0::2]
    size = (np.asarray(bbox)[:, 1::2] - np.asarray(bbox)[:, 0::2]).astype(np.int64)
    if len(size) and (size != size[0]).any():
        raise InputError("boxes must all have one size here: call once for each size of box")
    nx, ny, nz = size[0] if len(size) else (0, 0, 0)
    x, y, z = (low[:, i, None] + np.arange(n + 1) for i, n in enumerate((nx, ny, nz)))
    return x, y, z


def kabsch_coordinates(experiment: Experiment, panel: NDArray, s1: Array, xyzcal_px: Array, bbox: NDArray) -> NDArray:
    """Kabsch coordinates of all voxel centres of equally sized shoeboxes.

    Args:
        experiment: beam, detector and, for a rotation, goniometer and scan.
        panel: panel number of each reflection, [N].
        s1: predicted wave vectors, [N, 3], 1/A.
        xyzcal_px: predicted position, [N, 3]; only z (images) is used, and not for a still.
        bbox: x0, x1, y0, y1, z0, z1 (end excluded), int [N, 6], all of one size.

    Returns:
        epsilon1, epsilon2, epsilon3 at voxel centres, float32 [N, z, y, x, 3], rad; for a still epsilon3 is left
        out: [N, z, y, x, 2].

    Raises:
        InputError: the boxes differ in size.
    """
    x, y, z = (0.5 * (edges[:, 1:] + edges[:, :-1]) for edges in box_edges(bbox))
    directions = direction_coordinates(experiment, np.asarray(panel), s1, x, y)[:, None]
    shape = (len(x), z.shape[1], y.shape[1], x.shape[1])
    if experiment.is_still:
        return np.broadcast_to(directions, (*shape, 2)).copy()
    result = np.empty((*shape, 3), np.float32)
    result[..., :2] = directions
    rotation = rotation_coordinates(experiment, s1, np.asarray(xyzcal_px, float)[:, 2], z)
    result[..., 2] = rotation[:, :, None, None]
    return result
