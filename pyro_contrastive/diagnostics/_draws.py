"""Posterior draws in pieces, from laws or arrays, without touching the caller's random state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from numpy.typing import ArrayLike
from pyro.distributions import constraints
from torch import Tensor

from pyro_contrastive.diagnostics._arrays import as_array
from pyro_contrastive.ops.random import derived_seed, seeded

__all__ = ["as_draw_of", "batched", "checked_truth", "draw_pieces"]

_NUMBERS = 2**20  # in one piece: it stays near the cache


def batched(law: Any, num_items: int, name: str = "posterior") -> Any:
    """The law with batch shape (N,): one without a batch is the same for all items.

    Args:
        law: Distribution with batch shape (N,) or ().
        num_items: N.
        name: How error messages call it.

    Returns:
        The law, expanded where it has no batch.

    Raises:
        TypeError: If it is no distribution.
        ValueError: If its batch shape is another one.
    """
    if not (hasattr(law, "batch_shape") and callable(getattr(law, "sample", None))):
        raise TypeError(
            f"`{name}` must be a distribution with one member per item, got {type(law).__name__}; "
            "for instance guide.posterior(x)"
        )
    if law.batch_shape == ():
        law = law.expand((num_items,))
    if law.batch_shape != (num_items,):
        raise ValueError(f"`{name}` must have batch shape ({num_items},), got {tuple(law.batch_shape)}")
    return law


def draw_pieces(draws: Any, num_draws: int, seed: int, *, at_least: int = 1) -> Iterator[Tensor]:
    """Yields draws of all items in pieces of about a million numbers.

    Args:
        draws: A distribution with batch shape (N,), or draws that exist already, shape (S, N, ...).
        num_draws: S, for a distribution.
        seed: Seed of the draws, >= 0.
        at_least: Draws per piece, where as many are left.

    Yields:
        Tensors (s, N, ...), s >= 1, S rows in all; each piece has its own stream, and the caller's is left alone.
    """
    given = None if hasattr(draws, "batch_shape") else torch.as_tensor(as_array(draws))
    shape = (*draws.batch_shape, *draws.event_shape) if given is None else given.shape[1:]
    num_draws = num_draws if given is None else len(given)
    size = max(_NUMBERS // max(torch.Size(shape).numel(), 1), at_least)
    for position, start in enumerate(range(0, num_draws, size)):
        if given is not None:
            yield given[start : start + size]
            continue
        with torch.no_grad(), seeded(derived_seed(seed, 1, position), device_of(draws)):
            piece = draws.sample(torch.Size([min(size, num_draws - start)]))
        yield piece


def device_of(law: Any) -> torch.device:
    """Where a distribution draws.

    Args:
        law: The distribution.

    Returns:
        The device of its first tensor, CPU when it has none.
    """
    tensors = [value for value in vars(law).values() if isinstance(value, Tensor)]
    return tensors[0].device if tensors else torch.device("cpu")


def as_draw_of(law: Any, points: ArrayLike | Tensor) -> Tensor:
    """Points on the device and in the precision of a distribution, so that it can score them.

    Args:
        law: The distribution.
        points: Points of its support.

    Returns:
        The points, detached; of unit length in the new precision where the support is the sphere.
    """
    given = points if isinstance(points, Tensor) else torch.as_tensor(as_array(points))
    types = [v.dtype for v in vars(law).values() if isinstance(v, Tensor) and v.is_floating_point()]
    dtype = types[0] if types else given.dtype if given.is_floating_point() else torch.get_default_dtype()
    moved = given.detach().to(device_of(law), dtype)
    # .to float64 keeps the rounding of float32, which is off the sphere there; wrong lengths stay as wrong as they are
    on_sphere = getattr(law, "support", None) is constraints.sphere
    if on_sphere and dtype != given.dtype and ((moved.norm(dim=-1) - 1).abs() < 1e-5).all():
        moved = torch.nn.functional.normalize(moved, dim=-1)
    return moved


def checked_truth(draws: Any, truth: ArrayLike | Tensor) -> Tensor:
    """The truths as a tensor, after checking that there is one per item.

    Args:
        draws: A distribution with batch shape (N,), or draws (S, N, d).
        truth: Points, shape (N, d).

    Returns:
        Tensor (N, d), on the device and in the precision of a distribution.

    Raises:
        ValueError: If the shapes do not fit or a truth is not finite.
    """
    law = hasattr(draws, "batch_shape")
    points = as_draw_of(draws, truth) if law else torch.as_tensor(as_array(truth))
    shape = (*draws.batch_shape, *draws.event_shape) if law else as_array(draws).shape[1:]
    if points.dim() != 2 or tuple(points.shape) != tuple(shape) or not len(points):
        expected = f"the shape of one draw per item {tuple(shape)}"
        raise ValueError(f"`truth` must be (N, d), {expected}, got {tuple(points.shape)}")
    if not torch.isfinite(points).all():
        raise ValueError("`truth` must be finite, got NaN or infinite entries")
    return points
