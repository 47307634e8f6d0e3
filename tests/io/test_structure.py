"""Structures from files, directories and archives, and what is wrong with those that cannot be used."""

import gzip
import lzma
import tarfile

import gemmi
import numpy as np
import pytest

from xtalfast.errors import InputError
from xtalfast.io.structure import Atoms, StructureFile, check_cell, count_structures, iter_structures, read_atoms

PDB = """\
CRYST1   30.000   40.000   50.000  90.00 100.00  90.00 P 1 21 1      2
ATOM      1  N   GLY A   1       1.000   2.000   3.000  1.00 10.00           N
ATOM      2  CA AGLY A   1       2.000   3.000   4.000  0.60 11.00           C
ATOM      3  CA BGLY A   1       2.100   3.100   4.100  0.40 12.00           C
ATOM      4  HA2 GLY A   1       2.500   3.500   4.500  1.00 13.00           H
HETATM    5 ZN    ZN A 101      20.000  20.000  20.000  0.50 30.00          ZN
ANISOU    5 ZN    ZN A 101     1000   2000   3000      0      0      0      ZN
END
"""


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_atoms_of_a_pdb_file(tmp_path):
    atoms = read_atoms(write(tmp_path / "a.pdb", PDB))
    assert atoms.element.tolist() == [7, 6, 6, 1, 30]
    assert atoms.occupancy == pytest.approx([1, 0.6, 0.4, 1, 0.5])
    # Equivalent isotropic B: 8 pi^2 times the mean of U, here 0.2 A^2.
    assert atoms.b_iso == pytest.approx([10, 11, 12, 13, 8 * np.pi**2 * 0.2], rel=1e-4)
    assert atoms.coords[2] == pytest.approx([2.1, 3.1, 4.1])
    assert atoms.space_group.xhm() == "P 1 21 1" and atoms.cell.parameters == (30, 40, 50, 90, 100, 90)
    assert read_atoms(tmp_path / "a.pdb", hydrogens=False).element.tolist() == [7, 6, 6, 30]


@pytest.mark.parametrize("group", ["P 1 21 1", "P 43 21 2", "I 2 3", "R 3 2:H"])
def test_p1_expansion_has_the_structure_factors_of_the_crystal(group):
    """Direct summation over the expanded atoms in P 1 equals gemmi's over the symmetry, phases included."""
    sg = gemmi.SpaceGroup(group)
    cell = {"P 1 21 1": (30, 40, 50, 90, 100, 90), "R 3 2:H": (40, 40, 60, 90, 90, 120)}.get(
        group, (40, 40, 40, 90, 90, 90)
    )
    rng = np.random.default_rng(0)
    edges = "".join(f"{edge:9.3f}" for edge in cell[:3]) + "".join(f"{angle:7.2f}" for angle in cell[3:])
    text = f"CRYST1{edges} {sg.xhm()[:11]:<11}   1\n"
    text += "".join(
        f"ATOM  {i:5d}  C   GLY A{i:4d}    {x:8.3f}{y:8.3f}{z:8.3f}  1.00 20.00           C\n"
        for i, (x, y, z) in enumerate(rng.uniform(0, 30, (5, 3)), 1)
    )
    structure = gemmi.read_pdb_string(text)
    structure.setup_cell_images()
    atoms = Atoms(
        np.array([site.atom.pos.tolist() for site in structure[0].all()]),
        np.full(5, 6),
        np.full(5, 20.0),
        np.ones(5),
        structure.cell,
        sg,
    ).expand_to_p1()
    calculator = gemmi.StructureFactorCalculatorX(structure.cell)
    frac = np.array(structure.cell.frac.mat.tolist())
    carbon = gemmi.Element("C").it92
    for hkl in ([1, 2, 3], [2, 0, 4], [3, 3, 0], [-1, 4, 2]):
        stol2 = structure.cell.calculate_1_d2(hkl) / 4
        form = carbon.calculate_sf(stol2) * np.exp(-20 * stol2)
        ours = (form * np.exp(2j * np.pi * (atoms.coords @ frac.T) @ hkl)).sum()
        assert ours == pytest.approx(calculator.calculate_sf_from_model(structure[0], hkl), abs=1e-3)


