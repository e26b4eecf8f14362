"""The power spherical law: like von Mises-Fisher, without Bessel functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_contrastive.ops.gamma import digamma_increment, log_gamma_increment
from pyro_contrastive.ops.radial import POWER_SPHERICAL

from .rotational import RotationallySymmetric

__all__ = ["PowerSpherical"]


class PowerSpherical(RotationallySymmetric):
    r"""Power spherical distribution :math:`p(z) \propto (1 + \mu \cdot z)^\kappa` on :math:`S^{d-1}`.

    Its concentration is not that of a von Mises-Fisher law: for large values PowerSpherical(kappa) is close to
    VonMisesFisher(kappa / 2). Compare families by ``mean_resultant_length``.

    Args:
        mean_direction: unit vectors mu, ``(*batch, d)``.
        concentration: kappa >= 0, ``(*batch,)``; 0 is the uniform law.

    Raises:
        TypeError, ValueError: see :class:`~pyro_contrastive.distributions.rotational.RotationallySymmetric`.

    References:
        De Cao and Aziz, The Power Spherical distribution (2020), arXiv 2006.04437.

    Example:
        >>> import torch
        >>> PowerSpherical(torch.tensor([1.0, 0.0, 0.0]), torch.tensor(8.0)).mean_resultant_length  # 8 / (8 + 2)
        tensor(0.8000)
    """

    family = POWER_SPHERICAL

    @property
    def mean_resultant_length(self) -> Tensor:
        """kappa / (kappa + d - 1), in [0, 1)."""
        return self.concentration / (self.concentration + self.dim - 1)

    def entropy(self) -> Tensor:
        """Differential entropy with respect to surface area, in nats, shape ``batch``."""
        half = (self.dim - 1) / 2
        return self._log_normalizer() + self.concentration * digamma_increment(half + self.concentration, half)

    @staticmethod
    def _log_kernel(versine: Tensor, concentration: Tensor) -> Tensor:
        # the density vanishes at the antipode: stay one rounding step away from log 0
        limit = 1 - torch.finfo(versine.dtype).eps
        return concentration * torch.log1p(-(0.5 * versine).clamp_max(limit))

    def _log_normalizer(self) -> Tensor:
        # (1 + w)/2 ~ Beta((d-1)/2 + kappa, (d-1)/2)
        half = (self.dim - 1) / 2
        increment = log_gamma_increment(half + self.concentration, half)
        return 2 * half * math.log(2) + half * math.log(math.pi) - increment
