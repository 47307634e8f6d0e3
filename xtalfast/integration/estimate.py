"""Intensities of every reflection of a store, given its spot profile: three channels and what they rest on.

- `intensity.sum.*`: own summation: counts of the foreground above the background (`background_shapes`). It is the
  recorded part of the reflection: dials.scale divides it by `partiality`.
- `intensity.prf.*`: likelihood only (`ops.profile_fit`): one weighted linear fit of intensity and background, with
  weights and variance taken at the intensity expected from the other observations of the reflection (`references`; at
  its own posterior mean where it has none, or is strong). Unbiased, may be negative; what dials.scale should see. It is
  the intensity of the whole reflection: what lies outside box, scan or mask is supplied by the profile, as in DIALS.
- `intensity.vi.*`: exact posterior mean and variance (`ops.intensity_posterior`) under the empirical Wilson prior, of
  the whole reflection. Shrunk and positive: for looking at, not for merging.
- `intensity.q.*`: mean and variance of a network's own q(I), when there is one.

A reflection whose foreground is partly masked keeps its summation value without the flag IntegratedSum; one whose
profile lies mostly under the mask has intensity 0, variance -1 and no flag, as in DIALS. A box without any used pixel
has that in every channel. A box without a single photon has a summation variance of one count squared. Spots that share
pixels with others are fitted together with these (`joint_fit`); `overlap.n` is the number of their neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtalfast.errors import InputError
from xtalfast.integration.background_shapes import ShapedBackground
from xtalfast.integration.gaussian_rs import ReferenceProfiles
from xtalfast.integration.joint_fit import joint_fit, wilson_mean
from xtalfast.integration.priors import BackgroundPrior, Priors, WilsonPrior, centric_and_epsilon, space_groups
from xtalfast.integration.references import Observations, leave_one_out, relative_scales
from xtalfast.integration.spot_shape import SpotWidths
from xtalfast.integration.strong_spots import boxes_by_size
from xtalfast.integration.summation import Batch, Reader, background_tensor, summation
from xtalfast.io import Flag
from xtalfast.masks import OVERLAPPED
from xtalfast.metrics.equivalents import canonical_index
from xtalfast.models import Array, Experiment
from xtalfast.ops import intensity_posterior, profile_fit

Progress = Callable[[str, int, int], None]

VALID_PROFILE = 0.75  # share of the recorded profile that must be unmasked, DIALS' valid_foreground_threshold
MIN_RECORDED = 0.1  # share of the whole spot that must be recorded
FIRST_LOOK_ERROR = 0.05  # of a strong reflection fitted with the weights of a weak one
LOST_TO_NEIGHBOURS = 0.003  # of a profile under the masks of others: such spots are fitted together with these
MAX_KEPT = 3 << 27  # bytes of pixels and profiles that stay in memory between the two passes
STRONG = 20.0  # sigmas from which a reflection is its own reference


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
    absent: NDArray[np.bool_]  # systematically: of them the prior knows nothing

    def of(self, rows: NDArray) -> _Symmetry:
        return _Symmetry(*(getattr(self, f.name)[rows] for f in fields(self)))


def _symmetry(store: Any, experiments: Sequence[Experiment]) -> _Symmetry:
    d = np.asarray(store.metadata["d"][:], float)
    centric, epsilon, absent = np.zeros(store.n, bool), np.ones(store.n), np.zeros(store.n, bool)
    hkl = np.asarray(store.metadata["hkl"][:])
    for rows, group in space_groups(experiments, np.asarray(store.metadata["id"][:])):
        centric[rows], epsilon[rows] = centric_and_epsilon(hkl[rows], group)
        absent[rows] = group.operations().systematic_absences(np.ascontiguousarray(hkl[rows], np.int32))
    correction = np.asarray(store.metadata["lp"][:], float)
    return _Symmetry(d, centric, epsilon, np.where(np.isfinite(correction) & (correction > 0), correction, 1.0), absent)


def _usable(profile: Tensor, coverage: Array, batch: Batch, use: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Rows with enough of their profile under unmasked pixels to fit it."""
    shape = profile.numpy()
    recorded = np.einsum("np,np->n", shape, batch.in_scan)
    seen = np.einsum("np,np->n", shape, use)
    return (seen >= VALID_PROFILE * recorded) & (seen * coverage >= MIN_RECORDED) & (use.sum(axis=1) >= 2)


class _FirstLook(NamedTuple):
    """Prior-free values of all rows of a store: what priors and references are made of."""

    intensity: Array  # [N] counts, of the whole spot
    variance: Array  # [N], -1 where there is none
    background: Array  # [N] counts per pixel
    background_variance: Array  # [N], -1 where there is none


