"""Every kernel, and every config left to the autotuner, compiles for the GPUs we name, without spills.

No GPU is needed: Triton compiles offline and the assembler reports registers, spills and memory.
"""

import os
import re
import subprocess
from dataclasses import dataclass, field

import pytest

pytest.importorskip("triton", reason="triton is not installed (pip install xtalfast[gpu])")

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime import Autotuner

from xtalfast.kernels import conv3d_periodic, intensity_posterior, patch_embed, profile_fit
from xtalfast.kernels import nystrom_attention as nystrom
from xtalfast.kernels import poisson_gamma_elbo as elbo
from xtalfast.ops._random import ATTEMPTS

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # most that one block may take
REALS = ("scale", "eps")  # numbers that are not integers


@dataclass(frozen=True)
class Variant:
    """A kernel with the types of its pointers (None: not given), its constants, and what its launch fixes."""

    kernel: object
    pointers: dict[str, str | None]
    constants: dict[str, object]
    options: dict[str, object] = field(default_factory=lambda: {"num_warps": 4})


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


def phasing_variants(given: str) -> dict[str, Variant]:
    """The kernels of the phasing network at the density paper's sizes, for maps and tokens of this type."""

    def pointers(shared: str, single: str = "", absent: str = "") -> dict[str, str | None]:
        types = ((shared, given), (single, "fp32"), (absent, None))
        return {name: kind for names, kind in types for name in names.split()}

    head = {"DEPTH": 64, "D": 64, "M": 64, "PRECISION": "tf32"}
    rows = {"DEPTH": 64, "D": 64, "BLOCK": nystrom._ROWS}
    taps = head | {"TAPS": 33}
    size = 2 if given == "bf16" else 4
    voxels = {"CHANNELS": 10, "K": 5, "TAPS": 64, "WRAP": False, "PRECISION": "tf32", "real": tl.float32}
    voxels |= {"BLOCK": conv3d_periodic.VOXELS, "O": conv3d_periodic.OUT}
    tokens = {"PATCH": 4, "EDGE": 10, "DIM": 512, "PRECISION": "tf32", "real": tl.float32}
    tokens |= {"BLOCK": patch_embed.TOKENS, "COLUMNS": patch_embed.COLUMNS, "TAPS": patch_embed._TAPS}
    return {
        "landmarks": Variant(nystrom._landmark_kernel, pointers("tokens", "means", "mask"), rows),
        "right": Variant(
            nystrom._right_kernel, pointers("k v", "qm sums tops totals", "key_mask"), head, nystrom.RIGHT_OPTIONS
        ),
        "left": Variant(nystrom._left_kernel, pointers("q v residual out", "km u"), taps),
        "left-backward": Variant(
            nystrom._left_backward_kernel,
            pointers("grad q v by_q", "km u by_u by_km by_residual"),
            taps | {"TAPS_BLOCK": 64},
            nystrom.LEFT_BACKWARD_OPTIONS,
        ),
        "right-backward": Variant(
            nystrom._right_backward_kernel,
            pointers("grad k v residual by_k by_v", "qm lse by_w delta by_means by_qm", "key_mask"),
            taps,
            nystrom.RIGHT_BACKWARD_OPTIONS[size],
        ),
        "add-means": Variant(nystrom._add_means_kernel, pointers("tokens", "means", "mask"), rows),
        "convolve-statistics": Variant(
            conv3d_periodic._convolve_kernel,
            pointers("x weight y", "scale shift sums", "bias before before_scale"),
            voxels | {"RELU": True, "EPILOGUE": conv3d_periodic.STATISTICS, "BEFORE_RELU": False},
            conv3d_periodic.OPTIONS,
        ),
        "convolve-back": Variant(
            conv3d_periodic._convolve_kernel,
            pointers("x weight y before", "before_scale sums", "bias scale shift"),
            voxels | {"RELU": False, "EPILOGUE": conv3d_periodic.CHAIN, "BEFORE_RELU": True},
            conv3d_periodic.OPTIONS,
        ),
        "convolve-weight": Variant(
            conv3d_periodic._weight_kernel,
            pointers("x grad", "scale shift sums"),
            voxels | {"RELU": True},
            conv3d_periodic.OPTIONS,
        ),
        "patch-embed": Variant(
            patch_embed._patch_embed_kernel,
            pointers("x band weight tokens", "offset total bias norm_weight norm_bias"),
            tokens,
            patch_embed.OPTIONS,
        ),
    }


