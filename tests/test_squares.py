"""The squared length in one pass: the plain sum of squares in every kind of derivative."""

from __future__ import annotations

import pytest
import torch

from pyro_contrastive.ops.squares import squared_length


def plain(x):
    return x.square().sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3,), (2, 5, 7), (4, 0), (0, 4), (1, 129)])
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_value_and_gradient(dtype, shape, scale):
    x = (scale * torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))).requires_grad_()
    ours, expected = squared_length(x), plain(x.double())
    assert ours.shape == expected.shape and ours.dtype == dtype
    torch.testing.assert_close(ours.double(), expected, rtol=8 * torch.finfo(dtype).eps, atol=1e-36)
    (grad,) = torch.autograd.grad(ours.sum(), x)
    assert torch.equal(grad, 2 * x)


@pytest.mark.parametrize("zero", [False, True])
def test_derivatives_of_higher_order_at_zero_as_well(zero):
    x = torch.zeros(3, 4).double() if zero else torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).double()
    x.requires_grad_()
    assert torch.autograd.gradcheck(squared_length, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(squared_length, (x,))
    hessian = torch.autograd.functional.hessian(lambda t: squared_length(t).sum(), x.detach())
    torch.testing.assert_close(hessian.reshape(12, 12), 2 * torch.eye(12).double())


def test_it_composes_with_functional_transforms():
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(torch.func.vmap(squared_length)(x), plain(x))
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(squared_length))(x), 2 * x)
    tangent = torch.ones_like(x)
    torch.testing.assert_close(torch.func.jvp(squared_length, (x,), (tangent,))[1], 2 * x.sum(-1))
    torch.testing.assert_close(torch.func.hessian(squared_length)(x[0]), 2 * torch.eye(4))
