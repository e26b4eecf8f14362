r"""Are predictions of points as wide as their errors? Two checks of laws on the sphere against what came true.

They need no known posterior: a method that predicts the embedding of another view (``guides.Siamese``) is held to its
own held-out embeddings. In a world with known latents the truth takes their place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from pyro_contrastive.aggregates import law_like
from pyro_contrastive.diagnostics._arrays import FloatArray, as_array, unit_vectors
from pyro_contrastive.diagnostics._intervals import mean_and_error
from pyro_contrastive.distributions import RotationallySymmetric

__all__ = ["ResultantLengthCheck", "StationarityCheck", "resultant_length_check", "stationarity_check"]

_REACH = 20.0  # the factor on the concentrations is looked for within exp(+-20)


@dataclass(frozen=True, eq=False)
class ResultantLengthCheck:
    """Predicted against realised mean resultant length, in groups of equal size, the surest first.

    Attributes:
        predicted: Mean of E[mu . z] under the laws, per group, shape (G,).
        realised: Mean cosine of mu with the point that came true, shape (G,).
        lower: Lower ends of the intervals of `realised`, shape (G,).
        upper: Upper ends.
        counts: Items per group, shape (G,).
        level: Confidence level of each interval.
    """

    predicted: FloatArray
    realised: FloatArray
    lower: FloatArray
    upper: FloatArray
    counts: NDArray[np.int64]
    level: float

    @property
    def gap(self) -> FloatArray:
        """`predicted - realised` per group: > 0 over-confident, < 0 under-confident."""
        return self.predicted - self.realised

    @property
    def largest_gap(self) -> float:
        """The largest distance of the two in a group, in [0, 2]."""
        return float(np.abs(self.gap).max())


def resultant_length_check(
    posterior: Any, points: ArrayLike | torch.Tensor, *, num_groups: int = 4, level: float = 0.95
) -> ResultantLengthCheck:
    r"""Compare the mean resultant length of laws on the sphere with the mean cosine of the points they predict.

    The length :math:`\mu \cdot E[z]`, which is :math:`\kappa / (\kappa + d - 1)` for the power spherical law and
    :math:`A_d(\kappa)` for von Mises-Fisher, is the unit in which concentrations of different families and dimensions
    can be compared.

    Args:
        posterior: Laws with batch shape (N,) and event shape (d,), such as ``guide.posterior(x1)``.
        points: What they predict, unit vectors, shape (N, d), for instance ``guide.branch(x2).point``.
        num_groups: Groups by predicted length, 4 for quartiles.
        level: Confidence level of the intervals (normal, items independent).

    Returns:
        Both lengths per group.

    Raises:
        ValueError: If shapes do not fit, `level` is out of range or there are fewer than two items per group.

    Example:
        >>> from pyro_contrastive.distributions import PowerSpherical
        >>> law = PowerSpherical(torch.tensor([[1.0, 0.0]]).expand(8, 2), torch.full((8,), 3.0))
        >>> found = resultant_length_check(law, law.mean_direction, num_groups=1)  # 3 / (3 + 1), and always right
        >>> found.predicted, found.realised
        (array([0.75]), array([1.]))
    """
    mean, z = _checked(posterior, points, num_groups, level)
    length = (mean * as_array(posterior.mean)).sum(axis=-1)  # not |E z|, which is more for an anisotropic law
    cosine = (mean * z).sum(axis=-1)
    groups = np.array_split(np.argsort(-length, kind="stable"), num_groups)
    realised, half = _means(cosine, groups, level)
    counts = np.array([len(group) for group in groups])
    predicted = np.array([length[group].mean() for group in groups])
    return ResultantLengthCheck(predicted, realised, realised - half, realised + half, counts, level)


@dataclass(frozen=True, eq=False)
class StationarityCheck:
    r"""Where the likelihood of the points wants the concentrations to be, per group of equal size, the surest first.

    Attributes:
        score: Mean of :math:`\partial \log p(z) / \partial \log \kappa`, per group, shape (G,): 0 if calibrated, < 0
            over-confident.
        lower: Lower ends of its intervals, shape (G,).
        upper: Upper ends.
        factor: The factor on all concentrations of the group at which its score is 0, shape (G,): below 1
            over-confident; 0 or infinity where the likelihood has no maximum.
        common_factor: The same for all items together.
        counts: Items per group, shape (G,).
        level: Confidence level of each interval.
    """

    score: FloatArray
    lower: FloatArray
    upper: FloatArray
    factor: FloatArray
    common_factor: float
    counts: NDArray[np.int64]
    level: float


def stationarity_check(
    posterior: Any, points: ArrayLike | torch.Tensor, *, num_groups: int = 4, level: float = 0.95
) -> StationarityCheck:
    r"""Check the identity that holds where kappa is a maximum of the likelihood, on points that were not fitted.

    For the power spherical law in d dimensions, with :math:`t = \mu \cdot z`,

    .. math::  E[\log(1 + t)] = \log 2 + \psi(\alpha) - \psi(\alpha + \beta), \qquad \alpha = \beta + \kappa, \quad
               \beta = (d - 1) / 2,

    and for von Mises-Fisher :math:`E[t] = A_d(\kappa)`. The difference of both sides times kappa is the `score`. It
    weighs large errors more than the mean cosine does, so a power spherical law with heavy-tailed errors can pass
    :func:`resultant_length_check` and fail here.

    Args:
        posterior: Power spherical or von Mises-Fisher laws with batch shape (N,).
        points: What they predict, unit vectors, shape (N, d).
        num_groups: Groups by concentration.
        level: Confidence level of the intervals (normal, items independent).

    Returns:
        Scores, and the factors that would make them 0.

    Raises:
        TypeError: For a family without a scalar concentration.
        ValueError: As :func:`resultant_length_check`.

    Example:
        >>> from pyro_contrastive.distributions import PowerSpherical
        >>> mean = torch.nn.functional.normalize(torch.randn(4000, 5), dim=-1)
        >>> draws = PowerSpherical(mean, torch.full((4000,), 20.0)).sample()
        >>> round(stationarity_check(PowerSpherical(mean, torch.full((4000,), 40.0)), draws).common_factor, 1)
        0.5
    """
    if not isinstance(posterior, RotationallySymmetric):
        raise TypeError(
            "`posterior` must be power spherical or von Mises-Fisher laws, which have one concentration, got "
            f"{type(posterior).__name__}; use resultant_length_check"
        )
    mean, z = _checked(posterior, points, num_groups, level)
    kappa = as_array(posterior.concentration).astype(np.float64)

    def slope(factor: float, group: NDArray[np.int64]) -> FloatArray:
        """Derivative of the log density of every item of the group with respect to the factor; falls with it."""
        directions, targets = torch.from_numpy(mean[group]), torch.from_numpy(z[group])
        with torch.enable_grad():
            scale = torch.full((len(group),), factor, dtype=torch.float64, requires_grad=True)
            law = law_like(
                posterior, {"mean_direction": directions, "concentration": scale * torch.from_numpy(kappa[group])}
            )
            return as_array(torch.autograd.grad(law.log_prob(targets).sum(), scale)[0])

    def root(group: NDArray[np.int64]) -> float:
        def mean_slope(log_factor: float) -> float:
            return float(slope(float(np.exp(log_factor)), group).mean())

        if mean_slope(-_REACH) <= 0:
            return 0.0
        if mean_slope(_REACH) >= 0:
            return float("inf")
        return float(np.exp(optimize.brentq(mean_slope, -_REACH, _REACH, xtol=1e-6)))

    everything = np.arange(len(kappa))
    groups = np.array_split(np.argsort(-kappa, kind="stable"), num_groups)
    score, half = _means(slope(1.0, everything), groups, level)
    factors, counts = np.array([root(group) for group in groups]), np.array([len(group) for group in groups])
    return StationarityCheck(score, score - half, score + half, factors, root(everything), counts, level)


def _checked(
    posterior: Any, points: ArrayLike | torch.Tensor, num_groups: int, level: float
) -> tuple[FloatArray, FloatArray]:
    mean, z = unit_vectors(posterior.mean_direction, "mean_direction"), unit_vectors(points, "points")
    if mean.ndim != 2 or z.shape != mean.shape:
        raise ValueError(
            f"`points` must be (N, d), one per law of a batch of shape (N,), got {z.shape} for {mean.shape}"
        )
    if not 0 < level < 1:
        raise ValueError(f"`level` must be in (0, 1), got {level!r}; use 0.95 for a 95 % interval")
    if num_groups < 1 or len(mean) < 2 * num_groups:
        raise ValueError(f"there must be two items per group or more, got {len(mean)} items for {num_groups} groups")
    return mean, z


def _means(values: FloatArray, groups: list[NDArray[np.int64]], level: float) -> tuple[FloatArray, FloatArray]:
    """Mean of each group and the half width of its interval."""
    means, errors = np.array([mean_and_error(values[group]) for group in groups]).T
    return means, errors * stats.norm.ppf(0.5 + 0.5 * level)
