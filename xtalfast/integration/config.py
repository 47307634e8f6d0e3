"""What an integration network is and how it is trained: nested dataclasses, filled from TOML files in `presets/`."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from xtalfast.errors import InputError

CHANNELS = ("counts", "mask", "x", "y", "z", "dx", "dy", "dz")
PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class EncoderConfig:
    """Shoebox -> latent vector."""

    kind: Literal["cnn", "fc"] = "cnn"
    latent: int = 64
    transform: Literal["anscombe", "none"] = "anscombe"  # of the counts; anscombe is standardised
    position: bool = True  # append the sub-voxel centroid and the detector position to the pooled features
    channels: tuple[str, ...] = ("counts", "dx", "dy", "dz")  # cnn: counts and mask give one plane an image
    widths: tuple[int, ...] = (16, 32, 32)  # cnn: channels of the stem and of each stage (stride 2)
    hidden: int = 128  # fc
    blocks: int = 1  # residual blocks (cnn: a stage)


@dataclass(frozen=True)
class ProfileConfig:
    """Latent vector -> how the intensity spreads over the voxels."""

    kind: Literal["mvn", "softmax", "lowrank", "dials"] = "softmax"  # dials: given with the data
    rank: int = 12  # lowrank: latent size of the basis


@dataclass(frozen=True)
class PosteriorConfig:
    """Latent vector -> q(I), q(Bg)."""

    start: Literal["moments", "constant"] = (
        "moments"  # the heads correct a linear fit of the mean spot | the data's mean
    )


@dataclass(frozen=True)
class LossConfig:
    """Equation 4 of the paper. A rate of None is scaled to the data: shape / mean of the training reflections."""

    prior_i_shape: float = 1.0  # 1: Exponential
    prior_i_rate: float | None = None  # 1 / counts
    prior_bg_shape: float = 1.0
    prior_bg_rate: float | None = None  # 1 / (counts per pixel)
    kappa_i: float = 1.0
    kappa_bg: float = 1.0
    kappa_hidden: float = 0.0  # photons with which the share of a spot under its mask is held at that of the mean spot
    estimator: Literal["quadrature", "mc"] = "quadrature"
    nodes: int | Literal["auto"] = "auto"  # quadrature
    samples: int = 1  # mc


@dataclass(frozen=True)
class TrainConfig:
    """The optimiser and its data."""

    batch: int = 128  # reflections a step, over all processes
    epochs: int = 10
    lr: float = 1e-3
    schedule: Literal["cosine", "constant"] = "cosine"  # cosine: after a linear warm-up
    warmup: float = 0.05  # fraction of all steps
    weight_decay: float = 0.0
    clip_norm: float | None = None
    thin: bool = False  # encoder sees a random half of the photons, the spot shape is scored on the other
    held_out: float = 0.1  # fraction of the reflections never trained on
    max_validation: int = 8192  # held-out reflections scored at each validation
    checkpoint_every: int = 2000  # steps; also at the end of every epoch
    patience: int | None = None  # validations without improvement before stopping
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"


@dataclass(frozen=True)
class IntegrationConfig:
    """A whole network with its training: encoder, profile model, variational distributions, loss, optimiser."""

    name: str = "default"
    box: tuple[int, int, int] = (3, 21, 21)  # z, y, x
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    posterior: PosteriorConfig = field(default_factory=PosteriorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        for channel in self.encoder.channels:
            if channel not in CHANNELS:
                raise InputError(f"encoder.channels must be of {', '.join(CHANNELS)}, got {channel!r}")
        if self.profile.kind == "lowrank" and self.profile.rank < 3:
            raise InputError(f"profile.rank must be at least 3 (the three shifts), got {self.profile.rank}")
        for name in ("batch", "epochs", "lr", "checkpoint_every"):
            if not getattr(self.train, name) > 0:
                raise InputError(f"train.{name} must be positive, got {getattr(self.train, name)}")
        if not 0 <= self.train.held_out < 1:
            raise InputError(f"train.held_out must be a fraction from 0 to below 1, got {self.train.held_out}")

    @classmethod
    def preset(
        cls, name: str | Path = "default", *, encoder: str | None = None, profile: str | None = None
    ) -> IntegrationConfig:
        """The preset of that name ("paper", "default") or TOML file, with another encoder or profile model if given.

        Raises:
            InputError: no such preset or file, or a setting in it that does not exist.
        """
        path = Path(name) if str(name).endswith(".toml") else PRESETS / f"{name}.toml"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in PRESETS.glob("*.toml")))
            if str(name).endswith(".toml"):
                raise InputError(f"preset: no file {name}; a preset is one of {known} or a .toml file")
            raise InputError(f"preset must be one of {known} or a .toml file, got {name!s}")
        try:
            values = tomllib.loads(path.read_text())
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"{path}: not valid TOML: {error}") from error
        values.pop("parameters", None)  # how many weights each combination has: for the reader, and checked by a test
        config = cls.from_dict({"name": path.stem, **values})
        return config.combined(f"{encoder or config.encoder.kind}/{profile or config.profile.kind}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> IntegrationConfig:
        """The inverse of `to_dict`; what is not given keeps its default."""
        return _from_dict(cls, values, "")

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, as TOML, JSON and checkpoints hold them."""
        return asdict(self)

    @property
    def combination(self) -> str:
        """The paper's name of the model: encoder/profile, e.g. "cnn/softmax"."""
        return f"{self.encoder.kind}/{self.profile.kind}"

    def combined(self, combination: str) -> IntegrationConfig:
        """The same settings with another "encoder/profile"."""
        encoder, _, profile = combination.partition("/")
        values = self.to_dict()
        values["encoder"]["kind"], values["profile"]["kind"] = encoder, profile
        return type(self).from_dict(values)


def _from_dict(cls: type, values: dict[str, Any], prefix: str) -> Any:
    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls)]
    arguments = {}
    for name, value in values.items():
        if name not in known:
            raise InputError(f"unknown setting {prefix}{name}; known: {', '.join(prefix + k for k in known)}")
        hint = hints[name]
        if isinstance(value, dict):
            value = _from_dict(hint, value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            value = tuple(value)
        elif not _fits(value, hint):
            raise InputError(f"setting {prefix}{name} must be {_words(hint)}, got {value!r}")
        elif float in (hint, *get_args(hint)):
            value = None if value is None else float(value)
        arguments[name] = value
    return cls(**arguments)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of an annotated type; an int will do for a float."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_args(hint):
        return any(_fits(value, choice) for choice in get_args(hint))
    return type(value) is hint or (hint is float and type(value) is int)


def _words(hint: Any) -> str:
    if get_origin(hint) is Literal or get_args(hint):
        choices = [_words(c) if not isinstance(c, str) else repr(c) for c in get_args(hint) if c is not NoneType]
        return " or ".join(choices)
    return hint.__name__
