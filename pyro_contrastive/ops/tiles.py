r"""All pairs of a batch without their grid: log-sum-exp of rows and columns, tile by tile, with recomputation.

A contrastive likelihood reads three things off the N x N grid of pair values log f: its diagonal and the log-sum-exp of
its rows and of its columns. Their derivatives are softmax weights, which the log-sum-exps give back. So the grid need
not exist: forward, a tile at a time is computed, added to the running sums and dropped; backward, it is computed once
more, weighted, and differentiated at once. Memory is O(N) beside one tile, for one more evaluation of log f.

A grid is given as :class:`Pairs`: a pure function of two sets of items, and the tensors that it is evaluated on.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_contrastive.ops._once import once

__all__ = ["PLAIN_ELEMENTS", "TILE", "Contrast", "Pairs", "contrast"]

Tensors = tuple[Tensor, ...]
PairFunction = Callable[[Tensors, Tensors, Tensors], Tensor]

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
        return torch.broadcast_shapes(*(t.shape[:-2] for t in (*self.rows, *self.columns)))

    @property
    def shape(self) -> torch.Size:
        """Of the grid, ``(..., N, M)``."""
        return self.batch + (self.rows[0].shape[-2], self.columns[0].shape[-2])

    def grid(self) -> Tensor:
        """All values, ``(..., N, M)``, by ordinary autograd."""
        function = _compiled(self.function) if self.compile else self.function
        return function(self.rows, self.columns, self.shared)

    def compiled(self) -> Pairs:
        """The same pairs with ``compile=True``."""
        return replace(self, compile=True)


class Contrast(NamedTuple):
    """What a contrastive likelihood needs of a grid (..., N, N) whose diagonal holds the positives.

    Args:
        positive: the diagonal, ``(..., N)``.
        row: log-sum-exp of every row, ``(..., N)``.
        column: log-sum-exp of every column, ``(..., N)``; None unless asked for.
    """

    positive: Tensor
    row: Tensor
    column: Tensor | None


def contrast(
    pairs: Pairs | Tensor, *, symmetric: bool = False, shift: float = 0.0, tile: int | None = None
) -> Contrast:
    """Diagonal, and log-sum-exp of the rows and columns, of a square grid.

    Args:
        pairs: the grid ``(..., N, N)``, or what it is computed from.
        symmetric: the columns as well.
        shift: added to the diagonal inside the sums (not to ``positive``): a log weight of the positive.
        tile: side of the tiles, >= 1. By default grids of up to `PLAIN_ELEMENTS` elements, all leading axes counted, are
            computed whole, and larger ones in tiles of the side that `TILE` has for the device.

    Returns:
        Values ``(..., N)``. Tiles and the whole grid agree up to rounding; by tiles they are differentiable once.

    Raises:
        ValueError: if `tile` is not a positive integer, or is given for a grid that exists already.
    """
    if tile is not None and (isinstance(tile, bool) or not isinstance(tile, int) or tile < 1):
        raise ValueError(f"`tile` must be an integer >= 1, the side of a tile, or None (automatic), got {tile!r}")
    if isinstance(pairs, Tensor):
        if tile is not None:
            raise ValueError(
                f"`tile` is for grids that are not evaluated yet, got one of shape {tuple(pairs.shape)}; "
                "pass Pairs, for instance kernel(z1, z2, lazy=True)"
            )
        return Contrast(*_statistics(pairs, shift, True, symmetric))
    if tile is None and pairs.shape.numel() <= PLAIN_ELEMENTS:
        return Contrast(*_statistics(pairs.grid(), shift, True, symmetric))
    side = tile or TILE.get(pairs.rows[0].device.type, 2048)
    batch = pairs.batch
    flat = [t.expand(batch + t.shape[-2:]).reshape(-1, *t.shape[-2:]) for t in (*pairs.rows, *pairs.columns)]
    function = _compiled(pairs.function) if pairs.compile else pairs.function
    plan = _Plan(function, len(pairs.rows), len(flat), side, shift, symmetric, pairs.compile)
    values = _Tiled.apply(plan, *flat, *pairs.shared)
    return Contrast(*(value if value is None else value.view(pairs.shape[:-1]) for value in values))


# --------------------------------------------------------------------------------------------------------------------
# One tile
# --------------------------------------------------------------------------------------------------------------------


def _shifted(log_f: Tensor, shift: float, diagonal: bool) -> Tensor:
    if not diagonal or shift == 0.0:
        return log_f
    positive = log_f.diagonal(dim1=-2, dim2=-1)
    return torch.diagonal_scatter(log_f, positive + shift, dim1=-2, dim2=-1)


def _statistics(
    log_f: Tensor, shift: float, diagonal: bool, symmetric: bool
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Diagonal, if it is the grid's, and log-sum-exps of one tile."""
    positive = log_f.diagonal(dim1=-2, dim2=-1) if diagonal else None
    log_f = _shifted(log_f, shift, diagonal)
    return positive, log_f.logsumexp(-1), log_f.logsumexp(-2) if symmetric else None


