"""The fused operations, each one public function on torch tensors, CPU or CUDA."""

from xtalfast.ops.extract_shoeboxes import Shoeboxes, extract_shoeboxes
from xtalfast.ops.gamma import gamma_from_log_mean_cv, gamma_kl
from xtalfast.ops.intensity_posterior import IntensityPosterior, intensity_posterior
from xtalfast.ops.poisson_gamma_elbo import poisson_gamma_elbo
from xtalfast.ops.profile_fit import ProfileFit, profile_fit
from xtalfast.ops.profiles import LowRankProfile, MVNProfile, SoftmaxProfile, materialise

__all__ = [
    "IntensityPosterior",
    "LowRankProfile",
    "MVNProfile",
    "ProfileFit",
    "Shoeboxes",
    "SoftmaxProfile",
    "extract_shoeboxes",
    "gamma_from_log_mean_cv",
    "gamma_kl",
    "intensity_posterior",
    "materialise",
    "poisson_gamma_elbo",
    "profile_fit",
]
