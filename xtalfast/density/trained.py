"""A trained network with all it needs to be used: scale, residues' maps, domain, and the runs it recycles from."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xtalfast.density.cells import solvent_fraction
from xtalfast.density.conformers import mass_of
from xtalfast.density.dataset import ExampleDataset
from xtalfast.density.model import RecCrysFormer
from xtalfast.density.model_config import RecCrysFormerConfig
from xtalfast.density.recycle import flatten_template, refine_template
from xtalfast.density.scale import MapScale
from xtalfast.errors import InputError
from xtalfast.integration.checkpoint import read_checkpoint
from xtalfast.io.files import write_bytes

TRAIN_VERB = "xtalfast train density"
REFINED_BELOW = 0.18
"""R_free of density modification below which a map counts as refined.

Started from the truth, dipeptides reach 0.06 to 0.14 and 15-residue fragments 0.08 to 0.18; from noise, 0.2 to 0.6.
"""
_LARGE = 4096  # elements


@dataclass(frozen=True)
class Domain:
    """What a network was trained on, as ranges that data to be phased must lie in.

    Attributes:
        n_residues: of every example.
        d_min: A, from and to.
        rate: grid points per d_min, from and to.
        edges: shortest and longest cell edge seen, A.
        angles: smallest and largest, degrees.
        solvent: fraction of the cell, from and to.
    """

    n_residues: int
    d_min: tuple[float, float]
    rate: tuple[float, float]
    edges: tuple[float, float]
    angles: tuple[float, float]
    solvent: tuple[float, float]

    def outside(self, space_group: str, n_residues: int, d_min: float, cell: tuple[float, ...]) -> list[str]:
        """What of a crystal lies outside, in words; empty when nothing does."""
        problems = []
        if space_group.replace(" ", "") != "P1":
            problems.append(f"space group {space_group} (trained on P 1)")
        if n_residues != self.n_residues:
            problems.append(f"{n_residues} residues (trained on {self.n_residues})")
        if d_min > self.d_min[1] + 0.05:
            problems.append(f"resolution {d_min:.2f} A (trained on {self.d_min[0]:.2f} to {self.d_min[1]:.2f})")
        for name, values, (low, high) in (("cell edges", cell[:3], self.edges), ("angles", cell[3:], self.angles)):
            if min(values) < low - 0.5 or max(values) > high + 0.5:
                shown = ", ".join(f"{value:.1f}" for value in values)
                problems.append(f"{name} {shown} (trained on {low:.1f} to {high:.1f})")
        return problems


@dataclass
class Trained:
    """A network, and those before it whose maps it takes as templates.

    Attributes:
        networks: the first predicts from the Patterson alone, each next one from that and the last one's map.
        scale: of the training data.
        parents: structures (or clusters) trained on.
        domain: what the training data covered.
        info: settings and figures of the run.
    """

    networks: list[RecCrysFormer]
    scale: MapScale
    parents: tuple[str, ...]
    domain: Domain
    info: dict[str, Any]

    @classmethod
    def load(cls, path: str | os.PathLike, device: torch.device | str = "cpu") -> Trained:
        """Read a checkpoint of `xtalfast train density`. Raises InputError if it is none."""
        saved = read_checkpoint(Path(path), TRAIN_VERB)
        networks = []
        for config, weights in [*saved["chain"], (saved["network"], saved["published"])]:
            network = RecCrysFormer(RecCrysFormerConfig.from_dict(config), weights["residues.maps"][:, 0].float())
            network.load_state_dict({name: value.float() for name, value in weights.items()})
            networks.append(network.to(device).eval())
        info = {name: saved[name] for name in ("train", "seed", "step")}
        return cls(networks, MapScale(**saved["scale"]), tuple(saved["parents"]), Domain(**saved["domain"]), info)

    def chain(self) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
        """The networks as a checkpoint of a further run holds them."""
        return [(network.config.to_dict(), published(network)) for network in self.networks]

    @torch.no_grad()
    def predict(
        self,
        patterson: Tensor,
        residue_ids: Tensor,
        cells: Tensor,
        d_min: float,
        *,
        recycles: int | None = None,
        refine: bool = True,
    ) -> Tensor:
        """Predict densities on the scale of the training data.

        Args:
            patterson: scaled maps [B, X, Y, Z].
            residue_ids: int64 [B, R].
            cells: [B, 6], A and degrees.
            d_min: A.
            recycles: recycling steps, as many as there were runs if not given; beyond, the last network repeats.
            refine: templates are refined whenever that succeeds.

        Returns:
            [B, X, Y, Z].
        """
        steps = len(self.networks) - 1 if recycles is None else recycles
        if steps and len(self.networks) == 1:
            raise InputError("this network takes no template: --recycles 0, or weights of a recycling run")
        density = self.networks[0](patterson[:, None], residue_ids, cell=cells.float())[:, 0].float()
        for step in range(1, steps + 1):
            template = self.templates(density, patterson, residue_ids, cells, d_min) if refine else density
            network = self.networks[min(step, len(self.networks) - 1)]
            density = network(patterson[:, None], residue_ids, template[:, None], cells.float())[:, 0].float()
        return density

    def templates(self, density: Tensor, patterson: Tensor, ids: Tensor, cells: Tensor, d_min: float) -> Tensor:
        """Refined and flattened maps where refinement succeeds, else the predictions, [B, X, Y, Z]."""
        chosen = []
        for one, map_, residues, cell in zip(density, patterson, ids, cells):
            better = refined_or_none(one, map_, residues, cell, d_min, self.scale)
            chosen.append(one if better is None else better)
        return torch.stack(chosen)


def refined_or_none(
    density: Tensor, patterson: Tensor, ids: Tensor, cell: Tensor, d_min: float, scale: MapScale
) -> Tensor | None:
    """The flattened refined map of one prediction, None where density modification does not explain the data."""
    refined, r_free = refine_template(density, patterson, ids, cell, d_min, scale)
    return flatten_template(refined, cell) if r_free < REFINED_BELOW else None


def published(network: nn.Module) -> dict[str, Tensor]:
    """The state dict of a network, detached and on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}


def domain_of(dataset: ExampleDataset) -> Domain:
    """What the examples of a data set cover."""
    arrays, augmentation = dataset.store.arrays, dataset.augmentation
    cells = np.asarray(arrays["cells"])
    masses = np.array([mass_of(ids) for ids in np.unique(arrays["residue_ids"], axis=0)])
    solvent = solvent_fraction(masses.mean(), cells)

    def span(values: NDArray) -> tuple[float, float]:
        return float(values.min()), float(values.max())

    return Domain(
        n_residues=arrays["residue_ids"].shape[1],
        d_min=augmentation.d_min,
        rate=augmentation.rate,
        edges=span(cells[:, :3]),
        angles=span(cells[:, 3:]),
        solvent=span(solvent),
    )


def write_published(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint to use, not to resume from: no optimiser in it, large matrices in half precision."""
    half = {k: v.half() if v.is_floating_point() and v.numel() > _LARGE else v for k, v in content["published"].items()}
    data = io.BytesIO()
    torch.save(content | {"published": half}, data)
    write_bytes(path, data.getvalue())
