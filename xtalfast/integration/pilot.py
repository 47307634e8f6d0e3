"""A first look at a few images, from which the boxes of all reflections follow.

The spots of a dozen images in the middle of the scan are cut in boxes of one size, the spot model is fitted to the
strong ones, and every reflection gets a box as large as the model says its spot is.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xtalfast.errors import InputError
from xtalfast.integration.boxes import spot_boxes, spot_covariance
from xtalfast.integration.gaussian_rs import ReferenceProfiles
from xtalfast.integration.shoebox_rows import Box
from xtalfast.integration.shoeboxes import extract_store
from xtalfast.integration.spot_shape import MIN_STRONG, SpotShape
from xtalfast.io import ReflectionTable
from xtalfast.io.files import write_text
from xtalfast.models import Experiment

logger = logging.getLogger("xtalfast")

PILOT_BOX = (7, 15, 15)
PILOT_IMAGES = 8  # that hold the centres of the spots looked at
LONGEST_PILOT = 31  # images of a box, for scans finely sliced
N_SIGMA = 3.0
BACKGROUND_PX = 2  # around the spot; with several images there are hundreds of background pixels


def model_boxes(
    table: ReflectionTable, experiments: Sequence[Experiment], directory: Path, image_dir: Path | None = None
) -> NDArray[np.int32] | Box:
    """A box for each reflection of a rotation data set.

    Args:
        table: with its derived columns.
        experiments: one per id.
        directory: where the shape of the spots is kept, for the same boxes when the job is taken up again.
        image_dir: directory of the images, if not where the .expt says.

    Returns:
        int32 [N, 6]; or one size for all, z, y, x, where the pilot finds too few strong spots.
    """
    file = directory / "spot_shape.json"
    if file.is_file():
        found = json.loads(file.read_text())
        shape = SpotShape(tuple(found["psf"]), found["mosaicity"], found["lattice"]) if found else None
    else:
        shape = _pilot_shape(table, experiments, directory / "pilot", image_dir)
        write_text(file, json.dumps(asdict(shape) if shape is not None else None))
    if shape is None:
        logger.info("boxes: too few strong spots on the pilot images; all boxes are %d x %d x %d", *PILOT_BOX)
        return PILOT_BOX
    bbox = np.asarray(table["bbox"], np.int32).copy()
    ids, panel, s1, xyz = (np.asarray(table[name]) for name in ("id", "panel", "s1", "xyzcal.px"))
    for number in np.unique(ids[ids >= 0]):
        at = np.flatnonzero(ids == number)
        covariance = spot_covariance(experiments[int(number)], shape, panel[at].astype(np.int64), s1[at])
        bbox[at] = spot_boxes(covariance, xyz[at], n_sigma=N_SIGMA, background_px=BACKGROUND_PX)
    bbox[ids < 0] = bbox[np.argmax(ids >= 0)]
    return bbox


def _pilot_shape(
    table: ReflectionTable, experiments: Sequence[Experiment], directory: Path, image_dir: Path | None
) -> SpotShape | None:
    """The spot model of a few images, None where there are too few strong spots."""
    number = int(np.argmax(np.bincount(np.maximum(np.asarray(table["id"]), 0))))
    scan = experiments[number].scan
    assert scan is not None
    ids, z = np.asarray(table["id"]), np.asarray(table["xyzcal.px"])[:, 2]
    middle = 0.5 * (scan.array_range[0] + scan.array_range[1])
    half, box = PILOT_IMAGES / 2, PILOT_BOX
    try:
        while True:
            here = np.flatnonzero((ids == number) & (np.abs(z - middle) < half))
            profiles = _profiles(table.select(here), experiments, directory, box, image_dir) if len(here) else None
            if profiles is None or profiles.n_strong < MIN_STRONG:
                if half > middle - scan.array_range[0]:
                    return None
                half *= 2
                continue
            images = 6 * profiles.shape.mosaicity / np.radians(abs(scan.oscillation[1]))
            if images < box[0] or box[0] >= LONGEST_PILOT:
                return profiles.shape
            box = (min(2 * int(images / 2) + 3, LONGEST_PILOT), *box[1:])
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _profiles(
    part: ReflectionTable, experiments: Sequence[Experiment], directory: Path, box: Box, image_dir: Path | None
) -> ReferenceProfiles | None:
    shutil.rmtree(directory, ignore_errors=True)
    store = extract_store(part, experiments, directory, box=box, image_dir=image_dir)
    try:
        return ReferenceProfiles.fit(store, experiments, learn=False)
    except InputError:
        return None  # no widths to be had from so few spots
