"""A run that is killed, stopped or out of disk space is taken up by the same command and ends with the same bytes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from xtalfast.cli import common, main
from xtalfast.integration import shoebox_rows

SHARD_VOXELS = 50_000  # so that the few boxes of the test make several shards

# Progress is reported after each image and each step; the audit hook sees an output about to take its name.
KILLED = f"""
import os, signal, sys
from xtalfast.integration import shoebox_rows
from xtalfast.integration.integrate import integrate

shoebox_rows.SHARD_VOXELS = {SHARD_VOXELS}
expt, refl, output, where, when = sys.argv[1:]

def progress(stage, done, total):
    if (stage, str(done)) == (where, when):
        os.kill(os.getpid(), signal.SIGKILL)

def watch(event, arguments):
    if where == "rename" and event == "os.rename" and str(arguments[1]).endswith(when):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
integrate(expt, refl, output, epochs=3, progress=progress)
"""


def outputs(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in ("integrated.refl", "unmerged.mtz")}


def partial(directory: Path) -> list[Path]:
    return list(directory.rglob(".*.part"))


@pytest.mark.parametrize(
    ("where", "when"), [("extract", "4"), ("train", "2"), ("rename", "integrated.refl")], ids=lambda value: value
)
def test_killed_run_resumes_to_the_same_bytes(tiny_run, tmp_path, monkeypatch, where, when):
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, *map(str, (tiny_run.data.expt, tiny_run.data.refl, out, where, when))]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (out / "integrated.refl").exists()
    if where == "extract":
        assert not (out / "shoeboxes" / "store.json").exists()
        finished = len(list((out / "shoeboxes").glob("shard-*.json")))
        assert 0 < finished, "the kill came before the first shard was written"
    if where == "rename":
        assert partial(out), "the kill did not interrupt a write"
    monkeypatch.setattr(shoebox_rows, "SHARD_VOXELS", SHARD_VOXELS)
    assert main(tiny_run.arguments(out)) == 0
    assert ("training resumes at step 1 of 3" in (out / "xtalfast.log").read_text()) == (where == "train")
    assert len(list((out / "shoeboxes").glob("counts-*.npy"))) > 3
    assert not partial(out)
    # Nor does it matter into how many shards the store was cut.
    assert outputs(out) == outputs(tiny_run.directory)


def test_finished_run_repeated_changes_nothing(tiny_run, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(tiny_run.directory, out)
    read = [path.stat().st_mtime_ns for path in sorted((out / "shoeboxes").iterdir()) if path.suffix == ".npy"]
    assert main(tiny_run.arguments(out)) == 0
    assert outputs(out) == outputs(tiny_run.directory)
    assert read == [path.stat().st_mtime_ns for path in sorted((out / "shoeboxes").iterdir()) if path.suffix == ".npy"]


def test_interrupt_says_how_to_go_on(tiny_run, tmp_path, monkeypatch, capsys):
    def interrupt(self, stage, done, total):
        if (stage, done) == ("extract", 4):
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(common.ProgressBars, "__call__", interrupt)
        # A process started in the background is deaf to it.
        heard = signal.signal(signal.SIGINT, signal.default_int_handler)
        assert main(tiny_run.arguments(tmp_path)) == 130
        signal.signal(signal.SIGINT, heard)
    assert capsys.readouterr().err == "xtalfast: interrupted; the same command resumes where it stopped\n"
    assert main(tiny_run.arguments(tmp_path)) == 0
    assert outputs(tmp_path) == outputs(tiny_run.directory)


FULL_DISK = """
import subprocess, sys
from xtalfast.cli import main

disk, *sizes = sys.argv[1].split(",")
for size in sizes:
    subprocess.run(["mount", "-o", f"remount,size={size}k", disk], check=True)
    print(main(sys.argv[2:]), flush=True)
subprocess.run(["cp", "-r", f"{disk}/out", f"{disk}-kept"], check=True)
"""
LIMITED_FILE = """
import resource, sys
from xtalfast.cli import main

_, *sizes = sys.argv[1].split(",")
for size in sizes:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size) * 1024, resource.RLIM_INFINITY))
    print(main(sys.argv[2:]), flush=True)
"""


def can_mount() -> bool:
    """Whether a process may have a file system of its own: root, or a user with user namespaces."""
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


def test_full_disk_loses_nothing(tiny_run, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = tiny_run.arguments(disk / "out")
    if can_mount():
        # Room for nothing, for a part of the shoeboxes, of the checkpoints, and for everything.
        sizes = ["4", "700", "2000", "20000"]
        mount = f"mount -t tmpfs -o size=100k none {disk} && exec "
        script = ["unshare", "-rm", "sh", "-c", mount + '"$0" "$@"', sys.executable, "-c", FULL_DISK]
        kept = tmp_path / "disk-kept"
    else:
        sizes = ["0", "100", "1000", "20000"]
        script, kept = [sys.executable, "-c", LIMITED_FILE], disk / "out"
    done = subprocess.run([*script, ",".join([str(disk), *sizes]), *command], capture_output=True, text=True)
    assert done.stdout.split() == ["2", "2", "2", "0"], done.stdout + done.stderr
    errors = done.stderr.splitlines()
    assert len(errors) == 3, done.stderr
    for line in errors:
        assert line.startswith(f"xtalfast: error: cannot write {disk}/out/")
        assert line.endswith("make room or choose another directory")
    assert not partial(kept)
    assert outputs(kept) == outputs(tiny_run.directory)


def test_read_only_output_is_refused_before_any_work(tiny_run, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    command = [sys.executable, "-m", "xtalfast.cli", *tiny_run.arguments(locked)]
    if can_mount():  # permissions do not bind root, a read-only file system does
        mount = f"mount -t tmpfs -o ro none {locked} && exec "
        command = ["unshare", "-rm", "sh", "-c", mount + '"$0" "$@"', *command]
    locked.chmod(0o555)
    if os.geteuid() == 0 and not can_mount():
        command[command.index(str(locked))] = "/proc"  # where not even root can make a file
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"xtalfast: error: cannot write [^\n]+; choose another directory with -o\n", done.stderr), (
        done.stderr
    )


def test_output_directory_that_cannot_be_made(tiny_run, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main(tiny_run.arguments(tmp_path / "file" / "out")) == 2
    assert "cannot make the output directory" in capsys.readouterr().err
