"""The SHELX engine against stand-ins that speak its file formats; SHELX itself is not ours to distribute."""

from __future__ import annotations

import stat
import sys

import numpy as np
import pytest

from xtalfast.errors import InputError
from xtalfast.phasing import match, solve_with_shelx
from xtalfast.phasing.shelx import read_phs, read_res

# Reads what we write, strictly, and answers with the true atoms, kept beside it.
SHELXD = """#!{python}
import pathlib, sys
name = sys.argv[1]
ins = pathlib.Path(name + ".ins").read_text().splitlines()
words = {{line.split()[0]: line.split()[1:] for line in ins}}
assert len(words["CELL"]) == 7 and words["LATT"] == ["-1"] and words["HKLF"] == ["3"] and int(words["FIND"][0]) > 0
rows = pathlib.Path(name + ".hkl").read_text().splitlines()
assert all(len(row) == 28 for row in rows) and rows[-1].split() == ["0", "0", "0", "0.00", "0.00"]
float(rows[0][12:20]), float(rows[0][20:28])
pathlib.Path(name + ".res").write_text(pathlib.Path({atoms!r}).read_text())
"""
SHELXE = """#!{python}
import pathlib, sys
assert sys.argv[2].startswith("-s0.") and sys.argv[3].startswith("-m")
with open(sys.argv[1].replace(".phi", ".phs"), "w") as out:
    for row in open(sys.argv[1]):
        h, k, l, F, fom, phase = int(row[:4]), int(row[4:8]), int(row[8:12]), *map(float, row[12:].split())
        out.write(f"{{h:4d}}{{k:4d}}{{l:4d}}{{F:9.2f}}{{fom:8.4f}}{{phase:8.1f}}{{1.0:8.2f}}\\n")
"""


def install(tmp_path, monkeypatch, **programs: str) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(folder))


def test_whole_way(tmp_path, monkeypatch, make_crystal):
    crystal = make_crystal(0, n_atoms=40, solvent=0.75)
    atoms = [f"C{i + 1:03d} 1 {x:.6f} {y:.6f} {z:.6f} 11.00000 0.2" for i, (x, y, z) in enumerate(crystal.coords)]
    (tmp_path / "atoms").write_text("\n".join(["TITL a", "SFAC C N O", "UNIT 30 0 0", *atoms, "HKLF 3", "END"]))
    fill = {"python": sys.executable, "atoms": str(tmp_path / "atoms")}
    install(tmp_path, monkeypatch, shelxd=SHELXD.format(**fill), shelxe=SHELXE.format(**fill))
    found = solve_with_shelx(abs(crystal.F), crystal.hkl, crystal.cell, solvent=0.55)
    assert found.solved
    assert found.parameters["engine"] == "shelx"
    assert match(crystal.F, found.F, crystal.hkl, crystal.cell).map_cc > 0.8


def test_absent_or_silent_programs(tmp_path, monkeypatch, make_crystal):
    crystal = make_crystal(0, n_atoms=10, d_min=2.0)
    install(tmp_path, monkeypatch)
    with pytest.raises(InputError, match="needs the program shelxd on PATH"):
        solve_with_shelx(abs(crystal.F), crystal.hkl, crystal.cell)
    silent = f"#!{sys.executable}\nprint('** no licence **')\n"
    for name in ("shelxd", "shelxe"):
        (tmp_path / "bin" / name).write_text(silent)
        (tmp_path / "bin" / name).chmod(stat.S_IRWXU)
    with pytest.raises(InputError, match=r"shelxd wrote no phasing.res: \*\* no licence \*\*"):
        solve_with_shelx(abs(crystal.F), crystal.hkl, crystal.cell)


def test_files_of_shelx():
    coords, weights = read_res(
        "SFAC C S\nMIND 1.0 -0.1\nS1 2 0.1 0.2 0.3 10.5 0.2\nC1 1 -.1 0 1 0.25\nHKLF 3\nC2 1 0 0 0 1\n"
    )
    np.testing.assert_allclose(coords, [[0.1, 0.2, 0.3], [-0.1, 0, 1]])
    np.testing.assert_allclose(weights, [8, 1.5])
    with pytest.raises(InputError, match="no atoms"):
        read_res("SFAC C\nEND\n")
    F = read_phs("   1  -2-100   10.00  0.5000    90.0    1.00\n", np.array([[1, -2, -100], [-1, 2, 100], [0, 0, 1]]))
    np.testing.assert_allclose(F, [5j, -5j, 0], atol=1e-12)
