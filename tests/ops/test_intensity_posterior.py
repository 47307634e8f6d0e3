"""The exact posterior against a dense two-dimensional grid, its identities and its edge cases."""

import math

import numpy as np
import pytest
import torch

from xtalfast import _native
from xtalfast.ops import SoftmaxProfile, intensity_posterior
from xtalfast.ops.intensity_posterior import intensity_posterior_reference
from xtalfast.testing import assert_within_twin_error

PAPER, STILL, TINY = (3, 21, 21), (1, 9, 9), (1, 3, 3)
FLAT = ((1.0, 0.0), (1.0, 0.0))


def spot(box):
    axes = (torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in box)
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    values = torch.exp(-(z**2 / 0.5 + (y**2 + x**2) / 2.5)).reshape(-1)
    return values / values.sum()


def simulate(intensity, background, box, n=1, seed=0):
    profile = spot(box)
    generator = torch.Generator().manual_seed(seed)
    counts = torch.poisson((intensity * profile + background).expand(n, -1), generator=generator)
    return counts.to(torch.int32), profile.expand(n, -1)


def dense_grid(counts, profile, prior_i, prior_bg, n=600):
    """Means, sds and log-evidence on a two-dimensional grid of n x n midpoints over (I^shape, B), one box."""
    (a, alpha), (c, beta) = prior_i, prior_bg
    # pixels of one expected rate count as one: the sums are the same
    p, group = torch.unique(profile, return_inverse=True)
    y = torch.zeros_like(p).index_add_(0, group, counts.double())
    p, y = p[y > 0], y[y > 0]
    root = min(a, 1.0)  # I = s^(1/root) takes the singularity of a small shape out

    def log_joint(i, b):
        rate = i[:, None, None] * p + b[None, :, None]
        value = (y * rate.log()).sum(-1) - i[:, None] * (profile.sum() + alpha) - b * (len(profile) + beta)
        return value + (a - 1) * i.log()[:, None] + (c - 1) * b.log() + (1 / root - 1) * root * i.log()[:, None]

    low_i, high_i, low_b, high_b = 0.0, 3.0 * float(counts.sum()) + 60, 0.0, float(counts.sum()) / len(profile) * 2 + 2
    for size in (150, 150, 150, n):  # zoom to where the joint density is within e^-24 of its maximum
        s = torch.linspace(low_i**root, high_i**root, size + 1, dtype=torch.float64)
        i = (0.5 * (s[1:] + s[:-1])) ** (1 / root)
        b = torch.linspace(low_b, high_b, size + 1, dtype=torch.float64)
        b = 0.5 * (b[1:] + b[:-1])
        joint = torch.cat([log_joint(part, b) for part in i.split(25)])
        ds, db = float(s[1] - s[0]), float(b[1] - b[0])
        near = joint > joint.max() - 24
        rows, columns = near.any(1).nonzero().squeeze(1), near.any(0).nonzero().squeeze(1)
        if size != n:
            low_i = 0.0 if rows[0] == 0 else float(i[rows[0] - 1])
            low_b = 0.0 if columns[0] == 0 else float(b[columns[0] - 1])
            high_i, high_b = (float(g[min(k[-1] + 1, size - 1)]) for g, k in ((i, rows), (b, columns)))
    log_mass = torch.logsumexp(joint.reshape(-1), 0) + math.log(ds * db / root)
    weight = torch.softmax(joint.reshape(-1), 0).reshape(joint.shape)
    w_i, w_b = weight.sum(1), weight.sum(0)
    mean_i, mean_b = (w_i * i).sum(), (w_b * b).sum()
    evidence = log_mass - torch.lgamma(counts.double() + 1).sum()
    for shape, rate in (prior_i, prior_bg):
        evidence = evidence + (shape * math.log(rate) - math.lgamma(shape) if rate > 0 else 0.0)
    cdf = w_i.cumsum(0) - 0.5 * w_i
    sd = [(w * (g - m) ** 2).sum().sqrt() for w, g, m in ((w_i, i, mean_i), (w_b, b, mean_b))]
    return mean_i, sd[0], mean_b, sd[1], evidence, (i, cdf)


