r"""The two batch-coupled likelihoods of contrastive models, as Pyro factors.

A contrastive likelihood compares each item of the batch with all others. Both factors are emitted inside the plate of
the items with shape ``(..., N)``: one log-likelihood ratio per item, in nats, so that subsampling scales,
``poutine.scale`` and vectorised particles act on them as on any other site.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
from pyro.distributions import Delta
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor
from torch.distributions import Distribution

from .ops.matching import matching_log_ratio

__all__ = [
    "check_recognition",
    "infonce_factor",
    "infonce_log_ratio",
    "log_ratio_factor",
    "matching_factor",
    "recognition_factor",
]

Kernel = Callable[[Tensor, Tensor], Tensor]


def _emit(name: str, value: Tensor) -> Tensor:
    """Emit a factor after checking it against the enclosing plate: a wrong shape would be miscounted in silence."""
    plates: list[Any] = [handler for handler in _PYRO_STACK if isinstance(handler, pyro.plate)]
    if not plates:
        raise ValueError(
            f"factor {name!r} must be emitted inside the plate of its items; "
            f"wrap it in `with pyro.plate('pairs', {value.shape[-1]}):`"
        )
    plate = max(plates, key=lambda p: p.dim)  # dims are negative: the innermost batch dimension is the largest
    if plate.dim != -1 or plate.subsample_size != value.shape[-1]:
        raise ValueError(
            f"factor {name!r} must have one value per item of plate {plate.name!r} "
            f"(dim -1, size {plate.subsample_size}), got shape {tuple(value.shape)} for a plate at dim {plate.dim}; "
            "latents are (..., N, d) with N the plate size"
        )
    pyro.factor(name, value)
    return value


def _check_square(what: str, log_ratios: Tensor) -> None:
    if log_ratios.dim() < 2 or log_ratios.shape[-1] != log_ratios.shape[-2]:
        raise ValueError(
            f"{what} needs the grid (..., N, N) of all pairs of the batch, positives on the diagonal, "
            f"got {tuple(log_ratios.shape)}"
        )
    if log_ratios.shape[-1] < 2:
        raise ValueError(
            f"{what} compares items of a batch and needs at least 2, got {log_ratios.shape[-1]}; "
            "use a larger batch (drop_last=True in a DataLoader)"
        )


def infonce_log_ratio(log_f: Tensor, *, symmetric: bool = False) -> Tensor:
    r"""Log InfoNCE likelihood of each diagonal pair, :math:`\log f_{ii} - \log \frac1N \sum_j f_{ij}`.

    Args:
        log_f: ``(..., N, N)``, row i against all candidates j, positives on the diagonal.
        symmetric: average the row-wise and the column-wise form.

    Returns:
        ``(..., N)`` in nats, at most log N.

    Raises:
        ValueError: if the grid is not square or has fewer than two items.
    """
    _check_square("the InfoNCE likelihood", log_f)
    size = log_f.shape[-1]
    positive = log_f.diagonal(dim1=-2, dim2=-1)
    rows = log_f.logsumexp(-1)
    if symmetric:
        rows = 0.5 * (rows + log_f.logsumexp(-2))
    return positive - rows + math.log(size)


def log_ratio_factor(name: str, log_ratios: Tensor, *, symmetric: bool = False) -> Tensor:
    """InfoNCE likelihood from a grid of log ratios whose latents are already integrated out.

    Args:
        name: of the factor site.
        log_ratios: ``(..., N, N)`` log kernel or log evidence of all pairs, positives on the diagonal.
        symmetric: average both directions.

    Returns:
        The emitted value, ``(..., N)`` in nats.

    Raises:
        ValueError: if the grid is not square, has fewer than two items, or does not fit the enclosing plate.
    """
    _check_square(f"factor {name!r}", log_ratios)
    return _emit(name, infonce_log_ratio(log_ratios, symmetric=symmetric))


def matching_factor(name: str, log_ratios: Tensor) -> Tensor:
    """Likelihood of the whole matching of the batch, which does not depend on the marginals of the views.

    Where the aggregate of the recognition laws is not uniform on the sphere, a grid of closed-form evidences holds up to
    a term of each view, and this replaces :func:`log_ratio_factor`.

    Args:
        name: of the factor site.
        log_ratios: ``(..., N, N)`` log evidence of all pairs, positives on the diagonal, N >= 3.

    Returns:
        The emitted value, ``(..., N)`` in nats; see :func:`~pyro_contrastive.ops.matching.matching_log_ratio`.

    Raises:
        ValueError: if the grid is not square, has fewer than three items, or does not fit the enclosing plate.
    """
    return _emit(name, matching_log_ratio(log_ratios))


def infonce_factor(name: str, z1: Tensor, z2: Tensor, kernel: Kernel, *, symmetric: bool = False) -> Tensor:
    r"""InfoNCE likelihood of sampled latents: :math:`f(z_i, z'_i) \big/ \frac1N \sum_j f(z_i, z'_j)`.

    This is the recognition-parametrised model with the prior P(z) = R(z), P(z'|z) proportional to R(z') f(z, z'):
    all recognition densities cancel (Aitchison and Ganev 2021, arXiv 2107.02495).

    Args:
        name: of the factor site.
        z1: ``(..., N, d)`` latents of the first view.
        z2: ``(..., N, d)`` latents of the second view, row i the partner of row i.
        kernel: ``kernel(z1, z2) -> (..., N, N)`` log f, for instance
            :class:`~pyro_contrastive.kernels.VonMisesFisherKernel`.
        symmetric: average the likelihoods of z2 given z1 and of z1 given z2.

    Returns:
        The emitted value, ``(..., N)`` in nats.

    Raises:
        ValueError: for latents of different shapes, a batch of one, or shapes that do not fit the enclosing plate.
    """
    if z1.shape[-2:] != z2.shape[-2:] or z1.dim() < 2:
        raise ValueError(
            f"factor {name!r} needs latents of one shape (..., N, d), got {tuple(z1.shape)} and {tuple(z2.shape)}"
        )
    return log_ratio_factor(name, kernel(z1, z2), symmetric=symmetric)


def check_recognition(name: str, guide: Any) -> None:
    """Raise TypeError unless `guide` is a recognition module.

    Args:
        name: of the argument, for the message.
        guide: an object with ``posterior(x)``.

    Raises:
        TypeError: for anything else, a class included.
    """
    if isinstance(guide, type) or not callable(getattr(guide, "posterior", None)):
        got = f"the class {guide.__name__}" if isinstance(guide, type) else type(guide).__name__
        raise TypeError(
            f"`{name}` must be a recognition module with a method posterior(x), got {got}; "
            "build one, e.g. guides.VonMisesFisher(encoder, dim)"
        )


def recognition_factor(name: str, z: Tensor, posterior: Any) -> Tensor:
    r"""Likelihood of the views in a recognition-parametrised model: :math:`R(z_i|x_i) \big/ \frac1N \sum_j R(z_i|x_j)`.

    The aggregate R(z) is the average of the batch's recognition laws, the item itself included, so the factor is at
    most log N; its bias is O(1/N).

    Args:
        name: of the factor site, by convention the view that it observes.
        z: ``(..., N, d)`` latents, one per item.
        posterior: recognition law with batch shape ``(N,)``, as returned by ``guide.posterior(x)``.

    Returns:
        The emitted value, ``(..., N)`` in nats.

    Raises:
        TypeError: if `posterior` is not a distribution.
        ValueError: for a batch of one, shapes that do not match, or a deterministic (Delta) recognition law, which has
            no density.

    References:
        Aitchison and Ganev 2021, arXiv 2107.02495; Walker et al. 2022, arXiv 2209.05661, where the aggregate is F_j(Z).
    """
    if isinstance(posterior, Delta):
        raise ValueError(
            f"factor {name!r} needs a recognition law with a density, got Delta; use a stochastic guide "
            "(guides.VonMisesFisher, ...) or, for deterministic embeddings, infonce_factor"
        )
    if not isinstance(posterior, Distribution):
        raise TypeError(
            f"factor {name!r} needs a recognition law, got {type(posterior).__name__}; pass guide.posterior(x)"
        )
    batch = posterior.batch_shape
    if len(batch) != 1 or z.dim() < 2 or z.shape[-2] != batch[0]:
        raise ValueError(
            f"factor {name!r} needs latents (..., N, d) and a posterior of batch shape (N,), got "
            f"{tuple(z.shape)} and {tuple(batch)}"
        )
    # one matrix product where the law offers it, instead of an (N, N, d) tensor
    score = getattr(posterior, "cross_log_prob", None)
    return log_ratio_factor(name, score(z) if score else posterior.log_prob(z.unsqueeze(-2)))
