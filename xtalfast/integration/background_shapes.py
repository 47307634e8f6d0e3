"""The shape of the background under each spot: flat, sloping, or following the rings of the data set.

Every candidate is a Poisson model of the pixels around the spot, its shape the same on all images of the box:

    flat         B
    radial       B T(s), or A + B T(s): T is the mean background of the whole data set at s = 1 / d (air, water, ice)
    plane        B (1 + a x + b y)
    log-linear   B exp(a x + b y)

fitted by maximum likelihood and chosen by Schwarz's criterion (BIC), 2 log L - k log n. Zingers and the tails of
neighbours are left out inside the likelihood: pixels in the far upper tail of the rate that the chosen model gives
them, so that the crest of an ice ring is not taken for an outlier. What comes out is a shape of mean 1, which the ops
take as `background`; its height stays free there and is fitted together with the intensity.

Ref: G. Schwarz, Ann. Statist. 6, 461-464 (1978); J. M. Parkhurst et al., J. Appl. Cryst. 49, 1912-1921 (2016) for the
robust Poisson background.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xtalfast.integration.background import TAIL_SIGMA
from xtalfast.models import Array, Experiment, Panel

ROUNDS = 3  # of leaving out outliers and fitting again
NEWTON_STEPS = 5
MIN_PIXELS = 20  # pixels of the background needed for more than a flat one
SCORE = 9.0  # chi^2 (2 degrees of freedom) of a slope below which plane and log-linear are not tried: BIC refuses them
BIN_PX = 0.25  # width of the bins of the radial background, in pixels
BIN_PHOTONS = 1000.0  # photons that fix the radial background to 3 % at one place
RADIAL_ODDS = 6.0  # what BIC grants the radial shape before a flat one: the whole data set speaks for it
LOWEST = 0.05  # a rate falls nowhere below this part of the mean


class Kind(enum.IntEnum):
    """Which model describes the background of a box."""

    Flat = 0
    Plane = 1
    LogLinear = 2
    Radial = 3


class ShapedBackground(NamedTuple):
    """Background of each box."""

    shape: NDArray[np.float32]  # [N, P] mean 1 over the box
    mean: Array  # [N] counts per pixel, over the box
    variance: Array  # [N] of the mean
    dispersion: Array  # [N] variance / rate of the pixels used; 1 for Poisson
    kind: NDArray[np.uint8]  # [N] `Kind`
    n_used: NDArray[np.int64]  # [N] pixels
    outlier: NDArray[np.bool_]  # [N, P] pixels of `use` that were left out


def inverse_resolution(panel: Panel, s0: Array, wavelength: float) -> NDArray[np.float32]:
    """s = 1 / d of every pixel centre, [slow, fast], 1/A."""
    fast, slow = panel.image_size
    result = np.empty((slow, fast), np.float32)
    x = np.arange(fast) + 0.5
    for start in range(0, slow, 128):  # in bands: the rays of a large detector take gigabytes
        y = np.arange(start, min(start + 128, slow)) + 0.5
        ray = panel.lab_from_px(np.stack(np.broadcast_arrays(x[None, :], y[:, None]), axis=-1))
        ray /= np.linalg.norm(ray, axis=-1, keepdims=True) * wavelength
        result[start : start + len(y)] = np.linalg.norm(ray - s0, axis=-1)
    return result


class RadialBackground:
    """Mean background of every experiment of a store at s = 1 / d, from the background pixels of its boxes.

    Call `add` for the boxes of the data set, then `template` gives the rate that a box may expect at its pixels.
    """

    def __init__(self, experiments: Sequence[Experiment]) -> None:
        self.experiments = experiments
        self._maps: dict[tuple[int, int], NDArray[np.float32]] = {}
        self._width: list[float] = []
        for e in experiments:
            panel = e.detector[0]
            distance = abs(float(panel.origin @ panel.normal))
            self._width.append(BIN_PX * panel.pixel_size[0] / max(distance, 1e-9) / e.beam.wavelength)
        n_bins = [int(np.ceil(2 / e.beam.wavelength / w)) + 2 for e, w in zip(experiments, self._width)]
        self.counts = [np.zeros(n) for n in n_bins]
        self.pixels = [np.zeros(n) for n in n_bins]
        self._curve: list[tuple[Array, Array]] = []

    def _s(self, view: Any, rows: NDArray[np.int64], number: int, panel: int) -> NDArray[np.float32]:
        """s at the pixels of the boxes, [B, y, x]; beyond the edge of the panel that of its edge."""
        experiment = self.experiments[number]
        key = (id(experiment.detector[panel]), number)
        if key not in self._maps:
            beam = experiment.beam
            self._maps[key] = inverse_resolution(experiment.detector[panel], beam.s0, beam.wavelength)
        here = self._maps[key]
        bbox = np.asarray(view.metadata["bbox"][rows])
        y = np.clip(bbox[:, 2:3] + np.arange(view.box[1]), 0, here.shape[0] - 1)
        x = np.clip(bbox[:, 0:1] + np.arange(view.box[2]), 0, here.shape[1] - 1)
        return here[y[:, :, None], x[:, None, :]]

    def _groups(self, view: Any, rows: NDArray[np.int64]) -> Any:
        ids, panels = (np.asarray(view.metadata[name][rows]) for name in ("id", "panel"))
        for number, panel in np.unique(np.stack([ids, panels], axis=1), axis=0).tolist():
            if number >= 0:
                yield number, panel, np.flatnonzero((ids == number) & (panels == panel))

    def add(self, view: Any, rows: NDArray[np.int64], counts: NDArray, use: NDArray[np.bool_]) -> None:
        """Take in the background pixels of some boxes.

        Args:
            view: a store or view with boxes of one size.
            rows: rows of it, [B].
            counts: photons, [B, P].
            use: background pixels, bool [B, P].
        """
        n_z, n_y, n_x = view.box
        # Only gross outliers: a box is no measure of how high a ring in it may rise.
        mean = np.einsum("np,np->n", counts, use, dtype=np.float64) / np.maximum(use.sum(axis=1), 1)
        keep = use & (counts <= _tail(4 * mean + 1)[:, None])
        total = np.where(keep, counts, 0).reshape(-1, n_z, n_y, n_x).sum(axis=1, dtype=np.float64)
        pixels = keep.reshape(-1, n_z, n_y, n_x).sum(axis=1)
        for number, panel, at in self._groups(view, rows):
            bins = (self._s(view, rows[at], number, panel) / self._width[number]).astype(np.int64).ravel()
            size = len(self.counts[number])
            self.counts[number] += np.bincount(bins, total[at].ravel(), size)
            self.pixels[number] += np.bincount(bins, pixels[at].ravel(), size)
        self._curve = []

    def _curves(self) -> list[tuple[Array, Array]]:
        """Nodes s and rate of each experiment: bins joined until they hold enough photons, none wider than 16."""
        if not self._curve:
            for counts, pixels, width in zip(self.counts, self.pixels, self._width):
                edges, held = [0], 0.0
                for k in range(len(counts)):
                    held += counts[k]
                    if held >= BIN_PHOTONS or k + 1 - edges[-1] >= 16:
                        edges.append(k + 1)
                        held = 0.0
                at = np.array(edges[:-1])
                n, total = np.add.reduceat(pixels, at), np.add.reduceat(counts, at)
                centre = np.add.reduceat(pixels * (np.arange(len(pixels)) + 0.5), at)
                seen = n > 0
                self._curve.append((centre[seen] / n[seen] * width, total[seen] / n[seen]))
        return self._curve

    def template(self, view: Any, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Mean background at the pixels of the boxes, counts per pixel, [B, y, x]; 0 where nothing is known."""
        result = np.zeros((len(rows), *view.box[1:]), np.float32)
        for number, panel, at in self._groups(view, rows):
            s, rate = self._curves()[number]
            if len(s):
                result[at] = np.interp(self._s(view, rows[at], number, panel), s, rate)
        return result


