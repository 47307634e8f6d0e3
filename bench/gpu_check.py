"""Checks the CUDA path of every op against its reference in double precision, then times what passed.

Run by bench/gpu.sh; `--device cpu` rehearses it on small problems with the CPU kernels. Times are medians over rounds
on the current stream; the floor is what memory must move at least, at the bandwidth that a copy of 256 MB reaches.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import gpu_phasing
import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from xtalfast import ops
from xtalfast.density import RecCrysFormerConfig
from xtalfast.ops.density_map import density_map_reference, it92_form_factors
from xtalfast.ops.extract_shoeboxes import extract_shoeboxes_reference
from xtalfast.ops.intensity_posterior import intensity_posterior_reference
from xtalfast.ops.poisson_gamma_elbo import poisson_gamma_elbo_reference
from xtalfast.ops.profile_fit import profile_fit_reference
from xtalfast.ops.profiles import Profile
from xtalfast.testing import assert_within_twin_error

BOX = (3, 21, 21)
PIXELS = 3 * 21 * 21
PRIORS = ((1.0, 0.01), (1.0, 1.0))
FORMS: dict[str, Callable[..., Profile]] = {
    "values": lambda t: t,
    "logits": ops.SoftmaxProfile,
    "gaussian": ops.MVNProfile,
    "low-rank": ops.LowRankProfile,
}
CELL = (17.4, 21.5, 27.2, 100.0, 110.0, 95.0)
GRID = (36, 40, 52)


def shoeboxes(n: int) -> tuple[Tensor, Tensor, dict[str, list[Tensor]], list[Tensor]]:
    """Counts, DIALS mask bits, parameters of each form of profile and q(I), q(B) of simulated paper boxes, float64."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    axes = (torch.arange(length, dtype=torch.float64) - (length - 1) / 2 for length in BOX)
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    logits = -(grid**2).sum(-1) / 6 + 0.1 * normal(n, PIXELS)
    spot = torch.softmax(logits, 1)
    intensity = torch.logspace(0, 3.5, n, dtype=torch.float64)
    counts = torch.poisson(intensity[:, None] * spot + 0.9, generator=generator).to(torch.uint16)
    mask = torch.where(torch.rand(n, PIXELS, generator=generator) < 0.95, 1 | 4, 1 | 32).to(torch.uint8)
    scale_tril = torch.diag_embed(1.7 + 0.1 * normal(n, 3).abs()) + torch.tril(0.1 * normal(n, 3, 3), -1)
    parameters = {
        "values": [spot],
        "logits": [logits],
        "gaussian": [0.3 * normal(n, 3), scale_tril, grid],
        "low-rank": [normal(n, 16), 0.2 * normal(16, PIXELS), logits[0]],
    }
    shape = torch.logspace(-0.3, 3, n, dtype=torch.float64)
    q = [shape, shape / (1.1 * intensity), torch.full_like(shape, 30.0), torch.full_like(shape, 32.0)]
    return counts, mask, parameters, q


def atoms(n: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """Arguments of `density_map` up to the cells, for two maps of n atoms each."""
    generator = torch.Generator().manual_seed(1)
    coords = 20 * torch.rand(2 * n, 3, generator=generator, dtype=torch.float64)
    element = torch.tensor([6, 7, 8, 16])[torch.randint(4, (2 * n,), generator=generator)]
    b_iso = 15 + 20 * torch.rand(2 * n, generator=generator, dtype=torch.float64)
    cells = torch.tensor([CELL, CELL], dtype=torch.float64)
    ptr = torch.tensor([0, n, 2 * n])
    reals = (coords.to(dtype), element, b_iso.to(dtype), torch.ones(2 * n, dtype=dtype), ptr, cells)
    return tuple(t.to(device) for t in reals)


def agree(run: Callable[[str, torch.dtype, bool], list[Tensor]], device: str, terms: float) -> None:
    """`run(device, dtype, by_reference)`: the op in single precision against its reference in single and double."""
    results = run(device, torch.float32, False)
    twins, exacts = run("cpu", torch.float32, True), run("cpu", torch.float64, True)
    for result, twin, exact in zip(results, twins, exacts, strict=True):
        assert_within_twin_error(
            result.cpu().float(), twin.float(), exact, terms * float(1 + exact.abs().nan_to_num(posinf=0).max())
        )


def check_elbo(form: str, ragged: bool) -> Callable[[str], None]:
    def check(device: str) -> None:
        counts, mask, parameters, q = shoeboxes(24)

        def run(device: str, dtype: torch.dtype, by_reference: bool) -> list[Tensor]:
            values = [t.to(device, dtype, copy=True).requires_grad_() for t in parameters[form]]
            k_i, r_i, k_b, r_b = (t.to(device, dtype, copy=True).requires_grad_() for t in q)
            learned = values[:2] if form == "gaussian" else values  # not the grid
            leaves = [*learned, k_i, r_i, k_b, r_b]
            pixels = [counts.to(device), mask.to(device)]
            ptr = None
            if ragged:
                pixels = [t.reshape(-1) for t in pixels]
                values = [values[0].reshape(-1)]
                ptr = (torch.arange(25) * PIXELS).to(device)
            function = poisson_gamma_elbo_reference if by_reference else ops.poisson_gamma_elbo
            loss = function(*pixels, FORMS[form](*values), (k_i, r_i), (k_b, r_b), *PRIORS, ptr=ptr, nodes=16)
            upstream = torch.linspace(0.5, 2, 24).to(loss)
            return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]

        agree(run, device, terms=64.0)

    return check


