"""Which backends each op has: one stem, the same wherever the op appears.

An op named `x` has its definition, registration and public function in `xtalfast/ops/x.py` (with `x_reference` in plain
torch), its test in `tests/ops/test_x.py`, its bench in `bench/bench_x.py`, and for each backend the file below.
`tests/ops/test_registry.py` checks that exactly these files exist.
"""

from __future__ import annotations

FILES = {
    "cpp": "csrc/{}.cpp",
    "cuda": "csrc/{}.cu",
    "triton": "kernels/{}.py",
}

BACKENDS: dict[str, tuple[str, ...]] = {
    "extract_shoeboxes": ("cpp", "cuda"),
    "intensity_posterior": ("cpp", "triton"),
    "poisson_gamma_elbo": ("cpp", "triton"),
    "profile_fit": ("cpp", "triton"),
}
