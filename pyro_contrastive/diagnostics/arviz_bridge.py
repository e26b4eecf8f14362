"""From a trained Pyro model/guide pair to ArviZ: `InferenceData` on ArviZ 0.x, `DataTree` on ArviZ 1.x.

The pair may be ours or anybody's: two callables with the same arguments, trained by SVI in any way.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from pyro import distributions as pyro_dist
from pyro import poutine
from pyro.poutine.util import site_is_factor, site_is_subsample
from tqdm.auto import trange

from pyro_contrastive.diagnostics._arrays import as_array, geodesic_angle
from pyro_contrastive.diagnostics._run import evaluation

__all__ = ["to_arviz"]

_STORE_VIEWS_UP_TO = 2**20  # numbers in all views together; larger views are represented by their index

Variables = dict[str, tuple[tuple[str, ...], np.ndarray]]
_DRAW = ("chain", "draw")


def to_arviz(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    views: Sequence[torch.Tensor],
    *,
    num_samples: int = 100,
    seed: int | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    attrs: Mapping[str, str | int | float] | None = None,
    view_names: Sequence[str] | None = None,
    store_views: bool | None = None,
    sbc: Mapping[str, ArrayLike] | None = None,
    prior: bool = True,
    progress: bool = False,
) -> Any:
    """Draws from a trained pair and lays everything out for ArviZ.

    | group | variables |
    | --- | --- |
    | posterior | every latent site of the guide, (chain, draw, item, axis) for points on a sphere; deterministic \
sites; for the spherical site "z1" also `angle1`, the angle in radians of each draw to the mean direction of its \
posterior, and `concentration1` where the family has one |
    | prior | the same sites drawn from the model alone (an InfoNCE model draws them from the recognition law, which \
is its prior in the mean over the items) |
    | posterior_predictive | `partner`: which candidate of the batch is drawn as the partner of each item; needs the \
method `model.partner_logits(*views) -> (N, N)` |
    | log_likelihood | every observed site and factor of the model, by name. The rows of a contrastive factor share \
the batch, so pointwise leave-one-out (`arviz.loo`) is not valid for them |
    | sample_stats | `log_p`, `log_q`, `elbo` as scaled in training; per item where every site allows it |
    | observed_data | `partner`: item i belongs to item i |
    | constant_data | the views, or `index` when they are large; `pair_concentration` (`model.concentration`) and the \
