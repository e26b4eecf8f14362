"""Expected coverage with random reference points (TARP): calibration without the posterior's own centre."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from pyro_contrastive.diagnostics._arrays import FloatArray, unit_vectors
from pyro_contrastive.diagnostics._draws import checked_truth, draw_pieces
from pyro_contrastive.diagnostics.calibration import rank_pit, uniformity_pvalue
from pyro_contrastive.ops.random import derived_seed

__all__ = ["TARP", "expected_coverage", "tarp"]


@dataclass(frozen=True, eq=False)
class TARP:
    """Expected coverage of balls around reference points, per level.

    Attributes:
        levels: Credibility levels, shape (L,), from 0 to 1.
        expected_coverage: Share of items whose truth lies in the ball around its reference that holds this share of the
            posterior, shape (L,).
        lower: Lower ends of the band of the bootstrap over the items, pointwise, shape (L,).
        upper: Upper ends.
        fractions: Share of the posterior nearer to the reference than the truth, smoothed as a PIT value, shape (N,).
        pvalue: Kolmogorov-Smirnov p-value of uniform `fractions`.
        bias: Area between curve and diagonal, the mean of 1/2 - fraction, in [-1/2, 1/2]. Positive: truths are nearer
            to the references than draws are.
        confidence: Area above the diagonal on the upper half minus that on the lower half of the levels. Negative:
            over-confident (curve too high at small levels, too low at large ones). Positive: under-confident.
    """

    levels: FloatArray
    expected_coverage: FloatArray
    lower: FloatArray
    upper: FloatArray
    fractions: FloatArray
    pvalue: float
    bias: float
    confidence: float


def tarp(
    draws: Any,
    truth: ArrayLike | Tensor,
    *,
    references: ArrayLike | Tensor | None = None,
    num_draws: int = 999,
    levels: ArrayLike | None = None,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> TARP:
    """Tests of accuracy with random points on the sphere.

    For each item, a reference point and the ball around it that just reaches the truth: the posterior mass of that ball
    is uniform if the posterior is right (Lemos, Coogan, Hezaveh & Perreault-Levasseur 2023, arXiv 2302.03026, algorithm
    2). With references that may depend on the data but not on the truth, the converse holds too: right for all
    references means right. Unlike credible caps it looks away from the posterior's own centre, and so finds what caps
    cannot, such as a posterior that is shifted and widened until its caps hold.

    Distance is the angle; the chord gives the same result, since only the order counts.

    Args:
        draws: Posterior draws, unit vectors of shape (S, N, d), or a distribution with batch shape (N,) to draw from,
            which needs no memory for all draws.
        truth: True latent points, shape (N, d), in the posterior's frame.
        references: Unit vectors, shape (N, d), or (d,) for all items. Without, uniform on the sphere. Choose them to
            look for a suspected error: the pole that a posterior may be pulled to, or a function of the data.
        num_draws: S, where `draws` is a distribution.
        levels: Increasing, in [0, 1]; 0, .05, ..., 1 without.
        num_bootstrap: Resamples of the items behind the 95 % band, >= 1.
        seed: Seed of references, draws, ties and bootstrap, >= 0.

    Returns:
        The curve with its band, a p-value, and two areas that say in which direction it is off.

    Raises:
        ValueError: If shapes do not fit, vectors are not of unit length, or levels are out of range.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> z = rng.normal(size=(201, 300, 3)); z /= np.linalg.norm(z, axis=-1, keepdims=True)
        >>> result = tarp(z[1:], z[0])
        >>> result.pvalue > 0.01, bool(abs(result.expected_coverage[10] - result.levels[10]) < 0.1)
        (True, True)
    """
    points = checked_truth(draws, truth)
    points = torch.from_numpy(unit_vectors(points, "truth")).to(points)
    anchors = _references(references, points, seed)
    own = torch.linalg.vecdot(points, anchors)
    nearer = torch.zeros(len(points), dtype=torch.long, device=points.device)
    tied, drawn = torch.zeros_like(nearer), 0
    for z in draw_pieces(draws, num_draws, seed):
        if not drawn:
            unit_vectors(z[0], "draws")
        cosine = torch.linalg.vecdot(z, anchors.to(z))
        nearer += (cosine > own).sum(0)
        tied += (cosine == own).sum(0)
        drawn += len(z)
    if not drawn:
        raise ValueError("`draws` must hold at least one draw per item, got none")
    rng = np.random.default_rng(derived_seed(seed, 7))
    ranks = nearer.cpu().numpy() + rng.integers(0, tied.cpu().numpy(), endpoint=True)
    fractions = rank_pit(ranks, drawn, seed=derived_seed(seed, 8))
    return expected_coverage(fractions, levels=levels, num_bootstrap=num_bootstrap, seed=seed)


def _references(references: ArrayLike | Tensor | None, points: Tensor, seed: int) -> Tensor:
    if references is None:
        generator = torch.Generator().manual_seed(derived_seed(seed, 6))
        noise = torch.randn(points.shape, generator=generator)
        return torch.nn.functional.normalize(noise, dim=-1).to(points)
    anchors = torch.from_numpy(unit_vectors(references, "references")).to(points)
    if anchors.shape not in (points.shape, points.shape[-1:]):
        raise ValueError(
            f"`references` must have shape {tuple(points.shape)} or {tuple(points.shape[-1:])}, "
            f"got {tuple(anchors.shape)}"
        )
    return anchors


def expected_coverage(
    fractions: ArrayLike, *, levels: ArrayLike | None = None, num_bootstrap: int = 1000, seed: int = 0
) -> TARP:
    """The TARP curve of fractions that are known already, for instance of `sbc(...).pit["reference"]`.

    Args:
        fractions: Share of the posterior nearer to the reference than the truth, PIT values, shape (N,).
        levels: See `tarp`.
        num_bootstrap: See `tarp`.
        seed: Seed of the bootstrap, >= 0.

    Returns:
        See `tarp`.

    Raises:
        ValueError: If a number is out of range.
    """
    values = np.asarray(fractions, dtype=np.float64)
    pvalue = uniformity_pvalue(values)  # checks them
    grid = np.linspace(0.0, 1.0, 21) if levels is None else np.atleast_1d(np.asarray(levels, dtype=np.float64))
    if not len(grid) or not np.all((grid >= 0) & (grid <= 1)) or np.any(np.diff(grid) <= 0):
        raise ValueError(f"`levels` must increase and lie in [0, 1], got {grid.tolist()}")
    if num_bootstrap < 1:
        raise ValueError(f"`num_bootstrap` must be >= 1, got {num_bootstrap!r}")
    n = len(values)
    inside = np.searchsorted(np.sort(values), grid, side="right")
    # resampling the items with replacement: counts between the levels are multinomial
    between = np.diff(np.r_[0, inside, n]) / n
    rng = np.random.default_rng(derived_seed(seed, 9))
    curves = np.cumsum(rng.multinomial(n, between, size=num_bootstrap), axis=1)[:, :-1] / n
    lower, upper = np.quantile(curves, [0.025, 0.975], axis=0)
    # integrals of the empirical distribution function minus the diagonal, exactly
    bias = float(0.5 - values.mean())
    upper_half = float((1.0 - np.maximum(values, 0.5)).mean() - 0.375)
    return TARP(grid, inside / n, lower, upper, values, pvalue, bias, 2.0 * upper_half - bias)
