"""The forward model of a spot: the share of it that each voxel of its box holds, for many boxes of one size.

A spot is whitened image by image: in units of the standard deviations of its Gaussian within that image, about the
centre that it has there. A pixel is the mean of SUB_PIXELS^2 nodes, an image the exact integral along the rotation.
The functions here define what is computed, in plain torch; where the extension is installed it computes the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtalfast import _native
from xtalfast.integration.kabsch import experiment_frame
from xtalfast.models import Array, Experiment

SUB_PIXELS = 3  # nodes per pixel edge: exact to 1e-3 of the profile for widths above half a pixel
GRID_EXTENT = 4.5  # half width of the grid of a density, in standard deviations


@dataclass(frozen=True)
class SpotPixels:
    """Where the pixels of N boxes of one size look, seen from the predicted directions of their reflections."""

    box: tuple[int, int, int]  # z, y, x
    bbox: NDArray[np.int32]  # [N, 6]
    shift: Array  # [N, 2] px, from where a ray enters the panel to where it is recorded
    panels: Array  # [K, 9] origin, fast * pixel size, slow * pixel size; mm
    panel: NDArray[np.int32]  # [N] row of `panels`
    axes: Array  # [N, 6] Kabsch's e1 and e2

    @classmethod
    def of_rows(
        cls,
        experiments: Sequence[Experiment],
        ids: NDArray,
        panel: NDArray,
        bbox: NDArray,
        xyz_px: Array,
        box: tuple[int, int, int],
    ) -> tuple[SpotPixels, Array]:
        """The pixels of some boxes, and the wave vectors [N, 3] (1/A) of their predicted positions.

        Args:
            experiments: one per id.
            ids: experiment of each reflection, [N].
            panel: its panel, [N].
            bbox: its box, [N, 6].
            xyz_px: its predicted position, [N, 3] (px, px, images).
            box: z, y, x size of all boxes.
        """
        n = len(ids)
        shift, axes, s1 = np.zeros((n, 2)), np.zeros((n, 6)), np.zeros((n, 3))
        which = np.zeros(n, np.int32)
        vectors: list[Array] = []
        for number in np.unique(ids):
            experiment = experiments[int(number)]
            for p in np.unique(panel[ids == number]):
                at = np.flatnonzero((ids == number) & (panel == p))
                model = experiment.detector[int(p)]
                pixel = np.asarray(model.pixel_size)
                entered = model.mm_from_px(xyz_px[at, :2])
                shift[at] = xyz_px[at, :2] - entered / pixel
                # The wave vector of the predicted position, in double precision: a stored float32 s1 errs by 1e-4 px.
                ray = model.lab_from_mm(entered)
                s1[at] = ray / np.linalg.norm(ray, axis=1, keepdims=True) / experiment.beam.wavelength
                which[at] = len(vectors)
                vectors.append(np.concatenate([model.origin, model.fast * pixel[0], model.slow * pixel[1]]))
            at = np.flatnonzero(ids == number)
            frame = experiment_frame(experiment, s1[at])
            axes[at, :3], axes[at, 3:] = frame.e1, frame.e2
        panels = np.array(vectors, float).reshape(-1, 9)
        return cls(box, np.ascontiguousarray(bbox, np.int32), shift, panels, which, axes), s1

    def __len__(self) -> int:
        return len(self.bbox)

    def select(self, rows: Any) -> SpotPixels:
        """The pixels of some of the boxes."""
        return SpotPixels(
            self.box,
            self.bbox[rows],
            self.shift[rows],
            self.panels,
            self.panel[rows],
            np.ascontiguousarray(self.axes[rows]),
        )

    def window(self, y: slice, x: slice) -> SpotPixels:
        """The same boxes cut to some rows and columns of pixels."""
        bbox = self.bbox.copy()
        bbox[:, 1], bbox[:, 0] = bbox[:, 0] + x.stop, bbox[:, 0] + x.start
        bbox[:, 3], bbox[:, 2] = bbox[:, 2] + y.stop, bbox[:, 2] + y.start
        return replace(self, box=(self.box[0], y.stop - y.start, x.stop - x.start), bbox=bbox)

    def directions_at(self, x: Array, y: Array) -> NDArray[np.float32]:
        """epsilon1 and epsilon2 at positions x [N, nx], y [N, ny] (px), [N, ny, nx, 2] rad."""
        panel = self.panels[self.panel]
        u, v = x - self.shift[:, :1], y - self.shift[:, 1:]
        ray = panel[:, None, None, :3] + u[:, None, :, None] * panel[:, None, None, 3:6]
        ray = ray + v[:, :, None, None] * panel[:, None, None, 6:]
        axes = self.axes.reshape(-1, 2, 3)
        length = np.sqrt(np.einsum("nyxi,nyxi->nyx", ray, ray))
        return (np.einsum("nyxi,nki->nyxk", ray, axes) / length[..., None]).astype(np.float32)

    def directions(self) -> Tensor:
        """epsilon1 and epsilon2 at the pixel centres, float32 [N, y, x, 2], rad."""
        _, n_y, n_x = self.box
        if _native.C is None:
            low = self.bbox[:, (0, 2)].astype(float) + 0.5
            x, y = low[:, :1] + np.arange(n_x), low[:, 1:] + np.arange(n_y)
            return torch.from_numpy(self.directions_at(x, y))
        epsilon = torch.empty(len(self), n_y, n_x, 2)
        _native.C.spot_directions(self._arguments(), epsilon.data_ptr(), torch.get_num_threads())
        return epsilon

    def foreground(self, sigma: float, rotation: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Voxels with (epsilon1^2 + epsilon2^2) / sigma^2 + rotation <= 1 at their nearest corner, [N, z, y, x].

        Args:
            sigma: rad.
            rotation: what the rotation adds in each image, [N, z].
        """
        n_z, n_y, n_x = self.box
        rotation = np.ascontiguousarray(rotation, np.float32)
        if _native.C is None:
            low = self.bbox[:, (0, 2)].astype(float)
            corners = self.directions_at(low[:, :1] + np.arange(n_x + 1), low[:, 1:] + np.arange(n_y + 1))
            square = np.square(corners).sum(axis=-1)
            square = np.minimum(square[:, 1:], square[:, :-1])
            near = np.minimum(square[:, :, 1:], square[:, :, :-1])
            return near[:, None] / sigma**2 + rotation[:, :, None, None] <= 1
        inside = np.empty((len(self), n_z, n_y, n_x), np.bool_)
        threads = torch.get_num_threads()
        _native.C.spot_foreground(self._arguments(), sigma**-2, rotation.ctypes.data, inside.ctypes.data, threads)
        return inside

    def _arguments(self) -> dict[str, int]:
        n_z, n_y, n_x = self.box
        return {
            "n": len(self),
            "n_z": n_z,
            "n_y": n_y,
            "n_x": n_x,
            "bbox": self.bbox.ctypes.data,
            "shift": self.shift.ctypes.data,
            "panels": self.panels.ctypes.data,
            "panel": self.panel.ctypes.data,
            "axes": self.axes.ctypes.data,
        }


