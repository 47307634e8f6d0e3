"""Profiles in their four forms give the same pixel values, dense and ragged."""

import pytest
import torch

from xtalfast.ops import LowRankProfile, MVNProfile, SoftmaxProfile, materialise


def grid(z, y, x):
    axes = (torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in (z, y, x))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)


def test_gaussian_is_the_multivariate_normal_density_normalised_over_the_box():
    points = grid(3, 5, 7)
    mean = torch.tensor([[0.1, -0.4, 0.7], [0.0, 0.2, 0.0]], dtype=torch.float64)
    scale = torch.tensor([[[0.7, 0, 0], [0.2, 1.1, 0], [-0.3, 0.5, 1.4]]], dtype=torch.float64).expand(2, -1, -1)
    normal = torch.distributions.MultivariateNormal(mean, scale_tril=scale)
    density = normal.log_prob(points[:, None]).exp().T
    torch.testing.assert_close(
        materialise(MVNProfile(mean, scale, points)), density / density.sum(1, keepdim=True), rtol=1e-12, atol=1e-15
    )


def test_low_rank_is_the_softmax_of_its_logits():
    torch.manual_seed(0)
    latent, basis, bias = torch.randn(4, 3), torch.randn(3, 12), torch.randn(12)
    torch.testing.assert_close(
        materialise(LowRankProfile(latent, basis, bias)), materialise(SoftmaxProfile(latent @ basis + bias))
    )


def test_ragged_rows_equal_the_boxes_taken_alone():
    torch.manual_seed(0)
    sizes = [(1, 3, 3), (3, 2, 4), (1, 1, 1)]
    grids = [grid(*size) for size in sizes]
    ptr = torch.tensor([0, *(len(g) for g in grids)]).cumsum(0)
    logits = torch.randn(int(ptr[-1]), dtype=torch.float64) * 5
    mean = torch.randn(3, 3, dtype=torch.float64)
    scale = torch.eye(3, dtype=torch.float64).expand(3, -1, -1) * 0.8
    soft = materialise(SoftmaxProfile(logits), ptr)
    gauss = materialise(MVNProfile(mean, scale, torch.cat(grids)), ptr)
    for n in range(3):
        rows = slice(int(ptr[n]), int(ptr[n + 1]))
        torch.testing.assert_close(soft[rows], torch.softmax(logits[rows], 0))
        torch.testing.assert_close(gauss[rows], materialise(MVNProfile(mean[n : n + 1], scale[n : n + 1], grids[n]))[0])


def test_low_rank_refuses_ragged_boxes():
    with pytest.raises(ValueError, match="one size"):
        materialise(LowRankProfile(torch.ones(1, 1), torch.ones(1, 4), torch.ones(4)), torch.tensor([0, 4]))
