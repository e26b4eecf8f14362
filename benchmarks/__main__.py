"""Everything that has a peer, in one table of ratios measured in one run.

    python -m benchmarks [--quick] [--only NAME ...] [--threads 1] [--device cpu] [--out FILE]

Each row is ours and a named peer on the same task, measured in turn; the ratio is ours to theirs, less is better. Peers
that are not installed are named all the same. On the CPU the clock is CPU time of the process (wall time where
processes are started), on a GPU wall time with synchronisation, and rows that are bound by matrix products show the
fraction of the measured ceiling. ``python -m benchmarks.NAME`` has more options and its own table.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import table

# in the order of the table, the cheapest last but one; each has rows(quick, device)
NAMES = ("spherical", "infonce", "evidence", "images", "retrieval", "imports", "overhead")


def run(names: list[str], quick: bool, device: torch.device) -> list[dict[str, Any]]:
    """The rows of the named benchmarks, each with the benchmark's name and how long it took."""
    rows = []
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        start = time.perf_counter()
        found = importlib.import_module(f"benchmarks.{name}").rows(quick, device)
        took = time.perf_counter() - start
        rows += [{"benchmark": name, **entry, "benchmark_seconds": took} for entry in found]
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run, print the table, write the JSON."""
    there = [name for name in NAMES if importlib.util.find_spec(f"benchmarks.{name}") is not None]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: some minutes on one core")
    parser.add_argument(
        "--only", nargs="+", choices=there, default=there, metavar="NAME", help=f"of {', '.join(there)}"
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--device", default="cpu", help="torch device (default cpu)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks.json"), help="where the figures go (JSON)")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rows = run(options.only, options.quick, torch.device(options.device))
    machine = {"torch": torch.__version__, "python": platform.python_version(), "processor": platform.machine()}
    settings = {"quick": options.quick, "threads": options.threads, "device": options.device, "only": options.only}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": machine, "settings": settings, "rows": rows}, indent=1) + "\n")
    print(table(rows))
    print(f"\nratio: ours to the peer's in the same run, less is better. Wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
