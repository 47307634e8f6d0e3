"""The fused operations, each one public function on torch tensors, CPU or CUDA."""

from xtalfast.ops.extract_shoeboxes import Shoeboxes, extract_shoeboxes
from xtalfast.ops.gamma import gamma_from_log_mean_cv, gamma_kl
from xtalfast.ops.poisson_gamma_elbo import poisson_gamma_elbo
from xtalfast.ops.profiles import LowRankProfile, MVNProfile, SoftmaxProfile, materialise

__all__ = [
    "LowRankProfile",
    "MVNProfile",
    "Shoeboxes",
    "SoftmaxProfile",
    "extract_shoeboxes",
    "gamma_from_log_mean_cv",
    "gamma_kl",
    "materialise",
    "poisson_gamma_elbo",
]
