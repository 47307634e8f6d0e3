"""The package as a user gets it: sdist -> wheel -> import far from the source tree, with and without nvcc."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(c) for c in command], cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    result = run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", out, ROOT, cwd=out)
    assert result.returncode == 0, result.stderr[-2000:]
    return next(out.glob("*.tar.gz"))


@pytest.fixture
def source(sdist, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("source")  # a tree of its own: CMake remembers which compilers it found
    shutil.unpack_archive(sdist, out, filter="data")
    return next(out.iterdir())


def build_wheel(source: Path, out: Path, cuda: str, **env: str) -> subprocess.CompletedProcess:
    return run(
        *(sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", out, source),
        cwd=out,
        XTALFAST_CUDA=cuda,
        **env,
    )


def test_wheel_from_sdist_works_away_from_the_source(source, tmp_path):
    result = build_wheel(source, tmp_path, "OFF")
    assert result.returncode == 0, result.stderr[-2000:]
    wheel = next(tmp_path.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert "xtalfast/integration/presets/paper.toml" in names
    assert "xtalfast/density/conformers.json" in names
    assert any(name.startswith("xtalfast/report/templates/") for name in names)
    assert not any(name.startswith(("tests/", "bench/", "csrc/")) for name in names)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "import xtalfast, xtalfast._native as n, xtalfast.ops; print(xtalfast.__file__, n.C.version, n.C.with_cuda)"
    # -S keeps out the editable install; the dependencies come back by path.
    path = os.pathsep.join([str(tmp_path / "site"), *(p for p in sys.path if p.endswith("site-packages"))])
    result = run(sys.executable, "-S", "-P", "-c", code, cwd=tmp_path, PYTHONPATH=path)
    assert result.stdout.split()[1:] == ["0.1.0", "False"], result.stdout + result.stderr
    assert str(tmp_path) in result.stdout


def test_auto_without_a_working_nvcc_builds_for_the_cpu(source, tmp_path):
    result = build_wheel(source, tmp_path, "AUTO", CUDACXX="/bin/false")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "xtalfast: CUDA OFF" in result.stdout + result.stderr


def test_on_without_a_working_nvcc_says_what_to_do(source, tmp_path):
    result = build_wheel(source, tmp_path, "ON", CUDACXX="/bin/false")
    assert result.returncode != 0
    assert "XTALFAST_CUDA=ON but no working nvcc" in " ".join((result.stdout + result.stderr).split())


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH: the CUDA build is not tried")
def test_on_with_nvcc_builds_the_cuda_kernels_and_loads_without_a_driver(source, tmp_path):
    result = build_wheel(source, tmp_path, "ON")
    assert result.returncode == 0, (result.stdout + result.stderr)[-2000:]
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        archive.extractall(tmp_path / "site")
    path = os.pathsep.join([str(tmp_path / "site"), *(p for p in sys.path if p.endswith("site-packages"))])
    code = "import torch, xtalfast._native as n; print(n.C.with_cuda)"
    result = run(sys.executable, "-S", "-P", "-c", code, cwd=tmp_path, PYTHONPATH=path)
    assert result.stdout.strip() == "True", result.stdout + result.stderr


def test_the_gpu_script_says_so_where_there_is_no_gpu(tmp_path):
    result = run("bash", ROOT / "bench" / "gpu.sh", cwd=tmp_path, PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    assert result.returncode != 0
    assert re.fullmatch(r"error: torch \S+ sees no GPU; .*--device cpu.*\n", result.stderr), result.stderr
