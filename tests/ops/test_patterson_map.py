"""patterson_map against its definition and the vectors between atoms, and what a user may hand it."""

import math

import gemmi
import pytest
import torch

from xtalfast import _native
from xtalfast.ops import density_map, patterson_map, structure_factors
from xtalfast.ops.patterson_map import patterson_map_reference, spectrum_intensity_reference
from xtalfast.testing import assert_within_twin_error

CELL = (9.0, 10.5, 12.0, 100.0, 110.0, 95.0)
CELLS = torch.tensor([CELL, (10.0, 11.0, 9.0, 90.0, 90.0, 90.0)], dtype=torch.float64)
shapes = pytest.mark.parametrize(
    "shape", [(20, 24, 24), (21, 25, 27), (20, 25, 26), (1, 1, 1), (2, 3, 2)], ids=lambda s: "x".join(map(str, s))
)


def random_maps(shape, n=2, dtype=torch.float64):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def inverted(maps):
    """The map at -u."""
    return maps.flip((1, 2, 3)).roll((1, 1, 1), (1, 2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("n_kept", [1, 7, 99])
@shapes
def test_matches_reference(shape, n_kept, dtype):
    """Also for intensities that are not those of a real map: the plane l = 0 need not be symmetric."""
    intensity = random_maps((*shape[:2], min(n_kept, shape[2] // 2 + 1)), dtype=dtype)
    ours = torch.ops.xtalfast.patterson_map(intensity, shape[2])
    exact = patterson_map_reference(intensity.double(), shape[2])
    assert_within_twin_error(ours, patterson_map_reference(intensity, shape[2]), exact, 2 * intensity.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("d_min", [1.5, 4.0, math.inf])
@pytest.mark.parametrize("f000", [True, False])
def test_intensities_match_reference(d_min, f000, dtype):
    spectrum = torch.fft.rfftn(random_maps((20, 25, 26), dtype=dtype), dim=(1, 2, 3))
    limit = math.inf if d_min == math.inf else (1 + 1e-9) / d_min**2
    for n_kept in (1, 5, 14):
        arguments = (CELLS, 26, 0.5, -1, limit, f000, n_kept)
        ours = torch.ops.xtalfast.spectrum_intensity(spectrum, *arguments)
        twin = spectrum_intensity_reference(spectrum, *arguments)
        exact = spectrum_intensity_reference(spectrum.to(torch.complex128), *arguments)
        assert_within_twin_error(ours, twin, exact, exact.max())
        assert torch.equal(ours == 0, twin == 0)


@shapes
def test_is_the_autocorrelation_of_the_density(shape):
    density = random_maps(shape)
    patterson = patterson_map(density, CELLS, f000=True)
    volume = torch.tensor([gemmi.UnitCell(*cell).volume for cell in CELLS.tolist()])
    for u in [(0, 0, 0), (1, 0, 0), (0, 2, 1), (3, -4, 5)]:
        at = tuple(i % n for i, n in zip(u, shape))
        wanted = (density * density.roll([-i for i in u], (1, 2, 3))).mean((1, 2, 3)) * volume
        assert torch.allclose(patterson[(slice(None), *at)], wanted)


@shapes
def test_inversion_symmetry_and_highest_point(shape):
    patterson = patterson_map(random_maps(shape), CELLS)
    assert torch.allclose(patterson, inverted(patterson), atol=1e-12)
    assert torch.equal(patterson.flatten(1).argmax(1), torch.zeros(2, dtype=torch.int64))


def test_peaks_at_every_vector_between_atoms():
    """Five heavy atoms in general positions: every one of the 20 vectors is a peak of about Z_i Z_j."""
    cells, grid = torch.tensor([[24.0, 26.0, 28.0, 95.0, 100.0, 105.0]]).double(), (72, 80, 84)
    fractional = torch.tensor(
        [[0, 0, 0], [0.11, 0.23, 0.37], [0.52, 0.13, 0.76], [0.31, 0.64, 0.17], [0.83, 0.41, 0.55]]
    )
    cell = gemmi.UnitCell(*cells[0].tolist())
    coords = torch.tensor([cell.orthogonalize(gemmi.Fractional(*f)).tolist() for f in fractional.tolist()])
    n = len(coords)
    density = density_map(
        coords.double(), torch.full((n,), 26), torch.full((n,), 10.0).double(), torch.ones(n).double(),
        torch.tensor([0, n]), cells, grid,
    )  # fmt: skip
    patterson = patterson_map(density, cells, d_min=1.0, f000=True)[0]
    neighbourhood = torch.nn.functional.pad(patterson[None, None], (2,) * 6, mode="circular")
    highest = torch.nn.functional.max_pool3d(neighbourhood, 5, stride=1)[0, 0]
    for i in range(n):
        for j in range(n):
            u = tuple(round(float(f) * size) % size for f, size in zip(fractional[j] - fractional[i], grid))
            window = [torch.arange(c - 1, c + 2) % size for c, size in zip(u, grid)]
            near = torch.meshgrid(*window, indexing="ij")
            assert bool((patterson[near] == highest[near]).any()), (i, j)
            if i != j:  # one vector here, five of the same weight at the origin
                assert 0.15 < float(patterson[near].max() / patterson[0, 0, 0]) < 0.25


def test_from_density_and_from_structure_factors():
    density = random_maps((20, 24, 27))
    from_density = patterson_map(density, CELLS, d_min=1.5)
    f = structure_factors(density, CELLS)
    assert torch.allclose(patterson_map(f, CELLS, d_min=1.5, n_z=27), from_density, atol=1e-10)
    turned = f * torch.exp(1j * random_maps(f.shape[1:]))  # phases do not matter
    assert torch.allclose(patterson_map(turned, CELLS, d_min=1.5, n_z=27), from_density, atol=1e-10)


def test_origin_removed_and_sharpened():
    atoms = 40
    generator = torch.Generator().manual_seed(2)
    fractional = torch.rand(atoms, 3, generator=generator, dtype=torch.float64)
    cell = gemmi.UnitCell(*CELL)
    coords = torch.tensor([cell.orthogonalize(gemmi.Fractional(*f)).tolist() for f in fractional.tolist()]).double()
    b_iso, occupancy = torch.full((atoms,), 30.0).double(), torch.ones(atoms).double()
    density = density_map(
        coords, torch.full((atoms,), 7), b_iso, occupancy, torch.tensor([0, atoms]), CELLS[:1], (24, 28, 32)
    )
    plain = patterson_map(density, CELLS[:1], d_min=1.5)[0]
    removed = patterson_map(density, CELLS[:1], d_min=1.5, remove_origin=True)[0]
    sharp = patterson_map(density, CELLS[:1], d_min=1.5, sharpen=True)[0]
    assert removed[0, 0, 0].abs() < 1e-12 * plain[0, 0, 0]
    assert removed[1, 0, 0].abs() < 0.2 * plain[1, 0, 0]  # not the point alone, the peak
    assert torch.isclose(sharp[0, 0, 0], plain[0, 0, 0])  # the same sum of intensities
    assert sharp[1, 0, 0] / sharp[0, 0, 0] < plain[1, 0, 0] / plain[0, 0, 0]  # a narrower peak
    both = patterson_map(density, CELLS[:1], d_min=1.5, sharpen=True, remove_origin=True)[0]
    assert both[0, 0, 0].abs() < 1e-12 * sharp[0, 0, 0]
    nothing = patterson_map(density * 0, CELLS[:1], d_min=1.5, sharpen=True, remove_origin=True)
    assert not nothing.any()


def test_lists_are_batches_of_one():
    grids = [(20, 24, 24), (21, 25, 27), (20, 24, 24)]
    cells = torch.stack([CELLS[0], CELLS[1], CELLS[1]])
    maps = [random_maps(grid, 1)[0] * (i + 1) for i, grid in enumerate(grids)]
    for i, one in enumerate(patterson_map(maps, cells, d_min=1.6)):
        assert torch.allclose(one, patterson_map(maps[i][None], cells[i : i + 1], d_min=1.6)[0], rtol=1e-10)
    assert patterson_map([], cells[:0]) == []
    assert patterson_map(torch.zeros(0, 4, 5, 6), cells[:0]).shape == (0, 4, 5, 6)


@pytest.mark.parametrize("n_z", [6, 7])
@pytest.mark.parametrize("d_min", [None, 2.5])
def test_gradcheck(n_z, d_min):
    cells = torch.tensor([[4.0, 5.0, 6.0, 100.0, 95.0, 105.0]]).double()
    density = random_maps((5, 5, n_z), 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: patterson_map(m, cells, d_min=d_min), density)
    f = torch.rand(1, 5, 5, n_z // 2 + 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: patterson_map(torch.view_as_complex(f), cells, d_min=d_min, n_z=n_z), f)


def test_opcheck():
    spectrum = torch.rand(2, 4, 5, 4, dtype=torch.complex128, requires_grad=True)
    torch.library.opcheck(torch.ops.xtalfast.spectrum_intensity.default, (spectrum, CELLS, 6, 0.5, 1, 0.3, False, 3))
    intensity = torch.rand(2, 4, 5, 4, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.xtalfast.patterson_map.default, (intensity, 6))


def test_compiles_without_a_break():
    density = random_maps((20, 24, 26), dtype=torch.float32)
    function = torch.compile(lambda m: patterson_map(m, CELLS, d_min=1.6), fullgraph=True, backend="aot_eager")
    assert torch.allclose(function(density), patterson_map(density, CELLS, d_min=1.6), rtol=1e-4, atol=1e-4)


def test_works_without_the_extension(monkeypatch):
    density = random_maps((20, 25, 26))
    ours = patterson_map(density, CELLS, d_min=1.6)
    monkeypatch.setattr(_native, "C", None)
    assert torch.allclose(patterson_map(density, CELLS, d_min=1.6), ours, atol=1e-12)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m: patterson_map(m.int(), CELLS), TypeError, "density_or_f must be torch.float32 or torch.float64"),
        (lambda m: patterson_map(m[0], CELLS), ValueError, r"density_or_f must be \[B, X, Y, Z\]"),
        (lambda m: patterson_map(m, CELLS[:1]), ValueError, r"cells must be \[B, 6\] with B=2"),
        (lambda m: patterson_map(m, CELLS, d_min=0.5), ValueError, r"grid must be at least \[41, 45, 49\]"),
        (lambda m: patterson_map(m + 0j, CELLS, n_z=9), ValueError, "n_z must be 50 or 51, got 9"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(random_maps((20, 24, 26)))
