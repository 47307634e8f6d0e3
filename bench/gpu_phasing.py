"""The phasing network's ops and the network itself on a GPU: checks against references, times against plain torch.

Part of gpu_check.py. Products of bfloat16, and of float32 as TF32, must be as accurate as the reference in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from xtalfast import ops
from xtalfast.ops.conv3d_periodic import conv3d_periodic_reference
from xtalfast.ops.nystrom_attention import nystrom_attention_reference
from xtalfast.ops.patch_embed import patch_embed_reference, stem_statistics_reference
from xtalfast.testing import assert_within_twin_error

PAPER_GRID = (60, 40, 36)
BATCH = 10
Run = Callable[[str, torch.dtype, bool], list[Tensor]]


def agree(run: Run, device: str) -> None:
    """`run(device, dtype, by_reference)`: results and gradients of the op in both precisions of tensor cores."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        exacts, twins = run("cpu", torch.float64, True), run("cpu", torch.bfloat16, True)
        for dtype in (torch.bfloat16, torch.float32):
            for result, twin, exact in zip(run(device, dtype, False), twins, exacts, strict=True):
                terms = 16.0 * float(1 + exact.abs().max())
                assert_within_twin_error(result.cpu().to(torch.bfloat16), twin.to(torch.bfloat16), exact, terms)
    finally:
        torch.set_float32_matmul_precision(before)


