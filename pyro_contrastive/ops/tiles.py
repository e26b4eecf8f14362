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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_contrastive.ops._once import once
from pyro_contrastive.ops.joint import current_joint, one_process_only
from pyro_contrastive.ops.precision import HALF

__all__ = ["PLAIN_ELEMENTS", "TILE", "Contrast", "PairFunction", "Pairs", "Tensors", "contrast"]

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
        function = _compiled(self.function) if self.compile else self.function
        return function(self.rows, self.columns, self.shared)

    def diagonal(self) -> Tensor:
        """Row item i with column item i only, ``(..., N)``: the same function on N grids of one cell."""
        rows, columns = (tuple(t.unsqueeze(-2) for t in side) for side in (self.rows, self.columns))
        return self.function(rows, columns, self.shared).squeeze((-1, -2))

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
        tile: side of the tiles, >= 1. By default grids of up to `PLAIN_ELEMENTS` elements, all leading axes counted,
            are computed whole, and larger ones in tiles of the side that `TILE` has for the device. In a joint batch
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
        return _contrast(_at_least_single(pairs), shift, symmetric)
    if current_joint() is None and tile is None and pairs.shape.numel() <= PLAIN_ELEMENTS:
        return _contrast(_at_least_single(pairs.grid()), shift, symmetric)
    side = tile or TILE.get(pairs.rows[0].device.type, 2048)
    batch = pairs.batch
    flat = [t.expand(batch + t.shape[-2:]).reshape(-1, *t.shape[-2:]) for t in (*pairs.rows, *pairs.columns)]
    function = _compiled(pairs.function) if pairs.compile else pairs.function
    plan = Plan(function, len(pairs.rows), len(flat), side, shift, symmetric, pairs.compile)
    apply = _Tiled.apply
    if current_joint() is not None:
        from pyro_contrastive.ops.ring import around_the_ring as apply  # it is made of the parts below
    positive, row, column = apply(plan, *flat, *pairs.shared)
    shape = pairs.shape[:-1]
    return Contrast(positive.view(shape), row.view(shape), None if column is None else column.view(shape))


# --------------------------------------------------------------------------------------------------------------------
# One tile
# --------------------------------------------------------------------------------------------------------------------


def _at_least_single(value: Tensor) -> Tensor:
    """Half precision as float32: sums over a batch are not for 8 bits."""
    return value.float() if value.dtype in HALF else value


def _shifted(log_f: Tensor, shift: float) -> Tensor:
    """With `shift` added to the diagonal."""
    if shift == 0.0:
        return log_f
    return torch.diagonal_scatter(log_f, log_f.diagonal(dim1=-2, dim2=-1) + shift, dim1=-2, dim2=-1)


def _contrast(log_f: Tensor, shift: float, symmetric: bool) -> Contrast:
    positive = log_f.diagonal(dim1=-2, dim2=-1)
    log_f = _shifted(log_f, shift)
    return Contrast(positive, log_f.logsumexp(-1), log_f.logsumexp(-2) if symmetric else None)


def _softmax_weights(log_f: Tensor, shift: float, *sums_and_grads: Tensor) -> Tensor:
    """Derivative of the log-sum-exps with respect to the tile, from their values and incoming gradients."""
    log_f, weight = _shifted(log_f, shift), torch.zeros_like(log_f)
    for total, grad in zip(sums_and_grads[::2], sums_and_grads[1::2], strict=True):
        # -inf throughout a row: its entries have no weight (rather than that of exp(-inf + inf))
        weight = torch.addcmul(weight, torch.exp(log_f - total.masked_fill(total == -torch.inf, 0.0)), grad)
    return weight


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function by ``torch.compile``, and eagerly from the first failure on."""
    fast: Callable[..., Any] | None = None
    failed = False

    def call(*arguments: Any) -> Any:
        nonlocal fast, failed
        if failed:
            return function(*arguments)
        validate = torch.distributions.Distribution._validate_args  # the first compilation turns it off for everyone
        try:
            fast = fast or torch.compile(function)
            return fast(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            failed = True
            name = getattr(function, "__name__", repr(function))
            warnings.warn(f"{name} could not be compiled and runs eagerly: {error}", RuntimeWarning, stacklevel=2)
            return function(*arguments)
        finally:
            torch.distributions.Distribution._validate_args = validate

    return call


# --------------------------------------------------------------------------------------------------------------------
# All tiles
# --------------------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    function: PairFunction
    rows: int  # the first tensors are rows[0..rows), columns[rows..items), shared[items..]
    items: int
    side: int
    shift: float
    symmetric: bool
    compile: bool

    def evaluate(self, tensors: list[Tensor]) -> Tensor:
        parts = (tuple(tensors[: self.rows]), tuple(tensors[self.rows : self.items]), tuple(tensors[self.items :]))
        return _at_least_single(self.function(*parts))

    def tiles(self, tensors: Sequence[Tensor]) -> Iterator[tuple[slice, slice, slice]]:
        """Batch, row and column range of every tile; several small grids of a batch make one."""
        batch, size, _ = tensors[0].shape
        together = max(1, self.side**2 // min(self.side, size) ** 2)
        ranges = [slice(i, i + self.side) for i in range(0, size, self.side)]
        return itertools.product((slice(b, b + together) for b in range(0, batch, together)), ranges, ranges)

    def part(self, tensors: Sequence[Tensor], b: slice, i: slice, j: slice) -> list[Tensor]:
        rows = [t[b, i] for t in tensors[: self.rows]]
        return [*rows, *(t[b, j] for t in tensors[self.rows : self.items]), *tensors[self.items :]]


def new_diagonal(tensors: Sequence[Tensor]) -> Tensor:
    """Room for the diagonal, at least in single precision."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return tensors[0].new_empty(tensors[0].shape[:2], dtype=dtype)


