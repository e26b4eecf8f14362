"""Distributions on the unit sphere, in any dimension, that pass through `pyro.sample`."""

from . import kl as _kl  # noqa: F401  (registers the divergences)
from .kl_projected import (
    AmbientUniform,
    ScaleFreeUniform,
    projected_normal_kl_bound,
    projected_normal_kl_gaussian,
)
from .power_spherical import PowerSpherical
from .projected_normal import ProjectedNormal
from .rotational import RotationallySymmetric
from .uniform import HypersphericalUniform, log_uniform_density
from .von_mises_fisher import VonMisesFisher

__all__ = [
    "AmbientUniform",
    "HypersphericalUniform",
    "PowerSpherical",
    "ProjectedNormal",
    "RotationallySymmetric",
    "ScaleFreeUniform",
    "VonMisesFisher",
    "log_uniform_density",
    "projected_normal_kl_bound",
    "projected_normal_kl_gaussian",
]
