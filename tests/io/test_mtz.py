"""MTZ files: read back through gemmi, and the batch headers and rows against dials.export."""

from __future__ import annotations

import subprocess

import gemmi
import numpy as np
import pytest

from xtalfast.errors import InputError
from xtalfast.io import Flag, ReflectionTable, write_expt, write_refl
from xtalfast.io.mtz import write_merged_mtz, write_unmerged_mtz
from xtalfast.models import Beam, Crystal, Detector, Experiment, Goniometer, Panel, Scan, rotation_matrix

CELL = gemmi.UnitCell(42, 42, 89, 90, 90, 90)
GROUP = gemmi.SpaceGroup("P 43 21 2")
LABELS = "H K L M/ISYM BATCH I SIGI BG SIGBG XDET YDET ROT LP FRACTIONCALC QE".split()

IOTBX = """
import sys, json
from iotbx.reflection_file_reader import any_reflection_file
import iotbx.mtz
m = iotbx.mtz.object(sys.argv[1])
b = m.batches()[2]
arrays = any_reflection_file(sys.argv[1]).as_miller_arrays(merge_equivalents=False)
i = [a for a in arrays if a.info().labels == ["I", "SIGI"]][0]
merged = i.merge_equivalents()
print(json.dumps({
    "group": m.space_group().type().number(), "cell": m.crystals()[-1].unit_cell_parameters(),
    "wavelength": m.datasets()[-1].wavelength() if hasattr(m, "datasets") else None,
    "batch": [b.num(), b.phistt(), b.phiend(), list(b.umat()), list(b.cell()), b.alambd()],
    "n": i.size(), "unique": merged.array().size(), "r_merge": merged.r_merge(),
}))
"""


def experiment(images: tuple[int, int] = (1, 40), wavelength: float = 0.98) -> Experiment:
    """A goniometer and a beam that are not along the axes of the laboratory, and a crystal that changes in the scan."""
    panel = Panel(
        origin=np.array([-80.0, 85.0, -140.0]),
        fast=np.array([1.0, 0, 0]),
        slow=np.array([0, -1.0, 0]),
        pixel_size=(0.172, 0.172),
        image_size=(981, 1043),
        trusted_range=(0.0, 1e6),
    )
    crystal = Crystal.from_cell(CELL, rotation_matrix([1, 2, 3], 0.7), " P 4nw 2abw")
    n = images[1] - images[0] + 2
    crystal.A_at_scan_points = np.stack(
        [rotation_matrix([0, 1, 0], 1e-4 * i) @ crystal.A * (1 - 1e-5 * i) for i in range(n)]
    )
    return Experiment(
        beam=Beam(rotation_matrix([0, 1, 0], 0.01) @ [0, 0, 1.0], wavelength),
        detector=Detector([panel]),
        goniometer=Goniometer(np.array([0.995, 0.0998749217771909, 0]), fixed=rotation_matrix([0, 1, 0], 0.3)),
        scan=Scan(images, (12.0, 0.4), exposure_time=0.1),
        crystal=crystal,
        imageset={"__id__": "ImageSequence", "template": "/data/x_####.cbf"},
        identifier="abc",
    )


def observations(n: int = 600, seed: int = 1) -> ReflectionTable:
    """Symmetry-related observations with known intensities: I = 100 + 10 h^2 + l, up to noise of sigma 5."""
    rng = np.random.default_rng(seed)
    unique = np.array([(h, k, l) for h in range(2, 7) for k in range(1, h) for l in range(1, 9)])
    operations = [op for op in GROUP.operations().sym_ops]
    base = unique[rng.integers(len(unique), size=n)]
    sign = rng.choice([-1, 1], n)[:, None]
    hkl = np.array([operations[i].apply_to_hkl(h) for i, h in zip(rng.integers(8, size=n), base.tolist())]) * sign
    lp, qe = rng.uniform(0.2, 0.5, n), rng.uniform(0.8, 1.0, n)
    true = 100.0 + 10 * base[:, 0] ** 2 + base[:, 2]
    xyz = rng.uniform((5, 5, 0), (970, 1030, 40), (n, 3))
    columns = {
        "id": np.zeros(n, np.int32),
        "miller_index": hkl,
        "panel": np.zeros(n, np.uint64),
        "flags": np.full(n, int(Flag.Predicted | Flag.Integrated), np.uint64),
        "xyzcal.px": xyz,
        "xyzobs.px.value": xyz + np.array([0.5, -0.5, 0.0]),
        "intensity.prf.value": (true + rng.normal(0, 5, n)) * qe / lp,
        "intensity.prf.variance": (5 * qe / lp) ** 2,
        "intensity.sum.value": true * qe / lp * 0.9,
        "intensity.sum.variance": (5 * qe / lp) ** 2,
        "background.sum.value": np.full(n, 200.0),
        "background.sum.variance": np.full(n, 225.0),
        "lp": lp,
        "qe": qe,
        "partiality": np.full(n, 0.9),
        "partial_id": np.arange(n, dtype=np.uint64),
        "d": np.array([CELL.calculate_d(h) for h in hkl.tolist()]),
        "s1": np.tile([0.1, 0.1, -1.0], (n, 1)),
    }
    return ReflectionTable.from_columns(columns, {0: "abc"})


