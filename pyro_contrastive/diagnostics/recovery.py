"""Recovery of a known truth: how much of it a representation holds, and how far its concentrations are off.

`alignment` judges posteriors after the best rotation. Here are the weaker questions: whether the true latent is a
linear function of the learned one (`linear_r2`), whether single axes were found (`mcc`), and how far the concentrations
are from the true ones (`concentration_recovery`). Whatever is fitted is fitted on one half of the items and scored on
the other, so that a representation which knows nothing scores zero and not more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import linalg, optimize, stats

from pyro_contrastive.diagnostics._arrays import FloatArray, as_array, derived_seed
from pyro_contrastive.diagnostics._intervals import Estimate, bootstrap
from pyro_contrastive.diagnostics.selective import rank_correlation

__all__ = ["AxisRecovery", "ConcentrationRecovery", "LinearRecovery", "concentration_recovery", "linear_r2", "mcc"]

Correlation = Literal["pearson", "spearman"]
Alignment = Literal["none", "rotation", "linear"]


@dataclass(frozen=True, eq=False)
class LinearRecovery:
    """How much of the truth a linear map of the estimate explains on items it was not fitted to.

    Attributes:
        r2: Share of the variance of all axes together, at most 1; 0 or slightly less where nothing is known.
        per_axis: The same for each axis of the truth, shape (d,); NaN for an axis that is constant.
        groups: The same for each named group of axes.
        evaluated: Indices of the scored items, shape (M,).
    """

    r2: float
    per_axis: FloatArray
    groups: dict[str, float]
    evaluated: NDArray[np.int64]


def linear_r2(
    estimated: ArrayLike | torch.Tensor,
    truth: ArrayLike | torch.Tensor,
    *,
    groups: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
) -> LinearRecovery:
    r"""Held-out :math:`R^2` of the truth given an affine map of the estimate: least squares without a penalty.

    It is blind to every invertible linear map, so it also judges latents that are identified only up to one (those of
    an anisotropic kernel); read it per group, such as content and style axes.

    Args:
        estimated: Learned vectors, shape (N, m), e.g. mean directions.
        truth: True latents, shape (N, d).
        groups: Axes of the truth by name, e.g. ``{"content": range(5), "style": range(5, 10)}``.
        seed: Seed of the split into a half that is fitted and a half that is scored.

    Returns:
        :math:`1 - \mathrm{SS}_{res} / \mathrm{SS}_{tot}` with both sums over the axes and the scored items.

    Raises:
        ValueError: If shapes do not fit, a value is not finite, there are fewer than 2 (m + 2) items or an axis in
            `groups` does not exist.

    Example:
        >>> z = np.random.default_rng(0).normal(size=(50, 2))
        >>> found = linear_r2(z @ [[1.0, 2.0], [0.0, 1.0]], z, groups={"first": [0]})
        >>> round(found.r2, 6), round(found.groups["first"], 6)
        (1.0, 1.0)
    """
    x, y = _checked(estimated, truth, least=2 * (np.shape(estimated)[-1] + 2) if np.ndim(estimated) else 0)
    fitted, evaluated = _halves(len(x), seed)
    prediction = _affine(x, y, fitted)[evaluated]
    residual = ((y[evaluated] - prediction) ** 2).sum(axis=0)
    total = ((y[evaluated] - y[evaluated].mean(axis=0)) ** 2).sum(axis=0)
    by_name = {}
    for name, axes in (groups or {}).items():
        chosen = np.asarray(list(axes), dtype=np.int64)
        if not len(chosen) or not np.all((chosen >= 0) & (chosen < y.shape[1])):
            raise ValueError(f"`groups` must name axes in 0..{y.shape[1] - 1}, got {chosen.tolist()} for {name!r}")
        by_name[name] = float(_explained(residual[chosen].sum(), total[chosen].sum()))
    return LinearRecovery(
        float(_explained(residual.sum(), total.sum())), _explained(residual, total), by_name, evaluated
    )


@dataclass(frozen=True, eq=False)
class AxisRecovery:
    """Which learned axis stands for which true one.

    Attributes:
        mcc: Mean correlation coefficient over the true axes, 0 (up to chance, of either sign) to 1.
        correlations: Of each true axis with the learned axis assigned to it, times its sign, shape (d,); 0 for an axis
            that is constant.
        assignment: The learned axis of each true one, shape (d,).
        sign: 1 or -1: how the learned axis is oriented, shape (d,).
        evaluated: Indices of the scored items, shape (M,).
    """

    mcc: float
    correlations: FloatArray
    assignment: NDArray[np.int64]
    sign: FloatArray
    evaluated: NDArray[np.int64]


def mcc(
    estimated: ArrayLike | torch.Tensor,
    truth: ArrayLike | torch.Tensor,
    *,
    correlation: Correlation = "pearson",
    alignment: Alignment = "none",
    seed: int = 0,
) -> AxisRecovery:
    """Mean correlation coefficient of single axes (Hyvarinen & Morioka 2016, arXiv 1605.06336), on held-out items.

    Every true axis gets a learned one, by the assignment with the largest sum of absolute correlations (Hungarian
    method). Assignment, signs and alignment come from one half of the items and the correlations from the other: the
    usual figure, which does both on the same items, is above zero for a representation that knows nothing.

    The latents of an isotropic kernel are identified up to one rotation. Their axes mean nothing before
    ``alignment="rotation"``, and a low value without it is no fault.

    Args:
        estimated: Learned vectors, shape (N, m).
        truth: True latents, shape (N, d), d <= m; any m with a linear alignment.
        correlation: "pearson", or "spearman" for axes that are known up to a monotone map.
        alignment: What is fitted before: "none", "rotation" (orthogonal Procrustes after centring, m = d) or "linear"
            (least squares).
        seed: Seed of the split into halves.

    Returns:
        The mean, and what it is made of.

    Raises:
        ValueError: If shapes do not fit, a value is not finite, there are too few items or an option is unknown.

    Example:
        >>> z = np.random.default_rng(0).normal(size=(50, 2))
        >>> found = mcc(-z[:, ::-1] ** 3, z, correlation="spearman")
        >>> round(found.mcc, 6), found.assignment.tolist(), found.sign.tolist()
        (1.0, [1, 0], [-1.0, -1.0])
    """
    if correlation not in ("pearson", "spearman"):
        raise ValueError(f'`correlation` must be "pearson" or "spearman", got {correlation!r}')
    if alignment not in ("none", "rotation", "linear"):
        raise ValueError(f'`alignment` must be "none", "rotation" or "linear", got {alignment!r}')
    width = np.shape(estimated)[-1] if np.ndim(estimated) else 0
    x, y = _checked(estimated, truth, least=6 if alignment == "none" else 2 * (width + 2))
    fitted, evaluated = _halves(len(x), seed)
    if alignment == "linear":
        x = _affine(x, y, fitted)
    elif x.shape[1] < y.shape[1] or (alignment == "rotation" and x.shape[1] != y.shape[1]):
        raise ValueError(
            f"`estimated` must have the truth's {y.shape[1]} axes (more of them only without a rotation), got "
            f'{x.shape[1]}; use alignment="linear"'
        )
    elif alignment == "rotation":
        centred = [values[fitted] - values[fitted].mean(axis=0) for values in (x, y)]
        x = x @ linalg.orthogonal_procrustes(*centred)[0]
    table = _correlations(x[fitted], y[fitted], correlation)
    _, chosen = optimize.linear_sum_assignment(-np.abs(table.T))
    axes = np.arange(y.shape[1])
    sign = np.where(table[chosen, axes] < 0, -1.0, 1.0)
    held_out = sign * _correlations(x[evaluated], y[evaluated], correlation)[chosen, axes]
    return AxisRecovery(float(held_out.mean()), held_out, chosen, sign, evaluated)


@dataclass(frozen=True, eq=False)
class ConcentrationRecovery:
    """How far estimated concentrations are from the true ones, each figure with a bootstrap interval over items.

    Attributes:
        relative_error: Mean distance of the estimate from the truth, divided by the truth.
        log_ratio_mean: Mean of log(estimate / truth): the error of the level, 0 if right, > 0 too concentrated.
        log_ratio_sd: Standard deviation of the same: what no common factor explains.
        spearman: Rank correlation, of all items; NaN where one side is constant.
        num_items: N.
        num_incomparable: Items with an infinite (or zero) concentration on one side only. Their ratio is infinite and
            they are left out of the first three figures; where both sides are infinite the ratio is 1.
    """

    relative_error: Estimate
    log_ratio_mean: Estimate
    log_ratio_sd: Estimate
    spearman: Estimate
    num_items: int
    num_incomparable: int


def concentration_recovery(
    estimated: ArrayLike | torch.Tensor,
    truth: ArrayLike | torch.Tensor,
    *,
    level: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> ConcentrationRecovery:
    """Distance of estimated concentrations from the true ones: level, spread and order apart.

    The level is identified only relative to the pair concentration that was stated: a `log_ratio_mean` away from 0 with
    a small `log_ratio_sd` and a high `spearman` is a wrong assumption, not a bad fit.

    Args:
        estimated: Concentrations, >= 0, shape (N,); infinity is legal on both sides.
        truth: True ones, likewise.
        level: Confidence level of the intervals.
        num_resamples: Resamples of the bootstrap.
        seed: Its seed.

    Returns:
        The figures with their intervals.

    Raises:
        ValueError: If shapes differ, there are fewer than two items, or a value is negative or NaN.

    Example:
        >>> found = concentration_recovery([2.0, 8.0, 16.0, 64.0], [1.0, 4.0, 8.0, 32.0])
        >>> round(found.relative_error.value, 6), round(found.log_ratio_mean.value, 4), found.spearman.value
        (1.0, 0.6931, 1.0)
    """
    kappa, true_kappa = (as_array(values).astype(np.float64) for values in (estimated, truth))
    if kappa.ndim != 1 or kappa.shape != true_kappa.shape or len(kappa) < 2:
        raise ValueError(
            f"`estimated` and `truth` must be vectors of one length >= 2, got {kappa.shape} and {true_kappa.shape}"
        )
    if not (np.all(kappa >= 0) and np.all(true_kappa >= 0)):
        raise ValueError("concentrations must be >= 0, got negative or NaN values")
    with np.errstate(divide="ignore", invalid="ignore"):
        log_ratio = np.where(kappa == true_kappa, 0.0, np.log(kappa) - np.log(true_kappa))
    known = np.isfinite(log_ratio)
    log_ratio = np.where(known, log_ratio, 0.0)

    def figures(index: NDArray[np.int64]) -> tuple[FloatArray, ...]:
        ratio, weight = log_ratio[index], known[index]
        with np.errstate(invalid="ignore", divide="ignore"):
            count = weight.sum(axis=-1)
            mean = ratio.sum(axis=-1) / count
            square = (np.where(weight, ratio - mean[..., None], 0.0) ** 2).sum(axis=-1)
            error = np.abs(np.expm1(ratio)).sum(axis=-1) / count  # what is left out has ratio 0
            spread = np.sqrt(square / (count - 1))
        return error, mean, spread, rank_correlation(kappa[index], true_kappa[index])

    error, mean, spread, spearman = bootstrap(
        figures, np.arange(len(kappa)), level=level, num_resamples=num_resamples, seed=seed
    )
    return ConcentrationRecovery(error, mean, spread, spearman, len(kappa), int((~known).sum()))


def _checked(
    estimated: ArrayLike | torch.Tensor, truth: ArrayLike | torch.Tensor, *, least: int
) -> tuple[FloatArray, FloatArray]:
    x, y = (as_array(values).astype(np.float64) for values in (estimated, truth))
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < least:
        raise ValueError(
            f"`estimated` and `truth` must be (N, m) and (N, d) with the same N >= {least}, got {x.shape} and {y.shape}"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("`estimated` and `truth` must be finite, got NaN or infinite values")
    return x, y


def _halves(num: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    order = np.random.default_rng(derived_seed(seed, "recovery")).permutation(num)
    return order[: num // 2], np.sort(order[num // 2 :])


def _affine(x: FloatArray, y: FloatArray, fitted: NDArray[np.int64]) -> FloatArray:
    """Prediction of y for all items by the least-squares map of the fitted ones."""
    design = np.column_stack([np.ones(len(x)), x])
    return design @ linalg.lstsq(design[fitted], y[fitted])[0]


def _explained(residual: FloatArray, total: FloatArray) -> FloatArray:
    constant = total <= 1e-24
    return np.where(constant, np.nan, 1.0 - residual / np.where(constant, 1.0, total))


def _correlations(x: FloatArray, y: FloatArray, correlation: Correlation) -> FloatArray:
    """Correlation of every axis of x with every axis of y, 0 for one that is constant; (m, d)."""
    if correlation == "spearman":
        x, y = stats.rankdata(x, axis=0), stats.rankdata(y, axis=0)
    x, y = ((v - v.mean(axis=0)) for v in (x, y))
    x, y = (v / np.maximum(np.linalg.norm(v, axis=0), 1e-12) for v in (x, y))
    return np.clip(x.T @ y, -1.0, 1.0)
