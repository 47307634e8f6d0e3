"""What a user may choose about an integration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from xtalfast.errors import InputError
from xtalfast.integration.device import choose_device

ENGINES = ("exact", "network")
NETWORK_OPTIONS = ("preset", "encoder", "profile", "weights", "epochs")
PUBLISH = ("likelihood", "posterior")


@dataclass(frozen=True)
class IntegrateOptions:
    """What a user may choose; None takes the preset's value, or what the data say."""

    engine: str | None = None  # exact | network; None: exact, or network when one of its options is given
    preset: str = "default"
    encoder: str | None = None  # cnn | fc
    profile: str | None = None  # softmax | mvn | lowrank | dials
    weights: Path | None = None  # a checkpoint: no training
    box: tuple[int, int, int] | None = None  # z, y, x; None: what the engine likes best
    publish: str = "likelihood"  # what intensity.prf.* holds: likelihood | posterior
    d_min: float | None = None  # A
    epochs: int | None = None
    image_dir: Path | None = None
    verify: bool = False  # check Content-MD5 of every image
    resume: bool = True
    device: str = "auto"  # auto | cpu | cuda[:N]
    calibrate: bool = False  # pulls from simulation, thinned halves and symmetry mates, for the report
    truth: Path | None = None  # of simulated data: shown in the report, used for nothing else
    seed: int = 0

    def __post_init__(self) -> None:
        if self.engine not in (None, *ENGINES):
            raise InputError(f"engine must be one of {', '.join(ENGINES)}, got {self.engine!r}")
        if self.engine == "exact" and self.network_options:
            raise InputError(
                f"{', '.join(self.network_options)}: part of the network engine; leave out, or use engine network"
            )
        if self.publish not in PUBLISH:
            raise InputError(f"publish must be one of {', '.join(PUBLISH)}, got {self.publish!r}")
        if self.weights is not None and not Path(self.weights).is_file():
            raise InputError(f"weights: no file {self.weights}; give the .ckpt that `xtalfast train integration` wrote")
        if self.truth is not None and not Path(self.truth).is_file():
            raise InputError(f"truth: no file {self.truth}; give the truth.npz that `xtalfast simulate` wrote")
        if self.d_min is not None and not self.d_min > 0:
            raise InputError(f"d_min must be a positive resolution in A, got {self.d_min}")
        if self.box is not None and (len(self.box) != 3 or min(self.box) < 1):
            raise InputError(f"box must be three positive sizes z, y, x, got {self.box}")
        if self.epochs is not None and self.epochs < 1:
            raise InputError(f"epochs must be at least 1, got {self.epochs}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be from 0 to 2^63 - 1, got {self.seed}")
        choose_device(self.device)

    @property
    def network_options(self) -> list[str]:
        """Names of the options given that only the network engine has."""
        return [name for name in NETWORK_OPTIONS if getattr(self, name) != type(self).__dict__[name]]

    @property
    def chosen_engine(self) -> str:
        """exact or network."""
        return self.engine or ("network" if self.network_options else "exact")

    @property
    def torch_device(self) -> str:
        """The device where networks and fits run."""
        return str(choose_device(self.device))
