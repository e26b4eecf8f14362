"""From Pyro's MCMC to ArviZ, on both of its lines; ArviZ 1.x has no `from_pyro` of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from pyro_contrastive.diagnostics._arrays import as_array
from pyro_contrastive.diagnostics._container import Attributes, build, describe, name_of
from pyro_contrastive.diagnostics._passes import Programs, Run, given_values, is_deterministic, is_latent
from pyro_contrastive.diagnostics._recorder import DRAW, Recorder, Variables, safe_name
from pyro_contrastive.diagnostics._run import evaluation

__all__ = ["from_pyro"]

Samples = Mapping[str, torch.Tensor | ArrayLike]


def from_pyro(
    posterior: Any = None,
    *,
    prior: Samples | None = None,
    posterior_predictive: Samples | None = None,
    log_likelihood: bool | None = True,
    predictions: Samples | None = None,
    constant_data: Samples | None = None,
    predictions_constant_data: Samples | None = None,
    observed_data: Samples | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    pred_dims: Mapping[str, Sequence[str]] | None = None,
    num_chains: int = 1,
    attrs: Mapping[str, str | int | float] | None = None,
    progress: bool = False,
) -> Any:
    """Lays out a finished `pyro.infer.MCMC` run for ArviZ; takes the arguments of `arviz.from_pyro` of ArviZ 0.x.

    Groups, variables and values are those of ArviZ 0.23, and the same on ArviZ 1.x. On top of them there are:
    deterministic sites in posterior; `acceptance_rate` (chain: the share of transitions that moved), `step_size` (one
    chain only: Pyro keeps that of the last) and `log_p` (chain, draw: log joint density of the constrained values, as
    the model scores them) in sample_stats. Pyro keeps no energies. Deterministic sites and factors are no observed
    data here. Where a model cannot be run for many draws at once, its log likelihood is computed one draw after the
    other (ArviZ 0.x leaves it out); entries that a mask excludes are 0.

    Args:
        posterior: A `pyro.infer.MCMC` after `run`, with any kernel and number of chains.
        prior: Prior draws by site, (draws, ...), for example of `Predictive(model, num_samples=...)`; sites that are
            not in the posterior go to prior_predictive.
        posterior_predictive: Draws by site, (chains * draws, ...) or (chains, draws, ...).
        log_likelihood: Whether to compute the pointwise log likelihood; None is True.
        predictions: Draws out of sample, as `posterior_predictive`.
        constant_data: Arrays by name.
        predictions_constant_data: Arrays by name.
        observed_data: Arrays by name, instead of the values of the model's observed sites.
        coords: Labels of dimensions.
        dims: Names of the dimensions of a variable without (chain, draw); by default `w_dim_0`, ...
        pred_dims: The same for `predictions`.
        num_chains: Number of chains of the dictionaries when there is no `posterior`.
        attrs: Further attributes of the result and of each group.
        progress: Whether to show a progress bar.

    Returns:
        `arviz.InferenceData` (ArviZ 0.x) or `xarray.DataTree` (1.x).

    Raises:
        TypeError: If `posterior` is no MCMC run.
        ValueError: If it has not been run, if nothing is given, or if the sizes of `coords` or `dims` do not match.

    Example:
        >>> import pyro, torch
        >>> from pyro.infer import MCMC, NUTS
        >>> def model():
        ...     pyro.sample("x", pyro.distributions.Normal(0.0, 1.0))
        >>> mcmc = MCMC(NUTS(model), num_samples=5, warmup_steps=5, disable_progbar=True)
        >>> mcmc.run()
        >>> from_pyro(mcmc)["posterior"]["x"].dims
        ('chain', 'draw')
    """
    dims = dims or {}
    groups: dict[str, Variables] = {}
    info: Attributes = {}
    if posterior is not None:
        chains, draws = _checked(posterior)
        samples = {name: as_array(value) for name, value in posterior.get_samples(group_by_chain=True).items()}
        groups["posterior"] = _variables(samples, dims)
        groups["sample_stats"] = _sample_stats(posterior, chains, draws)
        info = {"method": type(posterior.kernel).__name__}
        _replay(posterior, groups, info, log_likelihood is not False, observed_data is None, dims, progress)
    else:
        first = next((given for given in (predictions, posterior_predictive, prior) if given), None)
        if first is None and not constant_data and not predictions_constant_data and not observed_data:
            raise ValueError(
                "from_pyro needs a `posterior`, or one of `prior`, `posterior_predictive`, `predictions`, got none"
            )
        chains = num_chains
        draws = len(as_array(next(iter(first.values())))) // chains if first else 0
        samples = {}
    for group, given, names in (
        ("posterior_predictive", posterior_predictive, dims),
        ("predictions", predictions, pred_dims or {}),
    ):
        if given:
            arrays = {name: _by_chain(name, as_array(value), chains, draws) for name, value in given.items()}
            groups[group] = _variables(arrays, names)
    for name, value in (prior or {}).items():
        array = as_array(value)
        # Predictive pads global sites by dimensions of size one; ArviZ 0.x drops all of that size
        shape = samples[name].shape[2:] if name in samples else tuple(size for size in array.shape[1:] if size > 1)
        group = "prior" if name in samples or not samples else "prior_predictive"
        groups.setdefault(group, {}).update(_variables({name: array.reshape(1, len(array), *shape)}, dims))
    for group, given in (
        ("observed_data", observed_data),
        ("constant_data", constant_data),
        ("predictions_constant_data", predictions_constant_data),
    ):
        if given:
            arrays = {name: as_array(value) for name, value in given.items()}
            names = (pred_dims or {}) if group.startswith("predictions") else dims
            groups[group] = _variables(arrays, names, leading=())
    return build(groups, coords or {}, {**describe(**info), **(attrs or {})})


def _checked(posterior: Any) -> tuple[int, int]:
    if not (hasattr(posterior, "get_samples") and hasattr(posterior, "kernel")):
        raise TypeError(
            f"`posterior` must be a pyro.infer.MCMC run, got {type(posterior).__name__}; for a model and guide trained "
            "by SVI use diagnostics.to_arviz"
        )
    if getattr(posterior, "_samples", None) is None:
        raise ValueError("`posterior` must have been run, got no samples; call posterior.run(...) first")
    return posterior.num_chains, posterior.num_samples


def _sample_stats(posterior: Any, chains: int, draws: int) -> Variables:
    """What the kernel reported per chain."""
    reports = [report or {} for report in getattr(posterior, "_diagnostics", [])]
    stats: Variables = {}
    if reports and all("divergences" in report for report in reports):
        diverging = np.zeros((chains, draws), dtype=bool)
        for chain, report in enumerate(reports):
            diverging[chain, [int(k) for k in report["divergences"]]] = True
        stats["diverging"] = (DRAW, diverging)
    if reports and all("acceptance rate" in report for report in reports):
        rates = np.array([float(report["acceptance rate"]) for report in reports])
        stats["acceptance_rate"] = (("chain",), rates, {"meaning": "share of transitions that moved"})
    try:
        step_size = float(posterior.kernel.step_size)
    except (AttributeError, TypeError, ValueError):  # a kernel without steps
        return stats
    if chains == 1:
        stats["step_size"] = (("chain",), np.array([step_size]), {"meaning": "after warm-up"})
    return stats


def _replay(
    posterior: Any,
    groups: dict[str, Variables],
    info: Attributes,
    log_likelihood: bool,
    observed: bool,
    dims: Mapping[str, Sequence[str]],
    progress: bool,
) -> None:
    """Runs the model on the draws: log likelihood, log joint, deterministic sites, observed data."""
    from tqdm.auto import tqdm

    model: Callable[..., Any] | None = getattr(posterior.kernel, "model", None)
    if model is None:
        info["log_likelihood_skipped"] = "the kernel was given a potential function, not a model"
        return
    info["model"] = name_of(model)
    samples = dict(posterior.get_samples(group_by_chain=True))
    chains, draws = posterior.num_chains, posterior.num_samples
    flat = {name: value.detach().reshape(chains * draws, *value.shape[2:]) for name, value in samples.items()}
    programs = Programs(tuple(posterior._args), dict(posterior._kwargs))
    recorder = Recorder(None, dims, name_plates=False)
    with evaluation(model):
        like = programs.run(model, given=given_values({name: value[0] for name, value in flat.items()}))
        missing = [name for name, site in like.nodes.items() if is_latent(site) and name not in samples]
        if observed:
            recorder.add_observed(like)
        if missing:
            info["log_likelihood_skipped"] = f"latent sites without samples: {', '.join(missing)}"
        elif log_likelihood or any(is_deterministic(site) for site in like.nodes.values()):
            programs.measure(like)

            def one_pass(size: int, where: slice) -> list[tuple[Callable[..., Any], Run]]:
                given = programs.given({name: flat[name] for name in flat if name in like.nodes}, like, where, size)
                return [(model, Run(programs.run(model, size=size, given=given), size, like))]

            total = chains * draws
            with tqdm(total=total, desc="log likelihood", disable=not progress) as bar:
                for (run,) in programs.passes("posterior", total, programs.draws_per_pass(total, like), one_pass):
                    recorder.add_replayed(run, log_likelihood)
                    bar.update(max(run.size, 1))
            info["log_likelihood_draws"] = programs.how("posterior")
    for group, variables in recorder.variables().items():
        made = {
            name: (v if group == "observed_data" else (v[0], v[1].reshape(chains, draws, *v[1].shape[2:]), *v[2:]))
            for name, v in variables.items()
        }
        groups.setdefault(group, {}).update(made)


def _by_chain(name: str, array: np.ndarray, chains: int, draws: int) -> np.ndarray:
    """Brings (chains * draws, ...) or (chains, draws, ...) to the latter; anything else is one chain."""
    if array.shape[:2] == (chains, draws):
        return array
    if array.ndim and len(array) == chains * draws:
        return array.reshape(chains, draws, *array.shape[1:])
    if not array.ndim:
        raise ValueError(f"`{name}` must have draws in its first dimension, got a scalar")
    return array[None]


def _variables(
    arrays: Mapping[str, np.ndarray], dims: Mapping[str, Sequence[str]], leading: tuple[str, ...] = DRAW
) -> Variables:
    made: Variables = {}
    for name, array in arrays.items():
        given = tuple(dims.get(name, ()))
        rest = array.ndim - len(leading)
        if len(given) > rest:
            raise ValueError(f"`dims` must name at most {rest} dimensions of `{name}` {array.shape}, got {given}")
        names = (*given, *(f"{safe_name(name)}_dim_{k}" for k in range(len(given), rest)))
        made[safe_name(name)] = ((*leading, *names), array)
    return made
