"""One batch of arguments through a trained pair: every ArviZ group as plain labelled arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pyro.poutine.util import site_is_factor, site_is_subsample
from tqdm.auto import tqdm

from pyro_contrastive.diagnostics._arrays import as_array
from pyro_contrastive.diagnostics._container import Attributes, name_of
from pyro_contrastive.diagnostics._passes import (
    Programs,
    Run,
    Site,
    Trace,
    brief,
    is_latent,
    is_observation,
    per_draw,
    unobserved,
)
from pyro_contrastive.diagnostics._recorder import DRAW, Recorder, Variables, safe_name

__all__ = ["Collection", "Collector", "checked_pair", "checked_views"]

_STORE_UP_TO = 2**20  # numbers in all views together, and in one parameter; more are left out


@dataclass(frozen=True)
class Collection:
    """What one batch gave.

    Attributes:
        groups: Variables by group.
        coords: Labels of dimensions that the library knows: view names, rows of subsampling plates.
        attrs: How it was drawn, and what was left out and why.
    """

    groups: dict[str, Variables]
    coords: dict[str, Any]
    attrs: Attributes


@dataclass
class Collector:
    """Runs a pair on one batch after the other, with one draw of the global latents for all of them.

    Attributes:
        model: Pyro program.
        guide: Pyro program with the same arguments.
        num_samples: Draws.
        kwargs: Keyword arguments of both.
        prior: Whether to draw from the prior.
        predictive: Whether to replicate the observed data.
        vectorize: Whether to try many draws in one pass.
        dims: Names of the dimensions of variables.
        view_names: Names of the views.
        store_views: Whether to keep the views; None keeps small ones.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    num_samples: int
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    prior: bool = True
    predictive: bool = True
    vectorize: bool = True
    dims: Mapping[str, Sequence[str]] = field(default_factory=dict)
    view_names: Sequence[str] | None = None
    store_views: bool | None = None

    def __post_init__(self) -> None:
        self.programs = Programs((), self.kwargs, self.vectorize)
        self.globals: dict[str, dict[str, torch.Tensor]] = {}  # by kind of draw, then by site: (draws, *shape)

    def collect(self, views: tuple[torch.Tensor, ...], *, progress: bool = False) -> Collection:
        """Draws everything for one batch.

        Args:
            views: Positional arguments of the pair.
            progress: Whether to show a progress bar.

        Returns:
            The groups.

        Raises:
            ValueError: If the guide has no latent site or a latent value is NaN.
        """
        programs = self.programs
        programs.start(views)
        recorder = Recorder(len(views[0]) if views else None, self.dims)
        guide_like = programs.run(self.guide)
        if not any(is_latent(site) for site in guide_like.nodes.values()):
            raise ValueError(
                "`guide` must have at least one latent sample site, got none; pass the guide trained by SVI"
            )
        model_like = programs.run(self.model, given=guide_like)
        programs.measure(guide_like, model_like)
        recorder.learn_plates(guide_like, model_like)
        with tqdm(total=self.num_samples, desc="posterior draws", disable=not progress) as bar:
            self._posterior(recorder, guide_like, model_like, bar)
        attrs: Attributes = {"posterior_draws": programs.how("posterior")}
        if self.prior:
            try:
                with tqdm(total=self.num_samples, desc="prior draws", disable=not progress) as bar:
                    self._prior(recorder, bar)
                attrs["prior_draws"] = programs.how("prior")
            except Exception as error:  # whatever somebody's model raises when it has no guide to follow
                recorder.columns.pop("prior", None)
                recorder.columns.pop("prior_predictive", None)
                attrs["prior_skipped"] = f"the model did not run without its guide: {brief(error)}"
        recorder.add_observed(model_like)
        groups = recorder.variables()
        coords: dict[str, Any] = recorder.labels()
        self._partner(groups, model_like, views, attrs)
        constants = groups.setdefault("constant_data", {})
        constants |= self._constants(guide_like, model_like, views, constants, attrs)
        self._name_views(groups, views, coords)
        self._describe(guide_like, model_like, views, attrs)
        return Collection(groups, coords, attrs)

    # --- draws -------------------------------------------------------------------------------------------------------

    def _posterior(self, recorder: Recorder, guide_like: Trace, model_like: Trace, bar: Any) -> None:
        programs = self.programs
        replicate = unobserved()(self.model)
        replicated_like: Trace | None = None
        unguided = any(is_latent(site) and name not in guide_like.nodes for name, site in model_like.nodes.items())
        if self.predictive and (unguided or any(is_observation(site) for site in model_like.nodes.values())):
            replicated_like = programs.run(replicate, given=guide_like)

        def one_pass(size: int, where: slice) -> list[tuple[Callable[..., Any], Run]]:
            guide = Run(
                programs.run(self.guide, size=size, given=self._given("posterior", guide_like, where, size)),
                size,
                guide_like,
            )
            model = Run(programs.run(self.model, size=size, given=guide.trace), size, model_like)
            made = [(self.guide, guide), (self.model, model)]
            if replicated_like is not None:
                run = Run(programs.run(replicate, size=size, given=guide.trace), size, replicated_like)
                made.append((replicate, run))
            return made

        size = programs.draws_per_pass(self.num_samples, guide_like, model_like)
        kept: dict[str, list[torch.Tensor]] = {}
        for guide, model, *replicated in programs.passes("posterior", self.num_samples, size, one_pass):
            recorder.add_posterior(guide, model)
            for run in replicated:
                recorder.add_predictive(guide, run)
            self._keep_globals(kept, recorder, guide)
            bar.update(max(guide.size, 1))
        self._set_globals("posterior", kept)

    def _prior(self, recorder: Recorder, bar: Any) -> None:
        programs, program = self.programs, unobserved()(self.model)
        like = programs.run(program)
        programs.measure(like)

        def one_pass(size: int, where: slice) -> list[tuple[Callable[..., Any], Run]]:
            given = self._given("prior", like, where, size)
            return [(program, Run(programs.run(program, size=size, given=given), size, like))]

        size = programs.draws_per_pass(self.num_samples, like)
        kept: dict[str, list[torch.Tensor]] = {}
        for (run,) in programs.passes("prior", self.num_samples, size, one_pass):
            recorder.add_prior(run)
            self._keep_globals(kept, recorder, run)
            bar.update(max(run.size, 1))
        self._set_globals("prior", kept)

    def _given(self, kind: str, like: Trace, where: slice, size: int) -> Trace | None:
        """The global latents of these draws, from the first batch on."""
        if not self.globals.get(kind):
            return None
        return self.programs.given(self.globals[kind], like, where, size)

    def _keep_globals(self, kept: dict[str, list[torch.Tensor]], recorder: Recorder, run: Run) -> None:
        for name, site in run.like.nodes.items():
            if site["type"] == "sample" and not site["is_observed"] and recorder.is_global(site):
                kept.setdefault(name, []).append(
                    per_draw(run.trace.nodes[name]["value"], site["value"].shape, run.size)
                )

    def _set_globals(self, kind: str, kept: dict[str, list[torch.Tensor]]) -> None:
        if kind not in self.globals:
            self.globals[kind] = {name: torch.cat(parts) for name, parts in kept.items()}

    # --- what needs no draws -----------------------------------------------------------------------------------------

    def _partner(
        self, groups: dict[str, Variables], like: Trace, views: tuple[torch.Tensor, ...], attrs: Attributes
    ) -> None:
        """Which candidate of the batch is the partner: draws from `model.partner_logits`, and the truth."""
        partner_logits = getattr(self.model, "partner_logits", None)
        truth: Variables = {"partner": (("item",), np.arange(len(views[0]) if views else 0))}
        if partner_logits is not None and len(views) > 1:
            logits, n = partner_logits(*views), len(views[0])
            if logits.shape != (n, n):
                raise ValueError(
                    f"`model.partner_logits` must return one row of scores per item, ({n}, {n}), got {logits.shape}"
                )
            drawn = torch.distributions.Categorical(logits=logits).sample(torch.Size([self.num_samples]))
            groups.setdefault("posterior_predictive", {})["partner"] = ((*DRAW, "item"), as_array(drawn)[None])
            groups.setdefault("observed_data", {}).update(truth)
        elif len(views) > 1 and any(site_is_factor(site) for site in like.nodes.values()):
            groups.setdefault("observed_data", {}).update(truth)
        if "posterior_predictive" not in groups:
            attrs["posterior_predictive_skipped"] = (
                "the model has no observed site and no method partner_logits(*views)"
                if self.predictive
                else "asked for"
            )

    def _constants(
        self,
        guide_like: Trace,
        model_like: Trace,
        views: tuple[torch.Tensor, ...],
        taken: Mapping[str, Any],
        attrs: Attributes,
    ) -> Variables:
        """Views or their index, tensors among the keyword arguments, parameters."""
        constants: Variables = {}
        length = len(views[0]) if views else None

        def add(name: str, tensor: torch.Tensor, *, by_item: bool) -> None:
            name = safe_name(name) if safe_name(name) not in {*taken, *constants} else f"{safe_name(name)}_value"
            dims = ["item" if by_item and k == 0 else f"{name}_dim_{k}" for k in range(tensor.ndim)]
            constants[name] = (tuple(self.dims.get(name, dims)), as_array(tensor).copy())  # training may go on

        if self.store_views if self.store_views is not None else sum(v.numel() for v in views) <= _STORE_UP_TO:
            for name, view in zip(self._names(views), views, strict=True):
                add(name, view, by_item=True)
        elif length:
            constants["index"] = (("item",), np.arange(length))
        observed = [site["value"] for site in model_like.nodes.values() if is_observation(site)]
        for name, value in self.kwargs.items():
            if isinstance(value, torch.Tensor) and value.numel() <= _STORE_UP_TO and not _among(value, observed):
                add(name, value, by_item=value.ndim > 0 and len(value) == length)
        skipped = []
        for name, site in {**guide_like.nodes, **model_like.nodes}.items():
            if site["type"] != "param" or not isinstance(site["value"], torch.Tensor) or not site["value"].numel():
                continue
            if "$$$" in name or name.rpartition(".")[2].startswith("_"):
                continue  # weights of a network that pyro.module registered; internals of autoguides
            if site["value"].numel() > _STORE_UP_TO:
                skipped.append(name)
            else:
                value = site["value"]
                add(name, value.reshape(()) if value.numel() == 1 else value, by_item=False)
        if skipped:
            attrs["parameters_skipped"] = f"more than {_STORE_UP_TO} numbers each: {', '.join(skipped)}"
        concentration = getattr(self.model, "concentration", None)
        if isinstance(concentration, (int, float)) or (
            isinstance(concentration, torch.Tensor) and concentration.numel() == 1
        ):
            constants["pair_concentration"] = ((), as_array(concentration).reshape(()).astype(np.float64))
        return constants

    def _names(self, views: tuple[torch.Tensor, ...]) -> list[str]:
        return list(self.view_names or [f"x{j + 1}" for j in range(len(views))])

    def _name_views(
        self, groups: dict[str, Variables], views: tuple[torch.Tensor, ...], coords: dict[str, Any]
    ) -> None:
        """Says which site belongs to which view, where the sites are numbered as the views are."""
        sites = [f"z{j + 1}" for j in range(len(views))]
        if sites and all(name in groups["posterior"] for name in sites):
            groups["constant_data"]["site"] = (("view",), np.array(sites))
            coords["view"] = self._names(views)

    def _describe(
        self,
        guide_like: Trace,
        model_like: Trace,
        views: tuple[torch.Tensor, ...],
        attrs: Attributes,
    ) -> None:
        attrs |= {"method": "SVI: draws from the guide", "model": name_of(self.model), "guide": name_of(self.guide)}
        unguided = [n for n, s in model_like.nodes.items() if is_latent(s) and n not in guide_like.nodes]
        if unguided:
            attrs["sites_without_guide"] = ", ".join(unguided)
        factors = [name for name, site in model_like.nodes.items() if site_is_factor(site)]
        if factors and views:
            attrs["batch_relative"] = (
                f"{', '.join(factors)}: relative to the rows of one batch, if contrastive; then arviz.loo and "
                "arviz.compare are not valid on them, diagnostics.partner_check and diagnostics.compare are"
            )
            attrs["batch_size"] = len(views[0])
        rows = [name for name, site in model_like.nodes.items() if site["type"] == "sample" and _is_subsampled(site)]
        if rows:
            attrs["subsampled"] = f"{', '.join(rows)}: one choice of rows for all draws"


