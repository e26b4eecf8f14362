"""The guide of a sequence with linear-Gaussian dynamics: the posteriors of its views, joined by the prior."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pyro
import pyro.distributions as pyro_dist
import torch
from torch import Tensor

from pyro_contrastive.modules import Module
from pyro_contrastive.priors import LinearDynamics

from .normal import Normal

__all__ = ["Smoothed"]


class _Step(NamedTuple):
    """What the views from one time on say of the state there: a normal law given the state before."""

    gain: Tensor  # (..., d, d), on the state that the dynamics predict
    offset: Tensor  # (..., d)
    covariance: Tensor  # (..., d, d)


class Smoothed(Module):
    r"""The tight guide of a sequence, its states joined by the prior.

    .. math::  Q(z_1, \dots, z_J) \propto P(z_1, \dots, z_J) \prod_j R(z_j | x_j) \,/\, N(z_j; 0, I)

    A view on its own may say little about the state: one frame of a video shows where a thing is, not where it goes.
    Under linear-Gaussian dynamics the posterior of the states given *all* views is Gaussian again, and is found by one
    pass back and one forth (a Kalman smoother). Where the states of the prior and the aggregate R(z) are standard
    normal at all times the ELBO with this guide *is* the evidence; ``diagnostics.evidence_gap`` measures what is left
    otherwise. An axis of R(z|x) that is wider than 1, which such an aggregate rules out, is taken to be 1 wide.

    Args:
        guide: recognition with independent axes, ``guides.Normal(..., full=False)``.
        prior: the dynamics; give the same object to the model.

    Raises:
        TypeError: for another guide or prior.
        ValueError: for a full covariance, or guide and prior of different dimensions; when called, for another number
            of views than the prior has.

    References:
        Rauch, Tung and Striebel, AIAA Journal 3(8), 1965; the model is that of Walker et al. 2022, arXiv 2209.05661,
        with a sequence as the latent.

    Example:
        >>> from torch import nn
        >>> from pyro.infer import Trace_ELBO
        >>> from pyro_contrastive import guides, models
        >>> prior = LinearDynamics(2, num_views=3, transition=[[0.8, 0.6], [-0.6, 0.8]])
        >>> guide = Smoothed(guides.Normal(nn.Linear(8, 32), dim=2), prior)
        >>> frames = torch.randn(3, 16, 8)
        >>> Trace_ELBO()(models.RPM(guide, prior), guide)(*frames).shape
        torch.Size([])
        >>> guide.smoothed(*frames)[0].mean.shape  # of the first state, given all frames
        torch.Size([16, 2])
    """

    def __init__(self, guide: Normal, prior: LinearDynamics) -> None:
        super().__init__()
        if not isinstance(guide, Normal):
            raise TypeError(f"`guide` must be a guides.Normal, got {type(guide).__name__}")
        if not isinstance(prior, LinearDynamics):
            raise TypeError(f"`prior` must be a priors.LinearDynamics, got {type(prior).__name__}")
        if guide.below is not None:
            raise ValueError("`guide` must have independent axes, got one with full=True; build it with full=False")
        if guide.dim != prior.dim:
            raise ValueError(f"guide and prior need one dimension, got dim={guide.dim} and dim={prior.dim}")
        self.guide = guide
        self.prior = prior
        self.dim = guide.dim

    def posterior(self, x: Tensor) -> Any:
        """Posterior given one view, see :meth:`~pyro_contrastive.guides.base.RecognitionGuide.posterior`."""
        return self.guide.posterior(x)

    def forward(self, *views: Tensor) -> None:
        """The Pyro guide: sites "z1", ..., "zJ" in the plate "pairs", each drawn given the one before.

        Args:
            views: one tensor per time, with one leading dimension N; row i of all of them is one sequence.

        Raises:
            ValueError: see the class.
        """
        steps = self._steps(views)
        with pyro.plate("pairs", len(views[0]), dim=-1):
            z: Tensor | None = None
            for j, step in enumerate(steps, start=1):
                mean = step.offset
                if z is not None:
                    mean = mean + (step.gain @ (self.prior.transition @ z.unsqueeze(-1))).squeeze(-1)
                z = pyro.sample(f"z{j}", pyro_dist.MultivariateNormal(mean, step.covariance, validate_args=False))

    def smoothed(self, *views: Tensor) -> list[pyro_dist.MultivariateNormal]:
        """Posterior of every state given all views.

        Args:
            views: as for the guide.

        Returns:
            One law per time, batch ``(N,)``, event ``(d,)``.

        Raises:
            ValueError: see the class.
        """
        laws: list[pyro_dist.MultivariateNormal] = []
        for step in self._steps(views):
            mean, covariance = step.offset, step.covariance
            if laws:
                forward = step.gain @ self.prior.transition
                mean = mean + (forward @ laws[-1].mean.unsqueeze(-1)).squeeze(-1)
                covariance = covariance + forward @ laws[-1].covariance_matrix @ forward.mT
            laws.append(pyro_dist.MultivariateNormal(mean, 0.5 * (covariance + covariance.mT)))
        return laws

    def _steps(self, views: Sequence[Tensor]) -> list[_Step]:
        """The law of each state given the one before and all views from it on; the views' messages, passed back."""
        if len(views) != self.prior.num_views:
            raise ValueError(f"the prior has {self.prior.num_views} views, got {len(views)}; pass one tensor per time")
        transition, variance = self.prior.transition, self.prior.noise.square()
        identity = torch.eye(self.dim, dtype=variance.dtype, device=variance.device)
        steps: list[_Step] = []
        precision: Tensor | None = None  # of the later views' message to this state, and its linear term
        linear: Tensor | None = None
        posteriors = self.guide.posteriors(*views)
        for j in reversed(range(len(views))):
            law = posteriors[j].base_dist
            weight = law.scale.clamp(max=1.0).square().reciprocal()
            informative = torch.diag_embed(weight - 1)
            precision = informative if precision is None else precision + informative
            linear = weight * law.loc if linear is None else linear + weight * law.loc
            noise = identity.diagonal() if j == 0 else variance
            # (noise^-1 + precision)^-1 without the inverse of a precision that may be singular
            gain = torch.linalg.inv(identity + noise.unsqueeze(-1) * precision)
            covariance = gain * noise
            covariance = 0.5 * (covariance + covariance.mT)
            steps.append(_Step(gain, (covariance @ linear.unsqueeze(-1)).squeeze(-1), covariance))
            linear = (transition.mT @ (gain.mT @ linear.unsqueeze(-1))).squeeze(-1)
            precision = transition.mT @ (precision @ gain) @ transition
        return steps[::-1]
