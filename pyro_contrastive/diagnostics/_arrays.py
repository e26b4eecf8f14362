"""Small NumPy helpers that the diagnostics share: tensors in, arrays out, angles without cancellation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

__all__ = ["FloatArray", "as_array", "derived_seed", "geodesic_angle", "unit_vectors"]

FloatArray = NDArray[np.float64]


def as_array(values: ArrayLike | torch.Tensor) -> NDArray[Any]:
    """Returns a NumPy array on the CPU, detached; bfloat16, which NumPy lacks, becomes float32.

    Args:
        values: A tensor (any device, with or without gradient) or anything that NumPy can read.

    Returns:
        The same values with the same shape.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    return np.asarray(values)


def derived_seed(seed: int, purpose: str) -> int:
    """Seed of a stream that shares nothing with streams of the same `seed` elsewhere.

    Posterior draws that reuse the stream which made the data are correlated with the truth they are judged by, and
    `torch.manual_seed(0)` in both places is all it takes.

    Args:
        seed: The user's seed, >= 0.
        purpose: What the stream is for; different purposes give unrelated streams.

    Returns:
        An integer in [0, 2**32).
    """
    return int(np.random.SeedSequence([seed, *purpose.encode()]).generate_state(1)[0])


def unit_vectors(values: ArrayLike | torch.Tensor, name: str, *, tolerance: float = 1e-3) -> FloatArray:
    """Returns `values` as float64 after checking that they lie on the sphere.

    Args:
        values: Vectors of shape (..., d).
        name: How error messages call them.
        tolerance: Largest accepted distance of a norm from 1; what is accepted is normalised exactly.

    Returns:
        The unit vectors, shape (..., d), float64.

    Raises:
        ValueError: If the last dimension is missing or < 2, or if a norm is not 1.
    """
    array = as_array(values).astype(np.float64)
    if array.ndim < 1 or array.shape[-1] < 2:
        raise ValueError(f"`{name}` must have shape (..., d) with d >= 2, got {array.shape}")
    norm = np.linalg.norm(array, axis=-1, keepdims=True)
    if not np.all(np.abs(norm - 1.0) <= tolerance):
        worst = norm.flat[np.argmax(np.abs(norm - 1.0))]
        raise ValueError(
            f"`{name}` must hold unit vectors, got a norm of {worst:.4g}; normalise over the last dimension"
        )
    return array / norm


def geodesic_angle(x: FloatArray, y: FloatArray) -> FloatArray:
    r"""Angle between unit vectors in radians, accurate near 0 and near :math:`\pi` (no `arccos`).

    Args:
        x: Unit vectors, shape (..., d).
        y: Unit vectors, shape (..., d), broadcast against `x`.

    Returns:
        Angles in [0, pi], shape (...).

    Example:
        >>> import numpy as np
        >>> float(geodesic_angle(np.array([1.0, 0.0]), np.array([1.0, 1e-12]))) == 1e-12
        True
    """
    return 2.0 * np.arctan2(np.linalg.norm(x - y, axis=-1), np.linalg.norm(x + y, axis=-1))
