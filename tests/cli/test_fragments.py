"""The verbs fragments, sfcalc and patterson as a user types them."""

import json
from pathlib import Path

import gemmi
import numpy as np
import pytest

from xtalfast.cli import main
from xtalfast.density.calculate import calculate_structure_factors, map_of_structure_factors
from xtalfast.density.conformers import conformers, ids_from_sequence
from xtalfast.io.ccp4 import read_ccp4, write_ccp4
from xtalfast.io.structure import read_atoms

CELL = (22.0, 26.0, 31.0, 90.0, 103.0, 90.0)


@pytest.fixture
def model(tmp_path) -> Path:
    """Twenty atoms at random places of a monoclinic cell, B 8 to 30, one of them a half-occupied zinc."""
    rng = np.random.default_rng(0)
    lines = ["CRYST1   22.000   26.000   31.000  90.00 103.00  90.00 P 1 21 1      2"]
    for i, (x, y, z) in enumerate(rng.uniform(0, 20, (20, 3)), 1):
        element, occupancy = ("ZN", 0.5) if i == 7 else (["C", "N", "O", "S"][i % 4], 1.0)
        lines.append(
            f"HETATM{i:5d} {element:>2}   UNL A{i:4d}    {x:8.3f}{y:8.3f}{z:8.3f}"
            f"{occupancy:6.2f}{rng.uniform(8, 30):6.2f}          {element:>2}"
        )
    path = tmp_path / "model.pdb"
    path.write_text("\n".join(lines) + "\n")
    return path


def direct_summation(path, hkl):
    structure = gemmi.read_structure(str(path))
    calculator = gemmi.StructureFactorCalculatorX(structure.cell)
    return np.array([calculator.calculate_sf_from_model(structure[0], h) for h in hkl.tolist()])


def test_sfcalc_equals_direct_summation(model, tmp_path, capsys):
    """R below 1e-4 against gemmi's sum over atoms and symmetry, sharp atoms included; MTZ and map open in gemmi."""
    assert main(["sfcalc", str(model), "-o", str(tmp_path / "f.mtz"), "--map", str(tmp_path / "f.ccp4")]) == 0
    mtz = gemmi.read_mtz_file(str(tmp_path / "f.mtz"))
    assert mtz.column_labels() == ["H", "K", "L", "FC", "PHIC"] and mtz.spacegroup.xhm() == "P 1 21 1"
    hkl = mtz.make_miller_array()
    f = mtz.column_with_label("FC").array * np.exp(1j * np.radians(mtz.column_with_label("PHIC").array))
    exact = direct_summation(model, hkl)
    assert np.abs(f - exact).sum() / np.abs(exact).sum() < 1e-4
    assert len(hkl) == len(gemmi.make_miller_array(gemmi.UnitCell(*CELL), mtz.spacegroup, 1.5))
    # The map is the Fourier sum of these, with gemmi as the judge.
    grid = mtz.transform_f_phi_to_map("FC", "PHIC", exact_size=list(read_ccp4(tmp_path / "f.ccp4").values.shape))
    ours = read_ccp4(tmp_path / "f.ccp4").values
    assert np.abs(ours - np.array(grid.array)).max() < 1e-4 * ours.std()
    assert "20 atoms to 1.5 A" in capsys.readouterr().out


