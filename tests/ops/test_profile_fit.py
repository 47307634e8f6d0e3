"""Profile fits: unbiased, calibrated, linear in the counts; the maximum of the likelihood; edge cases."""

import pytest
import torch

from xtalfast import _native
from xtalfast.ops import intensity_posterior, profile_fit
from xtalfast.ops.profile_fit import profile_fit_reference
from xtalfast.testing import assert_within_twin_error


def spot(box=(1, 9, 9)):
    axes = (torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in box)
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    values = torch.exp(-(z**2 / 0.5 + (y**2 + x**2) / 2.5)).reshape(-1)
    return values / values.sum()


def simulate(intensity, background, n, box=(1, 9, 9), seed=0):
    profile = spot(box)
    generator = torch.Generator().manual_seed(seed)
    counts = torch.poisson((intensity * profile + background).expand(n, -1), generator=generator)
    return counts.to(torch.int32), profile.expand(n, -1)


@pytest.mark.parametrize("intensity", [0.0, 1.0, 10.0, 1000.0])
def test_fit_at_the_truth_is_unbiased_and_its_pulls_have_sd_one(intensity):
    n, background = 100_000, 0.8
    counts, profile = simulate(intensity, background, n, box=(1, 7, 7))
    fit = profile_fit(counts, None, profile.float(), at=(intensity, background))
    standard_error = float(fit.var_i.mean()) ** 0.5 / n**0.5
    assert abs(float(fit.i.mean()) - intensity) < 2 * standard_error
    pulls = (fit.i - intensity) / fit.var_i.sqrt()
    assert 0.98 < float(pulls.std()) < 1.02
    background_pulls = (fit.bg - background) / fit.var_bg.sqrt()
    assert 0.98 < float(background_pulls.std()) < 1.02
    covariance = ((fit.i - intensity) * (fit.bg - background)).mean()
    assert float(covariance / fit.cov_i_bg.mean()) == pytest.approx(1, abs=0.05)


def test_linear_fit_is_linear_in_the_counts():
    one, profile = simulate(30.0, 1.0, 6)
    two, _ = simulate(3.0, 2.0, 6, seed=1)
    fits = [profile_fit(counts, None, profile, at=(10.0, 1.0)) for counts in (one, two, one + 2 * two)]
    torch.testing.assert_close(fits[0].i + 2 * fits[1].i, fits[2].i)
    torch.testing.assert_close(fits[0].bg + 2 * fits[1].bg, fits[2].bg)
    torch.testing.assert_close(fits[0].var_i, fits[2].var_i)


def test_weak_spots_may_come_out_negative():
    counts, profile = simulate(0.0, 2.0, 200)
    fit = profile_fit(counts, None, profile)
    assert 40 < int((fit.i < 0).sum()) < 160


def test_default_reference_is_the_flat_posterior_mean():
    counts, profile = simulate(8.0, 0.4, 20)
    flat = intensity_posterior(counts, None, profile, (1.0, 0.0), (1.0, 0.0))
    named = profile_fit(counts, None, profile, at=(flat.mean_i, flat.mean_bg))
    default = profile_fit(counts, None, profile)
    torch.testing.assert_close(default.i, named.i)
    torch.testing.assert_close(default.var_i, named.var_i)


@pytest.mark.parametrize("background", [0.0, 0.05, 1.0, 20.0])
@pytest.mark.parametrize("intensity", [0.0, 2.0, 100.0, 1e4])
def test_maximum_likelihood_satisfies_the_optimality_conditions(intensity, background):
    """Interior: the score is 0 in units of its sd. At a boundary it points outwards. The rates sum to the counts."""
    counts, profile = simulate(intensity, background, 50)
    fit = profile_fit(counts, None, profile, method="ml")
    assert bool(fit.converged.all())
    total = counts.sum(1).double()
    torch.testing.assert_close(fit.i * profile.sum(1) + 81 * fit.bg, total)
    rate = fit.i[:, None] * profile + fit.bg[:, None]
    ratio = torch.where(counts > 0, counts / rate, 0.0)
    score_i, score_b = (ratio * profile).sum(1) - 1, ratio.sum(1) - 81
    lit = total > 0
    inside_i, inside_b = lit & (fit.i > 1e-9), lit & (fit.bg > 1e-9)
    assert bool(((score_i.abs() * fit.var_i.sqrt())[inside_i & inside_b] < 1e-3).all())
    assert bool((score_i[lit & ~inside_i] <= 1e-9).all())
    assert bool((score_b[lit & ~inside_b] <= 1e-9).all())


def sizes_of_terms(counts, profile, fit, at):
    """What cancels in the solution of the two normal equations: rounding of each term reaches the result."""
    i, b = (torch.as_tensor(t, dtype=torch.float64).expand(len(counts))[:, None] for t in at)
    weight = 1 / (i * profile + b.clamp(min=1e-6))
    pp, pb, bb = (weight * profile**2).sum(1), (weight * profile).sum(1), weight.sum(1)
    py, by = (weight * profile * counts).sum(1), (weight * counts).sum(1)
    determinant = pp * bb - pb**2
    condition = (pp * bb + pb**2) / determinant
    return {
        "i": (bb * py + pb * by) / determinant + condition * fit.i.abs(),
        "var_i": condition * fit.var_i,
        "bg": (pp * by + pb * py) / determinant + condition * fit.bg.abs(),
        "var_bg": condition * fit.var_bg,
        "cov_i_bg": condition * fit.cov_i_bg.abs(),
        "correlation": 4 * condition,  # of fitted values, centred, multiplied and summed again
    }