def _tail(rate: Array) -> Array:
    """Counts above which a pixel of this Poisson rate is an outlier (Cornish-Fisher, probability 1e-4)."""
    return np.ceil(rate + TAIL_SIGMA * np.sqrt(rate) + (TAIL_SIGMA**2 - 1) / 6)


class _Pixels(NamedTuple):
    """Background pixels of boxes, their images added up."""

    counts: Array  # [N, Q]
    exposure: Array  # [N, Q] images that were added

    def log_likelihood(self, rate: Array) -> Array:
        safe = np.maximum(rate, 1e-12)
        return np.einsum("nq,nq->n", self.counts, np.log(safe)) - np.einsum("nq,nq->n", self.exposure, safe)

    def fit(self, design: Array, log_link: bool, start: Array) -> tuple[Array, Array]:
        """Maximum likelihood of rate = design . beta, or its exponential, by Newton's method with Fisher's matrix.

        Args:
            design: [N or 1, K, Q].
            log_link: the exponential.
            start: beta, [N, K].

        Returns:
            rate [N, Q], and Fisher's matrix [N, K, K].
        """
        beta = start.copy()
        floor = LOWEST * np.exp(start[:, :1]) if log_link else LOWEST * start[:, :1]
        k = design.shape[1]
        for _ in range(NEWTON_STEPS + 1):
            linear = np.einsum("nkq,nk->nq", np.broadcast_to(design, (len(beta), *design.shape[1:])), beta)
            rate = np.exp(np.clip(linear, -30, 30)) if log_link else np.maximum(linear, np.maximum(floor, 1e-9))
            if log_link:
                weight, slope = self.exposure * rate, self.counts - self.exposure * rate
            else:
                weight, slope = self.exposure / rate, self.counts / rate - self.exposure
            fisher = np.einsum("nkq,nq,nlq->nkl", design, weight, design, optimize=True)
            gradient = np.einsum("nkq,nq->nk", design, slope, optimize=True)
            scale = np.einsum("nkk->nk", fisher).max(axis=1)[:, None, None]
            step = np.linalg.solve(fisher + 1e-9 * np.maximum(scale, 1e-12) * np.eye(k), gradient[..., None])[..., 0]
            if log_link:
                step = np.clip(step, -1, 1)
            beta = beta + step
        return rate, fisher


