"""Estimates with their uncertainty: one bootstrap for every statistic, Wilson's interval for shares."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from pyro_contrastive.diagnostics._arrays import FloatArray, derived_seed

__all__ = ["Estimate", "bootstrap", "mean_and_error", "wilson_interval"]

Method = Literal["percentile", "BCa"]
_ENTRIES = 2**22  # resampled numbers that are held at once


@dataclass(frozen=True)
class Estimate:
    """A figure and its uncertainty.

    Attributes:
        value: The figure on the data as they are.
        lower: Lower end of its confidence interval; NaN where there is none.
        upper: Upper end.
        standard_error: Standard deviation of the figure over data sets of this size.
        level: Confidence level of the interval, in (0, 1).
    """

    value: float
    lower: float
    upper: float
    standard_error: float
    level: float


def bootstrap(
    statistic: Callable[..., Any],
    *samples: ArrayLike,
    level: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
    method: Method = "percentile",
) -> list[Estimate]:
    """Bootstrap intervals of statistics of N independent items, all measured on the same resamples.

    Args:
        statistic: Called with resampled `samples`, each (..., N), and gives (..., ) or a tuple of such.
        *samples: What is known about the items, each (N,); resampled together.
        level: Confidence level in (0, 1).
        num_resamples: Number of resamples, >= 1.
        seed: Seed of the resamples.
        method: "percentile", or "BCa" (bias-corrected and accelerated; N further evaluations, Efron 1987).

    Returns:
        One estimate per statistic. Where the statistic is NaN or infinite on the data its interval is NaN; resamples on
        which it is not defined are left out of "percentile" intervals.

    Raises:
        ValueError: If `level` or `num_resamples` is out of range.
    """
    if not 0 < level < 1:
        raise ValueError(f"`level` must be in (0, 1), got {level!r}; use 0.95 for a 95 % interval")
    if not isinstance(num_resamples, int | np.integer) or num_resamples < 1:
        raise ValueError(f"`num_resamples` must be an integer >= 1, got {num_resamples!r}; 1000 is enough for 95 %")
    arrays = [np.asarray(sample) for sample in samples]
    num = len(arrays[0])

    def together(index: NDArray[np.int64], axis: int = -1) -> FloatArray:
        found = statistic(*(array[index] for array in arrays))
        return np.stack(np.broadcast_arrays(*(found if isinstance(found, tuple) else (found,)))).astype(np.float64)

    observed = together(np.arange(num))
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore")  # a constant statistic: scipy warns, the interval says it
        found = stats.bootstrap(
            (np.arange(num),),
            together,
            n_resamples=int(num_resamples),
            batch=max(_ENTRIES // num, 1),
            vectorized=True,
            confidence_level=level,
            method=method,
            random_state=np.random.default_rng(derived_seed(seed, "bootstrap")),
        )
        drawn = found.bootstrap_distribution
        if method == "percentile":
            tails = [50 * (1 - level), 50 * (1 + level)]
            low, high = np.nanpercentile(np.where(np.isfinite(drawn), drawn, np.nan), tails, axis=-1)
        else:
            low, high = found.confidence_interval
        error = np.nanstd(np.where(np.isfinite(drawn), drawn, np.nan), axis=-1, ddof=1)
    defined = np.isfinite(observed)
    low, high, error = (np.where(defined, values, np.nan) for values in (low, high, error))
    return [
        Estimate(float(value), float(lower), float(upper), float(spread), level)
        for value, lower, upper, spread in zip(observed, low, high, error, strict=True)
    ]


def wilson_interval(share: ArrayLike, count: ArrayLike, level: float = 0.95) -> tuple[FloatArray, FloatArray]:
    """Wilson's score interval of a share (Wilson 1927), also of a fractional number of successes, as ties give.

    Args:
        share: Shares in [0, 1], any shape.
        count: Numbers of trials; NaN comes out where there are none.
        level: Confidence level in (0, 1).

    Returns:
        Lower and upper ends.

    Example:
        >>> low, high = wilson_interval(0.0, 20)
        >>> float(low), round(float(high), 4)
        (0.0, 0.1611)
    """
    share, count = np.broadcast_arrays(np.asarray(share, np.float64), np.asarray(count, np.float64))
    trials = np.where(count > 0, count, np.nan)
    z2 = stats.norm.ppf(0.5 + 0.5 * level) ** 2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = np.sqrt(z2 * share * (1 - share) / trials + (z2 / (2 * trials)) ** 2) / (1 + z2 / trials)
    return np.clip(centre - half, 0.0, share), np.clip(centre + half, share, 1.0)


def mean_and_error(values: FloatArray) -> tuple[float, float]:
    """Mean of independent values and its standard error; NaN where it is not defined (one value, an infinite one)."""
    mean = float(values.mean())
    known = len(values) > 1 and np.isfinite(mean)
    return mean, float(values.std(ddof=1) / np.sqrt(len(values))) if known else float("nan")
