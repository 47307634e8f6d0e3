"""Nystrom attention: S queries over T keys through m landmarks, with a convolution of the values; forward and backward.

Five launches forward: landmark means (queries, keys), the landmarks' attention over a share of the keys, the m x m
problem of a head, the queries' attention over the landmarks. Backward mirrors them; scores are computed again from what
is at hand, and sums over tokens are taken in a fixed order, so that the same input gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

SOLVE_OPTIONS = {"num_warps": 8, "num_stages": 1}
RIGHT_OPTIONS = {"BLOCK": 64, "num_warps": 4, "num_stages": 2}
LEFT_BACKWARD_OPTIONS = {"BLOCK": 32, "num_warps": 8, "num_stages": 2}
RIGHT_BACKWARD_OPTIONS = {4: {"BLOCK": 16, "num_warps": 8, "num_stages": 1}}  # by bytes of an element
RIGHT_BACKWARD_OPTIONS |= {2: RIGHT_BACKWARD_OPTIONS[4] | {"BLOCK": 32}, 8: RIGHT_BACKWARD_OPTIONS[4]}
PROGRAMS = 264  # wanted at least: two blocks for each multiprocessor of the GPUs we name
_SLICE = tl.constexpr(16)  # of the m x m products
_SHARE = 512  # keys, or queries, that a program takes at least


def _configs(*sizes: tuple[int, int]) -> list[triton.Config]:
    """One config for each (tokens in a tile, warps); under the interpreter, which cannot time, only the first."""
    configs = [triton.Config({"BLOCK": tokens}, num_warps=warps, num_stages=2) for tokens, warps in sizes]
    return configs[:1] if knobs.runtime.interpret else configs


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """Product, summed in single precision at least."""
    if a.dtype == tl.float64:
        product = tl.dot(a, b, input_precision="ieee", out_dtype=tl.float64)
    else:
        product = tl.dot(a, b, input_precision=PRECISION)
    return product


@triton.jit
def first_token(segment, n_tokens, n_landmarks):
    """First token of a segment; the first n_tokens % n_landmarks segments have one more."""
    return segment * (n_tokens // n_landmarks) + tl.minimum(segment, n_tokens % n_landmarks)


@triton.jit
def load_own_row(rows, head, token, used, n_tokens, n_landmarks, d, DEPTH: tl.constexpr):
    """Row [D] of the segment of each token, from one for each landmark."""
    size, longer = n_tokens // n_landmarks, n_tokens % n_landmarks
    ahead = longer * (size + 1)
    segment = tl.where(token < ahead, token // (size + 1), longer + (token - ahead) // size)
    offset = (head * n_landmarks + segment)[:, None] * DEPTH + d[None, :]
    return tl.load(rows + offset, mask=used[:, None] & (d < DEPTH)[None, :], other=0.0)


@triton.jit
def load_tokens(base, stride, token, n_tokens, d, DEPTH: tl.constexpr):
    """Rows of the tokens [..., D], zeros outside the sequence."""
    inside = (token >= 0) & (token < n_tokens)
    offset = token.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(base + offset, mask=inside[:, None] & (d < DEPTH)[None, :], other=0.0)


@triton.jit
def store_tokens(base, stride, token, n_tokens, d, values, DEPTH: tl.constexpr):
    """Write rows of the tokens that are there."""
    offset = token.to(tl.int64)[:, None] * stride + d[None, :]
    inside = ((token >= 0) & (token < n_tokens))[:, None] & (d < DEPTH)[None, :]
    tl.store(base + offset, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def load_landmarks(base, head, m, i, d, DEPTH: tl.constexpr):
    """Matrix [m, D] of a head, zeros outside."""
    offset = head * m * DEPTH + i[:, None] * DEPTH + d[None, :]
    return tl.load(base + offset, mask=(i < m)[:, None] & (d < DEPTH)[None, :], other=0.0)


@triton.jit
def store_landmarks(base, head, m, i, d, values, DEPTH: tl.constexpr):
    """Write the matrix [m, D] of a head."""
    offset = head * m * DEPTH + i[:, None] * DEPTH + d[None, :]
    tl.store(base + offset, values.to(base.dtype.element_ty), mask=(i < m)[:, None] & (d < DEPTH)[None, :])


@triton.jit
def load_square(base, M: tl.constexpr):
    """Matrix [M, M] of the workspace; what is not [m, m] there is 0."""
    i, j = tl.arange(0, M), tl.arange(0, M)
    return tl.load(base + i[:, None] * M + j[None, :])


@triton.jit
def store_square(base, values, M: tl.constexpr):
    """Write a matrix [M, M] that all threads may then read."""
    i, j = tl.arange(0, M), tl.arange(0, M)
    tl.debug_barrier()  # others may still be reading what was there
    tl.store(base + i[:, None] * M + j[None, :], values)
    tl.debug_barrier()


@triton.jit
def multiply(a, b, A_TURNED: tl.constexpr, B_TURNED: tl.constexpr, M: tl.constexpr, PRECISION: tl.constexpr):
    """Product of two matrices of the workspace, either transposed: a slice at a time, so that registers suffice."""
    real: tl.constexpr = a.dtype.element_ty
    i, j = tl.arange(0, M), tl.arange(0, M)
    acc = tl.zeros([M, M], real)
    for first in range(0, M, _SLICE):
        k = first + tl.arange(0, _SLICE)
        left = tl.load(a + (k[None, :] * M + i[:, None] if A_TURNED else i[:, None] * M + k[None, :]))
        right = tl.load(b + (j[None, :] * M + k[:, None] if B_TURNED else k[:, None] * M + j[None, :]))
        acc += dot(left, right, PRECISION)
    return acc


@triton.jit
def multiply_rows(a, rows, m, d, A_TURNED: tl.constexpr, M: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    """Product of a matrix of the workspace, or its transpose, with rows [m, D] in memory."""
    real: tl.constexpr = a.dtype.element_ty
    i = tl.arange(0, M)
    acc = tl.zeros([M, d.shape[0]], real)
    for first in range(0, M, _SLICE):
        k = first + tl.arange(0, _SLICE)
        left = tl.load(a + (k[None, :] * M + i[:, None] if A_TURNED else i[:, None] * M + k[None, :]))
        right = tl.load(rows + k[:, None] * DEPTH + d[None, :], mask=(k < m)[:, None] & (d < DEPTH)[None, :], other=0.0)
        acc += dot(left, right, PRECISION)
    return acc


@triton.jit
def multiply_turned(a, b, m, M: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T of two matrices [m, D] in memory."""
    real: tl.constexpr = a.dtype.element_ty
    i = tl.arange(0, M)
    acc = tl.zeros([M, M], real)
    for first in range(0, D, _SLICE):
        k = first + tl.arange(0, _SLICE)
        left = tl.load(a + i[:, None] * DEPTH + k[None, :], mask=(i < m)[:, None] & (k < DEPTH)[None, :], other=0.0)
        right = tl.load(b + i[None, :] * DEPTH + k[:, None], mask=(k < DEPTH)[:, None] & (i < m)[None, :], other=0.0)
        acc += dot(left, right, PRECISION)
    return acc


