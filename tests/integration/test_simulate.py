"""Simulated data: photons are conserved, spots have the shape physics gives them, and DIALS finds the cell put in."""

import subprocess
from dataclasses import replace

import gemmi
import numpy as np
import pytest

from xtalfast.errors import InputError
from xtalfast.integration.columns import zeta_factor
from xtalfast.integration.simulate import Simulation, SimulationConfig, simulate
from xtalfast.integration.simulate_config import PRESETS
from xtalfast.integration.simulate_crystal import structure_intensities, wilson_intensities
from xtalfast.integration.simulate_spots import spot_covariances, voxel_shares
from xtalfast.io import read_expt, read_image, read_refl
from xtalfast.models import rotation_matrix

CELL = gemmi.UnitCell(42, 42, 64, 90, 90, 90)
GROUP = gemmi.SpaceGroup("P 43 21 2")


@pytest.fixture(scope="module")
def tiny():
    return Simulation(SimulationConfig.tiny())


def expected_images(simulation):
    blocks = list(simulation.expected_blocks())
    return tuple(np.concatenate([block[k] for block in blocks]) for k in (1, 2))


# spot shape and voxel shares


@pytest.mark.parametrize("width", [0.45, 0.8, 1.2])
def test_voxel_shares_against_fine_sampling(width):
    """Shares of a skewed Gaussian agree with its density summed on a fine grid within 1 % of the largest voxel."""
    turn = rotation_matrix(np.array([0.3, -0.5, 0.8]), 0.9)
    covariance = turn @ np.diag([width, 1.4 * width, 0.8 * width]) ** 2 @ turn.T
    centre = np.array([11.3, 10.6, 6.2])
    stack, n = (13, 22, 23), 8
    shares = voxel_shares(centre[None], covariance[None], stack, 0)
    got = np.zeros(stack)
    got.reshape(-1)[shares.voxel] = shares.share

    fine = [(np.arange(size * n) + 0.5) / n - c for size, c in zip(stack, centre[::-1])]
    z, y, x = np.meshgrid(*fine, indexing="ij")
    inverse = np.linalg.inv(covariance)
    offset = np.stack([x, y, z], axis=-1)
    density = np.exp(-0.5 * np.einsum("...i,ij,...j->...", offset, inverse, offset))
    density /= np.sqrt((2 * np.pi) ** 3 * np.linalg.det(covariance)) * n**3
    brute = density.reshape(stack[0], n, stack[1], n, stack[2], n).sum(axis=(1, 3, 5))
    assert np.abs(got - brute).max() < 0.01 * brute.max()
    assert np.abs(got.sum() - 1) < 1e-3


def test_shares_of_a_stack_are_those_of_its_parts():
    rng = np.random.default_rng(1)
    centre = rng.uniform([-1, -1, -2], [31, 21, 12], (50, 3))
    covariance = np.array([np.diag(rng.uniform(0.5, 2, 3)) for _ in range(50)])

    def image(stack, first):
        shares = voxel_shares(centre, covariance, stack, first)
        return np.bincount(shares.voxel, shares.share * (1 + shares.row), int(np.prod(stack))).reshape(stack)

    whole = image((10, 20, 30), 0)
    parts = np.concatenate([image((3, 20, 30), 0), image((6, 20, 30), 3), image((1, 20, 30), 9)])
    np.testing.assert_allclose(whole, parts, rtol=1e-12, atol=1e-15)


def test_no_spots_no_shares():
    shares = voxel_shares(np.empty((0, 3)), np.empty((0, 3, 3)), (2, 5, 5), 0)
    assert [len(part) for part in shares] == [0, 0, 0]


