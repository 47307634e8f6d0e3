import pytest
import torch

from xtalfast.testing import assert_within_twin_error

EXACT = torch.tensor([1.0, 100.0], dtype=torch.float64)


def test_accepts_twice_the_error_of_the_twin():
    assert_within_twin_error((EXACT + 1.9e-3).float(), (EXACT + 1e-3).float(), EXACT, 1.0)


def test_accepts_rounding_when_the_twin_is_exact():
    off = torch.nextafter(EXACT.float(), torch.tensor(1e3))
    assert_within_twin_error(off, EXACT.float(), EXACT, 120.0)


def test_refuses_three_times_the_error_of_the_twin():
    with pytest.raises(AssertionError, match="above"):
        assert_within_twin_error((EXACT + 3e-3).float(), (EXACT + 1e-3).float(), EXACT, 1.0)


def test_refuses_nan_and_wrong_shape():
    nan = torch.tensor([1.0, float("nan")])
    with pytest.raises(AssertionError, match="not finite"):
        assert_within_twin_error(nan, EXACT.float(), EXACT, 1.0)
    with pytest.raises(AssertionError):
        assert_within_twin_error(EXACT[:1], EXACT, EXACT, 1.0)


def test_infinite_values_must_agree():
    infinite = torch.tensor([1.0, float("inf")], dtype=torch.float64)
    assert_within_twin_error(infinite.float(), infinite.float(), infinite, 1.0)
    with pytest.raises(AssertionError, match="infinite"):
        assert_within_twin_error(EXACT.float(), EXACT.float(), infinite, 1.0)
