"""Unmerged (or merged) intensities with what it takes to judge them: indices, sigmas, cell, space group.

Reads our and DIALS' `.refl` (unscaled or scaled) and MTZ files (unmerged or merged). From an unscaled `.refl` the
observations are those that dials.scale would use, with its corrections (lp, qe, and partiality for summation) applied.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import gemmi
import numpy as np
from numpy.typing import NDArray

from xtalfast.errors import InputError

if TYPE_CHECKING:
    from xtalfast.io import ReflectionTable
    from xtalfast.models import Experiment

INTENSITY_CHANNELS = {
    "scale": "scaled by dials.scale",
    "prf": "likelihood-only profile fit",
    "vi": "exact posterior under the Wilson prior",
    "q": "amortised posterior of the network",
    "sum": "summation",
}
# The defaults of dials.scale (partiality_cutoff, min_isigi): what it would leave out before scaling.
MIN_PARTIALITY = 0.4
MIN_I_OVER_SIGMA = -5.0


@dataclass(frozen=True)
class Observations:
    """Intensities, one row an observation (one row a unique reflection when `merged`).

    Attributes:
        hkl: Miller indices as measured (not reduced), int32 [N, 3]
        I, sigI: intensity and its standard deviation, float64 [N]
        cell, space_group: gemmi
        batch: image number, int32 [N]; 0 when unknown
        source: where they come from, for headings
        channel: which intensity of the source, e.g. `prf`
        scaling: `scaled`, `unscaled` or `as in file`
        rejected: reason -> number of rows of the source that were left out
    """

    hkl: NDArray[np.int32]
    I: NDArray[np.float64]
    sigI: NDArray[np.float64]
    cell: gemmi.UnitCell
    space_group: gemmi.SpaceGroup
    batch: NDArray[np.int32] | None = None
    source: str = ""
    channel: str = "I"
    scaling: str = "as in file"
    merged: bool = False
    rejected: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.hkl)
        if np.shape(self.hkl) != (n, 3):
            raise InputError(f"hkl must be [N, 3], got {list(np.shape(self.hkl))}")
        for name in ("I", "sigI"):
            if np.shape(getattr(self, name)) != (n,):
                raise InputError(f"{name} must be [N] with N={n} from hkl, got {list(np.shape(getattr(self, name)))}")

    def __len__(self) -> int:
        return len(self.hkl)

    @property
    def d(self) -> NDArray[np.float64]:
        """Resolution of each observation, A, [N]."""
        return self.cell.calculate_d_array(self.hkl)

    @property
    def label(self) -> str:
        """For headings: source, channel, scaling."""
        return heading(self.source, self.channel, self.scaling)


def heading(source: str, channel: str, scaling: str) -> str:
    """One phrase that says which intensities these are."""
    return f"{source or 'observations'} ({channel}, {scaling})"


def load_observations(
    path: str | os.PathLike, expt: str | os.PathLike | None = None, channel: str | None = None
) -> Observations:
    """Read the observations of a `.refl` or MTZ file.

    Args:
        path: `.refl` or `.mtz`
        expt: `.expt` with cell and space group; for a `.refl` the file of the same name beside it when not given
        channel: for a `.refl` one of scale, prf, vi, q, sum (default: scale if present, else prf, else sum);
            for an MTZ the label of an intensity column (default I, or IMEAN when merged)

    Raises:
        InputError: unknown kind of file, no cell, no such channel, or nothing usable in it.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.suffix == ".mtz":
        return _from_mtz(path, channel)
    if path.suffix != ".refl":
        raise InputError(f"{path}: want a .refl or .mtz file, got {path.suffix or 'no suffix'!r}")

    from xtalfast.io import read_expt, read_refl

    expt = Path(expt) if expt is not None else path.with_suffix(".expt")
    if not expt.is_file():
        raise InputError(f"{path} holds no unit cell and there is no {expt}: give the models with --expt models.expt")
    return observations_from_table(read_refl(path), read_expt(expt), channel, source=path.name)


def observations_from_table(
    table: ReflectionTable, experiments: Sequence[Experiment], channel: str | None = None, *, source: str = ""
) -> Observations:
    """The observations of a reflection table, with cell (median) and space group of its experiments."""
    cell, space_group = median_cell(experiments)
    return select_observations(table, cell, space_group, channel, source=source)


def median_cell(experiments: Sequence[Experiment]) -> tuple[gemmi.UnitCell, gemmi.SpaceGroup]:
    """Median unit cell of the crystals (as dials.merge takes it) and their common space group."""
    crystals = [e.crystal for e in experiments if e.crystal is not None]
    if not crystals:
        raise InputError("the experiments have no crystal model: statistics need a cell; index the data first")
    groups = {crystal.space_group.xhm() for crystal in crystals}
    if len(groups) > 1:
        raise InputError(f"experiments must share one space group, got {', '.join(sorted(groups))}: reindex them")
    parameters = np.median([crystal.cell.parameters for crystal in crystals], axis=0)
    return gemmi.UnitCell(*parameters), crystals[0].space_group


