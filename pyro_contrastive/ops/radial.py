r"""Exact draws of the angle of a rotationally symmetric law, without rejection: a monotone map of a Gaussian radius.

A law with density :math:`f(\mu\cdot x)` on :math:`S^{d-1}` is drawn from a Gaussian vector :math:`\epsilon` in the
tangent space at :math:`\mu` (n = d - 1 dimensions). The direction of :math:`\epsilon` is the azimuth; its squared
length s, a chi-square variable with n degrees of freedom that is independent of the direction, is carried to the angle
by the quantile transform. In stereographic coordinates, :math:`\tau = \tan^2(\theta/2) = (1-w)/(1+w)` with
:math:`w = \mu \cdot x`, the draw is

.. math::  x = \frac{(1 - \tau)\,\mu + 2\,\xi}{1 + \tau}, \qquad \xi = c\,\epsilon, \qquad \tau = c^2 s,

and the *stretch* c(s, kappa) is smooth: it is nearly constant, :math:`c^2 \to 1/(b\kappa)` for large kappa (b = 4 for
von Mises-Fisher, 2 for power spherical). This module tabulates :math:`R = \log c^2 + \log(b\kappa + 2n)` once per
dimension by solving :math:`F_{angle}(\tau) = F_{\chi^2_n}(s)` in float64, with each tail solved in its own log
probability, and evaluates a piecewise bicubic polynomial of it. Its derivatives are the exact pathwise (implicit)
gradients of the draws. No loop whose length depends on the data, no host sync.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_contrastive.ops._once import once

__all__ = ["POWER_SPHERICAL", "VON_MISES_FISHER", "RadialFamily", "draw"]

_RADIUS_CELLS, _KAPPA_CELLS = 192, 96
_CHUNK = 1 << 15  # draws evaluated at a time on a CPU: their 16 coefficients each then stay in the cache
_TAIL = 1e-17  # probability outside the tabulated radii: below what a float64 normal generator can reach


@dataclass(frozen=True)
class RadialFamily:
    r"""What the map has to know of a family: log f up to a constant, as a function of :math:`L = \log \tau`.

    Attributes:
        name: for messages and caches.
        rate: b such that :math:`\tau \approx s / (b \kappa)` for large kappa.
        knee: the table is uniform in (n/2 + knee) / (n/2 + knee + kappa); chosen by the error of the table in low d.
        increment: ``(kappa, L, dL) -> log f(L + dL) - log f(L)``, without cancellation, NumPy arrays.
        slope: ``(kappa, L) -> (first, second)`` derivative of log f in L.
    """

    name: str
    rate: float
    knee: float
    increment: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    slope: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return 1.0 / (1.0 + np.exp(-x))


def _softplus_increment(x: np.ndarray, dx: np.ndarray) -> np.ndarray:
    return np.logaddexp(0.0, x + dx) - np.logaddexp(0.0, x)


# log f = kappa w = kappa - 2 kappa sigmoid(L)
VON_MISES_FISHER = RadialFamily(
    "VonMisesFisher",
    4.0,
    3.0,
    lambda kappa, x, dx: -2 * kappa * (_sigmoid(x + dx) - _sigmoid(x)),
    lambda kappa, x: (
        -2 * kappa * _sigmoid(x) * _sigmoid(-x),
        -2 * kappa * _sigmoid(x) * _sigmoid(-x) * (1 - 2 * _sigmoid(x)),
    ),
)
# log f = kappa log(1 + w) = kappa log 2 - kappa softplus(L)
POWER_SPHERICAL = RadialFamily(
    "PowerSpherical",
    2.0,
    1.0,
    lambda kappa, x, dx: -kappa * _softplus_increment(x, dx),
    lambda kappa, x: (-kappa * _sigmoid(x), -kappa * _sigmoid(x) * _sigmoid(-x)),
)


# --------------------------------------------------------------------------------------------------------------------
# Solving for the map at the nodes of the table (NumPy, float64, once per dimension)
# --------------------------------------------------------------------------------------------------------------------

# Exp-sinh quadrature of a decaying function on (0, inf), for a unit scale of the decay.
_U = np.arange(-42, 43) * 0.08
_NODES = np.exp(np.pi / 2 * np.sinh(_U))
_WEIGHTS = _NODES * np.pi / 2 * np.cosh(_U) * 0.08


class _AngleLaw:
    """Density q(L) of L = log tau: f times the area element, sech(L/2)^n."""

    def __init__(self, family: RadialFamily, n: int) -> None:
        self.family, self.n = family, n

    def increment(self, kappa: np.ndarray, x: np.ndarray, dx: np.ndarray) -> np.ndarray:
        area = self.n * (dx / 2 - _softplus_increment(x, dx))
        return area + self.family.increment(kappa, x, dx)

    def slope(self, kappa: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first, second = self.family.slope(kappa, x)
        half = np.tanh(x / 2)
        return first - self.n / 2 * half, second - self.n / 4 * (1 - half**2)

    def mode(self, kappa: np.ndarray) -> np.ndarray:
        low, high = np.full_like(kappa, -60.0), np.full_like(kappa, 1.0)
        for _ in range(80):
            x = (low + high) / 2
            rising = self.slope(kappa, x)[0] > 0
            low, high = np.where(rising, x, low), np.where(rising, high, x)
        return low

    def log_tail(self, kappa: np.ndarray, x: np.ndarray, sign: np.ndarray) -> np.ndarray:
        """log of (integral of q from x outwards, in the direction `sign`) / q(x)."""
        first, second = self.slope(kappa, x)
        scale = 1.0 / np.maximum(np.maximum(-first * sign, 0.0), np.sqrt(np.maximum(-second, 1e-6)))
        dx = (sign * scale)[..., None] * _NODES
        value = self.increment(kappa[..., None], x[..., None], dx)
        return np.log((np.exp(np.minimum(value, 600.0)) * _WEIGHTS).sum(-1) * scale)


def _solve(family: RadialFamily, n: int, radius: np.ndarray, kappa: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """R and dR/dradius on the grid radius x kappa (radius > 0, kappa finite)."""
    from scipy import special

    law = _AngleLaw(family, n)
    s, k = np.meshgrid(radius**2, kappa, indexing="ij")
    lower, upper = special.gammainc(n / 2, s / 2), special.gammaincc(n / 2, s / 2)
    outwards = np.where(lower > 0.5, 1.0, -1.0)  # each node is solved in its smaller tail
    log_probability = np.log(np.where(lower > 0.5, upper, lower))

    base = np.log(s / (family.rate * k + 2 * n))
    middle = law.mode(kappa)  # the normaliser of q is taken relative to q(middle)
    log_total = np.logaddexp(
        law.log_tail(kappa, middle, np.full_like(kappa, -1.0)), law.log_tail(kappa, middle, np.full_like(kappa, 1.0))
    )
    # starting between the mode and the tail, Newton's method cannot overshoot the far side of the mode
    x = np.where(outwards > 0, np.maximum(base, middle), np.minimum(base, middle))
    for _ in range(40):
        log_density = law.increment(k, middle + 0 * k, x - middle) - log_total
        tail = law.log_tail(k, x, outwards)
        step = np.clip((log_density + tail - log_probability) * np.exp(tail) * outwards, -40.0, 40.0)
        x = x + step
        if np.abs(step).max() < 1e-10:
            break
    if not np.abs(step).max() < 1e-7:
        raise RuntimeError(f"the quantile map of {family.name} in dimension {n + 1} did not converge; please report it")
    log_density = law.increment(k, middle + 0 * k, x - middle) - log_total
    log_chi = (n - 1) * np.log(s) / 2 - s / 2 - (n / 2 - 1) * np.log(2.0) - special.gammaln(n / 2)
    slope = np.exp(log_chi - log_density) - 2 / np.sqrt(s)  # dL/dr - d(log s)/dr
    return x - base, slope


def _difference(values: np.ndarray) -> np.ndarray:
    """Derivative along the last axis of a uniform grid with unit spacing, by 7-point stencils."""
    size, width = values.shape[-1], 7
    out = np.empty_like(values)
    powers = np.arange(width)
    for j in range(size):
        start = min(max(j - width // 2, 0), size - width)
        offsets = np.arange(start, start + width) - j
        weights = np.linalg.solve(offsets[None, :] ** powers[:, None].astype(float), (powers == 1).astype(float))
        out[..., j] = values[..., start : start + width] @ weights
    return out


@dataclass(frozen=True)
class _Table:
    coefficients: np.ndarray  # (16, cells): c[4 k + l] of a^k b^l in each cell
    radius_min: float
    radius_step: float
    kappa_scale: float  # p = kappa_scale / (kappa_scale + kappa)


@lru_cache(maxsize=256)
def _table(family: RadialFamily, dim: int) -> _Table:
    from scipy import special

    n = dim - 1
    low = float(np.sqrt(2 * special.gammaincinv(n / 2, _TAIL))) if n > 40 else 0.0
    high = float(np.sqrt(2 * special.gammainccinv(n / 2, _TAIL)))
    radius = np.linspace(low, high, _RADIUS_CELLS + 1)
    share = np.linspace(0.0, 1.0, _KAPPA_CELLS + 1)  # p: 0 is kappa = inf, 1 is kappa = 0
    kappa_scale = n / 2 + family.knee
    kappa = kappa_scale * (1 - share[1:]) / share[1:]

    value = np.zeros((radius.size, share.size))  # R = 0 at kappa = inf
    slope = np.zeros_like(value)
    first = 1 if low == 0.0 else 0
    value[first:, 1:], slope[first:, 1:] = _solve(family, n, radius[first:], kappa)
    if first:  # R is even in the radius: its value at zero is extrapolated in r^2 from a much smaller radius
        value[0, 1:] = _solve(family, n, np.array([radius[1] * 1e-3]), kappa)[0][0]

    slope = slope * (radius[1] - radius[0])
    corners = np.stack([value, slope, _difference(value), _difference(slope)])  # f, f_a, f_b, f_ab per node
    f = np.empty((4, 4, _RADIUS_CELLS, _KAPPA_CELLS))
    for row in range(2):  # rows of the Hermite matrix: value at 0, value at 1, slope at 0, slope at 1
        for column in range(2):
            node = corners[:, row : row + _RADIUS_CELLS, column : column + _KAPPA_CELLS]
            f[row, column], f[row + 2, column] = node[0], node[1]
            f[row, column + 2], f[row + 2, column + 2] = node[2], node[3]
    hermite = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [-3, 3, -2, -1], [2, -2, 1, 1]], dtype=float)
    coefficients = np.einsum("ki,ijrc,lj->klrc", hermite, f, hermite).reshape(16, -1)
    return _Table(coefficients, low, float(radius[1] - radius[0]), kappa_scale)


@lru_cache(maxsize=256)
def _coefficients(family: RadialFamily, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # a plain tensor, even when the first call happens under inference mode
    with torch.inference_mode(False):
        return torch.as_tensor(_table(family, dim).coefficients.T.copy(), dtype=dtype, device=device)


# --------------------------------------------------------------------------------------------------------------------
# Evaluating it (torch)
# --------------------------------------------------------------------------------------------------------------------


def _horner(c: Sequence[Tensor], t: Tensor) -> Tensor:
    return torch.addcmul(c[0], torch.addcmul(c[1], torch.addcmul(c[2], c[3], t), t), t)


def _horner_slope(c: Sequence[Tensor], t: Tensor) -> Tensor:
    return torch.addcmul(c[1], torch.addcmul(2 * c[2], c[3], t, value=3.0), t)


def _bicubic(rows: Tensor, gradients: bool, cell: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """The piecewise polynomial at (a, b) in [0, 1]^2 of each cell, and its slopes; all arguments are flat."""
    if cell.device.type == "cpu" and cell.numel() > _CHUNK:
        parts = zip(*(t.split(_CHUNK) for t in (cell, a, b)), strict=True)
        return tuple(map(torch.cat, zip(*(_bicubic(rows, gradients, *part) for part in parts), strict=True)))
    c = torch.nn.functional.embedding(cell, rows).unbind(-1)
    inner = [_horner(c[4 * k : 4 * k + 4], b) for k in range(4)]
    value = _horner(inner, a)
    if not gradients:
        return (value,)
    return value, _horner_slope(inner, a), _horner([_horner_slope(c[4 * k : 4 * k + 4], b) for k in range(4)], a)


def _evaluate(s: Tensor, kappa: Tensor, dim: int, family: RadialFamily, gradients: bool) -> tuple[Tensor, ...]:
    """c, and with `gradients` also dc/ds and dc/dkappa."""
    table, n = _table(family, dim), dim - 1
    radius = s.sqrt()
    share = table.kappa_scale / (table.kappa_scale + kappa)
    row = ((radius - table.radius_min) / table.radius_step).clamp(0.0, _RADIUS_CELLS)
    column = (share * _KAPPA_CELLS).clamp(0.0, _KAPPA_CELLS)
    i = row.floor().clamp_(0.0, _RADIUS_CELLS - 1.0)
    j = column.floor().clamp_(0.0, _KAPPA_CELLS - 1.0)
    # a NaN has no cell: any valid one will do, and the NaN itself comes out through row - i or column - j
    cell = torch.nan_to_num(i * _KAPPA_CELLS + j).int()
    flat = [t.expand(cell.shape).reshape(-1) for t in (cell, row - i, column - j)]
    rows = _coefficients(family, dim, s.dtype, s.device)
    log_share, *slopes = (t.view(cell.shape) for t in _bicubic(rows, gradients, *flat))
    denominator = family.rate * kappa + 2 * n
    value = torch.exp(0.5 * log_share) * denominator.rsqrt()
    if not gradients:
        return (value,)
    d_radius, d_share = slopes[0] / table.radius_step, slopes[1] * _KAPPA_CELLS
    tiny = torch.finfo(s.dtype).tiny
    d_s = 0.25 * value * d_radius / radius.clamp_min(tiny)  # dR/ds = dR/dr / (2 r)
    d_kappa = -0.5 * value * (d_share * share * share / table.kappa_scale + family.rate / denominator)
    return value, d_s, d_kappa


def _place(s: Tensor, kappa: Tensor, dim: int, family: RadialFamily, gradients: bool) -> tuple[Tensor, ...]:
    """Coefficients of x = along * mu + across * t for tangent vectors t with |t|^2 = s, and their slopes."""
    c, *slopes = _evaluate(s, kappa, dim, family, gradients)
    tau = c * c * s
    scale = (1 + tau).reciprocal()
    along, across = (1 - tau) * scale, 2 * c * scale
    if not gradients:
        return along, across
    c_s, c_kappa = slopes
    tau_s, tau_kappa = c * c + 2 * c * s * c_s, 2 * c * s * c_kappa
    along_s, along_kappa = -2 * scale * scale * tau_s, -2 * scale * scale * tau_kappa
    across_s = 2 * scale * (c_s - c * scale * tau_s)
    across_kappa = 2 * scale * (c_kappa - c * scale * tau_kappa)
    return along, across, along_s, across_s, along_kappa, across_kappa


def _project(noise: Tensor, mu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Component of the noise along mu, the tangent part (in place of the noise), and its squared length."""
    length = torch.linalg.vecdot(noise, mu)
    t = noise.addcmul_(length.unsqueeze(-1), mu, value=-1.0)
    return length, t, torch.linalg.vector_norm(t, dim=-1).square_()


