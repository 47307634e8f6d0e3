"""The whole job as a library call, on rotation images, stills and bare shoeboxes."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest

import xtalfast
from xtalfast.cli import main
from xtalfast.errors import InputError
from xtalfast.integration.integrate import IntegrateOptions, open_prepared, prepare
from xtalfast.integration.store import ShoeboxStore
from xtalfast.io import ExperimentList, Flag, ShoeboxColumn, read_expt, read_refl


def test_call_equals_the_command_line(tiny_run, tmp_path):
    """Given files or what was read from them, with options as keywords."""
    expt, refl = read_expt(tiny_run.data.expt), read_refl(tiny_run.data.refl)
    given = refl.copy()
    stages = []
    result = xtalfast.integrate(
        expt, refl, tmp_path, epochs=3, progress=lambda stage, done, total: stages.append((stage, done / total))
    )
    assert (tmp_path / "integrated.refl").read_bytes() == (tiny_run.directory / "integrated.refl").read_bytes()
    assert list(refl) == list(given)  # the caller's table is left alone
    for name in given:
        np.testing.assert_array_equal(refl[name], given[name])
    written = read_refl(tmp_path / "integrated.refl")
    assert list(written) == list(result.table)
    assert [path.name for path in result.files] == [
        "integrated.refl", "integrated.expt", "unmerged.mtz", "xtalfast.json", "report.html",
    ]  # fmt: skip
    assert {"extract", "train", "estimate"} <= {stage for stage, _ in stages}
    assert all(0 <= done <= 1 for _, done in stages) and stages[-1][1] == 1
    assert result.summary() == (
        f"249 reflections: {result.table.has_flags(Flag.IntegratedPrf).sum()} profile-fitted, "
        f"{result.table.has_flags(Flag.IntegratedSum).sum()} summed, "
        f"{(~result.table.has_flags(Flag.Integrated)).sum()} not integrated"
    )


def test_without_reflections_those_of_the_models_are_integrated(tiny_run, tmp_path):
    result = xtalfast.integrate(tiny_run.data.expt, None, tmp_path, epochs=1, d_min=3.0)
    given = read_refl(tiny_run.data.refl)
    wanted = {tuple(h) for h in given["miller_index"][given["d"] >= 3.0].tolist()}
    found = {tuple(h) for h in result.table["miller_index"].tolist()}
    assert wanted <= found and result.table["d"].min() >= 3.0  # and those too near to the rotation axis, and absences
    strong = result.table.has_flags(Flag.IntegratedPrf)
    assert strong.mean() > 0.5
    prefix = ["integrate", str(tiny_run.data.expt)]
    assert main([*prefix, "-o", str(tmp_path / "cli"), "--d-min", "3", "--epochs", "1", "--quiet"]) == 0
    assert (tmp_path / "cli" / "integrated.refl").read_bytes() == (tmp_path / "integrated.refl").read_bytes()


def test_exact_engine_trains_nothing_and_sees_no_truth(tiny_copy, tmp_path):
    """The default engine; the truth beside the images changes nothing."""
    seen = xtalfast.integrate(tiny_copy.expt, tiny_copy.refl, tmp_path / "a", truth=tiny_copy.truth)
    assert seen.checkpoint is None and seen.record["parameters"]["engine"] == "exact"
    assert not (tmp_path / "a" / "training").exists() and "intensity.q.value" not in seen.table
    assert "EXACT" in (tmp_path / "a" / "report.html").read_text()
    tiny_copy.truth.unlink()
    assert main(["integrate", str(tiny_copy.expt), str(tiny_copy.refl), "-o", str(tmp_path / "b"), "--quiet"]) == 0
    for name in ("integrated.refl", "unmerged.mtz"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert seen.table.has_flags(Flag.IntegratedPrf).mean() > 0.5
    posterior = xtalfast.integrate(tiny_copy.expt, tiny_copy.refl, tmp_path / "b", publish="posterior").table
    np.testing.assert_array_equal(posterior["intensity.prf.value"], seen.table["intensity.vi.value"])


def test_engines_and_their_options():
    assert IntegrateOptions().chosen_engine == "exact" == IntegrateOptions(engine="exact").chosen_engine
    assert IntegrateOptions(encoder="fc").chosen_engine == "network" == IntegrateOptions(engine="network").chosen_engine
    with pytest.raises(InputError, match="encoder, epochs: part of the network engine"):
        IntegrateOptions(engine="exact", epochs=3, encoder="fc")
    with pytest.raises(InputError, match="engine must be one of exact, network, got 'magic'"):
        IntegrateOptions(engine="magic")


def test_rows_identifiers_and_models_are_kept(tiny_run):
    given, written = read_refl(tiny_run.data.refl), read_refl(tiny_run.directory / "integrated.refl")
    assert written.identifiers == given.identifiers
    for name in ("miller_index", "xyzcal.px", "id", "panel", "s1", "entering"):
        np.testing.assert_array_equal(written[name], given[name])
    before, after = read_expt(tiny_run.data.expt)[0], read_expt(tiny_run.directory / "integrated.expt")[0]
    assert after.identifier == before.identifier
    np.testing.assert_array_equal(after.crystal.A, before.crystal.A)
    np.testing.assert_array_equal(after.beam.s0, before.beam.s0)
    assert after.profile["sigma_b"] > 0 and after.profile["sigma_m"] > 0  # learned from the spots


def test_table_has_what_dials_scale_needs(tiny_run):
    table = read_refl(tiny_run.directory / "integrated.refl")
    needed = "id panel d s1 lp qe zeta partiality partial_id xyzobs.px.value xyzcal.mm bbox flags background.mean"
    table.require(*needed.split(), *(f"intensity.{c}.{p}" for c in ("prf", "sum", "vi") for p in ("value", "variance")))


def test_order_of_the_rows_does_not_matter(tiny_run, tmp_path):
    """Summation and likelihood of a row do not depend on where it stands; and the order is that of the input."""
    refl = read_refl(tiny_run.data.refl)
    shuffled = np.random.default_rng(0).permutation(len(refl))
    checkpoint = next(tiny_run.directory.glob("training/*/best.ckpt"))
    usual = xtalfast.integrate(tiny_run.data.expt, refl, tmp_path / "a", weights=checkpoint).table
    other = xtalfast.integrate(tiny_run.data.expt, refl.select(shuffled), tmp_path / "b", weights=checkpoint).table
    np.testing.assert_array_equal(other["miller_index"], usual["miller_index"][shuffled])
    np.testing.assert_array_equal(other["flags"], usual["flags"][shuffled])
    for name in ("intensity.sum.value", "intensity.prf.value", "intensity.prf.variance"):
        scale = np.abs(usual[name]).max()
        np.testing.assert_allclose(other[name] / scale, usual[name][shuffled] / scale, atol=1e-5)


def as_stills(data, directory):
    """Each of the first two images as a still of its own, with the reflections that it records."""
    experiment, table = read_expt(data.expt)[0], read_refl(data.refl)
    stills, tables = [], []
    for i in range(2):
        goniometer, scan = experiment.goniometer, experiment.scan
        turn = goniometer.rotation(np.array([scan.phi_from_z(np.array([i + 0.5]))[0]]))[0]
        stills.append(
            replace(
                experiment,
                crystal=replace(experiment.crystal, A=turn @ experiment.crystal.A),
                goniometer=None,
                scan=None,
                identifier=f"still-{i}",
                imageset={"__id__": "ImageSet", "images": [str(data.images[i])]},
            )
        )
        part = table.select(np.floor(table["xyzcal.px"][:, 2]) == i)
        part["id"] = np.full(len(part), i, np.int32)
        part["xyzcal.px"][:, 2] = 0.5
        for name in ("xyzcal.mm", "s1", "partiality"):
            del part[name]
        part.identifiers = {i: f"still-{i}"}
        tables.append(part)
    joined = type(table).concat(tables)
    joined.identifiers = {i: f"still-{i}" for i in range(2)}
    return ExperimentList.from_experiments(stills), joined


def test_stills_have_boxes_of_one_image(tiny_run, tmp_path):
    experiments, table = as_stills(tiny_run.data, tmp_path)
    result = xtalfast.integrate(experiments, table, tmp_path / "out", epochs=1)
    assert result.store.box == (1, 21, 21)
    assert len(result.table) == len(table) and result.table.identifiers == table.identifiers
    assert result.table.has_flags(Flag.IntegratedPrf).mean() > 0.5
    assert (result.table["bbox"][:, 5] - result.table["bbox"][:, 4] == 1).all()


def test_shoeboxes_in_the_table_replace_lost_images(tiny_run, tmp_path):
    """Counts and mask handed over as DIALS' shoebox column give the intensities of the images."""
    usual = read_refl(tiny_run.directory / "integrated.refl")
    store = ShoeboxStore.open(tiny_run.directory / "shoeboxes")
    row = np.argsort(store.metadata["row"][:])
    bbox, n = np.asarray(store.metadata["bbox"][:])[row], store.n
    counts, mask = store.counts(row), store.mask(row)
    table = read_refl(tiny_run.data.refl)
    table.columns["shoebox"] = ShoeboxColumn(
        panel=np.zeros(n, np.uint64), bbox=bbox,
        data=counts.astype(np.float32).ravel(), mask=mask.astype(np.int32).ravel(),
        background=np.zeros(counts.size, np.float32),
    )  # fmt: skip
    experiments = read_expt(tiny_run.data.expt)
    experiments[0].imageset = {"__id__": "ImageSequence", "template": str(tmp_path / "gone_####.cbf")}
    checkpoint = next(tiny_run.directory.glob("training/*/best.ckpt"))
    result = xtalfast.integrate(experiments, table, tmp_path / "out", weights=checkpoint)
    assert "shoebox" not in result.table
    good = usual.has_flags(Flag.IntegratedSum)
    assert result.table.has_flags(Flag.IntegratedSum)[good].all()
    np.testing.assert_allclose(
        result.table["intensity.sum.value"][good], usual["intensity.sum.value"][good], rtol=1e-5, atol=1e-2
    )


