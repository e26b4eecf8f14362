"""The Bessel functions against 50-digit arithmetic, over the whole range of dimensions and concentrations."""

from __future__ import annotations

import math

import mpmath as mp
import numpy as np
import pytest
import torch

from pyro_contrastive import ops
from tests.references import (
    DIMS,
    KAPPAS,
    bessel_ratio,
    bessel_ratio_derivative,
    bessel_ratio_n,
    bessel_ratio_second_derivative,
    log_iv,
    log_partition,
)

DTYPES = {torch.float64: 1e-10, torch.float32: 1e-5}  # dtype -> relative error that is promised


def relative_errors(values: torch.Tensor, references: list) -> np.ndarray:
    """|value - reference| / |reference|, and the value itself where the reference is zero."""
    values = [mp.mpf(v) for v in values.double().tolist()]
    return np.array([float(abs(v - r) / (abs(r) if r else 1)) for v, r in zip(values, references, strict=True)])


def mp_list(values: torch.Tensor) -> list:
    return [mp.mpf(v) for v in values.detach().double().tolist()]


def grid(dtype: torch.dtype) -> tuple[torch.Tensor, list[float]]:
    """Concentrations in the given dtype, and the exact values they were rounded to."""
    kappa = torch.tensor(KAPPAS, dtype=dtype)
    return kappa, kappa.double().tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", DIMS)
