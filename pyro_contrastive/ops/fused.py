r"""Row and column sums of a grid of inner products by one Triton kernel, which keeps each tile in registers.

By tiles, PyTorch writes every tile to memory and reads it back some thirty times; on a GPU that takes many times as
long as the products. Here a block of rows stays on a processor while all columns pass by, and only their log-sum-exp
is written. Backward, the tile is computed again, weighted, and multiplied by the other side at once, as in flash
attention: once for the rows and once for the columns. In units of one product of N x N x d that is 1 (2 for both
directions) and 4, where a grid that is kept would take 1 and 2.

Products are made by tensor cores: of halves, added up in float32, and of float32 where the process allows TF32
(``torch.set_float32_matmul_precision("high")``). The softmax weights of the backward pass are rounded to the dtype of
the items before they are multiplied, as in any mixed precision.

Nothing here is needed: where Triton is missing, or :func:`applies` says no, grids are computed by tiles.
"""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pyro_contrastive.ops._once import once
from pyro_contrastive.ops.precision import HALF

__all__ = ["MOST_DIMENSIONS", "applies", "product_sums"]

MOST_DIMENSIONS = {torch.float32: 128, torch.bfloat16: 256, torch.float16: 256}
"""Wider items do not fit into registers and shared memory beside their tile."""

WEIGHT_SCALE = 1024.0
"""Of the weights when they are rounded, so that 1 / N is no subnormal number in float16."""


def applies(a: Tensor, b: Tensor) -> bool:
    """Whether the items lie on a GPU, in a precision that tensor cores multiply, and are not too wide.

    The first time in a process, and for each dtype and size of items, a small grid is computed in both ways. If they
    differ, or the kernel cannot be built, a RuntimeWarning says so and the answer is no from then on.

    Args:
        a: row items ``(..., N, d)``.
        b: column items ``(..., M, d)``.
    """
    if a.device.type != "cuda" or a.dtype != b.dtype:
        return False
    by_tensor_cores = a.dtype in HALF or _precision(a.dtype) == "tf32"
    dim = a.shape[-1]
    return by_tensor_cores and dim <= MOST_DIMENSIONS[a.dtype] and _trusted(a.device, a.dtype, _padded(dim))


def product_sums(
    a: Tensor,
    b: Tensor,
    row_term: Tensor | None = None,
    column_term: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: float = 0.0,
    symmetric: bool = False,
) -> tuple[Tensor, Tensor | None]:
    r"""Log-sum-exp over j of :math:`s_{ij} = \kappa\, a_i \cdot b_j + r_i + c_j`, and if symmetric over i.

    Args:
        a: ``(B, N, d)``, float32, bfloat16 or float16, d at most `MOST_DIMENSIONS`.
        b: ``(B, M, d)``, same dtype.
        row_term: r, ``(B, N)`` float32; both terms or none.
        column_term: c, ``(B, M)`` float32.
        scale: kappa > 0, a scalar tensor; 1 if None.
        shift: added to the diagonal.
        symmetric: the columns as well.

    Returns:
        ``(B, N)`` and ``(B, M)`` (None unless symmetric), float32; differentiable once.

    Raises:
        ModuleNotFoundError: without Triton, which the Linux builds of PyTorch bring along.
    """
    kappa = a.new_ones((), dtype=torch.float32) if scale is None else scale.float()
    row, column = _ProductSums.apply(a, b, row_term, column_term, kappa, shift, symmetric)
    return row, column


class _ProductSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, r: Tensor | None, c: Tensor | None, kappa: Tensor, shift: float, symmetric: bool
    ) -> tuple[Tensor, Tensor | None]:
        a, b = a.contiguous(), b.contiguous()
        row = _sums(a, b, kappa, r, c, shift)
        column = _sums(b, a, kappa, c, r, shift) if symmetric else None
        ctx.shift = shift
        ctx.save_for_backward(a, b, r, c, kappa, row, column)
        return row, column

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        a, b, r, c, kappa, row, column = ctx.saved_tensors
        here, there = (row, grads[0]), (column, grads[1])
        wanted = ctx.needs_input_grad
        to_a = to_b = to_r = to_c = to_kappa = None
        if wanted[0] or wanted[2] or wanted[4]:
            to_a, to_r = _gradients(a, b, kappa, r, c, here, there, ctx.shift)
            to_kappa = (to_a * a).sum()
            to_a = (kappa * to_a).to(a.dtype)
        if wanted[1] or wanted[3]:
            to_b, to_c = _gradients(b, a, kappa, c, r, there, here, ctx.shift)
            to_b = (kappa * to_b).to(b.dtype)
        name = "a contrastive likelihood on a GPU (grids of up to PLAIN_ELEMENTS elements are computed whole)"
        reached = [t for t in (a, b, r, c, kappa, *grads) if t is not None]
        found = zip((to_a, to_b, to_r, to_c, to_kappa), wanted, strict=False)
        return *(once(name, g, *reached) if needed and g is not None else None for g, needed in found), None, None


