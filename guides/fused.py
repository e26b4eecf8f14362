"""The guide of one latent that all views share: their posteriors, multiplied."""

from __future__ import annotations

from typing import Any

import pyro
from torch import Tensor

from pyro_contrastive.modules import Module
from pyro_contrastive.shared_latent import fused_posterior

from .base import RecognitionGuide

__all__ = ["Fused"]


class Fused(Module):
    r"""The tight guide of a shared latent, :math:`Q(z) \propto P(z) \prod_j R(z|x_j) / R(z)`, for R(z) = P(z).

    For von Mises-Fisher recognition and a uniform prior it is von Mises-Fisher with
    :math:`\kappa \mu = \sum_j \kappa_j \mu_j`; Gaussian recognition needs views narrower than the prior
    (:func:`~pyro_contrastive.shared_latent.fused_posterior`). Where the aggregate is the prior the ELBO with this guide
    *is* the evidence; ``diagnostics.evidence_gap`` measures what is left otherwise.

    Args:
        guide: recognition module of this package, with posteriors of an exponential family.

    Raises:
        TypeError: for a guide that is no recognition module; when called, for posteriors of another family.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyro.infer import Trace_ELBO
        >>> from pyro_contrastive import guides, models, priors
        >>> guide = Fused(guides.VonMisesFisher(nn.Linear(8, 32), dim=5))
        >>> model = models.RPM(guide, priors.SharedUniform(5))
        >>> Trace_ELBO()(model, guide)(*torch.randn(3, 16, 8)).shape
        torch.Size([])
    """

    def __init__(self, guide: RecognitionGuide) -> None:
        super().__init__()
        if not isinstance(guide, RecognitionGuide):
            raise TypeError(f"`guide` must be a recognition module of this package, got {type(guide).__name__}")
        self.guide = guide
        self.dim = guide.dim

    def posterior(self, x: Tensor) -> Any:
        """Posterior given one view, see :meth:`~pyro_contrastive.guides.base.RecognitionGuide.posterior`."""
        return self.guide.posterior(x)

    def forward(self, *views: Tensor) -> None:
        """The Pyro guide: site "z" in the plate "pairs".

        Args:
            views: tensors with one leading dimension N; row i of all of them shows the same thing.
        """
        posteriors = self.guide.posteriors(*views)
        with pyro.plate("pairs", len(views[0]), dim=-1):
            pyro.sample("z", fused_posterior(posteriors))
