"""What ``import pyro_contrastive`` adds to ``import pyro``: CPU seconds in fresh processes, medians.

python -m benchmarks.imports
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import row, table

GOAL = 0.3
PROGRAM = """
import time
start = time.process_time()
import pyro
between = time.process_time()
import pyro_contrastive
from pyro_contrastive import guides, models
print(between - start, time.process_time() - between)
"""


def rows(quick: bool, device: torch.device) -> list[dict[str, Any]]:
    """One row: models and guides are imported as well."""
    runs = []
    for _ in range(3 if quick else 9):
        command = [sys.executable, "-c", PROGRAM]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True, check=True)
        runs.append([float(value) for value in done.stdout.split()])
    pyro, ours = (statistics.median(values) for values in zip(*runs, strict=True))
    return [row("import, added to import pyro", "", ours, "import pyro", pyro, goal=GOAL, goal_of="ours")]


if __name__ == "__main__":
    print(table(rows(quick=False, device=torch.device("cpu"))))
