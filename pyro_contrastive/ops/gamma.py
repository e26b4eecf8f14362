r"""Differences of log-gamma and digamma functions that stay accurate when the argument is much larger than the gap."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["digamma_increment", "log_gamma_increment"]

_SHIFT = 8  # arguments are raised by this much, where five terms of Stirling's series are exact to 1e-13
_STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188)  # coefficients of 1/a, 1/a^3, ... (DLMF 5.11.1)


def log_gamma_increment(a: Tensor, b: float) -> Tensor:
    r"""``lgamma(a + b) - lgamma(a)`` without cancellation.

    Args:
        a: > 0, any shape, float32 or float64.
        b: >= 0, a Python number.

    Returns:
        Shape of ``a``; relative error a few eps for every a, where the plain difference loses all digits at a = 1e7.
    """
    value = torch.zeros_like(a)
    for j in range(_SHIFT):
        value = value - torch.log1p(b / (a + j))
    a = a + _SHIFT
    value = value + b * torch.log(a + b) + ((a - 0.5) * torch.log1p(b / a) - b)
    for k, c in enumerate(_STIRLING):
        value = value + c * ((a + b) ** -(2 * k + 1) - a ** -(2 * k + 1))
    return value


def digamma_increment(a: Tensor, b: float) -> Tensor:
    r"""``digamma(a + b) - digamma(a)`` without cancellation: the derivative of :func:`log_gamma_increment`.

    Args:
        a: > 0, any shape, float32 or float64.
        b: >= 0, a Python number.

    Returns:
        Shape of ``a``, >= 0.
    """
    value = torch.zeros_like(a)
    for j in range(_SHIFT):
        value = value + b / ((a + j) * (a + b + j))
    a = a + _SHIFT
    value = value + torch.log1p(b / a) + 0.5 * b / (a * (a + b))
    for k, c in enumerate(_STIRLING):
        value = value - (2 * k + 1) * c * ((a + b) ** -(2 * k + 2) - a ** -(2 * k + 2))
    return value
