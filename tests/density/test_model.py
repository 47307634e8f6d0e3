"""The network against vectors of the public implementation, against itself written out densely, and its symmetries."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from xtalfast.density import RecCrysFormer, RecCrysFormerConfig, load_reference_state_dict
from xtalfast.density.model_weights import our_name
from xtalfast.errors import InputError
from xtalfast.testing import assert_within_twin_error

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"

SMALL = RecCrysFormerConfig(
    dim=8, depth=1, heads=2, dim_head=4, ff_dim=16, decoder_blocks=1, n_residues=3, residue_map_size=8,
    max_grid=(8, 12, 8), dropout=0.0, emb_dropout=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def dense():
    """`bench/dense_reccrysformer.py`, the network with nothing saved."""
    spec = importlib.util.spec_from_file_location("dense", ROOT / "bench" / "dense_reccrysformer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def case():
    return dict(np.load(DATA / "reccrysformer_small.npz"))


def reference_network(case, dtype=torch.float64):
    config = replace(SMALL, pinv_scale="batch")
    model = RecCrysFormer(config, torch.from_numpy(case["residue_maps"])).to(dtype).train()
    load_reference_state_dict(
        model, {key[6:]: torch.from_numpy(value) for key, value in case.items() if key.startswith("param/")}
    )
    x = torch.from_numpy(case["x"]).to(dtype).requires_grad_()
    return model, x, torch.from_numpy(case["residue_ids"]).long()


def random_network(config, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    size = config.residue_map_size
    model = RecCrysFormer(config, torch.rand(20, size, size, size)).to(dtype)
    for block in model.layers:
        if block.attention.gate is not None:
            torch.nn.init.normal_(block.attention.gate)
    return model


def test_reference_vectors(case):
    model, x, ids = reference_network(case)
    output = model(x, ids)
    assert (output - torch.from_numpy(case["output"])).abs().max() < 1e-10
    (output * torch.cos(torch.arange(output.numel()).view_as(output))).sum().backward()
    wanted = torch.from_numpy(case["grad_x"])
    assert (x.grad - wanted).abs().max() < 1e-9 * wanted.abs().max()
    for name, parameter in model.named_parameters():
        along, norm = case[f"grad/{name}"]
        wave = torch.cos(torch.arange(parameter.numel(), dtype=torch.float64))
        assert abs(float(parameter.grad.flatten() @ wave) - along) < 1e-9 * norm, name
        assert abs(float(parameter.grad.norm()) - norm) < 1e-9 * norm, name
    for name, value in model.state_dict().items():
        if "running" in name:
            assert (value - torch.from_numpy(case[f"after/{name}"])).abs().max() < 1e-10, name


def test_float32_is_as_accurate_as_the_dense_network(case, dense):
    model, x, ids = reference_network(case, torch.float32)
    twin = reference_network(case, torch.float32)[0]
    result, other = model(x, ids), dense.forward(twin, x, ids)
    assert_within_twin_error(result.detach(), other.detach(), torch.from_numpy(case["output"]), 1.0)


def test_every_key_of_the_public_weights_is_loaded():
    shapes = json.loads((DATA / "paper_state_dict_shapes.json").read_text())
    with torch.device("meta"):
        weights = {key: torch.empty(shape) for key, shape in shapes.items()}
        model = RecCrysFormer(RecCrysFormerConfig.paper(), torch.empty(20, 24, 24, 24))
        load_reference_state_dict(model, weights)
    assert {our_name(key) for key in shapes} == set(model.state_dict()) - {"residues.maps"}
    # 89,100 rows of residue positions are stored, 15 x 216 are ever used.
    dead = (89_100 - 15 * 216) * 512
    assert (
        sum(p.numel() for p in model.parameters())
        == sum(math.prod(shape) for key, shape in shapes.items() if "running" not in key and "tracked" not in key)
        - dead
    )


def test_weights_that_do_not_fit_are_refused(case):
    model, _, _ = reference_network(case)
    weights = {key[6:]: torch.from_numpy(value) for key, value in case.items() if key.startswith("param/")}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for change, message in (
        ({"conv1.weight": torch.zeros(10, 2, 7, 7, 7)}, "shapes that do not fit: conv1.weight"),
        ({"head.bias": torch.zeros(1)}, "unknown keys: head.bias"),
    ):
        with pytest.raises(InputError, match=message):
            load_reference_state_dict(model, weights | change)
    weights.pop("conv2.bias")
    with pytest.raises(InputError, match=r"missing: last\.bias"):
        load_reference_state_dict(model, weights)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("n_residues", [3, 40], ids=["pairs", "residues-and-slots"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_saving_residues_changes_nothing(dense, n_residues, train):
    config = replace(SMALL, n_residues=n_residues)
    ours, theirs = random_network(config).train(train), random_network(config).train(train)
    x = torch.randn(3, 1, 8, 12, 8, dtype=torch.float64)
    # Few kinds in many slots: fewer residues and slots than pairs of them.
    ids = torch.randint(0, 20 if n_residues == 3 else 4, (3, n_residues))
    tokens = ours.residues(ids)
    assert (tokens.pair is None) == (n_residues == 40)
    ours, theirs = random_network(config).train(train), random_network(config).train(train)
    one, other = ours(x, ids), dense.forward(theirs, x, ids)
    assert (one - other).abs().max() < 1e-12
    weight = torch.randn_like(one)
    (one * weight).sum().backward()
    (other * weight).sum().backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        assert (p.grad - q.grad).abs().max() <= 1e-11 * max(1, float(q.grad.abs().max())), name
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values()):
        if "running" in name:
            assert (a - b).abs().max() < 1e-12, name


def test_embedding_wraps_around():
    model = random_network(SMALL).eval()
    x = torch.randn(1, 1, 8, 12, 8, dtype=torch.float64)
    tokens = model.embed(x).view(2, 3, 2, -1)
    for axis in range(3):
        shifted = model.embed(x.roll(SMALL.patch, 2 + axis)).view(2, 3, 2, -1)
        assert (shifted - tokens.roll(1, axis)).abs().max() < 1e-12


def test_output_wraps_around_with_a_periodic_decoder():
    config = replace(SMALL, decoder_padding="wrap", depth=0)
    model = random_network(config).eval()
    torch.nn.init.zeros_(model.positions)
    x = torch.randn(1, 1, 8, 12, 8, dtype=torch.float64)
    ids = torch.zeros(1, 1, dtype=torch.int64)
    for axis in (2, 3, 4):
        assert (model(x.roll(4, axis), ids) - model(x, ids).roll(4, axis)).abs().max() < 1e-12


def test_an_example_does_not_depend_on_its_batch():
    model = random_network(SMALL).eval()
    x, ids = torch.randn(2, 1, 8, 12, 8, dtype=torch.float64), torch.randint(0, 20, (2, 3))
    assert (model(x, ids)[:1] - model(x[:1], ids[:1])).abs().max() < 1e-12
    coupled = random_network(replace(SMALL, pinv_scale="batch")).eval()
    alone = torch.cat([coupled(x[i : i + 1], ids[i : i + 1]) for i in range(2)])
    assert (coupled(x, ids) - alone).abs().max() > 1e-9


def test_padding_is_centred_and_cropped():
    model = random_network(SMALL).eval()
    x = torch.randn(1, 1, 7, 10, 8, dtype=torch.float64)
    whole = torch.nn.functional.pad(x, (0, 0, 1, 1, 0, 1))
    ids = torch.zeros(1, 3, dtype=torch.int64)
    assert torch.equal(model(x, ids), model(whole, ids)[:, :, :7, 1:11])


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": "exact"},
        {"mask_padding": True},
        {"pinv": "ridge"},
        {"residue_patches": 3},
        {"positions": "metric"},
        {"decoder_blocks": 0},
        {"centre_patterson": True, "conv_taps": 0},
        {"patch": 8, "max_grid": (16, 16, 16), "residue_map_size": 8},
        {"sim_gate": False, "legacy_inplace_skip": True},
    ],
    ids=str,
)
def test_options_run_and_every_parameter_is_trained(changes):
    model = random_network(replace(SMALL, **changes)).train()
    n = 16 if "patch" in changes else 8
    x = torch.randn(2, 1, n, n, n, dtype=torch.float64)
    cell = torch.tensor([[7.0, 9, 12, 90, 100, 110]] * 2, dtype=torch.float64)
    output = model(x, torch.tensor([[1, 2, 3], [4, 5, 6]]), cell=cell)
    assert output.shape == x.shape
    output.square().sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_template_is_the_second_channel():
    model = random_network(replace(SMALL, recycle=True)).eval()
    x = torch.randn(2, 2, 8, 12, 8, dtype=torch.float64)
    ids = torch.zeros(2, 3, dtype=torch.int64)
    one = model(x[:, :1], ids, template=x[:, 1:])
    assert not torch.equal(one, model(x[:, :1], ids, template=-x[:, 1:]))
    with pytest.raises(ValueError, match="wants a template"):
        model(x[:, :1], ids)


def test_bad_input():
    model = random_network(SMALL)
    x, ids = torch.zeros(2, 1, 8, 12, 8, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"patterson must be \[B, 1, X, Y, Z\], got \[2, 8, 12, 8\]"):
        model(x[:, 0], ids)
    with pytest.raises(ValueError, match=r"residue_ids must be \[2, 1 to 3\], got \[2, 4\]"):
        model(x, torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="takes no template"):
        model(x, ids, template=x)
    with pytest.raises(ValueError, match=r"has 27 tokens; max_grid = \(8, 12, 8\) allows 12"):
        model(torch.zeros(2, 1, 12, 12, 12, dtype=torch.float64), ids)
    with pytest.raises(ValueError, match="needs cell"):
        random_network(replace(SMALL, positions="metric"))(x, ids)
    with pytest.raises(InputError, match="attention must be one of nystrom, exact, auto, got 'full'"):
        RecCrysFormerConfig(attention="full")
    with pytest.raises(InputError, match="unknown network settings width"):
        RecCrysFormerConfig.from_dict({"width": 3})