def _sums(a: Tensor, b: Tensor, kappa: Tensor, r: Tensor | None, c: Tensor | None, shift: float) -> Tensor:
    """Log-sum-exp over the items of b, ``(B, N)``."""
    from pyro_contrastive.ops._fused_kernels import row_sums

    out = torch.empty(a.shape[:2], dtype=torch.float32, device=a.device)
    options = launch_options(a.dtype, a.shape[-1])
    with _on(a.device):
        row_sums[_grid(a, options)](
            a, b, kappa, *_terms(r, c, out), out, *a.shape[1:], b.shape[1], shift,
            **_variant(a, b, r, shift, options), **options,
        )  # fmt: skip
    return out


def _gradients(
    a: Tensor,
    b: Tensor,
    kappa: Tensor,
    r: Tensor | None,
    c: Tensor | None,
    here: tuple[Tensor | None, Tensor | None],
    there: tuple[Tensor | None, Tensor | None],
    shift: float,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of a (over kappa) and of its term, from the sums and incoming gradients of its items and the others."""
    from pyro_contrastive.ops._fused_kernels import row_gradients

    incoming = [grad.abs().amax() for _, grad in (here, there) if grad is not None]
    top = torch.stack(incoming).amax().float().clamp_min(torch.finfo(torch.float32).tiny)
    pointers: list[Tensor] = []
    for total, grad in (here, there):
        if total is None or grad is None:
            pointers += [a, a]  # not read
        else:  # a sum of nothing but exp(-inf) has no weights, rather than those of exp(-inf + inf)
            pointers += [total.masked_fill(total == -torch.inf, 0.0), (grad / top * WEIGHT_SCALE).float().contiguous()]
    out = torch.empty(a.shape, dtype=torch.float32, device=a.device)
    to_term = torch.empty(a.shape[:2], dtype=torch.float32, device=a.device) if r is not None else None
    options = launch_options(a.dtype, a.shape[-1])
    with _on(a.device):
        row_gradients[_grid(a, options)](
            a, b, kappa, *_terms(r, c, out), *pointers, out, out if to_term is None else to_term,
            *a.shape[1:], b.shape[1], shift,
            OWN=here[1] is not None, OTHERS=there[1] is not None, **_variant(a, b, r, shift, options), **options,
        )  # fmt: skip
    return out * (top / WEIGHT_SCALE), None if to_term is None else to_term * (top / WEIGHT_SCALE)


# --------------------------------------------------------------------------------------------------------------------
# Launching
# --------------------------------------------------------------------------------------------------------------------


def launch_options(dtype: torch.dtype, dim: int) -> dict[str, int]:
    """Rows and columns of a block, warps and pipeline stages, chosen so that no register spills on an sm_90."""
    wide = dim > 128 or dtype == torch.float32
    return {"BM": 64 if wide else 128, "BN": 32 if wide else 64, "num_warps": 4 if wide else 8, "num_stages": 2}


def _variant(a: Tensor, b: Tensor, r: Tensor | None, shift: float, options: dict[str, int]) -> dict[str, Any]:
    """What is compiled into the kernel."""
    return {
        "D": _padded(a.shape[-1]),
        "TERMS": r is not None,
        "SHIFT": shift != 0.0,
        "EVEN": b.shape[1] % options["BN"] == 0,
        "PRECISION": _precision(a.dtype),
    }


def _precision(dtype: torch.dtype) -> str:
    """Of products: "ieee" is exact for halves."""
    allowed = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if allowed else "ieee"


def _padded(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


def _terms(r: Tensor | None, c: Tensor | None, unread: Tensor) -> tuple[Tensor, Tensor]:
    return (unread, unread) if r is None or c is None else (r.contiguous(), c.contiguous())


def _grid(a: Tensor, options: dict[str, int]) -> tuple[int, int]:
    return -(-a.shape[1] // options["BM"]), a.shape[0]


def _on(device: torch.device) -> Any:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@cache
def _trusted(device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    """Whether the kernel agrees with ordinary autograd on a small grid of awkward sizes."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.nn.functional.normalize(torch.randn(2, 2, 165, dim, generator=generator), dim=-1)
    weights = torch.rand(2, 2, 165, generator=generator).to(device)
    found = []
    try:
        for fused in (True, False):
            a, b = ((factor * x).to(device, dtype).requires_grad_() for factor, x in zip((8.0, 1.0), raw, strict=True))
            with torch.enable_grad(), torch.autocast(device.type, enabled=False):
                if fused:
                    sums = product_sums(a, b, symmetric=True)
                else:
                    grid = a.float() @ b.float().mT
                    sums = grid.logsumexp(-1), grid.logsumexp(-2)
                value = sum((w * s).sum() for w, s in zip(weights, sums, strict=True))
                found.append([*sums, *torch.autograd.grad(value, (a, b))])
    except Exception as error:  # whatever a compiler or a driver may raise
        warnings.warn(f"the fused kernel does not work here, and tiles are used: {error}", RuntimeWarning, stacklevel=2)
        return False
    for ours, theirs in zip(*found, strict=True):
        ours, theirs = ours.detach().float(), theirs.detach().float()
        off = float((ours - theirs).abs().amax() / theirs.abs().amax())
        if not off < math.sqrt(torch.finfo(dtype).eps) / 4:
            warnings.warn(
                f"the fused kernel is off by {off:.2g} for {dtype} on {device}, and tiles are used; "
                "please report this, with the versions of torch and triton",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
    return True