def rows_of(mtz: gemmi.Mtz) -> dict[str, np.ndarray]:
    return dict(zip(mtz.column_labels(), np.array(mtz, copy=True).T))


def test_labels_types_symmetry_and_values_come_back(tmp_path):
    table = observations()
    assert write_unmerged_mtz(tmp_path / "u.mtz", table, [experiment()]) == len(table)
    mtz = gemmi.read_mtz_file(str(tmp_path / "u.mtz"))
    assert mtz.column_labels() == LABELS and mtz.sort_order == [1, 2, 3, 4, 5]
    assert [c.type for c in mtz.columns] == list("HHHYBJQ") + ["R"] * 8
    assert mtz.spacegroup.hm == "P 43 21 2" and mtz.datasets[1].wavelength == pytest.approx(0.98)
    np.testing.assert_allclose(mtz.cell.parameters, CELL.parameters, rtol=1e-6)

    in_asu = rows_of(mtz)
    asu = gemmi.ReciprocalAsu(GROUP)
    assert all(asu.is_in([int(h), int(k), int(l)]) for h, k, l in zip(in_asu["H"], in_asu["K"], in_asu["L"]))
    # With M/ISYM undone, every observation is there as it was measured.
    assert mtz.switch_to_original_hkl()
    got = rows_of(mtz)
    order = np.lexsort((got["ROT"],))
    z = table["xyzcal.px"][:, 2]
    wanted = np.argsort(z)
    hkl = np.stack([got["H"], got["K"], got["L"]], axis=1)[order]
    np.testing.assert_array_equal(hkl, table["miller_index"][wanted])
    np.testing.assert_allclose(got["ROT"][order], 12.0 + 0.4 * z[wanted], rtol=1e-5)
    np.testing.assert_array_equal(got["BATCH"][order], np.floor(z[wanted]) + 1)
    correction = (table["lp"] / table["qe"])[wanted]
    np.testing.assert_allclose(got["I"][order], table["intensity.prf.value"][wanted] * correction, rtol=1e-6)
    np.testing.assert_allclose(got["SIGI"], 5, rtol=1e-6)
    np.testing.assert_allclose(got["XDET"][order], table["xyzobs.px.value"][wanted, 0], rtol=1e-6)
    np.testing.assert_allclose(got["LP"][order], table["lp"][wanted], rtol=1e-6)
    assert set(got["BG"]) == {200.0} and set(got["SIGBG"]) == {15.0}


def test_batch_headers_rebuild_the_geometry(tmp_path):
    e = experiment()
    write_unmerged_mtz(tmp_path / "u.mtz", observations(), [e])
    mtz = gemmi.read_mtz_file(str(tmp_path / "u.mtz"))
    assert [b.number for b in mtz.batches] == list(range(1, 41))
    batch = mtz.batches[10]
    floats = np.array(list(batch.floats))
    assert floats[36:38] == pytest.approx([16.0, 16.4]) and floats[86] == pytest.approx(0.98)
    U = floats[6:15].reshape(3, 3).T
    np.testing.assert_allclose(U @ U.T, np.eye(3), atol=1e-6)
    assert np.linalg.det(U) == pytest.approx(1)
    # Lengths and angles to beam and rotation axis do not depend on the frame: rebuild them from the header alone.
    A = e.crystal.A_at(np.array(10.5), e.scan)
    lab = e.goniometer.fixed @ A
    cell = gemmi.UnitCell(*floats[:6].tolist())
    r = cell.reciprocal()
    assert r.gamma == pytest.approx(90) and r.beta == pytest.approx(90)
    header = U @ np.diag([r.a, r.b, r.c])
    np.testing.assert_allclose(header.T @ header, lab.T @ lab, atol=1e-8)
    np.testing.assert_allclose(floats[38:41] @ header, e.goniometer.lab_axis @ lab, atol=1e-7)
    np.testing.assert_allclose(floats[83:86] @ header, e.beam.direction @ lab, atol=1e-7)


