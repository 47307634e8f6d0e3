"""Training: the paper's schedule, bit-exact resume, several processes as one, what stops a run and what it leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from xtalfast.density import RecCrysFormerConfig
from xtalfast.density.dataset import ExampleDataset, GridBatches
from xtalfast.density.train_config import PRESETS, DensityTrainConfig, changed_settings, density_preset
from xtalfast.density.trained import Trained
from xtalfast.density.training import DensityTrainer, train_density
from xtalfast.errors import InputError

NETWORK = RecCrysFormerConfig(
    dim=8, depth=1, heads=2, dim_head=4, ff_dim=16, decoder_blocks=1, landmarks=4, n_residues=2, max_grid=(32, 32, 32),
    dropout=0.1, residue_patches=4,
)  # fmt: skip
TRAINING = DensityTrainConfig(
    epochs=1, batch=4, accumulate=2, lr=1e-2, ema=0.9, held_out=0.2, max_validation=4, validate_every=2
)
STEPS = 6

SCRIPT = """
import os, signal, sys
from xtalfast.density import RecCrysFormerConfig
from xtalfast.density.fragment_set import FragmentSet
from xtalfast.density.train_config import DensityTrainConfig
from xtalfast.density.training import train_density
import json
path, network, training, run, kill_at, steps = sys.argv[1:]

def progress(stage, done, total):
    if done == int(kill_at):
        os.kill(os.getpid(), signal.SIGKILL)

train_density(FragmentSet.open(path), RecCrysFormerConfig.from_dict(json.loads(network)),
              DensityTrainConfig.from_dict(json.loads(training)), run, max_steps=int(steps), device="cpu",
              progress=progress)
