"""Argument checks shared by the spherical distributions: the rule, what was got, the way out."""

from __future__ import annotations

import torch
from torch import Tensor

Shape = torch.Size | list[int] | tuple[int, ...]

UNIT_TOLERANCE = 1e-4  # on the norm of a direction; wide enough for float32 vectors that went through a network


def check_float(name: str, value: Tensor) -> None:
    """Raise TypeError unless `value` is a float32 or float64 tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {type(value).__name__}; wrap it in torch.as_tensor")
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"`{name}` must be float32 or float64, got {value.dtype}; call .float() on it")


def check_vectors(name: str, value: Tensor) -> int:
    """Return the dimension d of a ``(..., d)`` tensor, or raise ValueError."""
    if value.dim() < 1 or value.shape[-1] < 2:
        raise ValueError(f"`{name}` must have shape (..., d) with d >= 2, a point of R^d, got {tuple(value.shape)}")
    return value.shape[-1]


def check_same(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both tensors have one dtype and one device."""
    if value.dtype != other.dtype:
        raise TypeError(
            f"`{name}` and `{other_name}` must have one dtype, got {value.dtype} and {other.dtype}; "
            f"call {other_name}.to({name}.dtype)"
        )
    if value.device != other.device:
        raise ValueError(
            f"`{name}` and `{other_name}` must be on one device, got {value.device} and {other.device}; "
            f"call {other_name}.to({name}.device)"
        )


def check_unit(name: str, value: Tensor) -> None:
    """Raise ValueError unless every row has unit length (and no NaN)."""
    norms = torch.linalg.vector_norm(value.detach(), dim=-1)
    wrong = ~((norms - 1).abs() < UNIT_TOLERANCE)  # written so that NaN counts as wrong
    if bool(wrong.any()):
        missing = int(norms.isnan().sum())
        way_out = (
            "look for NaN in the inputs and in the parameters of the network that made it"
            if missing
            else f"pass torch.nn.functional.normalize({name}, dim=-1)"
        )
        raise ValueError(
            f"`{name}` must have rows of unit length, got norm {'nan' if missing else f'{norms[wrong][0].item():.6g}'} "
            f"({missing or int(wrong.sum())} of {norms.numel()} rows); {way_out}"
        )


def check_concentration(value: Tensor) -> None:
    """Raise ValueError unless every concentration is finite and >= 0."""
    detached = value.detach()
    wrong = ~((detached >= 0) & torch.isfinite(detached))
    if bool(wrong.any()):
        raise ValueError(
            f"`concentration` must be finite and >= 0, got {detached[wrong][0].item():.6g} "
            f"({int(wrong.sum())} of {detached.numel()} values); for a point mass use pyro.distributions.Delta"
        )


def check_on_sphere(name: str, value: Tensor, dim: int) -> None:
    """Raise ValueError unless `value` is ``(..., dim)``."""
    if value.dim() < 1 or value.shape[-1] != dim:
        raise ValueError(f"`{name}` must have shape (..., {dim}), a point of R^{dim}, got {tuple(value.shape)}")
