"""What an import costs: one op pulls in nothing but numpy, torch and gemmi."""

from __future__ import annotations

import subprocess
import sys

import pytest

EXTRAS = "msgpack h5py hdf5plugin fabio lightning tensorboard typer rich jinja2 triton servalcat".split()


def run_python(code: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120, **kwargs)


@pytest.mark.parametrize("module", ["xtalfast", "xtalfast.ops", "xtalfast.nn"])
def test_import_loads_no_extra(module):
    result = run_python(f"import sys, {module}; print(sorted(set({EXTRAS!r}) & set(sys.modules)))")
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_ops_and_nn_import_where_no_extra_is_installed():
    # To import and importlib alike, a name that is None in sys.modules is a package that is not there.
    block = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS!r}));"
    result = run_python(block + "import xtalfast.ops, xtalfast.nn; print('imported')")
    assert result.stdout.strip() == "imported", result.stderr
    result = run_python(block + "from xtalfast.cli import main; raise SystemExit(main(['doctor']))")
    assert result.returncode == 2
    assert "pip install 'xtalfast[cli]'" in result.stderr


def test_missing_extension_leaves_a_working_package_and_says_so():
    code = """
import sys
sys.modules["xtalfast._C"] = None
from xtalfast import _native
assert _native.C is None
try:
    _native.require("the byte-offset decoder")
except ImportError as error:
    print(error)
"""
    result = run_python(code)
    assert "byte-offset decoder" in result.stdout and "pip install ." in result.stdout, result.stderr
