"""Images, models and predictions -> intensities: the whole integration job as one call.

Stages, each taken up again by the same call after an interruption: read and check -> shoeboxes -> reference profiles ->
network (engine "network" only: trained, or given weights) -> estimates -> files.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtalfast.errors import InputError
from xtalfast.integration.calibrate import calibrate
from xtalfast.integration.columns import FIXED_BOX, add_derived_columns
from xtalfast.integration.estimate import Estimates, estimate
from xtalfast.integration.gaussian_rs import ReferenceProfiles
from xtalfast.integration.options import IntegrateOptions
from xtalfast.integration.outputs import RunResults, fill_table, write_outputs
from xtalfast.integration.pilot import model_boxes
from xtalfast.integration.predict import predict_experiments
from xtalfast.integration.shoebox_rows import Box
from xtalfast.integration.shoeboxes import ShoeboxStore, extract_store, store_from_shoebox_column
from xtalfast.integration.store import NO_SPOT, Reason
from xtalfast.io import ExperimentList, ReflectionTable, ShoeboxColumn, read_expt, read_refl, write_expt
from xtalfast.io.files import remove_partial
from xtalfast.io.images import fill_template

__all__ = ["IntegrateOptions", "IntegrationResult", "Prepared", "integrate", "open_prepared", "prepare"]

logger = logging.getLogger("xtalfast")
Progress = Callable[[str, int, int], None]

_WHY_NO_SPOT = {
    Reason.NoExperiment: "not indexed (id -1)",
    Reason.NotFinite: "with a position that is not finite",
    Reason.OffPanel: "off their panel",
    Reason.OutOfScan: "outside the scan",
    Reason.NoPixels: "without a valid pixel",
}


@dataclass
class Prepared:
    """A run directory in which shoeboxes and reference profiles are ready."""

    directory: Path
    experiments: ExperimentList
    store: ShoeboxStore
    profiles: ReferenceProfiles
    rows: NDArray[np.int64]  # of the reflection table, for each row of the store


@dataclass
class IntegrationResult:
    """What came out, and where it was written."""

    table: ReflectionTable  # integrated.refl: rows in the order of the input
    experiments: ExperimentList
    estimates: Estimates  # rows of the store
    store: ShoeboxStore
    checkpoint: Path | None  # of the network, if there was one
    files: list[Path]
    record: dict[str, Any] = field(repr=False)  # xtalfast.json

    def summary(self) -> str:
        """How many reflections came how far, in one line."""
        counts = self.record["counts"]
        return (
            f"{counts['reflections']} reflections: {counts['integrated_prf']} profile-fitted, "
            f"{counts['integrated_sum']} summed, {counts['not_integrated']} not integrated"
        )


def integrate(
    experiments: str | os.PathLike | ExperimentList,
    reflections: str | os.PathLike | ReflectionTable | None,
    out_dir: str | os.PathLike,
    options: IntegrateOptions | None = None,
    *,
    progress: Progress | None = None,
    **changes: Any,
) -> IntegrationResult:
    """Integrate a data set.

    Args:
        experiments: refined DIALS models, a `.expt` file or what `read_expt` returns.
        reflections: a `.refl` file or table with miller_index and xyzcal.px (or with a shoebox column); None predicts
            all reflections of the models to `d_min`, or to the corners of the detector.
        out_dir: where everything is written; an interrupted run there is taken up again.
        options: what to do; or give its fields as keywords: `integrate(expt, refl, "out", encoder="fc")`.
        progress: called as progress(stage, done, total).

    Returns:
        The integrated table, which is also in `out_dir`/integrated.refl, and the other files.

    Raises:
        InputError: anything wrong with the input; nothing that was there before is lost.

    Example:
        >>> result = xtalfast.integrate("refined.expt", None, "integrated", d_min=1.8)  # doctest: +SKIP
        >>> result.table["intensity.prf.value"]  # doctest: +SKIP
    """
    options = IntegrateOptions(**changes) if options is None else options
    out_dir = Path(out_dir)
    seconds: dict[str, float] = {}
    with _timed("read", seconds):
        table, experiments, source = _read(experiments, reflections, options)
    config = None
    if options.chosen_engine == "network":
        from xtalfast.integration.network_engine import network_settings, trained_network

        options, config = network_settings(options)
    with _timed("shoeboxes and profiles", seconds):
        prepared = _prepare(table, experiments, out_dir, options, progress)
    trained = network = None
    if options.chosen_engine == "network":
        with _timed("network", seconds):
            trained = trained_network(prepared, config, options, progress)
            network = trained.profiles
    given = network is None or network.model.config.profile.kind == "dials"
    with _timed("estimates", seconds):
        estimates = estimate(
            prepared.store,
            prepared.profiles if given else network,
            prepared.experiments,
            reference=prepared.profiles,
            network=network,
            device=options.torch_device,
            progress=progress,
        )
    calibrations = []
    if options.calibrate:
        with _timed("calibration", seconds):
            calibrations = calibrate(
                prepared.store,
                prepared.profiles if given else network,
                prepared.experiments,
                estimates,
                reference=prepared.profiles,
                seed=options.seed,
                progress=progress,
            )
    integrated = fill_table(table, prepared.store, prepared.rows, estimates, publish=options.publish)
    for experiment in experiments:
        experiment.profile = prepared.profiles.widths.to_profile()
    parameters = {**asdict(options), **source, "engine": options.chosen_engine}
    if trained is not None:
        parameters["combination"] = trained.profiles.model.config.combination
        parameters["checkpoint"] = trained.checkpoint
    with _timed("files", seconds):
        files, record = write_outputs(
            out_dir,
            RunResults(
                table, integrated, experiments, prepared.store, prepared.profiles, network, estimates, calibrations
            ),
            parameters=parameters,
            defaults=asdict(IntegrateOptions()) | {"engine": "exact"},
            config=network.model.config.to_dict() if network is not None else {},
            history=trained.history if trained is not None else [],
            training=trained.figures if trained is not None else {},
            seconds=seconds,
        )
    checkpoint = trained.checkpoint if trained is not None else None
    return IntegrationResult(integrated, experiments, estimates, prepared.store, checkpoint, files, record)


def prepare(
    experiments: str | os.PathLike | ExperimentList,
    reflections: str | os.PathLike | ReflectionTable | None,
    directory: str | os.PathLike,
    options: IntegrateOptions | None = None,
    *,
    progress: Progress | None = None,
) -> Prepared:
    """Cut the shoeboxes of a data set and learn its reference profiles; the part of `integrate` before the network."""
    options = options or IntegrateOptions()
    table, experiments, _ = _read(experiments, reflections, options)
    return _prepare(table, experiments, Path(directory), options, progress)


def open_prepared(directory: str | os.PathLike) -> Prepared:
    """What `prepare` left in a directory.

    Raises:
        InputError: nothing was prepared there, or it was interrupted.
    """
    directory = Path(directory)
    if not (directory / "profiles.npz").is_file():
        raise InputError(
            f"{directory} holds no finished shoebox store: run `xtalfast extract ... -o {directory}` first"
        )
    experiments = read_expt(directory / "models.expt")
    store = ShoeboxStore.open(directory / "shoeboxes")
    profiles = ReferenceProfiles.load(directory / "profiles.npz", store, experiments)
    return Prepared(directory, experiments, store, profiles, np.asarray(store.metadata["row"][:]))


@contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start
    logger.info("%s: %.1f s", stage, seconds[stage])


def _read(
    experiments: str | os.PathLike | ExperimentList,
    reflections: str | os.PathLike | ReflectionTable | None,
    options: IntegrateOptions,
) -> tuple[ReflectionTable, ExperimentList, dict[str, str]]:
    """Table with all derived columns, models, and where both came from."""
    source = {"experiments": "in memory", "reflections": "in memory"}
    if not isinstance(experiments, ExperimentList):
        source["experiments"] = str(experiments)
        experiments = read_expt(experiments, options.image_dir)
    if reflections is None:
        source["reflections"] = "predicted"
        reflections = predict_experiments(experiments, options.d_min)
        logger.info("predicted %d reflections to %.2f A", len(reflections), float(np.min(reflections["d"])))
    elif not isinstance(reflections, ReflectionTable):
        source["reflections"] = str(reflections)
        reflections = read_refl(reflections)
    if len(reflections) == 0:
        raise InputError(f"{source['reflections']}: the table is empty; predict reflections first (xtalfast predict)")
    table = reflections.copy()
    _check_identifiers(table, experiments, source)
    if "xyzcal.px" not in table and "shoebox" in table:
        # Spots that were found but not indexed: integrated where they were observed, without Miller indices.
        table.require("xyzobs.px.value")
        table["xyzcal.px"] = table["xyzobs.px.value"]
        logger.warning("no column xyzcal.px: spots are integrated where they were observed")
    if "miller_index" not in table and "shoebox" in table:
        table["miller_index"] = np.zeros((len(table), 3), np.int32)
        logger.warning("no column miller_index: spots are not indexed, so intensities cannot be scaled or merged")
    missing = [name for name in ("miller_index", "xyzcal.px") if name not in table]
    if missing:
        raise InputError(
            f"{source['reflections']}: no column {', '.join(map(repr, missing))}; present: {', '.join(table)}; "
            "make the table with xtalfast predict, or give the indexed or refined one"
        )
    add_derived_columns(table, experiments)
    return table, experiments, source


def _check_identifiers(table: ReflectionTable, experiments: ExperimentList, source: dict[str, str]) -> None:
    known = {e.identifier for e in experiments if e.identifier}
    strangers = [name for name in table.identifiers.values() if name and name not in known]
    if strangers and known:
        raise InputError(
            f"{source['reflections']}: experiment identifier {strangers[0]} is not in {source['experiments']}; "
            "give the .expt and .refl of one DIALS job"
        )


def _prepare(
    table: ReflectionTable,
    experiments: ExperimentList,
    directory: Path,
    options: IntegrateOptions,
    progress: Progress | None,
) -> Prepared:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the output directory {directory}: {error.strerror}") from error
    remove_partial(directory)
    if not options.resume:
        _forget(directory)
    rows = _rows_to_extract(table, options.d_min)
    wanted = table if len(rows) == len(table) else table.select(rows)
    still = all(e.is_still for e in experiments)
    box: Box | str = options.box or FIXED_BOX
    if still and options.box is None:
        box = (1, *FIXED_BOX[1:])
    shoeboxes, profile_file = directory / "shoeboxes", directory / "profiles.npz"
    if isinstance(table.columns.get("shoebox"), ShoeboxColumn) and not _has_images(experiments):
        logger.info("no images: using the shoeboxes of the reflection table")
        store = store_from_shoebox_column(wanted, experiments, shoeboxes, box=box)
    else:
        if options.box is None and options.chosen_engine == "exact" and not any(e.is_still for e in experiments):
            found = model_boxes(wanted, experiments, directory, options.image_dir)
            if isinstance(found, tuple):
                box = found
            else:
                wanted, box = wanted.copy(), "bbox"
                wanted["bbox"] = found
        store = extract_store(
            wanted,
            experiments,
            shoeboxes,
            box=box,
            image_dir=options.image_dir,
            verify=options.verify,
            progress=progress,
        )
    _check_spots(store)
    write_expt(directory / "models.expt", experiments)
    if profile_file.is_file():
        profiles = ReferenceProfiles.load(profile_file, store, experiments)
    else:
        profiles = ReferenceProfiles.fit(store, experiments, progress=progress)
        profiles.save(profile_file)
    return Prepared(directory, experiments, store, profiles, rows[np.asarray(store.metadata["row"][:])])


def _rows_to_extract(table: ReflectionTable, d_min: float | None) -> NDArray[np.int64]:
    if d_min is None:
        return np.arange(len(table))
    rows = np.flatnonzero(table["d"] >= d_min)
    if not len(rows):
        raise InputError(
            f"d_min {d_min} A leaves no reflection; the best resolution in the table is {table['d'].min():.2f} A"
        )
    return rows


def _check_spots(store: ShoeboxStore) -> None:
    """Raise InputError when no intensity can be had from any reflection."""
    reason = np.asarray(store.metadata["reason"][:])
    if ((reason & np.uint8(NO_SPOT)) != 0).all():
        found = ", ".join(
            f"{count} {words}"
            for bit, words in _WHY_NO_SPOT.items()
            if (count := store.statistics["reasons"][bit.name])
        )
        raise InputError(
            f"none of the {store.n} reflections can be integrated ({found}); give the .expt and .refl of one DIALS job"
        )


def _forget(directory: Path) -> None:
    """Remove the intermediate results of an earlier run; finished outputs stay until they are replaced."""
    for name in ("shoeboxes", "training"):
        if (directory / name).is_dir():
            shutil.rmtree(directory / name)
    for name in ("profiles.npz", "spot_shape.json"):
        (directory / name).unlink(missing_ok=True)


def _has_images(experiments: ExperimentList) -> bool:
    """Whether the first image of every experiment is there."""
    for experiment in experiments:
        block = experiment.imageset or {}
        names = block.get("images") or ([block["template"]] if block.get("template") else [])
        if not names:
            return False
        first = names[0] if experiment.scan is None else fill_template(names[0], experiment.scan.image_range[0])
        if not Path(first).is_file():
            return False
    return True
