"""Everything `integrate` writes: integrated.refl and .expt, unmerged.mtz, xtalfast.json, report.html."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

import xtalfast
from xtalfast.errors import InputError
from xtalfast.integration.calibrate import Calibration
from xtalfast.integration.device import choose_device
from xtalfast.integration.estimate import Estimates
from xtalfast.integration.gaussian_rs import ReferenceProfiles
from xtalfast.integration.store import Reason, ShoeboxStore
from xtalfast.io import ExperimentList, Flag, ReflectionTable, write_expt, write_refl, write_unmerged_mtz
from xtalfast.io.files import write_text
from xtalfast.metrics.merging import MergingStatistics, merging_statistics
from xtalfast.metrics.observations import observations_from_table
from xtalfast.models import Experiment
from xtalfast.report.collect import report_data
from xtalfast.report.integration import write_report

if TYPE_CHECKING:
    from xtalfast.integration.model import NetworkProfiles

logger = logging.getLogger("xtalfast")

# Of an earlier integration or scaling of the same table; they would contradict what is written now.
_STALE_PREFIXES = ("intensity.", "background.", "num_pixels.", "profile.", "summation_success", "inverse_scale_factor")
_STALE_FLAGS = (
    Flag.Integrated
    | Flag.BadShoebox
    | Flag.FailedDuringBackgroundModelling
    | Flag.FailedDuringSummation
    | Flag.FailedDuringProfileFitting
    | Flag.BadForScaling
    | Flag.Scaled
)


@dataclass(frozen=True)
class RunResults:
    """What one integration has in hand when it comes to writing."""

    source: ReflectionTable  # the input with its derived columns
    table: ReflectionTable  # integrated
    experiments: ExperimentList
    store: ShoeboxStore
    profiles: ReferenceProfiles
    network: NetworkProfiles | None
    estimates: Estimates  # rows of the store
    calibrations: Sequence[Calibration] = ()

    @property
    def spot_source(self) -> ReferenceProfiles | NetworkProfiles:
        """Whose profiles the estimates rest on."""
        if self.network is None or self.network.model.config.profile.kind == "dials":
            return self.profiles
        return self.network

    def by_size(self, rows: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], Any, Any]]:
        """Some rows, those of each size of box together, with a store and a spot source of them alone."""
        for view in self.store.by_size(rows):
            yield view.rows, view, self.spot_source.on(view)


def fill_table(
    table: ReflectionTable,
    store: ShoeboxStore,
    rows: NDArray[np.int64],
    estimates: Estimates,
    *,
    publish: str = "likelihood",
) -> ReflectionTable:
    """The table of `integrated.refl`: all rows of `table` in their order, with the estimates of those in the store.

    Args:
        table: the input with its derived columns; not changed. Columns of an earlier integration, and shoeboxes, are
            left out.
        store: the shoeboxes.
        rows: row of `table` for each row of the store.
        estimates: of the rows of the store.
        publish: "likelihood", or "posterior" to have the network's E_q[I], Var_q[I] in intensity.prf.*, as the paper
            (without a network those of the exact posterior).
    """
    result = table.copy()
    for name in list(result):
        if name == "shoebox" or name.startswith(_STALE_PREFIXES):
            del result[name]
    for name, values in estimates.columns.items():
        missing = -1 if name.endswith(".variance") else 0
        column = result[name].copy() if name in result else np.full(len(result), missing, values.dtype)
        column[rows] = values
        result[name] = column
    result["bbox"] = np.asarray(result["bbox"]).copy()
    result["bbox"][rows] = store.metadata["bbox"][:]
    flags = np.asarray(result["flags"]) & ~np.uint64(_STALE_FLAGS) | np.uint64(Flag.Predicted)
    overloaded = (np.asarray(store.metadata["reason"][:]) & np.uint8(Reason.Overloaded)) != 0
    flags[rows] |= estimates.flags | np.where(overloaded, np.uint64(Flag.Overloaded), np.uint64(0))
    result["flags"] = flags
    if publish == "posterior":
        channel = "q" if "intensity.q.value" in result else "vi"
        for part in ("value", "variance"):
            result[f"intensity.prf.{part}"] = result[f"intensity.{channel}.{part}"]
    return result


def versions() -> dict[str, str]:
    """Versions of everything that can change a number."""
    found = {"xtalfast": xtalfast.__version__, "python": platform.python_version()}
    for package in ("torch", "numpy", "gemmi", "lightning", "triton"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    """The processor or GPU behind a torch device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def counts_of(table: ReflectionTable, store: ShoeboxStore) -> dict[str, int]:
    """How many reflections came how far."""
    flags = np.asarray(table["flags"])

    def count(flag: Flag) -> int:
        return int(((flags & np.uint64(flag)) != 0).sum())

    return {
        "reflections": len(table),
        "shoeboxes": store.n,
        "integrated_prf": count(Flag.IntegratedPrf),
        "integrated_sum": count(Flag.IntegratedSum),
        "not_integrated": int(((flags & np.uint64(Flag.Integrated)) == 0).sum()),
        "overloaded": count(Flag.Overloaded),
        "foreground_includes_bad_pixels": count(Flag.ForegroundIncludesBadPixels),
        "failed_during_profile_fitting": count(Flag.FailedDuringProfileFitting),
    }


