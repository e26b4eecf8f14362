r"""Grids of a smooth function of two concentrations and a cosine, by a table in all three: its value once per *node*.

The evidence of a pair of views depends on the first view's concentration, the second's and the cosine of their mean
directions. On a tile it is a smooth function of three numbers on a small box, and there a polynomial:

.. math::  f(k_i, k'_j, c_{ij}) = \sum_r T_r(c_{ij}) \sum_{pq} G_{pqr}\, T_p(\log k_i)\, T_q(\log k'_j)

with Chebyshev polynomials T. The inner sum is a thin matrix product for each r, the outer one Clenshaw's recurrence, so
that a pair costs some dozens of additions and no transcendental function. G comes from exact values at the nodes, and
is used only if it reproduces exact values *between* the nodes to `TOLERANCE`; otherwise the function is evaluated as it
is. Boxes are rounded outward to a coarse lattice, which does not depend on what was computed before: a run that is
resumed meets the same tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pyro_contrastive.ops._once import once

__all__ = ["LEAST_PAIRS", "TOLERANCE", "Elementwise", "on_grid"]

Elementwise = Callable[..., Tensor]
Box = tuple[tuple[float, float], ...]

LEAST_PAIRS = 1 << 17
"""Grids with fewer elements are evaluated pair by pair: a table would not pay."""

TOLERANCE = 1e-5
"""Largest error of a table in nats, and 1e-5 of the function's range where that is less."""

_STAGES = ((8, 8), (16, 24), (24, 48))  # nodes in a concentration, and in the cosine: the first that is enough
_SHARED_NODES = 8
_LARGEST_SUM = 400.0  # of the coefficients: float32 then adds less than 1e-4 nats of rounding
_SLOPES = 1e-5  # what is left out changes no derivative by more than this part of the largest
_BLOCK = 1 << 16  # elements that a CPU sums at a time: the working set stays in the cache


def on_grid(
    function: Elementwise, dim: int, rows: Tensor, columns: Tensor, shared: tuple[Tensor, ...], cosine: Tensor
) -> Tensor:
    """``function(dim, rows, columns, *shared, cosine)`` on a grid, by a table where that is as good.

    Args:
        function: elementwise in tensors that broadcast, smooth, defined once at module level.
        dim: its first argument.
        rows: ``(..., N, 1)``, positive: of the row items.
        columns: ``(..., 1, M)``, positive: of the column items.
        shared: positive scalars that all pairs have in common.
        cosine: ``(..., N, M)``, in [-1, 1].

    Returns:
        ``(..., N, M)``. Tables serve float32 grids of at least `LEAST_PAIRS` elements; all else is exact. A table is
        differentiable once, in every argument.
    """
    if cosine.dtype != torch.float32 or cosine.shape[-2:].numel() < LEAST_PAIRS or torch.compiler.is_compiling():
        return function(dim, rows, columns, *shared, cosine)
    with torch.autocast(cosine.device.type, enabled=False):
        box = _box(rows, columns, cosine, shared)
        coefficients = None if box is None else _table(function, dim, box, cosine.device)
        if box is None or coefficients is None:
            return function(dim, rows, columns, *shared, cosine)
        for value, (low, high) in zip(shared, box[3:], strict=True):
            weights = _chebyshev(_scaled(value.double().log(), low, high), coefficients.shape[-1])
            coefficients = coefficients @ weights.reshape(-1)
        u, v = (
            _chebyshev(_scaled(k.double().log(), *bounds), size).float()
            for k, bounds, size in zip((rows.squeeze(-1), columns.squeeze(-2)), box, coefficients.shape, strict=False)
        )
        batch = cosine.shape[:-2]
        u, v = (t.expand(*batch, *t.shape[-2:]).reshape(-1, *t.shape[-2:]) for t in (u, v))
        flat = cosine.reshape(-1, *cosine.shape[-2:])
        return _Interpolated.apply(coefficients.float(), u, v, flat, box[2]).view(cosine.shape)


# --------------------------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------------------------


def _outward(low: float, high: float, step: float) -> tuple[float, float]:
    """To multiples of `step`, and at least one step apart."""
    first, last = math.floor(low / step), math.ceil(high / step)
    return step * first, step * max(last, first + 1)


