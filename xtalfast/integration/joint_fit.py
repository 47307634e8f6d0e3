"""Overlapping spots, fitted together: the intensity of a reflection with those of all neighbours that reach its box.

`overlaps.mark_overlaps` gives every voxel to the reflection whose lattice point is nearest and masks the rest. That is
right for spots that hardly touch; where neighbours share a good part of their profiles, the mask cuts away what
belongs to the spot, and leaves in what leaks across the border. Here the counts of the whole box have mean

    rate = I p + sum_k I_k p_k + B b

with the profiles p_k of the neighbours, and one weighted linear fit gives I with the I_k and B as nuisances: unbiased,
and its variance says what the overlap costs. Weights are taken at intensities shrunk to be positive, never at the
estimate itself. Only rows whose overlap matters are touched, and the column `overlap.n` says which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtalfast.integration.columns import mm_at_px
from xtalfast.integration.overlaps import PanelSpots, nearest_indices
from xtalfast.integration.spot_shape import images_in_scan
from xtalfast.masks import OVERLAPPED, VALID
from xtalfast.models import Array, Experiment

REACH = 7.0  # standard deviations between two centres beyond which they share less than 5e-4 of their profiles
SHARED = 0.01  # part of its profile that a spot must share for a joint fit
LEAK = 0.2  # or that leaks into it from a strong neighbour, in its standard deviations
MAX_NEIGHBOURS = 16
SLAB = 8192  # reflections whose profiles are held in memory together
ROUNDS = 2  # of weights
_LOWEST_RATE = 1e-3  # counts per pixel, for the weights

Profiles = Callable[[Any], Any]  # a view of a store -> something with `profiles(rows) -> Tensor [B, P]`
BackgroundOf = Callable[[Any, NDArray[np.int64]], tuple[NDArray, NDArray]]


@dataclass
class JointFit:
    """Reflections that were fitted together with their neighbours."""

    rows: NDArray[np.int64]  # of the store
    i: Array  # counts in the box
    var_i: Array
    bg: Array  # counts per pixel
    n_neighbours: NDArray[np.int32]
    shared: Array  # part of the profile that neighbours overlay, at most 1


@dataclass
class _Slab:
    """Profiles of some rows of a store, and where they are."""

    rows: NDArray[np.int64]
    bbox: NDArray[np.int64]  # [N, 6]
    hkl: NDArray[np.int32]  # [N, 3]
    profile: list[NDArray[np.float32]]  # [z, y, x] each
    centre: Array  # [N, 3] z, y, x
    covariance: Array  # [N, 3, 3]


def _slabs(store: Any, rows: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Rows to fit, and those with the neighbours that reach them, in slabs along the rotation."""
    z = np.asarray(store.metadata["xyzcal_px"][:], float)[rows, 2]
    bbox = np.asarray(store.metadata["bbox"][:])[rows]
    order = np.argsort(z, kind="stable")
    for start in range(0, len(rows), SLAB):
        own = np.sort(order[start : start + SLAB])
        low, high = bbox[own, 4].min(), bbox[own, 5].max()
        yield rows[own], rows[(bbox[:, 5] > low) & (bbox[:, 4] < high)]


def _load(store: Any, rows: NDArray[np.int64], profiles: Profiles) -> _Slab:
    place = np.full(store.n, -1)
    place[rows] = np.arange(len(rows))
    n = len(rows)
    found: list[Any] = [None] * n
    centre, covariance = np.full((n, 3), np.nan), np.tile(np.eye(3), (n, 1, 1))
    for view in store.by_size(rows):
        p = profiles(view).profiles(np.arange(view.n)).numpy().reshape(view.n, *view.box)
        at = place[view.rows]
        bbox = np.asarray(view.metadata["bbox"])
        low = bbox[:, [4, 2, 0]].astype(float)
        axes = [np.arange(size) + 0.5 for size in view.box]
        mean = np.empty((view.n, 3))
        sums = [p.sum(axis=tuple({1, 2, 3} - {k + 1})) for k in range(3)]
        total = np.maximum(sums[0].sum(axis=1), 1e-12)
        for k in range(3):
            mean[:, k] = sums[k] @ axes[k] / total
            covariance[at, k, k] = np.maximum(sums[k] @ axes[k] ** 2 / total - mean[:, k] ** 2, 1 / 12)
        for k, other in ((0, 1), (0, 2), (1, 2)):
            plane = p.sum(axis=({1, 2, 3} - {k + 1, other + 1}).pop())
            cross = np.einsum("nij,i,j->n", plane, axes[k], axes[other]) / total - mean[:, k] * mean[:, other]
            covariance[at, k, other] = covariance[at, other, k] = cross
        centre[at] = np.where(total[:, None] > 1e-6, low + mean, np.nan)
        for row, values in zip(at.tolist(), p):
            found[row] = values
    empty = np.zeros((0, 0, 0), np.float32)
    boxes = np.asarray(store.metadata["bbox"][rows]).astype(np.int64)
    hkl = np.asarray(store.metadata["hkl"][rows])
    return _Slab(rows, boxes, hkl, [empty if v is None else v for v in found], centre, covariance)


