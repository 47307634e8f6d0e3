"""Intensities of every reflection of a store, given its spot profile: three channels and what they rest on.

- `intensity.sum.*`: own summation: counts of the foreground above the robust mean of the background pixels. It is the
  recorded part of the reflection: dials.scale divides it by `partiality`.
- `intensity.prf.*`: likelihood only (`ops.profile_fit`): one weighted linear fit of intensity and background, with
  weights and variance taken at the posterior mean. Unbiased, may be negative; what dials.scale should see. It is the
  intensity of the whole reflection: what lies outside box, scan or mask is supplied by the profile, as in DIALS.
- `intensity.vi.*`: exact posterior mean and variance (`ops.intensity_posterior`) under the empirical Wilson prior, of
  the whole reflection. Shrunk and positive: for looking at, not for merging.
- `intensity.q.*`: mean and variance of a network's own q(I), when there is one.

A reflection whose foreground is partly masked keeps its summation value without the flag IntegratedSum; one whose
profile lies mostly under the mask has intensity 0, variance -1 and no flag, as in DIALS. A box without any used pixel
has that in every channel. A box without a single photon has a summation variance of one count squared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtalfast.errors import InputError
from xtalfast.integration.background import robust_background
from xtalfast.integration.gaussian_rs import ReferenceProfiles
from xtalfast.integration.priors import BackgroundPrior, Priors, WilsonPrior, centric_and_epsilon, space_groups
from xtalfast.integration.spot_shape import SpotWidths, images_in_scan, rotation_edges
from xtalfast.integration.spot_voxels import SpotPixels
from xtalfast.io import Flag
from xtalfast.masks import BACKGROUND, FOREGROUND, used_pixels
from xtalfast.models import Array, Experiment
from xtalfast.ops import intensity_posterior, profile_fit

Progress = Callable[[str, int, int], None]

VALID_PROFILE = 0.75  # share of the recorded profile that must be unmasked, DIALS' valid_foreground_threshold
MIN_RECORDED = 0.1  # share of the whole spot that must be recorded
PRIOR_ROWS = 20000  # reflections that the priors are fitted to


@dataclass
class Estimates:
    """Estimates of all rows of a store, in its order.

    Attributes:
        columns: name of the `.refl` column -> values [N], as described at the top of this module; besides the channels
            background.mean and .variance (counts per pixel), profile.correlation, partiality and num_pixels.*.
        flags: bits of `Flag` to set in the rows' flags, uint64 [N].
        priors: those used.
        diagnostics: numbers for log and report.
    """

    columns: dict[str, NDArray]
    flags: NDArray[np.uint64]
    priors: Priors
    diagnostics: dict[str, Any] = field(default_factory=dict)

    @property
    def integrated_sum(self) -> NDArray[np.bool_]:
        """Rows with a summation value that can be trusted."""
        return (self.flags & np.uint64(Flag.IntegratedSum)) != 0

    @property
    def integrated_prf(self) -> NDArray[np.bool_]:
        """Rows with a profile-fitted and a posterior value."""
        return (self.flags & np.uint64(Flag.IntegratedPrf)) != 0


def foreground(
    store: Any, experiments: Sequence[Experiment], widths: SpotWidths, rows: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Voxels that the ellipsoid of `n_sigma` widths about the predicted position touches.

    (epsilon1^2 + epsilon2^2) / (n sigma_b)^2 + epsilon3^2 / (n sigma_m)^2 <= 1 at the nearest point of the voxel.

    Args:
        store: ShoeboxStore with one size of box.
        experiments: one per `id` of the store.
        widths: sigma_b, sigma_m (rad) and n_sigma.
        rows: rows of the store, [B].

    Returns:
        bool [B, P].
    """
    metadata = {name: np.asarray(store.metadata[name][rows]) for name in ("id", "panel", "xyzcal_px", "bbox")}
    xyz = metadata["xyzcal_px"].astype(float)
    pixels, _ = SpotPixels.of_rows(experiments, metadata["id"], metadata["panel"], metadata["bbox"], xyz, store.box)
    rotation = np.zeros((len(rows), store.box[0]), np.float32)
    edges, _ = rotation_edges(store, experiments, rows)
    if edges.shape[1] and widths.sigma_m > 0:
        low, high = edges[:, :-1], edges[:, 1:]
        nearest = np.where(low * high <= 0, 0.0, np.minimum(np.abs(low), np.abs(high)))
        rotation = (nearest / (widths.n_sigma * widths.sigma_m)) ** 2
    return pixels.foreground(widths.n_sigma * widths.sigma_b, rotation).reshape(len(rows), -1)


