"""Tiles against the whole grid and against loops: values, gradients, memory, and every context they can run in."""

from __future__ import annotations

import math
import shutil

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from pyro_contrastive.distributions import VonMisesFisher
from pyro_contrastive.factors import infonce_factor, infonce_log_ratio
from pyro_contrastive.kernels import (
    AnisotropicKernel,
    VonMisesFisherKernel,
    expected_pairs,
    moment_matched_pairs,
    shared_latent_pairs,
)
from pyro_contrastive.ops import tiles
from pyro_contrastive.ops.tiles import Pairs, contrast

DIM = 4
KINDS = ["dot", "anisotropic", "shared latent", "moment matched", "exact", "shared tensor"]


def weighted(rows, columns, shared):
    """A user's own pair function, with a tensor that all pairs share and one that only the rows have."""
    return shared[0] * rows[1] * (rows[0] @ columns[0].mT)


def case(kind, *batch, size=7, dtype=torch.float64):
    """Leaves, and a function that builds the pairs from them."""
    torch.manual_seed(len(kind))
    raw = [torch.randn(*batch, size, DIM, dtype=dtype, requires_grad=True) for _ in range(2)]
    width = [(30 * torch.rand(*batch, size, dtype=dtype)).requires_grad_() for _ in range(2)]
    one = torch.tensor(6.0, dtype=dtype, requires_grad=True)

    def pairs():
        z = [torch.nn.functional.normalize(r, dim=-1) for r in raw]
        if kind == "dot":
            return VonMisesFisherKernel(6.0).to(dtype)(*z, lazy=True)
        if kind == "anisotropic":
            return AnisotropicKernel(DIM, [1.0, 2.0, 3.0, 9.0]).to(dtype)(*z, lazy=True)
        if kind == "shared tensor":
            return Pairs(weighted, (z[0], width[0].unsqueeze(-1)), (z[1],), (one,))
        q = [VonMisesFisher(*both) for both in zip(z, width, strict=True)]
        if kind == "shared latent":
            return shared_latent_pairs(*q)
        return (moment_matched_pairs if kind == "moment matched" else expected_pairs)(*q, one)

    leaves = {"dot": raw, "anisotropic": raw, "shared latent": [*raw, *width], "shared tensor": [*raw, width[0], one]}
    return leaves.get(kind, [*raw, *width, one]), pairs


