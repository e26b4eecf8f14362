r"""Modified Bessel functions of the first kind, in log space and in any order.

Everything that a von Mises-Fisher law needs follows from :math:`\log I_v(x)` and the ratio
:math:`r_v(x) = I_{v+1}(x) / I_v(x)`, and two properties make them safe to compute:

* downwards in the order, :math:`r_v = x / (2(v+1) + x\, r_{v+1})` (DLMF 10.29.1) adds positive numbers only;
* for large order the uniform (Debye) expansion of :math:`\log I_v` (DLMF 10.41.3) is accurate for *every* x.

So each function starts from the Debye expansion at an order that is large enough for its dtype and walks down the few
steps to the order asked for. All quantities are relative to their value at x = 0, which keeps them accurate there
too. Derivatives are computed by the differentiated recurrence, not by differentiating rounded values: each function
is an autograd function whose backward pass calls the next derivative. No SciPy, no host sync, float32 and float64.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_contrastive.ops import _debye
from pyro_contrastive.ops._once import once

__all__ = [
    "bessel_ratio",
    "bessel_ratio_complement",
    "bessel_ratios",
    "inverse_bessel_ratio",
    "log_iv",
    "log_partition",
    "log_partition_scaled",
    "matched_log_density",
]

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
        return _debye.log_partition(order, x, scaled)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        order, scaled = ctx.static
        slope = -_RatioComplement.apply(x, order) if scaled else _Ratio.apply(x, order, 0)
        return grad * slope, None, None


class _RatioComplement(_Function):
    @staticmethod
    def forward(x: Tensor, order: float) -> Tensor:
        return _debye.ratio_complement(order, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return -grad * _Ratio.apply(x, ctx.static[0], 1), None


class _Ratio(_Function):
    @staticmethod
    def forward(x: Tensor, order: float, derivative: int) -> Tensor:
        return _debye.ratio(order, x, derivative)[derivative]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        order, derivative = ctx.static
        if derivative == 2:
            raise NotImplementedError(
                "Bessel ratios are differentiable twice (log-partitions three times), and one more was asked for"
            )
        return grad * _Ratio.apply(x, order, derivative + 1), None, None


class _Ratios(_Function):
    @staticmethod
    def forward(x: Tensor, order: float, n_max: int) -> Tensor:
        return _debye.all_ratios(order, x, n_max, derivative=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        order, n_max = ctx.static
        slopes = _debye.all_ratios(order, x, n_max, derivative=True)
        return once("bessel_ratios", (grad * slopes).sum(-1), x, grad), None, None


def _invert(rho: Tensor, order: float) -> tuple[Tensor, Tensor]:
    """kappa with r_order(kappa) = rho, and r' there, by Newton steps from a start that is within a few percent."""
    dim = 2 * order + 2
    kappa = rho * (dim - rho**2) / (1 - rho**2)  # Banerjee et al. 2005 (JMLR 6)
    for _ in range(4 if rho.dtype == torch.float64 else 2):
        # on A where it is close to a line, on log(1 - A) where A saturates
        value, slope = _debye.ratio(order, kappa, 1)
        gap = 1 - value
        step = torch.where(rho < 0.5, rho - value, gap * torch.log(gap / (1 - rho))) / slope
        kappa = (kappa + step).clamp_min(0.0)
    # `slope` belongs to the kappa before the last step, which is as close as Newton's method needs
    return kappa.masked_fill(rho >= 1, math.inf).masked_fill(rho == 0, 0.0), slope


class _InverseRatio(_Function):
    @staticmethod
    def forward(rho: Tensor, order: float) -> Tensor:
        return _invert(rho, order)[0]

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


