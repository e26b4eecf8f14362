"""Slow, independent references for the numerics: mpmath with 50 digits, scipy, and one-dimensional grids.

Nothing here imports the package. ``cos`` is always the cosine of the angle to the mean direction.
"""

from __future__ import annotations

import functools
import math

import mpmath as mp
import numpy as np

mp.mp.dps = 50

DIMS = (2, 3, 4, 5, 8, 10, 16, 32, 64, 128, 512, 1024)
KAPPAS = (0.0, 1e-6, 1e-3, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e6)


# Bessel functions ----------------------------------------------------------------------------------------------------


@functools.cache
def log_iv(order: float, x: float) -> mp.mpf:
    """log I_order(x); -inf at x = 0 unless the order is 0."""
    value = mp.besseli(mp.mpf(order), mp.mpf(x))
    return mp.log(value) if value else mp.mpf("-inf")


@functools.cache
def log_partition(dim: int, kappa: float) -> mp.mpf:
    """log C_d(0)/C_d(kappa) = log E[exp(kappa cos)] under the uniform distribution = log 0F1(; d/2; kappa^2/4)."""
    return mp.log(mp.hyp0f1(mp.mpf(dim) / 2, mp.mpf(kappa) ** 2 / 4))


@functools.cache
def bessel_ratio(dim: int, kappa: float) -> mp.mpf:
    """A_d(kappa) = I_{d/2}(kappa)/I_{d/2-1}(kappa), by the quotient of two hypergeometric functions."""
    half, k = mp.mpf(dim) / 2, mp.mpf(kappa)
    return k / dim * mp.hyp0f1(half + 1, k**2 / 4) / mp.hyp0f1(half, k**2 / 4)


def bessel_ratio_derivative(dim: int, kappa: float) -> mp.mpf:
    """A_d'(kappa) = 1 - A^2 - (d-1) A/kappa."""
    if kappa == 0:
        return mp.mpf(1) / dim
    ratio = bessel_ratio(dim, kappa)
    return 1 - ratio**2 - (dim - 1) * ratio / mp.mpf(kappa)


def bessel_ratio_second_derivative(dim: int, kappa: float) -> mp.mpf:
    """A_d''(kappa)."""
    if kappa == 0:
        return mp.mpf(0)
    k, ratio, slope = mp.mpf(kappa), bessel_ratio(dim, kappa), bessel_ratio_derivative(dim, kappa)
    return -2 * ratio * slope - (dim - 1) * (slope / k - ratio / k**2)


def bessel_ratio_n(order: float, x: float, n: int) -> mp.mpf:
    """I_{order+n}(x)/I_order(x)."""
    if x == 0:
        return mp.mpf(n == 0)
    return mp.besseli(mp.mpf(order) + n, mp.mpf(x)) / mp.besseli(mp.mpf(order), mp.mpf(x))


# Projected normal ----------------------------------------------------------------------------------------------------


def _radial_quad(dim: int, a: float, power: int) -> tuple[mp.mpf, mp.mpf, mp.mpf]:
    """(log of the integrand at its mode, the mode, int (r - mode)^power * integrand / its maximum)."""
    a, k = mp.mpf(a), dim - 1
    mode = (a + mp.sqrt(a**2 + 4 * k)) / 2
    width = 1 / mp.sqrt(1 + k / mode**2)

    def integrand(r: mp.mpf) -> mp.mpf:
        if r <= 0:
            return mp.mpf(0)
        return (r - mode) ** power * mp.exp(k * mp.log(r / mode) - ((r - a) ** 2 - (mode - a) ** 2) / 2)

    points = sorted({max(mode + j * width, mp.mpf(0)) for j in (-14, -6, -2, 0, 2, 6, 14, 30, 60, 100)})
    with mp.workdps(30):
        return k * mp.log(mode) - (mode - a) ** 2 / 2, mode, mp.quad(integrand, points)


@functools.cache
def log_radial_integral(dim: int, a: float) -> mp.mpf:
    """log int_0^inf r^(d-1) exp(a r - r^2/2) dr - max(a, 0)^2/2."""
    peak, _, mass = _radial_quad(dim, a, 0)
    return peak + mp.log(mass) + mp.mpf(min(a, 0.0)) ** 2 / 2


