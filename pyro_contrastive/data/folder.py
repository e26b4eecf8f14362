"""All images below a folder, batch by batch from the disk: for sets that do not fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pyro_contrastive.data.images import _SUFFIXES, _resized
from pyro_contrastive.distributed import process_rank

__all__ = ["FolderImages"]

Unreadable = Literal["raise", "skip"]


class FolderImages:
    """Batches ``(ids, images)`` of every image below a folder, in the order of the names, each once.

    Made for :func:`pyro_contrastive.embedding.embed`: it holds the names and one batch, and goes on in the middle
    without reading what comes before. Of several processes each gets every R-th file.

    Args:
        folder: Searched with all folders below it.
        size: Height and width in pixels; an oblong image is cropped in its middle first.
        channels: 3 for colour, 1 for grey.
        batch_size: Images per batch, ``>= 1``.
        unreadable: ``"raise"`` on a file that cannot be read, or ``"skip"`` it and list it in ``unreadable``.
        num_workers: Processes that read ahead; 0 reads in this one.
        transform: Applied to each batch of images, for instance ``lambda x: x / 255``.

    Attributes:
        unreadable: Ids of the files that were skipped so far.

    Raises:
        FileNotFoundError: If there is no such folder, or no image in it.
        ValueError: If an argument is out of its range; when iterated, for a file that cannot be read.

    Yields:
        Paths relative to the folder (with slashes), and uint8 ``(n, channels, size, size)``, transformed. A batch has
        fewer images than `batch_size`, or none, where files were skipped.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        size: int,
        channels: int = 3,
        batch_size: int = 256,
        unreadable: Unreadable = "raise",
        num_workers: int = 0,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        for name, value in (("size", size), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"`{name}` must be >= 1, got {value!r}")
        if channels not in (1, 3):
            raise ValueError(f"`channels` must be 1 (grey) or 3 (colour), got {channels!r}")
        if unreadable not in get_args(Unreadable):
            raise ValueError(f"`unreadable` must be 'raise' or 'skip', got {unreadable!r}")
        root = Path(folder)
        if not root.is_dir():
            raise FileNotFoundError(f"{folder} is no folder")
        found = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.suffix.lower() in _SUFFIXES)
        if not found:
            raise FileNotFoundError(f"no image ({', '.join(_SUFFIXES)}) in {folder} or a folder below it")
        rank, ranks = process_rank()
        self.files = _Files(root, found[rank::ranks], size, channels)
        self.batch_size, self.num_workers, self.policy = batch_size, num_workers, unreadable
        self.transform = transform
        self.unreadable: list[str] = []
        self._first = 0

    def __len__(self) -> int:
        return -(-len(self.files) // self.batch_size)

    def seek(self, epoch: int, batch: int = 0) -> None:
        """Let the next pass begin at a batch.

        Args:
            epoch: Not used: every pass is the same.
            batch: Batches to leave out.
        """
        self._first = batch

    def __iter__(self) -> Iterator[tuple[list[str], Tensor]]:
        first, self._first = self._first, 0
        rest = torch.utils.data.Subset(self.files, range(first * self.batch_size, len(self.files)))
        loader: DataLoader = DataLoader(
            rest, batch_size=self.batch_size, num_workers=self.num_workers, collate_fn=lambda entries: entries
        )
        for entries in loader:
            good = []
            for name, image, reason in entries:
                if image is not None:
                    good.append((name, image))
                elif self.policy == "raise":
                    raise ValueError(
                        f"{self.files.root / name} is not a readable image: {reason}; repair or remove it, or pass "
                        "unreadable='skip'"
                    )
                else:
                    self.unreadable.append(name)
            shape = (len(good), *self.files.shape)
            images = torch.stack([image for _, image in good]) if good else torch.empty(shape, dtype=torch.uint8)
            yield [name for name, _ in good], images if self.transform is None else self.transform(images)


class _Files(Dataset):
    """Name, image or None, and the reason why there is none."""

    def __init__(self, root: Path, names: list[str], size: int, channels: int) -> None:
        self.root, self.names, self.shape = root, np.array(names), (channels, size, size)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[str, Tensor | None, str]:
        from torchvision.datasets.folder import default_loader

        name = str(self.names[index])
        try:
            image = default_loader(str(self.root / name))
        except (OSError, SyntaxError, ValueError) as error:
            return name, None, str(error).splitlines()[0]
        pixels = np.asarray(image if self.shape[0] == 3 else image.convert("L")).reshape(*image.size[::-1], -1)
        return name, _resized(torch.from_numpy(pixels.copy()).permute(2, 0, 1).unsqueeze(0), self.shape[-1])[0], ""
