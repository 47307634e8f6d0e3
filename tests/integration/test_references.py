"""Scales between equivalents, and what they say of an observation without itself."""

from __future__ import annotations

import numpy as np
import pytest

from xtalfast.integration.references import Observations, leave_one_out, relative_scales


@pytest.fixture(scope="module")
def observed():
    """Two sweeps of 40 deg with smooth scales, every reflection seen four times with the noise that is claimed."""
    rng = np.random.default_rng(3)
    n, mates = 1500, 4
    unique = np.repeat(np.arange(n), mates)
    true = rng.exponential(200.0, n)[unique]
    group, phi = rng.integers(0, 2, n * mates), rng.uniform(0, 40, n * mates)
    scale = np.where(group == 0, 1 + 0.3 * np.sin(phi / 12), 0.5 + 0.01 * phi)
    correction = rng.uniform(0.5, 2.0, n * mates)
    expected = true * scale / correction
    variance = expected + 100
    intensity = expected + rng.normal(size=n * mates) * np.sqrt(variance)
    return Observations(intensity, np.full(n * mates, 250.0), unique, unique >= 0, correction, group, phi), scale, true


def test_scales_are_recovered(observed) -> None:
    data, scale, _ = observed
    found = relative_scales(data) * data.correction
    ratio = found / scale
    assert np.std(ratio / ratio.mean()) < 0.03


def test_an_observation_has_no_part_in_its_own_reference(observed) -> None:
    data, scale, true = observed
    scale = scale / data.correction
    wilson = 200.0 * scale
    expected, known = leave_one_out(data, scale, wilson)
    assert known.all() and (expected > 0).all()
    changed = data.intensity.copy()
    changed[7] += 500
    again, _ = leave_one_out(data._replace(intensity=changed), scale, wilson)
    mates = np.flatnonzero(data.unique == data.unique[7])
    assert again[7] == pytest.approx(expected[7]) and (again[mates[mates != 7]] > expected[mates[mates != 7]]).all()
    strong = true > 300
    assert np.median(np.abs(expected / (true * scale) - 1)[strong]) < 0.06


def test_observations_without_mates_or_values_are_unknown(observed) -> None:
    data, scale, _ = observed
    alone = data._replace(unique=np.arange(len(data.unique)))
    expected, known = leave_one_out(alone, scale, 200.0 * scale)
    assert not known.any() and (expected == 0).all()
    assert np.allclose(relative_scales(alone) * alone.correction, 1.0)
    variance = data.variance.copy()
    variance[data.unique == 3] = -1
    expected, known = leave_one_out(data._replace(variance=variance), scale, 200.0 * scale)
    assert not known[data.unique == 3].any() and known[data.unique != 3].all()
    empty = Observations(*(values[:0] for values in data))
    assert relative_scales(empty).shape == (0,) and leave_one_out(empty, np.zeros(0), np.zeros(0))[0].shape == (0,)
