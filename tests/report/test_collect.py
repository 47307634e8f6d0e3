"""What the report of an integration shows is what the run wrote."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from xtalfast.integration.fit import load_checkpoint
from xtalfast.integration.integrate import integrate, open_prepared
from xtalfast.integration.model import NetworkProfiles
from xtalfast.integration.outputs import RunResults
from xtalfast.io import Flag, read_refl
from xtalfast.report.collect import report_data


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """The results of an integration, taken up from the finished one, and its record."""
    directory = tmp_path_factory.mktemp("collect") / "out"
    checkpoint = next(tiny_run.directory.glob("training/*/best.ckpt"))
    result = integrate(tiny_run.data.expt, tiny_run.data.refl, directory, weights=checkpoint)
    prepared = open_prepared(directory)
    network = NetworkProfiles(load_checkpoint(checkpoint), prepared.store, reference_profiles=prepared.profiles)
    source = read_refl(tiny_run.data.refl)
    return result, RunResults(
        source, result.table, result.experiments, prepared.store, prepared.profiles, network, result.estimates
    )


def collect(run, **parameters):
    result, results = run
    record = json.loads(json.dumps(result.record, default=str))
    record["parameters"] |= {"truth": None} | parameters
    return report_data(record, {"epochs": None, "seed": 0, "truth": None}, results, [], result.files)


def test_figures_are_those_of_the_table(run):
    data, table = collect(run, epochs=5), run[0].table
    assert data.key_figures["reflections"] == "249"
    assert data.key_figures["profile-fitted"] == str(table.has_flags(Flag.IntegratedPrf).sum())
    assert data.flags["IntegratedSum"] == table.has_flags(Flag.IntegratedSum).sum()
    assert data.changed == ["epochs"]
    assert data.files == [path.name for path in run[0].files]
    assert data.title == "Integration of predicted.refl"


def test_shoeboxes_show_the_counts_and_a_model_that_fits_them(run):
    data, (_, results) = collect(run), run
    assert {shoebox.group for shoebox in data.shoeboxes}
    by_place = {tuple(np.round(xyz, 2)): row for row, xyz in enumerate(results.store.metadata["xyzcal_px"][:])}
    for shoebox in data.shoeboxes:
        row = by_place[tuple(np.round(np.float32(shoebox.xyz_px), 2))]
        np.testing.assert_array_equal(shoebox.counts.ravel(), results.store.counts(np.array([row]))[0])
        assert shoebox.counts.shape == shoebox.model.shape == shoebox.mask.shape == (3, 21, 21)
        used = shoebox.mask
        expected, seen = shoebox.model[used].sum(), shoebox.counts[used].sum()
        assert abs(seen - expected) < 6 * np.sqrt(expected + 1)


def test_profiles_over_the_detector_are_shapes(run):
    grid = collect(run).profiles
    assert grid is not None
    assert grid.n.sum() == run[0].table.has_flags(Flag.IntegratedPrf).sum()
    for cell in grid.profiles[grid.n > 0]:
        assert cell.sum() == pytest.approx(1, abs=1e-3)
        y, x = np.unravel_index(cell.argmax(), cell.shape)
        assert abs(y - 10) <= 1 and abs(x - 10) <= 1


def test_comparisons(run, tiny_run):
    names = [comparison.name for comparison in collect(run).comparisons]
    assert names == ["our summation"]
    truth, summation = collect(run, truth=str(tiny_run.data.truth)).comparisons
    assert truth.is_truth and not summation.is_truth
    strong = truth.reference > 300
    ratio = np.median(truth.value[strong] / truth.reference[strong])
    assert 0.9 < ratio < 1.1


def test_intensities_of_the_input_are_compared(run):
    result, results = run
    source = results.source.copy()
    source["flags"] = np.asarray(source["flags"]) | np.uint64(Flag.IntegratedPrf)
    source["intensity.prf.value"] = np.full(len(source), 7.0)
    names = [c.name for c in collect((result, replace(results, source=source))).comparisons]
    assert names == ["our summation", "the input's profile fit"]


def test_outliers_are_sorted_by_their_misfit(run):
    result, results = run
    columns = dict(results.estimates.columns)
    columns["intensity.sum.value"] = columns["intensity.sum.value"].copy()
    fitted = np.flatnonzero(results.estimates.integrated_prf & (columns["intensity.sum.variance"] > 0))
    columns["intensity.sum.value"][fitted[:2]] += [1e4, 1e5]
    spoiled = replace(results, estimates=replace(results.estimates, columns=columns))
    outliers = collect((result, spoiled)).outliers
    differences = [float(row["difference / sigma"]) for row in outliers]
    assert len(outliers) >= 2 and differences == sorted(differences, reverse=True)
    assert {row["row"] for row in outliers[:2]} == set(results.store.metadata["row"][fitted[:2]].tolist())
