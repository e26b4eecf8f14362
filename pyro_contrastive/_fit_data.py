"""The stream of batches of a fit: how long it is, its first batch, and where it goes on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from pyro_contrastive._fit_state import FitState
from pyro_contrastive.ops.random import get_random_state, set_random_state

__all__ = ["peek", "stream", "to_views", "total_steps"]


def total_steps(data: Iterable[Any], epochs: int | None, steps: int | None) -> int:
    """Give the number of optimiser steps.

    Args:
        data: The batches.
        epochs: Passes over them, or None.
        steps: Steps, or None; exactly one of both is given.

    Raises:
        ValueError: If both or none are given, data without a length are counted in epochs, or there is nothing to do.
    """
    if (epochs is None) == (steps is None):
        raise ValueError(f"give exactly one of `epochs` and `steps`, got epochs={epochs!r}, steps={steps!r}")
    if steps is None:
        if not isinstance(data, Sized):
            raise ValueError(f"`epochs` needs data with a length, got {type(data).__name__}; pass `steps` instead")
        steps = (epochs or 0) * len(data)
    if steps < 1:
        raise ValueError(f"the number of optimiser steps must be >= 1, got {steps!r}")
    return steps


def to_views(batch: Any, num_views: int | None, device: torch.device) -> list[Any]:
    """Take the views of a batch, and move them to a device.

    Args:
        batch: A tuple or list of entries, or a single one.
        num_views: How many leading entries count. None: all.
        device: Where tensors go; other entries stay as they are.

    Raises:
        ValueError: If the batch has fewer entries.
    """
    entries = list(batch) if isinstance(batch, (tuple, list)) else [batch]
    if num_views is not None:
        if len(entries) < num_views:
            raise ValueError(f"a batch must have at least num_views={num_views} entries, got {len(entries)}")
        entries = entries[:num_views]
    return [entry.to(device, non_blocking=True) if isinstance(entry, Tensor) else entry for entry in entries]


def peek(data: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """Look at the first batch without losing it.

    Args:
        data: The batches.

    Returns:
        The first batch, and data that still begin with it.

    Raises:
        ValueError: If there is none.
    """
    if hasattr(data, "seek"):
        data.seek(0, 0)
    iterator = iter(data)
    try:
        first = next(iterator)
    except StopIteration:
        raise ValueError(
            "`data` gave no batch; is it an iterator that was used up, or a data set of no items?"
        ) from None
    one_shot = iterator is data and not hasattr(data, "seek")
    return first, chain([first], iterator) if one_shot else data


def stream(data: Iterable[Any], state: FitState) -> Iterator[Any]:
    """Give batches without end, from where ``state`` stands; a pass begun before is replayed with its random state.

    Args:
        data: The batches of one pass.
        state: Its position is read at the start of each pass, and moved on at the end.

    Raises:
        ValueError: If a pass is empty.
    """
    while True:
        skip, now = state.batch, get_random_state(state.device)
        if skip:
            set_random_state(state.epoch_random_state, state.device)
        else:
            state.epoch_random_state = now
        if hasattr(getattr(data, "sampler", None), "set_epoch"):
            data.sampler.set_epoch(state.epoch)  # type: ignore[attr-defined]
        if hasattr(data, "seek"):
            data.seek(state.epoch, skip)
            iterator = iter(data)
        else:
            iterator = iter(data)
            for _ in range(skip):
                next(iterator, None)
        if skip:
            set_random_state(now, state.device)
        yield from iterator
        if state.batch == 0:
            raise ValueError(
                f"`data` gave nothing more after {state.step} steps; pass a loader that can be iterated again, "
                "or fewer `steps`"
            )
        state.epoch, state.batch = state.epoch + 1, 0
