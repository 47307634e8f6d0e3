"""Every op has its reference, test, bench and backends under one stem, and no backend that it does not declare."""

from importlib import import_module
from pathlib import Path

import pytest

from xtalfast import ops
from xtalfast.ops.registry import BACKENDS, FILES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("op", BACKENDS)
def test_op_has_reference_public_function_test_and_bench(op):
    module = import_module(f"xtalfast.ops.{op}")
    assert any(name.endswith("_reference") and callable(value) for name, value in vars(module).items())
    assert getattr(ops, op) is getattr(module, op)
    assert (ROOT / f"tests/ops/test_{op}.py").is_file()
    assert (ROOT / f"bench/bench_{op}.py").is_file()


@pytest.mark.parametrize("op", BACKENDS)
def test_op_has_exactly_the_backends_it_declares(op):
    assert set(BACKENDS[op]) <= set(FILES)
    present = {backend for backend, path in FILES.items() if (ROOT / path.format(op)).is_file()}
    assert present == set(BACKENDS[op])


def test_every_op_with_a_bench_is_declared():
    benches = {path.stem.removeprefix("bench_") for path in (ROOT / "bench").glob("bench_*.py")}
    assert {name for name in benches if hasattr(ops, name)} == set(BACKENDS)
