"""The von Mises-Fisher law in any dimension."""

from __future__ import annotations

from torch import Tensor

from pyro_contrastive.ops.bessel import bessel_ratio, bessel_ratio_complement, log_partition_scaled
from pyro_contrastive.ops.radial import VON_MISES_FISHER

from .rotational import RotationallySymmetric
from .uniform import log_uniform_density

__all__ = ["VonMisesFisher"]


class VonMisesFisher(RotationallySymmetric):
    r"""Von Mises-Fisher distribution :math:`p(z) = C_d(\kappa) \exp(\kappa\, \mu \cdot z)` on :math:`S^{d-1}`.

    Density, entropy and moments are accurate for every d >= 2 and every concentration from 0 to at least 1e6, in
    float32 and float64. Draws are exact in law and carry the exact pathwise gradient to both arguments.

    Args:
        mean_direction: unit vectors mu, ``(*batch, d)``.
        concentration: kappa >= 0, ``(*batch,)``; 0 is the uniform law, and 1/sqrt(kappa) is about the standard
            deviation in radians along each tangent direction when kappa is much larger than d.

    Raises:
        TypeError, ValueError: see :class:`~pyro_contrastive.distributions.rotational.RotationallySymmetric`.

    References:
        Mardia and Jupp, Directional Statistics (2000), section 9.3.2.

    Example:
        >>> import torch
        >>> posterior = VonMisesFisher(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([10.0]))
        >>> posterior.rsample((5,)).shape
        torch.Size([5, 1, 3])
        >>> posterior.mean_resultant_length  # coth(10) - 1/10
        tensor([0.9000])
    """

    family = VON_MISES_FISHER

    @property
    def mean_resultant_length(self) -> Tensor:
        """A_d(kappa) = I_(d/2)(kappa) / I_(d/2-1)(kappa), in [0, 1]."""
        return bessel_ratio(self.dim, self.concentration)

    def entropy(self) -> Tensor:
        """Differential entropy with respect to surface area, in nats, shape ``batch``."""
        return self._log_normalizer() + self.concentration * bessel_ratio_complement(self.dim, self.concentration)

    @staticmethod
    def _log_kernel(versine: Tensor, concentration: Tensor) -> Tensor:
        return -concentration * versine

    def _log_normalizer(self) -> Tensor:
        return log_partition_scaled(self.dim, self.concentration) - log_uniform_density(self.dim)
