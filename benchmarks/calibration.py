"""Cost of calibrating 10,000 posteriors by 1,000 draws each at d = 64, draws included, against a plain NumPy loop.

    python -m benchmarks.calibration [--quick] [--items 10000] [--draws 1000] [--dim 64] [--out FILE]

The work: ranks of four quantities (angle to the mean, log density, a coordinate, the angle to a random reference), the
TARP curve of the last, coverage of credible caps, the energy score. The peer is the same work item by item in NumPy
and SciPy, for no package that does this on a sphere is installed: draws of `scipy.stats.vonmises_fisher`, all pairs in
the energy score (as a plain implementation has it) or the same groups of 16 draws. It runs on fewer items and is
scaled up; that it and the library agree on those items is checked. Every row runs in a process of its own: peaks are
those of its resident memory, libraries included (row "nothing"), clocks are CPU time of one thread.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROWS = (
    "nothing",
    "draws only",
    "ranks, TARP, coverage",
    "energy score",
    "all",
    "NumPy, groups of 16",
    "NumPy, all pairs",
)
LEVELS = (0.5, 0.8, 0.95)
BATCH = 256


def posteriors(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Mean directions, concentrations and truths, right by construction."""
    import torch

    from pyro_contrastive.distributions import VonMisesFisher

    torch.manual_seed(options.seed)
    mean = torch.nn.functional.normalize(torch.randn(options.items, options.dim), dim=-1)
    kappa = torch.empty(options.items).uniform_(np.log(50.0), np.log(400.0)).exp()
    truth = VonMisesFisher(mean, kappa).sample()
    VonMisesFisher(mean[:BATCH], kappa[:BATCH]).sample()
    return mean, kappa, truth


def library(options: argparse.Namespace, row: str, data: tuple[Any, Any, Any]) -> dict[str, float]:
    """The work by the library; what it found, for the comparison."""
    from pyro_contrastive import diagnostics as d
    from pyro_contrastive.distributions import VonMisesFisher

    mean, kappa, truth = data
    law = VonMisesFisher(mean, kappa, validate_args=False)
    found: dict[str, float] = {}
    if row == "draws only":
        for rows in range(0, options.items, BATCH):
            part = slice(rows, rows + BATCH)
            batch = VonMisesFisher(mean[part], kappa[part], validate_args=False)
            for _ in range(0, options.draws, 50):
                batch.sample((50,))
    if row in ("ranks, TARP, coverage", "all"):
        position = iter(range(0, options.items, BATCH))

        def simulate(n: int, seed: int) -> tuple[tuple[Any, Any], Any]:
            start = next(position)
            part = slice(start, start + n)
            return (mean[part], kappa[part]), truth[part]

        quantities = {
            "angle": d.angle_to_mean,
            "log density": d.log_density,
            "axis": d.coordinates(1)["axis0"],
            "reference": d.angle_to_reference(),
        }
        result = d.sbc(
            lambda inputs: VonMisesFisher(*inputs, validate_args=False),
            simulate,
            num_simulations=options.items,
            num_draws=options.draws,
            quantities=quantities,
            batch_size=BATCH,
        )
        curve = d.expected_coverage(result.pit["reference"])
        caps = d.coverage(d.cap_pit(law, truth), LEVELS)
        found |= {name: float(values.mean()) for name, values in result.pit.items()}
        found |= {"TARP": float(curve.expected_coverage[10]), "coverage": float(caps.empirical[0])}
    if row in ("energy score", "all"):
        found["energy"] = d.energy_score(law, truth, num_draws=options.draws).mean
    return found


