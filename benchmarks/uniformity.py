"""False alarms and power of `diagnostics.aggregate_uniformity`, both tests, by dimension and number of points.

    python -m benchmarks.uniformity [--quick] [--repeats 1000] [--out FILE]

"needed" is the smallest effect found with a probability of 80 % at a level of 5 %, from the non-central chi-squared
law: a mean resultant length for Rayleigh's test (von Mises-Fisher marginal), the relative excess of one eigenvalue for
Bingham's (one axis stretched). "power" is how often the test rang in simulations with just that effect.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from scipy import optimize, stats
from tqdm import tqdm

from pyro_contrastive.diagnostics import aggregate_uniformity
from pyro_contrastive.distributions import VonMisesFisher
from pyro_contrastive.ops import inverse_bessel_ratio
from pyro_contrastive.ops.random import seeded

LEVEL, POWER = 0.05, 0.8


def uniform(num: int, dim: int, generator: np.random.Generator) -> np.ndarray:
    z = generator.standard_normal((num, dim))
    return z / np.linalg.norm(z, axis=-1, keepdims=True)


def directed(num: int, dim: int, length: float, seed: int) -> np.ndarray:
    """Points around the first axis with a given mean resultant length."""
    kappa = inverse_bessel_ratio(dim, torch.tensor(length, dtype=torch.float64))
    with seeded(seed):
        return VonMisesFisher(torch.eye(dim, dtype=torch.float64)[0], kappa).sample((num,)).numpy()


def stretched(num: int, dim: int, excess: float, generator: np.random.Generator) -> np.ndarray:
    """Points whose mean squared first coordinate is (1 + excess) / dim, symmetric otherwise."""
    share, half = (1 + excess) / dim, 0.5 * (dim - 1)
    square = generator.beta(half * share / (1 - share), half, num)[:, None]
    rest = generator.standard_normal((num, dim - 1))
    rest /= np.linalg.norm(rest, axis=-1, keepdims=True)
    return np.hstack([np.sqrt(square) * generator.choice([-1.0, 1.0], (num, 1)), np.sqrt(1 - square) * rest])


def noncentrality(df: float) -> float:
    """Of a chi-squared statistic that exceeds its 5 % point with a probability of 80 %."""
    edge = stats.chi2.isf(LEVEL, df)
    return float(optimize.brentq(lambda nc: stats.ncx2.sf(edge, df, nc) - POWER, 1e-6, 50 * math.sqrt(df) + 100))


def row(dim: int, num: int, repeats: int, seed: int) -> dict[str, float]:
    direction = math.sqrt(noncentrality(dim) / (dim * num))
    axis = math.sqrt(2 * (dim - 1) / (num * (dim + 2)) * noncentrality((dim - 1) * (dim + 2) / 2))
    rings = np.zeros(4)
    for repeat in range(repeats):
        generator = np.random.default_rng([seed, dim, num, repeat])
        null = aggregate_uniformity(uniform(num, dim, generator))
        first = aggregate_uniformity(directed(num, dim, direction, repeat)) if direction < 1 else None
        second = aggregate_uniformity(stretched(num, dim, axis, generator)) if axis < dim - 1 else None
        pvalues = (
            null.rayleigh_pvalue,
            null.bingham_pvalue,
            first.rayleigh_pvalue if first else np.nan,
            second.bingham_pvalue if second else np.nan,
        )
        rings += np.where(np.isnan(pvalues), np.nan, np.less(pvalues, LEVEL))
    names = ("rayleigh_false", "bingham_false", "rayleigh_power", "bingham_power")
    shares = dict(zip(names, (rings / repeats).tolist(), strict=True))
    return {"dim": dim, "points": num, "rayleigh_needed": direction, "bingham_needed": axis, **shares}


def main(arguments: list[str] | None = None) -> int:
    """Run, print the table, write the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.uniformity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="20 repeats of the small ones: a smoke test")
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks_uniformity.json"), help="where the figures go")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cells = [(dim, num) for dim in (2, 3, 8, 32, 128) for num in ((100,) if options.quick else (100, 1000, 5000))]
    repeats = 20 if options.quick else options.repeats
    rows = [row(dim, num, repeats, options.seed) for dim, num in tqdm(cells, desc="cells", disable=None)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"repeats": repeats, "level": LEVEL, "rows": rows}, indent=1) + "\n")
    print(f"{'d':>4}{'N':>6}  {'Rayleigh: false, needed, power':>32}  {'Bingham: false, needed, power':>32}")
    for r in rows:
        figures = [
            f"{r[f'{test}_false']:>10.3f}{r[f'{test}_needed']:>12.3f}{r[f'{test}_power']:>10.2f}"
            for test in ("rayleigh", "bingham")
        ]
        print(f"{r['dim']:>4}{r['points']:>6}  {figures[0]}  {figures[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
