"""The modules of both networks, for your own training loop.

Integration: encoders, spot-shape heads and the loss,

    batch = ShoeboxBatch(counts, mask, xyzcal_px, bbox, box=(3, 21, 21))
    model = IntegrationModel(IntegrationConfig.preset("default", encoder="cnn", profile="softmax"))
    model.set_statistics(DataStatistics.of(batch))
    model.losses(batch).mean().backward()

Phasing: `NystromAttention`, `CircularPatchEmbed3d`, `PeriodicConv3d` (examples/own_phasing_network.py).

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
from xtalfast.nn.nystrom import NystromAttention
from xtalfast.nn.periodic import CircularPatchEmbed3d, PeriodicConv3d

__all__ = [
    "CNNEncoder",
    "CircularPatchEmbed3d",
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
    "NystromAttention",
    "PeriodicConv3d",
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
