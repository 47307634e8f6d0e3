"""The ELBO against brute-force integration, its gradients, its edge cases and its physics."""

import math
import sys

import pytest
import torch

from xtalfast import _native
from xtalfast.ops import (
    LowRankProfile,
    MVNProfile,
    SoftmaxProfile,
    gamma_from_log_mean_cv,
    gamma_kl,
    materialise,
    poisson_gamma_elbo,
)
from xtalfast.ops._random import standard_gamma_reference
from xtalfast.ops.poisson_gamma_elbo import poisson_gamma_elbo_reference, share_nodes
from xtalfast.testing import assert_within_twin_error

FLAT = ((1.0, 0.01), (1.0, 0.5))
BOXES = {"N7-px1x5x5": (7, (1, 5, 5)), "N1-px1x1x1": (1, (1, 1, 1)), "N33-px3x9x9": (33, (3, 9, 9))}


def spot(box=(1, 5, 5), dtype=torch.float64):
    axes = (torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in box)
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    values = torch.exp(-(z**2 / 0.5 + (y**2 + x**2) / 1.5)).reshape(-1)
    return (values / values.sum()).to(dtype)


def grid_of(box):
    axes = (torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in box)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)


def problem(n=7, box=(1, 5, 5), dtype=torch.float64, seed=0):
    """Counts, DIALS mask bits, profile, q(I), q(B) of n simulated boxes."""
    generator = torch.Generator().manual_seed(seed)
    profile = spot(box).expand(n, -1)
    intensity = torch.logspace(0, 3, n, dtype=torch.float64)[:, None]
    counts = torch.poisson(intensity * profile + 0.8, generator=generator).to(torch.int32)
    mask = torch.where(torch.rand(counts.shape, generator=generator) < 0.9, 1 | 4, 32 | 1).to(torch.uint8)
    q_i = gamma_from_log_mean_cv(intensity[:, 0].log() + 0.1, torch.linspace(-0.1, -2, n, dtype=torch.float64))
    q_bg = gamma_from_log_mean_cv(torch.zeros(n, dtype=torch.float64), torch.full((n,), -1.2, dtype=torch.float64))
    return counts, mask, profile.to(dtype), tuple(t.to(dtype) for t in q_i), tuple(t.to(dtype) for t in q_bg)


def log_gamma_grid(shape, rate, n=512):
    """Nodes and weights of a uniform rule in log x that covers a Gamma to 1e-14."""
    low = math.log(shape / rate) - 9 / math.sqrt(shape) - 36 / shape
    high = math.log(shape / rate) + 9 / math.sqrt(shape)
    t = torch.linspace(low, high, n, dtype=torch.float64)
    log_density = shape * math.log(rate) - math.lgamma(shape) + shape * t - rate * t.exp()
    weight = log_density.exp()
    return t.exp(), weight / weight.sum()


def brute_force(counts, used, profile, q_i, q_bg):
    """-E_q log p(counts) by a 512 x 512 rule, one box."""
    (i, w_i), (b, w_b) = log_gamma_grid(*q_i), log_gamma_grid(*q_bg)
    log_p = torch.zeros(len(i), len(b), dtype=torch.float64)
    for y, p in zip(counts[used].double(), profile[used]):
        rate = i[:, None] * p + b
        log_p += y * rate.log() - rate - torch.lgamma(y + 1)
    return -(w_i[:, None] * w_b * log_p).sum()


@pytest.mark.parametrize("photons", [3.0, 1e4])
@pytest.mark.parametrize("shape_bg", [1.0, 2.3, 60.0, 5e3])
@pytest.mark.parametrize("shape_i", [1.0, 1.7, 12.0, 4e3])
def test_quadrature_is_good_to_a_thousandth_of_a_nat(shape_i, shape_bg, photons):
    profile = spot()
    counts = torch.poisson(photons * profile + 1, generator=torch.Generator().manual_seed(3))
    used = torch.ones(25, dtype=torch.bool)
    q_i, q_bg = (shape_i, shape_i / photons), (shape_bg, shape_bg / 1.0)
    loss = poisson_gamma_elbo(counts[None], None, profile[None], q_i, q_bg, *FLAT, kappa_i=0, kappa_bg=0)
    assert abs(float(loss) - float(brute_force(counts, used, profile, q_i, q_bg))) < 1e-3


