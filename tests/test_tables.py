"""Tables of the pair evidence against the function itself in float64, and their gradients."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_contrastive.distributions import VonMisesFisher
from pyro_contrastive.factors import infonce_log_ratio
from pyro_contrastive.kernels import _matched_log_ratio, expected_pairs
from pyro_contrastive.ops import bessel_ratio, tables
from pyro_contrastive.ops.series import expected_kernel_log_ratio, shared_latent_kernel_log_ratio
from pyro_contrastive.ops.tables import on_grid

SIZE = 400
CASES = (  # dim, concentrations of both sides, of the pair
    (128, (16.0, 64.0), 20.0),
    (128, (1.0, 5.0), 20.0),
    (128, (100.0, 400.0), 10.0),
    (512, (100.0, 500.0), 100.0),
    (32, (16.0, 60.0), 20.0),
    (10, (4.0, 8.0), 20.0),
    (10, (0.1, 3.0), 2.0),
    (3, (0.5, 4.0), 3.0),
    (2, (0.3, 2.0), 1.0),
    (128, (16.0, 64.0), math.inf),
    (64, (30.0, 100.0), math.inf),
)


def items(dim: int, bounds: tuple[float, float], seed: int = 0) -> list[torch.Tensor]:
    """Concentrations of the rows, of the columns and cosines of pairs that lie from close to far; float32."""
    generator = torch.Generator().manual_seed(seed)
    k1, k2 = (bounds[0] + (bounds[1] - bounds[0]) * torch.rand(SIZE, generator=generator) for _ in range(2))
    z = torch.nn.functional.normalize(torch.randn(2, SIZE, dim, generator=generator), dim=-1)
    partners = torch.nn.functional.normalize(z[0] + torch.rand(SIZE, 1, generator=generator) * z[1], dim=-1)
    return [k1.unsqueeze(-1), k2.unsqueeze(0), (z[0] @ partners.mT).clamp(-1, 1)]


def evaluate(dim, kappa, arguments, by_table):
    k1, k2, *shared, cosine = arguments
    function = expected_kernel_log_ratio if shared else shared_latent_kernel_log_ratio
    if by_table:
        return on_grid(function, dim, k1, k2, tuple(shared), cosine)
    return function(dim, k1, k2, *shared, cosine)


@pytest.mark.parametrize(("dim", "bounds", "kappa"), CASES, ids=str)
def test_values_and_gradients_are_those_of_the_function(dim, bounds, kappa):
    k1, k2, cosine = items(dim, bounds)
    shared = [] if math.isinf(kappa) else [torch.tensor(kappa)]
    results = []
    for by_table in (True, False):
        dtype = torch.float32 if by_table else torch.float64
        leaves = [t.to(dtype).requires_grad_() for t in (k1, k2, *shared, cosine)]
        value = evaluate(dim, kappa, leaves, by_table)
        assert ("Interpolated" in str(value.grad_fn.next_functions[0][0])) == by_table
        weight = torch.softmax(value.detach().double(), -1) - 0.5 * torch.eye(SIZE)
        results.append([value.detach(), *torch.autograd.grad(value, leaves, weight.to(dtype))])
    (got, *gradients), (want, *wanted) = results
    near = want > want.max() - 10
    assert (got - want)[near].abs().max() < 1e-4 and ((got - want).abs() <= 1e-4 + 0.001 * want.abs()).all()
    for a, b in zip(gradients, wanted, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_fixed_and_learned_concentrations_agree():
    k1, k2, cosine = items(128, (16.0, 64.0))
    fixed, learned = (
        on_grid(expected_kernel_log_ratio, 128, k1, k2, (torch.tensor(20.0, requires_grad=learn),), cosine)
        for learn in (False, True)
    )
    assert learned.requires_grad and not fixed.requires_grad
    torch.testing.assert_close(learned.detach(), fixed, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("dim", "bounds", "kappa"), [CASES[0], CASES[5], CASES[9]], ids=str)
def test_rises_with_the_cosine(dim, bounds, kappa):
    """In float64, where neighbours differ by more than rounding: the table's own slope is what is looked at."""
    k1, k2, _ = items(dim, bounds)
    cosine = torch.linspace(-1, 1, SIZE).expand(SIZE, SIZE).clone().requires_grad_()
    shared = () if math.isinf(kappa) else (torch.tensor(kappa),)
    value = evaluate(dim, kappa, [k1, k2, *shared, cosine], by_table=True)
    assert "Interpolated" in str(value.grad_fn.next_functions[0][0])
    (slope,) = torch.autograd.grad(value.sum(), cosine)
    assert (slope > 0).all()


def exact(*arguments: torch.Tensor) -> torch.Tensor:
    return expected_kernel_log_ratio(10, *arguments)


@pytest.mark.parametrize("what", ["not smooth enough", "float64", "small", "infinite", "zero", "NaN"])
def test_everything_else_is_the_function_itself(what):
    k1, k2, cosine = items(10, (20.0, 60.0) if what == "not smooth enough" else (2.0, 8.0))
    kappa = torch.tensor(20.0)
    if what == "float64":
        k1, k2, cosine, kappa = (t.double() for t in (k1, k2, cosine, kappa))
    elif what == "small":
        k1, cosine = k1[:9], cosine[:9]
    elif what != "not smooth enough":
        k1[3] = {"infinite": math.inf, "zero": 0.0, "NaN": math.nan}[what]
    got = on_grid(expected_kernel_log_ratio, 10, k1, k2, (kappa,), cosine)
    torch.testing.assert_close(got, exact(k1, k2, kappa, cosine), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [1.0, -1.0, 0.25])
