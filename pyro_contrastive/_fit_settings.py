"""Arguments of a fit: checked, and settings that hold during it and are put back at its end."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pyro_contrastive.encoding import check_encoding
from pyro_contrastive.schedules import SCHEDULES
from pyro_contrastive.trackers import Tracker
from pyro_contrastive.validation import Validation

__all__ = ["check_arguments", "check_precision", "deterministic_algorithms", "encoder_options", "pick_device"]

_REPRODUCIBLE_CUBLAS = (":4096:8", ":16:8")


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """Turn a name into a device.

    Args:
        device: ``"auto"`` (CUDA when there is one, else the CPU) or anything ``torch.device`` takes.

    Returns:
        The device.

    Raises:
        ValueError: If the name is unknown, or CUDA is asked for and there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"`device` must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {device!r}") from error
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"`device` is {str(device)!r}, but PyTorch sees no CUDA device; pass 'auto' or 'cpu'")
    return picked


def check_arguments(
    lr: float,
    clip_norm: float | None,
    max_seconds: float | None,
    log_every: int,
    schedule: Any,
    ema: float | None,
    validation: Any,
    tracker: Any,
) -> None:
    """Check the arguments of ``fit`` of these names.

    Raises:
        ValueError: If a number or a name is out of its range.
        TypeError: If an object lacks what is needed of it.
    """
    for name, value in (("lr", lr), ("clip_norm", 1.0 if clip_norm is None else clip_norm)):
        if not value > 0.0:
            raise ValueError(f"`{name}` must be > 0, got {value!r}")
    if max_seconds is not None and not max_seconds >= 0.0:
        raise ValueError(f"`max_seconds` must be >= 0 or None, got {max_seconds!r}")
    if log_every < 1:
        raise ValueError(f"`log_every` must be >= 1 step, got {log_every!r}")
    if not callable(schedule) and schedule not in SCHEDULES:
        raise ValueError(f"`schedule` must be a function or one of {sorted(SCHEDULES)}, got {schedule!r}")
    if ema is not None and not 0.0 < ema < 1.0:
        raise ValueError(f"`ema` must lie in (0, 1), the decay of the average, or be None, got {ema!r}")
    if validation is not None and not isinstance(validation, Validation):
        raise TypeError(f"`validation` must be a validation.Validation, got {type(validation).__name__}")
    if validation is not None and validation.use_ema and ema is None:
        raise ValueError("`validation` has use_ema=True, and there is no average; pass `ema=0.999`, for instance")
    if tracker is not None and not isinstance(tracker, Tracker):
        raise TypeError(f"`tracker` must have the methods log, figure and flush, got {type(tracker).__name__}")


def check_precision(precision: str, device: torch.device) -> None:
    """Check that a precision trains on a device.

    Args:
        precision: As in ``fit``.
        device: Where the pair is.

    Raises:
        ValueError: For float16 off CUDA: its gradients need a scaler there is none for.
    """
    if precision == "float16" and device.type != "cuda":
        raise ValueError(f"`precision`='float16' needs a CUDA device, got {str(device)!r}; use 'bfloat16' or 'float32'")


@contextmanager
def encoder_options(modules: Mapping[str, nn.Module], chunk_size: int | None, precision: str) -> Iterator[None]:
    """Set how the encoders of a pair are run.

    Args:
        modules: The modules of the pair.
        chunk_size: Items per chunk. None: as each guide says.
        precision: Of the encoders. ``"float32"``: as each guide says.

    Raises:
        ValueError: If an option is out of its range, or no part of the pair knows it.
    """
    check_encoding(chunk_size, precision)
    given: dict[str, Any] = {} if chunk_size is None else {"chunk_size": chunk_size}
    if precision != "float32":
        given["precision"] = precision
    parts = {part for module in modules.values() for part in module.modules()}
    parts = {part for part in parts if hasattr(part, "chunk_size") and hasattr(part, "precision")}
    if given and not parts:
        raise ValueError(
            f"{given!r} is for recognition modules with attributes `chunk_size` and `precision`, and the pair has "
            "none; use a guide of this package, or encoding.encode in a module of yours with both attributes"
        )
    own = [(part, name, getattr(part, name)) for part in parts for name in given]
    try:
        for part, name, _ in own:
            setattr(part, name, given[name])
        yield
    finally:
        for part, name, value in own:
            setattr(part, name, value)


@contextmanager
def deterministic_algorithms(wanted: bool, device: torch.device) -> Iterator[None]:
    """Let PyTorch use deterministic algorithms only, and refuse operations that have none; then as before.

    Args:
        wanted: Whether to.
        device: Where the pair is.

    Raises:
        ValueError: On CUDA without the environment variable that cuBLAS needs.
    """
    if not wanted:
        yield
        return
    if device.type == "cuda" and os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in _REPRODUCIBLE_CUBLAS:
        found = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
        raise ValueError(
            f"`deterministic` on CUDA needs the environment variable CUBLAS_WORKSPACE_CONFIG to be one of "
            f"{', '.join(_REPRODUCIBLE_CUBLAS)}, got {found!r}; set it before the process starts"
        )
    mode, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    cudnn = torch.backends.cudnn
    own = cudnn.benchmark, cudnn.deterministic
    try:
        torch.use_deterministic_algorithms(True)
        cudnn.benchmark, cudnn.deterministic = False, True
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn_only)
        cudnn.benchmark, cudnn.deterministic = own
