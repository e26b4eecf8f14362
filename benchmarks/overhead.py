"""What `fit` costs over a hand-written torch loop: the same encoder, InfoNCE loss, batches and Adam.

    python -m benchmarks.overhead [--quick] [--chunk-size 32] [--device cpu] [--threads 1] [--out FILE]

Both run in pieces of a few steps, in turn, so that a busy machine slows both alike; on the CPU the clock is CPU time
of the process, on a GPU wall time. Rows of the history are written at their usual rate of one per 50 steps, no
checkpoint. Pieces of one step are measured as well and taken off: what remains is the cost of a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.measure import clock, row
from pyro_contrastive import guides, models, nets
from pyro_contrastive.fit import fit

CONCENTRATION = 10.0
# batch, steps per piece, rounds; quick: fewer
CASES = {"small MLP": (512, 50, 9), "ResNet-18, 32 x 32": (512, 2, 3)}
QUICK = {"small MLP": (512, 20, 3), "ResNet-18, 32 x 32": (32, 2, 2)}
GOALS = {"small MLP": ("extra_ms", 1.5), "ResNet-18, 32 x 32": ("ratio", None)}


def encoder_and_view(name: str, batch: int, device: torch.device) -> tuple[nn.Module, Tensor]:
    if name == "small MLP":
        return nets.mlp([32, 128, 128]), torch.randn(batch, 32, device=device)
    return nets.small_resnet18(3), torch.randn(batch, 3, 32, 32, device=device)


def by_hand(guide: nn.Module, views: list[Tensor], steps: int) -> None:
    """The loop that one writes without Pyro: symmetric InfoNCE with in-batch negatives."""
    guide.train()
    optimizer = torch.optim.Adam(guide.parameters(), lr=1e-3)
    target = torch.arange(len(views[0]), device=views[0].device)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        z1, z2 = (nn.functional.normalize(guide.direction(guide.batch_norm(guide.encoder(x))), dim=-1) for x in views)
        logits = CONCENTRATION * z1 @ z2.T
        loss = 0.5 * (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target))
        loss.backward()
        optimizer.step()


def by_fit(guide: nn.Module, views: list[Tensor], steps: int, chunk_size: int | None = None) -> None:
    model = models.MCInfoNCE(guide, concentration=CONCENTRATION, evidence="elbo")  # at points: InfoNCE
    fit(
        model,
        guide,
        [views] * 8,
        steps=steps,
        device=views[0].device,
        schedule="constant",
        log_every=50,
        progress=False,
        chunk_size=chunk_size,
    )


def measure(
    name: str, batch: int, steps: int, rounds: int, device: torch.device, chunk_size: int | None = None
) -> dict:
    """Seconds per step of both, and what one costs over the other."""
    torch.manual_seed(0)
    encoder, view = encoder_and_view(name, batch, device)
    views = [view, view + 0.1 * torch.randn_like(view)]
    guide = guides.Delta(encoder, dim=32).to(device)
    tasks: dict[str, Callable[[int], None]] = {
        "loop": lambda n: by_hand(guide, views, n),
        "fit": lambda n: by_fit(guide, views, n, chunk_size),
    }
    per_step: dict[str, list[float]] = {key: [] for key in tasks}
    for task in tasks.values():
        task(1)
    for _ in range(rounds):
        for key, task in tasks.items():
            spent = []
            for n in (1, 1 + steps):
                start = clock(device)
                task(n)
                spent.append(clock(device) - start)
            per_step[key].append((spent[1] - spent[0]) / steps)
    loop, ours = (statistics.median(per_step[key]) for key in ("loop", "fit"))
    kind, goal = GOALS[name]
    if kind == "ratio":
        goal = 1.10 if device.type == "cpu" else 1.05
    found = {"ratio": ours / loop, "extra_ms": 1e3 * (ours - loop)}
    return {
        "task": f"fit step, {name}, N = {batch}" + (f", in chunks of {chunk_size}" if chunk_size else ""),
        "peer": "hand-written torch loop",
        "seconds": ours,
        "peer_seconds": loop,
        **found,
        "goal": goal,
        "goal_of": kind,
        "met": found[kind] <= goal,
    }


def rows(quick: bool, device: torch.device) -> list[dict]:
    """One row per encoder; a goal in milliseconds beyond the loop becomes one in seconds of ours."""
    out = []
    for name, case in (QUICK if quick else CASES).items():
        found = measure(name, *case, device)
        extra, goal = found["goal_of"] == "extra_ms", found["goal"]
        goal, goal_of = (1e-3 * goal + found["peer_seconds"], "ours") if extra else (goal, "ratio")
        figures = found["seconds"], found["peer"], found["peer_seconds"]
        out.append(found | row(found["task"], "", *figures, goal=goal, goal_of=goal_of))
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps, a small batch for the ResNet")
    parser.add_argument("--case", choices=CASES, help="one encoder only")
    parser.add_argument("--batch", type=int, help="other batch size")
    parser.add_argument("--rounds", type=int, help="other number of rounds")
    parser.add_argument("--chunk-size", type=int, metavar="N", help="fit encodes in chunks; the loop does not")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    cases = {name: case for name, case in (QUICK if args.quick else CASES).items() if args.case in (None, name)}
    found = [
        measure(name, args.batch or batch, steps, args.rounds or rounds, device, args.chunk_size)
        for name, (batch, steps, rounds) in cases.items()
    ]
    for one in found:
        print(
            f"{one['task']:<60}{1e3 * one['seconds']:10.2f} ms{1e3 * one['peer_seconds']:10.2f} ms by hand"
            f"{one['ratio']:8.3f} x{one['extra_ms']:+9.2f} ms   goal {one['goal_of']} <= {one['goal']}"
        )
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
