"""Bad amplitudes and structures through every phasing verb: one line that says what to do, exit 2, nothing written."""

import re

import gemmi
import numpy as np
import pytest

from xtalfast.cli import main
from xtalfast.io.mtz_phases import write_phases

CELL = (20.0, 23.0, 27.0, 90.0, 90.0, 90.0)
GROUP = "P 21 21 21"


def write_mtz(path, *, cell=CELL, group=GROUP, columns=("FP", "SIGFP"), change=lambda hkl, f: (hkl, f)):
    """Amplitudes of a few random atoms to 2 A, spoiled by `change`."""
    good = gemmi.UnitCell(*CELL)
    hkl = np.array(gemmi.make_miller_array(good, gemmi.SpaceGroup(GROUP), 2.0))
    rng = np.random.default_rng(0)
    f = np.abs(rng.normal(size=len(hkl)) + 1j * rng.normal(size=len(hkl))) * 50
    hkl, f = change(hkl, f)
    mtz = gemmi.Mtz(with_base=True)
    mtz.spacegroup = gemmi.SpaceGroup(group)
    mtz.cell = gemmi.UnitCell(*cell)
    mtz.add_dataset("x")
    kinds = {"FP": "F", "SIGFP": "Q", "IMEAN": "J", "SIGIMEAN": "Q"}
    for name in columns:
        mtz.add_column(name, kinds[name])
    mtz.set_data(np.column_stack([hkl, f, 0.02 * f]).astype(np.float32))
    mtz.write_to_file(str(path))


def absent(hkl, f):
    """Strong reflections where a screw axis allows none."""
    extra = np.array([[h, 0, 0] for h in (1, 3, 5, 7)])
    return np.concatenate([hkl, extra]), np.concatenate([f, np.full(len(extra), 100.0)])


# What is wrong with the file, and what is said.
MTZ = {
    "no amplitudes": ({"columns": ("IMEAN", "SIGIMEAN")}, "present: H, K, L, IMEAN, SIGIMEAN|IMEAN"),
    "wrong symmetry": ({"change": absent}, "absent"),
    "group that does not fit the cell": ({"group": "P 4"}, "does not fit|one space group"),
    "negative cell": ({"cell": (20.0, -23.0, 27.0, 90.0, 90.0, 90.0)}, "cell"),
    "cell without volume": ({"cell": (20.0, 23.0, 27.0, 90.0, 90.0, 180.0), "group": "P 1"}, "cell|one space group"),
    "NaN": ({"change": lambda hkl, f: (hkl, np.full(len(f), np.nan))}, "no amplitude|without|missing|no value"),
    "zeros": ({"change": lambda hkl, f: (hkl, 0 * f)}, "zero|are 0"),
    "no reflection": ({"change": lambda hkl, f: (hkl[:0], f[:0])}, "no |not a readable"),
}
VERBS = {
    "patterson": ["patterson", "bad.mtz", "-o", "out"],
    "solve": ["solve", "bad.mtz", "-o", "out", "--starts", "1"],
    "modify": ["modify", "bad.mtz", "--phases", "phases.mtz", "-o", "out"],
}


def refused(arguments, message, folder, capsys):
    before = sorted(path.name for path in folder.iterdir())
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    error = captured.err.strip()
    assert error.startswith("xtalfast: error: ") and error.count("\n") == 0, error
    assert re.search(message, error), error
    assert sorted(path.name for path in folder.iterdir()) == before


