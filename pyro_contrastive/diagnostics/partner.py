r"""Where the mean direction of a partner lies, when two views share one latent: a closed-form law, no draws.

Let :math:`z` be uniform on the sphere and let the mean directions scatter around it with their own concentrations,
:math:`m_1 \sim \mathrm{vMF}(z, \kappa_1)`, :math:`m_2 \sim \mathrm{vMF}(z, \kappa_2)`: the posteriors
:math:`\mathrm{vMF}(m_i, \kappa_i)` are then exact. Given the first view the latent is
:math:`\mathrm{vMF}(m_1, \kappa_1)`, hence the density of the second mean direction, relative to the uniform law, is

.. math:: \frac{p(m_2 \mid m_1)}{p(m_2)} = \frac{C(\kappa_1)\, C(\kappa_2)}{C(\lVert\kappa_1 m_1+\kappa_2 m_2\rVert)\,
   C(0)}, \qquad \lVert\cdot\rVert^2 = \kappa_1^2 + \kappa_2^2 + 2 \kappa_1 \kappa_2 \cos\theta,

the evidence of the shared latent (von Mises-Fisher convolved with von Mises-Fisher; Mardia & Jupp 2000, section 9.3.2).
It falls with the angle :math:`\theta` between the two, so its highest-density regions are caps around :math:`m_1`, and
a partner can be judged by that angle alone. Nothing here depends on the frame: no rotation has to be fitted, and no
latent has to be known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.polynomial import chebyshev
from numpy.typing import ArrayLike
from scipy import special

from pyro_contrastive.diagnostics._arrays import FloatArray, as_array, geodesic_angle, unit_vectors
from pyro_contrastive.distributions import VonMisesFisher
from pyro_contrastive.ops import bessel_ratio_complement, log_partition_scaled

__all__ = ["PartnerRadii", "partner_pit", "partner_probability", "partner_radius"]

_CHUNK = 8192  # pairs whose nodes are held at once
_REACH = 12.0  # half width of the window in standard deviations; what is left out is below 1e-20
_NUM_NODES = 144  # of the density on that window, for 1e-13 in its integral
_NODES = chebyshev.chebpts1(_NUM_NODES)
_TO_SERIES = np.linalg.inv(chebyshev.chebvander(_NODES, _NUM_NODES - 1))


def partner_probability(
    angle: ArrayLike | torch.Tensor,
    concentration: ArrayLike | torch.Tensor,
    partner_concentration: ArrayLike | torch.Tensor,
    dim: int,
) -> FloatArray:
    """Probability that a partner's mean direction lies within `angle` of a view's own mean direction.

    Args:
        angle: Angles in radians, in [0, pi], any shape.
        concentration: Concentrations of the view's posterior, > 0 and finite, broadcast against `angle`.
        partner_concentration: Concentrations of the partner's posterior, likewise; the two may be swapped.
        dim: Dimension d >= 2 of the space around the sphere.

    Returns:
        Probabilities of the broadcast shape, accurate to 1e-11.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> round(float(partner_probability(np.pi / 2, 1e-3, 50.0, dim=10)), 3)  # a partner says nothing about noise
        0.5
    """
    angle = as_array(angle).astype(np.float64)
    if not np.all((angle >= 0) & (angle <= np.pi)):
        raise ValueError(f"`angle` must be in [0, pi] radians, got values from {angle.min():.4g} to {angle.max():.4g}")
    return _evaluate(_Law.probability, angle, *_concentrations(concentration, partner_concentration, dim), dim)


def partner_radius(
    level: ArrayLike,
    concentration: ArrayLike | torch.Tensor,
    partner_concentration: ArrayLike | torch.Tensor,
    dim: int,
) -> FloatArray:
    """Radius of the cap that holds a partner's mean direction with a given probability.

    The inverse of `partner_probability`; larger than `calibration.cap_radius`, which is its limit for a partner of
    infinite concentration.

    Args:
        level: Probabilities in (0, 1), any shape.
        concentration: Concentrations of the view's posterior, > 0 and finite, broadcast against `level`.
        partner_concentration: Concentrations of the partner's posterior, likewise.
        dim: Dimension d >= 2 of the space around the sphere.

    Returns:
        Angles in radians, in (0, pi), of the broadcast shape.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> radius = partner_radius(0.95, 30.0, [10.0, 100.0, 1e9], dim=10)
        >>> radius.round(3)  # the last one is cap_radius(0.95, 30.0, dim=10)
        array([1.389, 0.84 , 0.745])
    """
    level = np.asarray(level, dtype=np.float64)
    if not np.all((level > 0) & (level < 1)):
        raise ValueError(f"`level` must be in (0, 1), got values from {level.min():.4g} to {level.max():.4g}")
    return _evaluate(_Law.radius, level, *_concentrations(concentration, partner_concentration, dim), dim)


def partner_pit(queries: Any, partners: Any) -> FloatArray:
    """PIT of each partner's mean direction: the level of the cap around the query that just reaches it.

    Uniform if two views share one latent, the latent is uniform and the posteriors are right. It needs pairs, not
    known latents, and no rotation: `coverage(partner_pit(q1, q2))` checks calibration on real data. Agreement is
    necessary, not sufficient: the angle between two views sees mainly the sum of both variances.

    Args:
        queries: `VonMisesFisher` posteriors of the first views, batch shape (N,).
        partners: Those of the second views, batch shape (N,), same dimension.

    Returns:
        Values in [0, 1], shape (N,).

    Raises:
        TypeError: If a side is not `VonMisesFisher`.
        ValueError: If the shapes differ or a concentration is 0.
    """
    for name, law in (("queries", queries), ("partners", partners)):
        if not isinstance(law, VonMisesFisher):
            raise TypeError(f"`{name}` must be VonMisesFisher posteriors, got {type(law).__name__}")
    if queries.batch_shape != partners.batch_shape or queries.event_shape != partners.event_shape:
        raise ValueError(
            "`queries` and `partners` must have one batch and event shape, got "
            f"{tuple(queries.mean_direction.shape)} and {tuple(partners.mean_direction.shape)}"
        )
    mean1, mean2 = (unit_vectors(law.mean_direction, "mean_direction") for law in (queries, partners))
    return partner_probability(
        geodesic_angle(mean1, mean2), queries.concentration, partners.concentration, mean1.shape[-1]
    )


class PartnerRadii:
    r"""`partner_radius` at one level for every pair out of two large sets of concentrations.

    :math:`\log(1 - \cos r)` is a smooth function of :math:`(\log\kappa_1, \log\kappa_2)`. It is interpolated by
    Chebyshev polynomials on the box of the given concentrations, with the degree doubled until a second grid agrees to
    1e-9 (16 terms where both span a factor of 10, 64 for a factor of 1,000); `error` is what is left. The grid of all
    pairs is then one matrix product of inner dimension `terms`.

    Args:
        level: Probability in (0, 1).
        concentration: Concentrations of the queries, > 0 and finite, non-empty.
        partner_concentration: Those of the partners.
        dim: Dimension d >= 2.

    Raises:
        ValueError: If an argument is out of range, or 128 terms leave an error above 1e-5 (in two dimensions, with
            concentrations from far below 1 to far above).
    """

    def __init__(
        self,
        level: float,
        concentration: ArrayLike | torch.Tensor,
        partner_concentration: ArrayLike | torch.Tensor,
        dim: int,
    ) -> None:
        kappas = _concentrations(concentration, partner_concentration, dim)
        # never narrower than 1 %, so that one common concentration is no special case
        self._boxes = [(np.log(k.min()) - 0.005, np.log(k.max()) + 0.005) for k in kappas]

        def values(x: FloatArray, y: FloatArray) -> FloatArray:
            first, second = (
                np.exp(low + 0.5 * (high - low) * (1 + t)) for t, (low, high) in zip((x, y), self._boxes, strict=True)
            )
            radius = partner_radius(level, first[:, None], second, dim)
            return np.log(2.0) + 2.0 * np.log(np.sin(0.5 * radius))

        held_out = np.linspace(-1.0, 1.0, 7)
        truth = values(held_out, held_out)
        for self.terms in (8, 16, 32, 64, 128):
            nodes = chebyshev.chebpts1(self.terms)
            inverse = np.linalg.inv(chebyshev.chebvander(nodes, self.terms - 1))
            self._coefficients = inverse @ values(nodes, nodes) @ inverse.T
            basis = chebyshev.chebvander(held_out, self.terms - 1)
            self.error = float(np.abs(basis @ self._coefficients @ basis.T - truth).max())
            if self.error < 1e-9:
                return
        if self.error > 1e-5:
            raise ValueError(
                f"concentrations from {kappas[0].min():.3g} to {kappas[0].max():.3g} and {kappas[1].min():.3g} to "
                f"{kappas[1].max():.3g} span too much to interpolate to 1e-5, got {self.error:.1g}; "
                "split the queries or the gallery by concentration"
            )

    def rows(self, concentration: FloatArray) -> FloatArray:
        """Factor of the queries, (N, terms)."""
        return self._basis(concentration, 0) @ self._coefficients

    def columns(self, partner_concentration: FloatArray) -> FloatArray:
        """Factor of the partners, (M, terms): log(1 - cos r) of pair (i, j) is ``rows[i] @ columns[j]``."""
        return self._basis(partner_concentration, 1)

    def _basis(self, concentration: FloatArray, side: int) -> FloatArray:
        low, high = self._boxes[side]
        return chebyshev.chebvander(2.0 * (np.log(concentration) - low) / (high - low) - 1.0, self.terms - 1)


class _Law:
    """Distribution functions of the angle of B pairs, as Chebyshev series on a window around the bulk of each."""

    def __init__(self, first: FloatArray, second: FloatArray, dim: int) -> None:
        # the window is that of the von Mises-Fisher law with the same mean cosine, approximately inverted
        # (Banerjee et al. 2005, eq. 4.4); the true tails are lighter
        gap1, gap2 = (bessel_ratio_complement(dim, torch.from_numpy(k)).numpy() for k in (first, second))
        gap = gap1 + gap2 - gap1 * gap2
        rho = 1.0 - gap
        kappa, power = rho * (dim - rho**2) / (gap * (1.0 + rho)), dim - 2
        cosine = 2.0 * kappa / np.maximum(power + np.hypot(power, 2.0 * kappa), np.finfo(float).tiny)
        mode = np.arccos(np.clip(cosine, 0.0, 1.0))
        curvature = kappa * cosine + (power / np.maximum(np.sin(mode) ** 2, np.finfo(float).tiny) if power else 0.0)
        reach = _REACH / np.sqrt(np.maximum(curvature, 1e-4))
        self.low, high = np.maximum(mode - reach, 0.0), np.minimum(mode + reach, np.pi)
        self.half = 0.5 * (high - self.low)

        angle = self.low + self.half * (1.0 + _NODES[:, None])
        # |k1 m1 + k2 m2|^2 = (k1 + k2)^2 - 4 k1 k2 sin^2(angle / 2), and its distance from k1 + k2 without cancellation
        total, chord = first + second, 4.0 * first * second * np.sin(0.5 * angle) ** 2
        length = np.sqrt(np.maximum(total**2 - chord, 0.0))
        scaled = log_partition_scaled(dim, torch.from_numpy(length)).numpy()
        log_density = special.xlogy(power, np.sin(angle)) + scaled - chord / (total + length)
        series = _TO_SERIES @ np.exp(log_density - log_density.max(axis=0))
        self.series = chebyshev.chebint(series, lbnd=-1.0, axis=0)
        self.series /= chebyshev.chebval(1.0, self.series)

    def probability(self, angle: FloatArray) -> FloatArray:
        return np.clip(self._value(np.clip((angle - self.low) / self.half - 1.0, -1.0, 1.0)), 0.0, 1.0)

    def radius(self, level: FloatArray) -> FloatArray:
        low, high = np.full(level.shape, -1.0), np.ones(level.shape)
        for _ in range(50):
            middle = 0.5 * (low + high)
            inside = self._value(middle) < level
            low, high = np.where(inside, middle, low), np.where(inside, high, middle)
        return self.low + self.half * (1.0 + 0.5 * (low + high))

    def _value(self, x: FloatArray) -> FloatArray:
        return np.asarray(chebyshev.chebval(x, self.series, tensor=False), dtype=np.float64)


def _evaluate(
    quantity: Callable[[_Law, FloatArray], FloatArray], at: FloatArray, first: FloatArray, second: FloatArray, dim: int
) -> FloatArray:
    """A quantity of the law of every pair, a chunk of pairs at a time."""
    at, first, second = np.broadcast_arrays(at, first, second)
    value = np.empty(at.size)
    for start in range(0, at.size, _CHUNK):
        chunk = slice(start, start + _CHUNK)
        law = _Law(first.reshape(-1)[chunk], second.reshape(-1)[chunk], dim)
        value[chunk] = quantity(law, at.reshape(-1)[chunk])
    return value.reshape(at.shape)


def _concentrations(
    first: ArrayLike | torch.Tensor, second: ArrayLike | torch.Tensor, dim: int
) -> tuple[FloatArray, FloatArray]:
    if dim < 2:
        raise ValueError(f"`dim` must be >= 2, got {dim!r}")
    arrays = as_array(first).astype(np.float64), as_array(second).astype(np.float64)
    for name, array in zip(("concentration", "partner_concentration"), arrays, strict=True):
        if not np.all((array > 0) & (array < np.inf)):
            wrong = array[~((array > 0) & (array < np.inf))].flat[0]
            raise ValueError(
                f"`{name}` must be > 0 and finite, got {wrong:.4g}; for a partner that is a point use `cap_radius`"
            )
    return arrays
