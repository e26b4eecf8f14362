"""Contrastive learning as Bayesian inference in Pyro: spherical posteriors whose width can be trusted."""

__version__ = "0.1.0"

from . import distributions, factors, guides, kernels, models, nets, objectives, ops

__all__ = ["distributions", "factors", "guides", "kernels", "models", "nets", "objectives", "ops"]
