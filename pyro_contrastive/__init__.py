"""Contrastive learning as Bayesian inference in Pyro."""

__version__ = "0.1.0"
