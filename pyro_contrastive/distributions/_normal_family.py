"""Gaussians as exponential families: diagonal and full covariances, relative to a Gaussian prior."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as pyro_dist
import torch
from torch import Tensor

from pyro_contrastive.ops.tiles import Pairs, Tensors

from ._family import ExponentialFamily

__all__ = ["DiagonalNormalFamily", "NormalFamily"]

WIDER = 1e-4  # relative excess of a variance over the prior's that passes as rounding


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
        "add up posteriors that are at least as narrow as the prior, or take a smaller `nu`"
    )


def _check_ratio(name: str, ratio: float) -> None:
    if not ratio <= 1 + WIDER:
        raise ValueError(
            f"{name} must be at least as narrow as the prior in every direction, got a variance of {ratio:.6g} times "
            "the prior's; let the network give a positive precision that is added to the prior's, or pass a wider prior"
        )


def _full_pairs(rows: Tensors, columns: Tensors, shared: Tensors) -> Tensor:
    dim = rows[0].shape[-1]
    m1, s1 = (t.double().unsqueeze(-2).unflatten(-1, (dim, -1)) for t in rows)  # (..., n, 1, dim, 1 or dim)
    m2, s2 = (t.double().unsqueeze(-3).unflatten(-1, (dim, -1)) for t in columns)
    m1, m2 = torch.broadcast_tensors(m1, m2)
    order = s1 @ s2
    fused = s1 + s2 - order  # s1 times the fused precision times s2: no inverse, so a covariance may be singular
    lu, pivots = torch.linalg.lu_factor(fused)
    log_det = lu.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
    a = torch.linalg.lu_solve(lu, pivots, m1)
    b, e = torch.linalg.lu_solve(lu, pivots, torch.cat([m2, m1 - m2], -1), adjoint=True).split(1, -1)
    # the one-dimensional square of _diagonal_pairs, and what remains because the covariances need not commute
    square = (s2 @ m1) * a + b * (s1 @ m2) - (m1 - m2) * e + b * ((order - order.mT) @ e)
    return 0.5 * (square.sum((-1, -2)) - log_det).to(rows[0].dtype)


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

    def pairs(self, first: Any, second: Any, prior: Any) -> Pairs:
        """See :meth:`ExponentialFamily.pairs`."""
        return Pairs(_full_pairs, self._whitened(first, prior), self._whitened(second, prior))

    def check_views(self, name: str, law: Any, prior: Any) -> None:
        """Raise ValueError if a variance exceeds the prior's in some direction."""
        with torch.no_grad():
            covariance = self._whitened(law, prior)[1].unflatten(-1, (self.dim, self.dim))
            _check_ratio(name, torch.linalg.eigvalsh(covariance).max().item() if covariance.numel() else 0.0)
