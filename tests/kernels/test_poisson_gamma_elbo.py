"""The Triton ELBO, interpreted on the CPU, against the reference: loss, gradients, edge cases."""

import pytest
import torch

from xtalfast.ops import LowRankProfile, MVNProfile, SoftmaxProfile, gamma_kl
from xtalfast.ops._boxes import unpack
from xtalfast.ops._random import standard_gamma_reference
from xtalfast.ops.poisson_gamma_elbo import divergences, expected_loss, nodes_needed, quadrature_draws
from xtalfast.testing import assert_within_twin_error

PRIOR = torch.tensor([[1.0], [0.01], [1.3], [0.5]], dtype=torch.float64)
FORMS = ("values", "logits", "gaussian", "low-rank")


def uninitialised(*shape, dtype=torch.float64):
    return torch.full(shape, float("nan"), dtype=dtype)


def shapes_and_rates(n):
    """q(I) and q(B), [4, n]."""
    intensity = torch.logspace(0, 3, n, dtype=torch.float64)
    shape = torch.logspace(0.1, 3, n, dtype=torch.float64)
    return torch.stack([shape, shape / (1.1 * intensity), torch.full_like(shape, 11.0), torch.full_like(shape, 12.0)])


def problem(n, box, form, seed=0):
    """Counts, DIALS mask bits, float64 parameters of a profile of this form, q [4, n] of simulated boxes."""
    generator = torch.Generator().manual_seed(seed)
    axes = (torch.arange(length, dtype=torch.float64) - (length - 1) / 2 for length in box)
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    pixels = len(grid)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    logits = (-(grid**2).sum(-1) / 3).expand(n, -1) + 0.1 * normal(n, pixels)
    spot = torch.softmax(logits, 1)
    intensity = torch.logspace(0, 3, n, dtype=torch.float64)[:, None]
    counts = torch.poisson(intensity * spot + 0.8, generator=generator).to(torch.uint16)
    mask = torch.where(torch.rand(n, pixels, generator=generator) < 0.9, 1 | 4, 1 | 32).to(torch.uint8)
    scale_tril = torch.diag_embed(1.3 + 0.1 * normal(n, 3)) + torch.tril(0.1 * normal(n, 3, 3), -1)
    parameters = {
        "values": [spot],
        "logits": [logits],
        "gaussian": [0.3 * normal(n, 3), scale_tril, grid],
        "low-rank": [0.3 * normal(n, 4), normal(4, pixels), logits[0].clone()],
    }[form]
    return counts, mask, [t.contiguous() for t in parameters], shapes_and_rates(n)


def gamma_slopes(q, draws):
    """Derivatives of standard draws [2, N, S] by the shape."""
    return torch._standard_gamma_grad(q[0::2, :, None].expand_as(draws).contiguous(), draws)


def kernel(interpret, counts, mask, form, parameters, q, *, ptr=None, background=None, draws=None, nodes=16, kappa=0.0):
    """Loss and gradients by profile parameter and by gammas [10, N], as the kernel leaves them."""
    n, dtype = q.shape[1], parameters[0].dtype
    kind = FORMS.index(form)
    by_profile = uninitialised(*(parameters[0].shape if kind == 2 else counts.shape), dtype=dtype)
    by_matrix = uninitialised(n, 3, 3, dtype=dtype)
    out = (uninitialised(n), by_profile, by_matrix, uninitialised(10, n))
    padded = [*parameters, None, None][:3]
    gammas = torch.cat([q, PRIOR.expand(4, n), torch.full((2, n), kappa, dtype=torch.float64)]).contiguous()
    slopes = None if draws is None else gamma_slopes(q, draws)
    left = interpret(
        *("poisson_gamma_elbo", "poisson_gamma_elbo"),
        *(counts, mask, ptr, background, kind, *padded, gammas, draws, slopes, nodes, True, *out),
    )
    loss, by_profile, by_matrix, by_gammas = left[-4:]
    by = [by_profile, by_matrix] if kind == 2 else [by_profile]
    if kind == 3:  # the matrix products of the op
        latent, basis, _ = parameters
        by = [by_profile @ basis.T, latent.T @ by_profile, by_profile.sum(0)]
    return loss, by, by_gammas


