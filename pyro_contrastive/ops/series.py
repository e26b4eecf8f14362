r"""The expected von Mises-Fisher kernel: the exact evidence of a pair of views whose latents differ.

For z ~ vMF(mu1, k1), z' ~ vMF(mu2, k2) and the pair kernel vMF(z'; z, kappa), the density ratio of the two views,

.. math::  F = E\Big[\frac{e^{\kappa z \cdot z'}}{E_{z'' \sim U}[e^{\kappa z \cdot z''}]}\Big]
             = \sum_{n \ge 0} m_n\, a_n(k_1)\, a_n(k_2)\, a_n(\kappa)\, P_n(\mu_1 \cdot \mu_2),
             \qquad a_n(k) = \frac{I_{\lambda+n}(k)}{I_\lambda(k)},\ \lambda = \tfrac d2 - 1,

is a convolution on the sphere: a product in the degree n. The P_n are Gegenbauer polynomials with P_n(1) = 1 (cosines
at d = 2) and m_n is the number of spherical harmonics of degree n, so that at cosine 1 all terms are positive and below
it they cancel. In float64 that leaves about 30 nats below the peak; before that :mod:`._saddle` takes over smoothly,
which has no cancellation at all. float32 arguments are computed in float64 and rounded at the end.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_contrastive.ops import _debye
from pyro_contrastive.ops._once import once
from pyro_contrastive.ops._saddle import SURE, TINY, fused_length, saddle_log_ratio
from pyro_contrastive.ops.bessel import check_float, log_partition_scaled

__all__ = ["MAX_ORDER", "expected_kernel_log_ratio", "series_order", "shared_latent_kernel_log_ratio"]

MAX_ORDER = 2_000  # pairs that would need more terms take the saddle-point form, which is then exact to 1e-6 nats
# Nats by which the terms left out lie below the result, far from the peak where it is smallest
_MARGIN = {torch.float32: 11.0, torch.float64: 23.0}
# Nats below the peak between which the saddle-point form replaces the series. It is least accurate at d = 2, where the
# rounding error of the series happens to be smallest.
_BLEND, _BLEND_CIRCLE = (22.0, 26.0), (29.0, 35.0)
_FLOOR = 1e-28  # smallest F / peak that is looked at: keeps the log and its gradient finite before it is replaced
_LEAST = 1e-30  # added to a concentration of 0: its terms vanish, its gradient does not
_BLOCK = 1 << 15  # elements that are summed at a time: the working set stays in the cache


# --------------------------------------------------------------------------------------------------------------------
# How many terms
# --------------------------------------------------------------------------------------------------------------------


def _log_multiplicity(dim: int, n: np.ndarray) -> np.ndarray:
    """log of the number of spherical harmonics of degree n = 0..len(n)-1 in dim dimensions."""
    if dim == 2:
        return np.log(np.where(n == 0, 1.0, 2.0))
    # m_n / m_(n-1) = (2n + d - 2)/(2n + d - 4) (n + d - 3)/n
    k = n[1:]
    steps = np.log((2 * k + dim - 2) / (2 * k + dim - 4)) + np.log((k + dim - 3) / k)
    return np.concatenate([[0.0], np.cumsum(steps)])


def _log_iv_leading(order: np.ndarray, x: float) -> np.ndarray:
    radius = np.hypot(order, x)
    return radius - order * np.arcsinh(order / x) - 0.5 * np.log(radius)


@lru_cache(maxsize=4096)
def _order(dim: int, cut: float, exponents: tuple[int, ...]) -> int:
    n = np.arange(MAX_ORDER + 2, dtype=float)
    log_term = _log_multiplicity(dim, n)
    for exponent in exponents:
        orders = n + max(dim / 2 - 1, 0.1)
        log_iv = _log_iv_leading(orders, 2.0 ** (exponent / 8))
        log_term = log_term + log_iv - log_iv[0]
    return int(np.flatnonzero(log_term >= log_term.max() - cut)[-1]) + 1


def series_order(dim: int, *concentrations: float, dtype: torch.dtype = torch.float64) -> int:
    """Number of the last term that matters when no concentration exceeds those given.

    Args:
        dim: d >= 2.
        concentrations: the largest of each argument, > 0; infinite ones do not limit the sum and may be left out.
        dtype: of the result, float32 or float64.

    Returns:
        Largest degree n, at most ``MAX_ORDER + 1``, which stands for "more".

    Example:
        >>> series_order(10, 64.0, 64.0, 20.0), series_order(10, 64.0, 64.0, 20.0, dtype=torch.float32)
        (39, 34)
    """
    # rounded up to the next eighth of an octave, so that a training run meets few different orders
    finite = [max(float(k), 0.25) for k in concentrations if k < SURE]
    if not finite:
        return MAX_ORDER + 1
    cut = min(_blend(dim)[1], 2 * min(finite)) + _MARGIN[dtype]
    return _order(dim, cut, tuple(sorted(math.ceil(8 * math.log2(k)) for k in finite)))


def _blend(dim: int) -> tuple[float, float]:
    return _BLEND_CIRCLE if dim == 2 else _BLEND


@lru_cache
def _largest_for_series(dim: int) -> float:
    """Concentration up to which MAX_ORDER terms are enough if the two others are infinite."""
    low, high = 0, 8 * 27
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _order(dim, 60.0, (middle,)) <= MAX_ORDER else (low, middle)
    return float(2.0 ** (low / 8))


# --------------------------------------------------------------------------------------------------------------------
# The sum
# --------------------------------------------------------------------------------------------------------------------


def _tables(dim: int, order: int, k1: Tensor, k2: Tensor, kappa: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Left and right factors of the terms ``(order+1, *shape)``, their log scale, and d log a_n / dk of k1, k2, kappa.

    The multiplicity is split between the sides, and each side is divided by its largest entry: nothing overflows.
    """
    sizes = [k.numel() for k in (k1, k2, kappa)]
    logs, slopes = _debye.log_ratios(dim / 2 - 1, torch.cat([k.reshape(-1) for k in (k1, k2, kappa)]), order)
    (a1, a2, a3), slope = (
        [part.reshape(-1, *k.shape) for part, k in zip(t.split(sizes, 1), (k1, k2, kappa), strict=True)]
        for t in (logs, slopes)
    )
    half = 0.5 * torch.as_tensor(_log_multiplicity(dim, np.arange(order + 1.0)), device=k1.device)
    half = half.reshape(-1, *[1] * k1.dim())
    left, right = a1 + a3 + half, a2 + half
    scale_left, scale_right = left.amax(0), right.amax(0)
    return (left - scale_left).exp(), (right - scale_right).exp(), scale_left + scale_right, slope


