"""Contrastive methods on images: train, then judge answers and widths in one call. Your own folder of images, too.

    python examples/images.py --data digits --small --out runs/images
    python examples/images.py --data cifar10 --download --method simclr vsimclr --device cuda --out runs/images
    python examples/images.py --data FOLDER --method vsimclr --minutes 8 --out runs/images     # again until it is done
    python examples/images.py --table images.md --out runs/images

FOLDER has a subfolder of images per class, or the folders train and test (or val) of such. One JSON file per run;
runs that are there are not repeated, and with ``--minutes`` every call goes on where the last one stopped.
``--table`` writes the tables of what is there below the text of a page, and runs nothing.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _options import make_parser
from _runs import in_pieces, is_done, save_run, write_tables
from torch import Tensor, nn

from pyro_contrastive import diagnostics, guides, models, nets
from pyro_contrastive.data import (
    CORRUPTIONS,
    IMAGE_SETS,
    NUM_SEVERITIES,
    ViewLoader,
    crop_and_rotate,
    crop_flip_jitter,
    load_images,
)
from pyro_contrastive.fit import fit, pick_device
from pyro_contrastive.ops.random import derived_seed, seeded
from pyro_contrastive.schedules import warmup_cosine

METHODS = ("simclr", "supcon", "vsimclr", "vsupcon", "simsiam", "vi_simsiam", "mcinfonce", "rpm")
STRANGERS = {"mnist": "fashion_mnist", "fashion_mnist": "mnist", "cifar10": "svhn", "svhn": "cifar10"}
OPTIMIZERS = {"adamw": 1e-3, "sgd": 0.06, "lars": 0.3}  # rates for batches of 256; see build_optimizer
MARKER = "<!-- written by examples/images.py --table -->"


@dataclass(frozen=True)
class Setting:
    """Sizes that suit one kind of images.

    Attributes:
        steps: Optimiser steps.
        batch_size: Pairs per step.
        dim: Of the sphere's ambient space.
        width: Channels of the encoder's first stage.
        optimizer: A key of `OPTIMIZERS`.
        num_bank: Training images that neighbours and linear probe learn from.
        num_test: Test images.
        num_corrupted: Test images per kind and severity of corruption.
    """

    steps: int
    batch_size: int = 256
    dim: int = 32
    width: int = 32
    optimizer: str = "adamw"
    num_bank: int = 5_000
    num_test: int = 2_000
    num_corrupted: int = 500


EVERYTHING = {"num_bank": 10**9, "num_test": 10**9, "num_corrupted": 2_000}
SETTINGS = {  # by kind of images and --small
    ("tiny", True): Setting(300),
    ("grey", True): Setting(1_500),
    ("colour", True): Setting(500, dim=64, width=16),
    ("tiny", False): Setting(3_000, **EVERYTHING),
    ("grey", False): Setting(10_000, 512, 64, **EVERYTHING),
    ("colour", False): Setting(20_000, 512, 128, 64, "sgd", **EVERYTHING),
}


class Encoder(nn.Sequential):
    """A backbone, whose features are evaluated, and the hidden layer of a projection."""

    def __init__(self, backbone: nn.Module, *, bf16: bool) -> None:
        super().__init__(backbone, nets.projector(nets.feature_size(backbone)))
        self.bf16 = bf16
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def features(self, x: Tensor) -> Tensor:
        """What the backbone makes of images, ``(N, features)``."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            return self[0](x.contiguous(memory_format=torch.channels_last))

    def forward(self, x: Tensor) -> Tensor:
        """Features behind the projection's hidden layer."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            return self[1](self[0](x.contiguous(memory_format=torch.channels_last)))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the options; sizes that were left out depend on the images and ``--small``."""
    parser = make_parser(__doc__ or "")
    add = parser.add_argument
    add("--data", metavar="NAME|FOLDER|FILE", help=f"{', '.join(IMAGE_SETS)}; a folder; an npz file")
    add("--method", nargs="+", choices=METHODS, default=list(METHODS), help="default: all, one after the other")
    add("--root", default="data", metavar="DIR", help="where torchvision keeps its data sets; default: %(default)s")
    add("--download", action="store_true", help="let torchvision fetch what is missing")
    add("--size", type=int, metavar="PIXELS", help="resize the images; default: as they are, 32 for a folder")
    add("--ood", nargs="*", metavar="NAME|FOLDER|FILE", help="strangers; default: one that suits, if it is there")
    add("--minutes", type=float, help="stop cleanly after so much time; call again to go on")
    add("--steps", type=int, metavar="N", help="default, here and below: what suits the images and --small")
    add("--batch-size", type=int, metavar="N")
    add("--dim", type=int, metavar="D")
    add("--width", type=int, metavar="N")
    add("--num-bank", type=int, metavar="N", help="training images of neighbours and probe")
    add("--num-test", type=int, metavar="N", help="test images")
    add("--optimizer", choices=tuple(OPTIMIZERS), help="lars needs the package timm")
    add("--lr", type=float, help=f"default: {OPTIMIZERS} times batch size / 256 (adamw: its square root)")
    add("--weight-decay", type=float, default=1e-4, help="default: %(default)s")
    add("--warmup", type=float, default=0.05, metavar="SHARE", help="of the steps, before the cosine; default: .05")
    add("--temperature", type=float, default=0.2, help="of simclr, supcon, vsimclr, vsupcon; default: %(default)s")
    add("--beta", type=float, default=0.1, help="of vsimclr and vsupcon; default: %(default)s")
    add("--uniformity", choices=("none", "batch"), default="none", help="of vi_simsiam; default: %(default)s")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of the encoder; default: %(default)s")
    add("--compile", action="store_true", help="torch.compile the backbone")
    add("--table", type=Path, metavar="FILE", help="write the Markdown tables of what is in --out, and run nothing")
    args = parser.parse_args(argv)
    if args.out is None or (args.data is None and args.table is None):
        parser.error("--out is needed, and --data or --table")
    return args


