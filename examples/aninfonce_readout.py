"""What a representation keeps of the class and of the augmentation: InfoNCE, AnInfoNCE, and attempts to keep both.

    python examples/aninfonce_readout.py --data cifar10 --download --out runs/readout
    python examples/aninfonce_readout.py --data FOLDER --minutes 8 --out runs/readout            # again until done
    python examples/aninfonce_readout.py --table readout.md --out runs/readout

Linear probes read the class of an image and the parameters of its augmentation (each one above or below its median)
off the features before the projection and off the latents behind it. One JSON file per run; runs that are there are not
repeated. ``--full`` is meant for a GPU. ``--table`` writes the table of what is there and runs nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _options import make_parser
from _runs import in_pieces, is_done, save_run, write_tables
from images import SETTINGS, Encoder, build_encoder, build_optimizer
from torch import Tensor

from pyro_contrastive import guides, models
from pyro_contrastive.data import IMAGE_SETS, JITTER_DRAWS, ViewLoader, crop_flip_jitter, load_images
from pyro_contrastive.diagnostics import linear_probe
from pyro_contrastive.fit import fit, pick_device
from pyro_contrastive.ops.random import derived_seed, seeded
from pyro_contrastive.schedules import warmup_cosine

MARKER = "<!-- written by examples/aninfonce_readout.py --table -->"
READ = ("size", "aspect", "x", "y", "brightness", "contrast", "saturation", "hue")  # a flip shows in no single view
SHARED, FREE = 12.5, 0.5  # stated precisions of what a pair shares, and of what it does not
STYLE = 4  # one axis in so many is for the augmentation
augment = functools.partial(crop_flip_jitter, hue=0.1, random_order=True)  # every view is jittered

ROWS = {
    "untrained": "the encoder as it starts",
    "infonce": "views of one image, InfoNCE with a learned temperature",
    "aninfonce": "the same, a precision per axis",
    "blocks": f"the same, precisions stated: {SHARED:g} on 3/4 of the axes, {FREE:g} on the rest",
    "augmentation": "two images with one augmentation instead, a precision per axis",
    "ensemble": "both kinds of pairs, a precision per axis and kind",
    "ensemble-blocks": f"both, stated: {SHARED:g} on the axes of the kind (3/4 and 1/4), {FREE:g} on the others",
}


class PairsOf(ViewLoader):
    """The views that a row compares: x2 shares the image with x1, x3 (another image) the augmentation.

    ``(x1, x2)``, for the row "augmentation" ``(x1, x3)``, for ensembles ``(x1, x2, x3)``.
    """

    def __init__(self, images: Tensor, row: str, **options: Any) -> None:
        super().__init__(images, augment, **options)
        self.chosen = (0, 1, 2) if row.startswith("ensemble") else (0, 2) if row == "augmentation" else (0, 1)

    def _views(self, index: Tensor, generator: torch.Generator) -> list[Tensor]:
        def draw() -> Tensor:
            return torch.rand((15, len(index)), generator=generator, device=self.images.device)

        other = torch.randint(len(self.images), (len(index),), generator=generator, device=self.images.device)
        first, images = draw(), self.images[index]
        views = ((images, first), (images, draw()), (self.images[other], first))
        return [augment(x, draw=numbers)[0] for x, numbers in (views[k] for k in self.chosen)]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the options."""
    parser = make_parser(__doc__ or "")
    add = parser.add_argument
    add("--data", metavar="NAME|FOLDER|FILE", help=f"colour images: {', '.join(IMAGE_SETS)}; a folder; an npz file")
    add("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS), help="default: all")
    add("--root", default="data", metavar="DIR", help="where torchvision keeps its data sets; default: %(default)s")
    add("--download", action="store_true", help="let torchvision fetch what is missing")
    add("--full", action="store_true", help="the sizes of examples/images.py for a GPU")
    add("--steps", type=int, metavar="N", help="default: 500, and 20,000 with --full")
    add("--minutes", type=float, help="stop cleanly after so much time; call again to go on")
    add("--table", type=Path, metavar="FILE", help="write the Markdown table of what is in --out, and run nothing")
    args = parser.parse_args(argv)
    if args.out is None or (args.data is None and args.table is None):
        parser.error("--out is needed, and --data or --table")
    return args


def build_pair(row: str, encoder: Encoder, dim: int) -> tuple[Any, Any]:
    """Model and guide of a row; the guide is deterministic, as in the paper."""
    guide = guides.Delta(encoder, dim)
    style = torch.arange(dim) >= dim - dim // STYLE
    content, augmented = torch.where(style, FREE, SHARED), torch.where(style, SHARED, FREE)
    if row == "infonce":
        return models.MCInfoNCE(guide, concentration=10.0, evidence="elbo", learn_concentration=True), guide
    if row == "blocks":
        return models.AnInfoNCE(guide, precision=content, learn_precision=False), guide
    if row == "ensemble":
        return models.AnInfoNCEEnsemble(guide, 2), guide
    if row == "ensemble-blocks":
        both = torch.stack([content, augmented])
        return models.AnInfoNCEEnsemble(guide, 2, precision=both, learn_precision=False), guide
    return models.AnInfoNCE(guide), guide  # of views of one image, or of one augmentation


@torch.no_grad()
def read_out(guide: Any, encoder: Encoder, train: Any, test: Any, blocks: bool, small: bool, seed: int) -> dict:
    """Accuracy of linear probes: of the class on plain images, of the augmentation on augmented ones."""
    num_train, num_test = (300, 200) if small else (10_000, 5_000)
    images = [x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:n]]
              for x, n in ((train[0], num_train), (test[0], num_test))]  # fmt: skip
    labels = [y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:n]]
              for y, n in ((train[1], num_train), (test[1], num_test))]  # fmt: skip
    generator = torch.Generator().manual_seed(derived_seed(seed, 1))
    draws = [torch.rand((15, len(x)), generator=generator) for x in images]

    def embed(view: Callable[[Tensor, slice], Tensor], x: Tensor) -> dict[str, Tensor]:
        device = next(guide.parameters()).device
        parts = []
        for start in range(0, len(x), 1_000):
            chosen = slice(start, start + 1_000)
            seen = view(x[chosen], chosen).to(device)
            parts.append((encoder.features(seen).float().cpu(), guide.posterior(seen).mean.float().cpu()))
        features, latents = (torch.cat(part) for part in zip(*parts, strict=True))
        found = {"features": features, "latents": latents}
        if blocks:
            cut = latents.shape[1] - latents.shape[1] // STYLE
            found |= {"content": latents[:, :cut], "style": latents[:, cut:]}
        return found

    plain = [embed(lambda x, _: x.float() / 255, x) for x in images]
    views = [embed(lambda x, chosen, d=d: augment(x, draw=d[:, chosen])[0], x)
             for x, d in zip(images, draws, strict=True)]  # fmt: skip
    figures: dict[str, float] = {}
    for place in plain[0]:
        figures[f"class_{place}"] = linear_probe(plain[0][place], labels[0], plain[1][place], labels[1]).accuracy
        answers = []
        for name in READ:
            targets = [(d[JITTER_DRAWS[name]] > 0.5).long() for d in draws]
            probe = linear_probe(views[0][place], targets[0], views[1][place], targets[1])
            figures[f"{name}_{place}"] = probe.accuracy
            answers.append(probe.accuracy)
        figures[f"augmentation_{place}"] = sum(answers) / len(answers)
    return figures


