"""Which calibration check rings for which wrong posterior: shares of runs with a p-value below .01.

    python -m benchmarks.alarms [--items 1000] [--draws 499] [--runs 20] [--out FILE]

Data come from `data.SphereWorld`, whose exact posterior is known; each case judges another law made out of it. The row
"right" measures the rate of false alarms, which should be .01, on five times as many runs. In place of an alarm,
the last column has the mean share of items whose Pareto k-hat against the exact posterior is above .7.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from pyro_contrastive import diagnostics as d
from pyro_contrastive.data import SphereWorld
from pyro_contrastive.distributions import HypersphericalUniform, ProjectedNormal, VonMisesFisher
from pyro_contrastive.ops import inverse_bessel_ratio
from pyro_contrastive.ops.random import seeded

DIM = 10
WORLD = SphereWorld(DIM, concentration=(16.0, 64.0))
ALPHA = 0.01


@dataclass(frozen=True)
class Case:
    """A posterior that is wrong in a known way: `judged(mean_direction, concentration)` of the exact one."""

    judged: Callable[[Tensor, Tensor], Any]
    exact: Callable[[Tensor, Tensor], Any] = VonMisesFisher

    def simulate(self, num_items: int, seed: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        batch = WORLD.sample(num_items, seed)
        inputs = batch.mean_direction1, batch.concentration1
        if self.exact is VonMisesFisher:
            return inputs, batch.z1
        with seeded(seed):
            return inputs, self.exact(*inputs).sample()

    def posterior(self, inputs: tuple[Tensor, Tensor]) -> Any:
        return self.judged(*inputs)


def turned(mean: Tensor, angle: float) -> Tensor:
    """Rotates every pair of axes by one angle."""
    turn = torch.tensor([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], dtype=mean.dtype)
    return mean @ torch.block_diag(*[turn] * (DIM // 2))


def tilted(mean: Tensor, by: float) -> Tensor:
    """Pulls every direction to the first axis."""
    return normalize(mean + by * torch.eye(DIM)[0], dim=-1)


def widened(mean: Tensor, kappa: Tensor, by: float) -> Tensor:
    """The concentration whose caps hold in spite of the tilt: the squared shift is added to the variances."""
    return (DIM - 1) / ((DIM - 1) / kappa + by**2 * (1 - mean[:, 0] ** 2))


def elongated(mean: Tensor, kappa: Tensor) -> ProjectedNormal:
    """Truths that scatter four times as far along the first half of the axes as along the others."""
    scale = torch.tensor([1.6] * (DIM // 2) + [0.4] * (DIM - DIM // 2)) / kappa.sqrt().unsqueeze(-1)
    return ProjectedNormal(mean, scale)


def round_law(mean: Tensor, kappa: Tensor) -> VonMisesFisher:
    """The von Mises-Fisher law with the mean resultant length of `elongated`, as a fit would find it."""
    with seeded(1):
        length = elongated(mean, kappa).sample((256,)).mean(0).norm(dim=-1)
    return VonMisesFisher(mean, inverse_bessel_ratio(DIM, length.double()).float())


CASES = {
    "right": Case(VonMisesFisher),
    "over-confident: kappa x 4": Case(lambda m, k: VonMisesFisher(m, 4 * k)),
    "under-confident: kappa / 4": Case(lambda m, k: VonMisesFisher(m, k / 4)),
    "rotated by .2": Case(lambda m, k: VonMisesFisher(turned(m, 0.2), k)),
    "tilted to a pole by .15": Case(lambda m, k: VonMisesFisher(tilted(m, 0.15), k)),
    "tilted, widened until its caps hold": Case(lambda m, k: VonMisesFisher(tilted(m, 0.15), widened(m, k, 0.15))),
    "wrong family: round, truth elongated": Case(round_law, elongated),
    "widths of other items": Case(lambda m, k: VonMisesFisher(m, k.roll(1))),
    "ignores the input: uniform": Case(lambda m, k: HypersphericalUniform(DIM).expand((len(m),))),
}


def pvalues(case: Case, num_items: int, num_draws: int, seed: int) -> dict[str, float]:
    """One p-value per check, and the share of items whose k-hat is too large."""
    quantities = d.default_quantities(DIM) | {"log_density": d.log_density}
    sizes = {"num_simulations": num_items, "num_draws": num_draws, "seed": seed}
    ranks = d.sbc(case.posterior, case.simulate, quantities=quantities, **sizes)
    centre = d.variational_sbc(case.posterior, case.simulate, quantities=d.coordinates(3), **sizes)
    inputs, truth = case.simulate(num_items, seed + 1_000)
    judged, exact = case.posterior(inputs), case.exact(*inputs)
    axes = d.adjusted_pvalues({name: p for name, p in ranks.pvalues.items() if name.startswith("axis")})
    found = {
        "caps": d.uniformity_pvalue(d.cap_pit(judged, truth)),
        "log density": ranks.pvalues["log_density"],
        "TARP": ranks.pvalues["reference"],
        "axes": min(axes.values()),
        "VSBC, axes": min(centre.adjusted_pvalues.values()),
    }
    for name, score, sign in (("log score", d.log_score, 1.0), ("energy score", d.energy_score, -1.0)):
        gain = sign * (score(exact, truth).values - score(judged, truth).values)  # the same draws where laws agree
        found[name] = float(stats.ttest_1samp(gain, 0.0, alternative="greater").pvalue) if gain.any() else 1.0
    z = judged.sample((num_draws,))
    khat = d.psis_khat(exact.log_prob(z) - judged.log_prob(z))
    found["k-hat > .7"] = float(np.mean(khat > 0.7))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run, print the table, write the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.alarms", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=1000, help="simulations per run (default 1000)")
    parser.add_argument("--draws", type=int, default=499, help="posterior draws per item (default 499)")
    parser.add_argument("--runs", type=int, default=20, help="runs per wrong posterior (default 20)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--out", type=Path, default=Path("alarms.json"), help="where the figures go (JSON)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    start, rows = time.process_time(), []
    for name, case in CASES.items():
        seeds = range(options.runs * (5 if name == "right" else 1))
        progress = tqdm(seeds, desc=name, leave=False, disable=None)
        runs = [pvalues(case, options.items, options.draws, seed) for seed in progress]
        shares = {
            check: float(np.mean([run[check] if check.startswith("k-hat") else run[check] < ALPHA for run in runs]))
            for check in runs[0]
        }
        rows.append({"case": name, **shares})
        settings = {key: str(value) for key, value in vars(options).items()}
        seconds = time.process_time() - start
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"settings": settings, "seconds": seconds, "rows": rows}, indent=1) + "\n")
    columns = [key for key in rows[0] if key != "case"]
    print("| posterior | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for row in rows:
        print(f"| {row['case']} | " + " | ".join(f"{row[key]:.2f}".lstrip("0") for key in columns) + " |")
    print(f"\n{options.items} items, {options.draws} draws, {options.runs} runs; {seconds:.0f} CPU seconds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
