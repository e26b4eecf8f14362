"""Images in memory, as bytes: the sets that torchvision and scikit-learn read, one npz file, or a folder of yours."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from pyro_contrastive.data._files import read_arrays
from pyro_contrastive.data.digits import load_digits

__all__ = ["IMAGE_SETS", "load_images"]

Split = Literal["train", "test"]
IMAGE_SETS = ("digits", "mnist", "fashion_mnist", "cifar10", "svhn")
"""Sets known by name."""
_FOLDER_SIZE = 32  # pixels, of images from a folder
_TRAIN_SHARE = 0.8  # of a folder without train and test
_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # those of torchvision


def load_images(
    source: str | Path,
    split: Split = "train",
    *,
    root: str | Path = "data",
    download: bool = False,
    size: int | None = None,
    channels: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Load a set of labelled images into memory.

    Args:
        source: A name in :data:`IMAGE_SETS`, which comes first; or a path: an ``.npz`` file with ``x_train``,
            ``y_train``, ``x_test`` and ``y_test`` (uint8 ``[N, H, W]`` or ``[N, H, W, C]``, integers ``[N]``); or a
            folder with a subfolder of images per class. A folder that holds the folders ``train`` and ``test`` (or
            ``val``) is split by them, any other at random within each class, four fifths for training, always alike.
        split: ``"train"`` or ``"test"``.
        root: Folder of torchvision's data sets, for the named sets but the digits, which come with scikit-learn.
        download: Let torchvision fetch a named set into ``root``.
        size: Resize to this height and width in pixels; an oblong image is cropped in its middle first. Default: as
            the images are, and 32 for a folder.
        channels: 1 for grey, 3 for colour. Default: as the images are, and 3 for a folder.

    Returns:
        ``(images, labels)``: uint8 ``(N, C, H, W)`` and int64 ``(N,)``. Classes of a folder are numbered in
        alphabetical order.

    Raises:
        ValueError: If an argument is out of its range, or a file is not readable or not what it should be.
        FileNotFoundError: If there is no such set; says how to get it.

    Example:
        >>> images, labels = load_images("digits", "test", size=16)
        >>> images.shape, images.dtype, labels.shape
        (torch.Size([397, 1, 16, 16]), torch.uint8, torch.Size([397]))
    """
    if split not in get_args(Split):
        raise ValueError(f"`split` must be 'train' or 'test', got {split!r}")
    if size is not None and size < 1:
        raise ValueError(f"`size` must be >= 1 pixel, got {size!r}")
    if channels not in (None, 1, 3):
        raise ValueError(f"`channels` must be 1 (grey), 3 (colour) or None (as they are), got {channels!r}")
    path = Path(source)
    if source == "digits":
        floats, labels = load_digits(split)
        images = (floats * 255).round().byte()
    elif source in IMAGE_SETS:
        images, labels = _read_torchvision(str(source), split, Path(root), download)
    elif path.is_dir():
        images, labels = _read_folder(path, split, size or _FOLDER_SIZE)
    elif path.is_file():
        images, labels = _read_npz(path, split)
    else:
        raise FileNotFoundError(
            f"{source} is no folder, no npz file and none of the sets known by name ({', '.join(IMAGE_SETS)})"
        )
    if size is not None and images.shape[-2:] != (size, size):
        images = _resized(images, size)
    if channels == 1 and images.shape[1] == 3:
        from torchvision.transforms.v2.functional import rgb_to_grayscale

        images = rgb_to_grayscale(images)
    return images.repeat(1, 3, 1, 1) if channels == 3 and images.shape[1] == 1 else images, labels


