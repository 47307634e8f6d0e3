"""MTZ files out, through gemmi: unmerged observations with batch headers, and merged intensities.

The batch headers follow the layout of CCP4's library in the Cambridge frame: z along the rotation axis, x close to the
beam, U in the convention of Mosflm (a* along x, b* in the x-y plane of the crystal).
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Sequence

import gemmi
import numpy as np
from numpy.typing import ArrayLike, NDArray

from xtalfast.errors import InputError
from xtalfast.io.files import write_bytes
from xtalfast.io.refl import Flag, ReflectionTable
from xtalfast.models import Array, Experiment

logger = logging.getLogger(__name__)

# Where a value of the batch header lives: integers first, then floats (CCP4 mtzlib, "batch headers").
_INT_CELL_REFINED = range(4, 10)
_INT_CRYSTAL, _INT_DATA_TYPE, _INT_GONIO_AXIS, _INT_N_AXES, _INT_N_DETECTORS, _INT_DATASET = 12, 14, 15, 17, 19, 20
_ROTATION_DATA, _STILL_DATA = 2, 1
_CELL, _UMAT, _PHI_START, _PHI_END, _SCAN_AXIS, _SCALE = 0, 6, 36, 37, 38, 43
_PHI_RANGE, _AXIS_1, _IDEAL_SOURCE, _SOURCE, _WAVELENGTH, _DISTANCE, _DETECTOR_LIMITS = 47, 59, 80, 83, 86, 111, 113

_COLUMN_TYPES = {"M/ISYM": "Y", "BATCH": "B", "I": "J", "SIGI": "Q"}


def _cambridge_frame(experiment: Experiment) -> Array:
    """Rotation [3, 3] from the laboratory to z along the rotation axis, x as close to the beam as that allows."""
    axis = np.array([1.0, 0.0, 0.0]) if experiment.goniometer is None else experiment.goniometer.lab_axis
    z = axis / np.linalg.norm(axis)
    x = experiment.beam.s0 - (experiment.beam.s0 @ z) * z
    x /= np.linalg.norm(x)
    return np.stack([x, np.cross(z, x), z])


def _mosflm_b(cell: gemmi.UnitCell) -> Array:
    """Reciprocal basis [3, 3] with a* along x and b* in the x-y plane (Busing and Levy)."""
    r = cell.reciprocal()
    alpha, beta_star, gamma_star = np.radians([cell.alpha, r.beta, r.gamma])
    return np.array(
        [
            [r.a, r.b * np.cos(gamma_star), r.c * np.cos(beta_star)],
            [0.0, r.b * np.sin(gamma_star), -r.c * np.sin(beta_star) * np.cos(alpha)],
            [0.0, 0.0, 1 / cell.c],
        ]
    )


def _image_range(experiment: Experiment) -> tuple[int, int]:
    return (1, 1) if experiment.scan is None else experiment.scan.image_range


def _batch_offsets(experiments: Sequence[Experiment]) -> list[int]:
    """What to add to image numbers so that batches are positive and unique; those of the scans if they already are."""
    ranges = [_image_range(e) for e in experiments]
    given = [0 if e.scan is None else e.scan.batch_offset for e in experiments]
    spans = sorted((first + offset, last + offset) for (first, last), offset in zip(ranges, given))
    if spans[0][0] > 0 and all(end < start for (_, end), (start, _) in itertools.pairwise(spans)):
        return given
    offsets, end = [], 0
    for first, last in ranges:
        # Image numbers stay readable: batch 203 is image 3 of some later experiment.
        offset = max(0, -(-(end - first + 1) // 100) * 100) if end else max(0, 1 - first)
        offsets.append(offset)
        end = last + offset
    return offsets


def _batches(experiment: Experiment, offset: int, dataset_id: int) -> list[gemmi.Mtz.Batch]:
    """One batch header per image: cell, orientation at the middle of the image, phi range, beam, detector."""
    scan, goniometer, crystal = experiment.scan, experiment.goniometer, experiment.crystal
    assert crystal is not None  # checked by write_unmerged_mtz
    frame = _cambridge_frame(experiment)
    datum = frame if goniometer is None else frame @ goniometer.setting @ goniometer.fixed
    panel = experiment.detector[0]
    first, last = _image_range(experiment)
    batches = []
    for image in range(first, last + 1):
        A = crystal.A if scan is None else crystal.A_at(np.array(image - 0.5), scan)
        # The cell of this image, from its own A.
        cell = type(crystal)(A).cell
        start = 0.0 if scan is None else scan.oscillation[0] + (image - first) * scan.oscillation[1]
        width = 0.0 if scan is None else scan.oscillation[1]
        batch = gemmi.Mtz.Batch()
        batch.number = image + offset
        batch.title = f"Batch {batch.number}"
        batch.axes = ["AXIS"]
        ints, floats = batch.ints, batch.floats
        for position in _INT_CELL_REFINED:
            ints[position] = -1  # not known which cell parameters were refined
        for position, value in (
            (_INT_CRYSTAL, 1),
            (_INT_DATA_TYPE, _STILL_DATA if experiment.is_still else _ROTATION_DATA),
            (_INT_GONIO_AXIS, 1),
            (_INT_N_AXES, 1),
            (_INT_N_DETECTORS, 1),
            (_INT_DATASET, dataset_id),
        ):
            ints[position] = value
        orientation = datum @ A @ np.linalg.inv(_mosflm_b(cell))
        for position, values in (
            (_CELL, cell.parameters),
            (_UMAT, orientation.T.ravel()),  # column by column
            (_PHI_START, [start]),
            (_PHI_END, [start + width]),
            (_SCAN_AXIS, [0, 0, 1]),
            (_SCALE, [1]),
            (_PHI_RANGE, [width]),
            (_AXIS_1, [0, 0, 1]),
            (_IDEAL_SOURCE, [-1, 0, 0]),
            (_SOURCE, frame @ experiment.beam.direction),
            (_WAVELENGTH, [experiment.beam.wavelength]),
            (_DISTANCE, [abs(panel.origin @ panel.normal)]),
            (_DETECTOR_LIMITS, [0, panel.image_size[0], 0, panel.image_size[1]]),
        ):
            for i, value in enumerate(values):
                floats[position + i] = value
        batches.append(batch)
    return batches


def _usable_rows(table: ReflectionTable, channel: str, min_partiality: float) -> NDArray[np.int64]:
    """Rows with an intensity of this channel to write."""
    value, variance = table[f"intensity.{channel}.value"], table[f"intensity.{channel}.variance"]
    usable = table.has_flags(Flag.IntegratedSum if channel == "sum" else Flag.IntegratedPrf)
    usable &= (table["id"] >= 0) & np.isfinite(value) & np.isfinite(variance) & (variance > 0)
    if "partiality" in table:
        usable &= (table["partiality"] > 0) & (table["partiality"] >= min_partiality)
    if "qe" in table:
        usable &= table["qe"] > 0
    return np.flatnonzero(usable)


def _to_asu(hkl: NDArray, space_group: gemmi.SpaceGroup) -> tuple[NDArray, NDArray]:
    """Indices [N, 3] in CCP4's asymmetric unit, and ISYM [N]: 2 k - 1 for operation k, 2 k for its Friedel mate."""
    asu, operations = gemmi.ReciprocalAsu(space_group), space_group.operations()
    unique, inverse = np.unique(hkl, axis=0, return_inverse=True)
    reduced = [asu.to_asu(h, operations) for h in unique.tolist()]
    inverse = inverse.reshape(-1)
    return np.array([h for h, _ in reduced])[inverse], np.array([isym for _, isym in reduced])[inverse]