@pytest.mark.parametrize("shape_bg", [0.2, 3.0, 1e3])
@pytest.mark.parametrize("shape_i", [0.01, 0.1, 0.6])
def test_quadrature_of_small_shapes_is_good_to_a_hundredth_of_a_nat(shape_i, shape_bg):
    """Oracle: the one-dimensional integral over the share, on a uniform grid of 400,000 nodes."""
    profile = spot()
    counts = torch.poisson(50 * profile + 1, generator=torch.Generator().manual_seed(3))
    q_i, q_bg = (shape_i, shape_i / 50), (shape_bg, shape_bg)
    loss = poisson_gamma_elbo(counts[None], None, profile[None], q_i, q_bg, *FLAT, kappa_i=0, kappa_bg=0)
    t = torch.linspace(-40 / shape_i, 40 / shape_bg + 20, 400_000, dtype=torch.float64)
    log_density = shape_i * t - (shape_i + shape_bg) * torch.nn.functional.softplus(t)
    weight = torch.softmax(log_density, 0)
    log_share, log_rest = -torch.nn.functional.softplus(-t), -torch.nn.functional.softplus(t)
    digamma = torch.digamma(torch.tensor(shape_i + shape_bg, dtype=torch.float64))
    exact = 50 * profile.sum() + 25 + torch.lgamma(counts + 1).sum()
    for y, p in zip(counts, profile):
        log_rate = digamma + torch.logaddexp(log_share + math.log(p / q_i[1]), log_rest - math.log(q_bg[1]))
        exact = exact - y * (weight * log_rate).sum()
    assert abs(float(loss) - float(exact)) < 1e-2


