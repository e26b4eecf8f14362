"""What the pictures have in common: axes without pyplot, colours for all kinds of colour vision, labels, ticks.

The plots of this package fix their own colours and sizes, because a colour has a meaning in them; ArviZ's own plots
(`plots_arviz`) follow whatever style the user has set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["BLUE", "CYCLE", "GREEN", "GREY", "ORANGE", "RED", "check_backend", "images", "label",
           "named", "new_axes", "new_figure", "plain_ticks", "pvalue_text"]  # fmt: skip

# Okabe & Ito (2008), a palette for all kinds of colour vision
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#6E6E6E"
CYCLE = (BLUE, ORANGE, GREEN, RED, "#CC79A7", "#56B4E9")


def new_figure(figsize: tuple[float, float]) -> Figure:
    """Makes a figure on the Agg canvas, of which pyplot knows nothing.

    Args:
        figsize: Width and height in inches.

    Returns:
        The empty figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize, layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    return figure


def check_backend(backend: str) -> None:
    """Refuses every backend but matplotlib.

    Args:
        backend: Its name, as ArviZ spells it.

    Raises:
        ValueError: If it is another one.
    """
    if backend != "matplotlib":
        raise ValueError(
            f'`backend` must be "matplotlib" for this plot, got {backend!r}; the plots that ArviZ draws '
            "(`plots_arviz`) take ArviZ's other backends, and `sphere_html` needs none"
        )


def new_axes(
    ax: Axes | None,
    figsize: tuple[float, float] | None = None,
    backend: str = "matplotlib",
    *,
    default: tuple[float, float] = (5.2, 4.2),
) -> Axes:
    """Returns the axes to draw on, in the common style.

    Args:
        ax: Axes of the caller; None makes a new figure.
        figsize: Size of the new figure in inches; None takes `default`.
        backend: Must be "matplotlib".
        default: Size of a figure that the caller did not size.

    Returns:
        `ax`, or the axes of the new figure.

    Raises:
        ValueError: If `backend` is another one.
    """
    check_backend(backend)
    if ax is None:
        ax = new_figure(figsize or default).add_subplot()
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=10)
    return ax


def label(ax: Axes, x: str, y: str, title: str) -> None:
    """Labels both axes and sets the title.

    Args:
        ax: The axes.
        x: Label of the horizontal axis.
        y: Label of the vertical axis.
        title: Title.
    """
    ax.set_xlabel(x, fontsize=11)
    ax.set_ylabel(y, fontsize=11)
    ax.set_title(title, fontsize=12)


def named(values: Any, name: str) -> Mapping[str, Any]:
    """Returns several results by name; one alone gets `name`.

    Args:
        values: One result, or a mapping of results.
        name: What the one is called in a legend.

    Returns:
        The mapping.

    Raises:
        ValueError: If it is empty.
    """
    if not isinstance(values, Mapping):
        return {name: values}
    if not values:
        raise ValueError("at least one result is needed, got an empty mapping")
    return values


def pvalue_text(pvalue: float) -> str:
    """Writes a p-value for a legend.

    Args:
        pvalue: In [0, 1].

    Returns:
        For example "p = 0.031".
    """
    return f"p = {pvalue:.2g}" if pvalue >= 1e-6 else "p < 1e-6"


def plain_ticks(ax: Axes, which: Sequence[str] = ("x", "y")) -> None:
    """Labels a logarithmic axis by plain numbers (20, 50, 100), at decades only where it spans many of them.

    Args:
        ax: The axes; linear ones are left alone.
        which: The axes to label, of "x" and "y".
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    for axis in (getattr(ax, f"{name}axis") for name in which):
        if axis.get_scale() != "log":
            continue
        low, high = axis.get_view_interval()
        if high / low < 300:
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low > 8 else (1, 1.5, 2, 3, 4, 5, 7)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())


def images(values: np.ndarray, batch_and_pixels: int) -> np.ndarray:
    """(..., H, W) or (..., C, H, W) to (..., H, W) or (..., H, W, 3), as `imshow` reads them.

    Args:
        values: Images with C = 1 or 3.
        batch_and_pixels: Number of dimensions without the one of the channels.

    Returns:
        The same images.
    """
    if values.ndim == batch_and_pixels:
        return values
    return values[..., 0, :, :] if values.shape[-3] == 1 else np.moveaxis(values, -3, -1)
