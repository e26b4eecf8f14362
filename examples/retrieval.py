"""Credible-interval retrieval, scored: where the truth is known (SphereWorld), and on handwritten digits.

Fits both, then asks of the sets of 95 % probability: do they hold the true latent and the true partner as often as they
say? How large are they, which share of them has the query's label, and do they grow when the image is damaged?
Options: ``--out DIR --seed N --device auto|cpu|cuda --small``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pyro_contrastive import diagnostics as diag
from pyro_contrastive import guides, models, nets
from pyro_contrastive.data import SphereWorld, ViewLoader, corrupt, load_digits, shift_and_dropout
from pyro_contrastive.fit import fit
from pyro_contrastive.ops.random import derived_seed, seeded

LEVELS = (0.5, 0.8, 0.95)


def sphere(steps: int, seed: int, device: str) -> dict[str, float]:
    """Coverage of caps and sets where the latent of every view is known and both views share it."""
    world = SphereWorld(dim=10, concentration=(16.0, 64.0), pair_concentration=math.inf)
    with seeded(derived_seed(seed, 0)):
        guide = guides.VonMisesFisher(nets.mlp([world.observed_dim, 128, 128]), dim=10)
    fit_shared(guide, world.batches(256, seed), steps, 2e-3, seed, device)
    batch = world.sample(2_500, seed=seed + 1)
    with torch.no_grad():
        learned = [guide.posterior(x) for x in (batch.x1, batch.x2)]
    exact = [world.posterior(batch, view) for view in (1, 2)]
    score = diag.align_and_score(
        learned[0].mean_direction, learned[0].concentration, batch.z1, true_mean_direction=batch.mean_direction1
    )
    figures = coverages("sphere_latent_learned", score.pit) | coverages(
        "sphere_latent_exact", diag.cap_pit(exact[0], batch.z1)
    )
    for name, (first, second) in (("learned", learned), ("exact", exact)):
        figures |= coverages(f"sphere_partner_{name}", diag.partner_pit(first, second))
        for kind, gallery in (("set", second), ("cap", second.mean_direction)):
            sets = diag.credible_sets(first, gallery)
            figures[f"sphere_partner_in_{kind}_{name}"] = float((sets.indices == sets.queries).sum() / len(sets))
            figures[f"sphere_{kind}_size_{name}"] = float(sets.sizes.mean())
        figures |= among_all(f"sphere_{name}", first, second)
    return figures


def digits(steps: int, seed: int, device: str, out: Path | None) -> dict[str, float]:
    """Damaged held-out digits look for their class among the clean training digits."""
    (train, train_labels), (test, labels) = load_digits("train"), load_digits("test")
    with seeded(derived_seed(seed, 1)):
        guide = guides.VonMisesFisher(nets.mlp([64, 128, 128], batch_norm=True), dim=16)
    fit_shared(guide, ViewLoader(train, shift_and_dropout, batch_size=256, seed=seed), steps, 1e-3, seed, device)

    generator = torch.Generator().manual_seed(derived_seed(seed, 2))
    level = 0.8 * torch.rand(len(test), generator=generator)
    damaged = corrupt(test, level, generator)
    pair = [shift_and_dropout(test, generator)[0] for _ in range(2)]
    with torch.no_grad():
        queries, gallery, first, second = (guide.posterior(x) for x in (damaged, train, *pair))
    figures = coverages("digits_partner", diag.partner_pit(first, second)) | among_all("digits", first, second)
    for kind, items in (("set", gallery), ("cap", gallery.mean_direction)):
        sets = diag.credible_sets(queries, items)
        curve = diag.credible_curve(queries, items, labels, train_labels, alphas=[0.05])
        for name in ("size", "empty", "precision", "recall", "f1"):
            figures[f"digits_{kind}_{name}"] = float(getattr(curve, name)[0])
        figures[f"digits_{kind}_size_vs_damage"] = diag.size_correlation(sets, level)
    ranking = diag.ranking_scores(queries.mean_direction, gallery.mean_direction, labels, train_labels)
    by_width = diag.risk_coverage(queries.concentration, ranking.correct)
    figures |= {
        "digits_recall_at_1": ranking.recall_at_1,
        "digits_map_at_r": ranking.map_at_r,
        "digits_aurc": by_width.aurc,
        "digits_excess_aurc": by_width.excess_aurc,
    }
    if out is not None:
        caps, kappa = diag.credible_sets(queries, gallery.mean_direction), queries.concentration
        names = {"labels": labels, "gallery_labels": train_labels}
        pictures = {
            "credible_sets": diag.plot_credible_sets(caps, kappa, damaged, train, **names),
            "credible_caps": diag.plot_credible_caps(caps, kappa, diag.cap_radius(0.95, kappa, dim=16), **names),
            "risk_coverage": diag.plot_risk_coverage({"by concentration": by_width}),
        }
        save(pictures, out)
    return figures


def fit_shared(guide: nn.Module, data: Any, steps: int, lr: float, seed: int, device: str) -> None:
    """Fit by the exact evidence of one shared latent, and bring the guide back to the CPU."""
    model = models.MCInfoNCE(guide, concentration=math.inf, evidence="exact")
    fit(model, guide, data, steps=steps, lr=lr, seed=seed, device=device)
    guide.cpu()


def among_all(name: str, first: Any, second: Any) -> dict[str, float]:
    """Partners among all second views: how often the likeliest items that add up to a level hold the right one."""
    figures = {}
    for level in LEVELS:
        sets = diag.partner_sets(first, second, alpha=1.0 - level)
        figures[f"{name}_among_all_{level:.0%}"] = float((sets.indices == sets.queries).sum() / len(sets))
    return figures | {f"{name}_among_all_size": float(sets.sizes.mean())}


def coverages(name: str, pit: np.ndarray) -> dict[str, float]:
    """Share of PIT values below each level."""
    return {f"{name}_{level:.0%}": float((pit <= level).mean()) for level in LEVELS}


def save(pictures: dict[str, Any], out: Path) -> None:
    """Write the pictures as PNG."""
    out.mkdir(parents=True, exist_ok=True)
    for name, axes in pictures.items():
        axes.figure.savefig(out / f"{name}.png")


if __name__ == "__main__":
    from _options import finish, parse

    args = parse(__doc__ or "")
    steps = (30, 30) if args.small else (2_000, 1_500)
    figures = sphere(steps[0], args.seed, args.device) | digits(steps[1], args.seed, args.device, args.out)
    finish(figures, args.out)