def write_unmerged_mtz(
    path: str | os.PathLike,
    table: ReflectionTable,
    experiments: Sequence[Experiment],
    *,
    channel: str = "prf",
    min_partiality: float = 0.4,
) -> int:
    """Write integrated reflections as unmerged MTZ for AIMLESS, Pointless, careless or phenix.

    Intensities are corrected as `dials.export` does: I = intensity * lp / qe, and `sum` divided by the partiality too
    (`prf` and `vi` already are estimates of the whole spot). They are not scaled. Indices are reduced to the asymmetric
    unit with M/ISYM, rows are sorted. XDET and YDET are in pixels of the image (panel offset added), ROT in degrees.

    Args:
        path: the file; it appears whole or not at all.
        table: needs id, miller_index, flags, xyzcal.px, panel and intensity.<channel>.value and .variance; lp, qe,
            partiality, background.sum.* (or background.mean) and xyzobs.px.value are used when present.
        experiments: numbered by `id`; all in one space group.
        channel: prf (likelihood-only), vi (posterior) or sum (summation).
        min_partiality: rows of which a smaller fraction was recorded are left out.

    Returns:
        Number of rows written.

    Raises:
        InputError: a missing column, an experiment without crystal, several space groups, or nothing to write.
    """
    intensity = f"intensity.{channel}"
    table.require("id", "miller_index", "flags", "xyzcal.px", "panel", f"{intensity}.value", f"{intensity}.variance")
    rows = _usable_rows(table, channel, min_partiality)
    if len(rows) == 0:
        raise InputError(
            f"no reflection has a usable {intensity}.value; wanted integrated rows with a variance above 0"
        )
    if len(rows) < len(table):
        logger.info("unmerged MTZ: %d of %d reflections have a usable %s", len(rows), len(table), intensity)
    used = sorted(set(table["id"][rows].tolist()))
    if used[-1] >= len(experiments):
        raise InputError(f"column id names experiment {used[-1]}, there are {len(experiments)}")
    picked = [experiments[i] for i in used]
    crystals = [e.crystal for e in picked if e.crystal is not None]
    if len(crystals) < len(picked):
        raise InputError("every experiment with reflections must have a crystal; index the data before writing MTZ")
    groups = {crystal.space_group.hall: crystal.space_group for crystal in crystals}
    if len(groups) > 1:
        names = ", ".join(group.xhm() for group in groups.values())
        raise InputError(f"experiments must share one space group, got {names}; write one file each")

    mtz = gemmi.Mtz(with_base=True)
    mtz.title = "xtalfast unmerged intensities"
    mtz.spacegroup = crystals[0].space_group
    dataset_of = {}
    for wavelength in sorted({e.beam.wavelength for e in picked}):
        dataset = mtz.add_dataset("FROMXTALFAST")
        dataset.project_name, dataset.crystal_name = "XTALFAST", "XTAL"
        dataset.wavelength = wavelength
        dataset_of[wavelength] = dataset.id
    mtz.set_cell_for_all(crystals[0].cell)

    columns = _columns(table, rows, channel)
    columns["BATCH"], columns["ROT"] = np.empty(len(rows)), np.zeros(len(rows))
    for experiment, number, offset in zip(picked, used, _batch_offsets(picked)):
        for batch in _batches(experiment, offset, dataset_of[experiment.beam.wavelength]):
            mtz.batches.append(batch)
        mine = table["id"][rows] == number
        z = _position(table, rows)[mine, 2]
        first, last = _image_range(experiment)
        columns["BATCH"][mine] = np.clip(np.floor(z) + 1, first, last) + offset
        if experiment.scan is not None:
            columns["ROT"][mine] = np.degrees(experiment.scan.phi_from_z(table["xyzcal.px"][rows][mine, 2]))
        on_image = np.array([panel.raw_image_offset for panel in experiment.detector])[table["panel"][rows][mine]]
        columns["XDET"][mine] += on_image[:, 0]
        columns["YDET"][mine] += on_image[:, 1]

    order = "M/ISYM BATCH I SIGI BG SIGBG XDET YDET ROT LP FRACTIONCALC QE".split()
    for label in order:
        mtz.add_column(label, _COLUMN_TYPES.get(label, "R"), expand_data=False)
    hkl, columns["M/ISYM"] = _to_asu(table["miller_index"][rows], crystals[0].space_group)
    data = np.column_stack([hkl, *(columns[label] for label in order)])
    mtz.set_data(np.ascontiguousarray(data, np.float32))
    mtz.sort(5)
    mtz.update_reso()
    write_bytes(path, mtz.write_to_bytes())
    return len(rows)