def check_monte_carlo(device: str) -> None:
    """The same seed gives the same bits; many samples approach the quadrature."""
    counts, mask, parameters, q = (t for t in shoeboxes(24))
    pixels = (counts.to(device), mask.to(device), parameters["values"][0].float().to(device))
    q_i, q_b = ([t.float().to(device) for t in pair] for pair in (q[:2], q[2:]))

    def loss(**options: object) -> Tensor:
        return ops.poisson_gamma_elbo(*pixels, q_i, q_b, *PRIORS, **options)

    first = loss(estimator="mc", samples=2, seed=5)
    assert torch.equal(first, loss(estimator="mc", samples=2, seed=5)), "the same seed gave other bits"
    draws = torch.stack([loss(estimator="mc", samples=32, seed=seed) for seed in range(64)]).double()
    error = (draws.mean(0) - loss().double()).abs() / (draws.std(0) / 8 + 1e-4 * draws.mean(0).abs())
    assert float(error.max()) < 5, f"{float(error.max()):.1f} standard errors from the quadrature"


def check_compile(device: str) -> None:
    """One graph, forward and backward, and the same loss on a stream of its own."""
    counts, mask, parameters, q = shoeboxes(24)
    logits = parameters["logits"][0].float().to(device).requires_grad_()
    q_i, q_b = ([t.float().to(device) for t in pair] for pair in (q[:2], q[2:]))
    counts, mask = counts.to(device), mask.to(device)

    def loss(logits: Tensor) -> Tensor:
        return ops.poisson_gamma_elbo(counts, mask, ops.SoftmaxProfile(logits), q_i, q_b, *PRIORS, nodes=16).sum()

    (expected,) = torch.autograd.grad(loss(logits), [logits])
    (found,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(logits), [logits])
    torch.testing.assert_close(found, expected)
    if device == "cuda":
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            (found,) = torch.autograd.grad(loss(logits), [logits])
        stream.synchronize()
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def check_profile_fit(device: str) -> None:
    counts, mask, parameters, _ = shoeboxes(24)

    def run(device: str, dtype: torch.dtype, by_reference: bool) -> list[Tensor]:
        pixels = (counts.to(device), mask.to(device), parameters["values"][0].to(device, dtype))
        function = profile_fit_reference if by_reference else ops.profile_fit
        fit = function(*pixels, at=(torch.logspace(0, 3.5, 24, dtype=torch.float64).to(device), 0.9))
        return [fit.i, fit.var_i, fit.bg, fit.var_bg, fit.cov_i_bg, fit.correlation]

    agree(run, device, terms=16.0)


def check_intensity_posterior(device: str) -> None:
    counts, mask, parameters, _ = shoeboxes(24)

    def run(device: str, dtype: torch.dtype, by_reference: bool) -> list[Tensor]:
        pixels = (counts.to(device), mask.to(device), parameters["values"][0].to(device, dtype))
        function = intensity_posterior_reference if by_reference else ops.intensity_posterior
        posterior = function(*pixels, (1.0, 0.0), (2.0, 1.0), quantiles=(0.1, 0.9))
        moments = (posterior.mean_i, posterior.var_i, posterior.mean_bg, posterior.var_bg)
        return [*moments, posterior.quantiles_i, posterior.log_evidence]

    agree(run, device, terms=64.0)


def check_extract_shoeboxes(device: str) -> None:
    images, bbox = stack(n=500, size=300)
    found = ops.extract_shoeboxes(images.to(device), bbox.to(device))
    wanted = extract_shoeboxes_reference(images, bbox)
    for name in ("counts", "mask", "ptr"):
        assert torch.equal(getattr(found, name).cpu().long(), getattr(wanted, name).long()), f"{name} differ"


