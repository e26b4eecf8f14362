"""Credible sets of 1,000 queries in a gallery of 1,000,000 items, torch against faiss, in one run.

    python -m benchmarks.retrieval [--quick] [--items 1000000] [--gallery points posteriors] [--rounds 3]

The floor is the bare matrix product of all cosines, in the same blocks; every ratio is to it. "points" is a gallery of
directions (one cap per query), "posteriors" one with its own concentrations (another edge for every pair). The figure
is the median of CPU seconds over the rounds, all entries measured in turn. What is found does not depend on the
backend: the run checks it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import platform
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import directions, medians, peer, row
from pyro_contrastive.diagnostics import CredibleSets, credible_sets
from pyro_contrastive.distributions import VonMisesFisher

BLOCK = 8192


def rows(quick: bool, device: torch.device) -> list[dict[str, Any]]:
    """Credible sets of 1,000 queries by torch, on the CPU, against faiss and the bare matrix product."""
    cpu, dim = torch.device("cpu"), 64
    num = 50_000 if quick else 1_000_000
    queries, items = (
        VonMisesFisher(directions((n,), dim, cpu), torch.empty(n).uniform_(math.log(50), math.log(400)).exp())
        for n in (1000, num)
    )
    gallery = items.mean_direction
    tasks: dict[str, Callable[[], object]] = {
        "matrix product": lambda: [queries.mean_direction @ block.mT for block in gallery.split(BLOCK)],
        "torch": lambda: credible_sets(queries, gallery, backend="torch"),
    }
    faiss = peer("faiss")
    if faiss is not None:
        faiss.omp_set_num_threads(torch.get_num_threads())
        tasks["faiss"] = lambda: credible_sets(queries, gallery, backend="faiss")
    seconds = medians(tasks, 3, cpu, "credible sets")
    setting = f"1,000 in {num:,}, d = {dim}"
    return [
        row("credible sets", setting, seconds["torch"], "matrix product alone", seconds["matrix product"]),
        row("credible sets", setting, seconds["torch"], "faiss (flat index)", seconds.get("faiss")),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run, print the table, write the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.retrieval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="20,000 items, one round: a smoke test, not a figure")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--concentration", type=float, nargs=2, default=(50.0, 400.0), metavar=("LOW", "HIGH"))
    parser.add_argument("--gallery", nargs="+", choices=("points", "posteriors"), default=("points", "posteriors"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of torch and faiss (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks_retrieval.json"), help="where the figures go")
    options = parser.parse_args(arguments)
    if options.quick:
        options.items, options.rounds = 20_000, 1

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    cpu = torch.device("cpu")
    low, high = map(math.log, options.concentration)
    queries, items = (
        VonMisesFisher(directions((n,), options.dim, cpu), torch.empty(n).uniform_(low, high).exp())
        for n in (options.queries, options.items)
    )
    backends = ["torch"]
    if importlib.util.find_spec("faiss") is not None:
        import faiss

        faiss.omp_set_num_threads(options.threads)
        backends.append("faiss")

    found: dict[str, CredibleSets] = {}

    def product() -> None:
        for block in items.mean_direction.split(BLOCK):
            queries.mean_direction @ block.mT

    def search(name: str, gallery: object, backend: str) -> None:
        found[f"{name}, {backend}"] = credible_sets(queries, gallery, backend=backend)

    tasks: dict[str, Callable[[], object]] = {"matrix product": product}
    for name in options.gallery:
        gallery = items if name == "posteriors" else items.mean_direction
        for backend in backends:
            tasks[f"{name}, {backend}"] = lambda n=name, g=gallery, b=backend: search(n, g, b)
    seconds = medians(tasks, options.rounds, cpu, "credible sets")
    rows = [
        {"task": task, "seconds": value, "ratio": value / seconds["matrix product"]} for task, value in seconds.items()
    ]
    for entry in rows:
        sets = found.get(entry["task"])
        if sets is not None:
            entry |= {"mean_size": float(sets.sizes.mean()), "largest": int(sets.sizes.max())}
            other = found[entry["task"].split(",")[0] + ", torch"]
            assert np.array_equal(sets.indices, other.indices) and np.array_equal(sets.indptr, other.indptr)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    settings = {name: str(value) for name, value in vars(options).items()}
    machine = {"torch": torch.__version__, "python": platform.python_version(), "peak_gib": peak}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": machine, "settings": settings, "rows": rows}, indent=1) + "\n")
    print(f"{'task':<22}{'CPU s':>8}{'ratio':>7}{'mean size':>11}{'largest':>9}")
    for entry in rows:
        sizes = f"{entry['mean_size']:>11.1f}{entry['largest']:>9}" if "mean_size" in entry else ""
        print(f"{entry['task']:<22}{entry['seconds']:>8.2f}{entry['ratio']:>7.2f}{sizes}")
    print(f"\n{options.queries} queries, {options.items} items, d = {options.dim}; peak {peak:.2f} GiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
