"""Handwritten digits that ship inside scikit-learn, and a corruption of them whose strength is known."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["corrupt", "load_digits", "shift_and_dropout"]

NUM_TRAIN = 1_400


def load_digits(split: Literal["train", "test"] = "train", *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Load the 1,797 digits of scikit-learn (8 x 8 pixels), split by one fixed permutation.

    Args:
        split: ``"train"`` (1,400 images) or ``"test"`` (the other 397).
        seed: Seed of the permutation that separates the two; the same seed always gives the same split.

    Returns:
        ``(images, labels)``: float32 ``(N, 1, 8, 8)`` in ``[0, 1]`` and int64 ``(N,)`` in ``0..9``.

    Raises:
        ValueError: If ``split`` is neither ``"train"`` nor ``"test"``.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI repository, 1998 (its test part).

    Example:
        >>> images, labels = load_digits("test")
        >>> images.shape, labels.shape
        (torch.Size([397, 1, 8, 8]), torch.Size([397]))
    """
    if split not in ("train", "test"):
        raise ValueError(f"`split` must be 'train' or 'test', got {split!r}")
    from sklearn.datasets import load_digits as sklearn_digits

    data = sklearn_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))
    index = order[:NUM_TRAIN] if split == "train" else order[NUM_TRAIN:]
    images = torch.as_tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16.0
    labels = torch.as_tensor(data.target, dtype=torch.int64)
    return images[index], labels[index]


def corrupt(images: Tensor, level: float | Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Set every pixel to zero with probability ``level``, independently.

    Args:
        images: ``(N, C, H, W)``; all channels of a pixel are dropped together.
        level: Probability in ``[0, 1]``: one number, or one per image, ``(N,)``.
        generator: Source of randomness, on the device of ``images``. Default: PyTorch's global one.

    Returns:
        New images of the same shape; the input is untouched.

    Raises:
        ValueError: If the images are not ``(N, C, H, W)``, or ``level`` is a number outside ``[0, 1]`` or of
            another shape than ``()`` or ``(N,)``.

    Example:
        >>> corrupt(torch.ones(2, 1, 8, 8), torch.tensor([0.0, 1.0])).mean(dim=(1, 2, 3))
        tensor([1., 0.])
    """
    _check_images(images)
    if not isinstance(level, Tensor):
        if not 0.0 <= level <= 1.0:
            raise ValueError(f"`level` is the probability to lose a pixel and must be in [0, 1], got {level!r}")
        level = images.new_full((), level)
    if level.shape not in ((), images.shape[:1]):
        raise ValueError(f"`level` must have shape () or ({len(images)},), got {tuple(level.shape)}")
    n, _, height, width = images.shape
    draw = torch.rand((n, 1, height, width), generator=generator, device=images.device, dtype=images.dtype)
    return images.masked_fill(draw < level.to(images).reshape(-1, 1, 1, 1), 0.0)


def shift_and_dropout(
    images: Tensor, generator: torch.Generator | None = None, *, max_shift: int = 1, max_level: float = 0.8
) -> tuple[Tensor, Tensor]:
    """Augment a batch at once: a random shift, then pixel dropout at a random, *returned* level.

    Each image is moved by a whole number of pixels in ``-max_shift..max_shift`` in both directions (zeros move in),
    then loses every pixel with probability ``level``, uniform on ``[0, max_level]`` and drawn per image.

    Args:
        images: ``(N, C, H, W)``.
        generator: Source of randomness, on the device of ``images``. Default: PyTorch's global one.
        max_shift: Largest shift in pixels, ``>= 0``.
        max_level: Largest dropout level, in ``[0, 1]``.

    Returns:
        ``(view, level)``: the augmented images and the level of each, ``(N,)``, for evaluation.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> view, level = shift_and_dropout(torch.ones(3, 1, 8, 8), torch.Generator().manual_seed(0))
        >>> view.shape, level.shape
        (torch.Size([3, 1, 8, 8]), torch.Size([3]))
    """
    _check_images(images)
    if max_shift < 0:
        raise ValueError(f"`max_shift` must be >= 0 pixels, got {max_shift!r}")
    if not 0.0 <= max_level <= 1.0:
        raise ValueError(f"`max_level` must be in [0, 1], got {max_level!r}")
    n, _, height, width = images.shape
    device = images.device
    offset = torch.randint(-max_shift, max_shift + 1, (2, n, 1), generator=generator, device=device)
    padded = torch.nn.functional.pad(images, (max_shift,) * 4)
    rows = torch.arange(height, device=device) + offset[0] + max_shift  # (N, H)
    columns = torch.arange(width, device=device) + offset[1] + max_shift  # (N, W)
    index = torch.arange(n, device=device)
    shifted = padded[index[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
    level = max_level * torch.rand(n, generator=generator, device=device, dtype=images.dtype)
    return corrupt(shifted, level, generator), level


def _check_images(images: Tensor) -> None:
    if images.ndim != 4:
        raise ValueError(f"`images` must be (N, C, H, W), got {tuple(images.shape)}; add axes with `unsqueeze`")