def _box(rows: Tensor, columns: Tensor, cosine: Tensor, shared: Sequence[Tensor]) -> Box | None:
    """Bounds of log k of the rows and of the columns, the cosine, and log of each shared scalar; None if not finite."""
    with torch.no_grad():
        bounds = [bound.double() for t in (rows, columns, cosine, *shared) for bound in t.aminmax()]
        values = torch.stack(bounds).tolist()  # in one transfer
    if not all(map(math.isfinite, values)) or min(values[:4] + values[6:]) <= 0:
        return None
    logs = [math.log(value) for value in values[:4] + values[6:]]
    octave = math.log(2)
    # one range for both sides: views change places, and it is one table
    sides = _outward(min(logs[:4]), max(logs[:4]), octave)
    low, high = _outward(min(max(values[4], -1.0), 0.8), min(max(values[5], -0.8), 1.0), 0.25)
    scalars = [
        _outward(log, log, octave / 2) if value.requires_grad else (log, log)
        for value, log in zip(shared, logs[4::2], strict=True)
    ]
    return sides, sides, (low, high), *scalars


def _scaled(value: Tensor, low: float, high: float) -> Tensor:
    """From [low, high] to [-1, 1]."""
    return (value - 0.5 * (low + high)) * (2 / max(high - low, 1e-300))


def _chebyshev(x: Tensor, size: int) -> Tensor:
    """T_0..T_(size-1) at x, a new last axis."""
    out = [torch.ones_like(x), x]
    while len(out) < size:
        out.append(2 * x * out[-1] - out[-2])
    return torch.stack(out[:size], -1)


def _nodes(size: int) -> Tensor:
    """Roots of T_size."""
    return torch.cos(math.pi * (torch.arange(size, dtype=torch.float64) + 0.5) / size)


