"""Which beta is right for VSimCLR? Widths against the weight of the divergence, and widths that pairs choose.

Two worlds. In ``sphere`` every posterior is known: coverage of credible caps as fitted, and after
``diagnostics.calibrate_width``, which sees held-out pairs only. In ``digits`` nothing is known: what is checked is that
the calibrated widths do not depend on beta, and how the methods compare (SimCLR, SupCon and their variational forms).
Each finished row is a file in ``DIR/rows``; an interrupted run goes on where it stopped.
Options: ``--out DIR --seed N --seeds N --device auto|cpu|cuda --only sphere|digits --small``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _runs import save_run
from scipy import stats

from pyro_contrastive import diagnostics, guides, models, nets
from pyro_contrastive.data import SphereWorld, ViewLoader, load_digits, shift_and_dropout
from pyro_contrastive.fit import fit
from pyro_contrastive.ops.random import derived_seed, seeded

BETAS = (0.1, 0.3, 1.0, 3.0, 10.0)
PAIR = 20.0  # concentration between the latents of two views of the sphere world
KERNEL = 8.0  # and between their embeddings, which are ambiguous: what SimCLR learns there


@dataclass(frozen=True)
class Row:
    """One fit."""

    world: str
    method: str
    beta: float | None = None
    kl: str = "scale_free"
    kernel: float | None = None  # concentration of the kernel, at the start where it is learned
    learn: bool = False

    @property
    def name(self) -> str:
        """For people and file names."""
        parts = [self.method]
        parts += [] if self.beta is None else [f"beta {self.beta:g}"]
        parts += [] if self.beta is None or self.kl == "scale_free" else [self.kl]
        if self.world == "sphere" and self.kernel is not None:
            parts += ["kernel learned" if self.learn else f"kernel {self.kernel:g}"]
        return ", ".join(parts)


SPHERE = [
    *(Row("sphere", "VSimCLR", beta, kernel=KERNEL) for beta in BETAS),
    *(Row("sphere", "VSimCLR", 1.0, kl, kernel=KERNEL) for kl in ("exact", "gaussian")),
    *(Row("sphere", "VSimCLR", beta, kernel=10.0, learn=True) for beta in (0.3, 3.0)),
    *(Row("sphere", "VSimCLR", beta, kernel=PAIR) for beta in (0.3, 3.0)),
    Row("sphere", "SimCLR", kernel=10.0, learn=True),
]
DIGITS = [
    Row("digits", "SimCLR", kernel=5.0),
    *(Row("digits", "VSimCLR", beta, kernel=5.0) for beta in (0.01, 0.1, 1.0)),
    *(Row("digits", "VSimCLR", 0.1, kl, kernel=5.0) for kl in ("exact", "gaussian")),
    Row("digits", "SupCon", kernel=5.0),
    Row("digits", "VSupCon", 0.1, kernel=5.0),
    Row("digits", "MCInfoNCE"),
]


def pair_of(row: Row, encoder: torch.nn.Module, dim: int) -> tuple[Any, Any, Any]:
    """Model, guide and objective of a row."""
    if row.method == "MCInfoNCE":
        guide = guides.VonMisesFisher(encoder, dim)
        return models.MCInfoNCE(guide, concentration=math.inf), guide, None
    options: dict[str, Any] = {"concentration": row.kernel, "learn_concentration": row.learn}
    if row.beta is None:
        point = guides.Delta(encoder, dim)
        return getattr(models, row.method)(point, **options), point, None
    posterior = guides.ProjectedNormal(encoder, dim, free_length=row.kl == "gaussian")
    model = getattr(models, row.method)(posterior, beta=row.beta, kl=row.kl, **options)
    return model, posterior, model.objective()


def relative_width(posterior: Any) -> float:
    """Median of tr Sigma / |mu|^2 for projected normals; NaN for others."""
    if not hasattr(posterior, "scale_diag"):
        return math.nan
    return float((posterior.scale_diag.square().sum(-1) / posterior.loc.square().sum(-1)).median())


def directions(posterior: Any) -> torch.Tensor:
    """Mean directions, of point posteriors too."""
    return posterior.mean_direction if hasattr(posterior, "mean_direction") else posterior.mean


def sphere(row: Row, seed: int, device: str, small: bool) -> dict[str, Any]:
    """Fit in the world with known posteriors; score the widths as fitted and as held-out pairs want them."""
    world = SphereWorld(dim=10, concentration=(16.0, 64.0), pair_concentration=PAIR)
    with seeded(derived_seed(seed, 0)):
        model, guide, elbo = pair_of(row, nets.mlp([world.observed_dim, 128, 128]), world.dim)
    steps, size = (5, 64) if small else (1_000, 256)
    result = fit(model, guide, world.batches(size, seed), steps=steps, lr=3e-3, elbo=elbo, seed=seed, device=device,
                 progress=f"sphere, {row.name}")  # fmt: skip
    guide.cpu(), model.cpu()
    test, pairs = world.sample(20 * size, seed=seed + 1_000), world.sample(10 * size, seed=seed + 2_000)
    with torch.no_grad():
        q, first, second = (guide.posterior(x) for x in (test.x1, pairs.x1, pairs.x2))
    figures: dict[str, Any] = {
        "loss": result.history["loss"][-1],
        "kernel": float(model.concentration.detach()),
        "cosines": diagnostics.cosine_correlation(directions(q), test.mean_direction1),
    }
    if row.method == "SimCLR":
        return figures
    figures["relative width"] = relative_width(q)
    mean, kappa = diagnostics.direction_and_concentration(q, num_samples=1_024)
    laws = {"fitted": kappa}
    for name, stretch in (("factor", False), ("factor and power", True)):
        found = diagnostics.calibrate_width(
            first, second, PAIR, stretch=stretch, num_samples=64 if small else 1_024, batch_size=32 if small else 256
        )
        laws[name] = found.concentration(kappa).numpy()
        figures |= {f"{name}: {key}": getattr(found, key) for key in ("factor", "factor_error", "power", "power_error",
                                                                       "at_limit")}  # fmt: skip
        figures |= {f"{name}: evidence": float(found.evidence[1]), "fitted: evidence": float(found.evidence[0])}
    for name, concentration in laws.items():
        score = diagnostics.align_and_score(
            mean, concentration, test.z1, true_mean_direction=test.mean_direction1,
            true_concentration=test.concentration1,
        )  # fmt: skip
        order = np.argsort(test.concentration1[score.evaluated].numpy())
        figures |= {
            f"{name}: kappa": [float(np.percentile(concentration, p)) for p in (5, 50, 95)],
            f"{name}: coverage": score.coverage.empirical.tolist(),
            f"{name}: coverage 80, by quartile of true kappa": [
                float((score.pit[part] <= 0.8).mean()) for part in np.array_split(order, 4)
            ],
            f"{name}: kappa error": score.concentration_error,
            "spearman": score.spearman_concentration,
        }
    return figures


def digits(row: Row, seed: int, device: str, small: bool) -> dict[str, Any]:
    """Fit handwritten digits; score neighbours, the order of the widths, and the width that held-out pairs want."""
    (train, train_labels), (test, labels) = load_digits("train", seed=seed), load_digits("test", seed=seed)
    with seeded(derived_seed(seed, 1)):
        model, guide, elbo = pair_of(row, nets.mlp([64, 128, 128], batch_norm=True), dim=16)
    supervised = "SupCon" in row.method
    data = ViewLoader(train, shift_and_dropout, labels=train_labels if supervised else None, batch_size=256, seed=seed)
    result = fit(model, guide, data, steps=5 if small else 1_000, lr=1e-3, num_views=2 + supervised, elbo=elbo,
                 seed=seed, device=device, progress=f"digits, {row.name}")  # fmt: skip
    guide.cpu()
    generator = torch.Generator().manual_seed(derived_seed(seed, 2))
    damaged, level = shift_and_dropout(test, generator)
    with torch.no_grad():
        reference, clean, q = (guide.posterior(x) for x in (train, test, damaged))
        means = [directions(law) for law in (reference, clean, q)]
    correct = diagnostics.knn_correct(means[0], train_labels, means[2], labels)
    spectrum = diagnostics.embedding_spectrum(means[1]).singular_values ** 2
    figures: dict[str, Any] = {
        "loss": result.history["loss"][-1],
        "knn clean": diagnostics.knn_accuracy(means[0], train_labels, means[1], labels),
        "knn damaged": float(correct.mean()),
        "effective rank": float(np.exp(stats.entropy(spectrum))),
        "relative width": relative_width(q),
    }
    if row.method in ("SimCLR", "SupCon"):
        return figures
    _, kappa = diagnostics.direction_and_concentration(q, num_samples=1_024)
    figures |= {
        "spearman": diagnostics.corruption_correlation(kappa, level),
        "quartiles": diagnostics.accuracy_by_quartile(kappa, correct).tolist(),
        "kappa": [float(np.percentile(kappa, p)) for p in (5, 50, 95)],
    }
    pairs = [torch.cat(views) for views in zip(*(
        [shift_and_dropout(test[:384], generator)[0] for _ in range(2)] for _ in range(1 if small else 6)
    ), strict=True)]  # fmt: skip
    with torch.no_grad():
        laws = [guide.posterior(x) for x in pairs]
    for name, stretch in (("factor", False), ("factor and power", True)):
        found = diagnostics.calibrate_width(*laws, stretch=stretch, num_samples=64 if small else 1_024, batch_size=128)
        figures |= {f"{name}: {key}": getattr(found, key) for key in ("factor", "factor_error", "power", "power_error",
                                                                       "at_limit")}  # fmt: skip
        calibrated = found.concentration(kappa).numpy()
        figures |= {
            f"{name}: kappa": [float(np.percentile(calibrated, p)) for p in (5, 50, 95)],
            f"{name}: evidence": float(found.evidence[1]),
            "fitted: evidence": float(found.evidence[0]),
        }
    return figures


def run(out: Path, seeds: Iterable[int], device: str, small: bool, worlds: Iterable[str]) -> dict[str, float]:
    """Fit and score all rows that have no file yet; give all scalars under flat names."""
    rows = [row for row in (*SPHERE, *DIGITS) if row.world in worlds]
    if small:
        rows = [row for row in rows if row in (SPHERE[0], DIGITS[-2])]
    (out / "rows").mkdir(parents=True, exist_ok=True)
    figures = {}
    for seed in seeds:
        for row in rows:
            file = out / "rows" / f"{row.world}, {row.name}, {seed}.json".replace(", ", "-").replace(" ", "_")
            if not file.exists():
                score = sphere if row.world == "sphere" else digits
                save_run(file, score(row, seed, device, small))
            values = json.loads(file.read_text())
            figures |= {f"{row.world}, {row.name}, {seed}: {k}": v for k, v in values.items() if isinstance(v, float)}
    return figures


def collect(out: Path, row: Row) -> list[dict[str, Any]]:
    """Finished figures of a row, one per seed."""
    stem = f"{row.world}, {row.name}, ".replace(", ", "-").replace(" ", "_")
    files = [path for path in sorted((out / "rows").glob("*.json")) if path.stem.removeprefix(stem).isdigit()]
    return [json.loads(path.read_text()) for path in files]


def median(figures: list[dict[str, Any]], key: str) -> Any:
    """Over seeds, entry by entry."""
    values = np.median([one[key] for one in figures], axis=0)
    return values.tolist()


def tables(out: Path) -> str:
    """Both tables, in Markdown: medians over the seeds that are there."""
    lines = []

    def add(head: list[str], body: Iterable[tuple[Row, list[str]]]) -> None:
        lines.extend(["| " + " | ".join(["row", *head]) + " |", "|" + "---|" * (len(head) + 1)])
        lines.extend("| " + " | ".join([row.name, *cells]) + " |" for row, cells in body)
        lines.append("")

    def share(values: list[float]) -> str:
        return " / ".join(f"{100 * v:.0f}" for v in values)

    def number(value: float) -> str:
        return "-" if math.isnan(value) else f"{value:,.0f}" if value >= 1_000 else f"{value:.3g}"

    def interval(values: list[float]) -> str:
        return "{1} ({0}, {2})".format(*map(number, values))

    def sphere_cells(found: list[dict[str, Any]]) -> list[str]:
        if "relative width" not in found[0]:
            return ["-", "-", "-", f"{median(found, 'cosines'):.3f}", number(median(found, "kernel")), *["-"] * 7]
        limit = median(found, "factor: at_limit")
        return [
            number(median(found, "relative width")), interval(median(found, "fitted: kappa")),
            f"{median(found, 'spearman'):.2f}", f"{median(found, 'cosines'):.3f}", number(median(found, "kernel")),
            share(median(found, "fitted: coverage")), "none" if limit else f"{median(found, 'factor: factor'):.2f}",
            interval(median(found, "factor: kappa")), share(median(found, "factor: coverage")),
            share(median(found, "factor: coverage 80, by quartile of true kappa")),
            f"{median(found, 'factor and power: power'):.1f}",
            share(median(found, "factor and power: coverage 80, by quartile of true kappa")),
        ]  # fmt: skip

    head = ["relative width", "κ (5, 95 %)", "Spearman", "cosines", "kernel", "caps", "factor", "then κ", "caps",
            "80 % caps by true κ", "power", "then by true κ"]  # fmt: skip
    rows = [(row, found) for row in SPHERE if (found := collect(out, row))]
    add(head, ((row, sphere_cells(found)) for row, found in rows))

    def digit_cells(found: list[dict[str, Any]]) -> list[str]:
        cells = [f"{median(found, 'knn clean'):.3f}", f"{median(found, 'knn damaged'):.3f}",
                 f"{median(found, 'effective rank'):.2f}"]  # fmt: skip
        if "kappa" not in found[0]:
            return cells + ["-"] * 8
        factors = [one["factor: factor"] for one in found]
        return cells + [
            number(median(found, "relative width")), interval(median(found, "kappa")),
            f"{median(found, 'spearman'):.3f}", " ".join(f"{v:.2f}" for v in median(found, "quartiles")),
            f"{np.median(factors):.2f} ({min(factors):.2f}, {max(factors):.2f})",
            interval(median(found, "factor: kappa")), interval(median(found, "factor and power: kappa")),
            f"{median(found, 'factor and power: evidence'):.3f}",
        ]  # fmt: skip

    head = ["kNN clean", "damaged", "eff. rank", "relative width", "κ (5, 95 %)", "Spearman", "accuracy by quartile",
            "factor (least, most)", "then κ", "with power", "evidence"]  # fmt: skip
    rows = [(row, found) for row in DIGITS if (found := collect(out, row))]
    add(head, ((row, digit_cells(found)) for row, found in rows))
    return re.sub(r"(?<![\d.])0\.", ".", "\n".join(lines))


def plot(out: Path) -> None:
    """Coverage of 80 % caps and median concentration against beta: as fitted, and as the pairs want it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = [row for row in SPHERE[: len(BETAS)] if collect(out, row)]
    for name, colour in (("fitted", "#d55e00"), ("factor", "#0072b2"), ("factor and power", "#009e73")):
        shares = [median(collect(out, row), f"{name}: coverage")[1] for row in rows]
        left.semilogx([row.beta for row in rows], shares, "o-", color=colour, label=name)
    left.axhline(0.8, color="grey", linestyle="--", linewidth=1)
    left.set(xlabel="beta", ylabel="true latents inside 80 % caps", ylim=(-0.03, 1.03), title="Known posteriors")
    left.legend(frameon=False)
    rows = [row for row in DIGITS if row.method == "VSimCLR" and row.kl == "scale_free" and collect(out, row)]
    for key, colour in (("kappa", "#d55e00"), ("factor: kappa", "#0072b2")):
        for one in zip(*(collect(out, row) for row in rows), strict=False):
            right.loglog(
                [row.beta for row in rows], [figures[key][1] for figures in one], "o-", color=colour, alpha=0.6
            )
    right.set(xlabel="beta", ylabel="median concentration", title="Digits: fitted, and times the factor")
    figure.savefig(out / "vcl_beta.png", dpi=110)


if __name__ == "__main__":
    from _options import finish, make_parser

    parser = make_parser(__doc__ or "")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds per row, from --seed on")
    parser.add_argument("--only", choices=("sphere", "digits"), help="one of the two worlds")
    args = parser.parse_args()
    folder = args.out or Path("runs/which_beta")
    worlds = (args.only,) if args.only else ("sphere", "digits")
    figures = run(folder, range(args.seed, args.seed + args.seeds), args.device, args.small, worlds)
    (folder / "tables.md").write_text(tables(folder))
    plot(folder)
    print(tables(folder))
    finish(figures, folder)
