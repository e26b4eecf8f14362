"""ArviZ files of data that do not fit in memory: batch by batch, straight to netCDF or zarr."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from pyro_contrastive.diagnostics._collect import Collector, checked_pair, checked_views
from pyro_contrastive.diagnostics._container import datasets, describe
from pyro_contrastive.diagnostics._recorder import Variables
from pyro_contrastive.diagnostics._run import evaluation

__all__ = ["stream_arviz"]

_SUFFIXES = (".nc", ".zarr")
_PER_BATCH = ("sample_stats", "log_likelihood", "posterior_predictive", "prior_predictive", "observed_data")
_CHUNK = 2**18  # numbers in one chunk of the file


def stream_arviz(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batches: Iterable[Sequence[torch.Tensor]],
    path: str | os.PathLike[str],
    *,
    num_samples: int = 100,
    seed: int | None = None,
    kwargs: Mapping[str, Any] | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    attrs: Mapping[str, str | int | float] | None = None,
    view_names: Sequence[str] | None = None,
    store_views: bool = False,
    prior: bool = True,
    predictive: bool = True,
    vectorize: bool = True,
    progress: bool = False,
) -> Path:
    """Does what `to_arviz` does for one batch after the other and writes each to a file; memory is that of one batch.

    The file has the groups of `to_arviz`, appended along "item", and `batch` (item) in constant_data. What has no item
    dimension and differs between batches (a joint ELBO, say) gets the dimension "batch". Global latents are drawn with
    the first batch and hold for all of them, so a draw of the file is one draw of the joint posterior; the guide must
    be amortised over the items.

    Contrastive terms are relative to their batch: `log_likelihood`, `elbo` and `partner` (a row of the same batch) of
    two files compare only if the batches have one size.

    The file appears under its name when it is complete. Until then it has a temporary name beside it, which an error or
    an interrupt removes; an older file of the name stays until it is replaced.

    Args:
        model: Pyro program or module, called as `model(*views, **kwargs)`.
        guide: Pyro program or module with the same arguments.
        batches: Tuples of views, for example a `DataLoader`; iterated once. Lengths may differ.
        path: File to write, ending in `.nc` (netCDF 4) or `.zarr` (a folder; needs `pip install
            'pyro-contrastive[zarr]'`). Missing folders are made.
        num_samples: Number of posterior (and prior) draws, >= 1.
        seed: Seed of the draws; None uses the caller's current random state without advancing it.
        kwargs: Keyword arguments of both programs, the same for every batch.
        coords: Labels of dimensions; those of "item" are for all batches together.
        dims: Names of the dimensions of variables, see `to_arviz`.
        attrs: Further attributes.
        view_names: Names of the views, default x1, x2, ...
        store_views: Whether constant_data holds the views too.
        prior: Whether to draw from the prior.
        predictive: Whether to replicate observed sites.
        vectorize: False makes one draw after the other in any case.
        progress: Whether to show a progress bar over the batches.

    Returns:
        The path; open it with `arviz.from_netcdf`, or with `arviz.from_zarr` (ArviZ 1.x) or `xarray.open_datatree`.

    Raises:
        TypeError: If a batch is not a sequence of tensors, or the model or guide is not callable.
        ValueError: If the suffix is unknown, there is no batch, a batch gives other variables than the first, or as
            for `to_arviz`; the message names the batch.
        ImportError: If zarr is asked for and not installed.
        OSError: If the path cannot be written; nothing has been drawn then.

    Example:
        >>> import tempfile, torch
        >>> from pyro_contrastive import guides, models
        >>> guide = guides.VonMisesFisher(torch.nn.Linear(8, 16), dim=3)
        >>> batches = ((torch.randn(4, 8), torch.randn(4, 8)) for _ in range(3))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     stream_arviz(models.MCInfoNCE(guide), guide, batches, f"{folder}/posterior.nc", num_samples=5).name
        'posterior.nc'
    """
    checked_pair(model, guide)
    target = Path(path)
    if target.suffix not in _SUFFIXES:
        raise ValueError(f"`path` must end in {' or '.join(_SUFFIXES)}, got {target.name!r}")
    collector = Collector(
        model,
        guide,
        num_samples,
        kwargs=kwargs or {},
        prior=prior,
        predictive=predictive,
        vectorize=vectorize,
        dims=dims or {},
        view_names=view_names,
        store_views=store_views,
    )
    info = describe(seed="state of the caller" if seed is None else seed)
    writer = (_Zarr if target.suffix == ".zarr" else _NetCDF)(target)
    start = number = 0
    try:
        with evaluation(model, guide, seed=seed):
            for batch in tqdm(batches, desc="batches", disable=not progress):
                views = checked_views(batch, num_samples, view_names)
                if not views:
                    raise ValueError("`batches` must yield tuples of at least one view, got an empty one")
                stop = start + len(views[0])
                try:
                    made = collector.collect(views)
                    groups = _numbered(made.groups, number, start, stop)
                    labels = _labels(coords or {}, number, start, stop)
                    sets = datasets(groups, labels, {**info, **made.attrs, **(attrs or {})}, made.coords)
                    writer.write(sets) if number == 0 else writer.append(sets)
                except ValueError as error:
                    raise ValueError(f"batch {number} (items {start} to {stop - 1}): {error}") from error
                start, number = stop, number + 1
        if not number:
            raise ValueError("`batches` must yield at least one batch, got none; a generator can be iterated only once")
        writer.finish({**info, **made.attrs, **(attrs or {}), "num_batches": number, "num_items": start})
    except BaseException:
        writer.discard()
        raise
    return target


def _numbered(groups: Mapping[str, Variables], number: int, start: int, stop: int) -> dict[str, Variables]:
    """The groups of one batch with the number of the batch, and a dimension for what is one value per batch."""
    made: dict[str, Variables] = {}
    for group, variables in groups.items():
        made[group] = dict(variables)
        if group in _PER_BATCH:
            for name, (names, array, *rest) in variables.items():
                if "item" not in names:
                    made[group][name] = ((*names, "batch"), np.asarray(array)[..., None], *rest)
    constants = made.setdefault("constant_data", {})
    constants["batch"] = (("item",), np.full(stop - start, number))
    constants["index"] = (("item",), np.arange(start, stop))
    return made


def _labels(coords: Mapping[str, Sequence[Any]], number: int, start: int, stop: int) -> dict[str, Any]:
    """The user's labels of this batch; items count on from batch to batch."""
    items = np.asarray(coords["item"]) if "item" in coords else np.arange(stop)
    if len(items) < stop:
        raise ValueError(f"`coords` must label every item, got {len(items)} labels for at least {stop} items")
    return {**coords, "item": items[start:stop], "batch": [number]}


