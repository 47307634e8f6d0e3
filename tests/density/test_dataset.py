"""Examples on the fly: right maps, reproducible, every fragment once an epoch, augmentations that do what they say."""

import gemmi
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from xtalfast.density.cells import MIN_CONTACT, has_contact, orthogonalization, volume
from xtalfast.density.dataset import Augmentation, ExampleDataset, GridBatches
from xtalfast.density.fragment_set import make_fragments
from xtalfast.density.fragments import FragmentSettings
from xtalfast.density.scale import MapScale
from xtalfast.errors import InputError

SCALE = MapScale(patterson=900.0, density=4.4)


@pytest.fixture(scope="module")
def store(structures, tmp_path_factory):
    """The ten fragments with the smallest cells."""
    made = make_fragments([structures], tmp_path_factory.mktemp("set"), FragmentSettings(test_fraction=0))["train"]
    return made.select(np.argsort(volume(made.arrays["cells"]))[:10])


def batches(store, augmentation=None, epoch=0, batch_size=4, seed=0, **options):
    dataset = ExampleDataset(store, SCALE, augmentation, seed=seed)
    sampler = GridBatches(dataset, batch_size, **options)
    sampler.set_epoch(epoch)
    return [dataset[request] for request in sampler]


def by_row(found):
    return {int(row): (b, i) for b in found for i, row in enumerate(b.rows)}


def gemmi_density(fragment, grid, d_min):
    """Truncated density of a fragment by gemmi alone."""
    structure = gemmi.Structure()
    structure.cell = gemmi.UnitCell(*fragment.cell)
    structure.add_model(gemmi.Model(1))
    residue = gemmi.Residue()
    for z, xyz in zip(fragment.element.tolist(), fragment.coords.tolist()):
        atom = gemmi.Atom()
        atom.element, atom.pos, atom.b_iso = gemmi.Element(z), gemmi.Position(*xyz), 20.0
        residue.add_atom(atom)
    chain = gemmi.Chain("A")
    chain.add_residue(residue)
    structure[0].add_chain(chain)
    calculator = gemmi.DensityCalculatorX()
    calculator.d_min = d_min
    calculator.grid.set_unit_cell(structure.cell)
    calculator.grid.spacegroup = gemmi.SpaceGroup("P 1")
    calculator.grid.set_size(*grid)
    calculator.put_model_density_on_grid(structure[0])
    asu = gemmi.transform_map_to_f_phi(calculator.grid).prepare_asu_data(dmin=d_min)
    return np.array(asu.transform_f_phi_to_map(exact_size=list(grid)).array)


def test_maps_are_those_of_gemmi(store):
    """Density within 1e-3 of its sd; the Patterson is the autocorrelation of that density."""
    for batch in batches(store, batch_size=8)[:3]:
        fragment, grid = store[int(batch.rows[0])], tuple(batch.density.shape[1:])
        expected = gemmi_density(fragment, grid, 1.5)
        ours = batch.density[0].numpy() * SCALE.density
        assert np.abs(ours - expected).max() < 1e-3 * expected.std()
        transform = np.fft.fftn(expected)
        scale = volume(fragment.cell) / expected.size
        patterson = np.fft.ifftn(np.abs(transform) ** 2).real * scale
        assert batch.patterson[0].numpy() * SCALE.patterson == pytest.approx(patterson, abs=1e-3 * patterson.max())
        assert (batch.residue_ids[0].numpy() == fragment.residue_ids).all()
        assert batch.cells[0].numpy() == pytest.approx(fragment.cell)


def test_every_fragment_once_in_batches_of_one_grid(store):
    for min_batch in (1, 2):
        found = batches(store, min_batch=min_batch)
        rows = [row for batch in found for row in batch.rows.tolist()]
        assert len(rows) == len(set(rows)) and (min_batch > 1 or len(rows) == len(store))
        assert all(min_batch <= len(batch.rows) <= 4 for batch in found)
        assert all(n % 4 == 0 for batch in found for n in batch.density.shape[1:])


def test_ranks_share_the_epoch(store):
    """Three ranks have equally many batches; together they are all of them."""
    dataset = ExampleDataset(store, SCALE)
    ranks = [GridBatches(dataset, 2, rank=rank, world_size=3) for rank in range(3)]
    shares = [[tuple(request.rows) for request in rank] for rank in ranks]
    assert len({len(share) for share in shares}) == 1 == len({len(rank) for rank in ranks})
    assert {row for share in shares for rows in share for row in rows} == set(range(len(store)))


def test_epochs_differ_and_repeat(store):
    change = Augmentation(rotate=True, noise=(0.05, 0.1))
    first, again, later = (by_row(batches(store, change, epoch=e)) for e in (0, 0, 1))
    for row in range(0, len(store), 5):
        (one, i), (two, j), (three, k) = first[row], again[row], later[row]
        assert torch.equal(one.patterson[i], two.patterson[j]) and torch.equal(one.density[i], two.density[j])
        assert not torch.allclose(one.cells[i], three.cells[k])


