"""Forward and all gradients of the ELBO on paper boxes (3 x 21 x 21) against ordinary and compiled torch, one thread.

A box holds 1323 pixels. The least that memory must move for one sample with softmax logits is 2 bytes of counts, 4 of
logits and 4 of their gradient a pixel, 13 kB a reflection. `python bench/bench_poisson_gamma_elbo.py` prints the error
of the estimators beside their cost.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributions import Gamma, Poisson, kl_divergence

from xtalfast.ops import MVNProfile, SoftmaxProfile, poisson_gamma_elbo

PIXELS = 3 * 21 * 21
LEAST_BYTES = 10 * PIXELS  # a reflection
PRIOR_I, PRIOR_B = (1.0, 0.01), (1.0, 1.0)


def problem(n: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Counts, logits that require a gradient, and shape and rate of q(I) and q(B)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, PIXELS, generator=generator)
    counts = torch.poisson(50 * torch.softmax(logits, 1) + 1, generator=generator)
    q = [torch.full((n,), value) for value in (8.0, 0.16, 30.0, 30.0)]
    return counts, logits.requires_grad_(), [t.requires_grad_() for t in q]


def step(loss: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> Callable[[], object]:
    """Forward and backward of the summed loss."""
    return lambda: torch.autograd.grad(loss().sum(), leaves)


def ours(counts, logits, q, **options) -> Callable[[], object]:
    packed = counts.to(torch.uint16)
    return step(
        lambda: poisson_gamma_elbo(packed, None, SoftmaxProfile(logits), q[:2], q[2:], PRIOR_I, PRIOR_B, **options),
        [logits, *q],
    )


def ordinary(counts, logits, q, samples: int) -> Callable[[], object]:
    """What one writes first: torch.distributions throughout."""

    def loss() -> torch.Tensor:
        q_i, q_b = Gamma(q[0], q[1]), Gamma(q[2], q[3])
        i, b = q_i.rsample((samples,)), q_b.rsample((samples,))
        rate = i[..., None] * torch.softmax(logits, 1) + b[..., None]
        log_p = Poisson(rate, validate_args=False).log_prob(counts).sum(-1).mean(0)
        return (
            kl_divergence(q_i, Gamma(*map(torch.tensor, PRIOR_I)))
            + kl_divergence(q_b, Gamma(*map(torch.tensor, PRIOR_B)))
            - log_p
        )

    return step(loss, [logits, *q])


def tidy_compiled(counts, logits, q) -> Callable[[], object]:
    """The likelihood alone, without log y!, KL or sampler, by torch.compile: a floor for any torch version."""

    @torch.compile
    def loss(logits, i, b):
        rate = i[:, None] * torch.softmax(logits, 1) + b[:, None]
        return (rate - counts * torch.log(rate)).sum()

    i, b = (q[0] / q[1]).detach().requires_grad_(), (q[2] / q[3]).detach().requires_grad_()
    return lambda: torch.autograd.grad(loss(logits, i, b), [logits, i, b])


def tidy(counts, logits, q) -> Callable[[], object]:
    """The same likelihood without the compiler."""
    i, b = (q[0] / q[1]).detach().requires_grad_(), (q[2] / q[3]).detach().requires_grad_()

    def loss() -> torch.Tensor:
        rate = i[:, None] * torch.softmax(logits, 1) + b[:, None]
        return (rate - counts * torch.log(rate)).sum()

    return step(loss, [logits, i, b])


def shortest(function: Callable[[], object], rounds: int = 10) -> float:
    """CPU seconds of the quickest of several calls."""
    seconds = []
    for _ in range(rounds + 1):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return min(seconds[1:])


@pytest.mark.parametrize(("n", "at_least"), [(1024, 12.0), (8192, 25.0)], ids=["N1024", "N8192"])
def test_one_sample_against_torch_distributions(paired, n, at_least):
    arguments = problem(n)
    paired(ours(*arguments, estimator="mc"), ordinary(*arguments, samples=1), at_least=at_least, rounds=10)


@pytest.mark.parametrize(("n", "at_least"), [(1024, 5.0), (8192, 10.0)], ids=["N1024", "N8192"])
def test_one_sample_against_tidy_torch(paired, n, at_least):
    arguments = problem(n)
    paired(ours(*arguments, estimator="mc"), tidy(*arguments), at_least=at_least, rounds=10)


@pytest.mark.parametrize(("n", "at_least"), [(1024, 2.0), (8192, 3.5)], ids=["N1024", "N8192"])
def test_one_sample_against_torch_compile(paired, n, at_least):
    arguments = problem(n)
    paired(ours(*arguments, estimator="mc"), tidy_compiled(*arguments), at_least=at_least, rounds=20)


@pytest.mark.parametrize("n", [1024, 8192], ids=["N1024", "N8192"])
def test_one_sample_against_the_bandwidth_floor(paired, n):
    """The reference is a copy of the logits: what it moves in a second is the bandwidth of this machine now."""
    arguments = problem(n)
    logits = arguments[1].detach()
    gradient = torch.empty_like(logits)
    ratio = paired(ours(*arguments, estimator="mc"), lambda: gradient.copy_(logits), rounds=40)
    bandwidth = 8 * logits.numel() / shortest(lambda: gradient.copy_(logits))
    floor = LEAST_BYTES * n / bandwidth
    times_floor = 0.8 / ratio  # the copy moves 8 bytes a pixel
    print(
        f"{LEAST_BYTES / 1e3:.1f} kB a reflection, {bandwidth / 1e9:.1f} GB/s: floor {floor / n * 1e6:.2f} us a "
        f"reflection, ours {times_floor:.2f}x that, {100 / times_floor:.0f} % of the bandwidth"
    )


def test_default_quadrature_against_a_hundred_samples(paired):
    arguments = problem(64)
    paired(ours(*arguments), ordinary(*arguments, samples=100), at_least=180, rounds=7)


def test_one_step_takes_the_memory_of_its_gradients():
    """Peak memory of a fresh process above what it held before the step, in units of the gradient by the logits."""
    program = """
