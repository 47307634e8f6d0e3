"""`make new-op` writes an op whose own tests pass."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("new_op", ROOT / "tools" / "new_op.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_new_op_passes_its_own_tests(tool, tmp_path):
    shutil.copytree(ROOT / "xtalfast", tmp_path / "xtalfast", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for folder in ("tests/ops", "bench"):
        (tmp_path / folder).mkdir(parents=True)
    tool.new_op(tmp_path, "pixel_sum")
    # -S leaves out the editable install, so that the copy is what is tested.
    path = os.pathsep.join([str(tmp_path), *(p for p in sys.path if p.endswith("site-packages"))])
    result = subprocess.run(
        [sys.executable, "-S", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/test_pixel_sum.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert '"pixel_sum": ()' in (tmp_path / "xtalfast/ops/registry.py").read_text()


def test_new_op_overwrites_nothing_and_wants_snake_case(tool, tmp_path):
    (tmp_path / "xtalfast/ops").mkdir(parents=True)
    (tmp_path / "xtalfast/ops/profile_fit.py").write_text("mine")
    with pytest.raises(SystemExit, match="exists already"):
        tool.new_op(tmp_path, "profile_fit")
    with pytest.raises(SystemExit, match="snake_case"):
        tool.new_op(tmp_path, "ProfileFit")
