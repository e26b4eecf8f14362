"""VI-SimSiam (Nakamura, Okada and Taniguchi 2023) and SimSiam: predict where the other view lies, and how well."""

from __future__ import annotations

from typing import Any, Literal

import pyro
from torch import Tensor

from pyro_contrastive import distributions as dist
from pyro_contrastive.aggregates import aggregate_log_density
from pyro_contrastive.factors import check_recognition, recognition_factor
from pyro_contrastive.modules import Module

__all__ = ["SimSiam", "VISimSiam"]


class VISimSiam(Module):
    r"""The latent of each view, predicted from the other: :math:`z_1 \sim PS(\mu(x_2), \kappa(x_2))`, and vice versa.

    The guide puts the latents at the points :math:`z_i = g(x_i)` of the views, without gradient, so minus the ELBO is

    .. math::  -\sum_n \big[ \log PS(g(x_1); \mu(x_2), \kappa(x_2)) + \log PS(g(x_2); \mu(x_1), \kappa(x_1)) \big],

    2 N times the loss of the paper. This is a directional regression on a target that moves with the parameters:
    *not* a bound on the evidence of any fixed data. Its kappa(x) is the spread of the other view's point, hence of the
    augmentation, as the network of the moment sees it; the same data allow other points with other spreads.

    With ``uniformity`` the predictions become the recognition law of a recognition-parametrised model,

    .. math::  z_i \sim U(S^{d-1}), \qquad P(x_j | z_i) \propto R(z_i|x_j) / R(z_i), \quad
               R(z) = \frac1N \sum_n PS(z; \mu(x_{j,n}), \kappa(x_{j,n})),

    whose second term, J_uniform of the paper, is dropped there: what a prediction gains by being narrow it loses by
    being so everywhere. It holds the points apart by itself.

    Args:
        guide: ``guides.Siamese``, used as the Pyro guide too; density, width and stop-gradient are its options.
        uniformity: ``"none"``, as published; ``"batch"``: R(z) averages over the batch; or a ``MemoryBank`` or
            ``FullData`` from :mod:`pyro_contrastive.aggregates`.

    Raises:
        TypeError: for a guide that has no points and predictions, or an unknown kind of `uniformity`.
        ValueError: for another word as `uniformity`. When called: for views of different lengths.

    References:
        Nakamura, Okada and Taniguchi, "Representation Uncertainty in Self-Supervised Learning as Variational
        Inference", ICCV 2023, arXiv 2203.11437.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from pyro_contrastive import guides
        >>> from pyro.infer import Trace_ELBO
        >>> guide = guides.Siamese(nn.Linear(8, 32), dim=5)
        >>> elbo = Trace_ELBO()(VISimSiam(guide), guide)
        >>> elbo(torch.randn(16, 8), torch.randn(16, 8)).shape
        torch.Size([])
    """

    def __init__(self, guide: Any, *, uniformity: Literal["none", "batch"] | Any = "none") -> None:
        super().__init__()
        check_recognition("guide", guide)
        if not callable(getattr(guide, "branch", None)):
            raise TypeError(
                f"`guide` must give points and predictions, got {type(guide).__name__}; "
                "build guides.Siamese(encoder, dim)"
            )
        if isinstance(uniformity, str) and uniformity not in ("none", "batch"):
            raise ValueError(f"`uniformity` must be 'none', 'batch' or an aggregate, got {uniformity!r}")
        if not isinstance(uniformity, str) and (isinstance(uniformity, type) or not callable(uniformity)):
            raise TypeError(
                f"`uniformity` must be 'none', 'batch' or an aggregate, got {uniformity!r}; "
                "for instance aggregates.MemoryBank(4096)"
            )
        self.guide = guide
        self.uniformity: Any = uniformity

    def forward(self, x1: Tensor, x2: Tensor) -> None:
        """The Pyro model: sites "z1", "z2" in the plate "pairs", with `uniformity` also the factors "x1", "x2".

        Args:
            x1: ``(N, ...)`` first views.
            x2: ``(N, ...)`` second views, row i of the same thing as row i of ``x1``.

        Raises:
            ValueError: for views of different lengths.
        """
        if len(x1) != len(x2):
            raise ValueError(
                f"views must share one leading dimension N, got {tuple(x1.shape)} and {tuple(x2.shape)}; "
                "row i of both is one thing"
            )
        from_x1, from_x2 = self.guide.posterior(x1), self.guide.posterior(x2)
        with pyro.plate("pairs", len(x1), dim=-1):
            self._latent(1, from_x2, view=2)
            self._latent(2, from_x1, view=1)

    def _latent(self, number: int, law: Any, view: int) -> None:
        """The latent of one view, and what the other view, number `view`, says about it."""
        if self.uniformity == "none":
            pyro.sample(f"z{number}", law)
            return
        like = law.mean_direction
        uniform = dist.HypersphericalUniform(self.guide.dim, dtype=like.dtype, device=like.device)
        aggregate = None if self.uniformity == "batch" else self.uniformity(view, law, self.guide)
        recognition_factor(f"x{view}", pyro.sample(f"z{number}", uniform), law, aggregate=aggregate)

    def partner_logits(self, x1: Tensor, x2: Tensor) -> Tensor:
        r"""Log evidence that x1[i] and x2[j] show the same thing, by how well each predicts the other.

        The mean of :math:`\log R(g(x_i)|x_j) / R(g(x_i))` and the same with the views exchanged, each with R(z)
        averaged over these views.

        Args:
            x1: ``(N, ...)`` views.
            x2: ``(M, ...)`` views.

        Returns:
            ``(N, M)`` log density ratios in nats.
        """
        one, two = self.guide.branch(x1), self.guide.branch(x2)
        log_ratios = [
            law.cross_log_prob(z) - aggregate_log_density(z, law).unsqueeze(-1)
            for z, law in ((one.point, two.prediction), (two.point, one.prediction))
        ]
        return 0.5 * (log_ratios[0] + log_ratios[1].mT)


class SimSiam(VISimSiam):
    r"""SimSiam: predictions of one fixed concentration, so that only the direction is learned.

    With von Mises-Fisher predictions minus the ELBO is :math:`2 N [\kappa D + \log \int e^{\kappa \mu \cdot z} dz]`,
    D being SimSiam's negative cosine :math:`-\frac1{2N} \sum_n [\mu(x_2) \cdot g(x_1) + \mu(x_1) \cdot g(x_2)]`: the
    same gradient up to the factor :math:`2 N \kappa`, which Adam does not see. The power spherical law scores a cosine
    t by :math:`\kappa \log(1 + t)` instead: the same optimum, and large errors weigh more.

    Args:
        guide: ``guides.Siamese(..., width="fixed")``; ``density="von_mises_fisher"`` for the paper's loss.

    Raises:
        TypeError: see :class:`VISimSiam`.
        ValueError: for a guide that learns its concentration.

    References:
        Chen and He, "Exploring Simple Siamese Representation Learning", CVPR 2021, arXiv 2011.10566.

    Example:
        >>> from torch import nn
        >>> from pyro_contrastive import guides
        >>> guide = guides.Siamese(nn.Linear(8, 32), 5, density="von_mises_fisher", width="fixed", concentration=1.0)
        >>> model = SimSiam(guide)
    """

    def __init__(self, guide: Any) -> None:
        super().__init__(guide)
        if guide.width != "fixed":
            raise ValueError(
                f"SimSiam has one fixed concentration, got a guide with width={guide.width!r}; "
                "build guides.Siamese(encoder, dim, width='fixed'), or use VISimSiam"
            )
