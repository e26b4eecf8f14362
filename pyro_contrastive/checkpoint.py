"""Checkpoint files: written in one move, read without running code, refused with a reason."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

__all__ = ["CheckpointError", "load_checkpoint", "save_checkpoint"]

FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used: unreadable, of another format, or of another configuration."""


def save_checkpoint(path: str | os.PathLike[str], payload: dict[str, Any]) -> None:
    """Write a checkpoint so that a reader sees the old file or the new one, never half of one.

    The data go to a temporary file in the same folder, are flushed to the disk, and take the name of the old file in
    one step (``os.replace``).

    Args:
        path: File to write; missing folders are made.
        payload: Tensors, numbers, strings, and dicts, lists and tuples of them: nothing else survives the safe
            reader (``torch.load(..., weights_only=True)``).
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **payload}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
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
