"""Training: what is written, resumed and refused; several processes; that it learns."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from xtalfast.errors import InputError
from xtalfast.integration.config import IntegrationConfig, TrainConfig
from xtalfast.integration.fit import evaluate, load_checkpoint, train
from xtalfast.integration.splits import held_out
from xtalfast.integration.store import ShoeboxStore
from xtalfast.integration.trainer import _learning_rate, _next_stop

pytest.importorskip("lightning", reason="lightning is not installed (extra train)")

SCRIPT = """
import os, signal, sys
import torch
from xtalfast.integration.config import IntegrationConfig
from xtalfast.integration.fit import train
from xtalfast.integration.store import ShoeboxStore

torch.set_num_threads(1)
store, config, run, kill_at = sys.argv[1:]

def progress(stage, done, total):
    if done == int(kill_at):
        os.kill(os.getpid(), signal.SIGKILL)

train([ShoeboxStore.open(store)], IntegrationConfig.preset(config), run, device="cpu", progress=progress)
"""


def small(preset="default", combination="cnn/softmax", **changes) -> IntegrationConfig:
    config = IntegrationConfig.preset(preset).combined(combination)
    encoder = replace(config.encoder, widths=(4, 8), hidden=8, latent=8)
    return replace(config, encoder=encoder, train=replace(config.train, batch=32, epochs=2, **changes))


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path).state_dict()


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def store(spots, tmp_path_factory) -> ShoeboxStore:
    drawn = spots(300)
    path = tmp_path_factory.mktemp("data") / "store"
    return ShoeboxStore.create(path, drawn.values, drawn.bits, drawn.metadata, box=drawn.box)


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
    """An uninterrupted run, to compare others with."""
    run = tmp_path_factory.mktemp("whole")
    return run, train([store], small(checkpoint_every=5), run, device="cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_writes_checkpoints_history_and_logs(store, whole):
    run, result = whole
    n_held_out = int(held_out([store], 0.1, 0).sum())
    steps = 2 * ((300 - n_held_out) // 32)
    assert (result.steps, result.n_train, result.n_held_out) == (steps, 300 - n_held_out, n_held_out)
    assert not result.stopped_early and result.checkpoint == run / "best.ckpt"
    lines = (run / "history.csv").read_text().splitlines()
    assert lines[0] == "step,epoch,train_loss,val_loss,lr,seconds"
    assert [float(line.split(",")[0]) for line in lines[1:]] == [row["step"] for row in result.history]
    assert [row["step"] for row in result.history] == [5, steps // 2, 10, 15, steps]
    assert any(path.name.startswith("events") for path in (run / "tensorboard").rglob("*"))
    assert result.history[-1]["val_loss"] < result.history[0]["val_loss"]


def test_checkpoint_gives_back_the_network_and_its_statistics(store, whole):
    model = load_checkpoint(whole[1].checkpoint)
    assert not model.training
    assert model.config.box == (3, 9, 9) and model.config.combination == "cnn/softmax"
    assert model.encoder.features.transform.moments[0] != 0
    assert float(model.mean_profile.sum()) == pytest.approx(1, abs=1e-5)


def test_interrupted_anywhere_it_resumes_to_the_same_bits(store, whole, tmp_path):
    class Stop(Exception):
        pass

    def progress(stage, done, total):
        if done in stops:
            stops.remove(done)
            raise Stop

    stops = {3, 7, 10}
    for _ in range(3):
        with pytest.raises(Stop):
            train([store], small(checkpoint_every=5), tmp_path, device="cpu", progress=progress)
    result = train([store], small(checkpoint_every=5), tmp_path, device="cpu", progress=progress)
    assert_same_weights(tmp_path / "last.ckpt", whole[0] / "last.ckpt")
    assert_same_weights(tmp_path / "best.ckpt", whole[0] / "best.ckpt")

    def without_time(history):
        return [{name: value for name, value in row.items() if name != "seconds"} for row in history]

    assert without_time(result.history) == without_time(whole[1].history)


def test_a_finished_run_is_not_trained_again(store, whole):
    calls = []
    again = train([store], small(checkpoint_every=5), whole[0], device="cpu", progress=lambda *a: calls.append(a))
    assert not calls and again.history == whole[1].history


def test_killed_it_resumes_to_the_same_bits(store, whole, tmp_path):
    toml = write_toml(tmp_path / "small.toml")
    run = tmp_path / "run"
    command = [sys.executable, "-c", SCRIPT, str(store.path), str(toml), str(run)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    assert subprocess.run([*command, "12"], env=environment).returncode == -signal.SIGKILL
    assert (run / "last.ckpt").is_file()
    train([store], IntegrationConfig.preset(toml), run, device="cpu")
    config = IntegrationConfig.preset(toml)
    assert replace(config, name="default") == replace(small(checkpoint_every=5), box=config.box)
    assert_same_weights(run / "last.ckpt", whole[0] / "last.ckpt")


def test_two_processes_give_the_result_of_one(store, whole, tmp_path):
    """Equal up to the order of sums: losses agree to a thousandth of what training gained.

    (Weights whose gradient a normalisation cancels follow its rounding under Adam, without any effect.)
    """
    toml = write_toml(tmp_path / "small.toml")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(store.path), str(toml), str(run), "-1"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    one, two = (np.loadtxt(path / "history.csv", delimiter=",", skiprows=1)[:, 2:4] for path in (whole[0], run))
    gain = one[0, 1] - one[-1, 1]
    assert gain > 0 and np.abs(one - two).max() < 1e-3 * gain


def test_another_run_in_the_directory_is_refused_or_replaced(store, whole, tmp_path):
    first = train([store], small(), tmp_path, device="cpu", max_steps=2)
    for config, arguments, what in (
        (small(lr=1.0), {}, "other network settings"),
        (small(), {"seed": 1}, "another seed"),
        (small(), {"max_steps": 3}, "another number of epochs or steps"),
    ):
        with pytest.raises(InputError, match=what):
            train([store], config, tmp_path, device="cpu", **{"max_steps": 2, **arguments})
    again = train([store], small(), tmp_path, device="cpu", seed=1, max_steps=2, resume=False)
    assert again.history[-1]["val_loss"] != first.history[-1]["val_loss"]


def test_stops_early_when_held_out_reflections_no_longer_gain(store, tmp_path):
    result = train([store], small(lr=1e-30, patience=2, checkpoint_every=2), tmp_path, device="cpu")
    assert result.stopped_early and result.steps == 6


def test_a_loss_that_is_not_finite_ends_with_advice(store, tmp_path):
    config = small("paper", "fc/mvn", lr=1e30)
    with pytest.raises(InputError, match=r"not finite at step \d+: lower train.lr \(now 1e\+30\)"):
        train([store], config, tmp_path, device="cpu")


def test_mixed_precision_trains_to_nearly_the_same(store, whole, tmp_path):
    result = train([store], small(checkpoint_every=5, precision="bf16-mixed"), tmp_path, device="cpu")
    gain = whole[1].history[0]["val_loss"] - whole[1].history[-1]["val_loss"]
    assert abs(result.history[-1]["val_loss"] - whole[1].history[-1]["val_loss"]) < 0.2 * gain


def test_given_profiles_are_needed_cached_and_used(spots, tmp_path):
    drawn = spots(100)
    config = small(combination="cnn/dials")
    with pytest.raises(InputError, match="reference_profiles"):
        train([drawn], config, tmp_path, device="cpu")
    train([drawn], config, tmp_path, device="cpu", reference_profiles=[drawn], max_steps=2)
    assert (tmp_path / "reference_profiles_0.npy").is_file()


def test_data_that_cannot_be_trained_on(spots, tmp_path):
    drawn = spots(5)
    nowhere = replace(drawn, metadata=drawn.metadata | {"reason": np.full(5, 4, np.uint8)})
    with pytest.raises(InputError, match="none of 5 reflections"):
        train([nowhere], small(), tmp_path, device="cpu")


def test_checkpoints_that_are_none(tmp_path):
    missing, damaged, foreign = tmp_path / "no.ckpt", tmp_path / "bad.ckpt", tmp_path / "other.ckpt"
    damaged.write_bytes(b"PK\x03\x04 not a checkpoint")
    torch.save({"weights": 1}, foreign)
    for path, message in ((missing, "no checkpoint"), (damaged, "not a checkpoint"), (foreign, "not an xtalfast")):
        with pytest.raises(InputError, match=message):
            load_checkpoint(path)


def test_learning_rate_warms_up_and_ends_at_zero():
    config = TrainConfig(lr=2.0, schedule="cosine", warmup=0.1)
    rates = [_learning_rate(config, step, 100) for step in range(100)]
    assert np.argmax(rates) == 10 and rates[10] == 2.0
    assert all(np.diff(rates[:11]) > 0) and all(np.diff(rates[10:]) < 0) and rates[-1] < 0.01
    assert {_learning_rate(replace(config, schedule="constant"), step, 100) for step in range(100)} == {2.0}


def test_stops_are_ends_of_epochs_and_multiples():
    stops, step = [], 0
    while step < 40:
        stops.append(step := _next_stop(step, 16, 10))
    assert stops == [10, 16, 20, 30, 32, 40]


@pytest.mark.parametrize("combination", ["cnn/softmax", "cnn/lowrank", "cnn/mvn", "fc/mvn"])
def test_learned_shapes_explain_held_out_reflections(spots, tmp_path, combination):
    """Better than one mean shape and than no spot; worse when shapes are handed to other reflections."""
    drawn = spots(1200, intensity=2000.0)
    config = replace(IntegrationConfig.preset("default").combined(combination))
    config = replace(config, encoder=replace(config.encoder, widths=(8, 16), hidden=32))
    result = train([drawn], config, tmp_path, device="cpu", epochs=3)
    rows = np.flatnonzero(held_out([drawn], 0.1, 0))
    scores = evaluate(load_checkpoint(result.checkpoint), [drawn], rows)
    assert scores["n"] == len(rows) and scores["combination"] == combination
    for name in ("log_likelihood", "thinned"):
        found = scores[name]
        assert found["model"] > found["mean_profile"] > found["background"]
        assert found["model"] > found["shuffled"]


def write_toml(path: Path) -> Path:
    """The settings of `small(checkpoint_every=5)` as a preset file."""
    text = ["box = [3, 9, 9]"]
    for section, values in small(checkpoint_every=5).to_dict().items():
        if isinstance(values, dict):
            text.append(f"[{section}]")
            for name, value in values.items():
                if value is not None:
                    text.append(f"{name} = {toml(value)}")
    path.write_text("\n".join(text))
    return path


def toml(value) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(toml, value)) + "]"
    return str(value).lower() if isinstance(value, bool | int | float) else f'"{value}"'
