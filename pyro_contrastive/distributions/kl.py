"""Kullback-Leibler divergences between the rotationally symmetric laws, where a closed form exists (in nats).

E_PowerSpherical[mu_q . z] is closed, so a von Mises-Fisher second argument always works; E[log(1 + mu_q . z)] under a
law about another direction is not, so a power spherical second argument is registered for the uniform law only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import register_kl

from pyro_contrastive.ops.bessel import bessel_ratio_complement, log_partition, log_partition_scaled
from pyro_contrastive.ops.gamma import digamma_increment, log_gamma_increment
from pyro_contrastive.ops.squares import squared_length

from .power_spherical import PowerSpherical
from .rotational import RotationallySymmetric
from .uniform import HypersphericalUniform, log_uniform_density
from .von_mises_fisher import VonMisesFisher

__all__: list[str] = []


def _check_dims(
    p: HypersphericalUniform | RotationallySymmetric, q: HypersphericalUniform | RotationallySymmetric
) -> None:
    if p.event_shape != q.event_shape:
        raise ValueError(f"both laws must live on one sphere, got dimensions {p.event_shape[0]} and {q.event_shape[0]}")


def _shape(value: Tensor, p: torch.distributions.Distribution, q: torch.distributions.Distribution) -> Tensor:
    return value.expand(torch.broadcast_shapes(p.batch_shape, q.batch_shape))


@register_kl(HypersphericalUniform, HypersphericalUniform)
def _kl_uniform_uniform(p: HypersphericalUniform, q: HypersphericalUniform) -> Tensor:
    _check_dims(p, q)
    return _shape(torch.zeros_like(p.entropy()), p, q)


@register_kl(VonMisesFisher, HypersphericalUniform)
@register_kl(PowerSpherical, HypersphericalUniform)
def _kl_symmetric_uniform(p: RotationallySymmetric, q: HypersphericalUniform) -> Tensor:
    _check_dims(p, q)
    return _shape(-log_uniform_density(p.dim) - p.entropy(), p, q)


@register_kl(HypersphericalUniform, VonMisesFisher)
def _kl_uniform_vmf(p: HypersphericalUniform, q: VonMisesFisher) -> Tensor:
    _check_dims(p, q)
    return _shape(log_partition(q.dim, q.concentration), p, q)


@register_kl(HypersphericalUniform, PowerSpherical)
def _kl_uniform_power(p: HypersphericalUniform, q: PowerSpherical) -> Tensor:
    _check_dims(p, q)
    half, kappa = (q.dim - 1) / 2, q.concentration
    start = torch.full_like(kappa, half)
    # E_U log((1 + w)/2) = digamma(half) - digamma(2 half)
    log_ratio = log_gamma_increment(start, half) - log_gamma_increment(half + kappa, half)
    return _shape(log_ratio + kappa * digamma_increment(start, half), p, q)


@register_kl(VonMisesFisher, VonMisesFisher)
@register_kl(PowerSpherical, VonMisesFisher)
def _kl_symmetric_vmf(p: RotationallySymmetric, q: VonMisesFisher) -> Tensor:
    _check_dims(p, q)
    dim, kappa = p.dim, q.concentration
    if isinstance(p, VonMisesFisher):
        gap = bessel_ratio_complement(dim, p.concentration)
    else:
        gap = (dim - 1) / (p.concentration + dim - 1)
    versine = 0.5 * squared_length(p.mean_direction - q.mean_direction)
    expected_versine = gap + (1 - gap) * versine  # E_p[1 - mu_q . z]
    cross = log_partition_scaled(dim, kappa) - log_uniform_density(dim) + kappa * expected_versine
    return cross - p.entropy()
