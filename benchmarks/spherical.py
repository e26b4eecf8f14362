"""Cost of draws and densities, relative to the cheapest possible draw and measured in the same run.

    python -m benchmarks.spherical [--quick] [--threads 1] [--device cpu] [--out FILE]

The floor is ``normalize(randn)`` of the same shape. All entries of one block are measured in turn, round after round,
so that a busy machine slows every one of them alike; the figure is the median over the rounds. On the CPU the clock is
CPU time of the process, on a GPU wall time with synchronisation. Every call is warmed up first: what a family tabulates
once per dimension is shown in its own column and not hidden.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import bandwidth, clock, directions, medians, peer, row
from pyro_contrastive import distributions as dist

Draw = Callable[[], Tensor]
FAMILIES = ("von_mises_fisher", "power_spherical", "projected_normal")
GOALS = {"forward": 2.5, "gradient": 6.0}  # times the floor, for the first two families


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
    package = peer("power_spherical")
    return package and (lambda: package.PowerSpherical(mean, kappa).rsample(torch.Size(sample_shape)))


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
    package = power_spherical_package(mean.detach(), kappa.detach(), sample_shape)
    if package is not None:
        tasks["power-spherical package forward"] = package
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


Peer = tuple[str, Callable[[], object] | None, Callable[[], object] | None]


def tensorflow_probability(family: str, mean: Tensor, kappa: float, num: int, z: Tensor) -> Peer:
    """Draws and log densities of TensorFlow Probability on JAX, compiled; a new key for every draw."""
    name = "TFP on JAX"
    package = peer("tensorflow_probability.substrates.jax")
    if package is None:
        return name, None, None
    import jax

    law = {"von_mises_fisher": "VonMisesFisher", "power_spherical": "PowerSpherical"}[family]
    points, keys = jax.numpy.asarray(z.cpu().numpy()), iter(range(1 << 30))
    q = getattr(package.distributions, law)(jax.numpy.asarray(mean.cpu().numpy()), kappa)
    draw, score = jax.jit(lambda key: q.sample(num, seed=key)), jax.jit(q.log_prob)
    return (
        name,
        lambda: draw(jax.random.PRNGKey(next(keys))).block_until_ready(),
        lambda: score(points).block_until_ready(),
    )


def peers(mean: Tensor, kappa: float, num: int, z: Tensor) -> dict[str, list[Peer]]:
    """By family: name, draws and log densities; None for what is not installed."""
    from scipy import stats

    law, points = stats.vonmises_fisher(mean.double().cpu().numpy(), kappa), z.double().cpu().numpy()
    points /= np.linalg.norm(points, axis=-1, keepdims=True)
    package = peer("power_spherical")
    spherical = package and package.PowerSpherical(mean, torch.tensor(kappa, device=mean.device))
    formulas = peer("projnormal.formulas.projected_normal")
    spread = torch.eye(len(mean), device=mean.device) / kappa
    return {
        "von_mises_fisher": [
            ("scipy (CPU, float64)", lambda: law.rvs(num), lambda: law.logpdf(points)),
            tensorflow_probability("von_mises_fisher", mean, kappa, num, z),
        ],
        "power_spherical": [
            (
                "power-spherical",
                spherical and (lambda: spherical.sample(torch.Size((num,)))),
                spherical and (lambda: spherical.log_prob(z)),
            ),
            tensorflow_probability("power_spherical", mean, kappa, num, z),
        ],
        "projected_normal": [
            (
                "projnormal",
                formulas and (lambda: formulas.sample(mean, spread, num)),
                formulas and (lambda: formulas.log_pdf(mean, spread, z)),
            )
        ],
    }


def rows(quick: bool, device: torch.device) -> list[dict[str, Any]]:
    """Draws and log densities of one law each, against the packages that people use for that law.

    scipy and projnormal know one mean at a time, so that one law is what all can do.
    """
    num, rounds, dims = (10_000, 5, (10,)) if quick else (100_000, 15, (10, 128))
    out = []
    for dim in dims:
        mean, kappa = directions((), dim, device), 24.0
        z = directions((num,), dim, device)
        for family, others in peers(mean, kappa, num, z).items():
            q = build(family, mean, torch.tensor(kappa, device=device))
            own = {"draws": lambda q=q: q.sample((num,)), "log_prob": lambda q=q, z=z: q.log_prob(z)}
            for place, (what, ours) in enumerate(own.items(), start=1):
                tasks = {"ours": ours} | {other[0]: other[place] for other in others if other[place] is not None}
                for task in tasks.values():
                    task()
                seconds = medians(tasks, rounds, device, f"{family} {what}")
                title = f"{what}, {family.replace('_', ' ')}"
                bound = z.nbytes / bandwidth(device) if device.type == "cuda" else None
                setting = f"{num:,} of d = {dim}"
                out += [row(title, setting, seconds["ours"], n, seconds.get(n), bound=bound) for n, *_ in others]
    return out


def table(rows: list[dict]) -> str:
    lines = [f"{'task':<42}{'d':>5}  {'layout':<10}{'seconds':>10}{'ratio':>8}{'goal':>7}  {'once':>7}"]
    for entry in rows:
        goal = "" if entry["goal"] is None else f"{entry['goal']:.1f}{'' if entry['met'] else ' !'}"
        once = "" if entry["setup_seconds"] is None else f"{entry['setup_seconds']:.2f}"
        lines.append(
            f"{entry['task']:<42}{entry['dim']:>5}  {entry['layout']:<10}{entry['seconds']:>10.4f}"
            f"{entry['ratio']:>8.2f}{goal:>7}  {once:>7}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run, print the table, write the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.spherical", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