def _expand(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Chebyshev coefficients along every axis, from values at the nodes."""
    for axis, size in enumerate(sizes):
        matrix = _chebyshev(_nodes(size), size) * (2 / size)
        matrix[:, 0] /= 2
        values = torch.movedim(torch.tensordot(values, matrix, ([axis], [0])), -1, axis)
    return values


def _evaluate(coefficients: Tensor, points: Sequence[Tensor]) -> Tensor:
    """The polynomial on the lattice of points in [-1, 1], one axis each."""
    for axis, (x, size) in enumerate(zip(points, coefficients.shape, strict=True)):
        coefficients = torch.movedim(torch.tensordot(coefficients, _chebyshev(x, size), ([axis], [1])), -1, axis)
    return coefficients


def _degrees(coefficients: Tensor) -> list[int] | None:
    """How many along each axis matter to the value and to the derivative; None if the last ones do."""
    out = []
    for axis, size in enumerate(coefficients.shape):
        sums = coefficients.abs().movedim(axis, 0).reshape(size, -1).sum(1)
        slopes = sums * torch.arange(size, dtype=sums.dtype) ** 2
        rest = torch.maximum(
            sums.flip(0).cumsum(0) / (0.1 * TOLERANCE),
            slopes.flip(0).cumsum(0) / (_SLOPES * slopes.max().clamp_min(1e-300)),
        )
        small = int((rest <= 1).sum())
        if size > 1 and small < 1:
            return None
        out.append(max(size - small, min(size, 2)))
    return out


@lru_cache(maxsize=32)
def _table(function: Elementwise, dim: int, box: Box, device: torch.device) -> Tensor | None:
    """Coefficients, one axis per argument, or None if no table is good enough."""
    scalars = [_SHARED_NODES if high > low else 1 for low, high in box[3:]]
    with torch.inference_mode(False), torch.no_grad():  # the table outlives the mode of its first call
        for side, depth in _STAGES:
            sizes = [side, side, depth, *scalars]
            # the nodes, and points between them and at the ends
            points = [
                torch.cat([_nodes(n), torch.cos(math.pi * torch.arange(0, n + 1, max(1, n // 4)).double() / n)])
                for n in sizes
            ]
            lattice = []
            for axis, (x, (low, high)) in enumerate(zip(points, box, strict=True)):
                value = 0.5 * (low + high) + 0.5 * (high - low) * x
                value = value if axis == 2 else value.exp()
                lattice.append(value.reshape([-1 if a == axis else 1 for a in range(len(box))]))
            rows, columns, cosine, *shared = (t.to(device) for t in lattice)
            exact = function(dim, rows, columns, *shared, cosine).cpu()
            coefficients = _expand(exact[tuple(slice(n) for n in sizes)], sizes)
            kept = _degrees(coefficients)
            if kept is None:
                continue
            coefficients = coefficients[tuple(slice(n) for n in kept)].contiguous()
            error = (_evaluate(coefficients, points) - exact).abs().max()
            allowed = TOLERANCE * (exact.max() - exact.min()).clamp_max(1.0)
            if error <= allowed and coefficients.abs().sum() <= _LARGEST_SUM:
                return coefficients.to(device)
    return None


# --------------------------------------------------------------------------------------------------------------------
# The grid
# --------------------------------------------------------------------------------------------------------------------


def _blocks(cosine: Tensor, box: tuple[float, float]) -> Iterator[tuple[int, slice, Tensor]]:
    """Grid number, rows and scaled cosines of every block."""
    batch, size, width = cosine.shape
    step = max(1, _BLOCK // width) if cosine.device.type == "cpu" else size
    low, high = box
    for b in range(batch):
        for start in range(0, size, step):
            rows = slice(start, start + step)
            yield b, rows, cosine[b, rows].sub(0.5 * (low + high)).mul_(2 / (high - low))


def _sign(r: int) -> int:
    """+ + - - on the terms of a three-term recurrence turn its difference into a sum, which can be done in place."""
    return 1 - (r & 2)


def _turn(r: int) -> int:
    """2 from one sign to the next."""
    return 2 * _sign(r) * _sign(r + 1)


def _clenshaw(left: Tensor, right: Tensor, x: Tensor, out: Tensor) -> None:
    """Sum over r of ``(left[r] @ right) * T_r(x)``, into `out`."""
    after, last = torch.zeros_like(x), torch.zeros_like(x)
    for r in range(len(left) - 1, 0, -1):  # b_r = a_r + 2 x b_(r+1) - b_(r+2)
        after.addcmul_(x, last, value=_turn(r)).addmm_(left[r], right, alpha=_sign(r))
        after, last = last, after
    torch.addcmul(after, x, last, out=out).addmm_(left[0], right)


class _Interpolated(torch.autograd.Function):
    """The polynomial with coefficients (P, Q, R): T_p of the rows (B, N, P), T_q of the columns (B, M, Q), cosines."""

    @staticmethod
    def forward(
        ctx: Any, coefficients: Tensor, rows: Tensor, columns: Tensor, cosine: Tensor, box: tuple[float, float]
    ) -> Tensor:
        out = torch.empty_like(cosine)
        left = torch.einsum("bnp,pqr->brnq", rows, coefficients)
        turned = columns.mT.contiguous()
        for b, block, x in _blocks(cosine, box):
            _clenshaw(left[b, :, block], turned[b], x, out[b, block])
        ctx.save_for_backward(coefficients, rows, columns, cosine)
        ctx.box = box
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        coefficients, rows, columns, cosine = ctx.saved_tensors
        low, high = ctx.box
        of_items = any(ctx.needs_input_grad[:3])
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            to_cosine = torch.empty_like(cosine) if ctx.needs_input_grad[3] else None
            slope = torch.einsum("bnp,pqr->brnq", rows, _derivative(coefficients) * (2 / (high - low)))
            turned = columns.mT.contiguous()
            # sums over the columns of weight * T_r(cosine) * T_q, and over the rows of weight * T_r(cosine) * T_p
            size = coefficients.shape[2]
            across = columns.new_zeros(len(rows), size, columns.shape[2], rows.shape[1])
            down = rows.new_zeros(len(rows), size, rows.shape[2], columns.shape[1])
            for b, block, x in _blocks(cosine, ctx.box):
                weight = grad[b, block]
                if to_cosine is not None:
                    _clenshaw(slope[b, :, block], turned[b], x, to_cosine[b, block])
                    to_cosine[b, block].mul_(weight)
                if not of_items:
                    continue
                before, now = weight.clone(), weight * x
                for r in range(size):  # signs + + - - as in _clenshaw
                    across[b, r, :, block] = turned[b] @ before.mT
                    down[b, r].addmm_(rows[b, block].mT, before)
                    before, now = now, before.addcmul_(x, now, value=_turn(r + 1))
            sign = across.new_tensor([_sign(r) for r in range(size)]).reshape(-1, 1, 1)
            across, down = across * sign, down * sign
            gradients = [
                torch.einsum("brqn,bnp->pqr", across, rows),
                torch.einsum("brqn,pqr->bnp", across, coefficients),
                torch.einsum("brpm,pqr->bmq", down, coefficients),
            ]
        inputs = (*ctx.saved_tensors, grad)
        values = [
            g if needed else None for g, needed in zip([*gradients, to_cosine], ctx.needs_input_grad, strict=False)
        ]
        return *(None if g is None else once("the evidence of a grid", g, *inputs) for g in values), None


def _derivative(coefficients: Tensor) -> Tensor:
    """Coefficients of the derivative in the last axis: c'_(r-1) = c'_(r+1) + 2 r c_r, with c'_0 halved."""
    out = [torch.zeros_like(coefficients[..., 0])] * 2
    for r in range(coefficients.shape[-1] - 1, 0, -1):
        out.append(out[-2] + 2 * r * coefficients[..., r])
    out[-1] = 0.5 * out[-1]
    return torch.stack(out[:1:-1] or out[:1], -1)