def radial_derivatives(dim: int, a: float) -> tuple[mp.mpf, mp.mpf]:
    """First and second derivative of the above: E[r] - max(a, 0), and Var[r], less one for a >= 0."""
    _, mode, mass = _radial_quad(dim, a, 0)
    first, second = (_radial_quad(dim, a, n)[2] / mass for n in (1, 2))
    return mode - mp.mpf(max(a, 0.0)) + first, second - first**2 - (a >= 0)


def projected_normal_log_density(loc: list[float], scale: list[float], value: list[float]) -> mp.mpf:
    """Log density of w/|w|, w ~ N(loc, diag(scale^2)), as the integral of the Gaussian along the ray of ``value``."""
    dim, loc, scale, value = len(loc), *([mp.mpf(x) for x in v] for v in (loc, scale, value))
    precision = mp.fsum((y / s) ** 2 for y, s in zip(value, scale, strict=True))
    a = mp.fsum(m * y / s**2 for m, y, s in zip(loc, value, scale, strict=True)) / mp.sqrt(precision)
    total = mp.fsum((m / s) ** 2 for m, s in zip(loc, scale, strict=True))
    log_det = mp.fsum(mp.log(s) for s in scale)
    gaussian = -mp.mpf(dim) / 2 * mp.log(2 * mp.pi) - log_det - (total - max(a, mp.mpf(0)) ** 2) / 2
    return gaussian - mp.mpf(dim) / 2 * mp.log(precision) + log_radial_integral(dim, a)


# Densities of the isotropic families, as functions of the cosine -----------------------------------------------------


def log_area(dim: int) -> mp.mpf:
    """Log surface area of the unit sphere in ``dim`` dimensions."""
    half = mp.mpf(dim) / 2
    return mp.log(2) + half * mp.log(mp.pi) - mp.loggamma(half)


def uniform_log_density(dim: int, kappa: float, cos: float) -> mp.mpf:
    """-log area."""
    return -log_area(dim)


def von_mises_fisher_log_density(dim: int, kappa: float, cos: float) -> mp.mpf:
    """kappa cos - log_partition - log area."""
    return mp.mpf(kappa) * mp.mpf(cos) - log_partition(dim, kappa) - log_area(dim)


def power_spherical_log_density(dim: int, kappa: float, cos: float) -> mp.mpf:
    """De Cao & Aziz 2020, equation 2: (1 + cos)^kappa over 2^(a+b) pi^b Gamma(a)/Gamma(a+b)."""
    b = (mp.mpf(dim) - 1) / 2
    a = b + mp.mpf(kappa)
    normaliser = (a + b) * mp.log(2) + b * mp.log(mp.pi) + mp.loggamma(a) - mp.loggamma(a + b)
    return (mp.mpf(kappa) * mp.log1p(mp.mpf(cos)) if kappa else 0) - normaliser


def isotropic_projected_normal_log_density(dim: int, kappa: float, cos: float) -> mp.mpf:
    """Projected normal with |loc|^2 = kappa and unit scale."""
    length = mp.sqrt(mp.mpf(kappa))
    sin = mp.sqrt(1 - mp.mpf(cos) ** 2)
    rest = [0.0] * (dim - 2)
    return projected_normal_log_density([length, 0.0, *rest], [1.0] * dim, [cos, sin, *rest])


# The law of the angle on a grid --------------------------------------------------------------------------------------


class AngleLaw:
    """Law of the angle to the mean direction, from an unnormalised log density of the angle on the sphere.

    Args:
        dim: dimension of the ambient space.
        log_density: vectorised, angle in [0, pi] -> log density on the sphere up to a constant (float64 arrays).
    """

    def __init__(self, dim: int, log_density) -> None:
        grid = np.union1d(np.geomspace(1e-8, math.pi * (1 - 1e-12), 40_000), np.linspace(1e-9, math.pi - 1e-9, 40_000))
        with np.errstate(divide="ignore"):
            self._log = log_density(grid) + (dim - 2) * np.log(np.sin(grid))
        weight = np.exp(self._log - self._log.max())
        area = 0.5 * (weight[1:] + weight[:-1]) * np.diff(grid)
        self.grid = np.concatenate([[0.0], grid, [math.pi]])
        total = np.cumsum(area)
        self._cdf = np.concatenate([[0.0, 0.0], total, [total[-1]]]) / total[-1]
        self._mass = np.append(area, 0.0) / total[-1]

    def cdf(self, angle: np.ndarray) -> np.ndarray:
        """P(angle' <= angle)."""
        return np.interp(angle, self.grid, self._cdf)

    def quantile(self, probability: np.ndarray) -> np.ndarray:
        """Inverse of :meth:`cdf`."""
        return np.interp(probability, self._cdf, self.grid)

    def expect(self, function) -> float:
        """E[function(angle)], by the trapezoidal masses of the grid."""
        values = function(self.grid[1:-1])
        middle = np.append(0.5 * (values[1:] + values[:-1]), 0.0)
        return float((self._mass * middle).sum())


