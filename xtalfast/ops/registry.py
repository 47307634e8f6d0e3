"""Which backends each op has: one stem, the same wherever the op appears.

An op named `x` has its definition in plain torch (`x_reference`, or that of the step which has a kernel), registration
and public function in `xtalfast/ops/x.py`, its test in `tests/ops/test_x.py`, its bench in `bench/bench_x.py`, and for
each backend the file below. `tests/ops/test_registry.py` checks that exactly these files exist.
"""

from __future__ import annotations

FILES = {
    "cpp": "csrc/{}.cpp",
    "cuda": "csrc/{}.cu",
    "triton": "kernels/{}.py",
}

BACKENDS: dict[str, tuple[str, ...]] = {
    "conv3d_periodic": ("triton",),
    "density_map": ("cpp", "cuda"),
    "extract_shoeboxes": ("cpp", "cuda"),
    "intensity_posterior": ("cpp", "triton"),
    "nystrom_attention": ("triton",),
    "patch_embed": ("triton",),
    "patterson_map": ("cpp", "cuda"),
    "poisson_gamma_elbo": ("cpp", "triton"),
    "profile_fit": ("cpp", "triton"),
    "structure_factors": ("cpp", "cuda"),
}
