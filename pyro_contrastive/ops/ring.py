"""The grid of all pairs of a batch that is spread over processes: row items stay, column items travel round a ring.

Each of R processes holds the rows and the columns of its N / R items. In R steps every block of columns visits every
process, which adds the tiles of its own rows; the next block is under way while the present one is computed. The
log-sum-exps of the columns travel with their block and come home with the last step. Backward, the columns go round
once more, with their log-sum-exps and incoming gradients, and their own gradient behind them. A process never holds
more than two blocks of columns and one tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_contrastive.ops._tile_sums import Plan, add_tile_gradients, add_tiles, new_diagonal, new_totals, once_each
from pyro_contrastive.ops.joint import Joint, current_joint

__all__ = ["around_the_ring"]


def around_the_ring(plan: Plan, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Diagonal and log-sum-exps of the grid of the joint batch, for the items of this process.

    The gradient with respect to shared tensors is this process's part; it is summed with those of the parameters.

    Args:
        plan: what to evaluate.
        tensors: flat rows and columns ``(B, N / R, k)`` of this process, and the shared tensors.

    Returns:
        positive, row and column, ``(B, N / R)`` each.

    Raises:
        ValueError: on every process, if one has other shapes or options than the rest.
    """
    joint = current_joint()
    assert joint is not None
    gradients = [torch.is_grad_enabled() and t.requires_grad for t in tensors]
    shapes = [tuple(t.shape[::2]) for t in tensors[: plan.items]]
    joint.agree(
        "a contrastive likelihood",
        tensors[0].shape[-2],
        getattr(plan.function, "__name__", type(plan.function).__name__),
        shapes,
        tensors[0].dtype,
        plan.shift,
        plan.symmetric,
        gradients,
    )
    return _Ring.apply(plan, joint, *tensors)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, joint: Joint, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        rows, block, shared = _split(plan, tensors)
        positive = new_diagonal(tensors)
        row = torch.full_like(positive, -torch.inf)
        column = row.clone() if plan.symmetric else None
        for step in range(joint.ranks):
            last = step == joint.ranks - 1
            coming = joint.pass_on([] if last else block, tag=1)
            add_tiles(plan, [*rows, *block, *shared], positive, row, column, own=step == 0)
            if column is not None:
                (column,) = joint.pass_on([column], tag=2).wait()
            block = coming.wait()
        ctx.plan, ctx.joint = plan, joint
        ctx.save_for_backward(*tensors, row, *([] if column is None else [column]))
        return positive, row, column

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan, joint = ctx.plan, ctx.joint
        saved = ctx.saved_tensors
        split = len(saved) - 1 - plan.symmetric
        tensors, (sum_row, *sum_column) = saved[:split], saved[split:]
        rows, block, shared = _split(plan, tensors)
        totals = new_totals(tensors, ctx.needs_input_grad[2:])
        travelling = [k for k in totals if plan.rows <= k < plan.items]
        around = [*sum_column, *(g.contiguous() for g in grads[2:3] if plan.symmetric)]
        for step in range(joint.ranks):
            last = step == joint.ranks - 1
            coming = joint.pass_on([] if last else [*block, *around], tag=1)
            sums, incoming = [sum_row, *around[:1]], [*grads[:2], *around[1:]]
            add_tile_gradients(plan, [*rows, *block, *shared], sums, incoming, totals, own=step == 0)
            moved = joint.pass_on([totals[k] for k in travelling], tag=2).wait()
            totals.update(zip(travelling, moved, strict=True))
            arrived = coming.wait()
            block, around = arrived[: len(block)], arrived[len(block) :]
        return None, None, *once_each(tensors, grads, totals)


def _split(plan: Plan, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Rows, columns (as they can be sent) and shared tensors."""
    columns = [t.contiguous() for t in tensors[plan.rows : plan.items]]
    return list(tensors[: plan.rows]), columns, list(tensors[plan.items :])