def reference(counts, mask, form, parameters, q, *, ptr=None, background=None, draws=None, nodes=16):
    """Likelihood and its gradients from the reference and autograd, in the precision of the parameters."""
    leaves = [t.clone().requires_grad_() for t in parameters]
    forms = {"values": lambda t: t, "logits": SoftmaxProfile, "gaussian": MVNProfile, "low-rank": LowRankProfile}
    q = q.clone().requires_grad_()
    if draws is not None:
        moved = draws + gamma_slopes(q.detach(), draws) * (q - q.detach())[0::2, :, None]
        draws = moved / q[1::2, :, None]
    loss = expected_loss(unpack(counts, mask, forms[form](*leaves), ptr, background), q, nodes, draws)
    wanted = [*leaves[: 2 if form == "gaussian" else None], q]
    gradients = list(torch.autograd.grad(loss.sum(), wanted))
    if form == "gaussian":
        gradients[1] = torch.tril(gradients[1])
    return loss.detach(), gradients[:-1], gradients[-1]


def in_float32(parameters):
    return [t.float() for t in parameters]


@pytest.mark.parametrize("estimator", ["quadrature", "mc"])
@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradients_against_the_reference(interpret, form, estimator):
    counts, mask, parameters, q = problem(3, (1, 5, 5), form)
    generator = torch.Generator().manual_seed(1)
    background = 0.5 + torch.rand(25, generator=generator, dtype=torch.float64)
    draws = None
    if estimator == "mc":
        draws = torch._standard_gamma(q[0::2, :, None].expand(2, 3, 2).contiguous(), generator)
    options = dict(draws=draws, nodes=16)
    single = in_float32(parameters)
    loss, by, by_gammas = kernel(interpret, counts, mask, form, single, q, background=background.float(), **options)
    results = [loss.float(), *by, by_gammas[:4].float()]
    twin, exact = (
        reference(counts, mask, form, values, q, background=background.to(values[0].dtype), **options)
        for values in (single, parameters)
    )
    terms = 8.0 * float(counts.double().sum(1).max()) * float(1 + q[0].max() + q[2].max())
    for result, a, b in zip(results, [twin[0], *twin[1], twin[2]], [exact[0], *exact[1], exact[2]]):
        assert_within_twin_error(result, a.to(result.dtype), b, terms)


@pytest.mark.parametrize("form", ["values", "gaussian"])
def test_double_precision_equals_the_reference(interpret, form):
    """Automatic nodes too: the rule computed in the kernel is that of the reference."""
    counts, mask, parameters, q = problem(3, (1, 5, 5), form)
    q[0] = torch.tensor([0.02, 1.4, 3e3])
    loss, by, by_gammas = kernel(interpret, counts.double(), mask, form, parameters, q, nodes=0)
    expected, gradients, expected_by_q = reference(counts, mask, form, parameters, q, nodes=0)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=0)
    for result, wanted in zip(by, gradients):
        torch.testing.assert_close(result, wanted, rtol=1e-10, atol=1e-10 * float(wanted.abs().max()))
    # torch's own trigamma, in the gradient by the shapes, is good to 2e-9
    torch.testing.assert_close(by_gammas[:4], expected_by_q, rtol=1e-8, atol=1e-8 * float(expected_by_q.abs().max()))


def test_ragged_boxes_equal_the_boxes_taken_alone(interpret):
    """One box is larger than a tile, one has no pixel."""
    sizes = [(1, 3, 3), (3, 10, 10), (1, 1, 1)]
    parts = [problem(1, box, "logits", seed=k) for k, box in enumerate(sizes)]
    counts, mask, logits = (
        torch.cat([t.reshape(-1) for t in column]) for column in zip(*((*p[:2], *p[2]) for p in parts))
    )
    ptr = torch.tensor([0, 9, 309, 309, 310])
    q = shapes_and_rates(4)
    loss, (by_logits,), by_gammas = kernel(interpret, counts, mask, "logits", [logits], q, ptr=ptr)
    for row in (0, 1, 3):
        pixels = slice(int(ptr[row]), int(ptr[row + 1]))
        one = [t[pixels][None] for t in (counts, mask, logits)]
        expected, (by,), _ = reference(*one[:2], "logits", one[2:], q[:, row : row + 1])
        torch.testing.assert_close(loss[row], expected[0], rtol=1e-11, atol=0)
        torch.testing.assert_close(by_logits[pixels], by[0], rtol=1e-10, atol=1e-12 * float(by.abs().max()))
    assert loss[2] == 0 and bool((by_gammas[:4, 2] == 0).all())