def sub_pixel_offsets() -> Tensor:
    """Sub-pixel nodes relative to the pixel centre, [K, 2] (x, y), px."""
    line = (torch.arange(SUB_PIXELS) + 0.5) / SUB_PIXELS - 0.5
    return torch.cartesian_prod(line, line)


class Whitened(NamedTuple):
    """Spots in units of their own Gaussian, image by image; float32."""

    pixels: SpotPixels
    inverse: Tensor  # [N, z, 3] lower triangle 00, 10, 11 of the inverse Cholesky factor, 1/rad
    centre: Tensor  # [N, z, 2]
    steps: Tensor  # [N, z, K, 2] from the pixel centre to the sub-pixel nodes
    area: Tensor  # [N, z] of a pixel
    images: Tensor  # [N, z] share of the Gaussian spot in each image
    rotation: Tensor  # [N, z + 1] epsilon3 at image boundaries in standard deviations; [N, 0] for stills

    def select(self, rows: Any) -> Whitened:
        """Some of the spots."""
        return Whitened(self.pixels.select(rows), *(field[rows] for field in self[1:]))

    def coordinates(self) -> Tensor:
        """Of the pixel centres, [N, z, y, x, 2]."""
        epsilon = self.pixels.directions()[:, None]
        low, cross, high = (self.inverse[:, :, None, None, k] for k in range(3))
        u = torch.stack([low * epsilon[..., 0], cross * epsilon[..., 0] + high * epsilon[..., 1]], dim=-1)
        return u - self.centre[:, :, None, None]

    def arguments(self, scale: Tensor) -> dict[str, int]:
        return {
            "inverse": self.inverse.data_ptr(),
            "centre": self.centre.data_ptr(),
            "steps": self.steps.data_ptr(),
            "n_sub": self.steps.shape[2],
            "scale": scale.data_ptr(),
        }


def gaussian_voxels(at: Whitened) -> Tensor:
    """Share of the Gaussian spot in each voxel, float32 [N, z, y, x]."""
    scale = (at.images * at.area / at.steps.shape[2]).contiguous()
    if _native.C is None:
        return gaussian_voxels_reference(at)
    share = torch.empty(len(at.pixels), *at.pixels.box)
    _native.C.gaussian_voxels(at.pixels._arguments(), at.arguments(scale), share.data_ptr(), torch.get_num_threads())
    return share