def run(row: str, train: Any, test: Any, args: argparse.Namespace, deadline: float) -> bool:
    """Fit one row and read it out, or go on with it; whether it is done."""
    setting = SETTINGS["colour", not args.full]
    if args.small:
        setting = dataclasses.replace(setting, steps=3, batch_size=32, width=4, dim=8)
    setting = dataclasses.replace(setting, steps=args.steps or setting.steps)
    config = {"row": row, "data": Path(args.data).stem, "full": args.full, "seed": args.seed}
    config |= {key: getattr(setting, key) for key in ("steps", "batch_size", "dim", "width", "optimizer")}
    name = f"{config['data']}-{'full' if args.full else 'small'}-{row}-{args.seed}"
    file = args.out / f"{name}.json"
    if is_done(file, config):
        return True
    device = pick_device(args.device)
    with seeded(derived_seed(args.seed)):
        encoder = build_encoder(train[0], "colour", setting, not args.full, bf16=device.type == "cuda")
        model, guide = build_pair(row, encoder, setting.dim)
    loss, precision = math.nan, None
    if row == "untrained":
        guide.to(device).eval()
    else:
        loader = PairsOf(train[0], row, batch_size=min(setting.batch_size, len(train[0])), seed=args.seed)
        result = fit(
            model,
            guide,
            loader.to(device),
            steps=setting.steps,
            num_views=None,
            optimizer=build_optimizer(setting.optimizer, setting.batch_size, None, 1e-4),
            schedule=warmup_cosine(0.05),
            seed=args.seed,
            device=device,
            **in_pieces(file, config, deadline),
        )
        if result.status == "diverged":
            raise SystemExit(f"{name}: {result.message}")
        if result.status == "interrupted":
            print(f"{name}: {result.message}; call again to go on", flush=True)
            return False
        loss = result.history["loss"][-1]
        precision = model.precision.detach().cpu().tolist() if hasattr(model, "precision") else None
    figures = read_out(guide, encoder, train, test, "blocks" in row, args.small, args.seed)
    print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in figures.items()), flush=True)
    save_run(file, {"config": config, "figures": {"loss": loss, **figures}, "precision": precision})
    return True