@pytest.mark.parametrize("prior_i", [(1.0, 0.01), (0.5, 0.002), (3.0, 0.05)], ids=["acentric", "centric", "gamma"])
@pytest.mark.parametrize("background", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("intensity", [0.0, 3.0, 50.0, 1e4])
@pytest.mark.parametrize("box", [TINY, STILL, PAPER], ids=["px1x3x3", "px1x9x9", "px3x21x21"])
def test_moments_against_a_dense_grid(box, intensity, background, prior_i):
    counts, profile = simulate(intensity, background, box)
    prior_bg = (1.0, 0.1)
    exact_i, sd_i, exact_b, sd_b, evidence, _ = dense_grid(counts[0], profile[0], prior_i, prior_bg, n=300)
    for dtype in (torch.float64, torch.float32):
        post = intensity_posterior(counts, None, profile.to(dtype), prior_i, prior_bg)
        assert abs(float(post.mean_i - exact_i)) < 0.02 * float(sd_i)
        assert abs(float(post.mean_bg - exact_b)) < 0.02 * float(sd_b)
        assert float(post.var_i.sqrt() / sd_i) == pytest.approx(1, abs=0.02)
        assert float(post.var_bg.sqrt() / sd_b) == pytest.approx(1, abs=0.02)
        assert float(post.log_evidence) == pytest.approx(float(evidence), abs=0.01)
        torch.testing.assert_close(post.shape_i / post.rate_i, post.mean_i)
        torch.testing.assert_close(post.shape_i / post.rate_i**2, post.var_i)


@pytest.mark.parametrize("background", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("intensity", [0.0, 30.0, 1e4])
def test_paper_box_converges_with_nodes(intensity, background):
    """The moments of 24 nodes are those of 200, far closer than the grid above can tell."""
    counts, profile = simulate(intensity, background, PAPER, n=8)
    default, many = (
        intensity_posterior(counts, None, profile, (1.0, 0.01), (1.0, 0.1), nodes=nodes) for nodes in (24, 200)
    )
    assert float(((default.mean_i - many.mean_i).abs() / many.var_i.sqrt()).max()) < 1e-3
    assert float((default.var_i / many.var_i - 1).abs().max()) < 2e-3


@pytest.mark.parametrize("box", [PAPER, STILL, (1, 1, 2)], ids=["paper", "still", "two pixels"])
def test_flat_prior_gives_the_counts_plus_two(box):
    """Physical identity: with a flat prior on I, B >= 0 the rates sum to the counts plus 2 in the mean, exactly."""
    counts, profile = simulate(20.0, 0.3, box, n=5)
    mask = torch.rand(counts.shape, generator=torch.Generator().manual_seed(1)) < 0.8
    mask[:, :2] = True
    post = intensity_posterior(counts, mask, profile, *FLAT)
    total = post.mean_i * (profile * mask).sum(1) + post.mean_bg * mask.sum(1)
    torch.testing.assert_close(total, (counts * mask).sum(1).double() + 2, rtol=1e-12, atol=0)


def test_without_background_the_posterior_is_the_conjugate_gamma():
    """A background prior at 0 leaves Gamma(a + sum y, alpha + sum p)."""
    counts, profile = simulate(40.0, 0.0, STILL, n=4)
    post = intensity_posterior(counts, None, profile, (2.0, 0.1), (1.0, 1e6))
    shape, rate = counts.sum(1) + 2.0, 1.1
    torch.testing.assert_close(post.mean_i, (shape / rate).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(post.var_i, (shape / rate**2).double(), rtol=1e-4, atol=0)


def test_quantiles_against_the_dense_grid():
    counts, profile = simulate(12.0, 1.0, STILL)
    *_, (i, cdf) = dense_grid(counts[0], profile[0], (1.0, 0.01), (1.0, 0.1))
    probabilities = (0.025, 0.5, 0.975)
    post = intensity_posterior(counts, None, profile, (1.0, 0.01), (1.0, 0.1), quantiles=probabilities)
    for column, probability in enumerate(probabilities):
        exact = float(np.interp(probability, cdf, i))
        assert abs(float(post.quantiles_i[0, column]) - exact) < 0.01 * float(post.var_i.sqrt())


def test_coverage_of_intervals_over_the_prior():
    """Simulation-based calibration: intensities drawn from the prior lie in the 68 % interval 68 % of the time."""
    n = 2000
    generator = torch.Generator().manual_seed(5)
    profile = spot(STILL).expand(n, -1)
    truth = -torch.log(torch.rand(n, 1, generator=generator, dtype=torch.float64)) * 30
    background = -torch.log(torch.rand(n, 1, generator=generator, dtype=torch.float64))
    counts = torch.poisson(truth * profile + background, generator=generator).int()
    post = intensity_posterior(counts, None, profile, (1.0, 1 / 30), (1.0, 1.0), quantiles=(0.16, 0.84), nodes=16)
    inside = ((truth[:, 0] > post.quantiles_i[:, 0]) & (truth[:, 0] < post.quantiles_i[:, 1])).double().mean()
    assert abs(float(inside) - 0.68) < 4 * math.sqrt(0.68 * 0.32 / n)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_against_the_reference_and_in_single_precision(dtype):
    counts, profile = simulate(torch.logspace(0, 4, 9, dtype=torch.float64)[:, None], 0.7, STILL, n=9)
    prior = ((1.0, 0.01), (1.0, 0.1))
    result = intensity_posterior(counts, None, profile.to(dtype), *prior)
    twin = intensity_posterior_reference(counts, None, profile.to(dtype), *prior)
    exact = intensity_posterior_reference(counts, None, profile, *prior)
    for name in ("mean_i", "var_i", "mean_bg", "var_bg", "log_evidence"):
        values = (getattr(post, name).to(dtype) for post in (result, twin))
        wanted = getattr(exact, name)
        # the density is a sum of terms as large as the counts: its relative error multiplies every moment
        assert_within_twin_error(*values, wanted, float(counts.sum(1).max()) * float(wanted.abs().max()))


def test_ragged_masked_and_softmax_forms_agree():
    parts = [simulate(9.0, 0.5, box, seed=k) for k, box in enumerate([TINY, STILL, (1, 1, 1)])]
    counts, profile = (torch.cat([part[k].reshape(-1) for part in parts]) for k in range(2))
    ptr = torch.tensor([0, *(part[0].numel() for part in parts)]).cumsum(0)
    mask = (torch.arange(len(counts)) % 7 != 3).to(torch.uint8)
    ragged = intensity_posterior(counts, mask, SoftmaxProfile(profile.log()), (1.0, 0.1), (1.0, 0.5), ptr=ptr)
    for k, (counts, profile) in enumerate(parts):
        alone = intensity_posterior(
            counts,
            mask[ptr[k] : ptr[k + 1]][None],
            profile,
            (1.0, 0.1),
            (1.0, 0.5),
            background=torch.ones(len(profile[0])),
        )
        torch.testing.assert_close(ragged.mean_i[k], alone.mean_i[0])
        torch.testing.assert_close(ragged.log_evidence[k], alone.log_evidence[0])


def test_box_without_used_pixels_gives_the_prior_back():
    counts, profile = simulate(5.0, 1.0, TINY, n=2)
    mask = torch.zeros(counts.shape, dtype=torch.bool)
    post = intensity_posterior(counts, mask, profile, (2.0, 0.5), (3.0, 6.0))
    torch.testing.assert_close(post.mean_i, torch.full((2,), 4.0, dtype=torch.float64))
    torch.testing.assert_close(post.var_i, torch.full((2,), 8.0, dtype=torch.float64))
    torch.testing.assert_close(post.mean_bg, torch.full((2,), 0.5, dtype=torch.float64))
    torch.testing.assert_close(post.log_evidence, torch.zeros(2, dtype=torch.float64), atol=1e-6, rtol=0)
    flat = intensity_posterior(counts, mask, profile, *FLAT)
    assert bool(torch.isinf(flat.mean_i).all() and torch.isinf(flat.var_bg).all())


def test_extremes_are_finite():
    profile = spot(STILL)[None].float()
    for counts in (torch.full((1, 81), 2**20, dtype=torch.int32), torch.zeros(1, 81, dtype=torch.int32)):
        post = intensity_posterior(counts, None, profile, *FLAT)
        assert all(bool(torch.isfinite(value).all()) for value in vars(post).values())
    nothing = torch.tensor([[0.0, 1.0]])
    assert bool(torch.isfinite(intensity_posterior(torch.tensor([[3, 0]]), None, nothing, *FLAT).mean_i).all())


def test_no_reflections():
    empty = torch.zeros(0, 9)
    assert intensity_posterior(empty.int(), None, empty, *FLAT, quantiles=(0.5,)).quantiles_i.shape == (0, 1)


def test_bad_input_is_named():
    counts, profile = simulate(5.0, 1.0, TINY)
    with pytest.raises(ValueError, match="quantiles must be between 0 and 1"):
        intensity_posterior(counts, None, profile, *FLAT, quantiles=(50.0,))
    with pytest.raises(ValueError, match="nodes must be at least 2"):
        intensity_posterior(counts, None, profile, *FLAT, nodes=1)
    with pytest.raises(ValueError, match=r"prior_i must hold numbers or \[N\] with N=1"):
        intensity_posterior(counts, None, profile, (1.0, torch.ones(3)), FLAT[1])


def test_operator_passes_opcheck():
    counts, profile = simulate(20.0, 1.0, TINY, n=3)
    prior = torch.tensor([[1.0], [0.1], [1.0], [0.5]], dtype=torch.float64).repeat(1, 3)
    torch.library.opcheck(torch.ops.xtalfast.share_likelihood, (counts, None, None, None, profile, prior, 8))


def test_without_the_extension_the_reference_gives_the_same(monkeypatch):
    counts, profile = simulate(torch.logspace(0, 4, 9, dtype=torch.float64)[:, None], 0.7, STILL, n=9)
    arguments = (counts, None, profile, (0.5, 0.01), (1.0, 0.1))
    fused = intensity_posterior(*arguments, quantiles=(0.1, 0.9))
    monkeypatch.setattr(_native, "C", None)
    plain = intensity_posterior(*arguments, quantiles=(0.1, 0.9))
    for one, other in zip(vars(fused).values(), vars(plain).values()):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [1e2, 1e3, 1e5])
def test_a_peaked_background_prior_gives_the_definition(shape):
    """The search for the mode ends where 1 - X is still above 0, whatever its bracket."""
    generator = torch.Generator().manual_seed(0)
    profile = torch.softmax(-0.5 * torch.linspace(-6, 6, 300).square(), 0).expand(200, -1).contiguous()
    intensity = torch.linspace(0, 100, 200)[:, None]
    counts = torch.poisson(intensity * profile + 1.0, generator=generator).to(torch.int32)
    mask = torch.rand(counts.shape, generator=generator) > 0.3
    arguments = (counts, mask, profile, (1.0, 0.02), (shape, shape))
    found, wanted = intensity_posterior(*arguments), intensity_posterior_reference(*arguments)
    assert torch.isfinite(found.mean_i).all() and torch.isfinite(found.var_i).all()
    assert ((found.mean_i - wanted.mean_i).abs() < 1e-3 * wanted.var_i.sqrt()).all()
    assert ((found.var_i / wanted.var_i - 1).abs() < 1e-3).all()
