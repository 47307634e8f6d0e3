"""Nystrom attention as a module: self-attention, or attention of tokens over themselves and a context."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from xtalfast.ops.nystrom_attention import Attention, Pinv, batch_pinv_scale, legacy_padding, nystrom_attention


class NystromAttention(nn.Module):
    """Multi-head attention whose cost grows linearly with the number of tokens; a drop-in for self-attention.

    Tokens ask; keys and values come from the tokens and, if given, from a context that itself never asks. One
    projection serves both. See `xtalfast.ops.nystrom_attention` for the mathematics.

    Args:
        dim: width of the tokens.
        heads, dim_head: number and width of the heads.
        landmarks, iterations, pinv, attention: as in the op.
        residual_taps: of the convolution of the values along the tokens, odd; 0 for none.
        gate: whether the scores between landmarks have learned gates (they start open by half, logits 0).
        mask_padding: True: a sequence is as long as it is. False: as in the public implementation of the density paper,
            zero tokens before the tokens and before the context make both counts multiples of `landmarks`, and are keys
            like others.
        pinv_scale: "matrix", or "batch" as in the public implementation: examples then depend on their batch mates.
        dropout: after the output projection.

    Shape:
        x [B, S, dim], context [B, P, dim] -> [B, S, dim].
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        dim_head: int = 64,
        *,
        landmarks: int = 64,
        iterations: int = 6,
        residual_taps: int = 33,
        gate: bool = False,
        mask_padding: bool = True,
        pinv: Pinv = "iterative",
        pinv_scale: Literal["matrix", "batch"] = "matrix",
        attention: Attention = "nystrom",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if pinv_scale not in ("matrix", "batch"):
            raise ValueError(f"pinv_scale must be 'matrix' or 'batch', got {pinv_scale!r}")
        if residual_taps and residual_taps % 2 == 0:
            raise ValueError(f"residual_taps must be odd, or 0 for none, got {residual_taps}")
        self.heads, self.landmarks, self.iterations = heads, landmarks, iterations
        self.mask_padding, self.pinv, self.pinv_scale, self.attention = mask_padding, pinv, pinv_scale, attention
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim)
        self.dropout = nn.Dropout(dropout)
        self.residual = nn.Parameter(torch.empty(heads, residual_taps)) if residual_taps else None
        self.gate = nn.Parameter(torch.zeros(heads, landmarks, landmarks)) if gate else None
        if self.residual is not None:
            bound = residual_taps**-0.5  # as a torch convolution of that many inputs
            nn.init.uniform_(self.residual, -bound, bound)

    def split_heads(self, projected: Tensor) -> Tensor:
        """[B, n, heads dim_head] -> [B, heads, n, dim_head], a view."""
        return projected.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of tokens, [B, heads, n, dim_head] each."""
        q, k, v = (self.split_heads(part) for part in self.to_qkv(x).chunk(3, -1))
        return q, k, v

    def project_context(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a context; its queries are never computed."""
        weight = self.to_qkv.weight[len(self.to_qkv.weight) // 3 :]
        k, v = (self.split_heads(part) for part in functional.linear(context, weight).chunk(2, -1))
        return k, v

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        context_kv: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: tokens, [B, S, dim].
            context: further tokens to attend to, [B, P, dim].
            context_kv: keys and values of the context instead, [B, heads, P, dim_head] each, where they are known.
            mask, context_mask: tokens that are there, bool [B, S] and [B, P]; None: all.
        """
        q, k, v = self.project(x)
        if context is not None:
            context_kv = self.project_context(context)
        n_tokens, n_context = q.shape[2], 0 if context_kv is None else context_kv[0].shape[2]
        front = between = 0
        if not self.mask_padding and self.attention != "exact":
            if mask is not None or context_mask is not None:
                raise ValueError("masks need mask_padding=True; zero tokens are keys with mask_padding=False")
            front, between = legacy_padding(n_tokens, n_context, self.landmarks)
            q = functional.pad(q, (0, 0, front, 0))
        if context_kv is not None or front or between:
            parts = zip((k, v), context_kv or (k[:, :, :0], v[:, :, :0]))
            k, v = (
                torch.cat([functional.pad(own, (0, 0, front, between)), other.to(own.dtype)], 2) for own, other in parts
            )
        key_mask = mask
        if context_kv is not None and (mask is not None or context_mask is not None):
            masks = (mask, n_tokens), (context_mask, n_context)
            ones = (x.new_ones(len(x), n, dtype=torch.bool) if m is None else m for m, n in masks)
            key_mask = torch.cat(list(ones), 1)
        scale = None
        if self.pinv_scale == "batch" and self.attention != "exact" and self.pinv == "iterative":
            scale = batch_pinv_scale(q, k, self.gate, self.landmarks)
        out = nystrom_attention(
            *(q, k, v, self.residual, self.gate),
            landmarks=self.landmarks,
            iterations=self.iterations,
            pinv=self.pinv,
            pinv_scale=scale,
            query_mask=mask,
            key_mask=key_mask,
            attention=self.attention,
        )
        return self.dropout(self.to_out(out[:, :, front:].transpose(1, 2).flatten(2)))
