"""The true models of a simulated experiment: beam, detector, goniometer, scan and the crystal or crystals."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from xtalfast.integration.predict import crystal_model
from xtalfast.integration.simulate_background import module_gaps
from xtalfast.integration.simulate_config import SimulationConfig
from xtalfast.integration.simulate_crystal import TrueIntensities
from xtalfast.models import Array, Beam, Crystal, Detector, Experiment, Goniometer, Panel, Scan, rotation_matrix


def _orientation(config: SimulationConfig) -> Array:
    """Rotation matrix [3, 3] of the crystal at phi = 0: as given, or uniform over all rotations."""
    if config.orientation_deg is not None:
        turns = [rotation_matrix(axis, np.radians(a)) for axis, a in zip(np.eye(3), config.orientation_deg)]
        return turns[2] @ turns[1] @ turns[0]
    quaternion = np.random.default_rng([config.seed, 3]).standard_normal(4)
    return rotation_matrix(quaternion[1:], 2 * np.arccos(quaternion[0] / np.linalg.norm(quaternion)))


def true_models(config: SimulationConfig, intensities: TrueIntensities) -> Experiment:
    """The true models, in the frame that DIALS gives a PILATUS image: beam along -z, rotation axis x, y up."""
    width, height = config.image_size_px
    pixel = config.pixel_size_mm
    centre = config.beam_centre_px or (0.5 * width + 3.3, 0.5 * height - 2.7)
    panel = Panel(
        origin=np.array([-centre[0] * pixel, centre[1] * pixel, -config.distance_mm]),
        fast=np.array([1.0, 0.0, 0.0]),
        slow=np.array([0.0, -1.0, 0.0]),
        pixel_size=(pixel, pixel),
        image_size=config.image_size_px,
        trusted_range=(-1.0, float(config.trusted_max)),
        mask=module_gaps(config),
    )
    b_matrix = np.array(intensities.cell.frac.mat.tolist()).T
    return Experiment(
        beam=Beam(np.array([0.0, 0.0, 1.0]), config.wavelength_a, polarization_fraction=config.polarization_fraction),
        detector=Detector([panel]),
        goniometer=Goniometer(np.array([1.0, 0.0, 0.0])),
        scan=Scan((1, config.n_images), (config.start_deg, config.oscillation_deg), exposure_time=0.1),
        crystal=Crystal(_orientation(config) @ b_matrix, intensities.space_group.hall),
        identifier=str(uuid.uuid5(uuid.NAMESPACE_OID, repr(config))),
    )


def lattices(experiment: Experiment, config: SimulationConfig) -> Iterator[tuple[float, Experiment]]:
    """Relative intensity and models of the crystal, and of a second one turned a little when there is one."""
    yield 1.0, experiment
    if config.second_lattice_fraction > 0:
        crystal = crystal_model(experiment)
        turn = rotation_matrix(np.array([1.0, 1.0, 1.0]), np.radians(config.second_lattice_angle_deg))
        yield (
            config.second_lattice_fraction,
            replace(experiment, crystal=Crystal(turn @ crystal.A, crystal.hall_symbol)),
        )