@dataclass
class _Best:
    """The best model so far of each box."""

    rate: Array  # [N, Q]
    score: Array  # [N] 2 log L - k log n
    kind: NDArray[np.uint8]
    variance: Array  # [N] of the mean rate

    def offer(self, rows: NDArray, rate: Array, score: Array, kind: Kind, variance: Array) -> None:
        with np.errstate(invalid="ignore"):
            better = score > self.score[rows]
        at = rows[better]
        self.rate[at], self.score[at], self.kind[at] = rate[better], score[better], kind
        self.variance[at] = variance[better]


def _mean_variance(gradient: Array, fisher: Array) -> Array:
    """Variance of a mean rate with this derivative [N, K] to the parameters."""
    k = fisher.shape[1]
    scale = np.maximum(np.einsum("nkk->nk", fisher).max(axis=1), 1e-12)[:, None, None]
    spread = np.linalg.solve(fisher + 1e-9 * scale * np.eye(k), gradient[..., None])[..., 0]
    return np.einsum("nk,nk->n", gradient, spread)


def _models(pixels: _Pixels, template: Array | None, xy: Array, dispersion: float, start: Array) -> _Best:
    """Fit the candidates to every box and keep the best of each.

    Args:
        template: rate of the radial background, [N, Q], or None.
        xy: coordinates of the pixels, [2, Q], from -1 to 1.
        dispersion: variance / mean of the counts.
        start: flat rate, [N].
    """
    n_boxes, q = pixels.counts.shape
    total, exposure = pixels.counts.sum(axis=1), pixels.exposure.sum(axis=1)
    n = np.maximum((pixels.exposure > 0).sum(axis=1), 1)
    everyone = np.arange(n_boxes)

    def criterion(rate: Array, rows: NDArray, k: int) -> Array:
        part = _Pixels(pixels.counts[rows], pixels.exposure[rows])
        return 2 * part.log_likelihood(rate) / dispersion - k * np.log(n[rows])

    flat = np.broadcast_to(start[:, None], (n_boxes, q)).copy()
    variance = np.maximum(total, 1.0) / np.maximum(exposure, 1.0) ** 2
    best = _Best(flat, criterion(flat, everyone, 1), np.full(n_boxes, Kind.Flat, np.uint8), variance)
    enough = (n >= MIN_PIXELS) & (total > 0)
    if template is not None:
        known = np.flatnonzero(enough & (template.min(axis=1) > 0))
        if len(known):
            here = template[known]
            height = total[known] / np.einsum("nq,nq->n", pixels.exposure[known], here)
            rate = height[:, None] * here
            relative = 1 / np.maximum(total[known], 1.0)
            best.offer(
                known, rate, criterion(rate, known, 1) + RADIAL_ODDS, Kind.Radial, relative * rate.mean(axis=1) ** 2
            )
            # With a height of its own above the smooth part, where that is clearly better: ice is not even all round.
            uneven = here.max(axis=1) > 1.1 * here.min(axis=1)
            rows, here = known[uneven], here[uneven]
            if len(rows):
                design = np.stack([np.ones_like(here), here / here.mean(axis=1, keepdims=True)], axis=1)
                begin = np.stack([0.5 * start[rows], 0.5 * start[rows]], axis=1)
                part = _Pixels(pixels.counts[rows], pixels.exposure[rows])
                rate, fisher = part.fit(design, False, begin)
                gradient = design.mean(axis=2)
                best.offer(
                    rows, rate, criterion(rate, rows, 2) + RADIAL_ODDS, Kind.Radial, _mean_variance(gradient, fisher)
                )
    # Score test of a slope at the best model so far: chi^2 = u V^-1 u.
    residual = pixels.counts - pixels.exposure * best.rate
    design = np.concatenate([np.ones((1, q)), xy])[None]
    u = np.einsum("nq,kq->nk", residual, xy)
    weight = pixels.exposure * best.rate
    full = np.einsum("nq,kq,lq->nkl", weight, design[0], design[0], optimize=True)
    some = np.maximum(full[:, 0, 0], 1e-12)
    v = full[:, 1:, 1:] - full[:, 1:, :1] * full[:, :1, 1:] / some[:, None, None]
    v = v + 1e-6 * (np.einsum("nkk->n", v)[:, None, None] + 1e-9) * np.eye(2)
    chi2 = np.einsum("nk,nk->n", u, np.linalg.solve(v, u[..., None])[..., 0]) / dispersion
    rows = np.flatnonzero(enough & (chi2 > SCORE))
    if len(rows):
        part = _Pixels(pixels.counts[rows], pixels.exposure[rows])
        zero = np.zeros(len(rows))
        rate, fisher = part.fit(design, False, np.stack([start[rows], zero, zero], axis=1))
        gradient = np.broadcast_to(design[0].mean(axis=1), (len(rows), 3))
        best.offer(rows, rate, criterion(rate, rows, 3), Kind.Plane, _mean_variance(gradient, fisher))
        rate, fisher = part.fit(design, True, np.stack([np.log(start[rows]), zero, zero], axis=1))
        gradient = np.einsum("nq,kq->nk", rate, design[0]) / q
        best.offer(rows, rate, criterion(rate, rows, 3), Kind.LogLinear, _mean_variance(gradient, fisher))
    return best


