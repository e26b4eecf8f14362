"""SimCLR on images of 32 pixels: views, and whole training steps, against lightly with the same backbone and batch.

    python -m benchmarks.images [--quick] [--device cpu]

Ours: images as one uint8 tensor, ``ViewLoader`` with ``crop_flip_jitter`` (SimCLR's recipe), ``models.SimCLR`` by
``fit``. Theirs: the loop of lightly's tutorial: a ``DataLoader`` whose items go through ``SimCLRTransform`` one by one
(same crops, flips, jitter and greying, no blur), ``NTXentLoss``, Adam. Both: a ResNet-18 with a small stem, batches of
128, projections of 128. On the CPU all in one process and one thread, a quarter of the width; on a GPU the DataLoader
has as many workers as there are cores, and the width is whole. Seconds per 1,000 images.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import medians, peer, row, table
from pyro_contrastive import guides, models, nets
from pyro_contrastive.data import ViewLoader, crop_flip_jitter
from pyro_contrastive.fit import fit

BATCH, DIM, TEMPERATURE = 128, 128, 0.5
GOAL = 1 / 1.5


def encoder(width: int) -> nn.Module:
    return nn.Sequential(nets.small_resnet18(width=width), nets.projector(8 * width))


class Items(torch.utils.data.Dataset):
    """One image at a time, as a data set on disk gives them."""

    def __init__(self, images: Tensor, transform: Callable[[Tensor], list[Tensor]]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.transform(self.images[index])


def tasks(num: int, width: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Views of all images, and one epoch; ours and theirs."""
    images = torch.randint(0, 256, (num, 3, 32, 32), dtype=torch.uint8)
    recipe = functools.partial(crop_flip_jitter, scale=(0.08, 1.0), hue=0.1, probability=0.8, random_order=True)
    loader = ViewLoader(images.to(device), recipe, batch_size=BATCH)
    guide = guides.Delta(encoder(width), DIM).to(device)
    model = models.SimCLR(guide, concentration=1 / TEMPERATURE).to(device)
    found: dict[str, Callable[[], object]] = {
        "ours, views": lambda: [x.shape for x, _ in loader],
        "ours, training": lambda: fit(model, guide, loader, epochs=1, device=device, progress=False),
    }
    transforms, loss = peer("lightly.transforms"), peer("lightly.loss")
    if transforms is None or loss is None:
        return found
    transform = transforms.SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0.0)
    workers = 0 if device.type == "cpu" else os.cpu_count() or 1
    items = torch.utils.data.DataLoader(
        Items(images, transform),
        batch_size=BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
    )
    network = nn.Sequential(encoder(width), nn.LazyLinear(DIM)).to(device)
    network(torch.zeros(2, 3, 32, 32, device=device))
    optimizer, criterion = torch.optim.Adam(network.parameters(), lr=1e-3), loss.NTXentLoss(temperature=TEMPERATURE)

    def epoch() -> None:
        network.train()
        for views in items:
            x1, x2 = (view.to(device, non_blocking=True) for view in views)
            optimizer.zero_grad()
            criterion(network(x1), network(x2)).backward()
            optimizer.step()

    return found | {"theirs, views": lambda: [views[0].shape for views in items], "theirs, training": epoch}


def rows(quick: bool, device: torch.device) -> list[dict[str, Any]]:
    """Seconds per 1,000 images: making the views alone, and training."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the peers
        on_gpu = device.type == "cuda"
        num, width, rounds = (20_000, 64, 3) if on_gpu else (2 * BATCH if quick else 4 * BATCH, 16, 3 if quick else 5)
        todo = tasks(num, width, device)
        for task in todo.values():
            task()
        seconds = medians(todo, rounds, device, "images")
    setting, used = f"ResNet-18 / {64 // width}, batch {BATCH}", num // BATCH * BATCH
    out = []
    for what in ("views", "training"):
        ours, theirs = (
            None if (value := seconds.get(f"{who}, {what}")) is None else 1000 * value / used
            for who in ("ours", "theirs")
        )
        assert ours is not None
        goal = GOAL if what == "training" and on_gpu else None
        out.append(row(f"SimCLR, 1,000 images, {what}", setting, ours, "lightly SimCLR", theirs, goal=goal))
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(table(rows(args.quick, torch.device(args.device))))
    sys.exit(0)