@pytest.mark.dials
def test_same_rows_and_headers_as_dials_export(tmp_path):
    table, e = observations(), experiment()
    write_refl(tmp_path / "x.refl", table)
    write_expt(tmp_path / "x.expt", [e])
    done = subprocess.run(
        ["dials.export", "x.expt", "x.refl", "intensity=profile+sum", "mtz.hklout=dials.mtz"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    theirs = gemmi.read_mtz_file(str(tmp_path / "dials.mtz"))
    for channel, label in (("prf", "IPR"), ("sum", "I")):
        write_unmerged_mtz(tmp_path / "ours.mtz", table, [e], channel=channel)
        ours = gemmi.read_mtz_file(str(tmp_path / "ours.mtz"))
        a, b = rows_of(ours), rows_of(theirs)
        b["I"], b["SIGI"] = b[label], b[f"SIG{label}"]
        i, j = np.argsort(a["ROT"]), np.argsort(b["ROT"])
        assert len(i) == len(j) == len(table)
        for name in set(LABELS) - {"M/ISYM"}:  # numbered by each file's own list of operations
            np.testing.assert_allclose(a[name][i], b[name][j], rtol=2e-6, atol=1e-6, err_msg=name)
    for ours_batch, theirs_batch in zip(ours.batches, theirs.batches):
        assert ours_batch.number == theirs_batch.number and list(ours_batch.ints) == list(theirs_batch.ints)
        np.testing.assert_allclose(list(ours_batch.floats), list(theirs_batch.floats), rtol=1e-6, atol=1e-6)


def test_gemmi_merges_to_the_true_intensities(tmp_path):
    write_unmerged_mtz(tmp_path / "u.mtz", observations(6000), [experiment()])
    intensities = gemmi.Intensities()
    intensities.import_mtz(gemmi.read_mtz_file(str(tmp_path / "u.mtz")), gemmi.DataType.Unmerged)
    (stats,) = intensities.calculate_merging_stats(None)
    assert stats.all_refl == 6000 and stats.cc_half() > 0.99
    merged = intensities.merged(gemmi.DataType.Mean)
    h, value, sigma = merged.miller_array, merged.value_array, merged.sigma_array
    pull = (value - (100.0 + 10 * h[:, 0] ** 2 + h[:, 2])) / sigma
    # Unit pulls with their own standard errors: the mean over n values has 1 / sqrt(n), the sd 1 / sqrt(2 n).
    assert abs(pull.mean()) < 4 / np.sqrt(len(h)) and abs(pull.std() - 1) < 4 / np.sqrt(2 * len(h))


@pytest.mark.dials
def test_iotbx_reads_it(tmp_path, run_dials):
    write_unmerged_mtz(tmp_path / "u.mtz", observations(), [experiment()])
    theirs = run_dials(IOTBX, tmp_path / "u.mtz")
    assert theirs["group"] == 96 and theirs["n"] == 600 and theirs["r_merge"] < 0.05
    np.testing.assert_allclose(theirs["cell"], CELL.parameters, rtol=1e-6)
    number, start, end, _, _, wavelength = theirs["batch"]
    assert (number, start, end, wavelength) == pytest.approx((3, 12.8, 13.2, 0.98))


def test_rows_without_a_usable_intensity_are_left_out(tmp_path):
    table = observations(10)
    table["flags"][0] = int(Flag.Predicted)
    table["intensity.prf.variance"][1] = 0
    table["intensity.prf.value"][2] = np.nan
    table["partiality"][3] = 0.2
    table["id"][4] = -1
    table["qe"][5] = 0
    assert write_unmerged_mtz(tmp_path / "u.mtz", table, [experiment()]) == 4
    assert write_unmerged_mtz(tmp_path / "u.mtz", table, [experiment()], min_partiality=0) == 5


def test_batches_of_several_experiments_never_collide(tmp_path):
    table = observations(300)
    table["id"] = np.arange(300) % 4
    still = experiment((1, 40))
    still.scan = still.goniometer = None
    still.crystal.A_at_scan_points = None
    experiments = [experiment((1, 40)), experiment((1, 40), wavelength=1.5), experiment((30, 69)), still]
    table["xyzcal.px"][table["id"] == 2] += [0, 0, 29]
    table["xyzobs.px.value"] = table["xyzcal.px"]
    write_unmerged_mtz(tmp_path / "u.mtz", table, experiments)
    mtz = gemmi.read_mtz_file(str(tmp_path / "u.mtz"))
    numbers = [b.number for b in mtz.batches]
    assert len(set(numbers)) == len(numbers) == 121 and min(numbers) > 0
    assert numbers[40] == 101 and numbers[80] == 230  # the image number stays legible
    got = rows_of(mtz)
    assert set(got["BATCH"]) <= set(numbers)
    assert [d.wavelength for d in mtz.datasets[1:]] == pytest.approx([0.98, 1.5])
    dataset = {b.number: b.dataset_id for b in mtz.batches}
    assert dataset[1] == 1 and dataset[101] == 2


def test_background_may_be_missing(tmp_path):
    table = observations(20)
    del table["background.sum.value"]
    del table["xyzobs.px.value"]
    write_unmerged_mtz(tmp_path / "u.mtz", table, [experiment()])
    got = rows_of(gemmi.read_mtz_file(str(tmp_path / "u.mtz")))
    assert np.isnan(got["BG"]).all()
    np.testing.assert_allclose(np.sort(got["XDET"]), np.sort(table["xyzcal.px"][:, 0]), rtol=1e-6)


def test_bad_unmerged_input_says_what_is_wrong(tmp_path):
    table, e = observations(20), experiment()
    with pytest.raises(InputError, match=r"no column 'intensity.vi.value', 'intensity.vi.variance'"):
        write_unmerged_mtz(tmp_path / "u.mtz", table, [e], channel="vi")
    with pytest.raises(InputError, match="column id names experiment 0, there are 0"):
        write_unmerged_mtz(tmp_path / "u.mtz", table, [])
    other = experiment()
    other.crystal.hall_symbol = " P 1"
    table["id"] = np.arange(20) % 2
    with pytest.raises(InputError, match="must share one space group, got P 43 21 2, P 1"):
        write_unmerged_mtz(tmp_path / "u.mtz", table, [e, other])
    other.crystal = None
    with pytest.raises(InputError, match="must have a crystal"):
        write_unmerged_mtz(tmp_path / "u.mtz", table, [e, other])
    with pytest.raises(InputError, match=r"no reflection has a usable intensity.prf.value"):
        write_unmerged_mtz(tmp_path / "u.mtz", table.select([]), [e])
    assert not list(tmp_path.iterdir())


def test_merged_intensities_come_back(tmp_path):
    hkl = np.array([[2, 1, 3], [4, 2, 1], [5, 3, 2]])  # acentric, so that both mates count
    mean = np.array([1.0, 2.0, 3.0]), np.array([0.1, 0.2, 0.3])
    plus = np.array([1.5, np.nan, 3.5]), np.array([0.2, np.nan, 0.4])
    minus = np.array([0.5, 2.0, np.nan]), np.array([0.2, 0.3, np.nan])
    write_merged_mtz(
        tmp_path / "m.mtz",
        hkl,
        mean,
        cell=CELL,
        space_group=GROUP,
        wavelength=0.98,
        plus=plus,
        minus=minus,
        n_observations=[3, 2, 1],
    )
    mtz = gemmi.read_mtz_file(str(tmp_path / "m.mtz"))
    assert mtz.column_labels() == "H K L IMEAN SIGIMEAN I(+) SIGI(+) I(-) SIGI(-) N".split()
    assert [c.type for c in mtz.columns] == list("HHHJQKMKMI")
    got = rows_of(mtz)
    order = np.argsort(got["IMEAN"])
    np.testing.assert_array_equal(np.stack([got["H"], got["K"], got["L"]], axis=1)[order], hkl)
    np.testing.assert_allclose(got["I(+)"][order], plus[0])
    np.testing.assert_allclose(got["SIGI(-)"][order], minus[1], rtol=1e-6)
    intensities = gemmi.Intensities()
    intensities.import_mtz(mtz, gemmi.DataType.Anomalous)
    assert len(intensities.value_array) == 4


@pytest.mark.parametrize(
    ("hkl", "values", "message"),
    [
        ([[1, 2, 3]], [1.0], "must lie in the asymmetric unit of P 43 21 2, got [1, 2, 3]"),
        ([[2, 1, 3], [2, 1, 3]], [1.0, 2.0], "must name each reflection once"),
        ([[2, 1, 3]], [1.0, 2.0], "IMEAN must be [1] like hkl, got [2]"),
        ([2, 1, 3], [1.0, 2.0, 3.0], "hkl must be [N, 3], got [3]"),
    ],
)
def test_bad_merged_input_says_what_is_wrong(tmp_path, hkl, values, message):
    with pytest.raises(InputError) as caught:
        write_merged_mtz(tmp_path / "m.mtz", hkl, (values, values), cell=CELL, space_group=GROUP)
    assert message in str(caught.value)
