"""Recognition with projected-normal posteriors."""

from __future__ import annotations

import math

from torch import Tensor, nn

from pyro_contrastive import distributions as dist
from pyro_contrastive.nets import ConcentrationHead, DirectionHead

from .base import INITIAL_RESULTANT_LENGTH, RecognitionGuide

__all__ = ["ProjectedNormal"]


class ProjectedNormal(RecognitionGuide):
    r"""Amortised projected-normal posteriors: z = w/|w| with :math:`w \sim N(\mu(x), \mathrm{diag}\,\sigma(x)^2)`.

    The law of z depends on (mu, sigma) only up to a common factor, so mu is kept at unit length and sigma says it all:
    for small sigma, 1/sigma^2 along an axis is the concentration of a von Mises-Fisher law of that width.

    Args:
        encoder: any module ``x -> (N, features)``.
        dim: d >= 2.
        features: width of the encoder's output; read off its last layer when omitted.
        batch_norm: standardise the features over the batch before the heads.
        initial_scale: sigma at the start of training, by default sqrt((1/0.6^2 - 1)/d), where a draw's cosine to the
            mean direction is about 0.6.
        free_length: learn a common factor c(x) on mu and sigma as well (an output ``length``). The law does not see it,
            nor do its density and the other divergences; a Gaussian divergence from N(0, I) does.

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
        initial_scale: float | None = None,
        free_length: bool = False,
    ) -> None:
        super().__init__(encoder, dim, features=features, batch_norm=batch_norm)
        if initial_scale is None:
            initial_scale = math.sqrt((1 / INITIAL_RESULTANT_LENGTH**2 - 1) / dim)
        self.direction = DirectionHead(self.features, dim)
        self.scale = ConcentrationHead(self.features, initial_scale, outputs=dim)
        # at the start the best one, where |mu|^2 + tr Sigma = d
        best = math.sqrt(dim / (1 + dim * initial_scale**2))
        self.length = ConcentrationHead(self.features, best) if free_length else None

    def _posterior(self, features: Tensor) -> dist.ProjectedNormal:
        loc, scale = self.direction(features), self.scale(features)
        if self.length is not None:
            length = self.length(features)
            loc, scale = length * loc, length * scale
        return dist.ProjectedNormal(loc, scale)