class TestGrid:
    def test_log_partition(self, dim, dtype):
        kappa, exact = grid(dtype)
        value = ops.log_partition(dim, kappa)
        assert value.dtype == dtype
        error = relative_errors(value, [log_partition(dim, k) for k in exact])
        assert error.max() < DTYPES[dtype], dict(zip(KAPPAS, error, strict=True))

    def test_log_partition_scaled(self, dim, dtype):
        kappa, exact = grid(dtype)
        value = ops.log_partition_scaled(dim, kappa)
        error = relative_errors(value, [log_partition(dim, k) - mp.mpf(k) for k in exact])
        assert error.max() < DTYPES[dtype], dict(zip(KAPPAS, error, strict=True))

    def test_log_iv(self, dim, dtype):
        kappa, exact = grid(dtype)
        order = dim / 2 - 1
        value = ops.log_iv(order, kappa)
        reference = [log_iv(order, k) for k in exact]
        if dim > 2:
            assert value[0].item() == -math.inf
        finite = [i for i, r in enumerate(reference) if not mp.isinf(r)]
        got = mp_list(value[finite])
        # log I_v crosses zero: the error is relative to the larger of the value and one
        error = [float(abs(v - reference[i]) / max(1, abs(reference[i]))) for i, v in zip(finite, got, strict=True)]
        assert max(error) < DTYPES[dtype], error

    def test_ratio(self, dim, dtype):
        kappa, exact = grid(dtype)
        error = relative_errors(ops.bessel_ratio(dim, kappa), [bessel_ratio(dim, k) for k in exact])
        assert error.max() < DTYPES[dtype], dict(zip(KAPPAS, error, strict=True))

    def test_derivatives(self, dim, dtype):
        """d log_partition = A, d A = A', d^2 A = A'', all finite, at kappa = 0 too."""
        kappa, exact = grid(dtype)
        kappa.requires_grad_()
        (first,) = torch.autograd.grad(ops.log_partition(dim, kappa).sum(), kappa, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), kappa)
        (slope,) = torch.autograd.grad(ops.bessel_ratio(dim, kappa).sum(), kappa, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), kappa)
        assert relative_errors(first, [bessel_ratio(dim, k) for k in exact]).max() < DTYPES[dtype]
        # A' falls from 1/d to d/kappa^2 while A is near 1, so rounding is felt relative to 1/d and not to A'
        references = [bessel_ratio_derivative(dim, k) for k in exact]
        for value in (second, slope):
            errors = [abs(float(v - r)) for v, r in zip(mp_list(value), references, strict=True)]
            assert max(errors) < DTYPES[dtype] / dim, dict(zip(KAPPAS, errors, strict=True))
        references = [bessel_ratio_second_derivative(dim, k) for k in exact]
        errors = [abs(float(v - r)) for v, r in zip(mp_list(curvature), references, strict=True)]
        scale = max(abs(float(r)) for r in references)
        assert max(errors) < {torch.float64: 1e-9, torch.float32: 1e-4}[dtype] * scale, dict(
            zip(KAPPAS, errors, strict=True)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", [0.0, 0.5, 1.0, 4.0, 15.0, 31.0, 255.0, 511.0])
def test_ratios(order, dtype):
    """I_{v+n}/I_v up to n = 64, relative to the value and down to the smallest number of the dtype."""
    x = torch.tensor([1e-3, 0.1, 1.0, 10.0, 100.0, 1e4, 1e6], dtype=dtype)
    value = ops.bessel_ratios(order, x, 64)
    assert value.shape == (7, 65)
    tiny = torch.finfo(dtype).tiny
    worst = 0.0
    for i, k in enumerate(x.double().tolist()):
        for n in (0, 1, 2, 5, 17, 40, 64):
            reference = bessel_ratio_n(order, k, n)
            if reference > tiny:
                worst = max(worst, float(abs(mp.mpf(value[i, n].item()) / reference - 1)))
            else:
                assert 0 <= value[i, n].item() <= 2 * tiny
    # each of the n ratios that are multiplied may be off by the promised error of one
    assert worst < {torch.float64: 1e-10, torch.float32: 3e-5}[dtype], worst


def test_ratios_are_never_silently_wrong_twice():
    """The second derivative of the ratios is either right or an error."""
    x = torch.tensor([0.7, 5.0], dtype=torch.float64, requires_grad=True)
    try:
        (first,) = torch.autograd.grad((ops.bessel_ratios(4.0, x, 3)[..., 1] + x**2).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
    except (RuntimeError, NotImplementedError):
        return
    expected = [float(bessel_ratio_second_derivative(10, k)) + 2 for k in x.tolist()]
    np.testing.assert_allclose(second.numpy(), expected, rtol=1e-9)


def test_ratios_at_the_limits():
    """kappa = 0 is the uniform law (1, 0, 0, ...); kappa = inf a point mass (1, 1, 1, ...)."""
    value = ops.bessel_ratios(4.0, torch.tensor([0.0, math.inf], dtype=torch.float64), 5)
    assert value[0].tolist() == [1, 0, 0, 0, 0, 0]
    assert value[1].tolist() == [1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("dim", [2, 3, 10, 128])
def test_infinite_concentration(dim):
    kappa = torch.tensor(math.inf, dtype=torch.float64, requires_grad=True)
    ratio = ops.bessel_ratio(dim, kappa)
    (slope,) = torch.autograd.grad(ratio, kappa)
    assert ratio.item() == 1.0
    assert slope.item() == 0.0
    assert ops.log_partition(dim, kappa).item() == math.inf


@pytest.mark.parametrize("dim", [2, 3, 4, 10, 64, 512])
def test_gradcheck(dim):
    kappa = torch.tensor([1e-3, 0.3, 2.0, 9.0, 40.0, 300.0], dtype=torch.float64, requires_grad=True)
    for function in (ops.log_partition, ops.log_partition_scaled, ops.bessel_ratio):
        assert torch.autograd.gradcheck(lambda k, f=function: f(dim, k), kappa)
        assert torch.autograd.gradgradcheck(lambda k, f=function: f(dim, k), kappa)
    assert torch.autograd.gradcheck(lambda k: ops.bessel_ratios(dim / 2 - 1, k, 8), kappa)
    positive = kappa.detach()[1:].requires_grad_()
    assert torch.autograd.gradcheck(lambda k: ops.log_iv(dim / 2 - 1, k), positive)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [2, 3, 10, 64, 512, 1024])
def test_inverse_ratio(dim, dtype):
    """A(A^-1(rho)) = rho, and the derivative is 1/A'."""
    rho = torch.tensor([0.0, 1e-3, 0.1, 0.5, 0.9, 0.99], dtype=dtype, requires_grad=True)
    kappa = ops.inverse_bessel_ratio(dim, rho)
    for r, k in zip(rho.detach().double().tolist(), kappa.detach().double().tolist(), strict=True):
        assert float(abs(bessel_ratio(dim, k) - mp.mpf(r))) <= 10 * DTYPES[dtype] * max(r, 1e-30), (r, k)
    (slope,) = torch.autograd.grad(kappa.sum(), rho)
    expected = [float(1 / bessel_ratio_derivative(dim, k)) for k in kappa.detach().double().tolist()]
    np.testing.assert_allclose(slope.double().numpy(), expected, rtol=100 * DTYPES[dtype])


def test_shapes_and_dtypes():
    kappa = torch.rand(2, 3, 4)
    assert ops.log_partition(7, kappa).shape == (2, 3, 4)
    assert ops.bessel_ratios(2.5, kappa, 6).shape == (2, 3, 4, 7)
    assert ops.log_partition(7, torch.tensor(1.0)).shape == ()
    assert ops.log_partition(7, torch.empty(0)).shape == (0,)


def test_nan_stays_nan():
    kappa = torch.tensor([math.nan, 1.0])
    for value in (ops.log_partition(5, kappa), ops.bessel_ratio(5, kappa), ops.log_iv(1.5, kappa)):
        assert value.isnan().tolist() == [True, False]
