"""The identifiability experiment runs with its options, goes on where it stopped, and writes every figure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_experiment_runs_and_resumes(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "examples" / "identifiability.py"),
        "--small",
        "--device",
        "cpu",
        "--out",
        "run",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for attempt in range(2):
        started = time.time()
        result = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path, env=environment)
        assert result.returncode == 0, result.stderr
        assert ("step/s" in result.stderr or "s/step" in result.stderr) == (attempt == 0)  # nothing is fitted twice
        rows = sorted((tmp_path / "run" / "rows").glob("*.json"))
        assert len(rows) == 4 and (attempt == 0 or all(row.stat().st_mtime < started for row in rows))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert all(isinstance(value, float) for value in summary.values())
    assert {f"{row.stem}: kappa_pos" for row in rows} <= set(summary)
    assert "prior 10, empirical, prior power 0.5" in summary and "exact laws, kappa_pos 20: level" in summary
    assert len(result.stdout.split("| row |")) == 2 and (tmp_path / "run" / "identifiability.png").exists()
