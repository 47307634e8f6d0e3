"""`xtalfast extract`, `xtalfast train integration` and `integrate --weights`: one network for several data sets."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from xtalfast.cli import main
from xtalfast.integration.store import ShoeboxStore


@pytest.fixture(scope="module")
def extracted(tiny, tmp_path_factory):
    directory = tmp_path_factory.mktemp("extracted")
    assert main(["extract", str(tiny.expt), str(tiny.refl), "-o", str(directory), "--box", "3,15,15", "--quiet"]) == 0
    return directory


def test_extract_makes_a_store_with_its_profiles(extracted, capsys):
    store = ShoeboxStore.open(extracted / "shoeboxes")
    assert store.n == 249 and store.box == (3, 15, 15)
    assert (extracted / "profiles.npz").is_file() and (extracted / "models.expt").is_file()


@pytest.mark.parametrize("profile", ["softmax", "dials"])
def test_two_data_sets_train_one_network(tiny, extracted, tmp_path, capsys, profile):
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(extracted, tmp_path / "second")
    stores = [str(extracted), str(tmp_path / "second")]
    options = ["--encoder", "fc", "--profile", profile, "--epochs", "1"]
    assert main(["train", "integration", *stores, "-o", str(run), *options]) == 0
    text = capsys.readouterr().out
    assert f"wrote {run}/best.ckpt" in text and "held-out loss" in text
    weights = ["--weights", str(run / "best.ckpt")]
    assert main(["integrate", str(tiny.expt), str(tiny.refl), "-o", str(out), *weights, "--quiet"]) == 0
    assert ShoeboxStore.open(out / "shoeboxes").box == (3, 15, 15)  # as trained on
    assert np.array_equal(
        ShoeboxStore.open(out / "shoeboxes").counts(np.arange(249)),
        ShoeboxStore.open(extracted / "shoeboxes").counts(np.arange(249)),
    )


def test_weights_of_another_box(tiny, tiny_run, tmp_path, capsys):
    weights = ["--weights", str(next(tiny_run.directory.glob("training/*/best.ckpt"))), "--box", "3,15,15"]
    assert main(["integrate", str(tiny.expt), str(tiny.refl), "-o", str(tmp_path), *weights, "--quiet"]) == 2
    assert "was trained on boxes of (3, 21, 21) (z, y, x), these are (3, 15, 15)" in capsys.readouterr().err


def test_directory_that_was_not_prepared(tmp_path, capsys):
    assert main(["train", "integration", str(tmp_path), "-o", str(tmp_path / "run")]) == 2
    assert f"run `xtalfast extract ... -o {tmp_path}` first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "-1"], "seed must be from 0 to 2^63 - 1, got -1"),
        (["--epochs", "0"], "train.epochs must be positive, got 0"),
        (["--device", "x"], "device must be auto, cpu, cuda or cuda:N, got 'x'"),
        (["--encoder", "x"], "encoder.kind must be 'cnn' or 'fc', got 'x'"),
    ],
)
def test_bad_options(extracted, tmp_path, capsys, options, message):
    assert main(["train", "integration", str(extracted), "-o", str(tmp_path / "run"), "--quiet", *options]) == 2
    assert message in capsys.readouterr().err
