r"""The contrastive likelihood in its two-view layout with several positives: NT-Xent, and SupCon with labels.

The two views of N things are 2N items. Each is compared with the 2N - 1 others, itself excluded, and its positives are
the other view of its thing and, where labels are given, all items of its class.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, get_args

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .factors import emit
from .kernels import PairKernel
from .ops.joint import current_joint, gather, joint_offset, joint_size, one_process_only
from .ops.precision import at_least_single
from .ops.tiles import PLAIN_ELEMENTS, Pairs, contrast

__all__ = ["Positives", "nt_xent_factor", "nt_xent_log_ratio"]

Positives = Literal["supcon_out", "supcon_in"]


def nt_xent_log_ratio(
    log_f: Tensor | Pairs,
    labels: Tensor | None = None,
    *,
    positives: Positives = "supcon_out",
    block: int | None = None,
) -> Tensor:
    r"""Log likelihood of the positives of each pair of views against all other items of the batch.

    For item a with positives P(a), among all 2N - 1 other items A(a),

    .. math::  \text{supcon\_out: } \frac{1}{|P|} \sum_{p \in P} \log \frac{f_{ap}}{\bar f_a}, \qquad
               \text{supcon\_in: } \log \frac{1}{|P|} \sum_{p \in P} \frac{f_{ap}}{\bar f_a}, \qquad
               \bar f_a = \frac{1}{2N - 1} \sum_{k \in A(a)} f_{ak},

    averaged over the two views of a thing. Minus these, plus log(2N - 1), are the losses of Khosla et al. (2020,
    equations 2 and 3); without labels there is one positive and both are NT-Xent (Chen et al. 2020, equation 1).
    ``supcon_out`` is at most ``supcon_in``, by Jensen's inequality, and is what Khosla et al. recommend.

    Args:
        log_f: ``(..., 2N, 2N)`` log kernel of all items, the N first views before the N second ones; or that grid
            unevaluated, which is then never kept whole when it is large. The diagonal is not used.
        labels: ``(N,)`` integers: items with the same label are positives of one another. None: every thing is a class
            of its own, as unique labels say too.
        positives: the mean over positives outside (``"supcon_out"``) or inside the log (``"supcon_in"``).
        block: rows of an unevaluated grid that are computed at a time, and again in the backward pass; by default all
            of up to :data:`~pyro_contrastive.ops.tiles.PLAIN_ELEMENTS` elements, and without labels tiles
            (:func:`~pyro_contrastive.ops.tiles.contrast`).

    Returns:
        ``(..., N)`` in nats: zero where f says nothing, at most log(2N - 1).

    Raises:
        ValueError: for a grid that is not square and even, or of fewer than two things; for labels that are not N
            integers, or (under Pyro's validation) all the same; for another ``positives``; for a ``block`` that is not
            a positive integer or goes with a grid that exists already.

    References:
        Chen, Kornblith, Norouzi and Hinton, ICML 2020, arXiv 2002.05709; Khosla et al., NeurIPS 2020, arXiv 2004.11362.

    Example:
        >>> import torch
        >>> f = 100 * torch.eye(2).repeat(2, 2)  # the two views of two things: partners are close, others are not
        >>> nt_xent_log_ratio(f), nt_xent_log_ratio(0 * f, torch.tensor([0, 1]))  # log 3 against 3 others; nothing
        (tensor([1.0986, 1.0986]), tensor([0., 0.]))
    """
    if positives not in get_args(Positives):
        raise ValueError(f"`positives` must be one of {', '.join(get_args(Positives))}, got {positives!r}")
    size = log_f.shape[-1] if len(log_f.shape) >= 2 else 0
    if len(log_f.shape) < 2 or log_f.shape[-2] != size or size % 2 or size < 4:
        raise ValueError(
            "the NT-Xent likelihood needs the grid (..., 2N, 2N) of both views of N >= 2 things, first views first, "
            f"got {tuple(log_f.shape)}; use a larger batch (drop_last=True in a DataLoader)"
        )
    if block is not None and (isinstance(block, bool) or not isinstance(block, int) or block < 1):
        raise ValueError(f"`block` must be an integer >= 1, rows at a time, or None (automatic), got {block!r}")
    if isinstance(log_f, Tensor) and block is not None:
        raise ValueError(
            f"`block` is for grids that are not evaluated yet, got one of shape {tuple(log_f.shape)}; pass Pairs, for "
            "instance kernel(z, z, lazy=True)"
        )
    if isinstance(log_f, Tensor):
        one_process_only("a grid that one process has evaluated", "hand out Pairs (a PairKernel), or leave joint_batch")
        classes = _classes(labels, size // 2, log_f.device)
        value = _anchors(log_f, classes, classes, 0, positives)
    elif labels is None and block is None:
        value = _views_alone(log_f)
    else:
        value = _in_blocks(log_f, _classes(labels, size // 2, log_f.rows[0].device), positives, block)
    return value.unflatten(-1, (2, -1)).mean(-2) + math.log(joint_size(size) - 1)


def nt_xent_factor(
    name: str,
    z1: Tensor,
    z2: Tensor,
    kernel: Callable[[Tensor, Tensor], Tensor],
    labels: Tensor | None = None,
    *,
    positives: Positives = "supcon_out",
    block: int | None = None,
) -> Tensor:
    """Likelihood of the positives of sampled latents among the 2N - 1 other latents of the batch.

    Unlike :func:`~pyro_contrastive.factors.infonce_factor`, which compares a first view with the second views, it
    compares each view with all others, and takes labels. A :class:`~pyro_contrastive.kernels.PairKernel` keeps no grid
    of a large batch: memory is O(N) beside a block of rows.

    Args:
        name: of the factor site.
        z1: ``(..., N, d)`` latents of the first view.
        z2: ``(..., N, d)`` latents of the second view, row i the partner of row i.
        kernel: ``kernel(z, z) -> (..., 2N, 2N)`` symmetric log f, for instance
            :class:`~pyro_contrastive.kernels.VonMisesFisherKernel`.
        labels: ``(N,)`` integers, see :func:`nt_xent_log_ratio`.
        positives: ``"supcon_out"`` or ``"supcon_in"``.
        block: rows at a time, for a `PairKernel`.

    Returns:
        The emitted value, ``(..., N)`` in nats.

    Raises:
        ValueError: for latents of different shapes, or shapes that do not fit the enclosing plate; see
            :func:`nt_xent_log_ratio` for the rest.
    """
    if z1.shape != z2.shape or z1.dim() < 2:
        raise ValueError(
            f"factor {name!r} needs latents of one shape (..., N, d), got {tuple(z1.shape)} and {tuple(z2.shape)}"
        )
    z = torch.cat([z1, z2], -2)
    log_f = kernel(z, z, lazy=True) if isinstance(kernel, PairKernel) else kernel(z, z)
    return emit(name, nt_xent_log_ratio(log_f, labels, positives=positives, block=block))


def _classes(labels: Tensor | None, size: int, device: torch.device) -> Tensor:
    """Class of each of the 2N items, as a tensor (2N, 1)."""
    if labels is None:
        labels = torch.arange(size, device=device) + joint_offset(size)
    elif not isinstance(labels, Tensor) or labels.shape != (size,) or labels.is_floating_point() or labels.is_complex():
        got = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"`labels` must be a tensor of {size} integers, one per pair of views, got {got}")
    elif (
        current_joint() is None and is_validation_enabled() and bool((labels == labels[0]).all())
    ):  # waits for the device
        raise ValueError(
            f"`labels` must hold at least two classes, got {size} times {labels[0].item()!r}: nothing is left to tell "
            "the class from; shuffle the data or use a larger batch"
        )
    return labels.to(device).repeat(2).unsqueeze(-1)


def _anchors(log_f: Tensor, own: Tensor, classes: Tensor, first: int, positives: Positives) -> Tensor:
    """Log of the positives over the sum of all others for rows `first`, ..., without the count of the others."""
    rows, size = log_f.shape[-2:]
    itself = torch.arange(first, first + rows, device=log_f.device).unsqueeze(-1) == torch.arange(
        size, device=log_f.device
    )
    positive = (own == classes.mT) & ~itself
    count = positive.sum(-1)
    if positives == "supcon_in":
        near = log_f.masked_fill(~positive, -torch.inf).logsumexp(-1) - count.to(log_f.dtype).log()
    else:
        near = log_f.masked_fill(~positive, 0.0).sum(-1) / count
    return near - log_f.masked_fill(itself, -torch.inf).logsumexp(-1)


def _views_alone(pairs: Pairs) -> Tensor:
    """The same from an unevaluated grid without labels, where the other view is the only positive.

    One value per row and a log-sum-exp without the diagonal: by tiles, by one kernel on a GPU, round the ring in a
    joint batch.
    """
    things = pairs.shape[-1] // 2
    partners = replace(pairs, columns=tuple(t.roll(things, -2) for t in pairs.columns)).diagonal()
    return at_least_single(partners) - contrast(pairs, shift=-math.inf).row


def _in_blocks(pairs: Pairs, own: Tensor, positives: Positives, block: int | None) -> Tensor:
    """The same from an unevaluated grid: blocks of rows are evaluated, summed up, dropped, and evaluated again.

    In a joint batch against the columns of all processes; the rows are those of this one.
    """
    what, size = "the NT-Xent likelihood", pairs.shape[-2]
    classes, start = gather(own, what=what), joint_offset(size)
    pairs = replace(pairs, columns=tuple(gather(t, -2, what=what) for t in pairs.columns))
    block = block or max(1, PLAIN_ELEMENTS // (pairs.batch.numel() * pairs.shape[-1]))

    def rows(first: int) -> Tensor:
        part = slice(first, first + block)
        log_f = replace(pairs, rows=tuple(t[..., part, :] for t in pairs.rows)).grid()
        return _anchors(log_f, own[part], classes, start + first, positives)

    if block >= size:
        return rows(0)
    blocks = [checkpoint(rows, first, use_reentrant=False, preserve_rng_state=False) for first in range(0, size, block)]
    return torch.cat(blocks, -1)
