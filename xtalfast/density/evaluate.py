"""How good a trained network is on structures it has not seen: the density paper's tables, and controls.

Phases are compared as they stand: all examples are centred alike, so no origin is searched for and random phases are
90 degrees off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import gemmi
import numpy as np
import torch
from torch import Tensor

from xtalfast.density.dataset import Augmentation, ExampleBatch, ExampleDataset, GridBatches
from xtalfast.density.fragment_set import FragmentSet
from xtalfast.density.loss import pearson
from xtalfast.density.recycle import flatten_template, refine_template
from xtalfast.density.split import require_disjoint
from xtalfast.density.trained import REFINED_BELOW, Trained
from xtalfast.errors import InputError
from xtalfast.metrics.phasing import RANDOM_PHASE_ERROR
from xtalfast.phasing.fourier import FourierGrid

Progress = Callable[[str, int, int], None]
N_SHELLS = 10
SOLVED_BELOW = 60.0  # degrees: phases of a shell count as solved (the paper's Figure 7)


@dataclass
class Stage:
    """What a network (the first, or one that recycles) reaches, per example.

    Attributes:
        pc: of the map as predicted [N].
        phase_error: mean |delta phi| over all reflections, degrees, [N].
        shells: the same per resolution shell, low to high, [N, N_SHELLS].
        pc_modified, phase_error_modified: after density modification, refined or not, [N].
        refined: whether density modification explains the amplitudes [N], told without truth.
    """

    pc: list[float] = field(default_factory=list)
    phase_error: list[float] = field(default_factory=list)
    shells: list[list[float]] = field(default_factory=list)
    pc_modified: list[float] = field(default_factory=list)
    phase_error_modified: list[float] = field(default_factory=list)
    refined: list[bool] = field(default_factory=list)


@dataclass
class Evaluation:
    """Figures of a network on a test split.

    Attributes:
        ids: of the examples.
        stages: of the first network and of each that recycles.
        controls: mean PC of what a useless network would reach too, and of the network when its input is spoilt.
    """

    ids: list[str]
    stages: list[Stage]
    controls: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> str:
        """The paper's Tables 1 and 2 and Figure 7 as Markdown."""
        names = ["Initial", *(f"Recycling {n}" for n in range(1, len(self.stages)))]
        failed = ~np.array(self.stages[0].refined, bool)

        def mean(values: list, chosen: np.ndarray) -> str:
            picked = np.array(values, float)[chosen]
            return f"{picked.mean():.3f}" if len(picked) else "-"

        every = np.ones(len(failed), bool)
        rows = [
            ("Mean PC", lambda stage: mean(stage.pc, every)),
            ("Mean PC (not refined after the initial run)", lambda stage: mean(stage.pc, failed)),
            ("Mean phase error", lambda stage: mean(stage.phase_error, every)),
            ("Mean phase error (not refined after the initial run)", lambda stage: mean(stage.phase_error, failed)),
            ("Percent refined", lambda stage: f"{100 * np.mean(stage.refined):.0f}"),
            ("Mean PC after density modification", lambda stage: mean(stage.pc_modified, every)),
            ("Mean phase error after density modification", lambda stage: mean(stage.phase_error_modified, every)),
        ]
        lines = [f"| {len(self.ids)} test examples | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        lines += [f"| {title} | {' | '.join(map(figure, self.stages))} |" for title, figure in rows]
        shells = " | ".join(str(number + 1) for number in range(N_SHELLS))
        lines += ["", f"| part below {SOLVED_BELOW:.0f} degrees, shells from low resolution | {shells} |"]
        lines += ["|---" * (N_SHELLS + 1) + "|"]
        for name, stage in zip(names, self.stages):
            solved = (np.array(stage.shells) < SOLVED_BELOW).mean(0)
            lines.append(f"| {name} | {' | '.join(f'{part:.2f}' for part in solved)} |")
        if self.controls:
            lines += ["", "| control | mean PC |", "|---|---|"]
            lines += [f"| {name} | {value:.3f} |" for name, value in self.controls.items()]
        return "\n".join(lines) + "\n"


def evaluate_density(
    trained: Trained,
    fragments: FragmentSet,
    *,
    limit: int | None = None,
    controls: bool = False,
    batch_size: int = 32,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Evaluation:
    """Judge a network on the test split of a fragment set.

    Args:
        trained: networks and what they were trained on.
        fragments: the set they were trained with, or another on the same scale.
        limit: examples at most, drawn with `seed`.
        controls: also the mean training density, and the network with Pattersons or residues of other examples, and
            with empty residue maps.
        batch_size: examples at a time.
        device: where to compute.
        progress: called as progress("evaluate", done, total).

    Raises:
        InputError: test structures that were trained on, or no test fragment.
    """
    store = fragments["test"]
    require_disjoint(trained.parents, [store.parents[i] for i in np.unique(store.arrays["parent"]).tolist()])
    if len(store) == 0:
        raise InputError("the test split is empty; make the set with more structures")
    rows = np.arange(len(store))
    if limit is not None and limit < len(rows):
        rows = np.sort(np.random.default_rng(seed).choice(len(rows), limit, replace=False))
    domain = trained.domain
    augmentation = Augmentation(d_min=domain.d_min, rate=domain.rate)
    options: dict[str, Any] = {"multiple": max(trained.networks[0].config.patch, 4), "device": device, "seed": seed}
    dataset = ExampleDataset(store.select(rows), trained.scale, augmentation, **options)
    result = Evaluation([], [Stage() for _ in trained.networks], {})
    sums: dict[str, list[float]] = {}
    means = mean_densities(fragments, trained, augmentation, options) if controls else {}
    for request in GridBatches(dataset, batch_size, shuffle=False):
        batch = dataset[request]
        result.ids += [dataset.store.id(row) for row in request.rows.tolist()]
        _judge(trained, batch, result.stages)
        if controls:
            for name, values in _controls(trained, batch, means).items():
                sums.setdefault(name, []).extend(values.tolist())
        if progress:
            progress("evaluate", len(result.ids), len(dataset))
    result.controls = {name: float(np.mean(values)) for name, values in sums.items()}
    return result


def _judge(trained: Trained, batch: ExampleBatch, stages: list[Stage]) -> None:
    """Add the figures of one batch to each stage."""
    templates: Tensor | None = None
    for network, stage in zip(trained.networks, stages):
        with torch.no_grad():
            given = None if templates is None else templates[:, None]
            predicted = network(batch.patterson[:, None], batch.residue_ids, given, batch.cells.float())[:, 0].float()
        stage.pc += pearson(predicted, batch.density).tolist()
        chosen = []
        for i, one in enumerate(predicted):
            cell, d_min, truth = batch.cells[i], float(batch.d_min[i]), batch.density[i]
            total, shells = phase_errors(one, truth, cell, d_min)
            stage.phase_error.append(total)
            stage.shells.append(shells)
            better, r_free = refine_template(one, batch.patterson[i], batch.residue_ids[i], cell, d_min, trained.scale)
            stage.pc_modified.append(float(pearson(better, truth)))
            stage.phase_error_modified.append(phase_errors(better, truth, cell, d_min)[0])
            stage.refined.append(r_free < REFINED_BELOW)
            chosen.append(flatten_template(better, cell) if r_free < REFINED_BELOW else one)
        # The paper: an example refined after the initial run keeps its refined template.
        templates = torch.stack(chosen)


def phase_errors(density: Tensor, truth: Tensor, cell: Tensor, d_min: float) -> tuple[float, list[float]]:
    """Mean |delta phi| in degrees of a map [X, Y, Z] against the true one, over all and per shell of equal numbers."""
    x, y, z = truth.shape
    grid = FourierGrid(gemmi.UnitCell(*cell.double().cpu().tolist()), (x, y, z), d_min, truth.device)
    inside = grid.inside.clone()
    inside[0, 0, 0] = False
    one, other = (grid.to_spectrum(values.double())[inside] for values in (density, truth))
    weight, order = grid.weights[inside].double(), grid.s2[inside].argsort()
    error = torch.rad2deg((one * other.conj()).angle().abs()).nan_to_num(RANDOM_PHASE_ERROR)
    shells = [float((weight * error)[part].sum() / weight[part].sum()) for part in order.tensor_split(N_SHELLS)]
    return float((weight * error).sum() / weight.sum()), shells


def mean_densities(
    fragments: FragmentSet, trained: Trained, augmentation: Augmentation, options: dict[str, Any], at_most: int = 200
) -> dict[tuple[int, ...], Tensor]:
    """The mean density of training examples of each grid, of up to `at_most` of them; {} holds all grids there are."""
    dataset = ExampleDataset(fragments["train"], trained.scale, augmentation, **options)
    plan = dataset.plan()
    means = {}
    for grid in np.unique(plan.grids, axis=0):
        rows = np.flatnonzero((plan.grids == grid).all(1))[:at_most]
        parts = np.array_split(rows, len(rows) // 32 + 1)
        sums = [dataset[dataset.request(part, plan)].density.sum(0) for part in parts]
        means[tuple(grid.tolist())] = torch.stack(sums).sum(0) / len(rows)
    return means


@torch.no_grad()
def _controls(trained: Trained, batch: ExampleBatch, means: dict[tuple[int, ...], Tensor]) -> dict[str, Tensor]:
    """PC of each control on the examples of a batch; shuffles need a second example of that grid."""
    network, truth = trained.networks[0], batch.density
    result = {}
    mean = means.get(tuple(truth.shape[1:]))
    if mean is not None:
        result["training-mean density of the grid"] = pearson(mean.expand_as(truth), truth)

    def predict(patterson: Tensor, residue_ids: Tensor) -> Tensor:
        density = network(patterson[:, None], residue_ids, cell=batch.cells.float())[:, 0].float()
        return pearson(density, truth)

    if len(truth) > 1:
        result["Pattersons of other examples"] = predict(batch.patterson.roll(1, 0), batch.residue_ids)
        result["residues of other examples"] = predict(batch.patterson, batch.residue_ids.roll(1, 0))
    with empty_residues(network.residues.maps):
        result["no residues (empty maps)"] = predict(batch.patterson, batch.residue_ids)
    return result


@contextmanager
def empty_residues(maps: Tensor) -> Iterator[None]:
    """The network's residue maps are zero inside the block."""
    kept = maps.clone()
    maps.zero_()
    try:
        yield
    finally:
        maps.copy_(kept)