def warnings_of(run: RunResults) -> list[str]:
    """What a careful user should be told, in plain words."""
    found = []
    store, counts = run.store, counts_of(run.table, run.store)
    small = store.statistics["reasons"].get("SmallBox", 0)
    if small and store.box is not None:
        found.append(
            f"{small} of {store.n} boxes hold less than 95 % of the modelled spot: use a larger --box than {store.box}"
        )
    if counts["integrated_prf"] < 0.5 * store.n:
        found.append(f"only {counts['integrated_prf']} of {store.n} reflections could be profile-fitted")
    ratio = run.estimates.diagnostics.get("sum_over_prf_strong")
    if ratio is not None and not 0.95 < ratio < 1.05:
        found.append(
            f"strong reflections: summation is {ratio:.3f} times the profile-fitted intensity; check the profiles"
        )
    if counts["overloaded"]:
        found.append(f"{counts['overloaded']} reflections have overloaded pixels, which were masked")
    return found


def write_outputs(
    directory: Path,
    run: RunResults,
    *,
    parameters: Mapping[str, Any],
    defaults: Mapping[str, Any],
    config: Mapping[str, Any],
    history: Sequence[Mapping[str, float]],
    training: Mapping[str, Any],
    seconds: dict[str, float],
) -> tuple[list[Path], dict[str, Any]]:
    """Write all output files; each appears whole or not at all.

    Returns:
        The files in the order of writing, and the content of xtalfast.json.
    """
    refl, expt, mtz = directory / "integrated.refl", directory / "integrated.expt", directory / "unmerged.mtz"
    write_refl(refl, run.table)
    write_expt(expt, run.experiments)
    files = [refl, expt]
    indexed = all(e.crystal is not None for e in run.experiments)
    if not indexed:
        logger.warning("no unmerged.mtz: the models have no crystal")
    elif not run.estimates.integrated_prf.any():
        logger.warning("no unmerged.mtz: not one reflection could be profile-fitted")
    else:
        write_unmerged_mtz(mtz, run.table, run.experiments)
        files.append(mtz)
    warnings = warnings_of(run)
    for warning in warnings:
        logger.warning("%s", warning)
    statistics = _statistics(run.table, run.experiments) if indexed else []
    record: dict[str, Any] = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "device": device_name(choose_device(parameters["device"])),
        "parameters": parameters,
        "network": config,
        "training": training,
        "history": list(history),
        "counts": counts_of(run.table, run.store),
        "warnings": warnings,
        "estimates": run.estimates.diagnostics,
        "store": run.store.statistics,
        "calibration": [c.to_json() for c in run.calibrations],
        "statistics": [s.to_json() for s in statistics],
        "seconds": seconds,
        "files": [f.name for f in files],
    }
    report, json_file = directory / "report.html", directory / "xtalfast.json"
    files += [json_file, report]
    data = report_data(record, defaults, run, statistics, files)
    write_text(json_file, json.dumps(record, indent=1, default=_json_value) + "\n")
    write_report(report, data)
    return files, record


def _json_value(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"cannot write {type(value).__name__} as JSON")


def _statistics(table: ReflectionTable, experiments: Sequence[Experiment]) -> list[MergingStatistics]:
    """Merging statistics of profile-fitted and summation intensities, where there are equivalents to compare."""
    found = []
    for channel in ("prf", "sum"):
        try:
            observations = observations_from_table(table, experiments, channel, source="integrated.refl")
            found.append(merging_statistics(observations))
        except InputError as error:
            logger.warning("no merging statistics of intensity.%s: %s", channel, error)
    return found
