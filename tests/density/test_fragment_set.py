"""Fragment sets on disk: split by parent, resumable to the same bytes, small, honest about what was left out."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from xtalfast.density.fragment_set import FragmentSet, make_fragments
from xtalfast.density.fragments import REPEATED_NAME, UNREADABLE, FragmentSettings
from xtalfast.density.split import Clusters
from xtalfast.density.store import FragmentStore, map_arrays, write_arrays
from xtalfast.errors import InputError

SETTINGS = FragmentSettings(test_fraction=0.3)


@pytest.fixture(scope="module")
def made(structures, tmp_path_factory):
    return make_fragments([structures], tmp_path_factory.mktemp("set"), SETTINGS)


def files(path):
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def test_contents(made):
    """Eight structures of 37 residues: three fragments each, 2 kB, ids and parents as the paper names them."""
    assert len(made["train"]) + len(made["test"]) == made.tally.accepted == 24
    assert sorted(files(made.path)) == ["set.json", "test.safetensors", "train.safetensors"]
    ids = {store.id(row) for store in made.stores.values() for row in range(len(store))}
    assert len(ids) == 24 and "1XA0_1.pd_11" in {name.upper().replace(".PD_", ".pd_") for name in ids}
    fragment = made["train"][0]
    assert fragment.coords.shape == (len(fragment.element), 3) and len(fragment.sequence) == 15
    assert fragment.b_iso == pytest.approx(20)
    columns = ("ptr", "coords", "b_iso", "element", "residue_ids", "cells", "parent", "first_residue", "source")
    assert sum(store.arrays[name].nbytes for store in made.stores.values() for name in columns) < 24 * 2500
    assert made.scale.patterson > 100 * made.scale.density > 0


def test_no_parent_is_in_two_splits(made):
    train, test = (set(made[split].parents) for split in ("train", "test"))
    assert train and test and not train & test and len(train | test) == 8
    for store in made.stores.values():
        assert all(store.id(row).startswith(store[row].parent) for row in range(len(store)))


def test_clusters_move_whole_parents(structures, tmp_path, made):
    """With all structures in one cluster there is one split only."""
    names = [path.stem.upper() for path in structures.iterdir()]
    one = make_fragments([structures], tmp_path / "one", SETTINGS, clusters=Clusters([names]))
    assert sorted(len(store) for store in one.stores.values()) == [0, 24]
    assert {parent for store in one.stores.values() for parent in store.parents} == {min(names)}


def test_several_processes_write_the_same_bytes(structures, tmp_path, made):
    make_fragments([structures], tmp_path, SETTINGS, jobs=2)
    assert files(tmp_path) == files(made.path)


def test_finished_sets_are_opened_and_never_overwritten(structures, tmp_path, made):
    before = files(made.path)
    again = make_fragments([structures], made.path, SETTINGS)
    assert again.tally == made.tally and files(made.path) == before
    with pytest.raises(InputError, match="other structures or settings"):
        make_fragments([structures], made.path, FragmentSettings(test_fraction=0.3, rotate=True))
    with pytest.raises(InputError, match="other structures or settings"):
        make_fragments([structures], made.path, SETTINGS, clusters=Clusters([["1AAA", "2BBB"]]))
    assert files(made.path) == before


SCRIPT = """
import sys, time
from xtalfast.density import fragment_set
from xtalfast.density.fragments import FragmentSettings
fragment_set._PART = 2
def progress(stage, done, total):
    print(stage, done, flush=True)
    time.sleep(float(sys.argv[3]))