def label_foreground(
    store: Any,
    experiments: Sequence[Experiment],
    sigma_b: float,
    sigma_m: float,
    n_sigma: float = 3.0,
    rows: NDArray[np.int64] | None = None,
) -> NDArray[np.uint8]:
    """Mask of some rows with the bits Foreground (4) and Background (2) set from the widths of the spots.

    Args:
        store: ShoeboxStore with one size of box; it is not changed.
        experiments: one per `id` of the store.
        sigma_b: width along epsilon1 and epsilon2, rad.
        sigma_m: width along epsilon3, rad; 0 for stills.
        n_sigma: size of the foreground in widths.
        rows: rows of the store, [B]; None: all.

    Returns:
        DIALS mask bits uint8 [B, P]. Voxels that are not Valid, or are Overlapped, are labelled too.
    """
    rows = np.arange(store.n) if rows is None else np.asarray(rows, np.int64)
    inside = foreground(store, experiments, SpotWidths(sigma_b, sigma_m, n_sigma), rows)
    mask = np.asarray(store.mask(rows), np.uint8) & np.uint8(255 - FOREGROUND - BACKGROUND)
    return mask | np.where(inside, np.uint8(FOREGROUND), np.uint8(BACKGROUND))


@dataclass(frozen=True)
class _Batch:
    """Pixels of some rows."""

    rows: NDArray[np.int64]
    counts: NDArray  # [B, P]
    used: NDArray[np.bool_]  # [B, P]
    inside: NDArray[np.bool_]  # [B, P] foreground
    in_scan: NDArray[np.bool_]  # [B, P]

    @property
    def outside(self) -> NDArray[np.bool_]:
        return self.used & ~self.inside


