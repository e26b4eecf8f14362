"""The uniform law on the sphere."""

from __future__ import annotations

import math

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from ._checks import Shape, check_on_sphere, check_unit

__all__ = ["HypersphericalUniform", "log_uniform_density"]


def log_uniform_density(dim: int) -> float:
    """Log density of the uniform law on S^(dim-1) with respect to surface area, in nats."""
    return math.lgamma(dim / 2) - math.log(2) - dim / 2 * math.log(math.pi)


class HypersphericalUniform(TorchDistribution):
    r"""Uniform distribution on the unit sphere :math:`S^{d-1}` of :math:`R^d`.

    Args:
        dim: d >= 2, dimension of the embedding space.
        batch_shape: shape of independent copies, default one.
        dtype: of the samples, float32 (default) or float64.
        device: of the samples.

    Raises:
        ValueError: if ``dim`` < 2, or a scored value is not a point of the sphere.

    Shape:
        batch ``batch_shape``, event ``(d,)``.

    Example:
        >>> HypersphericalUniform(3).log_prob(torch.tensor([0.0, 0.0, 1.0]))  # -log(4 pi)
        tensor(-2.5310)
    """

    arg_constraints: dict = {}
    support = constraints.sphere
    has_rsample = True

    def __init__(
        self,
        dim: int,
        batch_shape: torch.Size | tuple[int, ...] = (),
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(dim, int) or dim < 2:
            raise ValueError(f"`dim` must be an integer >= 2 (the sphere S^(dim-1) of R^dim), got {dim!r}")
        self.dim = dim
        self._dtype, self._device = dtype, device
        super().__init__(torch.Size(batch_shape), torch.Size((dim,)), validate_args=validate_args)

    def expand(self, batch_shape: Shape, _instance: TorchDistribution | None = None) -> HypersphericalUniform:
        """See :meth:`torch.distributions.Distribution.expand`."""
        new = self._get_checked_instance(HypersphericalUniform, _instance)
        new.dim, new._dtype, new._device = self.dim, self._dtype, self._device
        super(HypersphericalUniform, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """The origin of R^d: the uniform law has no preferred direction."""
        return torch.zeros(self._extended_shape(), dtype=self._dtype, device=self._device)

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        """Normalised Gaussian draws, ``(*sample_shape, *batch_shape, d)``."""
        noise = torch.randn(self._extended_shape(torch.Size(sample_shape)), dtype=self._dtype, device=self._device)
        return noise / torch.linalg.vector_norm(noise, dim=-1, keepdim=True)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density with respect to surface area, in nats."""
        check_on_sphere("value", value, self.dim)
        if self._validate_args:
            check_unit("value", value)
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        return value.new_full(shape, log_uniform_density(self.dim))

    def entropy(self) -> Tensor:
        """Log of the area of the sphere, in nats."""
        return torch.full(self.batch_shape, -log_uniform_density(self.dim), dtype=self._dtype, device=self._device)
