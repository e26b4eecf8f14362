"""Variational contrastive learning (Jeong, Kim and Hero 2025): a uniform prior, and a weight on its divergence."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

from pyro.distributions import Delta, TorchDistribution
from torch import Tensor

from pyro_contrastive import distributions as dist
from pyro_contrastive.objectives import WeightedELBO
from pyro_contrastive.positives import Positives

from .simclr import SimCLR, check_positives

__all__ = ["VSimCLR", "VSupCon"]

KL = Literal["exact", "scale_free", "gaussian"]
PRIORS: dict[str, type[dist.HypersphericalUniform]] = {
    "exact": dist.HypersphericalUniform,
    "scale_free": dist.ScaleFreeUniform,
    "gaussian": dist.AmbientUniform,
}


class VSimCLR(SimCLR):
    r"""SimCLR with posteriors: sampled latents, a uniform prior, and a weight beta on the divergence from it.

    .. math::  \tfrac12 \Big[ L(z \to z') + \tfrac{\beta}{d} KL(q(z|x) \| U) \Big]
               + \tfrac12 \Big[ L(z' \to z) + \tfrac{\beta}{d} KL(q(z'|x') \| U) \Big]

    with the NT-Xent loss L of one draw of each latent. As a Pyro model: z1, z2 ~ ``HypersphericalUniform``, and the
    factor of :class:`SimCLR`, whose ELBO has both divergences at weight one. The weight belongs to the objective:
    :meth:`objective` is the ELBO with weight beta / 2d, **beta being a weight per dimension of the latent**, a
    convention of ours (the paper's divisor and weight are not known to us). ``fit`` takes the objective from the model;
    with plain Pyro it is ``SVI(model, guide, optim, loss=model.objective())``.

    The sum is a surrogate, not a bound on the log likelihood of the views: the factor is the log of a density ratio
    estimated by a batch. Beta sets how wide the posteriors are, the data only their order
    (:func:`pyro_contrastive.diagnostics.calibrate_width` finds the width that held-out pairs support). A concentration
    that is learned beside the divergence collapses, long before weight one: learn it by :class:`SimCLR`, then fix it.

    ``kl`` chooses the divergence that :meth:`objective`, and Pyro's ``TraceMeanField_ELBO``, find registered for
    ``guides.ProjectedNormal``:

    ==============  ==============================================================================================
    ``exact``       by the density, unbiased, with the noise of 16 draws.
    ``scale_free``  closed, a few per cent above; does not see the common scale of mu and sigma, as the law does not.
    ``gaussian``    KL(N(mu, Sigma) || N(0, I)), up to six times too large at an arbitrary scale of mu; needs a guide
                    with ``free_length=True``, which learns the scale.
    ==============  ==============================================================================================

    ``Trace_ELBO`` samples the exact divergence, at weight one, whatever ``kl`` and beta say. Other families have one
    divergence, the exact one.

    Args:
        guide: recognition module with ``posterior(x)``, used as the Pyro guide too: ``guides.ProjectedNormal``, or
            another family with a density.
        beta: weight of the divergence, >= 0 and finite; it is divided by d, the dimension.
        kl: see above.
        concentration: kappa of the kernel, > 0 and finite: the inverse of the temperature.
        learn_concentration: learn it.

    Raises:
        TypeError: for a guide without ``posterior(x)``.
        ValueError: for an argument out of its range; for the Gaussian divergence of a guide whose mu has a fixed
            length; when called, for point posteriors (``guides.Delta``), and as :class:`SimCLR`.

    References:
        Jeong, Kim and Hero, arXiv 2506.10159.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyro_contrastive import guides
        >>> guide = guides.ProjectedNormal(nn.Linear(8, 32), dim=5)
        >>> model = VSimCLR(guide, beta=0.1)
        >>> model.objective()(model, guide)(torch.randn(16, 8), torch.randn(16, 8)).shape
        torch.Size([])
    """

    def __init__(
        self,
        guide: Any,
        *,
        beta: float = 0.1,
        kl: KL = "scale_free",
        concentration: float = 10.0,
        learn_concentration: bool = False,
    ) -> None:
        super().__init__(guide, concentration=concentration, learn_concentration=learn_concentration)
        if not 0 <= beta < math.inf:
            raise ValueError(f"`beta` must be >= 0 and finite, the weight of the divergence times d, got {beta!r}")
        if kl not in get_args(KL):
            raise ValueError(f"`kl` must be one of {', '.join(get_args(KL))}, got {kl!r}")
        if kl == "gaussian" and getattr(guide, "length", self) is None:
            raise ValueError(
                "`kl`='gaussian' sees the length of mu, which this guide fixes to 1; build it with "
                "guides.ProjectedNormal(..., free_length=True), or use kl='scale_free'"
            )
        self.beta = float(beta)
        self.kl = kl

    def objective(self, *, num_particles: int = 1, **options: Any) -> WeightedELBO:
        """A fresh objective with both divergences at weight beta / 2d.

        Args:
            num_particles: draws per step.
            **options: see :class:`~pyro_contrastive.objectives.WeightedELBO`.

        Returns:
            The objective, for ``SVI(model, guide, optim, loss=...)``, ``fit(..., elbo=...)`` or as an ``ELBOModule``.
        """
        return WeightedELBO(self.beta / (2 * self.guide.dim), num_particles=num_particles, **options)

    def _prior(self, posterior: Any) -> TorchDistribution:
        if isinstance(posterior, Delta):
            raise ValueError(
                f"{type(self).__name__} needs posteriors with a density, got Delta; use guides.ProjectedNormal, or "
                "models.SimCLR or SupCon for point embeddings"
            )
        like = self.concentration
        return PRIORS[self.kl](self.guide.dim, dtype=like.dtype, device=like.device)


class VSupCon(VSimCLR):
    """SupCon with posteriors: :class:`VSimCLR` with the several positives of :class:`SupCon`.

    Model and guide take ``(x1, x2, labels)``. As the posteriors narrow it becomes SupCon, with unique labels VSimCLR.

    Args:
        guide: see :class:`VSimCLR`.
        beta: see :class:`VSimCLR`.
        kl: see :class:`VSimCLR`.
        concentration: see :class:`VSimCLR`.
        learn_concentration: see :class:`VSimCLR`.
        positives: ``"supcon_out"`` or ``"supcon_in"``, see :class:`SupCon`.

    Raises:
        TypeError: for a guide without ``posterior(x)``.
        ValueError: see :class:`VSimCLR` and :class:`SupCon`.

    References:
        Jeong, Kim and Hero, arXiv 2506.10159.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyro_contrastive import guides
        >>> guide = guides.ProjectedNormal(nn.Linear(8, 32), dim=5)
        >>> model = VSupCon(guide)
        >>> model.objective()(model, guide)(*torch.randn(2, 16, 8), torch.arange(16) % 4).shape
        torch.Size([])
    """

    def __init__(
        self,
        guide: Any,
        *,
        beta: float = 0.1,
        kl: KL = "scale_free",
        concentration: float = 10.0,
        learn_concentration: bool = False,
        positives: Positives = "supcon_out",
    ) -> None:
        super().__init__(guide, beta=beta, kl=kl, concentration=concentration, learn_concentration=learn_concentration)
        self.positives = check_positives(positives)

    def forward(self, x1: Tensor, x2: Tensor, labels: Tensor) -> None:  # type: ignore[override]
        """The Pyro model: sites "z1", "z2" and the factor "positive" in the plate "pairs".

        Args:
            x1: ``(N, ...)`` first views, N >= 2.
            x2: ``(N, ...)`` second views, row i of the same thing as row i of ``x1``.
            labels: ``(N,)`` integers.
        """
        self._pairs(x1, x2, labels)
