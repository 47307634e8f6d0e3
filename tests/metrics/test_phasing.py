"""Phase statistics per shell against what was put in."""

from __future__ import annotations

import json

import gemmi
import numpy as np

from xtalfast.metrics.phasing import phase_difference, phase_statistics

CELL = gemmi.UnitCell(20, 25, 30, 90, 95, 90)
HKL = np.array(gemmi.make_miller_array(CELL, gemmi.SpaceGroup("P 1"), 2.0))


def test_difference_is_cyclic():
    first, second = np.exp(1j * np.radians([179, 10, 0])), np.exp(1j * np.radians([-179, 350, 180]))
    np.testing.assert_allclose(phase_difference(first, second), [2, 20, 180])


def test_constant_error():
    rng = np.random.default_rng(0)
    F = rng.exponential(1, len(HKL)) * np.exp(2j * np.pi * rng.random(len(HKL)))
    result = phase_statistics(F, 3 * F * np.exp(1j * np.radians(30)), HKL, CELL, n_shells=7, fom=np.full(len(F), 0.5))
    assert len(result.shells) == 7
    assert sum(shell.n for shell in result.shells) == len(HKL)
    for shell in (*result.shells, result.overall):
        np.testing.assert_allclose(
            (shell.phase_error, shell.phase_error_weighted, shell.map_cc, shell.fom, shell.cos_error),
            (30, 30, np.cos(np.radians(30)), 0.5, np.cos(np.radians(30))),
        )
    assert all(one.d_min >= other.d_max for one, other in zip(result.shells, result.shells[1:]))


def test_weights_are_the_true_amplitudes():
    F = np.ones(len(HKL), complex)
    F[: len(F) // 2] = 3
    wrong = F.copy()
    wrong[: len(F) // 2] *= -1
    overall = phase_statistics(F, wrong, HKL, CELL).overall
    share = (len(F) // 2) / len(F)
    np.testing.assert_allclose(overall.phase_error, 180 * share)
    np.testing.assert_allclose(overall.phase_error_weighted, 180 * 3 * share / (3 * share + 1 - share))


def test_output():
    result = phase_statistics(np.ones(len(HKL)), np.ones(len(HKL)), HKL, CELL)
    assert "0.00" in result.table()
    assert json.loads(json.dumps(result.to_json()))["overall"]["fom"] is None