def _polynomials(dim: int, order: int, cosine: Tensor) -> Iterator[Tensor]:
    """Yield P_0..P_order at the cosine; each is overwritten when the next but one is asked for."""
    previous, current = torch.ones_like(cosine), cosine.clone()
    yield previous
    if order >= 1:
        yield current
    for n in range(1, order):  # (n + d - 2) P_(n+1) = (2n + d - 2) cos P_n - n P_(n-1)
        previous.mul_(-n / (n + dim - 2)).addcmul_(current, cosine, value=(2 * n + dim - 2) / (n + dim - 2))
        previous, current = current, previous
        yield current


def _raise_dimension(dim: int, n: int, lower: Tensor, polynomial: Tensor) -> Tensor:
    """P_n of dimension d + 2, in place of P_(n-2) of dimension d + 2, from P_n of dimension d; a weighted mean."""
    if n < 2:
        return polynomial.clone()
    # (n + lambda) C_n = lambda (C_n - C_(n-2) of order lambda + 1), all divided by their values at 1
    return lower.lerp_(polynomial, (2 * n + dim - 2) * (dim - 1) / ((n + dim - 1) * (n + dim - 2)))


def _contract(values: Tensor, other: Tensor, shape: torch.Size) -> Tensor:
    """Sum of ``values * other`` over the axes that ``shape`` lacks."""
    if shape[-1] == 1 and other.shape[-2] == 1 and other.shape[-1] == values.shape[-1]:  # a grid's rows
        return (values @ other.mT).sum_to_size(shape)
    if shape[-2] == 1 and other.shape[-1] == 1 and other.shape[-2] == values.shape[-2]:  # a grid's columns
        return (other.mT @ values).sum_to_size(shape)
    return (values * other).sum_to_size(shape)


