"""The two Triton kernels of :mod:`pyro_contrastive.ops.fused`. Needs Triton; imported on first use."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["row_gradients", "row_sums"]

LOG2E = tl.constexpr(1.4426950408889634)  # exponentials are taken to base 2, which is what the hardware does


@triton.jit
def _items(base, index, size, dim, D: tl.constexpr):
    """A block of items (len(index), D), zero where there is none."""
    column = tl.arange(0, D)
    inside = (index < size)[:, None] & (column < dim)[None, :]
    return tl.load(base + index[:, None].to(tl.int64) * dim + column[None, :], mask=inside, other=0.0)


@triton.jit
def _rows(A, SCALE, n, dim, BM: tl.constexpr, D: tl.constexpr, TERMS: tl.constexpr, SHIFT: tl.constexpr):
    """What a program keeps: its batch, rows i, their items, the scale, and what a value of `_tile` is in log2."""
    batch = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    scale = tl.load(SCALE)
    return batch, i, _items(A + batch * n * dim, i, n, dim, D), scale, LOG2E if TERMS or SHIFT else scale * LOG2E


@triton.jit
def _tile(
    a, B, C, batch, i, first, dim, m, scale, shift, BN: tl.constexpr, D: tl.constexpr,
    TERMS: tl.constexpr, SHIFT: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns j, their items, and the values without the row's term, -inf beyond the last column.

    Values are not yet scaled if there is nothing else to add.
    """
    j = first + tl.arange(0, BN)
    b = _items(B + batch * m * dim, j, m, dim, D)
    s = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    if TERMS or SHIFT:
        s *= scale
    if TERMS:
        s += tl.load(C + batch * m + j, mask=j < m, other=0.0)[None, :]
    if SHIFT:
        s = tl.where(i[:, None] == j[None, :], s + shift, s)
    if not EVEN:
        s = tl.where((j < m)[None, :], s, -float("inf"))
    return j, b, s


@triton.jit
def row_sums(
    A, B, SCALE, R, C, OUT, n, dim, m, shift,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    TERMS: tl.constexpr, SHIFT: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """OUT[i] = log sum_j exp(SCALE A[i] . B[j] + R[i] + C[j]), the largest so far kept beside the sum."""
    batch, i, a, scale, unit = _rows(A, SCALE, n, dim, BM, D, TERMS, SHIFT)
    top = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for first in range(0, m, BN):
        j, b, s = _tile(a, B, C, batch, i, first, dim, m, scale, shift, BN, D, TERMS, SHIFT, EVEN, PRECISION)
        larger = tl.maximum(top, tl.max(s, 1))
        around = tl.where(larger == -float("inf"), 0.0, larger) * unit
        total = total * tl.exp2(top * unit - around) + tl.sum(tl.exp2(s * unit - around[:, None]), 1)
        top = larger
    out = (top * unit + tl.log2(total)) / LOG2E
    if TERMS:
        out += tl.load(R + batch * n + i, mask=i < n, other=0.0)
    tl.store(OUT + batch * n + i, out, mask=i < n)


@triton.jit
def row_gradients(
    A, B, SCALE, R, C, SUM, GRAD, OTHER_SUM, OTHER_GRAD, OUT, OUT_TERM, n, dim, m, shift,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, OWN: tl.constexpr, OTHERS: tl.constexpr,
    TERMS: tl.constexpr, SHIFT: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """OUT[i] = sum_j w_ij B[j], OUT_TERM[i] = sum_j w_ij, for softmax weights w of the rows and of the columns."""
    batch, i, a, scale, unit = _rows(A, SCALE, n, dim, BM, D, TERMS, SHIFT)
    out = tl.zeros((BM, D), tl.float32)
    mass = tl.zeros((BM,), tl.float32)
    term = tl.load(R + batch * n + i, mask=i < n, other=0.0) * LOG2E if TERMS else tl.zeros((BM,), tl.float32)
    if OWN:
        around = tl.load(SUM + batch * n + i, mask=i < n, other=0.0) * LOG2E - term
        grad = tl.load(GRAD + batch * n + i, mask=i < n, other=0.0)
    for first in range(0, m, BN):
        j, b, s = _tile(a, B, C, batch, i, first, dim, m, scale, shift, BN, D, TERMS, SHIFT, EVEN, PRECISION)
        w = tl.zeros((BM, BN), tl.float32)
        if OWN:
            w += grad[:, None] * tl.exp2(s * unit - around[:, None])
        if OTHERS:
            other = tl.load(OTHER_SUM + batch * m + j, mask=j < m, other=0.0) * LOG2E
            weight = tl.load(OTHER_GRAD + batch * m + j, mask=j < m, other=0.0)
            w += weight[None, :] * tl.exp2(s * unit - (other[None, :] - term[:, None]))
        out = tl.dot(w.to(b.dtype), b, out, input_precision=PRECISION)
        if TERMS:
            mass += tl.sum(w, 1)
    column = tl.arange(0, D)
    inside = (i < n)[:, None] & (column < dim)[None, :]
    tl.store(OUT + batch * n * dim + i[:, None].to(tl.int64) * dim + column[None, :], out, mask=inside)
    if TERMS:
        tl.store(OUT_TERM + batch * n + i, mass, mask=i < n)