scalar parameters of the model by name |
    | prior_sbc | the PIT values of `sbc`, laid out for `arviz.plot_ecdf_pit` (1.x) |

    The modules run in eval mode, without gradients and with their own random stream; modes, random states and
    parameter store of the caller are left as they were. Draws are made one after the other, so that memory is that of
    one draw plus the result.

    Args:
        model: Pyro program or module, called as `model(*views)`.
        guide: Pyro program or module with the same arguments.
        views: The arguments, tensors with the items in the leading dimension, on the device of the pair.
        num_samples: Number of posterior (and prior) draws, >= 1.
        seed: Seed of the draws; None uses the caller's current random state without advancing it.
        coords: Labels of dimensions, for example `{"item": file_names}`.
        attrs: Further attributes of the result and of each group.
        view_names: Names of the views in constant_data, default x1, x2, ...
        store_views: Whether constant_data holds the views; None stores up to 2**20 numbers.
        sbc: PIT values in [0, 1] by test quantity, each of shape (number of simulations,), see `calibration`.
        prior: Whether to draw from the prior as well. Where the model cannot run without its guide the group is left
            out and the attribute `prior_skipped` says why.
        progress: Whether to show a progress bar.

    Returns:
        `arviz.InferenceData` (ArviZ 0.x) or `xarray.DataTree` (1.x) with chain = 1 and draw = `num_samples`; both have
        `.to_netcdf(path)`.

    Raises:
        TypeError: If `views` is not a sequence of tensors, or the model or guide is not callable.
        ValueError: If `num_samples` < 1, if the views differ in length, if the guide has no latent site, or if names
            in `view_names` and `views` do not match.
    """
    for name, program in (("model", model), ("guide", guide)):
        if not callable(program):
            raise TypeError(f"`{name}` must be callable as {name}(*views), got {type(program).__name__}")
    views = _checked_views(views, num_samples, view_names)
    info: dict[str, str | int | float] = {
        "inference_library": "pyro",
        "inference_library_version": version("pyro-ppl"),
        "torch_version": str(torch.__version__),  # its own subclass of str has no netCDF type
        "pyro_contrastive_version": _own_version(),
        "model": _name_of(model),
        "guide": _name_of(guide),
        "seed": "state of the caller" if seed is None else seed,
    }
    with evaluation(model, guide, seed=seed):
        recorder = _Recorder(num_items=len(views[0]))
        for _ in trange(num_samples, desc="posterior draws", disable=not progress):
            guide_trace = poutine.trace(guide).get_trace(*views)
            model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*views)
            recorder.add_posterior(guide_trace, model_trace)
        if not recorder.means:
            raise ValueError(
                "`guide` must have at least one latent sample site, got none; pass the guide trained by SVI"
            )
        if prior:
            try:
                for _ in trange(num_samples, desc="prior draws", disable=not progress):
                    recorder.add_prior(poutine.trace(model).get_trace(*views))
            except Exception as error:  # whatever somebody's model raises when it has no guide to follow
                recorder.drop("prior")
                info["prior_skipped"] = f"the model did not run without its guide: {type(error).__name__}: {error}"
        partners, reason = _partner_draws(model, views, num_samples)
        constants = _constants(model, model_trace, views, view_names, store_views)
    groups = recorder.groups()
    if partners is None:
        info["posterior_predictive_skipped"] = reason
    else:
        groups["posterior_predictive"] = {"partner": ((*_DRAW, "item"), partners[None])}
    if sbc:
        groups["prior_sbc"] = {name: (_DRAW, np.asarray(pit, dtype=np.float64)[None]) for name, pit in sbc.items()}
    groups["observed_data"] = {"partner": (("item",), np.arange(len(views[0])))}
    groups["constant_data"] = constants
    return _container(groups, coords or {}, {**info, **(attrs or {})})


class _Recorder:
    """Collects the draws of all groups, one trace at a time."""

    def __init__(self, num_items: int) -> None:
        self.num_items = num_items
        self.axis: int | None = None
        self.draws: dict[str, dict[str, list[np.ndarray]]] = {}
        self.dims: dict[str, dict[str, tuple[str, ...]]] = {}
        self.means: dict[str, tuple[np.ndarray | None, np.ndarray | None]] = {}

    def add_posterior(self, guide_trace: poutine.Trace, model_trace: poutine.Trace) -> None:
        for name, site in _latents(guide_trace):
            self._add("posterior", name, site["value"], site)
            if name not in self.means:
                self.means[name] = _direction_and_concentration(site)
        for name, site in [*_deterministics(guide_trace), *_deterministics(model_trace)]:
            # pyro.deterministic declares the plates' dimensions as part of the event
            depth = max((-frame.dim for frame in site["cond_indep_stack"] if frame.vectorized), default=0)
            self._add("posterior", name, site["value"], site, event_dim=max(site["value"].ndim - depth, 0))
        model_trace.compute_log_prob()
        guide_trace.compute_log_prob()
        for name, site in model_trace.nodes.items():
            if (
                site["type"] == "sample"
                and site["is_observed"]
                and not (_is_deterministic(site) or site_is_subsample(site))
            ):
                self._add("log_likelihood", name, site["unscaled_log_prob"], site, event_dim=0)
        log_p, log_q = self._log_density(model_trace), self._log_density(guide_trace)
        if log_p.ndim != log_q.ndim:
            log_p, log_q = log_p.sum(keepdims=False), log_q.sum(keepdims=False)
        for key, value in {"log_p": log_p, "log_q": log_q, "elbo": log_p - log_q}.items():
            self.draws.setdefault("sample_stats", {}).setdefault(key, []).append(np.asarray(value))
            self.dims.setdefault("sample_stats", {})[key] = ("item",) if value.ndim else ()

    def add_prior(self, trace: poutine.Trace) -> None:
        for name, site in _latents(trace):
            self._add("prior", name, site["value"], site)

    def drop(self, group: str) -> None:
        self.draws.pop(group, None)

    def groups(self) -> dict[str, Variables]:
        """Stacks the draws and adds the scalar quantities of the spherical sites."""
        groups: dict[str, Variables] = {}
        for group, variables in self.draws.items():
            groups[group] = {
                name: ((*_DRAW, *self.dims[group][name]), np.stack(draws)[None]) for name, draws in variables.items()
            }
        posterior = groups["posterior"]
        for name, (mean, concentration) in self.means.items():
            dims, draws = posterior[name]
            if not _on_sphere(draws):
                continue
            suffix = name[1:] if name[:1] == "z" and name[1:].isdigit() else "" if name == "z" else f"_{name}"
            if mean is None:
                total = draws.mean(axis=(0, 1))
                mean = total / np.maximum(np.linalg.norm(total, axis=-1, keepdims=True), np.finfo(total.dtype).tiny)
            posterior[f"angle{suffix}"] = (dims[:-1], geodesic_angle(draws, mean).astype(draws.dtype))
            if concentration is not None:
                posterior[f"concentration{suffix}"] = (
                    dims[:-1],
                    np.broadcast_to(concentration, draws.shape[:-1]).astype(draws.dtype),
                )
        return groups

    def _log_density(self, trace: poutine.Trace) -> np.ndarray:
        """Sum of all log-densities, (num_items,) when each of them has one value per item, else a scalar."""
        terms = [
            site["log_prob"]
            for site in trace.nodes.values()
            if site["type"] == "sample" and not site_is_subsample(site) and not _is_deterministic(site)
        ]
        if not terms:
            return np.zeros(())
        if all(term.shape == (self.num_items,) for term in terms):
            return as_array(sum(terms[1:], terms[0]))
        return as_array(sum((term.sum() for term in terms[1:]), terms[0].sum()))

    def _add(
        self, group: str, name: str, value: torch.Tensor, site: Mapping[str, Any], event_dim: int | None = None
    ) -> None:
        array = as_array(value)
        event_dim = site["fn"].event_dim if event_dim is None else event_dim
        self.draws.setdefault(group, {}).setdefault(name, []).append(array)
        if name in self.dims.setdefault(group, {}):
            return
        plates = {frame.dim: frame for frame in site["cond_indep_stack"] if frame.vectorized}
        dims: list[str] = []
        for position in range(array.ndim):
            from_right = position - array.ndim
            if from_right >= -event_dim:
                size = array.shape[position]
                if event_dim == 1:
                    self.axis = size if self.axis is None else self.axis
                dims.append("axis" if event_dim == 1 and size == self.axis else f"{name}_axis{event_dim + from_right}")
                continue
            plate = plates.get(from_right + event_dim)
            is_item = array.shape[position] == self.num_items and from_right == -event_dim - 1
            dims.append("item" if is_item else plate.name if plate is not None else f"{name}_dim{position}")
        self.dims[group][name] = tuple(dims)


def _latents(trace: poutine.Trace) -> list[tuple[str, Mapping[str, Any]]]:
    """Sample sites that carry a latent value: no factors, no auxiliaries, no subsampling, nothing observed."""
    return [
        (name, site)
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not site["is_observed"]
        and not site_is_subsample(site)
        and not site_is_factor(site)
        and not (site["infer"] or {}).get("is_auxiliary")
        and isinstance(site["value"], torch.Tensor)
        and site["value"].numel()
    ]


def _is_deterministic(site: Mapping[str, Any]) -> bool:
    return bool((site["infer"] or {}).get("_deterministic"))


def _deterministics(trace: poutine.Trace) -> list[tuple[str, Mapping[str, Any]]]:
    return [(n, s) for n, s in trace.nodes.items() if s["type"] == "sample" and _is_deterministic(s)]


def _direction_and_concentration(site: Mapping[str, Any]) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Mean direction and concentration of a site's distribution under its masks and expansions, None where missing."""
    fn = site["fn"]
    while isinstance(
        fn,
        (
            pyro_dist.MaskedDistribution,
            torch.distributions.Independent,
            pyro_dist.torch_distribution.ExpandedDistribution,
        ),
    ):
        fn = fn.base_dist
    direction, concentration = getattr(fn, "mean_direction", None), getattr(fn, "concentration", None)
    scalar = isinstance(concentration, torch.Tensor) and concentration.shape == fn.batch_shape
    return (
        as_array(direction) if isinstance(direction, torch.Tensor) else None,
        as_array(concentration) if isinstance(concentration, torch.Tensor) and scalar else None,
    )


