"""Recognition-parametrised model with one discrete latent that all views share (Walker et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import torch
from pyro.distributions import Categorical
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

from pyro_contrastive.factors import check_recognition, recognition_factor, state_log_aggregate, state_log_ratio
from pyro_contrastive.modules import Module, keep_parameters_local

__all__ = ["DiscreteRPM"]


class DiscreteRPM(Module):
    r"""J >= 2 views of a thing that is in one of K states, independent of one another given the state.

    .. math::  z \sim \pi, \qquad p(x_j | z = k) = \frac{f_j(k | x_j)}{F_j(k)} p_0(x_j), \qquad
               F_j(k) = \frac1N \sum_n f_j(k | x_{j,n}), \quad p_0 \text{ the empirical marginal}.

    The likelihood is a sum over K states, so nothing is approximated: with ``TraceEnum_ELBO`` and a guide without sites
    the ELBO *is* the log likelihood, and its maximum over the networks is maximum likelihood. Only the aggregates F_j
    are taken over the batch at hand: for views that tell the states apart the log likelihood is then J (K - 1) / 2N too
    small, to first order. A batch of all data has the exact ones.

    Views that tell the states apart perfectly have a log likelihood ratio of (J - 1) H(pi), the most a model with
    F_j = pi can reach. States have no order, several may share one class and one may hold two ("merged clusters", a
    local optimum): fit more than once and compare likelihoods.

    Args:
        guide: categorical recognition module, ``posterior(x)`` and ``num_states``, shared by all views; or a sequence
            of them, one per view, with the same number of states.
        prior: pi, K positive probabilities. Default: uniform.
        learn_prior: make pi a parameter, its logarithm up to a constant.

    Raises:
        TypeError: for a guide without ``posterior(x)``, or of another family than the categorical one.
        ValueError: for fewer than two guides in a sequence, different numbers of states, or a prior that is no
            distribution over the K states.

    References:
        Walker, Soulat, Yu and Sahani, AISTATS 2023, arXiv 2209.05661, section on discrete latents.

    Example:
        >>> from pyro.infer import TraceEnum_ELBO
        >>> from pyro_contrastive import guides
        >>> model = DiscreteRPM(guides.Categorical(nn.Linear(8, 16), num_states=4))
        >>> x1, x2 = torch.randn(2, 32, 8)
        >>> loss = TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda *views: None, x1, x2)
        >>> torch.testing.assert_close(torch.tensor(loss), -model.log_evidence(x1, x2).sum())
    """

    prior_logits: Tensor

    def __init__(self, guide: Any, *, prior: Tensor | Sequence[float] | None = None, learn_prior: bool = False) -> None:
        super().__init__()
        several = isinstance(guide, Sequence | nn.ModuleList)
        parts = list(guide) if several else [guide]
        for part in parts:
            check_recognition("guide", part)
            if not isinstance(getattr(part, "num_states", None), int):
                raise TypeError(
                    f"`guide` must be a categorical recognition module with `num_states`, got {type(part).__name__}; "
                    "build guides.Categorical(encoder, num_states)"
                )
        states = {part.num_states for part in parts}
        if len(states) != 1 or (several and len(parts) < 2):
            raise ValueError(
                "`guide` must be one module for all views, or one per view (two or more) with the same number of "
                f"states, got {len(parts)} with states {[part.num_states for part in parts]}"
            )
        self.num_states: int = states.pop()
        value = torch.full((self.num_states,), 1.0 / self.num_states) if prior is None else torch.as_tensor(prior)
        total = float(value.sum())
        if value.shape != (self.num_states,) or not bool((value > 0).all()) or not abs(total - 1.0) < 1e-5:
            raise ValueError(
                f"`prior` must be {self.num_states} positive probabilities that sum to one, one per state of the "
                f"guide, got shape {tuple(value.shape)}, minimum {float(value.min()):g} and sum {total:g}"
            )
        module_list: Any = PyroModule[nn.ModuleList]  # a subclass that Pyro makes
        self.guide = module_list(parts) if several else guide
        if several:
            keep_parameters_local(self)
        if learn_prior:
            setattr(self, "prior_logits", PyroParam(value.log()))  # noqa: B010 (typing)
        else:
            self.register_buffer("prior_logits", value.log())

    @property
    def prior(self) -> Tensor:
        """pi, ``(K,)`` probabilities."""
        return self.prior_logits.softmax(-1)

    def forward(self, *views: Tensor) -> None:
        """The Pyro model: site "z" and one factor "x1", "x2", ... per view, in the plate "pairs".

        Args:
            views: J >= 2 tensors ``(N, ...)``, row i of each a view of the same thing, N >= 2.

        Raises:
            ValueError: for fewer than two views, a number other than that of the guides, or different lengths.
        """
        self._check(views, least=2)
        posteriors = [self._part(j).posterior(x) for j, x in enumerate(views)]
        with pyro.plate("pairs", len(views[0]), dim=-1):
            z = pyro.sample("z", Categorical(logits=self.prior_logits), infer={"enumerate": "parallel"})
            for j, posterior in enumerate(posteriors, start=1):
                recognition_factor(f"x{j}", z, posterior)

    def tight_guide(self, *views: Tensor) -> None:
        """A Pyro guide that draws "z" from its exact posterior: every draw's ELBO is the evidence, without variance.

        For inference algorithms that want a guide with the site; training needs none.

        Args:
            views: as in :meth:`forward`.

        Raises:
            ValueError: see :meth:`forward`.
        """
        self._check(views, least=2)
        shared = not isinstance(self.guide, nn.ModuleList)
        laws = (
            self.guide.posteriors(*views)
            if shared
            else [part.posteriors(x)[0] for part, x in zip(self.guide, views, strict=True)]
        )
        logits = self.prior_logits + torch.stack([state_log_ratio(law) for law in laws]).sum(0)
        with pyro.plate("pairs", len(views[0]), dim=-1):
            pyro.sample("z", Categorical(logits=logits), infer={"enumerate": "parallel"})

    def log_aggregate(self, *views: Tensor) -> Tensor:
        """Log of the aggregates F_j, the average recognition law of every view.

        Args:
            views: J tensors ``(N, ...)``: the data that the aggregates are taken over, for instance all training views.

        Returns:
            ``(J, K)``; hand it to the other methods to recognise items one by one.

        Raises:
            ValueError: see :meth:`forward`; here one view is enough.
        """
        self._check(views, least=1)
        return torch.stack([state_log_aggregate(self._part(j).posterior(x)) for j, x in enumerate(views)])

    def posterior(self, *views: Tensor | None, log_aggregate: Tensor | None = None) -> Categorical:
        r"""Exact posterior of the state, :math:`p(z | x_1, \dots) \propto \pi(z) \prod_j f_j(z|x_j) / F_j(z)`.

        Args:
            views: J tensors ``(N, ...)``, or None in the place of a view that was not seen.
            log_aggregate: ``(J, K)`` from :meth:`log_aggregate`. Default: that of these views.

        Returns:
            A categorical law with batch shape ``(N,)``.

        Raises:
            ValueError: if no view was given, they differ in length, or the aggregate is not ``(J, K)``.
        """
        return Categorical(logits=self._log_joint(views, log_aggregate))

    def log_evidence(self, *views: Tensor | None, log_aggregate: Tensor | None = None) -> Tensor:
        r"""Log likelihood ratio of every item, :math:`\log \sum_k \pi(k) \prod_j f_j(k|x_j) / F_j(k)`.

        This is log p(x_1, ..., x_J) minus the log of the empirical marginals of the views.

        Args:
            views: as in :meth:`posterior`.
            log_aggregate: as in :meth:`posterior`.

        Returns:
            ``(N,)`` in nats.

        Raises:
            ValueError: see :meth:`posterior`.
        """
        return self._log_joint(views, log_aggregate).logsumexp(-1)

    def partner_logits(self, x1: Tensor, x2: Tensor, *, log_aggregate: Tensor | None = None) -> Tensor:
        r"""Log evidence that x1[i] and x2[j] show one thing: :math:`\log \sum_k \pi f_1(k|x_i) f_2(k|x_j) / F_1 F_2`.

        Args:
            x1: ``(N, ...)`` first views.
            x2: ``(M, ...)`` second views.
            log_aggregate: ``(2, K)``. Default: that of these views.

        Returns:
            ``(N, M)`` log density ratios in nats.

        Raises:
            ValueError: for guides of more than two views, or an aggregate of another shape.
        """
        self._check((x1, x1), least=2)
        laws = [self._part(j).posterior(x) for j, x in enumerate((x1, x2))]
        if log_aggregate is None:
            log_aggregate = torch.stack([state_log_aggregate(law) for law in laws])
        self._check_aggregate(log_aggregate, 2)
        weight = self.prior.log() - log_aggregate.sum(0)
        return ((laws[0].logits + weight)[:, None] + laws[1].logits).logsumexp(-1)

    def _part(self, view: int) -> Any:
        return self.guide[view] if isinstance(self.guide, nn.ModuleList) else self.guide

    def _log_joint(self, views: tuple[Tensor | None, ...], log_aggregate: Tensor | None) -> Tensor:
        self._check(views, least=1)
        if log_aggregate is not None:
            self._check_aggregate(log_aggregate, len(views))
        log_joint = self.prior.log()
        for j, x in enumerate(views):
            if x is not None:
                law = self._part(j).posterior(x)
                log_joint = log_joint + (
                    state_log_ratio(law) if log_aggregate is None else law.logits - log_aggregate[j]
                )
        return log_joint

    def _check_aggregate(self, log_aggregate: Tensor, num_views: int) -> None:
        if log_aggregate.shape != (num_views, self.num_states):
            raise ValueError(
                f"`log_aggregate` must have one row per view and one column per state, ({num_views}, "
                f"{self.num_states}), got {tuple(log_aggregate.shape)}; it comes from model.log_aggregate(*views)"
            )

    def _check(self, views: tuple[Tensor | None, ...], least: int) -> None:
        seen = [x for x in views if x is not None]
        if len(seen) < least:
            why = "a shared latent shows in what views have in common" if least > 1 else "nothing was seen"
            raise ValueError(f"the model needs at least {least} view{'s' * (least > 1)}, got {len(seen)}: {why}")
        if isinstance(self.guide, nn.ModuleList) and len(views) != len(self.guide):
            raise ValueError(
                f"there is one guide per view, {len(self.guide)}, but {len(views)} views were given; pass as many "
                "(None for a view not seen, where that is allowed), or one guide for all"
            )
        if len({len(x) for x in seen}) != 1:
            raise ValueError(f"views must share one leading dimension N, got {[tuple(x.shape) for x in seen]}")
