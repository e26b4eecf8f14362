r"""The two batch-coupled likelihoods of contrastive models, as Pyro factors.

A contrastive likelihood compares each item of the batch with all others. Both factors are emitted inside the plate of
the items with shape ``(..., N)``: one log-likelihood ratio per item, in nats, so that subsampling scales,
``poutine.scale`` and vectorised particles act on them as on any other site.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import pyro
import torch
from pyro.distributions import Delta
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor
from torch.distributions import Categorical, Distribution

from .aggregates import aggregate_log_density, law_of_all
from .distributions import VonMisesFisher
from .kernels import PairKernel, expected_pairs
from .ops.joint import current_joint, gather, joint_size, one_process_only
from .ops.matching import matching_log_ratio
from .ops.tiles import Pairs, contrast

__all__ = [
    "Negatives",
    "check_recognition",
    "expected_infonce_factor",
    "infonce_factor",
    "infonce_log_ratio",
    "log_ratio_factor",
    "matching_factor",
    "recognition_factor",
    "state_log_aggregate",
    "state_log_ratio",
]

Kernel = Callable[[Tensor, Tensor], Tensor]
Negatives = Literal["sum", "mean"]


def emit(name: str, value: Tensor) -> Tensor:
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


def _check_square(what: str, log_ratios: Tensor | Pairs) -> None:
    shape = log_ratios.shape
    if len(shape) < 2 or shape[-1] != shape[-2]:
        raise ValueError(
            f"{what} needs the grid (..., N, N) of all pairs of the batch, positives on the diagonal, "
            f"got {tuple(shape)}"
        )
    if joint_size(shape[-1]) < 2:
        raise ValueError(
            f"{what} compares items of a batch and needs at least 2, got {shape[-1]}; "
            "use a larger batch (drop_last=True in a DataLoader)"
        )


def infonce_log_ratio(
    log_f: Tensor | Pairs, *, symmetric: bool = False, negatives: Negatives = "sum", tile: int | None = None
) -> Tensor:
    r"""Log InfoNCE likelihood of each diagonal pair against the other pairs of its row.

    .. math::  \log f_{ii} - \log\Big[\pi f_{ii} + (1 - \pi) \frac{1}{N - 1} \sum_{j \ne i} f_{ij}\Big]

    This is the log density ratio of the pair to a mixture in which it belongs together with probability :math:`\pi` and
    by chance otherwise: zero where f says nothing, and at most :math:`-\log \pi`. ``negatives`` chooses
    :math:`\pi`, that is how much the N - 1 negatives count together:

    ========  ==========  ====================================================================================
    ``sum``   pi = 1 / N  each as much as the positive: the softmax over the row, plus log N. At most log N;
                          for large N an estimate of the log density ratio of the pair to chance alone.
    ``mean``  pi = 1 / 2  all together as much as the positive, whatever N, as in MCInfoNCE's code: the log of
                          f_ii / (f_ii + mean of the f_ij), plus log 2. At most log 2.
    ========  ==========  ====================================================================================

    Only ``sum`` is maximal at the true density ratio r(x, x') for every N. ``mean`` is so for one negative; for many,
    its maximum has f (1 + f) proportional to r, in the scale where f averages to one over chance pairs: large ratios
    are compressed towards their square root.

    Args:
        log_f: ``(..., N, N)``, row i against all candidates j, positives on the diagonal; or that grid unevaluated,
            which is then never kept whole when it is large.
        symmetric: average the row-wise and the column-wise form.
        negatives: see above.
        tile: side of the tiles of an unevaluated grid; by default chosen from its size
            (:func:`~pyro_contrastive.ops.tiles.contrast`).

    Returns:
        ``(..., N)`` in nats.

    Raises:
        ValueError: if the grid is not square or has fewer than two items, for another ``negatives``, or a ``tile`` that
            is not a positive integer or goes with a grid that exists already.

    Example:
        >>> import torch
        >>> log_f = 100 * torch.eye(4)
        >>> infonce_log_ratio(log_f)[0], infonce_log_ratio(log_f, negatives="mean")[0]  # log 4, log 2
        (tensor(1.3863), tensor(0.6931))
    """
    _check_square("the InfoNCE likelihood", log_f)
    if negatives not in get_args(Negatives):
        raise ValueError(f"`negatives` must be one of {', '.join(get_args(Negatives))}, got {negatives!r}")
    others = joint_size(log_f.shape[-1]) - 1
    # the weighted sum is the plain one with log(pi (N - 1) / (1 - pi)) added to the positive, up to a factor
    shift, log_count = (0.0, math.log(others + 1)) if negatives == "sum" else (math.log(others), math.log(2 * others))
    positive, total, down = contrast(log_f, symmetric=symmetric, shift=shift, tile=tile)
    if down is not None:
        total = 0.5 * (total + down)
    return positive - total + log_count


def log_ratio_factor(
    name: str,
    log_ratios: Tensor | Pairs,
    *,
    symmetric: bool = False,
    negatives: Negatives = "sum",
    tile: int | None = None,
) -> Tensor:
    """InfoNCE likelihood from log ratios of all pairs, for instance with the latents already integrated out.

    Args:
        name: of the factor site.
        log_ratios: ``(..., N, N)`` log kernel or log evidence of all pairs, positives on the diagonal; or that grid
            unevaluated.
        symmetric: average both directions.
        negatives: ``"sum"`` or ``"mean"``, see :func:`infonce_log_ratio`.
        tile: see :func:`infonce_log_ratio`.

    Returns:
        The emitted value, ``(..., N)`` in nats.

    Raises:
        ValueError: if the grid is not square, has fewer than two items, or does not fit the enclosing plate; see
            :func:`infonce_log_ratio` for the options.
    """
    _check_square(f"factor {name!r}", log_ratios)
    return emit(name, infonce_log_ratio(log_ratios, symmetric=symmetric, negatives=negatives, tile=tile))


def matching_factor(name: str, log_ratios: Tensor) -> Tensor:
    """Likelihood of the whole matching of the batch, which does not depend on the marginals of the views.

    Where the aggregate of the recognition laws is not uniform on the sphere, closed-form evidences hold up to a term of
    each view, and this replaces :func:`log_ratio_factor`. It keeps grids of all pairs: memory is O(N^2).

    Args:
        name: of the factor site.
        log_ratios: ``(..., N, N)`` log evidence of all pairs, positives on the diagonal, N >= 3.

    Returns:
        The emitted value, ``(..., N)`` in nats; see :func:`~pyro_contrastive.ops.matching.matching_log_ratio`.

    Raises:
        ValueError: if the grid is not square, has fewer than three items, or does not fit the enclosing plate.
    """
    one_process_only(
        "the likelihood of the whole matching", "use log_ratio_factor (marginal='uniform'), or one process"
    )
    return emit(name, matching_log_ratio(log_ratios))


def infonce_factor(
    name: str,
    z1: Tensor,
    z2: Tensor,
    kernel: Kernel,
    *,
    symmetric: bool = False,
    negatives: Negatives = "sum",
    tile: int | None = None,
) -> Tensor:
    r"""InfoNCE likelihood of sampled latents: :math:`f(z_i, z'_i) \big/ \frac1N \sum_j f(z_i, z'_j)`.

    This is the recognition-parametrised model with the prior P(z) = R(z), P(z'|z) proportional to R(z') f(z, z'):
    all recognition densities cancel (Aitchison and Ganev 2021, arXiv 2107.02495).

    A :class:`~pyro_contrastive.kernels.PairKernel` keeps no grid of a large batch: memory is O(N) beside one tile.

    Args:
        name: of the factor site.
        z1: ``(..., N, d)`` latents of the first view.
        z2: ``(..., N, d)`` latents of the second view, row i the partner of row i.
        kernel: ``kernel(z1, z2) -> (..., N, N)`` log f, for instance
            :class:`~pyro_contrastive.kernels.VonMisesFisherKernel`.
        symmetric: average the likelihoods of z2 given z1 and of z1 given z2.
        negatives: ``"sum"`` or ``"mean"``, see :func:`infonce_log_ratio`.
        tile: side of the tiles, for a `PairKernel`; by default chosen from the size of the batch.

    Returns:
        The emitted value, ``(..., N)`` in nats.

    Raises:
        ValueError: for latents of different shapes, a batch of one, or shapes that do not fit the enclosing plate; see
            :func:`infonce_log_ratio` for the options.
    """
    if z1.shape[-2:] != z2.shape[-2:] or z1.dim() < 2:
        raise ValueError(
            f"factor {name!r} needs latents of one shape (..., N, d), got {tuple(z1.shape)} and {tuple(z2.shape)}"
        )
    log_f = kernel(z1, z2, lazy=True) if isinstance(kernel, PairKernel) else kernel(z1, z2)
    return log_ratio_factor(name, log_f, symmetric=symmetric, negatives=negatives, tile=tile)


def expected_infonce_factor(
    name: str,
    posterior1: VonMisesFisher,
    posterior2: VonMisesFisher,
    concentration: float | Tensor = math.inf,
    *,
    symmetric: bool = False,
    negatives: Negatives = "sum",
    tile: int | None = None,
) -> Tensor:
    r"""InfoNCE likelihood of views, their latents integrated out: :math:`E f_{ii} \big/ \frac1N \sum_j E f_{ij}`.

    The latents are z ~ R(.|x_i), z' ~ R(.|x'_j) and the kernel is von Mises-Fisher. No samples: the learned
    concentrations are widths of P(z|x), relative to the concentration of the pair.

    Args:
        name: of the factor site.
        posterior1: von Mises-Fisher recognition law of the first views, batch ``(..., N)``, as returned by
            ``guide.posterior(x1)``.
        posterior2: that of the second views, row i the partner of row i.
        concentration: kappa > 0 of the pair, a number or a scalar tensor; infinite (default) when both views show one
            latent.
        symmetric: average both directions.
        negatives: ``"sum"`` or ``"mean"``, see :func:`infonce_log_ratio`.
        tile: see :func:`infonce_log_ratio`.

    Returns:
        The emitted value, ``(..., N)`` in nats.

    Raises:
        TypeError: for posteriors of another family.
        ValueError: for a concentration that is not positive, a batch of one, or shapes that do not fit the enclosing
            plate; see :func:`infonce_log_ratio` for the options.

    Example:
        >>> import torch
        >>> q = VonMisesFisher(torch.eye(3), torch.full((3,), 50.0))
        >>> with pyro.plate("pairs", 3):
        ...     expected_infonce_factor("positive", q, q)
        tensor([1.0986, 1.0986, 1.0986])
    """
    pairs = expected_pairs(posterior1, posterior2, concentration)
    return log_ratio_factor(name, pairs, symmetric=symmetric, negatives=negatives, tile=tile)


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


def state_log_aggregate(laws: Categorical) -> Tensor:
    r"""Log of the average of categorical laws, :math:`\log F(k) = \log \frac1N \sum_j f(k|x_j)`.

    Args:
        laws: categorical law with batch shape ``(N,)`` over K states.

    Returns:
        ``(K,)``; in a joint batch the average over the items of all processes.
    """
    sums = gather(laws.logits.logsumexp(0).unsqueeze(0), what="the average of categorical laws")
    return sums.logsumexp(0) - math.log(joint_size(len(laws.logits)))


def state_log_ratio(posterior: Categorical, aggregate: Categorical | None = None) -> Tensor:
    r"""Log likelihood of every item under every state of a discrete latent: :math:`\log f(k|x_i) - \log F(k)`.

    The aggregate F(k) is the average of f(k|x_j) over the batch, the item itself included. The batch is summed once per
    state, so that enumeration costs O(N K), not O(N^2 K).

    Args:
        posterior: categorical recognition law with batch shape ``(N,)`` over K states.
        aggregate: categorical law with batch shape ``(M,)`` to average over instead of the batch.

    Returns:
        ``(N, K)`` in nats; at most log N without an `aggregate`.

    Example:
        >>> state_log_ratio(Categorical(probs=torch.tensor([[0.9, 0.1], [0.3, 0.7]]))).exp()
        tensor([[1.5000, 0.2500],
                [0.5000, 1.7500]])
    """
    if aggregate is None:
        return posterior.logits - state_log_aggregate(posterior)
    return posterior.logits - aggregate.logits.logsumexp(0) + math.log(len(aggregate.logits))


def recognition_factor(
    name: str, z: Tensor, posterior: Any, *, aggregate: Any = None, tile: int | None = None
) -> Tensor:
    r"""Likelihood of the views in a recognition-parametrised model: :math:`R(z_i|x_i) \big/ \frac1N \sum_j R(z_i|x_j)`.

    The aggregate R(z) is the average of the batch's recognition laws, the item itself included, so the factor is at
    most log N; its bias is O(1/N).

    A discrete latent has a categorical law. Its states may be draws or enumerated by Pyro (``TraceEnum_ELBO``), and the
    likelihood is then exact: :func:`state_log_ratio` gives the table that is looked up.

    Args:
        name: of the factor site, by convention the view that it observes.
        z: ``(..., N, d)`` latents, one per item; for a categorical law states ``(..., N)``, or ``(..., 1)`` when they
            are enumerated.
        posterior: recognition law with batch shape ``(N,)``, as returned by ``guide.posterior(x)``.
        aggregate: recognition law with batch shape ``(M,)`` to average over instead of the batch, for instance of a
            memory bank or of all data (:mod:`pyro_contrastive.aggregates`).
        tile: side of the tiles, for the laws of this package (:func:`infonce_log_ratio`); by default chosen from the
            size of the batch. Without an `aggregate` only.

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
    if isinstance(posterior, Categorical):
        return _state_factor(name, z, posterior, aggregate)
    if len(batch) != 1 or z.dim() < 2 or z.shape[-2] != batch[0]:
        raise ValueError(
            f"factor {name!r} needs latents (..., N, d) and a posterior of batch shape (N,), got "
            f"{tuple(z.shape)} and {tuple(batch)}"
        )
    cross = getattr(posterior, "cross_pairs", None)  # without an (N, N, d) tensor, and by tiles when N is large
    if aggregate is None and cross is None and current_joint() is not None:
        aggregate = law_of_all(posterior)
    if aggregate is not None:
        return emit(name, posterior.log_prob(z) - aggregate_log_density(z, aggregate))
    return log_ratio_factor(name, cross(z) if cross else posterior.log_prob(z.unsqueeze(-2)), tile=tile)


def _state_factor(name: str, z: Tensor, posterior: Categorical, aggregate: Categorical | None) -> Tensor:
    batch = posterior.batch_shape
    if len(batch) != 1 or z.dim() < 1 or z.shape[-1] not in (1, batch[0]) or z.is_floating_point():
        raise ValueError(
            f"factor {name!r} needs integer states (..., N) and a categorical posterior of batch shape (N,), got "
            f"{z.dtype} {tuple(z.shape)} and {tuple(batch)}; draw them from pyro.distributions.Categorical in the plate"
        )
    if joint_size(batch[0]) < 2 and aggregate is None:
        raise ValueError(
            f"factor {name!r} compares items of a batch and needs at least 2, got {batch[0]}; "
            "use a larger batch (drop_last=True in a DataLoader)"
        )
    return emit(name, state_log_ratio(posterior, aggregate)[torch.arange(batch[0], device=z.device), z])