def _on_sphere(draws: np.ndarray) -> bool:
    """Whether vectors of at least two entries all have norm one."""
    if draws.ndim < 3 or draws.shape[-1] < 2 or not np.issubdtype(draws.dtype, np.floating):
        return False
    return bool(np.all(np.abs(np.linalg.norm(draws, axis=-1) - 1.0) < 1e-3))


def _partner_draws(
    model: Callable[..., Any], views: Sequence[torch.Tensor], num_samples: int
) -> tuple[np.ndarray | None, str]:
    """Draws (num_samples, N) of the partner of each item, or the reason why there are none."""
    partner_logits = getattr(model, "partner_logits", None)
    if partner_logits is None:
        return None, "the model has no method partner_logits(*views)"
    logits, n = partner_logits(*views), len(views[0])
    if logits.shape != (n, n):
        raise ValueError(
            f"`model.partner_logits` must return one row of scores per item, ({n}, {n}), got {logits.shape}"
        )
    return as_array(torch.distributions.Categorical(logits=logits).sample(torch.Size([num_samples]))), ""


def _constants(
    model: Callable[..., Any],
    model_trace: poutine.Trace,
    views: Sequence[torch.Tensor],
    view_names: Sequence[str] | None,
    store_views: bool | None,
) -> Variables:
    """Views or their index, and the scalars that the model learned or was given."""
    constants: Variables = {}
    if store_views if store_views is not None else sum(view.numel() for view in views) <= _STORE_VIEWS_UP_TO:
        for name, view in zip(view_names or [f"x{j + 1}" for j in range(len(views))], views, strict=True):
            constants[name] = (("item", *(f"{name}_dim{k}" for k in range(view.ndim - 1))), as_array(view))
    else:
        constants["index"] = (("item",), np.arange(len(views[0])))
    for name, site in model_trace.nodes.items():
        if site["type"] == "param" and isinstance(site["value"], torch.Tensor) and site["value"].numel() == 1:
            constants[name] = ((), as_array(site["value"]).reshape(()))
    concentration = getattr(model, "concentration", None)
    if isinstance(concentration, (int, float)) or (
        isinstance(concentration, torch.Tensor) and concentration.numel() == 1
    ):
        constants["pair_concentration"] = ((), as_array(concentration).reshape(()).astype(np.float64))
    return constants


