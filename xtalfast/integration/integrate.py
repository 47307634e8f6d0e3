"""Images, models and predictions -> intensities: the whole integration job as one call.

Stages, each taken up again by the same call after an interruption: read and check -> shoeboxes -> reference profiles ->
network (trained, or given weights) -> estimates -> files.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtalfast.errors import InputError
from xtalfast.integration import fit
from xtalfast.integration.columns import add_derived_columns
from xtalfast.integration.config import IntegrationConfig
from xtalfast.integration.device import choose_device
from xtalfast.integration.estimate import Estimates, estimate
from xtalfast.integration.gaussian_rs import ReferenceProfiles
from xtalfast.integration.model import IntegrationModel, NetworkProfiles
from xtalfast.integration.outputs import RunResults, fill_table, write_outputs
from xtalfast.integration.predict import predict_experiments
from xtalfast.integration.shoeboxes import ShoeboxStore, extract_store, store_from_shoebox_column
from xtalfast.integration.store import NO_SPOT, Reason
from xtalfast.io import ExperimentList, ReflectionTable, ShoeboxColumn, read_expt, read_refl, write_expt
from xtalfast.io.files import remove_partial
from xtalfast.io.images import fill_template

__all__ = ["IntegrateOptions", "IntegrationResult", "Prepared", "integrate", "open_prepared", "prepare"]

logger = logging.getLogger("xtalfast")
Progress = Callable[[str, int, int], None]

PUBLISH = ("likelihood", "posterior")
_WHY_NO_SPOT = {
    Reason.NoExperiment: "not indexed (id -1)",
    Reason.NotFinite: "with a position that is not finite",
    Reason.OffPanel: "off their panel",
    Reason.OutOfScan: "outside the scan",
    Reason.NoPixels: "without a valid pixel",
}


@dataclass(frozen=True)
class IntegrateOptions:
    """What a user may choose; None takes the preset's value, or what the data say."""

    preset: str = "default"
    encoder: str | None = None  # cnn | fc
    profile: str | None = None  # softmax | mvn | lowrank | dials
    weights: Path | None = None  # a checkpoint: no training
    box: tuple[int, int, int] | None = None  # z, y, x; None: 3 x 21 x 21, stills 1 x 21 x 21
    publish: str = "likelihood"  # what intensity.prf.* holds: likelihood | posterior
    d_min: float | None = None  # A
    epochs: int | None = None
    image_dir: Path | None = None
    verify: bool = False  # check Content-MD5 of every image
    resume: bool = True
    device: str = "auto"  # auto | cpu | cuda[:N]
    truth: Path | None = None  # of simulated data: shown in the report, used for nothing else
    seed: int = 0

    def __post_init__(self) -> None:
        if self.publish not in PUBLISH:
            raise InputError(f"publish must be one of {', '.join(PUBLISH)}, got {self.publish!r}")
        if self.weights is not None and not Path(self.weights).is_file():
            raise InputError(f"weights: no file {self.weights}; give the .ckpt that `xtalfast train integration` wrote")
        if self.truth is not None and not Path(self.truth).is_file():
            raise InputError(f"truth: no file {self.truth}; give the truth.npz that `xtalfast simulate` wrote")
        if self.d_min is not None and not self.d_min > 0:
            raise InputError(f"d_min must be a positive resolution in A, got {self.d_min}")
        if self.box is not None and (len(self.box) != 3 or min(self.box) < 1):
            raise InputError(f"box must be three positive sizes z, y, x, got {self.box}")
        if self.epochs is not None and self.epochs < 1:
            raise InputError(f"epochs must be at least 1, got {self.epochs}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be from 0 to 2^63 - 1, got {self.seed}")
        choose_device(self.device)

    @property
    def torch_device(self) -> str:
        """The device where networks and fits run."""
        return str(choose_device(self.device))


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
    checkpoint: Path
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
    options, config = _network_settings(options)
    with _timed("shoeboxes and profiles", seconds):
        prepared = _prepare(table, experiments, out_dir, options, progress)
    with _timed("network", seconds):
        checkpoint, history, training = _network(prepared, config, options, progress)
        model = fit.load_checkpoint(checkpoint, options.torch_device)
    with _timed("estimates", seconds):
        network = NetworkProfiles(
            model,
            prepared.store,
            reference_profiles=prepared.profiles if model.config.profile.kind == "dials" else None,
        )
        estimates = estimate(
            prepared.store,
            prepared.profiles if model.config.profile.kind == "dials" else network,
            prepared.experiments,
            reference=prepared.profiles,
            network=network,
            device=options.torch_device,
            progress=progress,
        )
    integrated = fill_table(table, prepared.store, prepared.rows, estimates, publish=options.publish)
    for experiment in experiments:
        experiment.profile = prepared.profiles.widths.to_profile()
    files, record = write_outputs(
        out_dir,
        RunResults(table, integrated, experiments, prepared.store, prepared.profiles, network, estimates),
        parameters={**asdict(options), **source, "combination": model.config.combination, "checkpoint": checkpoint},
        defaults=asdict(IntegrateOptions()),
        config=model.config.to_dict(),
        history=history,
        training=training,
        seconds=seconds,
    )
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
    box = options.box or ((1, 21, 21) if all(e.is_still for e in experiments) else (3, 21, 21))
    shoeboxes, profile_file = directory / "shoeboxes", directory / "profiles.npz"
    if isinstance(table.columns.get("shoebox"), ShoeboxColumn) and not _has_images(experiments):
        logger.info("no images: using the shoeboxes of the reflection table")
        store = store_from_shoebox_column(wanted, experiments, shoeboxes, box=box)
    else:
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
    (directory / "profiles.npz").unlink(missing_ok=True)


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