def von_mises_fisher_angle(kappa: float):
    """Log density of the angle, relative to its value at 0 and without cancellation for large kappa."""
    return lambda angle: -2.0 * kappa * np.sin(0.5 * angle) ** 2


def power_spherical_angle(kappa: float):
    """((1 + cos)/2)^kappa = cos(angle/2)^(2 kappa)."""
    return lambda angle: 2.0 * kappa * np.log(np.cos(0.5 * angle))


def projected_normal_angle(dim: int, kappa: float):
    """Isotropic projected normal, |loc|^2 = kappa: the radius integrated by Gauss-Legendre quadrature."""
    length = math.sqrt(kappa)

    def log_density(angle: np.ndarray) -> np.ndarray:
        a = length * np.cos(angle)
        mode = 0.5 * (a + np.sqrt(a * a + 4 * (dim - 1)))
        mode = np.where(a < 0, 2 * (dim - 1) / (np.sqrt(a * a + 4 * (dim - 1)) - a), mode)
        peak = (dim - 1) * np.log(mode) - 0.5 * (mode - a) ** 2
        width = mode / np.sqrt(dim - 1 + mode * mode)
        low, high = np.maximum(mode - 12 * width, 0.0), mode + 40 * width
        total = np.zeros_like(angle)
        for node, weight in zip(*np.polynomial.legendre.leggauss(200), strict=True):
            r = 0.5 * (low + high) + 0.5 * (high - low) * node
            total += weight * np.exp((dim - 1) * np.log(r) - 0.5 * (r - a) ** 2 - peak)
        return peak + np.log(0.5 * (high - low) * total) - 0.5 * (length * np.sin(angle)) ** 2

    return log_density


def uniform_angle(kappa: float):
    """Constant density."""
    return np.zeros_like


# The expected kernel of a pair of views -------------------------------------------------------------------------------


@functools.cache
def _expected_kernel_terms(dim: int, kappas: tuple[float, ...], digits: int) -> list[mp.mpf]:
    """Coefficients of the Gegenbauer series, to `digits` decimal places after the point at cosine 1."""
    with mp.workdps(digits):
        order = mp.mpf(dim) / 2 - 1
        finite = [mp.mpf(k) for k in kappas if not math.isinf(k)]
        effective = 1 / sum(1 / k for k in finite)
        # generous: the terms fall like exp(-n^2 / 2 k) and, once n exceeds every k, faster than geometrically
        top = int(mp.sqrt(2.4 * effective * (2.4 * digits + dim * mp.log(2 + effective))) + digits + 20)
        columns = []
        for k in finite:
            r = mp.besseli(order + top + 1, k) / mp.besseli(order + top, k)
            ladder = []
            for n in reversed(range(top)):
                r = k / (2 * (order + n + 1) + k * r)
                ladder.append(r)
            columns.append(ladder[::-1])
        terms = [mp.mpf(1)]
        for n in range(1, top):
            previous = mp.mpf(2 * n + dim - 4) / (n + dim - 3) * n if dim > 2 or n > 1 else mp.mpf(1)
            step = mp.mpf(2) if dim == 2 and n == 1 else mp.mpf(1) if dim == 2 else (2 * n + dim - 2) / previous
            for column in columns:
                step *= column[n - 1]
            terms.append(terms[-1] * step)
        assert terms[-1] < mp.mpf(10) ** -digits * max(terms)
        return terms


def expected_kernel_log_ratio(dim: int, k1: float, k2: float, kappa: float, cos: float, digits: int = 60) -> mp.mpf:
    """log of sum_n m_n a_n(k1) a_n(k2) a_n(kappa) C_n(cos)/C_n(1); `digits` also have to pay for the cancellation."""
    terms = _expected_kernel_terms(dim, tuple(sorted((k1, k2, kappa))), digits)
    with mp.workdps(digits):
        x, total = mp.mpf(cos), terms[0]
        previous, current = mp.mpf(1), mp.mpf(cos)
        for n in range(1, len(terms)):
            total += terms[n] * current
            previous, current = current, ((2 * n + dim - 2) * x * current - n * previous) / (n + dim - 2)
        return mp.log(total)
