"""The exact pair evidence against 60-digit series, quadrature, its limits and finite differences."""

from __future__ import annotations

import math

import mpmath as mp
import pytest
import torch

from pyro_contrastive import ops
from pyro_contrastive.ops import series
from pyro_contrastive.ops.series import expected_kernel_log_ratio, shared_latent_kernel_log_ratio
from tests.references import expected_kernel_log_ratio as reference

DIMS = (2, 3, 4, 10, 64, 512)
TRIPLES = (  # k1, k2, kappa of the pair, all of 0.1 to 1e4
    (0.1, 0.1, 0.1),
    (0.1, 1e4, 20.0),
    (8.0, 1e3, 1e3),
    (12.0, 12.0, 12.0),
    (16.0, 64.0, 20.0),
    (24.0, 24.0, 24.0),
    (100.0, 100.0, 20.0),
    (300.0, 200.0, 1e3),
    (1e4, 1e4, 1e4),
    (1e4, 30.0, 1e4),
)
PROMISED = {torch.float64: 1e-9, torch.float32: 1e-4}  # nats, within 10 nats of the peak
double = torch.float64


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=double)


def cosines(triple: tuple[float, ...]) -> list[float]:
    """From the peak to the far side: multiples of the pair's own angular scale, and the whole range."""
    scale = math.sqrt(sum(1 / k for k in triple))
    near = [math.cos(s * scale) for s in (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0) if s * scale < 3]
    return [*near, 0.9, 0.5, 0.0, -0.5, -0.97, -1.0]


def digits(triple: tuple[float, ...]) -> int:
    """60 after the cancellation, which costs at most 2 min(k) nats, or 40 for triples without their far side."""
    return 60 + int((2 * min(triple) if min(triple) <= 350 else 40) / math.log(10))


@pytest.mark.parametrize("triple", TRIPLES, ids=str)
@pytest.mark.parametrize("dim", DIMS)
def test_against_60_digits(dim, triple):
    far = 0.01 if dim == 2 else 0.006  # of the log ratio, beyond 10 nats
    for dtype, promised in PROMISED.items():
        k1, k2, kappa = (torch.tensor(k, dtype=dtype) for k in triple)
        rounded = tuple(float(k) for k in (k1, k2, kappa))
        peak = reference(dim, *rounded, 1.0, digits(triple))
        checked = 0
        for cosine in torch.tensor(cosines(triple), dtype=dtype):
            if min(triple) > 350 and cosine < 0.95:
                continue  # thousands of nats below the peak: see the test of the far side
            want = reference(dim, *rounded, float(cosine), digits(triple))
            got = expected_kernel_log_ratio(dim, k1, k2, kappa, cosine)
            assert got.dtype == dtype
            error = abs(mp.mpf(float(got)) - want)
            near = want > peak - 10
            checked += near
            # float32: the result itself is rounded to 6e-8 of up to hundreds of nats
            assert error <= (promised + 6e-8 * abs(want) * (dtype == torch.float32) if near else far * abs(want))
        assert checked >= 4 or peak < 1e-3


@pytest.mark.parametrize("dim", [2, 3, 10, 128, 512])
@pytest.mark.parametrize(
    "triple", [*TRIPLES, (1e6, 1e6, 1e6), (1e6, 20.0, 1e5), (1e4, 1e4, 100.0), (math.inf, 50.0, 1e3)], ids=str
)
def test_rises_with_the_cosine_and_has_finite_gradients(dim, triple):
    cosine = torch.linspace(-1, 1, 2001, dtype=double).unsqueeze(-1).requires_grad_()
    concentrations = [f64(k).requires_grad_() for k in triple]
    value = expected_kernel_log_ratio(dim, *concentrations, cosine)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert (value.diff(dim=0) > 0).all()
    assert torch.isfinite(cosine.grad).all() and (cosine.grad > 0).all()
    assert all(k.grad is None or torch.isfinite(k.grad).all() for k in concentrations)  # None: infinite


