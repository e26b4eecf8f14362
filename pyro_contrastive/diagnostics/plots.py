"""Pictures of the diagnostics: matplotlib axes in, axes out, colours that colour-blind readers can tell apart.

Every function takes `ax=None` and returns the axes; without axes it makes a new figure on the Agg canvas, so that
neither pyplot nor the user's backend or settings are touched: `plot_coverage(c).figure.savefig("coverage.png")`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import stats

from pyro_contrastive.diagnostics._arrays import as_array
from pyro_contrastive.diagnostics._style import (
    BLUE,
    CYCLE,
    GREY,
    ORANGE,
    RED,
    images,
    label,
    named,
    new_axes,
    plain_ticks,
    pvalue_text,
)
from pyro_contrastive.diagnostics.calibration import Coverage, uniformity_pvalue
from pyro_contrastive.diagnostics.representation import aggregate_uniformity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "plot_accuracy_by_quartile",
    "plot_aggregate",
    "plot_concentration_recovery",
    "plot_concentration_vs_corruption",
    "plot_coverage",
    "plot_history",
    "plot_neighbours",
    "plot_pit",
]


def plot_coverage(
    coverage: Coverage | Mapping[str, Coverage],
    *,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    backend: str = "matplotlib",
) -> Axes:
    """Nominal against empirical coverage of credible caps, with 95 % Wilson intervals.

    Args:
        coverage: One `Coverage`, or several by name.
        ax: Axes to draw on; a new figure without.
        figsize: Width and height of the new figure in inches.
        backend: "matplotlib"; no other is there.

    Returns:
        The axes. On the diagonal: calibrated. Below: over-confident. Above: under-confident.
    """
    ax = new_axes(ax, figsize, backend)
    ax.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="calibrated")
    for colour, (name, one) in zip(cycle(CYCLE), named(coverage, "credible caps").items(), strict=False):
        ax.fill_between(one.levels, one.lower, one.upper, color=colour, alpha=0.2, linewidth=0)
        marker = "o" if len(one.levels) <= 12 else ""
        ax.plot(one.levels, one.empirical, color=colour, marker=marker, markersize=5, linewidth=1.8, label=name)
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    ax.legend(fontsize=10, frameon=False)
    label(ax, "nominal level of the cap", "share of true points inside", "Coverage of credible caps")
    return ax


def plot_pit(
    pit: ArrayLike, *, ax: Axes | None = None, figsize: tuple[float, float] | None = None, backend: str = "matplotlib"
) -> Axes:
    """Distribution function of PIT values minus that of the uniform, with a simultaneous 95 % band.

    The band is that of the Kolmogorov-Smirnov test (exact for N items), so the curve leaves it exactly when
    `uniformity_pvalue` is below 5 %. ArviZ draws the same quantity with other bands: `plot_ecdf` (0.x) and
    `plot_ecdf_pit` (1.x).

    Args:
        pit: PIT values in [0, 1], shape (N,).
        ax: Axes to draw on; a new figure without.
        figsize: Width and height of the new figure in inches.
        backend: "matplotlib"; no other is there.

    Returns:
        The axes. A curve above zero: under-confident posteriors (truths too often near the centre). Below:
        over-confident.
    """
    ax = new_axes(ax, figsize, backend)
    values = np.sort(np.asarray(pit, dtype=np.float64))
    pvalue = uniformity_pvalue(values)
    n = len(values)
    band = stats.kstwo.ppf(0.95, n)
    ax.axhspan(-band, band, color=GREY, alpha=0.2, linewidth=0, label="95 % band if calibrated")
    ax.axhline(0.0, color=GREY, linestyle="--", linewidth=1)
    # both sides of every step of the empirical distribution function
    x = np.r_[0.0, np.repeat(values, 2), 1.0]
    y = np.r_[0.0, np.repeat(np.arange(n + 1) / n, 2)[1:-1], 1.0] - x
    ax.plot(x, y, color=BLUE, linewidth=1.5, label=f"posterior ({pvalue_text(pvalue)})")
    low, high = min(y.min(), -band), max(y.max(), band)
    ax.set(xlim=(0, 1), ylim=(low - 0.1 * (high - low), high + 0.35 * (high - low)))  # room for the legend
    ax.legend(fontsize=10, frameon=False, loc="upper right")
    label(ax, "PIT: level of the cap that reaches the truth", "ECDF - uniform", "Calibration at every level")
    return ax


def plot_concentration_recovery(
    truth: ArrayLike | torch.Tensor,
    estimate: ArrayLike | torch.Tensor,
    *,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    backend: str = "matplotlib",
) -> Axes:
    """True against estimated concentrations on logarithmic axes, with the identity.

    Args:
        truth: True concentrations, shape (N,), > 0.
        estimate: Estimated ones, shape (N,); infinite ones are left out and counted in the title.
        ax: Axes to draw on; a new figure without.
        figsize: Width and height of the new figure in inches.
        backend: "matplotlib"; no other is there.

    Returns:
        The axes.
    """
    ax = new_axes(ax, figsize, backend)
    truth, estimate = as_array(truth).astype(np.float64), as_array(estimate).astype(np.float64)
    shown = np.isfinite(truth) & np.isfinite(estimate)
    ax.scatter(truth[shown], estimate[shown], s=6, color=BLUE, alpha=0.35, linewidth=0, rasterized=True)
    title = "Concentration recovery"
    if not shown.all():
        title += f" ({int((~shown).sum())} infinite not shown)"
    if shown.any():
        low, high = truth[shown].min(), truth[shown].max()
        ax.plot([low, high], [low, high], color=RED, linestyle="--", linewidth=1.5, label="identity")
        ax.legend(fontsize=10, frameon=False)
        ax.set(xscale="log", yscale="log")
    plain_ticks(ax)
    label(ax, "true concentration", "estimated concentration", title)
    return ax


def plot_concentration_vs_corruption(
    level: ArrayLike | torch.Tensor,
    concentration: ArrayLike | torch.Tensor,
    *,
    num_bins: int = 12,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    backend: str = "matplotlib",
) -> Axes:
    """Concentration of each item against the corruption applied to it, with median and quartiles in bins.

    Args:
        level: Corruption levels, shape (N,).
        concentration: Concentrations, shape (N,); infinite ones are left out.
        num_bins: Bins of equal size in number of items.
        ax: Axes to draw on; a new figure without.
        figsize: Width and height of the new figure in inches.
        backend: "matplotlib"; no other is there.

    Returns:
        The axes. It should fall from left to right.
    """
    ax = new_axes(ax, figsize, backend)
    level, kappa = as_array(level).astype(np.float64), as_array(concentration).astype(np.float64)
    level, kappa = level[np.isfinite(kappa)], kappa[np.isfinite(kappa)]
    ax.scatter(level, kappa, s=8, color=BLUE, alpha=0.3, linewidth=0, rasterized=True, label="images")
    groups = [g for g in np.array_split(np.argsort(level, kind="stable"), min(num_bins, max(len(level), 1))) if len(g)]
    if groups:
        centre = np.array([np.median(level[g]) for g in groups])
        quartiles = np.array([np.quantile(kappa[g], [0.25, 0.5, 0.75]) for g in groups])
        ax.fill_between(centre, quartiles[:, 0], quartiles[:, 2], color=RED, alpha=0.25, linewidth=0, label="quartiles")
        ax.plot(centre, quartiles[:, 1], color=RED, marker="o", markersize=4, label="median")
        ax.set_yscale("log")
        ax.legend(fontsize=10, frameon=False)
    plain_ticks(ax, ("y",))
    label(ax, "corruption applied", "concentration of the posterior", "Does damage widen the posterior?")
    return ax


def plot_accuracy_by_quartile(
    accuracy: ArrayLike | Mapping[str, ArrayLike],
    *,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    backend: str = "matplotlib",
) -> Axes:
    """Accuracy from the surest to the least sure group of items, as bars.

    Args:
        accuracy: Accuracies in [0, 1], shape (G,), the surest group first; or several by name.
        ax: Axes to draw on; a new figure without.
        figsize: Width and height of the new figure in inches.
        backend: "matplotlib"; no other is there.

    Returns:
        The axes.
    """
    ax = new_axes(ax, figsize, backend)
    several = accuracy if isinstance(accuracy, Mapping) else {"": accuracy}
    width = 0.8 / len(several)
    for index, (name, values) in enumerate(several.items()):
        heights = np.asarray(values, dtype=np.float64)
        x = np.arange(len(heights)) + (index - (len(several) - 1) / 2) * width
        bars = ax.bar(x, heights, width=0.92 * width, color=CYCLE[index % len(CYCLE)], label=name or None)
        ax.bar_label(bars, fmt="%.2f", fontsize=10 if len(several) < 3 else 8, padding=2)
    groups = len(heights)
    middle = [{2: "2nd", 3: "3rd"}.get(k, f"{k}th") for k in range(2, groups)]
    names = ["surest", *middle, "least sure"] if groups > 1 else ["all"]
    ax.set_xticks(range(groups), names)
    ax.set_ylim(0, 1.08)
    if any(several):
        ax.legend(fontsize=10, frameon=False)
    label(ax, f"{'quartile' if groups == 4 else 'group'} of concentration", "accuracy", "Is the sure posterior right?")
    return ax


def plot_neighbours(
    queries: ArrayLike | torch.Tensor,
    neighbours: ArrayLike | torch.Tensor,
    concentration: ArrayLike | torch.Tensor,
    *,
    labels: Sequence[object] | None = None,
    neighbour_labels: Sequence[Sequence[object]] | None = None,
    title: str = "",
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    backend: str = "matplotlib",
) -> Axes:
    """Query images, one per row, each followed by its nearest neighbours.

    Args:
        queries: Images (Q, C, H, W) or (Q, H, W) with values in [0, 1], C = 1 or 3.
        neighbours: Images (Q, K, C, H, W) or (Q, K, H, W), the nearest first.
        concentration: Concentration of each query, shape (Q,).
        labels: Label of each query, shown beside its concentration.
        neighbour_labels: Labels (Q, K); with `labels`, neighbours of another label get a frame.
        title: Title of the picture.
        ax: Axes to draw on; a new figure without.
        figsize: Width and height of the new figure in inches.
        backend: "matplotlib"; no other is there.

    Returns:
        The axes.
    """
    from matplotlib.patches import Rectangle

    query, near = images(as_array(queries), 3), images(as_array(neighbours), 4)
    kappa = as_array(concentration)
    rows, columns, height, width = near.shape[:4]
    gap, wide_gap = 0.15, 0.7  # in image widths
    ax = new_axes(ax, figsize, backend, default=(1.5 + 0.62 * (columns + 1.7), 0.5 + 0.72 * rows))
    for row in range(rows):
        for column in range(columns + 1):
            left = column * (1 + gap) + (wide_gap if column else 0.0)
            bottom = (rows - 1 - row) * (1 + gap)
            image = query[row] if column == 0 else near[row, column - 1]
            ax.imshow(image, extent=(left, left + 1, bottom, bottom + 1), cmap="gray", vmin=0, vmax=1, zorder=1)
            wrong = column and labels is not None and neighbour_labels is not None
            if wrong and neighbour_labels[row][column - 1] != labels[row]:  # type: ignore[index]
                ax.add_patch(Rectangle((left, bottom), 1, 1, fill=False, edgecolor=ORANGE, linewidth=2.5, zorder=2))
        text = f"κ = {kappa[row]:.3g}" + ("" if labels is None else f"\nlabel {labels[row]}")
        ax.text(-0.15, (rows - 1 - row) * (1 + gap) + 0.5, text, ha="right", va="center", fontsize=10)
    ax.set(xlim=(-1.7, (columns + 1) * (1 + gap) + wide_gap), ylim=(-gap, rows * (1 + gap)), aspect="equal")
    ax.set_axis_off()
    ax.set_title(title, fontsize=12)
    return ax


def plot_aggregate(
    points: ArrayLike | torch.Tensor,
    *,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    backend: str = "matplotlib",
) -> Axes:
    r"""Coordinates of one draw per item along the principal axes, against those of uniform points.

    The distribution function of the cosine to each principal axis of the points (the eigenvectors of their second
    moments) is drawn over that of a coordinate of a uniform point, :math:`(1+t)/2 \sim` Beta((d-1)/2, (d-1)/2).

    Args:
        points: One draw per item, shape (N, d) on the unit sphere.
        ax: Axes to draw on; a new figure without.
        figsize: Width and height of the new figure in inches.
        backend: "matplotlib"; no other is there.

    Returns:
        The axes. All curves on the dashed one: uniform, as the identification of the posterior needs.
    """
    ax = new_axes(ax, figsize, backend)
    z = as_array(points).astype(np.float64)
    result = aggregate_uniformity(z)
    _, vectors = np.linalg.eigh(z.T @ z)
    d = z.shape[-1]
    grid = np.linspace(-1, 1, 401)
    height = (np.arange(len(z)) + 0.5) / len(z)
    for index, axis in enumerate(vectors.T):
        extreme = {0: (ORANGE, "least used axis"), d - 1: (BLUE, "most used axis")}.get(index)
        colour, name = extreme or (GREY, None)
        style: dict[str, Any] = (
            {"alpha": 1.0, "linewidth": 1.8, "zorder": 2} if extreme else {"alpha": 0.25, "linewidth": 0.8}
        )
        cosines = z @ axis
        cosines = np.sort(cosines if cosines.mean() >= 0 else -cosines)  # the sign of an eigenvector means nothing
        ax.plot(cosines, height, color=colour, label=name, **style)
    half = 0.5 * (d - 1)
    ax.plot(grid, stats.beta.cdf(0.5 * (1 + grid), half, half), color="black", linestyle="--", linewidth=1.5,
            label="uniform", zorder=3)  # fmt: skip
    reach = min(1.0, 5.0 / np.sqrt(d))
    ax.set(xlim=(-reach, reach), ylim=(0, 1))
    ax.legend(fontsize=10, frameon=False, loc="upper left")
    summary = f"mean length {result.mean_resultant_length:.3f}, eigenvalue ratio {result.eigenvalue_ratio:.2f}"
    label(ax, "cosine to a principal axis", "share of draws below", f"Aggregate posterior\n{summary}")
    return ax


def plot_history(
    history: Mapping[str, Sequence[float]],
    *,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    backend: str = "matplotlib",
) -> Axes:
    """Loss (and its parts) against training steps.

    Args:
        history: Curves by name, one value per row. A column "step" is the horizontal axis (without it, the row); "lr"
            is not a loss and left out.
        ax: Axes to draw on; a new figure without.
        figsize: Width and height of the new figure in inches.
        backend: "matplotlib"; no other is there.

    Returns:
        The axes. Long curves are shown as a thin line under a running median.
    """
    from scipy.ndimage import median_filter

    ax = new_axes(ax, figsize, backend)
    curves = {name: values for name, values in history.items() if name not in ("step", "lr")}
    for index, (name, values) in enumerate(curves.items()):
        colour, y = CYCLE[index % len(CYCLE)], np.asarray(values, dtype=np.float64)
        if not len(y):
            continue
        x = np.asarray(history.get("step", range(1, len(y) + 1)), dtype=np.float64)
        if len(y) >= 100:
            ax.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
            y = median_filter(y, size=max(len(y) // 50, 3), mode="nearest")
        ax.plot(x, y, color=colour, linewidth=1.8, label=name)
    ax.set_xlim(left=0)
    if curves:
        ax.legend(fontsize=10, frameon=False)
    label(ax, "step", "loss per item", "Training")
    return ax
