"""CIFAR-10 with the answers of many people (CIFAR-10H): reading, folds, and pairs drawn from soft labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pyro_contrastive.data._files import read_arrays
from pyro_contrastive.data.views import ViewLoader

__all__ = ["Cifar10H", "Fold", "SoftLabelPairs", "five_folds", "load_cifar10h", "sample_partners"]

_IMAGES = "CIFAR-10: https://www.cs.toronto.edu/~kriz/cifar.html, or let torchvision fetch it (download=True)"
_COUNTS = "CIFAR-10H: data/cifar10h-counts.npy or cifar10h-probs.npy of https://github.com/jcpeterson/cifar-10h"
_ARRAYS = "x_test [N, 32, 32, 3] uint8, y_test [N], human_counts [N, 10]; to train on more also x_train, y_train"


@dataclass(frozen=True)
class Cifar10H:
    """Images with what people said about them; ``train_*`` is the other, larger part, without answers of people.

    Attributes:
        images: uint8 ``(N, 3, 32, 32)``, the test part (10,000).
        labels: int64 ``(N,)`` in 0..9, the labels of CIFAR-10.
        soft_labels: float32 ``(N, 10)``, the share of people who chose each class.
        train_images: uint8 ``(M, 3, 32, 32)`` (50,000), or None if not asked for.
        train_labels: int64 ``(M,)``, or None.
    """

    images: Tensor
    labels: Tensor
    soft_labels: Tensor
    train_images: Tensor | None = None
    train_labels: Tensor | None = None

    @property
    def entropy(self) -> Tensor:
        """Entropy of each soft label in nats, float32 ``(N,)``: the ambiguity that people see."""
        return torch.special.entr(self.soft_labels.double()).sum(-1).float()

    @property
    def majority(self) -> Tensor:
        """The class that most people chose, int64 ``(N,)``; of equals the first."""
        return self.soft_labels.argmax(-1)


def load_cifar10h(
    path: str | Path, *, counts: str | Path | None = None, train: bool = False, download: bool = False
) -> Cifar10H:
    """Read CIFAR-10 and the answers of people from one npz file, or from torchvision's files and a file of answers.

    Args:
        path: A ``.npz`` file with the arrays ``x_test`` (uint8 ``[N, 32, 32, 3]``), ``y_test`` and ``human_counts``
            (``[N, 10]``), or the root folder of ``torchvision.datasets.CIFAR10``.
        counts: The answers as counts or shares, ``[N, 10]`` in the order of the test part: a ``.npy`` file, or a
            ``.npz`` file with the array ``counts`` or ``human_counts``. Needed for a folder; in the place of
            ``human_counts`` for an npz file.
        train: Also read the 50,000 training images (``x_train``, ``y_train``).
        download: Let torchvision fetch CIFAR-10 into the folder. The answers are never fetched.

    Returns:
        The data, on the CPU.

    Raises:
        FileNotFoundError: If a file is missing; says where to get it.
        ValueError: If a file is unreadable, an array is missing or has another shape, or the answers belong to other
            images (their majority must equal the label for at least half of the images; for CIFAR-10H it is 99 %).

    Source: J. Peterson, R. Battleday, T. Griffiths and O. Russakovsky, Human uncertainty makes classification more
    robust, ICCV 2019 (the answers, CC BY-NC-SA 4.0); A. Krizhevsky, Learning multiple layers of features from tiny
    images, 2009 (the images).
    """
    path = Path(path)
    if path.is_dir() or download:
        if counts is None:
            raise ValueError(f"`counts` must name the file of answers when `path` is a folder, got None; {_COUNTS}")
        arrays = _read_torchvision(path, train, download)
    elif path.exists():
        arrays = read_arrays(path)
    else:
        raise FileNotFoundError(f"{path} does not exist; pass an npz file with {_ARRAYS}, or a folder. {_IMAGES}")
    if counts is not None:
        if not Path(counts).exists():
            raise FileNotFoundError(f"{counts} does not exist; {_COUNTS}")
        found = read_arrays(Path(counts))
        names = [name for name in ("", "counts", "human_counts") if name in found]
        if not names:
            raise ValueError(f"{counts} must hold the array `counts` [N, 10], got {sorted(found)}; {_COUNTS}")
        arrays["human_counts"] = found[names[0]]

    parts = ("test", "train") if train else ("test",)
    needed = [f"{kind}_{part}" for part in parts for kind in "xy"] + ["human_counts"]
    if missing := [name for name in needed if arrays.get(name) is None]:
        raise ValueError(f"{path} lacks {', '.join(missing)}; it must hold {_ARRAYS}. {_IMAGES}; {_COUNTS}")
    tensors: list[Tensor] = []
    for part in parts:
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[1:] != (32, 32, 3):
            raise ValueError(f"`x_{part}` must be uint8 [N, 32, 32, 3], got {x.dtype} {list(x.shape)} in {path}")
        if y.shape != x.shape[:1] or not np.isin(y, np.arange(10)).all():
            raise ValueError(f"`y_{part}` must be {len(x)} integers in 0..9, got {y.dtype} {list(y.shape)} in {path}")
        tensors += [torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(y.astype(np.int64))]
    return Cifar10H(tensors[0], tensors[1], _soft_labels(arrays["human_counts"], tensors[1]), *tensors[2:])


def _read_torchvision(root: Path, train: bool, download: bool) -> dict[str, np.ndarray]:
    from torchvision.datasets import CIFAR10

    arrays = {}
    for part in ("test", "train") if train else ("test",):
        try:
            data = CIFAR10(str(root), train=part == "train", download=download)
        except RuntimeError as error:
            raise FileNotFoundError(f"{root} holds no intact CIFAR-10: {error}. {_IMAGES}") from error
        arrays[f"x_{part}"], arrays[f"y_{part}"] = data.data, np.asarray(data.targets)
    return arrays


def _soft_labels(counts: np.ndarray, labels: Tensor) -> Tensor:
    if counts.shape != (len(labels), 10) or not np.issubdtype(counts.dtype, np.number):
        raise ValueError(
            f"the answers must be numbers [{len(labels)}, 10], got {counts.dtype} {list(counts.shape)}; {_COUNTS}"
        )
    totals = counts.sum(axis=1, keepdims=True)
    if not (np.isfinite(totals).all() and counts.min() >= 0 and totals.min() > 0):
        raise ValueError("the answers must be finite and >= 0, with at least one per image; " + _COUNTS)
    shares = torch.from_numpy((counts / totals).astype(np.float32))
    agreement = float((shares.argmax(-1) == labels).float().mean())
    if agreement < 0.5:
        raise ValueError(
            f"the most frequent answer must equal the label for most images, got {agreement:.1%}; "
            "the rows must be in the order of CIFAR-10's test part"
        )
    return shares


@dataclass(frozen=True)
class Fold:
    """Indices of one fold, each sorted, int64: ``train`` (three fifths), ``validation`` and ``test`` (one each)."""

    train: Tensor
    validation: Tensor
    test: Tensor


def five_folds(fold: int, *, num_items: int = 10_000, seed: int = 0) -> Fold:
    """Give one of five splits into train, validation and test.

    One permutation, fixed by ``seed``, cuts the items into five sets of equal size (2,000 of CIFAR-10H's 10,000).
    Fold f trains on the sets f, f+1 and f+2, validates on f+3 and tests on f+4, all modulo 5 (the protocol of
    Kirchhof et al. 2023, arXiv 2302.02865). Every item is tested in exactly one fold; train parts overlap.

    Args:
        fold: f, in 0..4.
        num_items: Number of items, a multiple of 5.
        seed: Seed of the permutation, ``>= 0``.

    Returns:
        The indices.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> fold = five_folds(0)
        >>> len(fold.train), len(fold.validation), len(fold.test)
        (6000, 2000, 2000)
    """
    if fold not in range(5):
        raise ValueError(f"`fold` must be in 0..4, got {fold!r}")
    if num_items < 5 or num_items % 5:
        raise ValueError(f"`num_items` must be a positive multiple of 5, got {num_items!r}")
    order = torch.randperm(num_items, generator=torch.Generator().manual_seed(seed))
    sets = [order.reshape(5, -1)[(fold + shift) % 5] for shift in range(5)]
    return Fold(*(part.sort().values for part in (torch.cat(sets[:3]), sets[3], sets[4])))


def sample_partners(soft_labels: Tensor, reference: Tensor, generator: torch.Generator | None = None) -> Tensor:
    r"""Draw for each reference image another one that shows the same thing, as far as people can tell.

    A class c is drawn from the reference's soft label; every other image is flagged with probability
    :math:`p_j[c]`; one of the flagged is the partner. So a clear image meets clear ones of its class, an ambiguous one
    meets several classes. If nothing is flagged, the partner is drawn in proportion to :math:`p_j[c]`.

    This is the rule of Kirchhof et al. 2023 (arXiv 2302.02865), except that the reference is no partner of itself;
    their code lets it be one.

    Args:
        soft_labels: ``(N, C)``, rows sum to one; every class that occurs must occur in two rows.
        reference: Indices of the references, int64 ``(B,)`` in 0..N-1.
        generator: Source of randomness, on the device of ``soft_labels``. Default: PyTorch's global one.

    Returns:
        Indices of the partners, int64 ``(B,)``.

    Example:
        >>> labels = torch.eye(2).repeat(2, 1)  # classes 0 1 0 1
        >>> sample_partners(labels, torch.tensor([0, 1, 2, 3]))
        tensor([2, 3, 0, 1])
    """
    chosen = torch.multinomial(soft_labels[reference], 1, generator=generator).squeeze(1)
    probability = soft_labels.T[chosen]  # (B, N)
    draw = torch.rand((2, *probability.shape), generator=generator, device=soft_labels.device)
    # flagged images compete with uniform scores > 0, the others in an exponential race with scores < 0
    race = torch.log(draw[1]).clamp(max=-1e-9) / probability
    score = torch.where(draw[0] < probability, draw[1], race)
    return score.scatter_(1, reference[:, None], -torch.inf).argmax(1)


class SoftLabelPairs(ViewLoader):
    r"""Iterate over pairs of *different* images that show the same class, drawn from soft labels every time anew.

    A :class:`~pyro_contrastive.data.ViewLoader` (seeds, ``seek`` and ``to`` are its own) whose second view shows
    another image, drawn by :func:`sample_partners`.

    Negatives are the partners of the other items of the batch: draws from the marginal, which is what the softmax of
    the InfoNCE likelihood assumes, though some of them show the class of the reference. The published
    alternative is ``negatives="dissimilar"``: candidate j stays a negative of reference i with probability
    :math:`1 - p_i \cdot p_j`, drawn per batch and handed on as a mask for the model to use.

    Args:
        images: ``(N, 3, H, W)``.
        soft_labels: ``(N, C)``, rows sum to one.
        augment: As for :class:`~pyro_contrastive.data.ViewLoader`, applied to both images of a pair.
        negatives: ``"batch"`` or ``"dissimilar"``.
        batch_size: Pairs per batch.
        seed: Base seed, ``>= 0``.
        shuffle: Draw a new order of the references every epoch.
        drop_last: Leave out an incomplete last batch.

    Returns:
        Batches are ``(x1, x2)``, or ``(x1, x2, keep)`` with a boolean mask ``(batch, batch)`` whose diagonal is true.

    Raises:
        ValueError: If an argument is out of its range, lengths differ, or a class occurs in one image only.

    Example:
        >>> labels = torch.eye(2).repeat(4, 1)
        >>> pairs = SoftLabelPairs(torch.arange(8.0), labels, lambda x, generator: x, batch_size=8, shuffle=False)
        >>> x1, x2 = next(iter(pairs))
        >>> bool((x1 % 2 == x2 % 2).all()), bool((x1 != x2).all())
        (True, True)
    """

    def __init__(
        self,
        images: Tensor,
        soft_labels: Tensor,
        augment: Callable[[Tensor, torch.Generator], Tensor | tuple[Tensor, ...]],
        *,
        negatives: Literal["batch", "dissimilar"] = "batch",
        batch_size: int = 256,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
    ) -> None:
        super().__init__(images, augment, batch_size=batch_size, seed=seed, shuffle=shuffle, drop_last=drop_last)
        if soft_labels.ndim != 2 or len(soft_labels) != len(images):
            raise ValueError(f"`soft_labels` must be ({len(images)}, classes), got {tuple(soft_labels.shape)}")
        if not torch.allclose(soft_labels.sum(1), soft_labels.new_ones(()), atol=1e-4) or soft_labels.min() < 0:
            raise ValueError("`soft_labels` must be >= 0 with rows that sum to one; divide counts by their row sum")
        holders = (soft_labels > 0).sum(0)
        if len(alone := (holders == 1).nonzero().flatten().tolist()):
            raise ValueError(
                f"every class must occur in two images or in none, got one image for class {alone[0]}; "
                "such an image has no partner: leave it out"
            )
        if negatives not in ("batch", "dissimilar"):
            raise ValueError(f"`negatives` must be 'batch' or 'dissimilar', got {negatives!r}")
        self.soft_labels = soft_labels.to(images.device)
        self.negatives = negatives

    def to(self, device: torch.device | str) -> SoftLabelPairs:
        """Move images and soft labels to a device.

        Args:
            device: Target device.

        Returns:
            This loader.
        """
        super().to(device)
        self.soft_labels = self.soft_labels.to(device)
        return self

    def _views(self, index: Tensor, generator: torch.Generator) -> list[Tensor]:
        partner = sample_partners(self.soft_labels, index, generator)
        views = [self._augmented(self.images[part], generator) for part in (index, partner)]
        if self.negatives == "dissimilar":
            similarity = self.soft_labels[index] @ self.soft_labels[partner].mT
            keep = torch.rand(similarity.shape, generator=generator, device=similarity.device) >= similarity
            views.append(keep.fill_diagonal_(True))
        return views
