"""Opinions on a posterior whose truth is known: coverage, PIT, simulation-based calibration, TARP, recovery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import stats

from pyro_contrastive.diagnostics._arrays import FloatArray, as_array
from pyro_contrastive.diagnostics.alignment import spearman_correlation
from pyro_contrastive.diagnostics.calibration import coverage, uniformity_pvalue
from pyro_contrastive.diagnostics.checks import TEST_LEVEL, Check, Status, grade, percent, pvalue_text, worst

__all__ = [
    "judge_coverage",
    "judge_directions",
    "judge_pit",
    "judge_recovery",
    "judge_sbc",
    "judge_tarp",
    "judge_variational_sbc",
]

# Shares of truths. At .10 an 80 % cap is wrong half as often again (30 instead of 20 %) or half as often; .03 is the
# smallest gap that changes how a reader would round a stated probability to tens.
_GAP_WARN, _GAP_FAIL = 0.03, 0.10

_OVER = (
    "State a larger pair concentration, or `math.inf` if both views share one latent: one that is too small drives "
    'every concentration up. Use `evidence="exact"` instead of a small K, which favours narrow posteriors. '
    "Where the directions are off as well: more steps, more pairs."
)
_UNDER = (
    "State a smaller pair concentration: one that is too large (`math.inf` above all) makes the posterior count the "
    "scatter between the two latents as its own. Train longer if the loss still falls."
)
_SHAPE = "Change the family of the guide, and look at the PIT picture for where the caps miss."


def _too_few(found: int, smallest: float) -> str:
    return f"{found:,} items show gaps of {percent(smallest)} and more only; judge more items."


def _gap_text(over: bool) -> str:
    return "over-confident: truths lie outside too often" if over else "under-confident: the posterior is too wide"


def judge_coverage(pit: ArrayLike, *, levels: ArrayLike = (0.5, 0.8, 0.95), level: float = TEST_LEVEL) -> Check:
    """Opinion on the coverage of credible caps.

    Fails at a gap of 10 points between nominal and found share, warns at 3; tested by exact binomial tests, Bonferroni
    over the levels.

    Args:
        pit: PIT values from `cap_pit`, shape (N,), one per independent item.
        levels: Nominal levels in (0, 1).
        level: Significance level of the check.

    Returns:
        The check.

    Raises:
        ValueError: As `coverage`.

    Example:
        >>> judge_coverage(np.full(1000, 0.99)).status  # every truth at the rim of its posterior
        'fail'
    """
    found = coverage(pit, levels)
    counts = np.rint(found.empirical * found.num_items).astype(int)
    each = level / len(counts)
    tests = [stats.binomtest(int(c), found.num_items, p).pvalue for c, p in zip(counts, found.levels, strict=True)]
    gaps = found.empirical - found.levels
    significant = np.asarray(tests) < each
    gap = float(gaps[np.argmax(np.abs(gaps) * np.where(significant, 1.0, 1e-6))])
    spread = np.sqrt(np.max(found.levels * (1 - found.levels)) / found.num_items)
    resolution = float(stats.norm.isf(each / 2) * spread)
    status, few = grade(abs(gap), _GAP_WARN, _GAP_FAIL, significant=bool(significant.any()), resolution=resolution)
    shares = " / ".join(f"{share * 100:.1f}" for share in found.empirical)
    nominal = " / ".join(f"{share * 100:g}" for share in found.levels)
    value = f"{nominal} % caps hold {shares} % of {found.num_items:,} truths"
    return _gap_check("Coverage of caps", status, few, value, over=gap < 0, size=(found.num_items, resolution))


def judge_pit(pit: ArrayLike, *, level: float = TEST_LEVEL) -> Check:
    """Opinion on the uniformity of PIT values, at every level of the caps at once.

    The effect is the Kolmogorov-Smirnov distance: the largest gap in coverage over all levels. Fails at 10 points,
    warns at 3, as `judge_coverage`.

    Args:
        pit: PIT values, shape (N,), one per independent item.
        level: Significance level of the check.

    Returns:
        The check.

    Raises:
        ValueError: If `pit` is empty or outside [0, 1].

    Example:
        >>> judge_pit((np.arange(1000) + 0.5) / 1000).status
        'pass'
    """
    pvalue = uniformity_pvalue(pit)
    values = np.asarray(pit, dtype=np.float64)
    distance = _distance(values)
    resolution = float(stats.kstwo.isf(level, len(values)))
    status, few = grade(distance, _GAP_WARN, _GAP_FAIL, significant=pvalue < level, resolution=resolution)
    value = f"largest gap over all levels {percent(distance)}, {pvalue_text(pvalue)}"
    return _gap_check("PIT uniformity", status, few, value, values.mean() > 0.5, (len(values), resolution))


def _distance(values: FloatArray) -> float:
    """Largest distance of the empirical distribution function from that of the uniform."""
    return float(stats.kstest(values, "uniform").statistic)


def _gap_check(name: str, status: Status, few: bool, value: str, over: bool, size: tuple[int, float]) -> Check:
    if few:
        return Check(name, "skip", value, _too_few(*size))
    if status == "pass":
        return Check(name, status, value, "A stated probability is the share of truths it holds.")
    return Check(name, status, value, f"The posterior is {_gap_text(over)}.", _OVER if over else _UNDER)


class _SBC(Protocol):
    @property
    def pit(self) -> Mapping[str, FloatArray]: ...

    @property
    def pvalues(self) -> Mapping[str, float]: ...


class _VSBC(Protocol):
    @property
    def probabilities(self) -> Mapping[str, FloatArray]: ...

    @property
    def statistics(self) -> Mapping[str, float]: ...

    @property
    def pvalues(self) -> Mapping[str, float]: ...


def judge_sbc(sbc: _SBC, *, level: float = TEST_LEVEL) -> Check:
    """Opinion on simulation-based calibration over several test quantities.

    The effect is the largest Kolmogorov-Smirnov distance of the PIT values of a quantity. Fails at 10 points, warns
    at 3, where the quantity's p-value times the number of quantities is below `level`.

    Args:
        sbc: Result of `sbc`: `pit` (name to values (n_sim,)) and `pvalues` (name to p-value).
        level: Significance level of the check.

    Returns:
        The check.

    Raises:
        ValueError: If there is no quantity.
    """
    distances = {name: _distance(np.asarray(values)) for name, values in sbc.pit.items()}
    sizes = [len(values) for values in sbc.pit.values()]
    text = "Truths do not rank uniformly among posterior draws"
    return _quantities_check("Simulation-based calibration", distances, sbc.pvalues, sizes, level, text)


def judge_variational_sbc(sbc: _VSBC, *, level: float = TEST_LEVEL) -> Check:
    """Opinion on variational simulation-based calibration (Yao et al. 2018), which sees shifted marginals.

    The effect is half the distance between the distributions of p and 1 - p, the gap in coverage that it stands for.
    Fails at 10 points, warns at 3, where the quantity's p-value times the number of quantities is below `level`.

    Args:
        sbc: Result of `variational_sbc`.
        level: Significance level of the check.

    Returns:
        The check.

    Raises:
        ValueError: If there is no quantity.
    """
    distances = {name: value / 2 for name, value in sbc.statistics.items()}
    sizes = [len(values) for values in sbc.probabilities.values()]
    text = "The posterior is shifted to one side of the truth"
    return _quantities_check("Variational SBC", distances, sbc.pvalues, sizes, level, text)


def _quantities_check(
    title: str,
    distances: Mapping[str, float],
    pvalues: Mapping[str, float],
    sizes: Sequence[int],
    level: float,
    meaning: str,
) -> Check:
    if not distances:
        raise ValueError("`sbc` must hold at least one quantity, got none; name one in `quantities`")
    count, size = len(distances), min(sizes)
    flagged = [name for name in distances if pvalues[name] * count < level]
    name = max(flagged or distances, key=distances.__getitem__)
    resolution = float(stats.kstwo.isf(level / count, size))
    status, few = grade(distances[name], _GAP_WARN, _GAP_FAIL, significant=bool(flagged), resolution=resolution)
    value = f"{count} quantities, {size:,} simulations; largest gap {percent(distances[name])} ({name})"
    if few:
        return Check(title, "skip", value, _too_few(size, resolution))
    if status == "pass":
        return Check(title, status, value, "The truths rank among posterior draws as if they were draws themselves.")
    text = f"{meaning}, in: {', '.join(sorted(flagged))}."
    return Check(title, status, value, text, f"{_SHAPE} {_OVER}")


class _TARP(Protocol):
    @property
    def levels(self) -> FloatArray: ...

    @property
    def expected_coverage(self) -> FloatArray: ...

    @property
    def pvalue(self) -> float: ...

    @property
    def bias(self) -> float: ...


def judge_tarp(tarp: _TARP, *, level: float = TEST_LEVEL) -> Check:
    """Opinion on the expected coverage of balls around random references (TARP, Lemos et al. 2023).

    The effect is the largest distance of the curve from the diagonal. Fails at 10 points, warns at 3, where the p-value
    is below `level`.

    Args:
        tarp: Result of `tarp`.
        level: Significance level of the check.

    Returns:
        The check.
    """
    gap = float(np.max(np.abs(np.asarray(tarp.expected_coverage) - np.asarray(tarp.levels))))
    status, _ = grade(gap, _GAP_WARN, _GAP_FAIL, significant=tarp.pvalue < level)
    value = f"largest gap {percent(gap)}, bias {percent(tarp.bias)}, {pvalue_text(tarp.pvalue)}"
    title = "Expected coverage (TARP)"
    if status == "pass":
        return Check(title, status, value, "Balls around random points hold their share of truths as well.")
    text = "Balls around random points do not hold their share of truths: a wrong direction, or a wrong width."
    remedy = f"If the caps cover and this does not, the mean directions are off: more steps, a larger encoder. {_SHAPE}"
    return Check(title, status, value, text, remedy)


def judge_directions(cosine_correlation: float, mean_angle: float) -> Check:
    """Opinion on the recovered mean directions, which no width can change.

    Fails below a correlation of pairwise cosines of .7 (half of their variance lost), warns below .95 (a tenth).

    Args:
        cosine_correlation: From `cosine_correlation`, in [-1, 1]; NaN is skipped.
        mean_angle: Mean angle to the true directions in radians.

    Returns:
        The check.

    Example:
        >>> judge_directions(0.99, 0.08).status
        'pass'
    """
    status, _ = grade(1.0 - cosine_correlation, 0.05, 0.3)
    value = f"correlation of pairwise cosines {cosine_correlation:.3f}, mean angle {mean_angle:.2f} rad"
    if status in ("pass", "skip"):
        text = "The geometry of the latents is recovered." if status == "pass" else "All cosines are the same."
        return Check("Direction recovery", status, value, text)
    text = "The learned geometry is not that of the latents: a posterior with the right width would miss as well."
    remedy = (
        "More steps, a larger encoder, a larger batch. If the latents are not uniform: "
        '`models.MCInfoNCE(marginal="empirical")`.'
    )
    return Check("Direction recovery", status, value, text, remedy)


def judge_recovery(estimate: ArrayLike | torch.Tensor, truth: ArrayLike | torch.Tensor) -> Check:
    """Opinion on the order and the level of the concentrations against the true ones.

    Order: fails where the rank correlation is below .5 with 99.9 % confidence (Fisher's z), warns below .9. Level: the
    median ratio to the truth. A factor c scales the radius of every cap by about 1/sqrt(c): warns at 1.25 (12 % of the
    radius), fails at 2 (41 %), beyond 3.3 standard errors of the median.

    Args:
        estimate: Concentrations, shape (N,); infinity is legal.
        truth: True ones, shape (N,), > 0; where all are equal only the level is judged.

    Returns:
        The check.

    Raises:
        ValueError: If the shapes differ, there are fewer than 10 items, or a value is NaN.

    Example:
        >>> truth = np.linspace(16.0, 64.0, 100)
        >>> judge_recovery(3 * truth, truth).status  # the order is right, the level is not
        'fail'
    """
    kappa, true = as_array(estimate).astype(np.float64), as_array(truth).astype(np.float64)
    if kappa.shape != true.shape or kappa.ndim != 1 or len(kappa) < 10:
        raise ValueError(f"both must be (N,) with N >= 10, got {kappa.shape} and {true.shape}; judge more items")
    order = spearman_correlation(kappa, true)
    if np.isnan(order) and np.any(true != true[0]):  # one width for items that differ: no order at all
        order = 0.0
    reach = 3.3 / np.sqrt(len(kappa) - 3)
    upper = float(np.tanh(np.arctanh(min(order, 1 - 1e-12)) + reach)) if np.isfinite(order) else float("nan")
    order_status, _ = grade(1.0 - upper, 0.1, 0.5)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(kappa == true, 1.0, kappa / true)  # inf / inf is a right answer
    factor = float(np.quantile(ratio, 0.5, method="nearest"))
    logs = np.log(np.clip(ratio, 1e-300, 1e300))
    error = 1.25 * float(np.subtract(*np.quantile(logs, [0.75, 0.25]))) / 1.35 / np.sqrt(len(logs))
    off = max(abs(float(np.log(np.clip(factor, 1e-300, 1e300)))) - 3.3 * error, 0.0)
    level_status, _ = grade(off, np.log(1.25), np.log(2.0))
    status = worst([order_status, level_status])
    value = f"rank correlation {order:.3f}, level {factor:.3g} times the truth"
    if status == "pass":
        return Check("Concentration recovery", status, value, "Order and level of the widths are those of the truth.")
    meaning, remedy = [], []
    if order_status in ("fail", "warn"):
        meaning.append("The widths do not rank the items as their true ambiguity does.")
        remedy.append(
            'More steps and pairs; `evidence="exact"` instead of a small K. If the aggregate is not uniform: '
            '`models.MCInfoNCE(marginal="empirical")`.'
        )
    if level_status in ("fail", "warn"):
        meaning.append(f"The concentrations are too {'large' if factor > 1 else 'small'} as a whole.")
        remedy.append(
            "The level comes from the stated pair concentration: state a "
            f"{'larger' if factor > 1 else 'smaller'} one (see `diagnostics.identifiability`)."
        )
    return Check("Concentration recovery", status, value, " ".join(meaning), " ".join(remedy))
