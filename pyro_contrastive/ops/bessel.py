r"""Modified Bessel functions of the first kind, in log space and in any order.

Everything that a von Mises-Fisher law needs is one number theory away from the ratio
:math:`r_v(x) = I_{v+1}(x) / I_v(x)`, and that ratio has two properties that make it safe to compute:

* downwards in the order, :math:`r_v = x / (2(v+1) + x\, r_{v+1})` (DLMF 10.29.1) adds positive numbers only;
* for large order the uniform (Debye) expansion of :math:`\log I_v` (DLMF 10.41.3) is accurate for *every* x.

So each function starts from the Debye expansion at an order that is large enough for its dtype and walks down the few
steps to the order asked for. All quantities are relative to their value at x = 0, which keeps them accurate there
too. Derivatives are computed by the differentiated recurrence, not by differentiating rounded values: each function
is an autograd function whose backward pass calls the next derivative. No SciPy, no host sync, float32 and float64.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "bessel_ratio",
    "bessel_ratio_complement",
    "bessel_ratios",
    "inverse_bessel_ratio",
    "log_iv",
    "log_partition",
    "log_partition_scaled",
]

# dtype -> (smallest order at which the expansion is used, number of its terms). The first omitted term is below
# 1e-14 (float64) and 2e-7 (float32) in absolute value for every x; lower orders are reached by the recurrence.
_START = {torch.float64: (16.0, 12), torch.float32: (8.0, 5)}


# --------------------------------------------------------------------------------------------------------------------
# The Debye expansion:  log I_v(x) = R - v asinh(v/x) - log(2 pi R)/2 + sum_k D_k(t)/v^k,   R = sqrt(v^2+x^2), t = v/R
# --------------------------------------------------------------------------------------------------------------------


def _multiply(a: list[Fraction], b: list[Fraction]) -> list[Fraction]:
    product = [Fraction(0)] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            product[i + j] += x * y
    return product


def _add(a: list[Fraction], b: list[Fraction], scale: Fraction = Fraction(1)) -> list[Fraction]:
    size = max(len(a), len(b))
    a, b = a + [Fraction(0)] * (size - len(a)), b + [Fraction(0)] * (size - len(b))
    return [x + scale * y for x, y in zip(a, b, strict=True)]


@lru_cache
def _debye_polynomials(terms: int) -> list[list[Fraction]]:
    """Exact coefficients of D_1..D_terms, from the recursion of the U_k (DLMF 10.41.9) and the series of a log."""
    u = [[Fraction(1)]]
    for _ in range(terms):
        slope = [k * c for k, c in enumerate(u[-1])][1:] or [Fraction(0)]
        first = _multiply([Fraction(0), Fraction(0), Fraction(1, 2), Fraction(0), Fraction(-1, 2)], slope)
        second = _multiply([Fraction(1, 8), Fraction(0), Fraction(-5, 8)], u[-1])
        u.append(_add(first, [Fraction(0)] + [c / (k + 1) for k, c in enumerate(second)]))
    log_terms: list[list[Fraction]] = [[]]
    for k in range(1, terms + 1):
        total = u[k]
        for j in range(1, k):
            total = _add(total, _multiply(log_terms[j], u[k - j]), Fraction(-j, k))
        log_terms.append(total)
    return log_terms[1:]


@lru_cache(maxsize=1024)
def _correction(order: float, terms: int) -> tuple[tuple[float, ...], ...]:
    """Coefficients in t of Q, F', F'', F''', where F(t) = sum_k D_k(t)/order^k and F(t) - F(1) = (t-1) Q(t)."""
    series = [Fraction(0)]
    for k, polynomial in enumerate(_debye_polynomials(terms), start=1):
        series = _add(series, polynomial, 1 / Fraction(order) ** k)
    quotient, carry = [], Fraction(0)
    for c in reversed(series[1:]):  # synthetic division of F(t) - F(1) by (t - 1)
        carry += c
        quotient.append(carry)
    derivatives = [series]
    for _ in range(3):
        derivatives.append([k * c for k, c in enumerate(derivatives[-1])][1:])
    return tuple(tuple(float(c) for c in p) for p in (list(reversed(quotient)), *derivatives[1:]))


def _horner(coefficients: tuple[float, ...], t: Tensor) -> Tensor:
    value = torch.full_like(t, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = value * t + c
    return value


def _radius(order: float, x: Tensor) -> Tensor:
    return torch.hypot(x, torch.full((), order, dtype=x.dtype, device=x.device))


def _start_ratio(order: float, x: Tensor, derivatives: int) -> list[Tensor]:
    """r_order(x) and its first derivatives from the expansion; every term carries the factor x of r itself."""
    _, f1, f2, f3 = _correction(order, _START[x.dtype][1])
    radius = _radius(order, x)
    t, share = order / radius, (x / radius) ** 2  # share = 1 - t^2
    dt = -x * t**3 / order**2
    slope = _horner(f1, t)
    out = [x / (order + radius) - 0.5 * x * t**2 / order**2 + slope * dt]
    if derivatives >= 1:
        curve = _horner(f2, t)
        ddt = -(t**3) * (t**2 - 2 * share) / order**2
        out.append(t / (order + radius) - 0.5 * (t**2 - share) * t**2 / order**2 + curve * dt**2 + slope * ddt)
    if derivatives >= 2:
        dddt = x * t**5 * (9 * t**2 - 6 * share) / order**4
        first = -t * (x / radius) * (order + 2 * radius) / (radius * (order + radius) ** 2)
        second = x * (3 * t**2 - share) * t**4 / order**4
        out.append(first + second + _horner(f3, t) * dt**3 + 3 * curve * dt * ddt + slope * dddt)
    return out


def _steps(order: float, dtype: torch.dtype) -> int:
    return max(0, math.ceil(_START[dtype][0] - order))


def _ratio_down(order: float, x: Tensor, r: list[Tensor]) -> list[Tensor]:
    """One step of the recurrence: derivatives of r_order from those of r_(order+1)."""
    c = 2 * (order + 1)
    denominator = c + x * r[0]
    out = [x / denominator]
    if len(r) > 1:
        numerator = c - x * (x * r[1])
        out.append(numerator / denominator**2)
    if len(r) > 2:
        slope = -2 * x * r[1] - x * (x * r[2])
        out.append(slope / denominator**2 - 2 * out[1] * (r[0] + x * r[1]) / denominator)
    return out


def _ratio(order: float, x: Tensor, derivatives: int) -> list[Tensor]:
    """r_order(x) = I_(order+1)/I_order and its derivatives, x >= 0, infinity included."""
    steps = _steps(order, x.dtype)
    r = _start_ratio(order + steps, x, derivatives)
    for j in reversed(range(steps)):
        r = _ratio_down(order + j, x, r)
    at_infinity = torch.isinf(x)
    return [r[0].masked_fill(at_infinity, 1.0), *(d.masked_fill(at_infinity, 0.0) for d in r[1:])]


def _ratio_complement(order: float, x: Tensor) -> Tensor:
    """1 - r_order(x) without cancellation: the recurrence rewritten for the complement."""
    steps = _steps(order, x.dtype)
    top = order + steps
    radius = _radius(top, x)
    t = top / radius
    rest = top * (top / (radius + x))  # radius - x
    correction = _horner(_correction(top, _START[x.dtype][1])[1], t) * x * t**3 / top**2
    q = (top + rest) / (top + radius) + 0.5 * x * t**2 / top**2 + correction
    for j in reversed(range(steps)):
        c = 2 * (order + j + 1)
        gap = c - x * q
        q = gap / (gap + x)
    return q.masked_fill(torch.isinf(x), 0.0)


def _log_partition(order: float, x: Tensor, scaled: bool) -> Tensor:
    """g(x) = log[ Gamma(v+1) (2/x)^v I_v(x) ] (zero at x = 0), minus x when scaled."""
    steps = _steps(order, x.dtype)
    top = order + steps
    quotient = _correction(top, _START[x.dtype][1])[0]
    radius = _radius(top, x)
    t = top / radius
    excess = (x / top) * (x / (top + radius))  # radius/top - 1
    value = top * (top / (radius + x)) - top if scaled else top * excess
    value = value - top * torch.log1p(excess / 2) - 0.5 * torch.log1p(excess)
    value = value - (x / radius) ** 2 / (1 + t) * _horner(quotient, t)  # (t - 1) Q(t)
    r = _start_ratio(top, x, 0)
    for j in reversed(range(steps)):
        value = value + torch.log1p(x * r[0] / (2 * (order + j + 1)))
        r = _ratio_down(order + j, x, r)
    return value.masked_fill(torch.isinf(x), -math.inf if scaled else math.inf)


# --------------------------------------------------------------------------------------------------------------------
# Autograd: value -> ratio -> its first derivative -> its second derivative
# --------------------------------------------------------------------------------------------------------------------


class _Function(torch.autograd.Function):
    """Elementwise function of x with a static order; subclasses say what the derivative is."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, *static = inputs
        ctx.save_for_backward(x)
        ctx.static = static


