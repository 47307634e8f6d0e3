"""Layers of RecCrysFormer: periodic patch embedding, batch norm by counts, attention, residual blocks."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from xtalfast.density.model_config import RecCrysFormerConfig

_BLOCK = 64  # rows of the banded matrix that stands for the convolution along tokens


class CountedBatchNorm3d(nn.BatchNorm3d):
    """Batch norm over maps that stand for several each, and over all processes of a distributed run.

    Statistics are those of the batch in which map i is repeated counts[i] times; with several processes, of all their
    batches joined. Without either it is `torch.nn.BatchNorm3d`.
    """

    def forward(self, x: Tensor, counts: Tensor | None = None) -> Tensor:
        """x [B, C, X, Y, Z]; counts [B]."""
        spread = self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not self.training or (counts is None and not spread):
            return super().forward(x)
        weight = x.new_ones(len(x)) if counts is None else counts.to(x.dtype)
        n_voxels = x[0, 0].numel()
        totals = torch.cat([weight @ x.mean((2, 3, 4)), weight.sum()[None]])
        totals = _sum_over_processes(totals) if spread else totals
        mean, count = totals[:-1] / totals[-1], totals[-1].detach()
        variance = weight @ (x - mean.view(-1, 1, 1, 1)).square().mean((2, 3, 4))
        variance = (_sum_over_processes(variance) if spread else variance) / count
        with torch.no_grad():
            assert self.running_mean is not None and self.running_var is not None
            assert self.num_batches_tracked is not None and self.momentum is not None
            self.num_batches_tracked += 1
            n = count * n_voxels
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((variance * (n / (n - 1))).to(self.running_var.dtype), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return x * scale.view(-1, 1, 1, 1) + (self.bias - mean * scale).view(-1, 1, 1, 1)


def _sum_over_processes(values: Tensor) -> Tensor:
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(values)


def conv3d_periodic(x: Tensor, weight: Tensor) -> Tensor:
    """Cross-correlation of periodic maps [B, C, X, Y, Z] with kernels [O, C, k, k, k], by Fourier transforms.

    Its gradients cost as much as itself, where a direct convolution with few channels pays ten times for its weights.
    """
    shape = x.shape[2:]
    centre = torch.arange(weight.shape[-1], device=x.device) - weight.shape[-1] // 2
    kernel = weight.new_zeros(*weight.shape[:2], *shape)
    places = [(centre % n).view([-1 if axis == i else 1 for i in range(3)]) for axis, n in enumerate(shape)]
    # A kernel wider than the cell meets its own copies: they add up.
    kernel = kernel.index_put((slice_all(kernel, 0), slice_all(kernel, 1), *places), weight, accumulate=True)
    axes = (-3, -2, -1)
    spectrum = torch.einsum(
        "bcxyz,ocxyz->boxyz", torch.fft.rfftn(x, dim=axes), torch.fft.rfftn(kernel, dim=axes).conj()
    )
    return torch.fft.irfftn(spectrum, s=shape, dim=axes)


def slice_all(tensor: Tensor, axis: int) -> Tensor:
    """Indices of all of one of the first two axes, to be broadcast with three spatial ones."""
    n = torch.arange(tensor.shape[axis], device=tensor.device)
    return n.view(-1, 1, 1, 1, 1) if axis == 0 else n.view(1, -1, 1, 1, 1)


def to_patches(x: Tensor, patch: int, channels_last: bool) -> Tensor:
    """Maps [B, C, X, Y, Z] -> patches [B, tokens, C * patch^3]; the channel varies fastest or slowest."""
    b, c, x_size, y_size, z_size = x.shape
    grid = (x_size // patch, y_size // patch, z_size // patch)
    blocks = x.view(b, c, grid[0], patch, grid[1], patch, grid[2], patch)
    order = (0, 2, 4, 6, 3, 5, 7, 1) if channels_last else (0, 2, 4, 6, 1, 3, 5, 7)
    return blocks.permute(order).reshape(b, math.prod(grid), c * patch**3)


def from_patches(tokens: Tensor, patch: int, grid: tuple[int, int, int]) -> Tensor:
    """The inverse of `to_patches` with channels last; grid: voxels along each axis."""
    sizes = [n // patch for n in grid]
    blocks = tokens.view(len(tokens), *sizes, patch, patch, patch, -1)
    return blocks.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(len(tokens), -1, *grid)


class PatchEmbed(nn.Module):
    """Periodic convolution, batch norm, patches, and a linear layer between layer norms: maps -> tokens."""

    def __init__(self, config: RecCrysFormerConfig, in_channels: int, channels_last: bool) -> None:
        super().__init__()
        self.patch, self.channels_last = config.patch, channels_last
        width = config.channels * config.patch**3
        self.conv = nn.Conv3d(in_channels, config.channels, config.stem_kernel, bias=False)
        self.norm = CountedBatchNorm3d(config.channels)
        self.norm_in = nn.LayerNorm(width)
        self.linear = nn.Linear(width, config.dim)
        self.norm_out = nn.LayerNorm(config.dim)

    def forward(self, x: Tensor, counts: Tensor | None = None) -> Tensor:
        """x [B, C, X, Y, Z], each map standing for counts [B] -> [B, tokens, dim]."""
        y = self.norm(conv3d_periodic(x, self.conv.weight), counts)
        return self.norm_out(self.linear(self.norm_in(to_patches(y, self.patch, self.channels_last))))


def conv_tokens(v: Tensor, weight: Tensor, n: int) -> Tensor:
    """The first n rows of a depthwise convolution along the tokens of v [B, H, N, D], weight [H, taps].

    As a banded matrix times blocks of tokens: a matrix product instead of one pass over memory for each tap.
    """
    taps = weight.shape[1]
    half = taps // 2
    blocks = math.ceil(n / _BLOCK)
    needed = blocks * _BLOCK + half
    padded = F.pad(v[:, :, :needed], (0, 0, half, max(needed - v.shape[2], 0)))
    windows = padded.unfold(2, _BLOCK + 2 * half, _BLOCK)  # [B, H, blocks, D, window]
    offset = torch.arange(_BLOCK + 2 * half, device=v.device)[:, None] - torch.arange(_BLOCK, device=v.device)
    inside = (offset >= 0) & (offset < taps)
    band = torch.where(inside, weight[:, offset.clamp(0, taps - 1)], 0)  # [H, window, rows]
    rows = windows @ band[:, None]
    return rows.mT.flatten(2, 3)[:, :, :n]


def inverse_of_landmarks(a: Tensor, config: RecCrysFormerConfig) -> Tensor:
    """Pseudo-inverse of the landmarks' attention [..., m, m] by iteration, which 6 steps leave regularised.

    Ref: Xiong et al. (2021) Nystromformer, equation 14; Razavi et al. (2014).
    """
    if config.pinv_ridge is not None:
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        return torch.linalg.solve(a.mT @ a + config.pinv_ridge * eye, a.mT)
    columns, rows = a.sum(-1).amax(-1), a.sum(-2).amax(-1)
    if config.pinv_scale == "batch":
        columns, rows = columns.max(), rows.max()
    z = a.mT / (columns * rows)[..., None, None]
    for _ in range(config.pinv_iterations):
        az = a @ z
        z = 0.25 * (13 * z - z @ (15 * az - az @ (7 * az - az @ az)))
    return z


class Attention(nn.Module):
    """Tokens of the map attend to themselves and to the residues, which attend to nothing (one-way)."""

    def __init__(self, config: RecCrysFormerConfig) -> None:
        super().__init__()
        self.config = config
        inner = config.heads * config.dim_head
        self.to_qkv = nn.Linear(config.dim, 3 * inner, bias=False)
        self.to_out = nn.Linear(inner, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        taps = config.conv_taps
        self.conv = nn.Parameter(torch.empty(config.heads, taps).uniform_(-(taps**-0.5), taps**-0.5)) if taps else None
        m = config.landmarks
        gated = config.sim_gate and not config.uses_exact_attention
        self.gate = nn.Parameter(torch.zeros(config.heads, m, m)) if gated else None

    def forward(self, x: Tensor, residue_kv: Tensor) -> Tensor:
        """x [B, S, dim], residue_kv [B, P, 2 * heads * dim_head] -> [B, S, dim]."""
        config = self.config
        q, k, v = self.to_qkv(x).chunk(3, -1)
        k_residues, v_residues = residue_kv.chunk(2, -1)
        n = x.shape[1]
        front, between = 0, 0
        if not (config.uses_exact_attention or config.mask_padding):
            front = -n % config.landmarks
            between = -(n + front + residue_kv.shape[1]) % config.landmarks
        q = self._split(F.pad(q, (0, 0, front, 0)))
        k, v = (
            self._split(torch.cat([F.pad(own, (0, 0, front, between)), given], 1))
            for own, given in ((k, k_residues), (v, v_residues))
        )
        if config.uses_exact_attention:
            mixed = exact_attention(q, k, v)
        else:
            mixed = self._nystrom(q, k, v)
        if self.conv is not None:
            mixed = mixed + conv_tokens(v, self.conv, q.shape[2])
        mixed = mixed[:, :, front:].transpose(1, 2).flatten(2)
        return self.dropout(self.to_out(mixed))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.config.heads, self.config.dim_head)).transpose(1, 2)

    def _nystrom(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k_l) (softmax(q_l k_l))^+ softmax(q_l k) v with landmarks l: means of consecutive tokens."""
        m = self.config.landmarks
        q_landmarks, k_landmarks = (segment_means(rows, m) for rows in (q, k))
        similarity = q_landmarks @ k_landmarks.mT * self.config.dim_head**-0.5
        if self.gate is not None:
            similarity = similarity * self.gate[:, : similarity.shape[-2], : similarity.shape[-1]].sigmoid()
        gathered = F.scaled_dot_product_attention(q_landmarks, k, v)
        core = inverse_of_landmarks(similarity.softmax(-1), self.config) @ gathered
        return F.scaled_dot_product_attention(q, k_landmarks, core)


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k / sqrt(D)) v of [B, H, S, D] and [B, H, N, D]."""
    if q.is_cuda or k.shape[2] > _SHORT:
        return F.scaled_dot_product_attention(q, k, v)
    # torch's fused backward pass for CPUs takes several times as long as three matrix products when keys are few.
    return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1).to(v.dtype) @ v


_SHORT = 512


def segment_means(rows: Tensor, m: int) -> Tensor:
    """Means of m runs of tokens [B, H, N, D] -> [B, H, m, D]; where m does not divide N, runs differ by one token."""
    n = rows.shape[2]
    if n % m == 0:
        return rows.unflatten(2, (m, n // m)).mean(3)
    m = min(m, n)
    edges = torch.arange(m + 1, device=rows.device) * n // m
    inside = torch.arange(n, device=rows.device)
    pool = (inside >= edges[:-1, None]) & (inside < edges[1:, None])
    return (pool / torch.diff(edges)[:, None]).to(rows.dtype) @ rows


class FeedForward(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, config: RecCrysFormerConfig) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(config.dim, config.ff_dim),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.ff_dim, config.dim),
            nn.Dropout(config.dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class ResidualBlock(nn.Module):
    """Four convolutions, each behind ReLU and batch norm: 1, 5, 5 and 1 voxels wide. Ref: BigGAN."""

    def __init__(self, config: RecCrysFormerConfig) -> None:
        super().__init__()
        self.wrap, self.legacy_skip = config.decoder_padding == "wrap", config.legacy_inplace_skip
        c = config.channels
        self.norms = nn.ModuleList(CountedBatchNorm3d(c) for _ in range(4))
        self.convs = nn.ModuleList(nn.Conv3d(c, c, size, bias=size == 1 and last) for size, last in _BLOCK_CONVS)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for norm, conv in zip(self.norms, self.convs):
            assert isinstance(conv, nn.Conv3d)
            y = conv3d_same(norm(F.relu(y)), conv.weight, conv.bias, self.wrap)
        return y + (F.relu(x) if self.legacy_skip else x)


_BLOCK_CONVS = ((1, False), (5, False), (5, False), (1, True))


def conv3d_same(x: Tensor, weight: Tensor, bias: Tensor | None, wrap: bool) -> Tensor:
    """Convolution that keeps the grid, with zeros outside the cell or the cell's own copies."""
    half = weight.shape[-1] // 2
    if wrap and half:
        x = F.pad(x, (half,) * 6, mode="circular")
    return F.conv3d(x, weight, bias, padding=0 if wrap else half)