def test_bulk_solvent_is_the_transform_of_what_the_atoms_leave(model, tmp_path):
    """F with solvent less F without it is k exp(-B s^2 / 4) times the direct sum over the points of gemmi's mask."""
    for name, options in (("dry", []), ("wet", ["--bulk-solvent", "0.4,30"])):
        command = ["sfcalc", str(model), "-o", str(tmp_path / f"{name}.mtz"), "--d-min", "3", *options]
        assert main(command) == 0
    dry, wet = (gemmi.read_mtz_file(str(tmp_path / f"{name}.mtz")) for name in ("dry", "wet"))
    difference = wet.get_f_phi("FC", "PHIC").value_array - dry.get_f_phi("FC", "PHIC").value_array
    structure = gemmi.read_structure(str(model))
    structure.setup_cell_images()
    grid = gemmi.FloatGrid()
    grid.setup_from(structure, 1.0)
    gemmi.SolventMasker(gemmi.AtomicRadiiSet.Refmac).put_mask_on_float_grid(grid, structure[0])
    mask = np.array(grid)
    assert 0.3 < mask.mean() < 1
    hkl = dry.make_miller_array()
    n = np.stack(np.meshgrid(*(np.arange(size) / size for size in mask.shape), indexing="ij"), -1)[mask == 1]
    for row in range(0, len(hkl), 40):
        direct = np.exp(2j * np.pi * n @ hkl[row]).sum() * structure.cell.volume / mask.size
        expected = 0.4 * np.exp(-30 / 4 * structure.cell.calculate_1_d2(hkl[row].tolist())) * direct
        assert difference[row] == pytest.approx(expected, abs=1e-3 * float(np.abs(difference).max()))


def test_files_lose_nothing(model, tmp_path):
    """Map -> CCP4 -> structure factors -> MTZ and back: below 1e-5."""
    atoms = read_atoms(model)
    hkl, f = calculate_structure_factors(atoms, 2.0)
    density = map_of_structure_factors(hkl, f, atoms.cell, space_group=atoms.space_group, d_min=2.0).numpy()
    write_ccp4(tmp_path / "a.ccp4", density, atoms.cell, atoms.space_group)
    ccp4 = gemmi.read_ccp4_map(str(tmp_path / "a.ccp4"), setup=True)
    back = gemmi.transform_map_to_f_phi(ccp4.grid).prepare_asu_data(dmin=2.0)
    found = {tuple(v.hkl): v.value for v in back}
    again = np.array([found[tuple(h)] for h in hkl.tolist()])
    assert np.abs(again - f).sum() / np.abs(f).sum() < 1e-5


def test_patterson_has_a_peak_at_every_vector_between_heavy_atoms(tmp_path):
    """Two zinc atoms in P 1: without the origin peak the highest places are plus and minus the vector between them."""
    (tmp_path / "m.pdb").write_text(
        "CRYST1   20.000   24.000   30.000  90.00 100.00 110.00 P 1           1\n"
        "HETATM    1 ZN   UNL A   1       3.000   4.000   5.000  1.00 10.00          ZN\n"
        "HETATM    2 ZN   UNL A   2       9.000  11.000  14.000  1.00 10.00          ZN\n"
    )
    assert main(["sfcalc", str(tmp_path / "m.pdb"), "-o", str(tmp_path / "m.mtz")]) == 0
    arguments = ["patterson", str(tmp_path / "m.mtz"), "-o", str(tmp_path / "p.ccp4"), "--labels", "FC"]
    assert main([*arguments, "--remove-origin"]) == 0
    patterson = read_ccp4(tmp_path / "p.ccp4")
    place = np.array(np.unravel_index(patterson.values.argmax(), patterson.values.shape)) / patterson.values.shape
    vector = patterson.cell.fractionalize(gemmi.Position(6, 7, 9)).tolist()
    distance = min(np.abs((place - sign * np.array(vector) + 0.5) % 1 - 0.5).max() for sign in (1, -1))
    assert distance < 0.6 / min(patterson.values.shape)
    flipped = np.roll(patterson.values[::-1, ::-1, ::-1], 1, (0, 1, 2))
    assert flipped == pytest.approx(patterson.values, abs=float(1e-4 * patterson.values.max()))