def test_files_from_directories_and_archives(tmp_path):
    write(tmp_path / "in" / "pdb4az3.ent", PDB)
    write(tmp_path / "in" / "sub" / "model.pdb.gz", gzip.compress(PDB.encode()))
    write(tmp_path / "in" / "README.md", "not a structure")
    write(tmp_path / "in" / "notes.gz", gzip.compress(b"neither"))
    with tarfile.open(tmp_path / "in" / "set.tar.xz", "w:xz") as tar:
        for name in ("x/2xyz.cif.xz", "x/table.tsv"):
            cif = gemmi.read_pdb_string(PDB).make_mmcif_document().as_string().encode()
            tar.add(write(tmp_path / "tmp" / name, lzma.compress(cif)), name)
    found = list(iter_structures([tmp_path / "in"]))
    assert [file.name for file in found] == ["4AZ3", "2XYZ", "model"]
    assert [file.is_cif for file in found] == [False, True, False]
    assert {len(file.parse()[0]) for file in found} == {1}
    assert count_structures([tmp_path / "in"]) == 3
    assert [f.name for f in iter_structures([tmp_path / "in" / "set.tar.xz", tmp_path / "in" / "pdb4az3.ent"])] == [
        "2XYZ",
        "4AZ3",
    ]


@pytest.mark.parametrize(
    ("name", "header", "parent"),
    [
        ("BM5_1A2K_l_u_B", "", "1A2K"),
        ("masif_1A2K_C_C", "", "1A2K"),
        ("x_pdb1ejg_A", "", "1EJG"),
        ("model_2019_1234", "", "model_2019_1234"),  # numbers are no PDB codes
        ("BM5_1IRAtrunc_l_u", "", "BM5_1IRAtrunc_l_u"),
        ("refined", "HEADER    HYDROLASE                               20-JUN-12   4AZ3\n", "4AZ3"),
    ],
)
def test_parent_is_the_entry(name, header, parent):
    file = StructureFile(name, name, (header + PDB).encode(), False)
    assert file.parent(file.parse()) == parent


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.pdb", "nothing here\n", "holds no atoms"),
        ("a.cif", "data_x\n_cell.length_a 10\n", "holds no atoms"),
        ("a.cif", "loop_ _a 'unfinished\n", "no readable mmCIF"),
        ("a.cif", "", "no readable mmCIF|holds no atoms"),
        ("a.pdb.gz", b"not gzip", "cannot be decompressed"),
        ("a.txt", PDB, "wanted one structure file"),
        ("a.pdb", PDB.split("\n", 1)[1], "no unit cell"),
        ("a.pdb", PDB.replace("  90.00 100.00  90.00", " 120.00 120.00 120.00"), "encloses no volume"),
        ("a.pdb", PDB.replace("P 1 21 1 ", "P 99 9 9 "), "is in no table"),
        ("a.pdb", PDB.replace("P 1 21 1 ", "P 41 21 2"), "does not fit"),
        ("a.pdb", PDB.replace("          ZN\nAN", "          Q9\nAN"), "unknown element"),
    ],
)
def test_unusable_structures(tmp_path, name, data, message):
    with pytest.raises(InputError, match=message) as error:
        read_atoms(write(tmp_path / name, data))
    assert "\n" not in str(error.value)


def test_unusable_inputs(tmp_path):
    with pytest.raises(InputError, match="no such file or directory"):
        list(iter_structures([tmp_path / "missing"]))
    with pytest.raises(InputError, match=r"wanted a structure file \.pdb"):
        list(iter_structures([write(tmp_path / "data.mtz", b"MTZ")]))
    with pytest.raises(InputError, match="no readable tar archive"):
        list(iter_structures([write(tmp_path / "set.tar.xz", b"not an archive")]))
    with pytest.raises(InputError, match="cannot read"):
        read_atoms(tmp_path / "missing.pdb")


def test_cells_without_volume():
    check_cell(gemmi.UnitCell(10, 20, 30, 120, 110, 120), "x")
    for parameters in ((10, 20, 30, 120, 120, 120), (10, 20, -30, 90, 90, 90), (10, 20, 30, 60, 60, 130)):
        with pytest.raises(InputError, match="encloses no volume"):
            check_cell(gemmi.UnitCell(*parameters), "x")
