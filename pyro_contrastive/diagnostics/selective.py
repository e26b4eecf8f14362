"""What the width knows about mistakes, strangers and doubt, with intervals: checks that need no known posterior."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from pyro_contrastive.diagnostics._arrays import FloatArray, as_array
from pyro_contrastive.diagnostics._intervals import Estimate, bootstrap, wilson_interval
from pyro_contrastive.diagnostics.retrieval_scores import RiskCoverage, label_entropy, risk_coverage

__all__ = ["SelectiveRisk", "entropy_agreement", "ood_auroc", "rank_agreement", "selective_risk"]


@dataclass(frozen=True, eq=False)
class SelectiveRisk:
    """Error of the most confident items with its uncertainty.

    Attributes:
        curve: Error against the share kept.
        aurc: Area under the curve, with a bootstrap interval.
        excess_aurc: `aurc` above that of the best order, with a bootstrap interval. Both intervals end at 0 where there
            is no mistake at all: resampling cannot show what was never seen, the band can.
        lower: Lower ends of the pointwise Wilson band of `curve.risk`, shape (N,).
        upper: Upper ends, shape (N,).
        gain: Area above the curve: the error rate of all items minus `aurc`, with a bootstrap interval. If it includes
            0, nothing shows that the confidence knows about mistakes.
    """

    curve: RiskCoverage
    aurc: Estimate
    excess_aurc: Estimate
    gain: Estimate
    lower: FloatArray
    upper: FloatArray


def selective_risk(
    confidence: ArrayLike | torch.Tensor,
    correct: ArrayLike | torch.Tensor,
    *,
    level: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> SelectiveRisk:
    """Risk-coverage curve with a band, AURC and excess AURC with bootstrap intervals over items.

    Args:
        confidence: Shape (N,), the larger the surer; ties and infinities as in `risk_coverage`.
        correct: Booleans, shape (N,), of independent items.
        level: Confidence level of intervals and band.
        num_resamples: Resamples of the bootstrap.
        seed: Its seed.

    Returns:
        The curve and its uncertainty.

    Raises:
        ValueError: If shapes differ, there is no item, or a confidence is NaN.

    Example:
        >>> found = selective_risk(np.arange(100), np.arange(100) >= 20)
        >>> round(found.aurc.value, 4), found.excess_aurc.value, found.gain.lower > 0
        (0.0225, 0.0, True)
    """
    curve = risk_coverage(confidence, correct)
    values, wrong = as_array(confidence).astype(np.float64), ~as_array(correct).astype(bool)
    _, group = np.unique(-values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    group, wrong, num = group[order], wrong[order], len(order)
    starts = np.flatnonzero(np.r_[True, group[1:] != group[:-1]])
    kept = np.arange(1, num + 1)
    best = np.cumsum(np.r_[0.0, 1.0 / kept[::-1]])  # sums of 1 / k from the end, for the best order

    def areas(index: NDArray[np.int64]) -> tuple[FloatArray, ...]:
        """Areas of resampled items: how often each was drawn is all that matters."""
        rows = index.reshape(-1, num)
        cell = (rows + num * np.arange(len(rows))[:, None]).ravel()
        drawn = np.bincount(cell, minlength=rows.size).reshape(rows.shape)
        size = np.add.reduceat(drawn, starts, axis=1)
        errors = np.add.reduceat(drawn * wrong, starts, axis=1)
        share = errors / np.maximum(size, 1)  # a tie counts with its mean error
        error = np.repeat(share.ravel(), size.ravel()).reshape(rows.shape)
        aurc = (np.cumsum(error, axis=1) / kept).mean(axis=1)
        total = errors.sum(axis=1)
        # all mistakes last: sum over the last `total` places of (k - (num - total)) / k
        ideal = (total - (num - total) * best[total]) / num
        found = aurc, np.maximum(aurc - ideal, 0.0), total / num - aurc
        return tuple(values.reshape(index.shape[:-1]) for values in found)

    aurc, excess, gain = bootstrap(areas, np.arange(num), level=level, num_resamples=num_resamples, seed=seed)
    lower, upper = wilson_interval(curve.risk, kept, level)
    return SelectiveRisk(curve, aurc, excess, gain, lower, upper)


def ood_auroc(
    in_concentration: ArrayLike | torch.Tensor, out_concentration: ArrayLike | torch.Tensor, *, level: float = 0.95
) -> Estimate:
    r"""Probability that an item from the training distribution is more concentrated than one from outside it.

    The area under the ROC curve of the concentration as a detector, ties by one half (Mann & Whitney 1947). The
    standard error is DeLong's (DeLong, DeLong & Clarke-Pearson 1988) and the interval is symmetric on the logit scale.
    Where all pairs are in order that error is 0 and says nothing; the interval is then Clopper and Pearson's for the
    min(N, M) disjoint pairs that can be formed, whose successes are binomial.

    Args:
        in_concentration: Concentrations of items like those of training, shape (N,); infinities are ranked.
        out_concentration: Of items unlike them, shape (M,).
        level: Confidence level of the interval.

    Returns:
        0.5 if the concentration knows nothing, 1 if it separates them, below 0.5 if strangers look *surer*.

    Raises:
        ValueError: If a side is not a vector of at least two values, a value is NaN, or `level` is out of range.

    Example:
        >>> found = ood_auroc([5.0, 6.0, np.inf, 4.0], [3.0, 5.0, 1.0, 2.0])
        >>> round(found.value, 4), found.lower > 0.5, found.upper < 1.0
        (0.9062, True, True)
    """
    inside, outside = (as_array(v).astype(np.float64) for v in (in_concentration, out_concentration))
    for name, values in (("in_concentration", inside), ("out_concentration", outside)):
        if values.ndim != 1 or len(values) < 2 or np.isnan(values).any():
            raise ValueError(f"`{name}` must be a vector of two or more values without NaN, got shape {values.shape}")
    if not 0 < level < 1:
        raise ValueError(f"`level` must be in (0, 1), got {level!r}")
    n, m = len(inside), len(outside)
    ranks = stats.rankdata(np.r_[inside, outside])
    # per item, the share of the other side that it is in order with
    ordered_in = (ranks[:n] - stats.rankdata(inside)) / m
    ordered_out = 1.0 - (ranks[n:] - stats.rankdata(outside)) / n
    value = float(ordered_in.mean())
    error = float(np.sqrt(ordered_in.var(ddof=1) / n + ordered_out.var(ddof=1) / m))
    if value in (0.0, 1.0):
        far = (0.5 * (1 - level)) ** (1 / min(n, m))
        lower, upper = (far, 1.0) if value else (0.0, 1.0 - far)
    else:
        reach = stats.norm.ppf(0.5 + 0.5 * level) * error / (value * (1 - value))
        lower, upper = special.expit(special.logit(value) + np.array([-reach, reach]))
    return Estimate(value, float(lower), float(upper), error, level)


def rank_agreement(
    x: ArrayLike | torch.Tensor,
    y: ArrayLike | torch.Tensor,
    *,
    level: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Spearman's rank correlation with a bootstrap interval over items.

    For the concentration against a known corruption use ``rank_agreement(concentration, -level_of_corruption)``, which
    is `corruption_correlation` with an interval. Items must be independent: take one view of each.

    Args:
        x: Values, shape (N,); infinities are ranked.
        y: Values, shape (N,).
        level: Confidence level.
        num_resamples: Resamples of the bootstrap.
        seed: Its seed.

    Returns:
        The correlation in [-1, 1]; all NaN where a side is constant.

    Raises:
        ValueError: If the shapes differ, there are fewer than three items, or a value is NaN.

    Example:
        >>> rank_agreement([1.0, 2.0, 3.0, np.inf], [1.0, 4.0, 9.0, 16.0]).value
        1.0
    """
    arrays = [as_array(values).astype(np.float64) for values in (x, y)]
    if arrays[0].ndim != 1 or arrays[0].shape != arrays[1].shape or len(arrays[0]) < 3 or np.isnan(arrays).any():
        raise ValueError(
            "both sides must be vectors of one length >= 3 without NaN, got shapes "
            f"{arrays[0].shape} and {arrays[1].shape}"
        )
    return bootstrap(rank_correlation, *arrays, level=level, num_resamples=num_resamples, seed=seed)[0]