HEAD = {"DEPTH": 64, "D": 64, "M": 64, "PRECISION": "tf32"}
SOLVE = "qm km gate sums tops totals w lse u work"
SOLVE_BACKWARD = "qm km w gate by_u_parts by_solved_rows by_w delta work"
LANDMARK_BACKWARD = "qm km gate by_km_parts by_qm by_km by_gate work"
VARIANTS |= phasing_variants("bf16")
VARIANTS |= {
    "solve": Variant(
        nystrom._solve_kernel, dict.fromkeys(SOLVE.split(), "fp32") | {"pinv_scale": None}, HEAD, nystrom.SOLVE_OPTIONS
    ),
    "solve-backward": Variant(
        nystrom._solve_backward_kernel,
        dict.fromkeys(SOLVE_BACKWARD.split(), "fp32") | {"pinv_scale": None, "by_scale": None},
        HEAD,
        nystrom.SOLVE_OPTIONS,
    ),
    "landmark-backward": Variant(
        nystrom._landmark_backward_kernel,
        dict.fromkeys(LANDMARK_BACKWARD.split(), "fp32"),
        HEAD,
        nystrom.SOLVE_OPTIONS,
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
SINGLE = phasing_variants("fp32")


def configurations(variant: Variant) -> list[tuple[dict, dict]]:
    """Constants and compiler options of every config."""
    kernel = variant.kernel
    if not isinstance(kernel, Autotuner):
        options = {name: value for name, value in variant.options.items() if name.startswith("num_")}
        return [({name: value for name, value in variant.options.items() if name not in options}, options)]
    return [(c.kwargs, {"num_warps": c.num_warps, "num_stages": c.num_stages}) for c in kernel.configs]


def compile_for(variant: Variant, constants: dict, options: dict, arch: int, directory) -> dict[str, int]:
    """Registers and spilled bytes of a thread, shared memory of a block."""
    function = variant.kernel.fn if isinstance(variant.kernel, Autotuner) else variant.kernel
    fixed = variant.constants | constants | {name: None for name, kind in variant.pointers.items() if kind is None}
    pointers = {name: f"*{kind}" for name, kind in variant.pointers.items() if kind is not None}
    assert set(fixed) | set(pointers) <= set(function.arg_names)
    numbers = {name: "fp32" if name in REALS else "i32" for name in function.arg_names}
    signature = numbers | dict.fromkeys(fixed, "constexpr") | pointers
    assert not any(kind == "i32" and name.isupper() for name, kind in signature.items()), "a constant has no value"
    strides = [name for name in function.arg_names if name.startswith("stride_")]
    aligned = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, *strides)}
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
    check(name, VARIANTS[name], arch, configurations(VARIANTS[name]), tmp_path)


@pytest.mark.parametrize("name", SPECIAL)
def test_other_arguments_compile_without_spills(name, tmp_path):
    variant = SPECIAL[name]
    real = torch.float64 if variant.pointers["profile"] == "fp64" else torch.float32
    fitting = elbo.fitting_configs(variant.kernel.configs, {"profile": torch.empty(0, dtype=real)})
    configs = [one for one, config in zip(configurations(variant), variant.kernel.configs) if config in fitting]
    check(name, variant, min(SHARED_BYTES), configs[:1], tmp_path)


@pytest.mark.parametrize("name", SINGLE)
def test_single_precision_compiles_without_spills(name, tmp_path):
    check(name, SINGLE[name], min(SHARED_BYTES), configurations(SINGLE[name]), tmp_path)
