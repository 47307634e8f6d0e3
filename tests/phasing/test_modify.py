"""Density modification: it improves phases, it is differentiable, it refuses bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xtalfast.errors import InputError
from xtalfast.phasing import ModifyOptions, density_modify
from xtalfast.phasing.data import measured
from xtalfast.phasing.modify import match_histogram, modify_spectrum, reference_quantiles


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


def test_gradient(make_crystal):
    """Derivative of a loss through three cycles against a finite difference along it; the mask is held constant."""
    crystal = make_crystal(1, n_atoms=20, d_min=3.0)
    data = measured(abs(crystal.F), crystal.hkl, crystal.cell, "P 1", None)
    amplitudes = data.amplitudes(data.grid(3.0, 2.5))
    amplitudes.values = amplitudes.values.double()
    noise = np.random.default_rng(0).standard_normal(len(data.hkl))
    phases = torch.from_numpy(np.angle(crystal.F) + 0.5 * noise).requires_grad_()
    target, _ = amplitudes.grid.scatter(crystal.hkl, torch.from_numpy(crystal.F))

    def loss(angles: torch.Tensor) -> torch.Tensor:
        F = torch.polar(torch.from_numpy(data.F), angles)
        spectrum, _ = amplitudes.grid.scatter(data.hkl, F)
        options = ModifyOptions(cycles=3, histogram=0)
        final, _ = modify_spectrum(spectrum[None], amplitudes, torch.tensor([0.6]), options)
        return (final[0] * target.conj()).real.sum()

    (gradient,) = torch.autograd.grad(loss(phases), phases)
    step = 1e-6 * gradient / gradient.norm()
    with torch.no_grad():
        numerical = (loss(phases + step) - loss(phases - step)) / (2 * step.norm())
    torch.testing.assert_close(numerical, gradient.norm(), rtol=1e-3, atol=0)


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
    with pytest.raises(InputError, match="solvent"):
        density_modify(F, phases, crystal.hkl, crystal.cell, solvent=1.5)