class _Look(NamedTuple):
    """One batch with all that is known of it before a fit."""

    rows: NDArray[np.int64]  # of the whole store
    at: NDArray[np.int64]  # of the store of its size of box
    view: Any
    reference: ReferenceProfiles | None
    part: Batch
    background: ShapedBackground
    profile: Tensor
    coverage: Array


class _Batches:
    """The batches of a store, kept from the first pass to the second as long as they fit into MAX_KEPT bytes."""

    def __init__(
        self, store: Any, source: Any, reference: ReferenceProfiles | None, reader: Reader, batch: int
    ) -> None:
        self.store, self.source, self.reference, self.reader, self.batch = store, source, reference, reader, batch
        self._kept: dict[int, tuple[Batch, ShapedBackground, Tensor, Array]] = {}
        self._bytes = 0

    def __iter__(self) -> Iterator[_Look]:
        for rows_of, view, source, reference in _sources(self.store, self.source, self.reference):
            for start in range(0, len(rows_of), self.batch):
                at = np.arange(start, min(start + self.batch, len(rows_of)))
                key = int(rows_of[start])
                kept = self._kept.get(key)
                if kept is None:
                    part = self.reader.read(view, at)
                    kept = (part, self.reader.background(view, part), *_profiles(source, reference, at))
                    shape, outlier = kept[1].shape, kept[1].outlier
                    size = part.counts.nbytes + 3 * part.used.nbytes + shape.nbytes + outlier.nbytes + kept[2].nbytes
                    if self._bytes + size <= MAX_KEPT:
                        self._bytes += size
                        self._kept[key] = kept
                yield _Look(rows_of[at], at, view, reference, *kept)


def _first_look(store: Any, batches: _Batches, dispersion: float, tell: Progress) -> _FirstLook:
    """Fits with the weights of spots without intensity: fixed by the background alone, unbiased, good when weak."""
    found = _FirstLook(*(np.zeros(store.n) for _ in range(4)))
    done = 0
    for rows, _, _, _, part, background, profile, coverage in batches:
        use = part.used & ~background.outlier
        good = _usable(profile, coverage, part, use)
        weights = (0.0, torch.from_numpy(np.maximum(background.mean, 1e-3)))
        counts, mask = torch.from_numpy(part.counts), torch.from_numpy(use)
        fit = profile_fit(counts, mask, profile, background=background_tensor(background), at=weights)
        good &= np.isfinite(fit.var_i.numpy())
        share = np.where(good, coverage, 1.0)  # some boxes hold nothing of their spot
        found.intensity[rows] = np.where(good, fit.i.numpy() / share, 0.0)
        found.variance[rows] = np.where(good, dispersion * fit.var_i.numpy() / share**2, -1.0)
        found.background[rows] = background.mean
        found.background_variance[rows] = np.where(good & (background.n_used > 0), background.variance, -1.0)
        done += len(rows)
        tell("priors", done, store.n)
    return found


def _fit_priors(first: _FirstLook, symmetry: _Symmetry) -> Priors:
    """Wilson and background prior of the rows that could be fitted, absent reflections left out."""
    good = (first.variance > 0) & ~symmetry.absent
    # Weights of weak spots make strong ones noisy beyond their variance: a relative error stands for that.
    variance = first.variance + (FIRST_LOOK_ERROR * first.intensity) ** 2
    some, known = good & (first.variance > 0), good & (first.background_variance > 0)
    return Priors(
        WilsonPrior.fit(
            first.intensity[some], variance[some], symmetry.d[some], symmetry.epsilon[some], symmetry.correction[some]
        ),
        BackgroundPrior.fit(first.background[known], first.background_variance[known], symmetry.d[known]),
    )


def symmetry_mates(store: Any, experiments: Sequence[Experiment], intensity: Array, variance: Array) -> Observations:
    """Prior-free intensities [N] of the rows of a store with what relates them; absent reflections have variance -1."""
    symmetry = _symmetry(store, experiments)
    ids = np.asarray(store.metadata["id"][:], np.int64)
    hkl = np.asarray(store.metadata["hkl"][:])
    key, plus = np.zeros(store.n, np.int64), np.ones(store.n, bool)
    for n, (rows, group) in enumerate(space_groups(experiments, ids)):
        number, plus[rows] = canonical_index(hkl[rows], group)
        key[rows] = number * 8 + n % 8  # crystals of several space groups are not mates
    nothing = (hkl == 0).all(axis=1)  # spots without Miller indices are no mates of each other
    key[nothing] = -1 - np.flatnonzero(nothing)
    phi = np.zeros(store.n)
    for number in np.unique(ids[ids >= 0]):
        scan = experiments[int(number)].scan
        if scan is not None:
            at = ids == number
            phi[at] = np.asarray(store.metadata["xyzcal_px"][:, 2], float)[at] * abs(scan.oscillation[1])
    unique = np.unique(key, return_inverse=True)[1].ravel()
    variance = np.where(symmetry.absent, -1.0, variance)
    return Observations(intensity, variance, unique, plus, symmetry.correction, ids, phi)