def test_nodes_integrate_the_beta_moments():
    """Physical identity: the mean and variance of the share are those of the Beta distribution."""
    a = torch.tensor([0.5, 1.0, 3.0, 800.0, 5.0], dtype=torch.float64)
    b = torch.tensor([2.0, 1.0, 70.0, 3.0, 2e4], dtype=torch.float64)
    t, measure = share_nodes(a, b, 96)
    share = torch.sigmoid(t)
    log_weight = a[:, None] * torch.log(share) - b[:, None] * torch.nn.functional.softplus(t)
    weight = torch.softmax(log_weight + torch.log(measure), 1)
    beta = torch.distributions.Beta(a, b)
    torch.testing.assert_close((weight * share).sum(1), beta.mean, rtol=1e-5, atol=0)
    torch.testing.assert_close((weight * share**2).sum(1), beta.variance + beta.mean**2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("estimator", ["quadrature", "mc"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("name", BOXES)
def test_loss_and_gradients_against_the_reference(name, dtype, estimator):
    n, box = BOXES[name]
    counts, mask, profile, q_i, q_bg = problem(n, box, dtype)
    logits = profile.log()
    options = dict(estimator=estimator, nodes=16, samples=3, seed=5, kappa_i=0.3)

    def run(function, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (logits, *q_i, *q_bg)]
        loss = function(counts, mask, SoftmaxProfile(leaves[0]), leaves[1:3], leaves[3:], *FLAT, **options)
        upstream = torch.linspace(0.5, 2, n).to(loss.dtype)
        return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]

    results = zip(
        run(poisson_gamma_elbo, dtype),
        run(poisson_gamma_elbo_reference, dtype),
        run(poisson_gamma_elbo_reference, torch.float64),
    )
    # sums of y log(rate) over the pixels, times node weights whose exponents are as large as the shapes
    terms = 8.0 * float(counts.sum(1).max()) * float(1 + q_i[0].max() + q_bg[0].max())
    for result, twin, exact in results:
        assert result.dtype == dtype
        if dtype == torch.float64:  # torch's own trigamma, in the gradient by the shapes, is good to 2e-9
            torch.testing.assert_close(result, exact, rtol=1e-8, atol=1e-8 * float(exact.abs().max()))
        else:
            assert_within_twin_error(result, twin, exact, terms)


@pytest.mark.parametrize("estimator", ["quadrature", "mc"])
def test_ragged_boxes_equal_the_boxes_taken_alone(estimator):
    parts = [problem(1, box, seed=k) for k, box in enumerate([(1, 3, 3), (3, 5, 5), (1, 1, 1), (1, 7, 3)])]
    counts, mask, profile = (torch.cat([part[k].reshape(-1) for part in parts]) for k in range(3))
    ptr = torch.tensor([0, *(part[0].numel() for part in parts)]).cumsum(0)
    q_i, q_bg = (tuple(torch.cat([part[k][j] for part in parts]) for j in range(2)) for k in (3, 4))
    options = dict(estimator=estimator, nodes=16, samples=400, seed=1)
    ragged = poisson_gamma_elbo(counts, mask, profile, q_i, q_bg, *FLAT, ptr=ptr, **options)
    for k, (counts, mask, profile, q_i, q_bg) in enumerate(parts):
        alone = poisson_gamma_elbo(counts, mask, profile, q_i, q_bg, *FLAT, **options)
        if estimator == "quadrature":
            torch.testing.assert_close(ragged[k : k + 1], alone)
        else:  # other draws
            assert abs(float(ragged[k] - alone)) < 0.3 * float(counts.sum()) ** 0.5 + 1


def test_gaussian_and_low_rank_profiles_match_their_pixel_values():
    counts, mask, _, q_i, q_bg = problem(5, (3, 5, 5))
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scale = torch.tril(0.2 * normal(5, 3, 3)) + torch.diag(torch.tensor([0.8, 1.2, 1.2], dtype=torch.float64))
    forms = {
        "mvn": (lambda m, s: MVNProfile(m, s, grid_of((3, 5, 5))), [0.3 * normal(5, 3), scale]),
        "lowrank": (LowRankProfile, [normal(5, 4), normal(4, 75), normal(75)]),
    }
    for make, values in forms.values():
        leaves = [v.clone().requires_grad_() for v in values]
        loss = poisson_gamma_elbo(counts, mask, make(*leaves), q_i, q_bg, *FLAT, nodes=16)
        by_pixel = poisson_gamma_elbo(counts, mask, materialise(make(*leaves)), q_i, q_bg, *FLAT, nodes=16)
        torch.testing.assert_close(loss, by_pixel)
        for got, wanted in zip(torch.autograd.grad(loss.sum(), leaves), torch.autograd.grad(by_pixel.sum(), leaves)):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["tensor", "softmax", "mvn", "lowrank"])
def test_gradcheck(form):
    counts, mask, profile, q_i, q_bg = problem(2, (1, 3, 3))
    counts[0, 0] = 0
    make, values = {
        "tensor": (lambda p: p, [profile.clone()]),
        "softmax": (SoftmaxProfile, [profile.log()]),
        "mvn": (
            lambda m, s: MVNProfile(m, s, grid_of((1, 3, 3))),
            [torch.full((2, 3), 0.1, dtype=torch.float64), torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)],
        ),
        "lowrank": (
            LowRankProfile,
            [torch.ones(2, 2, dtype=torch.float64), profile[:2].log() / 3, profile[0].log() / 2],
        ),
    }[form]
    leaves = [t.clone().requires_grad_() for t in (*values, *q_i, *q_bg)]

    def loss(*leaves):
        k = len(leaves) - 4
        return poisson_gamma_elbo(counts, mask, make(*leaves[:k]), leaves[k : k + 2], leaves[k + 2 :], *FLAT, nodes=64)

    assert torch.autograd.gradcheck(loss, leaves)


def test_monte_carlo_gradient_is_unbiased():
    """Implicit reparameterisation: the mean over draws is the gradient of the quadrature within 4 standard errors."""
    counts, mask, profile, q_i, q_bg = problem(1, (1, 5, 5))
    n, rounds = 64, 40

    def gradients(**options):
        leaves = [t.expand(n).clone().requires_grad_() for t in (*q_i, *q_bg)]
        loss = poisson_gamma_elbo(
            counts.expand(n, -1), mask.expand(n, -1), profile.expand(n, -1), leaves[:2], leaves[2:], *FLAT, **options
        )
        return torch.stack([loss, *torch.autograd.grad(loss.sum(), leaves)])

    draws = torch.cat([gradients(estimator="mc", samples=4, seed=k).detach() for k in range(rounds)], 1)
    exact = gradients(nodes=96)[:, 0].detach()
    standard_error = draws.std(1) / draws.shape[1] ** 0.5
    assert bool(((draws.mean(1) - exact).abs() < 4 * standard_error).all())