def _pairs(slab: _Slab, group: NDArray) -> tuple[NDArray[np.int64], NDArray[np.int64], Array]:
    """All pairs of spots of one group (experiment and panel) within REACH: both orders, and their distance.

    Returns:
        i, j [K] into the slab, and the distance in standard deviations of the mean covariance, [K].
    """
    known = np.flatnonzero(np.isfinite(slab.centre).all(axis=1))
    order = known[np.argsort(slab.centre[known, 2], kind="stable")]
    x, group = slab.centre[order], group[order]
    sigma = np.sqrt(np.einsum("nkk->nk", slab.covariance[order]))
    window = REACH * sigma.max(axis=0) if len(order) else np.zeros(3)
    found = []
    for step in range(1, len(order)):
        apart = x[step:] - x[:-step]
        near = apart[:, 2] <= window[2]
        if not near.any():
            break
        near &= (group[step:] == group[:-step]) & (np.abs(apart) <= REACH * 0.5 * (sigma[step:] + sigma[:-step])).all(1)
        a = np.flatnonzero(near)
        if len(a):
            mean = 0.5 * (slab.covariance[order[a]] + slab.covariance[order[a + step]])
            square = np.einsum("nk,nk->n", apart[a], np.linalg.solve(mean, apart[a][..., None])[..., 0])
            close = square < REACH**2
            found.append((order[a[close]], order[a[close] + step], np.sqrt(square[close])))
    if not found:
        nothing = np.zeros(0, np.int64)
        return nothing, nothing, np.zeros(0)
    i, j, distance = (np.concatenate(part) for part in zip(*found))
    return np.concatenate([i, j]), np.concatenate([j, i]), np.concatenate([distance, distance])


def _shared(distance: Array) -> Array:
    """Part of its profile that a Gaussian spot shares with an equal one at this distance: 2 Phi(-distance / 2)."""
    return torch.special.ndtr(torch.from_numpy(-0.5 * distance)).numpy() * 2


def joint_fit(
    store: Any,
    experiments: list[Experiment],
    profiles: Profiles,
    expected: Array,
    sigma: Array,
    background: Array,
    *,
    background_of: BackgroundOf | None = None,
    candidates: NDArray[np.bool_] | None = None,
    batch: int = 256,
) -> JointFit:
    """Fit every reflection that shares pixels with others together with these.

    Args:
        store: ShoeboxStore, boxes of one size or several, its overlapped voxels marked.
        experiments: one per `id`.
        profiles: of the reflections of a view.
        expected: intensity to be expected in the box of each reflection, [N], counts; nan counts as 0.
        sigma: its standard deviation when fitted alone, [N] (<= 0 or nan: unknown).
        background: counts per pixel, [N].
        background_of: (view, rows) -> background shape [B, P] of mean 1, pixels to leave out bool [B, P]; None: flat.
        candidates: rows that may overlap with another, bool [N]; None: all. The others' profiles are not looked at.
        batch: reflections at a time.

    Returns:
        JointFit, only the rows whose overlap matters.
    """
    ids, panels = (np.asarray(store.metadata[name][:]) for name in ("id", "panel"))
    expected = np.maximum(np.nan_to_num(np.asarray(expected, float)), 0.0)
    spread = np.where(np.isfinite(sigma) & (np.asarray(sigma) > 0), sigma, np.inf)
    parts: list[JointFit] = []
    everyone = np.arange(store.n) if candidates is None else np.flatnonzero(candidates)
    for own, rows in _slabs(store, everyone):
        slab = _load(store, rows, profiles)
        i, j, distance = _pairs(slab, ids[rows] * 65536 + panels[rows])
        share = _shared(distance)
        overlaid = np.minimum(np.bincount(i, share, len(rows)), 1.0)
        with np.errstate(invalid="ignore"):
            leak = np.bincount(i, share * expected[rows[j]], len(rows)) / spread[rows]
        wanted = np.isin(rows, own) & ((overlaid > SHARED) | (leak > LEAK))
        order = np.lexsort((distance, i))
        i, j = i[order], j[order]
        first = np.searchsorted(i, np.arange(len(rows) + 1))
        place = np.full(store.n, -1)
        place[rows] = np.arange(len(rows))
        for view in store.by_size(rows[wanted]):
            for start in range(0, view.n, batch):
                at = np.arange(start, min(start + batch, view.n))
                here = place[view.rows[at]]
                neighbours = [j[first[r] : first[r + 1]][:MAX_NEIGHBOURS] for r in here.tolist()]
                parts.append(
                    _fit_batch(
                        slab, view, at, here, neighbours, expected, background, overlaid, experiments, background_of
                    )
                )
    if not parts:
        nothing = np.zeros(0)
        return JointFit(
            np.zeros(0, np.int64), nothing, nothing.copy(), nothing.copy(), np.zeros(0, np.int32), nothing.copy()
        )
    columns = [np.concatenate(column) for column in zip(*(vars(part).values() for part in parts))]
    return JointFit(*columns)


