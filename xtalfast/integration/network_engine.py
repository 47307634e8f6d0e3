"""The network engine: amortised inference proposes spot shapes and q(I), which the exact estimator then refines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtalfast.errors import InputError
from xtalfast.integration import fit
from xtalfast.integration.config import IntegrationConfig
from xtalfast.integration.model import IntegrationModel, NetworkProfiles
from xtalfast.integration.options import NETWORK_OPTIONS, IntegrateOptions

if TYPE_CHECKING:
    from xtalfast.integration.integrate import Prepared

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TrainedNetwork:
    """A network with what is to be said of its training."""

    checkpoint: Path
    history: list[dict[str, float]]
    figures: dict[str, Any]
    profiles: NetworkProfiles


def network_settings(options: IntegrateOptions) -> tuple[IntegrateOptions, IntegrationConfig | None]:
    """What to train; with given weights nothing, and by default the box that they were trained on."""
    if options.weights is not None:
        for name in NETWORK_OPTIONS:
            if name != "weights" and name in options.network_options:
                raise InputError(f"--{name} is part of the trained network: leave it out with --weights")
        trained = fit.load_checkpoint(options.weights).config
        return replace(options, box=options.box or trained.box), None
    return options, IntegrationConfig.preset(options.preset, encoder=options.encoder, profile=options.profile)


def trained_network(
    prepared: Prepared, config: IntegrationConfig | None, options: IntegrateOptions, progress: Progress | None
) -> TrainedNetwork:
    """The network to use, trained on the prepared store or given."""
    if config is None:
        assert options.weights is not None
        checkpoint = Path(options.weights)
        model = fit.load_checkpoint(checkpoint, options.torch_device)
        if tuple(model.config.box) != tuple(prepared.store.box or ()):
            raise InputError(
                f"{checkpoint} was trained on boxes of {model.config.box} (z, y, x), these are {prepared.store.box}; "
                f"use --box {','.join(map(str, model.config.box))}"
            )
        return TrainedNetwork(checkpoint, [], {}, _profiles(model, prepared))
    name = f"{Path(config.name).stem}-{config.combination.replace('/', '-')}"
    result = fit.train(
        [prepared.store],
        config,
        prepared.directory / "training" / name,
        seed=options.seed,
        epochs=options.epochs,
        resume=options.resume,
        reference_profiles=[prepared.profiles] if config.profile.kind == "dials" else None,
        progress=progress,
        device=options.device,
    )
    figures = {"steps": result.steps, "seconds": result.seconds, "n_train": result.n_train}
    figures |= {"n_held_out": result.n_held_out, "epochs": result.history[-1]["epoch"] if result.history else 0}
    model = fit.load_checkpoint(result.checkpoint, options.torch_device)
    return TrainedNetwork(result.checkpoint, result.history, figures, _profiles(model, prepared))


def _profiles(model: IntegrationModel, prepared: Prepared) -> NetworkProfiles:
    given = prepared.profiles if model.config.profile.kind == "dials" else None
    return NetworkProfiles(model, prepared.store, reference_profiles=given)
