"""The rows of the controlled experiment: which world, which encoder, which objective, and how a run is scored."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from pyro_contrastive import diagnostics, guides, models, nets
from pyro_contrastive.data import PairWorld, SphereBatch, SphereWorld
from pyro_contrastive.distributions import VonMisesFisher
from pyro_contrastive.fit import fit
from pyro_contrastive.ops import log_partition
from pyro_contrastive.ops.random import derived_seed, seeded

PAIR_CONCENTRATION = 20.0  # known to every method that has a place for it, as in the authors' scripts
WORLDS = ("pair", "sphere")
SEEDS = (4, 5, 6, 7, 8)
SCORED_PAIRWISE, SCORED, DRAWS = 1_000, 4_000, 100


@dataclass(frozen=True)
class Row:
    """What a row changes against the first one.

    Attributes:
        about: For the table.
        dim: Of the world.
        encoder_dim: Of the guide; None: the same.
        concentration: Range of the true concentrations, or ``math.inf``.
        family: Law of the latents; only the pair world has others than "vmf".
        partners: Law of the partners; only the pair world has "labelled".
        method: Objective.
        num_samples: K, of the K-sample objective.
        batch_norm: Of the guide.
        odds: Whether hedged instances use the odds of the world's pairs instead of a = 1, b = 0.
        options: Further arguments of `models.MCInfoNCE`.
        effort: Share of the common number of steps: a step of a large K costs more, and each row has about the CPU time
            of the exact one.
    """

    about: str
    dim: int = 10
    encoder_dim: int | None = None
    concentration: float | tuple[float, float] = (16.0, 32.0)
    family: Literal["vmf", "normal", "laplace"] = "vmf"
    partners: Literal["kernel", "labelled"] = "kernel"
    method: Literal["exact", "moment_matched", "k_sample", "elk", "hib"] = "exact"
    num_samples: int = 16
    batch_norm: bool = True
    odds: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    effort: float = 1.0

    def worlds(self) -> tuple[str, ...]:
        """Where the row can be run."""
        return WORLDS if self.family == "vmf" and self.partners == "kernel" else WORLDS[:1]


ROWS: dict[str, Row] = {
    "ambiguous": Row("the base setting: d = 10, kappa 16 to 32"),
    "clear": Row("kappa 64 to 128", concentration=(64.0, 128.0)),
    "injective": Row("kappa infinite", concentration=math.inf),
    "2d": Row("d = 2", dim=2),
    "gaussian": Row("Gaussian latents", family="normal"),
    "laplace": Row("Laplace latents", family="laplace"),
    "labelled": Row("the released code's sigmoid law of positives", partners="labelled"),
    "moment-matched": Row("approximate closed form", method="moment_matched"),
    "empirical": Row("exact, the marginal of the latents not assumed uniform", options={"marginal": "empirical"}),
    "mean-negatives": Row("exact, negatives averaged as in the released code", options={"negatives": "mean"}),
    "elk": Row("ELK: the pair shares one latent", method="elk"),
    "hib": Row("HIB, a = 1, b = 0", method="hib"),
    "hib-odds": Row("HIB, a and b from the world", method="hib", odds=True),
    **{
        f"samples-{k}": Row(f"K-sample, K = {k}", method="k_sample", num_samples=k, effort=effort)
        for k, effort in {1: 1.0, 4: 1.0, 16: 1.0, 64: 0.25, 256: 0.1, 512: 0.05}.items()
    },
    **{f"highdim-{d}": Row(f"d = {d} everywhere", dim=d) for d in (16, 32, 40, 48, 56, 64, 128)},
    **{f"plain-{d}": Row(f"d = {d}, batch_norm=False", dim=d, batch_norm=False) for d in (10, 16, 32, 40, 64, 128)},
    **{f"encoder-{d}": Row(f"encoder of dimension {d}", encoder_dim=d) for d in (4, 8, 16, 32, 64, 128)},
}


def make_world(row: Row, world: str, seed: int, *, small: bool = False) -> PairWorld | SphereWorld:
    """Build the world of a row; another seed is another world."""
    if world == "sphere":
        return SphereWorld(row.dim, row.concentration, PAIR_CONCENTRATION, seed=seed)
    options: dict[str, Any] = {"smoothing_steps": 50, "candidates": 512} if small else {}
    return PairWorld(
        row.dim, row.concentration, PAIR_CONCENTRATION, family=row.family, partners=row.partners, seed=seed, **options
    )


def make_pair(row: Row, observed_dim: int, seed: int) -> tuple[nn.Module, guides.VonMisesFisher]:
    """Build model and guide. The guide starts without knowing the range of the concentrations."""
    dim = row.encoder_dim or row.dim
    width = 128 if max(dim, row.dim) <= 32 else 256
    with seeded(derived_seed(seed)):
        guide = guides.VonMisesFisher(nets.mlp([observed_dim, width, width]), dim, batch_norm=row.batch_norm)
    if row.method == "elk":
        return models.MCInfoNCE(guide, concentration=math.inf), guide
    if row.method == "hib":
        if not row.odds:
            return models.HedgedInstance(guide), guide
        offset = -float(log_partition(dim, torch.tensor(PAIR_CONCENTRATION)))
        return models.HedgedInstance(guide, scale=PAIR_CONCENTRATION, offset=offset), guide
    model = models.MCInfoNCE(
        guide, concentration=PAIR_CONCENTRATION, evidence=row.method, num_samples=row.num_samples, **row.options
    )
    return model, guide


def run(
    name: str, world_name: str, seed: int, *, steps: int, batch_size: int, lr: float, device: str, small: bool
) -> dict[str, Any]:
    """Fit and score one row with one seed.

    Returns:
        Settings, CPU seconds of training (this process, all threads) and scores, all of them JSON values.
    """
    row = ROWS[name]
    world = make_world(row, world_name, seed, small=small)
    model, guide = make_pair(row, world.observed_dim, seed)
    used = max(1, round(steps * row.effort))
    started, wall = time.process_time(), time.monotonic()
    stream = world.to(device).batches(batch_size, seed=seed)
    result = fit(
        model, guide, stream, steps=used, lr=lr, seed=seed, device=device, progress=f"{name}, {world_name}, seed {seed}"
    )
    cost = {"cpu_seconds": time.process_time() - started, "wall_seconds": time.monotonic() - wall}
    scores = score(guide.cpu(), world.cpu(), seed=derived_seed(seed, 1))
    settings = {"row": name, "world": world_name, "seed": seed, "steps": used, "batch_size": batch_size, "lr": lr}
    device_name = (
        torch.cuda.get_device_name() if result.device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread"
    )
    return {**settings, "device": device_name, "status": result.status, **cost, **scores}


@torch.no_grad()
def score(guide: guides.VonMisesFisher, world: PairWorld | SphereWorld, seed: int) -> dict[str, float | None]:
    """Score directions, concentrations, mean resultant lengths and caps on fresh inputs.

    Pairwise cosines and the correlations are those of the authors ("MAE" is what their code calls mse), off the
    diagonal; the mean resultant length stands in for their spread of samples around the mean direction.

    Args:
        guide: Trained, on the CPU.
        world: On the CPU.
        seed: Of the inputs.

    Returns:
        One number per score; None where it does not exist (an infinite truth, no common rotation).
    """
    test = world.sample(SCORED, seed=seed)
    q = guide.posterior(test.x1)
    mean, kappa = q.mean_direction, q.concentration
    rows, columns = np.tril_indices(SCORED_PAIRWISE, -1)
    cosines = [
        (m[:SCORED_PAIRWISE] @ m[:SCORED_PAIRWISE].mT).numpy()[rows, columns] for m in (mean, test.mean_direction1)
    ]
    scores: dict[str, float | None] = {}
    pairs = {
        "cosine": cosines,
        "kappa": (kappa.numpy(), test.concentration1.numpy()),
        "length": (q.mean_resultant_length.numpy(), true_length(world, test, seed).numpy()),
    }
    for name, (estimate, truth) in pairs.items():
        estimate, truth = np.asarray(estimate, np.float64), np.asarray(truth, np.float64)
        varies = np.isfinite(truth).all() and np.ptp(truth) > 0
        scores[f"{name}_pearson"] = float(np.corrcoef(estimate, truth)[0, 1]) if varies else None
        scores[f"{name}_spearman"] = float(stats.spearmanr(estimate, truth).statistic) if varies else None
        scores[f"{name}_mae"] = float(np.abs(estimate - truth).mean()) if np.isfinite(truth).all() else None
    finite = bool(test.concentration1.isfinite().all())
    relative = (kappa - test.concentration1).abs() / test.concentration1
    scores["kappa_error"] = float(relative.mean()) if finite else None
    for share in (5, 50, 95):
        scores[f"kappa_{share}"] = float(kappa.quantile(share / 100))
    if mean.shape[-1] == test.z1.shape[-1]:
        aligned = diagnostics.align_and_score(mean, kappa, test.z1, true_mean_direction=test.mean_direction1)
        scores |= {
            f"coverage_{level}": float(s) for level, s in zip((50, 80, 95), aligned.coverage.empirical, strict=True)
        }
        scores["mean_angle"] = aligned.mean_angle
    return scores


def true_length(world: PairWorld | SphereWorld, test: SphereBatch, seed: int) -> Tensor:
    """Mean cosine of the latent to the mean direction: exact for von Mises-Fisher laws, over draws for the others."""
    if test.concentration1.isinf().all():
        return torch.ones_like(test.concentration1)
    if isinstance(world, SphereWorld) or world.family == "vmf":
        return VonMisesFisher(test.mean_direction1, test.concentration1).mean_resultant_length
    with seeded(seed):
        draws = world.latent(test.mean_direction1, test.concentration1, DRAWS)
    return (draws * test.mean_direction1).sum(-1).mean(0)
