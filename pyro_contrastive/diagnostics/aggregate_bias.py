"""How much a likelihood ratio loses because R(z) is averaged over a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_contrastive.aggregates import aggregate_log_density, law_like, law_parameters
from pyro_contrastive.diagnostics._arrays import FloatArray, as_array, derived_seed
from pyro_contrastive.diagnostics._draws import device_of
from pyro_contrastive.diagnostics._intervals import mean_and_error
from pyro_contrastive.ops.random import seeded

__all__ = ["AggregateBias", "aggregate_bias"]

_ROWS = 1024  # latents scored against all items at a time


@dataclass(frozen=True, eq=False)
class AggregateBias:
    """Recognition factor by size of the batch, in nats per view; see :func:`aggregate_bias`.

    Attributes:
        size: Items that R(z) averages over, increasing, shape (G,); the last is all of them.
        factor: Mean of log R(z|x) - log R(z), shape (G,).
        bias: `factor` minus the last one, shape (G,). Negative: the batch understates what the latent tells.
        error: Standard error of the bias over items, shape (G,).
    """

    size: NDArray[np.int64]
    factor: FloatArray
    bias: FloatArray
    error: FloatArray


@torch.no_grad()
def aggregate_bias(posterior: Any, *, sizes: Sequence[int] = (16, 64, 256), seed: int = 0) -> AggregateBias:
    r"""Bias of the recognition factor when R(z) is the average of a batch instead of all items.

    With the item itself in the batch the factor is at most log N and, to leading order, too small by
    :math:`\chi^2 / 2N`, where :math:`\chi^2 = E[R(z|x) / R(z)] - 1` says how much denser a posterior is than the
    aggregate. Concentrated posteriors in many dimensions need large batches, or a memory bank.

    Args:
        posterior: recognition laws of M items, batch shape ``(M,)``, in random order.
        sizes: sizes to try, each in 2..M; the items are cut into batches of that size.
        seed: seed of the draws, one latent per item.

    Returns:
        The factor and its bias by size.

    Raises:
        ValueError: for sizes out of their range, or a batch shape that is not ``(M,)``.

    Example:
        >>> from pyro_contrastive.data import SphereWorld
        >>> world = SphereWorld(dim=3, concentration=10.0)
        >>> found = aggregate_bias(world.posterior(world.sample(1024, seed=0)), sizes=[16])
        >>> found.size, bool(found.bias[0] < 0)
        (array([  16, 1024]), True)
    """
    shape = tuple(posterior.batch_shape)
    if len(shape) != 1 or shape[0] < 2:
        raise ValueError(f"`posterior` must have batch shape (M,) with M >= 2 items, got {shape}")
    total = shape[0]
    if not sizes or min(sizes) < 2 or max(sizes) > total:
        raise ValueError(f"`sizes` must be integers in 2..{total}, the number of items, got {list(sizes)!r}")
    with seeded(derived_seed(seed, "aggregate"), device_of(posterior)):
        z = posterior.sample()
    own, parameters = posterior.log_prob(z), law_parameters(posterior)

    def factor(rows: slice, size: int) -> FloatArray:
        """Log ratio of some items to batches of a size, which the items fill."""
        laws = law_like(posterior, {k: v[rows] for k, v in parameters.items()}) if size < total else posterior
        return as_array(own[rows] - aggregate_log_density(z[rows], laws)).astype(np.float64)

    full = np.concatenate([factor(slice(i, i + _ROWS), total) for i in range(0, total, _ROWS)])
    grid = sorted({*sizes, total})
    found = []
    for size in grid[:-1]:
        batches = [factor(slice(i, i + size), size) for i in range(0, total - size + 1, size)]
        found.append(np.concatenate(batches))
    found.append(full)
    off = [value - full[: len(value)] for value in found]
    bias, error = np.array([mean_and_error(value) for value in off]).T
    return AggregateBias(np.array(grid), np.array([v.mean() for v in found]), bias, error)
