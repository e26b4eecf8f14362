"""Opinions: what a check found, as pass, warn, fail or skip, with its meaning and what to try.

A test of N items finds any error when N is large and none when N is small, so no check here rests on a p-value alone:

- *fail* and *warn* need an effect that matters (the thresholds stand in each `judge_*` function, with their reason)
  **and** that chance does not explain it at the check's significance level;
- *pass* needs that an effect large enough to fail would have been seen;
- *skip* says that it could not be checked: too few items, nothing to check, or a matter of assumption.

The significance levels of one page add up to at most `FAMILY_LEVEL` (Bonferroni), so a right posterior gets any false
alarm from its tests with at most that probability.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

__all__ = ["FAMILY_LEVEL", "SYMBOLS", "Check", "Status", "grade", "percent", "pvalue_text", "verdict", "worst"]

Status = Literal["fail", "warn", "skip", "pass"]  # the most serious first
FAMILY_LEVEL = 0.01  # chance of any false alarm on a page, of the checks that test
TEST_LEVEL = 0.001  # of one test on its own: ten of them make a page
_OPINIONS: dict[Status, str] = {
    "fail": "Do not trust these posteriors yet",
    "warn": "Use these posteriors with care",
    "pass": "Nothing found against these posteriors",
    "skip": "Nothing could be judged",
}
_PHRASES: dict[Status, tuple[str, str]] = {  # of one check, of several
    "fail": ("fails", "fail"),
    "warn": ("warns", "warn"),
    "pass": ("passes", "pass"),
    "skip": ("cannot be judged", "cannot be judged"),
}
SYMBOLS: dict[Status, str] = {"fail": "✗", "warn": "!", "skip": "–", "pass": "✓"}


@dataclass(frozen=True)
class Check:
    """One line of an opinion.

    Attributes:
        name: What was checked, a few words; lines of several runs with one name belong together.
        status: "pass", "warn", "fail" or "skip".
        value: The figures behind it, as text.
        meaning: What the status means, one or two sentences.
        remedy: What to try, best first; empty where nothing is wrong.

    Raises:
        ValueError: If the status is unknown, or one that warns names no remedy.
    """

    name: str
    status: Status
    value: str
    meaning: str
    remedy: str = ""

    def __post_init__(self) -> None:
        if self.status not in get_args(Status):
            raise ValueError(f"`status` must be one of {', '.join(get_args(Status))}, got {self.status!r}")
        if self.status in ("fail", "warn") and not self.remedy:
            raise ValueError(f"a check that does not pass must name a `remedy`, got none for {self.name!r}")


def grade(
    effect: float, warn: float, fail: float, *, significant: bool = True, resolution: float = 0.0
) -> tuple[Status, bool]:
    """Status of an effect size, larger is worse.

    Args:
        effect: The effect found; NaN is "skip".
        warn: Smallest effect that matters.
        fail: Smallest effect that makes the result unusable.
        significant: Whether chance does not explain the effect.
        resolution: Smallest effect that this number of items would have shown.

    Returns:
        The status, and whether "skip" is for want of items.

    Example:
        >>> grade(0.2, 0.03, 0.1), grade(0.02, 0.03, 0.1), grade(0.05, 0.03, 0.1, significant=False, resolution=0.3)
        (('fail', False), ('pass', False), ('skip', True))
    """
    if effect != effect:
        return "skip", False
    if significant:
        return ("fail" if effect >= fail else "warn" if effect >= warn else "pass"), False
    return ("skip", True) if resolution > fail else ("pass", False)


def percent(share: float) -> str:
    """A share as text, "12 %"; with a decimal below ten percent."""
    return f"{share * 100:.{0 if abs(share) >= 0.1 or share == 0 else 1}f} %"


def pvalue_text(pvalue: float) -> str:
    """A p-value as text, "p = 0.032" or "p < 1e-16"."""
    return f"p = {pvalue:.2g}" if pvalue >= 1e-16 else "p < 1e-16"


def worst(statuses: Iterable[Status]) -> Status:
    """The most serious status: fail, then warn, then pass; "skip" only when there is nothing else.

    Args:
        statuses: Statuses in any order.

    Returns:
        One of them; "skip" when there is none.

    Example:
        >>> worst(["pass", "skip"]), worst(["pass", "warn"])
        ('pass', 'warn')
    """
    order: tuple[Status, ...] = ("fail", "warn", "pass", "skip")
    present = set(statuses)
    return next((status for status in order if status in present), "skip")


def verdict(checks: Sequence[Check]) -> tuple[Status, str]:
    """The overall opinion on some checks.

    Args:
        checks: The checks; several of one name (several runs) count once, by the worst.

    Returns:
        The worst status and a sentence.

    Example:
        >>> verdict([Check("Coverage", "pass", "50.1 %", "calibrated")])
        ('pass', 'Nothing found against these posteriors: 1 passes.')
    """
    by_name: dict[str, list[Status]] = {}
    for check in checks:
        by_name.setdefault(check.name, []).append(check.status)
    found: dict[Status, list[str]] = {status: [] for status in _PHRASES}
    for name, statuses in by_name.items():
        found[worst(statuses)].append(name)
    overall = worst(status for status, names in found.items() if names)
    parts = []
    for status, names in found.items():
        if names:
            listed = f" ({'; '.join(names)})" if status in ("fail", "warn") else ""
            parts.append(f"{len(names)} {_PHRASES[status][len(names) > 1]}{listed}")
    return overall, f"{_OPINIONS[overall]}: {', '.join(parts) or 'no checks'}."
