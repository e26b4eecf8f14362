"""Pictures of credible-interval retrieval; the conventions are those of `plots` (axes in, axes out)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from pyro_contrastive.diagnostics._arrays import as_array
from pyro_contrastive.diagnostics._style import BLUE, CYCLE, GREY, ORANGE, images, label, named, new_axes
from pyro_contrastive.diagnostics.retrieval import CredibleSets
from pyro_contrastive.diagnostics.retrieval_scores import RiskCoverage

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pyro_contrastive.diagnostics.selective import SelectiveRisk

__all__ = ["plot_credible_caps", "plot_credible_sets", "plot_risk_coverage"]


def plot_credible_sets(
    sets: CredibleSets,
    concentration: ArrayLike | torch.Tensor,
    queries: ArrayLike | torch.Tensor,
    gallery: ArrayLike | torch.Tensor,
    *,
    labels: ArrayLike | torch.Tensor | None = None,
    gallery_labels: ArrayLike | torch.Tensor | None = None,
    num_queries: int = 6,
    num_items: int = 10,
    title: str = "From sure to unsure: queries and their credible sets",
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    backend: str = "matplotlib",
) -> Axes:
    """Query images from the surest to the least sure, each followed by its credible set.

    Args:
        sets: Of N queries in a gallery of M items.
        concentration: Concentration of each query, shape (N,).
        queries: Images (N, C, H, W) or (N, H, W) with values in [0, 1], C = 1 or 3.
        gallery: Images (M, C, H, W) or (M, H, W).
        labels: Label of each query, shape (N,).
        gallery_labels: Label of each item, shape (M,); with `labels`, items of another label get a frame.
        num_queries: Rows; the queries are evenly spaced in the order of their concentrations.
        num_items: Items shown at most per set, evenly spaced from the nearest to the farthest.
        title: Title of the picture.
        ax: Axes to draw on; a new figure without.
        figsize: Width and height of the new figure in inches.
        backend: "matplotlib"; no other is there.

    Returns:
        The axes.

    Raises:
        ValueError: If a length does not fit.
    """
    from matplotlib.patches import Rectangle

    kappa, query, item = as_array(concentration), images(as_array(queries), 3), images(as_array(gallery), 3)
    if kappa.shape != (len(sets),) or len(query) != len(sets) or len(item) != sets.num_items:
        raise ValueError(
            f"`concentration` and `queries` must have {len(sets)} entries and `gallery` {sets.num_items}, as `sets` "
            f"has, got shapes {kappa.shape}, {query.shape} and {item.shape}"
        )
    own, other = (None if names is None else as_array(names) for names in (labels, gallery_labels))
    chosen = _sure_to_unsure(kappa, num_queries)
    gap, before = 0.15, 0.6  # in image widths
    ax = new_axes(ax, figsize, backend, default=(2.2 + 0.55 * (num_items + 1 + before), 0.5 + 0.66 * len(chosen)))
    for row, index in enumerate(chosen):
        bottom = (len(chosen) - 1 - row) * (1 + gap)
        members = sets[index]
        shown = members[np.unique(np.linspace(0, len(members) - 1, min(num_items, len(members))).round().astype(int))]
        for column, image in enumerate([query[index], *item[shown]]):
            left = column * (1 + gap) + (before if column else 0.0)
            ax.imshow(image, extent=(left, left + 1, bottom, bottom + 1), cmap="gray", vmin=0, vmax=1, zorder=1)
            if column and own is not None and other is not None and other[shown[column - 1]] != own[index]:
                ax.add_patch(Rectangle((left, bottom), 1, 1, fill=False, edgecolor=ORANGE, linewidth=2.5, zorder=2))
        name = "" if own is None else f"\nlabel {own[index]}"
        ax.text(-0.15, bottom + 0.5, f"κ = {kappa[index]:.3g}{name}", ha="right", va="center", fontsize=10)
        right = before + (len(shown) + 1) * (1 + gap)
        text = f"{len(shown)} of {len(members)}" if len(members) > len(shown) else f"all {len(members)}"
        ax.text(right + 0.1, bottom + 0.5, text if len(members) else "empty", ha="left", va="center", fontsize=10)
    ax.set(xlim=(-1.9, (num_items + 1) * (1 + gap) + before + 1.7), ylim=(-gap, len(chosen) * (1 + gap)))
    ax.set_aspect("equal")
    ax.set_axis_off()
    ax.set_title(title, fontsize=12)
    return ax


def plot_credible_caps(
    sets: CredibleSets,
    concentration: ArrayLike | torch.Tensor,
    radius: ArrayLike | None = None,
    *,
    labels: ArrayLike | torch.Tensor | None = None,
    gallery_labels: ArrayLike | torch.Tensor | None = None,
    num_queries: int = 8,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    backend: str = "matplotlib",
) -> Axes:
    """Credible sets without images: one row per query, its items as marks at their angle to the mean direction.

    Args:
        sets: Of N queries in a gallery of M items.
        concentration: Concentration of each query, shape (N,).
        radius: Radius of each cap in radians, shape (N,), drawn as a bar (`cap_radius(1 - sets.alpha, kappa, d)`).
        labels: Label of each query, shape (N,).
        gallery_labels: Label of each item, shape (M,); with `labels`, items of another label have their own colour.
        num_queries: Rows; the queries are evenly spaced in the order of their concentrations, the surest on top.
        ax: Axes to draw on; a new figure without.
        figsize: Width and height of the new figure in inches.
        backend: "matplotlib"; no other is there.

    Returns:
        The axes.

    Raises:
        ValueError: If a length does not fit.
    """
    kappa = as_array(concentration)
    reach = None if radius is None else np.degrees(as_array(radius))
    if kappa.shape != (len(sets),) or (reach is not None and reach.shape != kappa.shape):
        raise ValueError(
            f"`concentration` and `radius` must have shape ({len(sets)},), as `sets` has, got {kappa.shape}"
            + ("" if reach is None else f" and {reach.shape}")
        )
    own, other = (None if names is None else as_array(names) for names in (labels, gallery_labels))
    chosen = _sure_to_unsure(kappa, num_queries)
    ax = new_axes(ax, figsize, backend, default=(5.6, 0.9 + 0.36 * len(chosen)))
    angle = np.degrees(np.arccos(np.clip(sets.cosines, -1.0, 1.0)))
    for row, index in enumerate(chosen):
        entries = slice(sets.indptr[index], sets.indptr[index + 1])
        if reach is not None:
            ax.barh(row, reach[index], height=0.7, color=GREY, alpha=0.25, linewidth=0, zorder=1)
        right = np.ones(len(angle[entries]), dtype=bool)
        if own is not None and other is not None:
            right = other[sets.indices[entries]] == own[index]
        for colour, kept, name in ((BLUE, right, "same label"), (ORANGE, ~right, "another label")):
            legend = name if row == 0 and own is not None else None
            x = angle[entries][kept]
            ax.plot(x, np.full(len(x), row), "|", color=colour, markersize=9, markeredgewidth=0.8, label=legend)
    ax.set_yticks(range(len(chosen)), [f"κ = {kappa[i]:.3g}, {sets.sizes[i]} items" for i in chosen])
    ax.set(ylim=(len(chosen) - 0.4, -0.6), xlim=(0, None))
    if own is not None:
        ax.legend(fontsize=10, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    label(
        ax,
        "angle to the query in degrees",
        "",
        f"Credible sets of {1 - sets.alpha:.3g} probability, from sure to unsure",
    )
    return ax


def plot_risk_coverage(
    curve: RiskCoverage | SelectiveRisk | Mapping[str, RiskCoverage | SelectiveRisk],
    *,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    backend: str = "matplotlib",
) -> Axes:
    """Error rate among the most confident queries against the share of queries kept.

    Args:
        curve: One `RiskCoverage`, or what `selective_risk` returns, which adds a pointwise band and an interval of the
            area; or several by name.
        ax: Axes to draw on; a new figure without.
        figsize: Width and height of the new figure in inches.
        backend: "matplotlib"; no other is there.

    Returns:
        The axes. A curve that rises from the left: confidence knows where the mistakes are.

    Raises:
        ValueError: For an empty mapping.
    """
    ax = new_axes(ax, figsize, backend)
    for colour, (name, one) in zip(cycle(CYCLE), named(curve, "queries").items(), strict=False):
        plain = one if isinstance(one, RiskCoverage) else one.curve
        area = f"{plain.aurc:.3f}"
        if plain is not one:
            ax.fill_between(plain.coverage, one.lower, one.upper, color=colour, alpha=0.15, linewidth=0)
            area += f", {100 * one.aurc.level:.3g} %: {one.aurc.lower:.3f} to {one.aurc.upper:.3f}"
        ax.plot(plain.coverage, plain.risk, color=colour, linewidth=1.8, label=f"{name} (area {area})")
        ax.axhline(plain.risk[-1], color=colour, linestyle="--", linewidth=1)
    ax.set(xlim=(0, 1), ylim=(0, None))
    ax.legend(fontsize=9, frameon=False)
    label(ax, "share of queries kept, the surest first", "error rate", "Does confidence know the mistakes?")
    return ax


def _sure_to_unsure(kappa: NDArray[np.float64], num: int) -> NDArray[np.int64]:
    """Indices of `num` queries, evenly spaced from the largest concentration to the smallest."""
    order = np.argsort(-kappa, kind="stable")
    return order[np.unique(np.linspace(0, len(order) - 1, min(num, len(order))).round().astype(int))]