def _weights(
    log_f: Tensor, sums: list[Tensor], grads: list[Tensor], on_positive: Tensor | None, shift: float
) -> Tensor:
    """Derivative with respect to the tile: softmax weights of rows (and columns), and the positives."""
    log_f = _shifted(log_f, shift, on_positive is not None)
    # -inf throughout a row: its entries have no weight (rather than that of exp(-inf + inf))
    softmax = [torch.exp(log_f - total.masked_fill(total == -torch.inf, 0.0)) for total in sums]
    weight = softmax[0] * grads[0]
    if len(sums) == 2:
        weight = torch.addcmul(weight, softmax[1], grads[1])
    if on_positive is not None:
        weight = torch.diagonal_scatter(weight, weight.diagonal(dim1=-2, dim2=-1) + on_positive, dim1=-2, dim2=-1)
    return weight


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function by ``torch.compile``, and eagerly from the first failure on."""
    fast, failed = torch.compile(function), False

    def call(*arguments: Any) -> Any:
        nonlocal failed
        if not failed:
            try:
                return fast(*arguments)
            except torch._dynamo.exc.TorchDynamoException as error:
                failed = True
                name = getattr(function, "__name__", repr(function))
                warnings.warn(f"{name} was not compiled and runs eagerly: {error}", RuntimeWarning, stacklevel=2)
        return function(*arguments)

    return call


# --------------------------------------------------------------------------------------------------------------------
# All tiles
# --------------------------------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    function: PairFunction
    rows: int  # the first tensors are rows[0..rows), columns[rows..items), shared[items..]
    items: int
    side: int
    shift: float
    symmetric: bool
    compile: bool

    def evaluate(self, tensors: list[Tensor]) -> Tensor:
        parts = (tuple(tensors[: self.rows]), tuple(tensors[self.rows : self.items]), tuple(tensors[self.items :]))
        return self.function(*parts)

    def tiles(self, tensors: Tensors) -> Iterator[tuple[slice, slice, slice]]:
        """Batch, row and column range of every tile; several small grids of a batch make one."""
        batch, size, _ = tensors[0].shape
        together = max(1, self.side**2 // min(self.side, size) ** 2)
        ranges = [slice(i, i + self.side) for i in range(0, size, self.side)]
        return itertools.product((slice(b, b + together) for b in range(0, batch, together)), ranges, ranges)

    def part(self, tensors: Tensors, b: slice, i: slice, j: slice) -> list[Tensor]:
        rows = [t[b, i] for t in tensors[: self.rows]]
        return [*rows, *(t[b, j] for t in tensors[self.rows : self.items]), *tensors[self.items :]]


class _Tiled(torch.autograd.Function):
    """(positive, row, column) of the grid that flat tensors (B, N, k) and shared ones span."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        shape = tensors[0].shape[:2]
        statistics = _compiled(_statistics) if plan.compile else _statistics
        positive = tensors[0].new_empty(shape)
        row = torch.full_like(positive, -torch.inf)
        column = row.clone() if plan.symmetric else None
        with torch.autocast(positive.device.type, enabled=False):
            for b, i, j in plan.tiles(tensors):
                tile = plan.evaluate(plan.part(tensors, b, i, j))
                diagonal, across, down = statistics(tile, plan.shift, i == j, plan.symmetric)
                row[b, i] = torch.logaddexp(row[b, i], across)
                if diagonal is not None:
                    positive[b, i] = diagonal
                if column is not None and down is not None:
                    column[b, j] = torch.logaddexp(column[b, j], down)
        ctx.plan = plan
        ctx.save_for_backward(*tensors, row, *([] if column is None else [column]))
        return positive, row, column

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        saved = ctx.saved_tensors  # once: under activation checkpointing it can be read only once
        split = len(saved) - 1 - plan.symmetric
        tensors, sums = saved[:split], saved[split:]
        needed = [k for k in range(split) if ctx.needs_input_grad[1 + k]]
        totals = {k: torch.zeros_like(tensors[k]) for k in needed}
        weights = _compiled(_weights) if plan.compile else _weights
        on_positive, on_row, on_column = (g if g is None else g.detach() for g in grads)
        for b, i, j in plan.tiles(tensors):
            inputs = [t.detach() for t in plan.part(tensors, b, i, j)]
            wanted = [inputs[k].requires_grad_() for k in needed]
            with torch.enable_grad(), torch.autocast(inputs[0].device.type, enabled=False):
                tile = plan.evaluate(inputs)
            if not tile.requires_grad:
                continue
            around = [(sums[0][b, i].unsqueeze(-1), on_row[b, i].unsqueeze(-1))]
            if plan.symmetric:
                around.append((sums[1][b, j].unsqueeze(-2), on_column[b, j].unsqueeze(-2)))
            with torch.no_grad():
                weight = weights(
                    tile.detach(),
                    *map(list, zip(*around, strict=True)),
                    on_positive[b, i] if i == j else None,
                    plan.shift,
                )
            for k, grad in zip(needed, torch.autograd.grad(tile, wanted, weight, allow_unused=True), strict=True):
                if grad is not None:
                    where = () if k >= plan.items else (b, i) if k < plan.rows else (b, j)
                    totals[k][where] += grad
        name = "a contrastive likelihood by tiles (grids of up to PLAIN_ELEMENTS elements are computed whole)"
        inputs_and_grads = (*tensors, *(g for g in grads if g is not None))
        return None, *(once(name, totals[k], *inputs_and_grads) if k in totals else None for k in range(split))
