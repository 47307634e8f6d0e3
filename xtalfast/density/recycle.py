"""Recycling: a predicted density, refined or not, is the template a further network starts from.

Refinement is our density modification at the solvent content of the sequence, on the amplitudes that the Patterson map
itself holds: |F|^2 is its Fourier transform.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import gemmi
import numpy as np
import torch
from torch import Tensor

from xtalfast.density.cells import solvent_fraction
from xtalfast.density.conformers import mass_of
from xtalfast.density.scale import MapScale
from xtalfast.phasing.fourier import FourierGrid
from xtalfast.phasing.modify import HELD_OUT, ModifyOptions, modify_spectrum
from xtalfast.phasing.projections import Amplitudes

CYCLES = 30
_BLUR, _FLOOR, _ABOVE, _KEPT = 25.0, 1.23, 1.25, 0.05  # Appendix E
_NOISY_PART = 0.85  # of each edge, about the middle
NOISE_VARIANCE = {"refined": 1e-3, "raw": 3e-4}
REFINED_SHARE = {"original": 0.7, "modified": 1 / 6}
_WEIGHT_NOISE_VARIANCE = 5e-5


def measured_amplitudes(patterson: Tensor, grid: FourierGrid, scale: MapScale) -> Tensor:
    """|F| / V on the half spectrum from a scaled Patterson map [X, Y, Z]: P = (1/V) sum |F|^2 exp(-2 pi i h.u)."""
    power = grid.to_spectrum(patterson * scale.patterson).real.clamp_min(0)
    amplitude = (power / grid.cell.volume).sqrt()
    return torch.where(grid.inside, amplitude, 0)


def refine_template(
    density: Tensor, patterson: Tensor, residue_ids: Tensor, cell: Tensor, d_min: float, scale: MapScale
) -> tuple[Tensor, float]:
    """Density modification of one predicted map; what SHELXE does in the paper.

    Args:
        density: predicted, on the scale of the data [X, Y, Z].
        patterson: scaled, [X, Y, Z].
        residue_ids: [R], for the solvent content.
        cell: [6], A and degrees.
        d_min: A.
        scale: of the training data.

    Returns:
        the refined map on the scale of the data [X, Y, Z]; and R_free between the amplitudes of the modified density
        and measured ones that were held out on the way (every twentieth).
    """
    parameters = cell.double().cpu().numpy()
    x, y, z = density.shape
    grid = FourierGrid(gemmi.UnitCell(*parameters.tolist()), (x, y, z), d_min, density.device)
    values = measured_amplitudes(patterson.float(), grid, scale)
    bound = grid.inside.clone()
    bound[0, 0, 0] = False
    # Amplitudes of a random map are alike for Friedel mates, so mates are held out together.
    noise = torch.randn(density.shape, generator=torch.Generator().manual_seed(0)).to(density.device)
    lot = grid.to_spectrum(noise).abs()
    held_out = bound & (lot < lot[bound].quantile(HELD_OUT))
    amplitudes = Amplitudes(grid, values, bound & ~held_out, held_out)
    solvent = float(np.clip(solvent_fraction(mass_of(residue_ids.cpu().numpy()), parameters), 0.1, 0.95))
    with torch.no_grad():
        _, flat = modify_spectrum(
            grid.to_spectrum(density.float())[None], amplitudes, torch.tensor([solvent], device=density.device),
            ModifyOptions(cycles=CYCLES, histogram=0),
        )  # fmt: skip
        _, r_free = amplitudes.r_factors(grid.to_map(flat))
        final = Amplitudes(grid, values, bound, torch.zeros_like(bound)).impose(flat)[0]
    final[0, 0, 0] = 0
    return grid.to_map(final) / scale.density, float(r_free[0])


def flatten_template(density: Tensor, cell: Tensor) -> Tensor:
    """Flatten what is not protein in a refined map [X, Y, Z] and bring it to -1..1, as Appendix E says.

    Two masks: positive density, and density blurred by B = 25 A^2 above its mean + 1.25 rmsd. In units of the rmsd the
    floor is -1.23; 5 % of the map is kept everywhere.
    """
    x, y, z = density.shape
    grid = FourierGrid(gemmi.UnitCell(*cell.double().cpu().tolist()), (x, y, z), 1e-3, density.device)
    sigma = (density - density.mean()) / density.std(correction=0).clamp_min(1e-12)
    blurred = grid.to_map(grid.to_spectrum(sigma) * torch.exp(-_BLUR / 4 * grid.s2))
    inside = (density > 0) & (blurred > blurred.mean() + _ABOVE * blurred.std(correction=0))
    flattened = (sigma + _FLOOR) * inside - _FLOOR
    mixed = (1 - _KEPT) * flattened + _KEPT * sigma
    low, high = mixed.min(), mixed.max()
    return 2 * (mixed - low) / (high - low).clamp_min(1e-12) - 1


def noisy_template(template: Tensor, variance: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise on the middle 85 % of each edge of a template [X, Y, Z]; the Patterson map never gets any."""
    noise = torch.randn(template.shape, generator=generator, dtype=template.dtype) * math.sqrt(variance)
    inside = torch.ones((), dtype=torch.bool)
    for axis, n in enumerate(template.shape):
        place = (torch.arange(n) + 0.5) / n
        shape = [-1 if i == axis else 1 for i in range(3)]
        inside = inside & ((place - 0.5).abs() <= _NOISY_PART / 2).view(shape)
    return template + (noise * inside).to(template.device)


def mixed_templates(
    raw: Tensor, refined: list[Tensor | None], scheme: str, generator: torch.Generator | None
) -> Tensor:
    """Templates of a batch [B, X, Y, Z]: refined where chosen, else raw.

    Args:
        raw: predictions of the network before, [B, X, Y, Z].
        refined: flattened refined maps, None where refinement failed.
        scheme: "original" takes the refined template with probability .7; "modified" with 1/6, and adds noise.
        generator: of the choice and the noise; None is the test: refined whenever there is one, no noise.
    """
    templates = []
    for one, better in zip(raw, refined):
        if generator is None:
            templates.append(one if better is None else better)
            continue
        chosen = better is not None and float(torch.rand((), generator=generator)) < REFINED_SHARE[scheme]
        template = better if chosen and better is not None else one
        if scheme == "modified":
            template = noisy_template(template, NOISE_VARIANCE["refined" if chosen else "raw"], generator)
        templates.append(template)
    return torch.stack(templates)


@torch.no_grad()
def transferred_weights(
    earlier: Mapping[str, Tensor], fresh: Mapping[str, Tensor], generator: torch.Generator
) -> dict[str, Tensor]:
    """Weights to start a recycling run with: the earlier run's with slight noise (variance 5e-5).

    The first recycling run has one more input channel: its Patterson channel is carried over, that of the template is
    fresh; later runs carry both. Running statistics get no noise.
    """
    result = {}
    for name, value in fresh.items():
        old = earlier[name]
        if old.shape != value.shape:
            value = value.clone()
            value[:, : old.shape[1]] = old
            old = value
        if old.is_floating_point() and "running" not in name and name != "residues.maps":
            old = old + torch.randn(old.shape, generator=generator).to(old) * math.sqrt(_WEIGHT_NOISE_VARIANCE)
        result[name] = old
    return result
