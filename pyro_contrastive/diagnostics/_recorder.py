"""Collects the draws of all ArviZ groups as labelled arrays; scalar quantities of the sites on a sphere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pyro import distributions as pyro_dist
from pyro.poutine.util import site_is_subsample

from pyro_contrastive.diagnostics._arrays import as_array, geodesic_angle
from pyro_contrastive.diagnostics._passes import (
    Run,
    Site,
    Trace,
    is_deterministic,
    is_latent,
    is_observation,
    is_scored,
    per_draw,
)

__all__ = ["Recorder", "Variables", "safe_name"]

Variables = dict[str, tuple[Any, ...]]  # name -> (dimensions, array) or (dimensions, array, attributes)
DRAW = ("chain", "draw")
_WRAPPERS = (
    pyro_dist.MaskedDistribution,
    torch.distributions.Independent,
    pyro_dist.torch_distribution.ExpandedDistribution,
)


def safe_name(name: str) -> str:
    """Name of a site as a variable: "/" (scoped sites) is a path in netCDF and in `DataTree`, so it becomes "."."""
    return name.replace("/", ".")


@dataclass
class _Column:
    """One variable: its draws so far, and what its dimensions mean."""

    batch: tuple[str | None, ...]  # plate of each batch dimension
    event_dim: int
    parts: list[np.ndarray] = field(default_factory=list)

    def joined(self) -> np.ndarray:
        """All draws, (draws, ...); the parts are given up, so that nothing is held twice."""
        whole = np.concatenate(self.parts)
        self.parts = []
        return whole


@dataclass
class Recorder:
    """Collects draws pass by pass.

    Attributes:
        num_items: Length of the views; None without views.
        dims: Names of the dimensions of a variable that the user gave.
        columns: Variables by group and name.
        rows: Labels of subsampled dimensions.
        name_plates: Whether dimensions are called after plates, items and axes; else `w_dim_0`, as ArviZ does.
    """

    num_items: int | None
    dims: Mapping[str, Sequence[str]] = field(default_factory=dict)
    columns: dict[str, dict[str, _Column]] = field(default_factory=dict)
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    name_plates: bool = True

    def __post_init__(self) -> None:
        self.item_plates: set[str] = set()
        self.latents: list[str] = []
        self.shifting: set[str] = set()
        self.directions: dict[str, np.ndarray] = {}

    def learn_plates(self, *traces: Trace) -> None:
        """Finds the plate of the items: the one of the views' length, by preference one that holds data or factors."""
        plates: dict[str, int] = {}
        stacks: list[dict[str, int]] = []
        for trace in traces:
            for site in trace.nodes.values():
                if site["type"] != "sample" or is_deterministic(site):
                    continue
                if site_is_subsample(site):
                    if len(site["value"]) != site["fn"].size:
                        self.rows[site["name"]] = as_array(site["value"])
                    continue
                frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
                fitting = {f.name: f.dim for f in frames if self.num_items in (f.size, f.full_size or f.size)}
                stacks.append(fitting)
                for name in fitting:
                    plates[name] = max(plates.get(name, 0), int(bool(site["is_observed"])))
        best = max(plates.values(), default=0)
        self.item_plates = {name for name, rank in plates.items() if rank == best}
        if "pairs" in self.item_plates:
            self.item_plates = {"pairs"}
        for fitting in stacks:  # two of one length around one site, such as items against items: the innermost
            inside = sorted(self.item_plates & set(fitting), key=lambda name: -fitting[name])
            self.item_plates -= set(inside[1:])

    def is_global(self, site: Site) -> bool:
        """Whether a sample site of a plain run has no dimension for the items, in a plate or without one."""
        if is_deterministic(site) or site_is_subsample(site) or not site["value"].numel():
            return False
        frames = [frame.name for frame in site["cond_indep_stack"] if frame.vectorized]
        batch = site["value"].shape[: site["value"].ndim - site["fn"].event_dim]
        loose = not frames and len(batch) > 0 and batch[-1] == self.num_items
        return not (loose or self.item_plates & set(frames))

    def add_posterior(self, guide: Run, model: Run) -> None:
        """Adds the latent and deterministic values, pointwise log densities and scalar statistics of one pass."""
        for name, site in _sites(guide.trace, is_latent):
            like = guide.like.nodes[name]
            if name not in self.latents:
                self.latents.append(name)
            self._add("posterior", name, site["value"], like, guide.size)
            if like["fn"].event_dim == 1:
                self._add_law(name, site, like, guide.size)
        for run in (guide, model):
            for name, site in _sites(run.trace, is_deterministic):
                if run is guide or name not in guide.trace.nodes:
                    self._add("posterior", name, site["value"], run.like.nodes[name], run.size)
        self.add_likelihood(model)
        log_p, over_items = self._log_density(model, guide)
        log_q, _ = self._log_density(guide, model)
        for name, site in _sites(model.trace, is_latent):
            if name not in guide.trace.nodes:
                log_q = log_q + self._scores(name, site, model, over_items)
        for key, value in {"log_p": log_p, "log_q": log_q, "elbo": log_p - log_q}.items():
            self._put("sample_stats", key, value, ("item plate",) if over_items else (), 0)

    def add_likelihood(self, model: Run) -> None:
        """Adds the pointwise log density of every observed site and factor; masked entries are 0."""
        for name, site in _sites(model.trace, lambda site: is_scored(site) and site["is_observed"]):
            value, mask = site["unscaled_log_prob"], site["mask"]
            if isinstance(mask, torch.Tensor):
                value = torch.where(mask, value, torch.zeros((), dtype=value.dtype, device=value.device))
            elif mask is False:
                value = torch.zeros_like(value)
            like = model.like.nodes[name]
            self._add("log_likelihood", name, value, like, model.size, shape=like["unscaled_log_prob"].shape)

    def add_replayed(self, model: Run, likelihood: bool) -> None:
        """Adds what the model says of given draws: deterministic values, log joint density, pointwise log density."""
        for name, site in _sites(model.trace, is_deterministic):
            self._add("posterior", name, site["value"], model.like.nodes[name], model.size)
        if likelihood:
            self.add_likelihood(model)
            self._put("sample_stats", "log_p", self._log_density(model, model)[0], (), 0)

    def add_prior(self, run: Run) -> None:
        """Adds a pass of the model alone, without its data."""
        for name, site in run.trace.nodes.items():
            if is_observation(site):
                self._add("prior_predictive", name, site["value"], run.like.nodes[name], run.size)
            elif is_latent(site) or is_deterministic(site):
                self._add("prior", name, site["value"], run.like.nodes[name], run.size)

    def add_predictive(self, guide: Run, run: Run) -> None:
        """Adds what a pass of the model without its data drew given the guide: data, and latents of its own."""
        for name, site in run.trace.nodes.items():
            if is_observation(site) or (is_latent(site) and name not in guide.trace.nodes):
                self._add("posterior_predictive", name, site["value"], run.like.nodes[name], run.size)

    def add_observed(self, trace: Trace) -> None:
        """Sets the observed data, which have no draws."""
        for name, site in _sites(trace, is_observation):
            self._add("observed_data", name, site["value"], site, 0)

    def _add_law(self, name: str, site: Site, like: Site, size: int) -> None:
        """Adds concentration and log density of the law of a vector-valued site, and keeps its mean direction."""
        fn = _base(site["fn"])
        batch = like["value"].shape[:-1]
        concentration, direction = getattr(fn, "concentration", None), getattr(fn, "mean_direction", None)
        if isinstance(concentration, torch.Tensor) and concentration.shape == fn.batch_shape:
            self._add("concentration", name, concentration, like, size, shape=batch)
        if isinstance(direction, torch.Tensor):
            directions = as_array(per_draw(direction, like["value"].shape, size))
            first = self.directions.setdefault(name, directions[0])
            if not np.allclose(directions, first, rtol=0.0, atol=1e-5):
                self.shifting.add(name)  # it depends on other latents: no one direction of the law
        if not isinstance(fn, pyro_dist.Delta):
            self._add("log_density", name, site["unscaled_log_prob"], like, size, shape=batch)

    def _log_density(self, run: Run, other: Run) -> tuple[np.ndarray, bool]:
        """Sum of the log densities, (draws, items) when every term of both programs lies in the plate of the items."""
        over_items = all(
            any(frame.name in self.item_plates for frame in site["cond_indep_stack"] if frame.vectorized)
            for each in (run, other)
            for _, site in _sites(each.like, is_scored)
        )
        total: Any = np.zeros(max(run.size, 1))
        for name, site in _sites(run.trace, is_scored):
            scores = self._scores(name, site, run, over_items)
            total = scores + (total if scores.ndim == total.ndim else total[:, None])
        return total, over_items

    def _scores(self, name: str, site: Site, run: Run, over_items: bool) -> np.ndarray:
        """Log density of one site, as scaled in training, summed over all plates, or all but that of the items."""
        like = run.like.nodes[name]
        terms = as_array(per_draw(site["log_prob"], like["log_prob"].shape, run.size))
        keep = {f.dim for f in like["cond_indep_stack"] if f.vectorized and f.name in self.item_plates}
        axes = tuple(k for k in range(1, terms.ndim) if not (over_items and k - terms.ndim in keep))
        return terms.sum(axis=axes)

    def _add(
        self,
        group: str,
        name: str,
        value: torch.Tensor,
        like: Site,
        size: int,
        *,
        shape: Sequence[int] | None = None,
    ) -> None:
        """Adds one value of a pass; `shape` is that of a batch-shaped quantity of the site instead of its value."""
        natural = tuple(like["value"].shape) if shape is None else tuple(shape)
        plates = {frame.dim: frame.name for frame in like["cond_indep_stack"] if frame.vectorized}
        if shape is not None:
            event_dim = 0
        elif is_deterministic(like):  # declares the dimensions of its plates as part of the event
            event_dim = max(len(natural) - max((-dim for dim in plates), default=0), 0)
        else:
            event_dim = like["fn"].event_dim
        depth = len(natural) - event_dim
        batch = tuple(plates.get(position - depth) for position in range(depth))
        self._put(group, name, as_array(per_draw(value, natural, size)), batch, event_dim)

    def _put(self, group: str, name: str, rows: np.ndarray, batch: tuple[str | None, ...], event_dim: int) -> None:
        column = self.columns.setdefault(group, {}).setdefault(name, _Column(batch, event_dim))
        column.parts.append(rows)

    # --- what ArviZ sees ---------------------------------------------------------------------------------------------

    def variables(self) -> dict[str, Variables]:
        """Names the dimensions and adds the scalar quantities of the spherical sites.

        Returns:
            Variables by group; those of observed_data have no (chain, draw). To be called once.

        Raises:
            ValueError: If a latent value is NaN.
        """
        columns = dict(self.columns)
        laws = {key: columns.pop(key, {}) for key in ("concentration", "log_density")}
        arrays = {
            group: {name: column.joined() for name, column in members.items()} for group, members in columns.items()
        }
        for name in self.latents:
            self._refuse_nan(name, arrays["posterior"][name])
        vectors = [name for name, column in columns.get("posterior", {}).items() if column.event_dim == 1]
        spheres = [name for name in vectors if _on_sphere(arrays["posterior"][name])]
        axis = next((arrays["posterior"][name].shape[-1] for name in [*spheres, *vectors]), None)
        groups: dict[str, Variables] = {}
        for group, members in columns.items():
            groups[group] = {}
            for name, column in members.items():
                array = arrays[group][name]
                dims = self._dims(name, column, array.shape[1:], axis, group == "log_likelihood")
                groups[group][safe_name(name)] = (
                    (dims, array[0]) if group == "observed_data" else ((*DRAW, *dims), array[None])
                )
        for name in spheres:
            self._add_sphere(groups, name, laws)
        return groups

    def _add_sphere(self, groups: dict[str, Variables], name: str, laws: Mapping[str, Mapping[str, _Column]]) -> None:
        suffix = _suffix(name)
        dims, draws = groups["posterior"][safe_name(name)][:2]
        mean = None if name in self.shifting else self.directions.get(name)
        origin = "of the law that was drawn from"
        if mean is None or mean.shape != draws.shape[2:]:
            total = draws.mean(axis=(0, 1))
            mean = total / np.maximum(np.linalg.norm(total, axis=-1, keepdims=True), np.finfo(total.dtype).tiny)
            origin = "of the draws"
        groups.setdefault("constant_data", {})[f"mean_direction{suffix}"] = (
            dims[2:],
            mean.astype(draws.dtype),
            {"origin": origin},
        )
        for group in ("posterior", "prior"):
            if safe_name(name) in groups.get(group, {}):
                points = groups[group][safe_name(name)][1]
                groups[group][f"angle{suffix}"] = (
                    dims[:-1],
                    geodesic_angle(points, mean).astype(draws.dtype),
                    {"units": "radians", "from": f"mean_direction{suffix}"},
                )
        for key, columns in laws.items():
            if name in columns:
                values = columns[name].joined()[None]
                groups["posterior"][f"{key}{suffix}"] = (dims[:-1], values.astype(draws.dtype))
        if name in laws["log_density"]:
            level = _hpd_level(groups["posterior"][f"log_density{suffix}"][1])
            groups["posterior"][f"hpd_level{suffix}"] = (dims[:-1], level.astype(draws.dtype))

    def _refuse_nan(self, name: str, array: np.ndarray) -> None:
        if np.issubdtype(array.dtype, np.floating) and np.isnan(array).any():
            draw, *where = (int(k) for k in np.argwhere(np.isnan(array))[0])
            batch = self.columns["posterior"][name].batch
            items = [k for k, plate in zip(where, batch, strict=False) if plate in self.item_plates]
            place = f"item {items[0]}" if items else f"position {tuple(where)}"
            share = float(np.isnan(array).mean())
            raise ValueError(
                f"the posterior must be free of NaN, got NaN at site `{name}`, {place}, draw {draw} ({share:.1%} of "
                "its values); look at that input and at the parameters of the guide, training may have diverged"
            )

    def _dims(
        self, name: str, column: _Column, shape: Sequence[int], axis: int | None, density: bool
    ) -> tuple[str, ...]:
        if name in self.dims:
            given = tuple(self.dims[name])
            if density:
                given = given[: len(shape)]  # a log density has no event dimensions
            if len(given) != len(shape):
                raise ValueError(
                    f"`dims` must name the {len(shape)} dimensions of `{name}` {tuple(shape)}, got {given}"
                )
            return given
        dims: list[str] = []
        for position, size in enumerate(shape):
            plate = column.batch[position] if position < len(column.batch) else None
            last_batch = position == len(column.batch) - 1
            if not self.name_plates:
                label = ""
            elif position >= len(column.batch):
                label = "axis" if column.event_dim == 1 and size == axis else ""
            elif plate in self.item_plates or plate == "item plate":
                label = "item"
            elif plate is None:
                label = "item" if last_batch and size == self.num_items else ""
            else:
                label = f"{plate}_plate" if plate in {*DRAW, "item", "axis"} else safe_name(plate)
            dims.append(label if label and label not in dims else f"{safe_name(name)}_dim_{position}")
        return tuple(dims)

    def labels(self) -> dict[str, np.ndarray]:
        """Which rows a subsampling plate chose, by dimension; they are the same in all draws."""
        return {("item" if name in self.item_plates else safe_name(name)): rows for name, rows in self.rows.items()}


