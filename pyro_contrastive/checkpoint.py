"""Checkpoint files: written in one move, read without running code, refused with a reason."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

__all__ = ["CheckpointError", "fitted_weights", "load_checkpoint", "save_checkpoint"]

FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used: unreadable, of another format, or of another configuration."""


def save_checkpoint(path: str | os.PathLike[str], payload: dict[str, Any]) -> None:
    """Write a checkpoint so that a reader sees the old file or the new one, never half of one.

    The data go to a temporary file in the same folder, are flushed to the disk, and take the name of the old file in
    one step (``os.replace``). Temporary files that a killed process left there are removed.

    Args:
        path: File to write; missing folders are made. One process at a time writes it.
        payload: Tensors, numbers, strings, and dicts, lists and tuples of them: nothing else survives the safe
            reader (``torch.load(..., weights_only=True)``).

    Raises:
        CheckpointError: If another process writes the same file just now.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    for stale in target.parent.glob(f".{target.name}.*.tmp"):
        stale.unlink(missing_ok=True)
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **payload}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{temporary} was removed while it was written: another process writes {target}; give each its own folder"
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load_checkpoint(path: str | os.PathLike[str], *, expected_config: dict[str, Any] | None = None) -> dict[str, Any]:
    """Read a checkpoint on the CPU, and check that it belongs to a configuration.

    Args:
        path: File written by :func:`save_checkpoint`.
        expected_config: If given, every entry must equal the entry of the same name in ``payload["config"]``.

    Returns:
        The payload.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is truncated or not a checkpoint, or if the configurations differ; the
            message lists what differs.
    """
    path = Path(path)
    way_out = "delete it, choose another `out`, or pass resume=False to start anew"
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} is not a readable checkpoint (truncated?): {reason}; {way_out}") from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        found = payload.get("format") if isinstance(payload, dict) else type(payload).__name__
        raise CheckpointError(f"{path} must be a checkpoint of format {FORMAT}, got {found!r}; {way_out}")
    if expected_config is not None:
        found_config = payload.get("config", {})
        differences = [
            f"{key}: {found_config.get(key)!r} in the file, {value!r} now"
            for key, value in expected_config.items()
            if found_config.get(key) != value
        ]
        if differences:
            raise CheckpointError(f"{path} belongs to another configuration ({'; '.join(differences)}); {way_out}")
    return payload


def fitted_weights(payload: dict[str, Any], *, ema: bool = False) -> dict[str, dict[str, Any]]:
    """Pick the weights that ``fit`` gave back out of its checkpoint.

    A checkpoint holds the last weights, for going on, and those of the best validation, if there was one. A run that
    is done gives back the best ones, an interrupted run the last ones.

    Args:
        payload: From :func:`load_checkpoint`.
        ema: Pick their average over the steps instead.

    Returns:
        State dicts of the modules, by role: ``"model"`` (which holds the guide, if it has it as a part), ``"guide"``.

    Raises:
        CheckpointError: If averages are asked for, and the run kept none.

    Example:
        >>> last, best = {"model": {"w": torch.zeros(1)}}, {"model": {"w": torch.ones(1)}}
        >>> fitted_weights({"modules": last, "best": {"modules": best}, "done": True})["model"]["w"]
        tensor([1.])
    """
    best = payload.get("best") if payload.get("done") else None
    chosen = payload if best is None else best
    if not ema:
        return chosen["modules"]
    if chosen.get("average") is None:
        raise CheckpointError("the run kept no averaged weights; fit it with `ema=...`, or pass ema=False")
    return chosen["average"]["modules"]
