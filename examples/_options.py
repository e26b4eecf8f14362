"""The options every example takes, and the summary every example writes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def make_parser(description: str) -> argparse.ArgumentParser:
    """Make a parser of ``--out DIR --seed N --device auto|cpu|cuda --small``, for an example to add its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for summary.json and the checkpoint")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: %(default)s")
    parser.add_argument("--small", action="store_true", help="a few steps only: shows that it runs")
    return parser


def parse(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse ``--out DIR --seed N --device auto|cpu|cuda --small``."""
    return make_parser(description).parse_args(argv)


def finish(figures: dict[str, float], out: Path | None) -> None:
    """Print the figures, and write them to ``DIR/summary.json`` where a folder was given."""
    for name, value in figures.items():
        print(f"{name:<24} {value:.4g}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "summary.json").write_text(json.dumps(figures, indent=2) + "\n")
