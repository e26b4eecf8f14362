"""Seeds that do not collide, and random state that does not leak."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

__all__ = ["derived_seed", "get_random_state", "seed_generators", "seeded", "set_random_state"]


def derived_seed(seed: int, *position: int) -> int:
    """Mix a seed and a position (epoch, batch, ...) into one well-spread 63-bit seed.

    Args:
        seed: Base seed, ``>= 0``.
        *position: Any number of counters, each ``>= 0``.

    Returns:
        A seed for ``torch.Generator.manual_seed``. Different positions give unrelated streams, which
        ``seed + epoch`` does not (epoch 1 of seed 0 would be epoch 0 of seed 1).

    Raises:
        ValueError: If an argument is negative.

    Example:
        >>> derived_seed(0, 1) == derived_seed(1, 0)
        False
    """
    if min(seed, *position, 0) < 0:
        raise ValueError(f"`seed` and positions must be >= 0, got {(seed, *position)!r}")
    entropy = (len(position), seed, *position)  # the length: NumPy pads with zeros, so (1,) would equal (1, 0)
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed PyTorch's global generators inside the block, and put them back as they were at its end.

    Args:
        seed: Seed, in ``0..2**63 - 1``.
        device: The device whose generator is seeded and put back, besides the CPU's.
    """
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed_generators(seed, device)
        yield


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the global generators of the CPU and of one device; unlike ``torch.manual_seed``, of no other.

    Args:
        seed: Seed, in ``0..2**63 - 1``.
        device: CPU or CUDA device.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def get_random_state(device: torch.device) -> dict[str, Tensor]:
    """Copy the state of the global generators of the CPU and of one device.

    Args:
        device: CPU or CUDA device.

    Returns:
        uint8 tensors on the CPU, by the type of the device.
    """
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Put the global generators back.

    Args:
        state: From :func:`get_random_state`; an entry for another type of device is left out.
        device: CPU or CUDA device.
    """
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
