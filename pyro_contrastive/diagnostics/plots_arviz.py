"""ArviZ's own plots under one name for both of its lines, fed with what they have to be fed with.

Each function calls the one of ArviZ (0.x or 1.x) and returns what that returns: matplotlib axes, or arrays of axes, on
0.x and a `PlotCollection` on 1.x. Keyword arguments that are not named here go to ArviZ as they are. With the
matplotlib backend the axes are `ax`, or those of a new figure that pyplot does not know of; with another one ArviZ
makes its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from pyro_contrastive.diagnostics._arrays import FloatArray, as_array
from pyro_contrastive.diagnostics._arviz_axes import (
    DRAW,
    MAX_ROWS,
    Size,
    arviz_module,
    as_dataset,
    backend_name,
    chosen,
    collection_on,
    forest_on,
    forget,
    group_names,
    group_of,
    is_1x,
    num_rows,
    panels_for,
    scalars,
    selected,
    tree_of,
)
from pyro_contrastive.diagnostics._style import new_figure
from pyro_contrastive.diagnostics.calibration import rank_pit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["pit_values", "plot_ecdf_pit", "plot_forest", "plot_khat", "plot_ppc_pit", "plot_rank"]


def pit_values(
    data: Any, *, group: str = "prior_sbc", var_names: str | Sequence[str] | None = None, num_draws: int | None = None
) -> dict[str, FloatArray]:
    """PIT values by name, out of any form they come in.

    Args:
        data: PIT values (N,), or several by name; ranks, with `num_draws`; what `sbc` returns; or an ArviZ container
            or one group of it, whose ranks are recognised by the attribute `num_draws` or a group of PIT values beside
            them (as `SBC.to_arviz` writes both).
        group: Group of a container.
        var_names: Which of them; None takes all.
        num_draws: S, the number of draws behind ranks in 0..S.

    Returns:
        Copies as float64, each of shape (N,).

    Raises:
        ValueError: If there is no such group or name, a value lies outside [0, 1], or ranks come without their S.

    Example:
        >>> pit_values({"angle": [0.25, 0.5]})
        {'angle': array([0.25, 0.5 ])}
    """
    if hasattr(data, "to_netcdf"):
        dataset = group_of(data, group)
        if num_draws is None and (f"{group}_pit" in group_names(data)):
            dataset = group_of(data, f"{group}_pit")
        num_draws = num_draws or dataset.attrs.get("num_draws", getattr(data, "attrs", {}).get("num_draws"))
        values: Mapping[str, Any] = {name: array.values for name, array in dataset.data_vars.items()}
    else:
        values = getattr(data, "pit", data)
        values = values if isinstance(values, Mapping) else {"PIT": values}
    found = {}
    for name in chosen(list(values), var_names):
        array = as_array(values[name])
        is_rank = np.issubdtype(array.dtype, np.integer) or (array.size > 0 and array.max() > 1)
        if is_rank and num_draws is None:
            raise ValueError(
                f"`{name}` holds ranks (up to {array.max()}): without the number of draws S behind them they cannot be "
                "scaled, since the largest observed rank is not S; give `num_draws=S`, or PIT values"
            )
        pit = rank_pit(array.ravel(), int(num_draws or 0)) if is_rank else array.astype(np.float64).ravel()
        if not len(pit) or not np.all((pit >= 0) & (pit <= 1)):
            raise ValueError(f"PIT values must be at least one number in [0, 1]; `{name}` has shape {array.shape} and "
                             f"{int(np.sum(~((pit >= 0) & (pit <= 1))))} other ones")  # fmt: skip
        found[name] = pit.copy()
    return found


def plot_ecdf_pit(
    data: Any,
    *,
    var_names: str | Sequence[str] | None = None,
    group: str = "prior_sbc",
    num_draws: int | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    figsize: Size | None = None,
    backend: str | None = None,
    **kwargs: Any,
) -> Any:
    """ECDF of PIT values minus that of the uniform, one panel per quantity.

    ArviZ 1.x: `plot_ecdf_pit`, whose default "pot_c" tests uniformity and marks the values that speak against it. ArviZ
    0.x: `plot_ecdf` with a simultaneous band. ArviZ scales ranks by the largest one *observed*; what reaches it from
    here are always PIT values.

    Args:
        data: As in `pit_values`.
        var_names: As in `pit_values`.
        group: As in `pit_values`.
        num_draws: As in `pit_values`.
        ax: Axes, as many as there are quantities; a new figure without.
        figsize: Size of the new figure in inches.
        backend: ArviZ's backend; None takes its setting.
        **kwargs: For ArviZ's function.

    Returns:
        0.x: axes, for several quantities an array of them. 1.x: a `PlotCollection`.

    Raises:
        ValueError: As `pit_values`, or if the number of axes does not fit.
    """
    az = arviz_module()
    pits = pit_values(data, group=group, var_names=var_names, num_draws=num_draws)
    if len({len(pit) for pit in pits.values()}) > 1:
        raise ValueError(f"all quantities must have one length, got { {name: len(pit) for name, pit in pits.items()} }")
    backend = backend_name(az, backend)
    if is_1x():
        dataset = as_dataset({name: pit[None] for name, pit in pits.items()})
        kwargs["visuals"] = {"ylabel": {}, **kwargs.get("visuals", {})}
        given = collection_on(az, dataset, ax, figsize, backend, kwargs)
        return az.plot_ecdf_pit(tree_of({group: dataset}), group=group, backend=backend, **given, **kwargs)
    axes = panels_for(list(pits), ax, figsize, backend)
    settings = {
        "cdf": stats.uniform().cdf,
        "rvs": stats.uniform().rvs,
        "eval_points": np.linspace(0.0, 1.0, 201),
        "difference": True,
        "confidence_bands": True,
        "random_state": 0,  # of the simulated band
        **kwargs,
    }
    drawn = []
    for (name, pit), one in zip(pits.items(), axes, strict=True):
        drawn.append(az.plot_ecdf(pit, ax=one, backend=backend, **settings))
        if backend == "matplotlib":
            drawn[-1].set(xlabel="PIT", ylabel="Δ ECDF", title=name)
    return drawn[0] if len(drawn) == 1 else np.array(drawn, dtype=object)


def plot_rank(
    data: Any,
    *,
    var_names: str | Sequence[str] | None = None,
    group: str = "posterior",
    coords: Mapping[str, Any] | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    figsize: Size | None = None,
    backend: str | None = None,
    **kwargs: Any,
) -> Any:
    """Ranks of each chain among all chains: do the chains of an MCMC run agree? ArviZ's `plot_rank` on both lines.

    It compares chains, hence needs two: within one chain the ranks are 1..S whatever it holds, and the plot would look
    perfect. The draws of a guide are one chain, and what `sbc` returns is no chain at all; use `plot_ecdf_pit` or
    `plot_rank_histogram` for ranks of a truth among draws.

    Args:
        data: ArviZ container, or one group of it.
        var_names: Variables; None takes all.
        group: Group of the container.
        coords: Labels of dimensions to keep, e.g. ``{"item": [0, 1]}``; every other combination is a panel.
        ax: Axes, as many as there are panels; a new figure without.
        figsize: Size of the new figure in inches.
        backend: ArviZ's backend; None takes its setting.
        **kwargs: For ArviZ's function.

    Returns:
        0.x: an array of axes (axes, if there is one panel). 1.x: a `PlotCollection`.

    Raises:
        ValueError: For fewer than two chains, more than 24 panels, or axes that do not fit.
    """
    az = arviz_module()
    if not hasattr(data, "to_netcdf"):
        raise ValueError(
            f"`data` must be an ArviZ container with chains, got {type(data).__name__}; for ranks of a truth among "
            "draws use `plot_rank_histogram` or `plot_ecdf_pit`"
        )
    panels = scalars(selected(group_of(data, group), var_names, coords))
    chains = min(array.shape[0] for array in panels.values())
    if chains < 2:
        raise ValueError(
            "rank plots compare chains and need at least 2, got 1: the ranks of one chain are flat whatever it holds. "
            "To check the draws of a guide use `sbc` with `plot_ecdf_pit`"
        )
    dataset, backend = as_dataset(panels), backend_name(az, backend)
    if is_1x():
        by_chain = {"color": ["chain"], "overlay": ["chain"]}  # as ArviZ sets them where it makes the axes itself
        given = collection_on(az, dataset, ax, figsize, backend, kwargs, aes=by_chain)
        return az.plot_rank(tree_of({group: dataset}), group=group, backend=backend, **given, **kwargs)
    axes = panels_for(list(panels), ax, figsize, backend)
    shown = None if axes[0] is None else axes[0] if len(axes) == 1 else np.array(axes, dtype=object)
    if shown is not None:
        kwargs.setdefault("figsize", tuple(axes[0].figure.get_size_inches()))  # ArviZ scales its letters by it
    return az.plot_rank(dataset, ax=shown, backend=backend, **kwargs)


def plot_forest(
    data: Any,
    *,
    var_names: str | Sequence[str] | None = None,
    group: str = "posterior",
    coords: Mapping[str, Any] | None = None,
    combined: bool = True,
    ax: Any = None,
    figsize: Size | None = None,
    backend: str | None = None,
    **kwargs: Any,
) -> Any:
    """Point estimates and credible intervals in rows: ArviZ's `plot_forest` on both lines.

    Args:
        data: ArviZ container, or one group of it. Several models at once are ArviZ's own business: call it directly.
        var_names: Variables; None takes those without a dimension "axis", since the coordinates of a point on the
            sphere mean nothing one by one.
        group: Group of the container.
        coords: Labels of dimensions to keep, e.g. ``{"item": range(20)}``.
        combined: Whether the chains are drawn as one.
        ax: 0.x: axes. 1.x, which draws labels and intervals side by side: a pair of axes. A new figure without.
        figsize: Size of the new figure in inches.
        backend: ArviZ's backend; None takes its setting.
        **kwargs: For ArviZ's function.

    Returns:
        0.x: an array of axes. 1.x: a `PlotCollection`.

    Raises:
        ValueError: For an unknown group or variable, more than 80 rows, or axes that do not fit.
    """
    az = arviz_module()
    dataset = group_of(data, group)
    if var_names is None:
        var_names = [str(name) for name, array in dataset.data_vars.items() if "axis" not in array.dims]
    dataset = selected(dataset, var_names, coords)
    rows = num_rows(dataset)
    if rows > MAX_ROWS:
        raise ValueError(
            f'a forest of {rows} rows is not readable, at most {MAX_ROWS}; choose by `var_names` or by `coords`, e.g. '
            'coords={"item": range(20)}'
        )  # fmt: skip
    backend = backend_name(az, backend)
    figsize = figsize or (6.4, 1.2 + 0.26 * rows)
    if not is_1x():
        if ax is None and backend == "matplotlib":
            wide = 1 + bool(kwargs.get("ess")) + bool(kwargs.get("r_hat"))
            ratios = [3] + [1] * (wide - 1)
            ax = np.atleast_1d(new_figure(figsize).subplots(1, wide, sharey=True, width_ratios=ratios))
            kwargs.setdefault("textsize", 11)
        return az.plot_forest(dataset, combined=combined, ax=ax, backend=backend, **kwargs)
    given = {}
    if backend == "matplotlib" and "plot_collection" not in kwargs and (combined or ax is not None):
        pair = new_figure(figsize).subplots(1, 2, sharey=True, width_ratios=[1, 3]) if ax is None else np.ravel(ax)
        if len(pair) != 2 or not combined:
            raise ValueError(
                f"ArviZ 1.x draws labels and intervals on two axes and with combined=True only, got {len(pair)} axes "
                f"and combined={combined}; leave `ax` away, or give `plot_collection` as ArviZ has it"
            )
        given["plot_collection"] = forest_on(az, dataset, pair)
    figure_kwargs = {"figure_kwargs": {"figsize": figsize}} if not given and "plot_collection" not in kwargs else {}
    drawn = az.plot_forest(
        tree_of({group: dataset}), group=group, combined=combined, backend=backend, **given, **figure_kwargs, **kwargs
    )
    if "plot_collection" in given:
        pair[0].set_ylim(-0.6, rows - 0.4)
    elif figure_kwargs and backend == "matplotlib":
        forget(drawn.viz["figure"].item())
    return drawn


def plot_ppc_pit(
    data: Any,
    *,
    var_names: str | Sequence[str] | None = None,
    group: str = "posterior_predictive",
    ax: Axes | Sequence[Axes] | None = None,
    figsize: Size | None = None,
    backend: str | None = None,
    **kwargs: Any,
) -> Any:
    """PIT of observed data under the posterior predictive: ArviZ's `plot_ppc_pit` on 1.x.

    ArviZ 0.x has no such plot; there the randomised PIT, P(y' < y) + u P(y' = y), is drawn as by `plot_ecdf_pit`.

    The index of the partner among the candidates (`partner`, what a contrastive model predicts) is a name and no
    quantity: its PIT depends on the order in which the candidates stand, and for a model that knows nothing it is
    perfectly uniform. It is left out, and refused if it is all there is: `plot_reliability` shows such predictions.

    Args:
        data: ArviZ container with the groups `group` and "observed_data".
        var_names: Variables; None takes all quantities that both groups have.
        group: Group of the predictive draws.
        ax: Axes, as many as there are variables; a new figure without.
        figsize: Size of the new figure in inches.
        backend: ArviZ's backend; None takes its setting.
        **kwargs: For ArviZ's function.

    Returns:
        0.x: axes, for several variables an array of them. 1.x: a `PlotCollection`.

    Raises:
        ValueError: If a group or variable is missing, or is the index of a partner.
    """
    az = arviz_module()
    predicted, observed = group_of(data, group), group_of(data, "observed_data")
    names = chosen([str(name) for name in predicted.data_vars if name in observed.data_vars], var_names)
    indices = [name for name in names if _is_index(observed[name].values)]
    if var_names is None and len(indices) < len(names):
        names, indices = [name for name in names if name not in indices], []
    if indices:
        raise ValueError(
            f"`{indices[0]}` is the index of a candidate, not a quantity: its PIT depends on the order of the "
            "candidates and says nothing; use `partner_check` with `plot_reliability`"
        )
    predicted, observed = predicted[names], observed[names]
    if is_1x():
        backend = backend_name(az, backend)
        given = collection_on(az, observed, ax, figsize, backend, kwargs)
        tree = tree_of({group: predicted, "observed_data": observed})
        return az.plot_ppc_pit(tree, group=group, backend=backend, **given, **kwargs)
    rng, pits = np.random.default_rng(0), {}
    for name in names:
        draws, truth = predicted[name], observed[name]
        below, same = (draws < truth).mean(DRAW).values, (draws == truth).mean(DRAW).values
        pits[name] = (below + rng.uniform(size=below.shape) * same).ravel()
    return plot_ecdf_pit(pits, ax=ax, figsize=figsize, backend=backend, **kwargs)


def plot_khat(
    khat: Any,
    *,
    good_k: float | None = None,
    ax: Axes | None = None,
    figsize: Size | None = None,
    backend: str | None = None,
    **kwargs: Any,
) -> Any:
    """Pareto k-hat of every item with the line up to which it is reliable: ArviZ's `plot_khat` on both lines.

    Args:
        khat: What `guide_khat` returns, values (N,), or what `arviz.loo` returns.
        good_k: Largest reliable value. None takes that of `khat`, or .7.
        ax: Axes to draw on; a new figure without.
        figsize: Size of the new figure in inches.
        backend: ArviZ's backend; None takes its setting.
        **kwargs: For ArviZ's function; its `threshold` names the items above.

    Returns:
        0.x: axes. 1.x: a `PlotCollection`.

    Raises:
        ValueError: If the values are no vector.
    """
    import xarray as xr

    az = arviz_module()
    if hasattr(khat, "pareto_k"):
        values, labels = khat.pareto_k, None
        good_k = getattr(khat, "good_k", None) if good_k is None else good_k
    else:
        values, labels = getattr(khat, "khat", khat), getattr(khat, "items", None)
        good_k = getattr(khat, "threshold", None) if good_k is None else good_k
    if not isinstance(values, xr.DataArray):
        array = as_array(values).astype(np.float64)
        if array.ndim != 1 or not len(array):
            raise ValueError(f"`khat` must hold at least one value in a vector (N,), got shape {array.shape}")
        coords = {} if labels is None or callable(labels) else {"item": as_array(labels)}
        values = xr.DataArray(array, dims=["item"], coords=coords, name="pareto_k")
    good_k, backend = 0.7 if good_k is None else float(good_k), backend_name(az, backend)
    if not is_1x():
        kwargs = {"show_hlines": True, **kwargs}
        (one,) = panels_for(["khat"], ax, figsize, backend)
        if one is not None:
            kwargs.setdefault("figsize", tuple(one.figure.get_size_inches()))  # ArviZ scales its letters by it
        elpd = az.stats.ELPDData([values, good_k], index=["pareto_k", "good_k"])
        return az.plot_khat(elpd, ax=one, backend=backend, **kwargs)
    kwargs["visuals"] = {"hlines": {}, **kwargs.get("visuals", {})}
    given = collection_on(az, values.to_dataset(name="pareto_k"), ax, figsize, backend, kwargs, by_variable=False)
    return az.plot_khat(SimpleNamespace(pareto_k=values, good_k=good_k), backend=backend, **given, **kwargs)


def _is_index(observed: np.ndarray) -> bool:
    """Whether the observed values are 0, 1, ..., N - 1 in this order: names of candidates."""
    return bool(np.issubdtype(observed.dtype, np.integer) and np.array_equal(observed, np.arange(observed.size)))