import ctypes
import torch
from pathlib import Path
from bench_poisson_gamma_elbo import PIXELS, ours, problem

def resident(field):
    return int(next(l.split()[1] for l in Path("/proc/self/status").open() if l.startswith(field))) * 1024

torch.set_num_threads(1)
ours(*problem(64), estimator="mc")()
call = ours(*problem(4096), estimator="mc")
ctypes.CDLL(None).malloc_trim(0)  # so that nothing freed before is used again unseen
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
call()
print((resident("VmHWM") - before) / (4 * 4096 * PIXELS))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    arrays = float(done.stdout)
    print(f"\npeak memory of a step: {arrays:.2f} times the gradient by the logits")
    assert 0.9 < arrays < 1.2


def test_sixteen_nodes_against_one_sample_of_torch_distributions(paired):
    arguments = problem(1024)
    paired(ours(*arguments, nodes=16), ordinary(*arguments, samples=1), rounds=10)


def test_gaussian_profile_against_the_softmax_of_its_logits(paired):
    counts, logits, q = problem(1024)
    axes = (torch.arange(size) - (size - 1) / 2 for size in (3, 21, 21))
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    mean = torch.zeros(len(counts), 3, requires_grad=True)
    scale = torch.eye(3).repeat(len(counts), 1, 1).requires_grad_()
    packed = counts.to(torch.uint16)
    gaussian = step(
        lambda: poisson_gamma_elbo(
            packed, None, MVNProfile(mean, scale, grid), q[:2], q[2:], PRIOR_I, PRIOR_B, nodes=8
        ),
        [mean, scale, *q],
    )
    paired(gaussian, ours(counts, logits, q, nodes=8), rounds=20)


def error_and_cost(n: int = 96) -> list[str]:
    """Rows of a Markdown table: time, and error of loss and gradients, of quadratures and Monte Carlo.

    Errors are against 400 nodes in double precision: root mean square of the loss (nats) and of the gradient by log
    mean intensity (photons), over boxes of 1 to 10,000 photons whose q is the exact width.
    """
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(n, PIXELS, generator=generator, dtype=torch.float64)
    intensity = torch.logspace(0, 4, n, dtype=torch.float64)
    profile = torch.softmax(logits, 1)
    counts = torch.poisson(intensity[:, None] * profile + 1, generator=generator).to(torch.uint16)
    shape = intensity.clamp(min=1) ** 2 / (intensity + 100)  # width of a spot on 100 photons of background
    shape = shape.clamp(min=1.0)
    q_b = torch.full((n,), 1300.0, dtype=torch.float64)

    def run(dtype: torch.dtype, **options):
        log_mean = intensity.log().requires_grad_()
        rate = shape / log_mean.exp()
        values = SoftmaxProfile(logits.to(dtype))
        loss = poisson_gamma_elbo(counts, None, values, (shape, rate), (q_b, q_b), PRIOR_I, PRIOR_B, **options)
        return loss.detach().double(), torch.autograd.grad(loss.sum(), log_mean)[0]

    exact = run(torch.float64, nodes=400)
    rows = ["| estimator | us a reflection | error of the loss, nats | of the gradient, photons |", "|---|---|---|---|"]
    options: list[tuple[str, dict]] = [(f"quadrature, {k} nodes", {"nodes": k}) for k in (4, 8, 12, 16, 24)]
    options += [("quadrature, auto", {})]
    options += [(f"Monte Carlo, {s} samples", {"estimator": "mc", "samples": s, "seed": 1}) for s in (1, 10, 100, 1000)]
    for name, chosen in options:
        found = run(torch.float64, **chosen)
        errors = [float((a - b).square().mean().sqrt()) for a, b in zip(found, exact)]
        microseconds = 1e6 * shortest(lambda chosen=chosen: run(torch.float32, **chosen)) / n
        rows.append(f"| {name} | {microseconds:.1f} | {errors[0]:.1e} | {errors[1]:.1e} |")
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("\n".join(error_and_cost()))
