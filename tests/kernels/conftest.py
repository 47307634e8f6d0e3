"""Triton's interpreter, in a process of its own: Triton decides on import whether to compile or to interpret."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def interpret(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable]:
    """`interpret(op, function, *arguments)`: launch on CPU tensors; returns the arguments with what was written."""
    pytest.importorskip("triton", reason="triton is not installed (pip install xtalfast[gpu])")
    file = tmp_path_factory.mktemp("interpreter") / "call.pt"
    command = [sys.executable, str(Path(__file__).with_name("interpreter.py"))]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:

        def run(op: str, function: str, *arguments):
            torch.save((op, function, arguments), file)
            process.stdin.write(f"{file}\n")
            process.stdin.flush()
            if process.stdout.readline() != "done\n":
                pytest.fail(process.stderr.read())
            return torch.load(file)

        yield run
        process.stdin.close()