def test_monte_carlo_gradients_are_those_of_torch_distributions():
    """The same draws through torch's own implicit reparameterisation."""
    counts, mask, profile, q_i, q_bg = problem(6)
    leaves = [t.clone().requires_grad_() for t in (*q_i, *q_bg)]
    loss = poisson_gamma_elbo(
        counts, mask, profile, leaves[:2], leaves[2:], *FLAT, estimator="mc", samples=3, seed=9, kappa_i=0, kappa_bg=0
    )
    gradients = torch.autograd.grad(loss.sum(), leaves)
    standard = standard_gamma_reference(torch.stack([leaves[0], leaves[2]]).detach(), 3, torch.tensor(9))
    slopes = torch._standard_gamma_grad(torch.stack([leaves[0], leaves[2]])[..., None].expand_as(standard), standard)
    shapes = torch.stack([leaves[0], leaves[2]])[..., None]
    draws = standard + slopes.detach() * (shapes - shapes.detach())  # what Gamma.rsample differentiates
    i, b = (draws / torch.stack([leaves[1], leaves[3]])[..., None]).unbind()
    rate = i[..., None] * profile[:, None] + b[..., None]
    log_p = torch.distributions.Poisson(rate).log_prob(counts[:, None].double())
    expected = -torch.where(((mask & 33) == 1)[:, None], log_p, 0.0).sum(2).mean(1)
    torch.testing.assert_close(loss, expected.detach())
    for got, wanted in zip(gradients, torch.autograd.grad(expected.sum(), leaves)):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("estimator", ["quadrature", "mc"])
def test_threads_and_cuts_of_the_batch_change_no_bit(estimator):
    counts, mask, profile, q_i, q_bg = problem(41, (1, 5, 5), torch.float32)
    options = dict(estimator=estimator, samples=2, seed=4)
    whole = poisson_gamma_elbo(counts, mask, profile, q_i, q_bg, *FLAT, **options)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(whole, poisson_gamma_elbo(counts, mask, profile, q_i, q_bg, *FLAT, **options))
    finally:
        torch.set_num_threads(before)
    for rows in (slice(0, 17), slice(17, 41)):
        part = poisson_gamma_elbo(
            counts[rows], mask[rows], profile[rows], [t[rows] for t in q_i], [t[rows] for t in q_bg], *FLAT,
            first_row=rows.start, **options,
        )  # fmt: skip
        assert torch.equal(part, whole[rows])


