"""Which voxels of a shoebox belong to another reflection: those whose nearest lattice point is not its own.

The fractional index of every voxel centre, h = A^-1 R^-1 (s1 - s0), is rounded to the nearest Miller index. A voxel
whose index is another one, and not systematically absent, gets the DIALS bit Overlapped: no list of neighbours is
needed, and spots that nobody predicted are covered as well. The index is taken relative to that of the predicted
position, so that a reflection owns its own centre even where the prediction is off the lattice point (stills).
"""

from __future__ import annotations

from dataclasses import dataclass

import gemmi
import numpy as np
from numpy.typing import NDArray

from xtalfast import _native
from xtalfast.masks import OVERLAPPED
from xtalfast.models import Array, Experiment


@dataclass(frozen=True)
class PanelSpots:
    """Reflections of one experiment on one panel."""

    hkl: NDArray[np.int32]  # [N, 3]
    s1: Array  # [N, 3] 1/A
    xyz_px: Array  # [N, 3] where they are recorded
    xyz_mm: Array  # [N, 3] where they enter the panel
    bbox: NDArray[np.int32]  # [N, 6]


def index_from_lab(experiment: Experiment, z: NDArray) -> Array:
    """Matrices [N, 3, 3] from a scattering vector in the laboratory (1/A) at z [N] (images) to fractional indices."""
    assert experiment.crystal is not None
    if experiment.is_still or experiment.scan is None or experiment.goniometer is None:
        setting = np.broadcast_to(experiment.crystal.A, (len(z), 3, 3))
    else:
        setting = np.array(experiment.crystal.A_at(z, experiment.scan))
        setting = experiment.goniometer.rotation(experiment.scan.phi_from_z(z)) @ setting
    return np.linalg.inv(setting).astype(float)


def extinguishing_operations(group: gemmi.GroupOps) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Rotations [K, 3, 3] and translations [K, 3], in units of 1/24, of the operations that have a translation."""
    operations = [(op.rot, np.array(op.tran) % gemmi.Op.DEN) for op in group if any(op.tran)]
    rotation = np.array([r for r, t in operations if t.any()], np.int32).reshape(-1, 3, 3)
    translation = np.array([t for _, t in operations if t.any()], np.int32).reshape(-1, 3)
    return rotation, translation


def nearest_indices(experiment: Experiment, panel: int, spots: PanelSpots) -> NDArray[np.int32]:
    """Miller index of the lattice point nearest to every voxel of boxes of one size, [N, z, y, x, 3]."""
    model, bbox = experiment.detector[panel], np.asarray(spots.bbox, np.int64)
    n_x, n_y, n_z = (bbox[0, 1::2] - bbox[0, ::2]).tolist() if len(bbox) else (0, 0, 0)
    pixel = np.asarray(model.pixel_size)
    shift = spots.xyz_px[:, :2] - spots.xyz_mm[:, :2] / pixel
    x = (bbox[:, 0:1] + np.arange(n_x) + 0.5 - shift[:, 0:1]) * pixel[0]
    y = (bbox[:, 2:3] + np.arange(n_y) + 0.5 - shift[:, 1:2]) * pixel[1]
    ray = model.origin + x[:, None, :, None] * model.fast + y[:, :, None, None] * model.slow
    q = ray / np.linalg.norm(ray, axis=-1, keepdims=True) / experiment.beam.wavelength - experiment.beam.s0
    first, last = experiment.scan.array_range if experiment.scan is not None else (0, 1)
    z = np.clip(bbox[:, 4:5] + np.arange(n_z), first, last - 1)
    images = index_from_lab(experiment, np.arange(first, last) + 0.5)
    at_centre = index_from_lab(experiment, spots.xyz_px[:, 2])
    centre = np.einsum("nij,nj->ni", at_centre, spots.s1 - experiment.beam.s0) - spots.hkl
    h = np.einsum("nzij,nyxj->nzyxi", images[z - first], q) - centre[:, None, None, None]
    return np.floor(h + 0.5).astype(np.int32)


def mark_overlaps_reference(
    experiment: Experiment, panel: int, spots: PanelSpots, mask: NDArray[np.uint8], offset: NDArray[np.int64]
) -> None:
    """What `mark_overlaps` does, box by box with numpy and gemmi's absences."""
    assert experiment.crystal is not None
    operations = experiment.crystal.operations
    for i in range(len(spots.hkl)):
        one = PanelSpots(**{name: values[i : i + 1] for name, values in vars(spots).items()})
        nearest = nearest_indices(experiment, panel, one).reshape(-1, 3)
        foreign = (nearest != spots.hkl[i]).any(1) & ~operations.systematic_absences(nearest)
        mask[offset[i] : offset[i] + len(nearest)] |= np.where(foreign, OVERLAPPED, 0).astype(np.uint8)


def mark_overlaps(
    experiment: Experiment,
    panel: int,
    spots: PanelSpots,
    mask: NDArray[np.uint8],
    offset: NDArray[np.int64],
    n_threads: int = 1,
) -> None:
    """Set the bit Overlapped, in place, in the voxels that belong to another reflection.

    Args:
        experiment: with a crystal.
        panel: panel number of all these reflections.
        spots: the reflections.
        mask: DIALS mask bits of many boxes, [M], changed in place.
        offset: first voxel of each of the N boxes in `mask`, [N].
        n_threads: of the compiled version.
    """
    if _native.C is None:
        return mark_overlaps_reference(experiment, panel, spots, mask, offset)
    assert experiment.crystal is not None
    model = experiment.detector[panel]
    matrix = index_from_lab(experiment, spots.xyz_px[:, 2])
    centre = np.ascontiguousarray(np.einsum("nij,nj->ni", matrix, spots.s1 - experiment.beam.s0))
    first, last = experiment.scan.array_range if experiment.scan is not None else (0, 1)
    images = np.ascontiguousarray(index_from_lab(experiment, np.arange(first, last) + 0.5))
    vectors = np.ascontiguousarray([model.origin, model.fast * model.pixel_size[0], model.slow * model.pixel_size[1]])
    shift = np.ascontiguousarray(spots.xyz_px[:, :2] - spots.xyz_mm[:, :2] / np.asarray(model.pixel_size))
    rotation, translation = extinguishing_operations(experiment.crystal.operations)
    bbox, hkl = np.ascontiguousarray(spots.bbox, np.int32), np.ascontiguousarray(spots.hkl, np.int32)
    offset, s0 = np.ascontiguousarray(offset, np.int64), np.ascontiguousarray(experiment.beam.s0)
    _native.C.mark_overlaps(
        bbox=bbox.ctypes.data,
        offset=offset.ctypes.data,
        hkl=hkl.ctypes.data,
        centre=centre.ctypes.data,
        shift=shift.ctypes.data,
        n=len(hkl),
        mask=mask.ctypes.data,
        index_from_lab=images.ctypes.data,
        z_begin=first,
        n_z=len(images),
        panel=vectors.ctypes.data,
        s0=s0.ctypes.data,
        wavelength=experiment.beam.wavelength,
        rotation=rotation.ctypes.data,
        translation=translation.ctypes.data,
        n_ops=len(rotation),
        denominator=gemmi.Op.DEN,
        bit=OVERLAPPED,
        n_threads=n_threads,
    )