def _row_blocks(shape: torch.Size) -> list[slice]:
    step = max(1, _BLOCK // max(1, shape.numel() // max(1, shape[-2])))
    return [slice(i, i + step) for i in range(0, shape[-2], step)]


def _rows(table: Tensor, block: slice) -> Tensor:
    """The block of rows (second axis from the end) of a table that may have only one."""
    return table if table.shape[-2] == 1 else table[..., block, :]


class _Series(torch.autograd.Function):
    """log F, and log F at cosine 1 without gradient; arguments float64, with at least two axes, broadcastable."""

    @staticmethod
    def forward(
        ctx: Any, dim: int, order: int, k1: Tensor, k2: Tensor, kappa: Tensor, cosine: Tensor
    ) -> tuple[Tensor, Tensor]:
        left, right, scale, _ = _tables(dim, order, k1, k2, kappa)
        total = torch.zeros_like(cosine)
        slope = torch.zeros_like(cosine) if ctx.needs_input_grad[5] else None  # of F in the cosine
        for block in _row_blocks(cosine.shape):
            part = total[..., block, :]
            raised: list[Tensor] = [part, part]  # P_n, P_(n-1) in dimension d + 2
            for n, p in enumerate(_polynomials(dim, order, cosine[..., block, :])):
                term = _rows(left[n], block) * _rows(right[n], block)
                part.addcmul_(term, p)
                if slope is not None:
                    if n:  # P_n' = n (n + d - 2) / (d - 1) times P_(n-1) in dimension d + 2
                        slope[..., block, :].addcmul_(term, raised[0], value=n * (n + dim - 2) / (dim - 1))
                    raised = [_raise_dimension(dim, n, raised[1], p), raised[0]]
        top = _peak(left, right)
        total = torch.maximum(total, _FLOOR * top)
        ctx.save_for_backward(k1, k2, kappa, cosine, total, slope)
        ctx.static = (dim, order)
        peak = top.log() + scale
        ctx.mark_non_differentiable(peak)
        return total.log() + scale, peak

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
        k1, k2, kappa, cosine, total, slope = ctx.saved_tensors
        with torch.no_grad():
            weight = grad / total
            grads: list[Tensor | None] = [None, None, None]
            if any(ctx.needs_input_grad[2:5]):
                dim, order = ctx.static
                grads = _gradients(dim, order, k1, k2, kappa, cosine, weight)
            grads.append(None if slope is None else weight * slope)
        inputs = (k1, k2, kappa, cosine, grad)
        name = "expected_kernel_log_ratio"
        return None, None, *(None if g is None else once(name, g, *inputs) for g in grads)


def _gradients(
    dim: int, order: int, k1: Tensor, k2: Tensor, kappa: Tensor, cosine: Tensor, weight: Tensor
) -> list[Tensor | None]:
    """Of sum(weight * F), on the scale of the tables, to k1, k2 and kappa."""
    left, right, _, slopes = _tables(dim, order, k1, k2, kappa)
    to_left, to_right = torch.zeros_like(left), torch.zeros_like(right)
    for block in _row_blocks(cosine.shape):
        w = weight[..., block, :]
        term = torch.empty_like(w)
        for n, p in enumerate(_polynomials(dim, order, cosine[..., block, :])):
            a, b = _rows(left[n], block), _rows(right[n], block)
            torch.mul(w, p, out=term)
            _rows(to_left[n], block).add_(_contract(term, b, a.shape))
            _rows(to_right[n], block).add_(_contract(term, a, b.shape))
    to_left *= left
    to_right *= right
    return [
        (to_left * slopes[0]).sum(0).sum_to_size(k1.shape),
        (to_right * slopes[1]).sum(0).sum_to_size(k2.shape),
        (to_left * slopes[2]).sum(0).sum_to_size(kappa.shape),
    ]


def _peak(left: Tensor, right: Tensor) -> Tensor:
    """The sum at cosine 1, where every polynomial is 1."""
    if left.shape[-1] == 1 and right.shape[-2] == 1:
        return torch.einsum("n...ix,n...xj->...ij", left, right)
    return (left * right).sum(0)


# --------------------------------------------------------------------------------------------------------------------
# The public function
# --------------------------------------------------------------------------------------------------------------------


def shared_latent_kernel_log_ratio(dim: int, concentration1: Tensor, concentration2: Tensor, cosine: Tensor) -> Tensor:
    r"""Exact log evidence of two views that share one latent: the limit of an infinite pair concentration.

    .. math::  \log \frac{p(x, x')}{p(x)\,p(x')} = \Phi(|k_1 \mu_1 + k_2 \mu_2|) - \Phi(k_1) - \Phi(k_2)

    Args:
        dim: d >= 2.
        concentration1: k1 >= 0, float32 or float64; infinity for a latent that is known exactly.
        concentration2: k2 >= 0, likewise.
        cosine: of the mean directions, in [-1, 1]. All broadcast.

    Returns:
        Broadcast shape, in nats. Differentiable.

    Example:
        >>> shared_latent_kernel_log_ratio(3, torch.tensor(5.0), torch.tensor(5.0), torch.tensor([1.0, -1.0]))
        tensor([ 1.6095, -5.3947])
    """
    k1, k2 = concentration1.clamp_max(SURE), concentration2.clamp_max(SURE)
    fused = fused_length(k1, k2, cosine)
    # Phi(k) = k + scaled(k): the linear parts, fused - k1 - k2, are combined before they can cancel
    linear = (TINY - 2 * k1 * k2 * (1 - cosine)) / (fused + k1 + k2)
    return linear + log_partition_scaled(dim, fused) - log_partition_scaled(dim, k1) - log_partition_scaled(dim, k2)


def expected_kernel_log_ratio(
    dim: int, concentration1: Tensor, concentration2: Tensor, concentration: Tensor, cosine: Tensor
) -> Tensor:
    r"""Exact log evidence of two views with von Mises-Fisher posteriors under a von Mises-Fisher pair law.

    .. math::  \log \frac{p(x, x')}{p(x)\,p(x')} = \log E\Big[\frac{e^{\kappa z \cdot z'}}{C_d(0)/C_d(\kappa)}\Big],
               \qquad z \sim vMF(\mu_1, k_1),\ z' \sim vMF(\mu_2, k_2),\ \cos = \mu_1 \cdot \mu_2,

    for a latent that is uniform over all views. Symmetric in the three concentrations, rising in the cosine, zero when
    one concentration is zero. No sampling; the memory is a few copies of the result.

    Args:
        dim: d >= 2.
        concentration1: k1 > 0, float32 or float64; infinity for a latent that is known exactly.
        concentration2: k2 > 0, likewise.
        concentration: kappa > 0 of the pair; infinity when both views share one latent (then the closed form
            :math:`\Phi(|k_1\mu_1 + k_2\mu_2|) - \Phi(k_1) - \Phi(k_2)` is used). A tensor that is infinite must be so
            everywhere.
        cosine: in [-1, 1] (rounding beyond it is cut off, its gradient kept). All four broadcast; a grid of N x M
            pairs, with concentrations ``(N, 1)`` and ``(1, M)``, is the fast case.

    Returns:
        Broadcast shape, in nats, in the common dtype. Differentiable once, in all four.

    Raises:
        ValueError: for a dimension below 2 or a negative concentration. NaN gives NaN.
        TypeError: for arguments that are not float32 or float64 tensors.

    References:
        Kirchhof et al. 2023 (arXiv 2302.02865) for the model; the addition theorem of spherical harmonics for the
        series (Dai and Xu, Approximation Theory and Harmonic Analysis on Spheres, 2013, section 1.2).

    Example:
        >>> one = torch.ones(2, dtype=torch.float64)
        >>> expected_kernel_log_ratio(10, 16 * one, 64 * one, 20 * one, torch.tensor([1.0, 0.4], dtype=torch.float64))
        tensor([4.9766, 0.6505], dtype=torch.float64)
    """
    arguments = (concentration1, concentration2, concentration, cosine)
    for name, value in zip(("concentration1", "concentration2", "concentration", "cosine"), arguments, strict=True):
        check_float(value, name)
    if dim < 2:
        raise ValueError(f"`dim` must be an integer >= 2 (the sphere S^(dim-1)), got {dim!r}")
    shape = torch.broadcast_shapes(*(t.shape for t in arguments))
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in arguments))
    if not shape.numel():
        return torch.empty(shape, dtype=dtype, device=cosine.device)
    smallest, largest = _ranges(arguments[:3])
    if any(k < 0 for k in smallest):  # NaN passes and stays NaN, as in every other operation
        raise ValueError(f"concentrations must be >= 0, got a smallest value of {min(smallest)!r}")
    for known in (2, 0, 1):  # the three concentrations play the same part: an infinite one leaves the closed form
        if smallest[known] >= SURE:
            a, b = (k for i, k in enumerate(arguments[:3]) if i != known)
            return shared_latent_kernel_log_ratio(dim, a, b, cosine).to(dtype)
    k1, k2, kappa, c = (_two_axes(t.double(), len(shape)) for t in arguments)
    k1, k2, kappa = (k + _LEAST for k in (k1, k2, kappa))
    c = c + (c.detach().clamp(-1, 1) - c.detach())
    c = c.expand(torch.broadcast_shapes(*(t.shape for t in (k1, k2, kappa, c))))
    order = series_order(dim, *largest, dtype=dtype)
    log_ratio, peak = _Series.apply(dim, min(order, MAX_ORDER), k1, k2, kappa, c)
    if order > MAX_ORDER or 2 * min(largest) > _blend(dim)[0]:  # F(1)/F(c) <= exp(2k) for each concentration
        log_ratio = _with_far_side(dim, order, k1, k2, kappa, c, log_ratio, peak)
    return log_ratio.reshape(shape).to(dtype)


