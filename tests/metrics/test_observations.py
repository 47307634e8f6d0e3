"""Which rows of a file count as observations, and with which corrections."""

from __future__ import annotations

from types import SimpleNamespace

import gemmi
import numpy as np
import pytest

from xtalfast.errors import InputError
from xtalfast.io import ExperimentList, Flag, ReflectionTable, write_expt, write_refl
from xtalfast.metrics import load_observations, stats_for_file
from xtalfast.metrics.observations import median_cell, select_observations
from xtalfast.models import Beam, Crystal, Detector, Experiment, Panel

pytest.importorskip("msgpack", reason="reading .refl needs the extra io")

CELL, GROUP = gemmi.UnitCell(30, 30, 50, 90, 90, 90), gemmi.SpaceGroup("P 43 21 2")


def make_table(n: int = 6, **columns) -> ReflectionTable:
    """n good rows; keyword arguments replace or add columns (dots in names written as double underscores)."""
    base = {
        "miller_index": np.stack([np.arange(1, n + 1), np.full(n, 2), np.full(n, 3)], 1).astype(np.int32),
        "id": np.zeros(n, np.int32),
        "flags": np.full(n, int(Flag.Predicted | Flag.IntegratedSum | Flag.IntegratedPrf), np.uint64),
        "intensity.prf.value": np.linspace(10, 60, n),
        "intensity.prf.variance": np.linspace(4, 9, n),
        "intensity.sum.value": np.linspace(11, 61, n),
        "intensity.sum.variance": np.linspace(5, 10, n),
    }
    base.update({name.replace("__", "."): np.asarray(values) for name, values in columns.items()})
    return ReflectionTable.from_columns(base)


def test_corrections_of_dials_scale():
    lp, qe, partiality = np.linspace(0.5, 1.5, 6), np.linspace(0.8, 0.9, 6), np.linspace(0.5, 1, 6)
    table = make_table(lp=lp, qe=qe, partiality=partiality)
    prf = select_observations(table, CELL, GROUP, "prf")
    np.testing.assert_allclose(prf.I, table["intensity.prf.value"] * lp / qe)
    np.testing.assert_allclose(prf.sigI, np.sqrt(table["intensity.prf.variance"]) * lp / qe)
    total = select_observations(table, CELL, GROUP, "sum")
    np.testing.assert_allclose(total.I, table["intensity.sum.value"] * lp / qe / partiality)
    np.testing.assert_allclose(total.sigI, np.sqrt(table["intensity.sum.variance"]) * lp / qe / partiality)
    assert prf.scaling == total.scaling == "unscaled"


def test_scaled_intensities_are_divided_by_the_scale_and_preferred():
    scale = np.array([0.5, 1, 2, 4, -1, 1])
    flags = make_table()["flags"].copy()
    flags[5] |= np.uint64(Flag.OutlierInScaling)
    table = make_table(
        flags=flags, inverse_scale_factor=scale, intensity__scale__value=np.full(6, 8.0),
        intensity__scale__variance=np.full(6, 4.0), lp=np.full(6, 9.0),
    )  # fmt: skip
    data = select_observations(table, CELL, GROUP)
    assert (data.channel, data.scaling) == ("scale", "scaled")
    np.testing.assert_allclose(data.I, [16, 8, 4, 2])
    np.testing.assert_allclose(data.sigI, [4, 2, 1, 0.5])
    assert data.rejected == {"bad for scaling": 1, "inverse_scale_factor <= 0": 1}


def test_rows_left_out_are_counted_once_with_their_reason():
    flags = make_table()["flags"].copy()
    flags[0] = int(Flag.IntegratedSum)
    variance = make_table()["intensity.prf.variance"].copy()
    variance[1] = 0
    value = make_table()["intensity.prf.value"].copy()
    value[2] = -100.0
    index = make_table()["miller_index"].copy()
    index[3] = 0
    partiality = np.array([1, 1, 1, 0.1, 0.39, 1])
    table = make_table(
        flags=flags, intensity__prf__variance=variance, intensity__prf__value=value, miller_index=index,
        partiality=partiality,
    )  # fmt: skip
    data = select_observations(table, CELL, GROUP, "prf")
    assert data.rejected == {
        "not indexed": 1,
        "not integrated": 1,
        "partiality < 0.4": 1,
        "no positive variance": 1,
        "I/sigI < -5": 1,
    }
    np.testing.assert_array_equal(data.hkl, table["miller_index"][5:])


def test_bad_tables():
    table = make_table()
    with pytest.raises(InputError, match="channel must be one of scale, prf, vi, q, sum"):
        select_observations(table, CELL, GROUP, "profile")
    with pytest.raises(InputError, match=r"intensity\.vi\.value.*present"):
        select_observations(table, CELL, GROUP, "vi")
    nothing = make_table(flags=np.ones(6, np.uint64))
    with pytest.raises(InputError, match=r"no usable intensity\.prf in 6 rows; left out: 6 not integrated"):
        select_observations(nothing, CELL, GROUP, "prf")
    nan = make_table(intensity__prf__value=np.full(6, np.nan))
    with pytest.raises(InputError, match="6 no positive variance"):
        select_observations(nan, CELL, GROUP, "prf")


