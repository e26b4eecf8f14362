"""Recognition with Gaussian posteriors, for latents in Euclidean space."""

from __future__ import annotations

import pyro.distributions as pyro_dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_contrastive.nets import ConcentrationHead

from .base import RecognitionGuide

__all__ = ["Normal"]


class Normal(RecognitionGuide):
    r"""Amortised Gaussian posteriors in R^d, :math:`R(z|x) = N(\mu(x), \Sigma(x))`.

    For priors in Euclidean space, such as :class:`~pyro_contrastive.priors.LinearDynamics`. It has no scale of its own:
    the prior gives it.

    Args:
        encoder: any module ``x -> (N, features)``.
        dim: d >= 1.
        features: width of the encoder's output; read off its last layer when omitted.
        batch_norm: standardise the features over the batch before the heads.
        initial_scale: standard deviation of every axis at the start of training, > 0.
        full: a full covariance, by a lower-triangular factor, instead of a diagonal one.

    Raises:
        ValueError: for ``dim`` < 1; see also :class:`~pyro_contrastive.guides.base.RecognitionGuide`.

    Example:
        >>> guide = Normal(nn.Linear(8, 32), dim=2, full=True)
        >>> posterior = guide.posterior(torch.zeros(4, 8))
        >>> posterior.batch_shape, posterior.event_shape
        (torch.Size([4]), torch.Size([2]))
    """

    _least_dim = 1

    def __init__(
        self,
        encoder: nn.Module,
        dim: int,
        *,
        features: int | None = None,
        batch_norm: bool = True,
        initial_scale: float = 0.5,
        full: bool = False,
    ) -> None:
        super().__init__(encoder, dim, features=features, batch_norm=batch_norm)
        self.loc = nn.Linear(self.features, dim)
        self.scale = ConcentrationHead(self.features, initial_scale, outputs=dim)
        self.below = nn.Linear(self.features, dim * (dim - 1) // 2) if full and dim > 1 else None

    def _posterior(self, features: Tensor) -> TorchDistribution:
        loc, scale = self.loc(features), self.scale(features)
        if self.below is None:
            return pyro_dist.Normal(loc, scale).to_event(1)
        rows, columns = torch.tril_indices(self.dim, self.dim, offset=-1, device=features.device)
        # correlations that do not depend on the scales; the rows keep their length where the entries below vanish
        factor = torch.diag_embed(torch.ones_like(scale))
        factor = factor.index_put(
            (torch.arange(len(features), device=features.device)[:, None], rows, columns), self.below(features)
        )
        return pyro_dist.MultivariateNormal(loc, scale_tril=scale.unsqueeze(-1) * factor)
