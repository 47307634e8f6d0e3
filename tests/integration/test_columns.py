"""Derived columns against DIALS itself, against predictions made from the crystal, and against closed forms."""

import subprocess
import textwrap

import numpy as np
import pytest

from xtalfast.errors import InputError
from xtalfast.integration import columns
from xtalfast.integration.columns import add_derived_columns, lorentz_polarization, mm_at_px, partiality
from xtalfast.integration.predict import predict
from xtalfast.io import ExperimentList, ReflectionTable, write_expt, write_refl
from xtalfast.models import Beam, Crystal, Detector, Experiment, Goniometer, Panel, Scan, rotation_matrix

DERIVED = ("d", "s1", "zeta", "lp", "qe", "xyzcal.mm", "partiality", "bbox")


def make_experiment(scan_varying=False, n_images=20, identifier="a"):
    """Two panels with sensor and parallax, a tilted beam, a goniometer with a setting, an oblique cell."""
    panels = [
        Panel(
            np.array([x, 30.0, -120.0]),
            np.array([1.0, 0, 0]),
            np.array([0, -1.0, 0]),
            (0.172, 0.172),
            (200, 350),
            trusted_range=(0, 60000),
            thickness=0.45,
            mu=3.8,
            material="Si",
            parallax=True,
            raw_image_offset=(i * 200, 0),
            name=f"p{i}",
        )
        for i, x in enumerate((-37.0, 2.0))
    ]
    A = rotation_matrix(np.array([1.0, 2, 3]), 0.7) @ np.linalg.inv([[41, 0, 0], [3, 52, 0], [-6, 2, 61.0]])
    points = None
    if scan_varying:
        points = np.stack([rotation_matrix(np.array([0, 1.0, 1]), 2e-4 * i) @ A for i in range(n_images + 1)])
    return Experiment(
        Beam(np.array([0.002, -0.001, 1.0]), 0.97, polarization_normal=np.array([0.6, 0.8, 0.0])),
        Detector(panels),
        Goniometer(np.array([1.0, 0, 0]), setting=rotation_matrix(np.array([0, 0, 1.0]), 0.05)),
        Scan((1, n_images), (10.0, 0.5)),
        Crystal(A, " P 1", points),
        {"__id__": "gaussian_rs", "n_sigma": 3.0, "sigma_b": 0.04, "sigma_m": 0.1},
        {"__id__": "ImageSequence", "template": "image_####.cbf"},
        identifier,
    )


def make_table(experiment, **extra):
    found = predict(experiment, 1.6)
    table = ReflectionTable.from_columns({"miller_index": found.hkl, "xyzcal.px": found.xyz_px, **extra})
    return table, found


@pytest.mark.parametrize("scan_varying", [False, True], ids=["static", "scan-varying"])
def test_position_gives_back_the_prediction(scan_varying):
    """s1, panel and phi follow from the position alone, also for a crystal that moves."""
    experiment = make_experiment(scan_varying)
    table, found = make_table(experiment)
    assert len(table) > 200
    add_derived_columns(table, [experiment])
    np.testing.assert_array_equal(table["panel"], found.panel)
    np.testing.assert_allclose(table["s1"], found.s1, rtol=0, atol=1e-9)
    np.testing.assert_allclose(table["xyzcal.mm"], found.xyz_mm, rtol=0, atol=1e-7)
    np.testing.assert_allclose(np.linalg.norm(table["s1"], axis=1), 1 / 0.97)
    d = [experiment.crystal.cell.calculate_d(hkl) for hkl in found.hkl.tolist()]
    np.testing.assert_allclose(table["d"], d, rtol=1e-9)
    if not scan_varying:  # Bragg's law links d, from the cell, to s1, from the detector
        q = np.linalg.norm(table["s1"] - experiment.beam.s0, axis=1)
        np.testing.assert_allclose(q * table["d"], 1, rtol=1e-7)


ORACLE = """
import sys, numpy as np
from dials.array_family import flex
from dxtbx.model.experiment_list import ExperimentListFactory
experiments = ExperimentListFactory.from_json_file(sys.argv[1], check_format=False)
table = flex.reflection_table.from_file(sys.argv[2])
table.compute_d(experiments)
table.compute_zeta_multi(experiments)
table.compute_corrections(experiments)
table.compute_bbox(experiments)
table.compute_partiality(experiments)
vec = lambda c, n: np.array(list(c)).reshape(-1, n)
np.savez(sys.argv[3], d=table["d"], zeta=table["zeta"], lp=table["lp"], qe=table["qe"],
         partiality=table["partiality"], bbox=vec(table["bbox"], 6))
"""


@pytest.mark.dials
def test_agrees_with_dials(tmp_path):
    experiment = make_experiment(scan_varying=True)
    table, _ = make_table(experiment)
    add_derived_columns(table, [experiment])
    write_expt(tmp_path / "a.expt", ExperimentList.from_experiments([experiment]))
    write_refl(tmp_path / "a.refl", table)
    (tmp_path / "oracle.py").write_text(textwrap.dedent(ORACLE))
    names = [str(tmp_path / name) for name in ("oracle.py", "a.expt", "a.refl", "dials.npz")]
    subprocess.run(["/usr/bin/python3", *names], check=True, capture_output=True, timeout=120)
    dials = np.load(tmp_path / "dials.npz")
    for name in ("d", "zeta", "lp", "qe", "partiality"):
        np.testing.assert_allclose(table[name], dials[name], rtol=1e-9, atol=1e-12, err_msg=name)
    np.testing.assert_array_equal(table["bbox"], dials["bbox"])


