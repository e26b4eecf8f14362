"""Run by test_fused.py in a process of its own, with TRITON_INTERPRET=1: the fused kernel on the CPU, against loops.

Prints one JSON object: for each case the largest error of every result, relative to its largest element, and the
largest value of the grid, whose rounding the weights inherit.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from pyro_contrastive.factors import infonce_log_ratio
from pyro_contrastive.kernels import AnisotropicKernel, VonMisesFisherKernel
from pyro_contrastive.ops import fused, tiles

# B, N, M, d, terms and scale, shift, both directions. Blocks are 128 x 64, or 64 x 32.
SIZES = {
    "blocks": (1, 128, 128, 16, False, 0.0, True),
    "remainders": (2, 200, 165, 20, True, 0.0, True),
    "shift": (2, 130, 130, 5, True, 1.5, True),
    "itself left out": (2, 130, 130, 5, False, -torch.inf, True),
    "shift alone": (1, 130, 130, 3, False, -2.0, False),
    "one direction": (1, 70, 130, 128, False, 0.0, False),
    "one row": (1, 1, 65, 1, False, 0.0, True),
    "wide": (1, 70, 70, 200, False, 0.0, True),
}


def by_loops(a, b, r, c, *, scale, shift, symmetric):
    """The same in float64, written down as it is defined."""
    s = torch.einsum("bnd,bmd->bnm", a, b)
    s = s if scale is None else scale * s
    if r is not None:
        s = s + r.unsqueeze(-1) + c.unsqueeze(-2)
    s = torch.where(torch.eye(*s.shape[-2:], dtype=torch.bool), s + shift, s)
    return s.logsumexp(-1), s.logsumexp(-2) if symmetric else None


def errors(ours: list[Tensor], theirs: list[Tensor]) -> list[float]:
    return [float((x.double() - y).abs().amax() / y.abs().amax()) for x, y in zip(ours, theirs, strict=True)]


def sums_and_gradients(function, inputs, options, *, double, only=None):
    """Results and their gradients for fixed weights; `only`: the sum that is used ("row" or "column")."""
    generator = torch.Generator().manual_seed(1)
    inputs = [None if t is None else (t.double() if double else t).detach().requires_grad_() for t in inputs]
    *tensors, scale = inputs
    sums = [s for s in function(*tensors, scale=scale, **options) if s is not None]
    weights = [torch.randn(s.shape, generator=generator) for s in sums]
    used = {"row": slice(0, 1), "column": slice(1, 2), None: slice(None)}[only]
    value = sum((w.to(s) * s).sum() for w, s in zip(weights[used], sums[used], strict=True))
    return [*(s.detach() for s in sums), *torch.autograd.grad(value, [t for t in inputs if t is not None])]


def case(dtype, batch, n, m, dim, terms, shift, symmetric, *, size=20.0, only=None) -> dict:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(batch, k, dim, generator=generator).to(dtype) for k in (n, m))
    a = (a * size / dim**0.5).to(dtype)
    b = torch.nn.functional.normalize(b.float(), dim=-1).to(dtype)
    r, c = (torch.randn(batch, k, generator=generator) for k in (n, m)) if terms else (None, None)
    inputs = [a, b, r, c, torch.tensor(1.7) if terms else None]
    options = {"shift": shift, "symmetric": symmetric}
    ours = sums_and_gradients(fused.product_sums, inputs, options, double=False, only=only)
    theirs = sums_and_gradients(by_loops, inputs, options, double=True, only=only)
    found = errors(ours, theirs)
    if terms:  # the gradient of the scale is a sum over the items, which nearly cancels: relative to its terms
        found[-1] *= float(theirs[-1].abs() / (a.double() * theirs[-5] / 1.7).abs().sum())
    return {"errors": found, "largest": 2.0 + 1.7 * float(a.float().norm(dim=-1).amax())}


def likelihood(kernel, dtype) -> dict:
    """Through the public functions: the same numbers as from the whole grid."""
    generator = torch.Generator().manual_seed(2)
    raw = torch.nn.functional.normalize(torch.randn(2, 3, 40, 8, generator=generator), dim=-1).to(dtype)
    found, weight = [], torch.rand(3, 40, generator=generator)
    for plain in (0, tiles.PLAIN_ELEMENTS):
        tiles.PLAIN_ELEMENTS, z = plain, raw.detach().requires_grad_()
        value = infonce_log_ratio(kernel(*z, lazy=True), symmetric=True, negatives="mean")
        found.append([value.detach(), *torch.autograd.grad((weight * value).sum(), [z, *kernel.parameters()])])
    return {"errors": errors(found[0], [t.double() for t in found[1]]), "largest": 12.0}


def infinite() -> bool:
    """Rows and columns that hold nothing but -inf have no weight."""
    a, b = torch.zeros(1, 3, 2).requires_grad_(), torch.zeros(1, 3, 2)
    r = torch.tensor([[-torch.inf, 0.0, 1.0]])
    row, column = fused.product_sums(a, b, r, torch.zeros(1, 3), symmetric=True)
    expected = torch.tensor([1.0, torch.e]).sum().log()
    (grad,) = torch.autograd.grad(row[0, 1:].sum() + column.sum(), a)
    return row[0, 0].item() == -torch.inf and torch.allclose(column, expected) and bool(grad.isfinite().all())


def main() -> None:
    found: dict[str, object] = {}
    for name, sizes in SIZES.items():
        for dtype in (torch.float32, torch.float16):
            found[f"{name}, {str(dtype).removeprefix('torch.')}"] = case(dtype, *sizes)
    for only in ("row", "column"):
        found[f"gradient of the {only} sums alone, float32"] = case(torch.float32, *SIZES["remainders"], only=only)
    found["concentrations of 1,000, float32"] = case(torch.float32, *SIZES["blocks"], size=1e3)
    found["tiny gradients, float16"] = tiny_gradients()
    fused.applies = lambda a, b: True
    found["likelihood, von Mises-Fisher, float32"] = likelihood(VonMisesFisherKernel(5.0, learn=True), torch.float32)
    found["likelihood, von Mises-Fisher, float16"] = likelihood(VonMisesFisherKernel(5.0, learn=True), torch.float16)
    found["likelihood, anisotropic, float32"] = likelihood(AnisotropicKernel(8, [3.0, 1.0] * 4), torch.float32)
    found["infinite"] = infinite()
    print(json.dumps(found))


def tiny_gradients() -> dict:
    """Weights of 1e-7, the smallest that float16 tells from zero, whose products with long items are ordinary."""
    generator = torch.Generator().manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(2, 1, 70, 8, generator=generator), dim=-1)
    found, pair = [], ((0.01 * z[0]).half(), (100 * z[1]).half())
    for function, double in ((fused.product_sums, False), (by_loops, True)):
        a, b = ((t.double() if double else t).detach().requires_grad_() for t in pair)
        row, _ = function(a, b, None, None, scale=None, shift=0.0, symmetric=False)
        found.append([row.detach(), *torch.autograd.grad(1e-5 * row.sum(), a)])
    return {"errors": errors(*found), "largest": 1.0}


if __name__ == "__main__":
    main()
