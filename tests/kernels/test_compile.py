"""Every kernel, and every config left to the autotuner, compiles for the GPUs we name, without spills.

No GPU is needed: Triton compiles offline and the assembler reports registers, spills and memory.
"""

import os
import re
import subprocess
from dataclasses import dataclass

import pytest

pytest.importorskip("triton", reason="triton is not installed (pip install xtalfast[gpu])")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime import Autotuner

from xtalfast.kernels import intensity_posterior, profile_fit
from xtalfast.kernels import poisson_gamma_elbo as elbo
from xtalfast.ops._random import ATTEMPTS

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # most that one block may take
SIZES = dict.fromkeys(("n", "pixels", "width", "rank", "nodes", "rows", "samples", "total", "first"), "i32")


@dataclass(frozen=True)
class Variant:
    """A kernel with the types of its pointers (None: not given) and its constants."""

    kernel: object
    pointers: dict[str, str | None]
    constants: dict[str, object]


def elbo_variant(kind: int, real: str = "fp32", **changes: object) -> Variant:
    matrix, per_pixel = (None, None) if kind < 2 else (real, real)
    pointers = {"counts": "u16", "mask": "u8", "ptr": None, "background": None, "profile": real, "matrix": matrix}
    pointers |= {"per_pixel": per_pixel, "q": "fp64", "rule": real, "nodes_of": "i32", "draws": None, "slopes": None}
    pointers |= {"loss": "fp64", "by_profile": real, "by_matrix": real, "by_q": "fp64"}
    constants = {"KIND": kind, "BITS": True, "BACKGROUND_ROWS": False, "WHOLE": True, "GRADIENTS": True}
    pointers |= {name: value for name, value in changes.items() if name in pointers}
    constants |= {name: value for name, value in changes.items() if name in constants}
    return Variant(elbo._poisson_gamma_elbo_kernel, pointers, constants)


BOXES = {"counts": "u16", "mask": "u8", "ptr": None, "background": None, "profile": "fp32"}
VARIANTS = {
    "divergence": Variant(
        elbo._gamma_divergence_kernel,
        dict.fromkeys(("gammas", "loss", "by_gammas"), "fp64"),
        {"GRADIENTS": True, "ROWS": elbo._DIVERGENCE_ROWS},
    ),
    "rule": Variant(
        elbo._share_rule_kernel,
        {"q": "fp64", "photons": "fp64", "rule": "fp32", "nodes_of": "i32"},
        {"NODES": 0, "ROWS": elbo._RULE_ROWS, "WIDTH": 128},
    ),
    "photons": Variant(
        elbo._photons_kernel,
        {"counts": "u16", "mask": "u8", "ptr": None, "photons": "fp64"},
        {"BITS": True, "BLOCK": elbo._PIXELS},
    ),
    "draws": Variant(
        elbo._standard_gamma_kernel,
        {"shape": "fp64", "seed": "i64", "draws": "fp64"},
        {"ATTEMPTS": ATTEMPTS, "BLOCK": elbo._DRAWS},
    ),
    "elbo-logits": elbo_variant(1),
    "elbo-gaussian": elbo_variant(2),
    "fit": Variant(
        profile_fit._profile_fit_kernel,
        BOXES | {"at": "fp64", "fit": "fp64", "solvable": "i1"},
        {"BITS": True, "BACKGROUND_ROWS": False},
    ),
    "posterior": Variant(
        intensity_posterior._share_likelihood_kernel,
        BOXES | dict.fromkeys(("prior", "node", "summary", "log_rates"), "fp64"),
        {"TOLERANCE": 0.01, "TAIL": 16.0, "BITS": True, "BACKGROUND_ROWS": False, "WHOLE": True},
    ),
}
# what other arguments make of a kernel: the first config, for the oldest of the GPUs
SPECIAL = {
    "elbo-values": elbo_variant(0),
    "elbo-low-rank": elbo_variant(3),
    "elbo-logits-ragged": elbo_variant(1, ptr="i64", background="fp32", BACKGROUND_ROWS=True),
    "elbo-logits-double": elbo_variant(1, "fp64", counts="fp64", WHOLE=False),
    "elbo-gaussian-mc": elbo_variant(2, nodes_of=None, rule=None, draws="fp64", slopes="fp64"),
    "elbo-values-loss": elbo_variant(0, GRADIENTS=False),
}


def configurations(kernel) -> list[tuple[dict, dict]]:
    """Constants and compiler options of every config."""
    if not isinstance(kernel, Autotuner):
        return [({}, {"num_warps": 4})]
    return [(config.kwargs, {"num_warps": config.num_warps}) for config in kernel.configs]


def compile_for(variant: Variant, constants: dict, options: dict, arch: int, directory) -> dict[str, int]:
    """Registers and spilled bytes of a thread, shared memory of a block."""
    function = variant.kernel.fn if isinstance(variant.kernel, Autotuner) else variant.kernel
    fixed = variant.constants | constants | {name: None for name, kind in variant.pointers.items() if kind is None}
    pointers = {name: f"*{kind}" for name, kind in variant.pointers.items() if kind is not None}
    signature = {name: pointers.get(name) or SIZES.get(name, "constexpr") for name in function.arg_names}
    assert {name for name, kind in signature.items() if kind == "constexpr"} == set(fixed)
    aligned = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    source = ASTSource(function, signature, fixed, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = directory / "kernel.ptx"
    ptx.write_text(compiled.asm["ptx"])
    target = re.search(r"\.target (\w+)", compiled.asm["ptx"])[1]
    command = [get_ptxas(arch).path, "-v", "--gpu-name", target, str(ptx), "-o", os.devnull]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr

    def number(pattern: str) -> int:
        return int(re.search(pattern, report)[1])

    return {
        "registers": number(r"Used (\d+) registers"),
        "spilled": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        "shared": compiled.metadata.shared,
    }


@pytest.fixture(autouse=True)
def fused_multiply_add(monkeypatch):
    """Triton 3.9 asks for a choice, which 3.10 will make otherwise."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


def check(name: str, variant: Variant, arch: int, configs: list[tuple[dict, dict]], directory) -> None:
    for constants, options in configs:
        figures = compile_for(variant, constants, options, arch, directory)
        tile = constants.get("BLOCK", "-")
        print(
            f"{name:20} sm_{arch:<4} tile {tile:>4} warps {options['num_warps']} registers {figures['registers']:4} "
            f"spilled {figures['spilled']:4} shared {figures['shared']:6}"
        )
        assert figures["spilled"] == 0
        assert figures["shared"] <= SHARED_BYTES[arch]


@pytest.mark.parametrize("arch", SHARED_BYTES, ids=lambda arch: f"sm_{arch}")
@pytest.mark.parametrize("name", VARIANTS)
def test_every_config_compiles_without_spills(name, arch, tmp_path):
    check(name, VARIANTS[name], arch, configurations(VARIANTS[name].kernel), tmp_path)


@pytest.mark.parametrize("name", SPECIAL)
def test_other_arguments_compile_without_spills(name, tmp_path):
    variant = SPECIAL[name]
    real = torch.float64 if variant.pointers["profile"] == "fp64" else torch.float32
    fitting = elbo.fitting_configs(variant.kernel.configs, {"profile": torch.empty(0, dtype=real)})
    configs = [one for one, config in zip(configurations(variant.kernel), variant.kernel.configs) if config in fitting]
    check(name, variant, min(SHARED_BYTES), configs[:1], tmp_path)
