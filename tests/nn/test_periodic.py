"""Patch embedding and convolution as modules, against the same built of torch's."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from xtalfast.nn import CircularPatchEmbed3d, PeriodicConv3d
from xtalfast.nn.periodic import fold_batch_norm
from xtalfast.ops.patch_embed import patchify


def maps(n, channels=1, grid=(8, 8, 12)):
    return torch.randn(n, channels, *grid, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def embedding_of_torch(embed, x, norm):
    y = functional.conv3d(functional.pad(x, [3] * 6, mode="circular"), embed.conv_weight)
    return embed.norm(embed.projection(embed.patch_norm(patchify(norm(y), 4, embed.order))))


@pytest.mark.parametrize("order", ["(ph pw pd c)", "(c ph pw pd)"])
def test_embedding_equals_torch_in_training_and_after(order):
    torch.manual_seed(0)
    embed = CircularPatchEmbed3d(1, 16, order=order).double()
    norm = nn.BatchNorm3d(10).double()
    x = 3 + maps(2)
    found, wanted = embed(x), embedding_of_torch(embed, x, norm)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    by = [torch.autograd.grad(t.square().sum(), [embed.conv_weight, embed.projection.weight]) for t in (found, wanted)]
    for a, b in zip(*by):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for name, value in norm.state_dict().items():
        if name.startswith(("running", "num")):
            torch.testing.assert_close(embed.batch_norm.state_dict()[name], value, rtol=1e-11, atol=1e-12)
    embed.eval(), norm.eval()
    torch.testing.assert_close(embed(x), embedding_of_torch(embed, x, norm), rtol=1e-10, atol=1e-10)


def test_counted_maps_have_the_statistics_of_repeated_ones():
    torch.manual_seed(0)
    embed = CircularPatchEmbed3d(1, 16).double()
    x, counts = maps(3), torch.tensor([2, 1, 4])
    once = embed(x, counts)
    statistics = [embed.batch_norm.running_mean.clone(), embed.batch_norm.running_var.clone()]
    embed.batch_norm.reset_running_stats()
    torch.testing.assert_close(embed(x.repeat_interleave(counts, 0)), once.repeat_interleave(counts, 0))
    torch.testing.assert_close([embed.batch_norm.running_mean, embed.batch_norm.running_var], statistics)


@pytest.mark.parametrize("padding", ["wrap", "zeros"])
def test_convolution_equals_torch(padding):
    torch.manual_seed(0)
    convolution = PeriodicConv3d(3, 4, 5, padding=padding).double()
    theirs = nn.Conv3d(3, 4, 5, padding=2, padding_mode="circular" if padding == "wrap" else "zeros").double()
    theirs.load_state_dict(convolution.state_dict())
    torch.testing.assert_close(convolution(maps(2, 3)), theirs(maps(2, 3)))


def test_two_layers_hand_on_their_statistics():
    """relu, BatchNorm, convolution, twice, in training mode."""
    torch.manual_seed(0)
    first, second = (PeriodicConv3d(3, 3, 3, padding="zeros").double() for _ in range(2))
    norms = [nn.BatchNorm3d(3).double() for _ in range(2)]
    x = maps(2, 3)
    wanted = second(norms[1](torch.relu(first(norms[0](torch.relu(x))))))
    lit = torch.relu(x)
    y, mean, var = first(
        x,
        *fold_batch_norm(norms[0], lit.mean((0, 2, 3, 4)), lit.var((0, 2, 3, 4), correction=0)),
        relu=True,
        statistics=True,
    )
    torch.testing.assert_close(second(y, *fold_batch_norm(norms[1], mean, var), relu=True), wanted)