def test_covariance_against_rays_traced_one_by_one(tiny):
    """Block size, mosaicity and divergence drawn at random, each ray diffracted exactly, give the stated covariance."""
    config = replace(tiny.config, psf_px=1e-6, oblique_depth_mm=0.0, bandwidth=0.0, mosaicity_deg=0.05)
    experiment, spots = tiny.experiment, tiny.predictions
    zeta = np.abs(zeta_factor(experiment.beam.s0, spots.s1, experiment.goniometer.lab_axis))
    rng = np.random.default_rng(0)
    beam, axis, panel, n = experiment.beam, experiment.goniometer.axis, experiment.detector[0], 20000
    block = 0.9 / config.block_size_a / np.sqrt(8 * np.log(2))
    for row in rng.choice(np.flatnonzero(zeta > 0.3), 5, replace=False):
        spot = spots.select(np.array([row]))
        q = experiment.crystal.A @ spot.hkl[0]
        turn = rng.standard_normal((n, 3)) * np.radians(config.mosaicity_deg)
        q = q + np.cross(turn, q) + rng.standard_normal((n, 3)) * block
        tilt = rng.standard_normal((n, 3)) * np.radians(config.divergence_deg) / beam.wavelength
        s0 = beam.s0 + tilt * [1, 1, 0]  # the beam runs along z
        phi = np.full(n, spot.xyz_mm[0, 2])
        for _ in range(8):  # Newton: |s0 + R(phi) q| = |s0|
            turned = np.einsum("nij,nj->ni", experiment.goniometer.rotation(phi), q)
            excess = np.sum((s0 + turned) ** 2 - s0**2, axis=1)
            phi = phi - excess / (2 * np.sum((s0 + turned) * np.cross(axis, turned), axis=1))
        xy, _ = panel.intersect(s0 + np.einsum("nij,nj->ni", experiment.goniometer.rotation(phi), q))
        traced = np.column_stack([xy / panel.pixel_size, experiment.scan.z_from_phi(phi)])
        stated = spot_covariances(experiment, spot, config)[0]
        size = np.sqrt(np.diag(stated))
        np.testing.assert_allclose(np.cov(traced.T) / np.outer(size, size), stated / np.outer(size, size), atol=0.05)
        np.testing.assert_allclose(traced.mean(0), spot.xyz_px[0], atol=0.03)


def test_spot_shape_varies_over_the_detector(tiny):
    size = np.sqrt(np.diagonal(tiny.truth()["covariance"], axis1=1, axis2=2))
    assert size[:, :2].max() > 1.05 * size[:, :2].min()
    assert size[:, 2].max() > 2 * size[:, 2].min()


# photons


def test_expected_photons_are_all_accounted_for(tiny):
    """Noise-free photons around an isolated spot = its photons x recorded fraction; whole spots are recorded whole."""
    simulation = Simulation(SimulationConfig.tiny(n_images=40, d_min=6.0))
    truth = simulation.truth()
    spots, _ = expected_images(simulation)
    live = spots * simulation.valid
    reach = np.ceil(5.5 * np.sqrt(np.diagonal(truth["covariance"], axis1=1, axis2=2))).astype(int)
    isolated, margin = 0, np.array([5, 5, 4])
    for row in np.flatnonzero(truth["photons"] > 10):
        centre = np.floor(truth["xyz_px"][row]).astype(int)
        low, high = np.maximum(centre - reach[row], 0), centre + reach[row] + 1
        others = np.delete(truth["xyz_px"], row, axis=0)
        if low[2] == 0 or high[2] > 40 or np.any(np.all((others > low - margin) & (others < high + margin), axis=1)):
            continue
        isolated += 1
        total = live[low[2] : high[2], low[1] : high[1], low[0] : high[0]].sum()
        np.testing.assert_allclose(total, truth["photons"][row] * truth["fraction_recorded"][row], rtol=1e-4)
    assert isolated >= 3
    assert np.isclose(tiny.truth()["fraction_recorded"], 1, atol=1e-4).mean() > 0.4
    assert tiny.truth()["fraction_recorded"].max() < 1 + 1e-4


def test_noise_is_poisson(tiny):
    spots, background = expected_images(tiny)
    expected = (spots + background)[:, tiny.valid]
    counts = np.stack(list(tiny.images()))[:, tiny.valid]
    pulls = (counts - expected) / np.sqrt(expected)
    assert abs(pulls.mean()) < 5 / np.sqrt(pulls.size)
    assert abs(pulls.var() - 1) < 5 * np.sqrt((2 + np.mean(1 / expected)) / pulls.size)


def test_photons_follow_f2_over_lp(tiny):
    truth = tiny.truth()
    constant = truth["photons"] * truth["lp"] / truth["scale"]
    bright = truth["intensity"] > 0
    ratio = constant[bright] / truth["intensity"][bright]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-9)
    assert np.isclose(truth["photons"].mean(), tiny.config.photons_mean)
    assert (truth["photons"] == 0).any() and not (truth["photons"] < 0).any()


def test_background_mean_and_water_ring(tiny):
    assert np.isclose(tiny.background.mean(), tiny.config.background_photons)
    dry = Simulation(replace(tiny.config, water_ring=0.0)).background
    row = tiny.background[100] / dry[100]  # the horizontal line through the beam: 3.2 A lies at about 63 px
    assert row[np.abs(np.arange(200) - 103) < 110].argmax() < 60 or row.argmax() > 140


