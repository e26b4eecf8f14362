"""From plain labelled arrays to what the installed ArviZ works with: `InferenceData` (0.x) or `DataTree` (1.x)."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from pyro_contrastive.diagnostics._recorder import Variables

__all__ = ["Attributes", "build", "datasets", "describe", "name_of"]

Attributes = dict[str, str | int | float]

_ORDER = (
    "posterior",
    "posterior_predictive",
    "predictions",
    "log_likelihood",
    "sample_stats",
    "prior",
    "prior_predictive",
    "observed_data",
    "constant_data",
    "predictions_constant_data",
)


def describe(**entries: str | int | float) -> Attributes:
    """Attributes that every result carries: versions, time, and the given entries.

    Args:
        entries: Further attributes.

    Returns:
        Plain strings and numbers, as netCDF has types for.
    """
    import arviz

    try:
        own = version("pyro-contrastive")
    except PackageNotFoundError:  # run from a source tree
        own = "not installed"
    return {
        "inference_library": "pyro",
        "inference_library_version": version("pyro-ppl"),
        "torch_version": str(torch.__version__),  # its own subclass of str has no netCDF type
        "pyro_contrastive_version": own,
        "arviz_version": arviz.__version__,
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
        **entries,
    }


def name_of(program: Callable[..., Any]) -> str:
    """Name of a Pyro program for the attributes: that of its class or function."""
    if isinstance(program, torch.nn.Module):
        return type(program).__name__
    return getattr(program, "__qualname__", type(program).__name__)


def datasets(
    groups: Mapping[str, Variables],
    coords: Mapping[str, Sequence[Any]],
    attrs: Mapping[str, str | int | float],
    known: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """One xarray dataset per group that has variables, in the order that ArviZ lists them.

    Args:
        groups: Variables by group.
        coords: Labels of dimensions that the user gave; others count from 0.
        attrs: Attributes of each dataset.
        known: Labels that the library knows: names, and rows of subsampled dimensions.

    Returns:
        `xarray.Dataset` by group.

    Raises:
        ValueError: If the labels of a dimension are not as many as its size.
    """
    import xarray

    made: dict[str, Any] = {}
    for group in [*(g for g in _ORDER if g in groups), *(g for g in groups if g not in _ORDER)]:
        variables = groups[group]
        if not variables:
            continue
        sizes = {dim: size for v in variables.values() for dim, size in zip(v[0], np.shape(v[1]), strict=True)}
        labels = {dim: _labels(dim, size, coords.get(dim), known.get(dim), group) for dim, size in sizes.items()}
        made[group] = xarray.Dataset(dict(variables), coords=labels, attrs=dict(attrs))
    return made


def _labels(dim: str, size: int, given: Sequence[Any] | None, known: Any, group: str) -> Any:
    """Labels of one dimension; rows of a subsampled dimension pick among the user's labels of all rows."""
    if given is not None and len(given) == size:
        return given
    if known is not None and len(known) == size and (given is None or max(known) < len(given)):
        return known if given is None else np.asarray(given)[known]
    if given is None:
        return np.arange(size)
    raise ValueError(f"`coords` must have one label per entry of `{dim}`, {size} in {group}, got {len(given)}")


def build(
    groups: Mapping[str, Variables],
    coords: Mapping[str, Sequence[Any]],
    attrs: Mapping[str, str | int | float],
    known: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """Builds the container of the installed ArviZ.

    Args:
        groups: Variables by group.
        coords: Labels of dimensions that the user gave.
        attrs: Attributes of the container and of each group.
        known: Labels that the library knows.

    Returns:
        `arviz.InferenceData` (ArviZ 0.x) or `xarray.DataTree` (1.x).
    """
    import arviz
    import xarray

    made = datasets(groups, coords, attrs, known)
    if int(arviz.__version__.split(".")[0]) >= 1:
        tree = xarray.DataTree.from_dict(made)
        tree.attrs.update(attrs)
        return tree
    return arviz.InferenceData(**made, attrs=dict(attrs))
