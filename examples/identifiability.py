"""What pairs can tell about the concentrations: the pair concentration known, wrong and learned; marginals not uniform.

Fits one model per row, writes each finished row to ``DIR/rows`` and skips those that are there, so an interrupted run
goes on where it stopped. ``docs/identifiability.md`` reads the table.
Options: ``--out DIR --seed N --device auto|cpu|cuda --small``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch

from pyro_contrastive import diagnostics, guides, models, nets
from pyro_contrastive.data import AcceptanceWorld, SphereWorld
from pyro_contrastive.distributions import VonMisesFisher
from pyro_contrastive.factors import infonce_log_ratio
from pyro_contrastive.fit import fit, pick_device
from pyro_contrastive.kernels import expected_log_ratio, shared_latent_log_ratio
from pyro_contrastive.ops.matching import balance_log_ratios, matching_log_ratio

INF = math.inf
WORLDS: dict[str, Callable[[], Any]] = {
    "uniform, kappa_pos 20": lambda: SphereWorld(10, (16.0, 64.0), 20.0),
    "uniform, shared latent": lambda: SphereWorld(10, (16.0, 64.0), INF),
    "prior vMF(10), shared latent": lambda: SphereWorld(10, (16.0, 64.0), INF, prior_concentration=10.0),
    "prior vMF(10), kappa_pos 20": lambda: SphereWorld(10, (16.0, 64.0), 20.0, prior_concentration=10.0),
    "accepted pairs, offset 0.75": lambda: AcceptanceWorld(10, (16.0, 64.0), 20.0, offset=0.75),
}


@dataclass(frozen=True)
class Row:
    """One fit: a world, what the model assumes about the pairs, and the likelihood of a batch."""

    world: str
    concentration: float
    evidence: str = "exact"
    learn: bool = False
    marginal: str = "uniform"
    steps: int = 1_500
    batch_norm: bool = True  # of the guide: whether directions start spread over the sphere or crowded

    def name(self, seed: int) -> str:
        """File name of the finished row."""
        learn = "-learned" if self.learn else ""
        text = f"{self.world}-{self.concentration:g}{learn}-{self.evidence}-{self.marginal}-{self.steps}-{seed}"
        text += "" if self.batch_norm else "-crowded"
        return text.replace(" ", "_").replace(",", "")


LEVEL = [  # what the model is told about kappa_pos
    Row("uniform, kappa_pos 20", 20.0),
    Row("uniform, kappa_pos 20", 10.0),
    Row("uniform, kappa_pos 20", 40.0),
    Row("uniform, kappa_pos 20", INF),
    Row("uniform, shared latent", INF),
    Row("uniform, kappa_pos 20", 10.0, learn=True),
    Row("uniform, kappa_pos 20", 40.0, learn=True),
    Row("uniform, kappa_pos 20", 10.0, "moment_matched", learn=True),
    Row("uniform, kappa_pos 20", 40.0, "moment_matched", learn=True),
]
MARGINAL = [  # what the model assumes about the marginal of the latents
    Row(world, kappa, marginal=marginal, batch_norm=False)
    for world, kappa in (
        ("accepted pairs, offset 0.75", 20.0),
        ("prior vMF(10), shared latent", INF),
        ("prior vMF(10), kappa_pos 20", 20.0),
    )
    for marginal in ("uniform", "empirical")
]
LONGER = [replace(MARGINAL[3], steps=5_000)]  # the shallow direction comes last
SPREAD = [replace(row, batch_norm=True) for row in (*MARGINAL[1::2], *LONGER)]


def train(row: Row, seed: int, device: str, out: Path | None, batch_size: int) -> tuple[Any, Any, Any]:
    """Fit one row; give the world, the model and the guide."""
    pyro.set_rng_seed(seed)
    world = WORLDS[row.world]()
    guide = guides.VonMisesFisher(nets.mlp([world.observed_dim, 128, 128]), dim=world.dim, batch_norm=row.batch_norm)
    model = models.MCInfoNCE(
        guide,
        concentration=row.concentration,
        evidence=row.evidence,  # type: ignore[arg-type]
        learn_concentration=row.learn,
        marginal=row.marginal,  # type: ignore[arg-type]
    )
    name = row.name(seed)
    checkpoint = None if out is None else out / "checkpoints" / name
    fit(model, guide, world.batches(batch_size, seed), steps=row.steps, lr=2e-3, device=device, out=checkpoint,
        progress=name)  # fmt: skip
    return world, model.cpu(), guide.cpu()


def targets(world: Any, seed: int) -> tuple[torch.Tensor, dict[str, VonMisesFisher]]:
    """Held-out first views, and the exact laws that the fitted posteriors are compared with, by name."""
    if isinstance(world, AcceptanceWorld):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1_000 + seed)
            x = torch.randn(5_000, world.observed_dim)
        return x, {"posterior": world.posterior(x)}
    test = world.sample(5_000, seed=1_000 + seed)
    powers = {"likelihood": 0.0, "half way": 0.5, "posterior": 1.0} if world.prior_concentration else {"posterior": 1.0}
    return test.x1, {name: world.posterior(test, prior_power=power) for name, power in powers.items()}


def score(row: Row, world: Any, model: Any, guide: Any, seed: int) -> dict[str, float]:
    """Compare the fitted posteriors of fresh views with the exact laws, and read the pair concentration."""
    x, laws = targets(world, seed)
    with torch.no_grad():
        q = guide.posterior(x)
    figures = {
        "kappa_pos": float(model.concentration.detach()),
        "kappa_median": float(q.concentration.median()),
    }
    for name, law in laws.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2_000 + seed)
            z = law.sample()
        result = diagnostics.align_and_score(
            q.mean_direction, q.concentration, z, true_mean_direction=law.mean_direction,
            true_concentration=law.concentration,
        )  # fmt: skip
        figures |= {
            f"{name}: true kappa_median": float(law.concentration.median()),
            f"{name}: spearman": result.spearman_concentration,
            f"{name}: kappa_error": result.concentration_error,
            f"{name}: cosine_correlation": result.cosine_correlation,
            f"{name}: mean_angle": result.mean_angle,
            **{f"{name}: coverage_{level:.0%}": float(share)
               for level, share in zip(result.coverage.levels, result.coverage.empirical, strict=True)},
        }  # fmt: skip
    return figures


def profile(world: Any, model: Any, guide: Any, seed: int, num_pairs: int) -> diagnostics.Identifiability:
    """Held-out evidence along the flat direction."""
    pairs = world.sample(num_pairs, seed=3_000 + seed)
    with torch.no_grad():
        laws = guide.posterior(pairs.x1), guide.posterior(pairs.x2)
    return diagnostics.identifiability(*laws, model.concentration, marginal=model.marginal)


@torch.no_grad()
def held_out_matching(row: Row, world: Any, guide: Any, seed: int, num_pairs: int) -> dict[str, float]:
    """Matching likelihood of held-out pairs in nats, and what the exact laws gain where they are known."""
    pairs = world.sample(num_pairs, seed=4_000 + seed)

    def evidence(posterior: Callable[[torch.Tensor], Any]) -> torch.Tensor:
        batches = zip(pairs.x1.split(256), pairs.x2.split(256), strict=True)
        grids = (expected_log_ratio(posterior(x1), posterior(x2), row.concentration) for x1, x2 in batches)
        return torch.stack([matching_log_ratio(grid).mean() for grid in grids])

    fitted = evidence(guide.posterior)
    figures = {"held-out matching": float(fitted.mean())}
    if isinstance(world, AcceptanceWorld):
        gain = evidence(world.posterior) - fitted
        figures |= {"exact minus fitted": float(gain.mean()), "its s.e.": float(gain.std() / math.sqrt(len(gain)))}
    return figures


def run(out: Path, seed: int = 0, device: str = "auto", small: bool = False) -> dict[str, float]:
    """Fit and score all rows that are not in ``out/rows`` yet; give all figures under flat names."""
    rows_dir = out / "rows"
    rows_dir.mkdir(parents=True, exist_ok=True)
    rows = [*LEVEL, *MARGINAL, *LONGER, *SPREAD]
    batch_size = 256
    if small:
        kept = [LEVEL[0], LEVEL[7], MARGINAL[1], MARGINAL[3]]
        rows, batch_size = [replace(row, steps=20) for row in kept], 64
    figures: dict[str, float] = {}
    for row in rows:
        name = row.name(seed)
        file = rows_dir / f"{name}.json"
        if not file.exists():
            world, model, guide = train(row, seed, device, out, batch_size)
            values = {**score(row, world, model, guide, seed)}
            if row.marginal == "empirical":
                values |= held_out_matching(row, world, guide, seed, 256 if small else 5_120)
            else:
                result = profile(world, model, guide, seed, 256 if small else 2_560)
                low, high = result.plausible
                values |= {"plausible_low": low, "plausible_high": high}
                print(f"{name}\n  {result.summary()}")
                diagnostics.plot_identifiability(result).figure.savefig(out / f"{name}.png")
            file.write_text(json.dumps(values, indent=2) + "\n")
        values = json.loads(file.read_text())
        figures |= {f"{name}: {key}": value for key, value in values.items()}
    file = out / "population.json"
    if not file.exists():
        values = {**population(small), **exact_profile(out, 256 if small else 10_240)}
        file.write_text(json.dumps(values, indent=2) + "\n")
    return figures | json.loads(file.read_text())


def population(small: bool = False) -> dict[str, float]:
    """Where the likelihoods of a batch have their maximum: evaluated at exact laws, nothing fitted.

    Shared latents with a von Mises-Fisher prior of concentration 0 or 10. First the evidence of the laws between the
    normalised likelihood (prior power 0) and the posterior (1), relative to the middle; then, for the middle, the
    common factor on all log ratios that is best for each size of batch: 1 is right.
    """
    pairs = 512 if small else 5_120
    likelihoods: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "uniform": lambda log_f: infonce_log_ratio(log_f, symmetric=True),
        "empirical": matching_log_ratio,
        "balanced softmax": lambda log_f: infonce_log_ratio(balance_log_ratios(log_f), symmetric=True),
    }
    figures: dict[str, float] = {}

    def grids(world: SphereWorld, power: float, size: int) -> Iterator[torch.Tensor]:
        batch = world.sample(pairs, seed=0)
        laws = [world.posterior(batch, view, prior_power=power) for view in (1, 2)]
        for start in range(0, pairs - size + 1, size):
            part = slice(start, start + size)
            q1, q2 = (VonMisesFisher(q.mean_direction[part].double(), q.concentration[part].double()) for q in laws)
            yield shared_latent_log_ratio(q1, q2)

    for prior in (0.0, 10.0):
        world = SphereWorld(10, (16.0, 64.0), INF, prior_concentration=prior)
        for name in ("uniform", "empirical") if prior else ():
            evidence = likelihoods[name]
            items = {p: torch.cat([evidence(f) for f in grids(world, p, 256)]) for p in (0.5, 0.0, 0.25, 0.75, 1.0)}
            for power, value in items.items():
                difference = value - items[0.5]
                figures[f"prior {prior:g}, {name}, prior power {power:g}"] = float(difference.mean())
                figures[f"prior {prior:g}, {name}, prior power {power:g}: s.e."] = float(
                    difference.std() / math.sqrt(len(difference))
                )
        for size in (32, 128, 256):
            for name, evidence in likelihoods.items():
                values = torch.tensor([
                    [float(evidence(t * log_f).mean()) for t in (0.98, 1.0, 1.02)] for log_f in grids(world, 0.5, size)
                ])  # fmt: skip
                slopes = (values[:, 2] - values[:, 0]) / 0.04
                curvature = float((values[:, 2] + values[:, 0] - 2 * values[:, 1]).mean()) / 0.02**2
                key = f"prior {prior:g}, batch {size}, {name}: best factor"
                figures[key] = 1 - float(slopes.mean()) / curvature
                figures[f"{key}: s.e."] = float(slopes.std() / math.sqrt(len(slopes))) / abs(curvature)
                figures[f"prior {prior:g}, batch {size}, {name}: curvature"] = curvature
    return figures


def exact_profile(out: Path, num_pairs: int) -> dict[str, float]:
    """The flat direction at exact posteriors: what no encoder, however well fitted, can tell from pairs."""
    world = SphereWorld(10, (16.0, 64.0), 20.0)
    pairs = world.sample(num_pairs, seed=0)
    result = diagnostics.identifiability(world.posterior(pairs, 1), world.posterior(pairs, 2), 20.0)
    diagnostics.plot_identifiability(result).figure.savefig(out / "identifiability.png")
    names = ("level", "at_limit", "compensated", "compensated_error", "alone", "alone_error")
    return {
        f"exact laws, kappa_pos {kappa:.4g}: {name}": float(getattr(result, name)[i])
        for i, kappa in enumerate(result.pair_concentration)
        for name in names
    }


def table(out: Path, names: list[str]) -> str:
    """Markdown table of the named rows' most important figures."""
    head = ["row", "kappa_pos", "median kappa", "law", "true median", "Spearman", "error", "cosines", "50/80/95 % caps"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in names:
        values = json.loads((out / "rows" / f"{name}.json").read_text())
        for law in sorted({key.split(": ")[0] for key in values if ": " in key}):
            one = {key.split(": ")[1]: value for key, value in values.items() if key.startswith(f"{law}: ")}
            caps = " / ".join(f"{one[f'coverage_{level}%']:.3f}" for level in (50, 80, 95))
            cells = [name, f"{values['kappa_pos']:.3g}", f"{values['kappa_median']:.3g}", law,
                     f"{one['true kappa_median']:.3g}", f"{one['spearman']:.3f}", f"{one['kappa_error']:.1%}",
                     f"{one['cosine_correlation']:.3f}", caps]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    from _options import finish, parse

    args = parse(__doc__ or "")
    folder = args.out or Path("runs/identifiability")
    pick_device(args.device)
    figures = run(folder, args.seed, args.device, args.small)
    print(table(folder, sorted(path.stem for path in (folder / "rows").glob("*.json"))))
    finish({name: float(np.float64(value)) for name, value in figures.items()}, folder)
