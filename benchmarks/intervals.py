"""How often the 95 % intervals of the diagnostics miss the truth, in simulated worlds where it is known.

    python -m benchmarks.intervals [--quick] [--repeats 300] [--out FILE]

The band of the risk-coverage curve is measured beside the percentile bootstrap, which it replaces.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
from scipy import stats
from tqdm import tqdm

from pyro_contrastive import diagnostics as diag

RESAMPLES = 500
KEPT = (0.05, 0.2, 0.5, 1.0)
RHO, SHIFT, SPREAD = 0.7, 0.1, 0.2


def error_rate(confidence: np.ndarray) -> np.ndarray:
    return 0.5 * (1 - confidence) ** 2


def truths(generator: np.random.Generator) -> dict[str, float]:
    """The figures of two million items, or their formulas."""
    confidence, ratio = generator.uniform(size=2_000_000), generator.normal(SHIFT, SPREAD, 2_000_000)
    curve = diag.risk_coverage(confidence, generator.uniform(size=confidence.size) > error_rate(confidence))
    band = {f"{kind} at {share:.0%}": curve.risk[int(share * confidence.size) - 1] for share in KEPT
            for kind in ("band", "bootstrap band")}  # fmt: skip
    return {
        "spearman": 6 / math.pi * math.asin(RHO / 2),
        "aurc": curve.aurc,
        "excess aurc": curve.excess_aurc,
        "gain": float(curve.risk[-1] - curve.aurc),
        **band,
        **{f"auroc {shift:g}": float(stats.norm.cdf(shift / math.sqrt(2))) for shift in (0.0, 1.0, 2.5)},
        "relative error": float(np.abs(np.expm1(ratio)).mean()),
        "log ratio mean": SHIFT,
        "log ratio sd": SPREAD,
    }


def intervals(num: int, generator: np.random.Generator) -> dict[str, tuple[float, float]]:
    """All intervals of one data set of `num` items."""
    options = {"num_resamples": RESAMPLES, "seed": int(generator.integers(2**31))}
    x, noise, ratio = generator.normal(size=(3, num))
    confidence = generator.uniform(size=num)
    correct = generator.uniform(size=num) > error_rate(confidence)
    selective = diag.selective_risk(confidence, correct, **options)
    kappa = np.exp(generator.uniform(math.log(16), math.log(64), num))
    recovery = diag.concentration_recovery(kappa * np.exp(SHIFT + SPREAD * ratio), kappa, **options)
    estimates = {
        "spearman": diag.rank_agreement(x, RHO * x + math.sqrt(1 - RHO**2) * noise, **options),
        "aurc": selective.aurc,
        "excess aurc": selective.excess_aurc,
        "gain": selective.gain,
        "relative error": recovery.relative_error,
        "log ratio mean": recovery.log_ratio_mean,
        "log ratio sd": recovery.log_ratio_sd,
    }
    for shift in (0.0, 1.0, 2.5):
        estimates[f"auroc {shift:g}"] = diag.ood_auroc(generator.normal(shift, 1, num), generator.normal(size=num // 2))
    found = {name: (estimate.lower, estimate.upper) for name, estimate in estimates.items()}
    index = generator.integers(num, size=(RESAMPLES, num))
    index = np.take_along_axis(index, np.argsort(-confidence[index], axis=1), axis=1)
    risks = np.cumsum(~correct[index], axis=1) / np.arange(1, num + 1)
    for share in KEPT:
        at = max(int(share * num), 1) - 1
        found[f"band at {share:.0%}"] = selective.lower[at], selective.upper[at]
        found[f"bootstrap band at {share:.0%}"] = tuple(np.quantile(risks[:, at], [0.025, 0.975]))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run, print the table, write the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.intervals", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="5 repeats: a smoke test, not a figure")
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks_intervals.json"), help="where the figures go")
    options = parser.parse_args(arguments)
    repeats = 5 if options.quick else options.repeats
    truth = truths(np.random.default_rng(options.seed))
    rows: dict[str, dict[str, float]] = {name: {} for name in truth}
    for num in (50, 500):
        misses = dict.fromkeys(truth, 0)
        for repeat in tqdm(range(repeats), desc=f"{num} items", disable=None):
            for name, (lower, upper) in intervals(num, np.random.default_rng([options.seed, num, repeat])).items():
                misses[name] += not lower <= truth[name] <= upper
        for name in truth:
            rows[name][str(num)] = misses[name] / repeats
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"repeats": repeats, "misses": rows}, indent=1) + "\n")
    print(f"{'share of 95 % intervals that miss':<36}{'50 items':>9}{'500 items':>10}")
    for name, row in rows.items():
        print(f"{name:<36}{row['50']:>9.3f}{row['500']:>10.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
