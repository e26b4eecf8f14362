"""Two views of one thing: a wrapper for any torch ``Dataset``, and a fast loader for images held in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pyro_contrastive.ops.random import derived_seed

__all__ = ["TwoViews", "ViewLoader"]


class TwoViews(Dataset):
    """Give two independently transformed views of each item of any map-style data set.

    Args:
        dataset: Its items are an image, or a tuple ``(image, label, ...)`` as torchvision gives them.
        transform: Called once per view, on the image.
        transform2: Another transform for the second view. Default: ``transform`` again.
        return_label: Hand on what follows the image in the item's tuple.
        return_index: Append the index of the item.

    Returns:
        Items are ``(x1, x2[, label, ...][, index])``.

    Raises:
        TypeError: If ``dataset`` has no length or ``transform`` is not callable.

    Example:
        >>> images = [(torch.zeros(2), 7), (torch.ones(2), 3)]
        >>> pairs = TwoViews(images, lambda image: image + 1, lambda image: image - 1)
        >>> pairs[1]
        (tensor([2., 2.]), tensor([0., 0.]), 3)
    """

    def __init__(
        self,
        dataset: Any,
        transform: Callable[[Any], Any],
        transform2: Callable[[Any], Any] | None = None,
        *,
        return_label: bool = True,
        return_index: bool = False,
    ) -> None:
        if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            raise TypeError(f"`dataset` must have `__getitem__` and `__len__`, got {type(dataset).__name__}")
        for name, function in (("transform", transform), ("transform2", transform2 or transform)):
            if not callable(function):
                raise TypeError(f"`{name}` must be callable, got {type(function).__name__}")
        self.dataset = dataset
        self.transform = transform
        self.transform2 = transform2 or transform
        self.return_label = return_label
        self.return_index = return_index

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        item = self.dataset[index]
        image, *rest = item if isinstance(item, (tuple, list)) else (item,)
        views = (self.transform(image), self.transform2(image))
        return views + (tuple(rest) if self.return_label else ()) + ((index,) if self.return_index else ())


class ViewLoader:
    """Iterate over images in memory, augmenting whole batches on the device where the images lie.

    Every batch has its own seed, derived from ``(seed, epoch, batch)``: the loader never touches the global random
    state, gives the same views again for the same position, and can start anywhere (``seek``), which is what
    an exact resume needs. Each complete pass over the loader moves it on by one epoch.

    Args:
        images: ``(N, ...)``, any tensor whose first dimension counts items.
        augment: ``augment(batch, generator)`` gives the view, or a tuple whose first entry is the view (as
            :func:`shift_and_dropout` does).
        labels: ``(N, ...)``, handed on after the views.
        batch_size: Items per batch, in ``1..N``.
        num_views: Views per item, ``>= 1``.
        seed: Base seed, ``>= 0``.
        shuffle: Draw a new order every epoch.
        drop_last: Leave out an incomplete last batch; in-batch negatives want batches of one size.
        return_index: Append the index of each item, int64 ``(batch,)``.

    Returns:
        Batches are ``(x1, .., xJ[, labels][, index])``.

    Raises:
        ValueError: If an argument is out of its range or the lengths differ.

    Example:
        >>> loader = ViewLoader(torch.zeros(10, 3), lambda x, generator: x + 1, batch_size=4)
        >>> [x1.shape[0] for x1, x2 in loader]
        [4, 4]
    """

    def __init__(
        self,
        images: Tensor,
        augment: Callable[[Tensor, torch.Generator], Tensor | tuple[Tensor, ...]],
        *,
        labels: Tensor | None = None,
        batch_size: int = 256,
        num_views: int = 2,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        return_index: bool = False,
    ) -> None:
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"`labels` must be as many as `images`, got {len(labels)} and {len(images)}")
        if not 1 <= batch_size <= len(images):
            raise ValueError(f"`batch_size` must be in 1..{len(images)} (the number of images), got {batch_size!r}")
        if num_views < 1:
            raise ValueError(f"`num_views` must be >= 1, got {num_views!r}")
        derived_seed(seed)  # checks it
        self.images = images
        self.augment = augment
        self.labels = None if labels is None else labels.to(images.device)
        self.batch_size = batch_size
        self.num_views = num_views
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.return_index = return_index
        self.epoch = 0
        self._first_batch = 0

    def __len__(self) -> int:
        full, rest = divmod(len(self.images), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def seek(self, epoch: int, batch: int = 0) -> None:
        """Let the next pass be ``epoch``, without its first ``batch`` batches.

        Args:
            epoch: Epoch, ``>= 0``.
            batch: Batches to skip, in ``0..len(self)``; skipping costs nothing.

        Raises:
            ValueError: If an argument is out of its range.
        """
        if epoch < 0 or not 0 <= batch <= len(self):
            raise ValueError(f"`epoch` must be >= 0 and `batch` in 0..{len(self)}, got {epoch!r} and {batch!r}")
        self.epoch, self._first_batch = epoch, batch

    def to(self, device: torch.device | str) -> ViewLoader:
        """Move images and labels to a device, and with them the augmentation.

        Args:
            device: Target device.

        Returns:
            This loader.
        """
        self.images = self.images.to(device)
        self.labels = None if self.labels is None else self.labels.to(device)
        return self

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        epoch, first, self._first_batch = self.epoch, self._first_batch, 0
        device = self.images.device
        order = torch.arange(len(self.images))
        if self.shuffle:
            shuffler = torch.Generator().manual_seed(derived_seed(self.seed, epoch))
            order = torch.randperm(len(self.images), generator=shuffler)
        order = order.to(device)
        for batch in range(first, len(self)):
            index = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            generator = torch.Generator(device).manual_seed(derived_seed(self.seed, epoch, batch))
            extras = () if self.labels is None else (self.labels[index],)
            yield (*self._views(index, generator), *extras, *((index,) if self.return_index else ()))
        self.epoch = epoch + 1

    def _views(self, index: Tensor, generator: torch.Generator) -> list[Tensor]:
        """Make the views of the items ``index``; a loader with another notion of a pair overrides this."""
        images = self.images[index]
        return [self._augmented(images, generator) for _ in range(self.num_views)]

    def _augmented(self, images: Tensor, generator: torch.Generator) -> Tensor:
        view = self.augment(images, generator)
        return view if isinstance(view, Tensor) else view[0]
