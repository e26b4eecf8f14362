"""Recognition with von Mises-Fisher posteriors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_contrastive import distributions as dist
from pyro_contrastive.nets import ConcentrationHead, DirectionHead
from pyro_contrastive.ops.bessel import inverse_bessel_ratio

from .base import INITIAL_RESULTANT_LENGTH, RecognitionGuide

__all__ = ["VonMisesFisher"]


class VonMisesFisher(RecognitionGuide):
    r"""Amortised von Mises-Fisher posteriors, :math:`R(z|x) = vMF(\mu(x), \kappa(x))`.

    Args:
        encoder: any module ``x -> (N, features)``.
        dim: d >= 2.
        features: width of the encoder's output; read off its last layer when omitted.
        batch_norm: standardise the features over the batch before the heads.
        initial_concentration: kappa at the start of training. By default the value at which the mean resultant length
            is 0.6 in this dimension (kappa about 0.93 d: 9 for d = 10, 120 for d = 128): neither uniform, where
            nothing is learned, nor a point, where widths do not matter.

    Raises:
        ValueError: see :class:`~pyro_contrastive.guides.base.RecognitionGuide`.

    Example:
        >>> from torch import nn
        >>> guide = VonMisesFisher(nn.Linear(8, 32), dim=5)
        >>> guide.posterior(torch.zeros(4, 8)).batch_shape
        torch.Size([4])
    """

    def __init__(
        self,
        encoder: nn.Module,
        dim: int,
        *,
        features: int | None = None,
        batch_norm: bool = True,
        initial_concentration: float | None = None,
    ) -> None:
        super().__init__(encoder, dim, features=features, batch_norm=batch_norm)
        if initial_concentration is None:
            length = torch.tensor(INITIAL_RESULTANT_LENGTH, dtype=torch.float64)
            initial_concentration = inverse_bessel_ratio(dim, length).item()
        self.direction = DirectionHead(self.features, dim)
        self.concentration = ConcentrationHead(self.features, initial_concentration)

    def _posterior(self, features: Tensor) -> dist.VonMisesFisher:
        return dist.VonMisesFisher(self.direction(features), self.concentration(features).squeeze(-1))
