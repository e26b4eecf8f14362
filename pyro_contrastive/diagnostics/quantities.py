r"""Scalar test quantities: what a posterior on the sphere is asked about.

A calibration check compares the truth with posterior draws through numbers. A *quantity* is a function ``f(z)`` of
points ``(..., N, d)``, or ``f(z, posterior)`` that also sees the posterior of the N items (of batch shape ``(N,)``),
and gives one number per point, ``(..., N)``. It must not see the truth in any other way. Checks take a mapping from
names to functions:

    quantities = {"angle": angle_to_mean, "dog": cosine_to(prototype), "mine": lambda z: z[..., 0] * z[..., 1]}

Each sees another failure; a posterior may be right about one quantity and wrong about the next. Ranks do not change
under increasing maps of a quantity, so an angle and its cosine give the same test.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from pyro_contrastive.diagnostics._arrays import unit_vectors

__all__ = [
    "Quantities",
    "Quantity",
    "angle_to_mean",
    "angle_to_reference",
    "coordinates",
    "cosine_to",
    "default_quantities",
    "log_density",
]

Quantity = Callable[..., Any]
Quantities = Mapping[str, Quantity]


def angle_to_mean(z: Tensor, posterior: Any) -> Tensor:
    """Angle to the posterior's mean direction: do its credible caps hold what they say?

    Args:
        z: Unit vectors, shape (..., N, d).
        posterior: Law with `mean_direction` or `mean`, batch shape (N,). Where the mean is zero (the uniform law) the
            first axis takes its place.

    Returns:
        Angles in radians, in [0, pi], shape (..., N).
    """
    direction = getattr(posterior, "mean_direction", None)
    if direction is None:
        axis = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)[0]
        mean = torch.where((posterior.mean == 0).all(-1, keepdim=True), axis, posterior.mean)
        direction = torch.nn.functional.normalize(mean, dim=-1)
    return _angle(z, direction)


def log_density(z: Tensor, posterior: Any) -> Tensor:
    """Log density of the posterior: do its highest-density regions hold what they say?

    The PIT value of this quantity is 1 minus the level of the highest-density region that just reaches the truth. For
    laws that are symmetric about their mean direction it is the test of `angle_to_mean` read backwards.

    Args:
        z: Unit vectors, shape (..., N, d).
        posterior: Law with `log_prob`, batch shape (N,).

    Returns:
        Log densities in nats, shape (..., N).
    """
    return posterior.log_prob(z)


def angle_to_reference(seed: int = 0) -> Quantity:
    """Angle to a random reference point, another one for each item of a batch: the test quantity of TARP.

    Args:
        seed: Seed of the references, which depend on nothing else.

    Returns:
        The quantity f(z), in radians; see `tarp`.
    """

    def angle(z: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return _angle(z, torch.nn.functional.normalize(torch.randn(z.shape[-2:], generator=generator), dim=-1).to(z))

    return angle


def cosine_to(direction: ArrayLike | Tensor) -> Quantity:
    """Cosine to a fixed direction, for instance the prototype of a class.

    Args:
        direction: Unit vector, shape (d,).

    Returns:
        The quantity f(z), in [-1, 1].

    Raises:
        ValueError: If `direction` is no unit vector.

    Example:
        >>> cosine_to([0.0, 1.0])(torch.tensor([[0.6, 0.8]]))
        tensor([0.8000])
    """
    axis = torch.from_numpy(unit_vectors(direction, "direction"))
    if axis.dim() != 1:
        raise ValueError(f"`direction` must be one vector of shape (d,), got {tuple(axis.shape)}")
    return lambda z: z @ axis.to(z)


def coordinates(dim: int, *, name: str = "axis") -> dict[str, Quantity]:
    """The coordinates of the point, for posteriors in a known frame: which directions are too narrow, wide or shifted?

    Args:
        dim: How many of them, from the first on, >= 1.
        name: Prefix of their names.

    Returns:
        Quantities by name, "axis0", "axis1", ...

    Raises:
        ValueError: If `dim` < 1.

    Example:
        >>> coordinates(2)["axis1"](torch.tensor([[0.6, 0.8]]))
        tensor([0.8000])
    """
    if dim < 1:
        raise ValueError(f"`dim` must be >= 1, got {dim!r}")
    return {f"{name}{k}": lambda z, k=k: z[..., k] for k in range(dim)}


def default_quantities(dim: int) -> dict[str, Quantity]:
    """What `sbc` asks when it is not told: the angle to the mean, that to random references, the first three axes.

    Args:
        dim: Dimension d >= 2 of the space around the sphere.

    Returns:
        Quantities by name: "angle", "reference", "axis0", "axis1" and, from d = 3 on, "axis2".
    """
    return {"angle": angle_to_mean, "reference": angle_to_reference(), **coordinates(min(dim, 3))}


def bound(quantities: Quantities) -> dict[str, Callable[[Tensor, Any], Tensor]]:
    """Brings every quantity to the form f(z, posterior), with its result checked.

    Args:
        quantities: Functions by name.

    Returns:
        Functions by name that return a finite-or-infinite tensor of the shape of the points without the event.

    Raises:
        TypeError: If `quantities` is no mapping or a value cannot be called.
        ValueError: If it is empty.
    """
    if not isinstance(quantities, Mapping):
        raise TypeError(f"`quantities` must map names to functions, got {type(quantities).__name__}")
    if not quantities:
        raise ValueError("`quantities` must hold at least one function, got none")
    return {name: _bound(name, quantity) for name, quantity in quantities.items()}


def _bound(name: str, quantity: Quantity) -> Callable[[Tensor, Any], Tensor]:
    if not callable(quantity):
        raise TypeError(f"quantity {name!r} must be a function f(z) or f(z, posterior), got {type(quantity).__name__}")
    wants_posterior = _required_arguments(quantity) == 2

    def value(z: Tensor, posterior: Any) -> Tensor:
        found = torch.as_tensor(quantity(z, posterior) if wants_posterior else quantity(z))
        expected = z.shape[: z.dim() - len(posterior.event_shape)]
        if found.shape != expected:
            raise ValueError(
                f"quantity {name!r} must return one number per point, shape {tuple(expected)} for points of shape "
                f"{tuple(z.shape)}, got {tuple(found.shape)}; reduce over the last dimension only"
            )
        if torch.isnan(found).any():
            raise ValueError(f"quantity {name!r} must not be NaN, which no rank can be given to")
        return found

    return value


def _required_arguments(function: Callable[..., Any]) -> int:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return 1
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def _angle(z: Tensor, direction: Tensor) -> Tensor:
    """By the chord, which keeps its precision at small angles."""
    chord = torch.linalg.vector_norm(z - direction, dim=-1)
    return chord.mul_(0.5).clamp_(max=1.0).asin_().mul_(2.0)