def _design(slab: _Slab, here: NDArray, neighbours: list[NDArray], box: tuple[int, int, int]) -> NDArray[np.float32]:
    """Profiles of each spot and its neighbours over its own box, [B, K, z, y, x]."""
    k = 1 + max((len(n) for n in neighbours), default=0)
    design = np.zeros((len(here), k, *box), np.float32)
    for row, (me, others) in enumerate(zip(here.tolist(), neighbours)):
        design[row, 0] = slab.profile[me]
        low, high = slab.bbox[me, [4, 2, 0]], slab.bbox[me, [5, 3, 1]]
        for slot, other in enumerate(others.tolist(), 1):
            theirs = slab.bbox[other, [4, 2, 0]]
            start, stop = np.maximum(low, theirs), np.minimum(high, slab.bbox[other, [5, 3, 1]])
            if (stop <= start).any():
                continue
            mine = tuple(slice(a, b) for a, b in zip((start - low).tolist(), (stop - low).tolist()))
            source = tuple(slice(a, b) for a, b in zip((start - theirs).tolist(), (stop - theirs).tolist()))
            design[row, slot][mine] = slab.profile[other][source]
    return design


def _modelled(
    view: Any, at: NDArray[np.int64], slab: _Slab, neighbours: list[NDArray], experiments: list[Experiment]
) -> NDArray[np.bool_]:
    """Voxels [B, P] whose nearest lattice point is that of a neighbour in the fit."""
    names = ("id", "panel", "hkl", "s1", "xyzcal_px", "bbox")
    values = {name: np.asarray(view.metadata[name][at]) for name in names}
    most = max((len(others) for others in neighbours), default=0)
    listed = np.full((len(at), most, 3), np.iinfo(np.int32).max, np.int32)
    for row, others in enumerate(neighbours):
        listed[row, : len(others)] = slab.hkl[others]
    result = np.zeros((len(at), view.n_pixels), bool)
    for number, panel in np.unique(np.stack([values["id"], values["panel"]], axis=1), axis=0).tolist():
        rows = np.flatnonzero((values["id"] == number) & (values["panel"] == panel))
        xyz = values["xyzcal_px"][rows].astype(float)
        experiment = experiments[number]
        entry = np.column_stack([mm_at_px(experiment.detector[panel], xyz[:, :2]), xyz[:, 2]])
        s1 = experiment.detector.s1_from_px(values["panel"][rows], xyz[:, :2], experiment.beam.wavelength)
        spots = PanelSpots(values["hkl"][rows], s1, xyz, entry, values["bbox"][rows])
        owner = nearest_indices(experiment, panel, spots).reshape(len(rows), -1, 3)
        for k in range(most):
            result[rows] |= (owner == listed[rows, k, None]).all(axis=2)
    return result


