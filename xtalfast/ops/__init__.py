"""The fused operations, each one public function on torch tensors, CPU or CUDA."""

from xtalfast.ops.conv3d_periodic import conv3d_periodic
from xtalfast.ops.density_map import density_map, it92_form_factors
from xtalfast.ops.extract_shoeboxes import Shoeboxes, extract_shoeboxes
from xtalfast.ops.gamma import gamma_from_log_mean_cv, gamma_kl
from xtalfast.ops.intensity_posterior import IntensityPosterior, intensity_posterior
from xtalfast.ops.nystrom_attention import nystrom_attention
from xtalfast.ops.patch_embed import patch_embed, stem_statistics
from xtalfast.ops.patterson_map import patterson_map
from xtalfast.ops.poisson_gamma_elbo import poisson_gamma_elbo
from xtalfast.ops.profile_fit import ProfileFit, profile_fit
from xtalfast.ops.profiles import LowRankProfile, MVNProfile, SoftmaxProfile, materialise
from xtalfast.ops.structure_factors import limit_resolution, map_from_structure_factors, structure_factors

__all__ = [
    "IntensityPosterior",
    "LowRankProfile",
    "MVNProfile",
    "ProfileFit",
    "Shoeboxes",
    "SoftmaxProfile",
    "conv3d_periodic",
    "density_map",
    "extract_shoeboxes",
    "gamma_from_log_mean_cv",
    "gamma_kl",
    "intensity_posterior",
    "it92_form_factors",
    "limit_resolution",
    "map_from_structure_factors",
    "materialise",
    "nystrom_attention",
    "patch_embed",
    "patterson_map",
    "poisson_gamma_elbo",
    "profile_fit",
    "stem_statistics",
    "structure_factors",
]
