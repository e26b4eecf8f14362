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

import math
from typing import Any, ClassVar

import pyro.distributions as pyro_dist
import torch
from torch import Tensor
from torch import distributions as torch_dist

from pyro_contrastive.ops.bessel import log_partition, log_partition_scaled
from pyro_contrastive.ops.precision import matmul
from pyro_contrastive.ops.tiles import Pairs, Tensors

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

TINY = 1e-10  # added to a squared length: keeps its root differentiable at 0
WIDER = 1e-4  # relative excess of a Gaussian's variance over the prior's that passes as rounding


class ExponentialFamily:
    r"""What a family must know. All methods take and give batches ``(*batch,)`` and are differentiable.

    Example:
        >>> law = VonMisesFisher(torch.tensor([0.0, 1.0, 0.0]), torch.tensor(2.0))
        >>> family = exponential_family(law)
        >>> eta = family.natural(law).requires_grad_()
        >>> torch.autograd.grad(family.log_partition(eta), eta)[0], family.mean(law)  # the same
        (tensor([0.0000, 0.5373, 0.0000]), tensor([0.0000, 0.5373, 0.0000]))
    """

    name: ClassVar[str]
    dim: int

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.dim == other.dim  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash((type(self), self.dim))

    def __repr__(self) -> str:
        return f"{self.name} laws of dimension {self.dim}"

    @property
    def numbers_per_pair(self) -> int:
        """Numbers that one cell of a grid of all pairs is computed from at a time: it sets the size of its tiles."""
        return 1

    def standard(self, like: Tensor) -> Any:
        """The prior that is meant when none is given, with the dtype and device of `like`."""
        raise NotImplementedError

    def natural(self, law: Any) -> Tensor:
        """Natural parameter of a law, ``(*batch, m)``."""
        raise NotImplementedError

    def mean(self, law: Any) -> Tensor:
        """Mean parameter E[t(z)], ``(*batch, m)``: the gradient of the log-partition at the natural parameter."""
        raise NotImplementedError

    def log_partition(self, natural: Tensor) -> Tensor:
        """Phi, ``(*batch,)`` in nats. Raises ValueError where it is infinite (a precision that is not positive)."""
        raise NotImplementedError

    def law(self, natural: Tensor) -> Any:
        """The distribution with that natural parameter, batch ``natural.shape[:-1]``. ValueError if there is none."""
        raise NotImplementedError

    def pairs(self, first: Any, second: Any, prior: Any) -> Pairs:
        r"""Log evidence of all pairs, :math:`\Phi(\eta_1+\eta_2-\eta_0) - \Phi(\eta_1) - \Phi(\eta_2) + \Phi(\eta_0)`.

        It is the log of the integral of ``first * second / prior``: no cancellation where laws are narrow.

        Args:
            first: law with batch ``(..., N)``, the rows.
            second: law with batch ``(..., M)``, the columns.
            prior: law with batch ``()``.

        Returns:
            The grid ``(..., N, M)`` in nats, unevaluated.
        """
        raise NotImplementedError

    def tilted(self, rows: Tensors, columns: Tensors, shared: Tensors) -> Tensor:
        r"""Grid function of :math:`\Phi(\eta_j - \nu_i) - \Phi(\eta_j)`; rows nu, columns eta and its Phi."""
        (nu,), (eta, log_partition) = rows, columns
        return self.log_partition(eta.unsqueeze(-3) - nu.unsqueeze(-2)) - log_partition.mT

    def check_views(self, name: str, law: Any, prior: Any) -> None:
        """Raise ValueError if `law` cannot be a posterior under the prior; see :class:`DiagonalNormalFamily`."""


def _column(natural: Tensor) -> Tensor:
    """Length of every vector, with a gradient at zero: ``(..., N, d)`` to ``(..., N, 1)``."""
    return torch.sqrt(natural.square().sum(-1, keepdim=True) + TINY)


def _fuse(dot: Tensor, k1: Tensor, k2: Tensor, dim: int) -> Tensor:
    """Phi(|a + b|) - Phi(|a|) - Phi(|b|) from a.b and the two lengths."""
    fused = torch.sqrt((k1 - k2).square() + 2 * torch.relu(k1 * k2 + dot) + TINY)
    # Phi(k) = k + scaled(k): the linear parts are combined before they can cancel
    linear = -2 * (k1 * k2 - dot) / (fused + k1 + k2)
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
        nowhere = length == 0
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


