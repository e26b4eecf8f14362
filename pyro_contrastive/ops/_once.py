"""Gradients that can be taken once, and say so when they are differentiated again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["once"]


class _Barrier(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, value: Tensor, *inputs: Tensor) -> Tensor:
        ctx.name = name
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.name} is differentiable once, and a second derivative was asked for; "
            "compute the first one without create_graph=True, or detach it"
        )


def once(name: str, value: Tensor, *inputs: Tensor) -> Tensor:
    """Mark a gradient computed inside a backward pass as one that must not be differentiated.

    (torch's ``once_differentiable`` returns a constant, that is a silent zero, when only the inputs need a gradient.)

    Args:
        name: what is differentiated, for the message.
        value: the gradient.
        inputs: tensors that it depends on.

    Returns:
        ``value``, whose backward pass raises RuntimeError.
    """
    return _Barrier.apply(name, value.detach(), *inputs) if torch.is_grad_enabled() else value