@triton.jit
def banded(taps_of_head, i, j, TAPS: tl.constexpr, FLIP: tl.constexpr):
    """Matrix of a convolution: element (i, j) is tap j - i, counted from the other end if flipped."""
    tap = j[None, :] - i[:, None]
    inside = (tap >= 0) & (tap < TAPS)
    tap = tl.minimum(tl.maximum(tap, 0), TAPS - 1)
    if FLIP:
        tap = TAPS - 1 - tap
    return tl.load(taps_of_head + tap, mask=inside, other=0.0)


@triton.jit
def left_weights(queries, km, i, m, scale, PRECISION: tl.constexpr):
    """sigma(scale q km^T), [tokens, m], in the precision of the sums."""
    scores = dot(queries, tl.trans(km), PRECISION) * scale
    scores = tl.where((i < m)[None, :], scores, -float("inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit(do_not_specialize=["n_tokens", "m"])
def _landmark_kernel(
    tokens,
    mask,
    means,
    stride_b,
    stride_h,
    stride_t,
    n_heads,
    n_tokens,
    m,
    scale,
    DEPTH: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    segment, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    real: tl.constexpr = means.dtype.element_ty
    base = tokens + (head // n_heads) * stride_b + (head % n_heads) * stride_h
    start, end = first_token(segment, n_tokens, m), first_token(segment + 1, n_tokens, m)
    d = tl.arange(0, D)
    total = tl.zeros([D], real)
    count = tl.zeros([], tl.int32)
    for first in range(start, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        values = load_tokens(base, stride_t, token, end, d, DEPTH).to(real)
        if mask is None:
            count += tl.sum((token < end).to(tl.int32), 0)
        else:
            used = tl.load(mask + (head // n_heads) * n_tokens + token, mask=token < end, other=0) != 0
            values = tl.where(used[:, None], values, 0.0)
            count += tl.sum(used.to(tl.int32), 0)
        total += tl.sum(values, 0)
    mean = total / tl.maximum(count, 1) * scale
    tl.store(means + (head * m + segment) * DEPTH + d, mean.to(real), mask=d < DEPTH)


@triton.jit(do_not_specialize=["n_keys", "m", "share"])
def _right_kernel(
    qm,
    k,
    v,
    key_mask,
    sums,
    tops,
    totals,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    n_heads,
    n_keys,
    m,
    share,
    DEPTH: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """exp(qm k^T - top) v, top and the sum of the weights over a share of the keys."""
    part, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    real: tl.constexpr = qm.dtype.element_ty
    given: tl.constexpr = k.dtype.element_ty
    batch = head // n_heads
    keys = k + batch * stride_kb + (head % n_heads) * stride_kh
    values = v + batch * stride_vb + (head % n_heads) * stride_vh
    i, d = tl.arange(0, M), tl.arange(0, D)
    landmarks = load_landmarks(qm, head, m, i, d, DEPTH).to(given)
    top = tl.full([M], -float("inf"), real)
    total = tl.zeros([M], real)
    acc = tl.zeros([M, D], real)
    end = tl.minimum((part + 1) * share, n_keys)
    for first in range(part * share, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        used = token < end
        if key_mask is not None:
            used = used & (tl.load(key_mask + batch * n_keys + token, mask=used, other=0) != 0)
        scores = dot(landmarks, tl.trans(load_tokens(keys, stride_kt, token, end, d, DEPTH)), PRECISION)
        scores = tl.where(used[None, :], scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp(scores - base[:, None])
        shrink = tl.exp(top - base)
        total = total * shrink + tl.sum(weights, 1)
        rows = load_tokens(values, stride_vt, token, end, d, DEPTH)
        acc = acc * shrink[:, None] + dot(weights.to(given), rows, PRECISION)
        top = higher
    row = head * tl.num_programs(0) + part
    store_landmarks(sums, row, m, i, d, acc, DEPTH)
    tl.store(tops + row * m + i, top, mask=i < m)
    tl.store(totals + row * m + i, total, mask=i < m)


@triton.jit
def landmark_weights(qm, km, gate_of_head, i, j, m, PRECISION: tl.constexpr):
    """A = sigma(gate qm km^T), [m, m]; scores before the gate; the gate."""
    scores = dot(qm, tl.trans(km), PRECISION)
    open_ = tl.full(scores.shape, 1.0, scores.dtype)
    gated = scores
    if gate_of_head is not None:
        inside = (i < m)[:, None] & (j < m)[None, :]
        logits = tl.load(gate_of_head + i[:, None] * m + j[None, :], mask=inside, other=0.0).to(scores.dtype)
        open_ = 1.0 / (1.0 + tl.exp(-logits))
        gated = scores * open_
    gated = tl.where((j < m)[None, :], gated, -float("inf"))
    weights = tl.exp(gated - tl.max(gated, 1)[:, None])
    weights = tl.where((i < m)[:, None], weights / tl.sum(weights, 1)[:, None], 0.0)
    return weights, scores, open_


@triton.jit
def first_scale(a, pinv_scale, head):
    """What divides A^T at the start: given, or the largest sums along a row and along a column."""
    if pinv_scale is None:
        scale = tl.max(tl.sum(a, 1), 0) * tl.max(tl.sum(a, 0), 0)
    else:
        scale = tl.load(pinv_scale + head).to(a.dtype)
    return scale


@triton.jit
def identity(m, times: tl.constexpr, M: tl.constexpr, dtype: tl.constexpr):
    """times x unit matrix [m, m], zeros outside."""
    i, j = tl.arange(0, M), tl.arange(0, M)
    return tl.where((i[:, None] == j[None, :]) & (i < m)[:, None], times, 0.0).to(dtype)


@triton.jit(do_not_specialize=["m", "parts", "iterations"])
def _solve_kernel(
    qm,
    km,
    gate,
    pinv_scale,
    sums,
    tops,
    totals,
    w,
    lse,
    u,
    work,
    n_heads,
    m,
    parts,
    iterations,
    DEPTH: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """W from its parts, Z by the iteration, U = Z W, of one head."""
    head = tl.program_id(0).to(tl.int64)
    real: tl.constexpr = qm.dtype.element_ty
    i, j, d = tl.arange(0, M), tl.arange(0, M), tl.arange(0, D)
    top = tl.full([M], -float("inf"), real)
    total = tl.zeros([M], real)
    acc = tl.zeros([M, D], real)
    for part in range(parts):
        row = head * parts + part
        other = tl.load(tops + row * m + i, mask=i < m, other=0.0)
        higher = tl.maximum(top, other)
        base = tl.where(higher == -float("inf"), 0.0, higher)
        mine, theirs = tl.exp(top - base), tl.exp(other - base)
        total = total * mine + tl.load(totals + row * m + i, mask=i < m, other=1.0) * theirs
        acc = acc * mine[:, None] + load_landmarks(sums, row, m, i, d, DEPTH) * theirs[:, None]
        top = higher
    acc = acc / total[:, None]
    store_landmarks(w, head, m, i, d, acc, DEPTH)  # read again below
    tl.store(lse + head * m + i, top + tl.log(total), mask=i < m)

    gate_of_head = None if gate is None else gate + (head % n_heads) * m * m
    queries, keys = load_landmarks(qm, head, m, i, d, DEPTH), load_landmarks(km, head, m, i, d, DEPTH)
    a, _, _ = landmark_weights(queries, keys, gate_of_head, i, j, m, PRECISION)
    squares = work + head * 4 * M * M
    z, az, t = squares + M * M, squares + 2 * M * M, squares + 3 * M * M
    store_square(squares, a, M)
    store_square(z, tl.trans(a) / first_scale(a, pinv_scale, head), M)
    for _ in range(iterations):
        iterate(squares, z, az, t, t, z, m, M, PRECISION)
    store_landmarks(u, head, m, i, d, multiply_rows(z, w + head * m * DEPTH, m, d, False, M, DEPTH, PRECISION), DEPTH)


@triton.jit
def iterate(a, z, az, t2, t3, z_next, m, M: tl.constexpr, PRECISION: tl.constexpr):
    """One step: A Z, 15 - A Z (7 - A Z), 13 - A Z (15 - ...) and the next Z, all in the workspace."""
    store_square(az, multiply(a, z, False, False, M, PRECISION), M)
    square = multiply(az, az, False, False, M, PRECISION)
    store_square(t2, identity(m, 15.0, M, square.dtype) - 7.0 * load_square(az, M) + square, M)
    last = multiply(az, t2, False, False, M, PRECISION)
    store_square(t3, identity(m, 13.0, M, last.dtype) - last, M)
    store_square(z_next, 0.25 * multiply(z, t3, False, False, M, PRECISION), M)


@triton.autotune(configs=_configs((64, 4), (64, 8)), key=["n_queries", "DEPTH"])
@triton.jit(do_not_specialize=["n_queries", "n_keys", "m"])
def _left_kernel(
    q,
    km,
    u,
    v,
    residual,
    out,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_ob,
    stride_oh,
    stride_ot,
    n_heads,
    n_queries,
    n_keys,
    m,
    scale,
    TAPS: tl.constexpr,
    DEPTH: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sigma(q km^T) U and the convolution of the values, of a tile of queries."""
    head = tl.program_id(1).to(tl.int64)
    given: tl.constexpr = q.dtype.element_ty
    batch, h = head // n_heads, head % n_heads
    i, d = tl.arange(0, M), tl.arange(0, D)
    row = tl.arange(0, BLOCK)
    token = tl.program_id(0) * BLOCK + row
    queries = load_tokens(q + batch * stride_qb + h * stride_qh, stride_qt, token, n_queries, d, DEPTH)
    keys = load_landmarks(km, head, m, i, d, DEPTH).to(given)
    weights = left_weights(queries, keys, i, m, scale, PRECISION)
    result = dot(weights.to(given), load_landmarks(u, head, m, i, d, DEPTH).to(given), PRECISION)
    if residual is not None:
        for piece in tl.static_range((BLOCK + TAPS - 2) // BLOCK + 1):
            column = piece * BLOCK + tl.arange(0, BLOCK)
            band = banded(residual + h * TAPS, row, column, TAPS, False)
            seen = tl.program_id(0) * BLOCK - TAPS // 2 + column
            values = load_tokens(v + batch * stride_vb + h * stride_vh, stride_vt, seen, n_keys, d, DEPTH)
            result += dot(band.to(given), values, PRECISION)
    store_tokens(out + batch * stride_ob + h * stride_oh, stride_ot, token, n_queries, d, result, DEPTH)


@triton.jit(do_not_specialize=["n_queries", "n_keys", "m", "share"])
def _left_backward_kernel(
    grad,
    q,
    km,
    u,
    v,
    by_q,
    by_u,
    by_km,
    by_residual,
    stride_gb,
    stride_gh,
    stride_gt,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_yb,
    stride_yh,
    stride_yt,
    n_heads,
    n_queries,
    n_keys,
    m,
    share,
    scale,
    TAPS: tl.constexpr,
    TAPS_BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients by a share of the queries (but for their means), and its part of those by U, km and the residual."""
    part, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    real: tl.constexpr = km.dtype.element_ty
    given: tl.constexpr = q.dtype.element_ty
    batch, h = head // n_heads, head % n_heads
    i, d = tl.arange(0, M), tl.arange(0, D)
    taps = tl.arange(0, TAPS_BLOCK)
    keys = load_landmarks(km, head, m, i, d, DEPTH).to(given)
    solved = load_landmarks(u, head, m, i, d, DEPTH).to(given)
    acc_u, acc_km = tl.zeros([M, D], real), tl.zeros([M, D], real)
    acc_taps = tl.zeros([TAPS_BLOCK], real)
    end = tl.minimum((part + 1) * share, n_queries)
    for first in range(part * share, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        queries = load_tokens(q + batch * stride_qb + h * stride_qh, stride_qt, token, end, d, DEPTH)
        upstream = load_tokens(grad + batch * stride_gb + h * stride_gh, stride_gt, token, end, d, DEPTH)
        weights = left_weights(queries, keys, i, m, scale, PRECISION)
        acc_u += dot(tl.trans(weights).to(given), upstream, PRECISION)
        by_weights = dot(upstream, tl.trans(solved), PRECISION)
        by_scores = weights * (by_weights - tl.sum(weights * by_weights, 1)[:, None]) * scale
        by_scores = tl.where((token < end)[:, None], by_scores, 0.0).to(given)
        acc_km += dot(tl.trans(by_scores), queries, PRECISION)
        by_queries = dot(by_scores, keys, PRECISION)
        store_tokens(by_q + batch * stride_yb + h * stride_yh, stride_yt, token, end, d, by_queries, DEPTH)
        if by_residual is not None:
            for tap in range(TAPS):
                seen = token + tap - TAPS // 2
                values = load_tokens(v + batch * stride_vb + h * stride_vh, stride_vt, seen, n_keys, d, DEPTH)
                pairs = tl.sum(tl.sum(upstream.to(real) * values.to(real), 1), 0)
                acc_taps += tl.where(taps == tap, pairs, 0.0)
    row = head * tl.num_programs(0) + part
    store_landmarks(by_u, row, m, i, d, acc_u, DEPTH)
    store_landmarks(by_km, row, m, i, d, acc_km, DEPTH)
    if by_residual is not None:
        tl.store(by_residual + row * TAPS + taps, acc_taps, mask=taps < TAPS)


@triton.jit(do_not_specialize=["m", "parts", "iterations"])
def _solve_backward_kernel(
    qm,
    km,
    w,
    gate,
    pinv_scale,
    by_u_parts,
    by_solved_rows,
    by_w,
    delta,
    by_scale,
    work,
    n_heads,
    m,
    parts,
    iterations,
    DEPTH: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients by W and, left in the workspace, by A of one head: back through the iteration, computed again."""
    head = tl.program_id(0).to(tl.int64)
    real: tl.constexpr = qm.dtype.element_ty
    i, j, d = tl.arange(0, M), tl.arange(0, M), tl.arange(0, D)
    gate_of_head = None if gate is None else gate + (head % n_heads) * m * m
    queries, keys = load_landmarks(qm, head, m, i, d, DEPTH), load_landmarks(km, head, m, i, d, DEPTH)
    weights, _, _ = landmark_weights(queries, keys, gate_of_head, i, j, m, PRECISION)
    scale = first_scale(weights, pinv_scale, head)
    size: tl.constexpr = M * M
    a = work + head * (6 + 4 * iterations) * size
    by_z, by_az, by_t, by_a = a + size, a + 2 * size, a + 3 * size, a + 4 * size
    steps = a + 5 * size  # Z, A Z, t2, t3 of each, and the last Z
    store_square(a, weights, M)
    store_square(steps, tl.trans(weights) / scale, M)
    for step in range(iterations):
        z = steps + 4 * step * size
        iterate(a, z, z + size, z + 2 * size, z + 3 * size, z + 4 * size, m, M, PRECISION)

    by_solved = tl.zeros([M, D], real)
    for part in range(parts):
        by_solved += load_landmarks(by_u_parts, head * parts + part, m, i, d, DEPTH)
    store_landmarks(by_solved_rows, head, m, i, d, by_solved, DEPTH)
    tl.debug_barrier()
    rows = head * m * DEPTH
    store_square(by_z, multiply_turned(by_solved_rows + rows, w + rows, m, M, D, DEPTH, PRECISION), M)
    z = steps + 4 * iterations * size
    by_right = multiply_rows(z, by_solved_rows + rows, m, d, True, M, DEPTH, PRECISION)
    store_landmarks(by_w, head, m, i, d, by_right, DEPTH)
    right = load_landmarks(w, head, m, i, d, DEPTH)
    tl.store(delta + head * m + i, tl.sum(by_right * right, 1), mask=i < m)

    store_square(by_a, tl.zeros([M, M], real), M)
    for back in range(iterations):
        z = steps + 4 * (iterations - 1 - back) * size
        az, t2, t3 = z + size, z + 2 * size, z + 3 * size
        store_square(by_t, 0.25 * multiply(z, by_z, True, False, M, PRECISION), M)
        store_square(by_z, 0.25 * multiply(by_z, t3, False, True, M, PRECISION), M)
        store_square(by_az, -multiply(by_t, t2, False, True, M, PRECISION), M)
        store_square(by_t, -multiply(az, by_t, True, False, M, PRECISION), M)
        # by A Z: in t2 as a factor, and in t1 = 7 - A Z
        total = load_square(by_az, M) - 7.0 * load_square(by_t, M) + multiply(by_t, az, False, True, M, PRECISION)
        store_square(by_az, total, M)
        store_square(by_az, load_square(by_az, M) + multiply(az, by_t, True, False, M, PRECISION), M)
        store_square(by_a, load_square(by_a, M) + multiply(by_az, z, False, True, M, PRECISION), M)
        store_square(by_z, load_square(by_z, M) + multiply(a, by_az, True, False, M, PRECISION), M)

    turned = tl.trans(load_square(by_z, M))
    by_weights = load_square(by_a, M) + turned / scale
    weights = load_square(a, M)
    by_first = -tl.sum(tl.sum(turned * weights, 1), 0) / (scale * scale)
    if pinv_scale is None:  # the sums along rows are 1 whatever the scores
        columns = tl.sum(weights, 0)
        largest = columns == tl.max(columns, 0)
        share = by_first * tl.max(tl.sum(weights, 1), 0) / tl.sum(largest.to(real), 0)
        by_weights += tl.where(largest, share, 0.0)[None, :]
    else:
        tl.store(by_scale + head, by_first)

    store_square(by_a, by_weights, M)


@triton.jit(do_not_specialize=["m", "parts", "iterations"])
def _landmark_backward_kernel(
    qm,
    km,
    gate,
    by_km_parts,
    by_qm,
    by_km,
    by_gate,
    work,
    n_heads,
    m,
    parts,
    iterations,
    DEPTH: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients by landmarks and gate of one head, from that by A in the workspace."""
    head = tl.program_id(0).to(tl.int64)
    i, j, d = tl.arange(0, M), tl.arange(0, M), tl.arange(0, D)
    gate_of_head = None if gate is None else gate + (head % n_heads) * m * m
    a = work + head * (6 + 4 * iterations) * M * M
    by_az = a + 2 * M * M
    queries, keys = load_landmarks(qm, head, m, i, d, DEPTH), load_landmarks(km, head, m, i, d, DEPTH)
    weights, scores, open_ = landmark_weights(queries, keys, gate_of_head, i, j, m, PRECISION)
    by_weights = load_square(a + 4 * M * M, M)
    by_scores = weights * (by_weights - tl.sum(weights * by_weights, 1)[:, None])
    if gate is not None:
        target = by_gate + head * m * m + i[:, None] * m + j[None, :]
        inside = (i < m)[:, None] & (j < m)[None, :]
        tl.store(target, by_scores * scores * open_ * (1.0 - open_), mask=inside)
        by_scores = by_scores * open_
    store_square(by_az, by_scores, M)
    by_queries = multiply_rows(by_az, km + head * m * DEPTH, m, d, False, M, DEPTH, PRECISION)
    store_landmarks(by_qm, head, m, i, d, by_queries, DEPTH)
    by_keys = multiply_rows(by_az, qm + head * m * DEPTH, m, d, True, M, DEPTH, PRECISION)
    for part in range(parts):
        by_keys += load_landmarks(by_km_parts, head * parts + part, m, i, d, DEPTH)
    store_landmarks(by_km, head, m, i, d, by_keys, DEPTH)


@triton.jit(do_not_specialize=["n_queries", "n_keys", "m", "share"])
def _right_backward_kernel(
    grad,
    qm,
    k,
    v,
    residual,
    key_mask,
    lse,
    by_w,
    delta,
    by_means,
    by_k,
    by_v,
    by_qm,
    stride_gb,
    stride_gh,
    stride_gt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_yb,
    stride_yh,
    stride_yt,
    n_heads,
    n_queries,
    n_keys,
    m,
    share,
    TAPS: tl.constexpr,
    DEPTH: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients by a share of the keys and values, and its part of that by qm."""
    part, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    real: tl.constexpr = qm.dtype.element_ty
    given: tl.constexpr = k.dtype.element_ty
    batch, h = head // n_heads, head % n_heads
    i, d = tl.arange(0, M), tl.arange(0, D)
    row = tl.arange(0, BLOCK)
    landmarks = load_landmarks(qm, head, m, i, d, DEPTH).to(given)
    upstream = load_landmarks(by_w, head, m, i, d, DEPTH).to(given)
    log_total = tl.load(lse + head * m + i, mask=i < m, other=float("inf"))  # weight 0 beyond the landmarks
    centre = tl.load(delta + head * m + i, mask=i < m, other=0.0)
    acc = tl.zeros([M, D], real)
    end = tl.minimum((part + 1) * share, n_keys)
    for first in range(part * share, end, BLOCK):
        token = first + row
        used = token < end
        if key_mask is not None:
            used = used & (tl.load(key_mask + batch * n_keys + token, mask=used, other=0) != 0)
        keys = load_tokens(k + batch * stride_kb + h * stride_kh, stride_kt, token, end, d, DEPTH)
        values = load_tokens(v + batch * stride_vb + h * stride_vh, stride_vt, token, end, d, DEPTH)
        scores = dot(landmarks, tl.trans(keys), PRECISION)
        weights = tl.where(used[None, :], tl.exp(scores - log_total[:, None]), 0.0)
        by_values = dot(tl.trans(weights).to(given), upstream, PRECISION)
        if residual is not None:
            for piece in tl.static_range((BLOCK + TAPS - 2) // BLOCK + 1):
                column = piece * BLOCK + tl.arange(0, BLOCK)
                band = banded(residual + h * TAPS, row, column, TAPS, True)
                seeing = first - TAPS // 2 + column
                rows = load_tokens(grad + batch * stride_gb + h * stride_gh, stride_gt, seeing, n_queries, d, DEPTH)
                by_values += dot(band.to(given), rows, PRECISION)
        store_tokens(by_v + batch * stride_yb + h * stride_yh, stride_yt, token, end, d, by_values, DEPTH)
        by_scores = (weights * (dot(upstream, tl.trans(values), PRECISION) - centre[:, None])).to(given)
        acc += dot(by_scores, keys, PRECISION)
        by_keys = dot(tl.trans(by_scores), landmarks, PRECISION)
        by_keys += load_own_row(by_means, head, token, used, n_keys, m, d, DEPTH)
        store_tokens(by_k + batch * stride_yb + h * stride_yh, stride_yt, token, end, d, by_keys, DEPTH)
    store_landmarks(by_qm, head * tl.num_programs(0) + part, m, i, d, acc, DEPTH)


@triton.jit(do_not_specialize=["n_tokens", "m"])
def _add_means_kernel(
    tokens,
    means,
    mask,
    stride_b,
    stride_h,
    stride_t,
    n_heads,
    n_tokens,
    m,
    DEPTH: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add to each token the row of its segment."""
    head = tl.program_id(1).to(tl.int64)
    base = tokens + (head // n_heads) * stride_b + (head % n_heads) * stride_h
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    used = token < n_tokens
    if mask is not None:
        used = used & (tl.load(mask + (head // n_heads) * n_tokens + token, mask=used, other=0) != 0)
    d = tl.arange(0, D)
    values = load_tokens(base, stride_t, token, n_tokens, d, DEPTH).to(means.dtype.element_ty)
    values += load_own_row(means, head, token, used, n_tokens, m, d, DEPTH)
    store_tokens(base, stride_t, token, n_tokens, d, values, DEPTH)


_ROWS = 64  # tokens in a tile of the kernels that only sum or add


def _sizes(q: Tensor, qm: Tensor) -> dict:
    """Constants of the kernels."""
    depth = q.shape[3]
    square = max(16, triton.next_power_of_2(qm.shape[2]))
    return {"DEPTH": depth, "D": max(16, triton.next_power_of_2(depth)), "M": square}


def _parts(n_tokens: int, heads: int, share: int | None) -> tuple[int, int]:
    """Programs among which the tokens of a head are shared out, and tokens of each."""
    if share is None:
        parts = max(1, min(triton.cdiv(n_tokens, _SHARE), triton.cdiv(PROGRAMS, heads)))
        share = 128 * triton.cdiv(n_tokens, 128 * parts)
    return triton.cdiv(n_tokens, share), share


def _means(tokens: Tensor, mask: Tensor | None, scale: float, means: Tensor, sizes: dict) -> None:
    n_batch, n_heads, m, _ = means.shape
    _landmark_kernel[(m, n_batch * n_heads)](
        *(tokens, mask, means, *tokens.stride()[:3], n_heads, tokens.shape[2], m, scale),
        **{name: sizes[name] for name in ("DEPTH", "D")},
        BLOCK=_ROWS,
    )


def nystrom_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    pinv_scale: Tensor | None,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    iterations: int,
    scale: float,
    precision: str,
    out: Tensor,
    qm: Tensor,
    km: Tensor,
    w: Tensor,
    lse: Tensor,
    u: Tensor,
    share: int | None = None,
) -> None:
    """Write the attention and what its gradient needs.

    Args:
        q, k, v: [B, H, S, D], [B, H, T, D], the last dimension contiguous.
        residual: [H, taps] or None, contiguous.
        gate: logits, [H, m, m] or None, contiguous.
        pinv_scale: [B, H] or None, contiguous.
        query_mask, key_mask: bool, [B, S] and [B, T] or None, contiguous.
        precision: of products of float32, as `tl.dot` names it.
        out: like q.
        qm, km, w, u: landmarks of the queries times `scale` and of the keys, W, U, [B, H, m, D], float32 or float64.
        lse: log of the sum of exp(qm k^T), [B, H, m], like qm.
        share: keys of a program; None: chosen.
    """
    n_batch, n_heads, n_queries, _ = q.shape
    n_keys, m, heads = k.shape[2], qm.shape[2], n_batch * n_heads
    sizes = _sizes(q, qm)
    _means(q, query_mask, scale, qm, sizes)
    _means(k, key_mask, 1.0, km, sizes)
    parts, share = _parts(n_keys, heads, share)
    sums = qm.new_empty(heads, parts, m, sizes["DEPTH"])
    tops, totals = qm.new_empty(heads, parts, m), qm.new_empty(heads, parts, m)
    _right_kernel[(parts, heads)](
        *(qm, k, v, key_mask, sums, tops, totals, *k.stride()[:3], *v.stride()[:3], n_heads, n_keys, m, share),
        **sizes,
        PRECISION=precision,
        **RIGHT_OPTIONS,
    )
    work = qm.new_empty(heads, 4, sizes["M"], sizes["M"])
    _solve_kernel[(heads,)](
        *(qm, km, gate, pinv_scale, sums, tops, totals, w, lse, u, work),
        *(n_heads, m, parts, iterations),
        **sizes,
        PRECISION=precision,
        **SOLVE_OPTIONS,
    )
    _left_kernel[lambda meta: (triton.cdiv(n_queries, meta["BLOCK"]), heads)](
        *(q, km, u, v, residual, out, *q.stride()[:3], *v.stride()[:3], *out.stride()[:3]),
        *(n_heads, n_queries, n_keys, m, scale),
        TAPS=0 if residual is None else residual.shape[1],
        **sizes,
        PRECISION=precision,
    )


def nystrom_attention_backward(
    grad: Tensor,
    qm: Tensor,
    km: Tensor,
    w: Tensor,
    lse: Tensor,
    u: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    pinv_scale: Tensor | None,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    counts: tuple[Tensor, Tensor],
    iterations: int,
    scale: float,
    precision: str,
    by_q: Tensor,
    by_k: Tensor,
    by_v: Tensor,
    by_residual: Tensor,
    by_gate: Tensor,
    by_scale: Tensor,
    share: int | None = None,
) -> None:
    """Write the gradients; arguments as those of `nystrom_attention`.

    Args:
        grad: by out, [B, H, S, D], the last dimension contiguous.
        counts: tokens in each mean of queries and of keys, broadcastable to [B, H, m, 1].
        by_q, by_k, by_v: like q, k, v; by_k and by_v with the same strides.
        by_residual, by_gate, by_scale: like residual, gate and pinv_scale, where those are given.
    """
    n_batch, n_heads, n_queries, depth = q.shape
    n_keys, m, heads = k.shape[2], qm.shape[2], n_batch * n_heads
    sizes = _sizes(q, qm)
    taps = 0 if residual is None else residual.shape[1]

    parts, left_share = _parts(n_queries, heads, share)
    by_u_parts, by_km_parts = (qm.new_empty(heads, parts, m, depth) for _ in range(2))
    taps_parts = None if residual is None else qm.new_empty(heads, parts, taps)
    _left_backward_kernel[(parts, heads)](
        *(grad, q, km, u, v, by_q, by_u_parts, by_km_parts, taps_parts),
        *(*grad.stride()[:3], *q.stride()[:3], *v.stride()[:3], *by_q.stride()[:3]),
        *(n_heads, n_queries, n_keys, m, left_share, scale),
        TAPS=taps,
        TAPS_BLOCK=triton.next_power_of_2(max(taps, 1)),
        **sizes,
        PRECISION=precision,
        **LEFT_BACKWARD_OPTIONS,
    )

    by_qm, by_km, by_w = torch.empty_like(qm), torch.empty_like(km), torch.empty_like(w)
    delta = qm.new_empty(heads, m)
    gates = None if gate is None else qm.new_empty(n_batch, n_heads, m, m)
    scales = None if pinv_scale is None else qm.new_empty(n_batch, n_heads)
    work = qm.new_empty(heads, 6 + 4 * iterations, sizes["M"], sizes["M"])
    _solve_backward_kernel[(heads,)](
        *(qm, km, w, gate, pinv_scale, by_u_parts, torch.empty_like(w), by_w, delta, scales, work),
        *(n_heads, m, parts, iterations),
        **sizes,
        PRECISION=precision,
        **SOLVE_OPTIONS,
    )
    _landmark_backward_kernel[(heads,)](
        *(qm, km, gate, by_km_parts, by_qm, by_km, gates, work, n_heads, m, parts, iterations),
        **sizes,
        PRECISION=precision,
        **SOLVE_OPTIONS,
    )

    parts, right_share = _parts(n_keys, heads, share)
    by_qm_parts = qm.new_empty(n_batch, n_heads, parts, m, depth)
    _right_backward_kernel[(parts, heads)](
        *(grad, qm, k, v, residual, key_mask, lse, by_w, delta, by_km / counts[1], by_k, by_v, by_qm_parts),
        *(*grad.stride()[:3], *k.stride()[:3], *v.stride()[:3], *by_k.stride()[:3]),
        *(n_heads, n_queries, n_keys, m, right_share),
        TAPS=taps,
        **sizes,
        PRECISION=precision,
        **RIGHT_BACKWARD_OPTIONS[k.element_size()],
    )
    by_means = scale * (by_qm + by_qm_parts.sum(2)) / counts[0]
    _add_means_kernel[(triton.cdiv(n_queries, _ROWS), heads)](
        *(by_q, by_means, query_mask, *by_q.stride()[:3], n_heads, n_queries, m),
        **{name: sizes[name] for name in ("DEPTH", "D")},
        BLOCK=_ROWS,
    )
    if residual is not None:
        by_residual.copy_(taps_parts.sum(1).view(n_batch, n_heads, taps).sum(0))
    if gate is not None:
        by_gate.copy_(gates.sum(0))
    if pinv_scale is not None:
        by_scale.copy_(scales)
