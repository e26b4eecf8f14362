"""Deterministic recognition: the point embeddings of ordinary contrastive learning."""

from __future__ import annotations

from pyro.distributions import Delta as DeltaDistribution
from torch import Tensor, nn

from pyro_contrastive.nets import DirectionHead

from .base import RecognitionGuide

__all__ = ["Delta"]


class Delta(RecognitionGuide):
    r"""Point embeddings, :math:`R(z|x) = \delta(z - \mu(x))`: the limit of infinite concentration.

    With an InfoNCE likelihood the ELBO then equals the evidence. It has no density, so recognition factors refuse it.

    Args:
        encoder: any module ``x -> (N, features)``.
        dim: d >= 2.
        features: width of the encoder's output; read off its last layer when omitted.
        batch_norm: standardise the features over the batch before the heads.

    Raises:
        ValueError: see :class:`~pyro_contrastive.guides.base.RecognitionGuide`.
    """

    def __init__(self, encoder: nn.Module, dim: int, *, features: int | None = None, batch_norm: bool = True) -> None:
        super().__init__(encoder, dim, features=features, batch_norm=batch_norm)
        self.direction = DirectionHead(self.features, dim)

    def _posterior(self, features: Tensor) -> DeltaDistribution:
        return DeltaDistribution(self.direction(features), event_dim=1)
