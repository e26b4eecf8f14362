"""The rows of the controlled experiments of AnInfoNCE: which world, which model, and how a run is scored."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyro_contrastive import diagnostics, guides, models, nets
from pyro_contrastive.data import AnisotropicBatch, AnisotropicWorld, bimodal_precision, linear_precision
from pyro_contrastive.distributions import VonMisesFisher
from pyro_contrastive.fit import fit
from pyro_contrastive.kernels import moment_matched_anisotropic_pairs
from pyro_contrastive.models.aninfonce import pair_log_ratio
from pyro_contrastive.ops.random import derived_seed, seeded

SCORED = 8_192
HARD = {"negative_precision": (6.0, 4.0, 2.0, 0.0), "num_negatives": 4}  # of pairs with precision 8 everywhere
BLOCKS = ((10.0, 10.0, 3.0, 3.0), (10.0, 3.0, 10.0, 3.0))  # each family alone leaves two rotations


@dataclass(frozen=True)
class Row:
    """One fit.

    Attributes:
        about: For the table. Precisions in it are the paper's, half of those of the authors' code.
        precision: Of the world, ``(d,)`` or one row per family.
        world: Further arguments of `AnisotropicWorld`.
        method: "aninfonce", "infonce" (one learned temperature), "exact" (`MCInfoNCE`, the concentration stated),
            "ensemble".
        options: Further arguments of the model.
        start: "spread" (features standardised over the batch, the guides' default), "crowded" (not), or "oracle": the
            encoder is the inverse of the generator and only Lambda is learned.
        width: Of the three hidden layers.
        steps: Of Adam, with a cosine schedule to zero.
        batch_size: Pairs per step.
        lr: Learning rate.
    """

    about: str
    precision: Sequence[Any] | Tensor
    world: Mapping[str, Any] = field(default_factory=dict)
    method: str = "aninfonce"
    options: Mapping[str, Any] = field(default_factory=dict)
    start: str = "spread"
    width: int = 64
    steps: int = 3_000
    batch_size: int = 256
    lr: float = 2e-3

    @property
    def ambiguous(self) -> bool:
        """Whether views are ambiguous, so that posteriors have a width to score."""
        return "concentration" in self.world


def oracle(about: str, options: Mapping[str, Any], precision: Any = None, *, lr: float = 3e-3, **world: Any) -> Row:
    """A row in which only Lambda is learned."""
    precision = bimodal_precision(10) if precision is None else precision
    world["generator"] = "identity"
    return Row(about, precision, world, options=options, start="oracle", steps=1_000, batch_size=384, lr=lr)


BIMODAL, LINEAR = bimodal_precision(4), linear_precision(4)
RATIO_20, RATIO_10 = bimodal_precision(4, 30.0, 1.5), bimodal_precision(4, 25.0, 2.5)
STATED = {"learn_precision": False, "precision": LINEAR}
SHORT: dict[str, Any] = {"steps": 800, "lr": 5e-3}  # enough to see which axes are found
AMBIGUOUS = {"concentration": (16.0, 64.0)}
ROWS: dict[str, Row] = {
    "oracle": oracle("the default: anchors as candidates, both directions", {}),
    "oracle-partners": oracle("partners as candidates", {"candidates": "partners"}),
    "oracle-paper": oracle("2 N - 1 candidates, without C(z)", {"candidates": "both", "normalized": False}),
    "oracle-hard": oracle(
        "four hard negatives", {"hard_negatives": 4}, [12.5, 10.0, 7.5, 5.0],
        negative_precision=[2.5, 2.5, 1.0, 1.0], num_negatives=4, lr=1e-2,
    ),
    "oracle-hard-signed": oracle(
        "the last two closer than the partners, signed=True", {"hard_negatives": 4, "signed": True},
        [12.5, 10.0, 7.5, 5.0], negative_precision=[2.5, 2.5, 10.0, 7.5], num_negatives=4, lr=1e-2,
    ),
    "oracle-hard-pinned": oracle(
        "the same, precisions kept positive", {"hard_negatives": 4},
        [12.5, 10.0, 7.5, 5.0], negative_precision=[2.5, 2.5, 10.0, 7.5], num_negatives=4, lr=1e-2,
    ),
    "bimodal": Row("12.5, 12.5, 2.5, 2.5", BIMODAL),
    "bimodal-infonce": Row("the same, InfoNCE with a learned temperature", BIMODAL, method="infonce"),
    "bimodal-crowded": Row("the same, crowded start", BIMODAL, start="crowded"),
    "bimodal-infonce-crowded": Row("InfoNCE, crowded start", BIMODAL, method="infonce", start="crowded"),
    "linear": Row("2.5 to 12.5", LINEAR),
    "linear-infonce": Row("the same, InfoNCE", LINEAR, method="infonce"),
    "ratio-20": Row("30, 30, 1.5, 1.5", RATIO_20),
    "ratio-20-crowded": Row("the same, crowded start", RATIO_20, start="crowded"),
    "ratio-20-infonce": Row("the same, InfoNCE", RATIO_20, method="infonce"),
    "ratio-10": Row("25, 25, 2.5, 2.5", RATIO_10),
    "ratio-10-crowded": Row("the same, crowded start", RATIO_10, start="crowded"),
    "hard": Row(
        "pairs 8, 8, 8, 8, four hard negatives 6, 4, 2, 0", [8.0] * 4, HARD, options={"hard_negatives": 4}, lr=5e-3
    ),
    "hard-none": Row("the same pairs without them", [8.0] * 4, **SHORT),
    "family-1": Row("10, 10, 3, 3", BLOCKS[0], **SHORT),
    "family-2": Row("10, 3, 10, 3", BLOCKS[1], **SHORT),
    "ensemble": Row("both families, one encoder", BLOCKS, method="ensemble", **SHORT),
    "ambiguous": Row(
        "kappa 16 to 64, Lambda stated, moment-matched", LINEAR, AMBIGUOUS,
        options={**STATED, "evidence": "moment_matched"}, steps=5_000, lr=6e-3,
    ),
    "ambiguous-short": Row(
        "the same, a short run", LINEAR, AMBIGUOUS,
        options={**STATED, "evidence": "moment_matched"}, steps=1_000, batch_size=128,
    ),
    "ambiguous-k16": Row(
        "the short run with K = 16 samples", LINEAR, AMBIGUOUS,
        options={**STATED, "evidence": "k_sample"}, steps=1_000, batch_size=128,
    ),
    "ambiguous-equal": Row(
        "precisions 5 everywhere, moment-matched", [5.0] * 4, AMBIGUOUS,
        options={"learn_precision": False, "evidence": "moment_matched"}, steps=500, batch_size=128,
    ),
    "ambiguous-equal-exact": Row(
        "the same, MCInfoNCE with the exact evidence", [5.0] * 4, AMBIGUOUS, method="exact", steps=500, batch_size=128
    ),
    "d10-bimodal": Row("d = 10", bimodal_precision(10), width=256, steps=20_000, batch_size=1_024, lr=1e-3),
    "d10-bimodal-infonce": Row(
        "d = 10, InfoNCE", bimodal_precision(10), method="infonce", width=256, steps=20_000, batch_size=1_024, lr=1e-3
    ),
    "d10-linear": Row("d = 10", linear_precision(10), width=256, steps=20_000, batch_size=1_024, lr=1e-3),
}  # fmt: skip


def make_pair(row: Row, world: AnisotropicWorld, seed: int) -> tuple[nn.Module, Any]:
    """Build model and guide."""
    options: dict[str, Any] = dict(row.options)
    with seeded(derived_seed(seed)):
        encoder = nn.Identity() if row.start == "oracle" else nets.mlp([world.observed_dim] + [row.width] * 3)
        family = guides.VonMisesFisher if row.ambiguous else guides.Delta
        guide = family(encoder, world.dim, features=row.width if row.start != "oracle" else world.dim,
                       batch_norm=row.start == "spread")  # fmt: skip
    if row.start == "oracle":
        guide.requires_grad_(False)
        guide.direction.weight.copy_(torch.eye(world.dim))
        guide.direction.bias.zero_()
    if row.method == "infonce":
        return models.MCInfoNCE(guide, concentration=10.0, evidence="elbo", learn_concentration=True, **options), guide
    if row.method == "exact":
        return models.MCInfoNCE(guide, concentration=10.0), guide
    if row.method == "ensemble":
        return models.AnInfoNCEEnsemble(guide, len(row.precision), **options), guide
    return models.AnInfoNCE(guide, **options), guide


def run(name: str, seed: int, *, device: str, small: bool) -> dict[str, Any]:
    """Fit and score one row with one seed.

    Returns:
        Settings, CPU seconds of training (this process, all threads) and scores, all of them JSON values.
    """
    row = ROWS[name]
    steps, batch_size = (20, 64) if small else (row.steps, row.batch_size)
    world = AnisotropicWorld(row.precision, seed=seed, **row.world).to(device)
    model, guide = make_pair(row, world, seed)
    started, wall = time.process_time(), time.monotonic()
    result = fit(
        model, guide, world.batches(batch_size, seed), steps=steps, num_views=None, lr=row.lr, seed=seed, device=device,
        progress=f"{name}, seed {seed}",
    )  # fmt: skip
    cost = {"cpu_seconds": time.process_time() - started, "wall_seconds": time.monotonic() - wall}
    used = torch.cuda.get_device_name() if result.device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread"
    scores = score(model.cpu(), guide.cpu(), world.cpu(), row, derived_seed(seed, 1))
    return {"row": name, "seed": seed, "steps": steps, "batch_size": batch_size, "lr": row.lr, "device": used,
            "status": result.status, "loss": result.history["loss"][-1], **cost, **scores}  # fmt: skip


@torch.no_grad()
def score(model: Any, guide: Any, world: AnisotropicWorld, row: Row, seed: int) -> dict[str, Any]:
    """Score latents, axes, precisions and, where views are ambiguous, widths, on fresh views."""
    test = world.sample(SCORED, seed=seed)
    posterior = guide.posterior(test.x1)
    found = posterior.mean_direction if row.ambiguous else posterior.mean
    half = range(world.dim // 2), range(world.dim // 2, world.dim)
    linear = diagnostics.linear_r2(found, test.z1, groups={"first": half[0], "second": half[1]})
    axes = diagnostics.mcc(found, test.z1)
    scores = {
        "r2": linear.r2,
        "r2_first": linear.groups["first"],
        "r2_second": linear.groups["second"],
        "mcc": axes.mcc,
    }
    isotropic = row.method in ("infonce", "exact")
    learned = (model.concentration / 2).expand(1, world.dim) if isotropic else model.precision
    learned = learned.reshape(-1, world.dim)
    truth = world.precision - (0.0 if world.negative_precision is None else world.negative_precision)
    recovery = [
        diagnostics.precision_recovery(one, true, None if row.start == "oracle" else axes)
        for one, true in zip(learned, truth, strict=True)
        if not isotropic and row.options.get("learn_precision", True)
    ]
    errors = {
        "precision_error": sum(one.relative_error for one in recovery) / len(recovery) if recovery else None,
        "precision_sorted_error": sum(one.sorted_error for one in recovery) / len(recovery) if recovery else None,
    }
    order = list(range(world.dim)) if row.start == "oracle" else axes.assignment.tolist()
    kept = {"precision": learned[0].tolist(), "truth": truth[0].tolist(), "assignment": order}
    return scores | errors | kept | (_widths(posterior, test) if row.ambiguous else {})


@torch.no_grad()
def likelihood_of_scales(scales: Sequence[float], *, batches: int = 40) -> dict[float, float]:
    """Moment-matched likelihood at the exact posteriors' directions and their concentrations times a scale.

    Returns:
        Nats per pair by scale, in the world of the row "ambiguous": largest at 1 if the approximation is good enough.
    """
    world = AnisotropicWorld(LINEAR, **AMBIGUOUS)
    totals = dict.fromkeys(scales, 0.0)
    for seed in range(batches):
        batch = world.sample(256, seed=seed)
        for scale in scales:
            first, second = (VonMisesFisher(batch.mean_direction[i], scale * batch.concentration[i]) for i in (0, 1))
            pairs = partial(moment_matched_anisotropic_pairs, precision=world.precision[0])
            totals[scale] += float(pair_log_ratio(pairs, first, second).mean()) / batches
    return totals


def _widths(posterior: Any, test: AnisotropicBatch) -> dict[str, float]:
    found = diagnostics.align_and_score(
        posterior.mean_direction, posterior.concentration, test.z1, true_mean_direction=test.mean_direction[0],
        true_concentration=test.concentration[0],
    )  # fmt: skip
    levels = zip(found.coverage.levels, found.coverage.empirical, strict=True)
    caps = {f"coverage_{round(100 * level)}": float(share) for level, share in levels}
    error = ((posterior.concentration - test.concentration[0]).abs() / test.concentration[0]).mean()
    return caps | {"kappa_spearman": found.spearman_concentration, "kappa_error": float(error)}