def _fit_batch(
    slab: _Slab,
    view: Any,
    at: NDArray[np.int64],
    here: NDArray,
    neighbours: list[NDArray],
    expected: Array,
    background: Array,
    overlaid: Array,
    experiments: list[Experiment],
    background_of: BackgroundOf | None,
) -> JointFit:
    design = _design(slab, here, neighbours, view.box)
    n, k = design.shape[:2]
    mask = view.mask(at)
    in_scan = np.repeat(images_in_scan(view, experiments, at), view.n_pixels // view.box[0], axis=1)
    use = ((mask & VALID) != 0) & in_scan
    # A voxel of another reflection is used where that reflection is among the neighbours, so that its rate is modelled.
    use &= ((mask & OVERLAPPED) == 0) | _modelled(view, at, slab, neighbours, experiments)
    shape = np.ones((n, view.n_pixels), np.float32)
    if background_of is not None:
        shape, outlier = background_of(view, at)
        use &= ~outlier
    columns = np.concatenate([design.reshape(n, k, -1), shape[:, None]], axis=1) * use[:, None]
    # Nuisances that have next to nothing in the used pixels are left out: they cannot be told from the rest.
    alive = np.concatenate([columns[:, :k].sum(axis=2) > 1e-3, use.sum(axis=1)[:, None] > 0], axis=1)
    alive[:, 0] = True
    columns *= alive[:, :, None]
    reference = np.zeros((n, k + 1))
    reference[:, 0], reference[:, k] = expected[view.rows[at]], np.maximum(background[view.rows[at]], _LOWEST_RATE)
    for row, others in enumerate(neighbours):
        reference[row, 1 : 1 + len(others)] = expected[slab.rows[others]]
    y = torch.from_numpy(view.counts(at).astype(np.float32))
    a = torch.from_numpy(columns)
    unused = torch.diag_embed(torch.from_numpy(~alive).double())
    for _ in range(ROUNDS):
        rate = torch.einsum("nkp,nk->np", a, torch.from_numpy(reference).float()).clamp(min=_LOWEST_RATE)
        weighted = a / rate[:, None]
        normal = torch.einsum("nkp,nlp->nkl", weighted, a).double() + unused
        inverse = _inverse(normal)
        solution = torch.einsum("nkl,nl->nk", inverse, torch.einsum("nkp,np->nk", weighted, y).double())
        variance = torch.diagonal(inverse, dim1=1, dim2=2)
        reference = _positive_mean(solution, variance).numpy()
        reference[:, k] = np.maximum(reference[:, k], _LOWEST_RATE)
    i, var = solution[:, 0].numpy(), variance[:, 0].numpy()
    good = np.isfinite(i) & np.isfinite(var) & (var > 0) & (columns[:, 0].sum(axis=1) > 0.1)
    return JointFit(
        view.rows[at],
        np.where(good, i, 0.0),
        np.where(good, var, -1.0),
        solution[:, k].numpy(),
        np.array([len(others) for others in neighbours], np.int32),
        overlaid[here],
    )


def _inverse(normal: Tensor) -> Tensor:
    """Inverse of normal matrices [N, K, K], scaled to a unit diagonal first."""
    scale = torch.diagonal(normal, dim1=1, dim2=2).clamp(min=1e-20).rsqrt()
    unit = normal * scale[:, :, None] * scale[:, None, :]
    unit = unit + 1e-9 * torch.eye(normal.shape[1], dtype=normal.dtype)
    return torch.linalg.inv(unit) * scale[:, :, None] * scale[:, None, :]


def _positive_mean(value: Tensor, variance: Tensor) -> Tensor:
    """Mean of the normal law of this mean and variance, cut at 0."""
    sigma = variance.clamp(min=1e-12).sqrt()
    t = value / sigma
    ratio = torch.exp(-0.5 * t**2 - torch.special.log_ndtr(t)) / (2 * torch.pi) ** 0.5
    return torch.where(t > -8, value + sigma * ratio, sigma / 8)


def wilson_mean(i: Array, var_i: Array, shape: Array, rate: Array, n_nodes: int = 96) -> tuple[Array, Array]:
    """Posterior mean and variance of I >= 0 from a normal likelihood and a Gamma(shape, rate) prior, by quadrature.

    Args:
        i, var_i: likelihood-only estimate and variance, [N].
        shape, rate: of the prior, [N].
        n_nodes: nodes of the quadrature, over 6 standard deviations about the peak.
    """
    sigma = np.sqrt(var_i)
    peak = np.maximum(i - rate * var_i, 0.0)
    low, high = np.maximum(peak - 6 * sigma, 0.0), peak + 6 * sigma
    node, weight = np.polynomial.legendre.leggauss(n_nodes)
    # Squared nodes: dense at 0, where the prior of centric reflections has its pole.
    t = 0.5 * (node + 1)
    x = low[:, None] + (high - low)[:, None] * t**2
    log = -0.5 * ((x - i[:, None]) / sigma[:, None]) ** 2 + (shape[:, None] - 1) * np.log(x) - rate[:, None] * x
    p = np.exp(log - log.max(axis=1, keepdims=True)) * weight * t
    p /= p.sum(axis=1, keepdims=True)
    mean = (p * x).sum(axis=1)
    return mean, (p * (x - mean[:, None]) ** 2).sum(axis=1)