def test_median_cell_and_common_space_group():
    def crystal(a: float, hall: str = " P 4nw 2abw"):
        return SimpleNamespace(crystal=Crystal(np.diag([1 / a, 1 / a, 1 / 50]), hall))

    cell, group = median_cell([crystal(30), crystal(31), crystal(40)])
    assert cell.parameters == pytest.approx((31, 31, 50, 90, 90, 90))
    assert group.hm == "P 43 21 2"
    with pytest.raises(InputError, match="must share one space group, got P 1, P 43 21 2"):
        median_cell([crystal(30), crystal(30, " P 1")])
    with pytest.raises(InputError, match="no crystal model"):
        median_cell([SimpleNamespace(crystal=None)])


def test_refl_finds_the_models_of_the_same_name(tmp_path):
    panel = Panel(np.array([-50.0, 50, -200]), np.array([1.0, 0, 0]), np.array([0, -1.0, 0]), (0.1, 0.1), (1000, 1000))
    crystal = Crystal(np.diag([1 / 30, 1 / 30, 1 / 50]), " P 4nw 2abw")
    experiment = Experiment(Beam(np.array([0, 0, 1.0]), 1.0), Detector([panel]), crystal=crystal, identifier="one")
    models = ExperimentList.from_experiments([experiment])
    table = make_table(xyzcal__px=np.column_stack([np.zeros((6, 2)), np.arange(6) + 0.5]))
    write_refl(tmp_path / "data.refl", table)
    write_expt(tmp_path / "data.expt", models)
    write_expt(tmp_path / "other.expt", models)
    data = load_observations(tmp_path / "data.refl")
    assert data.label == "data.refl (prf, unscaled)"
    assert data.cell.parameters == pytest.approx(CELL.parameters)
    np.testing.assert_array_equal(data.batch, np.arange(1, 7))
    np.testing.assert_allclose(load_observations(tmp_path / "data.refl", tmp_path / "other.expt", "sum").I[0], 11)
    assert "unscaled: agreement is before any scaling" in stats_for_file(tmp_path / "data.refl", n_bins=1).table()


def write_mtz(path, hkl, labels: dict[str, tuple[str, np.ndarray]], batches: bool) -> None:
    mtz = gemmi.Mtz(with_base=True)
    mtz.spacegroup = GROUP
    mtz.set_cell_for_all(CELL)
    mtz.add_dataset("data")
    for label, (kind, _) in labels.items():
        mtz.add_column(label, kind)
    if batches:
        mtz.batches.append(gemmi.Mtz.Batch())
    mtz.set_data(np.column_stack([hkl, *(values for _, values in labels.values())]).astype(np.float32))
    mtz.write_to_file(str(path))


def test_unmerged_mtz_keeps_friedel_mates_apart(tmp_path):
    hkl = np.tile([[3, 2, 1], [4, 2, 1]], (4, 1))
    isym = np.array([1, 1, 2, 2, 1, 1, 4, 4])
    I = np.array([10, 20, 30, 40, 11, 21, 31, 41.0])
    columns = {"M/ISYM": ("Y", isym), "BATCH": ("B", np.arange(1, 9)), "I": ("J", I), "SIGI": ("Q", np.ones(8))}
    write_mtz(tmp_path / "unmerged.mtz", hkl, columns, batches=True)
    data = load_observations(tmp_path / "unmerged.mtz")
    np.testing.assert_array_equal(data.hkl[isym % 2 == 0], -hkl[isym % 2 == 0])
    np.testing.assert_array_equal(data.batch, np.arange(1, 9))
    result = stats_for_file(tmp_path / "unmerged.mtz", n_bins=1)
    assert (result.overall.n_obs, result.overall.n_unique, result.overall.anom_multiplicity) == (8, 2, 2)
    assert result.overall.r_merge_anom < 0.05 < result.overall.r_merge
    assert result.scaling == "as in file"


def test_merged_mtz_gives_only_what_is_defined(tmp_path):
    hkl = gemmi.make_miller_array(CELL, GROUP, 4.0)
    columns = {"IMEAN": ("J", np.full(len(hkl), 20.0)), "SIGIMEAN": ("Q", np.full(len(hkl), 4.0))}
    write_mtz(tmp_path / "merged.mtz", hkl, columns, batches=False)
    result = stats_for_file(tmp_path / "merged.mtz", n_bins=3)
    assert result.merged
    assert result.overall.n_unique == len(hkl)
    assert result.overall.completeness == 1
    assert result.overall.mean_I_over_sigma == pytest.approx(5)
    for name in ("r_merge", "r_pim", "cc_half", "cc_anom", "multiplicity", "anom_completeness"):
        assert np.isnan(getattr(result.overall, name))


def test_bad_files(tmp_path):
    (tmp_path / "broken.mtz").write_bytes(b"not an mtz file, only a few words that fill the header" * 4)
    with pytest.raises(InputError, match="cannot be read as MTZ"):
        load_observations(tmp_path / "broken.mtz")
    (tmp_path / "data.hkl").write_text("")
    with pytest.raises(InputError, match=r"want a \.refl or \.mtz file"):
        load_observations(tmp_path / "data.hkl")
    (tmp_path / "lonely.refl").write_bytes(b"")
    with pytest.raises(InputError, match=r"no unit cell .* give the models with --expt models\.expt"):
        load_observations(tmp_path / "lonely.refl")
    hkl = gemmi.make_miller_array(CELL, GROUP, 6.0)
    write_mtz(tmp_path / "phases.mtz", hkl, {"PHI": ("P", np.zeros(len(hkl)))}, batches=False)
    with pytest.raises(InputError, match="no column 'IMEAN'; intensity columns present: none"):
        load_observations(tmp_path / "phases.mtz")