def _read_torchvision(name: str, split: Split, root: Path, download: bool) -> tuple[Tensor, Tensor]:
    from torchvision import datasets

    train = split == "train"
    try:
        if name == "svhn":
            data = datasets.SVHN(str(root), split=split, download=download)
        else:
            known = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}
            data = known[name](str(root), train=train, download=download)
    except (RuntimeError, OSError, ValueError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0].rstrip(".")
        way_out = (
            "the download failed; check the connection, or put the files there as torchvision does"
            if download
            else "let torchvision fetch it (download=True, in the examples --download), or name the folder that has it"
        )
        raise FileNotFoundError(f"{root} holds no intact {name}: {reason}; {way_out}") from error
    pixels, labels = np.asarray(data.data), np.asarray(data.labels if name == "svhn" else data.targets)
    return _as_tensors(pixels.transpose(0, 2, 3, 1) if name == "svhn" else pixels, labels, root)


def _read_npz(path: Path, split: Split) -> tuple[Tensor, Tensor]:
    arrays = read_arrays(path)
    names = f"x_{split}", f"y_{split}"
    if missing := [name for name in names if name not in arrays]:
        raise ValueError(f"{path} lacks {', '.join(missing)}; it must hold x_{split} and y_{split}")
    return _as_tensors(arrays[names[0]], arrays[names[1]], path)


def _as_tensors(pixels: np.ndarray, labels: np.ndarray, place: Path) -> tuple[Tensor, Tensor]:
    """Check images with their channels last."""
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] not in (1, 3) or not len(pixels):
        raise ValueError(
            f"images must be uint8 [N, H, W], [N, H, W, 1] or [N, H, W, 3] with N >= 1, got {pixels.dtype} "
            f"{list(pixels.shape)} in {place}"
        )
    if labels.shape != pixels.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be {len(pixels)} integers, got {labels.dtype} {list(labels.shape)} in {place}")
    return torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels.astype(np.int64))


def _read_folder(path: Path, split: Split, size: int) -> tuple[Tensor, Tensor]:
    """Read class subfolders, in two parts or in one that is split here."""
    from torchvision.datasets import ImageFolder

    parts = [path / name for name in ((split,) if split == "train" else ("test", "val"))]
    divided = (path / "train").is_dir()
    folder = next((part for part in parts if part.is_dir()), parts[0]) if divided else path
    example = f"{path}{'/' + split if divided else ''}/CLASS/IMAGE.png"
    if not folder.is_dir():
        raise FileNotFoundError(f"{path} has a folder train and no {parts[0].name}; put the images at {example}")
    try:
        found = ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} must hold a subfolder per class with at least one image ({', '.join(_SUFFIXES)}) in each: "
            f"{str(error).splitlines()[0]} Put the images at {example}."
        ) from error
    labels = torch.tensor(found.targets)
    index = torch.arange(len(labels)) if divided else _split(labels, split)
    images = torch.empty(len(index), 3, size, size, dtype=torch.uint8)
    for row, item in enumerate(index.tolist()):
        file = found.samples[item][0]
        try:
            image = found.loader(file)
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(
                f"{file} is not a readable image: {str(error).splitlines()[0]}; repair or remove it"
            ) from error
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
        images[row] = _resized(pixels.unsqueeze(0), size)[0]
    return images, labels[index]


def _split(labels: Tensor, split: Split) -> Tensor:
    """Indices of one part, at random within each class, by one fixed generator."""
    generator, parts = torch.Generator().manual_seed(0), []
    for label in labels.unique():
        items = (labels == label).nonzero().flatten()
        items = items[torch.randperm(len(items), generator=generator)]
        cut = max(1, round(_TRAIN_SHARE * len(items)))
        parts.append(items[:cut] if split == "train" else items[cut:])
    index = torch.cat(parts).sort().values
    if not len(index):
        raise ValueError("no class of the folder has two images, so that nothing is left to test; add images")
    return index


def _resized(images: Tensor, size: int) -> Tensor:
    """Crop to a square in the middle and resize, ``(N, C, H, W)`` bytes."""
    from torchvision.transforms.v2.functional import center_crop, resize

    return resize(center_crop(images, [min(images.shape[-2:])] * 2), [size, size], antialias=True)