def check_density_map(device: str) -> None:
    def run(device: str, dtype: torch.dtype, by_reference: bool) -> list[Tensor]:
        arguments = atoms(40, dtype, device)
        leaves = [arguments[k].requires_grad_() for k in (0, 2, 3)]
        if by_reference:
            flat = [n for _ in range(2) for n in GRID]
            density = density_map_reference(*arguments, flat, it92_form_factors(), 1e-5, 0.0)
        else:
            density = ops.density_map(*arguments, GRID)
        upstream = torch.linspace(-1, 1, density.numel(), dtype=torch.float64).to(density).view_as(density)
        gradients = torch.autograd.grad(density, leaves, upstream)
        return [density.detach().reshape(-1), *gradients]

    agree(run, device, terms=64.0)


def check_maps(device: str) -> None:
    """Structure factors, maps and Patterson maps: torch.fft in double on the CPU is the reference."""

    def run(device: str, dtype: torch.dtype, by_reference: bool) -> list[Tensor]:
        density = torch.rand(2, *GRID, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        cells = torch.tensor([CELL, CELL], dtype=torch.float64).to(device)
        density = density.to(device, dtype)
        f = ops.structure_factors(density, cells, d_min=1.5, f000=False)
        back = ops.map_from_structure_factors(f, cells)
        return [torch.view_as_real(f), back, ops.patterson_map(density, cells, d_min=1.5)]

    agree(run, device, terms=64.0)


def stack(n: int, size: int) -> tuple[Tensor, Tensor]:
    """Eight images with bad pixels, and paper boxes, some beyond the edges."""
    generator = torch.Generator().manual_seed(3)
    images = torch.poisson(torch.ones(8, size, size), generator=generator).to(torch.int32)
    images[:, size // 3] = -1
    low = torch.stack([torch.randint(-10, length, (n,), generator=generator) for length in (size, size, 6)], 1)
    low = low[torch.argsort(low[:, 2], stable=True)]
    return images, torch.stack([low, low + torch.tensor(BOX[::-1])], 2).reshape(n, 6).to(torch.int32)


CHECKS: dict[str, dict[str, Callable[[str], None]]] = {
    "poisson_gamma_elbo": {
        **{form: check_elbo(form, ragged=False) for form in FORMS},
        "ragged": check_elbo("logits", ragged=True),
        "monte carlo": check_monte_carlo,
        "compile": check_compile,
    },
    "profile_fit": {"at a reference": check_profile_fit},
    "intensity_posterior": {"moments": check_intensity_posterior},
    "extract_shoeboxes": {"against box by box": check_extract_shoeboxes},
    "density_map": {"with gradients": check_density_map},
    "patterson_map": {"with structure factors": check_maps},
    **gpu_phasing.CHECKS,
}


def copy_bandwidth(device: str) -> float:
    """Bytes a second, read and written, of a copy."""
    source = torch.zeros(1 << 26, device=device)
    target = torch.empty_like(source)
    timer = Timer("target.copy_(source)", globals={"target": target, "source": source})
    return 2 * source.nbytes / timer.blocked_autorange(min_run_time=0.5).median


def timed(op: str, case: str, n: int, least_bytes: int, bandwidth: float, run: Callable[[], object]) -> dict:
    """Median and spread in microseconds an item, bytes that must move at least, and its share of the bandwidth."""
    cuda = torch.cuda.is_available()
    run()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    run()
    peak = torch.cuda.max_memory_allocated() - before if cuda else None
    times = torch.tensor(Timer("run()", globals={"run": run}).blocked_autorange(min_run_time=1.0).times).double()
    p20, median, p80 = (1e6 * float(t) / n for t in torch.quantile(times, torch.tensor([0.2, 0.5, 0.8]).double()))
    share = least_bytes / (1e-6 * median) / bandwidth
    result = {"op": op, "case": case, "n": n, "us_per_item": median, "p20": p20, "p80": p80}
    result |= {"least_bytes_per_item": least_bytes, "share_of_bandwidth": share, "extra_memory_bytes": peak}
    print(f"{op:20} {case:28} {median:10.4f} us an item ({p20:.4f} to {p80:.4f}), {100 * share:5.1f} % of bandwidth")
    return result


def benchmarks(device: str, passed: set[str], n: int) -> list[dict]:
    """Times of the ops that passed all checks, beside plain torch where that is what one would write."""
    bandwidth = copy_bandwidth(device)
    print(f"copy: {bandwidth / 1e9:.0f} GB/s")
    counts, mask, parameters, q = shoeboxes(256)
    repeat = n // 256
    counts, mask = counts.repeat(repeat, 1).to(device), mask.repeat(repeat, 1).to(device)
    q = [t.float().repeat(repeat).to(device).requires_grad_() for t in q]
    shared = {"grid", "basis", "bias"}
    results = []

    def add(op: str, case: str, items: int, least_bytes: int, run: Callable[[], object]) -> None:
        results.append(timed(op, case, items, least_bytes, bandwidth, run))

    if "poisson_gamma_elbo" in passed:
        for form in FORMS:
            names = {"gaussian": ("mean", "scale_tril", "grid"), "low-rank": ("latent", "basis", "bias")}.get(
                form, (form,)
            )
            values = [
                (t if name in shared else t.repeat(repeat, *[1] * (t.ndim - 1))).float().to(device).requires_grad_()
                for name, t in zip(names, parameters[form])
            ]
            learned = values[:2] if form == "gaussian" else values
            profile = FORMS[form](*values)
            # counts and mask; values or logits and their gradient; the gradient by logits alone, twice, for low rank
            least = 3 * PIXELS + {"values": 8, "logits": 8, "gaussian": 0, "low-rank": 4}[form] * PIXELS
            for case, options in (
                ("16 nodes", {"nodes": 16}),
                ("1 sample", {"estimator": "mc", "samples": 1, "seed": 0}),
            ):

                def step(profile=profile, learned=learned, options=options) -> object:
                    loss = ops.poisson_gamma_elbo(counts, mask, profile, q[:2], q[2:], *PRIORS, **options)
                    return torch.autograd.grad(loss.sum(), [*learned, *q])

                add("poisson_gamma_elbo", f"{form}, {case}", n, least, step)
        logits = parameters["logits"][0].float().repeat(repeat, 1).to(device).requires_grad_()
        y = counts.float()

        def ordinary() -> object:
            q_i, q_b = torch.distributions.Gamma(*q[:2]), torch.distributions.Gamma(*q[2:])
            rate = q_i.rsample()[:, None] * torch.softmax(logits, 1) + q_b.rsample()[:, None]
            log_p = torch.distributions.Poisson(rate, validate_args=False).log_prob(y).sum(1)
            return torch.autograd.grad(log_p.sum(), [logits, *q])

        add("torch.distributions", "logits, 1 sample, no KL", n, 11 * PIXELS, ordinary)
    spot = parameters["values"][0].float().repeat(repeat, 1).to(device)
    if "profile_fit" in passed:
        at = (torch.full((n,), 50.0, device=device), torch.ones(n, device=device))
        add("profile_fit", "at a reference", n, 7 * PIXELS, lambda: ops.profile_fit(counts, mask, spot, at=at))
    if "intensity_posterior" in passed:
        flat = ((1.0, 0.0), (1.0, 0.0))
        add(
            "intensity_posterior", "24 nodes", n, 7 * PIXELS, lambda: ops.intensity_posterior(counts, mask, spot, *flat)
        )
    if "extract_shoeboxes" in passed:
        images, bbox = (t.to(device) for t in stack(n, 2500 if device == "cuda" else 300))
        least = 7 * PIXELS  # 4 read, 2 and 1 written
        add("extract_shoeboxes", "uint16", n, least, lambda: ops.extract_shoeboxes(images, bbox, dtype=torch.uint16))
    voxels = GRID[0] * GRID[1] * GRID[2]
    if "density_map" in passed:
        arguments = atoms(120, torch.float32, device)
        add("density_map", "120 atoms", 2, 4 * voxels, lambda: ops.density_map(*arguments, GRID))
    if "patterson_map" in passed:
        density = torch.rand(32, *GRID, device=device)
        cells = torch.tensor([CELL] * 32, dtype=torch.float64, device=device)
        add("patterson_map", "1.5 A", 32, 8 * voxels, lambda: ops.patterson_map(density, cells, d_min=1.5))
    whole = device == "cuda"
    grid, batch = (gpu_phasing.PAPER_GRID, gpu_phasing.BATCH) if whole else ((8, 8, 8), 1)
    gpu_phasing.time_ops(device, passed, add, grid, batch)
    if set(gpu_phasing.CHECKS) <= passed:
        config = RecCrysFormerConfig.paper() if whole else RecCrysFormerConfig.dipeptide()
        gpu_phasing.time_model(device, add, grid, batch, config)
    return results


def commit() -> str | None:
    """The commit checked, where git knows it."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() or None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    device = arguments.device
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    checks: dict[str, dict[str, str]] = {}
    for op, cases in CHECKS.items():
        for case, check in cases.items():
            try:
                check(device)
            except (AssertionError, RuntimeError, ValueError, TypeError, ImportError) as error:
                traceback.print_exc()
                outcome = f"{type(error).__name__}: {error}"
            else:
                outcome = "passed"
            checks.setdefault(op, {})[case] = outcome
            print(f"{op:20} {case:28} {outcome}", flush=True)
    passed = {op for op, cases in checks.items() if set(cases.values()) == {"passed"}}
    report = {
        "device": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "torch": torch.__version__,
        "checks": checks,
        "times": benchmarks(device, passed, 65_536 if device == "cuda" else 256),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{name.replace(' ', '-')}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(path)
    return 0 if len(passed) == len(CHECKS) else 1


if __name__ == "__main__":
    sys.exit(main())