def entropy_agreement(
    concentration: ArrayLike | torch.Tensor,
    probabilities: ArrayLike | torch.Tensor,
    *,
    level: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Whether the posterior is wide where people disagree: Spearman of minus the concentration and the label entropy.

    Args:
        concentration: Shape (N,); infinities are ranked.
        probabilities: Soft labels or counts of annotators, shape (N, C), see `label_entropy`.
        level: Confidence level.
        num_resamples: Resamples of the bootstrap.
        seed: Its seed.

    Returns:
        The correlation, 1 when every image on which people disagree more has the wider posterior; all NaN where either
        is constant. With few annotators the entropy is itself noisy, which lowers it.

    Raises:
        ValueError: As `rank_agreement` and `label_entropy`.

    Example:
        >>> entropy_agreement([40.0, 20.0, 10.0, 5.0], [[10, 0], [9, 1], [7, 3], [5, 5]]).value
        1.0
    """
    entropy = label_entropy(probabilities)
    return rank_agreement(
        -as_array(concentration).astype(np.float64), entropy, level=level, num_resamples=num_resamples, seed=seed
    )


def rank_correlation(x: FloatArray, y: FloatArray) -> Any:
    """Spearman's correlation over the last axis of many resamples at once, NaN where a side is constant; (..., N)."""
    ranks = [stats.rankdata(values, axis=-1) - 0.5 * (values.shape[-1] + 1) for values in (x, y)]
    size = np.sqrt(np.prod([(r**2).sum(axis=-1) for r in ranks], axis=0))
    with np.errstate(invalid="ignore"):
        return np.where(size > 0, (ranks[0] * ranks[1]).sum(axis=-1) / size, np.nan)
