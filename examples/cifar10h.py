"""Does the width of the posterior follow what people find ambiguous? CIFAR-10 with the answers of CIFAR-10H.

Two ways to make pairs: ``--variant soft`` draws two different images of one class from the soft labels of people (five
folds of the 10,000 test images), ``--variant self`` takes two augmentations of one of the 50,000 training images, which
needs no label, and scores all 10,000 test images (a "fold" is then another seed). Either way the model reads only
pairs; the answers of people judge the concentrations afterwards.

    python examples/cifar10h.py --data cifar10.npz --variant self --small --out runs/cifar-self
    python examples/cifar10h.py --data ROOT --download --counts cifar10h-counts.npy --out runs/cifar-soft

Several values of ``--concentration``, ``--lr``, ``--steps`` or ``--dim`` are candidates: the one with the highest
evidence of the validation pairs is scored, per fold. No score takes part in the choice, and the last step is taken.
Finished folds are skipped, interrupted ones go on from their checkpoint.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyro
import torch
from _options import finish, make_parser
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_contrastive import diagnostics, guides, models, nets
from pyro_contrastive.data import (
    Cifar10H,
    SoftLabelPairs,
    ViewLoader,
    crop_flip_jitter,
    crop_ladder,
    five_folds,
    load_cifar10h,
    shift_and_flip,
)
from pyro_contrastive.factors import infonce_log_ratio, log_ratio_factor
from pyro_contrastive.fit import fit, pick_device
from pyro_contrastive.ops.random import derived_seed, seeded

SMALL: dict[str, Any] = {"width": 16, "pool": True, "batch_size": 256, "steps": [400], "lr": [3e-3], "folds": [0, 1]}
FULL: dict[str, Any] = {"width": 64, "pool": False, "lr": [1e-3], "folds": [0, 1, 2, 3, 4]}
DEFAULTS: dict[tuple[str, bool], dict[str, Any]] = {  # by variant and --small
    ("soft", True): {**SMALL, "dim": [16], "centre": False},
    ("self", True): {**SMALL, "dim": [64], "centre": True},
    ("soft", False): {**FULL, "dim": [16], "centre": False, "batch_size": 256, "steps": [7_000]},
    ("self", False): {**FULL, "dim": [64], "centre": True, "batch_size": 512, "steps": [40_000]},
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the options; what was left out depends on ``--variant`` and ``--small``."""
    parser = make_parser(__doc__ or "")
    add = parser.add_argument
    add("--data", required=True, metavar="FILE|ROOT", help="npz file, or root folder of torchvision's CIFAR-10")
    add("--counts", metavar="FILE", help="CIFAR-10H's cifar10h-counts.npy; needed with a folder")
    add("--download", action="store_true", help="let torchvision fetch CIFAR-10 into the folder")
    add("--variant", choices=("soft", "self"), default="soft", help="default: %(default)s")
    add("--folds", type=int, nargs="+", metavar="F", help="folds 0..4; seeds for `self`")
    add("--evidence", choices=("exact", "moment_matched", "k_sample"), default="exact", help="default: %(default)s")
    add("--negatives", choices=("batch", "dissimilar"), default="batch", help="of `soft`; default: %(default)s")
    add("--concentration", type=float, nargs="+", default=[math.inf], metavar="K", help="of a pair; default: inf")
    add("--lr", type=float, nargs="+", help="default: 0.001, with --small 0.003")
    add("--dim", type=int, nargs="+", metavar="D", help="of the sphere's ambient space; default: 16, for `self` 64")
    add("--steps", type=int, nargs="+", metavar="N", help="default: 7,000, for `self` 40,000; with --small 400")
    add("--batch-size", type=int, metavar="N", help="pairs")
    add("--width", type=int, metavar="N", help="channels of ResNet-18's first stage: 64, or 16 with --small")
    add("--pool", action=argparse.BooleanOptionalAction, help="max-pool after the stem: a quarter of the arithmetic")
    add("--centre", action=argparse.BooleanOptionalAction, help="batch-normalise the features; default: for `self`")
    add("--bf16", action=argparse.BooleanOptionalAction, help="the encoder in bfloat16; default: on CUDA")
    args = parser.parse_args(argv)
    args.device = pick_device(args.device)
    defaults = {**DEFAULTS[args.variant, args.small], "bf16": args.device.type == "cuda"}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.negatives == "dissimilar" and (args.variant == "self" or args.evidence == "k_sample"):
        parser.error("--negatives dissimilar goes with --variant soft and a closed-form evidence")
    return args


