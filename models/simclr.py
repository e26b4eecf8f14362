"""SimCLR (Chen et al. 2020) and SupCon (Khosla et al. 2020): point embeddings, one or several positives."""

from __future__ import annotations

import math
from typing import Any, get_args

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_contrastive.factors import check_recognition
from pyro_contrastive.kernels import VonMisesFisherKernel
from pyro_contrastive.modules import Module
from pyro_contrastive.positives import Positives, nt_xent_factor

__all__ = ["SimCLR", "SupCon"]


class SimCLR(Module):
    r"""NT-Xent: find the other view of a thing among the 2N - 1 other views of the batch.

    .. math::  \ell_{a,p} = -\log \frac{\exp(z_a \cdot z_p / \tau)}{\sum_{k \ne a} \exp(z_a \cdot z_k / \tau)}
               \qquad \text{(equation 1)}, \qquad \tau = 1 / \kappa,

    averaged over both views of a thing; the factor is :math:`\log(2N - 1)` minus it. The prior of the latents is the
    recognition law, P(z) = R(z), and cancels: with ``guides.Delta`` the ELBO is the evidence and minus the loss. With
    a stochastic guide the loss is averaged over draws, and nothing keeps them apart: their width goes to zero
    (:class:`~pyro_contrastive.models.VSimCLR` has the term that does).

    Args:
        guide: recognition module with ``posterior(x)``, used as the Pyro guide too: ``guides.Delta``.
        concentration: kappa of the kernel, > 0 and finite: the inverse of the temperature.
        learn_concentration: learn it.

    Raises:
        TypeError: for a guide without ``posterior(x)``.
        ValueError: for a concentration out of its range; when called, for a batch of one or views of different lengths.

    References:
        Chen, Kornblith, Norouzi and Hinton, ICML 2020, arXiv 2002.05709.

    Example:
        >>> from torch import nn
        >>> from pyro_contrastive import guides
        >>> from pyro.infer import Trace_ELBO
        >>> guide = guides.Delta(nn.Linear(8, 32), dim=5)
        >>> Trace_ELBO()(SimCLR(guide), guide)(torch.randn(16, 8), torch.randn(16, 8)).shape
        torch.Size([])
    """

    positives: Positives = "supcon_out"  # without labels there is one, and no choice

    def __init__(self, guide: Any, *, concentration: float = 10.0, learn_concentration: bool = False) -> None:
        super().__init__()
        check_recognition("guide", guide)
        self.guide = guide
        self.kernel = VonMisesFisherKernel(concentration, learn=learn_concentration)

    @property
    def concentration(self) -> Tensor:
        """Concentration kappa of the kernel, a scalar tensor."""
        return self.kernel.concentration

    def forward(self, x1: Tensor, x2: Tensor) -> None:
        """The Pyro model: sites "z1", "z2" and the factor "positive" in the plate "pairs".

        Args:
            x1: ``(N, ...)`` first views, N >= 2.
            x2: ``(N, ...)`` second views, row i of the same thing as row i of ``x1``.
        """
        self._pairs(x1, x2)

    def _pairs(self, x1: Tensor, x2: Tensor, labels: Tensor | None = None) -> None:
        if len(x1) != len(x2) or len(x1) < 2:
            raise ValueError(
                f"views must share one leading dimension N >= 2, got {tuple(x1.shape)} and {tuple(x2.shape)}; the "
                "other rows of the batch are the negatives"
            )
        posterior1, posterior2 = self.guide.posterior(x1), self.guide.posterior(x2)
        with pyro.plate("pairs", len(x1), dim=-1):
            z1 = pyro.sample("z1", self._prior(posterior1))
            z2 = pyro.sample("z2", self._prior(posterior2))
            nt_xent_factor("positive", z1, z2, self.kernel, labels, positives=self.positives)

    def _prior(self, posterior: Any) -> TorchDistribution:
        """P(z): the recognition law itself, which cancels."""
        return posterior

    def partner_logits(self, x1: Tensor, x2: Tensor, labels: Tensor | None = None, *, num_samples: int = 64) -> Tensor:
        """Log kernel of all pairs of views, averaged over draws inside the log: the logits of the partner's index.

        Args:
            x1: ``(N, ...)`` views.
            x2: ``(M, ...)`` views.
            labels: not used.
            num_samples: draws of every latent; for point embeddings one does.

        Returns:
            ``(N, M)``, up to a constant and, for a stochastic guide, Monte-Carlo error.
        """
        size = torch.Size((num_samples,))
        z1, z2 = (self.guide.posterior(x).sample(size) for x in (x1, x2))
        return self.kernel(z1, z2).logsumexp(0) - math.log(num_samples)


class SupCon(SimCLR):
    r"""Supervised contrastive learning: all items of a class are positives of one another.

    .. math::  L_{out} = \sum_a \frac{-1}{|P(a)|} \sum_{p \in P(a)} \log \frac{e^{z_a \cdot z_p / \tau}}
               {\sum_{k \ne a} e^{z_a \cdot z_k / \tau}} \quad \text{(equation 2)}, \qquad
               L_{in} = \sum_a -\log \frac{1}{|P(a)|} \sum_{p \in P(a)} \frac{e^{z_a \cdot z_p / \tau}}
               {\sum_{k \ne a} e^{z_a \cdot z_k / \tau}} \quad \text{(equation 3)}

    The factor is :math:`\log(2N - 1)` minus the mean over both views of a thing. Model and guide take
    ``(x1, x2, labels)``; with unique labels this is :class:`SimCLR`.

    Args:
        guide: recognition module with ``posterior(x)``, used as the Pyro guide too: ``guides.Delta``.
        concentration: kappa of the kernel, > 0 and finite: the inverse of the temperature.
        learn_concentration: learn it.
        positives: mean over positives outside the log, ``"supcon_out"`` (the paper's choice), or inside,
            ``"supcon_in"``.

    Raises:
        TypeError: for a guide without ``posterior(x)``.
        ValueError: for a concentration out of its range or another ``positives``; when called, as :class:`SimCLR`, and
            for labels that are not N integers or, under Pyro's validation, of one class.

    References:
        Khosla et al., NeurIPS 2020, arXiv 2004.11362.

    Example:
        >>> from torch import nn
        >>> from pyro_contrastive import guides
        >>> from pyro.infer import Trace_ELBO
        >>> guide = guides.Delta(nn.Linear(8, 32), dim=5)
        >>> Trace_ELBO()(SupCon(guide), guide)(*torch.randn(2, 16, 8), torch.arange(16) % 4).shape
        torch.Size([])
    """

    def __init__(
        self,
        guide: Any,
        *,
        concentration: float = 10.0,
        learn_concentration: bool = False,
        positives: Positives = "supcon_out",
    ) -> None:
        super().__init__(guide, concentration=concentration, learn_concentration=learn_concentration)
        self.positives = check_positives(positives)

    def forward(self, x1: Tensor, x2: Tensor, labels: Tensor) -> None:  # type: ignore[override]
        """The Pyro model: sites "z1", "z2" and the factor "positive" in the plate "pairs".

        Args:
            x1: ``(N, ...)`` first views, N >= 2.
            x2: ``(N, ...)`` second views, row i of the same thing as row i of ``x1``.
            labels: ``(N,)`` integers.
        """
        self._pairs(x1, x2, labels)


def check_positives(positives: Positives) -> Positives:
    """Raise ValueError for another convention than the two."""
    if positives not in get_args(Positives):
        raise ValueError(f"`positives` must be one of {', '.join(get_args(Positives))}, got {positives!r}")
    return positives