fragment_set.make_fragments([sys.argv[1]], sys.argv[2], FragmentSettings(test_fraction=0.3), progress=progress)
"""


def test_killed_and_run_again_gives_the_same_bytes(structures, tmp_path):
    """kill -9 after two of four parts; the parts done are kept, the end is that of an uninterrupted run."""
    command = [sys.executable, "-c", SCRIPT, str(structures)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "whole"), "0"], check=True, env=environment, capture_output=True)
    process = subprocess.Popen(
        [*command, str(tmp_path / "cut"), "30"], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().startswith("cut fragments")
    process.send_signal(signal.SIGKILL)
    process.wait()
    parts = sorted((tmp_path / "cut" / "parts").glob("[0-9]*.safetensors"))
    assert 1 <= len(parts) < 4 and not (tmp_path / "cut" / "set.json").exists()
    with pytest.raises(InputError, match="unfinished"):
        FragmentSet.open(tmp_path / "cut")
    subprocess.run([*command, str(tmp_path / "cut"), "0"], check=True, env=environment, capture_output=True)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert not (tmp_path / "cut" / "parts").exists()


def test_bad_files_are_counted_and_left_out(structures, tmp_path):
    folder = tmp_path / "in"
    (folder / "again").mkdir(parents=True)
    good = next(iter(sorted(structures.iterdir())))
    (folder / good.name).write_bytes(good.read_bytes())
    (folder / "again" / good.name).write_bytes(good.read_bytes())
    (folder / "empty.pdb").write_text("")
    (folder / "broken.cif").write_text("loop_ _a 'open")
    made = make_fragments([folder], tmp_path / "set", FragmentSettings(test_fraction=0))
    assert made.tally.accepted == 3 and made.tally.structures == 1
    assert made.tally.rejected_structures == {UNREADABLE: 2, REPEATED_NAME: 1}


def test_nothing_usable_leaves_nothing_behind(tmp_path, build):
    with pytest.raises(InputError, match="no PDB or mmCIF file"):
        make_fragments([tmp_path], tmp_path / "set")
    (tmp_path / "short.pdb").write_text(build.pdb_text(build.peptide("ACDEF")))
    with pytest.raises(InputError, match="not one fragment of 15 residues in 1 structures"):
        make_fragments([tmp_path / "short.pdb"], tmp_path / "set")
    assert list((tmp_path / "set").iterdir()) == []


def test_damaged_sets(made, tmp_path):
    for name, data in files(made.path).items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match="no such directory"):
        FragmentSet.open(tmp_path / "missing")
    train = (tmp_path / "train.safetensors").read_bytes()
    (tmp_path / "train.safetensors").write_bytes(train[:-100])
    with pytest.raises(InputError, match="truncated"):
        FragmentSet.open(tmp_path)
    (tmp_path / "train.safetensors").write_bytes(b"\xff" * 300)
    with pytest.raises(InputError, match="no readable fragment file"):
        FragmentSet.open(tmp_path)
    write_arrays(tmp_path / "train.safetensors", {"x": np.zeros(3)}, {})
    with pytest.raises(InputError, match="no array ptr"):
        FragmentSet.open(tmp_path)
    (tmp_path / "set.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(InputError, match="is no fragment set"):
        FragmentSet.open(tmp_path)
    with pytest.raises(InputError, match="split must be one of train, test"):
        made["validation"]


def test_arrays_on_disk(tmp_path):
    """Bytes lie where the safetensors layout says, aligned, empty arrays included."""
    arrays = {"b": np.arange(5, dtype=np.uint8), "a": np.eye(3), "none": np.empty((0, 3), np.float32)}
    write_arrays(tmp_path / "x", arrays, {"key": "value"})
    back, metadata = map_arrays(tmp_path / "x")
    assert metadata == {"key": "value"}
    for name, array in arrays.items():
        assert (back[name] == array).all() and back[name].dtype == array.dtype and back[name].shape == array.shape
    raw = (tmp_path / "x").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    begin, end = header["a"]["data_offsets"]
    assert (8 + length + begin) % 8 == 0
    assert np.frombuffer(raw[8 + length + begin : 8 + length + end]).tolist() == np.eye(3).ravel().tolist()


def test_select_and_concatenate(made):
    store = made["train"]
    rows = np.array([3, 0, 3])
    picked = FragmentStore.concatenate([store.select(rows), made["test"]])
    assert [picked.id(i) for i in range(3)] == [store.id(3), store.id(0), store.id(3)]
    assert (picked[0].coords == store[3].coords).all() and (picked[1].cell == store[0].cell).all()
    assert picked[3].id == made["test"].id(0) and (picked[3].coords == made["test"][0].coords).all()
    with pytest.raises(IndexError):
        store[len(store)]
