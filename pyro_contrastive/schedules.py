"""Schedules of the learning rate: functions from the fraction done, in [0, 1), to a factor on it."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["SCHEDULES", "warmup_cosine"]


def warmup_cosine(share: float = 0.05) -> Callable[[float], float]:
    """Rise linearly from zero during the first steps, then fall to zero along a half cosine.

    Args:
        share: Part of the steps that the rise takes, in ``[0, 1)``.

    Returns:
        The schedule, for ``fit(..., schedule=warmup_cosine(0.1))``; of a cosine without a rise at 0.

    Raises:
        ValueError: If ``share`` is out of its range.

    References:
        Goyal et al., arXiv 1706.02677 (the rise); Loshchilov and Hutter, arXiv 1608.03983 (the cosine).

    Example:
        >>> [round(warmup_cosine(0.2)(done), 3) for done in (0.0, 0.1, 0.2, 0.6, 1.0)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if not 0.0 <= share < 1.0:
        raise ValueError(f"`share` must be in [0, 1), the part of the steps with a rising rate, got {share!r}")

    def factor(done: float) -> float:
        if done < share:
            return done / share
        return 0.5 * (1.0 + math.cos(math.pi * (done - share) / (1.0 - share)))

    return factor


SCHEDULES: dict[str, Callable[[float], float]] = {"cosine": warmup_cosine(0.0), "constant": lambda done: 1.0}
"""Schedules known by name."""