def _diagonal_pairs(rows: Tensors, columns: Tensors, shared: Tensors) -> Tensor:
    (m1, v1), (m2, v2) = ([t.unsqueeze(-2) for t in rows], [t.unsqueeze(-3) for t in columns])
    fused = v1 + v2 - v1 * v2  # the fused precision, times both variances
    square = v2 * m1.square() + v1 * m2.square() - (m1 - m2).square()
    return 0.5 * (square / fused - fused.log()).sum(-1)


class DiagonalNormalFamily(ExponentialFamily):
    r"""Gaussians with a diagonal covariance, ``Independent(Normal, 1)``.

    A view cannot know less about its latent than nothing: if the recognition laws average to the prior, almost all of
    them have at least the prior's precision. (Were R(z|x) wider than P(z) along some direction, for a share of the
    views that is not zero, their average alone would exceed P(z) far out.) So wider ones are refused; a network that
    adds a positive precision to the prior's cannot produce them.
    """

    name = "diagonal Gaussian"

    @property
    def numbers_per_pair(self) -> int:
        """See :attr:`ExponentialFamily.numbers_per_pair`."""
        return self.dim

    def standard(self, like: Tensor) -> Any:
        """The standard normal law."""
        return pyro_dist.Normal(like.new_zeros(self.dim), like.new_ones(self.dim)).to_event(1)

    def natural(self, law: Any) -> Tensor:
        """See :meth:`ExponentialFamily.natural`."""
        precision = law.variance.reciprocal()
        return torch.cat([law.mean * precision, precision], -1)

    def mean(self, law: Any) -> Tensor:
        """See :meth:`ExponentialFamily.mean`."""
        return torch.cat([law.mean, -0.5 * (law.mean.square() + law.variance)], -1)

    def log_partition(self, natural: Tensor) -> Tensor:
        """See :meth:`ExponentialFamily.log_partition`."""
        h, precision = self._checked(natural)
        return 0.5 * (h.square() / precision - precision.log() + math.log(2 * math.pi)).sum(-1)

    def law(self, natural: Tensor) -> Any:
        """See :meth:`ExponentialFamily.law`."""
        h, precision = self._checked(natural)
        return pyro_dist.Normal(h / precision, precision.rsqrt()).to_event(1)

    def _checked(self, natural: Tensor) -> tuple[Tensor, Tensor]:
        h, precision = natural.chunk(2, -1)
        if bool((precision <= 0).any()):
            raise ValueError(_not_positive(precision.min().item()))
        return h, precision

    def _whitened(self, law: Any, prior: Any) -> Tensors:
        return (law.mean - prior.mean) / prior.stddev, law.variance / prior.variance

    def pairs(self, first: Any, second: Any, prior: Any) -> Pairs:
        """See :meth:`ExponentialFamily.pairs`."""
        return Pairs(_diagonal_pairs, self._whitened(first, prior), self._whitened(second, prior))

    def check_views(self, name: str, law: Any, prior: Any) -> None:
        """Raise ValueError if a variance exceeds the prior's."""
        ratio = (law.variance / prior.variance).detach().max().item() if law.variance.numel() else 0.0
        _check_ratio(name, ratio)


def _not_positive(value: float) -> str:
    return (
        f"no Gaussian has this natural parameter: its precision must be positive, got {value:.6g}; "
        "add up posteriors that are at least as narrow as the prior"
    )


def _check_ratio(name: str, ratio: float) -> None:
    if not ratio <= 1 + WIDER:
        raise ValueError(
            f"{name} must be at least as narrow as the prior in every direction, got a variance of {ratio:.6g} times "
            "the prior's; let the network give a positive precision that is added to the prior's, or pass a wider prior"
        )


def _full_pairs(rows: Tensors, columns: Tensors, shared: Tensors) -> Tensor:
    m1, m2 = rows[0].double().unsqueeze(-2), columns[0].double().unsqueeze(-3)
    dim = m1.shape[-1]
    s1, s2 = rows[1].double().unsqueeze(-2), columns[1].double().unsqueeze(-3)
    s1, s2 = s1.unflatten(-1, (dim, dim)), s2.unflatten(-1, (dim, dim))
    fused = s1 + s2 - s1 @ s2  # s1 times the fused precision times s2: no inverse, so a covariance may be singular
    lu, pivots = torch.linalg.lu_factor(fused)
    log_det = lu.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
    shape = fused.shape[:-1]
    m1, m2 = m1.expand(shape), m2.expand(shape)
    a = torch.linalg.lu_solve(lu, pivots, m1.unsqueeze(-1)).squeeze(-1)
    b = torch.linalg.lu_solve(lu, pivots, m2.unsqueeze(-1), adjoint=True).squeeze(-1)
    across = (s2 @ m1.unsqueeze(-1)).squeeze(-1) - m1
    down = (s1 @ m2.unsqueeze(-1)).squeeze(-1) - m2
    return 0.5 * ((across * a + b * down + 2 * m2 * a).sum(-1) - log_det).to(rows[0].dtype)


