r"""Scores of retrieval: classes in credible sets, rankings by cosine, and what confidence knows about mistakes.

Coverage needs nothing new: `coverage(cap_pit(q, z))` for a known latent, `coverage(partner_pit(q1, q2))` for pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import special
from torch import Tensor

from pyro_contrastive.diagnostics import _search
from pyro_contrastive.diagnostics._arrays import FloatArray, as_array
from pyro_contrastive.diagnostics._intervals import mean_and_error
from pyro_contrastive.diagnostics._search import CredibleSets, index_left_out, unit_points
from pyro_contrastive.diagnostics.alignment import spearman_correlation
from pyro_contrastive.diagnostics.retrieval import Backend, credible_sets
from pyro_contrastive.ops.precision import matmul

__all__ = [
    "ClassScores",
    "CredibleCurve",
    "RankingScores",
    "RiskCoverage",
    "class_scores",
    "credible_curve",
    "label_entropy",
    "ranking_scores",
    "risk_coverage",
    "size_correlation",
]


@dataclass(frozen=True, eq=False)
class ClassScores:
    """How well credible sets match the classes, per query; every array has shape (N,).

    Attributes:
        size: Number of items in the set.
        precision: Share of the set that has the query's label; NaN for an empty set.
        recall: Share of the gallery's items of that label that the set holds; NaN where there are none.
        f1: Harmonic mean of the two, 0 for an empty set; NaN where both sides are empty.
    """

    size: NDArray[np.int64]
    precision: FloatArray
    recall: FloatArray
    f1: FloatArray


def class_scores(
    sets: CredibleSets,
    labels: ArrayLike | Tensor,
    gallery_labels: ArrayLike | Tensor,
    *,
    exclude: ArrayLike | Tensor | None = None,
) -> ClassScores:
    """Precision, recall and F1 of each credible set for the class of its query.

    Args:
        sets: Of N queries in a gallery of M items.
        labels: Label of each query, shape (N,).
        gallery_labels: Label of each item, shape (M,).
        exclude: As given to `credible_sets`, shape (N,): these items are no misses.

    Returns:
        The scores.

    Raises:
        ValueError: If a shape does not fit.

    Example:
        >>> sets = CredibleSets(np.array([0, 2]), np.array([0, 1]), np.array([0.9, 0.8]), num_items=4, alpha=0.05)
        >>> scores = class_scores(sets, [7], [7, 3, 7, 7])
        >>> float(scores.precision[0]), round(float(scores.recall[0]), 3), float(scores.f1[0])
        (0.5, 0.333, 0.4)
    """
    own, items = _labels(labels, len(sets), gallery_labels, sets.num_items)
    hits = np.bincount(sets.queries[own[sets.queries] == items[sets.indices]], minlength=len(sets))
    relevant = _num_relevant(own, items, index_left_out(exclude, len(sets), sets.num_items))
    return ClassScores(
        sets.sizes, _ratio(hits, sets.sizes), _ratio(hits, relevant), _ratio(2 * hits, sets.sizes + relevant)
    )


@dataclass(frozen=True, eq=False)
class CredibleCurve:
    """Class scores against alpha, means over the queries; every array has shape (A,).

    Attributes:
        alphas: Probabilities left out.
        size: Mean number of items.
        empty: Share of queries whose set is empty.
        precision: Mean over the sets that are not empty; NaN where all are.
        recall: Mean over the queries whose class the gallery holds.
        f1: Mean F1.
        size_se: Standard error of `size` over the queries, in this gallery; NaN for a single query.
        precision_se: Of `precision`.
        recall_se: Of `recall`.
        f1_se: Of `f1`.
    """

    alphas: FloatArray
    size: FloatArray
    empty: FloatArray
    precision: FloatArray
    recall: FloatArray
    f1: FloatArray
    size_se: FloatArray
    precision_se: FloatArray
    recall_se: FloatArray
    f1_se: FloatArray


def credible_curve(
    queries: Any,
    gallery: Any,
    labels: ArrayLike | Tensor,
    gallery_labels: ArrayLike | Tensor,
    *,
    alphas: ArrayLike = (0.9, 0.5, 0.2, 0.1, 0.05, 0.01, 0.001),
    exclude: ArrayLike | Tensor | None = None,
    backend: Backend = "torch",
) -> CredibleCurve:
    """Class precision and recall against the size of the credible sets, by varying alpha.

    Args:
        queries: See `credible_sets`.
        gallery: See `credible_sets`.
        labels: Label of each query, shape (N,).
        gallery_labels: Label of each item, shape (M,).
        alphas: Probabilities left out, in (0, 1).
        exclude: See `credible_sets`.
        backend: See `credible_sets`.

    Returns:
        One point of the curve per alpha.

    Raises:
        TypeError: See `credible_sets`.
        ValueError: See `credible_sets` and `class_scores`.
    """
    alphas = np.atleast_1d(np.asarray(alphas, dtype=np.float64))
    points = []
    for alpha in alphas.tolist():
        sets = credible_sets(queries, gallery, alpha=alpha, exclude=exclude, backend=backend)
        scores = class_scores(sets, labels, gallery_labels, exclude=exclude)
        figures = [
            mean_and_error(values[~np.isnan(values)])
            for values in (scores.size.astype(np.float64), scores.precision, scores.recall, scores.f1)
        ]
        (size, *means), errors = zip(*figures, strict=True)
        points.append([size, (scores.size == 0).mean(), *means, *errors])
    return CredibleCurve(alphas, *np.array(points, dtype=np.float64).T)


def label_entropy(probabilities: ArrayLike | Tensor) -> FloatArray:
    """Entropy of soft labels in nats: how much the annotators disagree.

    Args:
        probabilities: Shape (..., C), >= 0; normalised here, so that counts will do.

    Returns:
        Entropies in [0, log C], shape (...).

    Raises:
        ValueError: If a value is negative or not finite, or a row sums to 0.

    Example:
        >>> label_entropy([[10, 0], [5, 5]]).round(4)
        array([0.    , 0.6931])
    """
    p = as_array(probabilities).astype(np.float64)
    if p.ndim < 1 or not np.all((p >= 0) & (p < np.inf)) or not np.all(p.sum(axis=-1) > 0):
        raise ValueError(f"`probabilities` must be (..., C), finite, >= 0, with positive sums, got shape {p.shape}")
    return special.entr(p / p.sum(axis=-1, keepdims=True)).sum(axis=-1)


def size_correlation(sets: CredibleSets, ambiguity: ArrayLike | Tensor) -> float:
    """Spearman correlation of the size of each set with a measure of how ambiguous its query is.

    Args:
        sets: Of N queries.
        ambiguity: Shape (N,): label entropy, corruption applied, ...; larger is less clear.

    Returns:
        Correlation in [-1, 1], 1 when a less clear query always has the larger set; NaN when either is constant.

    Raises:
        ValueError: If the shape does not fit or a value is NaN.
    """
    return spearman_correlation(sets.sizes, ambiguity)


@dataclass(frozen=True, eq=False)
class RankingScores:
    """Scores of the ranking of the gallery by cosine, per query.

    Attributes:
        correct: Whether the nearest item has the query's label, booleans (N,).
        average_precision: Average precision at R, (N,); NaN where the gallery holds no item of the label.
    """

    correct: NDArray[np.bool_]
    average_precision: FloatArray

    @property
    def recall_at_1(self) -> float:
        """Share of queries whose nearest item has their label."""
        return float(self.correct.mean())

    @property
    def map_at_r(self) -> float:
        """MAP@R, the mean of `average_precision` where it is defined."""
        return _mean(self.average_precision)


def ranking_scores(
    queries: Tensor,
    gallery: Tensor,
    labels: ArrayLike | Tensor,
    gallery_labels: ArrayLike | Tensor,
    *,
    exclude: ArrayLike | Tensor | None = None,
) -> RankingScores:
    r"""Recall@1 and MAP@R of the gallery ranked by cosine.

    With R items of the query's label in the gallery, :math:`\frac1R\sum_{i\le R} P(i)`, where P(i) is the precision
    among the first i if the i-th is right, and else 0 (Musgrave et al. 2020, arXiv 2003.08505, section 3.2).

    Args:
        queries: Unit vectors (N, d).
        gallery: Unit vectors (M, d), on any device; the work is done there.
        labels: Label of each query, shape (N,).
        gallery_labels: Label of each item, shape (M,).
        exclude: Gallery item that each query must not find, shape (N,), -1 for none; `numpy.arange(N)` where the
            queries are the gallery.

    Returns:
        The scores.

    Raises:
        ValueError: If a shape does not fit or a vector is not of unit length.

    Example:
        >>> points = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.3, 1.0]]))
        >>> scores = ranking_scores(points, points, [0, 0, 1, 0], [0, 0, 1, 0], exclude=np.arange(4))
        >>> scores.recall_at_1, round(scores.map_at_r, 3)
        (0.5, 0.75)
    """
    query_mean, item_mean = unit_points("queries", queries), unit_points("gallery", gallery)
    if query_mean.shape[1] != item_mean.shape[1]:
        raise ValueError(
            f"`queries` and `gallery` must have one dimension, got {query_mean.shape[1]} and {item_mean.shape[1]}"
        )
    num, size = len(query_mean), len(item_mean)
    own, items = _labels(labels, num, gallery_labels, size)
    left_out = index_left_out(exclude, num, size)
    relevant = _num_relevant(own, items, left_out)
    depth = max(int(relevant.max()), 1)
    ranks = np.arange(1, depth + 1)
    correct, average = np.zeros(num, dtype=bool), np.full(num, np.nan)
    rows = max(_search.ENTRIES // size, 1)
    for chunk in (slice(start, min(start + rows, num)) for start in range(0, num, rows)):
        cosine = matmul(query_mean[chunk].to(item_mean), item_mean.mT)
        hidden = np.flatnonzero(left_out[chunk] >= 0)
        cosine[torch.from_numpy(hidden), torch.from_numpy(left_out[chunk][hidden])] = -torch.inf
        near = cosine.topk(min(depth, size), dim=1).indices.cpu().numpy()
        hit = (items[near] == own[chunk, None]) & (near != left_out[chunk, None])
        correct[chunk] = hit[:, 0]
        within = hit & (ranks[: near.shape[1]] <= relevant[chunk, None])
        precision = np.cumsum(hit, axis=1) / ranks[: near.shape[1]]
        average[chunk] = _ratio((within * precision).sum(axis=1), relevant[chunk])
    return RankingScores(correct, average)


@dataclass(frozen=True, eq=False)
class RiskCoverage:
    """Error among the most confident queries (Geifman & El-Yaniv 2017, arXiv 1705.08500).

    Attributes:
        coverage: Share of queries kept, k / N for k = 1..N, shape (N,).
        risk: Error rate among the k most confident ones, shape (N,).
    """

    coverage: FloatArray
    risk: FloatArray

    @property
    def aurc(self) -> float:
        """Area under the curve, the mean of `risk`: the error rate if confidence says nothing; lower is better."""
        return float(self.risk.mean())

    @property
    def best_aurc(self) -> float:
        """`aurc` of the best possible order, all mistakes last: the lowest at this error rate."""
        num = len(self.risk)
        kept = np.arange(1, num + 1)
        errors = round(self.risk[-1] * num)
        return float((np.maximum(kept - (num - errors), 0) / kept).mean())

    @property
    def excess_aurc(self) -> float:
        """`aurc` minus `best_aurc` (Geifman et al. 2019, arXiv 1805.08206)."""
        return self.aurc - self.best_aurc


def risk_coverage(confidence: ArrayLike | Tensor, correct: ArrayLike | Tensor) -> RiskCoverage:
    """Error rate of the most confident share of queries, for every share.

    Args:
        confidence: Shape (N,), the larger the surer: a concentration, or minus the size of a credible set. Ties count
            with the mean error of the tied.
        correct: Booleans, shape (N,).

    Returns:
        The curve.

    Raises:
        ValueError: If shapes differ, there is no query, or a confidence is NaN.

    Example:
        >>> curve = risk_coverage([3.0, 2.0, 1.0], [True, False, True])
        >>> curve.risk.round(3)
        array([0.   , 0.5  , 0.333])
    """
    values, hits = as_array(confidence).astype(np.float64), as_array(correct).astype(bool)
    if values.ndim != 1 or values.shape != hits.shape or not len(values) or np.isnan(values).any():
        raise ValueError(
            "`confidence` and `correct` must be vectors of one length >= 1 without NaN, got shapes "
            f"{values.shape} and {hits.shape}"
        )
    _, group, count = np.unique(-values, return_inverse=True, return_counts=True)
    error = (np.bincount(group, weights=~hits) / count)[np.sort(group)]
    kept = np.arange(1, len(values) + 1)
    return RiskCoverage(kept / len(values), np.cumsum(error) / kept)


def _labels(
    labels: ArrayLike | Tensor, num: int, gallery_labels: ArrayLike | Tensor, size: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    own, items = as_array(labels), as_array(gallery_labels)
    if own.shape != (num,) or items.shape != (size,):
        raise ValueError(
            f"`labels` must have shape ({num},) and `gallery_labels` ({size},), got {own.shape} and {items.shape}"
        )
    return own, items


def _num_relevant(own: NDArray[Any], items: NDArray[Any], left_out: NDArray[np.int64]) -> NDArray[np.int64]:
    names, counts = np.unique(items, return_counts=True)
    place = np.minimum(np.searchsorted(names, own), len(names) - 1)
    total = np.where(names[place] == own, counts[place], 0)
    return total - ((left_out >= 0) & (items[left_out] == own))


def _ratio(part: NDArray[Any], whole: NDArray[Any]) -> FloatArray:
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def _mean(values: FloatArray) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")