@pytest.mark.parametrize("dim", [2, 3, 10, 64])
@pytest.mark.parametrize("triple", [(1e3, 1e3, 1e3), (2e3, 1e4, 500.0), (1e4, 1e4, 3e3)], ids=str)
def test_far_side_against_quadrature(dim, triple):
    """One-dimensional integral over z.mu2, thousands of nats below the peak, by the trapezoidal rule in log space."""
    k1, k2, kappa = triple
    theta = torch.tensor([0.7, 1.5, 2.5, 3.0], dtype=double).unsqueeze(-1)
    cosine = theta.cos()
    phi = torch.linspace(0, math.pi, 200_001, dtype=double)
    w, height = phi.cos(), phi.sin()
    if dim == 2:
        ring = torch.log(torch.cosh((k1 * theta.sin() * height).clamp(max=700)))
        ring = torch.where(k1 * theta.sin() * height > 700, k1 * theta.sin() * height - math.log(2), ring)
        area = torch.zeros(()).double() - math.log(math.pi)
    else:
        ring = ops.log_partition(dim - 1, k1 * theta.sin() * height)
        area = torch.lgamma(f64(dim / 2)) - torch.lgamma(f64((dim - 1) / 2)) - 0.5 * math.log(math.pi)
    inner = (
        ops.log_partition(dim, (kappa**2 + k2**2 + 2 * kappa * k2 * w).clamp_min(0).sqrt())
        - ops.log_partition(dim, f64(kappa))
        - ops.log_partition(dim, f64(k2))
    )
    log_term = (dim - 2) * height.clamp_min(1e-300).log() + k1 * cosine * w + ring + inner
    want = log_term.logsumexp(-1) + math.log(math.pi / 200_000) + area - ops.log_partition(dim, f64(k1))
    got = expected_kernel_log_ratio(dim, f64(k1), f64(k2), f64(kappa), cosine.squeeze(-1))
    assert (want < -100).sum() >= 2
    torch.testing.assert_close(got, want, rtol=2e-4, atol=0)


@pytest.mark.parametrize("dim", [2, 3, 10, 64, 512])
@pytest.mark.parametrize("triple", [(0.1, 5.0, 20.0), (16.0, 64.0, 20.0), (200.0, 900.0, 500.0)], ids=str)
def test_gradients_near_the_peak(dim, triple):
    """Against central differences in 90 digits."""
    scale = math.sqrt(sum(1 / k for k in triple))
    for cosine in (1.0, math.cos(scale), math.cos(2 * scale)):
        arguments = [f64(value).requires_grad_() for value in (*triple, cosine)]
        expected_kernel_log_ratio(dim, *arguments).sum().backward()
        for i, argument in enumerate(arguments):
            values = [mp.mpf(a.item()) for a in arguments]
            with mp.workdps(90):
                step = mp.mpf(10) ** -25
                up, down = ([v + sign * step * (j == i) for j, v in enumerate(values)] for sign in (1, -1))
                want = (reference(dim, *up, digits=90) - reference(dim, *down, digits=90)) / (2 * step)
            assert float(argument.grad) == pytest.approx(float(want), rel=1e-8, abs=1e-13)


@pytest.mark.parametrize("dim", [2, 3, 10])
def test_gradients_on_the_far_side_and_across_the_blend(dim):
    """Against central differences in 110 digits: what a badly placed positive pair is pulled by."""
    cosine = torch.linspace(-0.95, 0.15, 23, dtype=double)
    triple = (70.0, 55.0, 90.0)
    inputs = [torch.full_like(cosine, k).requires_grad_() for k in triple] + [cosine.clone().requires_grad_()]
    value = expected_kernel_log_ratio(dim, *inputs)
    value.sum().backward()
    depth = expected_kernel_log_ratio(dim, *f64(*triple, 1.0)) - value.detach()
    assert depth.min() < 26 and depth.max() > 50  # the series, the blend and the saddle point
    with mp.workdps(110):
        step = mp.mpf(10) ** -30
        for i, name in enumerate(("k1", "k2", "kappa", "cosine")):
            for j, x in enumerate(cosine.tolist()):
                up, down = (
                    [mp.mpf(v) + sign * step * (i == m) for m, v in enumerate((*triple, x))] for sign in (1, -1)
                )
                want = (reference(dim, *up, digits=110) - reference(dim, *down, digits=110)) / (2 * step)
                assert inputs[i].grad[j].item() == pytest.approx(float(want), rel=0.01), (name, x, depth[j])


def test_is_the_double_integral_of_its_definition():
    """On the circle, E f(z, z') over both posteriors by the trapezoidal rule, which is exact for periodic functions."""
    k1, k2, kappa, angle = 7.0, 3.0, 5.0, 0.8
    t = torch.arange(512, dtype=double) * (2 * math.pi / 512)
    law = [torch.softmax(k * torch.cos(t - centre), 0) for k, centre in ((k1, 0.0), (k2, angle))]
    kernel = torch.exp(kappa * torch.cos(t.unsqueeze(-1) - t))
    want = torch.log(law[0] @ kernel @ law[1] / kernel[0].mean())
    got = expected_kernel_log_ratio(2, *f64(k1, k2, kappa), f64(angle).cos())
    torch.testing.assert_close(got, want.unsqueeze(0), rtol=1e-12, atol=0)