@pytest.mark.skipif(_native.C is None, reason="the compiled extension is not built")
@pytest.mark.parametrize("estimator", ["quadrature", "mc"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("simd", ["portable", "avx2", "avx512"])
def test_every_instruction_set_is_as_accurate_as_torch(simd, dtype, estimator, monkeypatch):
    """Masks, a background, large and small counts, a Gaussian profile; where a processor lacks a set, the next best."""
    monkeypatch.setenv("XTALFAST_SIMD", simd)
    assert _native.C.isa() in ("portable", "avx2", simd)
    counts, mask, _, q_i, q_bg = problem(9, (3, 5, 5), dtype)
    counts[0, 3], counts[1, :40], counts[2] = 1 << 20, 0, 0
    background = torch.linspace(0.5, 1.5, 75, dtype=torch.float64)
    mean = torch.linspace(-0.4, 0.4, 27, dtype=torch.float64).reshape(9, 3)
    scale = torch.tensor([[0.9, 0.0, 0.0], [0.1, 1.3, 0.0], [-0.2, 0.1, 1.1]], dtype=torch.float64).repeat(9, 1, 1)

    def run(function, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (mean, scale, *q_i, *q_bg)]
        loss = function(
            counts, mask, MVNProfile(*leaves[:2], grid_of((3, 5, 5)).to(dtype)), leaves[2:4], leaves[4:], *FLAT,
            background=background.to(dtype), estimator=estimator, samples=5, seed=2, kappa_i=0.3,
        )  # fmt: skip
        gradients = list(torch.autograd.grad(loss.sum(), leaves))
        gradients[1] = torch.tril(gradients[1])
        return [loss.detach(), *gradients]

    results = zip(
        run(poisson_gamma_elbo, dtype),
        run(poisson_gamma_elbo_reference, dtype),
        run(poisson_gamma_elbo_reference, torch.float64),
    )
    terms = 8.0 * float(counts.sum(1).max()) * float(1 + q_i[0].max() + q_bg[0].max())
    for result, twin, exact in results:
        if dtype == torch.float64:
            torch.testing.assert_close(result, exact, rtol=1e-8, atol=1e-8 * float(exact.abs().max()))
        else:
            assert_within_twin_error(result, twin, exact, terms)


def test_unknown_instruction_set_is_named(monkeypatch):
    monkeypatch.setenv("XTALFAST_SIMD", "avx1024")
    counts, mask, profile, q_i, q_bg = problem()
    with pytest.raises(ValueError, match="XTALFAST_SIMD must be portable, avx2 or avx512, got avx1024"):
        poisson_gamma_elbo(counts, mask, profile, q_i, q_bg, *FLAT)


def test_gradient_array_is_not_copied_for_the_last_backward_pass_and_is_kept_for_others():
    counts, mask, profile, q_i, q_bg = problem(5)
    logits = profile.log().requires_grad_()

    def loss():
        return poisson_gamma_elbo(counts, mask, SoftmaxProfile(logits), q_i, q_bg, *FLAT)

    weight = torch.linspace(0.5, 2, 5, dtype=torch.float64)
    (plain,) = torch.autograd.grad(loss().sum(), logits)
    kept = loss()
    passes = [torch.autograd.grad(kept, logits, weight, retain_graph=True)[0] for _ in range(2)]
    passes[0].zero_()  # a caller's own from now on
    (last,) = torch.autograd.grad(kept, logits, weight)
    for result in (passes[1], last):
        torch.testing.assert_close(result, plain * weight[:, None])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(kept, logits, weight)


def test_gradients_by_every_prior_and_kappa():
    counts, mask, profile, q_i, q_bg = problem(3)
    numbers = [0.7, 0.2, 1.3, 0.4, 0.6, 0.8]
    leaves = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in numbers]
    leaves[2] = torch.full((3,), 1.3, dtype=torch.float32).requires_grad_()

    def loss(function):
        a, b, c, d, k1, k2 = leaves
        values = function(counts, mask, profile, q_i, q_bg, (a, b), (c, d), kappa_i=k1, kappa_bg=k2)
        return torch.autograd.grad((values * torch.arange(1, 4)).sum(), leaves)

    for got, wanted in zip(loss(poisson_gamma_elbo), loss(poisson_gamma_elbo_reference)):
        assert got.shape == wanted.shape and got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)


def test_same_seed_same_bits_and_other_seeds_differ():
    counts, mask, profile, q_i, q_bg = problem()
    one, again, other = (
        poisson_gamma_elbo(counts, mask, profile, q_i, q_bg, *FLAT, estimator="mc", seed=s) for s in (3, 3, 4)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    torch.manual_seed(11)
    free = [poisson_gamma_elbo(counts, mask, profile, q_i, q_bg, *FLAT, estimator="mc") for _ in range(2)]
    assert not torch.equal(*free)


@pytest.mark.parametrize("estimator", ["quadrature", "mc"])
def test_box_without_used_pixels_is_the_divergences_alone(estimator):
    counts, _, profile, q_i, q_bg = problem()
    logits = profile.log().requires_grad_()
    mask = torch.full(counts.shape, 32 | 1, dtype=torch.uint8)
    loss = poisson_gamma_elbo(
        counts, mask, SoftmaxProfile(logits), q_i, q_bg, *FLAT, kappa_i=0.2, kappa_bg=0.7, estimator=estimator
    )
    torch.testing.assert_close(loss, 0.2 * gamma_kl(q_i, FLAT[0]) + 0.7 * gamma_kl(q_bg, FLAT[1]))
    assert bool((torch.autograd.grad(loss.sum(), logits)[0] == 0).all())


def test_profile_of_zero_under_photons_is_finite():
    counts, profile = torch.tensor([[3, 0]]), torch.tensor([[0.0, 1.0]])
    loss = poisson_gamma_elbo(counts, None, profile, (2.0, 1.0), (0.02, 1e4), *FLAT)
    assert bool(torch.isfinite(loss).all())


def test_masked_pixels_do_not_matter_and_bool_mask_equals_bits():
    counts, mask, profile, q_i, q_bg = problem()
    loss = poisson_gamma_elbo(counts, mask, profile, q_i, q_bg, *FLAT)
    used = (mask & 33) == 1
    garbage = torch.where(used, counts, 12345)
    assert torch.equal(loss, poisson_gamma_elbo(garbage, used, profile, q_i, q_bg, *FLAT))
    assert torch.equal(loss, poisson_gamma_elbo(garbage, mask.to(torch.int32), profile, q_i, q_bg, *FLAT))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int64, torch.float32])
