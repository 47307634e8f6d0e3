"""Scales: one constant per map kind for a data set, and measured amplitudes brought to the scale of computed ones."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import gemmi
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from xtalfast.density.grids import grid_size
from xtalfast.density.maps import B_STANDARD, D_MIN, atoms_of_rows, maps_of_spectrum, spectrum_of_atoms
from xtalfast.density.store import FragmentStore
from xtalfast.errors import InputError

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]

_D_MAX = 4.0  # A; at lower resolution bulk solvent and the regular build of proteins bend a Wilson plot
_MIN_REFLECTIONS = 100
_MAX_STEPS = 100
_CONVERGED = 1e-10


@dataclass(frozen=True)
class MapScale:
    """What maps are divided by, so that those of the training set lie within [-1, 1].

    Attributes:
        patterson: largest |Patterson| of the training fragments, e^2/A^3 (the density paper: 926.581).
        density: largest |density|, e/A^3 (the density paper: 4.404).
    """

    patterson: float
    density: float

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (np.isfinite(value) and value > 0):
                raise InputError(f"scale {name} must be above 0, got {value:g}")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


PAPER_SCALE = MapScale(patterson=926.581, density=4.404)


def count_outside(values: Tensor) -> int:
    """Voxels of scaled maps beyond [-1, 1], where a tanh output cannot follow. They are counted, never clipped."""
    low, high = values.aminmax()  # nearly always enough, at a fifth of the cost
    return 0 if -1 <= low and high <= 1 else int(torch.count_nonzero(values.abs() > 1))


def fit_scale(
    store: FragmentStore,
    *,
    sample: int,
    seed: int = 0,
    d_min: float = D_MIN,
    batch_size: int = 8,
    progress: Callable[[str, int, int], None] | None = None,
) -> MapScale:
    """The constants of a data set: the largest values in the maps of some of its fragments.

    Args:
        store: training fragments.
        sample: how many to look at; all if there are fewer.
        seed: of their choice.
        d_min: A.
        batch_size: maps made at a time.
        progress: called with stage, done, total.

    Raises:
        InputError: an empty store.
    """
    if len(store) == 0:
        raise InputError("a scale is fitted to the training split, which is empty; add structures")
    rows = np.sort(np.random.default_rng(seed).permutation(len(store))[:sample])
    sizes = grid_size(store.arrays["cells"][rows], d_min)
    order = np.lexsort(sizes.T)
    largest = torch.zeros(2, dtype=torch.float64)
    done = 0
    # Runs of equal grids, cut into batches.
    changes = np.flatnonzero((np.diff(sizes[order], axis=0) != 0).any(axis=1)) + 1
    for run in np.split(order, changes):
        for start in range(0, len(run), batch_size):
            picked = run[start : start + batch_size]
            atoms = atoms_of_rows(store, rows[picked])
            x, y, z = sizes[picked[0]].tolist()
            maps = maps_of_spectrum(spectrum_of_atoms(*atoms, (x, y, z), d_min), atoms.cells)
            largest = torch.maximum(largest, torch.stack([one.abs().max() for one in maps]))
            done += len(picked)
            if progress:
                progress("fit scale", done, len(rows))
    return MapScale(patterson=float(largest[0]), density=float(largest[1]))


@dataclass(frozen=True)
class AmplitudeScale:
    """How measured amplitudes relate to computed ones: |F| = k |F of atoms at rest| exp(-b s^2 / 4), s = 1/d.

    Attributes:
        k: scale of the amplitudes.
        b: overall B factor, A^2.
    """

    k: float
    b: float

    @classmethod
    def parse(cls, text: str, option: str = "--scale") -> AmplitudeScale:
        """`K,B` from the command line."""
        try:
            k, b = (float(part) for part in text.split(","))
        except ValueError as error:
            raise InputError(f"{option} wants K,B (two numbers), got {text!r}") from error
        if not (k > 0 and np.isfinite([k, b]).all()):
            raise InputError(f"{option} wants K above 0 and a finite B, got {text!r}")
        return cls(k, b)

    def apply(self, f: ArrayLike, inverse_d2: ArrayLike, *, b: float = B_STANDARD) -> Array:
        """Amplitudes [N] on the absolute scale with the overall B factor `b` (A^2); inverse_d2 = 1/d^2 [N]."""
        return np.asarray(f, float) / self.k * np.exp((self.b - b) / 4 * np.asarray(inverse_d2, float))


def fit_wilson(
    hkl: ArrayLike,
    f: ArrayLike,
    cell: gemmi.UnitCell,
    element: ArrayLike,
    *,
    space_group: gemmi.SpaceGroup | None = None,
    d_max: float = _D_MAX,
) -> AmplitudeScale:
    """Scale and overall B of measured amplitudes from the composition of the cell, by maximum likelihood.

    Intensities follow Wilson's distribution with mean eps k^2 sum_j f_j(s)^2 exp(-B s^2 / 2). The fit needs no
    resolution bins and follows any change of scale or B of the data exactly.

    Args:
        hkl: Miller indices [N, 3], each reflection once.
        f: amplitudes [N], finite, >= 0.
        cell: unit cell.
        element: atomic numbers of the atoms in the asymmetric unit [M].
        space_group: P 1 when not given.
        d_max: A; reflections at lower resolution are left out, unless fewer than 100 would remain.

    Raises:
        InputError: amplitudes missing, negative, not finite or all zero, or no atoms.
    """
    hkl, f, element = np.asarray(hkl, np.int32), np.asarray(f, float), np.asarray(element, np.int64)
    group = space_group or gemmi.SpaceGroup("P 1")
    operations = group.operations()
    if len(element) == 0:
        raise InputError("the composition is empty; give the residues in the asymmetric unit")
    if len(f) == 0 or len(hkl) != len(f):
        raise InputError(f"wanted amplitudes [N] with indices [N, 3], got {len(f)} and {list(hkl.shape)}")
    if not np.isfinite(f).all() or (f < 0).any():
        raise InputError(f"{int((~np.isfinite(f) | (f < 0)).sum())} amplitudes are negative or not finite")
    s2 = cell.calculate_1_d2_array(hkl)
    used = (s2 >= 1 / d_max**2) & (s2 > 0)
    if used.sum() < _MIN_REFLECTIONS:
        used = s2 > 0
    if not f[used].any():
        raise InputError("all amplitudes are zero; there is nothing to scale")
    if used.sum() < _MIN_REFLECTIONS or np.ptp(s2[used]) < 0.05:
        logger.warning("scale and B come from %d reflections only; give --scale K,B if you know them", used.sum())
    hkl, f, s2 = hkl[used], f[used], s2[used]
    epsilon = operations.epsilon_factor_array(hkl)
    weight = np.where(operations.centric_flag_array(hkl), 0.5, 1.0)
    expected = sum_of_squares(element, s2) * len(operations)
    y = f**2 / (epsilon * expected)
    # Gamma regression with log link: log mean = x . p; Fisher scoring, with steps halved while the likelihood falls.
    x = np.stack([np.ones_like(s2), s2 - s2.mean()], axis=1)
    inverse = np.linalg.inv((x * weight[:, None]).T @ x)

    def loss(p: Array) -> float:
        eta = x @ p
        return float(weight @ (eta + y * np.exp(-eta)))

    p = np.array([np.log((weight @ y) / weight.sum()), 0.0])
    value = loss(p)
    for _ in range(_MAX_STEPS):
        step = inverse @ (x.T @ (weight * (y * np.exp(-(x @ p)) - 1)))
        while not (new := loss(p + step)) <= value + 1e-12 * abs(value):
            step = step / 2
        p, value = p + step, new
        if np.abs(x @ step).max() < _CONVERGED:
            break
    return AmplitudeScale(k=float(np.exp((p[0] - p[1] * s2.mean()) / 2)), b=float(-2 * p[1]))


def sum_of_squares(element: ArrayLike, inverse_d2: ArrayLike) -> Array:
    """sum_j f_j(s)^2 of atoms [M] at rest, IT92 form factors, at 1/d^2 [N] (1/A^2)."""
    numbers, counts = np.unique(np.asarray(element), return_counts=True)
    stol2 = np.asarray(inverse_d2, float) / 4
    total = np.zeros_like(stol2)
    for number, count in zip(numbers.tolist(), counts.tolist()):
        coefficients = gemmi.Element(number).it92
        a, b = np.array(coefficients.a), np.array(coefficients.b)
        total += count * (np.exp(-np.outer(stol2, b)) @ a + coefficients.c) ** 2
    return total
