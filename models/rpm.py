"""Recognition-parametrised models: views, their latents, and any prior that says how the latents relate."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroParam
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_contrastive import distributions as dist
from pyro_contrastive.aggregates import aggregate_log_density
from pyro_contrastive.factors import check_recognition, recognition_factor
from pyro_contrastive.kernels import VonMisesFisherKernel
from pyro_contrastive.modules import Module
from pyro_contrastive.ops.constraints import scale_parameter
from pyro_contrastive.priors import InfoNCE

__all__ = ["RPM"]

Prior = Callable[..., Any]


class _Latents(Messenger):
    """Collects what a prior samples, and compares each latent with the recognition law it will meet as it comes."""

    def __init__(self, posteriors: Sequence[Any]) -> None:
        super().__init__()
        self.expected = {f"z{j}": (f"x{j}", q.event_shape) for j, q in enumerate(posteriors, start=1)}
        self.expected["z"] = ("every view", posteriors[0].event_shape)
        self.values: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        view, wanted = self.expected.get(msg["name"], ("", None))
        got = getattr(msg["fn"], "event_shape", None)
        if wanted is not None and got != wanted:
            raise ValueError(
                f"the prior's latent {msg['name']!r} has event shape {tuple(got or ())} and the guide's posterior of "
                f"{view} has {tuple(wanted)}; give both one dimension (and a prior of one number per axis .to_event(1))"
            )

    def _pyro_post_sample(self, msg: Any) -> None:
        if re.fullmatch(r"z\d*", msg["name"]):
            self.values[msg["name"]] = msg["value"]

    def per_view(self) -> list[Tensor]:
        """The latent of each view, checked: one site per view, or one for all."""
        names, found = [name for name in self.expected if name != "z"], set(self.values)
        if found == {"z"}:
            return [self.values["z"]] * len(names)
        if found != set(names):
            raise ValueError(
                f"the prior must sample one latent per view, {', '.join(names)} for {len(names)} views, or one shared "
                f"latent z, got {', '.join(sorted(found)) or 'none of them'}; give it the number of views, or the "
                "model the views it speaks of"
            )
        return [self.values[name] for name in names]


class RPM(Module):
    r"""J views, their latents, and a prior that says how the latents relate.

    .. math::  z_1, \dots, z_J \sim P(z_1, \dots, z_J), \quad
               P(x_j | z_j) = \frac{R(z_j | x_j)}{R(z_j)} P(x_j), \quad R(z_j) = \frac1M \sum_m R(z_j | x_{j,m}).

    The likelihood needs no decoder: it is defined by the recognition law R through Bayes' rule. What the model assumes
    about the world is the prior: any Pyro function that samples "z1", ..., "zJ", or one shared "z"
    (:mod:`pyro_contrastive.priors` has several). With the guide :math:`\prod_j R(z_j|x_j)` the ELBO is
    :math:`E[\log P(z_1, ..., z_J) - \sum_j \log R(z_j)]`: the mutual information of the latents minus the distance of
    the prior from their law.

    Without a prior of yours the latents are a walk on the sphere, :math:`z_1 \sim U(S^{d-1}), z_{j+1} \sim
    vMF(z_j, \kappa)`, with kappa learned by default; at the optimum it is the concentration of the sampled pairs, and
    unlike independent uniform priors it does not let the posteriors collapse.

    What the posterior's width means: the ELBO with the product guide rewards information, so a wider posterior costs
    what the prior would have rewarded, and a noise-free encoder is its optimum. Only the evidence makes kappa(x) the
    aleatoric uncertainty: ``KSampleELBO`` and the fused guide of a shared latent come near it, up to the R(z) estimated
    from the batch, which favours wide posteriors; the closed forms of ``MCInfoNCE`` are it.
    ``diagnostics.evidence_gap`` and ``diagnostics.aggregate_bias`` measure the two.

    Args:
        guide: recognition module with ``posterior(x)``, used as the Pyro guide too; any family with a density. For a
            shared latent, ``guides.Fused``.
        prior: Pyro function without arguments, called inside the plate of the items, that samples one latent per view,
            "z1", ..., "zJ", or one, "z", that all views share; or :class:`~pyro_contrastive.priors.InfoNCE`. Latents
            outside the plate: write your own model around ``factors.recognition_factor``.
        concentration: kappa of the default prior at the start, > 0 and finite; 10 if omitted.
        learn_concentration: make it a parameter (default), optimised as log(kappa) / 4 so that it keeps pace with the
            network.
        aggregate: what R(z) averages over: the batch (None), a ``MemoryBank`` or ``FullData`` from
            :mod:`pyro_contrastive.aggregates`. The InfoNCE prior has no R left and takes none.

    Raises:
        TypeError: for a guide without ``posterior(x)``, or a prior that cannot be called.
        ValueError: if the concentration is not positive and finite, or goes with a prior that has its own; for an
            aggregate with the InfoNCE prior. When called: for fewer than two views, views of unequal lengths, and
            a prior whose latents are other ones, or of another event shape, than the guide's.

    References:
        Aitchison and Ganev, arXiv 2107.02495; Walker, Soulat, Yu and Sahani, arXiv 2209.05661.

    Example:
        >>> from torch import nn
        >>> from pyro_contrastive import guides, priors
        >>> from pyro.infer import Trace_ELBO
        >>> guide = guides.VonMisesFisher(nn.Linear(8, 32), dim=5)
        >>> elbo = Trace_ELBO()(RPM(guide), guide)
        >>> elbo(torch.randn(16, 8), torch.randn(16, 8)).shape
        torch.Size([])
        >>> model = RPM(guide, priors.Clusters(5, num_clusters=10, num_views=3))
        >>> Trace_ELBO()(model, guide)(*torch.randn(3, 16, 8)).shape
        torch.Size([])
    """

    concentration: Tensor

    def __init__(
        self,
        guide: Any,
        prior: Prior | None = None,
        *,
        concentration: float | None = None,
        learn_concentration: bool = True,
        aggregate: Any = None,
    ) -> None:
        super().__init__()
        check_recognition("guide", guide)
        if prior is not None and (not callable(prior) or isinstance(prior, type)):
            raise TypeError(
                f"`prior` must be a Pyro function that samples z1, ..., zJ (or z), got {prior!r}; for instance "
                "priors.VonMisesFisherChain(dim, num_views)"
            )
        if prior is not None and concentration is not None:
            raise ValueError(
                f"`concentration` is that of the default prior, got {concentration!r} together with a prior; "
                "give it to the prior"
            )
        if isinstance(prior, InfoNCE) and aggregate is not None:
            raise ValueError(
                f"`aggregate` cancels under the InfoNCE prior, got {type(aggregate).__name__}; leave it out"
            )
        self.guide = guide
        self.prior: Any = prior
        self.aggregate = aggregate
        if prior is None:
            value = VonMisesFisherKernel(10.0 if concentration is None else concentration).concentration  # checks it
            if learn_concentration:
                setattr(self, "concentration", PyroParam(value.clone(), constraint=scale_parameter))  # noqa: B010
            else:
                self.register_buffer("concentration", value.clone())

    def forward(self, *views: Tensor) -> None:
        """The Pyro model: the latents' sites and the factors "x1", ..., "xJ" in the plate "pairs".

        Args:
            views: ``(N, ...)`` each, row i of all of them showing the same thing; J >= 2.

        Raises:
            ValueError: see the class.
        """
        if len(views) < 2:
            raise ValueError(
                f"the prior relates the latents of J >= 2 views, got {len(views)}; pass model(x1, x2, ...)"
            )
        if len({len(x) for x in views}) > 1:
            shapes = ", ".join(f"x{j} {tuple(x.shape)}" for j, x in enumerate(views, start=1))
            raise ValueError(f"views must share one leading dimension N, got {shapes}; row i of each is one thing")
        posteriors = [self.guide.posterior(x) for x in views]
        with pyro.plate("pairs", len(views[0]), dim=-1):
            if isinstance(self.prior, InfoNCE):
                if len(views) != 2:
                    raise ValueError(f"the InfoNCE prior relates two views, got {len(views)}; use another prior")
                self.prior(*posteriors)
                return
            with _Latents(posteriors) as latents:
                if self.prior is None:
                    self._walk(posteriors)
                else:
                    self.prior()
            for j, (z, posterior) in enumerate(zip(latents.per_view(), posteriors, strict=True), start=1):
                laws = None if self.aggregate is None else self.aggregate(j, posterior, self.guide)
                recognition_factor(f"x{j}", z, posterior, aggregate=laws)

    def _walk(self, posteriors: Sequence[Any]) -> None:
        kappa = self.concentration
        z = pyro.sample("z1", dist.HypersphericalUniform(self.guide.dim, dtype=kappa.dtype, device=kappa.device))
        for j in range(2, len(posteriors) + 1):
            z = pyro.sample(f"z{j}", dist.VonMisesFisher(z, kappa))

    @torch.no_grad()
    def log_prior(self, *latents: Tensor) -> Tensor:
        """Log density of the prior at given latents.

        Args:
            latents: ``(..., d)``, one per view, or the shared one; leading axes broadcast.

        Returns:
            ``(...)``, in nats.

        Raises:
            ValueError: for the InfoNCE prior, whose density contains the aggregate.
        """
        if isinstance(self.prior, InfoNCE):
            raise ValueError("the InfoNCE prior has no density of its own; its kernel is `model.prior.kernel`")
        names = ["z"] if len(latents) == 1 else [f"z{j}" for j in range(1, len(latents) + 1)]
        prior = (lambda: self._walk(latents)) if self.prior is None else self.prior
        with (
            poutine.block(),
            poutine.trace() as capture,
            poutine.condition(data=dict(zip(names, latents, strict=True))),
        ):
            prior()
        capture.trace.compute_log_prob()
        sites = capture.trace.nodes.values()
        return sum((site["log_prob"] for site in sites if site["type"] == "sample"), torch.zeros(()))

    def partner_logits(self, x1: Tensor, x2: Tensor, *, num_samples: int = 64) -> Tensor:
        r"""Log evidence that x1[i] and x2[j] show the same thing: :math:`\log E[P(z_1, z_2) / R(z_1) R(z_2)]`.

        Args:
            x1: ``(N, ...)`` views.
            x2: ``(M, ...)`` views.
            num_samples: draws of every latent.

        Returns:
            ``(N, M)`` log density ratios in nats, up to Monte-Carlo error. The default prior takes R(z) to be uniform,
            which the learned aggregate need not be; other priors average it over these views. Under the InfoNCE prior,
            log E f, up to a constant.

        Raises:
            ValueError: for a prior over another number of latents than two.
        """
        size = torch.Size((num_samples,))
        q1, q2 = self.guide.posterior(x1), self.guide.posterior(x2)
        z1, z2 = q1.sample(size), q2.sample(size)
        if self.prior is None:
            prior = dist.VonMisesFisher(z1, self.concentration, validate_args=False)
            log_ratio = prior.cross_log_prob(z2).mT - dist.log_uniform_density(self.guide.dim)
        elif isinstance(self.prior, InfoNCE):
            log_ratio = self.prior.kernel(z1, z2)
        else:
            joint = torch.stack([self.log_prior(a.unsqueeze(1), b.unsqueeze(0)) for a, b in zip(z1, z2, strict=True)])
            marginals = [aggregate_log_density(z, q) for z, q in ((z1, q1), (z2, q2))]
            log_ratio = joint - marginals[0].unsqueeze(-1) - marginals[1].unsqueeze(-2)
        return log_ratio.logsumexp(0) - math.log(num_samples)