def load(args: argparse.Namespace) -> dict[str, Any]:
    """Read training and test images, and strangers of the same size; choose the setting."""
    options = {"root": args.root, "download": args.download}
    train, test = (load_images(args.data, split, size=args.size, **options) for split in ("train", "test"))
    _, channels, side, _ = train[0].shape
    kind = "colour" if channels == 3 else "tiny" if side <= 16 else "grey"
    chosen = {key: getattr(args, key, None) for key in asdict(SETTINGS[kind, args.small])}
    setting = Setting(**{**asdict(SETTINGS[kind, args.small]), **{k: v for k, v in chosen.items() if v is not None}})
    strangers = {}
    asked = args.ood is not None
    for name in args.ood if asked else [STRANGERS[args.data]] if args.data in STRANGERS else []:
        try:
            images, _ = load_images(name, "test", size=side, channels=channels, **options)
            strangers[Path(name).stem] = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
        except FileNotFoundError:
            if asked:
                raise
            print(f"no strangers: {name} is not in {args.root}", flush=True)
    return {"train": train, "test": test, "kind": kind, "setting": setting, "strangers": strangers}


def build_augment(data: str, kind: str) -> Callable[..., Any]:
    """SimCLR's recipe for colour; crops, small rotations and shifts for grey images, mirrored where harmless."""
    if kind == "colour":
        return functools.partial(crop_flip_jitter, hue=0.1, probability=0.8, random_order=True)
    return functools.partial(crop_and_rotate, flip=data == "fashion_mnist")


def build_encoder(images: Tensor, kind: str, setting: Setting, small: bool, bf16: bool) -> Encoder:
    """A small ResNet-18 for colour, a few convolutions for grey images."""
    channels, width = images.shape[1], setting.width
    if kind == "colour":
        return Encoder(nets.small_resnet18(channels, width=width, pool=small), bf16=bf16)
    strides = (1, 2, 2) if kind == "tiny" else (2, 2, 2)
    return Encoder(nets.small_convnet(channels, widths=(width, 2 * width, 4 * width), strides=strides), bf16=bf16)