def test_prepare_and_open_prepared(tiny_run, tmp_path):
    prepared = prepare(tiny_run.data.expt, tiny_run.data.refl, tmp_path, IntegrateOptions(d_min=4.0))
    opened = open_prepared(tmp_path)
    d = read_refl(tiny_run.data.refl)["d"]
    np.testing.assert_array_equal(np.sort(prepared.rows), np.flatnonzero(d >= 4.0))
    assert opened.store.n == prepared.store.n == len(prepared.rows)
    rows = np.arange(5)
    assert np.array_equal(opened.profiles.profiles(rows), prepared.profiles.profiles(rows))
    (tmp_path / "profiles.npz").unlink()
    with pytest.raises(InputError, match="holds no finished shoebox store"):
        open_prepared(tmp_path)


def test_restart_forgets_the_earlier_run_but_not_its_outputs(tiny_run, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(tiny_run.directory, out)
    (out / "notes.txt").write_text("of the user")
    with pytest.raises(InputError, match="is missing"):
        broken = read_expt(tiny_run.data.expt)
        broken[0].imageset = {"__id__": "ImageSequence", "template": str(tmp_path / "gone_####.cbf")}
        xtalfast.integrate(broken, tiny_run.data.refl, out, resume=False)
    assert (out / "integrated.refl").read_bytes() == (tiny_run.directory / "integrated.refl").read_bytes()
    assert (out / "notes.txt").read_text() == "of the user"
    assert not (out / "training").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"publish": "x"}, "publish must be one of likelihood, posterior, got 'x'"),
        ({"box": (3, 21)}, "box must be three positive sizes"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"seed": 2**63}, r"seed must be from 0 to 2\^63 - 1"),
        ({"device": "tpu"}, "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ({"truth": "none.npz"}, "truth: no file none.npz"),
    ],
)
def test_bad_options_are_refused_before_anything_is_read(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        xtalfast.integrate("no.expt", "no.refl", tmp_path, **options)