def test_counts_of_every_type_give_one_answer(dtype):
    counts, mask, profile, q_i, q_bg = problem(3)
    counts = counts.clamp(max=255)
    expected = poisson_gamma_elbo(counts, mask, profile, q_i, q_bg, *FLAT)
    assert torch.equal(expected, poisson_gamma_elbo(counts.to(dtype), mask, profile, q_i, q_bg, *FLAT))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_profiles_accumulate_in_float32(dtype):
    counts, mask, profile, q_i, q_bg = problem(4)
    half = profile.to(dtype)
    loss = poisson_gamma_elbo(counts, mask, half, q_i, q_bg, *FLAT)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, poisson_gamma_elbo(counts, mask, half.float(), q_i, q_bg, *FLAT))


def test_background_shape_scales_the_background():
    counts, mask, profile, q_i, q_bg = problem()
    slope = torch.linspace(0.5, 1.5, counts.shape[1], dtype=torch.float64)
    one = poisson_gamma_elbo(counts, mask, profile, q_i, q_bg, *FLAT, background=slope)
    each = poisson_gamma_elbo(counts, mask, profile, q_i, q_bg, *FLAT, background=slope.expand(7, -1))
    assert torch.equal(one, each)
    # halving B's scale and doubling its shape over the box is the same rate
    twice = poisson_gamma_elbo(
        counts, mask, profile, q_i, (q_bg[0], 2 * q_bg[1]), *FLAT, background=2 * slope, kappa_bg=0
    )
    torch.testing.assert_close(
        twice, poisson_gamma_elbo(counts, mask, profile, q_i, q_bg, *FLAT, background=slope, kappa_bg=0)
    )


def test_two_backward_passes_and_scalar_parameters():
    counts, mask, profile, _, _ = problem()
    rate = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    loss = poisson_gamma_elbo(counts, mask, profile, (2.0, rate), (3.0, 3.0), *FLAT).sum()
    (first,) = torch.autograd.grad(loss, rate, retain_graph=True)
    (second,) = torch.autograd.grad(loss, rate)
    assert first.shape == () and torch.equal(first, second)


def test_no_reflections():
    empty = torch.zeros(0, 9)
    assert poisson_gamma_elbo(empty.int(), None, empty, (2.0, 1.0), (2.0, 1.0), *FLAT).shape == (0,)
    ragged = poisson_gamma_elbo(
        torch.zeros(0), None, torch.zeros(0), (2.0, 1.0), (2.0, 1.0), *FLAT, ptr=torch.zeros(1, dtype=torch.int64)
    )
    assert ragged.shape == (0,)


def test_huge_counts_are_finite():
    counts = torch.full((1, 25), 2**20, dtype=torch.int32)
    profile = spot()[None].float()
    q_i = (torch.tensor([2.0], requires_grad=True), torch.tensor([1e-7]))
    loss = poisson_gamma_elbo(counts, None, profile, q_i, (2.0, 1e-6), *FLAT)
    (gradient,) = torch.autograd.grad(loss.sum(), q_i[0])
    assert bool(torch.isfinite(loss).all() and torch.isfinite(gradient).all())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(mask=torch.ones(7, 24, dtype=torch.uint8)), ValueError, r"mask must have the shape of counts \[7, 25\]"),
        (dict(mask=torch.ones(7, 25)), TypeError, "mask must be bool"),
        (dict(counts=torch.zeros(175, dtype=torch.int32)), ValueError, r"counts must be \[N, P\]"),
        (dict(counts=torch.zeros(7, 25, dtype=torch.bool)), TypeError, "counts must be an integer"),
        (dict(profile=torch.zeros(7, 24)), ValueError, r"profile must be \[7, 25\]"),
        (dict(profile=torch.full((7, 25), -0.1)), ValueError, "not negative"),
        (dict(profile=torch.full((7, 25), float("nan"))), ValueError, "not negative"),
        (dict(profile=[1.0]), TypeError, "profile must be a tensor"),
        (dict(q_i=(torch.ones(6), 1.0)), ValueError, r"q_i must hold numbers or \[N\] with N=7"),
        (dict(estimator="laplace"), ValueError, "estimator must be"),
        (dict(nodes=1), ValueError, "nodes must be"),
        (dict(samples=0), ValueError, "samples must be"),
        (dict(background=torch.ones(3)), ValueError, "background must be"),
        (dict(ptr=torch.tensor([0, 4])), ValueError, r"counts must be \[M\]"),
        (dict(counts=torch.zeros(9), mask=None, profile=torch.ones(9), ptr=torch.tensor([0, 4])), ValueError, "M=9"),
    ],
)
def test_bad_input_is_named(change, error, message):
    counts, mask, profile, q_i, q_bg = problem()
    arguments = dict(counts=counts, mask=mask, profile=profile, q_i=q_i, q_bg=q_bg, prior_i=FLAT[0], prior_bg=FLAT[1])
    with pytest.raises(error, match=message):
        poisson_gamma_elbo(**{**arguments, **change})