def _position(table: ReflectionTable, rows: NDArray) -> Array:
    """Observed centroids [N, 3] (px, px, image) where there are any, else predicted ones."""
    return table["xyzobs.px.value" if "xyzobs.px.value" in table else "xyzcal.px"][rows]


def _columns(table: ReflectionTable, rows: NDArray, channel: str) -> dict[str, Array]:
    """The columns that do not depend on the experiment, float64 [N]; NaN is MTZ's word for a missing value."""

    def column(name: str, default: float) -> Array:
        return table[name][rows] if name in table else np.full(len(rows), default)

    lp, qe, partiality = column("lp", 1.0), column("qe", 1.0), column("partiality", 1.0)
    correction = lp / qe / (partiality if channel == "sum" else 1.0)
    summed = "background.sum.value" in table
    background = "background.sum.value" if summed else "background.mean"
    background_variance = "background.sum.variance" if summed else "background.variance"
    position = _position(table, rows)
    return {
        "I": table[f"intensity.{channel}.value"][rows] * correction,
        "SIGI": np.sqrt(table[f"intensity.{channel}.variance"][rows]) * correction,
        "BG": column(background, np.nan),
        "SIGBG": np.sqrt(np.maximum(column(background_variance, np.nan), 0)),
        "XDET": position[:, 0].copy(),
        "YDET": position[:, 1].copy(),
        "LP": lp,
        "FRACTIONCALC": partiality,
        "QE": qe,
    }


