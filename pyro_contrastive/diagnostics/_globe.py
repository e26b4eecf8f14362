r"""Geometry of credible caps in an orthographic picture, for the static and the interactive plot alike.

A posterior with mean direction :math:`\mu` and projection :math:`p = F^\top\mu` on a 3-frame F is shown by an ellipse
with centre :math:`c\,p_2` and matrix :math:`a (I - p_2 p_2^\top) + b\,p_2 p_2^\top`, where :math:`p_2` holds the two
coordinates of the picture, rotated as one likes.

* d = 3: :math:`c = \cos r,\ a = \sin^2 r,\ b = 0`, exactly the boundary circle of the cap of radius r.
* d > 3: the cap itself would cover most of any picture, since nearly all its width is in the axes not shown. Drawn is
  the region of the *two shown coordinates*: mean and covariance of the projected law (:math:`c = A_d(\kappa)`,
  :math:`a = s A_d/\kappa`, :math:`b = s (1 - A_d^2 - (d-1) A_d / \kappa)`; Mardia & Jupp 2000, section 9.3.2) with s
  the level's quantile of chi-square with two degrees of freedom, as if the projection were normal.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import stats

from pyro_contrastive.diagnostics._arrays import FloatArray, as_array, geodesic_angle, unit_vectors
from pyro_contrastive.diagnostics.calibration import Family, cap_radius
from pyro_contrastive.ops import bessel_ratio

__all__ = ["Globe", "front_region", "globe", "view_frame"]


@dataclass(frozen=True, eq=False)
class Globe:
    """What a picture of N posteriors needs.

    Attributes:
        dim: Dimension d of the space.
        points: Mean directions in the 3-frame (right, up, towards the viewer), shape (N, 3), inside the unit ball; for
            d = 2 shape (N, 2).
        concentration: Concentrations, shape (N,).
        radius: Radii of the credible caps in radians, shape (N,).
        ellipse: (c, a, b) of each region, shape (N, 3); see the module's text.
        frame: Matrix (d, 3) of the axes shown; (d, 2) for d = 2.
        share: Share of the squared length of the mean directions that the axes show, in [0, 1].
        truth: True points in the frame, shape (N, 3) or (N, 2), or None.
        inside: Whether each true point lies in its cap, booleans (N,), or None.
        level: Probability of the regions.
        principal: Whether the axes are the principal axes of the mean directions.
    """

    dim: int
    points: FloatArray
    concentration: FloatArray
    radius: FloatArray
    ellipse: FloatArray
    frame: FloatArray
    share: float
    truth: FloatArray | None
    inside: np.ndarray | None
    level: float
    principal: bool

    @property
    def caption(self) -> str:
        """What is drawn, in words, and for d > 3 how much of it the axes show."""
        count = f"{len(self.points)} posterior" + ("s" if len(self.points) > 1 else "")
        if self.dim <= 3:
            return f"{100 * self.level:.3g} % credible caps of {count}"
        axes = "principal axes 1 to 3" if self.principal else "3 chosen axes"
        return (
            f"{100 * self.level:.3g} % regions of {count}, {axes} of {self.dim}\n"
            f"({100 * self.share:.0f} % of the squared length of the mean directions)"
        )


def view_frame(elevation: float, azimuth: float) -> FloatArray:
    """Axes of the picture for a viewer of the 2-sphere, as matplotlib's 3-d axes name the angles.

    Args:
        elevation: Degrees above the plane of the first two axes.
        azimuth: Degrees from the first axis towards the second.

    Returns:
        Orthogonal matrix (3, 3) with the columns right, up, towards the viewer.

    Example:
        >>> view_frame(0.0, 0.0).round(6).T.tolist()  # from the first axis: the second is right, the third up
        [[-0.0, 1.0, 0.0], [-0.0, -0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    e, a = np.radians(elevation), np.radians(azimuth)
    right = np.array([-np.sin(a), np.cos(a), 0.0])
    up = np.array([-np.sin(e) * np.cos(a), -np.sin(e) * np.sin(a), np.cos(e)])
    return np.stack([right, up, np.cross(right, up)], axis=1)


def globe(
    mean_direction: ArrayLike | torch.Tensor,
    concentration: ArrayLike | torch.Tensor,
    *,
    level: float = 0.95,
    truth: ArrayLike | torch.Tensor | None = None,
    frame: ArrayLike | None = None,
    view: tuple[float, float] | None = None,
    family: Family = "vmf",
) -> Globe:
    """Checks the input of the plots of caps, and computes what they draw.

    Args:
        mean_direction: Unit vectors, shape (N, d), d >= 2.
        concentration: Concentrations, >= 0, shape (N,); infinite ones are points.
        level: Probability of each cap, in (0, 1).
        truth: True latent points, shape (N, d).
        frame: Orthonormal columns (d, 3): right, up, towards the viewer. None: see `view`; for d > 3 the principal
            axes of the mean directions.
        view: Elevation and azimuth of the viewer in degrees, for d = 3. None: from above the mean of the directions.
        family: As in `cap_radius`.

    Returns:
        The picture's content.

    Raises:
        ValueError: If a shape or a value is out of range.
    """
    mean = unit_vectors(mean_direction, "mean_direction")
    kappa = as_array(concentration).astype(np.float64)
    if mean.ndim != 2 or not len(mean) or kappa.shape != mean.shape[:1]:
        raise ValueError(
            "`mean_direction` must be (N, d) and `concentration` (N,) with N >= 1, got shapes "
            f"{mean.shape} and {kappa.shape}"
        )
    if not 0 < level < 1:
        raise ValueError(f"`level` must lie in (0, 1), got {level!r}")
    dim = mean.shape[1]
    radius = cap_radius(level, kappa, dim, family=family)
    axes, principal = _axes_shown(mean, frame, view)
    points = mean @ axes
    inside = placed = None
    if truth is not None:
        true = unit_vectors(truth, "truth")
        if true.shape != mean.shape:
            raise ValueError(f"`truth` must have shape {mean.shape} as `mean_direction` has, got {true.shape}")
        inside, placed = geodesic_angle(true, mean) <= radius, true @ axes
    if dim <= 3:
        ellipse = np.stack([np.cos(radius), np.sin(radius) ** 2, np.zeros_like(radius)], axis=1)
    elif family != "vmf":
        raise ValueError(f'for d > 3 the regions are those of family "vmf", got {family!r} and d = {dim}')
    else:
        finite = np.where(np.isinf(kappa), 1.0, kappa)
        ratio = bessel_ratio(dim, torch.from_numpy(finite)).numpy()
        across = np.where(finite > 0, ratio / np.where(finite > 0, finite, 1.0), 1.0 / dim)
        along = np.maximum(1.0 - ratio**2 - (dim - 1) * across, 0.0)
        ellipse = np.stack([ratio, *(stats.chi2.ppf(level, 2) * np.stack([across, along]))], axis=1)
        ellipse[np.isinf(kappa)] = (1.0, 0.0, 0.0)
    share = float((points**2).sum(axis=1).mean())
    return Globe(dim, points, kappa, radius, ellipse, axes, share, placed, inside, level, principal)


def _axes_shown(mean: FloatArray, frame: ArrayLike | None, view: tuple[float, float] | None) -> tuple[FloatArray, bool]:
    """Matrix (d, 3) of right, up, towards the viewer, and whether it holds the principal axes."""
    dim = mean.shape[1]
    if frame is not None:
        axes = np.asarray(frame, dtype=np.float64)
        if dim == 2 or axes.shape != (dim, 3) or not np.allclose(axes.T @ axes, np.eye(3), atol=1e-6):
            raise ValueError(
                f"`frame` must hold 3 orthonormal columns of length d = {dim} >= 3, got shape {axes.shape}; "
                "numpy.linalg.qr makes columns orthonormal"
            )
        return axes, False
    if view is not None and dim != 3:
        raise ValueError(f"`view` is for d = 3, got d = {dim}; choose axes by `frame`")
    if dim == 2:
        return np.eye(2), False
    if dim == 3:
        if view is None:
            x, y, z = mean.mean(axis=0)
            view = (float(np.degrees(np.arctan2(z, np.hypot(x, y)))), float(np.degrees(np.arctan2(y, x))))
        return view_frame(*view), False
    _, vectors = np.linalg.eigh(mean.T @ mean)
    axes = vectors[:, ::-1][:, :3]
    return axes * np.where((mean @ axes).mean(axis=0) < 0, -1.0, 1.0), True  # the sign of an eigenvector means nothing


def front_region(point: FloatArray, radius: float, *, num: int = 60) -> list[FloatArray]:
    """Outlines in the picture of the part of a cap of the 2-sphere that lies on the viewer's side.

    Args:
        point: Centre of the cap in the frame of the picture, unit vector (3,). For the far side, negate its third
            entry.
        radius: Radius in radians, in (0, pi).
        num: Points per outline.

    Returns:
        No, one or two closed polygons (K, 2), to be filled by the even-odd rule.
    """
    x, y, depth = point
    c, s, q = np.cos(radius), np.sin(radius), np.hypot(x, y)
    full = np.linspace(0.0, 2.0 * np.pi, num)
    disc = np.stack([np.cos(full), np.sin(full)], axis=1)
    # e1 is the tangent towards the viewer, so that depth along the boundary is c depth + s q cos t
    e1 = np.array([-x * depth / q, -y * depth / q, q]) if q > 1e-12 else np.array([1.0, 0.0, 0.0])
    e2 = np.cross(point, e1)
    crosses = q > abs(c)
    t = np.linspace(-1.0, 1.0, num) * np.arccos(np.clip(-c * depth / (s * q), -1.0, 1.0)) if crosses else full
    boundary = (c * point + s * (np.cos(t)[:, None] * e1 + np.sin(t)[:, None] * e2))[:, :2]
    if not crosses:
        if c * depth > 0:
            return [boundary] if c > 0 else [disc, boundary]
        return [] if c > 0 else [disc]
    azimuth, half = np.arctan2(y, x), np.arccos(np.clip(c / q, -1.0, 1.0))
    side = np.sign(np.sin(np.arctan2(boundary[-1, 1], boundary[-1, 0]) - azimuth)) or 1.0
    limb = azimuth + side * half * np.linspace(1.0, -1.0, num)
    return [np.concatenate([boundary, np.stack([np.cos(limb), np.sin(limb)], axis=1)])]