def test_patterson_of_a_space_group_is_that_of_all_its_atoms(model, tmp_path):
    """Data of P 21 expanded by us and the autocorrelation of the P 21 density agree."""
    assert main(["sfcalc", str(model), "-o", str(tmp_path / "f.mtz"), "--map", str(tmp_path / "f.ccp4")]) == 0
    assert main(["patterson", str(tmp_path / "f.mtz"), "-o", str(tmp_path / "p.ccp4"), "--labels", "FC"]) == 0
    density, patterson = read_ccp4(tmp_path / "f.ccp4"), read_ccp4(tmp_path / "p.ccp4")
    transform = np.fft.fftn(density.values.astype(float)) * density.cell.volume / density.values.size
    origin = (np.abs(transform) ** 2).sum() / density.cell.volume
    assert float(patterson.values[0, 0, 0]) == pytest.approx(origin, rel=1e-3)


def test_fragments(structures_dir, tmp_path, capsys):
    output = tmp_path / "set"
    assert main(["fragments", str(structures_dir), "-o", str(output), "--jobs", "1", "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "solvent content 5/50/95 %" in printed and "bytes a fragment" in printed
    header = json.loads((output / "set.json").read_text())
    assert header["tally"]["accepted"] == sum(header["statistics"]["fragments"].values()) == 3


@pytest.fixture
def structures_dir(tmp_path):
    """One chain of 35 residues, the N of each put 1.33 A behind the C before it."""
    lines: list[str] = []
    start = np.zeros(3)
    for number, i in enumerate(ids_from_sequence("GASVT" * 7), 1):
        conformer = conformers()[i]
        coords = conformer.coords - conformer.coords[0] + start
        start = coords[2] + np.array([0.0, 0.0, 1.33])
        lines += (
            f"ATOM  {len(lines) + k:5d}  {atom:<3} {conformer.name} A{number:4d}    "
            f"{x:8.3f}{y:8.3f}{z:8.3f}  1.00 20.00           {atom[0]}"
            for k, (atom, (x, y, z)) in enumerate(zip(conformer.atoms, coords), 1)
        )
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "1abc.pdb").write_text("\n".join([*lines, "TER", "END", ""]))
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fragments", "nowhere", "-o", "set"], "no such file or directory"),
        (["fragments", "model.pdb", "-o", "set", "--overlap", "20"], "overlap must be"),
        (["fragments", "model.pdb", "-o", "set", "--clusters", "missing"], "cannot read the cluster file"),
        (["fragments", "model.pdb", "-o", "set", "--jobs", "1"], "not one fragment of 15 residues"),
        (["sfcalc", "missing.pdb"], "cannot read"),
        (["sfcalc", "model.pdb", "--d-min", "0"], "d_min"),
        (["sfcalc", "model.pdb", "--d-min", "100"], "no reflection"),
        (["sfcalc", "model.pdb", "--b-iso", "-1"], "--b-iso"),
        (["sfcalc", "model.pdb", "--bulk-solvent", "0.35"], "--bulk-solvent wants K,B"),
        (["patterson", "missing.mtz", "-o", "p.ccp4"], "missing.mtz"),
        (["patterson", "f.mtz", "-o", "p.ccp4", "--labels", "FOBS"], "no column 'FOBS'; present: H"),
        (["patterson", "f.mtz", "-o", "p.ccp4", "--labels", "FC", "--d-min", "1.0"], "beyond the data"),
        (["patterson", "f.mtz", "-o", "p.ccp4", "--labels", "FC", "--scale", "1"], "--scale wants K,B"),
        (["patterson", "f.mtz", "-o", "p.ccp4", "--labels", "FC", "--sequence", "AXA"], "got X"),
        (["patterson", "f.mtz", "-o", "p.ccp4", "--labels", "FC", "--rate", "1"], "rate must be above 2"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(model, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["sfcalc", "model.pdb", "-o", "f.mtz", "--d-min", "3"]) == 0
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and error.count("xtalfast: error:") == 1 and "Traceback" not in error
    assert not any((tmp_path / name).exists() for name in ("p.ccp4", "model.mtz", "missing.mtz", "set/set.json"))
