"""Simulated rotation data with known truth: images, models, predictions and what every reflection really was.

The intensities that go in obey the corrections that come out again: a reflection deposits photons ~ F^2 / lp (lp being
the Lorentz and polarization factor that dials.scale multiplies with) times a smooth scale factor of its place in the
scan, so that scaled and merged intensities are proportional to F^2. The expected photons of every voxel are computed,
then drawn from the Poisson distribution with a seed per image: the same configuration gives the same bytes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gemmi
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from xtalfast.errors import InputError
from xtalfast.integration.columns import lorentz_polarization, zeta_factor
from xtalfast.integration.predict import Predictions, predict, rotation_models
from xtalfast.integration.simulate_background import add_zingers, expected_background
from xtalfast.integration.simulate_config import SimulationConfig
from xtalfast.integration.simulate_crystal import TrueIntensities, structure_intensities, wilson_intensities
from xtalfast.integration.simulate_models import lattices, true_models
from xtalfast.integration.simulate_spots import REACH, profile_block, spot_covariances, voxel_shares
from xtalfast.io import MiniCbfHeader, write_cbf, write_expt, write_refl
from xtalfast.io.files import replacing
from xtalfast.models import Array, Experiment

__all__ = ["Simulation", "SimulationConfig", "SimulationResult", "simulate"]

logger = logging.getLogger("xtalfast")
Progress = Callable[[str, int, int], None]

# Spots closer to the rotation axis smear over many images; like DIALS' profile model we leave them out.
_MIN_ZETA = 0.05
_NEIGHBOURS_DEG = 10.0  # the tails of spots centred this far outside the scan may reach into it
_OVERLAP = 0.01  # a spot is called overlapped when it shares more than this part of its profile with others
_BLOCK_PIXELS = 4_000_000  # voxels simulated together: fixed, so that sums always run in the same order


@dataclass(frozen=True)
class SimulationResult:
    """Where everything was written."""

    directory: Path
    images: list[Path]
    expt: Path  # models.expt, the true models
    refl: Path  # predicted.refl
    truth: Path  # truth.npz, row by row with predicted.refl


@dataclass(frozen=True)
class _Spots:
    """Every spot that reaches an image: first those of `predicted.refl`, then those beyond the scan, then lattice 2."""

    predictions: Predictions
    covariance: Array  # [N, 3, 3]
    photons: Array  # [N] when fully recorded
    n_predicted: int


class Simulation:
    """A simulated experiment in memory; `simulate` writes it to files.

    Attributes:
        experiment: the true models, with the profile block of the true spot widths.
        predictions: the N spots of `predicted.refl`.
        valid: pixels that record, bool [slow, fast].
        background: mean photons per pixel and image, [slow, fast], before the scan's scale factor.
    """

    def __init__(self, config: SimulationConfig) -> None:
        self.config = config
        self.intensities = _true_intensities(config)
        self.experiment = true_models(config, self.intensities)
        goniometer, self._scan = rotation_models(self.experiment)
        self._axis = goniometer.lab_axis
        panel = self.experiment.detector[0]
        self.valid = panel.valid_pixels()
        self.background = expected_background(self.experiment.beam, panel, config)
        self._spots = self._make_spots()
        self.predictions = self._spots.predictions.select(np.arange(self._spots.n_predicted))
        if len(self.predictions) == 0:
            raise InputError(
                f"the simulation has no reflection on the detector: d_min {config.d_min} A, distance"
                f" {config.distance_mm} mm, {config.n_images} images; change one of them"
            )
        self.experiment.profile = profile_block(
            self.experiment, self.predictions, self._spots.covariance[: len(self.predictions)]
        )
        n_all = len(self._spots.photons)
        self._recorded, self._shared = np.zeros(n_all), np.zeros(n_all)
        self._tallied: set[int] = set()

    def scale(self, z: ArrayLike) -> Array:
        """Relative strength of beam and crystal at image coordinate z: two thirds of a wave over the scan."""
        return 1 + self.config.scale_amplitude * np.sin(2 * np.pi * np.asarray(z) / (1.5 * self.config.n_images))

    def _make_spots(self) -> _Spots:
        config, parts, photons = self.config, [], []
        for fraction, experiment in lattices(self.experiment, config):
            spots = self._reaching_spots(experiment)
            intensity, _ = self.intensities.of(spots.hkl)
            lp = lorentz_polarization(experiment.beam, spots.s1, self._axis)
            parts.append(spots)
            photons.append(fraction * intensity / lp * self.scale(spots.xyz_px[:, 2]))
        first, last = self._scan.array_range
        z = parts[0].xyz_px[:, 2]
        in_scan = (z >= first) & (z < last)
        order = np.concatenate([np.flatnonzero(in_scan), np.flatnonzero(~in_scan)])
        parts[0], photons[0] = parts[0].select(order), photons[0][order]
        n_predicted = int(in_scan.sum())
        mean = photons[0][:n_predicted].mean() if n_predicted else 1.0
        spots = Predictions.concatenate(parts)
        covariance = spot_covariances(self.experiment, spots, config)
        return _Spots(spots, covariance, np.concatenate(photons) * (config.photons_mean / (mean or 1.0)), n_predicted)

    def _reaching_spots(self, experiment: Experiment) -> Predictions:
        """Spots of one lattice whose tails may reach the scan, without those too close to the rotation axis."""
        spots = predict(experiment, self.config.d_min, padding=_NEIGHBOURS_DEG / self.config.oscillation_deg)
        zeta = zeta_factor(experiment.beam.s0, spots.s1, self._axis)
        spots = spots.select(np.abs(zeta) >= _MIN_ZETA)
        reach = REACH * np.sqrt(spot_covariances(experiment, spots, self.config)[:, 2, 2])
        first, last = self._scan.array_range
        z = spots.xyz_px[:, 2]
        return spots.select((z + reach > first) & (z - reach < last))

    @property
    def images_per_block(self) -> int:
        """Images computed together."""
        return max(1, _BLOCK_PIXELS // self.valid.size)

    def expected_blocks(self) -> Iterator[tuple[int, Array, Array]]:
        """Noise-free images, a few at a time: z of the first, photons of the spots and of the background [Z, Y, X]."""
        for start in range(0, self.config.n_images, self.images_per_block):
            yield start, *self._expected(start)

    def _expected(self, start: int) -> tuple[Array, Array]:
        stop = min(start + self.images_per_block, self._scan.array_range[1])
        stack = (stop - start, *self.valid.shape)
        shares = voxel_shares(self._spots.predictions.xyz_px, self._spots.covariance, stack, start)
        n_voxels = int(np.prod(stack))
        spots = np.bincount(shares.voxel, shares.share * self._spots.photons[shares.row], n_voxels)
        if start not in self._tallied:  # truth that only the voxels know
            self._tallied.add(start)
            everyone = np.bincount(shares.voxel, shares.share, n_voxels)
            n = len(self._recorded)
            valid = np.broadcast_to(self.valid, stack).reshape(-1)[shares.voxel]
            self._recorded += np.bincount(shares.row, shares.share * valid, n)
            others = everyone[shares.voxel] - shares.share
            self._shared += np.bincount(shares.row, np.minimum(shares.share, others), n)
        scale = self.scale(np.arange(start, stop) + 0.5)[:, None, None]
        return spots.reshape(stack), np.broadcast_to(self.background, stack) * scale

    def draw(self, expected: Array, image: int) -> NDArray[np.int32]:
        """One noisy image [slow, fast] as the detector writes it, from its expected photons.

        Args:
            expected: photons per pixel, [slow, fast].
            image: 0-based number in the scan; with the seed it fixes the draw.
        """
        rng = np.random.default_rng([self.config.seed, 1, image])
        counts = rng.poisson(expected)
        add_zingers(counts, self.config.zingers_per_image, rng)
        counts = np.minimum(counts, self.config.trusted_max)
        return np.where(self.valid, counts, -1).astype(np.int32)

    def images(self) -> Iterator[NDArray[np.int32]]:
        """The images of the scan in order."""
        first = self._scan.array_range[0]
        for start, spots, background in self.expected_blocks():
            expected = spots + background
            for k in range(len(expected)):
                yield self.draw(expected[k], start - first + k)

    def truth(self) -> dict[str, Any]:
        """What each row of `predicted.refl` really is.

        Returns:
            hkl int32 [N, 3]; plus: I(+) rather than I(-); intensity: F^2, what merged data should be proportional to;
            photons: expected on the fully recorded reflection = k intensity scale / lp; lp; scale; d (A);
            xyz_px [N, 3]; covariance [N, 3, 3] (x px, y px, image); background: photons per pixel at the centre;
            fraction_recorded: of the photons, within the scan and on live pixels; shared: part of the profile that
            other spots overlay; overlapped: shared > 0.01.
        """
        for start in range(0, self.config.n_images, self.images_per_block):
            if start not in self._tallied:
                self._expected(start)
        spots, n = self.predictions, len(self.predictions)
        intensity, plus = self.intensities.of(spots.hkl)
        column, row = np.floor(spots.xyz_px[:, :2]).astype(np.int64).T
        scale = self.scale(spots.xyz_px[:, 2])
        return {
            "hkl": spots.hkl,
            "plus": plus,
            "intensity": intensity,
            "photons": self._spots.photons[:n],
            "lp": lorentz_polarization(self.experiment.beam, spots.s1, self._axis),
            "scale": scale,
            "d": spots.d,
            "xyz_px": spots.xyz_px,
            "covariance": self._spots.covariance[:n],
            "background": self.background[row, column] * scale,
            "fraction_recorded": self._recorded[:n],
            "shared": self._shared[:n],
            "overlapped": self._shared[:n] > _OVERLAP,
        }

    def partiality(self) -> Array:
        """Part of each predicted spot [N] that the scan covers, gaps and panel edges aside."""
        z = self.predictions.xyz_px[:, 2]
        width = np.sqrt(self._spots.covariance[: len(z), 2, 2])
        ends = (np.array(self._scan.array_range)[:, None] - z) / width
        passed = torch.special.ndtr(torch.from_numpy(ends)).numpy()
        return passed[1] - passed[0]


def _true_intensities(config: SimulationConfig) -> TrueIntensities:
    rng = np.random.default_rng([config.seed, 2])
    if config.structure is not None:
        truth = structure_intensities(config.structure, config.d_min, config.anomalous_ratio, rng)
    else:
        cell, group = gemmi.UnitCell(*config.cell), gemmi.SpaceGroup(config.space_group)
        truth = wilson_intensities(cell, group, config.d_min, config.wilson_b_a2, config.anomalous_ratio, rng)
    return truth.with_zeros(config.zero_fraction, rng)


def _header(config: SimulationConfig, experiment: Experiment, image: int) -> MiniCbfHeader:
    """The header from which DIALS finds the true beam, detector and scan."""
    panel = experiment.detector[0]
    return MiniCbfHeader(
        pixel_size=panel.pixel_size,
        wavelength=config.wavelength_a,
        distance=config.distance_mm,
        beam_xy=(-panel.origin[0] / panel.pixel_size[0], panel.origin[1] / panel.pixel_size[1]),
        start_angle=config.start_deg + image * config.oscillation_deg,
        angle_increment=config.oscillation_deg,
        exposure_time=rotation_models(experiment)[1].exposure_time,
        count_cutoff=config.trusted_max,
        polarization=config.polarization_fraction,
    )


def _write_tables(simulation: Simulation, result: SimulationResult) -> None:
    experiment = simulation.experiment
    imageset = {"__id__": "ImageSequence", "template": "images/sim_####.cbf"}
    write_expt(result.expt, [replace(experiment, imageset=imageset)])
    table = simulation.predictions.to_table(experiment.identifier)
    table["partiality"] = simulation.partiality()
    write_refl(result.refl, table)
    with replacing(result.truth) as temporary, temporary.open("wb") as handle:
        np.savez_compressed(handle, **simulation.truth())


def simulate(
    out_dir: str | os.PathLike, config: SimulationConfig | None = None, *, progress: Progress | None = None
) -> SimulationResult:
    """Write a simulated data set: images/sim_####.cbf, models.expt, predicted.refl and truth.npz.

    Args:
        out_dir: directory, made when missing.
        config: what to simulate; None: the demonstration wedge.
        progress: called as progress("simulate", images done, images).

    Returns:
        The paths. `truth.npz` holds the arrays of `Simulation.truth`.

    Raises:
        InputError: a configuration without spots, images of another simulation in the way, or an unwritable place.
    """
    config = SimulationConfig.demo() if config is None else config
    simulation = Simulation(config)
    directory = Path(out_dir).absolute()
    names = [f"sim_{number:04d}.cbf" for number in range(1, config.n_images + 1)]
    try:
        (directory / "images").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {directory}: {error.strerror}") from error
    stale = sorted({p.name for p in (directory / "images").glob("sim_*.cbf")} - set(names))
    if stale:
        raise InputError(f"{directory / 'images'} holds {stale[0]} of a longer scan; choose an empty directory")

    paths = [directory / "images" / name for name in names]
    for number, (path, image) in enumerate(zip(paths, simulation.images())):
        write_cbf(path, image, _header(config, simulation.experiment, number))
        if progress is not None:
            progress("simulate", number + 1, config.n_images)
    result = SimulationResult(
        directory, paths, directory / "models.expt", directory / "predicted.refl", directory / "truth.npz"
    )
    _write_tables(simulation, result)
    logger.info(
        "simulated %d images, %d reflections, mean %.0f photons",
        config.n_images,
        len(simulation.predictions),
        config.photons_mean,
    )
    return result