def operator_arguments(form, estimator="quadrature"):
    """Arguments of torch.ops.xtalfast.poisson_gamma_elbo for each form of profile."""
    counts, mask, profile, q_i, q_bg = problem(3, (1, 3, 3))
    others = torch.rand(6, 3, dtype=torch.float64) + 0.5  # priors, kappas
    gammas = torch.cat([torch.stack([*q_i, *q_bg]), others]).requires_grad_()
    seed = torch.tensor(3) if estimator == "mc" else None
    scale_tril = grid = None
    if form == "gaussian":
        profile = torch.zeros(3, 3, dtype=torch.float64)
        scale_tril, grid = torch.eye(3, dtype=torch.float64).repeat(3, 1, 1).requires_grad_(), grid_of((1, 3, 3))
    kind = ["values", "logits", "gaussian"].index(form)
    profile = profile.clone().requires_grad_()
    return counts, mask, None, None, kind, profile, scale_tril, grid, gammas, seed, 2, 0, 8, True


@pytest.mark.parametrize("estimator", ["quadrature", "mc"])
@pytest.mark.parametrize("form", ["values", "logits", "gaussian"])
def test_operator_passes_opcheck(form, estimator):
    torch.library.opcheck(torch.ops.xtalfast.poisson_gamma_elbo, operator_arguments(form, estimator))


def test_sampler_passes_opcheck():
    shape = torch.tensor([[0.3, 2.0], [5.0, 1.0]], dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.xtalfast.standard_gamma, (shape, 3, torch.tensor(7), 0))


@pytest.mark.parametrize("estimator", ["quadrature", "mc"])
def test_without_the_extension_the_reference_gives_the_same_in_runs(estimator, monkeypatch):
    counts, mask, profile, q_i, q_bg = problem(33, (1, 5, 5))
    logits = profile.log().requires_grad_()

    def run():
        loss = poisson_gamma_elbo(
            counts, mask, SoftmaxProfile(logits), q_i, q_bg, *FLAT, estimator=estimator, samples=2, seed=1
        )
        return loss, torch.autograd.grad(loss.sum(), logits)[0]

    fused = run()
    monkeypatch.setattr(_native, "C", None)
    module = sys.modules["xtalfast.ops.poisson_gamma_elbo"]
    monkeypatch.setattr(module, "_REFERENCE_PIXELS", 96 * 25 * 4)  # four boxes at once
    for one, other in zip(fused, run()):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("estimator", ["quadrature", "mc"])
def test_compiles_to_one_graph(estimator):
    counts, mask, profile, q_i, q_bg = problem(4)
    logits = profile.log().requires_grad_()

    def loss(logits):
        values = poisson_gamma_elbo(
            counts, mask, SoftmaxProfile(logits), q_i, q_bg, *FLAT, estimator=estimator, nodes=16, seed=3
        )
        return values.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits), loss(logits))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(logits), logits)[0], torch.autograd.grad(loss(logits), logits)[0]
    )


def test_gradient_of_the_gradient_is_refused():
    counts, mask, profile, q_i, q_bg = problem(2)
    logits = profile.log().requires_grad_()
    loss = poisson_gamma_elbo(counts, mask, SoftmaxProfile(logits), q_i, q_bg, *FLAT).sum()
    with pytest.raises(RuntimeError, match="no gradient of its gradient"):
        torch.autograd.grad(loss, logits, create_graph=True)
