"""What all laws that are symmetric about a mean direction share: arguments, shapes, draws, log density by the angle."""

from __future__ import annotations

from typing import ClassVar

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from pyro_contrastive.ops.precision import matmul
from pyro_contrastive.ops.radial import RadialFamily, draw
from pyro_contrastive.ops.squares import squared_length
from pyro_contrastive.ops.tiles import Pairs, Tensors

from ._checks import Shape, check_concentration, check_float, check_on_sphere, check_same, check_unit, check_vectors

__all__ = ["RotationallySymmetric"]


class RotationallySymmetric(TorchDistribution):
    r"""A law on :math:`S^{d-1}` whose density depends on :math:`\mu \cdot z` only, with one concentration.

    Subclasses give ``family`` (for the draws), ``_log_normalizer`` and ``_log_kernel`` (for the density) and
    ``mean_resultant_length``.

    Args:
        mean_direction: unit vectors mu, ``(*batch, d)``, d >= 2.
        concentration: kappa >= 0, finite, ``(*batch,)`` or broadcastable to it; 0 is the uniform law.

    Raises:
        TypeError: for dtypes other than float32/float64, or two different ones.
        ValueError: for NaN, a negative concentration, a direction that is not of unit length (while argument
            validation is on, torch's default), or shapes that do not broadcast.

    Shape:
        batch ``broadcast(mean_direction.shape[:-1], concentration.shape)``, event ``(d,)``.
    """

    arg_constraints: ClassVar[dict] = {
        "mean_direction": constraints.sphere,
        "concentration": constraints.nonnegative,
    }
    support = constraints.sphere
    has_rsample = True
    family: ClassVar[RadialFamily]

    mean_direction: Tensor
    concentration: Tensor

    def __init__(self, mean_direction: Tensor, concentration: Tensor, *, validate_args: bool | None = None) -> None:
        check_float("mean_direction", mean_direction)
        dim = check_vectors("mean_direction", mean_direction)
        if not isinstance(concentration, Tensor):
            concentration = mean_direction.new_tensor(concentration)
        check_float("concentration", concentration)
        check_same("mean_direction", mean_direction, "concentration", concentration)
        try:
            batch_shape = torch.broadcast_shapes(mean_direction.shape[:-1], concentration.shape)
        except RuntimeError:
            raise ValueError(
                "`concentration` must have the shape of `mean_direction` without its last axis, got "
                f"{tuple(concentration.shape)} for directions of shape {tuple(mean_direction.shape)}; "
                "for one concentration per row pass shape (N,), not (N, 1)"
            ) from None
        self.mean_direction = mean_direction.expand(batch_shape + (dim,))
        self.concentration = concentration.expand(batch_shape)
        super().__init__(batch_shape, torch.Size((dim,)), validate_args=False)
        if validate_args is not None:
            self._validate_args = validate_args
        else:
            del self._validate_args  # back to the class attribute: the process-wide default
        if self._validate_args:
            check_unit("mean_direction", mean_direction)
            check_concentration(concentration)

    @staticmethod
    def infer_shapes(  # type: ignore[override]
        mean_direction: tuple[int, ...], concentration: tuple[int, ...] = ()
    ) -> tuple:
        """Batch and event shape from the shapes of the arguments (Pyro's shape inference)."""
        return torch.broadcast_shapes(tuple(mean_direction[:-1]), tuple(concentration)), tuple(mean_direction[-1:])

    def expand(self, batch_shape: Shape, _instance: TorchDistribution | None = None) -> RotationallySymmetric:
        """See :meth:`torch.distributions.Distribution.expand`."""
        new = self._get_checked_instance(type(self), _instance)
        batch_shape = torch.Size(batch_shape)
        new.mean_direction = self.mean_direction.expand(batch_shape + self.event_shape)
        new.concentration = self.concentration.expand(batch_shape)
        super(RotationallySymmetric, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def dim(self) -> int:
        """Dimension d of the embedding space."""
        return self.event_shape[0]

    @property
    def mean_resultant_length(self) -> Tensor:
        """E[mu . z], in [0, 1], shape ``batch_shape``: the width of the law in a unit that all families share."""
        raise NotImplementedError

    @property
    def mean(self) -> Tensor:
        """Expectation in R^d, ``(*batch, d)``: the mean direction times the mean resultant length (inside the ball)."""
        return self.mean_resultant_length.unsqueeze(-1) * self.mean_direction

    @property
    def mode(self) -> Tensor:
        """The mean direction (any point at concentration 0)."""
        return self.mean_direction

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        """Draws of shape ``(*sample_shape, *batch, d)`` with pathwise gradients to both arguments.

        A Gaussian vector is projected on the tangent space at the mean direction and carried to the sphere by
        the radial quantile map of :mod:`pyro_contrastive.ops.radial`: no rejection, so no hidden bias in the gradient.
        """
        mu = self.mean_direction
        noise = torch.randn(self._extended_shape(torch.Size(sample_shape)), dtype=mu.dtype, device=mu.device)
        return draw(self.family, mu, self.concentration, noise)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density with respect to surface area, in nats; shape ``broadcast(value.shape[:-1], batch)``."""
        check_on_sphere("value", value, self.dim)
        if self._validate_args:
            check_unit("value", value)
        versine = 0.5 * squared_length(value - self.mean_direction)  # 1 - cos, accurate at small angles
        return self._log_kernel(versine, self.concentration) - self._log_normalizer()

    def cross_log_prob(self, value: Tensor) -> Tensor:
        """Log density of every value under every member of the batch, by one matrix product.

        Args:
            value: ``(..., N, d)`` points of the sphere.

        Returns:
            ``(..., N, M)`` for a batch of shape ``(..., M)``: entry (i, j) scores value i under member j.
        """
        return self.cross_pairs(value).grid()

    def cross_pairs(self, value: Tensor) -> Pairs:
        """:meth:`cross_log_prob`, unevaluated."""
        check_on_sphere("value", value, self.dim)
        members = (self.mean_direction, self.concentration.unsqueeze(-1), self._log_normalizer().unsqueeze(-1))
        return Pairs(self._cross, (value,), members)

    @classmethod
    def _cross(cls, rows: Tensors, columns: Tensors, shared: Tensors) -> Tensor:
        (value,), (mean_direction, concentration, log_normalizer) = rows, columns
        versine = 1 - matmul(value, mean_direction.mT)
        return cls._log_kernel(versine, concentration.mT) - log_normalizer.mT

    @staticmethod
    def _log_kernel(versine: Tensor, concentration: Tensor) -> Tensor:
        """log f relative to its value at the mode, from 1 - cos."""
        raise NotImplementedError

    def _log_normalizer(self) -> Tensor:
        """log of the integral of exp(_log_kernel) over the sphere."""
        raise NotImplementedError
