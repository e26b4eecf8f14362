"""VI-SimSiam: does the predicted concentration mean what it says, with and without the uniformity term?

``python examples/vi_simsiam.py --out runs/vi_simsiam`` fits every row of both worlds with every seed: pairs of damaged
digits, whose damage is known, and pairs of `data.SphereWorld`, whose posterior is known. One JSON file per run; files
that are there are not run again, so it can be interrupted and repeated. ``--table FILE.md`` writes the tables of what
is there, below the text of the page, and the runs themselves into FILE.json; it runs nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from _runs import save_run, write_all_runs, write_tables
from torch import nn

from pyro_contrastive import diagnostics, guides, models, nets
from pyro_contrastive.data import SphereWorld, ViewLoader, corrupt, load_digits, shift_and_dropout
from pyro_contrastive.fit import fit
from pyro_contrastive.guides.siamese import Branch
from pyro_contrastive.ops import bessel_ratio, inverse_bessel_ratio
from pyro_contrastive.ops.random import derived_seed, seeded

PAIR_CONCENTRATION = 20.0
CONCENTRATIONS = (16.0, 64.0)
COPIES = 4  # damaged copies of every test digit
MAX_LEVEL = 0.8  # largest share of pixels that a damaged digit loses, as in training


@dataclass(frozen=True)
class Row:
    """One way to fit.

    Attributes:
        about: For the table.
        guide: Arguments of `guides.Siamese`.
        uniformity: Of `models.VISimSiam`.
        dim: Of the sphere.
    """

    about: str
    guide: Mapping[str, Any] = field(default_factory=dict)
    uniformity: str = "none"
    dim: int = 16


FIXED = {"density": "von_mises_fisher", "width": "fixed"}
LARGE: dict[str, Any] = {"width": "fixed", "concentration": 1_000.0, "predictor": nn.Identity()}
SYMMETRIC = {"stop_gradient": False, "predictor": nn.Identity()}
ROWS: dict[str, dict[str, Row]] = {
    "digits": {
        "published": Row("power spherical, kappa(x), no uniformity"),
        "vmf": Row("von Mises-Fisher instead", {"density": "von_mises_fisher"}),
        "projection": Row("kappa read off the projection", {"width_input": "projection"}),
        "simsiam": Row("kappa fixed, von Mises-Fisher: the negative cosine", FIXED),
        "uniformity": Row("uniformity over the batch added", uniformity="batch"),
        "rpm": Row("uniformity, no predictor, no stop-gradient", SYMMETRIC, "batch"),
        "no-stop": Row("as published, without stop-gradient", {"stop_gradient": False}),
        "no-predictor": Row("kappa = 1,000, no predictor", LARGE),
        "collapse": Row(
            "kappa = 1,000, no predictor, no stop-gradient, heads not standardised",
            LARGE | {"stop_gradient": False, "batch_norm": False},
        ),
    },
    "sphere": {
        f"{name}-{dim}": Row(f"d = {dim}, {about}", options, uniformity, dim)
        for dim in (3, 10)
        for name, about, options, uniformity in (
            ("published", "as published", {}, "none"),
            ("uniformity", "uniformity over the batch added", {}, "batch"),
            ("rpm", "uniformity, no predictor, no stop-gradient", SYMMETRIC, "batch"),
        )
    },
}
LR = {"digits": 1e-3, "sphere": 2e-3}


def run(name: str, world: str, seed: int, *, steps: int, batch_size: int, lr: float, device: str) -> dict[str, Any]:
    """Fit and score one row with one seed.

    Returns:
        Settings, CPU seconds of training (this process) and scores, all of them JSON values.
    """
    row = ROWS[world][name]
    sphere = SphereWorld(row.dim, CONCENTRATIONS, PAIR_CONCENTRATION, seed=seed)
    digits = world == "digits"
    with seeded(derived_seed(seed)):
        encoder = nets.mlp([64 if digits else sphere.observed_dim, 128, 128], batch_norm=digits)
        guide = guides.Siamese(encoder, row.dim, **row.guide)
    model = models.SimSiam(guide) if name == "simsiam" else models.VISimSiam(guide, uniformity=row.uniformity)
    images = load_digits("train")[0]
    data: Any = ViewLoader(images, shift_and_dropout, batch_size=batch_size, seed=seed)
    if not digits:
        data = sphere.batches(batch_size, seed=seed)
    started = time.process_time()
    result = fit(
        model, guide, data, steps=steps, lr=lr, seed=seed, device=device, progress=f"{name}, {world}, seed {seed}"
    )
    seconds = time.process_time() - started
    scores = score_digits(guide.cpu(), seed) if digits else score_sphere(guide.cpu(), sphere, seed)
    settings = {"row": name, "world": world, "seed": seed, "steps": steps, "batch_size": batch_size, "lr": lr}
    return {**settings, "status": result.status, "loss": result.history["loss"][-1], "cpu_seconds": seconds, **scores}


def score_width(branch: Branch, other: Branch) -> dict[str, Any]:
    """Collapse, and the width of the predictions against the other view's points."""
    spectrum = diagnostics.embedding_spectrum(branch.point)
    check = diagnostics.resultant_length_check(branch.prediction, other.point)
    stationary = diagnostics.stationarity_check(branch.prediction, other.point)
    caps = diagnostics.coverage(diagnostics.cap_pit(branch.prediction, other.point))
    return {
        "spread": spectrum.spread,
        "effective_rank": spectrum.effective_rank,
        "dimensions": diagnostics.judge_dimensions(branch.point).status,
        "predicted_length": check.predicted.tolist(),
        "realised_length": check.realised.tolist(),
        "length_gap": check.largest_gap,
        "factor": stationary.common_factor,
        "partner_coverage": caps.empirical.tolist(),
    }


