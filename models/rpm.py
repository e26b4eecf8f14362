"""Recognition-parametrised model with a learned pair prior (Aitchison and Ganev 2021; Walker et al. 2022)."""

from __future__ import annotations

import math
from typing import Any

import pyro
import torch
from pyro.nn import PyroParam
from torch import Tensor

from pyro_contrastive import distributions as dist
from pyro_contrastive.factors import check_recognition, recognition_factor
from pyro_contrastive.kernels import VonMisesFisherKernel
from pyro_contrastive.modules import Module
from pyro_contrastive.ops.constraints import scale_parameter

__all__ = ["RPM"]


class RPM(Module):
    r"""Two views, one latent each, and a prior that says how the latents relate.

    .. math::  z_1 \sim U(S^{d-1}), \quad z_2 \sim vMF(z_1, \kappa), \quad
               P(x_j | z_j) = \frac{R(z_j | x_j)}{\frac1N \sum_n R(z_j | x_{j,n})} P(x_j).

    The likelihood needs no decoder: it is defined by the recognition law R through Bayes' rule. With the guide
    R(z_1|x_1) R(z_2|x_2) the ELBO is :math:`E[\log P(z_1, z_2) - \log R(z_1) - \log R(z_2)]`, the InfoNCE objective in
    the paper's reading. The pair concentration kappa is learned by default; at the optimum it is the concentration of
    the sampled latent pairs, and unlike two independent uniform priors it does not let the posteriors collapse.

    What the posterior's width means here: it maximises the ELBO, not the evidence, so a wider posterior costs
    information that the pair prior rewards. Use ``MCInfoNCE`` where kappa(x) must be the aleatoric uncertainty.

    Args:
        guide: recognition module with ``posterior(x)`` and ``dim``, used as the Pyro guide too; any family with a
            density.
        concentration: kappa of the pair prior at the start, > 0 and finite.
        learn_concentration: make it a parameter (default), optimised as log(kappa) / 4 so that it keeps pace with the
            network.

    Raises:
        TypeError: for a guide without ``posterior(x)``.
        ValueError: if the concentration is not positive and finite.

    References:
        Aitchison and Ganev, arXiv 2107.02495; Walker, Soulat, Yu and Sahani, arXiv 2209.05661.

    Example:
        >>> from torch import nn
        >>> from pyro_contrastive import guides
        >>> from pyro.infer import Trace_ELBO
        >>> guide = guides.VonMisesFisher(nn.Linear(8, 32), dim=5)
        >>> elbo = Trace_ELBO()(RPM(guide), guide)
        >>> elbo(torch.randn(16, 8), torch.randn(16, 8)).shape
        torch.Size([])
    """

    concentration: Tensor

    def __init__(self, guide: Any, *, concentration: float = 10.0, learn_concentration: bool = True) -> None:
        super().__init__()
        check_recognition("guide", guide)
        self.guide = guide
        value = VonMisesFisherKernel(concentration).concentration  # checks it
        if learn_concentration:
            setattr(self, "concentration", PyroParam(value.clone(), constraint=scale_parameter))  # noqa: B010 (typing)
        else:
            self.register_buffer("concentration", value.clone())

    def forward(self, x1: Tensor, x2: Tensor) -> None:
        """The Pyro model: sites "z1", "z2" and the factors "x1", "x2" in the plate "pairs".

        Args:
            x1: ``(N, ...)`` first views.
            x2: ``(N, ...)`` second views, row i of the same thing as row i of ``x1``.
        """
        posterior1, posterior2 = self.guide.posterior(x1), self.guide.posterior(x2)
        kappa = self.concentration
        with pyro.plate("pairs", len(x1), dim=-1):
            uniform = dist.HypersphericalUniform(self.guide.dim, dtype=kappa.dtype, device=kappa.device)
            z1 = pyro.sample("z1", uniform)
            z2 = pyro.sample("z2", dist.VonMisesFisher(z1, kappa))
            recognition_factor("x1", z1, posterior1)
            recognition_factor("x2", z2, posterior2)

    def partner_logits(self, x1: Tensor, x2: Tensor, *, num_samples: int = 64) -> Tensor:
        r"""Log evidence that x1[i] and x2[j] show the same thing: :math:`\log E[P(z_2|z_1) / U(z_2)]` over posteriors.

        Args:
            x1: ``(N, ...)`` views.
            x2: ``(M, ...)`` views.
            num_samples: draws of every latent.

        Returns:
            ``(N, M)`` log density ratios in nats, up to Monte-Carlo error, for a uniform latent marginal.
        """
        size = torch.Size((num_samples,))
        z1, z2 = self.guide.posterior(x1).sample(size), self.guide.posterior(x2).sample(size)
        prior = dist.VonMisesFisher(z1, self.concentration, validate_args=False)
        log_ratio = prior.cross_log_prob(z2).mT - dist.log_uniform_density(self.guide.dim)
        return log_ratio.logsumexp(0) - math.log(num_samples)
