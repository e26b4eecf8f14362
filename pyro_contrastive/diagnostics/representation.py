r"""Checks of a representation that need no known posterior: neighbours, corruption, aggregate uniformity."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from pyro_contrastive.diagnostics._arrays import FloatArray, as_array, unit_vectors
from pyro_contrastive.diagnostics.alignment import spearman_correlation

__all__ = [
    "Uniformity",
    "accuracy_by_quartile",
    "aggregate_uniformity",
    "corruption_correlation",
    "knn_accuracy",
    "knn_correct",
    "neighbour_distance",
]


def knn_correct(
    train_embeddings: ArrayLike | torch.Tensor,
    train_labels: ArrayLike | torch.Tensor,
    embeddings: ArrayLike | torch.Tensor,
    labels: ArrayLike | torch.Tensor,
    *,
    k: int = 5,
) -> NDArray[np.bool_]:
    """Whether the majority of the k nearest training items by cosine has the right label.

    Args:
        train_embeddings: Reference vectors, shape (M, d), of any length.
        train_labels: Their labels, shape (M,).
        embeddings: Query vectors, shape (N, d).
        labels: Their labels, shape (N,).
        k: Number of neighbours, 1..M.

    Returns:
        Booleans, shape (N,).

    Raises:
        ValueError: If `k` is out of range or lengths differ.
    """
    from sklearn.neighbors import KNeighborsClassifier

    reference, queries = as_array(train_embeddings), as_array(embeddings)
    if not 1 <= k <= len(reference):
        raise ValueError(f"`k` must be in 1..{len(reference)}, the number of training items, got {k!r}")
    targets = as_array(labels)
    if targets.shape != queries.shape[:1]:
        raise ValueError(f"`labels` must have one entry per query, got {targets.shape} for {queries.shape}")
    # brute force: scikit-learn has no tree for the cosine distance
    classifier = KNeighborsClassifier(n_neighbors=k, metric="cosine", algorithm="brute")
    return classifier.fit(reference, as_array(train_labels)).predict(queries) == targets


def knn_accuracy(
    train_embeddings: ArrayLike | torch.Tensor,
    train_labels: ArrayLike | torch.Tensor,
    embeddings: ArrayLike | torch.Tensor,
    labels: ArrayLike | torch.Tensor,
    *,
    k: int = 5,
) -> float:
    """Accuracy in [0, 1] of the k-nearest-neighbour classifier of `knn_correct` (same arguments and errors)."""
    return float(knn_correct(train_embeddings, train_labels, embeddings, labels, k=k).mean())


def neighbour_distance(
    train_embeddings: ArrayLike | torch.Tensor, embeddings: ArrayLike | torch.Tensor, *, k: int = 5
) -> FloatArray:
    """One minus the cosine with the k-th nearest training item: large for what was never seen.

    A posterior's width says how much a view leaves open, not whether anything like it was in the training data; this
    says the second.

    Args:
        train_embeddings: Reference vectors, shape (M, d), of any length.
        embeddings: Query vectors, shape (N, d).
        k: Number of neighbours, 1..M.

    Returns:
        Distances in [0, 2], shape (N,).

    Raises:
        ValueError: If `k` is out of range.

    References:
        Sun, Ming, Zhu and Li, ICML 2022, arXiv 2204.06507.

    Example:
        >>> neighbour_distance(np.eye(2), [[2.0, 0.0], [-1.0, 0.0]], k=1)
        array([0., 1.])
    """
    from sklearn.neighbors import NearestNeighbors

    reference, queries = as_array(train_embeddings), as_array(embeddings)
    if not 1 <= k <= len(reference):
        raise ValueError(f"`k` must be in 1..{len(reference)}, the number of training items, got {k!r}")
    search = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(reference)
    return search.kneighbors(queries)[0][:, -1]


def accuracy_by_quartile(
    concentration: ArrayLike | torch.Tensor, correct: ArrayLike | torch.Tensor, *, num_groups: int = 4
) -> FloatArray:
    """Accuracy in groups of equal size, from the most to the least concentrated posteriors.

    Args:
        concentration: Concentrations, shape (N,); infinities are the surest.
        correct: Booleans, shape (N,).
        num_groups: Number of groups, 4 for quartiles.

    Returns:
        Accuracies, shape (num_groups,), the surest group first.

    Raises:
        ValueError: If shapes differ, a concentration is NaN, or there are fewer items than groups.

    Example:
        >>> accuracy_by_quartile([8.0, 4.0, 2.0, 1.0], [True, True, False, False])
        array([1., 1., 0., 0.])
    """
    kappa, hits = as_array(concentration), as_array(correct).astype(bool)
    if kappa.ndim != 1 or kappa.shape != hits.shape or len(kappa) < num_groups or np.isnan(kappa).any():
        raise ValueError(
            f"`concentration` and `correct` must be vectors of one length >= {num_groups} without NaN, "
            f"got shapes {kappa.shape} and {hits.shape}"
        )
    order = np.argsort(-kappa, kind="stable")
    return np.array([group.mean() for group in np.array_split(hits[order], num_groups)])


def corruption_correlation(concentration: ArrayLike | torch.Tensor, level: ArrayLike | torch.Tensor) -> float:
    """Spearman correlation of the concentration with minus the corruption applied: 1 when more damage always widens.

    Args:
        concentration: Concentrations, shape (N,).
        level: Corruption levels, shape (N,), larger is worse.

    Returns:
        Correlation in [-1, 1]; NaN when either is constant.

    Raises:
        ValueError: If shapes differ or a value is NaN.
    """
    return spearman_correlation(as_array(concentration), -as_array(level))


@dataclass(frozen=True)
class Uniformity:
    """Tests that points are uniform on the sphere, with effect sizes that do not grow with the number of points.

    Attributes:
        mean_resultant_length: Length of the mean vector, 0 (uniform, up to 1/sqrt(N)) to 1.
        eigenvalue_ratio: d times the largest eigenvalue of the mean of z z^T: 1 when uniform, d when on a line.
        smallest_eigenvalue_ratio: d times the smallest one: 1 when uniform, 0 when a direction is never used.
        rayleigh_pvalue: p-value against a preferred direction.
        bingham_pvalue: p-value against a preferred axis or an unused one.
        num_points: N.
        dim: d.
    """

    mean_resultant_length: float
    eigenvalue_ratio: float
    smallest_eigenvalue_ratio: float
    rayleigh_pvalue: float
    bingham_pvalue: float
    num_points: int
    dim: int

    @property
    def pvalue(self) -> float:
        """Bonferroni-corrected p-value of both tests together."""
        return min(1.0, 2.0 * min(self.rayleigh_pvalue, self.bingham_pvalue))


def aggregate_uniformity(points: ArrayLike | torch.Tensor) -> Uniformity:
    r"""Tests whether the aggregate posterior is uniform on the sphere, as identified posteriors need.

    Rayleigh: :math:`d N \bar R^2 \sim \chi^2_d`, here with Jupp's correction, which leaves an error of order
    :math:`N^{-2}` (Mardia & Jupp 2000, section 10.4.1; Jupp 2001, Ann. Statist. 29). It sees a preferred direction.
    Bingham: :math:`\frac{N d (d+2)}{2}(\mathrm{tr}\,T^2 - 1/d) \sim \chi^2_{(d-1)(d+2)/2}` with
    :math:`T = \frac1N\sum z z^\top` (Bingham 1974; Mardia & Jupp 2000, section 10.7.1). It sees preferred axes,
    antipodal clusters and unused dimensions. p-values shrink with N for any departure: judge by the effect sizes.

    Args:
        points: One draw per item (so that points are independent), shape (N, d) on the unit sphere.

    Returns:
        Both tests and their effect sizes.

    Raises:
        ValueError: If `points` is not (N, d) with N >= 10 on the unit sphere.
    """
    z = unit_vectors(points, "points")
    if z.ndim != 2 or len(z) < 10:
        raise ValueError(f"`points` must be (N, d) with N >= 10, one draw per item, got {z.shape}; take draw 0 of each")
    n, d = z.shape
    length = float(np.linalg.norm(z.mean(axis=0)))
    rayleigh = d * n * length**2
    rayleigh = (1 - 1 / (2 * n)) * rayleigh + rayleigh**2 / (2 * n * (d + 2))
    moments = z.T @ z / n
    eigenvalues = np.linalg.eigvalsh(moments)
    bingham = 0.5 * n * d * (d + 2) * (np.sum(moments**2) - 1 / d)
    return Uniformity(
        mean_resultant_length=length,
        eigenvalue_ratio=float(d * eigenvalues[-1]),
        smallest_eigenvalue_ratio=float(d * max(eigenvalues[0], 0.0)),
        rayleigh_pvalue=float(stats.chi2.sf(rayleigh, d)),
        bingham_pvalue=float(stats.chi2.sf(bingham, (d - 1) * (d + 2) / 2)),
        num_points=n,
        dim=d,
    )
