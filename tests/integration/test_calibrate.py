"""Pulls that a data set gives of itself, on spots whose sigmas are right and on such whose are not."""

from __future__ import annotations

import json

import numpy as np
import pytest

import xtalfast
from xtalfast.integration.calibrate import Calibration, calibrate
from xtalfast.integration.estimate import estimate
from xtalfast.integration.integrate import open_prepared
from xtalfast.integration.simulate import SimulationConfig, simulate


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("calibrate")
    files = simulate(directory / "data", SimulationConfig(n_images=8, d_min=2.6, photons_mean=1000.0))
    result = xtalfast.integrate(files.expt, files.refl, directory / "out", calibrate=True)
    return result, open_prepared(directory / "out")


def pooled(calibration: Calibration, high: float) -> float:
    bins = [b for b in calibration.bins if b.high <= high]
    return float(np.sqrt(sum(b.n * b.sd**2 for b in bins) / sum(b.n for b in bins)))


def test_calibrated_sigmas_are_found_to_be_so(run) -> None:
    result, prepared = run
    record = json.loads((prepared.directory / "xtalfast.json").read_text())
    assert [c["name"] for c in record["calibration"]][:2] == ["simulation", "halves"]
    report = (prepared.directory / "report.html").read_text()
    assert "simulation" in report and "halves" in report
    found = calibrate(
        prepared.store, prepared.profiles, prepared.experiments, result.estimates, reference=prepared.profiles
    )
    assert [c.to_json() for c in found] == record["calibration"]
    for calibration in found[:2]:
        assert calibration.bins[0].low == 0 and sum(b.n for b in calibration.bins) > 300
        assert 0.9 < pooled(calibration, 20.0) < 1.1
        for b in calibration.bins:
            if b.n > 100:
                assert abs(b.coverage_68 - 0.683) < 0.1 and abs(b.coverage_95 - 0.95) < 0.06


def test_counts_that_are_no_photons_are_seen_by_the_mates(run) -> None:
    _, prepared = run
    store = prepared.store

    class Fourfold:
        """Every photon counted four times: Poisson sigmas are half of what they should be."""

        box, n, metadata, dtype = None, store.n, store.metadata, store.dtype

        def by_size(self, rows=None):
            for view in store.by_size(rows):
                counts = view.counts
                view.counts = lambda at, counts=counts: counts(at).astype(np.int32) * 4
                yield view

    fourfold = Fourfold()
    found = estimate(fourfold, prepared.profiles, prepared.experiments, reference=prepared.profiles)
    result = calibrate(fourfold, prepared.profiles, prepared.experiments, found, reference=prepared.profiles)
    mates = [c for c in result if c.name == "mates"]
    assert mates and pooled(mates[0], 20.0) > 1.5  # symmetry mates tell; simulation and thinning cannot
