"""Structure factors against direct summation, maps against structure factors, and what a user may hand them."""

import math

import gemmi
import numpy as np
import pytest
import torch

from xtalfast import _native
from xtalfast.ops import (
    density_map,
    limit_resolution,
    map_from_structure_factors,
    patterson_map,
    structure_factors,
)
from xtalfast.ops._cells import volumes
from xtalfast.ops.structure_factors import filter_spectrum_reference, inverse_d2
from xtalfast.testing import assert_within_twin_error

CELL = (9.0, 10.5, 12.0, 100.0, 110.0, 95.0)
CELLS = torch.tensor([CELL, (10.0, 11.0, 9.0, 90.0, 90.0, 90.0)], dtype=torch.float64)
SHAPES = [(20, 24, 24), (21, 25, 27), (20, 25, 26), (21, 24, 25)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


def random_maps(shape, n=2, dtype=torch.float64):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def make_atoms(n=30, b=20.0):
    rng = np.random.default_rng(1)
    cell = gemmi.UnitCell(*CELL)
    coords = [cell.orthogonalize(gemmi.Fractional(*rng.uniform(0, 1, 3))).tolist() for _ in range(n)]
    return torch.tensor(coords).double(), torch.tensor(rng.choice([6, 7, 8], n)), torch.full((n,), b).double()


def map_of(coords, element, b_iso, grid=(20, 24, 26), blur=0.0):
    ptr = torch.tensor([0, len(coords)])
    return density_map(coords, element, b_iso, torch.ones_like(b_iso), ptr, CELLS[:1], grid, cutoff=1e-7, blur=blur)


def direct_sum(coords, element, b_iso, d_min):
    """Indices [N, 3] to d_min and F(h) = sum f exp(-B s^2 / 4) exp(+2 pi i h.x), from gemmi's form factors."""
    cell = gemmi.UnitCell(*CELL)
    hkl = gemmi.make_miller_array(cell, gemmi.SpaceGroup("P 1"), d_min)
    s2 = cell.calculate_1_d2_array(hkl)
    x = np.array([cell.fractionalize(gemmi.Position(*xyz)).tolist() for xyz in coords.tolist()])
    f = np.array([[gemmi.Element(z).it92.calculate_sf(v / 4) for z in element.tolist()] for v in s2])
    f *= np.exp(-b_iso.numpy() * s2[:, None] / 4)
    return hkl, (f * np.exp(2j * np.pi * hkl @ x.T)).sum(1)


def entries(f, hkl):
    """Structure factors of one half spectrum at any indices."""
    lower = hkl[:, 2] < 0
    h, k, l = np.where(lower[:, None], -hkl, hkl).T
    values = f[h, k, l].numpy()
    return np.where(lower, values.conj(), values)


@pytest.mark.parametrize("blur", [0.0, 15.0])
def test_match_direct_summation(blur):
    atoms = make_atoms()
    hkl, wanted = direct_sum(*atoms, d_min=1.5)
    f = structure_factors(map_of(*atoms, blur=blur), CELLS[:1], d_min=1.5, blur=blur)[0]
    got = entries(f, hkl)
    assert np.abs(got - wanted).sum() / np.abs(wanted).sum() < 1e-4
    assert int((f != 0).sum()) == len(hkl) + 1 + int((hkl[:, 2] == 0).sum())  # F000 and both halves of the plane l = 0


def test_atoms_moved_by_t_turn_phases_by_h_t():
    coords, element, b_iso = make_atoms()
    t = np.array([0.13, -0.27, 0.31])
    shift = torch.tensor(gemmi.UnitCell(*CELL).orthogonalize(gemmi.Fractional(*t)).tolist())
    hkl = gemmi.make_miller_array(gemmi.UnitCell(*CELL), gemmi.SpaceGroup("P 1"), 1.5)
    before = entries(structure_factors(map_of(coords, element, b_iso), CELLS[:1], d_min=1.5)[0], hkl)
    after = entries(structure_factors(map_of(coords + shift, element, b_iso), CELLS[:1], d_min=1.5)[0], hkl)
    difference = after - before * np.exp(2j * np.pi * hkl @ t)
    assert np.abs(difference).sum() / np.abs(before).sum() < 1e-4


def test_rolling_a_map_is_a_phase_ramp():
    density = random_maps((20, 24, 26))
    f, rolled = structure_factors(density, CELLS), structure_factors(density.roll((3, -4, 5), (1, 2, 3)), CELLS)
    h, k, l = (torch.fft.fftfreq(n, 1 / n) for n in (20, 24, 26))
    ramp = h[:, None, None] * 3 / 20 - k[:, None] * 4 / 24 + l[:14] * 5 / 26
    assert torch.allclose(rolled, f * torch.exp(2j * math.pi * ramp), atol=1e-10)


@shapes
def test_map_and_back(shape):
    density = random_maps(shape)
    f = structure_factors(density, CELLS)
    assert torch.allclose(map_from_structure_factors(f, CELLS, n_z=shape[2]), density, atol=1e-13)
    volume = torch.tensor([gemmi.UnitCell(*cell).volume for cell in CELLS.tolist()])
    assert torch.allclose(f[:, 0, 0, 0].real, density.mean((1, 2, 3)) * volume)


@shapes
def test_parseval(shape):
    density = random_maps(shape)
    f = structure_factors(density, CELLS)
    weight = torch.full((shape[2] // 2 + 1,), 2.0)
    weight[0] = 1
    weight[-1] = 2 if shape[2] % 2 else 1
    volume = torch.tensor([gemmi.UnitCell(*cell).volume for cell in CELLS.tolist()])
    assert torch.allclose((f.abs() ** 2 * weight).sum((1, 2, 3)) / volume, (density**2).mean((1, 2, 3)) * volume)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("f000", [True, False])
@pytest.mark.parametrize("blur", [0.0, 3.0])
@pytest.mark.parametrize("d_min", [1.3, 2.0, 30.0, math.inf])
@shapes
def test_filter_matches_reference(shape, d_min, blur, f000, dtype):
    spectrum = torch.fft.rfftn(random_maps(shape, dtype=dtype), dim=(1, 2, 3))
    limit = math.inf if d_min == math.inf else (1 + 1e-9) / d_min**2
    arguments = (CELLS, shape[2], 0.25, 1, limit, f000, blur)
    ours = torch.ops.xtalfast.filter_spectrum(spectrum, *arguments)
    twin = filter_spectrum_reference(spectrum, *arguments)
    exact = filter_spectrum_reference(spectrum.to(torch.complex128), *arguments)
    # Scale, s^2, exponential and product are rounded, in another order; an error of the exponent counts as often as the
    # exponent is large.
    exponent = blur / 4 * float(inverse_d2(CELLS, *shape).max())
    terms = (4 + exponent) * exact.abs().max()
    assert_within_twin_error(*(torch.view_as_real(v.resolve_conj()) for v in (ours, twin, exact)), terms)
    assert torch.equal(ours == 0, twin == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("d_min", [None, 1.3, 4.0, 30.0])
@pytest.mark.parametrize(
    "shape",
    [(20, 24, 24), (21, 25, 26), (36, 40, 52), (14, 22, 38), (17, 34, 20), (1, 1, 2), (2, 3, 2), (5, 1, 8), (9, 8, 6)],
    ids=lambda s: "x".join(map(str, s)),
)
def test_compiled_transforms_are_those_of_torch(shape, d_min, dtype):
    """There and back, and the Patterson map, against torch.fft, which runs where a gradient is wanted."""
    if d_min is not None and any(2 * int(a / d_min) + 1 > n for a, n in zip(CELLS[:, :3].max(0).values, shape)):
        d_min = 30.0
    density = random_maps(shape, dtype=dtype)
    exact = density.double().clone().requires_grad_()
    twin = density.clone().requires_grad_()
    options = {"d_min": d_min, "f000": d_min == 4.0, "blur": 2.0 if d_min == 1.3 else 0.0}

    def compare(ours, twin, exact, terms):
        if exact.is_complex():
            ours, twin, exact = (torch.view_as_real(v.detach().resolve_conj()) for v in (ours, twin, exact))
        assert_within_twin_error(ours, twin.detach(), exact.detach(), terms)

    f, f_twin, f_exact = (structure_factors(v, CELLS, **options) for v in (density, twin, exact))
    assert f_twin.requires_grad and not f.requires_grad
    # The terms of F(h) add up to the electrons of the cell; a pass of a transform rounds, and so does the filter.
    electrons = (density.double().mean((1, 2, 3)) * volumes(CELLS)).max()
    compare(f, f_twin, f_exact, 8 * electrons * (2 if options["blur"] else 1))
    maps = [map_from_structure_factors(v, CELLS) for v in (f, f_exact.to(f.dtype), f_exact)]
    compare(*maps, 8 * (2 * f_exact.detach().abs().sum((1, 2, 3)) / volumes(CELLS)).max())  # with Friedel mates
    pattersons = [patterson_map(v, CELLS, d_min=d_min) for v in (density, twin, exact)]
    compare(*pattersons, 8 * pattersons[2].detach().abs().max())


@pytest.mark.parametrize("n", [(23, 24, 24), (24, 29, 24), (24, 24, 46), (24, 24, 25)], ids=str)
def test_awkward_sizes_are_left_to_torch(n):
    assert _native.C is None or not _native.C.can_transform(n)
    density = random_maps(n)
    expected = torch.fft.rfftn(density, dim=(1, 2, 3)).conj() / density[0].numel()
    volume = torch.tensor([gemmi.UnitCell(*cell).volume for cell in CELLS.tolist()]).view(-1, 1, 1, 1)
    assert torch.allclose(structure_factors(density, CELLS), expected * volume)


def test_limit_resolution_keeps_the_sphere_and_nothing_else():
    density = random_maps((20, 24, 26))
    once = limit_resolution(density, CELLS, 1.6)
    assert torch.allclose(limit_resolution(once, CELLS, 1.6), once, atol=1e-13)
    assert once.mean((1, 2, 3)).abs().max() < 1e-14
    with_f000 = limit_resolution(density, CELLS, 1.6, f000=True)
    assert torch.allclose(with_f000.mean((1, 2, 3)), density.mean((1, 2, 3)))
    cell = gemmi.UnitCell(*CELL)
    f = structure_factors(once, CELLS)[0]
    hkl = gemmi.make_miller_array(cell, gemmi.SpaceGroup("P 1"), 1.3)
    inside = cell.calculate_d_array(hkl) >= 1.6
    assert np.allclose(entries(f, hkl[~inside]), 0, atol=1e-12)
    assert np.allclose(entries(f, hkl[inside]), entries(structure_factors(density, CELLS)[0], hkl[inside]))


def test_a_reflection_at_d_min_is_inside():
    cells = torch.tensor([[15.0, 15.0, 15.0, 90, 90, 90]])
    f = structure_factors(random_maps((32, 32, 32), 1), cells, d_min=1.5)[0]
    assert f[10, 0, 0] != 0 and f[0, -10, 0] != 0 and f[0, 0, 10] != 0 and f[6, 8, 0] != 0
    assert f[11, 0, 0] == 0 and f[0, 0, 11] == 0


def test_lists_are_batches_of_one():
    grids = [(20, 24, 24), (21, 25, 27), (20, 24, 24)]
    cells = torch.stack([CELLS[0], CELLS[1], CELLS[1]])
    maps = [random_maps(grid, 1)[0] * (i + 1) for i, grid in enumerate(grids)]
    limited = limit_resolution(maps, cells, 1.6)
    assert isinstance(limited, list)
    for i, one in enumerate(limited):
        assert torch.allclose(one, limit_resolution(maps[i][None], cells[i : i + 1], 1.6)[0], atol=1e-14)
    assert structure_factors([], cells[:0]) == []
    assert structure_factors(torch.zeros(0, 4, 5, 6), cells[:0]).shape == (0, 4, 5, 4)


def test_gradients():
    density = random_maps((4, 5, 6), 1).requires_grad_()
    cells = torch.tensor([[4.0, 5.0, 6.0, 100.0, 95.0, 105.0]]).double()

    def there(density):
        return torch.view_as_real(structure_factors(density, cells, d_min=2.5, blur=3.0))

    def back(f):
        return map_from_structure_factors(torch.view_as_complex(f), cells)

    assert torch.autograd.gradcheck(there, density)
    assert torch.autograd.gradcheck(back, torch.rand(1, 4, 5, 4, 2, dtype=torch.float64, requires_grad=True))


def test_opcheck():
    spectrum = torch.rand(2, 4, 5, 4, dtype=torch.complex128, requires_grad=True)
    arguments = (spectrum, CELLS, 6, 0.5, 1, 0.3, False, 2.0)
    torch.library.opcheck(torch.ops.xtalfast.filter_spectrum.default, arguments)


def test_compiles_without_a_break():
    density = random_maps((20, 24, 26), dtype=torch.float32)
    function = torch.compile(lambda m: limit_resolution(m, CELLS, 1.6), fullgraph=True, backend="aot_eager")
    assert torch.allclose(function(density), limit_resolution(density, CELLS, 1.6), atol=1e-6)


def test_works_without_the_extension(monkeypatch):
    density = random_maps((20, 24, 26))
    ours = limit_resolution(density, CELLS, 1.6, blur=5.0)
    monkeypatch.setattr(_native, "C", None)
    assert torch.allclose(limit_resolution(density, CELLS, 1.6, blur=5.0), ours, atol=1e-12)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m: structure_factors(m.int(), CELLS), TypeError, "density must be torch.float32 or torch.float64"),
        (lambda m: structure_factors(m[0], CELLS), ValueError, r"density must be \[B, X, Y, Z\]"),
        (lambda m: structure_factors(m, CELLS[:1]), ValueError, r"cells must be \[B, 6\] with B=2"),
        (lambda m: structure_factors(m, CELLS, d_min=-1.0), ValueError, "d_min must be positive"),
        (lambda m: limit_resolution(m, CELLS, 0.5), ValueError, r"grid must be at least \[41, 45, 49\] for d_min=0.5"),
        (lambda m: map_from_structure_factors(m, CELLS), TypeError, "f must be torch.complex64"),
        (lambda m: map_from_structure_factors(m + 0j, CELLS, n_z=9), ValueError, "n_z must be 50 or 51, got 9"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(random_maps((20, 24, 26)))
