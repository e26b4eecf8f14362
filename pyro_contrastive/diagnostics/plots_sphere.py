"""Posterior caps on the 2-sphere, as a picture; `sphere_html` is the same as a page that turns under the mouse."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from pyro_contrastive.diagnostics._arrays import FloatArray
from pyro_contrastive.diagnostics._globe import Globe, front_region, globe
from pyro_contrastive.diagnostics._style import BLUE, GREY, RED, new_axes, plain_ticks
from pyro_contrastive.diagnostics.calibration import Family

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["cap_colours", "plot_sphere_caps"]

_FAR = np.array([1.0, 1.0, -1.0])


def plot_sphere_caps(
    mean_direction: ArrayLike | torch.Tensor,
    concentration: ArrayLike | torch.Tensor,
    *,
    level: float = 0.95,
    truth: ArrayLike | torch.Tensor | None = None,
    frame: ArrayLike | None = None,
    view: tuple[float, float] | None = None,
    family: Family = "vmf",
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    backend: str = "matplotlib",
) -> Axes:
    r"""Posteriors on a globe seen from far away: mean directions and credible caps, coloured by concentration.

    For d = 3 the caps are exact; what lies on the far side is dashed and pale. For d = 2 the picture is a circle with
    one arc per posterior. For d > 3 no picture shows a cap: drawn are the mean directions projected on three axes
    (inside the ball, the nearer to the rim the more of them is seen), each with the region that the two shown
    coordinates of its latent occupy. The title then says which axes, and which share of the squared length of the mean
    directions they show. Those regions treat the projected law as normal: at level 95 % they hold 93 to 97 % (d = 4 to
    64, concentrations from d to 20 d).

    Args:
        mean_direction: Unit vectors, shape (N, d), d >= 2. More than about 50 hide each other.
        concentration: Concentrations, >= 0, shape (N,); infinite ones are points.
        level: Probability of each cap, in (0, 1).
        truth: True latent points, shape (N, d), in the posterior's frame (see `procrustes`): crosses, red where the
            cap (the exact one in d dimensions) misses them.
        frame: Orthonormal columns (d, 3), the axes of the picture: right, up, towards the viewer. None: as seen from
            `view`; for d > 3 the principal axes of the mean directions.
        view: Elevation and azimuth of the viewer in degrees, for d = 3; give it where pictures are to be compared.
            None: above the mean of the mean directions.
        family: "vmf" or, for d <= 3, "power_spherical"; as in `cap_radius`.
        ax: Axes to draw on; a new figure without.
        figsize: Width and height of the new figure in inches.
        backend: "matplotlib"; no other is there.

    Returns:
        The axes.

    Raises:
        ValueError: If a shape or a value is out of range.

    Example:
        >>> ax = plot_sphere_caps([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [50.0, 5.0], truth=[[0.0, 0.0, 1.0]] * 2)
        >>> ax.get_title()
        '95 % credible caps of 2 posteriors'
    """
    content = globe(mean_direction, concentration, level=level, truth=truth, frame=frame, view=view, family=family)
    ax = new_axes(ax, figsize, backend, default=(5.4, 4.6))
    colours, mappable = cap_colours(content.concentration)
    (_draw_arcs if content.dim == 2 else _draw_globe)(ax, content, colours)
    if content.truth is not None and content.inside is not None:
        _draw_truth(ax, content, content.truth, content.inside)
    if mappable is not None:
        bar = ax.figure.colorbar(mappable, ax=ax, shrink=0.7, pad=0.02)
        bar.set_label("concentration κ", fontsize=10)
        plain_ticks(bar.ax, ("y",))
    ax.set_aspect("equal")
    ax.set_axis_off()
    ax.set_title(content.caption, fontsize=12 if content.dim <= 3 else 11)
    return ax


def cap_colours(concentration: FloatArray) -> tuple[NDArray[Any], Any]:
    """Colours by the logarithm of the concentration.

    Args:
        concentration: Concentrations, >= 0, shape (N,).

    Returns:
        RGBA colours (N, 4) and what a colour bar needs; one colour and None where the concentrations are all the same.
    """
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm, to_rgba

    usable = concentration[np.isfinite(concentration) & (concentration > 0)]
    if not len(usable) or usable.max() < 1.001 * usable.min():
        return np.tile(to_rgba(BLUE), (len(concentration), 1)), None
    mappable = ScalarMappable(LogNorm(usable.min(), usable.max()), matplotlib.colormaps["viridis_r"])
    return mappable.to_rgba(np.clip(concentration, usable.min(), usable.max())), mappable


def _draw_globe(ax: Axes, content: Globe, colours: NDArray[Any]) -> None:
    from matplotlib.patches import Circle

    ax.add_patch(Circle((0.0, 0.0), 1.0, facecolor="#F4F4F4", edgecolor=GREY, linewidth=1.0, zorder=0))
    if content.dim == 3:
        _draw_graticule(ax, content.frame)
    for index in np.argsort(-content.radius, kind="stable"):  # the small ones on top
        point, colour = content.points[index], colours[index]
        near = point[2] >= 0
        if content.dim == 3 and content.radius[index] > 0:
            _fill(ax, front_region(point * _FAR, content.radius[index]), colour, near=False)
            _fill(ax, front_region(point, content.radius[index]), colour, near=True)
        elif content.dim > 3:
            _fill(ax, [_ellipse(point[:2], content.ellipse[index])], colour, near=bool(near))
        ax.plot(*point[:2], "o", markersize=4, color=colour, markerfacecolor=colour if near else "white", zorder=4)
    names = ("right", "up") if content.dim > 3 else ()
    for axis, name in enumerate(names):
        text = f"axis {axis + 1}"
        end = (1.03, 0.0) if name == "right" else (0.0, 1.03)
        ax.text(*end, text, fontsize=9, color=GREY, ha="left" if axis == 0 else "center",
                va="center" if axis == 0 else "bottom")  # fmt: skip
    ax.set(xlim=(-1.08, 1.08 if content.dim == 3 else 1.25), ylim=(-1.08, 1.08 if content.dim == 3 else 1.15))


def _draw_graticule(ax: Axes, frame: FloatArray) -> None:
    """Meridians and parallels every 30 degrees on the near side, and the ends of the axes."""
    t = np.radians(np.arange(0.0, 361.0, 3.0))
    lines = [np.stack([np.cos(t) * np.cos(b), np.sin(t) * np.cos(b), np.full_like(t, np.sin(b))], axis=1)
             for b in np.radians([-60, -30, 0, 30, 60])]  # fmt: skip
    lines += [np.stack([np.cos(t) * np.cos(a), np.cos(t) * np.sin(a), np.sin(t)], axis=1)
              for a in np.radians(np.arange(0, 180, 30))]  # fmt: skip
    for line in lines:
        shown = line @ frame
        shown[shown[:, 2] < 0] = np.nan
        ax.plot(shown[:, 0], shown[:, 1], color="white", linewidth=0.9, zorder=0.5)
    for axis, (x, y, depth) in enumerate(frame):
        if depth >= -1e-9:
            ax.text(1.03 * x, 1.03 * y, f"$e_{axis + 1}$", fontsize=9, color=GREY, ha="center", va="center", zorder=0.6)


def _ellipse(point: FloatArray, shape: FloatArray) -> FloatArray:
    """Outline (K, 2) of the region of an item, see the text of `_globe`; what would leave the disc is cut off there."""
    centre, across, along = shape
    t = np.linspace(0.0, 2.0 * np.pi, 97)
    square = np.outer(point, point)
    values, vectors = np.linalg.eigh(across * (np.eye(2) - square) + along * square)
    circle = np.stack([np.cos(t), np.sin(t)], axis=1)
    outline = centre * point + circle * np.sqrt(np.maximum(values, 0.0)) @ vectors.T
    return outline / np.maximum(np.linalg.norm(outline, axis=1, keepdims=True), 1.0)


def _fill(ax: Axes, outlines: list[FloatArray], colour: NDArray[Any], *, near: bool) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    if not outlines:
        return
    # a hole is an outline that runs the other way: matplotlib fills by the winding number
    paths = [Path(_turning(outline, 1.0 if k == 0 else -1.0), closed=False) for k, outline in enumerate(outlines)]
    line = {"linewidth": 1.2, "linestyle": "-"} if near else {"linewidth": 0.7, "linestyle": (0, (3, 3))}
    face, edge = (*colour[:3], 0.3 if near else 0.08), (*colour[:3], 1.0 if near else 0.55)
    shape = Path.make_compound_path(*paths)
    ax.add_patch(PathPatch(shape, facecolor=face, edgecolor=edge, zorder=3 if near else 1, **line))


def _turning(outline: FloatArray, sense: float) -> FloatArray:
    x, y = outline.T
    area = np.sum(x[:-1] * y[1:] - x[1:] * y[:-1])
    return outline if area * sense >= 0 else outline[::-1]


def _rings(content: Globe) -> FloatArray:
    """d = 2: the radius at which each posterior is drawn, so that the arcs do not hide each other."""
    count = len(content.points)
    return 1.0 + min(0.06, 0.8 / count) * np.arange(1.0, count + 1.0)


def _draw_arcs(ax: Axes, content: Globe, colours: NDArray[Any]) -> None:
    t = np.linspace(0.0, 2.0 * np.pi, 181)
    ax.plot(np.cos(t), np.sin(t), color=GREY, linewidth=1.0, zorder=0)
    for (x, y), radius, colour, ring in zip(content.points, content.radius, colours, _rings(content), strict=True):
        arc = np.arctan2(y, x) + radius * np.linspace(-1.0, 1.0, 91)
        ax.plot(ring * np.cos(arc), ring * np.sin(arc), color=colour, linewidth=2.2, solid_capstyle="butt")
        ax.plot(ring * x, ring * y, "o", markersize=5, color=colour, zorder=4)
    reach = 0.06 + _rings(content)[-1]
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach))


def _draw_truth(ax: Axes, content: Globe, truth: FloatArray, inside: NDArray[Any]) -> None:
    from matplotlib.lines import Line2D

    if content.dim == 2:
        truth = truth * _rings(content)[:, None]
    near = truth[:, 2] >= 0 if content.dim > 2 else np.ones(len(truth), dtype=bool)
    for colour, held in (("black", inside), (RED, ~inside)):
        for side, alpha in ((near, 1.0), (~near, 0.45)):
            ax.plot(*truth[held & side][:, :2].T, "x", color=colour, alpha=alpha, markersize=6, zorder=5,
                    markeredgewidth=1.2 if colour == "black" else 2.0)  # fmt: skip
    style: dict[str, Any] = {"marker": "x", "linestyle": ""}
    marks = [
        Line2D([], [], color="black", label=f"truth in its cap: {inside.sum()}", **style),
        Line2D([], [], color=RED, markeredgewidth=2.0, label=f"outside: {(~inside).sum()}", **style),
    ]
    ax.legend(handles=marks, fontsize=10, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0.01), ncols=2)