def _growing(dataset: Any) -> str:
    """The dimension along which batches of a dataset are appended, "" when it is the same for all batches."""
    return next((dim for dim in ("item", "batch") if dim in dataset.dims), "")


class _File:
    """What both formats share: a temporary name beside the target, and what may differ between batches."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        self.shapes: dict[str, dict[str, tuple[Any, ...]]] = {}
        target.parent.mkdir(parents=True, exist_ok=True)
        self.discard()
        self.begin()

    def begin(self) -> None:
        """Makes the temporary file, so that a path that cannot be written is known before anything is drawn."""
        raise NotImplementedError

    def discard(self) -> None:
        """Removes the temporary file."""
        if self.temporary.is_dir():
            shutil.rmtree(self.temporary)
        self.temporary.unlink(missing_ok=True)

    @staticmethod
    def _shapes(dataset: Any) -> dict[str, tuple[Any, ...]]:
        return {
            name: tuple((dim, None if dim in ("item", "batch") else size) for dim, size in variable.sizes.items())
            for name, variable in dataset.data_vars.items()
        }

    def _check(self, sets: Mapping[str, Any]) -> None:
        shapes = {group: self._shapes(dataset) for group, dataset in sets.items()}
        self.shapes = self.shapes or shapes
        if shapes != self.shapes:
            ours = {(g, *item) for g, members in shapes.items() for item in members.items()}
            first = {(g, *item) for g, members in self.shapes.items() for item in members.items()}
            other = sorted({f"{group}/{name}" for group, name, _ in ours ^ first}) or sorted(
                set(shapes) ^ set(self.shapes)
            )
            raise ValueError(
                f"every batch must give the variables of the first, in its shapes, got others for {', '.join(other)}"
            )

    def _encoding(self, dataset: Any, key: str) -> dict[str, dict[str, Any]]:
        """Chunks for what grows: whole in all dimensions but the items."""
        encoding = {}
        for name, variable in dataset.variables.items():
            if _growing(variable) and variable.size:
                along = _growing(variable)
                other = max(variable.size // variable.sizes[along], 1)
                rows = max(1, min(max(variable.sizes[along], 64), _CHUNK // other))
                encoding[name] = {key: tuple(rows if d == along else n for d, n in variable.sizes.items())}
        return encoding


class _NetCDF(_File):
    """netCDF 4 through h5netcdf: xarray writes the first batch, which sets names, types and attributes."""

    def begin(self) -> None:
        import xarray

        xarray.Dataset().to_netcdf(self.temporary, mode="w", engine="h5netcdf")

    def write(self, sets: Mapping[str, Any]) -> None:
        """Writes the first batch."""
        self._check(sets)
        for group, dataset in sets.items():
            dataset.to_netcdf(
                self.temporary,
                mode="a",
                group=group,
                engine="h5netcdf",
                unlimited_dims=[dim for dim in ("item", "batch") if dim in dataset.dims],
                encoding=self._encoding(dataset, "chunksizes"),
            )

    def append(self, sets: Mapping[str, Any]) -> None:
        """Appends a later batch."""
        import h5netcdf

        self._check(sets)
        with h5netcdf.File(self.temporary, "r+") as file:
            for group, dataset in sets.items():
                node = file[group]
                starts = {dim: node.dimensions[dim].size for dim in ("item", "batch") if dim in dataset.dims}
                for dim, start in starts.items():
                    node.resize_dimension(dim, start + dataset.sizes[dim])
                for name, variable in dataset.variables.items():
                    along = _growing(variable)
                    if not along:
                        continue
                    stored = node.variables[name]
                    where = tuple(slice(starts[d], None) if d == along else slice(None) for d in variable.dims)
                    values = variable.values
                    stored[where] = values.astype(object if values.dtype.kind in "OU" else stored.dtype)

    def finish(self, attrs: Mapping[str, Any]) -> None:
        """Adds the attributes of the whole and gives the file its name."""
        import h5netcdf

        with h5netcdf.File(self.temporary, "r+") as file:
            file.attrs.update(attrs)
        os.replace(self.temporary, self.target)


class _Zarr(_File):
    """A zarr folder, written by xarray."""

    def begin(self) -> None:
        try:
            import zarr
        except ImportError as error:
            raise ImportError(
                "writing .zarr needs zarr, which is not installed: pip install 'pyro-contrastive[zarr]', or write .nc"
            ) from error
        self.zarr = zarr
        zarr.open_group(str(self.temporary), mode="w", zarr_format=2)

    def write(self, sets: Mapping[str, Any]) -> None:
        """Writes the first batch."""
        self._check(sets)
        for group, dataset in sets.items():
            dataset.to_zarr(
                self.temporary,
                group=group,
                mode="a",
                zarr_format=2,
                consolidated=False,
                encoding=self._encoding(dataset, "chunks"),
            )

    def append(self, sets: Mapping[str, Any]) -> None:
        """Appends a later batch."""
        self._check(sets)
        for group, dataset in sets.items():
            for along in ("item", "batch"):
                names = [name for name, variable in dataset.variables.items() if _growing(variable) == along]
                if names:
                    part = dataset[names]
                    part = part.drop_vars([name for name in part.coords if along not in part[name].dims])
                    part.to_zarr(self.temporary, group=group, append_dim=along, zarr_format=2, consolidated=False)

    def finish(self, attrs: Mapping[str, Any]) -> None:
        """Adds the attributes of the whole and gives the folder its name."""
        self.zarr.open_group(str(self.temporary), mode="a", zarr_format=2).attrs.update(attrs)
        old = self.target.with_name(f"{self.temporary.name}.old")
        if self.target.is_dir():
            os.replace(self.target, old)
        os.replace(self.temporary, self.target)
        shutil.rmtree(old, ignore_errors=True)