@pytest.mark.parametrize("method", ["linear", "ml"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_against_the_reference_and_in_single_precision(dtype, method):
    counts, profile = simulate(torch.logspace(0, 4, 12, dtype=torch.float64)[:, None], 0.7, 12)
    options = dict(at=(50.0, 1.0), method=method)
    result = profile_fit(counts, None, profile.to(dtype), **options)
    twin = profile_fit_reference(counts, None, profile.to(dtype), **options)
    exact = profile_fit_reference(counts, None, profile, **options)
    summed = sizes_of_terms(counts, profile, exact, options["at"] if method == "linear" else (exact.i, exact.bg))
    for name in ("i", "var_i", "bg", "var_bg", "cov_i_bg", "correlation"):
        values = (getattr(fit, name).to(dtype) for fit in (result, twin))
        # a term is rounded some eight times on its way: weight, products, sums, determinant, quotient
        assert_within_twin_error(*values, getattr(exact, name), 8 * summed[name])
    assert torch.equal(result.converged, exact.converged)


def test_correlation_is_one_for_a_perfect_fit_and_small_for_noise():
    profile = spot()
    perfect = (1000 * profile + 2)[None]
    assert float(profile_fit(perfect, None, profile[None]).correlation) == pytest.approx(1, abs=1e-9)
    counts, many = simulate(0.0, 5.0, 300)
    assert abs(float(profile_fit(counts, None, many).correlation.mean())) < 0.2


def test_masked_pixels_only_lose_information():
    counts, profile = simulate(100.0, 1.0, 10)
    mask = torch.ones(counts.shape, dtype=torch.uint8)
    mask[:, ::3] = 1 | 32
    full, less = (profile_fit(counts, m, profile, at=(100.0, 1.0)) for m in (None, mask))
    assert bool((less.var_i > full.var_i).all())
    assert float(less.i.mean()) == pytest.approx(100, abs=30)  # not scaled down with the masked part of the profile


@pytest.mark.parametrize("method", ["linear", "ml"])
def test_undetermined_boxes_say_so(method):
    counts = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [5, 5, 5, 5]])
    mask = torch.tensor([[False] * 4, [True, False, False, False], [True] * 4])
    profile = torch.tensor([[0.25, 0.25, 0.4, 0.1]] * 2 + [[0.25] * 4])  # masked; one pixel; profile like background
    fit = profile_fit(counts, mask, profile, method=method)
    assert not bool(fit.converged.any())
    assert bool(torch.isinf(fit.var_i).all() and torch.isinf(fit.var_bg).all())
    assert bool((fit.i == 0).all() and (fit.bg == 0).all())


@pytest.mark.parametrize("method", ["linear", "ml"])
def test_ragged_boxes_equal_the_boxes_taken_alone(method):
    parts = [simulate(50.0, 1.0, 1, box, seed=k) for k, box in enumerate([(1, 3, 3), (3, 5, 5), (1, 7, 2)])]
    counts, profile = (torch.cat([part[k].reshape(-1) for part in parts]) for k in range(2))
    ptr = torch.tensor([0, *(part[0].numel() for part in parts)]).cumsum(0)
    at = (torch.tensor([10.0, 20.0, 30.0]), 1.0)
    ragged = profile_fit(counts, None, profile, ptr=ptr, at=at, method=method)
    for k, (counts, profile) in enumerate(parts):
        alone = profile_fit(counts, None, profile, at=(at[0][k], 1.0), method=method)
        torch.testing.assert_close(ragged.i[k], alone.i[0])
        torch.testing.assert_close(ragged.var_i[k], alone.var_i[0])


def test_background_shape_is_fitted():
    slope = torch.linspace(0.5, 1.5, 81, dtype=torch.float64)
    exact = 40 * spot() + 3 * slope
    fit = profile_fit(exact[None], None, spot()[None], background=slope, at=(40.0, 3.0))
    torch.testing.assert_close(fit.i, torch.tensor([40.0], dtype=torch.float64))
    torch.testing.assert_close(fit.bg, torch.tensor([3.0], dtype=torch.float64))


def test_no_reflections_and_bad_method():
    empty = torch.zeros(0, 9)
    assert profile_fit(empty.int(), None, empty).i.shape == (0,)
    with pytest.raises(ValueError, match="method must be"):
        profile_fit(empty.int(), None, empty, method="map")


def test_operator_passes_opcheck():
    counts, profile = simulate(20.0, 1.0, 3, box=(1, 3, 3))
    at = torch.ones(2, 3, dtype=torch.float64)
    torch.library.opcheck(torch.ops.xtalfast.profile_fit, (counts, None, None, None, profile, at))
    torch.library.opcheck(torch.ops.xtalfast.profile_fit_ml, (counts, None, None, None, profile))


@pytest.mark.parametrize("options", [{}, {"at": (30.0, 1.0)}, {"method": "ml"}], ids=["posterior mean", "at", "ml"])
def test_without_the_extension_the_reference_gives_the_same(options, monkeypatch):
    counts, profile = simulate(torch.logspace(0, 4, 9, dtype=torch.float64)[:, None], 0.7, 9)
    mask = torch.ones(counts.shape, dtype=torch.bool)
    mask[0], mask[1, :80] = False, False  # a box without pixels and one with a single one
    fused = profile_fit(counts, mask, profile, **options)
    monkeypatch.setattr(_native, "C", None)
    plain = profile_fit(counts, mask, profile, **options)
    for one, other in zip(vars(fused).values(), vars(plain).values()):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
