"""Objectives that Pyro lacks: a bound with one importance weight per row, and an ELBO with a weighted divergence."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.elbo import ELBO
from pyro.infer.enum import get_importance_trace
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.util import warn_if_nan
from torch import Tensor

__all__ = ["KSampleELBO", "WeightedELBO"]


class KSampleELBO(ELBO):
    r"""Importance-weighted bound with one weight per row: :math:`\sum_i \log \frac1K \sum_k w_{ik}`.

    The logarithm is outside the average over K particles, and each row (item of the plate) has its own average. For
    contrastive factors this is the "K samples inside the log" of MCInfoNCE; with K = 1 it equals ``Trace_ELBO``. It
    grows with K towards the evidence; for small K it favours posteriors that are too concentrated.
    (``pyro.infer.RenyiELBO(alpha=0)`` averages per row or jointly depending on where a factor was emitted.)

    Works with plain ``SVI``, with ``ELBOModule`` (``KSampleELBO(16)(model, guide)``), and with sequential or vectorised
    particles (vectorised ones where a plate draws its own subsample: sequential particles would each draw other rows).
    All latents must be reparametrised and live in the same plates, those of the rows.

    Args:
        num_particles: K >= 1.
        vectorize_particles: draw all particles in one pass (default) or one after the other.
        max_plate_nesting: number of plates of the rows, default 1.

    Raises:
        ValueError: if K < 1, or a site is outside the rows' plates (its weight would be counted once per row).
        NotImplementedError: for a latent without a reparametrised sampler.

    References:
        Burda, Grosse and Salakhutdinov 2016 (arXiv 1509.00519); Kirchhof et al. 2023 (arXiv 2302.02865).
    """

    def __init__(
        self, num_particles: int = 16, *, vectorize_particles: bool = True, max_plate_nesting: int = 1, **kwargs: Any
    ) -> None:
        if num_particles < 1:
            raise ValueError(f"`num_particles` must be >= 1, got {num_particles!r}")
        super().__init__(
            num_particles=num_particles,
            vectorize_particles=vectorize_particles,
            max_plate_nesting=max_plate_nesting,
            **kwargs,
        )
        self._depth = max_plate_nesting  # of the rows; Pyro adds the plate of vectorised particles to its own count

    def _get_trace(self, model: Any, guide: Any, args: tuple, kwargs: dict) -> tuple[Trace, Trace]:
        return get_importance_trace("flat", self.max_plate_nesting, model, guide, args, kwargs)

    def _row_log_weights(self, model_trace: Trace, guide_trace: Trace) -> tuple[Tensor, float]:
        """log w of shape (particles?, *rows), and the factor by which subsampled plates scale a row."""
        terms: dict[str, Tensor] = {}
        scale = 1.0
        for sign, trace in ((1.0, model_trace), (-1.0, guide_trace)):
            for name, site in trace.nodes.items():
                if site["type"] != "sample" or site["infer"] and site["infer"].get("_do_not_score"):
                    continue
                if sign < 0 and not site["is_observed"] and not getattr(site["fn"], "has_rsample", False):
                    raise NotImplementedError(
                        f"KSampleELBO needs reparametrised latents, but site {name!r} is {type(site['fn']).__name__} "
                        "without rsample; enumerate or marginalise it"
                    )
                rows = [f for f in site["cond_indep_stack"] if f.vectorized and not f.name.startswith("num_particles")]
                if not rows:
                    raise ValueError(
                        f"KSampleELBO gives each row its own weight, but site {name!r} is outside every plate; move it "
                        "into the plate of the items, make it a pyro.param, or use Trace_ELBO"
                    )
                scale = math.prod((f.full_size or f.size) / f.size for f in rows)
                terms[f"{'model' if sign > 0 else 'guide'} {name}"] = sign * site["log_prob"] / scale
        shapes = {name: tuple(t.shape[-self._depth :]) for name, t in terms.items()}
        if len(set(shapes.values())) > 1:
            raise ValueError(
                f"KSampleELBO needs every site in the plates of the rows, got log-weight shapes {shapes}; "
                "a site in fewer plates would be counted once per row"
            )
        return sum(terms.values(), torch.zeros(())), scale

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Negative bound summed over rows, a scalar tensor with pathwise gradients."""
        particles, scale = [], 1.0
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            log_weight, scale = self._row_log_weights(model_trace, guide_trace)
            particles.append(log_weight)
        if self.vectorize_particles and self.num_particles > 1:
            log_weights = particles[0]
            # vectorised particles are the leftmost plate, just left of the rows
            log_weights = log_weights.reshape(self.num_particles, *log_weights.shape[-self._depth :])
        else:
            log_weights = torch.stack(particles)
        bound = log_weights.logsumexp(0) - math.log(self.num_particles)
        loss = -scale * bound.sum()
        if is_validation_enabled():
            warn_if_nan(loss, "loss")
        return loss

    @torch.no_grad()
    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Negative bound as a number (what ``SVI.evaluate_loss`` returns)."""
        return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Negative bound as a number, after its backward pass (what ``SVI.step`` calls)."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.item()


class _LatentScale(Messenger):
    """Multiply the scale of every latent site."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"]:
            msg["scale"] = msg["scale"] * self.scale


class WeightedELBO(TraceMeanField_ELBO):
    r"""``TraceMeanField_ELBO`` with a weight on the divergence: :math:`E_q[\log p(x|z)] - w\, KL(q(z|x) \| p(z))`.

    The weight of a beta-VAE. It is no statement about the world and belongs to no model: with w < 1 the bound is not
    one on the evidence. Dividing by w shows what is fitted: the posterior of a model that counts every likelihood 1/w
    times, which is as much too narrow. Every latent site of model and guide is scaled, as by ``poutine.scale`` around
    them on both sides; factors and other observed sites are not.

    Divergences that are registered for a guide's family and the prior's are used (:mod:`pyro_contrastive.distributions`
    registers those of this package), the others are sampled. Works with plain ``SVI``, with ``ELBOModule``
    (``WeightedELBO(0.1)(model, guide)``), and with sequential or vectorised particles.

    Args:
        kl_weight: w >= 0, finite; 1 is ``TraceMeanField_ELBO``.
        num_particles: draws per step, >= 1.
        max_plate_nesting: number of plates, default 1.
        **kwargs: other options of ``TraceMeanField_ELBO``, for instance ``vectorize_particles``.

    Raises:
        ValueError: if the weight is negative or not finite.

    References:
        Higgins et al., "beta-VAE", ICLR 2017.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.factor("likelihood", torch.tensor(3.0))
        >>> def guide():
        ...     pyro.sample("z", dist.Normal(2.0, 1.0))  # KL = 2
        >>> WeightedELBO(0.5).loss(model, guide)
        -2.0
    """

    def __init__(
        self, kl_weight: float = 1.0, *, num_particles: int = 1, max_plate_nesting: int = 1, **kwargs: Any
    ) -> None:
        if not 0 <= kl_weight < math.inf:
            raise ValueError(f"`kl_weight` must be >= 0 and finite, got {kl_weight!r}")
        super().__init__(num_particles=num_particles, max_plate_nesting=max_plate_nesting, **kwargs)
        self.kl_weight = float(kl_weight)

    def _get_trace(self, model: Any, guide: Any, args: tuple, kwargs: dict) -> tuple[Trace, Trace]:
        scale = _LatentScale(self.kl_weight)
        return super()._get_trace(scale(model), scale(guide), args, kwargs)
