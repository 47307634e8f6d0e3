"""Amplitudes and phases in MTZ files: gemmi reads what we write, we find the columns by type."""

from __future__ import annotations

import gemmi
import numpy as np
import pytest

from xtalfast.errors import InputError
from xtalfast.io.mtz_phases import read_amplitudes, read_phases, shared_reflections, write_phases

CELL = gemmi.UnitCell(20, 25, 30, 90, 90, 90)
GROUP = gemmi.SpaceGroup("P 21 21 21")


@pytest.fixture
def data():
    hkl = np.array(gemmi.make_miller_array(CELL, GROUP, 3.0))
    rng = np.random.default_rng(0)
    F = rng.uniform(1, 100, len(hkl)) * np.exp(2j * np.pi * rng.random(len(hkl)))
    return hkl, F, rng.random(len(hkl))


def test_round_trip(tmp_path, data):
    hkl, F, fom = data
    write_phases(tmp_path / "a.mtz", hkl, F, cell=CELL, space_group=GROUP, fom=fom, observed=abs(F), sigF=abs(F) * 0.1)
    mtz = gemmi.read_mtz_file(str(tmp_path / "a.mtz"))
    types = {c.label: c.type for c in mtz.columns}
    assert types == dict(H="H", K="H", L="H", FWT="F", PHWT="P", FOM="W", FP="F", SIGFP="Q")
    assert mtz.spacegroup.xhm() == GROUP.xhm()
    read = read_phases(tmp_path / "a.mtz")
    order = {tuple(h): f for h, f in zip(hkl.tolist(), F)}
    wanted = np.array([order[tuple(h)] for h in read.hkl.tolist()])
    assert abs(read.F - wanted).max() < 1e-5 * abs(F).max()
    assert read.labels == ("FWT", "PHWT", "FOM")
    amplitudes = read_amplitudes(tmp_path / "a.mtz")
    assert amplitudes.labels == ("FP", "SIGFP")
    np.testing.assert_allclose(amplitudes.sigF, 0.1 * amplitudes.F, rtol=1e-5)


def test_missing_values_are_left_out(tmp_path, data):
    hkl, F, _ = data
    observed = abs(F)
    observed[:7] = np.nan
    write_phases(tmp_path / "a.mtz", hkl, F, cell=CELL, space_group=GROUP, observed=observed)
    read = read_amplitudes(tmp_path / "a.mtz", ["FP"])
    assert (len(read.F), read.n_missing, read.sigF) == (len(F) - 7, 7, None)


def test_shared_reflections(tmp_path, data):
    hkl, F, _ = data
    for name, rows in (("a", slice(0, 60)), ("b", slice(30, 90))):
        write_phases(tmp_path / f"{name}.mtz", hkl[rows], F[rows], cell=CELL, space_group=GROUP)
    one, two = shared_reflections(read_phases(tmp_path / "a.mtz"), read_phases(tmp_path / "b.mtz"))
    assert len(one.F) == 30
    assert np.array_equal(one.hkl, two.hkl)
    np.testing.assert_allclose(one.F, two.F)
    other = gemmi.UnitCell(21, 25, 30, 90, 90, 90)
    write_phases(tmp_path / "c.mtz", hkl, F, cell=other, space_group=GROUP)
    with pytest.raises(InputError, match="one cell"):
        shared_reflections(one, read_phases(tmp_path / "c.mtz"))


def test_bad_input(tmp_path, data):
    hkl, F, fom = data
    write_phases(tmp_path / "a.mtz", hkl, F, cell=CELL, space_group=GROUP, observed=-abs(F))
    with pytest.raises(InputError, match=r"no column 'XX'; present: .*FWT \(F\)"):
        read_amplitudes(tmp_path / "a.mtz", ["XX"])
    with pytest.raises(InputError, match="negative"):
        read_amplitudes(tmp_path / "a.mtz", ["FP"])
    with pytest.raises(InputError, match="labels must be"):
        read_phases(tmp_path / "a.mtz", ["FWT"])
    (tmp_path / "b.mtz").write_text("no")
    for path in ("b.mtz", "none.mtz"):
        with pytest.raises(InputError, match="not a readable MTZ"):
            read_phases(tmp_path / path)
    for change in ({"fom": fom[1:]}, {"F": F * np.nan}):
        with pytest.raises(InputError):
            write_phases(tmp_path / "c.mtz", hkl, **{"F": F, "cell": CELL, "space_group": GROUP, **change})
    assert not (tmp_path / "c.mtz").exists()
