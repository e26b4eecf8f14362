"""The controlled experiments of AnInfoNCE: which latents and precisions are recovered, and from which start.

``python examples/aninfonce_controlled.py --out runs/aninfonce`` runs every row with seeds 0 to 4 and writes one JSON
file per run. Files that are there are not run again, so it can be interrupted and repeated. ``--table FILE.md`` writes
the tables of what is there, below the text of the page, and the runs themselves into FILE.json; it runs nothing.
``--figure FILE.png`` draws learned against true precisions of the rows chosen. ``--scales .85 1 1.15`` prints the
likelihood at the exact posteriors of the row "ambiguous", concentrations times a scale.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, median

from _aninfonce import ROWS, likelihood_of_scales, run
from _runs import save_run, write_all_runs, write_tables

from pyro_contrastive import diagnostics

SEEDS = (0, 1, 2, 3, 4)
COLUMNS = {
    "R2": "r2",
    "R2, first half of the axes": "r2_first",
    "R2, second half": "r2_second",
    "MCC": "mcc",
    "error of Lambda": "precision_error",
    "sorted": "precision_sorted_error",
}
COVERAGE = {
    "caps 50 %": "coverage_50",
    "80 %": "coverage_80",
    "95 %": "coverage_95",
    "kappa: rank correlation": "kappa_spearman",
    "relative error": "kappa_error",
}
MARKER = "<!-- written by examples/aninfonce_controlled.py --table -->"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="ROW", help=f"or patterns; of {', '.join(ROWS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), metavar="N", help="default: 0 to 4")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or auto")
    parser.add_argument("--out", type=Path, default=Path("runs/aninfonce"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--small", action="store_true", help="a few steps: shows that it runs")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the Markdown tables of what is in --out")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the precisions of what is in --out")
    parser.add_argument("--scales", nargs="+", type=float, metavar="S", help="print the likelihood at these scales")
    args = parser.parse_args(argv)
    args.rows = [name for name in ROWS if any(fnmatch.fnmatch(name, pattern) for pattern in args.rows)]
    if not args.rows:
        parser.error(f"no row matches; the rows are {', '.join(ROWS)}")
    return args


def main(args: argparse.Namespace) -> None:
    """Run what is missing, the first seed of every row before the second of any."""
    tasks = [(seed, name) for seed in args.seeds for name in args.rows]
    args.out.mkdir(parents=True, exist_ok=True)
    for number, (seed, name) in enumerate(tasks, start=1):
        path = args.out / f"{name}-{seed}.json"
        if path.exists():
            continue
        print(f"{number} of {len(tasks)}: {name}, seed {seed}", flush=True)
        result = run(name, seed, device=args.device, small=args.small)
        save_run(path, result)


def load(folder: Path, name: str) -> list[dict]:
    """The runs of a row, by seed."""
    files = [folder / f"{name}-{seed}.json" for seed in SEEDS]
    return [json.loads(path.read_text()) for path in files if path.exists()]


def table(folder: Path, rows: Iterable[str]) -> str:
    """Markdown tables of the runs in a folder: medians over the seeds."""
    parts: list[str] = []
    for title, columns, chosen in (
        ("Latents and precisions", COLUMNS, [name for name in rows if not ROWS[name].ambiguous]),
        ("Ambiguous views", COLUMNS | COVERAGE, [name for name in rows if ROWS[name].ambiguous]),
    ):
        if not chosen:
            continue
        parts += [f"## {title}", "", f"| row | seeds | {' | '.join(columns)} | steps | CPU s |"]
        parts += ["|---" * (len(columns) + 4) + "|"]
        for name in chosen:
            about = f"{name}: {ROWS[name].about}"
            found = load(folder, name)
            if not found:
                parts.append(f"| {about} | not run |" + " |" * (len(columns) + 2))
                continue
            cells = " | ".join(_median(found, key) for key in columns.values())
            seeds = " ".join(str(one["seed"]) for one in found)
            cpu = fmean(one["cpu_seconds"] for one in found)
            parts.append(f"| {about} | {seeds} | {cells} | {found[0]['steps']} | {cpu:.0f} |")
        parts.append("")
    return "\n".join(parts)


def draw(file: Path, folder: Path, rows: Iterable[str]) -> None:
    """Learned against true precisions, the first seed of each row."""
    found = {name: load(folder, name) for name in rows}
    recoveries = {
        name: diagnostics.precision_recovery(runs[0]["precision"], runs[0]["truth"], runs[0]["assignment"])
        for name, runs in found.items()
        if runs and runs[0]["precision_error"] is not None
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    diagnostics.plot_precision(recoveries).figure.savefig(file)


def _median(results: list[dict], key: str) -> str:
    values = [result[key] for result in results if result.get(key) is not None]
    if not values:
        return "-"
    value = median(values)
    return f"{value:.1%}" if key.endswith("error") else f"{value:.3f}"


if __name__ == "__main__":
    arguments = parse()
    if arguments.figure is not None:
        draw(arguments.figure, arguments.out, arguments.rows)
    if arguments.table is not None:
        write_tables(arguments.table, MARKER, table(arguments.out, arguments.rows))
        write_all_runs(arguments.table.with_suffix(".json"), arguments.out)
    for scale, nats in (likelihood_of_scales(arguments.scales) if arguments.scales else {}).items():
        print(f"{scale:<6g} {nats:.4f} nats per pair")
    if arguments.table is None and arguments.figure is None and arguments.scales is None:
        main(arguments)
