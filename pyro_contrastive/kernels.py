r"""Pair kernels f(z, z'), the unnormalised density of one view's latent given the other's, and their expectations.

A kernel is a callable ``kernel(z1, z2)`` on ``(..., N, d)`` and ``(..., M, d)`` that returns ``log f`` on the grid
``(..., N, M)``. Only ratios of f matter to the InfoNCE likelihood, so kernels need no normaliser.

The functions below integrate the von Mises-Fisher kernel over two von Mises-Fisher posteriors. Their values are log
density ratios: log of p(x, x') / p(x) p(x') under the model, in nats, zero for views that say nothing.
"""

from __future__ import annotations

import torch
from pyro.nn import PyroParam
from torch import Tensor

from .distributions import VonMisesFisher
from .modules import Module
from .ops.bessel import bessel_ratio, log_partition_scaled, matched_log_density
from .ops.constraints import scale_parameter
from .ops.precision import matmul

__all__ = ["VonMisesFisherKernel", "moment_matched_log_ratio", "shared_latent_log_ratio"]


_TINY = 1e-10  # added to a squared concentration: shifts a log ratio by at most 1e-10 / (2 d) nats


class VonMisesFisherKernel(Module):
    r"""The von Mises-Fisher kernel, :math:`\log f(z, z') = \kappa\, z \cdot z'`.

    Its concentration is the inverse of the "temperature" of contrastive losses.

    Args:
        concentration: kappa > 0, finite.
        learn: make it a positive parameter (``concentration``) instead of a buffer, optimised as log(kappa) / 4 so
            that it keeps pace with the network.

    Raises:
        ValueError: if the concentration is not positive and finite.

    Shape:
        ``(..., N, d), (..., M, d) -> (..., N, M)``.
    """

    concentration: Tensor

    def __init__(self, concentration: float = 10.0, *, learn: bool = False) -> None:
        super().__init__()
        value = torch.as_tensor(float(concentration))
        if not (value > 0 and torch.isfinite(value)):
            raise ValueError(f"`concentration` of a kernel must be positive and finite, got {concentration!r}")
        if learn:
            setattr(self, "concentration", PyroParam(value, constraint=scale_parameter))  # noqa: B010 (typing)
        else:
            self.register_buffer("concentration", value)

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """Return log f on the grid of all pairs."""
        return self.concentration * matmul(z1, z2.mT)


def _cosines(posterior1: VonMisesFisher, posterior2: VonMisesFisher) -> tuple[Tensor, Tensor, Tensor]:
    """cos of all pairs ``(..., N, M)`` and the concentrations as a column and a row."""
    for q in (posterior1, posterior2):
        if not isinstance(q, VonMisesFisher):
            raise TypeError(
                "closed-form evidences need VonMisesFisher posteriors, got "
                f"{type(q).__name__}; use guides.VonMisesFisher, or evidence='k_sample' with any guide"
            )
    cosine = matmul(posterior1.mean_direction, posterior2.mean_direction.mT)
    return cosine, posterior1.concentration.unsqueeze(-1), posterior2.concentration.unsqueeze(-2)


def shared_latent_log_ratio(posterior1: VonMisesFisher, posterior2: VonMisesFisher) -> Tensor:
    r"""Exact evidence of a pair of views that share one uniform latent (pair concentration infinite), on all pairs.

    With recognition laws vMF(mu1, k1) and vMF(mu2, k2), writing :math:`\Phi` for the log-partition
    (:func:`~pyro_contrastive.ops.log_partition`),

    .. math::  \log \frac{p(x, x')}{p(x)\,p(x')} = \Phi(|k_1 \mu_1 + k_2 \mu_2|) - \Phi(k_1) - \Phi(k_2).

    It has no temperature: the concentrations take its place, item by item. (The expected-likelihood kernel of the
    literature is the same quantity.)

    Args:
        posterior1: batch ``(..., N)``.
        posterior2: batch ``(..., M)``.

    Returns:
        ``(..., N, M)`` log ratios in nats.

    Raises:
        TypeError: for posteriors of another family.
    """
    cosine, k1, k2 = _cosines(posterior1, posterior2)
    dim = posterior1.event_shape[0]
    # |k1 mu1 + k2 mu2|^2 = (k1 - k2)^2 + 2 k1 k2 (1 + cos); the tiny constant keeps the square root differentiable
    # where two equally sure posteriors are antipodal, and there Phi'(x)/x has a finite limit
    squared = (k1 - k2).square() + 2 * k1 * k2 * (1 + cosine).clamp_min(0.0)
    fused = torch.sqrt(squared + _TINY)
    # Phi(k) = k + scaled(k): the linear parts, fused - k1 - k2, are combined before they can cancel
    linear = (_TINY - 2 * k1 * k2 * (1 - cosine)) / (fused + k1 + k2)
    return (
        linear
        + log_partition_scaled(dim, fused)
        - log_partition_scaled(dim, posterior1.concentration).unsqueeze(-1)
        - log_partition_scaled(dim, posterior2.concentration).unsqueeze(-2)
    )


def moment_matched_log_ratio(posterior1: VonMisesFisher, posterior2: VonMisesFisher, concentration: Tensor) -> Tensor:
    r"""Evidence of a pair of views whose latents are vMF(z, kappa) apart, by matching one moment, on all pairs.

    The law of z2 given the two posteriors' means is replaced by the von Mises-Fisher law with the same mean resultant
    length: :math:`A(k_{12}) = A(k_1) A(k_2) A(\kappa)`, and the log ratio is
    :math:`k_{12} \cos - \Phi(k_{12})`. Cheap and smooth; off by up to half a nat for concentrated pairs in high
    dimension, and by more on the far side, where pairs weigh little.

    Args:
        posterior1: batch ``(..., N)``.
        posterior2: batch ``(..., M)``.
        concentration: kappa > 0 of the pair, a scalar tensor.

    Returns:
        ``(..., N, M)`` log ratios in nats.

    Raises:
        TypeError: for posteriors of another family.
    """
    cosine, _, _ = _cosines(posterior1, posterior2)
    dim = posterior1.event_shape[0]
    length1 = bessel_ratio(dim, posterior1.concentration).unsqueeze(-1)
    length2 = bessel_ratio(dim, posterior2.concentration).unsqueeze(-2)
    return matched_log_density(dim, length1 * length2 * bessel_ratio(dim, concentration), cosine)
