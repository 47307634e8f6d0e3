"""The counter-based sampler: its generator, its distribution, and what a draw does not depend on."""

import pytest
import torch

from xtalfast.ops._random import philox, standard_gamma_reference

SEED = torch.tensor(2**62 + 12345)


def draw(shape, samples, seed=SEED, first=0):
    return torch.ops.xtalfast.standard_gamma(shape, samples, seed, first)


def words(*values):
    return tuple(torch.tensor(v) for v in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0x299F31D0 << 32) + 0xA4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    """Those that the authors publish with Random123."""
    assert tuple(int(w) for w in philox(words(*counter), torch.tensor(key))) == expected


@pytest.mark.parametrize("shape", [0.01, 0.3, 1.0, 2.5, 40.0, 1e4])
def test_draws_have_the_gamma_distribution(shape):
    """Kolmogorov-Smirnov at 1e-4, against the incomplete Gamma function of torch."""
    n = 20_000
    x = draw(torch.full((1, n), shape, dtype=torch.float64), 1).reshape(-1).sort()[0]
    cdf = torch.special.gammainc(torch.tensor(shape, dtype=torch.float64), x)
    inside = x > torch.finfo(torch.float64).tiny  # below, a draw is the smallest number
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((cdf - steps[:-1]).abs(), (cdf - steps[1:]).abs())[inside].max()
    assert float(distance) < 2.23 / n**0.5


def test_streams_rows_and_draws_are_independent():
    x = draw(torch.full((2, 400), 3.0, dtype=torch.float64), 50)
    flat = x.reshape(2, -1)
    assert abs(float(torch.corrcoef(flat)[0, 1])) < 5 / flat.shape[1] ** 0.5
    assert abs(float(torch.corrcoef(torch.stack([x[0, :-1].reshape(-1), x[0, 1:].reshape(-1)]))[0, 1])) < 0.035
    assert len(x.unique()) == x.numel()


def test_draw_depends_on_seed_row_and_number_alone():
    shape = torch.rand(2, 30, dtype=torch.float64) * 3 + 0.2
    whole = draw(shape, 4)
    assert torch.equal(draw(shape[:, 11:], 2, first=11), whole[:, 11:, :2])
    assert not bool((draw(shape, 4, torch.tensor(1)) == whole).any())
    far = draw(shape, 4, first=1 << 33)
    assert not bool((far == whole).any())


def test_compiled_draws_equal_the_reference():
    shape = torch.tensor([[0.01, 0.3, 0.999, 1.0, 7.0, 1e5]], dtype=torch.float64)
    torch.testing.assert_close(draw(shape, 200), standard_gamma_reference(shape, 200, SEED), rtol=1e-11, atol=0)


def test_no_draws():
    assert draw(torch.ones(2, 0, dtype=torch.float64), 3).shape == (2, 0, 3)
