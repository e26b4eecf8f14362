"""The one-dimensional integrals behind the projected normal law: its density, with all derivatives, and its mean."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

# (log of the largest relative mass that may be dropped, Gauss-Legendre nodes). Both are set by the accuracy of the
# dtype: the quadrature itself is converged (see tests/test_projected.py), rounding is what is left.
_ACCURACY = {torch.float64: (38.0, 64), torch.float32: (20.0, 32)}
_STEP, _NUM_STEPS = 0.16, 96  # of the trapezoidal rule for the mean, which ends at sinh(15) = 2e6


def log_radial_integral(dim: int, a: Tensor) -> Tensor:
    r"""Logarithm of the radial integral of a projected normal distribution, relative to the peak of the Gaussian.

    .. math:: \log J_d(a) = \log \int_0^\infty r^{d-1} e^{a r - r^2 / 2} \, dr - \tfrac12 \max(a, 0)^2

    Both branches are kept apart because each is free of cancellation on its side only: the Gaussian peaks at ``r = a``
    for positive ``a`` and has its maximum at ``r = 0`` otherwise. The function and its first derivative are continuous.

    Evaluated by Gauss-Legendre quadrature relative to the exactly known mode of the integrand, so that neither large
    dimensions nor far negative ``a`` under- or overflow. Measured against mpmath for ``dim`` 2 to 1024 and ``a`` in
    ``[-1000, 1000]``: relative error at most 1e-10 in float64 and 1e-5 in float32, with an absolute floor of the same
    size where the logarithm crosses zero.

    Differentiable to any order in ``a``. Every derivative is itself a quadrature (a joint cumulant of the radius and
    its inverse), so memory is that of ``a`` alone, whatever the number of nodes. Nothing synchronises with the host.

    Args:
        dim: dimension ``d`` of the ambient space, at least 2.
        a: where to evaluate, any shape. float16 and bfloat16 are evaluated in float32.

    Returns:
        Tensor of the shape and dtype of ``a``.

    Raises:
        ValueError: if ``dim`` is smaller than 2.

    References:
        Hernandez-Stumpfhauser, Breidt, van der Woerd: The General Projected Normal Distribution of Arbitrary Dimension
        (Bayesian Analysis 2017), equation 3, where this integral appears as a recursion that overflows in high ``d``.

    Example:
        >>> log_radial_integral(2, torch.zeros(1, dtype=torch.float64)).abs() < 1e-14  # int r exp(-r^2/2) dr = 1
        tensor([True])
    """
    if dim < 2:
        raise ValueError(f"`dim` must be at least 2, got {dim!r}; the sphere in one dimension is a pair of points")
    return _RadialCumulant.apply(a, int(dim), 0)[0]


def projected_mean(loc: Tensor, scale_diag: Tensor) -> Tensor:
    r"""Mean of a projected normal distribution.

    .. math:: E\left[\frac{w_i}{|w|}\right] = \frac{2}{\sqrt\pi} \int_0^\infty E[w_i e^{-s^2 |w|^2}] \, ds
              = \frac{2}{\sqrt\pi} \int_0^\infty \frac{\mu_i}{v_i}
              \prod_j v_j^{-1/2} e^{-s^2 \mu_j^2 / v_j} \, ds, \qquad v_j = 1 + 2 s^2 \sigma_j^2,

    as :math:`1/|w| = \frac{2}{\sqrt\pi} \int_0^\infty e^{-s^2 |w|^2} ds`. With :math:`s = \sinh x` in units of
    :math:`1/\sqrt{E|w|^2}` the integrand is smooth, even and falls off fast: the trapezoidal rule is exact to rounding.
    Against mpmath, for equal scales and d from 2 to 1024: relative errors below 1e-11 in float64, 1e-5 in float32.

    Args:
        loc: means of the Gaussian, ``(*batch, d)``.
        scale_diag: its standard deviations, positive, ``(*batch, d)``.

    Returns:
        Vectors of length below one, ``(*batch, d)``, differentiable in both.

    Example:
        >>> projected_mean(torch.tensor([0.0, 3.0, 4.0]), torch.full((3,), 1e-3))
        tensor([0.0000, 0.6000, 0.8000])
    """
    size = (loc.square() + scale_diag.square()).sum(-1, keepdim=True).sqrt()  # the law does not see it
    location, variance = loc / size, (scale_diag / size).square()
    square, total = location.square(), torch.zeros_like(location)
    for k in range(_NUM_STEPS):
        s2, weight = math.sinh(k * _STEP) ** 2, math.cosh(k * _STEP) * (0.5 if k == 0 else 1.0)
        growth = 2.0 * s2 * variance
        spread = 1.0 + growth
        exponent = (0.5 * torch.log1p(growth) + s2 * square / spread).sum(-1, keepdim=True)
        total = total + weight * torch.exp(-exponent) / spread
    return 2.0 / math.sqrt(math.pi) * _STEP * total * location


class _RadialCumulant(torch.autograd.Function):
    """Derivative of order ``order`` of ``log J_d``, and the next one, which the backward pass needs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, dim: int, order: int) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
        value, derivative = _radial_cumulants(dim, a.to(dtype), order)
        return value.to(a.dtype), derivative.to(a.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, int], output: tuple[Tensor, Tensor]) -> None:
        a, ctx.dim, ctx.order = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(a, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        a, derivative = ctx.saved_tensors
        if torch.is_grad_enabled():  # a graph of the backward pass is wanted: the derivative must be differentiable
            derivative = _RadialCumulant.apply(a, ctx.dim, ctx.order + 1)[0]
        return grad * derivative, None, None


@functools.cache
def _gauss_legendre(num_nodes: int) -> tuple[tuple[float, float], ...]:
    """Pairs (node, weight) on [-1, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
    return tuple(zip(nodes.tolist(), weights.tolist(), strict=True))


def _radial_cumulants(dim: int, a: Tensor, order: int) -> tuple[Tensor, Tensor]:
    r"""Derivatives ``order`` and ``order + 1`` of :math:`\log J_d` at ``a``.

    With :math:`k = d - 1` the law of the radius is :math:`p(r) \propto r^k e^{-(r-a)^2/2}`, with mode
    :math:`r_0 = (a + \sqrt{a^2 + 4k})/2` and, for :math:`r = r_0 (1 + x)`,

    .. math:: \log p(r) - \log p(r_0) = k (\log(1 + x) - x) - r_0^2 x^2 / 2.

    For :math:`a < 0` the derivative of order :math:`n` is the cumulant of that order of :math:`r`. For
    :math:`a \ge 0` it is that of :math:`r - a`, less one for :math:`n = 2`. As :math:`E[r] - a = k E[1/r]` (integration
    by parts) and :math:`dE[g]/da = Cov(g, r)`, this is :math:`k` times the joint cumulant of one :math:`1/r` and
    :math:`n - 1` factors :math:`r`, which does not cancel for large ``a``.
    """
    log_drop, num_nodes = _ACCURACY[a.dtype]
    k = dim - 1
    far = 0.5 * (a.abs() + torch.sqrt(a * a + 4.0 * k))
    near = k / far
    mode = torch.where(a >= 0, far, near)
    slope = torch.where(a >= 0, near, far)  # k / mode

    square = mode * mode
    low = torch.clamp(-torch.sqrt(2.0 * log_drop / (k + square)), min=-1.0)  # x - log(1+x) >= x^2/2 for x < 0
    high = torch.minimum(
        math.sqrt(2.0 * log_drop) / mode,
        torch.full_like(a, (log_drop + math.sqrt(log_drop**2 + 2.0 * log_drop * k)) / k),  # >= x^2/(2(1+x)) for x > 0
    )
    for _ in range(3):  # Newton steps on a convex function, from the right: they never drop too much
        excess = k * (high - torch.log1p(high)) + 0.5 * square * high * high - log_drop
        high = high - excess / (k * high / (1.0 + high) + square * high)
    half, middle = 0.5 * (high - low), 0.5 * (high + low)

    negative = a < 0
    mass = torch.zeros_like(a)
    mixed = [torch.zeros_like(a) for _ in range(order + 1)]  # E[y x^j], y = x for a < 0, else 1/(1+x) - 1
    powers = [torch.zeros_like(a) for _ in range(order)]  # E[x^(j+1)]
    for node, weight in _gauss_legendre(num_nodes):
        x = middle + half * node
        density = weight * torch.exp(k * (torch.log1p(x) - x) - 0.5 * square * x * x)
        mass += density
        term = density * torch.where(negative, x, -x / (1.0 + x))
        for j in range(order + 1):
            mixed[j] += term
            if j < order:
                term = term * x
                density = density * x
                powers[j] += density

    moments = [torch.ones_like(a), *(power / mass for power in powers)]
    cumulants: list[Tensor] = []
    for n in range(order + 1):  # the moment-cumulant recursion, for cumulants with exactly one factor y
        lower = (math.comb(n, j) * cumulants[j] * moments[n - j] for j in range(n))
        cumulants.append(mixed[n] / mass - sum(lower, torch.zeros_like(a)))

    def derivative(n: int) -> Tensor:
        if n == 0:
            peak = k * torch.log(mode) + torch.where(negative, mode * (a - 0.5 * mode), -0.5 * slope * slope)
            return peak + torch.log(half * mode * mass)
        result = torch.where(negative, square, k) * mode ** (n - 2) * cumulants[n - 1]
        return result + torch.where(negative, mode, slope) if n == 1 else result

    return derivative(order), derivative(order + 1)