def assert_same(leaves, pairs, **options):
    """Values and gradients by tiles equal those of ordinary autograd on the whole grid, to 1e-12."""
    tile = options.pop("tile")
    whole, tiled = infonce_log_ratio(pairs().grid(), **options), infonce_log_ratio(pairs(), tile=tile, **options)
    torch.testing.assert_close(tiled, whole, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(whole)
    gradients = [torch.autograd.grad(value, leaves, weight) for value in (tiled, whole)]
    for by_tiles, by_grid in zip(*gradients, strict=True):
        torch.testing.assert_close(by_tiles, by_grid, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("symmetric", "negatives"), [(False, "sum"), (True, "mean")])
@pytest.mark.parametrize("tile", [1, 3, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_equal_the_grid(kind, tile, symmetric, negatives):
    leaves, pairs = case(kind)
    assert_same(leaves, pairs, tile=tile, symmetric=symmetric, negatives=negatives)


@pytest.mark.parametrize("tile", [1, 2])
@pytest.mark.parametrize("kind", KINDS[:1] + KINDS[-1:])
def test_two_items(kind, tile):
    leaves, pairs = case(kind, size=2)
    assert_same(leaves, pairs, tile=tile, symmetric=True, negatives="mean")


@pytest.mark.parametrize("tile", [3, 16, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_leading_axes(kind, tile):
    """16 and 100 put several grids of the batch into one tile."""
    leaves, pairs = case(kind, 2, 5)
    assert_same(leaves, pairs, tile=tile, symmetric=True)


@pytest.mark.parametrize("tile", [3, 20])
def test_leading_axes_broadcast(tile):
    z1 = torch.randn(5, 7, DIM, dtype=torch.float64, requires_grad=True)
    z2, kappa = torch.randn(7, DIM, dtype=torch.float64, requires_grad=True), torch.rand(2, 1, 7, 1).double()
    one = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    pairs = Pairs(weighted, (z1, kappa), (z2,), (one,))
    assert pairs.shape == pairs.grid().shape == (2, 5, 7, 7)
    assert_same([z1, z2, one], lambda: pairs, tile=tile, symmetric=True)


def masked(rows, columns, shared):
    """-inf where the marks of the two items differ: impossible pairs."""
    log_f = 3 * rows[0] @ columns[0].mT
    return log_f.masked_fill(rows[1] != columns[1].mT, -torch.inf)


@pytest.mark.parametrize("tile", [1, 2, 6])
def test_impossible_pairs(tile):
    torch.manual_seed(0)
    z = torch.randn(6, DIM, dtype=torch.float64, requires_grad=True)
    mark = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 2.0]).double().unsqueeze(-1)  # whole tiles of -inf, a lonely item
    pairs = Pairs(masked, (z, mark), (z.flip(-1), mark))
    assert torch.isinf(pairs.grid()).sum() == 36 - (1 + 4 + 9)
    assert_same([z], lambda: pairs, tile=tile, symmetric=True)
    assert_same([z], lambda: pairs, tile=tile, negatives="mean")
    assert infonce_log_ratio(pairs, tile=tile)[0].item() == pytest.approx(math.log(6))


def test_a_row_without_any_possible_pair_has_no_gradient_rather_than_nan():
    z, mark = torch.randn(4, DIM, requires_grad=True), torch.tensor([[0.0], [1.0], [1.0], [9.0]])
    other = torch.tensor([[0.0], [1.0], [1.0], [1.0]])
    values = contrast(Pairs(masked, (z, mark), (z.detach(), other)), tile=3)
    assert values.row[3] == -torch.inf
    (gradient,) = torch.autograd.grad(values.row.sum(), z)
    assert torch.isfinite(gradient).all() and gradient[3].count_nonzero() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_finite_differences(kind):
    leaves, pairs = case(kind, size=3)
    assert torch.autograd.gradcheck(lambda *_: tuple(contrast(pairs(), symmetric=True, shift=0.7, tile=2)), leaves)


def test_only_what_is_asked_for_gets_a_gradient():
    z1, z2, scale = torch.randn(5, DIM, requires_grad=True), torch.randn(5, DIM), torch.tensor(2.0)
    value = infonce_log_ratio(Pairs(weighted, (z1, torch.ones(5, 1)), (z2,), (scale,)), tile=2)
    value.sum().backward()
    assert z1.grad is not None and z2.grad is None and scale.grad is None
    assert not infonce_log_ratio(Pairs(weighted, (z2, torch.ones(5, 1)), (z2,), (scale,)), tile=2).requires_grad


def test_second_derivatives_are_refused():
    leaves, pairs = case("dot")
    (gradient,) = torch.autograd.grad(infonce_log_ratio(pairs(), tile=3).sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="by tiles .* differentiable once"):
        gradient.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["shared latent", "shared tensor"])
def test_under_activation_checkpointing(kind, reentrant):
    leaves, pairs = case(kind)
    plain = torch.autograd.grad(infonce_log_ratio(pairs(), tile=3, symmetric=True).sum(), leaves)

    def loss(*_):
        return infonce_log_ratio(pairs(), tile=3, symmetric=True).sum()

    checkpoint(loss, *leaves, use_reentrant=reentrant).backward()
    for leaf, want in zip(leaves, plain, strict=True):
        torch.testing.assert_close(leaf.grad, want, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_precision_leaves_the_tiles_alone(kind):
    leaves, pairs = case(kind, dtype=torch.float32)
    plain = infonce_log_ratio(pairs(), tile=3)
    wanted = torch.autograd.grad(plain.sum(), leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = infonce_log_ratio(pairs(), tile=3)
        got = torch.autograd.grad(mixed.sum(), leaves)
    assert mixed.dtype == torch.float32 and torch.equal(mixed, plain)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("tile", [None, 7])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_embeddings_in_half_precision_are_summed_in_single(half, tile):
    """The same rounded embeddings in float32 give the same values; gradients are rounded to halves once, at the end."""
    torch.manual_seed(2)
    rounded = torch.nn.functional.normalize(torch.randn(2, 40, DIM), dim=-1).to(half)
    kernel = VonMisesFisherKernel(16.0)  # a power of 2: its product with a half is exact
    results = []
    for dtype in (half, torch.float32):
        z = rounded.to(dtype).requires_grad_()
        value = infonce_log_ratio(kernel(*z, lazy=True), symmetric=True, tile=tile)
        results.append((value, torch.autograd.grad(value.sum(), z)[0]))
    (value, grad), (want, wanted) = results
    assert value.dtype == torch.float32 and grad.dtype == half
    torch.testing.assert_close(value, want, rtol=0, atol=1e-5)
    assert (grad.float() - wanted).abs().max() <= 2 * torch.finfo(half).eps * wanted.abs().max()


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_no_operation_returns_more_than_a_tile_or_the_items(kind):
    size, side = 100, 24
    leaves, pairs = case(kind, size=size)
    largest = {}
    for tile in (side, size):
        with Largest() as mode:
            infonce_log_ratio(pairs(), tile=tile, symmetric=True, negatives="mean").sum().backward()
        largest[tile] = mode.numel
    assert largest[size] >= size * size  # the recorder sees the grid where there is one
    series = 100 * side if kind == "exact" else 0  # its terms, per item of a tile
    assert largest[side] <= max(side * side, size * DIM, series)


def test_large_batches_go_by_tiles_and_small_ones_by_the_grid(monkeypatch):
    leaves, pairs = case("dot")
    monkeypatch.setattr(tiles, "TILE", {"cpu": 3})
    assert "Tiled" not in str(contrast(pairs()).row.grad_fn)
    monkeypatch.setattr(tiles, "PLAIN_ELEMENTS", 48)
    assert "Tiled" in str(contrast(pairs()).row.grad_fn.next_functions[0][0])
    whole, tiled = infonce_log_ratio(pairs().grid()), infonce_log_ratio(pairs())
    torch.testing.assert_close(tiled, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tile", [None, 3])
@pytest.mark.parametrize("kernel", ["vMF", "anisotropic"])
def test_plain_svi_learns_the_parameters_of_a_kernel(kernel, tile):
    """Pyro registers what it sees in a call of the module: the store must hold the parameter, and it must move."""
    torch.manual_seed(0)
    kernel = VonMisesFisherKernel(3.0, learn=True) if kernel == "vMF" else AnisotropicKernel(DIM)
    name = "concentration" if isinstance(kernel, VonMisesFisherKernel) else "precision"
    z = torch.nn.functional.normalize(torch.randn(8, DIM), dim=-1)

    def model():
        with pyro.plate("pairs", 8):
            infonce_factor("f", z, z, kernel, tile=tile)

    start = getattr(kernel, name).detach().clone()
    SVI(model, lambda: None, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step()
    assert list(pyro.get_param_store().keys()) == [name]
    assert (pyro.param(name) > start).all()  # equal embeddings: surer is better


def test_vectorised_particles():
    torch.manual_seed(1)
    z1, z2 = torch.randn(3, 8, DIM), torch.randn(3, 8, DIM)

    def emitted(tile):
        with poutine.trace() as trace, pyro.plate("particles", 3, dim=-2), pyro.plate("pairs", 8, dim=-1):
            infonce_factor("f", z1, z2, VonMisesFisherKernel(2.0), symmetric=True, tile=tile)
        return trace.trace.nodes["f"]["fn"].log_factor

    torch.testing.assert_close(emitted(3), emitted(None))


@pytest.mark.parametrize("tile", [0, -1, 2.0, True, "8"])
def test_side_of_a_tile_is_checked(tile):
    _, pairs = case("dot")
    with pytest.raises(ValueError, match=r"`tile` must be an integer >= 1.*got"):
        contrast(pairs(), tile=tile)


def test_tiles_of_a_grid_that_exists_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"pass Pairs, for instance kernel\(z1, z2, lazy=True\)"):
        contrast(torch.zeros(4, 4), tile=2)
    z = torch.eye(4)
    with pyro.plate("pairs", 4), pytest.raises(ValueError, match="lazy=True"):
        infonce_factor("f", z, z, lambda a, b: a @ b.mT, tile=2)


# --- torch.compile ----------------------------------------------------------------------------------------------------


def test_what_cannot_be_compiled_runs_eagerly_with_a_warning(monkeypatch):
    def broken(function):
        def call(*arguments):
            raise torch._dynamo.exc.Unsupported("no such thing here")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    tiles.compiled.cache_clear()
    leaves, pairs = case("dot")
    with pytest.warns(RuntimeWarning, match="runs eagerly: no such thing here"):
        tiled = infonce_log_ratio(pairs().compiled(), tile=3)
    torch.testing.assert_close(tiled, infonce_log_ratio(pairs(), tile=3), rtol=0, atol=0)
    tiles.compiled.cache_clear()


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_compiled_tiles_equal_eager_ones():
    leaves, pairs = case("shared tensor", size=8)
    eager, compiled = (infonce_log_ratio(p, tile=4, symmetric=True) for p in (pairs(), pairs().compiled()))
    torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(value.sum(), leaves) for value in (compiled, eager)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
