"""Amplitudes and phases in MTZ files: read measured amplitudes or map coefficients, write FWT PHWT FOM."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import gemmi
import numpy as np
from numpy.typing import ArrayLike, NDArray

from xtalfast.errors import InputError
from xtalfast.io.files import write_bytes

logger = logging.getLogger(__name__)

# Labels in order of preference, for files that hold several columns of one type.
_AMPLITUDES = ("F", "FP", "FOBS", "F-obs", "FMEAN", "F_XDSdataset")
_MAP_COEFFICIENTS = (
    ("FWT", "PHWT"),
    ("2FOFCWT", "PH2FOFCWT"),
    ("FC", "PHIC"),
    ("F", "PHIF"),
    ("F", "PHI"),
    ("FP", "PHIB"),
    ("FPHASED", "PHIPHASED"),
)


@dataclass(frozen=True)
class ReflectionData:
    """One reflection list with what stands beside it; NaN never occurs (such rows are left out).

    Attributes:
        hkl: indices [N, 3].
        F: amplitudes, or structure factors (complex) when phases were read, [N].
        cell, space_group: of the crystal.
        sigF: standard deviations [N], if there are any.
        fom: figures of merit [N], if there are any.
        labels: the columns read.
        n_missing: rows of the file without a value.
    """

    hkl: NDArray[np.int64]
    F: NDArray
    cell: gemmi.UnitCell
    space_group: gemmi.SpaceGroup
    sigF: NDArray[np.float64] | None = None
    fom: NDArray[np.float64] | None = None
    labels: tuple[str, ...] = ()
    n_missing: int = 0

    @property
    def d_min(self) -> float:
        """Resolution of the finest reflection, A."""
        return float(np.min(self.cell.calculate_d_array(np.ascontiguousarray(self.hkl, np.int32))))

    @property
    def phases(self) -> NDArray[np.float64]:
        """Phases of F, degrees [N]."""
        return np.degrees(np.angle(self.F))

    def select(self, rows: NDArray) -> ReflectionData:
        """These rows only."""
        return replace(
            self,
            hkl=self.hkl[rows],
            F=self.F[rows],
            sigF=None if self.sigF is None else self.sigF[rows],
            fom=None if self.fom is None else self.fom[rows],
        )


def shared_reflections(first: ReflectionData, second: ReflectionData) -> tuple[ReflectionData, ReflectionData]:
    """The reflections that both lists hold, in the order of the first.

    Raises:
        InputError: different space groups, cells more than 1 % apart, or no reflection in common.
    """
    if first.space_group.hall != second.space_group.hall:
        raise InputError(
            f"both files must be in one space group, got {first.space_group.xhm()} and {second.space_group.xhm()}"
        )
    if not np.allclose(first.cell.parameters, second.cell.parameters, rtol=0.01):
        raise InputError(f"both files must have one cell, got {first.cell.parameters} and {second.cell.parameters}")
    there = {tuple(h): row for row, h in enumerate(second.hkl.tolist())}
    pairs = np.array(
        [(row, there[tuple(h)]) for row, h in enumerate(first.hkl.tolist()) if tuple(h) in there], np.int64
    ).reshape(-1, 2)
    if len(pairs) == 0:
        raise InputError("the files have no reflection in common; reduce both to the same asymmetric unit")
    return first.select(pairs[:, 0]), second.select(pairs[:, 1])


def _open(path: str | os.PathLike) -> gemmi.Mtz:
    try:
        mtz = gemmi.read_mtz_file(os.fspath(path))
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{path}: not a readable MTZ file: {error}") from error
    if mtz.spacegroup is None:
        raise InputError(f"{path}: no space group known to gemmi ({mtz.spacegroup_name!r}); set it in the file")
    if len(mtz.batches):
        raise InputError(f"{path}: unmerged MTZ; wanted merged reflections, merge it first")
    return mtz


def _present(mtz: gemmi.Mtz) -> str:
    return ", ".join(f"{c.label} ({c.type})" for c in mtz.columns)


def _column(mtz: gemmi.Mtz, label: str, path: str | os.PathLike) -> NDArray[np.float64]:
    for column in mtz.columns:
        if column.label == label:
            return np.array(column.array, np.float64)
    raise InputError(f"{path}: no column {label!r}; present: {_present(mtz)}")


def _pick(labels: Sequence[str], preferred: Sequence[str]) -> str | None:
    """The preferred label if it is there, else the first."""
    return next((label for label in preferred if label in labels), labels[0] if labels else None)


def _sigma_of(mtz: gemmi.Mtz, amplitude: str) -> str | None:
    """The column of type Q that belongs to an amplitude: SIG<label>, or the one right after it."""
    labels = [c.label for c in mtz.columns]
    after = labels.index(amplitude) + 1
    if f"SIG{amplitude}" in labels:
        return f"SIG{amplitude}"
    return labels[after] if after < len(labels) and mtz.columns[after].type == "Q" else None


def read_amplitudes(path: str | os.PathLike, labels: Sequence[str] | None = None) -> ReflectionData:
    """Read measured amplitudes (columns of type F) and their standard deviations from a merged MTZ file.

    Args:
        path: the file.
        labels: amplitude column and, if wanted, sigma column; found by type and name when not given.

    Raises:
        InputError: no such file or column (the columns present are listed), or no usable reflection.
    """
    mtz = _open(path)
    if labels is None:
        amplitude = _pick([c.label for c in mtz.columns if c.type == "F"], _AMPLITUDES)
        if amplitude is None:
            raise InputError(f"{path}: no amplitude column (type F); present: {_present(mtz)}; name one with --labels")
        sigma = _sigma_of(mtz, amplitude)
    else:
        if len(labels) not in (1, 2):
            raise InputError(f"labels must be F or F,SIGF, got {','.join(labels)}")
        amplitude, sigma = labels[0], labels[1] if len(labels) == 2 else None
    values = _column(mtz, amplitude, path)
    sigmas = None if sigma is None else _column(mtz, sigma, path)
    hkl = np.array(mtz.make_miller_array(), np.int64)
    keep = np.isfinite(values) & hkl.any(1)
    if sigmas is not None:
        keep &= np.isfinite(sigmas)
    if not keep.any():
        raise InputError(f"{path}: column {amplitude} holds no value")
    if (values[keep] < 0).any():
        raise InputError(f"{path}: column {amplitude} holds negative values; wanted amplitudes, not intensities")
    read = (amplitude,) if sigma is None else (amplitude, sigma)
    logger.info("%s: %d amplitudes from %s", path, int(keep.sum()), ", ".join(read))
    return ReflectionData(
        hkl[keep],
        values[keep],
        mtz.cell,
        mtz.spacegroup,
        sigF=None if sigmas is None else sigmas[keep],
        labels=read,
        n_missing=int((~keep).sum()),
    )


def read_phases(path: str | os.PathLike, labels: Sequence[str] | None = None) -> ReflectionData:
    """Read structure factors (an amplitude and a phase column) and figures of merit from a merged MTZ file.

    Args:
        path: the file.
        labels: amplitude and phase column (and, if wanted, FOM); FWT,PHWT or the usual alternatives when not given.

    Raises:
        InputError: no such file or columns (the columns present are listed), or no usable reflection.
    """
    mtz = _open(path)
    present = [c.label for c in mtz.columns]
    if labels is None:
        pair = next((p for p in _MAP_COEFFICIENTS if p[0] in present and p[1] in present), None)
        if pair is None:
            amplitude = _pick([c.label for c in mtz.columns if c.type == "F"], _AMPLITUDES)
            phase = _pick([c.label for c in mtz.columns if c.type == "P"], ())
            if amplitude is None or phase is None:
                raise InputError(f"{path}: no pair of amplitude (type F) and phase (P); present: {_present(mtz)}")
            pair = (amplitude, phase)
        merit_label = _pick([c.label for c in mtz.columns if c.type == "W"], ("FOM",))
    else:
        if len(labels) not in (2, 3):
            raise InputError(f"labels must be F,PHI or F,PHI,FOM, got {','.join(labels)}")
        pair, merit_label = (labels[0], labels[1]), labels[2] if len(labels) == 3 else None
    amplitudes, phases = (_column(mtz, label, path) for label in pair)
    merits = None if merit_label is None else _column(mtz, merit_label, path)
    hkl = np.array(mtz.make_miller_array(), np.int64)
    keep = np.isfinite(amplitudes) & np.isfinite(phases) & hkl.any(1)
    if not keep.any():
        raise InputError(f"{path}: columns {pair[0]}, {pair[1]} hold no value")
    return ReflectionData(
        hkl[keep],
        amplitudes[keep] * np.exp(1j * np.radians(phases[keep])),
        mtz.cell,
        mtz.spacegroup,
        fom=None if merits is None else np.nan_to_num(merits[keep]),
        labels=pair if merit_label is None else (*pair, merit_label),
        n_missing=int((~keep).sum()),
    )


def write_phases(
    path: str | os.PathLike,
    hkl: ArrayLike,
    F: ArrayLike,
    *,
    cell: gemmi.UnitCell,
    space_group: gemmi.SpaceGroup,
    fom: ArrayLike | None = None,
    observed: ArrayLike | None = None,
    sigF: ArrayLike | None = None,
    labels: tuple[str, str] = ("FWT", "PHWT"),
    title: str = "xtalfast phases",
) -> None:
    """Write map coefficients as MTZ: FWT PHWT FOM, and FP SIGFP as far as given. Coot opens it as a map.

    Args:
        path: the file; it appears whole or not at all.
        hkl: indices [N, 3], each reflection once.
        F: map coefficients, complex [N]: FWT = |F|, PHWT = its phase in degrees.
        cell, space_group: of the crystal.
        fom: figures of merit [N].
        observed: measured amplitudes [N]; NaN where there is none.
        sigF: their standard deviations [N].
        labels: of amplitude and phase.
        title: of the file.

    Raises:
        InputError: arrays of unequal length or values that are not finite.
    """
    index, values = np.asarray(hkl), np.asarray(F, np.complex128)
    columns: list[tuple[str, str, NDArray]] = [
        (labels[0], "F", abs(values)),
        (labels[1], "P", np.degrees(np.angle(values))),
    ]
    for label, kind, given in (("FOM", "W", fom), ("FP", "F", observed), ("SIGFP", "Q", sigF)):
        if given is not None:
            columns.append((label, kind, np.asarray(given, np.float64)))
    for label, _, column in columns:
        if index.shape != (len(column), 3):
            raise InputError(f"hkl must be [{len(column)}, 3] like {label}, got {list(index.shape)}")
    if not np.isfinite(values).all():
        raise InputError("F must be finite; leave out reflections without phases")
    mtz = gemmi.Mtz(with_base=True)
    mtz.title = title
    mtz.spacegroup = space_group
    dataset = mtz.add_dataset("XTALFAST")
    dataset.project_name, dataset.crystal_name = "XTALFAST", "XTAL"
    mtz.set_cell_for_all(cell)
    for label, kind, _ in columns:
        mtz.add_column(label, kind, expand_data=False)
    data = np.column_stack([index, *(column for _, _, column in columns)])
    mtz.set_data(np.ascontiguousarray(data, np.float32))
    mtz.sort(3)
    mtz.update_reso()
    write_bytes(path, mtz.write_to_bytes())
