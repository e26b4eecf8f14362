"""Categorical recognition: which of K states a discrete latent is in."""

from __future__ import annotations

from pyro.distributions import Categorical as CategoricalDistribution
from torch import Tensor, nn

from .base import RecognitionGuide

__all__ = ["Categorical"]


class Categorical(RecognitionGuide):
    """Probabilities of K states for every input: the recognition factor f(k | x) of a discrete latent.

    ``posterior(x)`` has batch shape ``(N,)``, an empty event and the states 0 to K - 1. As a Pyro guide it gives every
    view a state of its own; ``models.DiscreteRPM``, where the views share one, needs no guide at all.

    Args:
        encoder: any module ``x -> (N, features)``.
        num_states: K >= 2.
        features: width of the encoder's output; read off its last layer when omitted.
        batch_norm: standardise the features over the batch before the head.

    Raises:
        TypeError: for an encoder that is not a module.
        ValueError: for ``num_states`` < 2; see :class:`~pyro_contrastive.guides.base.RecognitionGuide` for the rest.

    Example:
        >>> import torch
        >>> Categorical(nn.Linear(8, 16), num_states=10).posterior(torch.randn(5, 8)).probs.shape
        torch.Size([5, 10])
    """

    def __init__(
        self, encoder: nn.Module, num_states: int, *, features: int | None = None, batch_norm: bool = True
    ) -> None:
        if not isinstance(num_states, int) or num_states < 2:
            raise ValueError(f"`num_states` must be an integer >= 2 (one state tells nothing), got {num_states!r}")
        super().__init__(encoder, num_states, features=features, batch_norm=batch_norm)
        self.logits = nn.Linear(self.features, num_states)

    @property
    def num_states(self) -> int:
        """K, the number of states."""
        return self.dim

    def _posterior(self, features: Tensor) -> CategoricalDistribution:
        return CategoricalDistribution(logits=self.logits(features))
