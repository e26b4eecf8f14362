"""A positive parameter that an optimiser moves fast enough."""

from __future__ import annotations

from torch.distributions import biject_to, transform_to
from torch.distributions.constraints import greater_than
from torch.distributions.transforms import AffineTransform, ComposeTransform, ExpTransform, Transform

__all__ = ["scale_parameter"]

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


scale_parameter = _ScaleParameter()
