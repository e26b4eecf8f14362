"""The parts that a sum over all tiles of a grid is made of: one tile's sums, and their gradients."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_contrastive.ops._once import once
from pyro_contrastive.ops.precision import at_least_single

__all__ = [
    "Contrast",
    "PairFunction",
    "Plan",
    "Tensors",
    "add_tile_gradients",
    "add_tiles",
    "compiled",
    "new_diagonal",
    "new_totals",
    "once_each",
    "sums_of_grid",
]

Tensors = tuple[Tensor, ...]
PairFunction = Callable[[Tensors, Tensors, Tensors], Tensor]


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


# --------------------------------------------------------------------------------------------------------------------
# One tile
# --------------------------------------------------------------------------------------------------------------------


def _shifted(log_f: Tensor, shift: float) -> Tensor:
    """With `shift` added to the diagonal."""
    if shift == 0.0:
        return log_f
    return torch.diagonal_scatter(log_f, log_f.diagonal(dim1=-2, dim2=-1) + shift, dim1=-2, dim2=-1)


def sums_of_grid(log_f: Tensor, shift: float, symmetric: bool) -> Contrast:
    """Of a grid that is there, or of one tile."""
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
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
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
    """What to evaluate, and how."""

    function: PairFunction
    rows: int  # the first tensors are rows[0..rows), columns[rows..items), shared[items..]
    items: int
    side: int
    shift: float
    symmetric: bool
    compile: bool

    def evaluate(self, tensors: list[Tensor]) -> Tensor:
        """The tile of such a part, at least in single precision."""
        parts = (tuple(tensors[: self.rows]), tuple(tensors[self.rows : self.items]), tuple(tensors[self.items :]))
        return at_least_single(self.function(*parts))

    def tiles(self, tensors: Sequence[Tensor]) -> Iterator[tuple[slice, slice, slice]]:
        """Batch, row and column range of every tile; several small grids of a batch make one."""
        batch, size, _ = tensors[0].shape
        together = max(1, self.side**2 // min(self.side, size) ** 2)
        ranges = [slice(i, i + self.side) for i in range(0, size, self.side)]
        return itertools.product((slice(b, b + together) for b in range(0, batch, together)), ranges, ranges)

    def part(self, tensors: Sequence[Tensor], b: slice, i: slice, j: slice) -> list[Tensor]:
        """What one tile is evaluated on: rows, columns and shared tensors."""
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
    summary = compiled(sums_of_grid) if plan.compile else sums_of_grid
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
    softmax_weights = compiled(_softmax_weights) if plan.compile else _softmax_weights
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
