"""MCInfoNCE (Kirchhof, Kasneci and Oh 2023): contrastive learning that recovers each input's aleatoric uncertainty."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, get_args

import pyro
import torch
from torch import Tensor

from pyro_contrastive.factors import (
    Negatives,
    check_recognition,
    infonce_factor,
    infonce_log_ratio,
    log_ratio_factor,
    matching_factor,
)
from pyro_contrastive.kernels import VonMisesFisherKernel, expected_pairs, moment_matched_pairs
from pyro_contrastive.modules import Module
from pyro_contrastive.ops.tiles import Pairs

__all__ = ["MCInfoNCE"]

Evidence = Literal["exact", "moment_matched", "k_sample", "elbo"]
Marginal = Literal["uniform", "empirical"]


class MCInfoNCE(Module):
    r"""InfoNCE whose latents are integrated over the posteriors of both views.

    Generative story: latents of a positive pair are :math:`z' \sim vMF(z, \kappa_{pos})` on the sphere, z uniform, and
    each view says R(z|x) about its latent. The likelihood of a pair against the batch is

    .. math::  \log \frac{E[f(z_i, z'_i)]}{\frac1N \sum_j E[f(z_i, z'_j)]} \quad\text{or}\quad
               \log E\Big[\frac{f(z_i, z'_i)}{\frac1N \sum_j f(z_i, z'_j)}\Big],
               \qquad f(z, z') = e^{\kappa_{pos} z \cdot z'},

    with expectations over :math:`z_i \sim R(\cdot|x_i), z'_j \sim R(\cdot|x'_j)`: the first form for the closed-form
    evidences (a softmax over exact log evidences of pairs), the second, the paper's, for samples.

    ``evidence`` says how the latents are integrated:

    ==================  ==========================================================================================
    ``exact``           no samples, no approximation: a series on the sphere, a closed form for ``concentration=inf``.
    ``moment_matched``  no samples; a finite pair concentration by matching one moment. Faster than ``exact``, with an
                        error of up to half a nat for concentrated pairs.
    ``k_sample``        the paper's log-mean-exp over ``num_samples`` draws of every latent. Biased towards
                        concentrated posteriors when there are few.
    ``elbo``            mean of the log at the sampled latents (one draw per particle of the ELBO); for point
                        embeddings it is the evidence. With ``KSampleELBO(K)`` it becomes ``k_sample``.
    ==================  ==========================================================================================

    The level of the learned kappa(x) is identified only relative to the pair concentration: state it (as in the
    paper), or use the shared latent. A finite value that is too small for the data drives kappa(x) up without bound.

    The latents z1, z2 are ordinary sample sites with law R(z|x), so ``Predictive`` and ArviZ see posterior draws
    whatever the evidence.

    Args:
        guide: recognition module with ``posterior(x)``, used as the Pyro guide too. Closed forms need
            ``guides.VonMisesFisher``; the others take any family.
        concentration: kappa_pos of the pair, > 0; ``math.inf`` means that the views share one latent.
        evidence: see above.
        learn_concentration: learn kappa_pos (only sensible with point embeddings; see the note on identification).
        num_samples: K of ``k_sample``.
        symmetric: average the likelihoods of view 2 given view 1 and of view 1 given view 2.
        negatives: how much the other items of the batch count: ``sum`` (InfoNCE) or ``mean`` (as in the authors' code);
            see :func:`~pyro_contrastive.factors.infonce_log_ratio`.
        marginal: ``"uniform"``: the aggregate of the recognition laws is uniform on the sphere, as the closed forms
            assume. ``"empirical"``: it is whatever it is, and the factor becomes the likelihood of the whole matching
            of the batch (:func:`~pyro_contrastive.factors.matching_factor`), from which the marginals cancel. Needs a
            closed-form evidence and batches of 128 or more; ``symmetric`` and ``negatives`` say nothing then. It is
            nearly flat along tilts of the sphere, so latents that are crowded are found from a crowded start only:
            build the guide with ``batch_norm=False``.

    Raises:
        TypeError: for a guide without ``posterior(x)``.
        ValueError: for an unknown evidence or one that does not go with the concentration.

    Warns:
        UserWarning: for ``marginal="empirical"`` with a guide that spreads its directions by batch norm.

    References:
        Kirchhof, Kasneci and Oh, ICML 2023, arXiv 2302.02865.

    Example:
        >>> from torch import nn
        >>> from pyro_contrastive import guides
        >>> from pyro.infer import Trace_ELBO
        >>> guide = guides.VonMisesFisher(nn.Linear(8, 32), dim=5)
        >>> elbo = Trace_ELBO()(MCInfoNCE(guide), guide)
        >>> elbo(torch.randn(16, 8), torch.randn(16, 8)).shape
        torch.Size([])
    """

    def __init__(
        self,
        guide: Any,
        *,
        concentration: float = math.inf,
        evidence: Evidence = "exact",
        learn_concentration: bool = False,
        num_samples: int = 16,
        symmetric: bool = True,
        negatives: Negatives = "sum",
        marginal: Marginal = "uniform",
    ) -> None:
        super().__init__()
        check_recognition("guide", guide)
        shared = math.isinf(concentration) and concentration > 0
        if evidence not in get_args(Evidence):
            raise ValueError(f"`evidence` must be one of {', '.join(get_args(Evidence))}, got {evidence!r}")
        if shared and (evidence != "exact" or learn_concentration):
            raise ValueError(
                "an infinite pair concentration (views that share one latent) has the closed-form evidence 'exact' "
                f"and nothing to learn, got evidence={evidence!r}, learn_concentration={learn_concentration}; "
                "pass a finite `concentration` for the others"
            )
        if negatives not in get_args(Negatives):
            raise ValueError(f"`negatives` must be one of {', '.join(get_args(Negatives))}, got {negatives!r}")
        if marginal not in get_args(Marginal):
            raise ValueError(f"`marginal` must be one of {', '.join(get_args(Marginal))}, got {marginal!r}")
        if marginal == "empirical" and evidence not in ("exact", "moment_matched"):
            raise ValueError(
                f"`marginal`='empirical' needs a closed-form evidence, got evidence={evidence!r}; use 'exact' or "
                "'moment_matched' with guides.VonMisesFisher"
            )
        if marginal == "empirical" and getattr(guide, "batch_norm", None) is not None:
            warnings.warn(
                "marginal='empirical' is for latents that are not uniform, and this guide starts with uniform ones, "
                "from where they are not found; build it with batch_norm=False",
                UserWarning,
                stacklevel=2,
            )
        if not isinstance(num_samples, int) or num_samples < 1:
            raise ValueError(f"`num_samples` must be an integer >= 1, got {num_samples!r}")
        self.guide = guide
        self.kernel: Any = None if shared else VonMisesFisherKernel(concentration, learn=learn_concentration)
        self.evidence = evidence
        self.num_samples = num_samples
        self.symmetric = symmetric
        self.negatives = negatives
        self.marginal = marginal

    @property
    def concentration(self) -> Tensor:
        """kappa_pos of the pair, a scalar tensor; infinity when the views share one latent."""
        return torch.tensor(math.inf) if self.kernel is None else self.kernel.concentration

    def forward(self, x1: Tensor, x2: Tensor) -> None:
        """The Pyro model: sites "z1", "z2" and the factor "positive" in the plate "pairs".

        Args:
            x1: ``(N, ...)`` first views.
            x2: ``(N, ...)`` second views, row i of the same thing as row i of ``x1``.
        """
        posterior1, posterior2 = self.guide.posterior(x1), self.guide.posterior(x2)
        with pyro.plate("pairs", len(x1), dim=-1):
            # P(z) = R(z), P(z'|z) ~ R(z') f: the recognition laws cancel and the factor is what is left
            z1 = pyro.sample("z1", posterior1)
            z2 = pyro.sample("z2", posterior2)
            options: dict[str, Any] = {"symmetric": self.symmetric, "negatives": self.negatives}
            if self.evidence == "elbo":
                infonce_factor("positive", z1, z2, self.kernel, **options)
            elif self.evidence == "k_sample":
                pyro.factor("positive", self._k_sample(posterior1, posterior2, options))
            elif self.marginal == "empirical":
                matching_factor("positive", self._expected_pairs(posterior1, posterior2).grid())
            else:
                log_ratio_factor("positive", self._expected_pairs(posterior1, posterior2), **options)

    def _k_sample(self, posterior1: Any, posterior2: Any, options: dict[str, Any]) -> Tensor:
        size = torch.Size((self.num_samples,))
        log_f = self.kernel(posterior1.rsample(size), posterior2.rsample(size), lazy=True)
        return infonce_log_ratio(log_f, **options).logsumexp(0) - math.log(self.num_samples)

    def _expected_pairs(self, posterior1: Any, posterior2: Any) -> Pairs:
        """log E[f] of all pairs, not evaluated yet: a large grid is never kept whole."""
        if self.evidence == "moment_matched":
            return moment_matched_pairs(posterior1, posterior2, self.kernel.concentration)
        return expected_pairs(posterior1, posterior2, math.inf if self.kernel is None else self.kernel.concentration)

    def partner_logits(self, x1: Tensor, x2: Tensor, *, posteriors: tuple[Any, Any] | None = None) -> Tensor:
        """Log evidence that x1[i] and x2[j] show the same thing, for all pairs: the logits of the partner's index.

        Args:
            x1: ``(N, ...)`` views.
            x2: ``(M, ...)`` views.
            posteriors: of both, when they are already known.

        Returns:
            ``(N, M)`` log density ratios in nats. Sampled evidences average the unnormalised kernel over
            ``num_samples`` draws: theirs hold up to one constant, the same for all pairs, and Monte-Carlo error.
        """
        posterior1, posterior2 = posteriors or (self.guide.posterior(x1), self.guide.posterior(x2))
        if self.evidence in ("exact", "moment_matched"):
            return self._expected_pairs(posterior1, posterior2).grid()
        size = torch.Size((self.num_samples,))
        log_f = self.kernel(posterior1.rsample(size), posterior2.rsample(size))
        return log_f.logsumexp(0) - math.log(self.num_samples)
