"""The constraint of learned concentrations: positive, differentiable, and fast enough under Adam."""

import math

import pyro
import pytest
import torch
from pyro.nn import PyroModule, PyroParam
from torch.distributions import biject_to, transform_to

from pyro_contrastive.ops.constraints import scale_parameter


@pytest.mark.parametrize("registry", [transform_to, biject_to])
def test_round_trip_and_jacobian(registry):
    transform = registry(scale_parameter)
    x = torch.tensor([1e-3, 1.0, 10.0, 1e5], dtype=torch.float64)
    unconstrained = transform.inv(x)
    torch.testing.assert_close(unconstrained, x.log() / 4)
    torch.testing.assert_close(transform(unconstrained), x)
    torch.testing.assert_close(transform.log_abs_det_jacobian(unconstrained, x), (4 * x).log())
    assert not scale_parameter.check(torch.tensor([-1.0, 0.0])).any()


def test_adam_moves_it_four_times_as_far_as_a_logarithm():
    module = PyroModule()
    module.scale = PyroParam(torch.tensor(10.0), constraint=scale_parameter)
    optimiser = torch.optim.Adam(module.parameters(), lr=0.01)
    for _ in range(50):
        optimiser.zero_grad()
        module.scale.log().backward()  # a constant slope: every step is the learning rate
        optimiser.step()
    assert math.log(10.0 / module.scale.item()) == pytest.approx(4 * 50 * 0.01, rel=1e-3)


def test_pyro_param_statements_take_it():
    value = pyro.param("scale", torch.tensor(3.0), constraint=scale_parameter)
    assert value.item() == pytest.approx(3.0)