def test_parallax_is_undone_exactly():
    panel = make_experiment().detector[0]
    xy = np.random.default_rng(0).uniform(0, 200, (100, 2))
    np.testing.assert_allclose(panel.px_from_mm(mm_at_px(panel, xy)), xy, rtol=0, atol=1e-9)


def test_polarization_of_an_unpolarized_beam():
    """A beam that is half polarised along each axis has P = (1 + cos^2 2theta) / 2, whatever the azimuth."""
    beam = Beam(np.array([0, 0, 1.0]), 1.0, polarization_fraction=0.5)
    two_theta, azimuth = np.random.default_rng(0).uniform(0.1, 1.4, (2, 50))
    s1 = np.stack([np.sin(two_theta) * np.cos(azimuth), np.sin(two_theta) * np.sin(azimuth), -np.cos(two_theta)], 1)
    np.testing.assert_allclose(lorentz_polarization(beam, s1, None), 2 / (1 + np.cos(two_theta) ** 2))


def test_partialities_of_adjoining_boxes_add_up():
    zeta, z = np.full(4, 0.7), np.array([3.2, 0.1, 9.9, 5.0])
    whole = partiality(np.zeros(4), np.full(4, 10.0), z, zeta, 0.01, 0.005)
    parts = [partiality(np.full(4, a), np.full(4, b), z, zeta, 0.01, 0.005) for a, b in ((0, 4), (4, 7), (7, 10))]
    np.testing.assert_allclose(sum(parts), whole)
    everything = partiality(np.full(4, -1e4), np.full(4, 1e4), z, zeta, 0.01, 0.005)
    np.testing.assert_allclose(everything, 1)


def test_columns_that_are_there_are_kept_unless_recomputed():
    experiment = make_experiment()
    table, found = make_table(experiment, lp=np.full(len(predict(experiment, 1.6)), 7.0))
    add_derived_columns(table, [experiment])
    assert (table["lp"] == 7).all() and (table["flags"] == 1).all() and (table["id"] == 0).all()
    np.testing.assert_array_equal(table["partial_id"], np.arange(len(found)))
    np.testing.assert_array_equal(table["xyzobs.px.value"], found.xyz_px)
    first = {name: table[name].copy() for name in DERIVED}
    table["flags"] = np.full(len(table), 513, np.uint64)
    add_derived_columns(table, [experiment], recompute=True)
    assert (table["lp"] < 5).all() and (table["flags"] == 513).all()
    for name in set(DERIVED) - {"lp"}:
        np.testing.assert_array_equal(table[name], first[name], err_msg=name)


def test_odd_rows_stay():
    experiment = make_experiment()
    table, _ = make_table(experiment)
    position = table["xyzcal.px"].copy()
    position[0], position[1, 2], position[2, 2] = np.nan, np.inf, -7.3
    table["xyzcal.px"] = position
    table["id"] = np.where(np.arange(len(table)) == 3, -1, 0).astype(np.int32)
    add_derived_columns(table, [experiment])
    for row in (0, 1, 3):
        assert np.isnan(table["s1"][row]).all() and not table["bbox"][row].any() and table["partiality"][row] == 0
    assert np.isfinite(table["d"][:3]).all() and np.isnan(table["d"][3])
    assert table["bbox"][2, 4:].tolist() == [0, 1] and table["partiality"][2] < 0.01
    assert np.isfinite(table["s1"][4:]).all()


def test_stills_and_no_profile():
    experiment = make_experiment()
    table, found = make_table(experiment)
    still = Experiment(experiment.beam, experiment.detector, crystal=experiment.crystal)
    position = found.xyz_px.copy()
    position[:, 2] = 0
    table["xyzcal.px"] = position
    add_derived_columns(table, [still])
    assert "zeta" not in table and (table["partiality"] == 1).all()
    size = table["bbox"][:, 1::2] - table["bbox"][:, ::2]
    assert (size == [21, 21, 1]).all()
    assert (table["xyzobs.px.value"][:, 2] == 0.5).all()


def test_empty_table():
    table = ReflectionTable.from_columns({"miller_index": np.zeros((0, 3), np.int32), "xyzcal.px": np.zeros((0, 3))})
    add_derived_columns(table, [make_experiment()])
    assert len(table) == 0 and table["bbox"].shape == (0, 6)


def test_identifiers_decide_which_experiment_a_row_has():
    a, b = make_experiment(identifier="a"), make_experiment(identifier="b")
    table, _ = make_table(a)
    table["id"] = np.arange(len(table), dtype=np.int32) % 2
    table.identifiers = {0: "b", 1: "a"}
    np.testing.assert_array_equal(columns.experiment_index(table, [a, b]), 1 - table["id"])
    assert [len(rows) for _, rows in columns.rows_of_experiments(table, [a, b])] == [len(table) // 2] * 2 or len(
        table
    ) % 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.__delitem__("xyzcal.px"), "no column 'xyzcal.px'"),
        (lambda t: t.__setitem__("id", np.full(len(t), 3, np.int32)), "id 3 in the reflections, but there are 1"),
        (lambda t: t.__setitem__("panel", np.full(len(t), 9, np.uint64)), "panel 9 in the reflections"),
        (lambda t: t.identifiers.update({0: "other"}), "identifier 'other'"),
    ],
    ids=["no-position", "id", "panel", "identifier"],
)
def test_bad_tables(change, message):
    experiment = make_experiment()
    table, _ = make_table(experiment)
    table["id"] = np.zeros(len(table), np.int32)
    change(table)
    with pytest.raises(InputError, match=message):
        add_derived_columns(table, [experiment])


def test_several_experiments_need_ids():
    experiment = make_experiment()
    table, _ = make_table(experiment)
    with pytest.raises(InputError, match="no column 'id', but 2 experiments"):
        add_derived_columns(table, [experiment, experiment])
