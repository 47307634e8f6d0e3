"""From a checkpoint to maps and to the paper's tables, by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import gemmi
import numpy as np
import pytest
import torch

from xtalfast.cli import main
from xtalfast.density.dataset import ExampleDataset, GridBatches
from xtalfast.density.evaluate import N_SHELLS, Evaluation, Stage, phase_errors
from xtalfast.density.loss import pearson
from xtalfast.density.maps import atoms_of_rows
from xtalfast.density.recycle import flatten_template, measured_amplitudes, noisy_template, refine_template
from xtalfast.density.trained import Trained
from xtalfast.io.mtz_phases import write_phases
from xtalfast.phasing.fourier import FourierGrid

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def batch(dipeptides):
    dataset = ExampleDataset(dipeptides["test"], dipeptides.scale)
    return dataset[next(iter(GridBatches(dataset, 3, shuffle=False)))]


def grid_of(batch, i=0):
    x, y, z = batch.density.shape[1:]
    return FourierGrid(gemmi.UnitCell(*batch.cells[i].tolist()), (x, y, z), 1.5)


@pytest.fixture(scope="module")
def crystal(dipeptides, tmp_path_factory):
    """Amplitudes of a test dipeptide, its sequence and its true structure factors."""
    store = dipeptides["test"]
    fragment = store[0]
    cell = gemmi.UnitCell(*fragment.cell)
    hkl = np.array(gemmi.make_miller_array(cell, gemmi.SpaceGroup("P 1"), 1.5))
    atoms = atoms_of_rows(store, np.array([0]))
    fraction = fragment.coords.astype(float) @ np.array(cell.frac.mat.tolist()).T
    s2 = 1 / cell.calculate_d_array(hkl) ** 2
    factors = np.stack([[gemmi.Element(int(e)).it92.calculate_sf(s / 4) for e in atoms.element] for s in s2])
    truth = (factors * np.exp(2j * np.pi * hkl @ fraction.T)).sum(1) * np.exp(-20 / 4 * s2)
    path = tmp_path_factory.mktemp("crystal") / "data.mtz"
    write_phases(
        path, hkl, truth, cell=cell, space_group=gemmi.SpaceGroup("P 1"), fom=np.ones(len(hkl)), observed=abs(truth)
    )
    return path, fragment.sequence, hkl, truth


def test_amplitudes_come_back_out_of_the_patterson(dipeptides, batch):
    grid = grid_of(batch)
    found = measured_amplitudes(batch.patterson[0], grid, dipeptides.scale)
    wanted = torch.where(grid.inside, grid.to_spectrum(batch.density[0] * dipeptides.scale.density).abs(), 0)
    assert (found - wanted).abs().max() < 2e-4 * wanted.max()


def test_refined_template_keeps_the_truth(dipeptides, batch):
    """Started from the truth, density modification stays near and says so; from noise it finds nothing."""
    arguments = (batch.patterson[0], batch.residue_ids[0], batch.cells[0], 1.5, dipeptides.scale)
    good, r_good = refine_template(batch.density[0], *arguments)
    bad, r_bad = refine_template(torch.randn_like(batch.density[0]), *arguments)
    truth = batch.density[0]
    from_truth, from_noise = (phase_errors(found, truth, batch.cells[0], 1.5)[0] for found in (good, bad))
    assert from_truth < from_noise / 2
    assert r_good < r_bad


def test_flattened_template_follows_appendix_e(batch):
    density = batch.density[0]
    flat = flatten_template(density, batch.cells[0])
    assert flat.min() == -1 and flat.max() == 1
    sigma = (density - density.mean()) / density.std(correction=0)
    # Undo the last scaling; outside the masks only 5 % of the map is left upon the floor.
    mixed = 0.95 * -1.23 + 0.05 * sigma
    low = (sigma.argmin(), sigma.min())[1]
    outside = density < 0
    scaled = flat[outside] - flat[outside].mean()
    wanted = mixed[outside] - mixed[outside].mean()
    assert torch.allclose(scaled / scaled.std(), wanted / wanted.std(), atol=1e-3) and low < 0


def test_noise_stays_in_the_middle():
    template = torch.zeros(20, 20, 40)
    noisy = noisy_template(template, 1e-3, torch.Generator().manual_seed(0))
    assert not noisy[0].any() and not noisy[:, :, -3:].any() and not noisy[:, -1].any()
    inside = noisy[2:-2, 2:-2, 3:-3]
    assert abs(float(inside.var()) / 1e-3 - 1) < 0.05


def test_phase_errors_of_known_phases(batch):
    truth, cell = batch.density[0].double(), batch.cells[0]
    total, shells = phase_errors(truth, truth, cell, 1.5)
    assert total < 1e-3 and len(shells) == N_SHELLS
    assert phase_errors(-truth, truth, cell, 1.5)[0] == pytest.approx(180, abs=1e-3)
    other = torch.randn_like(truth)
    one, two = (np.fft.fftn(values.numpy()) for values in (other, truth))
    index = np.stack(np.meshgrid(*(np.fft.fftfreq(n, 1 / n) for n in truth.shape), indexing="ij"), -1).reshape(-1, 3)
    unit_cell = gemmi.UnitCell(*cell.tolist())
    s2 = ((index @ np.array(unit_cell.frac.mat.tolist())) ** 2).sum(1)
    inside = (s2 > 0) & (s2 <= 1.5**-2)
    wanted = np.degrees(np.abs(np.angle(one * two.conj()))).ravel()[inside].mean()
    assert phase_errors(other, truth, cell, 1.5)[0] == pytest.approx(wanted, abs=1e-6)


def test_phase_writes_maps_and_phases(crystal, weights, tmp_path, capsys):
    path, sequence, _, _ = crystal
    arguments = ["phase", str(path), "--sequence", sequence, "--weights", str(weights), "--scale", "1,0", "--quiet"]
    assert main([*arguments, "-o", str(tmp_path), "--force"]) == 0
    assert "after density modification" in capsys.readouterr().out
    mtz = gemmi.read_mtz_file(str(tmp_path / "phased.mtz"))
    assert {"FWT", "PHWT", "FOM", "FP"} <= set(mtz.column_labels())
    assert (tmp_path / "modified" / "modified.mtz").is_file()
    written = gemmi.read_ccp4_map(str(tmp_path / "network.ccp4"))
    assert written.grid.shape == tuple(4 * (n // 4) for n in written.grid.shape)
    facts = json.loads((tmp_path / "phase.json").read_text())
    assert facts["recycles"] == 0 and facts["solver"] is None and 0 < facts["network"]["mean_fom"] < 1


def test_phase_refuses_what_it_was_not_trained_on(crystal, weights, tmp_path, capsys):
    path, sequence, _, _ = crystal
    arguments = ["phase", str(path), "--weights", str(weights), "-o", str(tmp_path / "out"), "--quiet"]
    assert main([*arguments, "--sequence", sequence + "G"]) == 2
    assert "3 residues (trained on 2)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--sequence", "A?"]) == 2
    assert main([*arguments, "--sequence", sequence, "--recycles", "1", "--force"]) == 2
    assert "takes no template" in capsys.readouterr().err


def test_evaluate_writes_the_papers_tables(dipeptides, weights, tmp_path, capsys):
    arguments = ["evaluate", str(dipeptides.path), "--weights", str(weights), "-o", str(tmp_path), "--quiet"]
    assert main([*arguments, "--limit", "6", "--controls", "--device", "cpu"]) == 0
    text = (tmp_path / "evaluation.md").read_text()
    for row in ("Mean PC (not refined after the initial run)", "Percent refined", "Pattersons of other examples"):
        assert row in text
    facts = json.loads((tmp_path / "evaluation.json").read_text())
    assert len(facts["ids"]) == 6 and len(facts["stages"][0]["shells"][0]) == N_SHELLS
    assert -1 <= facts["controls"]["no residues (empty maps)"] <= 1


def test_evaluate_refuses_structures_that_were_trained_on(dipeptides, weights, tmp_path, capsys):
    saved = torch.load(weights, weights_only=True)
    saved["parents"] = saved["parents"] + list(dipeptides["test"].parents)[:1]
    torch.save(saved, tmp_path / "leaky.ckpt")
    arguments = ["evaluate", str(dipeptides.path), "--weights", str(tmp_path / "leaky.ckpt"), "-o", str(tmp_path)]
    assert main([*arguments, "--quiet"]) == 2
    assert "were trained on" in capsys.readouterr().err


def test_the_shipped_network_uses_the_patterson(dipeptides):
    """On peptides of ideal geometry, which it has not seen, beside controls that a useless network would pass."""
    trained = Trained.load(ROOT / "examples" / "dipeptide.ckpt")
    assert (ROOT / "examples" / "dipeptide.ckpt").stat().st_size < 5_000_000
    found: dict[str, list[float]] = {"right": [], "shuffled": [], "mean": []}
    dataset = ExampleDataset(dipeptides["train"], trained.scale)
    for request in GridBatches(dataset, 16, min_batch=3, shuffle=False):
        batch = dataset[request]
        truth = batch.density
        others = (truth.sum(0) - truth) / (len(truth) - 1)
        given = batch.residue_ids, batch.cells, 1.5
        found["right"] += pearson(trained.predict(batch.patterson, *given), truth).tolist()
        found["shuffled"] += pearson(trained.predict(batch.patterson.roll(1, 0), *given), truth).tolist()
        found["mean"] += pearson(others, truth).tolist()
    mean = {name: np.mean(values) for name, values in found.items()}
    assert len(found["right"]) > 20
    assert mean["right"] > 0.1 + max(mean["shuffled"], mean["mean"]), mean


def test_table_separates_what_was_not_refined():
    shells = [[30.0] * N_SHELLS, [80.0] * N_SHELLS]
    first = Stage([0.9, 0.5], [20.0, 80.0], shells, [0.95, 0.5], [10.0, 80.0], [True, False])
    second = Stage([0.95, 0.7], [15.0, 60.0], shells, [0.95, 0.8], [10.0, 50.0], [True, True])
    text = Evaluation(["a", "b"], [first, second], {}).table()
    assert "| Mean PC | 0.700 | 0.825 |" in text
    assert "| Mean PC (not refined after the initial run) | 0.500 | 0.700 |" in text
    assert "| Percent refined | 50 | 100 |" in text
    assert "| Initial | 0.50 |" in text


def test_a_checkpoint_of_another_kind_is_refused(tmp_path, capsys):
    torch.save({"format": 1, "model": {}}, tmp_path / "other.ckpt")
    with pytest.raises(Exception, match="xtalfast train density"):
        Trained.load(tmp_path / "other.ckpt")
