"""Peak memory and time of the N x N likelihood, forward and backward: by tiles, and with the whole grid.

    python -m benchmarks.memory [--sizes 512 2048 8192 16384] [--max-grid 8192] [--device cpu] [--out FILE]

Each row runs in a process of its own, since the peak of a process never falls. On the CPU the peak is that of the
resident memory, the libraries included (row "nothing"), and the clock CPU time; on a GPU it is the peak that torch has
allocated, and the clock wall time. Both paths of a block run one after the other; "ratio" is tiles to grid.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

KERNELS = ("dot product", "anisotropic", "shared latent", "finite concentration")
MIB = 2**20


def pairs_of(kernel: str, z1: Any, z2: Any, width: Any) -> Any:
    from pyro_contrastive import kernels
    from pyro_contrastive.distributions import VonMisesFisher

    if kernel == "dot product":
        return kernels.VonMisesFisherKernel(20.0).to(z1.device)(z1, z2, lazy=True)
    if kernel == "anisotropic":
        return kernels.AnisotropicKernel(z1.shape[-1], 10.0).to(z1.device)(z1, z2, lazy=True)
    posteriors = [VonMisesFisher(z, width) for z in (z1, z2)]
    return kernels.expected_pairs(*posteriors, float("inf") if kernel == "shared latent" else 20.0)


def measure(kernel: str, path: str, size: int, options: argparse.Namespace) -> dict[str, Any]:
    """One forward and backward pass in this process, after one of 64 items that builds what is built once."""
    import torch

    from pyro_contrastive.factors import infonce_log_ratio

    torch.set_num_threads(options.threads)
    device = torch.device(options.device)

    def step(size: int) -> None:
        torch.manual_seed(0)
        raw = torch.randn(2, size, options.dim, device=device).requires_grad_()
        z1, z2 = torch.nn.functional.normalize(raw, dim=-1)
        width = torch.empty(size, device=device).uniform_(16.0, 64.0).requires_grad_()
        pairs = pairs_of(kernel, z1, z2, width)
        pairs = pairs.grid() if path == "grid" else pairs.compiled() if options.compile else pairs
        infonce_log_ratio(pairs, symmetric=True).sum().backward()
        if device.type != "cpu":
            torch.accelerator.synchronize()

    clock = time.process_time if device.type == "cpu" else time.perf_counter
    if kernel == "nothing":
        torch.zeros(1, device=device)
        seconds = 0.0
    else:
        step(size if options.compile else 64)
        start = clock()
        step(size)
        seconds = clock() - start
    if device.type == "cpu":
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    else:
        peak = torch.cuda.max_memory_allocated(device)
    return {"kernel": kernel, "path": path, "size": size, "peak_mib": peak / MIB, "seconds": seconds}


def table(rows: list[dict[str, Any]]) -> str:
    found = {(row["kernel"], row["path"], row["size"]): row for row in rows}
    lines = [f"{'kernel':<22}{'N':>7}{'MiB tiles':>12}{'MiB grid':>12}{'s tiles':>10}{'s grid':>10}{'ratio':>8}"]
    for kernel, path, size in found:
        if path == "grid":
            continue
        row, grid = found[kernel, path, size], found.get((kernel, "grid", size))
        peak, seconds, ratio = "-", "-", "-"
        if grid is not None:
            peak, seconds = f"{grid['peak_mib']:.0f}", f"{grid['seconds']:.2f}"
            ratio = f"{row['seconds'] / grid['seconds']:.2f}"
        lines.append(
            f"{kernel:<22}{size:>7}{row['peak_mib']:>12.0f}{peak:>12}{row['seconds']:>10.2f}{seconds:>10}{ratio:>8}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run every row in a process of its own, print the table, write the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 2048, 8192, 16384], help="numbers of items N")
    parser.add_argument("--dim", type=int, default=128, help="dimension d (default 128)")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--max-grid", type=int, default=8192, help="largest N with the whole grid (default 8192)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--device", default="cpu", help="torch device (default cpu)")
    parser.add_argument("--compile", action="store_true", help="tiles by torch.compile")
    parser.add_argument("--out", type=Path, default=Path("memory.json"), help="where the figures go (JSON)")
    parser.add_argument("--row", nargs=3, metavar=("KERNEL", "PATH", "N"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.row:
        kernel, path, size = options.row
        print(json.dumps(measure(kernel, path, int(size), options)))
        return 0

    plan = [("nothing", "tiles", 0)]
    plan += [
        (kernel, path, size)
        for kernel in options.kernels
        for size in options.sizes
        for path in ("tiles", "grid")
        if path == "tiles" or size <= options.max_grid
    ]
    rows = []
    for number, row in enumerate(plan, start=1):
        print(f"{number}/{len(plan)}: {', '.join(map(str, row))}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "benchmarks.memory", "--row", *map(str, row), "--dim", str(options.dim)]
        command += ["--threads", str(options.threads), "--device", options.device]
        command += ["--compile"] if options.compile else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        settings = {name: getattr(options, name) for name in ("dim", "threads", "device", "compile")}
        machine = {"python": platform.python_version(), "processor": platform.machine()}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"machine": machine, "settings": settings, "rows": rows}, indent=1) + "\n")
    print(table(rows))
    print(f"\nPeaks include the libraries (first row) on the CPU. Wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
