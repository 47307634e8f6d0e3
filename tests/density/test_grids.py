"""Grid sizes: fine enough, FFT-friendly, whole patches, smallest of their kind."""

import numpy as np
import pytest

from xtalfast.density.grids import bin_statistics, grid_size
from xtalfast.errors import InputError


def prime_factors(n):
    return {p for p in range(2, n + 1) if n % p == 0 and all(p % q for q in range(2, p))}


@pytest.mark.parametrize("multiple", [4, 8])
def test_sizes_are_the_smallest_allowed(multiple):
    lengths = np.random.default_rng(0).uniform(5, 90, (100, 3))
    sizes = grid_size(lengths, 1.5, multiple=multiple)
    assert (lengths / sizes <= 0.5 + 1e-9).all()
    assert all(n % multiple == 0 and prime_factors(n) <= {2, 3, 5} for n in np.unique(sizes).tolist())
    for length, n in zip(lengths.ravel(), sizes.ravel()):
        between = range(int(np.ceil(length / 0.5)), n)
        assert not any(m % multiple == 0 and prime_factors(m) <= {2, 3, 5} for m in between)


def test_paper_sizes_are_those_seen_in_its_data():
    """Even numbers with factors up to 19: 34, 26, 38, 28, 42 and 46 -> 48 (23 is too large a factor)."""
    assert grid_size([17, 13, 8], 1.5, paper=True).tolist() == [34, 26, 16]
    assert grid_size([18.8, 13.6, 20.7], 1.5, paper=True).tolist() == [38, 28, 42]
    assert grid_size([22.6, 16.9, 15], 1.5, paper=True).tolist() == [48, 34, 30]


def test_resolution_and_rate_may_differ_by_example():
    sizes = grid_size([[20.0, 20.0, 20.0]] * 2, [1.5, 2.25], rate=[3.0, 2.305])
    assert sizes.tolist() == [[40, 40, 40], [24, 24, 24]]


def test_whole_numbers_of_points_do_not_grow_by_rounding():
    assert grid_size([0.1 * 3 * 80, 24, 24], 1.5).tolist() == [48, 48, 48]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([10, 10, 10], 0), "d_min must be above 0"),
        (([10, 10, float("nan")], 1.5), "cell edges"),
        (([10, -1, 10], 1.5), "cell edges"),
        (([1e5, 10, 10], 1.5), "raise d_min"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(InputError, match=message):
        grid_size(*arguments)
    with pytest.raises(InputError, match="rate"):
        grid_size([10, 10, 10], 1.5, rate=2)


def test_bin_statistics():
    grids = [[4, 4, 4]] * 3 + [[4, 4, 8]]
    assert bin_statistics(grids, minimum=3) == (2, 0.75)
    assert bin_statistics(np.empty((0, 3))) == (0, 0.0)
