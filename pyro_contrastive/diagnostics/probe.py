r"""What a representation is good for, without its width: a linear probe, and how views and items spread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import special

from pyro_contrastive.diagnostics._arrays import FloatArray, as_array, unit_vectors
from pyro_contrastive.diagnostics.calibration import direction_and_concentration
from pyro_contrastive.ops import bessel_ratio

__all__ = ["LinearProbe", "alignment_loss", "linear_probe", "uncertainty", "uniformity_loss"]

_ROWS = 1_000  # of a matrix of cosines that is never kept whole


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A linear classifier of frozen features, scored on items it was not fitted to.

    Attributes:
        accuracy: Share of right answers, in [0, 1].
        cross_entropy: Mean of minus the log probability of the right answer, in nats.
        label_entropy: Entropy H(Y) of the scored labels, in nats.
        correct: Whether each answer is right, shape (N,).
    """

    accuracy: float
    cross_entropy: float
    label_entropy: float
    correct: NDArray[np.bool_]

    @property
    def information(self) -> float:
        """H(Y) - cross-entropy, nats: a lower bound on the mutual information of features and labels (in expectation).

        The bound of Barber and Agakov (2003), tight where the probe's probabilities are the true ones; negative for a
        probe that is worse than the frequencies of the labels.
        """
        return self.label_entropy - self.cross_entropy


def linear_probe(
    train_features: ArrayLike | torch.Tensor,
    train_labels: ArrayLike | torch.Tensor,
    features: ArrayLike | torch.Tensor,
    labels: ArrayLike | torch.Tensor,
    *,
    penalty: float = 1.0,
    max_iter: int = 1_000,
) -> LinearProbe:
    """Fit scikit-learn's multinomial logistic regression to standardised features, and score it on others.

    Args:
        train_features: Features to fit, shape (M, D).
        train_labels: Their labels, integers, shape (M,).
        features: Features to score, shape (N, D).
        labels: Their labels, shape (N,), all of them among the training labels.
        penalty: Weight of the squared norm of the coefficients, > 0: one over scikit-learn's ``C``. It is not tuned.
        max_iter: Steps of L-BFGS.

    Returns:
        The scores.

    Raises:
        ValueError: If shapes do not fit, a label does not occur in training, or `penalty` is not positive.

    Example:
        >>> x, y = np.random.default_rng(0).normal(size=(200, 3)), np.arange(200) % 2
        >>> x[:, 0] += 8 * y
        >>> found = linear_probe(x[:100], y[:100], x[100:], y[100:])
        >>> found.accuracy, bool(0.6 < found.information <= np.log(2))
        (1.0, True)
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    (x, y), (z, targets) = (
        (as_array(a).astype(np.float64), as_array(b)) for a, b in ((train_features, train_labels), (features, labels))
    )
    if x.ndim != 2 or z.ndim != 2 or x.shape[1] != z.shape[1] or y.shape != x.shape[:1] or targets.shape != z.shape[:1]:
        raise ValueError(
            f"features must be (M, D) and (N, D) with labels (M,) and (N,), got {x.shape} and {z.shape} with {y.shape} "
            f"and {targets.shape}"
        )
    if not penalty > 0:
        raise ValueError(f"`penalty` must be > 0, got {penalty!r}")
    classes, counts = np.unique(targets, return_counts=True)
    if len(strange := np.setdiff1d(classes, y)):
        raise ValueError(f"every label must occur in training, got {strange[0]} in `labels` only")
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=1.0 / penalty, max_iter=max_iter)).fit(x, y)
    log_probability = probe.predict_log_proba(z)
    of_label = log_probability[np.arange(len(z)), np.searchsorted(probe.classes_, targets)]
    correct = probe.classes_[log_probability.argmax(axis=1)] == targets
    entropy = float(special.entr(counts / counts.sum()).sum())
    return LinearProbe(float(correct.mean()), float(-of_label.mean()), entropy, correct)


def uncertainty(posterior: Any) -> FloatArray:
    r"""Uncertainty of posteriors on the sphere in one unit for all families: one minus the mean resultant length.

    0 for a point and 1 for a law without a preferred direction. Exact for the families of this package; for one that
    does not know its mean from draws (:func:`direction_and_concentration`).

    Args:
        posterior: Distribution with batch shape (N,) and event shape (d,).

    Returns:
        Values in [0, 1], shape (N,).

    Example:
        >>> from pyro_contrastive.distributions import PowerSpherical
        >>> law = PowerSpherical(torch.eye(3)[:2], torch.tensor([8.0, 0.0]))
        >>> uncertainty(law).round(6)  # 8 / (8 + 2), and no concentration
        array([0.2, 1. ])
    """
    length = getattr(posterior, "mean_resultant_length", None)
    if length is None:
        try:
            length = torch.linalg.vector_norm(posterior.mean, dim=-1)
        except NotImplementedError:
            _, kappa = direction_and_concentration(posterior)
            length = bessel_ratio(posterior.event_shape[0], torch.from_numpy(kappa))
    return 1.0 - as_array(length).astype(np.float64)


def alignment_loss(points1: ArrayLike | torch.Tensor, points2: ArrayLike | torch.Tensor) -> float:
    """Mean squared distance of two views of an item (Wang & Isola 2020, arXiv 2005.10242, with alpha = 2).

    Args:
        points1: Unit vectors, shape (N, d).
        points2: Those of the other views, shape (N, d).

    Returns:
        0 where views coincide, 2 for unrelated ones, 4 at most.

    Raises:
        ValueError: If the shapes differ or a vector is not of length one.

    Example:
        >>> alignment_loss([[1.0, 0.0]], [[0.0, 1.0]])
        2.0
    """
    x, y = unit_vectors(points1, "points1"), unit_vectors(points2, "points2")
    if x.ndim != 2 or x.shape != y.shape:
        raise ValueError(f"`points1` and `points2` must both be (N, d), got {x.shape} and {y.shape}")
    return float(((x - y) ** 2).sum(axis=1).mean())


def uniformity_loss(points: ArrayLike | torch.Tensor) -> float:
    r"""Log of the mean of :math:`e^{-2 |x - y|^2}` over pairs of items (Wang & Isola 2020, with t = 2).

    Args:
        points: Unit vectors, shape (N, d), N >= 2.

    Returns:
        0 for one point; down to -4 as d grows for points spread over the sphere.

    Raises:
        ValueError: If the shape is another, or a vector is not of length one.

    Example:
        >>> round(uniformity_loss([[1.0, 0.0], [-1.0, 0.0]]), 6)
        -8.0
    """
    x = unit_vectors(points, "points")
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"`points` must be (N, d) with N >= 2, got {x.shape}")
    sums = [np.exp(4.0 * (x[start : start + _ROWS] @ x.T) - 4.0).sum() for start in range(0, len(x), _ROWS)]
    return float(np.log((sum(sums) - len(x)) / (len(x) * (len(x) - 1))))  # less the pairs of an item with itself