def test_edge_cases_have_defined_results(interpret):
    """An all-masked box, p = 0 under counts, a count of 2^20, and NaN in a masked pixel."""
    counts = torch.tensor([[3, 1, 2], [5, 0, 7], [1 << 20, 0, 12], [1, 2, 13]]).float()
    counts[3, 0] = float("nan")
    mask = torch.tensor([[0, 0, 0], [1, 1, 1], [1, 1, 1], [0, 1, 1]]).bool()
    values = torch.tensor([[0.2, 0.6, 0.2], [0.0, 1.0, 0.0], [0.2, 0.6, 0.2], [0.2, 0.6, 0.2]])
    q = shapes_and_rates(4)
    loss, (by,), by_gammas = kernel(interpret, counts, mask, "values", [values], q)
    assert all(bool(torch.isfinite(t).all()) for t in (loss, by, by_gammas))
    assert loss[0] == 0 and bool((by[0] == 0).all()) and bool((by_gammas[:4, 0] == 0).all())
    expected, (by_exact,), _ = reference(counts.nan_to_num(0), mask, "values", [values.double()], q)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(by.double(), by_exact, rtol=1e-5, atol=1e-5)


def test_no_reflections(interpret):
    empty = torch.empty(0, 4)
    loss, *_ = kernel(interpret, empty, None, "logits", [empty], torch.empty(4, 0, dtype=torch.float64))
    assert loss.shape == (0,)


def test_divergences_and_their_gradients(interpret):
    """Shapes from 0.01 to 1e6; exact: the closed form of the reference and its autograd."""
    shape = torch.logspace(-2, 6, 9, dtype=torch.float64)
    q = torch.stack([shape, shape.flip(0), shape.flip(0), 2 * shape])
    counts = torch.zeros(9, 1)
    loss, _, by = kernel(interpret, counts, None, "values", [torch.zeros(9, 1)], q, nodes=4, kappa=0.3)
    without, _, likelihood = kernel(interpret, counts, None, "values", [torch.zeros(9, 1)], q, nodes=4)
    prior = PRIOR.expand(4, 9).clone().requires_grad_()
    leaf = q.clone().requires_grad_()
    expected = divergences(leaf, prior)
    torch.testing.assert_close(by[8:], expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(by[8], gamma_kl((q[0], q[1]), (PRIOR[0], PRIOR[1])), rtol=1e-12, atol=0)
    torch.testing.assert_close(loss - without, 0.3 * expected.detach().sum(0), rtol=1e-11, atol=1e-9)
    by_q, by_prior = torch.autograd.grad(0.3 * expected.sum(), [leaf, prior])
    size = float(likelihood.abs().max())
    torch.testing.assert_close(by[:4] - likelihood[:4], by_q, rtol=1e-7, atol=1e-8 + 1e-15 * size)
    torch.testing.assert_close(by[4:8], by_prior, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("nodes", [4, 16, 0], ids=["4", "16", "auto"])
def test_rule_equals_that_of_the_reference(interpret, nodes):
    shapes = torch.tensor([[0.01, 5e3], [0.7, 0.3], [1.0, 1.0], [40.0, 3.0], [1e4, 1e3]], dtype=torch.float64)
    q = torch.stack([shapes[:, 0], torch.full((5,), 2.0), shapes[:, 1], torch.full((5,), 3.0)]).double().contiguous()
    width = nodes or 96
    photons = torch.tensor([50.0, 3.0, 1e3, 20.0, 1e5], dtype=torch.float64)
    left = interpret(
        "poisson_gamma_elbo", "share_rule", q, photons, uninitialised(5, 5, width), torch.zeros(5).int(), nodes
    )
    chosen = nodes_needed(q[0], q[2], photons).tolist()
    assert nodes or chosen[:2] == [96, 96]
    assert left[3].tolist() == ([nodes] * 5 if nodes else chosen)
    for row, count in enumerate([nodes] * 5 if nodes else chosen):
        intensity, background, weight = quadrature_draws(q[:, row : row + 1], count)
        table = left[2][row, :, :count]
        for result, wanted in zip(table[:3], (intensity[0], background[0], weight[0])):
            torch.testing.assert_close(result, wanted, rtol=1e-8, atol=1e-13 * float(wanted.max()))
        assert float(table[3:].sum(1).abs().max()) < 1e-10  # they weigh differences: they sum to 0


def test_draws_equal_those_of_the_reference(interpret):
    shape = torch.tensor([[0.02, 0.7, 1.0], [3.0, 40.0, 1e4]], dtype=torch.float64)
    seed = torch.tensor(2**40 + 5)
    (*_, draws) = interpret("poisson_gamma_elbo", "standard_gamma", shape, seed, 7, uninitialised(2, 3, 5))
    torch.testing.assert_close(draws, standard_gamma_reference(shape, 5, seed, 7), rtol=1e-10, atol=0)
