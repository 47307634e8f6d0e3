"""Which of two mirror images of a density is made of L-amino acids: a short helix fitted into both."""

from __future__ import annotations

import math
from dataclasses import dataclass

import gemmi
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtalfast.phasing.fourier import FourierGrid, fractionalisation

# The right-handed alpha helix in cylindrical coordinates: electrons, radius (A), angle (degrees), height (A) of N, CA,
# C, O. Arnott & Dover (1967) J. Mol. Biol. 30, 209. CB follows from the three atoms it is bound to or near.
_HELIX = ((7, 1.55, -27.7, -0.87), (6, 2.28, 0.0, 0.0), (6, 1.64, 26.3, 1.08), (8, 2.03, 23.0, 2.26))
_HELIX_TURN, _HELIX_RISE = 100.0, 1.50
_TEMPLATE_B = 20.0
TEMPLATE_D_MIN = 2.0
_HELIX_RESIDUES = 5
N_ROTATIONS = 1000
N_PEAKS = 8
# Margin between the hands (in units of the spread of template scores) at which the odds are e : 1, and the confidence
# that decides. From fragments that are in no test set: docs/phasing.md.
MARGIN_SCALE, DECISIVE = 0.15, 0.9


@dataclass(frozen=True)
class Hand:
    """Which hand the phases have ("as found", "inverted", "undecided"), who says so, and how probable that is."""

    choice: str
    decided_by: str
    confidence: float


def _l_carbon_beta(n: NDArray, ca: NDArray, c: NDArray) -> NDArray[np.float64]:
    """CB of an L-amino acid, tetrahedral at CA."""
    to_n, to_c = (n - ca) / np.linalg.norm(n - ca), (c - ca) / np.linalg.norm(c - ca)
    away = -(to_n + to_c) / np.linalg.norm(to_n + to_c)
    across = np.cross(to_n, to_c) / np.linalg.norm(np.cross(to_n, to_c))
    half = math.radians(109.5 / 2)
    return ca + 1.53 * (math.cos(half) * away + math.sin(half) * across)


def helix(n_residues: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Poly-L-alanine alpha helix: electrons [M] and coordinates [M, 3] (A) about their centre."""
    electrons, atoms = [], []
    for residue in range(n_residues):
        backbone = []
        for number, radius, angle, height in _HELIX:
            turn = math.radians(angle + residue * _HELIX_TURN)
            backbone.append(
                np.array([radius * math.cos(turn), radius * math.sin(turn), height + residue * _HELIX_RISE])
            )
            electrons.append(float(number))
        atoms += [*backbone, _l_carbon_beta(*backbone[:3])]
        electrons.append(6.0)
    coords = np.array(atoms)
    weights = np.array(electrons)
    return weights, coords - (coords * weights[:, None]).sum(0) / weights.sum()


def rotations(n: int) -> NDArray[np.float64]:
    """Rotation matrices [n, 3, 3] spread evenly over all orientations (a spiral on the sphere of quaternions).

    Ref: Alexa (2022) CVPR, Super-Fibonacci spirals.
    """
    s = np.arange(n) + 0.5
    r, big_r = np.sqrt(s / n), np.sqrt(1 - s / n)
    alpha, beta = 2 * np.pi * s / math.sqrt(2), 2 * np.pi * s / 1.533751168755204288118041
    x, y, z, w = r * np.sin(alpha), r * np.cos(alpha), big_r * np.sin(beta), big_r * np.cos(beta)
    return np.stack(
        [
            np.stack([1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)], -1),
            np.stack([2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)], -1),
            np.stack([2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)], -1),
        ],
        -2,
    )


def template_scores(
    grid: FourierGrid, spectrum: Tensor, electrons: NDArray, coords: NDArray, n_rotations: int = N_ROTATIONS
) -> tuple[Tensor, Tensor]:
    """Highest correlation of a template with a density and with its mirror image, for every orientation; [R] each.

    Args:
        grid: of the density.
        spectrum: of the density [X, Y, Z // 2 + 1].
        electrons, coords: the template, [M] and [M, 3] (A).
        n_rotations: orientations tried.
    """
    inside = grid.inside.clone()
    inside[0, 0, 0] = False
    place = torch.nonzero(inside)
    X, Y, _ = grid.shape
    h = place.cpu().numpy().astype(np.float64)
    h[:, 0] -= X * (h[:, 0] > X // 2)
    h[:, 1] -= Y * (h[:, 1] > Y // 2)
    reciprocal = torch.from_numpy(h @ fractionalisation(grid.cell)).float()  # [H, 3], 1/A
    falloff = torch.exp(-_TEMPLATE_B / 4 * grid.s2[inside].cpu())
    target = spectrum[inside].cpu()
    weights = torch.from_numpy(electrons).float()
    turned = torch.from_numpy(np.einsum("rij,mj->rmi", rotations(n_rotations), coords)).float()
    best: tuple[list[Tensor], list[Tensor]] = ([], [])
    empty = torch.zeros((1, *grid.inside.shape), dtype=torch.complex64)
    for batch in turned.split(16):
        phase = 2 * math.pi * (batch @ reciprocal.T)  # [r, M, H]
        real = (weights[:, None] * phase.cos()).sum(1) * falloff
        imaginary = (weights[:, None] * phase.sin()).sum(1) * falloff
        # Spectra hold conj(F); the inverted template is the conjugate of the template.
        for hand, sign in enumerate((1.0, -1.0)):
            product = target * torch.complex(real, sign * imaginary)
            full = empty.repeat(len(batch), 1, 1, 1)
            full[:, inside.cpu()] = product / (real.square() + imaginary.square()).sum(1, keepdim=True).sqrt()
            best[hand].append(torch.fft.irfftn(full, s=grid.shape, dim=(1, 2, 3), norm="forward").amax((1, 2, 3)))
    return torch.cat(best[0]), torch.cat(best[1])


def chirality(F: NDArray, hkl: NDArray, cell: gemmi.UnitCell, d_min: float) -> Hand:
    """Decide between a density and its mirror image by how well a short helix of L-residues fits into each.

    Even strands and loops are told apart: what the template tests in them is the turn of the backbone about CA.

    Args:
        F: map coefficients in P1, complex [N].
        hkl: indices, one of each Friedel pair, [N, 3].
        cell: A, degrees.
        d_min: resolution limit of the data, A.
    """
    grid = FourierGrid.for_resolution(cell, max(d_min, TEMPLATE_D_MIN), rate=2.5)
    spectrum, _ = grid.scatter(hkl, torch.from_numpy(np.asarray(F, np.complex64)))
    as_found, inverted = template_scores(grid, spectrum, *helix(_HELIX_RESIDUES))
    spread = max(float(torch.cat([as_found, inverted]).std()), 1e-30)
    margin = float(as_found.topk(N_PEAKS).values.mean() - inverted.topk(N_PEAKS).values.mean()) / spread
    confidence = 1 / (1 + math.exp(-abs(margin) / MARGIN_SCALE))
    if confidence < DECISIVE:
        return Hand("undecided", "chirality", confidence)
    return Hand("as found" if margin > 0 else "inverted", "chirality", confidence)
