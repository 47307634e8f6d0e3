"""Shoeboxes and their profiles as the kernels read them: a tile of pixels of one box at a time."""

import triton
import triton.language as tl
from triton import knobs

# Forms of a profile. `profile`, `matrix`, `per_pixel` hold: values or logits, like the counts (the others None);
# mean [N, 3], scale_tril [N, 3, 3], grid [P or M, 3]; or latent [N, D], basis [D, P], bias [P].
VALUES, LOGITS, GAUSSIAN, LOW_RANK = (tl.constexpr(kind) for kind in range(4))
SMALLEST_RATE = tl.constexpr(1e-25)  # photons; rates below are taken for it, so that p = 0 with y > 0 stays finite
USED_BITS = tl.constexpr(1 | 32)  # DIALS: Valid, Overlapped
VALID = tl.constexpr(1)


def tile_configs(*sizes: tuple[int, int]) -> list[triton.Config]:
    """One config for each (pixels in a tile, warps); under the interpreter, which cannot time, only the first."""
    configs = [triton.Config({"BLOCK": pixels}, num_warps=warps) for pixels, warps in sizes]
    return configs[:1] if knobs.runtime.interpret else configs


@triton.jit
def box_extent(ptr, row, pixels):
    """First pixel (int64) and number of pixels of a box."""
    if ptr is None:
        first = row * pixels
        size = pixels
    else:
        first = tl.load(ptr + row)
        size = (tl.load(ptr + row + 1) - first).to(tl.int32)
    return first, size


@triton.jit
def load_pixels(
    counts, mask, background, first, at, inside, BITS: tl.constexpr, BACKGROUND_ROWS: tl.constexpr, dtype: tl.constexpr
):
    """Counts (0 where not used), use, and background (1 where not used) of the pixels `at` of a box."""
    used = inside
    if mask is not None:
        bits = tl.load(mask + (first + at), mask=inside, other=0)
        used = inside & ((bits & USED_BITS) == VALID) if BITS else inside & (bits != 0)
    y = tl.where(used, tl.load(counts + (first + at), mask=inside, other=0).to(dtype), 0.0)
    b = tl.full(at.shape, 1.0, dtype)
    if background is not None:
        row_first = first if BACKGROUND_ROWS else first * 0
        b = tl.where(used, tl.load(background + (row_first + at), mask=inside, other=1.0), 1.0)
    return y, used, b


@triton.jit
def whiten(mean, scale_tril, grid, row, first, at, inside, RAGGED: tl.constexpr):
    """L^-1 (x - mean) of the pixels `at`, by forward substitution."""
    position = grid + 3 * (first + at if RAGGED else at)
    l = scale_tril + 9 * row
    z0 = (tl.load(position, mask=inside, other=0.0) - tl.load(mean + 3 * row)) / tl.load(l)
    z1 = tl.load(position + 1, mask=inside, other=0.0) - tl.load(mean + 3 * row + 1)
    z1 = (z1 - tl.load(l + 3) * z0) / tl.load(l + 4)
    z2 = tl.load(position + 2, mask=inside, other=0.0) - tl.load(mean + 3 * row + 2)
    z2 = (z2 - tl.load(l + 6) * z0 - tl.load(l + 7) * z1) / tl.load(l + 8)
    return z0, z1, z2


@triton.jit
def profile_logits(
    profile, matrix, per_pixel, row, first, at, inside, pixels, rank, RAGGED: tl.constexpr, KIND: tl.constexpr
):
    """Logarithm of the profile but for a constant, -inf outside the box."""
    if KIND == GAUSSIAN:
        z0, z1, z2 = whiten(profile, matrix, per_pixel, row, first, at, inside, RAGGED)
        logits = -0.5 * (z0 * z0 + z1 * z1 + z2 * z2)
    elif KIND == LOW_RANK:
        logits = tl.load(per_pixel + at, mask=inside, other=0.0)
        for d in range(rank):  # the basis is shared by all boxes and stays in cache
            pattern = tl.load(matrix + d * pixels + at, mask=inside, other=0.0)
            logits += tl.load(profile + row * rank + d) * pattern
    else:
        logits = tl.load(profile + (first + at), mask=inside, other=0.0)
    return tl.where(inside, logits, -float("inf"))


@triton.jit
def softmax_range(
    profile,
    matrix,
    per_pixel,
    row,
    first,
    size,
    pixels,
    rank,
    RAGGED: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Largest logit of a box, and 1 / sum exp(logit - largest); (0, 1) for a profile given by values."""
    dtype: tl.constexpr = profile.dtype.element_ty
    top = tl.full([], 0.0, dtype)
    scale = tl.full([], 1.0, dtype)
    if KIND != VALUES:
        tops = tl.full([BLOCK], -float("inf"), dtype)
        sums = tl.zeros([BLOCK], dtype)
        for start in range(0, size, BLOCK):
            at = start + tl.arange(0, BLOCK)
            logits = profile_logits(
                profile, matrix, per_pixel, row, first, at, at < size, pixels, rank, RAGGED, KIND
            ).to(dtype)
            higher = tl.maximum(tops, logits)
            base = tl.where(higher == -float("inf"), 0.0, higher)
            sums = sums * tl.exp(tops - base) + tl.exp(logits - base)
            tops = higher
        top = tl.max(tops, 0)
        top = tl.where(top == -float("inf"), 0.0, top)  # a box without pixels
        scale = 1.0 / tl.maximum(tl.sum(sums * tl.exp(tops - top), 0), SMALLEST_RATE)
    return top, scale


@triton.jit
def load_profile(
    profile,
    matrix,
    per_pixel,
    row,
    first,
    at,
    inside,
    pixels,
    rank,
    top,
    scale,
    RAGGED: tl.constexpr,
    KIND: tl.constexpr,
):
    """Profile values of the pixels `at` of a box, 0 outside it."""
    if KIND == VALUES:
        p = tl.load(profile + (first + at), mask=inside, other=0.0)
    else:
        logits = profile_logits(profile, matrix, per_pixel, row, first, at, inside, pixels, rank, RAGGED, KIND)
        p = tl.exp(logits - top) * scale
    return p


@triton.jit
def log_factorial(y, WHOLE: tl.constexpr):
    """log y!: of whole numbers the logarithm of an exact product, Stirling's series above 12; in double for others."""
    if WHOLE:
        x = tl.maximum(y, 12.0) + 1.0
        product = tl.full(y.shape, 1.0, y.dtype)
        for i in tl.static_range(2, 13):  # 12! has 19 significant bits
            product *= tl.where(y >= i, i * 1.0, 1.0)
        result = tl.where(y > 12.0, stirling(x), tl.log(product))
    else:
        x = y.to(tl.float64) + 1.0
        product = tl.full(y.shape, 1.0, tl.float64)
        for _ in range(12):  # Gamma(x) = Gamma(x + 1) / x
            product *= tl.where(x <= 12.0, x, 1.0)
            x += tl.where(x <= 12.0, 1.0, 0.0)
        result = tl.where((y == 0.0) | (y == 1.0), 0.0, stirling(x) - tl.log(product)).to(y.dtype)
    return result


@triton.jit
def stirling(x):
    """log Gamma(x) for x > 12."""
    inverse = 1.0 / x
    square = inverse * inverse
    series = inverse * (1 / 12 + square * (-1 / 360 + square * (1 / 1260 + square * (-1 / 1680 + square * (1 / 1188)))))
    return (x - 0.5) * tl.log(x) - x + 0.9189385332046727 + series