def select_observations(
    table: ReflectionTable,
    cell: gemmi.UnitCell,
    space_group: gemmi.SpaceGroup,
    channel: str | None = None,
    *,
    source: str = "",
) -> Observations:
    """The rows of a reflection table that dials.scale (once scaled, dials.merge) would use, corrected as it does."""
    from xtalfast.io import Flag

    channel = channel or _best_channel(table)
    if channel not in INTENSITY_CHANNELS:
        raise InputError(f"channel must be one of {', '.join(INTENSITY_CHANNELS)}, got {channel!r}")
    table.require("miller_index", "flags", f"intensity.{channel}.value", f"intensity.{channel}.variance")
    hkl = np.asarray(table["miller_index"], np.int32)
    intensity = np.asarray(table[f"intensity.{channel}.value"], np.float64)
    variance = np.asarray(table[f"intensity.{channel}.variance"], np.float64)

    usable = np.ones(len(hkl), bool)
    rejected: dict[str, int] = {}

    def keep(reason: str, good: NDArray[np.bool_]) -> None:
        lost = int(np.count_nonzero(usable & ~good))
        if lost:
            rejected[reason] = lost
        usable[:] &= good

    keep("not indexed", np.any(hkl != 0, axis=1) & (np.asarray(table["id"]) >= 0 if "id" in table else True))
    if channel == "scale":
        table.require("inverse_scale_factor")
        scale = np.asarray(table["inverse_scale_factor"], np.float64)
        keep("bad for scaling", ~table.has_flags(Flag.BadForScaling))
        keep("inverse_scale_factor <= 0", scale > 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            factor = 1 / scale
    else:
        keep("not integrated", table.has_flags(Flag.IntegratedSum if channel == "sum" else Flag.IntegratedPrf))
        factor = np.ones(len(hkl))
        if "partiality" in table:
            partiality = np.asarray(table["partiality"], np.float64)
            keep(f"partiality < {MIN_PARTIALITY}", partiality >= MIN_PARTIALITY)
            if channel == "sum":
                factor = factor / np.where(partiality > 0, partiality, 1)
        if "qe" in table:
            qe = np.asarray(table["qe"], np.float64)
            keep("qe <= 0", qe > 0)
            factor = factor / np.where(qe > 0, qe, 1)
        if "lp" in table:
            factor = factor * np.asarray(table["lp"], np.float64)
    keep("no positive variance", np.isfinite(intensity) & np.isfinite(variance) & (variance > 0))
    sigma = np.sqrt(np.where(variance > 0, variance, 1))
    if channel != "scale":
        keep(f"I/sigI < {MIN_I_OVER_SIGMA:g}", intensity >= MIN_I_OVER_SIGMA * sigma)
    if not usable.any():
        raise InputError(
            f"{source or 'table'}: no usable intensity.{channel} in {len(hkl)} rows; left out: {_join(rejected)}"
        )
    batch = np.zeros(len(hkl), np.int32)
    if "xyzcal.px" in table:
        z = np.asarray(table["xyzcal.px"])[:, 2]
        batch = np.floor(np.where(usable, z, 0)).astype(np.int32) + 1  # unusable ones may have no position
    return Observations(
        hkl=hkl[usable],
        I=(intensity * factor)[usable],
        sigI=(sigma * factor)[usable],
        cell=cell,
        space_group=space_group,
        batch=batch[usable],
        source=source,
        channel=channel,
        scaling="scaled" if channel == "scale" else "unscaled",
        rejected=rejected,
    )


def _best_channel(table: ReflectionTable) -> str:
    if "intensity.scale.value" in table and "inverse_scale_factor" in table:
        return "scale"
    return "prf" if "intensity.prf.value" in table else "sum"


def _from_mtz(path: Path, label: str | None) -> Observations:
    try:
        mtz = gemmi.read_mtz_file(str(path))
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f"{path}: cannot be read as MTZ ({error})") from error
    if mtz.spacegroup is None:
        raise InputError(f"{path}: the MTZ file has no space group known to gemmi")
    columns = {column.label: column for column in mtz.columns}
    merged = "M/ISYM" not in columns
    if label is None:
        label = next((name for name in ("IMEAN", "I", "IOBS", "I-obs") if name in columns), "IMEAN") if merged else "I"
    for name in (label, f"SIG{label}"):
        if name not in columns:
            intensities = ", ".join(c.label for c in mtz.columns if c.type in "JK") or "none"
            raise InputError(f"{path}: no column {name!r}; intensity columns present: {intensities}")
    hkl = mtz.make_miller_array()
    if not merged:
        # Indices are in the asymmetric unit; an even ISYM says that the Friedel mate was measured.
        isym = columns["M/ISYM"].array.astype(np.int64) % 256
        hkl = np.where((isym % 2 == 0)[:, None] & (isym > 0)[:, None], -hkl, hkl)
    intensity = columns[label].array.astype(np.float64)
    sigma = columns[f"SIG{label}"].array.astype(np.float64)
    good = np.isfinite(intensity) & (sigma > 0)
    if not good.any():
        raise InputError(f"{path}: no row has a finite {label} and a positive SIG{label}")
    batch = columns["BATCH"].array.astype(np.int32)[good] if "BATCH" in columns else None
    lost = int(np.count_nonzero(~good))
    return Observations(
        hkl=hkl[good].astype(np.int32),
        I=intensity[good],
        sigI=sigma[good],
        cell=mtz.get_cell(),
        space_group=mtz.spacegroup,
        batch=batch,
        source=path.name,
        channel=label,
        scaling="scaled" if merged or "SCALEUSED" in columns else "as in file",
        merged=merged,
        rejected={"no positive sigma": lost} if lost else {},
    )


def _join(rejected: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in rejected.items()) or "none"