def _is_subsampled(site: Site) -> bool:
    return site_is_subsample(site) and len(site["value"]) != site["fn"].size


def _among(value: torch.Tensor, others: Sequence[torch.Tensor]) -> bool:
    return any(value is other or (value.shape == other.shape and torch.equal(value, other)) for other in others)


def checked_pair(model: Any, guide: Any) -> None:
    """Refuses what cannot be called.

    Args:
        model: Pyro program.
        guide: Pyro program.

    Raises:
        TypeError: If one of them is not callable.
    """
    for name, program in (("model", model), ("guide", guide)):
        if not callable(program):
            raise TypeError(f"`{name}` must be callable as {name}(*views), got {type(program).__name__}")


def checked_views(
    views: Sequence[torch.Tensor], num_samples: int, view_names: Sequence[str] | None
) -> tuple[torch.Tensor, ...]:
    """Checks the views of one batch against each other.

    Args:
        views: Tensors with the items in the leading dimension.
        num_samples: Number of draws.
        view_names: Names of the views, or None.

    Returns:
        The views as a tuple.

    Raises:
        TypeError: If they are not a sequence of tensors with at least one dimension.
        ValueError: If they differ in length or hold no item, or if another argument is out of range.
    """
    if isinstance(views, torch.Tensor) or not all(isinstance(view, torch.Tensor) and view.ndim for view in views):
        raise TypeError(
            "`views` must be a tuple of tensors with a leading item dimension; pass (x,) for a single one, and other "
            "arguments in `kwargs`"
        )
    views = tuple(views)
    if views and (len({len(view) for view in views}) != 1 or not len(views[0])):
        raise ValueError(
            f"`views` must be of one length >= 1, got shapes {[tuple(view.shape) for view in views]}; pass tensors "
            "without a dimension for the items in `kwargs`"
        )
    if not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"`num_samples` must be an integer >= 1, got {num_samples!r}")
    if view_names is not None and len(view_names) != len(views):
        raise ValueError(f"`view_names` must name each of the {len(views)} views, got {list(view_names)!r}")
    return views