# `modify` looks only at reflections that have a phase, which absent ones have not.
@pytest.mark.parametrize(
    ("kind", "verb"), [(k, v) for k in MTZ for v in VERBS if (k, v) != ("wrong symmetry", "modify")]
)
def test_bad_amplitudes(kind, verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options, message = MTZ[kind]
    write_mtz(tmp_path / "bad.mtz", **options)
    hkl = np.array(gemmi.make_miller_array(gemmi.UnitCell(*CELL), gemmi.SpaceGroup(GROUP), 2.0))
    f = np.exp(1j * np.arange(len(hkl)))
    write_phases("phases.mtz", hkl, f, cell=gemmi.UnitCell(*CELL), space_group=gemmi.SpaceGroup(GROUP))
    refused(VERBS[verb], message, tmp_path, capsys)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("d_min", ["1.0", "0", "-2", "nan"])
def test_resolution_that_the_data_do_not_have(d_min, verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_mtz(tmp_path / "bad.mtz")
    write_mtz(tmp_path / "phases.mtz")
    refused([*VERBS[verb], "--d-min", d_min], "d_min|d-min|beyond|no column|phases", tmp_path, capsys)


FILES = {
    "missing": (None, "No such file|no such file|cannot read"),
    "empty": (b"", "empty|cannot read|no readable|not .* MTZ"),
    "text": (b"this is no crystallography\n" * 100, "cannot read|no readable|not .* MTZ"),
}


@pytest.mark.parametrize("verb", [*VERBS, "phase-error"])
@pytest.mark.parametrize("kind", FILES)
def test_unreadable_files(kind, verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content, message = FILES[kind]
    if content is not None:
        (tmp_path / "bad.mtz").write_bytes(content)
    write_mtz(tmp_path / "phases.mtz")
    refused(VERBS.get(verb, ["phase-error", "bad.mtz", "phases.mtz"]), message, tmp_path, capsys)


ATOM = (
    "{record}{serial:5d}  {name:<3} {residue} A{number:4d}    {x:8.3f}{y:8.3f}{z:8.3f}  1.00 20.00           {element}"
)


def chain(residue, n, step=3.8, record="ATOM  "):
    """n residues of four backbone atoms each, `step` A apart."""
    lines = ["CRYST1   40.000   50.000   60.000  90.00  90.00  90.00 P 1           1"]
    for number in range(1, n + 1):
        for k, name in enumerate(("N", "CA", "C", "O")):
            x = {"N": 0.0, "CA": 1.46, "C": 2.47, "O": 2.4}[name] + step * number
            lines.append(
                ATOM.format(
                    record=record,
                    serial=4 * number + k,
                    name=name,
                    residue=residue,
                    number=number,
                    x=x,
                    y=1.2 * (name == "O"),
                    z=0.0,
                    element=name[0],
                )
            )
    return "\n".join([*lines, "END", ""])


STRUCTURES = {
    "empty": (
        "CRYST1   40.000   50.000   60.000  90.00  90.00  90.00 P 1           1\nEND\n",
        "no atoms|no protein|not one",
    ),
    "unknown residues": (chain("UNK", 30), "not one fragment .*(non-standard residue|no protein)"),
    "breaks everywhere": (chain("GLY", 30, step=9.0), "not one fragment .*chain break inside"),
    "missing atoms": (chain("TRP", 30), "not one fragment .*missing atoms"),
    "too short": (chain("GLY", 8), "not one fragment"),
}


@pytest.mark.parametrize("kind", STRUCTURES)
def test_structures_without_a_fragment(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text, message = STRUCTURES[kind]
    (tmp_path / "bad.pdb").write_text(text)
    capsys.readouterr()
    assert main(["fragments", "bad.pdb", "-o", "set", "--jobs", "1", "--quiet"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("xtalfast: error: ") and error.count("\n") == 0, error
    assert re.search(message, error), error
    assert not any((tmp_path / "set").glob("*")) if (tmp_path / "set").exists() else True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("END\n", "no atoms|no atom|unit cell|cannot read|no model"),
        (STRUCTURES["empty"][0], "no atom|no model"),
        (chain("GLY", 3).replace("40.000   50.000", " 0.000    0.000"), "cell"),
        (chain("GLY", 3).replace("90.00  90.00  90.00 P 1", "90.00  90.00 180.00 P 1"), "cell"),
    ],
    ids=["nothing", "no atoms", "no cell", "flat cell"],
)
def test_structures_without_structure_factors(text, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.pdb").write_text(text)
    refused(["sfcalc", "bad.pdb", "-o", "f.mtz", "--d-min", "3"], message, tmp_path, capsys)