def test_equal_concentrations_and_equal_cosines(value):
    """Boxes without an extent: the slopes must be right all the same."""
    k1, k2 = torch.full((SIZE, 1), 16.0, requires_grad=True), torch.full((1, SIZE), 16.0, requires_grad=True)
    cosine = torch.full((SIZE, SIZE), value, requires_grad=True)
    got = on_grid(expected_kernel_log_ratio, 128, k1, k2, (torch.tensor(20.0),), cosine)
    one = [torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (16.0, 16.0, value)]
    want = expected_kernel_log_ratio(128, *one[:2], torch.tensor(20.0, dtype=torch.float64), one[2])
    assert (got - want.float()).abs().max() < 2e-5
    slopes, wanted = torch.autograd.grad(got.sum(), (k1, k2, cosine)), torch.autograd.grad(want.sum(), one)
    for slope, b, count in zip(slopes, wanted, (SIZE, SIZE, 1), strict=True):
        torch.testing.assert_close(slope, b.float().expand(slope.shape) * count, rtol=1e-4, atol=0)


@pytest.mark.parametrize("sizes", [(3, 4, 5), (2, 2, 2), (4, 3, 1)])
def test_gradients_by_finite_differences(sizes, monkeypatch):
    """Several grids, and several blocks of rows with a ragged last one."""
    monkeypatch.setattr(tables, "_BLOCK", 10)
    torch.manual_seed(0)
    p, q, r = sizes
    coefficients, rows, columns = torch.randn(p, q, r), torch.randn(2, 5, p), torch.randn(2, 4, q)
    leaves = [t.double().requires_grad_() for t in (coefficients, rows, columns, 2 * torch.rand(2, 5, 4) - 1)]

    def value(g, u, v, c):
        return tables._Interpolated.apply(g, u, v, c, (-1.0, 1.5))

    x = (leaves[3] - 0.25) / 1.25
    waves = torch.cos(torch.arange(r) * torch.acos(x.detach()).unsqueeze(-1))
    want = torch.einsum("pqr,bnp,bmq,bnmr->bnm", *leaves[:3], waves)
    torch.testing.assert_close(value(*leaves), want)
    assert torch.autograd.gradcheck(value, leaves)


def test_second_derivatives_say_so():
    k1, k2, cosine = items(128, (16.0, 64.0))
    cosine.requires_grad_()
    value = on_grid(expected_kernel_log_ratio, 128, k1, k2, (torch.tensor(20.0),), cosine)
    (slope,) = torch.autograd.grad(value.sum(), cosine, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        slope.sum().backward()


def test_a_table_of_inference_mode_serves_training():
    k1, k2, cosine = items(127, (16.0, 64.0))
    with torch.inference_mode():
        first = on_grid(expected_kernel_log_ratio, 127, k1, k2, (torch.tensor(20.0),), cosine)
    again = on_grid(expected_kernel_log_ratio, 127, k1.requires_grad_(), k2, (torch.tensor(20.0),), cosine)
    again.sum().backward()
    assert torch.equal(again.detach(), first) and k1.grad.isfinite().all()


def test_the_moment_matched_evidence_takes_a_table():
    k1, k2, cosine = items(128, (16.0, 64.0))
    lengths = [bessel_ratio(128, k.double()) for k in (k1, k2, torch.tensor(20.0))]
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in (*lengths, cosine)]
        value = on_grid(_matched_log_ratio, 128, *leaves[:2], (leaves[2],), leaves[3])
        results.append([value, *torch.autograd.grad(value.logsumexp(-1).sum(), leaves)])
    assert "View" in str(results[0][0].grad_fn)
    (got, *gradients), (want, *wanted) = results
    assert (got - want).abs().max() < 1e-4
    for a, b in zip(gradients, wanted, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


@pytest.mark.parametrize("kappa", [20.0, math.inf])
def test_likelihoods_by_tiles_with_different_tables(kappa):
    """Tiles of 370 have boxes of their own; mixed precision changes nothing; float64 takes the series."""
    torch.manual_seed(3)
    z = torch.randn(2, 740, 64, requires_grad=True)
    width = torch.empty(740).uniform_(16.0, 60.0).requires_grad_()

    def likelihood(dtype: torch.dtype, tile: int | None) -> list[torch.Tensor]:
        mu1, mu2 = torch.nn.functional.normalize(z.to(dtype), dim=-1)
        k = width.to(dtype)
        pairs = expected_pairs(VonMisesFisher(mu1, k), VonMisesFisher(mu2, k), kappa)
        value = infonce_log_ratio(pairs, symmetric=True, tile=tile)
        return [value.detach(), *torch.autograd.grad(value.sum(), (z, width))]

    want = likelihood(torch.float64, None)
    for tile in (None, 370):
        got = likelihood(torch.float32, tile)
        assert (got[0] - want[0]).abs().max() < 5e-5
        for a, b in zip(got[1:], want[1:], strict=True):
            assert (a - b).abs().max() <= 2e-4 * b.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = likelihood(torch.float32, 370)
    assert all(torch.equal(a, b) for a, b in zip(mixed, got, strict=True))