def _references(
    store: Any, experiments: Sequence[Experiment], first: _FirstLook, symmetry: _Symmetry, priors: Priors
) -> tuple[Array, NDArray[np.bool_]]:
    """Intensity of each row expected from its symmetry mates, and whether it has any."""
    data = symmetry_mates(store, experiments, first.intensity, first.variance)
    wilson = priors.intensity.mean(symmetry.d, symmetry.epsilon, symmetry.correction)
    return leave_one_out(data, relative_scales(data), wilson)


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
    overlaps: bool = True,
    dispersion: float = 1.0,
    batch: int = 2048,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Estimates:
    """Integrate every reflection of a store.

    Args:
        store: ShoeboxStore, boxes of one size or several.
        source: spot profiles, anything with `profiles(rows) -> float32 [B, P]`: `ReferenceProfiles`, `NetworkProfiles`.
        experiments: one per `id` of the store.
        reference: knows which share of a spot its box and the scan hold; None takes `source` if it does, else every
            box is taken to hold its whole spot and no `partiality` is given.
        widths: size of the foreground; None takes those of the reference, else of the profile block of the `.expt`.
        priors: None fits them to this store.
        network: something with `moments(rows)` (`NetworkProfiles`), for `intensity.q.*`.
        overlaps: fit spots that share pixels together (`joint_fit`); False: mask what is nearer to another one.
        dispersion: variance / mean of the counts: 1 for photons; of a charge-integrating detector its gain.
        batch: reflections at a time.
        device: where the fits run.
        progress: called as progress("estimate", done, total).

    Returns:
        Estimates, one row per row of the store.

    Raises:
        InputError: no widths to be had, or no reflection that the priors can be fitted to.
    """
    reference, widths = _geometry_of(source, reference, experiments, widths)
    tell = progress or (lambda stage, done, total: None)
    symmetry = _symmetry(store, experiments)
    reader = Reader(experiments, widths, dispersion=dispersion).with_radial(store)
    batches = _Batches(store, source, reference, reader, batch)
    first = _first_look(store, batches, dispersion, tell)
    if priors is None:
        priors = _fit_priors(first, symmetry)
    expected, known = _references(store, experiments, first, symmetry, priors)
    expected = np.where(known, expected, np.nan)
    columns: dict[str, NDArray] = {}
    flags = np.zeros(store.n, np.uint64)
    held, lost = np.ones(store.n), np.zeros(store.n)  # of each spot in its box; of its profile to the masks of others
    done_rows = 0
    for rows, at, view, given, part, background, profile, coverage in batches:
        found, complete = summation(part, background, dispersion)
        use = part.used & ~background.outlier
        usable = _usable(profile, coverage, part, use)
        shape = background_tensor(background)
        law = symmetry.of(rows)
        fitted = _fit(part, use, profile, shape, coverage, usable, priors, law, expected[rows], dispersion, device)
        held[rows] = coverage
        lost[rows] = np.einsum("np,np->n", profile.numpy(), (view.mask(at) & OVERLAPPED) != 0)
        usable, found = usable & (fitted["intensity.prf.variance"] > 0), found | fitted
        if given is not None:
            found["partiality"] = given.partiality(at).numpy().astype(float)
        if network is not None:
            moments = network.moments(at)
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
        done_rows += len(at)
        tell("estimate", done_rows, store.n)
    result = Estimates(columns, flags, priors)
    columns["overlap.n"] = np.zeros(store.n, np.int32)
    if overlaps and (lost > LOST_TO_NEIGHBOURS).any():
        _fit_overlaps(result, store, source, reader, symmetry, expected, held, lost)
    result.diagnostics = _diagnostics(result, widths)
    return result


def _sources(
    store: Any, source: Any, reference: ReferenceProfiles | None
) -> Iterator[tuple[NDArray[np.int64], Any, Any, ReferenceProfiles | None]]:
    """Rows of each size of box, a store of them, and the sources of profile and coverage for that store."""
    for rows, view in boxes_by_size(store):
        if view is store:
            yield rows, view, source, reference
        else:
            given = reference.on(view) if reference is not None else None
            yield rows, view, given if source is reference else source.on(view), given


