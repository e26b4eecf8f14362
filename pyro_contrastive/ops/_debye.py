r"""Values of log I_v, of the ratios I_(v+1)/I_v and of their derivatives: plain tensor arithmetic, no autograd.

See :mod:`pyro_contrastive.ops.bessel` for the method and for the differentiable functions.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["DTYPES", "all_ratios", "log_partition", "log_ratios", "ratio", "ratio_complement"]

# dtype -> (smallest order at which the expansion is used, number of its terms). The first omitted term is below
# 1e-14 (float64) and 2e-7 (float32) in absolute value for every x; lower orders are reached by the recurrence.
DTYPES = {torch.float64: (16.0, 12), torch.float32: (8.0, 5)}


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
        value.mul_(t).add_(c)
    return value


def _radius(order: float, x: Tensor) -> Tensor:
    return torch.hypot(x, torch.full((), order, dtype=x.dtype, device=x.device))


def _start_ratio(order: float, x: Tensor, derivatives: int) -> list[Tensor]:
    """r_order(x) and its first derivatives from the expansion; every term carries the factor x of r itself."""
    _, f1, f2, f3 = _correction(order, DTYPES[x.dtype][1])
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
    return max(0, math.ceil(DTYPES[dtype][0] - order))


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


def ratio(order: float, x: Tensor, derivatives: int) -> list[Tensor]:
    """r_order(x) = I_(order+1)/I_order and its derivatives, x >= 0, infinity included."""
    steps = _steps(order, x.dtype)
    r = _start_ratio(order + steps, x, derivatives)
    for j in reversed(range(steps)):
        r = _ratio_down(order + j, x, r)
    at_infinity = torch.isinf(x)
    return [r[0].clamp_max(1.0).masked_fill(at_infinity, 1.0), *(d.masked_fill(at_infinity, 0.0) for d in r[1:])]


def ratio_complement(order: float, x: Tensor) -> Tensor:
    """1 - r_order(x) without cancellation: the recurrence rewritten for the complement."""
    steps = _steps(order, x.dtype)
    top = order + steps
    radius = _radius(top, x)
    t = top / radius
    rest = top * (top / (radius + x))  # radius - x
    correction = _horner(_correction(top, DTYPES[x.dtype][1])[1], t) * x * t**3 / top**2
    q = (top + rest) / (top + radius) + 0.5 * x * t**2 / top**2 + correction
    for j in reversed(range(steps)):
        c = 2 * (order + j + 1)
        gap = c - x * q
        q = gap / (gap + x)
    return q.masked_fill(torch.isinf(x), 0.0)


def log_partition(order: float, x: Tensor, scaled: bool) -> Tensor:
    """g(x) = log[ Gamma(v+1) (2/x)^v I_v(x) ] (zero at x = 0), minus x when scaled."""
    steps = _steps(order, x.dtype)
    top = order + steps
    quotient = _correction(top, DTYPES[x.dtype][1])[0]
    radius = _radius(top, x)
    t = top / radius
    excess = (x / top) * (x / (top + radius))  # radius/top - 1
    value = -2 * top * (x / (radius + x + top)) if scaled else top * excess  # radius - top - x, or radius - top
    value = value - top * torch.log1p(excess / 2) - 0.5 * torch.log1p(excess)
    value = value - (x / radius) ** 2 / (1 + t) * _horner(quotient, t)  # (t - 1) Q(t)
    r = _start_ratio(top, x, 0)
    for j in reversed(range(steps)):
        value = value + torch.log1p(x * r[0] / (2 * (order + j + 1)))
        r = _ratio_down(order + j, x, r)
    return value.masked_fill(torch.isinf(x), -math.inf if scaled else math.inf)


def _ladder(order: float, x: Tensor, n_max: int, derivatives: int) -> list[list[Tensor]]:
    """r_(order+n) and its derivatives for n = 0..n_max: one expansion at the top, then the recurrence."""
    at_infinity = torch.isinf(x)
    finite = x.masked_fill(at_infinity, 0.0)
    steps = [ratio(order + n_max, x, derivatives)]
    r = steps[0]
    for j in reversed(range(n_max)):
        r = _ratio_down(order + j, finite, r)
        steps.append([r[0].masked_fill(at_infinity, 1.0), *(d.masked_fill(at_infinity, 0.0) for d in r[1:])])
    return steps[::-1]


def all_ratios(order: float, x: Tensor, n_max: int, derivative: bool) -> Tensor:
    """a_n = product of r_order .. r_(order+n-1); the product rule adds positive terms only."""
    value, slope = torch.ones_like(x), torch.zeros_like(x)
    out = [slope if derivative else value]
    for step in _ladder(order, x, n_max, int(derivative))[:-1]:
        if derivative:
            slope = slope * step[0] + value * step[1]
        value = value * step[0]
        out.append(slope if derivative else value)
    return torch.stack(out, dim=-1)


def log_ratios(order: float, x: Tensor, n_max: int) -> tuple[Tensor, Tensor]:
    """log a_n and its derivative for n = 0..n_max, each ``(n_max + 1, *x.shape)``, x > 0, infinity included."""
    ladder = torch.stack([step[0] for step in _ladder(order, x, n_max, 0)])
    values = torch.cat([torch.zeros_like(ladder[:1]), ladder[:-1].log().cumsum(0)])
    # r_v'/r_v = 1/x + r_(v+1) - r_v, and the sum telescopes
    degree = torch.arange(n_max + 1.0, dtype=x.dtype, device=x.device).reshape(-1, *[1] * x.dim())
    return values, degree / x + ladder - ladder[0]
