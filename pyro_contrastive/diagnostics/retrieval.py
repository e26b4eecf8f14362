r"""Credible-interval retrieval: the gallery items that a query's posterior cannot tell from its own latent.

A *credible set* is an answer whose size says how sure the query is. For a gallery of points it holds the items inside
the highest-density cap of mass 1 - alpha (Kirchhof et al. 2023, arXiv 2302.02865, who take the radius from 10,000
draws; here it is the quantile of the angle itself). For a gallery of posteriors the width of every item counts as well:
it holds the items that lie where a *partner* of the query, a second view of the same latent with the item's
concentration, would lie with probability 1 - alpha (see `partner`). When the posteriors are right and the latent is
uniform, the true latent is in the cap, and the true partner in the set, with probability 1 - alpha.

Where the gallery is known to hold the partner, `partner_sets` (in the module of that name) weighs every item by the
evidence that it is the one. That is what the InfoNCE likelihood is about, and it needs no uniform latent.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import special
from torch import Tensor

from pyro_contrastive.diagnostics import _search
from pyro_contrastive.diagnostics._arrays import FloatArray, as_array
from pyro_contrastive.diagnostics._search import (
    Candidates,
    CredibleSets,
    IntArray,
    checked_search,
    collect,
    posteriors,
    take,
    unit_points,
)
from pyro_contrastive.diagnostics.calibration import Family, cap_radius
from pyro_contrastive.diagnostics.partner import PartnerRadii
from pyro_contrastive.distributions import PowerSpherical, VonMisesFisher
from pyro_contrastive.ops.precision import matmul

__all__ = ["CredibleSets", "cap_area", "credible_sets"]

Backend = Literal["torch", "faiss"]
Search = Callable[[Tensor, FloatArray], Candidates]

_FAMILIES: dict[type, Family] = {VonMisesFisher: "vmf", PowerSpherical: "power_spherical"}
_ROWS = 256  # queries of one step: the fastest of 16 to 1024 for either backend


def cap_area(radius: ArrayLike | Tensor, dim: int) -> FloatArray:
    r"""Area of a cap as a share of the sphere: the size that a credible set has in a uniform gallery, per item.

    :math:`I_{\sin^2(r/2)}\left(\frac{d-1}{2}, \frac{d-1}{2}\right)`, a regularised incomplete beta function (Li 2011).

    Args:
        radius: Radii in radians, in [0, pi], any shape.
        dim: Dimension d >= 2 of the space around the sphere.

    Returns:
        Shares in [0, 1], of the shape of `radius`.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> cap_area([np.pi / 3, np.pi / 2], dim=3).round(6)  # (1 - cos r) / 2 in three dimensions
        array([0.25, 0.5 ])
    """
    radius = as_array(radius).astype(np.float64)
    if dim < 2 or not np.all((radius >= 0) & (radius <= np.pi)):
        raise ValueError(f"`radius` must be in [0, pi] radians and `dim` >= 2, got {radius} and {dim!r}")
    return special.betainc(0.5 * (dim - 1), 0.5 * (dim - 1), np.sin(0.5 * radius) ** 2)


def credible_sets(
    queries: Any,
    gallery: Any,
    *,
    alpha: float = 0.05,
    exclude: ArrayLike | Tensor | None = None,
    backend: Backend = "torch",
) -> CredibleSets:
    """Gallery items inside each query's credible region of mass 1 - alpha, without draws.

    Args:
        queries: `VonMisesFisher` or `PowerSpherical` posteriors, batch shape (N,), concentrations > 0.
        gallery: Points, unit vectors of shape (M, d): the set is the cap that holds the query's *latent* with
            probability 1 - alpha. Or `VonMisesFisher` posteriors, batch shape (M,), for queries of this family: an item
            is in the set if it lies where a *partner* of its concentration lies with probability 1 - alpha. Give
            `gallery.mean_direction` to leave the widths of the items out of account.
        alpha: Probability left out, in (0, 1).
        exclude: Gallery item that each query must not find, shape (N,), with -1 for none; `numpy.arange(N)` where the
            queries are the gallery.
        backend: "torch" (on the gallery's device), or "faiss" (CPU; ``pip install "pyro-contrastive[retrieval]"``). The
            sets are the same: either proposes by float32 cosines, and what lies within rounding of an edge is decided
            in float64. An exact search is bound by the matrix product, and torch was no slower where it was measured.

    Returns:
        The sets. Work space is bounded, whatever N and M.

    Raises:
        ImportError: If faiss is asked for and missing.
        TypeError: If a side is of another kind.
        ValueError: If a shape, a concentration or alpha is out of range, or a side is empty.

    Example:
        >>> east, gallery = torch.tensor([[1.0, 0.0, 0.0]]), torch.eye(3)
        >>> credible_sets(VonMisesFisher(east, torch.tensor([100.0])), gallery).sizes  # sure: the nearest one
        array([1])
        >>> credible_sets(VonMisesFisher(east, torch.tensor([0.1])), gallery).sizes  # unsure: everything
        array([3])
    """
    family = _FAMILIES.get(type(queries))
    if family is None:
        raise TypeError(
            f"`queries` must be VonMisesFisher or PowerSpherical posteriors, got {type(queries).__name__}; for another "
            "family pass VonMisesFisher(mean, kappa) with the torch tensors of `direction_and_concentration(queries)`"
        )
    query_mean, query_kappa = posteriors("queries", queries)
    num, dim = query_mean.shape
    if isinstance(gallery, Tensor | np.ndarray):
        item_mean, item_kappa = unit_points("gallery", torch.as_tensor(gallery)), None
    elif isinstance(gallery, VonMisesFisher) and family == "vmf":
        item_mean, item_kappa = posteriors("gallery", gallery)
    else:
        raise TypeError(
            "`gallery` must be unit vectors (M, d), or VonMisesFisher posteriors where the queries are, got "
            f"{type(gallery).__name__} for queries {type(queries).__name__}; pass its mean directions"
        )
    size = len(item_mean)
    left_out = checked_search(query_mean, item_mean, alpha, exclude)
    _check_backend(backend)

    # The edge as log(1 - cosine), one matrix product of (N, terms) and (terms, M) in float64.
    if item_kappa is None:
        edge_rows = np.log(2.0) + 2.0 * np.log(np.sin(0.5 * cap_radius(1.0 - alpha, query_kappa, dim, family=family)))
        edge_rows = edge_rows[:, None]
    else:
        radii = PartnerRadii(1.0 - alpha, query_kappa, item_kappa, dim)
        edge_rows = radii.rows(query_kappa)
    margin = _margin(item_mean)
    # Steps of similar concentrations, so that one bound for all of them is not much too wide.
    query_order = np.argsort(query_kappa, kind="stable")
    item_order = None if item_kappa is None else np.argsort(item_kappa, kind="stable")
    rows = min(_ROWS, num)
    columns = max(_search.ENTRIES // rows, 1)

    parts: list[Candidates] = []
    for start in range(0, size, columns):
        items = np.arange(start, min(start + columns, size)) if item_order is None else item_order[start:][:columns]
        block = item_mean[start : start + columns] if item_order is None else take(item_mean, items)
        edge_columns = np.ones((len(items), 1)) if item_kappa is None else radii.columns(item_kappa[items])
        search = (_search_torch if backend == "torch" else _search_faiss)(_float32(block))
        for chunk in np.array_split(query_order, -(-num // rows)):
            mean = take(query_mean, chunk).to(block)
            widest = np.exp(edge_rows[chunk] @ edge_columns[0]) * (1.0 + 1e-4)  # the first item is the least sure
            query, item, cosine = search(_float32(mean), 1.0 - widest - margin)
            for part in _pieces(len(query), max(edge_columns.shape[1], dim)):
                q, i, c = query[part], item[part], cosine[part]
                edge = np.exp(np.einsum("st,st->s", edge_rows[chunk[q]], edge_columns[i]))
                beyond = 1.0 - c.astype(np.float64) - edge
                inside = beyond <= 0.0
                close = np.abs(beyond) <= margin
                inside[close] = _versine(mean, block, q[close], i[close]) <= edge[close]
                inside &= items[i] != left_out[chunk[q]]
                parts.append((chunk[q[inside]], items[i[inside]], c[inside]))

    return collect(parts, num, size, alpha)


def _search_torch(block: Tensor) -> Search:
    def search(mean: Tensor, least: FloatArray) -> Candidates:
        cosine = matmul(mean, block.mT)
        found = cosine >= torch.from_numpy(least).to(cosine)[:, None]
        query, item = found.nonzero(as_tuple=True)
        return query.cpu().numpy(), item.cpu().numpy(), cosine[found].cpu().numpy()

    return search


def _search_faiss(block: Tensor) -> Search:
    import faiss

    index = faiss.IndexFlatIP(block.shape[1])
    index.add(block.cpu().numpy())

    def search(mean: Tensor, least: FloatArray) -> Candidates:
        # one radius per call: that of the least sure query
        limits, cosine, item = index.range_search(mean.cpu().numpy(), float(least.min()))
        query = np.repeat(np.arange(len(mean)), np.diff(limits.astype(np.int64)))
        found = cosine >= least[query]
        return query[found], item[found], cosine[found]

    return search


def _check_backend(backend: str) -> None:
    if backend not in ("torch", "faiss"):
        raise ValueError(f'`backend` must be "torch" or "faiss", got {backend!r}')
    if backend == "faiss" and find_spec("faiss") is None:
        raise ImportError(
            'backend="faiss" needs faiss: pip install "pyro-contrastive[retrieval]"; or pass backend="torch", which '
            "gives the same sets"
        )


def _margin(gallery: Tensor) -> float:
    """Bound on the error of a float32 cosine: inputs rounded as the process allows, d + 4 roundings of a unit sum."""
    allowed = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}[torch.get_float32_matmul_precision()]
    if gallery.device.type != "cpu":
        allowed = max(allowed, 2.0**-10)  # TF32 has more switches than one
    return allowed + (gallery.shape[1] + 4) * 2.0**-23


def _float32(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=-1).float().contiguous()


def _versine(queries: Tensor, items: Tensor, query: IntArray, item: IntArray) -> FloatArray:
    """1 - cosine of pairs in float64, accurate at small angles."""
    a, b = (take(vectors, index).double() for vectors, index in ((queries, query), (items, item)))
    difference = torch.nn.functional.normalize(a, dim=-1) - torch.nn.functional.normalize(b, dim=-1)
    return (0.5 * difference.square().sum(-1)).cpu().numpy()


def _pieces(length: int, width: int) -> list[slice]:
    """Runs of candidates with at most `_search.ENTRIES` numbers, at `width` each."""
    step = max(_search.ENTRIES // width, 1)
    return [slice(start, start + step) for start in range(0, max(length, 1), step)]
