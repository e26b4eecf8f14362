"""Opinions from held-out views without a known latent: the partner, corruption, nearest neighbours, k-hat."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import stats

from pyro_contrastive.diagnostics._arrays import FloatArray, as_array
from pyro_contrastive.diagnostics._intervals import mean_and_error
from pyro_contrastive.diagnostics.checks import TEST_LEVEL, Check, Status, grade, percent
from pyro_contrastive.diagnostics.representation import accuracy_by_quartile, corruption_correlation

__all__ = ["judge_accuracy", "judge_corruption", "judge_khat", "judge_partner", "judge_partner_reliability"]


class _Partner(Protocol):
    """What a `PartnerCheck` has."""

    @property
    def log_score(self) -> float: ...

    @property
    def accuracy(self) -> float: ...

    @property
    def overconfidence(self) -> float: ...

    @property
    def overconfidence_se(self) -> float: ...

    @property
    def pair_log_score(self) -> FloatArray: ...

    @property
    def num_blocks(self) -> int: ...

    @property
    def num_candidates(self) -> int: ...


def judge_partner(check: _Partner, *, level: float = TEST_LEVEL) -> Check:
    """Opinion on whether the posterior finds the partner of a view among candidates better than by guessing.

    The effect is the gain of the log score over guessing, in nats per pair, with its interval over blocks (Student's t;
    over pairs where there is one block). Fails where it cannot be told from 0 and is surely below half a nat; warns
    below .1 nats.

    Args:
        check: Result of `partner_check` on held-out pairs.
        level: Significance level of the check.

    Returns:
        The check; "skip" where the interval holds both 0 and half a nat.
    """
    size = check.num_candidates
    scores = np.asarray(check.pair_log_score) + math.log(size)
    blocks = scores.mean(axis=1) if check.num_blocks > 1 else scores.ravel()
    gain, error = mean_and_error(blocks)
    reach = float(stats.t.isf(level, len(blocks) - 1) * error)
    value = (
        f"{gain:.2f} nats per pair over guessing among {size} (at most {math.log(size):.2f}), "
        f"right {percent(check.accuracy)} of the time"
    )
    name = "Partner among candidates"
    if gain - reach > 0.0:
        status, _ = grade(1.0 - gain, 0.9, math.inf)
        if status == "pass":
            return Check(name, status, value, "Posteriors of two views of one thing find each other.")
        text = "The views tell hardly anything about each other under these posteriors."
    elif gain + reach > 0.5:
        return Check(name, "skip", value, f"{scores.size} pairs do not show half a nat; judge more pairs.")
    else:
        status, text = "fail", "The posterior of one view does not find its partner better than guessing."
    remedy = (
        "Check that row i of both views shows one thing; more steps; a smaller pair concentration if views of one "
        "thing differ much; a larger encoder."
    )
    return Check(name, status, value, text, remedy)


def judge_partner_reliability(check: _Partner, *, level: float = TEST_LEVEL) -> Check:
    """Opinion on the probabilities that the model states for the partner.

    The effect is the over-confidence in nats: the log score the stated probabilities expect of themselves minus the
    one they have, so that exp of it is the typical factor between stated and true probability. Warns at .1 (a factor of
    1.1), fails at .5 (1.6); t test over blocks.

    Args:
        check: Result of `partner_check` on held-out pairs.
        level: Significance level of the check.

    Returns:
        The check; "skip" for fewer than five blocks or where they could not show .5 nats.
    """
    name, blocks = "Partner probabilities", check.num_blocks
    excess, error = check.overconfidence, check.overconfidence_se
    side = "over" if excess > 0 else "under"
    value = f"{abs(excess):.2f} ± {error:.2f} nats {side}-confident, {blocks} blocks of {check.num_candidates}"
    if blocks < 5:
        return Check(name, "skip", value, f"{blocks} blocks are too few for a standard error; judge more pairs.")
    critical = float(stats.t.isf(level / 2, blocks - 1)) * error
    status, few = grade(abs(excess), 0.1, 0.5, significant=abs(excess) > critical, resolution=critical)
    if few:
        return Check(name, "skip", value, f"{blocks} blocks do not show half a nat; judge more pairs.")
    if status == "pass":
        return Check(name, status, value, "A stated probability of a partner is how often it is the partner.")
    if excess > 0:
        text = "The stated probabilities of the partner are too sure: widths and pair concentration together are off."
        remedy = (
            'More training pairs or fewer steps (over-fitting); `evidence="exact"` instead of a small K; if the '
            'aggregate is not uniform: `models.MCInfoNCE(marginal="empirical")`.'
        )
    else:
        text = "The stated probabilities of the partner are too cautious: the pairs agree better than the model says."
        remedy = 'More steps; a larger pair concentration, if it is finite; `negatives="sum"` instead of `"mean"`.'
    return Check(name, status, value, text, remedy)


def _by_interval(lower: float, upper: float, *, nothing: float, little: float, enough: float) -> Status:
    """Status of an effect that should be large, from its interval."""
    if upper < little or (lower <= nothing and upper < enough):
        return "fail"
    if upper < enough:
        return "warn"
    return "skip" if lower <= nothing else "pass"


def judge_corruption(
    concentration: ArrayLike | torch.Tensor, corruption: ArrayLike | torch.Tensor, *, level: float = TEST_LEVEL
) -> Check:
    """Opinion on whether the concentration falls with a corruption that was applied to the views.

    By the interval of the rank correlation with minus the corruption (Fisher's z): passes where it reaches above .5 (a
    quarter of the variance of the ranks), warns where it ends below; fails where it also holds 0, or ends below .2.

    Args:
        concentration: Concentrations, shape (N,).
        corruption: Corruption applied, shape (N,), larger is worse.
        level: Significance level of the check.

    Returns:
        The check; "skip" where either is constant or the interval holds both 0 and .5.

    Raises:
        ValueError: If the shapes differ or a value is NaN.

    Example:
        >>> judge_corruption(np.arange(100.0), np.arange(100.0)).status  # wider where the view is cleaner
        'fail'
    """
    correlation = corruption_correlation(concentration, corruption)
    size = len(as_array(corruption))
    value, name = f"rank correlation {correlation:.2f} over {size:,} views", "Width against corruption"
    if math.isnan(correlation):
        return Check(name, "skip", "constant", "One width for all views, or one corruption: nothing to compare.")
    reach = float(stats.norm.isf(level / 2)) / math.sqrt(max(size - 3, 1))
    z = math.atanh(float(np.clip(correlation, -1 + 1e-12, 1 - 1e-12)))
    status = _by_interval(math.tanh(z - reach), math.tanh(z + reach), nothing=0.0, little=0.2, enough=0.5)
    if status == "skip":
        return Check(name, status, value, "Too few views to tell; judge more.")
    if status == "pass":
        return Check(name, status, value, "Damaged views get wider posteriors, as they should.")
    text = "The width hardly follows the damage: it is about something else than how ambiguous a view is."
    remedy = (
        "Train on views that differ in strength, so that there is something to be unsure about; more steps; check the "
        "uniformity of the aggregate; a closed-form evidence instead of the ELBO, whose width is not the ambiguity."
    )
    return Check(name, status, value, text, remedy)


def judge_accuracy(
    concentration: ArrayLike | torch.Tensor, correct: ArrayLike | torch.Tensor, *, level: float = TEST_LEVEL
) -> Check:
    """Opinion on whether mistakes gather among the least sure items.

    By the interval of the probability that a right item is surer than a wrong one (the area under the ROC curve; normal
    approximation of Mann & Whitney 1947): passes where it reaches above .65, warns where it ends below; fails where it
    also holds .5, the area of a width that knows nothing of mistakes, or ends below .55.

    Args:
        concentration: Concentrations, shape (N,); infinity is legal.
        correct: Booleans, shape (N,), whether each item's nearest neighbours are right.
        level: Significance level of the check.

    Returns:
        The check; "skip" for one width, fewer than ten right or wrong items, or an interval with both .5 and .65.

    Raises:
        ValueError: If the shapes differ, a concentration is NaN, or there are fewer than four items.

    Example:
        >>> judge_accuracy(np.arange(100.0), np.arange(100) > 50).status
        'pass'
    """
    kappa, hits = as_array(concentration).astype(np.float64), as_array(correct).astype(bool)
    quartiles = accuracy_by_quartile(kappa, hits)
    right, wrong = int(hits.sum()), int((~hits).sum())
    name = "Mistakes among the least sure"
    value = f"right in {percent(quartiles[0])} of the surest quarter, {percent(quartiles[-1])} of the least sure"
    if np.all(kappa == kappa[0]):
        return Check(name, "skip", "one width for all", "Without a width that varies no item is surer than another.")
    if min(right, wrong) < 10:
        return Check(name, "skip", value, f"{right} right and {wrong} wrong items are too few to compare.")
    area = float(stats.mannwhitneyu(kappa[hits], kappa[~hits]).statistic) / (right * wrong)
    reach = float(stats.norm.isf(level / 2)) * math.sqrt((right + wrong + 1) / (12.0 * right * wrong))
    value += f"; P(right surer than wrong) = {area:.2f}"
    status = _by_interval(area - reach, area + reach, nothing=0.5, little=0.55, enough=0.65)
    if status == "skip":
        return Check(name, status, value, "Too few mistakes to tell; judge more items.")
    if status == "pass":
        return Check(name, status, value, "Where the posterior is sure, it is right more often.")
    text = "The width does not know where the mistakes are: do not use it to reject or to rank items."
    remedy = (
        "Check the width against a known corruption; train on views that destroy what the labels are about; a "
        "closed-form evidence instead of the ELBO."
    )
    return Check(name, status, value, text, remedy)


class _KHat(Protocol):
    @property
    def khat(self) -> FloatArray: ...

    @property
    def threshold(self) -> float: ...


def judge_khat(khat: _KHat) -> Check:
    """Opinion on PSIS k-hat (Yao et al. 2018): how far the guide is from the model's own posterior, item by item.

    Fails where a quarter of the items is above the threshold, warns at one in twenty.

    Args:
        khat: Result of `guide_khat`: `khat` (N,), NaN and infinity counting as above, and `threshold`.

    Returns:
        The check.

    Raises:
        ValueError: If there is no item.
    """
    values = np.asarray(khat.khat, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"`khat.khat` must be a vector with at least one item, got shape {values.shape}")
    share = float(np.mean(~(values <= khat.threshold)))
    status, _ = grade(share, 0.05, 0.25)
    value = f"{percent(share)} of {len(values):,} items above {khat.threshold:.2f}"
    if status == "pass":
        return Check("Guide against model (k-hat)", status, value, "The guide is close to the model's own posterior.")
    text = "For these items the guide is not the posterior of the model; weights of its draws are not reliable."
    remedy = "Change the family of the guide, more steps, a larger encoder; more draws, if k-hat is close to the limit."
    return Check("Guide against model (k-hat)", status, value, text, remedy)
