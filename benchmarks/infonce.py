"""InfoNCE and NT-Xent, forward and backward: time and peak memory against what people use.

    python -m benchmarks.infonce [--sizes 128 512 2048 8192] [--most 8192] [--device cpu] [--dtype float32] [--out FILE]

Time is measured in turn (medians). Memory is what a step adds at most to the resident memory of the process (Linux), on
a GPU to what torch has allocated. Losses that keep the grid are left out above ``--most`` items. NT-Xent has 2N items
for N pairs.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import medians, peer, rate, row, table
from pyro_contrastive.factors import infonce_log_ratio
from pyro_contrastive.kernels import VonMisesFisherKernel
from pyro_contrastive.positives import nt_xent_log_ratio

CONCENTRATION, DIM = 10.0, 128
MIB = 2**20
Loss = Callable[[Tensor, Tensor], Tensor]


@functools.cache
def kernel(device: torch.device) -> VonMisesFisherKernel:
    """Built once, as the criteria of the peers are."""
    return VonMisesFisherKernel(CONCENTRATION).to(device)


def infonce(z1: Tensor, z2: Tensor) -> Tensor:
    return -infonce_log_ratio(kernel(z1.device)(z1, z2, lazy=True), symmetric=True).mean()


def infonce_plain(z1: Tensor, z2: Tensor) -> Tensor:
    logits, labels = CONCENTRATION * z1 @ z2.mT, torch.arange(len(z1), device=z1.device)
    return 0.5 * sum(torch.nn.functional.cross_entropy(grid, labels) for grid in (logits, logits.mT))


def nt_xent(z1: Tensor, z2: Tensor) -> Tensor:
    z = torch.cat([z1, z2])
    return -nt_xent_log_ratio(kernel(z.device)(z, z, lazy=True)).mean()


def losses() -> dict[str, Loss | None]:
    """By name; None where the peer is not installed."""
    lightly, metric = peer("lightly.loss"), peer("pytorch_metric_learning.losses")
    found: dict[str, Loss | None] = {"InfoNCE": infonce, "plain PyTorch": infonce_plain, "NT-Xent": nt_xent}
    found["lightly NTXentLoss"] = lightly and lightly.NTXentLoss(temperature=1 / CONCENTRATION)
    found["pytorch-metric-learning"] = metric and metric.SelfSupervisedLoss(metric.NTXentLoss(1 / CONCENTRATION))
    return found


PEERS = {"plain PyTorch": "InfoNCE", "lightly NTXentLoss": "NT-Xent", "pytorch-metric-learning": "NT-Xent"}
GRID = "plain PyTorch (grid too large)"
ITEMS = {"plain PyTorch": 1, "lightly NTXentLoss": 2, "NT-Xent": 2}  # of a pair, in the grid
MOST_METRIC = 128  # pytorch-metric-learning compares all positive with all negative pairs: 8 N^3 of them


def step(loss: Loss, size: int, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    """Loss of normalised embeddings and its gradient."""
    raw = torch.randn(2, size, DIM, device=device, dtype=dtype).requires_grad_()

    def run() -> None:
        raw.grad = None
        loss(*torch.nn.functional.normalize(raw, dim=-1)).backward()

    return run


def resident(entry: str) -> float:
    """MiB of "VmRSS" (now) or "VmHWM" (at most so far) of this process."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(entry))
    return int(line.split()[1]) / 1024


def peak(run: Callable[[], None], device: torch.device) -> float | None:
    """MiB that a step adds at most; None where the system does not tell."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is free goes back, so that it is counted when it is used
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    except (AttributeError, OSError):
        return None
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def compare(
    sizes: list[int], most: int, rounds: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> list[dict[str, Any]]:
    out, found, limit = [], losses(), {"pytorch-metric-learning": min(most, MOST_METRIC)}
    kind = "" if dtype == torch.float32 else f", {str(dtype).removeprefix('torch.')}"
    for size in sizes:
        setting = f"N = {size:,}, d = {DIM}{kind}"
        names = [
            name
            for name, loss in found.items()
            if loss is not None and (name == "InfoNCE" or ITEMS.get(name, 1) * size <= limit.get(name, most))
        ]
        tasks = {name: step(found[name], size, device, dtype) for name in names}
        for run in tasks.values():
            if size <= 2048 or device.type == "cuda":
                run()
        seconds = medians(tasks, rounds if size <= 4096 else max(1, rounds // 5), device, setting)
        mib = {name: peak(tasks[name], device) for name in names}
        # forward one product of N x N x d, backward two
        bound = 6 * size**2 * DIM / rate(device, dtype) if device.type == "cuda" else None
        for theirs, ours in PEERS.items():
            if ours not in seconds or (theirs not in seconds and theirs in found and found[theirs] is not None):
                continue
            best = bound if ours == "InfoNCE" else None
            goal = 1.0 if theirs == "plain PyTorch" and size >= 2048 else None
            out.append(row(f"{ours}, time", setting, seconds[ours], theirs, seconds.get(theirs), goal=goal, bound=best))
            if mib[ours] is not None:
                out.append(row(f"{ours}, memory", setting, mib[ours], theirs, mib.get(theirs), unit="MiB"))
        if size > most:
            out.append(row("InfoNCE, time", setting, seconds["InfoNCE"], GRID, None, bound=bound))
            if mib["InfoNCE"] is not None:
                out.append(row("InfoNCE, memory", setting, mib["InfoNCE"], GRID, None, unit="MiB"))
    return out


def rows(quick: bool, device: torch.device) -> list[dict[str, Any]]:
    """Time and memory; on a GPU also in bfloat16, with the fraction of the matmul ceiling."""
    if device.type == "cuda":
        sizes = [128, 512, 2048, 8192, 32_768] + ([] if quick else [65_536])
        return [r for kind in (torch.float32, torch.bfloat16) for r in compare(sizes, 16_384, 5, device, kind)]
    return compare([128, 512, 2048] if quick else [128, 512, 2048, 8192, 65_536], 4096 if quick else 8192, 5, device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 512, 2048, 8192], help="numbers of pairs N")
    parser.add_argument("--most", type=int, default=8192, help="most items whose grid is kept whole")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, help="write JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    found = compare(args.sizes, args.most, args.rounds, device, dtype)
    print(table(found))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