def _combine(x: Tensor, t: Tensor, mu: Tensor, along: Tensor, across: Tensor) -> Tensor:
    """x <- along mu + across t, of unit norm up to rounding, and then exactly."""
    torch.mul(t, across.unsqueeze(-1), out=x).addcmul_(along.unsqueeze(-1), mu)
    return x.mul_(torch.linalg.vector_norm(x, dim=-1, keepdim=True).reciprocal_())


class _Draw(torch.autograd.Function):
    """x(mu, kappa; noise). The noise is a buffer of ours, overwritten; the gradient to mu is the tangential one."""

    @staticmethod
    def forward(ctx: Any, mu: Tensor, kappa: Tensor, noise: Tensor, family: RadialFamily) -> Tensor:
        length, t, s = _project(noise, mu)
        along, across, *slopes = _place(s, kappa, mu.shape[-1], family, gradients=True)
        ctx.save_for_backward(mu, kappa, t, length, along, across, *slopes)
        return _combine(torch.empty_like(t), t, mu, along, across)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        mu, kappa, t, length, along, across, along_s, across_s, along_kappa, across_kappa = ctx.saved_tensors
        grad_mu = grad_kappa = None
        on_mu, on_t = torch.linalg.vecdot(grad, mu), torch.linalg.vecdot(grad, t)
        if ctx.needs_input_grad[1]:
            grad_kappa = (on_mu * along_kappa + on_t * across_kappa).sum_to_size(mu.shape[:-1])
            grad_kappa = once("a draw from a spherical law", grad_kappa, mu, kappa, grad)
        if ctx.needs_input_grad[0]:
            # dx = along dmu + across dt + (along_s mu + across_s t) ds with, for dmu tangent to the sphere at mu,
            # dt = -(t.dmu) mu - length dmu and ds = -2 length (t.dmu)
            weight_grad = along - length * across
            weight_t = -across * on_mu - 2 * length * (on_mu * along_s + on_t * across_s)
            grad_mu = (grad * weight_grad.unsqueeze(-1)).addcmul_(weight_t.unsqueeze(-1), t).sum_to_size(mu.shape)
            grad_mu = once("a draw from a spherical law", grad_mu, mu, kappa, grad)
        return grad_mu, grad_kappa, None, None


def draw(family: RadialFamily, mean_direction: Tensor, concentration: Tensor, noise: Tensor) -> Tensor:
    r"""Points of the sphere with the law of the family, from standard Gaussian noise.

    Args:
        family: which law of the angle.
        mean_direction: unit vectors mu, ``(*batch, d)``, d >= 2.
        concentration: kappa >= 0, ``(*batch,)``; infinity gives the mean direction itself.
        noise: standard normal, ``(*sample, *batch, d)``. It is overwritten.

    Returns:
        ``(*sample, *batch, d)``, differentiable once in the mean direction (tangentially) and the concentration.
    """
    if torch.is_grad_enabled() and (mean_direction.requires_grad or concentration.requires_grad):
        return _Draw.apply(mean_direction, concentration, noise, family)
    mu = mean_direction
    _, t, s = _project(noise, mu)
    along, across = _place(s, concentration, mu.shape[-1], family, gradients=False)
    return _combine(t, t, mu, along, across)