def test_gaps_are_masked_and_strong_pixels_saturate():
    config = SimulationConfig.tiny(trusted_max=30)
    simulation = Simulation(config)
    images = np.stack(list(simulation.images()))
    assert (images[:, ~simulation.valid] == -1).all() and (~simulation.valid).mean() > 0.05
    assert images[:, simulation.valid].min() >= 0 and images.max() == 30


def test_ice_rings_zingers_and_a_second_lattice_show():
    plain, config = Simulation(SimulationConfig.tiny()), SimulationConfig.tiny()
    ice = Simulation(replace(config, ice_ring_photons=9.0))
    assert 5 < (ice.background - plain.background).max() < 15
    zingers = Simulation(replace(config, zingers_per_image=20.0, photons_mean=1.0))
    assert np.mean([np.sum(image > 50) for image in zingers.images()]) == pytest.approx(15, abs=6)
    twin = Simulation(replace(config, second_lattice_fraction=0.5))
    np.testing.assert_array_equal(twin.predictions.hkl, plain.predictions.hkl)
    assert 1.3 < expected_images(twin)[0].sum() / expected_images(plain)[0].sum() < 1.7
    assert twin.truth()["shared"].mean() > plain.truth()["shared"].mean()


# intensities


def test_wilson_statistics():
    truth = wilson_intensities(CELL, GROUP, 1.7, 0.0, 0.0, np.random.default_rng(0))
    hkl = gemmi.make_miller_array(CELL, GROUP, 1.7)
    intensity, _ = truth.of(hkl)
    centric = GROUP.operations().centric_flag_array(hkl)
    epsilon = GROUP.operations().epsilon_factor_without_centering_array(hkl)
    for rows, second_moment in ((~centric & (epsilon == 1), 2), (centric & (epsilon == 1), 3)):
        I, n = intensity[rows], rows.sum()
        assert abs(I.mean() - 1) < 5 * np.sqrt((second_moment - 1) / n)
        assert abs(np.mean(I**2) - second_moment) < 5 * np.sqrt(np.var(I**2) / n)
    assert intensity[epsilon == 2].mean() / epsilon[epsilon == 2].mean() == pytest.approx(1, abs=0.3)


def test_equivalents_agree_and_friedel_mates_differ():
    ratio = 0.08
    truth = wilson_intensities(CELL, GROUP, 2.5, 10.0, ratio, np.random.default_rng(0))
    hkl = gemmi.make_miller_array(CELL, GROUP, 2.5)
    plus, _ = truth.of(hkl)
    for operation in GROUP.operations():
        np.testing.assert_array_equal(truth.of(np.array([operation.apply_to_hkl(h) for h in hkl.tolist()]))[0], plus)
    minus, _ = truth.of(-hkl)
    centric = GROUP.operations().centric_flag_array(hkl)
    np.testing.assert_array_equal(plus[centric], minus[centric])
    F, G = np.sqrt(plus[~centric]), np.sqrt(minus[~centric])
    assert np.mean(np.abs(F - G)) / np.mean(F) == pytest.approx(ratio, rel=0.1)


def test_absent_reflections_are_zero():
    truth = wilson_intensities(CELL, GROUP, 2.5, 10.0, 0.0, np.random.default_rng(0))
    assert truth.of(np.array([[0, 0, 1], [0, 0, 2], [3, 0, 0], [200, 0, 0]]))[0].tolist() == [0, 0, 0, 0]
    assert truth.of(np.array([[0, 0, 4]]))[0][0] > 0


def test_structure_intensities_are_those_of_its_atoms(tmp_path):
    structure = gemmi.Structure()
    structure.cell, structure.spacegroup_hm = gemmi.UnitCell(20, 25, 30, 90, 90, 90), "P 21 21 21"
    rng = np.random.default_rng(0)
    model, chain = gemmi.Model(1), gemmi.Chain("A")
    for k in range(30):
        residue, atom = gemmi.Residue(), gemmi.Atom()
        residue.name, residue.seqid = "ALA", gemmi.SeqId(str(k + 1))
        atom.name, atom.element = "CA", gemmi.Element("C")
        atom.pos, atom.b_iso, atom.occ = gemmi.Position(*rng.uniform(0, 20, 3)), 15.0, 1.0
        residue.add_atom(atom)
        chain.add_residue(residue)
    model.add_chain(chain)
    structure.add_model(model)
    structure.setup_entities()
    structure.make_mmcif_document().write_file(str(tmp_path / "model.cif"))

    truth = structure_intensities(tmp_path / "model.cif", 2.0, 0.0, rng)
    read = gemmi.read_structure(str(tmp_path / "model.cif"))
    direct = gemmi.StructureFactorCalculatorX(read.cell)
    hkl = np.array([[1, 2, 3], [-1, 2, 3], [4, 0, 0], [0, 3, 5], [2, -5, 7], [3, 0, 0]])
    expected = [abs(direct.calculate_sf_from_model(read[0], h)) ** 2 for h in hkl.tolist()]
    np.testing.assert_allclose(truth.of(hkl)[0], expected, rtol=0.01, atol=1e-3 * max(expected))

    simulation = Simulation(SimulationConfig.tiny(structure=tmp_path / "model.cif"))
    assert simulation.experiment.crystal.space_group.hm == "P 21 21 21"
    np.testing.assert_allclose(simulation.experiment.crystal.cell.parameters, read.cell.parameters, rtol=1e-6)


