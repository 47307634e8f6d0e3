"""From structures to training examples, and the network that learns from them to turn Patterson maps into density.

Fragments in tight P1 cells, their maps, batches made on the fly; `RecCrysFormer` and its training.
"""

from xtalfast.density.model import RecCrysFormer
from xtalfast.density.model_config import RecCrysFormerConfig
from xtalfast.density.model_weights import load_reference_state_dict

__all__ = ["RecCrysFormer", "RecCrysFormerConfig", "load_reference_state_dict"]
