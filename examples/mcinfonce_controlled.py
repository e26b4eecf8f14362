"""The controlled experiments of MCInfoNCE: does an objective recover the true posterior? One row per script.

``python examples/mcinfonce_controlled.py --out runs/controlled`` runs every row with every seed in both worlds, and
writes one JSON file per run. Files that are there are not run again, so it can be interrupted and repeated.
``--table FILE.md`` writes the tables of what is there, below the text of the page, and the runs themselves into
FILE.json; it runs nothing.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

from _controlled import ROWS, SEEDS, WORLDS, run
from _runs import save_run, write_all_runs, write_tables

COLUMNS = {
    "cosine: Pearson / Spearman / MAE": ("cosine_pearson", "cosine_spearman", "cosine_mae"),
    "kappa: Pearson / Spearman / MAE": ("kappa_pearson", "kappa_spearman", "kappa_mae"),
    "kappa: relative error": ("kappa_error",),
    "kappa: 5 / 50 / 95 %": ("kappa_5", "kappa_50", "kappa_95"),
    "length: Spearman / MAE": ("length_spearman", "length_mae"),
    "caps 50 / 80 / 95 %": ("coverage_50", "coverage_80", "coverage_95"),
}
MARKER = "<!-- written by examples/mcinfonce_controlled.py --table -->"
TITLES = {"pair": "The authors' generator (`data.PairWorld`)", "sphere": "`data.SphereWorld`"}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="ROW", help=f"or patterns; of {', '.join(ROWS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), metavar="N", help="default: 4 to 8")
    parser.add_argument("--worlds", nargs="+", default=list(WORLDS), choices=WORLDS, help="default: both")
    parser.add_argument("--steps", type=int, default=1_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=2e-3, help="of Adam, cosine to zero; default: %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or auto")
    parser.add_argument("--out", type=Path, default=Path("runs/controlled"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--small", action="store_true", help="a few steps in small worlds: shows that it runs")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the Markdown table of what is in --out")
    args = parser.parse_args(argv)
    args.rows = [name for name in ROWS if any(fnmatch.fnmatch(name, pattern) for pattern in args.rows)]
    if not args.rows:
        parser.error(f"no row matches; the rows are {', '.join(ROWS)}")
    if args.small:
        args.steps = 20
    return args


def main(args: argparse.Namespace) -> None:
    """Run what is missing, the first seed of every row before the second of any."""
    tasks = [(s, r, w) for s in args.seeds for w in args.worlds for r in args.rows if w in ROWS[r].worlds()]
    args.out.mkdir(parents=True, exist_ok=True)
    for number, (seed, name, world) in enumerate(tasks, start=1):
        path = args.out / f"{world}-{name}-{seed}.json"
        if path.exists():
            continue
        print(f"{number} of {len(tasks)}: {name}, {world} world, seed {seed}", flush=True)
        settings = {"steps": args.steps, "batch_size": args.batch_size, "lr": args.lr}
        result = run(name, world, seed, **settings, device=args.device, small=args.small)
        save_run(path, result)


def table(folder: Path, rows: Iterable[str]) -> str:
    """Markdown tables of the runs in a folder, one per world: means over the seeds."""
    parts = []
    for world in WORLDS:
        parts += [f"## {TITLES[world]}", ""]
        parts += [f"| row | seeds | {' | '.join(COLUMNS)} | steps | CPU s |", "|---" * (len(COLUMNS) + 4) + "|"]
        for name in rows:
            if world not in ROWS[name].worlds():
                continue
            files = [folder / f"{world}-{name}-{seed}.json" for seed in SEEDS]
            found = [json.loads(path.read_text()) for path in files if path.exists()]
            if not found:
                parts.append(f"| {name}: {ROWS[name].about} | not run |" + " |" * (len(COLUMNS) + 2))
                continue
            cells = [" / ".join(_mean(found, key) for key in keys) for keys in COLUMNS.values()]
            seeds = " ".join(str(result["seed"]) for result in found)
            steps, cpu = found[0]["steps"], fmean(result["cpu_seconds"] for result in found)
            parts.append(f"| {name}: {ROWS[name].about} | {seeds} | {' | '.join(cells)} | {steps} | {cpu:.0f} |")
        parts.append("")
    return "\n".join(parts)


def _mean(results: list[dict], key: str) -> str:
    values = [result[key] for result in results if result.get(key) is not None]
    if not values:
        return "-"
    mean = fmean(values)
    if key == "kappa_error":
        return f"{mean:.1%}" if mean < 10 else f"{mean:,.0f} times"
    return f"{mean:.3f}" if abs(mean) < 1 else f"{mean:.3g}"


if __name__ == "__main__":
    arguments = parse()
    if arguments.table is None:
        main(arguments)
    else:
        write_tables(arguments.table, MARKER, table(arguments.out, arguments.rows))
        write_all_runs(arguments.table.with_suffix(".json"), arguments.out)