class _MatchedLogDensity(torch.autograd.Function):
    """kappa cos - g(kappa) at kappa = A^-1(rho). As g' = A = rho, its derivatives need few more Bessel functions."""

    @staticmethod
    def forward(ctx: Any, rho: Tensor, cosine: Tensor, order: float) -> Tensor:
        kappa, _ = _invert(rho, order)
        ctx.save_for_backward(rho, cosine, kappa)
        ctx.order = order
        return kappa * cosine - _debye.log_partition(order, kappa, False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rho, cosine, kappa = ctx.saved_tensors
        slope = _debye.ratio(ctx.order, kappa, 1)[1]
        grad_rho = torch.where(slope > 0, grad * (cosine - rho) / slope, torch.zeros_like(grad))
        inputs = (rho, cosine, grad)
        name = "matched_log_density"
        return once(name, grad_rho, *inputs), once(name, grad * kappa, *inputs), None


# --------------------------------------------------------------------------------------------------------------------
# Public functions
# --------------------------------------------------------------------------------------------------------------------


def check_float(x: Tensor, name: str) -> Tensor:
    """Return `x` if it is a float32 or float64 tensor; raise TypeError naming it otherwise."""
    if not isinstance(x, Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {type(x).__name__}; wrap it in torch.as_tensor")
    if x.dtype not in _debye.DTYPES:
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
        Shape of ``x``; -inf at x = 0 for v > 0, +inf at infinity. Differentiable three times.

    Raises:
        ValueError: for a negative order.
        TypeError: for another dtype.

    Example:
        >>> log_iv(0.5, torch.tensor([1.0], dtype=torch.float64))  # sqrt(2/pi) sinh(1)
        tensor([-0.0644], dtype=torch.float64)
    """
    if order < 0:
        raise ValueError(f"`order` must be >= 0, got {order!r}")
    x = check_float(x, "x")
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
    return _LogPartition.apply(check_float(concentration, "concentration"), _order_of(dim), False)


def log_partition_scaled(dim: int, concentration: Tensor) -> Tensor:
    r"""``log_partition(dim, concentration) - concentration`` without the cancellation at large concentrations.

    Args:
        dim: d >= 2.
        concentration: kappa >= 0, any shape, float32 or float64.

    Returns:
        Shape of ``concentration``; minus infinity at infinity.
    """
    return _LogPartition.apply(check_float(concentration, "concentration"), _order_of(dim), True)


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
    return _Ratio.apply(check_float(concentration, "concentration"), _order_of(dim), 0)


def bessel_ratio_complement(dim: int, concentration: Tensor) -> Tensor:
    r"""``1 - bessel_ratio(dim, concentration)`` without cancellation: about (d-1) / (2 kappa) for large kappa.

    Args:
        dim: d >= 2.
        concentration: kappa >= 0, any shape, float32 or float64.

    Returns:
        Shape of ``concentration``, in [0, 1]; 0 at infinity.
    """
    return _RatioComplement.apply(check_float(concentration, "concentration"), _order_of(dim))


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
    return _Ratios.apply(check_float(x, "x"), float(order), int(n_max))


def inverse_bessel_ratio(dim: int, rho: Tensor) -> Tensor:
    r"""Concentration whose mean resultant length is ``rho``: the inverse of :func:`bessel_ratio`.

    Args:
        dim: d >= 2.
        rho: in [0, 1], any shape, float32 or float64.

    Returns:
        Shape of ``rho``; 0 at 0 and infinity at 1. Differentiable by the implicit function theorem.
    """
    return _InverseRatio.apply(check_float(rho, "rho"), _order_of(dim))


def matched_log_density(dim: int, rho: Tensor, cosine: Tensor) -> Tensor:
    r"""Log density ratio to uniform, at angle cosine, of the vMF law whose mean resultant length is ``rho``.

    Equal to ``kappa * cosine - log_partition(dim, kappa)`` at ``kappa = inverse_bessel_ratio(dim, rho)``, cheaper.

    Args:
        dim: d >= 2.
        rho: in [0, 1), any shape, float32 or float64.
        cosine: in [-1, 1], same shape.

    Returns:
        Shape of ``rho``, in nats. Differentiable once.
    """
    return _MatchedLogDensity.apply(check_float(rho, "rho"), cosine, _order_of(dim))