def _read(store: Any, experiments: Sequence[Experiment], widths: SpotWidths, rows: NDArray[np.int64]) -> _Batch:
    in_scan = np.repeat(images_in_scan(store, experiments, rows), store.n_pixels // store.box[0], axis=1)
    used = used_pixels(store.mask(rows)) & in_scan
    return _Batch(rows, store.counts(rows), used, foreground(store, experiments, widths, rows), in_scan)


def _sum(batch: _Batch) -> tuple[dict[str, NDArray], NDArray[np.bool_], NDArray[np.bool_]]:
    """Summation columns, their success, and the pixels fit for profile fitting (used, without background outliers).

    Variance as in DIALS: the counts expected in the foreground, |I| + n B, and the error of the background, n^2 var(B).
    """
    background = robust_background(batch.counts, batch.outside)
    pixels = batch.used & batch.inside
    n = pixels.sum(axis=1)
    total = np.einsum("np,np->n", batch.counts, pixels, dtype=np.float64)
    value = total - n * background.mean
    has_background = background.n_used > 0
    spread = np.where(has_background, background.variance, 0.0)
    variance = np.maximum(np.abs(value) + n * background.mean + n**2 * spread, 1.0)
    something = (n > 0) & has_background
    complete = something & ~(batch.inside & batch.in_scan & ~batch.used).any(axis=1)
    columns = {
        "intensity.sum.value": np.where(something, value, 0.0),
        "intensity.sum.variance": np.where(something, variance, -1.0),
        "background.mean": background.mean,
        "background.variance": np.where(has_background, background.variance, -1.0),
        "background.dispersion": background.dispersion,
        "num_pixels.valid": batch.used.sum(axis=1).astype(np.int32),
        "num_pixels.foreground": n.astype(np.int32),
        "num_pixels.background": batch.outside.sum(axis=1).astype(np.int32),
        "num_pixels.background_used": background.n_used.astype(np.int32),
    }
    return columns, complete, batch.used & ~background.outlier


def _profiles(source: Any, reference: ReferenceProfiles | None, rows: NDArray[np.int64]) -> tuple[Tensor, Array]:
    """Profiles [B, P] and the share of each spot that its box holds [B]."""
    if source is reference and reference is not None:
        profile, coverage = reference.profiles_and_coverage(rows)
        return profile, coverage.numpy().astype(float)
    coverage = reference.coverage(rows).numpy().astype(float) if reference is not None else np.ones(len(rows))
    return source.profiles(rows), coverage


@dataclass(frozen=True)
class _Symmetry:
    """What the Wilson prior needs to know of each row."""

    d: Array
    centric: NDArray[np.bool_]
    epsilon: Array
    correction: Array


def _symmetry(store: Any, experiments: Sequence[Experiment]) -> _Symmetry:
    d = np.asarray(store.metadata["d"][:], float)
    centric, epsilon = np.zeros(store.n, bool), np.ones(store.n)
    hkl = np.asarray(store.metadata["hkl"][:])
    for rows, group in space_groups(experiments, np.asarray(store.metadata["id"][:])):
        centric[rows], epsilon[rows] = centric_and_epsilon(hkl[rows], group)
    correction = np.asarray(store.metadata["lp"][:], float)
    return _Symmetry(d, centric, epsilon, np.where(np.isfinite(correction) & (correction > 0), correction, 1.0))


def _usable(profile: Tensor, coverage: Array, batch: _Batch, use: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Rows with enough of their profile under unmasked pixels to fit it."""
    shape = profile.numpy()
    recorded = np.einsum("np,np->n", shape, batch.in_scan)
    seen = np.einsum("np,np->n", shape, use)
    return (seen >= VALID_PROFILE * recorded) & (seen * coverage >= MIN_RECORDED) & (use.sum(axis=1) >= 2)


def fit_priors(
    store: Any,
    source: Any,
    experiments: Sequence[Experiment],
    *,
    reference: ReferenceProfiles | None = None,
    widths: SpotWidths | None = None,
    batch: int = 2048,
    progress: Progress | None = None,
) -> Priors:
    """Wilson and background prior from likelihood-only estimates of up to PRIOR_ROWS evenly chosen reflections.

    Arguments as for `estimate`.

    Raises:
        InputError: not a single reflection can be fitted.
    """
    reference, widths = _geometry_of(source, reference, experiments, widths)
    rows = np.unique(np.linspace(0, store.n - 1, min(store.n, PRIOR_ROWS)).round().astype(np.int64))
    symmetry = _symmetry(store, experiments)
    found: list[Array] = []
    for start in range(0, len(rows), batch):
        part = _read(store, experiments, widths, rows[start : start + batch])
        columns, _, use = _sum(part)
        profile, coverage = _profiles(source, reference, part.rows)
        fit = profile_fit(torch.from_numpy(part.counts), torch.from_numpy(use), profile)
        good = _usable(profile, coverage, part, use)
        share = np.where(good, coverage, 1.0)  # some boxes hold nothing of their spot
        values = np.stack(
            [
                fit.i.numpy() / share,
                fit.var_i.numpy() / share**2,
                columns["background.mean"],
                columns["background.variance"],
                part.rows,
            ]
        )
        found.append(values[:, good])
        if progress:
            progress("priors", min(start + batch, len(rows)), len(rows))
    intensity, variance, mean, mean_variance, row = np.concatenate(found, axis=1) if found else np.zeros((5, 0))
    at = row.astype(np.int64)
    d, known = symmetry.d[at], mean_variance > 0
    return Priors(
        WilsonPrior.fit(intensity, variance, d, symmetry.epsilon[at], symmetry.correction[at]),
        BackgroundPrior.fit(mean[known], mean_variance[known], d[known]),
    )


def _geometry_of(
    source: Any,
    reference: ReferenceProfiles | None,
    experiments: Sequence[Experiment],
    widths: SpotWidths | None,
) -> tuple[ReferenceProfiles | None, SpotWidths]:
    """The reference that knows coverage and partiality, and the widths of the foreground."""
    if reference is None and isinstance(source, ReferenceProfiles):
        reference = source
    if widths is None:
        widths = (
            reference.widths if reference else SpotWidths.from_profile(experiments[0].profile if experiments else None)
        )
    if widths is None:
        raise InputError(
            "the foreground needs sigma_b and sigma_m: give widths, reference profiles, "
            "or an .expt with a gaussian_rs profile block"
        )
    return reference, widths


def estimate(
    store: Any,
    source: Any,
    experiments: Sequence[Experiment],
    *,
    reference: ReferenceProfiles | None = None,
    widths: SpotWidths | None = None,
    priors: Priors | None = None,
    network: Any | None = None,
    batch: int = 2048,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Estimates:
    """Integrate every reflection of a store.

    Args:
        store: ShoeboxStore with one size of box.
        source: spot profiles, anything with `profiles(rows) -> float32 [B, P]`: `ReferenceProfiles`, `NetworkProfiles`.
        experiments: one per `id` of the store.
        reference: knows which share of a spot its box and the scan hold; None takes `source` if it does, else every
            box is taken to hold its whole spot and no `partiality` is given.
        widths: size of the foreground; None takes those of the reference, else of the profile block of the `.expt`.
        priors: None fits them to this store.
        network: something with `moments(rows)` (`NetworkProfiles`), for `intensity.q.*`.
        batch: reflections at a time.
        device: where the fits run.
        progress: called as progress("estimate", done, total).

    Returns:
        Estimates, one row per row of the store.

    Raises:
        InputError: boxes of several sizes, no widths to be had, or no reflection that the priors can be fitted to.
    """
    if store.box is None:
        raise InputError("estimates need boxes of one size: extract the store with box=(z, y, x), not 'bbox'")
    reference, widths = _geometry_of(source, reference, experiments, widths)
    if priors is None:
        priors = fit_priors(
            store, source, experiments, reference=reference, widths=widths, batch=batch, progress=progress
        )
    symmetry = _symmetry(store, experiments)
    columns: dict[str, NDArray] = {}
    flags = np.zeros(store.n, np.uint64)
    for start in range(0, store.n, batch):
        rows = np.arange(start, min(start + batch, store.n))
        part = _read(store, experiments, widths, rows)
        found, complete, use = _sum(part)
        profile, coverage = _profiles(source, reference, rows)
        usable = _usable(profile, coverage, part, use)
        fitted = _fit(part, use, profile, coverage, usable, priors, symmetry, device)
        usable, found = usable & (fitted["intensity.prf.variance"] > 0), found | fitted
        if reference is not None:
            found["partiality"] = reference.partiality(rows).numpy().astype(float)
        if network is not None:
            moments = network.moments(rows)
            some = part.used.any(axis=1)
            found["intensity.q.value"] = np.where(some, moments["mean_i"] / coverage, 0.0)
            found["intensity.q.variance"] = np.where(some, moments["var_i"] / coverage**2, -1.0)
        for name, values in found.items():
            columns.setdefault(name, np.zeros(store.n, values.dtype))[rows] = values
        for good, done, failed in (
            (complete, Flag.IntegratedSum, Flag.FailedDuringSummation),
            (usable, Flag.IntegratedPrf, Flag.FailedDuringProfileFitting),
        ):
            flags[rows] |= np.where(good, np.uint64(done), np.uint64(failed))
        bad = (part.inside & part.in_scan & ~part.used).any(axis=1)
        flags[rows] |= np.where(bad, np.uint64(Flag.ForegroundIncludesBadPixels), np.uint64(0))
        if progress:
            progress("estimate", int(rows[-1]) + 1, store.n)
    result = Estimates(columns, flags, priors)
    result.diagnostics = _diagnostics(result, widths)
    return result


def _fit(
    part: _Batch,
    use: NDArray[np.bool_],
    profile: Tensor,
    coverage: Array,
    usable: NDArray[np.bool_],
    priors: Priors,
    symmetry: _Symmetry,
    device: torch.device | str,
) -> dict[str, NDArray]:
    """Posterior and likelihood-only columns of a batch; 0 with variance -1 where the profile cannot be fitted."""
    rows = part.rows
    failed = {
        "intensity.prf.value": 0.0,
        "intensity.prf.variance": -1.0,
        "intensity.vi.value": 0.0,
        "intensity.vi.variance": -1.0,
        "profile.correlation": 0.0,
    }
    columns = {name: np.full(len(rows), value) for name, value in failed.items()}
    if not usable.any():
        return columns
    at, kept = rows[usable], coverage[usable]
    counts = torch.from_numpy(part.counts[usable]).to(device)
    mask, shape = torch.from_numpy(use[usable]).to(device), profile[usable].to(device)
    shape_i, rate_i = priors.intensity.gamma(
        symmetry.d[at], symmetry.centric[at], symmetry.epsilon[at], symmetry.correction[at]
    )
    prior_i = (shape_i.to(device), (rate_i / torch.from_numpy(kept)).to(device))  # of the part inside the box
    shape_bg, rate_bg = priors.background.gamma(symmetry.d[at])
    posterior = intensity_posterior(counts, mask, shape, prior_i, (shape_bg.to(device), rate_bg.to(device)))
    fit = profile_fit(counts, mask, shape, at=(posterior.mean_i, posterior.mean_bg))
    found = {
        "intensity.prf.value": fit.i.cpu().numpy() / kept,
        "intensity.prf.variance": fit.var_i.cpu().numpy() / kept**2,
        "intensity.vi.value": posterior.mean_i.cpu().numpy() / kept,
        "intensity.vi.variance": posterior.var_i.cpu().numpy() / kept**2,
        "profile.correlation": _correlation(part, usable, use, profile, fit.i.cpu().numpy()),
    }
    finite = np.logical_and.reduce([np.isfinite(values) for values in found.values()])
    for name, values in found.items():
        columns[name][usable] = np.where(finite, values, failed[name])
    return columns


def _correlation(
    part: _Batch, rows: NDArray[np.bool_], use: NDArray[np.bool_], profile: Tensor, intensity: Array
) -> Array:
    """Correlation of counts and fitted model over the used foreground voxels of some rows, 0 where one is constant.

    DIALS correlates the same two after mapping them to its reciprocal-space grid, which smooths the noise: its values
    are higher for weak reflections.
    """
    weight = (use & part.inside)[rows].astype(float)
    weight /= np.maximum(weight.sum(axis=1, keepdims=True), 1)
    counts, model = part.counts[rows].astype(float), profile.numpy()[rows].astype(float)
    counts -= np.einsum("np,np->n", weight, counts)[:, None]
    model -= np.einsum("np,np->n", weight, model)[:, None]
    variance = np.einsum("np,np,np->n", weight, counts, counts) * np.einsum("np,np,np->n", weight, model, model)
    covariance = np.einsum("np,np,np->n", weight, counts, model) * np.sign(intensity)
    return np.where(variance > 0, covariance / np.sqrt(np.where(variance > 0, variance, 1.0)), 0.0)


def _diagnostics(estimates: Estimates, widths: SpotWidths) -> dict[str, Any]:
    """Counts, and how the two prior-free channels agree for strong reflections (1 where the profile is right)."""
    columns = estimates.columns
    both = estimates.integrated_sum & estimates.integrated_prf
    partiality = columns.get("partiality", np.ones(len(both)))
    strong = both & (columns["intensity.prf.value"] > 20 * np.sqrt(np.abs(columns["intensity.prf.variance"])))
    ratio = columns["intensity.sum.value"][strong] / (columns["intensity.prf.value"] * partiality)[strong]
    wilson = estimates.priors.intensity
    return {
        "n": len(both),
        "n_integrated_sum": int(estimates.integrated_sum.sum()),
        "n_integrated_prf": int(estimates.integrated_prf.sum()),
        "sum_over_prf_strong": float(np.median(ratio)) if strong.any() else None,
        "sigma_b_deg": float(np.degrees(widths.sigma_b)),
        "sigma_m_deg": float(np.degrees(widths.sigma_m)),
        "wilson_d": (wilson.inverse_d2**-0.5).tolist(),
        "wilson_mean": np.exp(wilson.log_mean).tolist(),
    }
