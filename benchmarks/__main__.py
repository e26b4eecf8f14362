"""Cost of draws and densities, relative to the cheapest possible draw and measured in the same run.

    python -m benchmarks [--quick] [--threads 1] [--device cpu] [--out FILE]

The floor is ``normalize(randn)`` of the same shape. All entries of one block are measured in turn, round after round,
so that a busy machine slows every one of them alike; the figure is the median over the rounds. On the CPU the clock is
CPU time of the process, on a GPU wall time with synchronisation. Every call is warmed up first: what a family tabulates
once per dimension is shown in its own column and not hidden.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_contrastive import distributions as dist

Draw = Callable[[], Tensor]
FAMILIES = ("von_mises_fisher", "power_spherical", "projected_normal")
GOALS = {"forward": 2.5, "gradient": 6.0}  # times the floor, for the first two families


def clock(device: torch.device) -> float:
    """CPU seconds of this process, or wall seconds once the device is idle."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def medians(tasks: dict[str, Callable[[], object]], rounds: int, device: torch.device, label: str) -> dict[str, float]:
    """Median seconds per call, the tasks interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in tqdm(range(rounds), desc=label, leave=False, disable=None):
        for name, task in tasks.items():
            start = clock(device)
            task()
            seconds[name].append(clock(device) - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def directions(shape: tuple[int, ...], dim: int, device: torch.device) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, dim, device=device), dim=-1)


def build(family: str, mean: Tensor, kappa: Tensor) -> torch.distributions.Distribution:
    """The family with validation off: what is measured is the draw."""
    if family == "von_mises_fisher":
        return dist.VonMisesFisher(mean, kappa, validate_args=False)
    if family == "power_spherical":
        return dist.PowerSpherical(mean, kappa, validate_args=False)
    return dist.ProjectedNormal(mean, kappa.rsqrt().unsqueeze(-1), validate_args=False)


def forward(family: str, mean: Tensor, kappa: Tensor, sample_shape: tuple[int, ...]) -> None:
    with torch.no_grad():
        build(family, mean, kappa).rsample(sample_shape)


def gradient(family: str, mean: Tensor, kappa: Tensor, sample_shape: tuple[int, ...], weight: Tensor) -> None:
    mean, kappa = mean.requires_grad_(), kappa.requires_grad_()
    z = build(family, mean, kappa).rsample(sample_shape)
    torch.autograd.grad(z, (mean, kappa), weight)


def power_spherical_package(mean: Tensor, kappa: Tensor, sample_shape: tuple[int, ...]) -> Callable[[], object] | None:
    """The peer on PyPI, where it is installed."""
    if importlib.util.find_spec("power_spherical") is None:
        return None
    from power_spherical import PowerSpherical

    return lambda: PowerSpherical(mean, kappa).rsample(torch.Size(sample_shape))


def scipy_sampler(mean: Tensor, kappa: Tensor, num: int) -> Callable[[], object]:
    """scipy draws for one mean and one concentration only: all draws from the first row."""
    from scipy import stats

    law = stats.vonmises_fisher(mean.reshape(-1, mean.shape[-1])[0].double().cpu().numpy(), kappa.flatten()[0].item())
    return lambda: law.rvs(num)


def sampling(dim: int, layout: str, size: int, rounds: int, device: torch.device) -> list[dict]:
    """One block: size x size draws in dimension dim; ``layout`` says whether a row of parameters is drawn often."""
    batch, sample_shape = ((size,), (size,)) if layout == "repeated" else ((size, size), ())
    mean, kappa = directions(batch, dim, device), torch.empty(batch, device=device).uniform_(16.0, 32.0)
    weight = torch.randn(size, size, dim, device=device)
    noise_like = torch.empty(size, size, dim, device=device)
    tasks: dict[str, Callable[[], object]] = {
        "floor": lambda: torch.nn.functional.normalize(torch.randn_like(noise_like), dim=-1)
    }
    setup = {}
    for family in FAMILIES:
        start = clock(device)
        forward(family, mean[:1], kappa[:1], ())
        setup[family] = clock(device) - start
        tasks[f"{family} forward"] = lambda f=family: forward(f, mean, kappa, sample_shape)
        tasks[f"{family} gradient"] = lambda f=family: gradient(f, mean, kappa, sample_shape, weight)
    peer = power_spherical_package(mean.detach(), kappa.detach(), sample_shape)
    if peer is not None:
        tasks["power-spherical package forward"] = peer
    tasks["scipy forward"] = scipy_sampler(mean, kappa, size * size)
    for task in tasks.values():
        task()
    seconds = medians(tasks, rounds, device, f"draws, d = {dim}, {layout}")
    rows = []
    for name, value in seconds.items():
        family, _, kind = name.rpartition(" ")
        goal = GOALS.get(kind) if family in FAMILIES[:2] else None
        ratio = value / seconds["floor"]
        rows.append(
            {
                "task": f"draw {name}",
                "dim": dim,
                "layout": layout,
                "seconds": value,
                "ratio": ratio,
                "goal": goal,
                "met": None if goal is None else ratio <= goal,
                "setup_seconds": setup.get(family) if kind == "forward" else None,
            }
        )
    return rows


def densities(dim: int, size: int, rounds: int, device: torch.device) -> list[dict]:
    """Every one of ``size`` points under every one of ``size`` laws, with gradients to the parameters.

    Relative to the matrix product that an InfoNCE loss needs anyway, with its gradient.
    """
    mean = directions((size,), dim, device).requires_grad_()
    kappa = torch.empty(size, device=device).uniform_(16.0, 32.0).requires_grad_()
    z = directions((size,), dim, device)

    def product() -> None:
        torch.autograd.grad(((z @ mean.mT) * kappa).sum(), (mean, kappa))

    def score(family: str) -> None:
        torch.autograd.grad(build(family, mean, kappa).cross_log_prob(z).sum(), (mean, kappa))

    tasks: dict[str, Callable[[], object]] = {"matrix product": product}
    tasks |= {family: (lambda f=family: score(f)) for family in FAMILIES}
    for task in tasks.values():
        task()
    seconds = medians(tasks, rounds, device, f"log_prob grid, d = {dim}")
    return [
        {
            "task": f"log_prob grid {name}",
            "dim": dim,
            "layout": f"{size} x {size}",
            "seconds": value,
            "ratio": value / seconds["matrix product"],
            "goal": None,
            "met": None,
            "setup_seconds": None,
        }
        for name, value in seconds.items()
    ]


def table(rows: list[dict]) -> str:
    lines = [f"{'task':<42}{'d':>5}  {'layout':<10}{'seconds':>10}{'ratio':>8}{'goal':>7}  {'once':>7}"]
    for row in rows:
        goal = "" if row["goal"] is None else f"{row['goal']:.1f}{'' if row['met'] else ' !'}"
        once = "" if row["setup_seconds"] is None else f"{row['setup_seconds']:.2f}"
        lines.append(
            f"{row['task']:<42}{row['dim']:>5}  {row['layout']:<10}{row['seconds']:>10.4f}{row['ratio']:>8.2f}"
            f"{goal:>7}  {once:>7}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run, print the table, write the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="128 x 128 draws and few rounds: a smoke test, not a figure"
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--device", default="cpu", help="torch device (default cpu)")
    parser.add_argument("--rounds", type=int, help="measurements per entry (default 15, with --quick 5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks.json"), help="where the figures go (JSON)")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    size, rounds = (128, 5) if options.quick else (512, 15)
    rounds = options.rounds or rounds
    rows = []
    for dim in (10, 128):
        for layout in ("repeated", "batch"):
            rows += sampling(dim, layout, size, rounds, device)
        rows += densities(dim, min(size, 256), rounds, device)
    machine = {"torch": torch.__version__, "python": platform.python_version(), "processor": platform.processor()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {"size": size, "rounds": rounds, "threads": options.threads, "device": options.device}
    options.out.write_text(json.dumps({"machine": machine, "settings": settings, "rows": rows}, indent=1) + "\n")
    print(table(rows))
    print(f"\nratio: to the floor normalize(randn) for draws, to a matrix product for densities. Wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
