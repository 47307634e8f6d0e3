"""Encoders, spot-shape heads and the loss of integration networks, for your own training loop.

    batch = ShoeboxBatch(counts, mask, xyzcal_px, bbox, box=(3, 21, 21))
    model = IntegrationModel(IntegrationConfig.preset("default", encoder="cnn", profile="softmax"))
    model.set_statistics(DataStatistics.of(batch))
    model.losses(batch).mean().backward()

No file format and no optional package is attached to anything here.
"""

from xtalfast.integration.config import (
    EncoderConfig,
    IntegrationConfig,
    LossConfig,
    PosteriorConfig,
    ProfileConfig,
    TrainConfig,
)
from xtalfast.integration.data import ShoeboxBatch
from xtalfast.integration.encoders import CNNEncoder, FCEncoder, InputTransform, make_encoder
from xtalfast.integration.model import IntegrationModel, PoissonGammaELBO, Posterior
from xtalfast.integration.profiles import (
    GammaHead,
    GivenProfile,
    LowRankHead,
    MVNHead,
    SoftmaxHead,
    make_profile_head,
    moments_start,
)
from xtalfast.integration.statistics import DataStatistics

__all__ = [
    "CNNEncoder",
    "DataStatistics",
    "EncoderConfig",
    "FCEncoder",
    "GammaHead",
    "GivenProfile",
    "InputTransform",
    "IntegrationConfig",
    "IntegrationModel",
    "LossConfig",
    "LowRankHead",
    "MVNHead",
    "PoissonGammaELBO",
    "Posterior",
    "PosteriorConfig",
    "ProfileConfig",
    "ShoeboxBatch",
    "SoftmaxHead",
    "TrainConfig",
    "make_encoder",
    "make_profile_head",
    "moments_start",
]