class NormalFamily(DiagonalNormalFamily):
    """Gaussians with any covariance, ``MultivariateNormal``; its grids cost a factorisation per pair, in float64."""

    name = "Gaussian"

    @property
    def numbers_per_pair(self) -> int:
        """See :attr:`ExponentialFamily.numbers_per_pair`."""
        return 8 * self.dim**2

    def standard(self, like: Tensor) -> Any:
        """The standard normal law."""
        eye = torch.eye(self.dim, dtype=like.dtype, device=like.device)
        return pyro_dist.MultivariateNormal(like.new_zeros(self.dim), scale_tril=eye)

    def natural(self, law: Any) -> Tensor:
        """See :meth:`ExponentialFamily.natural`."""
        precision = torch.cholesky_inverse(law.scale_tril.double())
        h = (precision @ law.mean.double().unsqueeze(-1)).squeeze(-1)
        return torch.cat([h, precision.flatten(-2)], -1).to(law.mean.dtype)

    def mean(self, law: Any) -> Tensor:
        """See :meth:`ExponentialFamily.mean`."""
        second = law.mean.unsqueeze(-1) * law.mean.unsqueeze(-2) + law.covariance_matrix
        return torch.cat([law.mean, -0.5 * second.flatten(-2)], -1)

    def log_partition(self, natural: Tensor) -> Tensor:
        """See :meth:`ExponentialFamily.log_partition`."""
        h, root = self._root(natural)
        solved = torch.linalg.solve_triangular(root, h.unsqueeze(-1), upper=False).squeeze(-1)
        log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return (0.5 * solved.square().sum(-1) - log_det + 0.5 * self.dim * math.log(2 * math.pi)).to(natural.dtype)

    def law(self, natural: Tensor) -> Any:
        """See :meth:`ExponentialFamily.law`."""
        h, root = self._root(natural)
        covariance = torch.cholesky_inverse(root)
        mean = torch.cholesky_solve(h.unsqueeze(-1), root).squeeze(-1)
        tril = torch.linalg.cholesky(covariance)
        return pyro_dist.MultivariateNormal(mean.to(natural.dtype), scale_tril=tril.to(natural.dtype))

    def _root(self, natural: Tensor) -> tuple[Tensor, Tensor]:
        """S^-1 mu and the Cholesky factor of the precision, in float64."""
        h, precision = natural.double().split([self.dim, self.dim**2], -1)
        matrix = precision.unflatten(-1, (self.dim, self.dim))
        root, info = torch.linalg.cholesky_ex(0.5 * (matrix + matrix.mT))
        if bool((info != 0).any()):
            raise ValueError(_not_positive(torch.linalg.eigvalsh(matrix.detach()).min().item()))
        return h, root

    def _whitened(self, law: Any, prior: Any) -> Tensors:
        root = prior.scale_tril
        mean = torch.linalg.solve_triangular(root, (law.mean - prior.mean).unsqueeze(-1), upper=False).squeeze(-1)
        scale = torch.linalg.solve_triangular(root, law.scale_tril, upper=False)
        return mean, (scale @ scale.mT).flatten(-2)

    def check_views(self, name: str, law: Any, prior: Any) -> None:
        """Raise ValueError if a variance exceeds the prior's in some direction."""
        with torch.no_grad():
            covariance = self._whitened(law, prior)[1].unflatten(-1, (self.dim, self.dim))
            _check_ratio(name, torch.linalg.eigvalsh(covariance).max().item() if covariance.numel() else 0.0)


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
        "closed forms of a shared latent need VonMisesFisher, Independent(Normal, 1), MultivariateNormal or Categorical "
        f"laws with one event axis, got {law!r:.80}; use .to_event(1) on a Normal, or a sampled evidence "
        "(objectives.KSampleELBO) for other families"
    )
