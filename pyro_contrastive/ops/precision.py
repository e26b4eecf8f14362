"""Matrix products that mixed precision leaves alone, and that add up in float32 whatever they are given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["HALF", "at_least_single", "matmul"]

HALF = (torch.bfloat16, torch.float16)


def at_least_single(value: Tensor) -> Tensor:
    """Half precision as float32: sums over a batch are not for 8 bits."""
    return value.float() if value.dtype in HALF else value


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in the dtype of the arguments, under ``torch.autocast`` as well; in float32 for half precision.

    Cosines in half precision are off by up to 0.4 %, which a concentration multiplies: at 100 the log density would be
    off by a large part of a nat. Embeddings in half precision are rounded once, when they are made, and their products
    are exact: on a GPU the tensor cores multiply halves and add up in float32.

    Args:
        a: ``(..., N, d)``.
        b: ``(..., d, M)``, same dtype and device.

    Returns:
        ``(..., N, M)``; float32 for bfloat16 and float16.

    Example:
        >>> matmul(torch.full((1, 3), 0.1, dtype=torch.bfloat16), torch.ones(3, 1, dtype=torch.bfloat16))
        tensor([[0.3003]])
    """
    with torch.autocast(a.device.type, enabled=False):
        return _HalfProduct.apply(a, b) if a.dtype in HALF and b.dtype == a.dtype else a @ b


def _wide(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in float32, from halves by the tensor cores of a GPU."""
    half = b.dtype if b.dtype in HALF else a.dtype
    plain = a.dim() == b.dim() == 3 and len(a) == len(b)
    if plain and a.is_cuda and "dtype" in torch.ops.aten.bmm.overloads():  # from torch 2.8 on
        return torch.bmm(a.to(half), b.to(half), out_dtype=torch.float32)
    return a.float() @ b.float()


class _HalfProduct(torch.autograd.Function):
    """Product of halves in float32. On a GPU the incoming gradient is rounded to halves, as in any mixed precision."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return _wide(a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            to_a = _wide(grad, b.mT).sum_to_size(a.shape).to(a.dtype) if ctx.needs_input_grad[0] else None
            to_b = _wide(a.mT, grad).sum_to_size(b.shape).to(b.dtype) if ctx.needs_input_grad[1] else None
        return to_a, to_b