@torch.no_grad()
def score_digits(guide: guides.Siamese, seed: int) -> dict[str, Any]:
    """Score a guide on copies of the test digits.

    Predictions are held against the points of a second view, as in training. For kappa and neighbours the copies lose
    pixels and are not shifted; the neighbours are the clean training digits, by the encoder's features.
    """
    (train, train_labels), (test, labels) = load_digits("train"), load_digits("test")
    generator = torch.Generator().manual_seed(derived_seed(seed, 1))
    copies, targets = test.repeat(COPIES, 1, 1, 1), labels.repeat(COPIES)
    branch, other = (guide.branch(shift_and_dropout(copies, generator)[0]) for _ in range(2))
    level = MAX_LEVEL * torch.rand(len(copies), generator=generator)
    damaged = corrupt(copies, level, generator)
    _, kappa = diagnostics.direction_and_concentration(guide.posterior(damaged))
    bank = guide.encoder(train)
    correct = diagnostics.knn_correct(bank, train_labels, guide.encoder(damaged), targets)
    return {
        **score_width(branch, other),
        "kappa": np.quantile(kappa, [0.05, 0.5, 0.95]).tolist(),
        "spearman": none_if_nan(diagnostics.corruption_correlation(kappa, level)),
        "knn_clean": diagnostics.knn_accuracy(bank, train_labels, guide.encoder(test), labels),
        "knn_damaged": float(correct.mean()),
        "quartiles": diagnostics.accuracy_by_quartile(kappa, correct).tolist(),
    }


@torch.no_grad()
def score_sphere(guide: guides.Siamese, world: SphereWorld, seed: int) -> dict[str, Any]:
    r"""Score a guide against the exact posterior of a view, and against the exact law of the other view's direction.

    The mean direction m' of the other view's posterior is predicted from this one with the mean resultant length
    :math:`A(\kappa) A(\kappa_{pair}) E[A(\kappa')]`. Where the points are those directions, it is what a calibrated
    prediction has; dividing it by the last two factors gives the length of the posterior of the latent. They are known
    where kappa_pair is: the mean of the lengths is :math:`A(\kappa_{pair}) E[A(\kappa)]^2`.
    """
    test = world.sample(4_000, seed=derived_seed(seed, 1))
    branch, other = guide.branch(test.x1), guide.branch(test.x2)
    law: Any = branch.prediction
    length, dim = law.mean_resultant_length.double(), world.dim
    pair = bessel_ratio(dim, torch.tensor(world.pair_concentration, dtype=torch.float64))
    exact = [bessel_ratio(dim, kappa.double()) for kappa in (test.concentration1, test.concentration2)]
    of_latent = (length / (pair * length.mean()).sqrt()).clamp_max(1 - 1e-6)
    comparable, without = (inverse_bessel_ratio(dim, value) for value in (length, of_latent))
    of_partner = inverse_bessel_ratio(dim, exact[0] * pair * exact[1].mean())
    truth = {"true_mean_direction": test.mean_direction1, "true_concentration": test.concentration1}
    aligned = diagnostics.align_and_score(law.mean_direction, comparable, test.z1, **truth)
    corrected = diagnostics.align_and_score(law.mean_direction, without, test.z1, **truth)

    def log_error(kappa: torch.Tensor, other: torch.Tensor) -> float:
        return float((kappa.log() - other.double().log()).abs().mean())

    return {
        **score_width(branch, other),
        "cosine": aligned.cosine_correlation,
        "spearman": aligned.spearman_concentration,
        "points_cosine": diagnostics.cosine_correlation(branch.point, test.mean_direction1),
        "log_error_posterior": log_error(comparable, test.concentration1),
        "log_error_partner": log_error(comparable, of_partner),
        "log_error_corrected": log_error(without, test.concentration1),
        "level_partner": float((comparable / of_partner).median()),
        "level_corrected": float((without / test.concentration1).median()),
        "latent_coverage": aligned.coverage.empirical.tolist(),
        "latent_coverage_corrected": corrected.coverage.empirical.tolist(),
    }