def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Normal numbers that bfloat16 holds exactly, float64."""
    values = scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.bfloat16().double()


def with_gradients(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """What the function returns, and its gradients by the tensors."""
    leaves = [t.requires_grad_() for t in tensors]
    out = function(*leaves)
    outs = list(out) if isinstance(out, tuple) else [out]
    upstream = [torch.linspace(-1, 1, o.numel(), dtype=torch.float64).view(o.shape).to(o) for o in outs]
    return [o.detach() for o in outs] + list(torch.autograd.grad(outs, leaves, upstream))


def check_nystrom(gated: bool, masked: bool) -> Callable[[str], None]:
    def check(device: str) -> None:
        s, t, m = (200, 333, 64) if gated else (130, 400, 64)
        q, k, v = (random(2, n, 4, 64, seed=i).transpose(1, 2) for i, n in enumerate((s, t, t)))
        tensors = [q, k, v, random(4, 33, seed=3, scale=0.2)]
        tensors += [random(4, m, m, seed=4), random(2, 4, seed=5).abs() + 1] if gated else []
        mask = torch.arange(t) < t - 7

        def run(device: str, dtype: torch.dtype, by_reference: bool) -> list[Tensor]:
            function = nystrom_attention_reference if by_reference else ops.nystrom_attention
            key_mask = mask.expand(2, t).to(device) if masked else None

            def attend(q, k, v, residual, gate=None, pinv_scale=None) -> Tensor:
                return function(q, k, v, residual, gate, pinv_scale=pinv_scale, key_mask=key_mask)

            return with_gradients(attend, [x.detach().to(device, dtype) for x in tensors])

        agree(run, device)

    return check


def check_nystrom_compiles(device: str) -> None:
    """One graph, forward and backward, and the same bits twice."""
    tensors = [random(2, 4, n, 64, seed=i).to(device, torch.bfloat16) for i, n in enumerate((130, 400, 400))]
    compiled = torch.compile(lambda q, k, v: ops.nystrom_attention(q, k, v), fullgraph=True)
    for a, b in zip(with_gradients(compiled, tensors), with_gradients(ops.nystrom_attention, tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def check_convolution(padding: str, kernel: int) -> Callable[[str], None]:
    def check(device: str) -> None:
        tensors = [random(2, 10, 12, 9, 20, seed=0), random(10, 10, *[kernel] * 3, seed=1, scale=kernel**-1.5)]
        tensors += [random(10, seed=2), random(10, seed=3) + 2, random(10, seed=4)]

        def run(device: str, dtype: torch.dtype, by_reference: bool) -> list[Tensor]:
            function = conv3d_periodic_reference if by_reference else ops.conv3d_periodic

            def convolve(x, weight, bias, scale, shift) -> tuple[Tensor, ...]:
                return function(
                    *(x, weight, bias),
                    padding=padding,
                    channel_scale=scale,
                    channel_shift=shift,
                    relu=True,
                    statistics=True,
                )

            return with_gradients(convolve, [x.detach().to(device, dtype) for x in tensors])

        agree(run, device)

    return check


def check_patch_embed(order: str) -> Callable[[str], None]:
    def check(device: str) -> None:
        tensors = [random(2, 1, 12, 8, 16, seed=0), random(10, 1, 7, 7, 7, seed=1, scale=0.1)]
        tensors += [random(10, seed=2) + 2, random(10, seed=3), random(640, seed=4) + 2, random(640, seed=5)]
        tensors += [random(512, 640, seed=6, scale=0.04), random(512, seed=7), random(512, seed=8) + 2]
        tensors += [random(512, seed=9)]

        def run(device: str, dtype: torch.dtype, by_reference: bool) -> list[Tensor]:
            function = patch_embed_reference if by_reference else ops.patch_embed

            def embed(x, w, a, b, w1, b1, weight, bias, w2, b2) -> Tensor:
                return function(x, w, a, b, (w1, b1), weight, bias, (w2, b2), order=order)

            return with_gradients(embed, [x.detach().to(device, dtype) for x in tensors])

        agree(run, device)

    return check


def check_statistics(device: str) -> None:
    x, w = random(3, 2, 12, 8, 16, seed=0), random(10, 2, 7, 7, 7, seed=1)
    counts = torch.tensor([2, 1, 3])
    found = ops.stem_statistics(x.float().to(device), w.float().to(device), counts.to(device))
    for a, b in zip(found, stem_statistics_reference(x, w, counts), strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-5, atol=1e-5)


CHECKS: dict[str, dict[str, Callable[[str], None]]] = {
    "nystrom_attention": {
        "residual": check_nystrom(gated=False, masked=False),
        "gate and scale": check_nystrom(gated=True, masked=False),
        "masked": check_nystrom(gated=False, masked=True),
        "compile": check_nystrom_compiles,
    },
    "conv3d_periodic": {f"{p}, k={k}": check_convolution(p, k) for p, k in (("wrap", 5), ("zeros", 5), ("zeros", 1))},
    "patch_embed": {
        "channels last": check_patch_embed("(ph pw pd c)"),
        "channels first": check_patch_embed("(c ph pw pd)"),
        "statistics": check_statistics,
    },
}

Add = Callable[[str, str, int, int, Callable[[], object]], None]


def time_ops(device: str, passed: set[str], add: Add, grid: tuple[int, int, int], batch: int) -> None:
    """Forward and backward in bfloat16 of each op that passed, of its reference, and of that compiled."""
    tokens, context, voxels = math.prod(grid) // 64, 3240, math.prod(grid)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).bfloat16().requires_grad_()

    def each(op: str, ours: Callable, reference: Callable, inputs: list[Tensor], least: int, **options) -> None:
        ways = (("ours", ours), ("eager", reference), ("compiled", torch.compile(reference)))
        for name, function in ways:

            def step(function=function) -> object:
                out = function(*inputs, **options)
                outs = out if isinstance(out, tuple) else (out,)
                return torch.autograd.grad(sum(o.sum() for o in outs), inputs)

            add(op, name, batch, least, step)

    if "nystrom_attention" in passed:
        q, k, v = (normal(batch, n, 8, 64) for n in (tokens, tokens + context, tokens + context))

        def attend(function: Callable) -> Callable:
            return lambda q, k, v, residual: function(*(x.transpose(1, 2) for x in (q, k, v)), residual)

        # forward reads q, k, v and writes out; backward reads those and the gradient and writes three
        least = 2 * 512 * (7 * tokens + 6 * (tokens + context))
        inputs = [q, k, v, normal(8, 33)]
        each("nystrom_attention", attend(ops.nystrom_attention), attend(nystrom_attention_reference), inputs, least)
    if "conv3d_periodic" in passed:
        inputs = [normal(batch, 10, *grid), normal(10, 10, 5, 5, 5)]
        options = {"padding": "zeros", "relu": True, "statistics": True}
        each("conv3d_periodic", ops.conv3d_periodic, conv3d_periodic_reference, inputs, 2 * 10 * 6 * voxels, **options)
    if "patch_embed" in passed:
        w = [normal(10, 1, 7, 7, 7), normal(10), normal(10), normal(640), normal(640), normal(512, 640), normal(512)]
        inputs = [*w, normal(512), normal(512)]
        x = torch.randn(batch, 1, *grid, device=device).bfloat16()

        def embed(function: Callable) -> Callable:
            return lambda w, a, b, w1, b1, weight, bias, w2, b2: function(x, w, a, b, (w1, b1), weight, bias, (w2, b2))

        least = 2 * (2 * voxels + 2 * 512 * tokens)
        each("patch_embed", embed(ops.patch_embed), embed(patch_embed_reference), inputs, least)


def time_model(device: str, add: Add, grid: tuple[int, int, int], batch: int, config: object) -> None:
    """A training step's forward and backward of RecCrysFormer: ours, written out densely, and that compiled."""
    import dense_reccrysformer as dense

    from xtalfast.density import RecCrysFormer

    torch.manual_seed(0)
    model = RecCrysFormer(config).to(device).train()
    n = model.config.n_residues
    patterson = 0.05 * torch.randn(batch, 1, *grid, device=device)
    ids = torch.randint(20, (batch, n), device=device)
    compiled = torch.compile(dense.forward)
    ways = {
        "ours": lambda: model(patterson, ids),
        "dense eager": lambda: dense.forward(model, patterson, ids),
        "dense compiled": lambda: compiled(model, patterson, ids),
    }
    # least bytes: parameters once, bfloat16 activations of the decoder and of the layers once each way
    tokens, voxels = math.prod(grid) // 64, math.prod(grid)
    least = 2 * (20 * 10 * voxels + model.config.depth * 20 * model.config.dim * tokens)
    for name, forward in ways.items():
        for precision in ("bf16", "tf32"):

            def step(forward=forward, precision=precision) -> None:
                torch.set_float32_matmul_precision("high")
                with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                    loss = forward().float().square().mean()
                loss.backward()
                model.zero_grad(set_to_none=True)

            add("RecCrysFormer", f"{name}, {precision}", batch, least, step)
    torch.set_float32_matmul_precision("highest")
