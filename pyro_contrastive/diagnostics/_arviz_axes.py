"""What ArviZ's plots are given: variables out of a container of either line, and axes that pyplot does not know of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_contrastive.diagnostics._style import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DRAW", "MAX_ROWS", "Size", "arviz_module", "as_dataset", "backend_name", "chosen", "collection_on",
           "forest_on", "forget", "group_names", "group_of", "is_1x", "num_rows", "panels_for", "scalars", "selected",
           "tree_of"]  # fmt: skip

Size = tuple[float, float]
DRAW = ("chain", "draw")
MAX_PANELS, MAX_ROWS = 24, 80


def arviz_module() -> Any:
    """ArviZ of either line; what one line lacks is no type error then."""
    import arviz

    return arviz


def is_1x() -> bool:
    """Whether ArviZ of the 1.x line is installed."""
    return int(version("arviz").split(".")[0]) >= 1


def backend_name(az: Any, backend: str | None) -> str:
    """Name of the backend, ArviZ's own setting where none was asked for."""
    return str(az.rcParams["plot.backend"] if backend is None else backend).lower()


def group_names(data: Any) -> list[str]:
    """Names of the groups of a container; none for a data set."""
    groups = getattr(data, "groups", [])
    return [str(name).strip("/") for name in (groups() if callable(groups) else groups)]


def group_of(data: Any, group: str) -> Any:
    """One group of a container, or the data set that was given in its place, as an `xarray.Dataset`."""
    if not hasattr(data, "to_netcdf"):
        raise ValueError(f"`data` must be an ArviZ container, got {type(data).__name__}; `to_arviz` makes one")
    if not hasattr(data, "groups"):
        return data
    if group not in group_names(data):
        raise ValueError(f'`data` has no group "{group}", only {group_names(data)}')
    found = data[group]
    return found.to_dataset() if hasattr(found, "to_dataset") else found


def chosen(names: list[str], wanted: str | Sequence[str] | None) -> list[str]:
    """The variables asked for, all without a wish; a ValueError names those that exist."""
    chosen = names if wanted is None else [wanted] if isinstance(wanted, str) else list(wanted)
    unknown = [name for name in chosen if name not in names]
    if unknown or not chosen:
        raise ValueError(f"`var_names` must be among {names}, got {unknown or chosen}")
    return chosen


def selected(dataset: Any, var_names: str | Sequence[str] | None, coords: Mapping[str, Any] | None) -> Any:
    """The variables asked for, at the labels asked for."""
    dataset = dataset[chosen([str(name) for name in dataset.data_vars], var_names)]
    return dataset.sel({d: list(v) if isinstance(v, range) else v for d, v in coords.items()}) if coords else dataset


def scalars(dataset: Any) -> dict[str, np.ndarray]:
    """Draws (chain, draw) of every entry of every variable, by the name that a panel gets."""
    found = {}
    for name, array in dataset.data_vars.items():
        array = array.transpose(*DRAW, ...)
        for index in np.ndindex(array.shape[2:]):
            place = [str(array[d].values[i]) for d, i in zip(array.dims[2:], index, strict=True)]
            found[f"{name}[{', '.join(place)}]" if place else str(name)] = array.values[(..., *index)]
            if len(found) > MAX_PANELS:
                raise ValueError(f"more than {MAX_PANELS} panels; choose by `var_names` or `coords`")
    return found


def as_dataset(variables: Mapping[str, np.ndarray]) -> Any:
    """Draws (chain, draw) by name as an `xarray.Dataset`."""
    import xarray as xr

    (shape,) = {values.shape for values in variables.values()}
    coords = {name: np.arange(size) for name, size in zip(DRAW, shape, strict=True)}
    return xr.Dataset({name: (DRAW, values) for name, values in variables.items()}, coords=coords)


def tree_of(groups: Mapping[str, Any]) -> Any:
    """Groups as ArviZ 1.x holds them."""
    import xarray as xr

    return xr.DataTree.from_dict(dict(groups))


