"""What all searches of a gallery share: the sets they return, the checks of what they are given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pyro_contrastive.diagnostics._arrays import FloatArray, as_array

__all__ = [
    "ENTRIES", "Candidates", "CredibleSets", "IntArray", "checked_search", "collect", "index_left_out", "posteriors",
    "take", "unit_points",
]  # fmt: skip

IntArray = NDArray[np.int64]
# (queries, items, float32 cosine) of each candidate
Candidates = tuple[IntArray, IntArray, NDArray[np.float32]]
ENTRIES = 1 << 23  # numbers of one step: at most a few hundred MiB whatever the sizes


@dataclass(frozen=True, eq=False)
class CredibleSets:
    """Credible sets of N queries in a gallery of M items, as the rows of a sparse matrix (CSR).

    Attributes:
        indptr: Where each set begins in `indices`, and the end of the last one; shape (N + 1,).
        indices: Gallery items of all sets, ascending within each; shape (S,) for S members in total.
        cosines: Cosine between the query's mean direction and each of them, shape (S,), float32.
        num_items: M.
        alpha: Probability left out.

    Example:
        >>> sets = CredibleSets(np.array([0, 2, 2]), np.array([1, 4]), np.array([0.8, 0.9]), num_items=5, alpha=0.05)
        >>> sets.sizes, sets[0], sets[1]
        (array([2, 0]), array([4, 1]), array([], dtype=int64))
    """

    indptr: IntArray
    indices: IntArray
    cosines: NDArray[Any]
    num_items: int
    alpha: float

    @property
    def sizes(self) -> IntArray:
        """Number of items in each set, shape (N,)."""
        return np.diff(self.indptr)

    @property
    def queries(self) -> IntArray:
        """Query that each entry of `indices` belongs to, shape (S,)."""
        return np.repeat(np.arange(len(self)), self.sizes)

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def __getitem__(self, query: int) -> IntArray:
        """Members of one set, the nearest first."""
        if not 0 <= query < len(self):
            raise IndexError(f"`query` must be in 0..{len(self) - 1}, got {query!r}")
        row = slice(self.indptr[query], self.indptr[query + 1])
        return self.indices[row][np.argsort(-self.cosines[row], kind="stable")]


def collect(parts: list[Candidates], num: int, size: int, alpha: float) -> CredibleSets:
    """Sorts the members of all steps, (query, item, cosine) each, into the sets of `num` queries in `size` items."""
    query, item, cosine = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order = np.lexsort((item, query))
    indptr = np.concatenate([[0], np.cumsum(np.bincount(query, minlength=num))])
    return CredibleSets(indptr, item[order], cosine[order], size, alpha)


def take(vectors: Tensor, index: IntArray) -> Tensor:
    """Rows of `vectors`, on their device."""
    return vectors[torch.from_numpy(index).to(vectors.device)]


def unit_points(name: str, vectors: Tensor) -> Tensor:
    """Returns the detached vectors (M, d), M >= 1, after checking that they are finite and of unit length to 1e-3.

    Raises:
        ValueError: If they are not.
    """
    vectors = vectors.detach()
    if vectors.dim() != 2 or not len(vectors) or vectors.shape[1] < 2 or not vectors.is_floating_point():
        raise ValueError(
            f"`{name}` must hold at least one vector, floating point, of shape (M, d) with d >= 2, got "
            f"{tuple(vectors.shape)} of {vectors.dtype}"
        )
    norms = torch.linalg.vector_norm(vectors, dim=-1)
    wrong = ~((norms - 1.0).abs() <= 1e-3)  # written so that NaN counts as wrong
    if bool(wrong.any()):
        raise ValueError(
            f"`{name}` must hold finite unit vectors, got a norm of {norms[wrong][0].item():.4g} "
            f"({int(wrong.sum())} of {len(norms)}); normalise over the last dimension"
        )
    return vectors


def posteriors(name: str, law: Any) -> tuple[Tensor, FloatArray]:
    """Mean directions (N, d) and concentrations (N,) of a distribution with one batch dimension.

    Raises:
        ValueError: If there is another number of them, or a concentration is not > 0 and finite.
    """
    if len(law.batch_shape) != 1:
        raise ValueError(f"`{name}` must have batch shape (N,), got {tuple(law.batch_shape)}; flatten the batch")
    mean, kappa = unit_points(name, law.mean_direction), as_array(law.concentration).astype(np.float64)
    wrong = ~((kappa > 0) & (kappa < np.inf))
    if wrong.any():
        raise ValueError(
            f"`{name}` must have concentrations > 0 and finite, got {kappa[wrong][0]:.4g} ({wrong.sum()} of "
            f"{len(kappa)}); a posterior of concentration 0 says nothing, leave it out"
        )
    return mean, kappa


def checked_search(queries: Tensor, gallery: Tensor, alpha: float, exclude: ArrayLike | Tensor | None) -> IntArray:
    """Checks dimensions and alpha, and returns the item that each query must not find, -1 for none.

    Raises:
        ValueError: If one does not fit.
    """
    if queries.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"`queries` and `gallery` must have one dimension, got {queries.shape[1]} and {gallery.shape[1]}"
        )
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"`alpha` must lie in (0, 1), got {alpha!r}; 0.05 gives sets of 95 %")
    return index_left_out(exclude, len(queries), len(gallery))


def index_left_out(exclude: ArrayLike | Tensor | None, num: int, size: int) -> IntArray:
    """Returns the item that each of `num` queries must not find among `size`, shape (num,), -1 for none.

    Raises:
        ValueError: If the shape, the dtype or an index is wrong.
    """
    if exclude is None:
        return np.full(num, -1)
    index = as_array(exclude)
    if index.shape != (num,) or index.dtype.kind not in "iu" or np.any((index < -1) | (index >= size)):
        raise ValueError(
            f"`exclude` must be {num} integers, one per query, in -1..{size - 1} (-1: none), got shape {index.shape} "
            f"of {index.dtype}" + (f", {index.min()} to {index.max()}" if index.size else "")
        )
    return index.astype(np.int64)
