"""True intensities: Wilson's statistics or a structure, with symmetry, systematic absences and Friedel differences."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import gemmi
import numpy as np
from numpy.typing import NDArray

from xtalfast.errors import InputError
from xtalfast.metrics.equivalents import canonical_index
from xtalfast.models import Array


@dataclass(frozen=True)
class TrueIntensities:
    """F^2 of the unique reflections of both Friedel mates; look observations up with `of`."""

    cell: gemmi.UnitCell
    space_group: gemmi.SpaceGroup
    key: NDArray[np.int64]  # [U] sorted `canonical_index`
    plus: Array  # [U] F^2 of I(+)
    minus: Array  # [U] F^2 of I(-)

    def of(self, hkl: NDArray) -> tuple[Array, NDArray[np.bool_]]:
        """F^2 [N] and whether it is I(+) [N] of Miller indices [N, 3]; 0 for reflections not in the list."""
        key, is_plus = canonical_index(hkl, self.space_group)
        if len(self.key) == 0:
            return np.zeros(len(key)), is_plus
        place = np.minimum(np.searchsorted(self.key, key), len(self.key) - 1)
        intensity = np.where(is_plus, self.plus[place], self.minus[place])
        return np.where(self.key[place] == key, intensity, 0.0), is_plus

    def with_zeros(self, fraction: float, rng: np.random.Generator) -> TrueIntensities:
        """The same, with this fraction of the unique reflections drawn to be 0."""
        keep = rng.random(len(self.key)) >= fraction
        return replace(self, plus=self.plus * keep, minus=self.minus * keep)


def wilson_intensities(
    cell: gemmi.UnitCell,
    space_group: gemmi.SpaceGroup,
    d_min: float,
    b_a2: float,
    anomalous_ratio: float,
    rng: np.random.Generator,
) -> TrueIntensities:
    """Random intensities of a crystal of many equal atoms.

    Acentric F^2 is exponential, centric F^2 chi-square with one degree of freedom, each of mean
    epsilon exp(-2 B s^2), s = 1 / (2 d).

    Args:
        d_min: resolution limit, A.
        b_a2: B of the fall-off, A^2.
        anomalous_ratio: <|F+ - F-|> / <F> of acentric reflections.
        rng: the draws.

    Ref: A. J. C. Wilson, Acta Cryst. 2, 318-321 (1949).
    """
    hkl = np.asarray(gemmi.make_miller_array(cell, space_group, d_min), np.int32)
    operations = space_group.operations()
    epsilon = np.asarray(operations.epsilon_factor_without_centering_array(hkl), float)
    centric = np.asarray(operations.centric_flag_array(hkl))
    normal = rng.standard_normal((2, len(hkl)))
    unit = np.where(centric, normal[0] ** 2, 0.5 * (normal**2).sum(0))
    mean = epsilon * np.exp(-0.5 * b_a2 * cell.calculate_1_d2_array(hkl))
    return _with_anomalous(cell, space_group, hkl, np.sqrt(mean * unit), np.sqrt(mean), anomalous_ratio, rng)


def structure_intensities(
    path: Path, d_min: float, anomalous_ratio: float, rng: np.random.Generator
) -> TrueIntensities:
    """Intensities of an atomic model (PDB or mmCIF), without bulk solvent, from its density by FFT.

    Raises:
        InputError: the file cannot be read, or has no atoms, cell or space group.
    """
    try:
        structure = gemmi.read_structure(str(path))
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"structure {path} cannot be read as PDB or mmCIF: {error}") from error
    group = structure.find_spacegroup()
    if len(structure) == 0 or not structure.cell.is_crystal() or group is None:
        raise InputError(f"structure {path} needs atoms, a unit cell and a space group; give a crystal structure")
    density = gemmi.DensityCalculatorX()
    density.d_min, density.rate = d_min, 1.5
    density.set_refmac_compatible_blur(structure[0])
    density.set_grid_cell_and_spacegroup(structure)
    density.put_model_density_on_grid(structure[0])
    grid = gemmi.transform_map_to_f_phi(density.grid)
    data = grid.prepare_asu_data(dmin=d_min, unblur=density.blur)
    hkl, amplitude = np.asarray(data.miller_array, np.int32), np.abs(np.asarray(data.value_array))
    absent = np.asarray(group.operations().systematic_absences(hkl))
    hkl, amplitude = hkl[~absent], amplitude[~absent].astype(float)
    rms = _shell_rms(structure.cell.calculate_1_d2_array(hkl), amplitude)
    return _with_anomalous(structure.cell, group, hkl, amplitude, rms, anomalous_ratio, rng)


def _shell_rms(s2: Array, amplitude: Array, per_shell: int = 200) -> Array:
    """Root mean square amplitude in the resolution shell of each reflection."""
    order = np.argsort(s2)
    rms = np.empty(len(s2))
    for rows in np.array_split(order, max(1, len(s2) // per_shell)):
        rms[rows] = np.sqrt(np.mean(amplitude[rows] ** 2)) if len(rows) else 0.0
    return rms


def _with_anomalous(
    cell: gemmi.UnitCell,
    space_group: gemmi.SpaceGroup,
    hkl: NDArray[np.int32],
    amplitude: Array,
    rms: Array,
    ratio: float,
    rng: np.random.Generator,
) -> TrueIntensities:
    """Split F into F(+) and F(-) = |F -+ delta|, delta normal and independent of F, none for centric reflections."""
    # <|F+ - F-|> = 2 sigma sqrt(2 / pi) = ratio <F>, and <F> = sqrt(pi) / 2 rms for acentric reflections.
    delta = ratio * np.pi / (4 * np.sqrt(2)) * rms * rng.standard_normal(len(hkl))
    delta[np.asarray(space_group.operations().centric_flag_array(hkl))] = 0.0
    key, _ = canonical_index(hkl, space_group)
    order = np.argsort(key)
    plus, minus = (amplitude + delta) ** 2, (amplitude - delta) ** 2
    return TrueIntensities(cell, space_group, key[order], plus[order], minus[order])
