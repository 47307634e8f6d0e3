"""relu, BatchNorm, 5^3 convolution of ten channels, zero-padded, one thread, forward and backward, against torch."""

from __future__ import annotations

import torch

from xtalfast.nn import PeriodicConv3d
from xtalfast.nn.periodic import fold_batch_norm


def test_conv3d_periodic(paired):
    torch.manual_seed(0)
    convolution = PeriodicConv3d(10, 10, 5, padding="zeros", bias=False)
    norm = torch.nn.BatchNorm3d(10)
    theirs = torch.nn.Conv3d(10, 10, 5, padding=2, bias=False)
    x = torch.randn(1, 10, 60, 40, 36, requires_grad=True)

    def ours() -> torch.Tensor:
        lit = torch.relu(x)
        mean, var = lit.mean((0, 2, 3, 4)), lit.var((0, 2, 3, 4), correction=0)
        return convolution(x, *fold_batch_norm(norm, mean, var), relu=True)

    paired(lambda: ours().sum().backward(), lambda: theirs(norm(torch.relu(x))).sum().backward(), rounds=5)
