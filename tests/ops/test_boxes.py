"""What the ops on shoeboxes share: compiling and exporting, every instruction set, bad input, sizes beyond 2^31."""

import mmap
from importlib import import_module

import numpy as np
import pytest
import torch

from xtalfast import _native
from xtalfast.ops import (
    MVNProfile,
    SoftmaxProfile,
    extract_shoeboxes,
    intensity_posterior,
    poisson_gamma_elbo,
    profile_fit,
)

PRIORS = ((1.0, 0.01), (1.0, 0.5))


def boxes(n, pixels=27, seed=0):
    """Counts int32, bool mask and float32 profile [n, pixels]."""
    generator = torch.Generator().manual_seed(seed)
    profile = torch.softmax(torch.randn(n, pixels, generator=generator), 1)
    counts = torch.poisson(50 * profile + 1, generator=generator).to(torch.int32)
    return counts, torch.rand(n, pixels, generator=generator) < 0.9, profile


def elbo(counts, mask, profile, ptr=None, **options):
    shape = 2 + 0.5 * torch.arange(counts.shape[0] if ptr is None else ptr.shape[0] - 1)
    return (
        poisson_gamma_elbo(counts, mask, profile, (shape, 0.1 * shape), (shape, shape), *PRIORS, ptr=ptr, **options),
    )


def posterior(counts, mask, profile, ptr=None):
    found = intensity_posterior(counts, mask, profile, *PRIORS, ptr=ptr)
    return found.mean_i, found.var_i, found.mean_bg, found.var_bg, found.log_evidence


def fit(counts, mask, profile, ptr=None):
    found = profile_fit(counts, mask, profile, at=(50.0, 1.0), ptr=ptr)
    return found.i, found.var_i, found.bg, found.cov_i_bg, found.correlation


def ml(counts, mask, profile, ptr=None):
    found = profile_fit(counts, mask, profile, method="ml", ptr=ptr)
    return found.i, found.var_i, found.bg, found.cov_i_bg, found.iterations


OPS = {"elbo": elbo, "posterior": posterior, "fit": fit, "ml": ml}


@pytest.fixture(params=OPS)
def op(request):
    return OPS[request.param]


def test_one_graph_serves_every_number_of_boxes(op):
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 9):
        for found, wanted in zip(compiled(*boxes(n)), op(*boxes(n))):
            torch.testing.assert_close(found, wanted)


def test_gradients_through_one_graph():
    torch._dynamo.reset()

    def loss(logits, counts):
        return elbo(counts, None, SoftmaxProfile(logits))[0].sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 9):
        counts, _, profile = boxes(n)
        logits = profile.log().requires_grad_()
        (wanted,) = torch.autograd.grad(loss(logits, counts), logits)
        (found,) = torch.autograd.grad(compiled(logits, counts), logits)
        torch.testing.assert_close(found, wanted)


def test_exported_program_serves_every_number_of_boxes(op):
    class Program(torch.nn.Module):
        def forward(self, counts, mask, profile):
            return op(counts, mask, profile)

    n = torch.export.Dim("n", min=2)
    program = torch.export.export(Program(), boxes(5), dynamic_shapes=({0: n},) * 3).module()
    for found, wanted in zip(program(*boxes(9)), op(*boxes(9))):
        torch.testing.assert_close(found, wanted)


def test_exported_extraction():
    class Program(torch.nn.Module):
        def forward(self, images, bbox):
            return extract_shoeboxes(images, bbox, box=(2, 3, 4)).counts.int()

    images = torch.arange(4 * 9 * 11, dtype=torch.int32).reshape(4, 9, 11)
    bbox = torch.tensor([[1, 5, 2, 5, 1, 3], [-1, 3, 7, 10, 0, 2], [0, 4, 0, 3, 2, 4]], dtype=torch.int32)
    program = torch.export.export(Program(), (images, bbox), dynamic_shapes=(None, {0: torch.export.Dim("n", min=2)}))
    assert torch.equal(program.module()(images, bbox[:2]), extract_shoeboxes(images, bbox[:2]).counts.int())


