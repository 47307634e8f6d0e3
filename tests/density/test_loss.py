"""The loss against its formula, written out with full complex transforms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xtalfast.density.loss import amplitude_pearson, density_loss, pearson


@pytest.mark.parametrize("shape", [(4, 6, 8), (5, 4, 7), (1, 1, 2)], ids=str)
def test_loss_is_that_of_the_paper(shape):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 3, 1, *shape))
    loss = density_loss(torch.from_numpy(x), torch.from_numpy(y), mse=0.9, pc=0.3, amplitude_pc=0.2)
    for i in range(3):
        pc = np.corrcoef(x[i].ravel(), y[i].ravel())[0, 1]
        amplitudes = [abs(np.fft.fftn(values[i, 0])).ravel() for values in (x, y)]
        of_amplitudes = np.corrcoef(*amplitudes)[0, 1]
        wanted = 0.9 * ((x[i] - y[i]) ** 2).mean() + 0.3 * (1 - pc) + 0.2 * (1 - of_amplitudes)
        assert abs(float(loss[i]) - wanted) < 1e-12


def test_masked_voxels_do_not_count():
    x, y = torch.randn(2, 2, 1, 6, 4, 4, dtype=torch.float64)
    mask = torch.zeros(2, 1, 6, 4, 4, dtype=torch.bool)
    mask[:, :, :4] = True
    same = density_loss(x[:, :, :4], y[:, :, :4], amplitude_pc=0)
    assert torch.allclose(density_loss(x, y, amplitude_pc=0, mask=mask), same, rtol=1e-12)
    changed = torch.where(mask, x, 7.0)
    assert torch.equal(density_loss(x, y, mask=mask), density_loss(changed, y, mask=mask))


def test_flat_maps_have_a_loss_and_gradient():
    x = torch.zeros(1, 1, 4, 4, 4, requires_grad=True)
    density_loss(x, torch.ones(1, 1, 4, 4, 4)).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_correlations_do_not_depend_on_scale_and_shift():
    x, y = torch.randn(2, 5, 4, 6, 4, dtype=torch.float64)
    assert torch.allclose(pearson(3 * x + 2, y), pearson(x, y))
    assert torch.allclose(amplitude_pearson(-2 * x, y), amplitude_pearson(x, y))
    assert torch.allclose(amplitude_pearson(x.roll((1, 2), (1, 3)), x), torch.ones(5, dtype=torch.float64))


def test_gradient():
    x = torch.randn(1, 1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(1, 1, 3, 2, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda values: density_loss(values, y, pc=0.5, amplitude_pc=0.5), x)
