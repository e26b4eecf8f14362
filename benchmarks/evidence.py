"""Cost of the loss and its gradients for every way to integrate the latents, relative to plain InfoNCE in the same run.

    python -m benchmarks.evidence [--batch 512] [--dim 10] [--concentration 20] [--samples 16 64] [--rounds 5]

One step is the symmetric likelihood of a batch from posteriors with concentrations 16 to 32, and its gradients to their
mean directions and concentrations; no encoder. Entries are measured in turn, round after round.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import directions, medians, row
from pyro_contrastive.distributions import VonMisesFisher
from pyro_contrastive.factors import infonce_log_ratio
from pyro_contrastive.kernels import VonMisesFisherKernel, expected_pairs, moment_matched_pairs, shared_latent_pairs

REFERENCE = {"batch": 512, "dim": 10, "seconds": 38.4}  # released loss, 512 samples, 32 negatives, 2-core CPU


def steps(args: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], object]]:
    """One callable per evidence: loss and gradients."""
    mean1 = directions((args.batch,), args.dim, device)
    mean2 = torch.nn.functional.normalize(mean1 + 0.3 * directions((args.batch,), args.dim, device), dim=-1)
    kappa1, kappa2 = (16 + 16 * torch.rand(args.batch, device=device) for _ in range(2))
    kappa = torch.tensor(args.concentration, device=device)
    kernel = VonMisesFisherKernel(args.concentration).to(device)

    def step(loss: Callable[[VonMisesFisher, VonMisesFisher], Tensor]) -> Callable[[], object]:
        def run() -> object:
            leaves = [t.clone().requires_grad_() for t in (mean1, kappa1, mean2, kappa2)]
            laws = [VonMisesFisher(leaves[i], leaves[i + 1], validate_args=False) for i in (0, 2)]
            return torch.autograd.grad(-loss(*laws).mean(), leaves, allow_unused=True)

        return run

    def closed(pairs: Callable[..., Any], *more: Any) -> Callable[[], object]:
        return step(lambda q1, q2: infonce_log_ratio(pairs(q1, q2, *more), symmetric=True))

    def sampled(num: int) -> Callable[[], object]:
        def loss(q1: VonMisesFisher, q2: VonMisesFisher) -> Tensor:
            size = torch.Size((num,))
            log_f = kernel(q1.rsample(size), q2.rsample(size), lazy=True)
            return infonce_log_ratio(log_f, symmetric=True).logsumexp(0) - math.log(num)

        return step(loss)

    plain = step(
        lambda q1, q2: infonce_log_ratio(kernel(q1.mean_direction, q2.mean_direction, lazy=True), symmetric=True)
    )
    return {
        "plain InfoNCE, no latents": plain,
        "shared latent, exact": closed(shared_latent_pairs),
        "moment-matched": closed(moment_matched_pairs, kappa),
        "exact": closed(expected_pairs, args.concentration),
        **{f"K-sample, K = {k}": sampled(k) for k in args.samples},
    }


def rows(quick: bool, device: torch.device) -> list[dict[str, Any]]:
    """The exact evidences against InfoNCE without latents and with 16 samples, at a small and at a large batch."""
    out = []
    for batch, dim, goal in ((512, 10, None), (4096 if quick else 16_384, 128, 5.0)):
        sizes = argparse.Namespace(batch=batch, dim=dim, concentration=20.0, samples=[16])
        tasks = steps(sizes, device)
        names = ["exact", "shared latent, exact", "moment-matched"]
        others = {"plain InfoNCE, no latents": goal, "K-sample, K = 16": None}
        tasks = {name: tasks[name] for name in (*names, *others)}
        for task in tasks.values() if batch == 512 else ():
            task()
        seconds = medians(tasks, 5 if batch == 512 else 1, device, f"evidence, {batch}")
        for other, wanted in others.items():
            for name in names:
                setting = f"N = {batch:,}, d = {dim}"
                best = wanted if name == "exact" else None
                out.append(row(f"evidence, {name}", setting, seconds[name], other, seconds[other], goal=best))
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--dim", type=int, default=10)
    parser.add_argument("--concentration", type=float, default=20.0, help="of the pair; default: %(default)s")
    parser.add_argument("--samples", type=int, nargs="*", default=[16, 64], metavar="K")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    tasks = steps(args, device)
    for task in tasks.values():
        task()
    seconds = medians(tasks, args.rounds, device, "evidence")
    floor = next(iter(seconds.values()))
    compare = (args.batch, args.dim) == (REFERENCE["batch"], REFERENCE["dim"]) and device.type == "cpu"
    print(f"batch {args.batch}, d = {args.dim}, kappa of the pair {args.concentration:g}, {args.threads} thread(s)")
    for name, value in seconds.items():
        less = f"{REFERENCE['seconds'] / value:8.0f} x less than the released loss" if compare else ""
        print(f"{name:<28}{1e3 * value:10.1f} ms{value / floor:10.1f} x plain{less}")
    if args.out:
        args.out.write_text(json.dumps({"arguments": {k: str(v) for k, v in vars(args).items()}, "seconds": seconds}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
