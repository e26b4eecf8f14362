"""Posteriors of more items than fit in memory: encoded batch by batch into parts on the disk, by several processes.

A data set of embeddings is a folder. Process r of R writes ``part-r-k`` (a parquet file or a zarr group of its
own) and a list of what it has finished; a part counts once it is on that list, so that after a kill nothing is lost but
the part under way. All parts together are the data set: :func:`open_embedding` reads them, :func:`merge_embedding`
makes one file of them, and parquet readers take the folder as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from pyro.distributions import Categorical, Delta
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_contrastive._embedding_parts import read_part, require, write_part, write_parts
from pyro_contrastive.aggregates import law_parameters
from pyro_contrastive.diagnostics._run import evaluation
from pyro_contrastive.distributed import process_rank

__all__ = ["Embedding", "embed", "merge_embedding", "open_embedding"]

Format = Literal["zarr", "parquet"]
VERSION = 1


def embed(
    guide: Any,
    batches: Iterable[tuple[Sequence[Any] | Tensor, Tensor]],
    out: str | os.PathLike[str],
    *,
    format: Format = "zarr",  # noqa: A002 (what everybody calls it)
    part_items: int = 65_536,
    config: Mapping[str, str | int | float] | None = None,
    resume: bool = True,
    progress: bool | str = True,
) -> Embedding:
    """Write the posterior of every item to a folder; memory is that of one part, whatever the number of items.

    Of several processes (``torch.distributed``) each brings its own share of the items and writes its own parts; nobody
    waits for anybody.

    Args:
        guide: Recognition module with ``posterior(x)``; run in eval mode, where its parameters are, and left as it was.
        batches: Iterable of ``(ids, x)``: n strings or integers, and ``(n, ...)`` inputs. An object with a method
            ``seek(epoch, batch)`` (:class:`pyro_contrastive.data.FolderImages`) goes on in the middle; of any other,
            the batches that were already embedded are drawn again and dropped. They must come in the same order.
        out: Folder of the data set, made when missing.
        format: ``"zarr"`` or ``"parquet"``; each is an extra.
        part_items: Least number of items in a part but the last, ``>= 1``; whole batches.
        config: Numbers and strings of yours that identify the data set; other ones are refused on resuming.
        resume: Go on with what is there. False: refuse a folder that holds a data set.
        progress: Show a progress bar; a string is its label.

    Returns:
        The data set, of all processes as far as they are.

    Raises:
        TypeError: For a guide without ``posterior(x)``.
        ValueError: If an argument is out of its range; for ids that do not fit their inputs; and if the folder holds
            embeddings of another model, format, configuration or number of processes, or of other items.
        ImportError: If the format's library is missing.

    Example:
        >>> import tempfile
        >>> from pyro_contrastive import guides
        >>> guide = guides.VonMisesFisher(nn.Linear(8, 16), dim=3)
        >>> batches = [(["a", "b"], torch.randn(2, 8)), (["c"], torch.randn(1, 8))]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = embed(guide, batches, folder, progress=False)
        ...     len(made), made.load()["mean_direction"].shape
        (3, (3, 3))
    """
    if not callable(getattr(guide, "posterior", None)):
        raise TypeError(f"`guide` must be a recognition module with a method posterior(x), got {type(guide).__name__}")
    if format not in get_args(Format):
        raise ValueError(f"`format` must be one of {', '.join(get_args(Format))}, got {format!r}")
    if not isinstance(part_items, int) or part_items < 1:
        raise ValueError(f"`part_items` must be an integer >= 1, got {part_items!r}")
    require(format)
    folder = Path(out)
    rank, ranks = process_rank()
    about = {
        "version": VERSION,
        "format": format,
        "ranks": ranks,
        "guide": type(guide).__name__,
        "weights": _fingerprint(guide),
        "config": dict(config or {}),
    }
    _begin(folder, about, resume)
    journal = _Journal(folder, rank, format)
    if not journal.complete:
        label = progress if isinstance(progress, str) else "embed"
        bar = tqdm(desc=label, unit="item", initial=journal.items, disable=not progress or rank > 0)
        with bar, evaluation(guide) as device:
            _write_parts(guide, batches, journal, part_items, device, bar)
    return open_embedding(folder)


@dataclass(frozen=True)
class Embedding:
    """A data set of embeddings on the disk.

    Attributes:
        path: Its folder.
        about: Format, class of the guide, hash of its weights, number of processes, configuration.
        parts: The finished parts, by process and in order.
        items: Number of items in them.
        complete: Whether every process has come to its end.
        skipped: Ids of items that could not be read.
    """

    path: Path
    about: dict[str, Any]
    parts: tuple[Path, ...]
    items: int
    complete: bool
    skipped: tuple[str, ...]

    def __len__(self) -> int:
        return self.items

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """The parts one after the other: ``id`` (n,) and the parameters (n, ...), by name."""
        for part in self.parts:
            yield read_part(part)

    def load(self) -> dict[str, np.ndarray]:
        """Everything in memory.

        Raises:
            ValueError: If there is nothing yet.
        """
        if not self.parts:
            raise ValueError(f"{self.path} has no finished part yet")
        parts = list(self)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def open_embedding(path: str | os.PathLike[str]) -> Embedding:
    """Read what :func:`embed` wrote, of all processes, finished or not.

    Args:
        path: The folder.

    Raises:
        FileNotFoundError: If it holds no data set of embeddings.
        ValueError: If it is of a version that this one cannot read.
    """
    folder = Path(path)
    try:
        about = json.loads((folder / "_embedding.json").read_text())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder} holds no embeddings (no _embedding.json); embed(guide, batches, out)"
        ) from None
    if about.get("version") != VERSION:
        raise ValueError(f"{folder} must hold embeddings of version {VERSION}, got {about.get('version')!r}")
    journals = [_Journal(folder, rank, about["format"]) for rank in range(about["ranks"])]
    return Embedding(
        path=folder,
        about=about,
        parts=tuple(journal.path(k) for journal in journals for k in range(len(journal.parts))),
        items=sum(journal.items for journal in journals),
        complete=all(journal.complete for journal in journals),
        skipped=tuple(name for journal in journals for name in journal.skipped),
    )


def merge_embedding(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """Make one zarr group or one parquet file of all parts, a part at a time.

    Args:
        source: Folder from :func:`embed`; complete.
        target: File to write, ending in ``.zarr`` or ``.parquet``; it appears when it is complete.

    Returns:
        The target.

    Raises:
        ValueError: For another suffix, a target that is there, or a data set that is not complete.
    """
    found, path = open_embedding(source), Path(target)
    if path.suffix.removeprefix(".") not in get_args(Format):
        raise ValueError(f"`target` must end in .zarr or .parquet, got {path.name!r}")
    if path.exists():
        raise ValueError(f"{path} is there already; delete it, or choose another `target`")
    if not found.complete or not found.parts:
        raise ValueError(f"{found.path} is not complete ({found.items} items so far); call embed again to go on")
    write_parts(path, iter(found))
    return path


# --------------------------------------------------------------------------------------------------------------------


class _Journal:
    """What one process has finished; replaced in one move after every part."""

    def __init__(self, folder: Path, rank: int, kind: str) -> None:
        self.folder, self.rank, self.kind = folder, rank, kind
        self.file = folder / f"_rank-{rank:05d}.json"
        state = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.parts: list[dict[str, Any]] = state.get("parts", [])
        self.complete: bool = state.get("complete", False)
        self.skipped: list[str] = state.get("skipped", [])

    @property
    def items(self) -> int:
        return sum(part["items"] for part in self.parts)

    @property
    def batches(self) -> int:
        return sum(part["batches"] for part in self.parts)

    def path(self, number: int) -> Path:
        return self.folder / f"part-{self.rank:05d}-{number:06d}.{self.kind}"

    def add(self, columns: Mapping[str, np.ndarray], batches: int) -> None:
        ids = columns["id"]
        write_part(self.path(len(self.parts)), columns)
        self.parts.append({"items": len(ids), "batches": batches, "last": str(ids[-1])})
        self.save()

    def save(self) -> None:
        _replace(self.file, {"complete": self.complete, "parts": self.parts, "skipped": self.skipped})


def _write_parts(
    guide: Any, batches: Iterable[Any], journal: _Journal, part_items: int, device: torch.device, bar: Any
) -> None:
    before, kept, waiting, count = list(journal.skipped), [], 0, 0
    for ids, x in _from(batches, journal):
        names, count = _ids(ids, len(x)), count + 1
        if len(names):
            law = guide.posterior(x.to(device, non_blocking=True))
            kept.append({"id": names, **_columns(law)})
            waiting += len(names)
            bar.update(len(names))
        journal.skipped = before + list(getattr(batches, "unreadable", []))
        if waiting >= part_items:
            journal.add(_joined(kept), count)
            kept, waiting, count = [], 0, 0
    if kept:
        journal.add(_joined(kept), count)
    journal.complete = True
    journal.save()


def _from(batches: Iterable[Any], journal: _Journal) -> Iterator[Any]:
    """The batches that are not embedded yet."""
    done = journal.batches
    if hasattr(batches, "seek"):
        batches.seek(0, done)
        yield from batches
        return
    iterator = iter(batches)
    last = None
    for number in range(done):
        entry = next(iterator, None)
        if entry is None:
            raise ValueError(f"`batches` ended after {number} of the {done} batches that are embedded already")
        last = _ids(entry[0], len(entry[1]))[-1:] if len(entry[1]) else last
    if done and last is not None and str(last[0]) != journal.parts[-1]["last"]:
        raise ValueError(
            f"`batches` must come in the order in which they were embedded; item {journal.items - 1} is now {last[0]}, "
            f"in {journal.folder}: {journal.parts[-1]['last']}; do not shuffle, or choose another `out`"
        )
    yield from iterator


def _ids(ids: Any, size: int) -> np.ndarray:
    names = np.asarray(ids.cpu() if isinstance(ids, Tensor) else ids)
    if names.shape != (size,) or (size and names.dtype.kind not in "iuU"):
        raise ValueError(
            f"a batch must be (ids, x) with one string or integer per input, got {names.dtype} {names.shape} for "
            f"{size} inputs"
        )
    return names


def _columns(law: Any) -> dict[str, np.ndarray]:
    """The parameters of a batch of laws, by name; under `concentration`, `scale_diag`, ... lies the width."""
    if isinstance(law, Delta):
        tensors = {"mean_direction": law.v}
    elif isinstance(law, Categorical):
        tensors = {"logits": law.logits}
    else:
        tensors = law_parameters(law)
    whole = {name: t.detach().expand(*law.batch_shape, *t.shape[1:]) for name, t in tensors.items()}
    return {name: t.cpu().numpy() for name, t in whole.items()}


def _joined(kept: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([entry[name] for entry in kept]) for name in kept[0]}


def _fingerprint(guide: Any) -> str:
    digest = hashlib.sha256()
    if isinstance(guide, nn.Module):
        for name, tensor in guide.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _begin(folder: Path, about: dict[str, Any], resume: bool) -> None:
    """Say what the folder is, or check that it is that."""
    file = folder / "_embedding.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        others = [p.name for p in folder.iterdir() if not p.name.startswith((".", "_"))]
        if others and about["ranks"] == 1:
            raise ValueError(f"`out` must be a folder of its own, and {folder} holds {others[0]}")
        _replace(file, about)
        return
    found = open_embedding(folder).about
    if not resume:
        raise ValueError(f"{folder} holds embeddings already; delete it, choose another `out`, or pass resume=True")
    differences = [
        f"{key}: {found.get(key)!r} there, {about[key]!r} now" for key in about if found.get(key) != about[key]
    ]
    if differences:
        raise ValueError(
            f"{folder} was begun with something else ({'; '.join(differences)}); delete it, or choose another `out`"
        )
    for leftover in folder.glob(f".part-{process_rank()[0]:05d}-*.tmp"):  # of a process that was killed
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _replace(file: Path, content: Mapping[str, Any]) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with open(temporary, "w") as stream:
        json.dump(content, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)
