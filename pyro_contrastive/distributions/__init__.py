"""Distributions on the unit sphere, in any dimension, that pass through `pyro.sample`."""

from . import kl as _kl  # noqa: F401  (registers the divergences)
from .power_spherical import PowerSpherical
from .rotational import RotationallySymmetric
from .uniform import HypersphericalUniform, log_uniform_density
from .von_mises_fisher import VonMisesFisher

__all__ = ["HypersphericalUniform", "PowerSpherical", "RotationallySymmetric", "VonMisesFisher", "log_uniform_density"]
