"""The Lightning example: two processes end where one does; without Lightning it says what to install."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "lightning_fit.py"


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(EXAMPLE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLE), "--small", "--device", "cpu", "--out", str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)


@pytest.mark.slow
def test_two_processes_end_where_one_does(tmp_path):
    pytest.importorskip("lightning")
    figures = []
    for processes in ("1", "2"):
        done = run(tmp_path / processes, "--processes", processes)
        assert done.returncode == 0, done.stderr
        figures.append(json.loads((tmp_path / processes / "summary.json").read_text()))
    assert figures[1] == pytest.approx(figures[0], abs=1e-4)


@pytest.mark.skipif(find_spec("lightning") is not None, reason="Lightning is installed")
def test_without_lightning_it_says_what_to_install(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 1
    assert "pip install 'pyro-contrastive[lightning]'" in done.stderr