def test_is_the_expectation_over_posterior_draws():
    """E f(z, z') by 400,000 draws at d = 10; five standard errors, false alarm 6e-7 per cosine."""
    from pyro_contrastive.distributions import VonMisesFisher

    torch.manual_seed(0)
    mu1 = torch.eye(10, dtype=double)[0]
    for cosine in (0.9, 0.5):
        mu2 = cosine * mu1 + math.sqrt(1 - cosine**2) * torch.eye(10, dtype=double)[1]
        z1, z2 = (VonMisesFisher(mu, f64(k)).sample((400_000,)).squeeze(1) for mu, k in ((mu1, 12.0), (mu2, 8.0)))
        f = torch.exp(5.0 * (z1 * z2).sum(-1) - ops.log_partition(10, f64(5.0)))
        got = expected_kernel_log_ratio(10, *f64(12.0, 8.0, 5.0), f64(cosine)).exp()
        assert abs(f.mean() - got) < 5 * f.std() / math.sqrt(len(f))


@pytest.mark.parametrize("dim", [2, 3, 10, 512])
def test_limits(dim):
    cosine = f64(1.0, 0.7, 0.0, -0.6)
    k1, k2, kappa = f64(16.0), f64(40.0), f64(20.0)
    shared = shared_latent_kernel_log_ratio(dim, k1, k2, cosine)
    value = expected_kernel_log_ratio
    # an infinite pair concentration is the shared latent, exactly and as a limit
    torch.testing.assert_close(value(dim, k1, k2, f64(math.inf), cosine), shared, rtol=0, atol=0)
    torch.testing.assert_close(value(dim, k1, k2, f64(5e7), cosine), shared, rtol=1e-5, atol=1e-5)
    # it is a convolution: the three concentrations play the same part
    for order in ((k2, k1, kappa), (kappa, k2, k1), (k1, kappa, k2)):
        torch.testing.assert_close(value(dim, *order, cosine), value(dim, k1, k2, kappa, cosine), rtol=1e-9, atol=1e-9)
    # latents that are known leave the kernel's own density, one that is known a single posterior
    kernel = kappa * cosine - ops.log_partition(dim, kappa)
    torch.testing.assert_close(value(dim, *f64(math.inf, math.inf), kappa, cosine), kernel, rtol=1e-6, atol=1e-6)
    one_known = value(dim, f64(math.inf), k2, kappa, cosine)
    torch.testing.assert_close(one_known, shared_latent_kernel_log_ratio(dim, k2, kappa, cosine), rtol=0, atol=0)
    # a view that says nothing leaves nothing, and its gradient is that of the first degree alone
    nothing = torch.zeros(1, dtype=double, requires_grad=True)
    silent = value(dim, nothing, k2, kappa, cosine)
    torch.testing.assert_close(silent, torch.zeros_like(silent), rtol=0, atol=1e-13)
    silent.sum().backward()
    slope = (ops.bessel_ratio(dim, k2) * ops.bessel_ratio(dim, kappa) * cosine).sum()
    torch.testing.assert_close(nothing.grad, slope.unsqueeze(0), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("dim", [2, 3, 10, 512])
def test_runaway_concentrations_take_the_saddle_point(dim, monkeypatch):
    """Above MAX_ORDER terms the series is left; there both agree."""
    cosine = torch.cos(torch.linspace(0, 0.05, 6, dtype=double))
    with_series = expected_kernel_log_ratio(dim, *f64(1e4, 2e4, 1.5e4), cosine)
    monkeypatch.setattr(series, "MAX_ORDER", 100)
    series._order.cache_clear()
    series._largest_for_series.cache_clear()
    try:
        without = expected_kernel_log_ratio(dim, *f64(1e4, 2e4, 1.5e4), cosine)
    finally:
        series._order.cache_clear()
        series._largest_for_series.cache_clear()
    assert not torch.equal(with_series, without)
    torch.testing.assert_close(without, with_series, rtol=1e-6, atol=1e-6)
    # one item that runs away leaves the others what they are
    mixed = expected_kernel_log_ratio(dim, f64(16.0, 1e9).unsqueeze(-1), f64(64.0), f64(20.0), f64(0.4))
    alone = expected_kernel_log_ratio(dim, f64(16.0), f64(64.0), f64(20.0), f64(0.4))
    torch.testing.assert_close(mixed[0], alone, rtol=1e-12, atol=1e-12)


def test_enough_terms(monkeypatch):
    """More terms change nothing, for concentrations between the steps of the rounding as well."""
    cosine = f64(1.0, 0.8, 0.2)
    for dim in (2, 10, 128):
        for k in (0.3, 1.0, 9.7, 33.0, 410.0):
            usual = expected_kernel_log_ratio(dim, f64(k), f64(2 * k), f64(k), cosine)
            with monkeypatch.context() as patch:
                patch.setattr(series, "_MARGIN", {double: 60.0})
                series._order.cache_clear()
                longer = expected_kernel_log_ratio(dim, f64(k), f64(2 * k), f64(k), cosine)
            series._order.cache_clear()
            near = usual > usual[0] - 10
            torch.testing.assert_close(usual[near], longer[near], rtol=0, atol=1e-10)


def test_grid_equals_single_pairs_and_leading_axes(monkeypatch):
    """Also across blocks of rows, ragged ones included, values and gradients."""
    torch.manual_seed(1)
    k1, k2 = torch.rand(3, 7, 1, dtype=double) * 60 + 1, torch.rand(3, 1, 5, dtype=double) * 60 + 1
    kappa, cosine = torch.rand(3, 1, 1, dtype=double) * 30 + 1, torch.rand(3, 7, 5, dtype=double) * 2 - 1
    arguments = [t.clone().requires_grad_() for t in (k1, k2, kappa, cosine)]
    whole = expected_kernel_log_ratio(6, *arguments)
    weights = torch.randn(3, 7, 5, dtype=double)
    whole.backward(weights)
    singles = [t.expand(3, 7, 5).clone().requires_grad_() for t in (k1, k2, kappa, cosine)]
    value = torch.stack([expected_kernel_log_ratio(6, *p) for p in zip(*(s.flatten() for s in singles), strict=True)])
    torch.testing.assert_close(whole.flatten(), value, rtol=1e-9, atol=1e-9)
    (value.view(3, 7, 5) * weights).sum().backward()
    for argument, single in zip(arguments, singles, strict=True):
        # single pairs have their own, smaller number of terms
        torch.testing.assert_close(argument.grad, single.grad.sum_to_size(argument.shape), rtol=1e-6, atol=1e-9)
    monkeypatch.setattr(series, "_BLOCK", 32)  # two rows of three grids at a time
    again = [t.clone().requires_grad_() for t in (k1, k2, kappa, cosine)]
    blocks = expected_kernel_log_ratio(6, *again)
    blocks.backward(weights)
    torch.testing.assert_close(blocks, whole, rtol=1e-13, atol=1e-13)
    for argument, other in zip(arguments, again, strict=True):
        torch.testing.assert_close(argument.grad, other.grad, rtol=1e-7, atol=1e-9)  # the far pairs' rounding


def test_cosine_beyond_one_is_rounding():
    cosine = f64(1 + 1e-7).requires_grad_()
    value = expected_kernel_log_ratio(10, *f64(16.0, 16.0, 20.0), cosine)
    torch.testing.assert_close(value, expected_kernel_log_ratio(10, *f64(16.0, 16.0, 20.0), f64(1.0)))
    value.sum().backward()
    assert cosine.grad > 1


def test_no_pairs_give_an_empty_grid():
    value = expected_kernel_log_ratio(10, torch.ones(0, 1), torch.ones(1, 5), torch.tensor(20.0), torch.ones(0, 5))
    assert value.shape == (0, 5) and value.dtype == torch.float32


def test_second_derivatives_say_so():
    k = f64(5.0).requires_grad_()
    value = expected_kernel_log_ratio(3, k, f64(5.0), f64(5.0), f64(0.5))
    (grad,) = torch.autograd.grad(value.sum(), k, create_graph=True)
    with pytest.raises(RuntimeError, match="expected_kernel_log_ratio is differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1, *f64(1.0, 1.0, 1.0, 0.0)), ValueError, "`dim` must be an integer >= 2"),
        ((3, *f64(-1.0, 1.0, 1.0, 0.0)), ValueError, "must be >= 0, got a smallest value of -1.0"),
        ((3, 1.0, *f64(1.0, 1.0, 0.0)), TypeError, "`concentration1` must be a tensor, got float"),
        ((3, *f64(1.0, 1.0, 1.0), torch.tensor(0)), TypeError, "`cosine` must be float32 or float64, got torch.int64"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        expected_kernel_log_ratio(*arguments)


def test_nan_stays_nan_and_touches_nothing_else():
    want = expected_kernel_log_ratio(10, *f64(16.0, 64.0, 20.0), f64(0.5))
    for value in (
        expected_kernel_log_ratio(10, *f64(16.0, 64.0, 20.0), f64(0.5, math.nan)),
        expected_kernel_log_ratio(10, f64(16.0, math.nan), *f64(64.0, 20.0, 0.5)),
        expected_kernel_log_ratio(10, f64(16.0, math.nan), f64(math.nan, 64.0).flip(0), f64(20.0), f64(0.5)),
    ):
        torch.testing.assert_close(value[:1], want, rtol=1e-9, atol=1e-9)
        assert torch.isnan(value[1])