@pytest.mark.skipif(_native.C is None, reason="the extension is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_gives_the_definition(op, isa, dtype, monkeypatch):
    """All tails of vectors, masked pixels, and boxes that are dark or bright."""
    monkeypatch.setenv("XTALFAST_SIMD", isa)
    assert _native.C.isa() in ("portable", "avx2", "avx512")[: 1 + ["portable", "avx2", "avx512"].index(isa)]
    parts = [boxes(1, pixels, seed=pixels) for pixels in (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 64, 150)]
    counts, mask, profile = (torch.cat([part[k].reshape(-1) for part in parts]) for k in range(3))
    counts[50:90] = 0
    counts[-1] = 2**20
    ptr = torch.tensor([0, *(part[0].numel() for part in parts)]).cumsum(0)
    found = op(counts, mask, profile.to(dtype), ptr=ptr)
    with monkeypatch.context() as patch:
        patch.setattr(_native, "C", None)
        wanted = op(counts, mask, profile.to(torch.float64), ptr=ptr)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    for one, exact in zip(found, wanted):
        if exact.dtype == torch.int64:
            assert (one - exact).abs().max() <= 2  # iterations to the same maximum
        else:
            torch.testing.assert_close(one.double(), exact.double(), rtol=tolerance, atol=tolerance)


def test_an_instruction_set_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setenv("XTALFAST_SIMD", "sse9")
    with pytest.raises(ValueError, match="XTALFAST_SIMD must be portable, avx2 or avx512, got sse9"):
        profile_fit(*boxes(1), at=(1.0, 1.0))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.int32, torch.int64, torch.float32])
def test_every_type_of_counts_and_strides_give_the_same(op, dtype):
    counts, mask, profile = boxes(4)
    wanted = op(counts, mask, profile)
    wide = torch.stack([counts, counts], 2).flatten(1)[:, ::2].to(dtype)  # every other element
    strided = (wide, mask.T.contiguous().T, profile.T.contiguous().T)
    assert not any(t.is_contiguous() for t in strided[1:])
    for found, one in zip(op(*strided), wanted):
        torch.testing.assert_close(found, one)


def test_counts_beyond_32_bits_are_taken_as_they_are(op):
    counts, mask, profile = boxes(2)
    large = counts.to(torch.int64)
    large[0, 3] = 2**40
    for found, wanted in zip(op(large, mask, profile.double()), op(large.double(), mask, profile.double())):
        torch.testing.assert_close(found, wanted)
        assert bool(torch.isfinite(found.double()).all())


@pytest.mark.parametrize("shape", [(0, 9), (3, 0), (0, 0)], ids=str)
def test_nothing_at_all(op, shape):
    counts, profile = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape)
    for value in op(counts, torch.zeros(shape, dtype=torch.bool), profile):
        assert value.shape == shape[:1]
        assert not bool(torch.isnan(value.double()).any())


def test_masked_boxes_may_hold_anything(op):
    counts, mask, profile = boxes(3)
    counts, mask = counts.float(), mask.clone()
    mask[1] = False
    spoiled = counts.clone()
    spoiled[1], spoiled[2, ~mask[2]] = float("nan"), -1e30
    for found, wanted in zip(op(spoiled, mask, profile), op(counts, mask, profile)):
        torch.testing.assert_close(found, wanted)


