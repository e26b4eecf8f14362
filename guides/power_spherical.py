"""Recognition with power spherical posteriors."""

from __future__ import annotations

from torch import Tensor, nn

from pyro_contrastive import distributions as dist
from pyro_contrastive.nets import ConcentrationHead, DirectionHead

from .base import INITIAL_RESULTANT_LENGTH, RecognitionGuide

__all__ = ["PowerSpherical"]


class PowerSpherical(RecognitionGuide):
    r"""Amortised power spherical posteriors, :math:`R(z|x) = PS(\mu(x), \kappa(x))`.

    Args:
        encoder: any module ``x -> (N, features)``.
        dim: d >= 2.
        features: width of the encoder's output; read off its last layer when omitted.
        batch_norm: standardise the features over the batch before the heads.
        initial_concentration: kappa at the start of training, by default 1.5 (d - 1), where the mean resultant length
            kappa / (kappa + d - 1) is 0.6.

    Raises:
        ValueError: see :class:`~pyro_contrastive.guides.base.RecognitionGuide`.
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
            initial_concentration = INITIAL_RESULTANT_LENGTH / (1 - INITIAL_RESULTANT_LENGTH) * (dim - 1)
        self.direction = DirectionHead(self.features, dim)
        self.concentration = ConcentrationHead(self.features, initial_concentration)

    def _posterior(self, features: Tensor) -> dist.PowerSpherical:
        return dist.PowerSpherical(self.direction(features), self.concentration(features).squeeze(-1))
