r"""How far held-out pairs determine the level of the concentrations, and how far that level was an assumption.

The evidence of a pair sees the widths of both posteriors and of the pair kernel through products of
:math:`a_n(\kappa) = I_{d/2-1+n}(\kappa) / I_{d/2-1}(\kappa) \approx e^{-n(n+d-2)/(2\kappa)}`, so to leading order
through :math:`1/\kappa_1 + 1/\kappa_2 + 1/\kappa_{pos}` alone. The diagnostic walks along the direction in which that
sum stays put and shows what the evidence makes of it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from pyro_contrastive.diagnostics._arrays import FloatArray
from pyro_contrastive.diagnostics._style import BLUE, GREY, ORANGE, label, new_axes
from pyro_contrastive.distributions import VonMisesFisher
from pyro_contrastive.factors import infonce_log_ratio
from pyro_contrastive.kernels import expected_log_ratio
from pyro_contrastive.ops.bessel import bessel_ratio, inverse_bessel_ratio
from pyro_contrastive.ops.matching import matching_log_ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Identifiability", "identifiability", "plot_identifiability"]

_CEILING = 1e4  # concentrations that the flat direction would send to infinity stop here
_SMALL_SHARE = 0.05


@dataclass(frozen=True)
class Identifiability:
    """Held-out evidence against the assumed pair concentration; see :func:`identifiability`.

    Evidences are nats per pair, relative to the fitted model: positive is better than fitted.

    Attributes:
        pair_concentration: The values tried, increasing, shape (G,); the last may be infinite.
        fitted: Index of the fitted model's own value.
        compensated: Evidence with all item widths moved along the flat direction, shape (G,).
        compensated_error: Standard error of it over pairs, shape (G,).
        alone: Evidence with the item widths left as fitted, shape (G,).
        alone_error: Standard error of it, shape (G,).
        level: Median concentration of the items along the flat direction, shape (G,).
        at_limit: Share of items that no finite concentration could have kept on the flat direction, shape (G,).
        posterior_share: Part of the spread of a pair that the model attributes to the posteriors, the mean of
            (1/k1 + 1/k2) / (1/k1 + 1/k2 + 1/kappa_pos), in [0, 1].
    """

    pair_concentration: FloatArray
    fitted: int
    compensated: FloatArray
    compensated_error: FloatArray
    alone: FloatArray
    alone_error: FloatArray
    level: FloatArray
    at_limit: FloatArray
    posterior_share: float

    @property
    def plausible(self) -> tuple[float, float]:
        """Smallest and largest pair concentration within two standard errors of the fitted evidence, widths moved."""
        inside = self.pair_concentration[self.compensated + 2 * self.compensated_error >= 0]
        return float(inside.min()), float(inside.max())

    @property
    def too_small(self) -> bool:
        """Whether the pair concentration looks too small for the data: it explains nearly all spread of the pairs."""
        return self.posterior_share < _SMALL_SHARE

    def summary(self) -> str:
        """What this means, in words.

        Returns:
            A few sentences.
        """
        low, high = self.plausible
        ends = [int(np.flatnonzero(self.pair_concentration == value)[0]) for value in (low, high)]
        levels = sorted(float(self.level[end]) for end in ends)
        text = (
            f"Fitted with kappa_pos = {self.pair_concentration[self.fitted]:.4g}, median concentration "
            f"{self.level[self.fitted]:.3g}. On held-out pairs every kappa_pos tried from {low:.4g} to {high:.4g} does "
            f"as well within two standard errors, once the concentrations move along: their median is then "
            f"{levels[0]:.3g} to {levels[1]:.3g}. "
        )
        if levels[1] > 1.25 * levels[0]:
            text += "The order of the concentrations comes from the data, their level from the assumed kappa_pos."
        else:
            text += "Here the pairs determine the level of the concentrations as well."
        if self.too_small:
            text += (
                f" Only {self.posterior_share:.1%} of the spread of the pairs is left for the posteriors: kappa_pos is "
                "probably too small for these data, and the concentrations ran towards infinity. Try a larger one, or "
                "math.inf (the views share one latent)."
            )
        return text


@torch.no_grad()
def identifiability(
    posterior1: VonMisesFisher,
    posterior2: VonMisesFisher,
    pair_concentration: float | Tensor,
    *,
    grid: Sequence[float] | None = None,
    batch_size: int = 256,
    marginal: Literal["uniform", "empirical"] = "uniform",
) -> Identifiability:
    r"""Profile of the held-out evidence over the pair concentration, without refitting.

    For each value on the grid, the concentration of every item is moved so that the expected cosine between the latents
    of the two views stays what it was,

    .. math::  A_d(\kappa') = A_d(\kappa) \sqrt{A_d(\kappa_{pos}) / A_d(\kappa'_{pos})},

    which for large concentrations is :math:`1/\kappa \to 1/\kappa + \delta` with the same :math:`\delta` for all items.
    The profile is that of the exact evidence; the moment-matched one depends on nothing else than that product and its
    profile is exactly flat.

    Args:
        posterior1: Fitted posteriors of the first views of held-out pairs, batch shape ``(N,)``.
        posterior2: Of the second views.
        pair_concentration: The kappa_pos they were fitted with, > 0; ``math.inf`` for views that share a latent.
        grid: Pair concentrations to try, > 0. None: eleven from 1/4 to 8 times the fitted one (of the median
            concentration, where that is infinite), and infinity.
        batch_size: Pairs that are compared with each other, >= 3; what is left over is not used.
        marginal: Likelihood of a batch, as the model was fitted; see :mod:`pyro_contrastive.ops.matching`.

    Returns:
        The profile, with :meth:`Identifiability.summary` and :func:`plot_identifiability`.

    Raises:
        TypeError: For posteriors of another family.
        ValueError: If the posteriors do not belong together, are fewer than two batches, or a concentration is not
            positive.

    Example:
        >>> from pyro_contrastive.data import SphereWorld
        >>> world = SphereWorld(dim=3)
        >>> pairs = world.sample(512, seed=0)
        >>> result = identifiability(world.posterior(pairs, 1), world.posterior(pairs, 2), 20.0, grid=[10.0, math.inf])
        >>> result.pair_concentration
        array([10., 20., inf])
    """
    for law in (posterior1, posterior2):
        if not isinstance(law, VonMisesFisher):
            raise TypeError(f"the profile needs VonMisesFisher posteriors, got {type(law).__name__}")
    if posterior1.batch_shape != posterior2.batch_shape or len(posterior1.batch_shape) != 1:
        raise ValueError(
            f"both posteriors need one batch shape (N,), got {tuple(posterior1.batch_shape)} and "
            f"{tuple(posterior2.batch_shape)}"
        )
    if marginal not in ("uniform", "empirical"):
        raise ValueError(f"`marginal` must be 'uniform' or 'empirical', got {marginal!r}")
    batches = len(posterior1.mean_direction) // batch_size if batch_size >= 3 else 0
    if batches < 1 or batches * batch_size < 32:
        raise ValueError(
            f"the profile needs at least 32 pairs in whole batches of `batch_size` >= 3, got "
            f"{len(posterior1.mean_direction)} pairs and batch_size={batch_size!r}"
        )
    own = float(pair_concentration)
    laws = [
        (law.mean_direction[: batches * batch_size].double(), law.concentration[: batches * batch_size].double())
        for law in (posterior1, posterior2)
    ]
    kappas = torch.cat([kappa for _, kappa in laws])
    dim = posterior1.event_shape[0]
    if grid is None:
        centre = own if math.isfinite(own) else float(kappas.median())
        grid = [*(centre * 2.0 ** (0.5 * k) for k in range(-4, 7)), math.inf]
    values = np.unique(np.array([*grid, own], dtype=np.float64))
    if not values[0] > 0 or np.isnan(values[-1]):
        raise ValueError(f"pair concentrations must be > 0, got grid={list(grid)!r} and {pair_concentration!r}")

    def resultant(kappa: float) -> Tensor:
        return bessel_ratio(dim, kappas.new_tensor(kappa)) if math.isfinite(kappa) else kappas.new_ones(())

    def evidence(concentrations: list[Tensor], kappa: float) -> Tensor:
        items = []
        for start in range(0, batches * batch_size, batch_size):
            part = slice(start, start + batch_size)
            q1, q2 = (VonMisesFisher(mean[part], k[part]) for (mean, _), k in zip(laws, concentrations, strict=True))
            log_f = expected_log_ratio(q1, q2, kappa)
            items.append(
                matching_log_ratio(log_f) if marginal == "empirical" else infonce_log_ratio(log_f, symmetric=True)
            )
        return torch.cat(items)

    ceiling = resultant(_CEILING)
    fixed = [kappa for _, kappa in laws]
    reference = evidence(fixed, own)
    columns: dict[str, list[float]] = defaultdict(list)
    for value in values:
        factor = (resultant(own) / resultant(value)).sqrt()
        lengths = [bessel_ratio(dim, kappa) * factor for kappa in fixed]
        moved = [
            kappa if value == own else inverse_bessel_ratio(dim, length.clamp_max(ceiling))
            for kappa, length in zip(fixed, lengths, strict=True)
        ]
        for name, concentrations in (("compensated", moved), ("alone", fixed)):
            difference = evidence(concentrations, value) - reference
            columns[name].append(float(difference.mean()))
            columns[f"{name}_error"].append(float(difference.std() / math.sqrt(len(difference))))
        columns["level"].append(float(torch.cat(moved).median()))
        columns["at_limit"].append(float((torch.cat(lengths) > ceiling).double().mean()))
    spread = 1 / fixed[0] + 1 / fixed[1]
    return Identifiability(
        pair_concentration=values,
        fitted=int(np.flatnonzero(values == own)[0]),
        posterior_share=float((spread / (spread + 1 / own)).mean()),
        **{name: np.array(column) for name, column in columns.items()},
    )


def plot_identifiability(
    result: Identifiability,
    *,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    backend: str = "matplotlib",
) -> Axes:
    r"""Held-out evidence against the width of the pair kernel, with the item widths moved along and kept.

    Args:
        result: From :func:`identifiability`.
        ax: Axes to draw on; a new figure without.
        figsize: Width and height of the new figure in inches.
        backend: "matplotlib"; no other is there.

    Returns:
        The axes. The horizontal axis is 1/kappa_pos, so that infinity has a place on it. Where the curve of the moved
        widths stays within its band of two standard errors around zero, the level of the concentrations is an
        assumption.
    """
    ax = new_axes(ax, figsize, backend)
    x = 1 / result.pair_concentration
    for name, colour, value, error in (
        ("item widths kept", ORANGE, result.alone, result.alone_error),
        ("item widths moved along", BLUE, result.compensated, result.compensated_error),
    ):
        ax.fill_between(x, value - 2 * error, value + 2 * error, color=colour, alpha=0.2, linewidth=0)
        ax.plot(x, value, color=colour, marker="o", markersize=4, linewidth=1.8, label=name)
    ax.axhline(0.0, color=GREY, linestyle="--", linewidth=1)
    ax.axvline(x[result.fitted], color=GREY, linestyle=":", linewidth=1.2, label="as fitted")
    lowest = min(float(result.compensated.min()), 0.0)
    ax.set_ylim(min(3 * lowest, -0.3), max(0.1, 1.3 * float(max(result.compensated.max(), result.alone.max()))))
    ax.legend(fontsize=10, frameon=False)
    label(
        ax,
        "1 / κ_pos  (0: one shared latent)",
        "held-out evidence, nats per pair",
        "What the pairs say about the level",
    )
    return ax