class Encoder(nn.Sequential):
    """ResNet-18 of any width with a 3 x 3 stem for small images, ``(N, 3, H, W) -> (N, 8 width)``."""

    def __init__(self, width: int, *, pool: bool = False, centre: bool = False, bf16: bool = False) -> None:
        from torchvision.transforms.v2 import Normalize

        super().__init__(
            Normalize([0.491, 0.482, 0.447], [0.245, 0.243, 0.261]),  # of the training pixels
            *nets.small_resnet18(3, width=width, pool=pool),
            nn.BatchNorm1d(8 * width) if centre else nn.Identity(),
        )
        self.bf16 = bf16
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        """Run the layers, in bfloat16 where asked for."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            return super().forward(x.contiguous(memory_format=torch.channels_last))


class SelectedNegatives(models.MCInfoNCE):
    """MCInfoNCE with a mask of the candidates that count, True on the diagonal: the authors' choice of negatives."""

    def forward(self, x1: Tensor, x2: Tensor, keep: Tensor) -> None:
        """Emit the sites and the factor of the closed-form evidences."""
        posteriors = self.guide.posterior(x1), self.guide.posterior(x2)
        with pyro.plate("pairs", len(x1), dim=-1):
            for name, posterior in zip(("z1", "z2"), posteriors, strict=True):
                pyro.sample(name, posterior)
            log_ratios = self.partner_logits(x1, x2, posteriors=posteriors)
            log_ratio_factor("positive", log_ratios.masked_fill(~keep, -math.inf), symmetric=True)


def loaders(data: Cifar10H, fold: int, args: argparse.Namespace) -> tuple[ViewLoader, ViewLoader, Tensor]:
    """Give training pairs, validation pairs and the indices of the images to score."""
    seed, common = derived_seed(args.seed, fold), {"batch_size": args.batch_size}
    if args.variant == "self":
        assert data.train_images is not None
        order = torch.randperm(len(data.train_images), generator=torch.Generator().manual_seed(0))
        images = data.train_images[order]
        cut = len(images) // 10  # 5,000 for validation
        train = ViewLoader(images[cut:], crop_flip_jitter, seed=seed, **common)
        validation = ViewLoader(images[:cut], crop_flip_jitter, shuffle=False, **common)
        test = torch.arange(len(data.images))
    else:
        part = five_folds(fold, num_items=len(data.images))
        common["negatives"] = args.negatives
        images, labels = data.images, data.soft_labels
        train = SoftLabelPairs(images[part.train], labels[part.train], shift_and_flip, seed=seed, **common)
        validation = SoftLabelPairs(
            images[part.validation], labels[part.validation], shift_and_flip, shuffle=False, **common
        )
        test = part.test
    return train.to(args.device), validation.to(args.device), test


@torch.no_grad()
def evidence(model: models.MCInfoNCE, pairs: Iterable[tuple[Tensor, ...]]) -> float:
    """Mean log evidence of pairs against their batch, in nats per pair: what candidates are compared by."""
    values = []
    for x1, x2, *keep in pairs:
        log_ratios = model.partner_logits(x1, x2)
        log_ratios = log_ratios.masked_fill(~keep[0], -math.inf) if keep else log_ratios
        values.append(infonce_log_ratio(log_ratios, symmetric=True).mean())
    return float(torch.stack(values).mean())


@torch.no_grad()
def encode(guide: Any, images: Tensor, device: torch.device, label: str) -> tuple[Tensor, Tensor]:
    """Mean directions ``(N, d)`` and concentrations ``(N,)``, on the CPU."""
    found = []
    for part in tqdm(images.split(500), desc=label, unit="batch"):
        part = part.to(device)
        posterior = guide.posterior(part.float() / 255.0 if part.dtype == torch.uint8 else part)
        found.append((posterior.mean_direction.cpu(), posterior.concentration.cpu()))
    directions, concentrations = zip(*found, strict=True)
    return torch.cat(directions), torch.cat(concentrations)


def nearest_is_right(directions: Tensor, labels: Tensor) -> Tensor:
    """Whether the nearest *other* image by cosine has the same label, ``(N,)``: its mean is recall@1."""
    nearest = []
    for start in range(0, len(directions), 1_000):
        cosine = directions[start : start + 1_000] @ directions.mT
        nearest.append(cosine.diagonal_scatter(cosine.new_full((len(cosine),), -2.0), offset=start).argmax(1))
    return labels[torch.cat(nearest)] == labels