# files


def test_files_hold_the_truth(tmp_path):
    calls = []
    config = SimulationConfig.tiny(start_deg=12.5)
    result = simulate(tmp_path / "new" / "wedge", config, progress=lambda *call: calls.append(call))
    assert calls[-1] == ("simulate", 6, 6) and len(calls) == 6
    simulation = Simulation(config)
    for path, image in zip(result.images, simulation.images()):
        np.testing.assert_array_equal(read_image(path, verify=True), image)

    experiment, table, truth = read_expt(result.expt)[0], read_refl(result.refl), np.load(result.truth)
    np.testing.assert_allclose(experiment.crystal.cell.parameters, config.cell)
    np.testing.assert_allclose(experiment.crystal.A, simulation.experiment.crystal.A, atol=1e-12)
    assert experiment.crystal.space_group.hm == "P 43 21 2" and experiment.scan.oscillation == (12.5, 0.5)
    assert experiment.profile == simulation.experiment.profile
    np.testing.assert_array_equal(experiment.detector[0].valid_pixels(), simulation.valid)
    np.testing.assert_array_equal(table["miller_index"], truth["hkl"])
    np.testing.assert_array_equal(table["xyzcal.px"], truth["xyz_px"])
    assert table.identifiers == {0: experiment.identifier}
    assert set(table.columns) >= {"id", "panel", "s1", "xyzcal.mm", "flags", "entering", "d", "partiality"}
    assert np.all(truth["fraction_recorded"] <= table["partiality"] + 1e-5)
    interior = truth["xyz_px"][np.isclose(truth["fraction_recorded"], table["partiality"], atol=1e-4)]
    assert len(interior) > 0.5 * len(table)


def test_same_seed_same_bytes(tmp_path):
    config = SimulationConfig.tiny(n_images=3)
    first, again = simulate(tmp_path / "a", config), simulate(tmp_path / "b", config)
    other = simulate(tmp_path / "c", replace(config, seed=1))
    for a, b, c in zip(first.images, again.images, other.images):
        assert a.read_bytes() == b.read_bytes() != c.read_bytes()
    assert first.refl.read_bytes() == again.refl.read_bytes()
    assert first.expt.read_bytes() == again.expt.read_bytes()


def test_profile_block_matches_known_widths():
    """With only point spread, sigma_b is the pixel seen from the crystal; with only mosaicity, sigma_m is that."""
    config = SimulationConfig.tiny(block_size_a=1e7, divergence_deg=0.0, bandwidth=0.0, oblique_depth_mm=0.0)
    spread = Simulation(replace(config, mosaicity_deg=1e-5, psf_px=2.0, distance_mm=200.0)).experiment.profile
    assert spread["sigma_b"] == pytest.approx(np.degrees(2.0 * config.pixel_size_mm / 200.0), rel=0.02)
    mosaic = Simulation(replace(config, mosaicity_deg=0.2)).experiment.profile
    assert mosaic["sigma_m"] == pytest.approx(0.2, rel=1e-3)


def test_refuses_a_directory_with_more_images(tmp_path):
    simulate(tmp_path, SimulationConfig.tiny(n_images=3))
    with pytest.raises(InputError, match="longer scan"):
        simulate(tmp_path, SimulationConfig.tiny(n_images=2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space_group": "P 99"}, "space_group"),
        ({"cell": (40.0, 50.0, 60.0, 90.0, 90.0, 90.0)}, "symmetry"),
        ({"cell": (40.0, 40.0, 60.0)}, "6 numbers"),
        ({"n_images": 0}, "n_images must be positive"),
        ({"n_images": 10000}, "at most 9999"),
        ({"mosaicity_deg": -0.1}, "must not be negative"),
        ({"photons_mean": float("nan")}, "finite"),
        ({"oscillation_deg": 0.0}, "oscillation_deg"),
        ({"d_min": 0.4}, "half the wavelength"),
        ({"polarization_fraction": 1.5}, "polarization_fraction"),
        ({"scale_amplitude": 1.0}, "scale_amplitude"),
        ({"zero_fraction": 1.0}, "zero_fraction"),
        ({"module_gap_px": (-1, 0)}, "gaps"),
    ],
)
def test_bad_configuration(changes, message):
    with pytest.raises(InputError, match=message):
        SimulationConfig.tiny(**changes)