def _network_settings(options: IntegrateOptions) -> tuple[IntegrateOptions, IntegrationConfig | None]:
    """What to train; with given weights nothing, and by default the box that they were trained on."""
    if options.weights is not None:
        for name in ("preset", "encoder", "profile", "epochs"):
            if getattr(options, name) != getattr(IntegrateOptions, name):
                raise InputError(f"--{name} is part of the trained network: leave it out with --weights")
        trained = fit.load_checkpoint(options.weights).config
        return replace(options, box=options.box or trained.box), None
    return options, IntegrationConfig.preset(options.preset, encoder=options.encoder, profile=options.profile)


def _network(
    prepared: Prepared, config: IntegrationConfig | None, options: IntegrateOptions, progress: Progress | None
) -> tuple[Path, list[dict[str, float]], dict[str, Any]]:
    """Checkpoint of the network to use, its training history, and the training in numbers."""
    if config is None:
        assert options.weights is not None
        checkpoint = Path(options.weights)
        model: IntegrationModel = fit.load_checkpoint(checkpoint)
        if tuple(model.config.box) != tuple(prepared.store.box or ()):
            raise InputError(
                f"{checkpoint} was trained on boxes of {model.config.box} (z, y, x), these are {prepared.store.box}; "
                f"use --box {','.join(map(str, model.config.box))}"
            )
        return checkpoint, [], {}
    name = f"{Path(config.name).stem}-{config.combination.replace('/', '-')}"
    result = fit.train(
        [prepared.store],
        config,
        prepared.directory / "training" / name,
        seed=options.seed,
        epochs=options.epochs,
        resume=options.resume,
        reference_profiles=[prepared.profiles] if config.profile.kind == "dials" else None,
        progress=progress,
        device=options.device,
    )
    figures = {"steps": result.steps, "seconds": result.seconds, "n_train": result.n_train}
    figures |= {"n_held_out": result.n_held_out, "epochs": result.history[-1]["epoch"] if result.history else 0}
    return result.checkpoint, result.history, figures
