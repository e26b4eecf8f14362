"""One part of a data set of embeddings as a parquet file or a zarr group; it has its name once it is whole."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Columns = Mapping[str, np.ndarray]
_LIBRARY = {"zarr": "zarr", "parquet": "pyarrow"}
_ROWS = 65_536  # of a chunk


def require(kind: str) -> None:
    """Raise ImportError if the library of a format is missing.

    Args:
        kind: ``"zarr"`` or ``"parquet"``.
    """
    if importlib.util.find_spec(_LIBRARY[kind]) is None:
        raise ImportError(
            f"writing .{kind} needs {_LIBRARY[kind]}, which is not installed: pip install 'pyro-contrastive[{kind}]'"
        )


def write_part(path: Path, columns: Columns) -> None:
    """Write columns under a temporary name, then give it the path's.

    Args:
        path: Ends in ``.zarr`` or ``.parquet``; what is there is replaced.
        columns: Arrays of one length.
    """
    write_parts(path, [columns])


def write_parts(path: Path, parts: Iterable[Columns]) -> None:
    """Write parts one after the other into one file; see :func:`write_part`.

    Args:
        path: Ends in ``.zarr`` or ``.parquet``; what is there is replaced.
        parts: At least one; ids may be strings of any length.
    """
    require(path.suffix.removeprefix("."))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _remove(temporary)
    try:
        (_write_zarr if path.suffix == ".zarr" else _write_parquet)(temporary, parts)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except BaseException:
        _remove(temporary)
        raise


def read_part(path: Path) -> dict[str, np.ndarray]:
    """Read the columns of a part.

    Args:
        path: From :func:`write_part`.
    """
    require(path.suffix.removeprefix("."))
    if path.suffix == ".zarr":
        import xarray

        with xarray.open_zarr(path, chunks=None, consolidated=False) as data:
            data = data.load()
            return {str(name): _plain(data[name].values) for name in sorted(data.data_vars, key=_order)}
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    made = {}
    for name in sorted(table.column_names, key=_order):
        column = table.column(name).combine_chunks()
        shape = [len(column)]
        while hasattr(column.type, "list_size"):
            shape.append(column.type.list_size)
            column = column.flatten()
        made[name] = _plain(column.to_numpy(zero_copy_only=False).reshape(shape))
    return made


def _order(name: Any) -> tuple[bool, str]:
    return name != "id", str(name)


def _plain(values: np.ndarray) -> np.ndarray:
    return np.array(values.tolist(), dtype=str) if values.dtype.kind in "OT" else values


def _write_zarr(path: Path, parts: Iterable[Columns]) -> None:
    import xarray

    for number, columns in enumerate(parts):
        data = xarray.Dataset(
            {
                name: (
                    ("item", *(f"{name}_{axis}" for axis in range(1, values.ndim))),
                    values.astype(object) if values.dtype.kind == "U" else values,  # of any length
                )
                for name, values in columns.items()
            }
        )
        options: dict[str, Any] = {"append_dim": "item"}
        if number == 0:
            chunks = {name: {"chunks": (min(len(v), _ROWS), *v.shape[1:])} for name, v in columns.items()}
            options = {"mode": "w", "encoding": chunks}
        data.to_zarr(path, zarr_format=2, consolidated=False, **options)


def _write_parquet(path: Path, parts: Iterable[Columns]) -> None:
    import pyarrow
    import pyarrow.parquet

    writer = None
    try:
        for columns in parts:
            arrays = {}
            for name, values in columns.items():
                column = pyarrow.array(values.reshape(-1))
                for size in values.shape[:0:-1]:
                    column = pyarrow.FixedSizeListArray.from_arrays(column, size)
                arrays[name] = column
            table = pyarrow.table(arrays)
            writer = writer or pyarrow.parquet.ParquetWriter(path, table.schema)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
