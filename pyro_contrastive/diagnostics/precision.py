"""The precisions of an anisotropic kernel: against the truth where there is one, and what they say about axes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from pyro_contrastive.diagnostics._arrays import FloatArray, as_array
from pyro_contrastive.diagnostics._style import CYCLE, GREY, label, named, new_axes
from pyro_contrastive.diagnostics.checks import Check
from pyro_contrastive.diagnostics.recovery import AxisRecovery

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PrecisionRecovery", "judge_precision", "plot_precision", "precision_recovery"]

_SILENT = 0.05  # nats per pair: below, an axis says nothing


@dataclass(frozen=True, eq=False)
class PrecisionRecovery:
    """How far learned precisions are from the true ones.

    A correlation would hide a wrong scale, and is near 1 for fits that have lost an axis; hence relative errors.

    Attributes:
        relative_error: Mean over the true axes of |learned / true - 1|, each true axis with the learned one that
            stands for it.
        sorted_error: The same with both sides sorted: blind to which axis is which, right inside blocks of equal
            precision.
        matched: The learned precision of each true axis, shape (d,).
        truth: The true ones, shape (d,).
    """

    relative_error: float
    sorted_error: float
    matched: FloatArray
    truth: FloatArray


def precision_recovery(
    estimated: ArrayLike | torch.Tensor, truth: ArrayLike | torch.Tensor, axes: AxisRecovery | ArrayLike | None = None
) -> PrecisionRecovery:
    """Distance of learned precisions from the true ones.

    Args:
        estimated: Learned precisions, shape (m,), e.g. ``model.precision``.
        truth: True ones, shape (d,), not 0; in the same convention (those of the AnInfoNCE authors' code are twice the
            paper's).
        axes: Which learned axis stands for which true one: the result of :func:`mcc`, or indices of shape (d,). None:
            the learned axes are in the order of the true ones (an oracle encoder).

    Returns:
        The errors. `sorted_error` is NaN where there are more learned axes than true ones.

    Raises:
        ValueError: If shapes do not fit, a value is not finite, or a true one is 0.

    Example:
        >>> found = precision_recovery([9.0, 4.4], [4.0, 10.0], axes=[1, 0])
        >>> round(found.relative_error, 6), found.matched.tolist()
        (0.1, [4.4, 9.0])
    """
    learned, true = (as_array(values).astype(np.float64) for values in (estimated, truth))
    if learned.ndim != 1 or true.ndim != 1 or len(learned) < len(true) or not len(true):
        raise ValueError(
            f"`estimated` and `truth` must be (m,) and (d,) with m >= d >= 1, got {learned.shape} and {true.shape}"
        )
    if not (np.isfinite(learned).all() and np.isfinite(true).all() and np.all(true != 0)):
        raise ValueError(f"precisions must be finite and true ones not 0, got {learned.tolist()} and {true.tolist()}")
    chosen: NDArray[np.int64] = np.asarray(
        np.arange(len(true)) if axes is None else axes.assignment if isinstance(axes, AxisRecovery) else axes
    )
    if chosen.shape != true.shape or not np.isin(chosen, np.arange(len(learned))).all():
        raise ValueError(
            f"`axes` must be {len(true)} indices of the {len(learned)} learned axes, got {chosen.tolist()}"
        )
    matched = learned[chosen]
    both = len(learned) == len(true)
    by_size = np.abs(np.sort(learned) / np.sort(true) - 1).mean() if both else np.nan
    return PrecisionRecovery(float(np.abs(matched / true - 1).mean()), float(by_size), matched, true)


def judge_precision(precision: ArrayLike | torch.Tensor) -> Check:
    """Opinion on learned precisions without a truth: axes about which the pairs say nothing.

    An axis adds 2 Lambda_j / d nats to the mean log kernel of chance pairs against that of a perfect one. Warns below
    .05 nats, and for negative precisions (a kernel with ``signed=True``).

    Args:
        precision: Learned precisions, shape (d,).

    Returns:
        The check.

    Raises:
        ValueError: If they are no vector of two or more finite numbers.

    Example:
        >>> judge_precision([12.0, 3.0, 0.004, 5.0]).value
        'axis 2: 0.004'
    """
    values = as_array(precision).astype(np.float64)
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(f"`precision` must be (d,), finite, with d >= 2, got {values.tolist()}")
    silent = np.flatnonzero(2 * values / len(values) < _SILENT)
    if not len(silent):
        return Check(
            "Precisions", "pass", f"{values.min():.3g} to {values.max():.3g}", "Every axis is shared by the views."
        )
    found = ", ".join(f"axis {j}: {values[j]:.3g}" for j in silent)
    return Check(
        "Precisions",
        "warn",
        found,
        "Along these axes partners are no closer than what they are contrasted with, so nothing holds them in place.",
        "With hard negatives: choose ones whose precision is below the partners' (`signed=True` shows by how much it "
        "is above). Otherwise a smaller `dim`, or partners that keep more.",
    )


def plot_precision(
    recovery: PrecisionRecovery | Mapping[str, PrecisionRecovery],
    *,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    backend: str = "matplotlib",
) -> Axes:
    """Learned against true precisions, one point per axis.

    Args:
        recovery: From :func:`precision_recovery`, or several by name.
        ax: Axes to draw on; a new figure without.
        figsize: Width and height of the new figure in inches.
        backend: "matplotlib"; no other is there.

    Returns:
        The axes. On the diagonal: recovered, on the absolute scale.
    """
    ax = new_axes(ax, figsize, backend)
    results = named(recovery, "learned")
    largest = 1.08 * max(max(r.truth.max(), r.matched.max()) for r in results.values())
    smallest = min(0.0, 1.08 * min(min(r.truth.min(), r.matched.min()) for r in results.values()))
    ax.plot([smallest, largest], [smallest, largest], color=GREY, linestyle="--", linewidth=1, label="recovered")
    for colour, marker, (name, one) in zip(cycle(CYCLE), cycle("os^Dv"), results.items(), strict=False):
        text = f"{name} ({one.relative_error:.0%} off)"
        ax.plot(one.truth, one.matched, marker, color=colour, markersize=7, alpha=0.85, label=text)
    ax.set(xlim=(smallest, largest), ylim=(smallest, largest), aspect="equal")
    ax.legend(fontsize=10, frameon=False)
    label(ax, "true precision of the axis", "learned precision", "Precisions")
    return ax
