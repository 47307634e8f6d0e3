"""solve, modify and phase-error from the command line, file to file."""

from __future__ import annotations

import json

import gemmi
import numpy as np
import pytest

from xtalfast.cli import main
from xtalfast.io.mtz_phases import write_phases


@pytest.fixture
def truth(tmp_path):
    """Atoms as dense as protein in a third of a P1 cell, to 2 A."""
    rng = np.random.default_rng(0)
    cell, group = gemmi.UnitCell(17, 15, 13, 90, 100, 110), gemmi.SpaceGroup("P 1")
    atoms = [np.zeros(3)]
    while len(atoms) < 40:
        trial = np.array([7.0, 5.5, 4.0]) * rng.uniform(-1, 1, 3)
        if np.linalg.norm(trial / [7.0, 5.5, 4.0]) < 1 and min(np.linalg.norm(trial - atom) for atom in atoms) > 1.4:
            atoms.append(trial)
    hkl = np.array(gemmi.make_miller_array(cell, group, 2.0))
    fractional = np.array(atoms) @ np.array(cell.frac.mat.tolist()).T
    F = 6.5 * np.exp(2j * np.pi * (hkl @ fractional.T)).sum(1) * np.exp(-7 / cell.calculate_d_array(hkl) ** 2)
    write_phases(tmp_path / "truth.mtz", hkl, F, cell=cell, space_group=group, observed=abs(F), sigF=0.02 * abs(F))
    return tmp_path / "truth.mtz"


def test_solve_then_modify_then_judge(truth, capsys):
    out = truth.parent / "out"
    command = [
        "solve",
        str(truth),
        "-o",
        str(out),
        "--labels",
        "FP,SIGFP",
        "--starts",
        "24",
        "--solvent",
        "0.6",
        "--quiet",
    ]
    assert main(command) == 0
    facts = json.loads((out / "solve.json").read_text())
    assert facts["solved"] and facts["n_reflections"] > 500 and facts["parameters"]["seed"] == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert ">solved<" in page and 'id="ccp4"' in page and "mean figure of merit" in page and "iteration" in page
    assert (out / "phased_inverse.mtz").exists() == (facts["hand"]["choice"] == "undecided")
    mtz = gemmi.read_mtz_file(str(out / "phased.mtz"))
    assert {"FWT", "PHWT", "FOM", "FP", "SIGFP"} <= {c.label for c in mtz.columns}
    # The map is the map of the coefficients.
    grid = gemmi.read_ccp4_map(str(out / "map.ccp4")).grid
    np.testing.assert_allclose(
        np.array(grid),
        np.array(mtz.transform_f_phi_to_map("FWT", "PHWT", exact_size=[grid.nu, grid.nv, grid.nw])),
        atol=1e-5 * np.array(grid).std(),
    )
    start = ["--phases", str(out / "phased.mtz"), "--labels", "FP,SIGFP"]
    assert main(["modify", str(truth), *start, "-o", str(out / "m"), "--solvent", "0.55", "--quiet"]) == 0
    for file in (out / "phased.mtz", out / "m" / "modified.mtz"):
        capsys.readouterr()
        assert main(["phase-error", str(truth), str(file), "--json", "-"]) == 0
        judged = json.loads(capsys.readouterr().out)
        assert judged["overall"]["map_cc"] > 0.8
        assert judged["floor"] > 80


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--labels", "XX"], "present: "),
        (["--d-min", "0.5"], "beyond the data"),
        (["--solvent", "70"], "fraction"),
        (["--method", "magic"], "method must be one of"),
    ],
)
def test_bad_input_leaves_nothing(truth, capsys, arguments, message):
    out = truth.parent / "out"
    assert main(["solve", str(truth), "-o", str(out), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
