"""The guide of one latent that all views share: their posteriors, multiplied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_contrastive import distributions as dist
from pyro_contrastive.modules import Module

from .base import RecognitionGuide

__all__ = ["Fused"]


class Fused(Module):
    r"""The tight guide of a shared latent, :math:`Q(z) \propto P(z) \prod_j R(z|x_j) / R(z)`, for a uniform P and R(z).

    For von Mises-Fisher recognition it is von Mises-Fisher with :math:`\kappa \mu = \sum_j \kappa_j \mu_j`. Where the
    aggregate is uniform the ELBO with this guide *is* the evidence; ``diagnostics.evidence_gap`` measures what is left
    otherwise.

    Args:
        guide: recognition module with von Mises-Fisher posteriors, ``guides.VonMisesFisher``.

    Raises:
        TypeError: for a guide that is no recognition module; when called, for posteriors of another family.

    Example:
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

    @staticmethod
    def fuse(posteriors: Sequence[Any]) -> dist.VonMisesFisher:
        """Posterior given several views.

        Args:
            posteriors: of the single views, von Mises-Fisher with one batch shape.

        Returns:
            The law with the sum of their natural parameters.

        Raises:
            TypeError: for another family.
        """
        for q in posteriors:
            if not isinstance(q, dist.VonMisesFisher):
                raise TypeError(
                    f"posteriors are fused in the von Mises-Fisher family, got {type(q).__name__}; "
                    "use guides.VonMisesFisher"
                )
        natural = torch.stack([q.concentration.unsqueeze(-1) * q.mean_direction for q in posteriors]).sum(0)
        # views that contradict each other exactly leave no direction, and a norm without a gradient
        square, tiny = natural.square().sum(-1, keepdim=True), torch.finfo(natural.dtype).tiny
        length = square.clamp(min=tiny).sqrt()
        direction = torch.where(square > tiny, natural / length, posteriors[0].mean_direction)
        return dist.VonMisesFisher(direction, length.squeeze(-1))

    def forward(self, *views: Tensor) -> None:
        """The Pyro guide: site "z" in the plate "pairs".

        Args:
            views: tensors with one leading dimension N; row i of all of them shows the same thing.
        """
        posteriors = self.guide.posteriors(*views)
        with pyro.plate("pairs", len(views[0]), dim=-1):
            pyro.sample("z", self.fuse(posteriors))
