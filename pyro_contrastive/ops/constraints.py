"""Scale parameters that an optimiser moves fast enough."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints, transform_to
from torch.distributions.constraints import Constraint, greater_than
from torch.distributions.transforms import AffineTransform, ComposeTransform, ExpTransform, Transform

__all__ = ["scale_parameter", "signed_scale_parameter"]

_GAIN = 4.0


class _ScaleParameter(greater_than):
    """Positive numbers, optimised as log(x) / 4.

    Adam moves every unconstrained value by about its learning rate per step, whatever the gradient. A single
    concentration has to travel by a factor of several in the time in which each weight of a network moves by a few
    hundredths, so that under the plain log it would still be on its way when the network has converged.
    """

    def __init__(self) -> None:
        super().__init__(0.0)


@biject_to.register(_ScaleParameter)
@transform_to.register(_ScaleParameter)
def _transform(constraint: _ScaleParameter) -> Transform:
    return ComposeTransform([AffineTransform(0.0, _GAIN), ExpTransform()])


class _SignedScaleParameter(Constraint):
    """Real numbers, optimised as asinh(x) / 4: like a positive scale where they are large, and free to change sign."""

    def check(self, value: Tensor) -> Tensor:
        return constraints.real.check(value)


class _Sinh(Transform):
    domain = constraints.real
    codomain = constraints.real
    bijective = True
    sign = +1

    def _call(self, x: Tensor) -> Tensor:
        return torch.sinh(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.asinh(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * torch.log1p(y.square())


@biject_to.register(_SignedScaleParameter)
@transform_to.register(_SignedScaleParameter)
def _signed_transform(constraint: _SignedScaleParameter) -> Transform:
    return ComposeTransform([AffineTransform(0.0, _GAIN), _Sinh()])


scale_parameter = _ScaleParameter()
signed_scale_parameter = _SignedScaleParameter()
