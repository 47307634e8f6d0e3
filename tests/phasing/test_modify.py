"""Density modification: it improves phases, it is differentiable, it refuses bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xtalfast.errors import InputError
from xtalfast.phasing import ModifyOptions, density_modify
from xtalfast.phasing.data import measured
from xtalfast.phasing.histogram import match_histogram, reference_quantiles
from xtalfast.phasing.modify import modify_spectrum, modify_weighted
from xtalfast.phasing.weights import concentration, figure_of_merit, phase_concentration, shell_numbers


def error(F, truth) -> float:
    return float(np.degrees(abs(np.angle(F * truth.conj()))).mean())


@pytest.mark.parametrize(
    "space_group, cell", [("P 1", None), ("P 21 21 21", (19, 23, 27, 90, 90, 90))], ids=["P1", "P212121"]
)
def test_random_errors_shrink(make_crystal, space_group, cell):
    crystal = make_crystal(0, space_group, cell, n_atoms=40, solvent=0.75)
    noise = np.radians(50) * np.random.default_rng(0).standard_normal(len(crystal.F))
    centric = crystal.space_group.operations().centric_flag_array(crystal.hkl.astype(np.int32))
    start = crystal.F * np.exp(1j * np.where(centric, 0, noise))
    found = density_modify(
        abs(crystal.F),
        np.degrees(np.angle(start)),
        crystal.hkl,
        crystal.cell,
        space_group,
        options=ModifyOptions(cycles=20),
    )
    assert error(found.F, crystal.F) < 0.6 * error(start, crystal.F)
    np.testing.assert_allclose(abs(found.F), abs(crystal.F), rtol=1e-12)
    assert ((found.fom >= 0) & (found.fom <= 1)).all()


def test_weights_help_where_solvent_is_not_empty(make_fragment):
    """Bulk solvent takes away most of the low resolution: full amplitudes on an empty solvent then mislead."""
    crystal = make_fragment(1)
    s2 = crystal.cell.calculate_1_d2_array(crystal.hkl.astype(np.int32))
    truth = crystal.F * (1 - 0.8 * np.exp(-46 / 4 * s2))  # Babinet
    spread = np.radians(60) * np.sqrt(np.pi / 2)
    mean_cos = np.exp(-(spread**2) / 2)
    start = truth * np.exp(1j * spread * np.random.default_rng(0).standard_normal(len(truth)))
    weighted, imposed = (
        density_modify(
            abs(truth),
            np.degrees(np.angle(start)),
            crystal.hkl,
            crystal.cell,
            fom=np.full(len(truth), mean_cos),
            solvent=0.6,
            options=ModifyOptions(scheme=scheme),
        )
        for scheme in ("weighted", "imposed")
    )
    assert error(weighted.F, truth) < 0.5 * error(start, truth)
    assert error(weighted.F, truth) < error(imposed.F, truth) - 5
    assert abs(weighted.fom.mean() - np.cos(np.angle(weighted.F * truth.conj())).mean()) < 0.15


@pytest.mark.parametrize("scheme", ["imposed", "weighted"])
def test_gradient(make_crystal, scheme):
    """Derivative of a loss through three cycles against a finite difference along it; the mask is held constant."""
    crystal = make_crystal(1, n_atoms=20, d_min=3.0)
    data = measured(abs(crystal.F), crystal.hkl, crystal.cell, "P 1", None)
    amplitudes = data.amplitudes(data.grid(3.0, 2.5))
    amplitudes.values = amplitudes.values.double()
    noise = np.random.default_rng(0).standard_normal(len(data.hkl))
    phases = torch.from_numpy(np.angle(crystal.F) + 0.5 * noise).requires_grad_()
    target, _ = amplitudes.grid.scatter(crystal.hkl, torch.from_numpy(crystal.F))
    options = ModifyOptions(cycles=3, weighted_cycles=3, histogram=0)
    fom, centric = torch.full_like(amplitudes.values, 0.8), torch.zeros_like(amplitudes.bound)

    def loss(angles: torch.Tensor) -> torch.Tensor:
        F = torch.polar(torch.from_numpy(data.F), angles)
        spectrum, _ = amplitudes.grid.scatter(data.hkl, F)
        if scheme == "imposed":
            final, _ = modify_spectrum(spectrum[None], amplitudes, torch.tensor([0.6]), options)
        else:
            final, _, merit = modify_weighted(
                spectrum[None], amplitudes, torch.tensor([0.6]), options, fom=fom, centric=centric
            )
            final = final * merit
        return (final[0] * target.conj()).real.sum()

    (gradient,) = torch.autograd.grad(loss(phases), phases)
    assert float(gradient.norm()) > 0
    step = 1e-6 * gradient / gradient.norm()
    with torch.no_grad():
        numerical = (loss(phases + step) - loss(phases - step)) / (2 * step.norm())
    torch.testing.assert_close(numerical, gradient.norm(), rtol=1e-3, atol=0)


def test_figures_of_merit_and_concentrations_are_inverse():
    fom = torch.linspace(0, 0.99, 50, dtype=torch.float64).repeat(2, 1)
    centric = torch.tensor([[False], [True]]).expand_as(fom)
    torch.testing.assert_close(figure_of_merit(concentration(fom, centric), centric), fom, rtol=0, atol=1e-6)


def test_phase_concentration_is_that_of_the_errors():
    """Structure factors with a known correlation: the mean figure of merit is the mean cosine of the phase errors."""
    generator = torch.Generator().manual_seed(0)
    first, other = (torch.randn(20_000, dtype=torch.complex128, generator=generator) for _ in range(2))
    s2, used = torch.rand(20_000, generator=generator), torch.ones(20_000, dtype=torch.bool)
    shells = shell_numbers(s2, used)
    assert torch.bincount(shells).min() > 900
    never = torch.zeros_like(used)
    for sigma_a in (0.3, 0.6, 0.9):
        second = sigma_a * first + (1 - sigma_a**2) ** 0.5 * other
        x = phase_concentration(first.abs(), 7 * second.abs()[None], torch.ones_like(s2).double(), shells, never)
        cosine = (first * second.conj()).angle().cos().mean()
        torch.testing.assert_close(figure_of_merit(x, never).mean(), cosine, rtol=0, atol=0.03)


def test_histogram_gives_the_distribution_asked_for():
    maps = torch.randn(2, 8, 9, 10, generator=torch.Generator().manual_seed(0))
    inside = maps > -0.5
    quantiles = torch.linspace(0, 1, 32) ** 2
    matched = match_histogram(maps, inside, quantiles)
    assert torch.equal(matched[~inside], maps[~inside])
    for before, after, chosen in zip(maps, matched, inside):
        torch.testing.assert_close(after[chosen].square().mean(), before[chosen].square().mean(), rtol=0.02, atol=0)
        # In the same order, up to rounding.
        assert float(after[chosen][before[chosen].argsort()].diff().min()) > -1e-5
        assert abs(float(after[chosen].median() / after[chosen].max()) - 0.25) < 0.02


def test_protein_density_is_skewed():
    quantiles = reference_quantiles(2.0)
    assert (quantiles.diff() >= 0).all()
    assert float(quantiles.mean()) > 1.2 * float(quantiles.median())


def test_bad_input(make_crystal):
    crystal = make_crystal(0, n_atoms=20, d_min=2.5)
    F, phases = abs(crystal.F), np.zeros(len(crystal.F))
    with pytest.raises(InputError, match="phases must be"):
        density_modify(F, phases[1:], crystal.hkl, crystal.cell)
    with pytest.raises(InputError, match="phases must be"):
        density_modify(F, phases * np.nan, crystal.hkl, crystal.cell)
    with pytest.raises(InputError, match="scheme must be one of imposed"):
        density_modify(F, phases, crystal.hkl, crystal.cell, options=ModifyOptions(scheme="magic"))
    with pytest.raises(InputError, match="solvent"):
        density_modify(F, phases, crystal.hkl, crystal.cell, solvent=1.5)
