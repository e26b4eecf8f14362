"""Estimates with their uncertainty: one bootstrap for every statistic, Wilson's interval for shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from pyro_contrastive.diagnostics._arrays import FloatArray, derived_seed

__all__ = ["Estimate", "bootstrap", "mean_and_error", "wilson_interval"]

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
) -> list[Estimate]:
    """Percentile bootstrap of statistics of N independent items, all measured on the same resamples (Efron 1979).

    Args:
        statistic: Called with resampled `samples`, each (..., N); gives (...) or a tuple of such, NaN where undefined.
        *samples: What is known about the items, each (N,); resampled together.
        level: Confidence level in (0, 1).
        num_resamples: Number of resamples, >= 2.
        seed: Seed of the resamples.

    Returns:
        One estimate per statistic. Where it is not finite on the data its interval is NaN; resamples on which it is not
        finite are left out.

    Raises:
        ValueError: If `level` or `num_resamples` is out of range.
    """
    if not 0 < level < 1:
        raise ValueError(f"`level` must be in (0, 1), got {level!r}; use 0.95 for a 95 % interval")
    if not isinstance(num_resamples, int | np.integer) or num_resamples < 2:
        raise ValueError(f"`num_resamples` must be an integer >= 2, got {num_resamples!r}; 1000 is enough for 95 %")
    arrays = [np.asarray(sample) for sample in samples]
    num = len(arrays[0])
    generator = np.random.default_rng(derived_seed(seed, "bootstrap"))

    def figures(index: NDArray[np.int64]) -> FloatArray:
        found = statistic(*(array[index] for array in arrays))
        return np.stack(np.broadcast_arrays(*(found if isinstance(found, tuple) else (found,)))).astype(np.float64)

    batch = max(_ENTRIES // num, 1)
    sizes = [min(batch, num_resamples - start) for start in range(0, num_resamples, batch)]
    drawn = np.concatenate([figures(generator.integers(num, size=(size, num))) for size in sizes], axis=-1)
    estimates = []
    for value, values in zip(figures(np.arange(num)), drawn, strict=True):
        values = values[np.isfinite(values)]
        if np.isfinite(value) and len(values) > 1:
            lower, upper = np.quantile(values, [0.5 * (1 - level), 0.5 * (1 + level)])
            estimates.append(Estimate(float(value), float(lower), float(upper), float(values.std(ddof=1)), level))
        else:
            estimates.append(Estimate(float(value), float("nan"), float("nan"), float("nan"), level))
    return estimates


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
    mean = float(values.mean()) if len(values) else float("nan")
    known = len(values) > 1 and np.isfinite(mean)
    return mean, float(values.std(ddof=1) / np.sqrt(len(values))) if known else float("nan")