def gaussian_voxels_reference(at: Whitened) -> Tensor:
    """What `gaussian_voxels` computes, in plain torch."""
    u = at.coordinates()
    total = torch.zeros_like(u[..., 0])
    for k in range(at.steps.shape[2]):
        total = total + torch.exp(-0.5 * ((u + at.steps[:, :, k, None, None]) ** 2).sum(dim=-1))
    return total * (at.images * at.area / (2 * torch.pi * at.steps.shape[2]))[:, :, None, None]


def tent_images(at: Whitened, n_nodes: int) -> Tensor:
    """Share of each tent function of the epsilon3 grid in each image, [N, z, nodes]."""
    if at.rotation.shape[1] == 0:
        return torch.ones(len(at.pixels), 1, 1)
    spacing = 2 * GRID_EXTENT / (n_nodes - 1)
    node = torch.linspace(-GRID_EXTENT, GRID_EXTENT, n_nodes)
    t = ((at.rotation[..., None] - node) / spacing).clamp(-1, 1)
    integral = 0.5 + t - 0.5 * t * t.abs()  # of a tent of unit area from -1 to t
    return integral.diff(dim=1).abs()


class DensityModel:
    """Densities on a grid of tent functions, mixed for each spot, as shares of voxels.

    Args:
        at: the spots.
        cell: share of each density in each spot, [N, cells].
        size: nodes of the grid, (epsilon3, epsilon2, epsilon1).
    """

    def __init__(self, at: Whitened, cell: Tensor, size: tuple[int, int, int]) -> None:
        self.at, self.cell, self.size = at, cell.contiguous(), size
        self.images = tent_images(at, size[0]).contiguous()
        spacing = 2 * GRID_EXTENT / (size[2] - 1)
        self.scale = (at.area / (spacing**2 * at.steps.shape[2])).contiguous()

    def voxels(self, density: Tensor) -> Tensor:
        """Share of density [cells, epsilon3, epsilon2, epsilon1] in each voxel, float32 [N, z, y, x]."""
        if _native.C is None:
            return self.voxels_reference(density)
        density = density.contiguous()
        share = torch.empty(len(self.at.pixels), *self.at.pixels.box)
        _native.C.density_voxels(
            self.at.pixels._arguments(),
            self.at.arguments(self.scale),
            self._arguments(density),
            share.data_ptr(),
            torch.get_num_threads(),
        )
        return share

    def voxels_reference(self, density: Tensor) -> Tensor:
        """What `voxels` computes, in plain torch."""
        own = torch.einsum("nc,ckyx->nkyx", self.cell, density)
        plane = torch.einsum("nzk,nkyx->nzyx", self.images, own).flatten(0, 1)[:, None]
        u, step = self.at.coordinates().flatten(0, 1), self.at.steps.flatten(0, 1)
        total = torch.zeros_like(u[..., 0])
        for k in range(step.shape[1]):
            nodes = (u + step[:, k, None, None]) / GRID_EXTENT
            sampled = torch.nn.functional.grid_sample(plane, nodes, padding_mode="zeros", align_corners=True)
            total = total + sampled[:, 0]
        return (total * self.scale.flatten()[:, None, None]).reshape(-1, *self.at.pixels.box)

    def transpose(self, factors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """sum over voxels of factor x d share / d density, for two factors [N, z, y, x] at once, float64 each."""
        shape = (self.cell.shape[1], *self.size)
        if _native.C is None:
            density = torch.zeros(shape, requires_grad=True)
            share = self.voxels_reference(density)
            first, second = (
                torch.autograd.grad((factor * share).sum(), density, retain_graph=True)[0].double()
                for factor in factors
            )
            return first, second
        density = torch.zeros(shape)
        factors = (factors[0].contiguous(), factors[1].contiguous())
        first, second = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
        _native.C.density_voxels_backward(
            self.at.pixels._arguments(),
            self.at.arguments(self.scale),
            self._arguments(density),
            *(tensor.data_ptr() for tensor in (*factors, first, second)),
            torch.get_num_threads(),
        )
        return first, second

    def _arguments(self, density: Tensor) -> dict[str, Any]:
        return {
            "density": density.data_ptr(),
            "cell": self.cell.data_ptr(),
            "images": self.images.data_ptr(),
            "cells": self.cell.shape[1],
            "n_k": self.size[0],
            "nodes": self.size[2],
            "extent": GRID_EXTENT,
        }
