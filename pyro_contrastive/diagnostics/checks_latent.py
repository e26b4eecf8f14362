"""Opinions on the learned latent space, with no truth needed: its use of the sphere, its widths, their level."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import stats

from pyro_contrastive.diagnostics._arrays import as_array, unit_vectors
from pyro_contrastive.diagnostics.checks import TEST_LEVEL, Check, grade, percent, pvalue_text
from pyro_contrastive.diagnostics.identifiability import Identifiability
from pyro_contrastive.diagnostics.representation import aggregate_uniformity
from pyro_contrastive.ops import bessel_ratio

__all__ = ["judge_concentration", "judge_dimensions", "judge_level", "judge_uniformity"]

# Mean length of the aggregate. In a world with a known truth, an aggregate of mean length .55 cost the uniform fit the
# whole order of its concentrations (docs/identifiability.md). At .1 the marginal has a concentration of about d / 10,
# still small beside that of any posterior that says something.
_LENGTH_WARN, _LENGTH_FAIL = 0.1, 0.55
_CROWDED = 0.9  # mean length of the mean directions: nine tenths of every direction is the same for all items


def judge_uniformity(points: ArrayLike | torch.Tensor, *, assumed: bool = True, level: float = TEST_LEVEL) -> Check:
    """Opinion on the aggregate posterior, which the closed forms take to be uniform on the sphere.

    Warns at a mean length of .1 or a largest eigenvalue 25 % above the one that uniform points show by chance
    (Marchenko & Pastur 1967), fails at a mean length of .55; each where `aggregate_uniformity` rejects at `level`.

    Args:
        points: One posterior draw per item, shape (N, d), N >= 10.
        assumed: Whether the fit assumes uniformity; not so with `marginal="empirical"`.
        level: Significance level of the check.

    Returns:
        The check.

    Raises:
        ValueError: As `aggregate_uniformity`.

    Example:
        >>> judge_uniformity(np.tile(np.eye(3), (50, 1))).status  # three points
        'fail'
    """
    result = aggregate_uniformity(points)
    n, d = result.num_points, result.dim
    length, ratio = result.mean_resultant_length, result.eigenvalue_ratio
    by_chance = (1 + math.sqrt(d / n)) ** 2
    effect = max(length, _LENGTH_WARN if ratio >= 1.25 * by_chance else 0.0)
    resolution = math.sqrt(stats.chi2.isf(level / 2, d) / (d * n))
    status, few = grade(effect, _LENGTH_WARN, _LENGTH_FAIL, significant=result.pvalue < level, resolution=resolution)
    value = f"mean length {length:.2f}, largest eigenvalue ratio {ratio:.1f}, {pvalue_text(result.pvalue)}, {n:,} draws"
    if few:
        return Check("Uniform aggregate", "skip", value, f"{n} draws cannot show a departure; judge more items.")
    if status == "pass":
        return Check("Uniform aggregate", status, value, "The sphere is used evenly, as identified widths need.")
    if not assumed:
        text = "The latents are not uniform, and this fit does not assume it. Trust the order before the level."
        return Check("Uniform aggregate", "pass", value, text)
    text = "The latents are not uniform, as the closed forms assume: directions are drawn to the crowd, and " + (
        "even the order of the concentrations may be wrong."
        if status == "fail"
        else "the level of the widths is not to be relied on. Their order needs another check."
    )
    remedy = (
        'Fit with `models.MCInfoNCE(marginal="empirical")`, a guide with `batch_norm=False` and batches of 256, and '
        "compare the order of the widths."
    )
    return Check("Uniform aggregate", status, value, text, remedy)


def judge_dimensions(mean_direction: ArrayLike | torch.Tensor) -> Check:
    r"""Opinion on how many dimensions the mean directions use.

    The effective number is the participation ratio of the eigenvalues of their second moments,
    :math:`1 / \operatorname{tr} T^2`, 1 on a line and d when uniform. Fails where it covers less than a tenth of the
    way from 1 to what uniform points show, or where the mean directions are crowded (mean length above .9); warns
    below half of the way.

    Args:
        mean_direction: Unit vectors, shape (N, d), N >= 10.

    Returns:
        The check.

    Raises:
        ValueError: If the shape is another or a vector is not of length one.

    Example:
        >>> judge_dimensions(np.tile(np.eye(4), (50, 1))).value
        '4.0 of 4 dimensions, mean length of the directions 0.50'
    """
    mean = unit_vectors(mean_direction, "mean_direction")
    if mean.ndim != 2 or len(mean) < 10:
        raise ValueError(f"`mean_direction` must be (N, d) with N >= 10, got {mean.shape}; judge more items")
    n, d = mean.shape
    used = 1.0 / float(np.sum((mean.T @ mean / n) ** 2))
    uniform = 1.0 / (1.0 / d + (1.0 - 1.0 / d) / n)
    length = float(np.linalg.norm(mean.mean(axis=0)))
    share = (used - 1.0) / (uniform - 1.0)
    status, _ = grade(1.0 - share, 0.5, 0.9)
    crowded = length > _CROWDED
    status = "fail" if crowded else status
    value = f"{used:.1f} of {d} dimensions, mean length of the directions {length:.2f}"
    if status == "pass":
        return Check("Dimensions in use", status, value, "The directions fill the sphere.")
    if crowded or (status == "fail" and length > 0.5):
        text = "All directions are crowded together: the latent space is hardly used, and no cap can hold its share."
    else:
        text = "The directions use part of the sphere only: a smaller sphere would hold them."
    remedy = (
        "Standardise the features before the heads: keep `batch_norm=True` of the guides, or end the encoder of a "
        "guide of your own with `nn.BatchNorm1d(width, affine=False)`. More steps; a larger batch. If the things "
        "differ in few ways only: a smaller `dim`."
    )
    return Check("Dimensions in use", status, value, text, remedy)


def judge_concentration(concentration: ArrayLike | torch.Tensor, dim: int) -> Check:
    r"""Opinion on the range of the concentrations: neither uniform posteriors, nor points, nor one width for all.

    Judged by the mean resultant length :math:`A_d(\kappa)`, which means the same in every dimension. *Collapsed*: the
    median is below .05 (fails) or .1 (warns), a posterior that says almost nothing. *Runaway*: above .999, a posterior
    no wider than .045 radians; fails for half of the items, warns for one in twenty. *Constant*: the concentrations
    differ by less than 1 %, which warns.

    Args:
        concentration: Concentrations, shape (N,), >= 0; infinity is legal.
        dim: Dimension d >= 2.

    Returns:
        The check; "skip" for points, which have no width.

    Raises:
        ValueError: If there is no concentration.

    Example:
        >>> judge_concentration([0.01, 0.02, 0.03], dim=10).status
        'fail'
    """
    kappa = as_array(concentration).astype(np.float64)
    if kappa.ndim != 1 or not len(kappa):
        raise ValueError(f"`concentration` must be a vector with at least one item, got shape {kappa.shape}")
    name = "Range of the concentrations"
    if np.isnan(kappa).any():
        text = "Some concentrations are not numbers: the fit has diverged."
        return Check(name, "fail", f"{int(np.isnan(kappa).sum())} NaN", text, "A smaller `lr`, or `clip_norm=1.0`.")
    if np.isinf(kappa).all():
        return Check(name, "skip", "infinite for all", "Point posteriors have no width. Use a guide that has one.")
    finite = torch.as_tensor(np.where(np.isinf(kappa), 1.0, kappa))
    length = np.where(np.isinf(kappa), 1.0, as_array(bessel_ratio(dim, finite)))
    low, middle, high = np.quantile(kappa, [0.05, 0.5, 0.95], method="nearest")
    value = f"5, 50, 95 %: {low:.3g}, {middle:.3g}, {high:.3g} in {dim} dimensions"
    collapsed, _ = grade(1.0 - float(np.median(length)), 0.9, 0.95)
    runaway, _ = grade(float(np.mean(length > 0.999)), 0.05, 0.5)
    if collapsed != "pass":
        text = "The posteriors have collapsed towards the uniform law: they say almost nothing about their views."
        remedy = (
            "Check that the two views of a pair belong together. Do not combine independent uniform priors with a "
            "learned InfoNCE kernel: use `models.RPM`, or a stated pair concentration; a smaller pair concentration; "
            "more steps."
        )
        return Check(name, collapsed, value, text, remedy)
    if runaway != "pass":
        text = (
            f"{percent(float(np.mean(length > 0.999)))} of the posteriors are points for all purposes. Unless those "
            "views are free of ambiguity, the concentrations ran away."
        )
        remedy = (
            "State a larger pair concentration, or `math.inf`: no finite width can make pairs agree better than the "
            'stated one allows. `evidence="exact"` instead of a small K.'
        )
        return Check(name, runaway, value, text, remedy)
    if len(kappa) > 1 and np.all(np.isfinite(kappa)) and np.log(high) - np.log(max(low, 1e-300)) < 0.01:
        text = "Every view gets the same width, so the width says nothing about the view."
        return Check(name, "warn", value, text, "More steps, or views that differ in how ambiguous they are.")
    return Check(name, "pass", value, "Neither uniform, nor points, nor one width for all.")


def judge_level(
    pair_concentration: float | None, *, learned: bool = False, profile: Identifiability | None = None
) -> Check:
    """The standing note on the level of the concentrations, which rests on an assumption.

    No number of pairs refutes a pair concentration that is too large; one that is too small warns, where the profile
    says so (`Identifiability.too_small`).

    Args:
        pair_concentration: The concentration of the pair that the model assumes or learned; None where it has none.
        learned: Whether it was learned.
        profile: Result of `identifiability` on held-out pairs, to say over which range other values do as well.

    Returns:
        The check, "skip" or "warn".

    Example:
        >>> judge_level(20.0).value
        'stated pair concentration 20'
    """
    name = "Level of the concentrations"
    if pair_concentration is None:
        text = "The model states no pair concentration: what fixes the level of the widths is for you to say."
        return Check(name, "skip", "not known", text)
    value = f"{'learned' if learned else 'stated'} pair concentration {_named(pair_concentration)}"
    if profile is None:
        text = (
            "Pairs show the order of the widths; their level shifts with the pair concentration and fits as well. "
            "`diagnostics.identifiability` shows over which range."
        )
        return Check(name, "skip", value, text)
    low, high = profile.plausible
    inside = profile.level[(profile.pair_concentration >= low) & (profile.pair_concentration <= high)]
    other = (
        f"fit {low:.3g} to {high:.3g} as well".replace("inf", "infinity") if low < high else "fit no other value tried"
    )
    value += f"; held-out pairs {other}"
    if profile.too_small:
        text = (
            f"Only {percent(profile.posterior_share)} of the spread of the pairs is left for the posteriors: the pair "
            "concentration is probably too small, and the widths ran towards zero."
        )
        return Check(name, "warn", value, text, "State a larger pair concentration, or `math.inf`.")
    text = (
        f"Pairs show the order of the widths. Their level is an assumption: the median concentration would be "
        f"{inside.max():.3g} to {inside.min():.3g} over that range. Only knowledge of the pairs can decide."
    )
    return Check(name, "skip", value, text)


def _named(concentration: float) -> str:
    return "infinite (one shared latent)" if math.isinf(concentration) else f"{concentration:.3g}"
