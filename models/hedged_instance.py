"""Hedged instance embedding (Oh et al. 2019), in the contrastive form that MCInfoNCE was compared with."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import pyro
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_contrastive.factors import check_recognition
from pyro_contrastive.modules import Module
from pyro_contrastive.ops.joint import gather, joint_offset, joint_size
from pyro_contrastive.ops.precision import matmul

__all__ = ["HedgedInstance"]

Evidence = Literal["elbo", "k_sample"]


class HedgedInstance(Module):
    r"""Matches decided one pair at a time: :math:`P(\text{match} \mid z, z') = \sigma(a\, z \cdot z' + b)`.

    Every pair of the batch is a binary observation, a match on the diagonal and none elsewhere. The factor of item i is

    .. math::  \log \bar p_{ii} + \frac1{N-1} \sum_{j \ne i} \log (1 - p)_{ij}

    where the bar, and likewise the second term, is an average over draws of both latents: of the logs (``"elbo"``: one
    draw per particle, the variant of the MCInfoNCE paper) or of the probabilities, inside the log (``"k_sample"``:
    the original hedged instance embedding). All in log space, so a saturated sigmoid costs nothing.

    There is no softmax over the batch and the averages weigh matches and non-matches alike. With ``a = 1``, ``b = 0``
    on the unit sphere the probabilities stay within .27 and .73, and the posterior's width is hardly identified; with
    :math:`a = \kappa`, :math:`b = -\log C_d(0)/C_d(\kappa)` they are the odds of a von Mises-Fisher pair against a
    random one. The width is a baseline's, not the aleatoric uncertainty.

    Args:
        guide: recognition module with ``posterior(x)``, used as the Pyro guide too; any family.
        scale: a > 0.
        offset: b.
        evidence: ``"elbo"`` or ``"k_sample"``.
        num_samples: K of ``k_sample``.

    Raises:
        TypeError: for a guide without ``posterior(x)``.
        ValueError: for an argument out of its range; when called, for a batch of one or views of different lengths.

    References:
        Oh et al., "Modeling Uncertainty with Hedged Instance Embeddings", ICLR 2019, arXiv 1810.00319; Kirchhof,
        Kasneci and Oh, ICML 2023, arXiv 2302.02865, and its public code, whose defaults these are.

    Example:
        >>> from torch import nn
        >>> from pyro_contrastive import guides
        >>> from pyro.infer import Trace_ELBO
        >>> guide = guides.VonMisesFisher(nn.Linear(8, 32), dim=5)
        >>> elbo = Trace_ELBO()(HedgedInstance(guide), guide)
        >>> elbo(torch.randn(16, 8), torch.randn(16, 8)).shape
        torch.Size([])
    """

    def __init__(
        self,
        guide: Any,
        *,
        scale: float = 1.0,
        offset: float = 0.0,
        evidence: Evidence = "elbo",
        num_samples: int = 16,
    ) -> None:
        super().__init__()
        check_recognition("guide", guide)
        if not 0 < scale < math.inf:
            raise ValueError(f"`scale` must be > 0 and finite, got {scale!r}")
        if not math.isfinite(offset):
            raise ValueError(f"`offset` must be finite, got {offset!r}")
        if evidence not in get_args(Evidence):
            raise ValueError(f"`evidence` must be one of {', '.join(get_args(Evidence))}, got {evidence!r}")
        if not isinstance(num_samples, int) or num_samples < 1:
            raise ValueError(f"`num_samples` must be an integer >= 1, got {num_samples!r}")
        self.guide = guide
        self.scale = float(scale)
        self.offset = float(offset)
        self.evidence = evidence
        self.num_samples = num_samples

    def forward(self, x1: Tensor, x2: Tensor) -> None:
        """The Pyro model: sites "z1", "z2" and the factor "match" in the plate "pairs".

        Args:
            x1: ``(N, ...)`` first views, N >= 2.
            x2: ``(N, ...)`` second views, row i of the same thing as row i of ``x1``.
        """
        if len(x1) != len(x2) or len(x1) < 2:
            raise ValueError(
                f"views must share one leading dimension N >= 2 (the other rows are the non-matches), got "
                f"{tuple(x1.shape)} and {tuple(x2.shape)}"
            )
        posterior1, posterior2 = self.guide.posterior(x1), self.guide.posterior(x2)
        with pyro.plate("pairs", len(x1), dim=-1):
            z1 = pyro.sample("z1", posterior1)
            z2 = pyro.sample("z2", posterior2)
            if self.evidence == "k_sample":
                size = torch.Size((self.num_samples,))
                z1, z2 = posterior1.rsample(size), posterior2.rsample(size)
            own = {"offset": joint_offset(len(x1)), "dim1": -2, "dim2": -1}
            logits = self.match_logits(z1, gather(z2, -2, what="hedged instance embedding"))
            match, other = logsigmoid(logits.diagonal(**own)), logsigmoid(-logits)
            if self.evidence == "k_sample":
                match = match.logsumexp(0) - math.log(self.num_samples)
                other = other.logsumexp(0) - math.log(self.num_samples)
            others = other.sum(-1) - other.diagonal(**own)
            pyro.factor("match", match + others / (joint_size(len(x1)) - 1))

    def match_logits(self, z1: Tensor, z2: Tensor) -> Tensor:
        """Log odds that two latents match, for all pairs.

        Args:
            z1: ``(..., N, d)`` unit vectors.
            z2: ``(..., M, d)`` unit vectors.

        Returns:
            ``(..., N, M)``.
        """
        return self.scale * matmul(z1, z2.mT) + self.offset
