"""How well spot shapes explain reflections that were kept from training, in nats a photon."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtalfast import ops
from xtalfast.errors import InputError
from xtalfast.integration.data import ProfileSource, ShoeboxLoader, ShoeboxSource
from xtalfast.integration.model import IntegrationModel
from xtalfast.ops.profiles import materialise


def evaluate(
    model: IntegrationModel,
    stores: Sequence[ShoeboxSource],
    rows: NDArray[np.int64],
    *,
    reference_profiles: Sequence[ProfileSource] | None = None,
    seed: int = 0,
    batch: int = 512,
) -> dict[str, Any]:
    """Log-likelihood a photon of a network's spot shapes, beside three that know less.

    - `model`: the spot shapes of the network;
    - `mean_profile`: one mean spot for all reflections;
    - `shuffled`: the network's spot shapes, handed to other reflections of the same batch;
    - `background`: no spot.

    Each is scored at the maximum-likelihood intensity and background of its own shape, so that shapes are compared and
    nothing else. In `log_likelihood` network, fit and score see the same counts. In `thinned` every photon is given to
    one of two halves at random: network and fit see the first half, the second, independent one is scored. There a
    shape gains nothing from following the noise of a box.

    Args:
        model: trained network.
        stores: opened stores.
        rows: reflections to score, numbered through all stores, e.g. `np.flatnonzero(held_out(...))`.
        reference_profiles: one source a store, for the profile model "dials".
        seed: of thinning and shuffling.
        batch: reflections at once.

    Returns:
        combination, n (reflections), photons, elbo (nats a reflection), and log_likelihood and thinned, each a dict of
        the four scores in nats a photon.

    Raises:
        InputError: no rows, or no photon in them.
    """
    if len(rows) < 2:
        raise InputError(f"scoring needs at least two reflections, got {len(rows)}")
    loader = ShoeboxLoader(stores, rows, batch, seed=seed, profiles=reference_profiles, thin=True)
    generator = torch.Generator().manual_seed(seed)
    device = model.mean_profile.device
    sums: dict[str, dict[str, float]] = {"log_likelihood": {}, "thinned": {}}
    photons = {"log_likelihood": 0.0, "thinned": 0.0}
    elbo = 0.0
    with torch.no_grad():
        for shoeboxes in loader.chunks(loader.rows):
            assert shoeboxes.seen is not None
            whole = replace(shoeboxes, seen=None)
            counts, half = shoeboxes.counts.to(torch.float32), shoeboxes.seen.to(torch.float32)
            order = torch.randperm(len(counts), generator=generator).roll(1)
            elbo -= float(model.losses(whole.to(device), seed=seed).double().sum())
            for name, shown, seen, scored in (
                ("log_likelihood", whole, counts, counts),
                ("thinned", shoeboxes, half, counts - half),
            ):
                shapes = materialise(model(shown.to(device)).profile).cpu()
                used = shoeboxes.used
                mean = model.mean_profile.cpu().expand_as(shapes)
                rates = {
                    "model": _fitted_rate(seen, used, shapes),
                    "mean_profile": _fitted_rate(seen, used, mean),
                    "shuffled": _fitted_rate(seen, used, shapes[order]),
                    "background": _flat_rate(seen, used),
                }
                for what, rate in rates.items():
                    sums[name][what] = sums[name].get(what, 0.0) + _log_likelihood(scored, used, rate)
                photons[name] += float((scored * used).double().sum())
    if not photons["log_likelihood"]:
        raise InputError(f"no photon in {len(rows)} reflections")
    scores = {
        name: {what: value / max(photons[name], 1.0) for what, value in values.items()} for name, values in sums.items()
    }
    return {
        "combination": model.config.combination,
        "n": len(rows),
        "photons": photons["log_likelihood"],
        "elbo": elbo / len(rows),
        **scores,
    }


def _fitted_rate(counts: Tensor, used: Tensor, profile: Tensor) -> Tensor:
    fit = ops.profile_fit(counts, used, profile, method="ml")
    return fit.i[:, None] * profile + fit.bg[:, None]


def _flat_rate(counts: Tensor, used: Tensor) -> Tensor:
    mean = (counts * used).sum(1, keepdim=True) / used.sum(1, keepdim=True).clamp(min=1)
    return mean.expand_as(counts)


def _log_likelihood(counts: Tensor, used: Tensor, rate: Tensor) -> float:
    # A rate of exactly 0 under a photon of the other half is the fit's failure to predict, not an infinite one.
    rate = rate.double().clamp(min=1e-4)
    terms = torch.xlogy(counts.double(), rate) - rate - torch.lgamma(counts.double() + 1)
    return float((terms * used).sum())