def test_workers_change_nothing(store):
    dataset = ExampleDataset(store, SCALE, Augmentation(noise=(0.1, 0.1)))
    sampler = GridBatches(dataset, 8)
    loader = DataLoader(dataset, sampler=sampler, batch_size=None, num_workers=1)
    for batch, request in zip(loader, sampler):
        assert (batch.rows.numpy() == request.rows).all()
        assert torch.equal(batch.patterson, dataset[request].patterson)


def test_an_example_does_not_depend_on_its_batch(store):
    change = Augmentation(origin=True, b_iso=(10, 40), missing=(0.1, 0.3), missing_low=(10, 20))
    alone, together = (by_row(batches(store, change, batch_size=n)) for n in (1, 8))
    for row in range(0, len(store), 4):
        (a, i), (b, j) = alone[row], together[row]
        assert a.patterson[i].numpy() == pytest.approx(b.patterson[j].numpy(), abs=1e-5)


def test_rotation_makes_sound_new_cells(store):
    dataset = ExampleDataset(store, SCALE, Augmentation(rotate=True))
    plan = dataset.plan(epoch=3)
    for row in range(0, len(store), 3):
        fragment = store[row]
        turn = plan.rotations[row]
        assert np.linalg.det(turn) == pytest.approx(1)
        turned = fragment.coords.astype(float) @ turn.T
        orth = orthogonalization(plan.cells[row])
        assert not has_contact(turned, orth, MIN_CONTACT - 1e-3)


def test_origin_moves_the_density_not_the_patterson(store):
    still, moved = (by_row(batches(store, change)) for change in (None, Augmentation(origin=True)))
    for row in range(0, len(store), 6):
        (a, i), (b, j) = still[row], moved[row]
        assert b.patterson[j].numpy() == pytest.approx(a.patterson[i].numpy(), abs=2e-4)
        assert not torch.allclose(a.density[i], b.density[j], atol=0.01)
        assert float(a.density[i].std()) == pytest.approx(float(b.density[j].std()), rel=1e-3)


def spectrum(values):
    return np.abs(np.fft.rfftn(values.numpy()))


def test_resolution_b_and_missing_data(store):
    sharp, blurred = (by_row(batches(store, Augmentation(b_iso=(b, b)))) for b in (20, 60))
    (a, i), (b, j) = sharp[0], blurred[0]
    assert float(b.density[j].max()) < 0.8 * float(a.density[i].max())
    variable = batches(store, Augmentation.paper_variable())
    limits = torch.cat([batch.d_min for batch in variable])
    assert limits.min() >= 1.6 and limits.max() <= 2.25 and limits.std() > 0.05
    cut = by_row(batches(store, Augmentation(data_d_min=(3.0, 3.0), missing_low=(10.0, 10.0))))
    (c, k) = cut[0]
    assert torch.equal(c.density[k], a.density[i])  # the truth stays
    cell = gemmi.UnitCell(*store[0].cell)
    strength = spectrum(c.patterson[k])
    seen = set()
    for hkl in ((1, 0, 0), (0, 1, 0), (0, 1, 1), (2, 1, 1), (1, 2, 3), (0, 0, 4), (0, 0, 12), (7, 0, 1), (3, 5, 6)):
        kept = 3.0 <= cell.calculate_d(list(hkl)) <= 10.0
        assert (strength[hkl] > 1e-5 * strength.max()) == kept, hkl
        seen.add(kept)
    assert seen == {True, False}


def test_noise_has_the_size_asked_for_and_keeps_friedel_symmetry(store):
    """Relative error of |F|, from the spectra of noisy and true Patterson: 10 % rms within 1 %."""
    (a, i), (b, j) = (by_row(batches(store, change))[2] for change in (None, Augmentation(noise=(0.1, 0.1))))
    true, noisy = (np.fft.fftn(x.numpy().astype(float)) for x in (a.patterson[i], b.patterson[j]))
    strong = true.real > 1e-3 * true.real.max()
    error = np.sqrt(np.maximum(noisy.real[strong], 0) / true.real[strong]) - 1
    assert np.sqrt((error**2).mean()) == pytest.approx(0.1, abs=0.01)
    assert noisy.real[0, 3, 0] == pytest.approx(noisy.real[0, -3, 0], rel=1e-5)


def test_bad_input(store):
    with pytest.raises(InputError, match="noise must be"):
        Augmentation(noise=(0.0, 2.0))
    with pytest.raises(InputError, match="d_min must be"):
        Augmentation(d_min=(2.0, 1.5))
    with pytest.raises(InputError, match="split is empty"):
        ExampleDataset(store.select(np.array([], np.int64)), SCALE)
    with pytest.raises(InputError, match="multiple must be"):
        ExampleDataset(store, SCALE, multiple=5)
    with pytest.raises(InputError, match="min_batch"):
        GridBatches(ExampleDataset(store, SCALE), 4, min_batch=8)
    with pytest.raises(InputError, match="rank must be"):
        GridBatches(ExampleDataset(store, SCALE), 4, rank=2, world_size=2)
