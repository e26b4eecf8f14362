"""The smallest set of gallery items that holds a query's partner with a given probability."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from pyro_contrastive.diagnostics import _search
from pyro_contrastive.diagnostics._search import Candidates, CredibleSets, checked_search, collect, posteriors, take
from pyro_contrastive.distributions import VonMisesFisher
from pyro_contrastive.ops.precision import matmul
from pyro_contrastive.ops.series import expected_kernel_log_ratio

__all__ = ["partner_sets"]


def partner_sets(
    queries: VonMisesFisher,
    gallery: VonMisesFisher,
    *,
    alpha: float = 0.05,
    pair_concentration: float = math.inf,
    exclude: ArrayLike | Tensor | None = None,
) -> CredibleSets:
    r"""Smallest sets of gallery items that hold the query's partner with probability 1 - alpha, if the gallery does.

    With every item as likely as any other beforehand, item r is the partner with probability
    :math:`P(r \mid x) \propto p(x, x_r) / (p(x)\, p(x_r))`, the exact evidence of a pair
    (`ops.series.expected_kernel_log_ratio`): the softmax that the InfoNCE likelihood trains, over the gallery. A set
    holds the likeliest items until they add up to 1 - alpha or more. It is never empty.

    Args:
        queries: Posteriors of the queries, batch shape (N,), concentrations > 0.
        gallery: Posteriors of the items, batch shape (M,).
        alpha: Probability left out, in (0, 1).
        pair_concentration: Of the latents of a pair, > 0; infinity if they are one.
        exclude: As for `credible_sets`, e.g. the query's own place in the gallery.

    Returns:
        The sets. All M evidences of a query are held at once, and as many queries as fit into a fixed work space.

    Raises:
        TypeError: If a side is not `VonMisesFisher`.
        ValueError: If a shape, a concentration or alpha is out of range, or a side is empty.

    Example:
        >>> law = VonMisesFisher(torch.eye(3), torch.tensor([50.0, 50.0, 50.0]))
        >>> partner_sets(law, law).indices
        array([0, 1, 2])
    """
    for name, law in (("queries", queries), ("gallery", gallery)):
        if not isinstance(law, VonMisesFisher):
            raise TypeError(f"`{name}` must be VonMisesFisher posteriors, got {type(law).__name__}")
    (query_mean, query_kappa), (item_mean, item_kappa) = (
        posteriors("queries", queries),
        posteriors("gallery", gallery),
    )
    num, size = len(query_mean), len(item_mean)
    left_out = checked_search(query_mean, item_mean, alpha, exclude)
    if not pair_concentration > 0.0:
        raise ValueError(f"`pair_concentration` must be > 0 (math.inf: one latent), got {pair_concentration!r}")
    items, kappa = item_mean.double(), torch.from_numpy(item_kappa).to(item_mean.device)
    pair = kappa.new_tensor(pair_concentration)
    parts: list[Candidates] = []
    for chunk in np.array_split(np.arange(num), -(-num * size * 16 // _search.ENTRIES)):
        if not len(chunk):
            continue
        cosine = matmul(take(query_mean, chunk).to(items), items.mT)
        own = torch.from_numpy(query_kappa[chunk]).to(kappa)[:, None]
        evidence = expected_kernel_log_ratio(query_mean.shape[1], own, kappa[None, :], pair, cosine)
        hidden = np.flatnonzero(left_out[chunk] >= 0)
        evidence[torch.from_numpy(hidden), torch.from_numpy(left_out[chunk][hidden])] = -torch.inf
        weight, order = evidence.softmax(dim=1).sort(dim=1, descending=True, stable=True)
        row, rank = (weight.cumsum(dim=1) - weight < 1.0 - alpha).logical_and(weight > 0).nonzero(as_tuple=True)
        item = order[row, rank]
        parts.append((chunk[row.cpu().numpy()], item.cpu().numpy(), cosine[row, item].float().cpu().numpy()))
    return collect(parts, num, size, alpha)