def none_if_nan(value: float) -> float | None:
    """None for NaN, which JSON has not."""
    return value if value == value else None


COLUMNS: dict[str, dict[str, tuple[str, ...]]] = {
    "digits": {
        "spread": ("spread",),
        "effective rank": ("effective_rank",),
        "check of dimensions": ("dimensions",),
        "5-NN clean / damaged": ("knn_clean", "knn_damaged"),
        "kappa 5 / 50 / 95 %": ("kappa",),
        "Spearman of kappa and - damage": ("spearman",),
        "accuracy by quartile, surest first": ("quartiles",),
        "predicted length": ("predicted_length",),
        "realised length": ("realised_length",),
        "factor": ("factor",),
        "partner in 50 / 80 / 95 % caps": ("partner_coverage",),
    },
    "sphere": {
        "spread": ("spread",),
        "effective rank": ("effective_rank",),
        "cosines: predictions / points": ("cosine", "points_cosine"),
        "Spearman of kappa": ("spearman",),
        "largest gap of lengths": ("length_gap",),
        "factor": ("factor",),
        "partner's point in 50 / 80 / 95 % caps": ("partner_coverage",),
        "abs log error of kappa against partner's law": ("log_error_partner",),
        "against posterior": ("log_error_posterior",),
        "against posterior, corrected": ("log_error_corrected",),
        "latent in caps": ("latent_coverage",),
        "latent in caps, corrected": ("latent_coverage_corrected",),
    },
}
MARKER = "<!-- written by examples/vi_simsiam.py --table -->"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=tuple(ROWS), help="default: both")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="; ".join(f"{w}: {', '.join(ROWS[w])}" for w in ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    parser.add_argument("--steps", type=int, default=1_500, metavar="N", help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="default: %(default)s")
    parser.add_argument("--lr", type=float, help=f"of Adam, cosine to zero; default: {LR}")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or auto")
    parser.add_argument("--out", type=Path, default=Path("runs/vi_simsiam"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--small", action="store_true", help="20 steps, one seed: shows that it runs")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the Markdown tables of what is in --out")
    args = parser.parse_args(argv)
    args.worlds = [args.world] if args.world else list(ROWS)
    if args.rows and not any(row in ROWS[world] for world in args.worlds for row in args.rows):
        parser.error(f"no row matches {' '.join(args.rows)}")
    if args.small:
        args.steps, args.seeds = 20, args.seeds[:1]
    return args


def main(args: argparse.Namespace) -> None:
    """Run what is missing, the first seed of every row before the second of any."""
    names = {world: [row for row in ROWS[world] if not args.rows or row in args.rows] for world in args.worlds}
    args.out.mkdir(parents=True, exist_ok=True)
    for seed, world, name in [(s, w, n) for s in args.seeds for w in args.worlds for n in names[w]]:
        path = args.out / f"{world}-{name}-{seed}.json"
        if path.exists():
            continue
        options = {"steps": args.steps, "batch_size": args.batch_size, "device": args.device}
        result = run(name, world, seed, lr=args.lr or LR[world], **options)
        save_run(path, result)
        print(f"{world}, {name}, seed {seed}: {result['cpu_seconds']:.0f} CPU s", flush=True)


def tables(folder: Path) -> str:
    """Markdown tables of the runs in a folder, one per world: medians over the seeds, entry by entry."""
    parts = []
    for world, rows in ROWS.items():
        columns = COLUMNS[world]
        parts += [f"## {world.capitalize()}", "", f"| row | seeds | {' | '.join(columns)} | CPU s |"]
        parts.append("|---" * (len(columns) + 3) + "|")
        for name, row in rows.items():
            found = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{world}-{name}-[0-9]*.json"))]
            if not found:
                parts.append(f"| {name}: {row.about} | not run |" + " |" * (len(columns) + 1))
                continue
            cells = [" / ".join(cell for key in keys for cell in _medians(found, key)) for keys in columns.values()]
            seeds, seconds = len(found), median(result["cpu_seconds"] for result in found)
            parts.append(f"| {name}: {row.about} | {seeds} | {' | '.join(cells)} | {seconds:.0f} |")
        parts.append("")
    return "\n".join(parts)


def _medians(results: list[dict[str, Any]], key: str) -> list[str]:
    values = [result[key] for result in results if result[key] is not None]
    if not values:
        return ["-"]
    if isinstance(values[0], str):
        return [", ".join(sorted(set(values)))]
    stacked = np.atleast_1d(np.median(np.asarray(values, dtype=float), axis=0))
    return [f"{value:,.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f}" for value in stacked]


def write_page(file: Path, folder: Path) -> None:
    """Put the tables at the end of a page, below its marker, and the runs into the JSON file beside it."""
    write_tables(file, MARKER, tables(folder))
    write_all_runs(file.with_suffix(".json"), folder)


if __name__ == "__main__":
    arguments = parse()
    if arguments.table is None:
        main(arguments)
    else:
        write_page(arguments.table, arguments.out)
