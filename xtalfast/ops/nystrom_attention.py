"""Nystrom attention in which only the first tokens of a sequence ask: cost linear in both token counts.

With queries q of S tokens, keys k and values v of T tokens (the S and any others), m landmarks qm, km that are means of
consecutive queries and keys, and sigma the softmax over keys,

    out = sigma(q km^T) Z sigma(qm k^T) v + residual * v,    Z ~ sigma(qm km^T)^+,

q scaled by 1 / sqrt(D). Z is found from Z = A^T / (|A|_1 |A|_inf), A = sigma(qm km^T), by iterations of

    Z <- Z/4 (13 - A Z (15 - A Z (7 - A Z))),

six of which leave an error of some percent that trained weights have learned to live with; `pinv="ridge"` solves
(A^T A + eps) U = A^T W instead. The residual is a convolution along the tokens, one kernel per head.

Work per head: 2 m D (S + T) multiply-adds and 24 products of m x m matrices; exact attention takes 2 D S T.

Ref: Xiong et al., Nystromformer, AAAI 2021, equations 11-15; Pan et al. (the density paper) for the one-way form.

Example:
    >>> q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 9, 8)
    >>> nystrom_attention(q, k, k, landmarks=4).shape
    torch.Size([1, 2, 5, 8])
"""

from __future__ import annotations

from functools import wraps
from itertools import pairwise, product
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from xtalfast.ops._triton import PRECISION, allows_tensor_cores

Attention = Literal["nystrom", "exact", "auto"]
Pinv = Literal["iterative", "ridge"]

_BLOCK = 64  # tokens to a block of the residual convolution as matrix product


def segments(n_tokens: int, n_landmarks: int) -> list[slice]:
    """Consecutive tokens of each landmark; the first n_tokens % n_landmarks have one more (as numpy.array_split)."""
    size, longer = divmod(n_tokens, n_landmarks)
    ends = [i * size + min(i, longer) for i in range(n_landmarks + 1)]
    return [slice(a, b) for a, b in pairwise(ends)]


def legacy_padding(n_tokens: int, n_context: int, landmarks: int = 64) -> tuple[int, int]:
    """Zero tokens that the public implementation puts before the n_tokens and between them and the n_context.

    Its sequence is [zeros, tokens, zeros, context]; the zeros are keys like others there.
    """
    front = -n_tokens % landmarks
    return front, -(n_tokens + front + n_context) % landmarks


