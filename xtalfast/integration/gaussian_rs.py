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
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtalfast.errors import InputError
from xtalfast.integration.spot_shape import (
    MIN_STRONG,
    SPOT_PHOTONS,
    Geometry,
    SpotShape,
    SpotWidths,
    fit_shape,
    fit_widths,
    images_in_scan,
    isotropic_shape,
    rotation_edges,
    spot_data,
    spot_geometry,
    whiten,
)
from xtalfast.integration.spot_voxels import GRID_EXTENT, DensityModel, Whitened, gaussian_voxels
from xtalfast.integration.strong_spots import MAX_STRONG, PaddedBoxes, StrongSpots, select_brightest, select_strong
from xtalfast.io.files import replacing
from xtalfast.models import Array, Experiment

logger = logging.getLogger("xtalfast")
Progress = Callable[[str, int, int], None]

GRID = 13  # tent functions along epsilon1 and epsilon2
GRID_ROTATION = 11  # and along epsilon3
PRIOR_PHOTONS = 2000.0  # weight of the Gaussian against the photons of the spots of a cell
EM_STEPS = 16
STRIDE = 1.8  # below 2


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
            store: ShoeboxStore.
            experiments: one per `id` of the store.
            widths: sigma_b and sigma_m; None takes them from strong spots, or where these are too few from the
                profile block, or without one from the brightest boxes as they are.
            learn: False stops at the Gaussian.
            phi_block_deg: rotation per block of reference profiles, deg.
            n_max: strong spots used at most.
            progress: called as progress("profiles", done, total).

        Raises:
            InputError: too few strong spots and no profile block to fall back on.
        """
        tell = progress or (lambda stage, done, total: None)
        tell("profiles", 0, EM_STEPS + 2)
        strong, whole = select_strong(store, experiments, n_max=n_max), store
        given = SpotWidths.from_profile(experiments[0].profile) if experiments else None
        enough = len(strong.rows) >= MIN_STRONG
        if not enough and widths is None and given is None:
            bright = select_brightest(store, n_max=n_max)
            store, bright = _boxes_of(store, bright)
            widths = fit_widths(store, experiments, bright)
            logger.warning(
                "only %d strong spots with background around them: the spot widths are rough, from the photons of "
                "the brightest boxes",
                len(strong.rows),
            )
        else:
            store, strong = _boxes_of(store, strong)
        if widths is None:
            widths = given
            if enough:
                widths = fit_widths(store, experiments, strong, given.n_sigma if given else 3.0)
        assert widths is not None
        sample = np.arange(min(store.n, MAX_STRONG)) if store is not whole or not enough else strong.rows
        shape = isotropic_shape(spot_geometry(store, experiments, sample), widths)
        tell("profiles", 1, EM_STEPS + 2)
        if enough:
            step = max(len(strong.rows) // 500, 1)
            few = StrongSpots(strong.rows[::step], strong.background[::step], strong.intensity[::step])
            shape = fit_shape(store, experiments, few, shape)
        tell("profiles", 2, EM_STEPS + 2)
        cells = _make_cells(whole, experiments, len(strong.rows), phi_block_deg)
        result = cls(store, experiments, widths, shape, cells, n_strong=len(strong.rows))
        if learn and enough:
            result._learn(strong, lambda done: tell("profiles", 2 + done, EM_STEPS + 2))
        result.store = whole
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

    def on(self, store: Any) -> ReferenceProfiles:
        """The same profiles for the reflections of another store."""
        return type(self)(
            store,
            self.experiments,
            self.widths,
            self.shape,
            self.cells,
            self.density,
            self.history,
            self.n_strong,
        )

    def _whitened(self, geometry: Geometry) -> Whitened:
        xx, xy, yy = self.shape.psf
        psf = torch.tensor([[xx, xy], [xy, yy]], dtype=torch.float32)
        return whiten(geometry, psf, torch.tensor(self.shape.mosaicity), torch.tensor(self.shape.lattice))

    def _learn(self, strong: StrongSpots, tell: Callable[[int], None]) -> None:
        """Densities by expectation maximisation, kept only as far as they predict spots that they have not seen."""
        data = spot_data(self.store, self.experiments, strong, half=self._half_width(strong))
        held_out = np.arange(len(strong.rows)) % 5 == 4
        weight = (SPOT_PHOTONS / data.intensity).clamp(max=1.0)
        cell = self.cells.weights(CellGrid.coordinates(self.store, self.experiments, strong.rows))
        train, test = data.select(~held_out), data.select(held_out)
        gaussian = _gaussian_density(GRID_ROTATION if data.geometry.rotation.shape[1] else 1)
        size = (gaussian.shape[0], gaussian.shape[1], gaussian.shape[2])
        at_test = self._whitened(test.geometry)
        model = DensityModel(self._whitened(train.geometry), cell[~held_out], size)
        unseen = DensityModel(at_test, cell[held_out], size)
        best = float(test.log_likelihood(gaussian_voxels(at_test), weight[held_out]))
        history = [best]
        density = gaussian.expand(self.cells.n, -1, -1, -1).clone()
        photons = train.used * weight[~held_out, None, None, None]
        for done in range(EM_STEPS):
            rate, intensity = train.rate(model.voxels(density))
            expected = photons * intensity[:, None, None, None]
            gain, cost = model.transpose((expected * train.counts / rate, expected))
            step = ((density * gain + PRIOR_PHOTONS * gaussian) / (cost + PRIOR_PHOTONS)).float()
            # Steps of the logarithm nearly twice as long converge to the same density in half the number.
            density = density * (step / density) ** STRIDE
            density /= density.sum(dim=(1, 2, 3), keepdim=True)
            score = float(test.log_likelihood(unseen.voxels(density), weight[held_out]))
            history.append(score)
            tell(done + 1)
            if score > best:
                best, self.density = score, density.clone()
            elif score < max(history[-4:-1]) - 1e-6 and done > 4:
                break
        self.history = history

    def _half_width(self, strong: StrongSpots) -> int:
        """Pixels that hold the whole grid of most spots."""
        at = self._whitened(spot_geometry(self.store, self.experiments, strong.rows))
        return int(np.ceil(GRID_EXTENT / float(at.area.sqrt().quantile(0.05))))

    def _evaluate(self, rows: NDArray[np.int64]) -> Tensor:
        """Share of the whole spot in each voxel, [N, z, y, x]."""
        at = self._whitened(spot_geometry(self.store, self.experiments, rows))
        if self.density is None:
            return gaussian_voxels(at)
        cell = self.cells.weights(CellGrid.coordinates(self.store, self.experiments, rows))
        size = (self.density.shape[1], self.density.shape[2], self.density.shape[3])
        return DensityModel(at, cell, size).voxels(self.density)

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


def _boxes_of(store: Any, strong: StrongSpots) -> tuple[Any, StrongSpots]:
    """The store itself, or when its boxes have several sizes the strong ones in boxes of one."""
    if store.box is not None or not len(strong.rows):
        return store, strong
    return PaddedBoxes(store, strong.rows), strong._replace(rows=np.arange(len(strong.rows)))


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