def build_pair(method: str, encoder: Encoder, dim: int, args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Model, guide and objective (None for Pyro's) of a method."""
    kernel = {"concentration": 1.0 / args.temperature}
    if method in ("simclr", "supcon"):
        guide: Any = guides.Delta(encoder, dim)
        return {"simclr": models.SimCLR, "supcon": models.SupCon}[method](guide, **kernel), guide, None
    if method in ("vsimclr", "vsupcon"):
        guide = guides.ProjectedNormal(encoder, dim)
        model: Any = {"vsimclr": models.VSimCLR, "vsupcon": models.VSupCon}[method](guide, beta=args.beta, **kernel)
        return model, guide, model.objective()
    if method == "simsiam":
        guide = guides.Siamese(encoder, dim, density="von_mises_fisher", width="fixed")
        return models.SimSiam(guide), guide, None
    if method == "vi_simsiam":
        guide = guides.Siamese(encoder, dim)
        return models.VISimSiam(guide, uniformity=args.uniformity), guide, None
    guide = guides.VonMisesFisher(encoder, dim)
    return (models.MCInfoNCE(guide) if method == "mcinfonce" else models.RPM(guide)), guide, None


def build_optimizer(name: str, batch_size: int, lr: float | None, weight_decay: float) -> Callable[..., Any]:
    """A builder for `fit`; rates are scaled to the batch (SGD and LARS linearly, AdamW by the square root)."""
    scale = batch_size / 256
    lr = OPTIMIZERS[name] * (math.sqrt(scale) if name == "adamw" else scale) if lr is None else lr
    if name == "adamw":
        return functools.partial(torch.optim.AdamW, lr=lr, weight_decay=weight_decay)
    if name == "sgd":
        return functools.partial(torch.optim.SGD, lr=lr, momentum=0.9, weight_decay=weight_decay)
    try:
        from timm.optim import Lars
    except ImportError as error:
        raise SystemExit("--optimizer lars needs timm: pip install timm, or choose sgd or adamw") from error
    return functools.partial(Lars, lr=lr, momentum=0.9, weight_decay=weight_decay)


def run(method: str, data: dict[str, Any], args: argparse.Namespace, deadline: float) -> bool:
    """Fit and judge one method, or go on with it; whether it is done."""
    setting: Setting = data["setting"]
    name = f"{Path(args.data).stem}-{'small' if args.small else 'full'}-{method}-{args.seed}"
    keys = ("data", "small", "seed", "lr", "weight_decay", "warmup", "temperature", "beta", "uniformity", "precision")
    config = {"method": method, **asdict(setting), **{key: getattr(args, key) for key in keys}}
    config["data"] = Path(args.data).stem
    file = args.out / f"{name}.json"
    if is_done(file, config):
        return True
    device, supervised = pick_device(args.device), method in ("supcon", "vsupcon")
    (images, labels), augment = data["train"], build_augment(args.data, data["kind"])
    with seeded(derived_seed(args.seed)):
        encoder = build_encoder(images, data["kind"], setting, args.small, args.precision == "bf16")
        model, guide, elbo = build_pair(method, encoder, setting.dim, args)
    if args.compile:
        encoder[0].compile()
    batch = min(setting.batch_size, len(images))
    loader = ViewLoader(images, augment, labels=labels if supervised else None, batch_size=batch, seed=args.seed)
    result = fit(
        model,
        guide,
        loader.to(device),
        steps=setting.steps,
        num_views=2 + supervised,
        optimizer=build_optimizer(setting.optimizer, batch, args.lr, args.weight_decay),
        schedule=warmup_cosine(args.warmup),
        elbo=elbo,
        seed=args.seed,
        device=device,
        **in_pieces(file, config, deadline),
    )
    spent = args.out / name / "seconds.json"  # of the calls so far
    seconds = [*(json.loads(spent.read_text()) if spent.exists() else []), result.seconds]
    spent.write_text(json.dumps(seconds))
    if result.status == "diverged":
        raise SystemExit(f"{name}: {result.message}")
    if result.status == "interrupted" or deadline - time.monotonic() < 30 * (args.minutes or 0):
        print(f"{name}: {result.message}; call again to go on", flush=True)
        return False  # the scores need time, too: they start in a call that has half of it left
    started = time.monotonic()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: setting.num_bank]
    scores = diagnostics.evaluate_representation(
        guide,
        (images[order], labels[order]),
        tuple(part[: setting.num_test] for part in data["test"]),
        features=encoder.features,
        augment=augment,
        num_corrupted=setting.num_corrupted,
        ood={name: images[: setting.num_test] for name, images in data["strangers"].items()},
        # a temperature is no statement on the views; RPM learns one, for the others two views share the latent
        pair_concentration=float(model.concentration) if method == "rpm" else math.inf,
        seed=args.seed,
    )
    print(f"{name}\n{scores.summary()}", flush=True)
    done = {
        "config": config,
        "figures": {"loss": result.history["loss"][-1], **scores.figures()},
        "seconds": sum(seconds),
        "seconds_of_scores": time.monotonic() - started,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
    }
    save_run(file, done)
    return True


def tables(folder: Path) -> str:
    """Markdown tables, two per set of images: what is answered, and what the widths know. Medians over seeds."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    lines = []
    for data, small in sorted({(run["config"]["data"], run["config"]["small"]) for run in runs}):
        groups = {m: [r for r in runs if (r["config"]["data"], r["config"]["small"], r["config"]["method"])
                      == (data, small, m)] for m in METHODS}  # fmt: skip
        groups = {method: found for method, found in groups.items() if found}
        lines += [f"## {data}{', small' if small else ''}", ""]
        for head, columns in COLUMNS.items():
            lines += [f"| {head} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
            for method, found in groups.items():
                cells = [" / ".join(_cell(found, key) for key in keys) for keys in columns.values()]
                cells = ["-" if set(cell) <= set("- /") else cell for cell in cells]
                lines.append(f"| {method} | {' | '.join(cells)} |")
            lines.append("")
    return "\n".join(lines)


def _cell(runs: list[dict[str, Any]], key: str) -> str:
    """Median over runs of a figure; of several, joined by "+", of their means."""
    if key == "runs":
        return str(len(runs))
    if key in ("steps", "batch_size"):
        return "{:,}".format(runs[0]["config"][key])
    if key == "seconds":
        return f"{median(run['seconds'] for run in runs):,.0f}"
    values = []
    for run in runs:
        names = [name for name in run["figures"] if name.startswith(f"{key}_") and not name.endswith("er")]
        found = [run["figures"].get(name) for name in (names if key in ("ood", "distance") else key.split("+"))]
        if found and None not in found:
            values.append(sum(found) / len(found))
    if not values:
        return "-"
    return f"{median(values):.{1 if 'rank' in key else 2 if 'information' in key else 3}f}"


def _ladder(name: str) -> tuple[str, ...]:
    """A figure by severity, over all kinds of corruption."""
    return tuple("+".join(f"{kind}_{name}_{i}" for kind in CORRUPTIONS) for i in range(1, NUM_SEVERITIES + 1))


COLUMNS: dict[str, dict[str, tuple[str, ...]]] = {
    "answers": {
        "runs": ("runs",),
        "linear probe": ("linear",),
        "5-NN": ("knn",),
        "information, nats": ("information",),
        "effective rank, features / latents": ("feature_rank", "latent_rank"),
        "AUROC strangers by distance": ("distance",),
        "alignment": ("alignment",),
        "uniformity": ("uniformity",),
        "5-NN by severity of corruption, 1 to 5": _ladder("accuracy"),
        "steps / batch": ("steps", "batch_size"),
        "seconds": ("seconds",),
    },
    "widths": {
        "mean uncertainty": ("uncertainty",),
        "AUROC wrong answers, clean / corrupted": ("wrong_auroc", "corrupted_wrong_auroc"),
        "5-NN by quartile, surest first": tuple(f"quartile_{i}" for i in range(1, 5)),
        "AUROC corrupted by severity, 1 to 5": _ladder("auroc"),
        "AUROC strangers by width": ("ood",),
        "length of pairs predicted, by quartile": tuple(f"length_predicted_{i}" for i in range(1, 5)),
        "realised": tuple(f"length_realised_{i}" for i in range(1, 5)),
    },
}


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, method by method, or write the tables."""
    args = parse(argv)
    started = time.monotonic()
    if args.table is not None:
        write_tables(args.table, MARKER, tables(args.out))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = math.inf if args.minutes is None else started + 60 * args.minutes
    try:
        data = load(args)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"images.py: {error}") from None
    for method in args.method:
        if not run(method, data, args, deadline):
            return


if __name__ == "__main__":
    main()
