"""A loop of the user's own with Accelerate: two processes do what one does. Runs where Accelerate is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="Accelerate is not installed")
HERE = Path(__file__).parent


def run(processes: int) -> dict:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *sys.path[1:]])
    command.append(str(HERE / "accelerate_loop.py"))
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_two_processes_do_what_one_does():
    one, two = run(1), run(2)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["losses"][-1] < one["losses"][0] - 0.1
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-9)