def _container(
    groups: Mapping[str, Variables], coords: Mapping[str, Sequence[Any]], attrs: Mapping[str, str | int | float]
) -> Any:
    """Builds what the installed ArviZ works with out of plain labelled arrays."""
    import arviz
    import xarray

    attrs = {
        **attrs,
        "arviz_version": arviz.__version__,
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
    }
    datasets: dict[str, Any] = {}
    for group, variables in groups.items():
        sizes = {dim: size for dims, array in variables.values() for dim, size in zip(dims, array.shape, strict=True)}
        labels = {dim: coords.get(dim, np.arange(size)) for dim, size in sizes.items()}
        datasets[group] = xarray.Dataset(dict(variables), coords=labels, attrs=dict(attrs))
    if int(arviz.__version__.split(".")[0]) >= 1:
        tree = xarray.DataTree.from_dict(datasets)
        tree.attrs.update(attrs)
        return tree
    return arviz.InferenceData(**datasets, attrs=dict(attrs))


def _checked_views(
    views: Sequence[torch.Tensor], num_samples: int, view_names: Sequence[str] | None
) -> tuple[torch.Tensor, ...]:
    if isinstance(views, torch.Tensor) or not all(isinstance(view, torch.Tensor) and view.ndim for view in views):
        raise TypeError("`views` must be a tuple of tensors with a leading item dimension; pass (x,) for a single one")
    views = tuple(views)
    if not views or len({len(view) for view in views}) != 1 or not len(views[0]):
        raise ValueError(f"`views` must be of one length >= 1, got shapes {[tuple(view.shape) for view in views]}")
    if num_samples < 1:
        raise ValueError(f"`num_samples` must be >= 1, got {num_samples!r}")
    if view_names is not None and len(view_names) != len(views):
        raise ValueError(f"`view_names` must name each of the {len(views)} views, got {list(view_names)!r}")
    return views


def _own_version() -> str:
    try:
        return version("pyro-contrastive")
    except PackageNotFoundError:  # run from a source tree
        return "not installed"


def _name_of(program: Callable[..., Any]) -> str:
    if isinstance(program, torch.nn.Module):
        return type(program).__name__
    return getattr(program, "__qualname__", type(program).__name__)