class _LogPartition(_Function):
    @staticmethod
    def forward(x: Tensor, order: float, scaled: bool) -> Tensor:
        return _log_partition(order, x, scaled)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        order, scaled = ctx.static
        slope = -_RatioComplement.apply(x, order) if scaled else _Ratio.apply(x, order, 0)
        return grad * slope, None, None


class _RatioComplement(_Function):
    @staticmethod
    def forward(x: Tensor, order: float) -> Tensor:
        return _ratio_complement(order, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return -grad * _Ratio.apply(x, ctx.static[0], 1), None


class _Ratio(_Function):
    @staticmethod
    def forward(x: Tensor, order: float, derivative: int) -> Tensor:
        return _ratio(order, x, derivative)[derivative]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        order, derivative = ctx.static
        if derivative == 2:
            raise NotImplementedError(
                "Bessel ratios are differentiable three times (log-partition: four times), one more was asked for"
            )
        return grad * _Ratio.apply(x, order, derivative + 1), None, None


class _Ratios(_Function):
    @staticmethod
    def forward(x: Tensor, order: float, n_max: int) -> Tensor:
        return _all_ratios(order, x, n_max, derivative=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        order, n_max = ctx.static
        return (grad * _all_ratios(order, x, n_max, derivative=True)).sum(-1), None, None


def _all_ratios(order: float, x: Tensor, n_max: int, derivative: bool) -> Tensor:
    """a_n = product of r_order .. r_(order+n-1); the product rule adds positive terms only."""
    above = order + n_max
    r = _ratio(above, x, 1) if derivative else _ratio(above, x, 0)
    ladder = []
    at_infinity = torch.isinf(x)
    finite = x.masked_fill(at_infinity, 0.0)
    for j in reversed(range(n_max)):
        r = _ratio_down(order + j, finite, r)
        ladder.append([r[0].masked_fill(at_infinity, 1.0), *(d.masked_fill(at_infinity, 0.0) for d in r[1:])])
    value, slope = torch.ones_like(x), torch.zeros_like(x)
    out = [slope if derivative else value]
    for step in reversed(ladder):
        if derivative:
            slope = slope * step[0] + value * step[1]
        value = value * step[0]
        out.append(slope if derivative else value)
    return torch.stack(out, dim=-1)


class _InverseRatio(_Function):
    @staticmethod
    def forward(rho: Tensor, order: float) -> Tensor:
        dim = 2 * order + 2
        kappa = rho * (dim - rho**2) / (1 - rho**2)  # Banerjee et al. 2005, eq. 4.4; within a few percent everywhere
        for _ in range(4 if rho.dtype == torch.float64 else 2):
            # Newton on A where it is close to a line, on log(1 - A) where A saturates
            value, slope = _ratio(order, kappa, 1)
            gap = _ratio_complement(order, kappa)
            step = torch.where(rho < 0.5, rho - value, gap * torch.log(gap / (1 - rho))) / slope
            kappa = (kappa + step).clamp_min(0.0)
        return kappa.masked_fill(rho >= 1, math.inf).masked_fill(rho == 0, 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(output)
        ctx.static = inputs[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (kappa,) = ctx.saved_tensors
        slope = _Ratio.apply(kappa, ctx.static[0], 1)
        # kappa = inf is a legal, absorbing limit: no gradient instead of 0/0
        return torch.where(slope > 0, grad / slope, torch.zeros_like(grad)), None


# --------------------------------------------------------------------------------------------------------------------
# Public functions
# --------------------------------------------------------------------------------------------------------------------


def _as_float(x: Tensor, name: str) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {type(x).__name__}; wrap it in torch.as_tensor")
    if x.dtype not in _START:
        raise TypeError(f"`{name}` must be float32 or float64, got {x.dtype}; call .float() on it")
    return x


def _order_of(dim: int) -> float:
    if dim < 2:
        raise ValueError(f"`dim` must be an integer >= 2 (the sphere S^(dim-1)), got {dim!r}")
    return dim / 2 - 1


def log_iv(order: float, x: Tensor) -> Tensor:
    r"""Log of the modified Bessel function of the first kind, :math:`\log I_v(x)`.

    Args:
        order: v >= 0, a Python number.
        x: any shape, >= 0, float32 or float64.

    Returns:
        Shape of ``x``; -inf at x = 0 for v > 0, +inf at infinity. Differentiable four times.

    Raises:
        ValueError: for a negative order.
        TypeError: for another dtype.

    Example:
        >>> log_iv(0.5, torch.tensor([1.0], dtype=torch.float64))  # sqrt(2/pi) sinh(1)
        tensor([-0.0643], dtype=torch.float64)
    """
    if order < 0:
        raise ValueError(f"`order` must be >= 0, got {order!r}")
    x = _as_float(x, "x")
    value = _LogPartition.apply(x, float(order), False)
    if order == 0:
        return value
    return value + order * torch.log(x / 2) - math.lgamma(order + 1)


def log_partition(dim: int, concentration: Tensor) -> Tensor:
    r"""Log-partition function of the von Mises-Fisher law relative to the uniform law, :math:`\log C_d(0)/C_d(\kappa)`.

    It is :math:`\log E_{z \sim U}[e^{\kappa \mu \cdot z}]`: 0 at kappa = 0, convex, with derivative
    :func:`bessel_ratio`.

    Args:
        dim: d >= 2, dimension of the embedding space.
        concentration: kappa >= 0, any shape, float32 or float64; infinity gives infinity.

    Returns:
        Shape of ``concentration``.

    References:
        Mardia and Jupp, Directional Statistics (2000), section 9.3.2.
    """
    return _LogPartition.apply(_as_float(concentration, "concentration"), _order_of(dim), False)


def log_partition_scaled(dim: int, concentration: Tensor) -> Tensor:
    r"""``log_partition(dim, concentration) - concentration`` without the cancellation at large concentrations.

    Args:
        dim: d >= 2.
        concentration: kappa >= 0, any shape, float32 or float64.

    Returns:
        Shape of ``concentration``; minus infinity at infinity.
    """
    return _LogPartition.apply(_as_float(concentration, "concentration"), _order_of(dim), True)


def bessel_ratio(dim: int, concentration: Tensor) -> Tensor:
    r"""Mean resultant length of a vMF law, :math:`A_d(\kappa) = I_{d/2}(\kappa) / I_{d/2-1}(\kappa)`.

    Args:
        dim: d >= 2.
        concentration: kappa >= 0, any shape, float32 or float64.

    Returns:
        Shape of ``concentration``, in [0, 1]; 1 at infinity. Differentiable twice more.

    Example:
        >>> bessel_ratio(3, torch.tensor(1.0, dtype=torch.float64))  # coth(1) - 1
        tensor(0.3130, dtype=torch.float64)
    """
    return _Ratio.apply(_as_float(concentration, "concentration"), _order_of(dim), 0)


def bessel_ratio_complement(dim: int, concentration: Tensor) -> Tensor:
    r"""``1 - bessel_ratio(dim, concentration)`` without cancellation: about (d-1) / (2 kappa) for large kappa.

    Args:
        dim: d >= 2.
        concentration: kappa >= 0, any shape, float32 or float64.

    Returns:
        Shape of ``concentration``, in [0, 1]; 0 at infinity.
    """
    return _RatioComplement.apply(_as_float(concentration, "concentration"), _order_of(dim))


def bessel_ratios(order: float, x: Tensor, n_max: int) -> Tensor:
    r"""All ratios :math:`a_n(x) = I_{v+n}(x) / I_v(x)` for n = 0..n_max.

    With v = d/2 - 1 these are the Gegenbauer coefficients of a vMF law relative to those of a point mass.

    Args:
        order: v >= 0.
        x: any shape, >= 0, float32 or float64; infinity gives 1.
        n_max: largest n, >= 0.

    Returns:
        ``(*x.shape, n_max + 1)``, in [0, 1], falling in n. Differentiable once.
    """
    if order < 0:
        raise ValueError(f"`order` must be >= 0, got {order!r}")
    if n_max < 0:
        raise ValueError(f"`n_max` must be >= 0, got {n_max!r}")
    return _Ratios.apply(_as_float(x, "x"), float(order), int(n_max))


def inverse_bessel_ratio(dim: int, rho: Tensor) -> Tensor:
    r"""Concentration whose mean resultant length is ``rho``: the inverse of :func:`bessel_ratio`.

    Args:
        dim: d >= 2.
        rho: in [0, 1], any shape, float32 or float64.

    Returns:
        Shape of ``rho``; 0 at 0 and infinity at 1. Differentiable by the implicit function theorem.
    """
    return _InverseRatio.apply(_as_float(rho, "rho"), _order_of(dim))
