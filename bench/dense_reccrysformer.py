"""RecCrysFormer written out as it is described, with nothing saved: the baseline of `bench_reccrysformer.py`.

Same parameters and the same mathematics as `xtalfast.density.RecCrysFormer` with Nystrom attention, tables of positions
and zeros around the decoder: every residue of every example goes through stem, embedding and projections, queries of
residue tokens are computed and thrown away, and the convolution along tokens runs over all of them. Our own code, by
the layer-by-layer description of the public implementation; tests hold the network to it in float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xtalfast.density import RecCrysFormer


def embed(module, x: Tensor, batch_norm) -> Tensor:
    """Circular convolution, batch norm, patches, linear layer between layer norms."""
    weight = module.conv_weight
    half = weight.shape[-1] // 2
    y = batch_norm(module.batch_norm, F.conv3d(F.pad(x, (half,) * 6, mode="circular"), weight))
    p = module.patch
    b, c, X, Y, Z = y.shape
    blocks = y.reshape(b, c, X // p, p, Y // p, p, Z // p, p)
    order = (0, 2, 4, 6, 3, 5, 7, 1) if module.order == "(ph pw pd c)" else (0, 2, 4, 6, 1, 3, 5, 7)
    return module.norm(module.projection(module.patch_norm(blocks.permute(order).reshape(b, -1, c * p**3))))


def attention(module, x: Tensor, residues: Tensor) -> Tensor:
    """One-way Nystrom attention over the concatenated sequence."""
    heads, m = module.heads, module.landmarks
    n = x.shape[1]
    x = F.pad(x, (0, 0, -n % m, 0))
    s = x.shape[1]
    residues = F.pad(residues, (0, 0, -(s + residues.shape[1]) % m, 0))
    both = module.to_qkv(torch.cat([x, residues], 1))
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in both.chunk(3, -1))
    q = q[:, :, :s] * q.shape[-1] ** -0.5
    q_landmarks = q.unflatten(2, (m, -1)).mean(3)
    k_landmarks = k.unflatten(2, (m, -1)).mean(3)
    similarity = q_landmarks @ k_landmarks.mT
    if module.gate is not None:
        similarity = similarity * module.gate.sigmoid()
    first, second, third = ((a).softmax(-1) for a in (q @ k_landmarks.mT, similarity, q_landmarks @ k.mT))
    columns, rows = second.sum(-1), second.sum(-2)
    if module.pinv_scale == "batch":
        scale = columns.max() * rows.max()
    else:
        scale = (columns.amax(-1) * rows.amax(-1))[..., None, None]
    z, eye = second.mT / scale, torch.eye(m, dtype=x.dtype, device=x.device)
    for _ in range(module.iterations):
        az = second @ z
        z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
    mixed = (first @ z) @ (third @ v)
    taps = module.residual.shape[1]
    along = F.conv2d(v, module.residual[:, None, :, None], padding=(taps // 2, 0), groups=heads)
    mixed = mixed + along[:, :, :s]
    return module.dropout(module.to_out(mixed.transpose(1, 2).flatten(2)))[:, -n:]


def forward(model: RecCrysFormer, patterson: Tensor, residue_ids: Tensor, template: Tensor | None = None) -> Tensor:
    """What `model(patterson, residue_ids, template)` computes, densely; grids must be multiples of the patch."""

    def batch_norm(norm, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, model.training, norm.momentum, norm.eps
        )

    config = model.config
    x = patterson if template is None else torch.cat([patterson, template], 1)
    grid = x.shape[2:]
    tokens = embed(model.embed, x, batch_norm)
    tokens = model.dropout(tokens + model.positions[: tokens.shape[1]])
    branch = model.residues
    maps = branch.maps[residue_ids.flatten()].to(x.dtype)
    residues = embed(branch.embed, maps, batch_norm).view(len(x), -1, config.dim)
    residues = residues + branch.positions[: residue_ids.shape[1]].flatten(0, 1)
    for layer in model.layers:
        tokens = tokens + attention(layer.attention, layer.norm(tokens), layer.norm_residues(residues))
        tokens = tokens + layer.feed_forward(layer.norm_ff(tokens))
    p = config.patch
    y = model.head(tokens).view(len(x), *(n // p for n in grid), p, p, p, -1)
    y = y.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(len(x), -1, *grid)
    for block in model.blocks:
        skip = y
        for norm, conv in zip(block.norms, block.convs):
            y = F.conv3d(batch_norm(norm, F.relu(y)), conv.weight, conv.bias, padding=conv.weight.shape[-1] // 2)
        y = y + (F.relu(skip) if config.legacy_inplace_skip else skip)
    return torch.tanh(F.conv3d(y, model.last.weight, model.last.bias, padding=1))
