"""Peer supervision: images come in groups that share a class, nobody says which; a discrete latent finds the classes.

`models.DiscreteRPM` with K = 10 states and a uniform prior, one network for all views, fitted by maximum likelihood
(the sum over the states is exact). Every image is in one group of J. After training the states are matched to the
classes on training images (Hungarian algorithm), and the accuracy of the most probable state is that of test images.

The likelihood has local optima in which one state holds two classes. Two things help, and neither needs a label.
`--heads` models are fitted at once on the features of one network, and the head with the highest likelihood of the
training groups is taken; every setting is fitted `--restarts` times, and the fit with the highest likelihood is marked.
Interrupt it and start it again with the same `--out`: it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro.contrib.autoname import scope
from pyro.infer import TraceEnum_ELBO
from pyro.nn import PyroModule
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from pyro_contrastive import guides, models, nets
from pyro_contrastive.data import ViewLoader, load_digits, shift_and_dropout
from pyro_contrastive.fit import fit
from pyro_contrastive.modules import Module
from pyro_contrastive.ops.random import derived_seed, seeded

CLASSES = 10
Split = tuple[Tensor, Tensor]


def load_mnist(folder: Path, download: bool) -> tuple[Split, Split]:
    """MNIST from a torchvision folder, or an .npz file with x_train, y_train, x_test, y_test."""
    if folder.suffix == ".npz":
        with np.load(folder) as arrays:
            data = [(arrays[f"x_{split}"], arrays[f"y_{split}"]) for split in ("train", "test")]
    else:
        from torchvision.datasets import MNIST

        sets = [MNIST(str(folder), train=train, download=download) for train in (True, False)]
        data = [(part.data.numpy(), part.targets.numpy()) for part in sets]
    train, test = [
        (torch.as_tensor(x).reshape(-1, 1, 28, 28).float() / 255, torch.as_tensor(y).long()) for x, y in data
    ]
    return train, test


def convnet() -> nn.Sequential:
    """The small network of the paper's script up to its features: two convolutions and a layer of 50."""
    return nn.Sequential(
        nn.Conv2d(1, 10, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(10, 20, 5), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(), nn.Linear(320, 50), nn.ReLU(),
    )  # fmt: skip


def groups(labels: Tensor, size: int, seed: int) -> Tensor:
    """Indices ``(T, size)`` of images of one class, every image in one group; the remainder of a class is dropped."""
    generator = torch.Generator().manual_seed(derived_seed(seed, 0))
    found = []
    for label in range(CLASSES):
        members = torch.nonzero(labels == label)[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        found.append(members[: len(members) // size * size].reshape(-1, size))
    return torch.cat(found)


class Shared(nn.Module):
    """An encoder of several heads, which runs once per view of a batch."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.kept: list[tuple[Tensor, Tensor]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Encode, or give the features of this very tensor again."""
        for view, features in self.kept or []:
            if view is x:
                return features
        features = self.encoder(x)
        if self.kept is not None:
            self.kept.append((x, features))
        return features


class Heads(Module):
    """Independent discrete latents of the same views: the Pyro model is the models' product."""

    def __init__(self, encoder: nn.Module, num: int) -> None:
        super().__init__()
        self.shared = Shared(encoder)
        self.models = PyroModule[nn.ModuleList](
            models.DiscreteRPM(guides.Categorical(self.shared, CLASSES)) for _ in range(num)
        )

    def forward(self, *views: Tensor) -> None:
        """Sites "0/z", "1/z", ... and their factors."""
        shared = self._modules["shared"]
        shared.kept = []
        for number, model in enumerate(self.models):
            scope(model, prefix=str(number))(*views)
        shared.kept = None


class GroupLoader:
    """Batches of J views from a loader of groups ``(batch, J, ...)``."""

    def __init__(self, loader: ViewLoader) -> None:
        self.loader, self.seek = loader, loader.seek

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for (batch,) in self.loader:
            yield batch.unbind(1)


def shift(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Move every image of every group by up to one pixel."""
    images, _ = shift_and_dropout(batch.flatten(0, 1), generator, max_level=0.0)
    return images.unflatten(0, batch.shape[:2])


@torch.no_grad()
def recognise(model: Heads, images: Tensor) -> Tensor:
    """Log probabilities of every head, ``(heads, N, K)``; the network runs once."""
    found = []
    for part in images.split(2_000):
        model.shared.kept = []
        found.append(torch.stack([head.guide.posterior(part).logits for head in model.models]))
    model.shared.kept = None
    return torch.cat(found, 1)


def score(log_f: tuple[Tensor, Tensor], labels: tuple[Tensor, Tensor], index: Tensor) -> dict[str, Any]:
    """What one head has learned.

    Args:
        log_f: Log probabilities of the training and the test images, ``(N, K)``.
        labels: Their classes.
        index: Groups of training images.

    Returns:
        Log likelihood ratio of the training groups (mean, nats), accuracies, and how many classes are the most frequent
        one of some state.
    """
    laws = log_f[0][index]  # (T, J, K); the aggregates are over all groups, so the likelihood is exact
    ratio = laws - (laws.logsumexp(0) - np.log(len(laws)))
    counts = np.zeros((CLASSES, CLASSES))
    states = [table.argmax(1).numpy() for table in log_f]
    np.add.at(counts, (states[0], labels[0].numpy()), 1)
    _, name = linear_sum_assignment(counts, maximize=True)
    accuracy = [float((name[state] == label.numpy()).mean()) for state, label in zip(states, labels, strict=True)]
    return {
        "log_likelihood": float((ratio.sum(1) - np.log(CLASSES)).logsumexp(1).mean()),  # the prior is uniform
        "train_accuracy": accuracy[0],
        "test_accuracy": accuracy[1],
        "classes_found": len(set(counts.argmax(1))),
    }


def run(args: Any, number: int, data: tuple[Split, Split]) -> dict[str, Any]:
    """One restart: other weights, other groups, other batches."""
    train, test = data
    seed = derived_seed(args.seed, args.views, number) % 2**31
    index = groups(train[1], args.views, seed)
    digits = args.data == "digits"
    images = train[0][index]
    loader = ViewLoader(
        images, shift if args.shift else lambda x, _: x, batch_size=args.batch_size, num_views=1, seed=seed
    )
    with seeded(seed):
        model = Heads(nets.mlp([64, 128]) if digits else convnet(), args.heads)
    started = time.process_time()
    fit(
        model,
        lambda *views: None,  # no guide: the sum over the states is exact
        GroupLoader(loader),
        elbo=TraceEnum_ELBO(max_plate_nesting=1),
        epochs=args.epochs,
        num_views=args.views,
        lr=args.lr,
        seed=seed,
        device=args.device,
        out=args.out / f"fit-{number}",
        config={"data": args.data, "views": args.views, "batch_size": args.batch_size, "shift": args.shift}
        | {"heads": args.heads},
        progress=f"J = {args.views}, restart {number}",
    )
    seconds = time.process_time() - started
    model = model.cpu()
    log_f = zip(recognise(model, train[0]), recognise(model, test[0]), strict=True)
    found = [score(head, (train[1], test[1]), index) for head in log_f]
    best = max(found, key=lambda row: row["log_likelihood"])
    heads = sorted(row["test_accuracy"] for row in found)
    return {"restart": number, **best, "heads": heads, "groups": len(index), "cpu_seconds": seconds}


def parse(argv: list[str] | None = None) -> Any:
    """Parse the command line."""
    from _options import make_parser

    parser = make_parser(__doc__ or "")
    add = parser.add_argument
    add("--data", choices=("digits", "mnist"), default="digits", help="default: %(default)s")
    add("--mnist", type=Path, default=Path("data"), metavar="PATH", help="torchvision folder or .npz file")
    add("--download", action="store_true", help="let torchvision fetch MNIST into --mnist")
    add("--views", type=int, default=2, metavar="J", help="images per group, >= 2; default: %(default)s")
    add("--heads", type=int, default=5, metavar="N", help="on one network; default: %(default)s")
    add("--restarts", type=int, default=3, metavar="N", help="default: %(default)s")
    add("--epochs", type=int, metavar="N", help="default: 200 (digits), 5 (mnist)")
    add("--batch-size", type=int, metavar="N", help="groups; default: 200 (digits), 300 (mnist)")
    add("--lr", type=float, metavar="RATE", help="of Adam; default: 3e-3")
    add("--shift", action=argparse.BooleanOptionalAction, help="move images by up to a pixel; default: digits only")
    args = parser.parse_args(argv)
    digits = args.data == "digits"
    defaults = {"epochs": 200 if digits else 5, "batch_size": 200 if digits else 300, "lr": 3e-3, "shift": digits}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.small:
        args.epochs, args.restarts = 2, 2
    if args.views < 2 or min(args.restarts, args.heads) < 1:
        parser.error(
            f"--views must be >= 2, --restarts and --heads >= 1, got {args.views}, {args.restarts}, {args.heads}"
        )
    args.out = args.out or Path("runs") / f"peers-{args.data}-{args.views}"
    return args


def main(args: Any) -> dict[str, float]:
    """Fit every restart that is not done yet, print the table, give the summary."""
    args.out.mkdir(parents=True, exist_ok=True)
    data = (
        (load_digits("train"), load_digits("test")) if args.data == "digits" else load_mnist(args.mnist, args.download)
    )
    rows = []
    for number in range(args.restarts):
        path = args.out / f"restart-{number}.json"
        if not path.exists():
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(run(args, number, data), indent=1) + "\n")
            os.replace(temporary, path)
        rows.append(json.loads(path.read_text()))
    best = max(rows, key=lambda row: row["log_likelihood"])
    most = (args.views - 1) * np.log(CLASSES)
    print(
        f"| restart | log likelihood ratio (most {most:.3f}) | train | test | classes found | all heads, test | CPU s |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        mark = " (highest)" if row is best else ""
        heads = " ".join(f"{accuracy:.3f}" for accuracy in row["heads"])
        print(
            f"| {row['restart']} | {row['log_likelihood']:.3f}{mark} | {row['train_accuracy']:.3f} | "
            f"{row['test_accuracy']:.3f} | {row['classes_found']} | {heads} | {row['cpu_seconds']:.0f} |"
        )
    accuracy = [row["test_accuracy"] for row in rows]
    return {
        "test_accuracy_of_highest_likelihood": best["test_accuracy"],
        "median_test_accuracy": float(np.median(accuracy)),
        "worst_test_accuracy": min(accuracy),
        "best_test_accuracy": max(accuracy),
        "log_likelihood": best["log_likelihood"],
    }


if __name__ == "__main__":
    from _options import finish

    arguments = parse()
    finish(main(arguments), arguments.out)