C, M, P = boxes(3)
BAD = {
    "counts complex": ({"counts": C + 0j}, TypeError, "counts must be an integer or floating tensor"),
    "counts bool": ({"counts": C > 1}, TypeError, "counts must be an integer or floating tensor"),
    "counts flat": ({"counts": C.flatten()}, ValueError, r"counts must be \[N, P\]"),
    "mask float": ({"mask": M.float()}, TypeError, "mask must be bool, or integer DIALS mask bits"),
    "mask shape": ({"mask": M[:, :5]}, ValueError, "mask must have the shape of counts"),
    "mask device": ({"mask": M.to("meta")}, ValueError, "mask is on meta, counts on cpu"),
    "profile integer": ({"profile": C}, TypeError, "profile must be a floating tensor"),
    "profile shape": ({"profile": P[:2]}, ValueError, "profile must be"),
    "profile device": ({"profile": P.to("meta")}, ValueError, "profile is on meta, counts on cpu"),
    "profile negative": ({"profile": P - 1}, ValueError, "profile must be finite and not negative"),
    "profile nan": ({"profile": P / 0 * 0}, ValueError, "profile must be finite and not negative"),
    "profile kind": ({"profile": [1.0]}, TypeError, "profile must be a tensor, SoftmaxProfile, MVNProfile"),
    "profile pieces": (
        {"profile": MVNProfile(torch.zeros(2, 3), torch.eye(3).expand(2, 3, 3), torch.zeros(27, 3))},
        ValueError,
        "profile.mean must be",
    ),
    "ptr type": ({"counts": C.flatten(), "ptr": torch.tensor([0, 81]).int()}, ValueError, "ptr must be int64"),
    "ptr end": (
        {
            "counts": C.flatten(),
            "mask": M.flatten(),
            "profile": P.flatten(),
            "ptr": torch.tensor([0, 27, 54, 82]),
        },
        ValueError,
        "ptr must rise from 0 to M=81, got 0 to 82",
    ),
    "ptr falls": (
        {
            "counts": C.flatten(),
            "mask": M.flatten(),
            "profile": P.flatten(),
            "ptr": torch.tensor([0, 54, 27, 81]),
        },
        ValueError,
        "ptr must rise",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_says_what_was_wanted(op, case):
    change, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        op(**{"counts": C, "mask": M, "profile": P, **change})


@pytest.mark.parametrize("background", [torch.tensor([-1.0] * 27), torch.full((3, 27), float("nan"))])
def test_bad_background(background):
    with pytest.raises(ValueError, match="background must be finite and not negative"):
        profile_fit(C, M, P, at=(1.0, 1.0), background=background)


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_counts_that_are_no_photons_are_refused_where_they_are_used(value):
    counts = C.float()
    counts[M & (counts > 0)] = value
    for function in (posterior, ml):
        with pytest.raises(ValueError, match="counts of used pixels must not be negative or NaN"):
            function(counts, M, P)


@pytest.mark.parametrize("prior", [(0.0, 1.0), (-1.0, 1.0), (1.0, -0.1), (float("nan"), 1.0)])
def test_bad_prior(prior):
    with pytest.raises(ValueError, match="prior_i must have shape > 0 and rate >= 0"):
        intensity_posterior(C, M, P, prior, PRIORS[1])


@pytest.mark.parametrize("at", [(float("nan"), 1.0), (1.0, torch.tensor([1.0, float("inf"), 1.0]))])
def test_a_reference_must_be_finite(at):
    with pytest.raises(ValueError, match=r"at must be finite, got [IB]_ref = (nan|inf)"):
        profile_fit(C, M, P, at=at)


@pytest.mark.parametrize("method", ["linear", "ml"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_one_pixel_does_not_tell_a_spot_from_background(dtype, method):
    """Rounding in single precision must not make the two equations solvable."""
    n = 500
    profile = torch.rand(n, 1, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = profile_fit(torch.full((n, 1), 7), None, profile, at=(33.3, 0.7), background=profile + 0.3, method=method)
    assert not bool(found.converged.any()) and bool(torch.isinf(found.var_i).all())


def test_a_box_too_large_for_memory_is_refused(op):
    shape = (1, (1 << 24) + 1)
    with pytest.raises(ValueError, match="a box must hold at most 16777216 pixels, got one of 16777217"):
        op(torch.zeros(1, 1).expand(shape), None, torch.zeros(1, 1).expand(shape))


def untouched(n, dtype):
    """Zeros of which memory holds only what is written."""
    no_reserve = 0x4000
    pages = mmap.mmap(-1, n * dtype().itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return torch.from_numpy(np.frombuffer(pages, dtype))


def test_boxes_beyond_two_to_the_31_pixels(op, monkeypatch):
    """Offsets into 12 GB of which a few pages are touched; the rows before them are left out."""
    counts, mask, profile = boxes(3)
    first = 2**31 + 11
    size = first + counts.numel()
    ragged = untouched(size, np.uint8), untouched(size, np.uint8), untouched(size, np.float32)
    for large, small in zip(ragged, (counts, mask, profile)):
        large[first:] = small.flatten().to(large.dtype)
    # bits of DIALS: a used pixel is Valid
    for name in ("poisson_gamma_elbo", "intensity_posterior", "profile_fit"):
        module = import_module(f"xtalfast.ops.{name}")
        monkeypatch.setattr(module, "check_boxes", lambda *arguments: 3)  # it wants rows from 0 on
    ptr = first + 27 * torch.arange(4)
    for found, wanted in zip(op(*ragged, ptr=ptr), op(counts, mask, profile)):
        torch.testing.assert_close(found, wanted)


def test_images_beyond_two_to_the_31_pixels():
    images = untouched(9 * 16384 * 16384, np.uint16).view(9, 16384, 16384)
    images[8, -3:, -4:] = torch.arange(1, 13).reshape(3, 4).to(torch.uint16)
    bbox = torch.tensor([[16380, 16384, 16381, 16384, 8, 9], [16381, 16385, 16381, 16384, 8, 9]], dtype=torch.int32)
    counts, mask, _ = extract_shoeboxes(images, bbox)
    assert counts.int().tolist() == [*range(1, 13), 2, 3, 4, 0, 6, 7, 8, 0, 10, 11, 12, 0]
    assert mask.tolist() == [1] * 12 + [1, 1, 1, 0] * 3
