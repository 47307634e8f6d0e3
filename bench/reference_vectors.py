"""Hold the network to vectors of the density paper's public implementation, all cases, in float64.

    python bench/reference_vectors.py ../shared/data/reccrysformer-reference

prints the largest differences and fails above 1e-10 (outputs, statistics of batch norm) or 1e-9 (gradients, relative).
`--reduce FILE` writes the small case that the tests carry: slices of the public case's weights and inputs, and what
`dense_reccrysformer.py`, held to the same vectors, makes of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

import dense_reccrysformer

from xtalfast.density import RecCrysFormer, RecCrysFormerConfig, load_reference_state_dict
from xtalfast.density.model_weights import our_name

SMALL = {"dim": 8, "depth": 1, "heads": 2, "dim_head": 4, "ff_dim": 16, "decoder_blocks": 1}
GRID, BATCH = (8, 12, 8), 2


def network(config: dict, arrays: dict[str, NDArray]) -> RecCrysFormer:
    """The network with the weights of a case."""
    settings = {"n_residues": 3, "residue_map_size": 8, "dropout": 0.0, "emb_dropout": 0.0, "pinv_scale": "batch"}
    model = RecCrysFormer(
        RecCrysFormerConfig(**settings, **config), torch.from_numpy(np.array(arrays["residue_maps"]))
    ).double()
    weights = {key[6:]: torch.from_numpy(np.array(value)) for key, value in arrays.items() if key.startswith("param/")}
    load_reference_state_dict(model, weights)
    return model


def inputs(arrays: dict[str, NDArray]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Patterson, residue ids and template (or None)."""
    x = torch.from_numpy(np.array(arrays["x"], np.float64))
    return x[:, :1], torch.from_numpy(np.array(arrays["residue_ids"], np.int64)), x[:, 1:] if x.shape[1] > 1 else None


def gradients(model: RecCrysFormer) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def check(name: str, case: dict, arrays: dict[str, NDArray], forward) -> bool:
    """Compare one case; True if it holds."""
    config = {
        "dim": case["dim"], "depth": case["depth"], "heads": case["heads"], "dim_head": case["dim_head"],
        "ff_dim": case["mlp_dim"], "max_grid": (case["image_height"], case["image_width"], case["image_depth"]),
        "recycle": case["recycle"], "legacy_inplace_skip": case["legacy"],
    }  # fmt: skip
    model = network(config, arrays).train(case["train"])
    patterson, ids, template = inputs(arrays)
    channels = [channel.requires_grad_() for channel in (patterson, template) if channel is not None]
    output = forward(model, patterson, ids, template)
    output.backward(torch.from_numpy(arrays["grad_output"]))
    in_output = float((output.detach() - torch.from_numpy(arrays["output"])).abs().max())
    grad_x = torch.cat([channel.grad for channel in channels], 1)
    in_gradients = [relative(grad_x, torch.from_numpy(arrays["grad_x"]))]
    in_statistics = [0.0]
    found = gradients(model)
    for key, value in arrays.items():
        kind, _, rest = key.partition("/")
        if kind == "grad":
            ours = found[our_name(rest)]
            theirs = torch.from_numpy(value).flatten()
            # Of their tables of positions we keep the rows that are used.
            assert not theirs[ours.numel() :].any()
            in_gradients.append(relative(ours.flatten(), theirs[: ours.numel()]))
        elif kind == "after":
            ours = model.state_dict()[our_name(rest)].double()
            in_statistics.append(float((ours - torch.from_numpy(np.array(value))).abs().max()))
    print(f"{name:<22} output {in_output:.1e}  gradients {max(in_gradients):.1e}  batch norm {max(in_statistics):.1e}")
    return in_output < 1e-10 and max(in_gradients) < 1e-9 and max(in_statistics) < 1e-10


def reduce(arrays: dict[str, NDArray], path: Path) -> None:
    """Write the small case: slices of weights and inputs, and the outputs and gradients of the dense network."""
    ours = RecCrysFormer(
        RecCrysFormerConfig(**SMALL, n_residues=3, residue_map_size=8, max_grid=GRID),
        torch.zeros(20, 8, 8, 8),
    ).state_dict()
    small: dict[str, NDArray] = {}
    for key, value in arrays.items():
        name = our_name(key[6:]) if key.startswith("param/") else None
        if name in ours:
            shape = list(ours[name].shape)
            if name == "residues.positions":
                shape = [1, shape[0] * shape[1], shape[2]]
            elif name == "positions":
                shape = [1, *shape]
            elif name.endswith("attention.residual"):
                shape = [shape[0], 1, shape[1], 1]
            sliced = np.array(value)[tuple(slice(n) for n in shape)]
            small[key] = sliced.astype(np.float16 if sliced.dtype.kind == "f" else sliced.dtype)
    small["residue_maps"] = arrays["residue_maps"].astype(np.float16)
    small["residue_ids"] = arrays["residue_ids"][:BATCH].astype(np.int8)
    small["x"] = arrays["x"][:BATCH, :, : GRID[0], : GRID[1], : GRID[2]].astype(np.float16)
    model = network({**SMALL, "max_grid": GRID}, small).train()
    patterson, ids, _ = inputs(small)
    patterson.requires_grad_()
    output = dense_reccrysformer.forward(model, patterson, ids)
    (output * torch.cos(torch.arange(output.numel()).view_as(output))).sum().backward()
    small["output"], small["grad_x"] = output.detach().numpy(), patterson.grad.numpy()
    for name, gradient in gradients(model).items():
        wave = torch.cos(torch.arange(gradient.numel(), dtype=torch.float64))
        small[f"grad/{name}"] = np.array([float(gradient.flatten() @ wave), float(gradient.norm())])
    for name, value in model.state_dict().items():
        if "running" in name:
            small[f"after/{name}"] = value.numpy()
    np.savez_compressed(path, **small)
    print(f"wrote {path}: {path.stat().st_size} bytes")


def main() -> int:
    """Check all cases, with our network and the dense one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--reduce", type=Path, metavar="FILE", help="write the small case of the tests")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    good = True
    for name, case in json.loads((arguments.data / "cases.json").read_text()).items():
        arrays = dict(np.load(arguments.data / f"{name}.npz"))
        good &= check(name, case, arrays, lambda model, *rest: model(*rest))
        if name != "padded":
            good &= check(f"{name} (dense)", case, arrays, dense_reccrysformer.forward)
        if arguments.reduce and name == "train_mode":
            reduce(arrays, arguments.reduce)
    print("all within 1e-10 and 1e-9" if good else "NOT within 1e-10 and 1e-9")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