def _ranges(concentrations: Sequence[Tensor]) -> tuple[list[float], list[float]]:
    """Smallest and largest entry of each, in one transfer."""
    bounds = torch.stack([bound.double() for k in concentrations for bound in torch.aminmax(k.detach())]).tolist()
    return bounds[::2], bounds[1::2]


def _two_axes(value: Tensor, axes: int) -> Tensor:
    """At least two axes: (E,) becomes a column, everything else gets leading ones."""
    if axes < 2:
        return value.reshape(-1, 1)
    return value.reshape(*[1] * (axes - value.dim()), *value.shape)


def _with_far_side(
    dim: int, order: int, k1: Tensor, k2: Tensor, kappa: Tensor, cosine: Tensor, log_ratio: Tensor, peak: Tensor
) -> Tensor:
    """Replace the series by the saddle-point form where it has cancelled, or is too short."""
    with torch.no_grad():
        start, end = _blend(dim)
        share = ((peak - log_ratio - start) / (end - start)).clamp(0, 1)
        if order > MAX_ORDER:
            share = share.masked_fill(1 / (1 / k1 + 1 / k2 + 1 / kappa) > _largest_for_series(dim), 1.0)
        far = share.nonzero(as_tuple=True)
    if not len(far[0]):
        return log_ratio
    share = share[far]
    saddle = saddle_log_ratio(dim, *(t.expand(cosine.shape)[far] for t in (k1, k2, kappa, cosine)))
    # where the series no longer counts it may be rounding noise: a product with 0 keeps it out of the gradient too
    return log_ratio.index_put(far, (1 - share) * log_ratio[far] + share * saddle)
