"""`make new-op NAME=my_op`: the files of a new op, with a working example (the sum over pixels) to be replaced.

Writes xtalfast/ops/NAME.py, tests/ops/test_NAME.py and bench/bench_NAME.py, exports the op and declares it in the
registry; `make format` puts the export in its place.
Add csrc/NAME.{hpp,cpp,cu} or kernels/NAME.py when there is a backend, and name it in xtalfast/ops/registry.py.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

OP = '''"""NAME: one sentence in the field's words.

    out_n = sum_p values_np

Ref: paper, equation, DOI.
"""

from __future__ import annotations

import torch
from torch import Tensor


def NAME_reference(values: Tensor) -> Tensor:
    """The definition, in plain torch: any float dtype, [N, P] -> [N]."""
    return values.sum(1)  # out_n = sum_p values_np


_library = torch.library.Library("xtalfast_NAME", "DEF")
_library.define("NAME(Tensor values) -> Tensor")
_library.impl("NAME", NAME_reference, "CompositeImplicitAutograd")


def NAME(values: Tensor) -> Tensor:
    """One sentence in the field's words.

    Args:
        values: [N, P], float, counts.

    Returns:
        [N], counts; 0 for P = 0.

    Raises:
        TypeError: not floating point.
        ValueError: not two-dimensional.

    Example:
        >>> NAME(torch.ones(2, 3))
        tensor([3., 3.])
    """
    if not values.is_floating_point():
        raise TypeError(f"values must be floating point, got {values.dtype}")
    if values.ndim != 2:
        raise ValueError(f"values must be [N, P], got {list(values.shape)}")
    return torch.ops.xtalfast_NAME.NAME(values)
'''

TEST = '''"""NAME against its definition, gradients, edges and bad input."""

from __future__ import annotations

import pytest
import torch

from xtalfast.ops import NAME
from xtalfast.ops.NAME import NAME_reference


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (7, 0), (128, 729)], ids=lambda s: f"N{s[0]}-P{s[1]}")
def test_equals_the_definition(shape):
    values = torch.rand(shape, dtype=torch.float64)
    assert torch.equal(NAME(values), NAME_reference(values))


def test_gradcheck():
    torch.autograd.gradcheck(NAME, torch.rand(2, 3, dtype=torch.float64, requires_grad=True))


def test_opcheck():
    torch.library.opcheck(torch.ops.xtalfast_NAME.NAME.default, (torch.rand(3, 4),))


def test_bad_input():
    with pytest.raises(TypeError, match="floating point, got torch.int64"):
        NAME(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="values must be"):
        NAME(torch.ones(3))
'''

BENCH = '''"""NAME against plain torch, one thread."""

from __future__ import annotations

import torch

from xtalfast.ops import NAME


def test_NAME(paired):
    values = torch.rand(8192, 1323)
    paired(lambda: NAME(values), lambda: values.sum(1))
'''


def new_op(root: Path, name: str) -> list[Path]:
    """Write the files of the op `name` below `root`; nothing is overwritten."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise SystemExit(f"NAME must be a noun in snake_case such as profile_fit, got {name!r}")
    files = {
        root / f"xtalfast/ops/{name}.py": OP,
        root / f"tests/ops/test_{name}.py": TEST,
        root / f"bench/bench_{name}.py": BENCH,
    }
    there = [str(path) for path in files if path.exists()]
    if there:
        raise SystemExit(f"{', '.join(there)} exists already")
    for path, text in files.items():
        path.write_text(text.replace("\\\\\\\\", "\\\\").replace("NAME", name))
    registry = root / "xtalfast/ops/registry.py"
    text = registry.read_text()
    registry.write_text(text[: text.rindex("}")] + f'    "{name}": (),\n}}\n')
    exports = root / "xtalfast/ops/__init__.py"
    lines = f'from xtalfast.ops.{name} import {name}\n\n__all__ = [\n    "{name}",\n'
    text = exports.read_text().replace("\n__all__ = [\n", lines)
    exports.write_text(text)
    return [*files, registry, exports]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: make new-op NAME=my_op")
    for path in new_op(Path(__file__).parents[1], sys.argv[1]):
        print(path)