def tables(folder: Path) -> str:
    """Markdown tables: medians over the seeds."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    lines, everywhere = [], ("features", "latents", "content", "style")
    for data, full in sorted({(run["config"]["data"], run["config"]["full"]) for run in runs}):
        chosen = [run for run in runs if (run["config"]["data"], run["config"]["full"]) == (data, full)]
        places = [place for place in everywhere if any(f"class_{place}" in run["figures"] for run in chosen)]
        lines += [f"## {data}, {'full' if full else 'small'}", "", "Class / augmentation, share of right answers.", ""]
        lines += [f"| row | seeds | {' | '.join(places)} | steps |", "|---" * (len(places) + 3) + "|"]
        for row, about in ROWS.items():
            found = [run for run in chosen if run["config"]["row"] == row]
            if found:
                cells = [f"{_median(found, f'class_{p}')} / {_median(found, f'augmentation_{p}')}" for p in places]
                seeds = " ".join(str(run["config"]["seed"]) for run in found)
                steps = 0 if row == "untrained" else found[0]["config"]["steps"]
                lines.append(f"| {row}: {about} | {seeds} | {' | '.join(cells)} | {steps} |")
        lines += ["", "Features, augmentation by parameter.", ""]
        lines += [f"| row | {' | '.join(READ)} |", "|---" * (len(READ) + 1) + "|"]
        for row in ROWS:
            found = [run for run in chosen if run["config"]["row"] == row]
            if found:
                lines.append(f"| {row} | {' | '.join(_median(found, f'{name}_features') for name in READ)} |")
        lines.append("")
    return "\n".join(lines)


def _median(runs: list[dict], key: str) -> str:
    values = [run["figures"][key] for run in runs if key in run["figures"]]
    return f"{median(values):.3f}" if values else "-"


def main(args: argparse.Namespace) -> None:
    """Run what is missing."""
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = math.inf if args.minutes is None else time.monotonic() + 60 * args.minutes
    options = {"root": args.root, "download": args.download}
    train, test = (load_images(args.data, split, **options) for split in ("train", "test"))
    if train[0].shape[1] != 3:
        raise SystemExit(f"--data must be colour images, got {args.data} with {train[0].shape[1]} channel")
    for row in args.rows:
        if not run(row, train, test, args, deadline):
            break


if __name__ == "__main__":
    arguments = parse()
    if arguments.table is None:
        main(arguments)
    else:
        write_tables(arguments.table, MARKER, tables(arguments.out))
