"""The commonest grid of pairs: an inner product and a term of each item."""

from __future__ import annotations

from torch import Tensor

from pyro_contrastive.ops.precision import matmul

__all__ = ["products"]


def products(rows: tuple[Tensor, ...], columns: tuple[Tensor, ...], shared: tuple[Tensor, ...] = ()) -> Tensor:
    """``a_i . b_j``, times a scale and plus a term of row i and one of column j where there are any.

    Kernels of this form name this very function in their :class:`~pyro_contrastive.ops.tiles.Pairs`, by which large
    grids on a GPU are recognised as work for one fused kernel (:mod:`pyro_contrastive.ops.fused`).

    Args:
        rows: ``(..., n, d)``, and if both sides have terms ``(..., n, 1)``.
        columns: ``(..., m, d)``, and ``(..., m, 1)``.
        shared: the scale > 0, a scalar tensor, or nothing.

    Returns:
        ``(..., n, m)``; float32 for half precision.

    Example:
        >>> import torch
        >>> products((torch.eye(2), torch.tensor([[1.0], [0.0]])), (torch.eye(2), torch.zeros(2, 1)))
        tensor([[2., 1.],
                [0., 1.]])
    """
    grid = matmul(rows[0], columns[0].mT)
    if shared:
        grid = shared[0] * grid
    return grid if len(rows) == 1 else grid + rows[1] + columns[1].mT