"""


@pytest.fixture(scope="module")
def fragments(dipeptides):
    return dipeptides


def run_script(fragments, network, training, run, kill_at=-1, steps=STEPS, launcher=()):
    import json

    script = run.parent / "script.py"
    script.write_text(SCRIPT)
    arguments = [str(fragments.path), json.dumps(network.to_dict()), json.dumps(training.to_dict()), str(run)]
    return subprocess.run(
        [sys.executable, *launcher, str(script), *arguments, str(kill_at), str(steps)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(fragments, tmp_path_factory):
    """A run that nothing interrupted."""
    run = tmp_path_factory.mktemp("whole") / "run"
    done = run_script(fragments, NETWORK, TRAINING, run)
    assert done.returncode == 0, done.stderr
    return run


def test_schedule_is_torch_one_cycle():
    config = DensityTrainConfig()
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    torch_schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.4e-3, total_steps=200, pct_start=0.3, div_factor=2.8, final_div_factor=40
    )
    for step in range(200):
        assert abs(config.learning_rate(step, 200) - torch_schedule.get_last_lr()[0]) < 1e-12
        optimizer.step()
        if step < 199:
            torch_schedule.step()
    assert config.learning_rate(0, 200) == pytest.approx(5e-4)
    recycling = density_preset("paper-recycle")[1]
    assert recycling.learning_rate(0, 200) == pytest.approx(2.5e-4) and recycling.epochs == 80


def test_killed_it_resumes_to_the_same_bits(fragments, whole, tmp_path):
    run = tmp_path / "run"
    killed = run_script(fragments, NETWORK, TRAINING, run, kill_at=3)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (run / "last.ckpt").is_file()
    assert run_script(fragments, NETWORK, TRAINING, run).returncode == 0
    one, other = (torch.load(path / "last.ckpt", weights_only=True) for path in (whole, run))
    for part in ("model", "published"):
        for name, value in one[part].items():
            assert torch.equal(value, other[part][name]), name
    columns = slice(0, 6)  # all but seconds
    histories = [np.loadtxt(path / "history.csv", delimiter=",", skiprows=1)[:, columns] for path in (whole, run)]
    assert np.array_equal(*histories)


def test_two_processes_give_the_result_of_one(fragments, tmp_path):
    """Batch norm and gradients of the joined batch; equal up to the order of sums."""
    network, training = replace(NETWORK, dropout=0.0, emb_dropout=0.0), replace(TRAINING, lr=1e-3, min_batch=2)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    runs = tmp_path / "one", tmp_path / "two"
    for run, start in zip(runs, ((), launcher)):
        done = run_script(fragments, network, training, run, steps=2, launcher=start)
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(run / "last.ckpt", weights_only=True) for run in runs)
    losses = [[row["loss"] for row in saved["run"]["history"]] for saved in (one, two)]
    assert np.allclose(*losses, rtol=1e-5)
    for name, value in one["model"].items():
        if "running" in name:
            assert torch.allclose(value, two["model"][name], rtol=1e-3, atol=1e-6), name


def test_gradient_of_joined_batches_is_that_of_one(fragments, tmp_path):
    """Accumulated batches weigh each example alike."""
    trainer = make_trainer(fragments, tmp_path, replace(TRAINING, clip_norm=None))
    plan, rows = trainer.batches.whole()
    sizes = [len(batch) for batch in rows]
    assert max(sizes) > min(sizes)
    pair = [rows[int(np.argmax(sizes))], rows[int(np.argmin(sizes))]]
    sums = trainer.step([trainer.dataset.request(batch, plan) for batch in pair], tmp_path)
    assert sums[2] == max(sizes) + min(sizes)


def make_trainer(fragments, run_dir, training=TRAINING, network=NETWORK):
    from xtalfast.integration.device import launch

    trainer = DensityTrainer(launch("32-true", "cpu"), fragments, network, training, 0, STEPS, None)
    trainer.model, trainer.optimizer = trainer.fabric.setup(trainer.network, trainer.optimizer)
    return trainer


def test_loss_that_is_not_finite_stops_with_state_and_fragments(fragments, tmp_path):
    with pytest.raises(InputError, match=r"not finite at step 2 \(fragments \d\w+_\w+\.pd_\d+, .*failed\.ckpt"):
        train_density(
            fragments, NETWORK, replace(TRAINING, lr=1e30, clip_norm=None, warmup=0.0, div=1.0), tmp_path,
            max_steps=STEPS, device="cpu",
        )  # fmt: skip
    assert torch.load(tmp_path / "failed.ckpt", weights_only=True)["run"]["step"] == 1


def test_checkpoint_says_what_it_was_trained_on(fragments, whole):
    trained = Trained.load(whole / "best.ckpt")
    assert trained.scale == fragments.scale
    assert set(trained.parents) == set(fragments["train"].parents)
    assert trained.domain.n_residues == 2 and trained.domain.d_min == (1.5, 1.5)
    assert trained.domain.outside("P 21", 3, 2.5, (8, 9, 99, 90, 90, 90)) != []
    cell = tuple(fragments["train"].arrays["cells"][0])
    assert trained.domain.outside("P 1", 2, 1.5, cell) == []
    example = ExampleDataset(fragments["test"], fragments.scale)
    batch = example[next(iter(GridBatches(example, 2)))]
    predicted = trained.predict(batch.patterson, batch.residue_ids, batch.cells, 1.5)
    assert predicted.shape == batch.density.shape
    with pytest.raises(InputError, match="takes no template"):
        trained.predict(batch.patterson, batch.residue_ids, batch.cells, 1.5, recycles=1)


def test_recycling_run_starts_from_the_first(fragments, whole, tmp_path):
    network = replace(NETWORK, recycle=True)
    result = train_density(
        fragments, network, TRAINING, tmp_path, max_steps=2, device="cpu", recycle_from=whole / "best.ckpt"
    )
    trained = Trained.load(result.checkpoint)
    assert [one.config.recycle for one in trained.networks] == [False, True]
    example = ExampleDataset(fragments["test"], fragments.scale)
    batch = example[next(iter(GridBatches(example, 2)))]
    maps = [trained.predict(batch.patterson, batch.residue_ids, batch.cells, 1.5, recycles=n) for n in (None, 0, 1, 2)]
    assert torch.equal(maps[0], maps[2])
    assert not torch.equal(maps[1], maps[2]) and not torch.equal(maps[2], maps[3])
    with pytest.raises(InputError, match="needs the checkpoint it recycles from"):
        train_density(fragments, network, TRAINING, tmp_path / "other", device="cpu")


def test_another_run_in_the_directory_is_refused(fragments, whole):
    with pytest.raises(InputError, match="a run with train"):
        train_density(fragments, NETWORK, replace(TRAINING, lr=1.0), whole, max_steps=STEPS, device="cpu")


def test_settings_from_the_command_line():
    network, training = changed_settings(*density_preset("dipeptide"), ["dim=64", "lr=0.01", "decoder_padding=wrap"])
    assert (network.dim, training.lr, network.decoder_padding) == (64, 0.01, "wrap")
    for change, message in (("width=3", "--set wants NAME=VALUE"), ("dim=wide", "dim wants a value like 64")):
        with pytest.raises(InputError, match=message):
            changed_settings(network, training, [change])
    for name in PRESETS:
        density_preset(name)
    with pytest.raises(InputError, match="preset must be one of"):
        density_preset("huge")


def test_larger_grids_come_in_smaller_batches(fragments):
    dataset = ExampleDataset(fragments["train"], fragments.scale)
    batches = GridBatches(dataset, 8, max_voxels=20_000)
    plan, rows = batches.whole()
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(dataset)))
    for batch in rows:
        voxels = int(plan.grids[batch[0]].prod())
        assert len(batch) == 1 or len(batch) * voxels <= 20_000