def panels_for(names: list[str], ax: Any, figsize: Size | None, backend: str) -> list[Any]:
    """One axes per name: the caller's, or new ones; nothing for ArviZ's other backends."""
    if ax is not None:
        given = list(np.ravel(np.array(ax, dtype=object)))
        if len(given) != len(names):
            raise ValueError(f"`ax` must hold {len(names)} axes, one per {names}, got {len(given)}")
        return given
    if backend != "matplotlib":
        return [None] * len(names)
    if len(names) > MAX_PANELS:
        raise ValueError(f"{len(names)} panels are too many, at most {MAX_PANELS}; choose by `var_names`")
    columns = min(len(names), 4)
    rows = -(-len(names) // columns)
    size = figsize or ((5.2, 4.2) if len(names) == 1 else (3.4 * columns, 2.9 * rows))
    grid = new_figure(size).subplots(rows, columns, squeeze=False).ravel()
    for unused in grid[len(names) :]:
        unused.set_axis_off()
    return list(grid[: len(names)])


def collection_on(
    az: Any,
    data: Any,
    ax: Any,
    figsize: Size | None,
    backend: str,
    kwargs: Mapping[str, Any],
    by_variable: bool = True,
    aes: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """The `plot_collection` argument of ArviZ 1.x that makes it draw on our axes; none where it has its own."""
    if "plot_collection" in kwargs or backend != "matplotlib":
        if ax is not None:
            raise ValueError('`ax` is for backend="matplotlib" and without `plot_collection`; give one of them')
        return {}
    names = [str(name) for name in data.data_vars]
    axes = panels_for(names if by_variable else names[:1], ax, figsize, backend)
    if by_variable:
        tree = {"plot": dict(zip(names, axes, strict=True))}
        tree |= {index: dict.fromkeys(names, 0) for index in ("row_index", "col_index")}
        tree["col_index"] = {name: column for column, name in enumerate(names)}
        leaves: dict[str, Any] = {"/": {}}
    else:
        tree, leaves = {}, {"/": {"plot": axes[0], "row_index": 0, "col_index": 0}}
    leaves["/"]["figure"] = axes[0].figure
    return {"plot_collection": az.PlotCollection(data, _viz({**leaves, **tree}), aes=aes, backend="matplotlib")}


def _viz(groups: Mapping[str, Mapping[str, Any]]) -> Any:
    import xarray as xr

    def scalar(value: Any) -> Any:
        if isinstance(value, int):
            return value
        held = np.empty((), dtype=object)
        held[()] = value
        return held

    return xr.DataTree.from_dict(
        {path: xr.Dataset({name: ((), scalar(value)) for name, value in leaf.items()}) for path, leaf in groups.items()}
    )


def num_rows(dataset: Any) -> int:
    """How many rows a forest of these variables has."""
    return sum(int(np.prod([n for d, n in array.sizes.items() if d not in DRAW])) for array in dataset.values())


def forest_on(az: Any, dataset: Any, pair: Any) -> Any:
    """What `plot_forest` of ArviZ 1.x would make for one model and joined chains, on our two axes."""
    import xarray as xr

    columns = ["labels", "forest"]
    dims = ["__variable__", *(d for d in dataset.dims if d not in DRAW)]
    data = dataset.expand_dims(column=2).assign_coords(column=columns)
    viz = xr.Dataset(
        {"plot": ("column", np.array(list(pair), dtype=object)), "row_index": ("column", [0, 0]),
         "col_index": ("column", [0, 1])}, coords={"column": columns},
    )  # fmt: skip
    viz["figure"] = _viz({"/": {"figure": pair[0].figure}}).to_dataset()["figure"]
    heights = list(range(num_rows(dataset) - 1, -1, -1))
    return az.PlotCollection(
        data, xr.DataTree(viz), aes={"y": dims, "overlay": dims}, backend="matplotlib", y=heights
    )  # fmt: skip


def forget(figure: Figure) -> None:
    """Takes a figure that ArviZ made out of pyplot's books; it can still be drawn and saved."""
    from matplotlib import pyplot
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    pyplot.close(figure)
    FigureCanvasAgg(figure)