def choose_background(
    counts: NDArray,
    use: NDArray[np.bool_],
    box: tuple[int, int, int],
    *,
    template: NDArray | None = None,
    dispersion: float = 1.0,
) -> ShapedBackground:
    """The shape and height of the background of each box.

    Args:
        counts: photons, [N, P], any real dtype, pixels in the order z, y, x.
        use: pixels that are background, bool [N, P].
        box: z, y, x size, of P voxels.
        template: what `RadialBackground.template` gives for these boxes, [N, y, x]; None: no radial candidate.
        dispersion: variance / mean of the counts: 1 for photons, above for charge-integrating detectors, whose counts
            then decide less (quasi-likelihood) and have larger variances.

    Returns:
        ShapedBackground. A box without background pixels has mean 0, variance inf, dispersion 1 and a flat shape.
    """
    n_z, n_y, n_x = box
    counts = np.asarray(counts, np.float32)
    use = np.asarray(use, bool)
    n_boxes, q = len(counts), n_y * n_x
    stack = counts.reshape(n_boxes, n_z, q)
    usable = use.reshape(n_boxes, n_z, q)
    y, x = np.meshgrid(np.linspace(-1, 1, n_y), np.linspace(-1, 1, n_x), indexing="ij")
    xy = np.stack([x.ravel(), y.ravel()])
    radial = None if template is None else np.asarray(template, float).reshape(n_boxes, q)
    root = np.sqrt(dispersion)

    def limit(rate: Array) -> Array:
        return np.maximum(_tail(rate), rate + root * (_tail(rate) - rate)).astype(np.float32)

    # Before anything is known, only what no candidate can explain is left out.
    mean = np.einsum("nzq,nzq->n", stack, usable, dtype=np.float64) / np.maximum(usable.sum(axis=(1, 2)), 1)
    for _ in range(2):
        ceiling = limit(4 * mean + 1)
        keep = usable & (stack <= ceiling[:, None, None])
        mean = np.einsum("nzq,nzq->n", stack, keep, dtype=np.float64) / np.maximum(keep.sum(axis=(1, 2)), 1)
    best = None
    for _ in range(ROUNDS):
        exposure = keep.sum(axis=1).astype(float)
        pixels = _Pixels(np.where(keep, stack, 0).sum(axis=1, dtype=np.float64), exposure)
        start = np.maximum(pixels.counts.sum(axis=1), 0.5) / np.maximum(exposure.sum(axis=1), 1.0)
        best = _models(pixels, radial, xy, dispersion, start)
        previous, keep = keep, usable & (stack <= limit(best.rate)[:, None, :])
        if np.array_equal(keep, previous):
            break
    assert best is not None
    n = keep.sum(axis=(1, 2), dtype=np.int64)
    rate = best.rate[:, None, :]
    some = np.maximum(n, 1)
    square = np.where(keep, (stack - rate) ** 2 / rate, 0).sum(axis=(1, 2))
    average = best.rate.mean(axis=1)
    shape = (best.rate / average[:, None]).astype(np.float32)
    nothing = n == 0
    return ShapedBackground(
        shape=np.repeat(np.where(nothing[:, None], 1.0, shape)[:, None], n_z, axis=1).reshape(n_boxes, n_z * q),
        mean=np.where(nothing, 0.0, np.where(pixels.counts.sum(axis=1) > 0, average, 0.0)),
        variance=np.where(nothing, np.inf, dispersion * best.variance),
        dispersion=np.where(n > 1, square / some, 1.0),
        kind=best.kind,
        n_used=n,
        outlier=use & ~keep.reshape(n_boxes, n_z * q),
    )
