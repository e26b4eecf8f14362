"""Exact, moment-matched and K-sample evidence of MCInfoNCE: error of the concentrations against CPU seconds.

All start from the same weights, see the same stream of pairs and have the same CPU time, of which a cosine schedule
makes the most; the number of steps follows from a few that are timed first. Best on an idle machine with
``OMP_NUM_THREADS=1``. The cost of the evidence alone is in ``python -m benchmarks.evidence``.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _runs import save_run

from pyro_contrastive import guides, models, nets
from pyro_contrastive.data import SphereWorld
from pyro_contrastive.fit import fit
from pyro_contrastive.ops.random import seeded

CONTENDERS: dict[str, dict[str, Any]] = {
    "exact": {"evidence": "exact"},
    "moment-matched": {"evidence": "moment_matched"},
    **{f"{k} samples": {"evidence": "k_sample", "num_samples": k} for k in (16, 64, 512)},
}
SETTINGS = ("dim", "concentration", "pair_concentration", "width", "batch_size", "seed", "batch_norm")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS, metavar="NAME")
    parser.add_argument("--cpu-seconds", type=float, default=240.0, metavar="S", help="of each; default: %(default)s")
    parser.add_argument("--steps", type=int, metavar="N", help="so many instead, whatever they cost")
    parser.add_argument("--dim", type=int, default=10, metavar="D", help="default: %(default)s")
    parser.add_argument(
        "--concentration",
        nargs=2,
        type=float,
        default=(16.0, 64.0),
        metavar="KAPPA",
        help="range of the true ones; default: 16 64",
    )
    parser.add_argument(
        "--pair-concentration", type=float, default=20.0, metavar="KAPPA", help="known to all; default: %(default)s"
    )
    parser.add_argument(
        "--batch-norm", action=argparse.BooleanOptionalAction, default=True, help="of the guide; default: yes"
    )
    parser.add_argument("--width", type=int, default=128, metavar="N", help="of both layers; default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/race"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw what is in --out and run nothing")
    parser.add_argument("--small", action="store_true", help="a fraction of a CPU second each: shows that it runs")
    args = parser.parse_args(argv)
    if args.small:
        args.cpu_seconds, args.batch_size = 0.3, 32
    return args


class Watched:
    """A stream that calls back before chosen steps, and does not count the time that takes.

    Args:
        stream: Batches.
        steps: Before which of them to call, counted from 0.
        callback: Called with the step and the CPU seconds used up to it.
    """

    def __init__(self, stream: Iterator[Any], steps: set[int], callback: Callable[[int, float], None]) -> None:
        self.stream, self.steps, self.callback = stream, steps, callback
        self.step, self.excluded, self.started = 0, 0.0, time.process_time()

    def __iter__(self) -> Watched:
        return self

    def seconds(self) -> float:
        """CPU seconds of training so far."""
        return time.process_time() - self.started - self.excluded

    def __next__(self) -> Any:
        if self.step in self.steps:
            before = time.process_time()
            self.callback(self.step, self.seconds())
            self.excluded += time.process_time() - before
        self.step += 1
        return next(self.stream)


def race(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train one contender for its CPU time; give the curve of its error."""
    world = SphereWorld(args.dim, tuple(args.concentration), args.pair_concentration)
    test = world.sample(2_500, seed=1)
    with seeded(args.seed):
        guide = guides.VonMisesFisher(
            nets.mlp([world.observed_dim, args.width, args.width]), args.dim, batch_norm=args.batch_norm
        )
    curve: list[dict[str, float]] = []

    def note(step: int, seconds: float) -> None:
        with torch.no_grad():
            kappa = guide.posterior(test.x1).concentration
        errors = (kappa - test.concentration1).abs() / test.concentration1
        curve.append({"step": step, "cpu_seconds": seconds, "kappa_error": float(errors.mean())})

    def train(guide: guides.VonMisesFisher, stream: Watched, steps: int, progress: bool | str) -> None:
        model = models.MCInfoNCE(guide, concentration=args.pair_concentration, **CONTENDERS[name])
        fit(model, guide, stream, steps=steps, lr=2e-3, seed=args.seed, device="cpu", progress=progress)

    begin: list[float] = []
    trial = Watched(world.batches(args.batch_size, args.seed), {2}, lambda _, seconds: begin.append(seconds))
    train(copy.deepcopy(guide), trial, 6, False)
    steps = args.steps or max(2, round(args.cpu_seconds / ((trial.seconds() - begin[0]) / 4)))

    marks = {round(steps * share) for share in (0, 0.01, 0.02, 0.05, *(i / 10 for i in range(1, 10)))}
    stream = Watched(world.batches(args.batch_size, args.seed), marks, note)
    train(guide, stream, steps, name)
    note(steps, stream.seconds())
    settings = {key: getattr(args, key) for key in SETTINGS}
    return {"name": name, **settings, "curve": curve}


def draw(folder: Path, file: Path) -> None:
    """Draw the curves of a folder."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter, StrMethodFormatter

    figure = Figure(figsize=(6.4, 4.4), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7")  # Okabe and Ito 2008
    for (name, colour), marker in zip(zip(CONTENDERS, colours, strict=True), "osD^v", strict=True):
        path = folder / f"{name.replace(' ', '-')}.json"
        if path.exists():
            curve = json.loads(path.read_text())["curve"][1:]
            x, y = ([point[key] for point in curve] for key in ("cpu_seconds", "kappa_error"))
            label = f"{name} ({curve[-1]['step']:,.0f} steps)"
            axes.plot(x, y, color=colour, marker=marker, markersize=4, linewidth=1.6, label=label)
    axes.set(xscale="log", yscale="log")
    for axis, formatter in ((axes.xaxis, StrMethodFormatter("{x:g}")), (axes.yaxis, PercentFormatter(1.0, decimals=0))):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(formatter)
    axes.set_xlabel("CPU seconds of training", fontsize=11)
    axes.set_ylabel("mean relative error of the concentration", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    axes.legend(fontsize=9, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def main(args: argparse.Namespace) -> None:
    """Race, time or draw."""
    if args.figure is not None:
        draw(args.out, args.figure)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.contenders:
        path = args.out / f"{name.replace(' ', '-')}.json"
        if path.exists():
            continue
        result = race(name, args)
        save_run(path, result)
        print(name, result["curve"][-1], flush=True)


if __name__ == "__main__":
    main(parse())