def test_nothing_on_the_detector_and_unreadable_structure(tmp_path):
    with pytest.raises(InputError, match="no reflection"):
        Simulation(SimulationConfig.tiny(d_min=45.0))
    for text in ("nonsense", "data_x\n_cell.length_a 10\n"):
        (tmp_path / "model.cif").write_text(text)
        with pytest.raises(InputError, match="structure"):
            Simulation(SimulationConfig.tiny(structure=tmp_path / "model.cif"))
    with pytest.raises(InputError, match="structure"):
        Simulation(SimulationConfig.tiny(structure=tmp_path / "missing.pdb"))


@pytest.mark.dials
def test_dials_processes_the_images_alone(tmp_path):
    """Import, find spots, index, refine, integrate and scale with the images as the only input: the cell comes back."""
    config = SimulationConfig.demo(n_images=20, d_min=2.4)
    result = simulate(tmp_path, config)

    def dials(program, *arguments):
        done = subprocess.run([f"dials.{program}", *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
        return done.stdout

    dials("import", "images")
    dials("find_spots", "imported.expt", "nproc=1")
    # Fewer trial lattices to refine than by default: half the time.
    symbol = config.space_group.replace(" ", "")
    dials("index", "imported.expt", "strong.refl", f"space_group={symbol}", "basis_vector_combinations.max_refine=5")
    indexed = read_refl(tmp_path / "indexed.refl")
    assert np.mean(indexed["id"] >= 0) > 0.8
    dials("refine", "indexed.expt", "indexed.refl", "scan_varying=False")
    found = read_expt(tmp_path / "refined.expt")[0].crystal.cell.parameters
    np.testing.assert_allclose(found, config.cell, rtol=1e-3)
    dials("integrate", "refined.expt", "refined.refl", "nproc=1", f"prediction.d_min={config.d_min}")
    integrated = read_refl(tmp_path / "integrated.refl")
    assert np.mean((integrated["flags"] & 256) > 0) > 0.8
    dials("scale", "integrated.expt", "integrated.refl")
    scaled, truth = read_refl(tmp_path / "scaled.refl"), np.load(result.truth)
    strong = (scaled["intensity.scale.value"] > 20 * np.sqrt(scaled["intensity.scale.variance"])).nonzero()[0]
    apart = np.abs(scaled["xyzcal.px"][strong, None] - truth["xyz_px"])
    nearest = apart.sum(axis=2).argmin(axis=1)
    same = apart[np.arange(len(strong)), nearest].max(axis=1) < 0.5
    merged = scaled["intensity.scale.value"][strong] / scaled["inverse_scale_factor"][strong]
    assert same.mean() > 0.9
    assert np.corrcoef(np.log(merged[same]), np.log(truth["intensity"][nearest[same]]))[0, 1] > 0.99


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_what_they_say(name):
    """Few images of each: spots on the detector, of the widths, overlap and background that the preset is for."""
    corner = dict(n_images=2, image_size_px=(240, 240), beam_centre_px=(20, 20))
    simulation = Simulation(SimulationConfig.preset(name, **corner))
    truth = simulation.truth()
    assert len(truth["hkl"]) > 20
    width = np.sqrt(np.diagonal(truth["covariance"], axis1=1, axis2=2)).mean(axis=0)
    assert (width[0] < 0.7) == (name == "monoclinic") and (width[0] > 1.2) == (name in ("cubic", "overlap"))
    assert (np.median(truth["shared"]) > 0.2) == (name == "overlap")
    assert (truth["background"].mean() > 8) == (name == "ice")


def test_dose_multiplies_all_photons():
    full, weak = SimulationConfig.tiny(ice_ring_photons=4.0), SimulationConfig.tiny(ice_ring_photons=4.0).with_dose(0.1)
    strong, faint = Simulation(full), Simulation(weak)
    np.testing.assert_allclose(faint.background, 0.1 * strong.background)
    np.testing.assert_allclose(faint.truth()["photons"], 0.1 * strong.truth()["photons"])
    with pytest.raises(InputError, match="dose must be positive"):
        full.with_dose(0)
    with pytest.raises(InputError, match="preset must be one of demo, monoclinic"):
        SimulationConfig.preset("nothing")
