"""Shoeboxes with known truth, small and in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from xtalfast.models import Beam, Crystal, Detector, Experiment, Goniometer, Panel, Scan, rotation_matrix


@dataclass
class Spots:
    """What the networks need of a `ShoeboxStore`, and the truth it was drawn from."""

    box: tuple[int, int, int]
    values: np.ndarray  # [N, P]
    bits: np.ndarray  # [N, P]
    metadata: dict[str, np.ndarray]
    intensity: np.ndarray  # [N]
    background: np.ndarray  # [N]
    profile: np.ndarray  # [N, P]

    @property
    def n(self) -> int:
        return len(self.values)

    def by_size(self, rows: np.ndarray | None = None) -> Iterator[RayTraced]:
        """The given rows as the one store of their size of box, as `ShoeboxStore.by_size` does."""
        rows = np.arange(self.n) if rows is None else rows
        view = self.select(rows)
        view.rows = rows  # type: ignore[attr-defined]
        yield view

    def counts(self, rows: np.ndarray) -> np.ndarray:
        return self.values[rows]

    def mask(self, rows: np.ndarray) -> np.ndarray:
        return self.bits[rows]

    def profiles(self, rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self.profile[rows])


def draw_spots(n: int, box: tuple[int, int, int] = (3, 9, 9), *, seed: int = 0, intensity: float = 500.0) -> Spots:
    """Poisson counts of Gaussian spots on a flat background; their centroids and, over the detector, widths vary."""
    rng = np.random.default_rng(seed)
    xyz = rng.uniform([20, 20, 3], [980, 980, 97], (n, 3)).astype(np.float32)
    size = np.array(box[::-1])
    low = np.floor(xyz).astype(np.int32) - size // 2
    bbox = np.stack([low, low + size], 2).reshape(n, 6).astype(np.int32)
    width = np.stack([1.0 + xyz[:, 0] / 1000, np.full(n, 1.2), np.full(n, 0.7)], 1)
    edges = [np.exp(-0.5 * ((low[:, a, None] + np.arange(size[a]) + 0.5 - xyz[:, a, None]) / width[:, a, None]) ** 2)
             for a in range(3)]  # fmt: skip
    profile = np.einsum("nz,ny,nx->nzyx", edges[2], edges[1], edges[0]).reshape(n, int(size.prod()))
    profile /= profile.sum(1, keepdims=True)
    strength = rng.exponential(intensity, n)
    background = rng.gamma(20.0, 0.05, n)
    counts = rng.poisson(strength[:, None] * profile + background[:, None]).astype(np.uint16)
    bits = np.full(counts.shape, 1, np.uint8)
    bits[::10, : box[2]] = 0  # a dead row
    bits[1::10, -box[2] :] |= 32  # a neighbour's
    metadata = {"row": np.arange(n), "xyzcal_px": xyz, "bbox": bbox}
    return Spots(box, counts, bits, metadata, strength, background, profile.astype(np.float32))


@pytest.fixture(scope="session")
def spots():
    """The function that draws them."""
    return draw_spots


@dataclass
class RayTraced:
    """Photons traced one by one through crystal and detector, as a store, with its experiment and its truth."""

    box: tuple[int, int, int]
    values: np.ndarray  # [N, P]
    bits: np.ndarray  # [N, P]
    metadata: dict[str, np.ndarray]
    experiment: Experiment
    intensity: np.ndarray  # [N] photons expected in the whole spot
    background: np.ndarray  # [N] per pixel
    held: np.ndarray  # [N] share of the photons of the spot that fell into the box
    recorded: np.ndarray  # [N] share of the photons that fell on images of box and scan

    def select(self, rows: np.ndarray) -> RayTraced:
        """Some of the spots."""
        metadata = {name: column[rows] for name, column in self.metadata.items()}
        arrays = (self.intensity, self.background, self.held, self.recorded)
        return RayTraced(
            self.box, self.values[rows], self.bits[rows], metadata, self.experiment, *(a[rows] for a in arrays)
        )

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def n_pixels(self) -> int:
        return self.values.shape[1]

    def by_size(self, rows: np.ndarray | None = None) -> Iterator[RayTraced]:
        """The given rows as the one store of their size of box, as `ShoeboxStore.by_size` does."""
        rows = np.arange(self.n) if rows is None else rows
        view = self.select(rows)
        view.rows = rows  # type: ignore[attr-defined]
        yield view

    def counts(self, rows: np.ndarray) -> np.ndarray:
        return self.values[rows]

    def mask(self, rows: np.ndarray) -> np.ndarray:
        return self.bits[rows]


def trace_spots(
    n: int,
    *,
    intensity: float | np.ndarray = 2000.0,
    background: float = 0.5,
    box: tuple[int, int, int] = (3, 15, 15),
    mosaicity: float = np.radians(0.15),
    lattice: float = 3e-4,
    psf: tuple[float, float, float] = (0.8, 0.15, 0.5),
    split: float = 0.0,
    still: bool = False,
    edge: bool = False,
    seed: int = 0,
) -> RayTraced:
    """Spots of a mosaic crystal, one ray a photon, no profile formula involved.

    Each photon comes from a mosaic block: its reciprocal-lattice point is tilted by `mosaicity` (rad) about the two
    axes across q, widened by `lattice` (1/A), turned until it lies on the Ewald sphere, and its ray hits the detector,
    where it is displaced by the point spread `psf` (xx, xy, yy, px^2). `split` (px) moves half of the photons away
    along x, so that the spot is no Gaussian. `edge` puts spots at the ends of the scan too.
    """
    rng = np.random.default_rng(seed)
    panel = Panel(
        np.array([-34.4, 34.4, -100.0]), np.array([1.0, 0, 0]), np.array([0, -1.0, 0]), (0.172, 0.172), (400, 400)
    )
    experiment = Experiment(
        beam=Beam(np.array([0.0, 0.0, 1.0]), 1.0),
        detector=Detector([panel]),
        goniometer=None if still else Goniometer(np.array([1.0, 0.0, 0.0])),
        scan=None if still else Scan((1, 60), (0.0, 0.5)),
        crystal=Crystal(np.diag([1 / 40, 1 / 50, 1 / 60]), "P 2ac 2ab"),
    )
    axis, s0 = np.array([1.0, 0, 0]), experiment.beam.s0
    xyz = rng.uniform([20, 20, 0.2 if edge else 3], [380, 380, 59.8 if edge else 57], (8 * n, 3))
    s1 = experiment.detector.s1_from_px(np.zeros(len(xyz), int), xyz[:, :2], 1.0)
    e1 = np.cross(s1, s0)
    zeta = e1 @ axis / np.linalg.norm(e1, axis=1)
    good = np.flatnonzero((np.abs(zeta) > 0.2) & (np.linalg.norm(s1 - s0, axis=1) > 0.04))[:n]
    xyz, s1, zeta = xyz[good].astype(np.float32), s1[good], zeta[good]
    if still:
        xyz[:, 2] = 0.5
    q = s1 - s0
    mean = np.broadcast_to(np.asarray(intensity, float), n)
    row = np.repeat(np.arange(n), rng.poisson(mean))
    first = np.cross(q, s0)
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    second = np.cross(q, first)
    second /= np.linalg.norm(second, axis=1, keepdims=True)
    tilt = mosaicity * rng.standard_normal((len(row), 2)) * np.linalg.norm(q, axis=1)[row, None]
    point = q[row] + tilt[:, :1] * first[row] + tilt[:, 1:] * second[row]
    point *= (np.linalg.norm(q, axis=1)[row] / np.linalg.norm(point, axis=1))[:, None]
    point += lattice * rng.standard_normal(point.shape)
    angle = np.zeros(len(row))
    if still:  # the nearest point of the Ewald sphere
        ray = s0 + point
        ray /= np.linalg.norm(ray, axis=1, keepdims=True)
    else:
        for _ in range(6):  # Newton: |s0 + R(angle) point| = |s0|
            turned = np.einsum("nij,nj->ni", rotation_matrix(axis, angle), point)
            miss = 2 * turned @ s0 + (point**2).sum(axis=1)
            angle = np.clip(angle - miss / (2 * np.cross(axis, turned) @ s0), -0.2, 0.2)
        ray = s0 + np.einsum("nij,nj->ni", rotation_matrix(axis, angle), point)
    xy_mm, _ = panel.intersect(ray)
    factor = np.linalg.cholesky([[psf[0], psf[1]], [psf[1], psf[2]]])
    xy = panel.px_from_mm(xy_mm) + rng.standard_normal((len(row), 2)) @ factor.T
    xy[:, 0] += split * (rng.random(len(row)) < 0.5) - split / 2
    z = xyz[row, 2] + np.degrees(angle) / 0.5
    size = np.array(box[::-1])
    low = np.floor(xyz).astype(np.int32) - size // 2
    bbox = np.stack([low, low + size], axis=2).reshape(n, 6).astype(np.int32)
    voxel = np.floor(np.column_stack([xy, z])).astype(np.int64) - low[row]
    inside = ((voxel >= 0) & (voxel < size)).all(axis=1)
    exists = np.ones((n, box[0]), bool)
    if not still:
        image = low[:, 2:] + np.arange(box[0])
        exists = (image >= 0) & (image < 60)
    flat = (voxel[:, 2] * box[1] + voxel[:, 1]) * box[2] + voxel[:, 0]
    values = rng.poisson(background, (n, int(np.prod(box))))
    np.add.at(values, (row[inside], flat[inside]), 1)
    valid = np.repeat(exists, box[1] * box[2], axis=1)
    in_image = (voxel[:, 2] >= 0) & (voxel[:, 2] < box[0])
    in_image[in_image] = exists[row[in_image], voxel[in_image, 2]]
    photons = np.maximum(np.bincount(row, minlength=n), 1)
    metadata = {
        "row": np.arange(n),
        "bbox": bbox,
        "xyzcal_px": xyz,
        "panel": np.zeros(n, np.int64),
        "id": np.zeros(n, np.int64),
        "s1": s1.astype(np.float32),
        "d": (1 / np.linalg.norm(q, axis=1)).astype(np.float32),
        "hkl": rng.integers(1, 20, (n, 3)).astype(np.int32),
        "zeta": zeta.astype(np.float32),
        "lp": np.ones(n, np.float32),
        "flags": np.ones(n, np.uint32),
    }
    return RayTraced(
        box,
        np.where(valid, values, 0).astype(np.uint16),
        valid.astype(np.uint8),
        metadata,
        experiment,
        mean.copy(),
        np.full(n, background),
        np.bincount(row[inside], minlength=n) / photons,
        np.bincount(row[in_image], minlength=n) / photons,
    )


@pytest.fixture(scope="session")
def traced():
    """The function that traces them."""
    return trace_spots