def write_merged_mtz(
    path: str | os.PathLike,
    hkl: ArrayLike,
    mean: tuple[ArrayLike, ArrayLike],
    *,
    cell: gemmi.UnitCell,
    space_group: gemmi.SpaceGroup,
    wavelength: float = 0.0,
    plus: tuple[ArrayLike, ArrayLike] | None = None,
    minus: tuple[ArrayLike, ArrayLike] | None = None,
    n_observations: ArrayLike | None = None,
) -> None:
    """Write merged intensities as MTZ: IMEAN SIGIMEAN, I(+) SIGI(+) I(-) SIGI(-) and N as far as they are given.

    Args:
        path: the file; it appears whole or not at all.
        hkl: Miller indices in the asymmetric unit, each once, [N, 3].
        mean: intensity and its standard deviation, [N] each; NaN where there is none.
        cell, space_group: of the crystal.
        wavelength: A; 0 if unknown.
        plus, minus: intensity and standard deviation of the two Friedel mates, [N] each; NaN where not observed.
        n_observations: observations merged, [N].

    Raises:
        InputError: arrays of unequal length, or indices that repeat or lie outside the asymmetric unit.
    """
    indices = np.asarray(hkl)
    columns: list[tuple[str, str, ArrayLike]] = [("IMEAN", "J", mean[0]), ("SIGIMEAN", "Q", mean[1])]
    for sign, pair in (("+", plus), ("-", minus)):
        if pair is not None:
            columns += [(f"I({sign})", "K", pair[0]), (f"SIGI({sign})", "M", pair[1])]
    if n_observations is not None:
        columns.append(("N", "I", n_observations))
    if indices.ndim != 2 or indices.shape[1] != 3:
        raise InputError(f"hkl must be [N, 3], got {list(indices.shape)}")
    for label, _, values in columns:
        if np.shape(values) != (len(indices),):
            raise InputError(f"{label} must be [{len(indices)}] like hkl, got {list(np.shape(values))}")
    asu = gemmi.ReciprocalAsu(space_group)
    outside = [h for h in indices.tolist() if not asu.is_in(h)]
    if outside:
        raise InputError(
            f"hkl must lie in the asymmetric unit of {space_group.xhm()}, got {outside[0]}; reduce it first"
        )
    if len(np.unique(indices, axis=0)) < len(indices):
        raise InputError("hkl must name each reflection once; merge the observations first")
    mtz = gemmi.Mtz(with_base=True)
    mtz.title = "xtalfast merged intensities"
    mtz.spacegroup = space_group
    dataset = mtz.add_dataset("FROMXTALFAST")
    dataset.project_name, dataset.crystal_name, dataset.wavelength = "XTALFAST", "XTAL", wavelength
    mtz.set_cell_for_all(cell)
    for label, kind, _ in columns:
        mtz.add_column(label, kind, expand_data=False)
    data = np.column_stack([indices, *(np.asarray(values, np.float64) for _, _, values in columns)])
    mtz.set_data(np.ascontiguousarray(data, np.float32))
    mtz.sort(3)
    mtz.update_reso()
    write_bytes(path, mtz.write_to_bytes())
