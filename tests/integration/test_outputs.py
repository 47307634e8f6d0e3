"""What goes into integrated.refl and xtalfast.json, and what is told to the user."""

from __future__ import annotations

import json

import numpy as np
import pytest

from xtalfast.integration.estimate import Estimates
from xtalfast.integration.outputs import counts_of, fill_table, versions
from xtalfast.integration.priors import BackgroundPrior, Priors, WilsonPrior
from xtalfast.integration.store import Reason, ShoeboxStore
from xtalfast.io import Flag, ReflectionTable, read_refl

N = 6
ROWS = np.array([4, 1, 2])  # of the table, for the three rows of the store
ONE = np.ones(1)  # the priors are not looked at
DONE = Flag.IntegratedSum | Flag.IntegratedPrf


@pytest.fixture
def store(tmp_path):
    bbox = np.array([[10, 13, 20, 23, k, k + 1] for k in range(3)], np.int32)
    reason = np.array([0, Reason.Overloaded, 0], np.uint8)
    counts = np.ones((3, 9), np.uint16)
    metadata = {"bbox": bbox, "reason": reason}
    return ShoeboxStore.create(tmp_path / "store", counts, np.ones((3, 9), np.uint8), metadata, box=(1, 3, 3))


@pytest.fixture
def estimates():
    columns = {}
    for k, channel in enumerate(("prf", "sum", "vi", "q"), start=1):
        columns[f"intensity.{channel}.value"] = k * np.array([10.0, 20.0, 30.0])
        columns[f"intensity.{channel}.variance"] = k * np.array([1.0, 2.0, 3.0])
    flags = np.array([DONE, DONE, 0], np.uint64)
    return Estimates(columns, flags, Priors(WilsonPrior(ONE, ONE), BackgroundPrior(ONE, ONE, ONE)))


def table(flags=0):
    return ReflectionTable(
        {
            "miller_index": np.arange(3 * N, dtype=np.int32).reshape(N, 3),
            "bbox": np.zeros((N, 6), np.int32),
            "flags": np.full(N, flags, np.uint64),
            "intensity.prf.value": np.full(N, 99.0),
            "intensity.scale.value": np.full(N, 99.0),
            "inverse_scale_factor": np.full(N, 2.0),
            "extra": np.arange(N, dtype=np.float64),
        },
        {0: "crystal"},
    )


def test_estimates_go_to_their_rows(store, estimates):
    source = table()
    filled = fill_table(source, store, ROWS, estimates)
    assert filled["intensity.prf.value"].tolist() == [0, 20, 30, 0, 10, 0]
    assert filled["intensity.prf.variance"].tolist() == [-1, 2, 3, -1, 1, -1]  # DIALS leaves out variances <= 0
    np.testing.assert_array_equal(filled["bbox"][ROWS], store.metadata["bbox"])
    assert not filled["bbox"][[0, 3, 5]].any()
    for name in ("miller_index", "extra"):
        np.testing.assert_array_equal(filled[name], source[name])
    assert filled.identifiers == {0: "crystal"}
    assert source["intensity.prf.value"].tolist() == [99.0] * N and not source["flags"].any()


def test_nothing_of_an_earlier_integration_survives(store, estimates):
    earlier = Flag.IntegratedPrf | Flag.Scaled | Flag.BadForScaling | Flag.UsedInRefinement | Flag.Strong
    filled = fill_table(table(int(earlier)), store, ROWS, estimates)
    assert "intensity.scale.value" not in filled and "inverse_scale_factor" not in filled
    integrated = np.isin(np.arange(N), ROWS[:2])
    np.testing.assert_array_equal(filled.has_flags(DONE), integrated)
    assert not filled.has_flags(Flag.Scaled | Flag.BadForScaling).any()
    assert filled.has_flags(Flag.UsedInRefinement).all() and filled.has_flags(Flag.Strong).all()
    assert filled.has_flags(Flag.Predicted).all()
    np.testing.assert_array_equal(filled.has_flags(Flag.Overloaded), np.arange(N) == 1)


def test_counts(store, estimates):
    counts = counts_of(fill_table(table(), store, ROWS, estimates), store)
    assert counts["reflections"] == N and counts["shoeboxes"] == 3
    assert counts["integrated_prf"] == counts["integrated_sum"] == 2
    assert counts["not_integrated"] == 4 and counts["overloaded"] == 1


def test_published_posterior(store, estimates):
    filled = fill_table(table(), store, ROWS, estimates, publish="posterior")
    for part in ("value", "variance"):
        np.testing.assert_array_equal(filled[f"intensity.prf.{part}"], filled[f"intensity.q.{part}"])
    usual = fill_table(table(), store, ROWS, estimates)
    np.testing.assert_array_equal(filled["flags"], usual["flags"])


def test_flags_say_what_was_integrated(tiny_run):
    written = read_refl(tiny_run.directory / "integrated.refl")
    given = read_refl(tiny_run.data.refl)
    assert written.has_flags(Flag.Predicted).all()
    for flag, channel in ((Flag.IntegratedPrf, "prf"), (Flag.IntegratedSum, "sum")):
        done = written.has_flags(flag)
        assert 0 < done.sum() < len(done)
        assert (written[f"intensity.{channel}.variance"][done] > 0).all()
        assert np.isfinite(written[f"intensity.{channel}.value"]).all()
    assert not (given["flags"] & ~written["flags"]).any()  # no flag of the prediction is lost


def test_record_agrees_with_the_table(tiny_run):
    written = read_refl(tiny_run.directory / "integrated.refl")
    record = json.loads((tiny_run.directory / "xtalfast.json").read_text())
    counts = record["counts"]
    assert counts["reflections"] == len(written) == 249
    assert counts["integrated_prf"] == written.has_flags(Flag.IntegratedPrf).sum()
    assert counts["integrated_sum"] == written.has_flags(Flag.IntegratedSum).sum()
    assert counts["not_integrated"] == (~written.has_flags(Flag.Integrated)).sum()
    small = record["store"]["reasons"]["SmallBox"]
    assert any(f"{small} of 249 boxes hold less than 95 %" in warning for warning in record["warnings"])
    assert record["versions"].items() <= versions().items()
    assert all(seconds >= 0 for seconds in record["seconds"].values())
