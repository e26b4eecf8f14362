"""The recognition families, one file per family: an encoder, its heads, and the Pyro guide."""

if __name__ == "guides":
    raise ImportError("import pyro_contrastive.guides, not the bare folder guides")

from .base import RecognitionGuide
from .categorical import Categorical
from .delta import Delta
from .fused import Fused
from .normal import Normal
from .power_spherical import PowerSpherical
from .projected_normal import ProjectedNormal
from .siamese import Siamese
from .smoothed import Smoothed
from .von_mises_fisher import VonMisesFisher

__all__ = [
    "Categorical",
    "Delta",
    "Fused",
    "Normal",
    "PowerSpherical",
    "ProjectedNormal",
    "RecognitionGuide",
    "Siamese",
    "Smoothed",
    "VonMisesFisher",
]