def nystrom_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    landmarks: int = 64,
    iterations: int = 6,
    pinv: Pinv = "iterative",
    pinv_scale: Tensor | None = None,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    attention: Attention = "nystrom",
    scale: float | None = None,
    ridge: float = 1e-3,
) -> Tensor:
    """The definition, in plain torch; arguments as in `nystrom_attention`."""
    n_queries, n_keys = q.shape[2], k.shape[2]
    q = q * (q.shape[3] ** -0.5 if scale is None else scale)
    shut = q.new_zeros(())
    if key_mask is not None:
        shut = torch.where(key_mask, 0.0, -torch.inf).to(q.dtype)[:, None, None]  # [B, 1, 1, T]
        k, v = (torch.where(key_mask[:, None, :, None], t, 0.0) for t in (k, v))
    if attention == "exact":
        out = torch.softmax(q @ k.mT + shut, -1) @ v
    else:
        m = min(landmarks, n_queries, n_keys)
        qm = torch.stack(
            [_mean(q[:, :, s], None if query_mask is None else query_mask[:, s]) for s in segments(n_queries, m)], 2
        )
        km = torch.stack(
            [_mean(k[:, :, s], None if key_mask is None else key_mask[:, s]) for s in segments(n_keys, m)], 2
        )
        between = qm @ km.mT
        if gate is not None:
            between = between * torch.sigmoid(gate[:, :m, :m])
        a = torch.softmax(between, -1)
        w = torch.softmax(qm @ k.mT + shut, -1) @ v
        u = _ridge_solve(a, w, ridge) if pinv == "ridge" else _iterate(a, iterations, pinv_scale) @ w
        out = torch.softmax(q @ km.mT, -1) @ u
    if residual is not None:
        taps = residual.shape[1]
        shifted = functional.pad(v, (0, 0, taps // 2, taps // 2 + max(n_queries - n_keys, 0)))
        for j in range(taps):  # out_s += sum_j w_j v_(s + j - taps // 2)
            out = out + residual[:, j, None, None] * shifted[:, :, j : j + n_queries]
    return out


def _mean(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the tokens [B, H, n, D] in the mask [B, n], 0 of none."""
    if mask is None:
        return tokens.mean(2)
    tokens = torch.where(mask[:, None, :, None], tokens, 0.0)
    return tokens.sum(2) / mask.sum(1).clamp(min=1)[:, None, None]


def largest_sums(a: Tensor) -> tuple[Tensor, Tensor]:
    """Largest sum along a row and along a column, of each matrix."""
    return a.abs().sum(-1).amax(-1), a.abs().sum(-2).amax(-1)


def _iterate(a: Tensor, iterations: int, pinv_scale: Tensor | None) -> Tensor:
    """Approximate pseudo-inverse of [..., m, m] by a Newton-like iteration of third order."""
    if pinv_scale is None:
        rows, columns = largest_sums(a)
        pinv_scale = rows * columns
    z = a.mT / pinv_scale[..., None, None]
    one = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(iterations):
        az = a @ z
        z = 0.25 * z @ (13 * one - az @ (15 * one - az @ (7 * one - az)))
    return z


def _ridge_solve(a: Tensor, w: Tensor, ridge: float) -> Tensor:
    """U of least |A U - W|^2 + ridge |U|^2."""
    normal = a.mT @ a + ridge * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return torch.cholesky_solve(a.mT @ w, torch.linalg.cholesky(normal))


def _pieces(n_tokens: int, n_landmarks: int) -> list[tuple[int, int, int, int]]:
    """Runs of segments of one length: first token, first landmark, number of landmarks, length."""
    size, longer = divmod(n_tokens, n_landmarks)
    pieces = [(0, 0, longer, size + 1), (longer * (size + 1), longer, n_landmarks - longer, size)]
    return [piece for piece in pieces if piece[2]]


def landmark_means(tokens: Tensor, n_landmarks: int, mask: Tensor | None = None) -> Tensor:
    """Means over the segments of [B, H, T, D], of the tokens in the mask [B, T]; at most two reductions, no loop."""
    if mask is not None:
        tokens = torch.where(mask[:, None, :, None], tokens, 0.0)
    means = []
    for first, _, n, length in _pieces(tokens.shape[2], n_landmarks):
        part = tokens.narrow(2, first, n * length).unflatten(2, (n, length))
        means.append(part.mean(3) if mask is None else part.sum(3) / _used(mask, first, n, length))
    return torch.cat(means, 2) if len(means) > 1 else means[0]


def _used(mask: Tensor, first: int, n: int, length: int) -> Tensor:
    """Used tokens of each segment, at least 1, [B, 1, n, 1]."""
    return mask.narrow(1, first, n * length).unflatten(1, (n, length)).sum(2).clamp(min=1)[:, None, :, None]


def _add_by_means(by_tokens: Tensor, by_means: Tensor, mask: Tensor | None) -> None:
    """Add the gradient of `landmark_means` to that by the tokens [B, H, T, D]."""
    for first, landmark, n, length in _pieces(by_tokens.shape[2], by_means.shape[2]):
        part = by_tokens.narrow(2, first, n * length).unflatten(2, (n, length))
        by = by_means.narrow(2, landmark, n)
        if mask is None:
            part += (by / length).unsqueeze(3)
        else:
            used = mask.narrow(1, first, n * length).unflatten(1, (n, length))[:, None, :, :, None]
            part += (by / _used(mask, first, n, length)).unsqueeze(3) * used


def batch_pinv_scale(q: Tensor, k: Tensor, gate: Tensor | None, landmarks: int, scale: float | None = None) -> Tensor:
    """The first scale of the public implementation: one for all heads and all examples of the batch.

    The output of an example then depends on the others. For weights trained with it; goes into `pinv_scale`.
    """
    m = min(landmarks, q.shape[2], k.shape[2])
    scale = q.shape[3] ** -0.5 if scale is None else scale
    between = scale * landmark_means(q, m) @ landmark_means(k, m).mT
    if gate is not None:
        between = between * torch.sigmoid(gate[:, :m, :m])
    rows, columns = largest_sums(torch.softmax(between, -1))
    return (rows.max() * columns.max()).expand(q.shape[:2])


def _toeplitz(weight: Tensor, n: int) -> Tensor:
    """[H, taps] -> [H, n, n + taps - 1], row i holding the taps from column i on."""
    n_heads, taps = weight.shape
    width = n + taps - 1
    matrix = weight.new_zeros(n_heads, n * width)
    matrix.as_strided((n_heads, n, taps), (n * width, width + 1, 1)).copy_(weight[:, None].expand(-1, n, -1))
    return matrix.view(n_heads, n, width)


def _windows(tokens: Tensor, taps: int, n_out: int) -> Tensor:
    """Tokens that each block of outputs sees, [B, H, blocks, D, block + taps - 1]."""
    half, length = taps // 2, -(-n_out // _BLOCK) * _BLOCK + taps - 1
    seen = tokens[:, :, : length - half]
    return functional.pad(seen, (0, 0, half, length - half - seen.shape[2])).unfold(2, _BLOCK + taps - 1, _BLOCK)


def _convolve(tokens: Tensor, weight: Tensor, n_out: int) -> Tensor:
    """out_s = sum_j w_j tokens_(s + j - taps // 2) as matrix products, eight times as fast as conv2d."""
    windows = _windows(tokens, weight.shape[1], n_out)
    return (_toeplitz(weight, _BLOCK)[:, None] @ windows.mT).flatten(2, 3)[:, :, :n_out]


def _convolve_backward(grad: Tensor, tokens: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `_convolve` by the tokens that it saw, the first ones, and by the weight."""
    taps, n_out = weight.shape[1], grad.shape[2]
    by_tokens = _convolve(grad, weight.flip(1), min(tokens.shape[2], n_out + taps // 2))
    windows = _windows(tokens, taps, n_out)
    grad = functional.pad(grad, (0, 0, 0, -n_out % _BLOCK)).unflatten(2, (-1, _BLOCK))
    # products of all pairs of a block; each tap is the sum along one diagonal
    pairs = torch.einsum("bhnsd,bhndt->hst", grad, windows).contiguous()
    n_heads, width = pairs.shape[0], pairs.shape[2]
    return by_tokens, pairs.as_strided((n_heads, _BLOCK, taps), (_BLOCK * width, width + 1, 1)).sum(1)


def _solve_landmarks(qm, km, w, gate, pinv_scale, iterations, ridge):
    """Z W; the iteration if ridge is 0."""
    between = qm @ km.mT
    if gate is not None:
        m = between.shape[-1]
        between = between * torch.sigmoid(gate[:, :m, :m].to(between.dtype))
    a = torch.softmax(between, -1)
    return _ridge_solve(a, w, ridge) if ridge > 0 else _iterate(a, iterations, pinv_scale) @ w


_library = torch.library.Library("xtalfast", "FRAGMENT")
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? residual, Tensor? gate, Tensor? pinv_scale, Tensor? query_mask, "
    "Tensor? key_mask, int landmarks, int iterations, float ridge, float scale"
)
_library.define(f"nystrom_attention({_INPUTS}) -> (Tensor out, Tensor qm, Tensor km, Tensor w, Tensor lse, Tensor u)")
_library.define(
    f"nystrom_attention_backward(Tensor grad, Tensor qm, Tensor km, Tensor w, Tensor lse, Tensor u, {_INPUTS}) -> "
    "(Tensor q, Tensor k, Tensor v, Tensor residual, Tensor gate, Tensor pinv_scale)"
)


def _like_tokens(tokens: Tensor, n_tokens: int) -> Tensor:
    """[B, H, n, D] stored as [B, n, H, D], as projections want it."""
    n_batch, n_heads, _, depth = tokens.shape
    return tokens.new_empty(n_batch, n_tokens, n_heads, depth).transpose(1, 2)


def _empty_results(q, k, landmarks):
    """Output; landmarks of queries (scaled) and keys, W, log of the sums behind W, U, in single precision at least."""
    n_batch, n_heads, n_queries, depth = q.shape
    m = min(landmarks, n_queries, k.shape[2])
    real = torch.promote_types(q.dtype, torch.float32)
    qm, km, w, u = (q.new_empty(n_batch, n_heads, m, depth, dtype=real) for _ in range(4))
    return _like_tokens(q, n_queries), qm, km, w, q.new_empty(n_batch, n_heads, m, dtype=real), u


def _empty_gradients(q, k, residual, gate, pinv_scale):
    """Gradients by q, k, v, residual, gate and pinv_scale; empty ones for what was not given."""
    by_tokens = _like_tokens(q, q.shape[2]), _like_tokens(k, k.shape[2]), _like_tokens(k, k.shape[2])
    others = (q.new_empty(0) if t is None else torch.empty_like(t) for t in (residual, gate, pinv_scale))
    return *by_tokens, *others


@torch.library.register_fake("xtalfast::nystrom_attention", lib=_library)
def _(q, k, v, residual, gate, pinv_scale, query_mask, key_mask, landmarks, iterations, ridge, scale):
    return _empty_results(q, k, landmarks)


@torch.library.register_fake("xtalfast::nystrom_attention_backward", lib=_library)
def _(grad, qm, km, w, lse, u, q, k, v, residual, gate, pinv_scale, *_rest):
    return _empty_gradients(q, k, residual, gate, pinv_scale)


def _forward(q, k, v, residual, gate, pinv_scale, query_mask, key_mask, landmarks, iterations, ridge, scale):
    """In torch, one head at a time, so that its scores stay in cache and are never stored."""
    out, qm, km, w, lse, u = _empty_results(q, k, landmarks)
    m, real = qm.shape[2], qm.dtype
    torch.mul(landmark_means(q, m, query_mask), scale, out=qm)
    km.copy_(landmark_means(k, m, key_mask))
    for b, h in product(*map(range, q.shape[:2])):
        scores = _right_scores(qm[b, h], k[b, h].to(real), key_mask, b)
        torch.logsumexp(scores, 1, out=lse[b, h])
        torch.mm(scores.sub_(lse[b, h, :, None]).exp_(), v[b, h].to(real), out=w[b, h])
    u.copy_(_solve_landmarks(qm, km, w, gate, pinv_scale, iterations, ridge))
    for b, h in product(*map(range, q.shape[:2])):
        _multiply(_left_weights(q[b, h].to(real), km[b, h], scale), u[b, h], out[b, h])
    if residual is not None:
        out += _convolve(v, residual.to(v.dtype), q.shape[2])
    return out, qm, km, w, lse, u


def _right_scores(qm, k, key_mask, b):
    """qm k^T of one head, [m, T]."""
    scores = qm @ k.T
    if key_mask is not None:
        scores.masked_fill_(~key_mask[b], -torch.inf)
    return scores


def _left_weights(q, km, scale):
    """sigma(q km^T) of one head, [S, m]."""
    return torch.softmax(q @ (scale * km).T, 1)


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, without a copy where the types allow."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def _softmax_backward(by_weights: Tensor, weights: Tensor) -> Tensor:
    return torch._softmax_backward_data(by_weights, weights, 1, weights.dtype)


def _backward(grad, qm, km, w, lse, u, q, k, v, residual, gate, pinv_scale, query_mask, key_mask, *settings):
    _, iterations, ridge, scale = settings
    real = qm.dtype
    gradients = _empty_gradients(q, k, residual, gate, pinv_scale)
    by_q, by_k, by_v = gradients[:3]
    by_u, by_km = torch.empty_like(u), torch.empty_like(km)
    for b, h in product(*map(range, q.shape[:2])):
        queries, upstream = q[b, h].to(real), grad[b, h].to(real)
        weights = _left_weights(queries, km[b, h], scale)
        torch.mm(weights.T, upstream, out=by_u[b, h])
        by_scores = scale * _softmax_backward(upstream @ u[b, h].T, weights)
        _multiply(by_scores, km[b, h], by_q[b, h])
        torch.mm(by_scores.T, queries, out=by_km[b, h])
    leaves = [t.detach().requires_grad_() for t in (qm, km, w, gate, pinv_scale) if t is not None]
    with torch.enable_grad():
        given = iter(leaves[3:])
        optional = (None if t is None else next(given) for t in (gate, pinv_scale))
        solved = _solve_landmarks(*leaves[:3], *optional, iterations, ridge)
    by_qm, more, by_w, *by_optional = torch.autograd.grad(solved, leaves, by_u, materialize_grads=True)
    by_km += more
    for b, h in product(*map(range, q.shape[:2])):
        keys, values = k[b, h].to(real), v[b, h].to(real)
        weights = _right_scores(qm[b, h], keys, key_mask, b).sub_(lse[b, h, :, None]).exp_()
        _multiply(weights.T, by_w[b, h], by_v[b, h])
        by_scores = _softmax_backward(by_w[b, h] @ values.T, weights)
        by_qm[b, h] += by_scores @ keys
        _multiply(by_scores.T, qm[b, h], by_k[b, h])
    _add_by_means(by_q, scale * by_qm, query_mask)
    _add_by_means(by_k, by_km, key_mask)
    if residual is not None:
        by_tokens, by_weight = _convolve_backward(grad, v, residual.to(v.dtype))
        by_v[:, :, : by_tokens.shape[2]] += by_tokens
        gradients[3].copy_(by_weight)
    for target, value in zip(
        (t for t, given in zip(gradients[4:], (gate, pinv_scale)) if given is not None), by_optional
    ):
        target.copy_(value)
    return gradients


def _as_given(function):
    """Outside of autocast, which would round the landmarks' matrices."""

    @wraps(function)
    def run(first: Tensor, *rest):
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *rest)

    return run


def _rows_contiguous(*tensors: Tensor) -> list[Tensor]:
    return [t if t.stride(3) == 1 else t.contiguous() for t in tensors]


def _optional(residual, gate, pinv_scale, query_mask, key_mask, m):
    """What the kernels take of the optional arguments, contiguous."""
    gate = None if gate is None else gate[:, :m, :m]
    return [None if t is None else t.contiguous() for t in (residual, gate, pinv_scale, query_mask, key_mask)]


def _forward_on_gpu(q, k, v, residual, gate, pinv_scale, query_mask, key_mask, landmarks, iterations, ridge, scale):
    from xtalfast.kernels.nystrom_attention import nystrom_attention as launch

    results = _empty_results(q, k, landmarks)
    optional = _optional(residual, gate, pinv_scale, query_mask, key_mask, results[1].shape[2])
    with torch.cuda.device(q.device):
        launch(*_rows_contiguous(q, k, v), *optional, iterations, scale, PRECISION, *results)
    return results


def token_counts(n_tokens: int, m: int, mask: Tensor | None, like: Tensor) -> Tensor:
    """Tokens in the mean of each landmark, broadcastable to [B, H, m, 1]; at least 1."""
    if mask is not None:
        parts = [_used(mask, first, n, length) for first, _, n, length in _pieces(n_tokens, m)]
        return torch.cat(parts, 2).to(like.dtype)
    return torch.cat([like.new_full((n, 1), length) for _, _, n, length in _pieces(n_tokens, m)])


def _backward_on_gpu(grad, qm, km, w, lse, u, q, k, v, residual, gate, pinv_scale, query_mask, key_mask, *settings):
    from xtalfast.kernels.nystrom_attention import nystrom_attention_backward as launch

    _, iterations, _, scale = settings
    m = qm.shape[2]
    optional = _optional(residual, gate, pinv_scale, query_mask, key_mask, m)
    gradients = _empty_gradients(q, k, residual, gate, pinv_scale)
    by_gate = gradients[4]
    if gate is not None:
        by_gate = by_gate.zero_()[:, :m, :m]  # the other gates were not used
    counts = tuple(token_counts(n.shape[2], m, mask, qm) for n, mask in ((q, query_mask), (k, key_mask)))
    with torch.cuda.device(q.device):
        launch(
            *_rows_contiguous(grad),
            *(qm, km, w, lse, u),
            *_rows_contiguous(q, k, v),
            *optional,
            *(counts, iterations, scale, PRECISION),
            *(*gradients[:4], by_gate, gradients[5]),
        )
    return gradients


_library.impl("nystrom_attention", _as_given(_forward), "CPU")
_library.impl("nystrom_attention", _as_given(_forward_on_gpu), "CUDA")
_library.impl("nystrom_attention_backward", _as_given(_backward), "CPU")
_library.impl("nystrom_attention_backward", _as_given(_backward_on_gpu), "CUDA")


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], *inputs[:8])
    ctx.settings = inputs[8:]


def _autograd_backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 12
    optional = ctx.saved_tensors[8:11]  # residual, gate, pinv_scale
    gradients = torch.ops.xtalfast.nystrom_attention_backward(grad, *ctx.saved_tensors, *ctx.settings)
    given = (by if t is not None else None for by, t in zip(gradients[3:], optional))
    return *gradients[:3], *given, *[None] * 6


torch.library.register_autograd(
    "xtalfast::nystrom_attention", _autograd_backward, setup_context=_setup_context, lib=_library
)


_FEW_KEYS = 512


def _exact(q, k, v, key_mask, scale):
    if key_mask is None and k.device.type == "cpu" and k.shape[2] <= _FEW_KEYS:
        # The gradient of torch's fused attention takes several times as long as three matrix products of this size.
        return torch.softmax(scale * q @ k.mT, -1).to(v.dtype) @ v
    mask = None if key_mask is None else key_mask[:, None, None]
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _has_kernel(q: Tensor, ridge: float, landmarks: int) -> bool:
    """Whether the Triton kernels take these arguments: what they hold of a head must fit into one multiprocessor."""
    return q.shape[3] <= 64 and landmarks <= 64 and ridge == 0 and allows_tensor_cores(q.dtype)


def _in_torch(q, k, v, gate, pinv_scale, query_mask, key_mask, landmarks, iterations, ridge, scale):
    """Two calls of torch's fused attention, the landmarks being queries of the one and keys of the other."""
    m = min(landmarks, q.shape[2], k.shape[2])
    qm, km = landmark_means(q, m, query_mask), landmark_means(k, m, key_mask)
    real = torch.promote_types(q.dtype, torch.float32)
    w = _exact(qm, k, v, key_mask, scale)
    with torch.autocast(q.device.type, enabled=False):
        arguments = (scale * qm.to(real), km.to(real), w.to(real), gate, pinv_scale, iterations, ridge)
        u = _solve_landmarks(*arguments).to(q.dtype)
    return functional.scaled_dot_product_attention(q, km, u, scale=scale)


def nystrom_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    landmarks: int = 64,
    iterations: int = 6,
    pinv: Pinv = "iterative",
    pinv_scale: Tensor | None = None,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    attention: Attention = "nystrom",
    scale: float | None = None,
    ridge: float = 1e-3,
) -> Tensor:
    """Nystrom attention of S queries over T keys, or exact attention, with a residual convolution of the values.

    Args:
        q: queries, [B, H, S, D], float; any strides.
        k, v: keys and values, [B, H, T, D], like q.
        residual: weights of the convolution along the values, [H, taps] with an odd number of taps; query s sees values
            s - taps // 2 to s + taps // 2, so that the queries are the first S tokens of the keys. None: no residual.
        gate: logits of gates on the scores between landmarks, [H, landmarks, landmarks]. None: no gate.
        landmarks: number of landmarks m; min(m, S, T) are used. Each is the mean of consecutive tokens, the first
            S % m (T % m) of one more than the others.
        iterations: of the pseudo-inverse.
        pinv: "iterative", or "ridge": regularised least squares, faster on the CPU and closer to exact attention, but
            not what weights trained with the iteration expect.
        pinv_scale: divides A^T at the start of the iteration, broadcastable to [B, H]; None takes |A|_1 |A|_inf of each
            matrix, which makes the examples of a batch independent (see `batch_pinv_scale`).
        query_mask: tokens that enter the means of the queries, bool [B, S].
        key_mask: tokens that are keys, bool [B, T], at least one in each row; the others may hold anything, NaN too.
        attention: "nystrom"; "exact"; or "auto", the faster of the two by the counts of tokens.
        scale: of the scores; D^(-1/2) unless given.
        ridge: eps of `pinv="ridge"`.

    Returns:
        [B, H, S, D], stored as [B, S, H, D]; the landmarks' matrices are in single precision at least.

    Raises:
        TypeError: wrong kind or dtype of an argument.
        ValueError: wrong shape, device or name.

    Example:
        >>> q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 9, 8)
        >>> exact = nystrom_attention(q, k, k, attention="exact")
        >>> torch.allclose(exact, torch.nn.functional.scaled_dot_product_attention(q, k, k), atol=1e-6)
        True
    """
    _check(q, k, v, residual, gate, landmarks, iterations, pinv, ridge, query_mask, key_mask, attention)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if key_mask is not None:
        k, v = (torch.where(key_mask[:, None, :, None], t, 0.0) for t in (k, v))
    if attention == "auto":
        attention = faster_attention(q.shape[2], k.shape[2], min(landmarks, q.shape[2], k.shape[2]))
    if q.shape[0] == 0 or q.shape[2] == 0:
        return torch.zeros_like(q)
    if attention == "exact":
        out = _exact(q, k, v, key_mask, scale)
        return out if residual is None else out + _convolve(v, residual.to(v.dtype), q.shape[2])
    if pinv_scale is not None:
        pinv_scale = pinv_scale.expand(q.shape[:2])
    ridge = ridge if pinv == "ridge" else 0.0
    if q.is_cuda and not _has_kernel(q, ridge, landmarks):
        out = _in_torch(q, k, v, gate, pinv_scale, query_mask, key_mask, landmarks, iterations, ridge, scale)
        return out if residual is None else out + _convolve(v, residual.to(v.dtype), q.shape[2])
    options = (landmarks, iterations, ridge, scale)
    return torch.ops.xtalfast.nystrom_attention(q, k, v, residual, gate, pinv_scale, query_mask, key_mask, *options)[0]


def faster_attention(n_queries: int, n_keys: int, landmarks: int) -> Attention:
    """Which attention takes less time, forward and backward: by products, with what they were measured to cost.

    On one core of a Sapphire Rapids with 8 heads of 64 and 64 landmarks the two meet at S = T = 380 to 500, or at
    S = 256 to 400 with T about 2.8 S.
    """
    nystrom = 3 * landmarks * (n_queries + n_keys) + 75 * landmarks**2  # the second: small products are slow
    return "nystrom" if nystrom < 2 * n_queries * n_keys else "exact"


def _check(q, k, v, residual, gate, landmarks, iterations, pinv, ridge, query_mask, key_mask, attention) -> None:
    if not q.is_floating_point():
        raise TypeError(f"q must be floating point [B, H, S, D], got {q.dtype}")
    if q.ndim != 4:
        raise ValueError(f"q must be [B, H, S, D], got {list(q.shape)}")
    n_batch, n_heads, n_queries, depth = q.shape
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must be {q.dtype} like q, got {tensor.dtype}")
        if tensor.ndim != 4 or tensor.shape[:2] != q.shape[:2] or tensor.shape[3] != depth or tensor.shape[2] == 0:
            raise ValueError(f"{name} must be [B={n_batch}, H={n_heads}, T > 0, D={depth}], got {list(tensor.shape)}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {tensor.device}")
    if k.shape != v.shape:
        raise ValueError(f"v must be like k, {list(k.shape)}, got {list(v.shape)}")
    if residual is not None and (residual.ndim != 2 or len(residual) != n_heads or residual.shape[1] % 2 == 0):
        raise ValueError(f"residual must be [H={n_heads}, odd number of taps], got {list(residual.shape)}")
    if landmarks < 1:
        raise ValueError(f"landmarks must be positive, got {landmarks}")
    if iterations < 0:
        raise ValueError(f"iterations must not be negative, got {iterations}")
    if gate is not None and gate.shape != (n_heads, landmarks, landmarks):
        raise ValueError(f"gate must be [H={n_heads}, {landmarks}, {landmarks}], got {list(gate.shape)}")
    for name, mask, n_tokens in (("query_mask", query_mask, n_queries), ("key_mask", key_mask, k.shape[2])):
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (n_batch, n_tokens)):
            raise ValueError(f"{name} must be bool [B={n_batch}, {n_tokens}], got {mask.dtype} {list(mask.shape)}")
    if pinv == "ridge" and not ridge > 0:
        raise ValueError(f"ridge must be positive, got {ridge}")
    for name, value, allowed in (
        ("attention", attention, ("nystrom", "exact", "auto")),
        ("pinv", pinv, ("iterative", "ridge")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