def _sites(trace: Trace, keep: Any) -> Iterator[tuple[str, Site]]:
    return ((name, site) for name, site in trace.nodes.items() if keep(site))


def _base(fn: Any) -> Any:
    """The distribution under masks and expansions."""
    while isinstance(fn, _WRAPPERS):
        fn = fn.base_dist
    return fn


def _suffix(name: str) -> str:
    """What `angle` and the like end in: "1" for "z1", nothing for "z", else an underscore and the whole name."""
    if name[:1] == "z" and (name == "z" or name[1:].isdigit()):
        return name[1:]
    return f"_{safe_name(name)}"


def _on_sphere(draws: np.ndarray) -> bool:
    """Whether vectors of at least two entries all have norm one; one-hot codes have, and are no directions."""
    if draws.shape[-1] < 2 or not np.issubdtype(draws.dtype, np.floating):
        return False
    unit = np.all(np.abs(np.linalg.norm(draws, axis=-1) - 1.0) < 1e-3)
    return bool(unit and np.any(draws != np.rint(draws)))


def _hpd_level(log_density: np.ndarray) -> np.ndarray:
    """Mass of the smallest credible region that reaches each draw: the share of draws that are denser, ties halved."""
    from scipy.stats import rankdata

    return (rankdata(-log_density, axis=1) - 0.5) / log_density.shape[1]
