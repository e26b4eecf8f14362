r"""Agreement of a learned posterior with the truth, up to what contrastive learning cannot know.

A contrastive likelihood sees inner products only, so the latent space is identified up to one orthogonal map. It is
fitted on one half of the items (orthogonal Procrustes) and everything is scored on the other half.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import linalg, stats

from pyro_contrastive.diagnostics._arrays import FloatArray, as_array, geodesic_angle, unit_vectors
from pyro_contrastive.diagnostics.calibration import (
    Coverage,
    Family,
    cap_probability,
    coverage,
    uniformity_pvalue,
)

__all__ = ["AlignmentScore", "align_and_score", "cosine_correlation", "procrustes"]


def procrustes(estimated: ArrayLike | torch.Tensor, truth: ArrayLike | torch.Tensor) -> FloatArray:
    """Orthogonal matrix R (a rotation or reflection) that brings `estimated @ R` closest to `truth`.

    Args:
        estimated: Unit vectors, shape (N, d).
        truth: Unit vectors of the same items, shape (N, d).

    Returns:
        R of shape (d, d), the minimiser of the Frobenius norm of `estimated @ R - truth` (Schoenemann 1966).

    Raises:
        ValueError: If the shapes differ or there are fewer than d items.

    Example:
        >>> import numpy as np
        >>> procrustes(np.eye(2), np.eye(2)[::-1]).round(6)
        array([[0., 1.],
               [1., 0.]])
    """
    estimated, truth = unit_vectors(estimated, "estimated"), unit_vectors(truth, "truth")
    if estimated.ndim != 2 or estimated.shape != truth.shape or len(truth) < truth.shape[-1]:
        raise ValueError(
            f"`estimated` and `truth` must both be (N, d) with N >= d, got {estimated.shape} and {truth.shape}; "
            "fewer items than dimensions leave the rotation open"
        )
    return linalg.orthogonal_procrustes(estimated, truth)[0]


def cosine_correlation(estimated: ArrayLike | torch.Tensor, truth: ArrayLike | torch.Tensor) -> float:
    """Pearson correlation between all off-diagonal pairwise cosines of two sets of directions; blind to rotations.

    Computed from (d, d) moments in O(N d^2), without the (N, N) matrices.

    Args:
        estimated: Unit vectors, shape (N, d).
        truth: Unit vectors of the same items, shape (N, d'); the dimensions may differ.

    Returns:
        Correlation in [-1, 1]; NaN when one set of cosines is constant.

    Raises:
        ValueError: If the numbers of items differ or are < 3.
    """
    x, y = unit_vectors(estimated, "estimated"), unit_vectors(truth, "truth")
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < 3:
        raise ValueError(f"`estimated` and `truth` must be (N, d) with the same N >= 3, got {x.shape} and {y.shape}")
    n = len(x)
    pairs = n * (n - 1)

    def mean(a: FloatArray) -> float:
        return float((np.sum(a.sum(axis=0) ** 2) - n) / pairs)  # every diagonal cosine is 1

    def mean_product(a: FloatArray, b: FloatArray) -> float:
        return float((np.sum((a.T @ b) ** 2) - n) / pairs)

    covariance = mean_product(x, y) - mean(x) * mean(y)
    variance_x, variance_y = (max(mean_product(a, a) - mean(a) ** 2, 0.0) for a in (x, y))
    if min(variance_x, variance_y) < 1e-14:
        return float("nan")
    return float(np.clip(covariance / np.sqrt(variance_x * variance_y), -1.0, 1.0))


@dataclass(frozen=True)
class AlignmentScore:
    """What `align_and_score` found on the items that the rotation has not seen.

    Attributes:
        rotation: Orthogonal matrix (d, d); `mean_direction @ rotation` is in the frame of the truth.
        evaluated: Indices of the scored items, shape (M,).
        pit: Level of the credible cap that just reaches each true point, shape (M,).
        coverage: Coverage of the credible caps.
        pit_pvalue: Kolmogorov-Smirnov p-value of uniform `pit`.
        cosine_correlation: Correlation of pairwise cosines of mean directions with those of the true ones.
        mean_angle: Mean angle in radians between aligned and true mean directions.
        spearman_concentration: Rank correlation of the concentrations with the true ones; NaN where none were given.
        concentration_error: Mean of |estimate - truth| / truth; NaN where no true concentrations were given.
    """

    rotation: FloatArray
    evaluated: NDArray[np.int64]
    pit: FloatArray
    coverage: Coverage
    pit_pvalue: float
    cosine_correlation: float
    mean_angle: float
    spearman_concentration: float
    concentration_error: float


def align_and_score(
    mean_direction: ArrayLike | torch.Tensor,
    concentration: ArrayLike | torch.Tensor,
    truth: ArrayLike | torch.Tensor,
    *,
    true_mean_direction: ArrayLike | torch.Tensor | None = None,
    true_concentration: ArrayLike | torch.Tensor | None = None,
    levels: ArrayLike = (0.5, 0.8, 0.95),
    family: Family = "vmf",
    seed: int = 0,
) -> AlignmentScore:
    """Fits the rotation on a random half of the items and scores posteriors on the other half.

    Args:
        mean_direction: Mean directions of the posteriors, shape (N, d).
        concentration: Their concentrations, shape (N,).
        truth: True latent points z, shape (N, d); the credible caps should cover these.
        true_mean_direction: Mean directions of the exact posteriors, shape (N, d), where known: the rotation is fitted
            to them and directions are compared with them (otherwise with `truth`).
        true_concentration: Concentrations of the exact posteriors, shape (N,), where known.
        levels: Levels of the credible caps.
        family: Family of the posteriors, "vmf" or "power_spherical".
        seed: Seed of the split into halves.

    Returns:
        The scores, all on the half that the rotation has not seen.

    Raises:
        ValueError: If shapes do not fit or there are fewer than 2 d items.
    """
    mean = unit_vectors(mean_direction, "mean_direction")
    points = unit_vectors(truth, "truth")
    target = points if true_mean_direction is None else unit_vectors(true_mean_direction, "true_mean_direction")
    kappa = as_array(concentration).astype(np.float64)
    if mean.ndim != 2 or points.shape != mean.shape or target.shape != mean.shape or kappa.shape != mean.shape[:1]:
        raise ValueError(
            "directions and `truth` must be (N, d) and `concentration` (N,), got "
            f"{mean.shape}, {target.shape}, {points.shape} and {kappa.shape}"
        )
    order = np.random.default_rng(seed).permutation(len(mean))
    fitted, evaluated = order[: len(order) // 2], np.sort(order[len(order) // 2 :])
    rotation = procrustes(mean[fitted], target[fitted])
    aligned = (mean @ rotation)[evaluated]
    pit = cap_probability(geodesic_angle(aligned, points[evaluated]), kappa[evaluated], mean.shape[-1], family=family)
    spearman = error = float("nan")
    if true_concentration is not None:
        true_kappa = as_array(true_concentration).astype(np.float64)[evaluated]
        spearman = spearman_correlation(kappa[evaluated], true_kappa)
        error = float(np.mean(np.abs(kappa[evaluated] - true_kappa) / true_kappa))
    return AlignmentScore(
        rotation=rotation,
        evaluated=evaluated,
        pit=pit,
        coverage=coverage(pit, levels),
        pit_pvalue=uniformity_pvalue(pit),
        cosine_correlation=cosine_correlation(mean[evaluated], target[evaluated]),
        mean_angle=float(geodesic_angle(aligned, target[evaluated]).mean()),
        spearman_concentration=spearman,
        concentration_error=error,
    )


def spearman_correlation(x: Any, y: Any) -> float:
    """Spearman's rank correlation, NaN without a warning when one side is constant (as for point posteriors).

    Args:
        x: Values, shape (N,); infinities are ranked.
        y: Values, shape (N,).

    Returns:
        Correlation in [-1, 1] or NaN.

    Raises:
        ValueError: If the shapes differ or a value is NaN.
    """
    x, y = as_array(x), as_array(y)
    if x.ndim != 1 or x.shape != y.shape or np.isnan(x).any() or np.isnan(y).any():
        raise ValueError(f"both sides must be vectors of one length without NaN, got shapes {x.shape} and {y.shape}")
    if np.all(x == x[0]) or np.all(y == y[0]):
        return float("nan")
    return float(stats.spearmanr(x, y).statistic)