def _fit_overlaps(
    result: Estimates,
    store: Any,
    source: Any,
    reader: Reader,
    symmetry: _Symmetry,
    expected: Array,
    held: Array,
    lost: Array,
) -> None:
    """Replace the profile-fitted and posterior values of spots that share pixels by those of joint fits, in place."""
    columns, priors = result.columns, result.priors
    alone = result.integrated_prf
    own = np.where(alone, columns["intensity.vi.value"], np.nan)
    wilson = priors.intensity.mean(symmetry.d, symmetry.epsilon, symmetry.correction)
    reference = np.where(np.isfinite(expected), expected, np.where(np.isfinite(own), own, wilson))
    seen = columns["num_pixels.background_used"] > 0
    typical = float(np.median(columns["background.mean"][seen])) if seen.any() else 0.0

    def background_of(view: Any, at: NDArray[np.int64]) -> tuple[NDArray, NDArray]:
        background = reader.background(view, reader.read(view, at))
        return background.shape, background.outlier

    found = joint_fit(
        store,
        list(reader.experiments),
        lambda view: source.on(view),
        reference * held,
        np.where(alone, np.sqrt(np.abs(columns["intensity.prf.variance"])) * held, np.nan),
        np.where(seen, columns["background.mean"], typical),
        background_of=background_of,
        candidates=lost > 0.1 * LOST_TO_NEIGHBOURS,
    )
    good = (found.var_i > 0) & np.isfinite(found.i) & (held[found.rows] >= MIN_RECORDED)
    rows, share = found.rows[good], held[found.rows[good]]
    columns["overlap.n"][rows] = found.n_neighbours[good]
    value, variance = found.i[good] / share, reader.dispersion * found.var_i[good] / share**2
    columns["intensity.prf.value"][rows], columns["intensity.prf.variance"][rows] = value, variance
    law = symmetry.of(rows)
    shape, rate = (v.numpy() for v in priors.intensity.gamma(law.d, law.centric, law.epsilon, law.correction))
    columns["intensity.vi.value"][rows], columns["intensity.vi.variance"][rows] = wilson_mean(
        value, variance, shape, rate
    )
    result.flags[rows] &= ~np.uint64(Flag.FailedDuringProfileFitting)
    result.flags[rows] |= np.uint64(Flag.IntegratedPrf)


def _fit(
    part: Batch,
    use: NDArray[np.bool_],
    profile: Tensor,
    background: Tensor | None,
    coverage: Array,
    usable: NDArray[np.bool_],
    priors: Priors,
    symmetry: _Symmetry,
    expected: Array,
    dispersion: float,
    device: torch.device | str,
) -> dict[str, NDArray]:
    """Posterior and likelihood-only columns of a batch; 0 with variance -1 where the profile cannot be fitted.

    `symmetry` and `expected`, the intensity that the symmetry mates give (NaN without any), are of its rows.
    """
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
    kept, law = coverage[usable], symmetry.of(usable)
    counts = torch.from_numpy(part.counts[usable]).to(device)
    mask, shape = torch.from_numpy(use[usable]).to(device), profile[usable].to(device)
    shape_i, rate_i = priors.intensity.gamma(law.d, law.centric, law.epsilon, law.correction)
    prior_i = (shape_i.to(device), (rate_i / torch.from_numpy(kept)).to(device))  # of the part inside the box
    shape_bg, rate_bg = priors.background.gamma(law.d)
    sloping = None if background is None else background[torch.from_numpy(usable)].to(device)
    prior_bg = (shape_bg.to(device), rate_bg.to(device))
    posterior = intensity_posterior(counts, mask, shape, prior_i, prior_bg, background=sloping)
    # A strong reflection knows its own intensity better than scales between images tell it, and its noise is small.
    mates, own = torch.from_numpy(expected[usable] * kept).to(device), posterior.mean_i
    strong = own > STRONG * posterior.var_i.sqrt()
    weights = torch.where(torch.isnan(mates) | strong, own, mates)
    fit = profile_fit(counts, mask, shape, background=sloping, at=(weights, posterior.mean_bg))
    found = {
        "intensity.prf.value": fit.i.cpu().numpy() / kept,
        "intensity.prf.variance": dispersion * fit.var_i.cpu().numpy() / kept**2,
        "intensity.vi.value": posterior.mean_i.cpu().numpy() / kept,
        "intensity.vi.variance": dispersion * posterior.var_i.cpu().numpy() / kept**2,
        "profile.correlation": _correlation(part, usable, use, profile, fit.i.cpu().numpy()),
    }
    finite = np.logical_and.reduce([np.isfinite(values) for values in found.values()])
    for name, values in found.items():
        columns[name][usable] = np.where(finite, values, failed[name])
    return columns


def _correlation(
    part: Batch, rows: NDArray[np.bool_], use: NDArray[np.bool_], profile: Tensor, intensity: Array
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