def new_totals(tensors: Sequence[Tensor], needed: Sequence[bool]) -> dict[int, Tensor]:
    """Zeros for the gradients that are needed, by position, at least in single precision."""
    wide = [torch.promote_types(t.dtype, torch.float32) for t in tensors]
    return {k: torch.zeros_like(t, dtype=wide[k]) for k, t in enumerate(tensors) if needed[k]}


def add_tiles(
    plan: Plan, tensors: Sequence[Tensor], positive: Tensor, row: Tensor, column: Tensor | None, own: bool = True
) -> None:
    """Add every tile to the running log-sum-exps, in place.

    Args:
        plan: what to evaluate.
        tensors: flat rows, columns and shared ones.
        positive: gets the diagonal.
        row: running sums.
        column: likewise.
        own: whether column i is the partner of row i; else there is no diagonal.
    """
    summary = _compiled(_contrast) if plan.compile else _contrast
    with torch.autocast(positive.device.type, enabled=False):
        for b, i, j in plan.tiles(tensors):
            tile, partners = plan.evaluate(plan.part(tensors, b, i, j)), own and i == j
            diagonal, across, down = summary(tile, plan.shift if partners else 0.0, plan.symmetric)
            row[b, i] = torch.logaddexp(row[b, i], across)
            if column is not None and down is not None:
                column[b, j] = torch.logaddexp(column[b, j], down)
            if partners:
                positive[b, i] = diagonal


def add_tile_gradients(
    plan: Plan,
    tensors: Sequence[Tensor],
    sums: Sequence[Tensor],
    grads: Sequence[Tensor],
    totals: Mapping[int, Tensor],
    own: bool = True,
) -> None:
    """Add the gradients of every tile to `totals`, in place.

    Args:
        plan: what to evaluate.
        tensors: flat rows, columns and shared ones.
        sums: log-sum-exps of the rows and, if symmetric, of the columns.
        grads: incoming gradients of diagonal, rows and columns.
        totals: where to, by position in `tensors`; the others need no gradient.
        own: whether column i is the partner of row i.
    """
    softmax_weights = _compiled(_softmax_weights) if plan.compile else _softmax_weights
    with torch.autocast(tensors[0].device.type, enabled=False):
        for b, i, j in plan.tiles(tensors):
            inputs = [t.detach() for t in plan.part(tensors, b, i, j)]
            wanted = [inputs[k].requires_grad_() for k in totals]
            with torch.enable_grad():
                tile = plan.evaluate(inputs)
            if not tile.requires_grad:
                continue
            with torch.no_grad():
                around = [sums[0][b, i].unsqueeze(-1), grads[1][b, i].unsqueeze(-1)]
                if plan.symmetric:
                    around += [sums[1][b, j].unsqueeze(-2), grads[2][b, j].unsqueeze(-2)]
                partners = own and i == j
                weight = softmax_weights(tile.detach(), plan.shift if partners else 0.0, *around)
                if partners:
                    weight.diagonal(dim1=-2, dim2=-1).add_(grads[0][b, i])
            parts = torch.autograd.grad(tile, wanted, weight, allow_unused=True)
            for k, part in zip(totals, parts, strict=True):
                if part is not None:
                    where = () if k >= plan.items else (b, i) if k < plan.rows else (b, j)
                    totals[k][where] += part


def once_each(tensors: Sequence[Tensor], grads: Sequence[Tensor], totals: Mapping[int, Tensor]) -> list[Tensor | None]:
    """The gradients by position, marked as differentiable once."""
    name = "a contrastive likelihood by tiles (grids of up to PLAIN_ELEMENTS elements are computed whole)"
    reached = (*tensors, *(g for g in grads if g is not None))
    found = {k: total.to(tensors[k].dtype) for k, total in totals.items()}
    return [once(name, found[k], *reached) if k in found else None for k in range(len(tensors))]


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
