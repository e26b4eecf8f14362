"""Peak memory and time of the likelihood of a joint batch over several processes, against one process.

    python -m benchmarks.ring [--sizes 4096 16384] [--ranks 1 2] [--kernels "dot product"] [--out FILE]

Every process is new. On the CPU (gloo) the peak is that of the resident memory of the largest process, less what it was
after the start (libraries, process group, inputs), and the clock CPU time of one process; on a GPU it is the peak that
torch has allocated, and the clock wall time. "grid" is one process with the whole grid, where it is small enough.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.memory import KERNELS, MIB, pairs_of

UNIT = 1 if sys.platform == "darwin" else 1024


def measure(kernel: str, size: int, rank: int, ranks: int, options: argparse.Namespace, meet: str) -> dict[str, Any]:
    """One forward and backward pass of this process's share, after a small one; `ranks` 0 is the whole grid."""
    import torch

    from pyro_contrastive.distributed import joint_batch
    from pyro_contrastive.factors import infonce_log_ratio

    torch.set_num_threads(options.threads)
    device = torch.device(options.device, *([rank] if options.device == "cuda" else []))
    if ranks > 1:
        backend = "gloo" if device.type == "cpu" else "nccl"
        torch.distributed.init_process_group(backend, f"file://{meet}", rank=rank, world_size=ranks)

    def inputs(size: int) -> tuple[Any, Any, Any]:
        torch.manual_seed(rank)
        share = size // max(ranks, 1)
        raw = torch.randn(2, share, options.dim, device=device)
        z1, z2 = torch.nn.functional.normalize(raw, dim=-1).requires_grad_()
        return z1, z2, torch.empty(share, device=device).uniform_(16.0, 64.0).requires_grad_()

    def step(z1: Any, z2: Any, width: Any) -> None:
        with joint_batch():
            pairs = pairs_of(kernel, z1, z2, width)
            infonce_log_ratio(pairs.grid() if ranks == 0 else pairs, symmetric=True).sum().backward()
        if device.type != "cpu":
            torch.accelerator.synchronize()

    cpu = device.type == "cpu"
    step(*inputs(64))
    made = inputs(size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT if cpu else torch.cuda.memory_allocated(device)
    clock = time.process_time if cpu else time.perf_counter
    start, wall = clock(), time.perf_counter()
    step(*made)
    seconds, wall = clock() - start, time.perf_counter() - wall
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT if cpu else torch.cuda.max_memory_allocated(device)
    if ranks > 1:
        torch.distributed.destroy_process_group()
    return {"peak_mib": (peak - before) / MIB, "seconds": seconds, "wall_seconds": wall}


def together(kernel: str, size: int, ranks: int, arguments: list[str]) -> dict[str, Any]:
    """A row: the largest figures of all its processes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.ring", *arguments, "--row", kernel, str(size)]
        processes = [
            subprocess.Popen([*command, str(rank), str(ranks), f"{folder}/meet"], stdout=subprocess.PIPE, text=True)
            for rank in range(max(ranks, 1))
        ]
        found = [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]
    return {"kernel": kernel, "size": size, "ranks": ranks, **{k: max(f[k] for f in found) for k in found[0]}}


def main(arguments: list[str] | None = None) -> int:
    """Run every row in processes of its own, print the table, write the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ring", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 16384], help="items N of the joint batch")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of processes")
    parser.add_argument("--dim", type=int, default=128, help="dimension d (default 128)")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=["dot product", "shared latent"])
    parser.add_argument("--max-grid", type=int, default=4096, help="largest N with the whole grid (default 4096)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of a process (default 1)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="default: cpu")
    parser.add_argument("--out", type=Path, default=Path("ring.json"), help="where the figures go (JSON)")
    parser.add_argument("--row", nargs=5, metavar=("KERNEL", "N", "RANK", "RANKS", "MEET"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.row:
        kernel, size, rank, ranks, meet = options.row
        print(json.dumps(measure(kernel, int(size), int(rank), int(ranks), options, meet)))
        return 0
    passed = ["--dim", str(options.dim), "--threads", str(options.threads), "--device", options.device]
    rows = []
    print(f"{'kernel':<22}{'N':>7}{'processes':>11}{'MiB each':>10}{'s each':>9}{'s wall':>9}", flush=True)
    for kernel in options.kernels:
        for size in options.sizes:
            for ranks in ([0] if size <= options.max_grid else []) + options.ranks:
                row = together(kernel, size, ranks, passed)
                rows.append(row)
                name = str(ranks) if ranks else "1, grid"
                print(
                    f"{kernel:<22}{size:>7}{name:>11}{row['peak_mib']:>10.1f}{row['seconds']:>9.2f}"
                    f"{row['wall_seconds']:>9.2f}",
                    flush=True,
                )
    setting = {"machine": platform.machine(), "system": platform.system(), "dim": options.dim, "device": options.device}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**setting, "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
