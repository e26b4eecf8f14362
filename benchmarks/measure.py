"""What every benchmark shares: a clock, interleaved medians, and the row of the common table."""

from __future__ import annotations

import functools
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

NOT_INSTALLED = "not installed"


def clock(device: torch.device) -> float:
    """CPU seconds of this process, or wall seconds once the device is idle."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def medians(tasks: dict[str, Callable[[], object]], rounds: int, device: torch.device, label: str) -> dict[str, float]:
    """Median seconds per call, the tasks interleaved: a busy machine slows every one of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in tqdm(range(rounds), desc=label, leave=False, disable=None):
        for name, task in tasks.items():
            start = clock(device)
            task()
            seconds[name].append(clock(device) - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def directions(shape: tuple[int, ...], dim: int, device: torch.device) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, dim, device=device), dim=-1)


@functools.cache
def rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measured ceiling of matrix products, in operations per second."""
    a, b = (torch.randn(8192, 8192, device=device).to(dtype) for _ in range(2))
    a @ b
    return 2 * 8192**3 / medians({"product": lambda: a @ b}, 9, device, "matrix products")["product"]


@functools.cache
def bandwidth(device: torch.device) -> float:
    """Measured ceiling of memory traffic, in bytes per second."""
    a, b = (torch.zeros(1 << 28, device=device) for _ in range(2))
    b.copy_(a)
    return 2 * a.nbytes / medians({"copy": lambda: b.copy_(a)}, 9, device, "copies")["copy"]


def peer(module: str) -> Any | None:
    """The module of a peer, None where it is not installed or lacks something that it needs itself."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def row(
    task: str,
    setting: str,
    ours: float,
    name: str,
    theirs: float | None,
    *,
    unit: str = "s",
    goal: float | None = None,
    goal_of: str = "ratio",
    bound: float | None = None,
) -> dict[str, Any]:
    """One line of the common table.

    Args:
        task: what is measured.
        setting: sizes, short.
        ours: the figure of this package; less is better.
        name: of the peer.
        theirs: the peer's figure in the same run; None where it is not installed.
        unit: of both figures.
        goal: largest value wanted.
        goal_of: "ratio" or "ours".
        bound: seconds that the hardware's measured ceilings allow at best (on a GPU).
    """
    ratio = None if theirs is None else ours / theirs
    value = ratio if goal_of == "ratio" else ours
    return {
        "task": task,
        "setting": setting,
        "unit": unit,
        "ours": ours,
        "peer": name,
        "theirs": theirs,
        "ratio": ratio,
        "goal": goal,
        "goal_of": goal_of,
        "met": None if goal is None or value is None else value <= goal,
        "of_ceiling": None if bound is None else bound / ours,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The common table as text."""
    lines = [f"{'task':<34}{'setting':<26}{'ours':>12}    {'peer':<34}{'theirs':>12}{'ratio':>8}{'goal':>9}  met"]
    for r in rows:
        theirs, ratio = "" if "too large" in r["peer"] else NOT_INSTALLED, ""
        if r["theirs"] is not None:
            theirs, ratio = f"{r['theirs']:.4g} {r['unit']}", f"{r['ratio']:.2f}"
        goal = "" if r["goal"] is None else f"{r['goal']:.3g}{' ' + r['unit'] if r['goal_of'] == 'ours' else ''}"
        met = {None: "", True: "yes", False: "no"}[r["met"]]
        ceiling = "" if r["of_ceiling"] is None else f"  {100 * r['of_ceiling']:.0f} % of ceiling"
        lines.append(
            f"{r['task']:<34}{r['setting']:<26}{r['ours']:>10.4g} {r['unit']:<5}{r['peer']:<34}{theirs:>12}{ratio:>8}"
            f"{goal:>9}  {met:<3}{ceiling}"
        )
    return "\n".join(lines)