def score(guide: Any, data: Cifar10H, test: Tensor, device: torch.device, label: str) -> dict[str, float]:
    """Score the test images and their crops, one crop per image; higher is better but for AURC."""
    cropped, fraction = crop_ladder(data.images)
    labels, found = data.majority[test], {}
    for suffix, images in (("", data.images), ("_cropped", cropped)):
        directions, kappa = encode(guide, images[test], device, label + suffix)
        correct = nearest_is_right(directions, labels)
        quarters = diagnostics.accuracy_by_quartile(kappa, correct)
        curve = diagnostics.risk_coverage(kappa, correct)
        if suffix:
            found["spearman_crop"] = diagnostics.corruption_correlation(kappa, -fraction[test])
        else:
            found["spearman_entropy"] = diagnostics.corruption_correlation(kappa, data.entropy[test])
            found["mean_length"] = diagnostics.aggregate_uniformity(directions).mean_resultant_length
        found["recall_at_1" + suffix] = float(correct.float().mean())
        found["aurc" + suffix] = curve.aurc
        found["best_aurc" + suffix] = curve.best_aurc
        found["surest_quarter" + suffix] = float(quarters[0])
        found["least_sure_quarter" + suffix] = float(quarters[-1])
        for percent in (5, 95):
            found[f"kappa_{percent}{suffix}"] = float(np.percentile(kappa, percent))
    return found


def run_fold(data: Cifar10H, fold: int, args: argparse.Namespace) -> dict[str, Any]:
    """Fit every candidate, score the one with the highest validation evidence; read the result if it is there."""
    places = {"data", "counts", "download", "out", "device", "small", "folds"}
    config = {"fold": fold, **{key: str(value) for key, value in vars(args).items() if key not in places}}
    file = args.out and args.out / f"fold{fold}.json"
    if file and file.exists():
        done = json.loads(file.read_text())
        if done["config"] != config:
            raise SystemExit(f"{file} was made with other options; choose another --out or delete it")
        return done
    train, validation, test = loaders(data, fold, args)
    values: dict[str, float] = {}
    for concentration, lr, dim, steps in itertools.product(args.concentration, args.lr, args.dim, args.steps):
        candidate = f"k{concentration:g}-lr{lr:g}-d{dim}-n{steps}"
        with seeded(derived_seed(args.seed, fold)):
            guide = guides.VonMisesFisher(
                Encoder(args.width, pool=args.pool, centre=args.centre, bf16=args.bf16), dim, batch_norm=False
            )
        build = SelectedNegatives if args.negatives == "dissimilar" else models.MCInfoNCE
        model = build(guide, concentration=concentration, evidence=args.evidence)
        result = fit(
            model,
            guide if build is models.MCInfoNCE else lambda x1, x2, keep, guide=guide: guide(x1, x2),
            train,
            steps=steps,
            num_views=None,
            lr=lr,
            seed=derived_seed(args.seed, fold),
            device=args.device,
            out=args.out and args.out / f"fold{fold}" / candidate,
            config=config,
            progress=f"fold {fold} {candidate}",
        )
        if result.status != "done":
            raise SystemExit(f"fold {fold}, {candidate}: {result.message}")
        values[candidate] = evidence(model, validation)
        if values[candidate] == max(values.values()):
            chosen, best = candidate, guide
            scores = {"validation_evidence": values[chosen], "train_evidence": -result.history["loss"][-1]}
    scores |= score(best, data, test, args.device, f"fold {fold} score")
    done = {"config": config, "chosen": chosen, "validation_evidence": values, "scores": scores}
    if file:
        file.write_text(json.dumps(done, indent=2) + "\n")
    return done


def main(argv: list[str] | None = None) -> None:
    """Run the folds, then write ``summary.json`` (means and standard errors over folds) and ``table.md``."""
    args = parse(argv)
    data = load_cifar10h(args.data, counts=args.counts, train=args.variant == "self", download=args.download)
    rows = [run_fold(data, fold, args) for fold in args.folds]
    figures = {}
    lines = [
        "| score | mean | s.e. | "
        + " | ".join(f"fold {f}: {r['chosen']}" for f, r in zip(args.folds, rows, strict=True))
        + " |"
    ]
    lines.append("|---" * (3 + len(rows)) + "|")
    for name in rows[0]["scores"]:
        values = np.array([row["scores"][name] for row in rows])
        figures[name] = float(values.mean())
        cells = [f"{figures[name]:.3g}", "", *(f"{value:.3g}" for value in values)]
        if len(rows) > 1:
            figures[name + "_se"] = float(values.std(ddof=1) / math.sqrt(len(rows)))
            cells[1] = f"{figures[name + '_se']:.2g}"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    finish(figures, args.out)
    if args.out:
        (args.out / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
