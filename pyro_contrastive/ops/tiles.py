r"""All pairs of a batch without their grid: log-sum-exp of rows and columns, tile by tile, with recomputation.

A contrastive likelihood reads three things off the N x N grid of pair values log f: its diagonal and the log-sum-exp of
its rows and of its columns. Their derivatives are softmax weights, which the log-sum-exps give back. So the grid need
not exist: forward, a tile at a time is computed, added to the running sums and dropped; backward, it is computed once
more, weighted, and differentiated at once. Memory is O(N) beside one tile, for one more evaluation of log f.

A grid is given as :class:`Pairs`: a pure function of two sets of items, and the tensors that it is evaluated on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_contrastive.ops import fused
from pyro_contrastive.ops._tile_sums import (
    Contrast,
    PairFunction,
    Plan,
    Tensors,
    add_tile_gradients,
    add_tiles,
    compiled,
    new_diagonal,
    new_totals,
    once_each,
    sums_of_grid,
)
from pyro_contrastive.ops.joint import current_joint, one_process_only
from pyro_contrastive.ops.precision import at_least_single
from pyro_contrastive.ops.products import products
from pyro_contrastive.ops.ring import around_the_ring

__all__ = ["PLAIN_ELEMENTS", "TILE", "Contrast", "PairFunction", "Pairs", "Tensors", "contrast"]

PLAIN_ELEMENTS = 2048 * 2048
"""Grids of at most this many elements (16 MiB in float32) are computed whole, by ordinary autograd."""

TILE = {"cpu": 1024, "cuda": 4096}
"""Side of a tile by device type: on the CPU few MiB, so that its passes stay near the cache. 2048 elsewhere."""


@dataclass(frozen=True)
class Pairs:
    """A grid of values, one per pair of a row item and a column item, that is not evaluated yet.

    Args:
        function: pure, ``function(rows, columns, shared)``: tuples of tensors ``(..., n, a)`` and ``(..., m, b)`` to
            the tile ``(..., n, m)``; entry (i, j) depends on row item i, column item j and `shared` alone. It reads
            tensors only from its arguments (others get no gradient), and is defined once at module level.
        rows: tensors ``(..., N, a)``, the items before their last axis; leading axes broadcast.
        columns: tensors ``(..., M, b)``, as ``rows``.
        shared: tensors that all pairs have in common, without batch axes.
        compile: evaluate tiles by ``torch.compile``; eagerly, with a warning, where that fails. The first call takes
            its time: for large grids that are evaluated often.

    Example:
        >>> def product(rows, columns, shared):
        ...     return shared[0] * rows[0] @ columns[0].mT
        >>> pairs = Pairs(product, (torch.eye(3),), (torch.eye(3)[:2],), (torch.tensor(5.0),))
        >>> pairs.shape, pairs.grid()[1]
        (torch.Size([3, 2]), tensor([0., 5.]))
    """

    function: PairFunction
    rows: Tensors
    columns: Tensors
    shared: Tensors = ()
    compile: bool = False

    @property
    def batch(self) -> torch.Size:
        """Common leading axes."""
        first, *others = (t.shape[:-2] for t in (*self.rows, *self.columns))
        if all(shape == first for shape in others):
            return first  # broadcast_shapes takes longer than a small grid
        return torch.broadcast_shapes(first, *others)

    @property
    def shape(self) -> torch.Size:
        """Of the grid, ``(..., N, M)``."""
        return self.batch + (self.rows[0].shape[-2], self.columns[0].shape[-2])

    def grid(self) -> Tensor:
        """All values, ``(..., N, M)``, by ordinary autograd."""
        function = compiled(self.function) if self.compile else self.function
        return function(self.rows, self.columns, self.shared)

    def diagonal(self) -> Tensor:
        """Row item i with column item i only, ``(..., N)``: the same function on N grids of one cell."""
        rows, columns = (tuple(t.unsqueeze(-2) for t in side) for side in (self.rows, self.columns))
        return self.function(rows, columns, self.shared).squeeze((-1, -2))

    def compiled(self) -> Pairs:
        """The same pairs with ``compile=True``."""
        return replace(self, compile=True)


def contrast(
    pairs: Pairs | Tensor, *, symmetric: bool = False, shift: float = 0.0, tile: int | None = None
) -> Contrast:
    """Diagonal, and log-sum-exp of the rows and columns, of a square grid.

    Args:
        pairs: the grid ``(..., N, N)``, or what it is computed from.
        symmetric: the columns as well.
        shift: added to the diagonal inside the sums (not to ``positive``): a log weight of the positive.
        tile: side of the tiles, >= 1. By default grids of up to `PLAIN_ELEMENTS` elements, all leading axes counted,
            are computed whole, and larger ones in tiles of the side that `TILE` has for the device, or, inner products
            on a GPU, by one kernel (:mod:`pyro_contrastive.ops.fused`). In a joint batch
            (:mod:`pyro_contrastive.ops.joint`) always tiles.

    Returns:
        Values ``(..., N)``, float32 for a grid in half precision; in a joint batch those of this process's items,
        against those of all. Tiles and the whole grid agree up to rounding; by tiles they are differentiable once.

    Raises:
        ValueError: if `tile` is not a positive integer, or is given for a grid that exists already; in a joint batch
            for such a grid anyway, and for processes that differ in shapes or options.
    """
    if tile is not None and (isinstance(tile, bool) or not isinstance(tile, int) or tile < 1):
        raise ValueError(f"`tile` must be an integer >= 1, the side of a tile, or None (automatic), got {tile!r}")
    if isinstance(pairs, Tensor):
        if tile is not None:
            raise ValueError(
                f"`tile` is for grids that are not evaluated yet, got one of shape {tuple(pairs.shape)}; "
                "pass Pairs, for instance kernel(z1, z2, lazy=True)"
            )
        one_process_only(
            "a grid that one process has evaluated",
            "hand out Pairs (a PairKernel instead of a function, a law with cross_pairs), or leave joint_batch",
        )
        return sums_of_grid(at_least_single(pairs), shift, symmetric)
    if current_joint() is None and tile is None:
        if pairs.shape.numel() <= PLAIN_ELEMENTS:
            return sums_of_grid(at_least_single(pairs.grid()), shift, symmetric)
        if pairs.function is products and not pairs.compile and fused.applies(pairs.rows[0], pairs.columns[0]):
            return _by_fused_kernel(pairs, shift, symmetric)
    side = tile or TILE.get(pairs.rows[0].device.type, 2048)
    flat = _flat(pairs)
    function = compiled(pairs.function) if pairs.compile else pairs.function
    plan = Plan(function, len(pairs.rows), len(flat), side, shift, symmetric, pairs.compile)
    apply = _Tiled.apply if current_joint() is None else around_the_ring
    positive, row, column = apply(plan, *flat, *pairs.shared)
    shape = pairs.shape[:-1]
    return Contrast(positive.view(shape), row.view(shape), None if column is None else column.view(shape))


def _flat(pairs: Pairs) -> list[Tensor]:
    """Rows and columns with their leading axes, broadcast, as one."""
    batch = pairs.batch
    return [t.expand(batch + t.shape[-2:]).reshape(-1, *t.shape[-2:]) for t in (*pairs.rows, *pairs.columns)]


def _by_fused_kernel(pairs: Pairs, shift: float, symmetric: bool) -> Contrast:
    """A grid of :func:`~pyro_contrastive.ops.products.products`; its diagonal by ordinary autograd."""
    flat, shape = _flat(pairs), pairs.shape[:-1]
    a, b = flat[0], flat[len(pairs.rows)]
    terms = [t.squeeze(-1).float() for t in (flat[1], flat[3])] if len(pairs.rows) == 2 else []
    scale = pairs.shared[0] if pairs.shared else None
    row, column = fused.product_sums(a, b, *terms, scale=scale, shift=shift, symmetric=symmetric)
    positive = at_least_single(pairs.diagonal())
    return Contrast(positive, row.view(shape), None if column is None else column.view(shape))


class _Tiled(torch.autograd.Function):
    """(positive, row, column) of the grid that flat tensors (B, N, k) and shared ones span."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        positive = new_diagonal(tensors)
        row = torch.full_like(positive, -torch.inf)
        column = row.clone() if plan.symmetric else None
        add_tiles(plan, tensors, positive, row, column)
        ctx.plan = plan
        ctx.save_for_backward(*tensors, row, *([] if column is None else [column]))
        return positive, row, column

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        saved = ctx.saved_tensors  # once: under activation checkpointing it can be read only once
        split = len(saved) - 1 - plan.symmetric
        tensors, sums = saved[:split], saved[split:]
        totals = new_totals(tensors, ctx.needs_input_grad[1:])
        add_tile_gradients(plan, tensors, sums, grads, totals)
        return None, *once_each(tensors, grads, totals)