def numpy_loop(options: argparse.Namespace, row: str, data: tuple[Any, Any, Any]) -> dict[str, float]:
    """The same, one item after the other."""
    from scipy import stats

    mean, kappa, truth = (values.double().numpy() for values in data)
    rng = np.random.default_rng(options.seed)
    pit: dict[str, list[float]] = {"angle": [], "log density": [], "axis": [], "reference": []}
    energy, inside = [], []
    for i in range(options.items):
        centre = mean[i] / np.linalg.norm(mean[i])
        law = stats.vonmises_fisher(centre, kappa[i])
        draws, own = law.rvs(options.draws, random_state=rng), truth[i] / np.linalg.norm(truth[i])
        reference = rng.standard_normal(options.dim)
        reference /= np.linalg.norm(reference)
        pairs = {
            "angle": (np.arccos(draws @ centre), np.arccos(own @ centre)),
            "log density": (law.logpdf(draws), law.logpdf(own)),
            "axis": (draws[:, 0], own[0]),
            "reference": (np.arccos(draws @ reference), np.arccos(own @ reference)),
        }
        for name, (values, value) in pairs.items():
            pit[name].append((np.sum(values < value) + rng.uniform()) / (options.draws + 1))
        inside.append(pit["angle"][-1] <= np.array(LEVELS))
        size = 16 if row == "NumPy, groups of 16" else options.draws
        groups = np.split(draws[: options.draws // size * size], options.draws // size)
        apart = [np.sqrt(np.maximum(2 - 2 * g @ g.T, 0)).sum() / (size * (size - 1)) for g in groups]
        energy.append(np.linalg.norm(draws - own, axis=1).mean() - 0.5 * np.mean(apart))
    found = {name: float(np.mean(values)) for name, values in pit.items()}
    reference_pit = np.array(pit["reference"])
    found |= {"TARP": float(np.mean(reference_pit <= 0.5)), "coverage": float(np.mean(inside, axis=0)[0])}
    return found | {"energy": float(np.mean(energy))}


def measure(row: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row in this process."""
    import torch

    torch.set_num_threads(options.threads)
    import pyro_contrastive.diagnostics  # noqa: F401

    start, found = time.process_time(), {}
    if row != "nothing":
        data = posteriors(options)  # draws of the truth and the quantile map of this dimension, built once per process
        start = time.process_time()
        found = (numpy_loop if row.startswith("NumPy") else library)(options, row, data)
    seconds = time.process_time() - start
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    return {"row": row, "items": options.items, "seconds": seconds, "peak_mib": peak, "found": found}


def main(arguments: list[str] | None = None) -> int:
    """Run every row in a process of its own, print the table, write the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.calibration",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="500 items of 100 draws: a smoke test, not a figure")
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--peer-items", type=int, default=200, help="items of the NumPy loop (default 200)")
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("calibration.json"), help="where the figures go (JSON)")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.items, options.peer_items, options.draws = 500, 50, 100
    if options.row:
        print(json.dumps(measure(options.row, options)))
        return 0
    rows = []
    plan = [(row, options.peer_items if row.startswith("NumPy") else options.items) for row in ROWS]
    for number, (row, items) in enumerate([*plan, ("all", options.peer_items)], start=1):
        print(f"{number}/{len(plan) + 1}: {row}, {items} items", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "benchmarks.calibration", "--row", row, "--items", str(items)]
        for name in ("draws", "dim", "threads", "seed"):
            command += [f"--{name}", str(getattr(options, name))]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        machine = {"python": platform.python_version(), "processor": platform.machine()}
        settings = {name: str(value) for name, value in vars(options).items()}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"machine": machine, "settings": settings, "rows": rows}, indent=1) + "\n")
    ours, peer = rows[-1]["found"], rows[-2]["found"]
    for name in ("energy",):  # the same truths, other draws: equal up to the error of the draws
        assert abs(ours[name] - peer[name]) < 0.01, (name, ours, peer)
    for name in ("angle", "log density", "axis"):
        assert abs(ours[name] - peer[name]) < 0.02, (name, ours, peer)
    print(f"{'row':<24}{'items':>8}{'CPU s':>9}{'CPU s / 10,000':>16}{'peak MiB':>10}")
    for row in rows:
        each = row["seconds"] * 10_000 / row["items"]
        print(f"{row['row']:<24}{row['items']:>8}{row['seconds']:>9.2f}{each:>16.1f}{row['peak_mib']:>10.0f}")
    print(f"\n{options.draws} draws, d = {options.dim}, {options.threads} thread. Wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
