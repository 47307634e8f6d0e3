"""CCP4 maps: exact round trip, gemmi's reading of ours, other axis orders and asymmetric units, bad files."""

import gemmi
import numpy as np
import pytest

from xtalfast.errors import InputError
from xtalfast.io.ccp4 import read_ccp4, write_ccp4

CELL = gemmi.UnitCell(20, 25, 31, 90, 105, 90)


@pytest.fixture
def values():
    return np.random.default_rng(0).normal(size=(8, 12, 20)).astype(np.float32)


def test_round_trip_is_exact(tmp_path, values):
    write_ccp4(tmp_path / "a.ccp4", values, CELL)
    back = read_ccp4(tmp_path / "a.ccp4")
    assert (back.values == values).all() and back.values.flags.c_contiguous
    assert back.cell.parameters == pytest.approx(CELL.parameters) and back.space_group.xhm() == "P 1"


def test_gemmi_reads_the_same_density_at_the_same_place(tmp_path, values):
    write_ccp4(tmp_path / "a.ccp4", values, CELL)
    ccp4 = gemmi.read_ccp4_map(str(tmp_path / "a.ccp4"), setup=True)
    assert ccp4.grid.get_value(3, 7, 11) == values[3, 7, 11]
    there = CELL.orthogonalize(gemmi.Fractional(3 / 8, 7 / 12, 11 / 20))
    assert ccp4.grid.interpolate_value(there) == pytest.approx(values[3, 7, 11], abs=1e-4)
    assert ccp4.header_float(22) == pytest.approx(values.mean(), abs=1e-5)


def test_asymmetric_units_and_other_axis_orders(tmp_path):
    """A map of the asymmetric unit of P 21 in order Z, X, Y comes back as the whole cell in X, Y, Z."""
    group = gemmi.SpaceGroup("P 1 21 1")
    grid = gemmi.FloatGrid(8, 12, 20)
    grid.set_unit_cell(CELL)
    grid.spacegroup = group
    for point in grid:
        grid.set_value(point.u, point.v, point.w, np.sin(point.u) + point.v * 0.3 - point.w**2 * 0.01)
    grid.symmetrize_sum()
    whole = np.array(grid.array)
    ccp4 = gemmi.Ccp4Map()
    ccp4.grid = grid
    ccp4.update_ccp4_header(2)
    box = gemmi.FractionalBox()
    box.extend(gemmi.Fractional(0, 0, 0))
    box.extend(gemmi.Fractional(0.999, 0.5, 0.999))
    ccp4.set_extent(box)
    ccp4.write_ccp4_map(str(tmp_path / "asu.ccp4"))
    back = read_ccp4(tmp_path / "asu.ccp4")
    assert back.values == pytest.approx(whole, abs=1e-4) and back.space_group.xhm() == "P 1 21 1"


def test_bad_input(tmp_path, values):
    with pytest.raises(InputError, match="no such file"):
        read_ccp4(tmp_path / "missing.ccp4")
    (tmp_path / "bad.ccp4").write_bytes(b"not a map" * 200)
    with pytest.raises(InputError, match="no readable CCP4 map"):
        read_ccp4(tmp_path / "bad.ccp4")
    with pytest.raises(InputError, match=r"must be \[X, Y, Z\], got \[8, 12\]"):
        write_ccp4(tmp_path / "x.ccp4", values[..., 0], CELL)
    values[0, 0, 0] = np.nan
    with pytest.raises(InputError, match="1 values that are not finite"):
        write_ccp4(tmp_path / "x.ccp4", values, CELL)
    with pytest.raises(InputError, match="encloses no volume"):
        write_ccp4(tmp_path / "x.ccp4", np.ones((4, 4, 4)), gemmi.UnitCell(10, 10, 10, 120, 120, 120))
    assert not (tmp_path / "x.ccp4").exists()


def test_a_map_of_part_of_the_cell_is_refused(tmp_path, values):
    write_ccp4(tmp_path / "a.ccp4", values, CELL)
    ccp4 = gemmi.read_ccp4_map(str(tmp_path / "a.ccp4"), setup=True)
    box = gemmi.FractionalBox()
    box.extend(gemmi.Fractional(0, 0, 0))
    box.extend(gemmi.Fractional(0.4, 0.4, 0.4))
    ccp4.set_extent(box)
    ccp4.write_ccp4_map(str(tmp_path / "part.ccp4"))
    with pytest.raises(InputError, match="grid points of the cell open"):
        read_ccp4(tmp_path / "part.ccp4")
