"""Pictures of calibration and of model checks; the conventions are those of `plots` (axes in, axes out)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from pyro_contrastive.diagnostics._style import (
    BLUE,
    CYCLE,
    GREY,
    check_backend,
    label,
    named,
    new_axes,
    new_figure,
    plain_ticks,
    pvalue_text,
)
from pyro_contrastive.diagnostics.calibration import coverage, uniformity_pvalue
from pyro_contrastive.diagnostics.plots import plot_concentration_recovery, plot_coverage, plot_pit
from pyro_contrastive.diagnostics.plots_arviz import pit_values

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pyro_contrastive.diagnostics.comparison import Comparison
    from pyro_contrastive.diagnostics.predictive import PartnerCheck, Reliability
    from pyro_contrastive.diagnostics.tarp import TARP

__all__ = [
    "plot_calibration_grid",
    "plot_comparison",
    "plot_rank_histogram",
    "plot_reliability",
    "plot_tarp",
]

_GRID_LEVELS = tuple(np.linspace(0.05, 0.95, 19))


def plot_calibration_grid(
    pit: Mapping[str, ArrayLike],
    *,
    concentration: Mapping[str, ArrayLike | torch.Tensor] | None = None,
    true_concentration: ArrayLike | torch.Tensor | None = None,
    levels: ArrayLike = _GRID_LEVELS,
    ax: NDArray[Any] | Sequence[Sequence[Axes]] | None = None,
    figsize: tuple[float, float] | None = None,
    backend: str = "matplotlib",
) -> NDArray[Any]:
    """Several methods side by side: one row each, with coverage, PIT and (where known) the concentrations.

    The PIT panels share their scale, so that rows compare at a glance, and so do the concentration panels.

    Args:
        pit: PIT values of the credible caps by method, each (N,), see `cap_pit`; lengths may differ.
        concentration: Estimated concentrations by method, each (N,); needs `true_concentration`.
        true_concentration: True ones, (N,), the same items for all methods.
        levels: Levels of the coverage curves, in (0, 1).
        ax: Axes (M, 2) or, with concentrations, (M, 3); a new figure without.
        figsize: Width and height of the new figure in inches.
        backend: "matplotlib"; no other is there.

    Returns:
        Array of axes, a row per method.

    Raises:
        ValueError: If there is no method, names or shapes do not fit, or a PIT value lies outside [0, 1].

    Example:
        >>> rng = np.random.default_rng(0)
        >>> grid = plot_calibration_grid({"right": rng.uniform(size=200), "too sure": rng.uniform(size=200) ** 0.5})
        >>> grid.shape, grid[1, 0].get_ylabel().split()[:2]
        ((2, 2), ['too', 'sure'])
    """
    check_backend(backend)
    if not isinstance(pit, Mapping) or not pit:
        raise ValueError(f"`pit` must map at least one method to its PIT values, got {type(pit).__name__}")
    if (concentration is None) != (true_concentration is None):
        raise ValueError("`concentration` and `true_concentration` go together; give both or none")
    if concentration is not None and set(concentration) != set(pit):
        raise ValueError(f"`concentration` must have the methods of `pit`, {sorted(pit)}, got {sorted(concentration)}")
    shape = (len(pit), 2 if concentration is None else 3)
    if ax is None:
        ax = new_figure(figsize or (3.5 * shape[1] + 0.5, 3.0 * shape[0] + 0.2)).subplots(*shape, squeeze=False)
    grid = np.array(ax, dtype=object)
    if grid.shape != shape:
        raise ValueError(f"`ax` must be an array of {shape} axes, a row per method, got {grid.shape}")
    for row, (name, values) in zip(grid, pit.items(), strict=True):
        plot_coverage({name: coverage(values, levels)}, ax=row[0])
        plot_pit(values, ax=row[1])
        if concentration is not None and true_concentration is not None:
            plot_concentration_recovery(true_concentration, concentration[name], ax=row[2])
        row[0].set_ylabel(f"{name}\n{row[0].get_ylabel()}", fontsize=10)
        for one in row:  # small panels: letters to match, and what the rows share said once
            one.title.set_fontsize(11)
            one.xaxis.label.set_fontsize(10)
            one.yaxis.label.set_fontsize(10)
            one.tick_params(labelsize=9)
        row[0].get_legend().remove()
        for text in row[1].get_legend().get_texts():
            text.set_fontsize(8)
            text.set_text(text.get_text().removeprefix("posterior (").removesuffix(")"))
        for legend in [one.get_legend() for one in row[2:] if one.get_legend() is not None]:
            legend.get_texts()[0].set_fontsize(8)
    for one in grid[1:].flat:
        one.set_title("")
    for one in grid[:-1].flat:
        one.set_xlabel("")
    for column in range(1, shape[1]):
        for get, put in (("get_ylim", "set_ylim"), ("get_xlim", "set_xlim")):
            ends = np.array([getattr(one, get)() for one in grid[:, column]])
            for one in grid[:, column]:
                getattr(one, put)(ends[:, 0].min(), ends[:, 1].max())
    low, high = grid[0, 1].get_ylim()
    for one in grid[:, 1]:
        one.set_ylim(low, high + 0.2 * (high - low))  # the legends stay clear of the curves of all rows
    for one in grid[:, 2:].flat:
        plain_ticks(one)
    return grid


def plot_rank_histogram(
    data: Any,
    *,
    var_names: str | Sequence[str] | None = None,
    group: str = "prior_sbc",
    num_draws: int | None = None,
    num_bins: int = 20,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    backend: str = "matplotlib",
) -> Axes:
    """Histogram of the ranks of truths among posterior draws (Talts et al. 2018), as PIT values, a line per quantity.

    Flat: calibrated. Both ends high: over-confident. A hump: under-confident. A slope: biased. Of the angle to the mean
    direction, whose PIT is one-sided, rising: over-confident, falling: under-confident.

    Args:
        data: As in `pit_values`: what `sbc` returns, PIT values or ranks.
        var_names: As in `pit_values`.
        group: As in `pit_values`.
        num_draws: As in `pit_values`.
        num_bins: Number of bins, >= 2.
        ax: Axes to draw on; a new figure without.
        figsize: Width and height of the new figure in inches.
        backend: "matplotlib"; no other is there.

    Returns:
        The axes. The band holds all bins of one calibrated quantity with probability at least 95 % (binomial,
        Bonferroni over the bins).

    Raises:
        ValueError: As `pit_values`, or for fewer than 2 bins.

    Example:
        >>> ax = plot_rank_histogram({"angle": np.arange(100)}, num_draws=99, num_bins=10)
        >>> ax.get_xlabel()
        'PIT: (rank + u) / (S + 1)'
    """
    if num_bins < 2:
        raise ValueError(f"`num_bins` must be >= 2, got {num_bins!r}")
    pits = pit_values(data, group=group, var_names=var_names, num_draws=num_draws)
    ax = new_axes(ax, figsize, backend)
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    fewest = min(len(pit) for pit in pits.values())
    tail = 0.025 / num_bins
    ends = stats.binom.ppf([tail, 1 - tail], fewest, 1 / num_bins) * num_bins / fewest
    ax.axhspan(*ends, color=GREY, alpha=0.2, linewidth=0, label="95 % band if calibrated")
    ax.axhline(1.0, color=GREY, linestyle="--", linewidth=1)
    for colour, (name, pit) in zip(cycle(CYCLE), pits.items(), strict=False):
        density = np.histogram(pit, edges)[0] * num_bins / len(pit)
        text = f"{name} ({pvalue_text(uniformity_pvalue(pit))})"
        ax.stairs(density, edges, color=colour, linewidth=1.8, label=text, baseline=None)
    ax.set(xlim=(0, 1), ylim=(0, 1.3 * max(ax.get_ylim()[1], ends[1])))
    ax.legend(fontsize=9, frameon=False, loc="upper center", ncols=2)
    label(ax, "PIT: (rank + u) / (S + 1)", "share per bin / expected", "Ranks of the truth among posterior draws")
    return ax


def plot_tarp(
    result: TARP | Mapping[str, TARP],
    *,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    backend: str = "matplotlib",
) -> Axes:
    """Expected coverage of balls around random points, against their level.

    Args:
        result: What `tarp` returns, or several by name.
        ax: Axes to draw on; a new figure without.
        figsize: Width and height of the new figure in inches.
        backend: "matplotlib"; no other is there.

    Returns:
        The axes. On the diagonal: accurate. An S that is high at the left and low at the right: over-confident; the
        other way: under-confident. All on one side: biased.

    Raises:
        ValueError: For an empty mapping.
    """
    ax = new_axes(ax, figsize, backend)
    ax.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="accurate")
    for colour, (name, one) in zip(cycle(CYCLE), named(result, "posterior").items(), strict=False):
        ax.fill_between(one.levels, one.lower, one.upper, color=colour, alpha=0.2, linewidth=0)
        text = f"{name} ({pvalue_text(one.pvalue)})"
        ax.plot(one.levels, one.expected_coverage, color=colour, linewidth=1.8, label=text)
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    ax.legend(fontsize=9, frameon=False)
    label(ax, "level of the ball around a random point", "share of truths inside", "Expected coverage (TARP)")
    return ax


def plot_reliability(
    check: PartnerCheck | Reliability | Mapping[str, PartnerCheck | Reliability],
    *,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    backend: str = "matplotlib",
) -> Axes:
    """How often the candidate called likeliest is the partner, against the probability stated for it.

    Args:
        check: What `partner_check` returns or its `reliability`, or several by name.
        ax: Axes to draw on; a new figure without.
        figsize: Width and height of the new figure in inches.
        backend: "matplotlib"; no other is there.

    Returns:
        The axes: a point per bin with its 95 % Wilson interval; steps at the bottom show how the rows share out among
        the bins. Below the diagonal: over-confident. The legend has the expected calibration error and what chance
        alone makes of it.

    Raises:
        ValueError: For an empty mapping.
    """
    ax = new_axes(ax, figsize, backend, default=(5.2, 5.0))
    ax.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="calibrated")
    for colour, (name, one) in zip(cycle(CYCLE), named(check, "model").items(), strict=False):
        curve = getattr(one, "reliability", one)
        used = curve.counts > 0
        x, y = curve.predicted[used], curve.observed[used]
        below, above = np.maximum(y - curve.lower[used], 0.0), np.maximum(curve.upper[used] - y, 0.0)
        text = f"{name}: ECE {curve.ece:.3f} (chance {curve.ece_if_calibrated:.3f})"
        ax.errorbar(x, y, yerr=[below, above], color=colour, marker="o", markersize=4.5, linewidth=1.5, elinewidth=1,
                    capsize=2, label=text)  # fmt: skip
        share = 0.2 * curve.counts / curve.counts.max()
        ax.stairs(share, curve.edges, color=colour, fill=True, alpha=0.2)
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    ax.legend(fontsize=9, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14))  # no curve ever runs there
    label(ax, "stated probability of the likeliest", "share of them right", "Prediction of the partner")
    return ax


def plot_comparison(
    comparison: Comparison,
    *,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    backend: str = "matplotlib",
) -> Axes:
    """Log scores of several methods on the same held-out pairs, as paired differences from the reference.

    Args:
        comparison: What `compare` returns.
        ax: Axes to draw on; a new figure without.
        figsize: Width and height of the new figure in inches.
        backend: "matplotlib"; no other is there.

    Returns:
        The axes: a row per method, the best on top, with the simultaneous interval of its difference; a method whose
        difference is infinite (it gave a partner no probability at all) is named at the left end.
    """
    rows = len(comparison.names)
    ax = new_axes(ax, figsize, backend, default=(6.4, 1.3 + 0.42 * rows))
    difference = np.asarray(comparison.difference, dtype=np.float64)
    ax.axvline(0.0, color=GREY, linestyle="--", linewidth=1)
    for row, name in enumerate(comparison.names):
        own = name == comparison.reference
        if not np.isfinite(difference[row]):
            ax.annotate("-∞", (0.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=11, color=BLUE)
            continue
        ends = np.array([comparison.lower[row], comparison.upper[row]])
        if not own and np.isfinite(ends).all():
            ax.plot(ends, [row, row], color=BLUE, linewidth=2.2, solid_capstyle="butt")
        ax.plot(difference[row], row, "o", color=GREY if own else BLUE, markersize=7,
                markerfacecolor="white" if own else BLUE)  # fmt: skip
    ax.set_yticks(range(rows), list(comparison.names), fontsize=10)
    ax.set_ylim(rows - 0.5, -0.5)
    right = ax.secondary_yaxis("right")
    scores = [_score(s, e) for s, e in zip(comparison.log_score, comparison.log_score_se, strict=True)]
    right.set_yticks(range(rows), scores, fontsize=10)
    right.tick_params(length=0)
    right.spines["right"].set_visible(False)
    right.set_ylabel("log score", fontsize=10)
    label(
        ax,
        f"log score minus that of {comparison.reference}, nats per pair ({100 * comparison.level:.3g} % intervals)",
        "",
        "Which method predicts the partner?",
    )
    return ax


def _score(value: float, error: float) -> str:
    return f"{value:.3f} ± {error:.3f}" if np.isfinite(error) else f"{value:.3f}"
