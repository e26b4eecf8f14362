r"""Exponential families with the algebra that evidences of a shared latent are made of.

A family has densities :math:`\exp(\eta \cdot t(z) - \Phi(\eta))` relative to one base measure. Here a natural parameter
is one tensor ``(..., m)``, so that fusing laws is adding tensors:

=================================  =============================  =================================
law                                natural parameter, m numbers   t(z); base measure
=================================  =============================  =================================
``VonMisesFisher(mu, kappa)``      kappa mu; d                    z; the uniform law
``Independent(Normal(mu, s), 1)``  mu / s^2, 1 / s^2; 2 d         z, -z^2 / 2; volume
``MultivariateNormal(mu, S)``      S^-1 mu, S^-1; d + d^2         z, -z z^T / 2; volume
``Categorical(p)``                 log p; K                       indicators of the classes; counting
=================================  =============================  =================================

``HypersphericalUniform`` is the von Mises-Fisher law with natural parameter zero.

Differences of :math:`\Phi` cancel where laws are narrow, so :meth:`ExponentialFamily.pairs` has a form of its own for
each family: the log evidence of two laws relative to a prior, on the grid of all pairs of a batch.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as pyro_dist
import torch
from torch import Tensor
from torch import distributions as torch_dist

from pyro_contrastive.ops.bessel import log_partition, log_partition_scaled
from pyro_contrastive.ops.precision import matmul
from pyro_contrastive.ops.tiles import Pairs, Tensors

from ._family import ExponentialFamily
from ._normal_family import DiagonalNormalFamily, NormalFamily
from .uniform import HypersphericalUniform
from .von_mises_fisher import VonMisesFisher

__all__ = [
    "CategoricalFamily",
    "DiagonalNormalFamily",
    "ExponentialFamily",
    "NormalFamily",
    "VonMisesFisherFamily",
    "exponential_family",
]

TINY = 1e-10  # added to a squared length: keeps its root differentiable at 0, shifts a value by 1e-10 / (2 d) nats
NOWHERE = 1e-12  # a natural parameter this short has no direction: its squares leave the range of float32


def _column(natural: Tensor) -> Tensor:
    """Length of every vector, with a gradient at zero: ``(..., N, d)`` to ``(..., N, 1)``."""
    return torch.sqrt(natural.square().sum(-1, keepdim=True) + TINY)


def _fuse(dot: Tensor, k1: Tensor, k2: Tensor, dim: int) -> Tensor:
    """Phi(|a + b|) - Phi(|a|) - Phi(|b|) from a.b and the two lengths."""
    fused = torch.sqrt((k1 - k2).square() + 2 * torch.relu(k1 * k2 + dot) + TINY)
    # Phi(k) = k + scaled(k): the linear parts are combined before they can cancel
    linear = (TINY - 2 * (k1 * k2 - dot)) / (fused + k1 + k2)
    return linear + log_partition_scaled(dim, fused) - log_partition_scaled(dim, k1) - log_partition_scaled(dim, k2)


def _vmf_pairs(rows: Tensors, columns: Tensors, shared: Tensors) -> Tensor:
    (a, k1), (b, k2, offset) = rows, columns
    return _fuse(matmul(a, b.mT), k1, k2.mT, a.shape[-1]) + offset.mT


class VonMisesFisherFamily(ExponentialFamily):
    """Von Mises-Fisher laws on the sphere of R^dim; the uniform law is the one with natural parameter zero."""

    name = "von Mises-Fisher"

    def standard(self, like: Tensor) -> HypersphericalUniform:
        """The uniform law."""
        return HypersphericalUniform(self.dim, dtype=like.dtype, device=like.device)

    def natural(self, law: Any) -> Tensor:
        """See :meth:`ExponentialFamily.natural`."""
        if isinstance(law, HypersphericalUniform):
            return law.mean
        return law.concentration.unsqueeze(-1) * law.mean_direction

    def mean(self, law: Any) -> Tensor:
        """See :meth:`ExponentialFamily.mean`."""
        return law.mean

    def log_partition(self, natural: Tensor) -> Tensor:
        """See :meth:`ExponentialFamily.log_partition`."""
        return log_partition(self.dim, _column(natural).squeeze(-1))

    def law(self, natural: Tensor) -> VonMisesFisher:
        """See :meth:`ExponentialFamily.law`; any direction will do at zero."""
        length = natural.norm(dim=-1, keepdim=True)
        nowhere = length < NOWHERE
        axis = torch.zeros_like(natural)
        axis[..., 0] = 1.0
        direction = torch.where(nowhere, axis, natural / length.masked_fill(nowhere, 1.0))
        return VonMisesFisher(direction, length.squeeze(-1))

    def pairs(self, first: Any, second: Any, prior: Any) -> Pairs:
        """See :meth:`ExponentialFamily.pairs`."""
        a, b = self.natural(first), self.natural(second)
        if isinstance(prior, HypersphericalUniform):
            k2 = _column(b)
            return Pairs(_vmf_pairs, (a, _column(a)), (b, k2, torch.zeros_like(k2)))
        # the second law over the prior is another one, up to a factor that goes with the column
        eta0 = self.natural(prior)
        message, k0 = b - eta0, _column(eta0)
        dot = -(b * eta0).sum(-1, keepdim=True)
        offset = _fuse(dot, _column(b), k0, self.dim) + 2 * log_partition(self.dim, k0)
        return Pairs(_vmf_pairs, (a, _column(a)), (message, _column(message), offset))


def _categorical_pairs(rows: Tensors, columns: Tensors, shared: Tensors) -> Tensor:
    return (rows[0].unsqueeze(-2) + columns[0].unsqueeze(-3)).logsumexp(-1)


class CategoricalFamily(ExponentialFamily):
    """Laws on `dim` classes, ``Categorical``."""

    name = "categorical"

    @property
    def numbers_per_pair(self) -> int:
        """See :attr:`ExponentialFamily.numbers_per_pair`."""
        return self.dim

    def standard(self, like: Tensor) -> Any:
        """The uniform law on the classes."""
        return pyro_dist.Categorical(logits=like.new_zeros(self.dim))

    def natural(self, law: Any) -> Tensor:
        """Log probabilities."""
        return law.logits.log_softmax(-1)

    def mean(self, law: Any) -> Tensor:
        """Probabilities."""
        return law.probs

    def log_partition(self, natural: Tensor) -> Tensor:
        """See :meth:`ExponentialFamily.log_partition`."""
        return natural.logsumexp(-1)

    def law(self, natural: Tensor) -> Any:
        """See :meth:`ExponentialFamily.law`."""
        return pyro_dist.Categorical(logits=natural)

    def pairs(self, first: Any, second: Any, prior: Any) -> Pairs:
        """See :meth:`ExponentialFamily.pairs`."""
        return Pairs(_categorical_pairs, (self.natural(first),), (self.natural(second) - self.natural(prior),))


def exponential_family(law: Any) -> ExponentialFamily:
    """The family of a law.

    Args:
        law: one of the laws in the table of this module.

    Returns:
        Its family, equal for laws of one family and dimension.

    Raises:
        TypeError: for any other law.

    Example:
        >>> exponential_family(torch.distributions.Categorical(torch.ones(3)))
        categorical laws of dimension 3
    """
    shape = getattr(law, "event_shape", torch.Size())
    if isinstance(law, VonMisesFisher | HypersphericalUniform):
        return VonMisesFisherFamily(shape[0])
    if isinstance(law, torch_dist.MultivariateNormal):
        return NormalFamily(shape[0])
    if isinstance(law, torch_dist.Independent) and isinstance(law.base_dist, torch_dist.Normal) and len(shape) == 1:
        return DiagonalNormalFamily(shape[0])
    if isinstance(law, torch_dist.Categorical):
        return CategoricalFamily(law.logits.shape[-1])
    raise TypeError(
        "closed forms of a shared latent need VonMisesFisher, Independent(Normal, 1), MultivariateNormal or "
        f"Categorical laws, got {law!r:.80}; use .to_event(1) on a Normal, or objectives.KSampleELBO for other families"
    )
