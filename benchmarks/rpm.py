"""Recognition-parametrised models in a world with known posteriors: what the width means, what the aggregate costs.

    python -m benchmarks.rpm widths [--steps 600] [--out FILE]
    python -m benchmarks.rpm aggregate [--steps 600] [--out FILE]

`widths` fits the same pairs by several evidences and compares the learned concentrations with the true ones; the bounds
are those of 256 held-out pairs. `aggregate` gives the bias of the recognition factor by batch size, for the exact
posteriors of the world and along a fit with a memory bank. Finished rows are kept in FILE and not computed again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from pyro.infer import Trace_ELBO

from pyro_contrastive import diagnostics, guides, models, nets, priors
from pyro_contrastive.aggregates import MemoryBank, aggregate_log_density
from pyro_contrastive.data import SphereWorld
from pyro_contrastive.distributions import log_uniform_density
from pyro_contrastive.fit import fit
from pyro_contrastive.objectives import KSampleELBO
from pyro_contrastive.ops.random import seeded

DIM, PAIR, BATCH = 10, 20.0, 128


def guide():
    return guides.VonMisesFisher(nets.mlp([32, 128, 128]), DIM)


def rpm(**options):
    def build():
        g = guide()
        return models.RPM(g, **options), g

    return build


def optimal():
    g = guide()
    return models.RPM(g, priors.optimal(DIM)), g


def exact(concentration):
    def build():
        g = guide()
        return models.MCInfoNCE(g, concentration=concentration), g

    return build


def fused(aggregate=None):
    g = guides.Fused(guide())
    return models.RPM(g, priors.SharedUniform(DIM), aggregate=aggregate), g


def elbo(num_samples=1):
    return lambda: Trace_ELBO(max_plate_nesting=1) if num_samples == 1 else KSampleELBO(num_samples)


FIXED = {"concentration": PAIR, "learn_concentration": False}
FITS = {
    "pairs 20 apart": {
        "RPM, kappa learned, ELBO": (rpm(), elbo()),
        "RPM, kappa 20, ELBO": (rpm(**FIXED), elbo()),
        "RPM, kappa 20, 16 samples": (rpm(**FIXED), elbo(16)),
        "RPM, optimal prior, ELBO": (optimal, elbo()),
        "MCInfoNCE, kappa 20, exact": (exact(PAIR), elbo()),
    },
    "one shared latent": {
        "RPM, fused guide, ELBO": (fused, elbo()),
        "RPM, fused guide, ELBO, bank of 8,192": (lambda: fused(MemoryBank(8_192)), elbo()),
        "MCInfoNCE, infinite kappa, exact": (exact(math.inf), elbo()),
    },
}


def train(name, world_name, steps):
    """Fit, and compare with the truth."""
    world = SphereWorld(DIM, pair_concentration=PAIR if world_name == "pairs 20 apart" else math.inf)
    build, objective = FITS[world_name][name]
    start = time.process_time()
    with seeded(0):
        model, g = build()
        fit(
            model, g, world.batches(BATCH, seed=0), steps=steps, lr=5e-3, elbo=objective(), device="cpu", progress=False
        )
    seconds = time.process_time() - start
    test = world.sample(5_000, seed=1)
    with torch.no_grad():
        q = g.posterior(test.x1)
    score = diagnostics.align_and_score(
        q.mean_direction, q.concentration, test.z1, true_concentration=test.concentration1
    )
    gap = None
    if isinstance(model, models.RPM):
        gap = diagnostics.evidence_gap(model, g, (test.x1[:256], test.x2[:256]), num_samples=128, sizes=(1, 16))
    return {
        "world": world_name,
        "fit": name,
        "spearman": score.spearman_concentration,
        "level": (q.concentration / test.concentration1).median().item(),
        "coverage": score.coverage.empirical.tolist(),
        "bounds": gap.bound.tolist() if gap else None,
        "unreliable": gap.unreliable if gap else None,
        "cpu_seconds": seconds,
    }


def batches_of_the_truth():
    """Bias of the factor by batch size under the exact posteriors."""
    world = SphereWorld(DIM)
    posterior = world.posterior(world.sample(8_192, seed=0))
    found = diagnostics.aggregate_bias(posterior, sizes=(16, 64, 256, 1024))
    truth = (-posterior.entropy() - log_uniform_density(DIM)).mean().item()  # the aggregate is exactly uniform
    return {"size": found.size.tolist(), "factor": found.factor.tolist(), "error": found.error.tolist(), "truth": truth}


def bank_along_a_fit(steps, size=2_048, batch=BATCH):
    """Bias of the factor with and without the bank, at some steps of a fit, against 16,384 fresh items."""
    world, rows = SphereWorld(DIM), []
    fresh = world.sample(16_384, seed=5)
    with seeded(0):
        g = guide()
        bank = MemoryBank(size)
        model = models.RPM(g, **FIXED, aggregate=bank)

    def measure(step):
        with torch.no_grad():
            g.eval(), bank.eval()
            everyone, q = g.posterior(fresh.x1), g.posterior(fresh.x1[:batch])
            z = q.sample((32,))
            own, reference = q.log_prob(z), aggregate_log_density(z, everyone)
            laws = {"batch": q, "bank": bank(1, q, g), "factor": everyone}
            row = {name: (reference - aggregate_log_density(z, law)).mean().item() for name, law in laws.items()}
            rows.append({"step": step, **row, "factor": (own - reference).mean().item()})
            g.train(), bank.train()

    objective, batches = Trace_ELBO(max_plate_nesting=1)(model, g), world.batches(batch, seed=0)
    optimizer = torch.optim.Adam([p for p in model.parameters()], lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(1, steps + 1):
        loss = objective(*next(batches)) / batch
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step in {20, 50, 100, 200, 400, steps}:
            measure(step)
    return {"size": size, "batch": batch, "rows": rows}


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing in the file, print everything in it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rpm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["widths", "aggregate"])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--only", default="", help="jobs whose name holds this text")
    parser.add_argument("--out", type=Path, default=None, help="where the figures go")
    options = parser.parse_args(arguments)
    out = options.out or Path(f"benchmarks_rpm_{options.what}.json")
    torch.set_num_threads(1)
    done = json.loads(out.read_text()) if out.exists() else {}
    if options.what == "widths":
        jobs = {f"{w}: {f}": (lambda w=w, f=f: train(f, w, options.steps)) for w, fits in FITS.items() for f in fits}
    else:
        jobs = {"exact posteriors": batches_of_the_truth, "memory bank": lambda: bank_along_a_fit(options.steps)}
    for name, job in jobs.items():
        if options.only not in name:
            continue
        if name not in done:
            done[name] = job()
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(done, indent=1) + "\n")
        print(name, json.dumps(done[name]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
