"""Comparison of fitted methods by what they predict for the same held-out pairs: what `arviz.compare` is for rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from pyro_contrastive.diagnostics._arrays import FloatArray
from pyro_contrastive.diagnostics._intervals import mean_and_error
from pyro_contrastive.diagnostics.predictive import PartnerCheck

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Methods from best to worst by their log score on the same held-out pairs; arrays have shape (M,), in nats a pair.

    Attributes:
        names: Names of the methods, best first.
        reference: The method that the others are compared with.
        log_score: Mean log probability of the true partner.
        log_score_se: Its standard error. It is mostly about the pairs, which are common to all: two intervals of
            `log_score` may overlap although the difference is certain.
        difference: `log_score` minus that of the reference.
        standard_error: Standard error of the difference, from the paired differences of the blocks; 0 for the
            reference, NaN for one block or an infinite difference.
        lower: Lower ends of the intervals of the difference, simultaneous over all comparisons.
        upper: Upper ends.
        level: Their joint confidence level.
        num_blocks: Number of independent blocks behind the standard errors.
        num_candidates: Candidates per row.
    """

    names: tuple[str, ...]
    reference: str
    log_score: FloatArray
    log_score_se: FloatArray
    difference: FloatArray
    standard_error: FloatArray
    lower: FloatArray
    upper: FloatArray
    level: float
    num_blocks: int
    num_candidates: int

    def __str__(self) -> str:
        """The table, one method a line."""
        width = max(len("method"), *(len(name) for name in self.names))
        interval = f"{100 * self.level:g} % interval"
        lines = [f"{'method':<{width}}  {'log score':>18}  {f'minus {self.reference}':>20}  {interval:>20}"]
        for k, name in enumerate(self.names):
            score = f"{self.log_score[k]:.4f} ± {self.log_score_se[k]:.4f}"
            known = name != self.reference
            gap = f"{self.difference[k]:.4f} ± {self.standard_error[k]:.4f}" if known else ""
            ends = f"{self.lower[k]:.4f} to {self.upper[k]:.4f}" if known else ""
            lines.append(f"{name:<{width}}  {score:>18}  {gap:>20}  {ends:>20}".rstrip())
        return "\n".join(lines)


def compare(checks: Mapping[str, PartnerCheck], *, reference: str | None = None, level: float = 0.95) -> Comparison:
    r"""Ranks methods by their log score and says which differences the data can tell.

    With :math:`\delta_b` the difference of two methods' mean log scores on block b, the difference is their mean over
    the B blocks and its standard error :math:`\mathrm{sd}(\delta_b) / \sqrt B`: blocks of disjoint pairs are
    independent, rows of one block are not. The intervals are Student's with B - 1 degrees of freedom, widened
    (Bonferroni) for all comparisons that were made: with all pairs of methods where the data choose the reference, with
    the M - 1 others where you do. They speak about new pairs for *these fits*; that another training run would differ
    by more is not in them.

    Args:
        checks: Results of `partner_check` by name, at least two, with the same pairs, `num_candidates` and `seed`.
        reference: Name of the method to compare with; None takes the best.
        level: Joint confidence level of the intervals, in (0, 1).

    Returns:
        The ranking.

    Raises:
        KeyError: If `reference` is not one of the names.
        ValueError: If there are fewer than two checks, if they were not made on the same pairs and candidates, or if
            `level` is out of range.

    Example:
        >>> from pyro_contrastive.diagnostics import partner_check
        >>> logits = np.random.default_rng(0).normal(size=(300, 300)) + 2.0 * np.eye(300)
        >>> scales = {"right": 2.0, "sharp": 8.0}  # partners lie 2 standard deviations above the others
        >>> checks = {name: partner_check(scale * logits, num_candidates=6) for name, scale in scales.items()}
        >>> found = compare(checks)
        >>> found.names, bool(found.upper[1] < 0)
        (('right', 'sharp'), True)
    """
    if len(checks) < 2:
        raise ValueError(f"`checks` must hold two methods or more, got {list(checks)}")
    if not 0 < level < 1:
        raise ValueError(f"`level` must be in (0, 1), got {level!r}")
    if reference is not None and reference not in checks:
        raise KeyError(f"`reference` must be one of {sorted(checks)}, got {reference!r}")
    if len({check.fingerprint for check in checks.values()}) > 1:
        seen = {name: f"{c.num_blocks} x {c.num_candidates}, {c.fingerprint[:8]}" for name, c in checks.items()}
        raise ValueError(
            "`checks` must be of the same held-out pairs in the same candidate blocks, got (blocks x candidates, "
            f"fingerprint) {seen}; call partner_check on each with the same `views` (or `ids`, where methods prepare "
            "the views differently), `num_candidates` and `seed`"
        )
    names = sorted(checks, key=lambda name: -checks[name].log_score)
    best = names[0] if reference is None else reference
    blocks = {name: check.pair_log_score.mean(axis=1) for name, check in checks.items()}
    num_blocks, count = len(blocks[best]), len(names)
    comparisons = count * (count - 1) // 2 if reference is None else count - 1
    reach = stats.t.ppf(1 - 0.5 * (1 - level) / comparisons, num_blocks - 1) if num_blocks > 1 else np.nan
    found = []
    for name in names:
        with np.errstate(invalid="ignore"):  # both minus infinity: the difference is not defined
            mean, error = mean_and_error(blocks[name] - blocks[best]) if name != best else (0.0, 0.0)
        half = reach * error if name != best else 0.0
        found.append((checks[name].log_score, checks[name].log_score_se, mean, error, mean - half, mean + half))
    score, score_se, difference, standard_error, lower, upper = np.array(found).T
    return Comparison(
        tuple(names),
        best,
        score,
        score_se,
        difference,
        standard_error,
        lower,
        upper,
        level,
        num_blocks,
        checks[best].num_candidates,
    )
