r"""Exact evidence of any number of views that share one latent, for recognition laws in an exponential family.

Views :math:`x_1, \dots, x_J` are independent given z, and each says :math:`R(z|x_j)`, a law with natural parameter
:math:`\eta_j` in a family with log-partition :math:`\Phi`. If the recognition laws average to the prior, which has
:math:`\eta_0`, then by Bayes' rule :math:`p(x_j|z)/p(x_j) = R(z|x_j)/p(z)`, and the integral over z is closed:

.. math::  \log \frac{p(x_1, \dots, x_J)}{\prod_j p(x_j)}
           = \log \int p(z) \prod_j \frac{R(z|x_j)}{p(z)}\, dz
           = \Phi(\eta) - \sum_j \Phi(\eta_j) + (J - 1)\, \Phi(\eta_0), \qquad \eta = \sum_j \eta_j - (J - 1)\, \eta_0,

where :math:`\eta` is the natural parameter of the posterior given all views. Two views on the sphere and a uniform
prior leave the expected-likelihood kernel, :func:`~pyro_contrastive.kernels.shared_latent_log_ratio`.

Numerically the sum goes by the chain rule, one view at a time against the posterior of those before it: every step is
the evidence of a *pair* of laws, which each family has in a form that does not cancel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.distributions import kl_divergence

from .distributions.exponential import ExponentialFamily, exponential_family
from .factors import emit, infonce_log_ratio
from .ops.joint import joint_size
from .ops.tiles import PLAIN_ELEMENTS, TILE, Pairs, contrast

__all__ = ["fused_posterior", "interior_bound", "shared_latent_factor", "shared_latent_log_evidence"]


def _checked(posteriors: Sequence[Any], prior: Any, least: int) -> tuple[ExponentialFamily, list[Any], Any]:
    """The common family, the views, and the prior, after all checks."""
    views = list(posteriors)
    if len(views) < least:
        raise ValueError(f"`posteriors` must hold the laws of at least {least} views, got {len(views)}")
    named = {f"posteriors[{j}]": exponential_family(q) for j, q in enumerate(views)}
    family = named["posteriors[0]"]
    if prior is None:
        prior = family.standard(family.natural(views[0]))
    named["prior"] = exponential_family(prior)
    for name, other in named.items():
        if other != family:
            raise TypeError(f"all views and the prior need one family: posteriors[0] is {family}, {name} is {other}")
    if prior.batch_shape:
        raise ValueError(f"`prior` must be one law for all items (batch shape ()), got {tuple(prior.batch_shape)}")
    sizes = [tuple(q.batch_shape) for q in views]
    if len(set(sizes)) != 1:
        raise ValueError(f"all views need one batch shape (..., N), row i of one thing, got {sizes}")
    for j, q in enumerate(views):
        family.check_views(f"posteriors[{j}]", q, prior)
    return family, views, prior


def _fused_natural(family: ExponentialFamily, views: Sequence[Any], prior: Any) -> Tensor:
    total = sum(family.natural(q) for q in views[1:]) + family.natural(views[0])
    return total - (len(views) - 1) * family.natural(prior)


def _check_items(what: str, law: Any) -> None:
    if not law.batch_shape:
        raise ValueError(f"{what} compares the items of a batch and needs laws of batch shape (..., N), got ()")


def _side(numbers: int, pairs: Pairs, tile: int | None) -> int | None:
    """Side of the tiles: smaller ones where a pair is computed from many numbers."""
    if tile is not None or numbers == 1 or pairs.shape.numel() * numbers <= PLAIN_ELEMENTS:
        return tile
    return max(16, math.isqrt(TILE.get(pairs.rows[0].device.type, 2048) ** 2 // numbers))


def fused_posterior(posteriors: Sequence[Any], prior: Any = None) -> Any:
    r"""Posterior of the latent that all views share: natural parameter :math:`\sum_j \eta_j - (J - 1)\, \eta_0`.

    Its mean parameter is the gradient of the log evidence's first term.

    Args:
        posteriors: recognition law of every view, J >= 1 of them, of one family (``VonMisesFisher``,
            ``Independent(Normal, 1)``, ``MultivariateNormal``, ``Categorical``) and one batch shape ``(..., N)``.
        prior: law of the latent before any view, of the same family, batch shape ``()``. By default uniform on the
            sphere, standard normal, or uniform on the classes.

    Returns:
        A distribution of that family, batch ``(..., N)``.

    Raises:
        TypeError: for laws of another family, or of several.
        ValueError: for batch shapes that differ, or Gaussian views wider than the prior.

    Example:
        >>> import torch
        >>> from pyro_contrastive.distributions import VonMisesFisher
        >>> q = VonMisesFisher(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([3.0, 4.0]))
        >>> fused_posterior([q, q, q]).concentration
        tensor([ 9., 12.])
    """
    family, views, prior = _checked(posteriors, prior, 1)
    return family.law(_fused_natural(family, views, prior))


def shared_latent_log_evidence(posteriors: Sequence[Any], prior: Any = None) -> Tensor:
    r"""Log of p(x_1, ..., x_J) / prod p(x_j) under one shared latent, item by item; exact if R averages to the prior.

    For evaluation, not for training: nothing in it holds the recognition laws to the condition that makes it exact. A
    constant encoder R(z|x) = vMF(mu, kappa) scores :math:`\Phi(J\kappa) - J\Phi(\kappa)`, which rises without bound
    with kappa, although its views say nothing. Train with :func:`shared_latent_factor`, or with
    :func:`interior_bound`, which adds what the batch's own averages are found to be.

    Args:
        posteriors: as in :func:`fused_posterior`, J >= 2.
        prior: likewise.

    Returns:
        ``(..., N)`` in nats: 0 for views that say nothing, negative for views that contradict each other.

    Raises:
        TypeError, ValueError: see :func:`fused_posterior`.

    References:
        The model is Walker, Soulat, Yu and Sahani 2022, arXiv 2209.05661; for J = 2 on the sphere this is the
        expected-likelihood kernel.

    Example:
        >>> import torch
        >>> from pyro.distributions import Categorical
        >>> sure = Categorical(torch.tensor([[1.0, 0.0, 0.0]]))
        >>> shared_latent_log_evidence([sure, sure]), shared_latent_log_evidence([sure, sure, sure])  # log 3, log 9
        (tensor([1.0986]), tensor([2.1972]))
    """
    family, views, prior = _checked(posteriors, prior, 2)
    total = family.pairs(views[0], views[1], prior).diagonal()
    for j in range(2, len(views)):
        before = family.law(_fused_natural(family, views[:j], prior))
        total = total + family.pairs(before, views[j], prior).diagonal()
    return total


def shared_latent_factor(name: str, posteriors: Sequence[Any], prior: Any = None, *, tile: int | None = None) -> Tensor:
    r"""Contrastive likelihood of views that share one latent: which item's view j goes with the other views of item n?

    .. math::  \frac1J \sum_j \log \frac{r_j(n, n)}{\frac1N \sum_m r_j(n, m)}, \qquad
               r_j(n, m) = \frac{p(x_j^m \mid x_{-j}^n)}{p(x_j^m)}
                         = \exp\big[\Phi(\rho + \eta_j^m - \eta_0) - \Phi(\rho) - \Phi(\eta_j^m) + \Phi(\eta_0)\big],

    with :math:`\rho` the natural parameter of the posterior given all views of item n but the j-th. Each term is the
    probability of the right answer among the N views j of the batch, relative to guessing. For J = 2 the average over
    views is that over both directions of InfoNCE.

    *Why this can be trained and the evidence itself cannot.* Whatever the recognition laws are, a term is a log
    probability that N alternatives share: its expectation is at most :math:`\min(\log N, I(x_j; x_{-j}))`, and the best
    critic for every N is the true density ratio, up to a factor of the row. Laws that describe the posterior and
    average to the prior give that ratio, so they are a maximum; a constant encoder scores 0 at every concentration.
    The average over views is a composite (pseudo-)likelihood: proper, though not the joint likelihood of J views.

    Grids are never kept whole when they are large. There are J of them (one for J = 2); a cell costs O(1) beside a
    matrix product on the sphere, O(d) for diagonal and O(d^3) for full Gaussians, O(K) for classes.

    Args:
        name: of the factor site.
        posteriors: as in :func:`fused_posterior`, J >= 2, batch ``(..., N)`` with N >= 2 the size of the plate.
        prior: likewise.
        tile: side of the tiles; by default chosen from the size of the batch and the family.

    Returns:
        The emitted value, ``(..., N)`` in nats, at most log N.

    Raises:
        TypeError: for laws of another family, or of several.
        ValueError: for a single view or item, batch shapes that differ or do not fit the enclosing plate, Gaussian
            views wider than the prior, or a ``tile`` that is not a positive integer.

    References:
        van den Oord, Li and Vinyals 2018, arXiv 1807.03748, and Poole et al. 2019, arXiv 1905.06922, for the bound;
        Besag 1975 for the pseudo-likelihood.

    Example:
        >>> import pyro, torch
        >>> from pyro_contrastive.distributions import VonMisesFisher
        >>> q = VonMisesFisher(torch.eye(3), torch.full((3,), 50.0))
        >>> with pyro.plate("pairs", 3):
        ...     shared_latent_factor("views", [q, q, q])
        tensor([1.0986, 1.0986, 1.0986])
    """
    family, views, prior = _checked(posteriors, prior, 2)
    _check_items(f"factor {name!r}", views[0])
    total: Any = 0.0
    left_out = range(len(views)) if len(views) > 2 else [0]  # two views have one grid, and its transpose
    for j in left_out:
        rest = family.law(_fused_natural(family, views[:j] + views[j + 1 :], prior))
        pairs = family.pairs(rest, views[j], prior)
        total = total + infonce_log_ratio(
            pairs, symmetric=len(views) == 2, tile=_side(family.numbers_per_pair, pairs, tile)
        )
    return emit(name, total / len(left_out))


def interior_bound(
    posteriors: Sequence[Any],
    guide: Any = None,
    prior: Any = None,
    *,
    nu: Sequence[Tensor] | None = None,
    tile: int | None = None,
) -> Tensor:
    r"""Lower bound on the log evidence of a shared latent where the recognition laws need not average to the prior.

    The model is :math:`p(z) \prod_j R(z|x_j) / F_j(z)` with :math:`F_j` the average of the batch's N recognition laws.
    For any law q and any :math:`h_j(z) = e^{\nu_j \cdot t(z)}`, Jensen's inequality in the form
    :math:`E_q \log (g / q) \le \log \int g` with :math:`g = F_j / h_j` gives
    :math:`E_q \log F_j \le \log \int F_j / h_j + \nu_j \cdot E_q t - H[q]`, and with it

    .. math::  \log \int p \prod_j \frac{R_j}{F_j} \ge -KL(q|p) - \sum_j \Big[ KL(q|R_j) + \nu_j \cdot E_q t
               + \log \frac1N \sum_m e^{\Phi(\eta_j^m - \nu_j) - \Phi(\eta_j^m)} \Big].

    It is tight if q is the posterior and :math:`h_j` is proportional to :math:`F_j / q`. By default
    :math:`\nu_j = \eta_0 - \eta_q`, which is right if :math:`F_j = p`; the bracket then is
    :math:`KL(q|R_j) - KL(q|p) + \log E_q[F_j / p]`. With the fused posterior as q the bound is
    :func:`shared_latent_log_evidence` minus :math:`\sum_j \log E_q[F_j / p]`: the closed form, corrected by what the
    averages of the batch are. That makes it an objective that can be trained: a constant encoder gets at most 0.

    Args:
        posteriors: as in :func:`fused_posterior`, J >= 2, batch ``(..., N)``.
        guide: q, a law of the same family with the same batch shape; by default :func:`fused_posterior`, the exact
            posterior if every average equals the prior.
        prior: as in :func:`fused_posterior`.
        nu: J tensors ``(..., N, m)`` or ``(m,)`` in the layout of the family's natural parameter
            (:mod:`pyro_contrastive.distributions.exponential`); any value gives a bound, so they can be optimised.
        tile: side of the tiles of the grids of all items; by default chosen from the size of the batch and the family.

    Returns:
        ``(..., N)`` in nats, relative to the product of the empirical marginals, as :func:`shared_latent_log_evidence`.

    Raises:
        TypeError: for laws of another family, or of several.
        ValueError: for a single view, batch shapes that differ, Gaussian views wider than the prior, another number of
            ``nu`` than of views, or a ``nu`` for which the integral diverges.

    References:
        Walker, Soulat, Yu and Sahani 2022, arXiv 2209.05661, the interior variational bound.

    Example:
        >>> import torch
        >>> from pyro_contrastive.distributions import VonMisesFisher
        >>> constant = VonMisesFisher(torch.eye(3)[:1].expand(5, 3), torch.tensor(100.0))
        >>> bool((shared_latent_log_evidence([constant, constant]) > 3).all())
        True
        >>> bool((interior_bound([constant, constant]) <= 0).all())
        True
    """
    family, views, prior = _checked(posteriors, prior, 2)
    _check_items("the interior bound", views[0])
    if nu is not None and len(nu) != len(views):
        raise ValueError(f"`nu` must hold one tensor per view, {len(views)} of them, got {len(nu)}")
    q = family.law(_fused_natural(family, views, prior)) if guide is None else guide
    if guide is not None and (exponential_family(q) != family or q.batch_shape != views[0].batch_shape):
        raise ValueError(
            f"`guide` must be {family} with batch shape {tuple(views[0].batch_shape)} as the views, got "
            f"{exponential_family(q)} with {tuple(q.batch_shape)}"
        )
    to_prior = kl_divergence(q, prior)
    total = -to_prior
    for j, view in enumerate(views):
        total = total - kl_divergence(q, view)
        numbers = family.numbers_per_pair
        if nu is None:
            pairs = family.pairs(q, view, prior)
            total = total + to_prior
        else:
            eta = family.natural(view)
            tilt, numbers = nu[j].expand_as(eta), max(numbers, eta.shape[-1])
            pairs = Pairs(family.tilted, (tilt,), (eta, family.log_partition(eta).unsqueeze(-1)))
            total = total - (tilt * family.mean(q)).sum(-1)
        total = total - contrast(pairs, tile=_side(numbers, pairs, tile)).row + math.log(joint_size(pairs.shape[-1]))
    return total
