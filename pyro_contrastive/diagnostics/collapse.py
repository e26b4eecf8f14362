"""Whether embeddings have collapsed: to a point, or to a few directions, which another figure has to tell."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike

from pyro_contrastive.diagnostics._arrays import FloatArray, unit_vectors

__all__ = ["Spectrum", "embedding_spectrum"]


@dataclass(frozen=True, eq=False)
class Spectrum:
    r"""How embeddings spread over the axes of their space.

    Attributes:
        spread: :math:`\sqrt d` times the mean over axes of the standard deviation: about 1 where the axes are used
            alike, 0 where all embeddings are one point (Chen and He 2021, figure 2). It does *not* see embeddings on a
            line, such as :math:`\pm v`.
        singular_values: Of the centred embeddings over :math:`\sqrt N`, descending, shape (d,); all
            :math:`1/\sqrt d` when uniform.
        effective_rank: exp of the entropy of the singular values scaled to sum to one, 1 on a line and d when uniform
            (Roy and Vetterli 2007; RankMe, Garrido et al. 2023); 0 for one point.
        num_items: N.
        dim: d.
    """

    spread: float
    singular_values: FloatArray
    effective_rank: float
    num_items: int
    dim: int


def embedding_spectrum(embeddings: ArrayLike | torch.Tensor) -> Spectrum:
    """Spread, singular values and effective rank of embeddings.

    Args:
        embeddings: Unit vectors, shape (N, d), N > d: points or mean directions of held-out items.

    Returns:
        The spectrum.

    Raises:
        ValueError: If the shape is another, there are too few items or a vector is not of length one.

    Example:
        >>> line = np.tile([[1.0, 0.0], [-1.0, 0.0]], (5, 1))
        >>> found = embedding_spectrum(line)
        >>> found.singular_values.round(6), round(found.effective_rank, 6)
        (array([1., 0.]), 1.0)
    """
    z = unit_vectors(embeddings, "embeddings")
    if z.ndim != 2 or len(z) <= z.shape[1]:
        raise ValueError(f"`embeddings` must be (N, d) with more items than axes, got {z.shape}; embed more items")
    n, d = z.shape
    centred = z - z.mean(axis=0)
    values = np.linalg.svd(centred, compute_uv=False) / np.sqrt(n)
    total, rank = values.sum(), 0.0
    if total > 1e-6:  # below, the embeddings are one point, and the shape of what is left is rounding
        share = values[values > 0] / total
        rank = float(np.exp(-np.sum(share * np.log(share))))
    return Spectrum(float(np.sqrt(d) * centred.std(axis=0).mean()), values, rank, n, d)
