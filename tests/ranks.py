"""One process of several: runs every case on its share of the rows and leaves what came out in a file.

``python -m tests.ranks RANK FOLDER`` is started three times by test_distributed; ranks 0 and 1 are also a group of
their own. :func:`run_case` with one process and all rows is the reference.
"""

from __future__ import annotations

import math
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.distributions import Delta
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_contrastive import distributed, guides, models, priors
from pyro_contrastive.aggregates import FullData, MemoryBank
from pyro_contrastive.factors import infonce_factor, matching_factor
from pyro_contrastive.fit import fit
from pyro_contrastive.ops.random import derived_seed
from pyro_contrastive.ops.tiles import Pairs, contrast
from pyro_contrastive.shared_latent import interior_bound, shared_latent_factor

N, D, INPUTS = 12, 3, 5
RANKS = 3


def encoder() -> nn.Module:
    return nn.Sequential(nn.Linear(INPUTS, 8), nn.BatchNorm1d(8), nn.Tanh())


def guide(family: Callable[..., Any] = guides.VonMisesFisher, **options: Any) -> Any:
    return family(encoder(), D, **options)


class Rows(nn.Module):
    """A model of its own around a factor."""

    def __init__(self, recognition: Any, emit: Callable[[list[Any]], Tensor]) -> None:
        super().__init__()
        self.guide, self.emit = recognition, emit

    def forward(self, *views: Tensor) -> None:
        laws = [self.guide.posterior(x) for x in views]
        with pyro.plate("pairs", len(views[0])):
            for j, law in enumerate(laws, start=1):
                pyro.sample(f"z{j}", law)
            self.emit(laws)


def full_data() -> Any:
    net = guides.VonMisesFisher(nn.Sequential(nn.Linear(INPUTS, 8), nn.Tanh()), D, batch_norm=False)
    return models.RPM(net, aggregate=FullData(*views_of(2)))


def shared(laws: list[Any]) -> Tensor:
    pyro.factor("bound", interior_bound(laws[:2]))
    return shared_latent_factor("views", laws)


MC, PN, DELTA = models.MCInfoNCE, guides.ProjectedNormal, guides.Delta
ENUM = TraceEnum_ELBO(max_plate_nesting=1)
# name: (model, number of views, labels too, objective)
CASES: dict[str, tuple[Callable[[], Any], int, bool, Any]] = {
    "infonce": (lambda: MC(guide(DELTA), concentration=5.0, evidence="elbo", symmetric=False), 2, False, None),
    "infonce symmetric mean learned": (
        lambda: MC(guide(DELTA), concentration=5.0, evidence="elbo", negatives="mean", learn_concentration=True),
        2,
        False,
        None,
    ),
    "sampled latents": (lambda: MC(guide(), concentration=5.0, evidence="elbo"), 2, False, None),
    "draws in front": (lambda: MC(guide(DELTA), concentration=5.0, evidence="k_sample", num_samples=3), 2, False, None),
    "exact": (lambda: MC(guide(), concentration=20.0), 2, False, None),
    "exact shared": (lambda: MC(guide()), 2, False, None),
    "moment matched": (lambda: MC(guide(), concentration=20.0, evidence="moment_matched"), 2, False, None),
    "rpm": (lambda: models.RPM(guide()), 2, False, None),
    "rpm projected normal": (lambda: models.RPM(guide(PN)), 2, False, None),
    "rpm any law": (lambda: models.RPM(guide(guides.Normal), priors.LinearDynamics(D, 2)), 2, False, None),
    "rpm bank": (lambda: models.RPM(guide(), aggregate=MemoryBank(8)), 2, False, None),
    "rpm full data": (full_data, 2, False, None),
    "rpm critic": (lambda: models.RPM(guide(), priors.optimal(D, features=4, hidden=4)), 2, False, None),
    "discrete": (lambda: models.DiscreteRPM(guides.Categorical(encoder(), 4), learn_prior=True), 2, False, ENUM),
    "simclr": (lambda: models.SimCLR(guide(DELTA)), 2, False, None),
    "supcon": (lambda: models.SupCon(guide(DELTA)), 2, True, None),
    "supcon in": (lambda: models.SupCon(guide(DELTA), positives="supcon_in"), 2, True, None),
    "vsimclr": (lambda: models.VSimCLR(guide(PN)), 2, False, TraceMeanField_ELBO(max_plate_nesting=1)),
    "vsupcon": (lambda: models.VSupCon(guide(PN)), 2, True, TraceMeanField_ELBO(max_plate_nesting=1)),
    "aninfonce": (lambda: models.AnInfoNCE(guide(DELTA)), 2, False, None),
    "aninfonce both matched": (
        lambda: models.AnInfoNCE(guide(), candidates="both", evidence="moment_matched"),
        2,
        False,
        None,
    ),
    "aninfonce hard": (lambda: models.AnInfoNCE(guide(DELTA), hard_negatives=1), 3, False, None),
    "ensemble": (lambda: models.AnInfoNCEEnsemble(guide(DELTA), 2, candidates="partners"), 3, False, None),
    "hedged": (lambda: models.HedgedInstance(guide()), 2, False, None),
    "simsiam": (lambda: models.SimSiam(guide(guides.Siamese, width="fixed")), 2, False, None),
    "vi_simsiam": (lambda: models.VISimSiam(guide(guides.Siamese)), 2, False, None),
    "vi_simsiam uniformity": (
        lambda: models.VISimSiam(guide(guides.Siamese, stop_gradient=False), uniformity="batch"),
        2,
        False,
        None,
    ),
    "shared latent": (lambda: Rows(guide(), shared), 3, False, None),
}


def views_of(count: int, labels: bool = False) -> list[Tensor]:
    """All rows, the same on every process."""
    source = torch.Generator().manual_seed(3)
    views = [torch.randn(N, INPUTS, generator=source, dtype=torch.float64) for _ in range(count)]
    return [*views, torch.tensor([0, 1, 0, 2, 2, 1] * 2)] if labels else views


def share(tensor: Tensor, rank: int, ranks: int) -> Tensor:
    size = len(tensor) // ranks
    return tensor[rank * size : (rank + 1) * size]


class Replay(Messenger):
    """Gives every latent of a guide the noise of its row, whichever process the row is on."""

    def __init__(self, rank: int, ranks: int) -> None:
        super().__init__()
        self.where = rank, ranks

    def _pyro_sample(self, msg: Any) -> None:
        law = msg["fn"]
        if msg["done"] or msg["value"] is not None or not getattr(law, "has_rsample", False) or isinstance(law, Delta):
            return
        source = torch.Generator().manual_seed(derived_seed(0, *map(ord, msg["name"])))
        noise = share(torch.randn(N, D, generator=source, dtype=torch.float64), *self.where)
        if hasattr(law, "mean_direction"):
            width = law.concentration.rsqrt().unsqueeze(-1) if hasattr(law, "concentration") else 0.3
            value = nn.functional.normalize(law.mean_direction + width * noise, dim=-1)
        else:
            value = law.mean + law.stddev * noise
        msg["value"], msg["done"] = value, True


def build(name: str) -> tuple[Any, Any, list[Tensor], Any]:
    """Model, guide, all views and objective; the same weights on every process."""
    make, count, labels, objective = CASES[name]
    torch.manual_seed(0)
    pyro.clear_param_store()
    model = distributed.synchronise_batch_norm(make().double())
    partner = (lambda *views: None) if objective is ENUM else model.guide
    return model, partner, views_of(count, labels), objective or Trace_ELBO(max_plate_nesting=1)


def run_case(name: str, rank: int = 0, ranks: int = 1, group: Any = None) -> dict[str, Tensor]:
    """Loss, gradients and buffers after some steps of gradient descent, of the joint batch."""
    model, partner, views, objective = build(name)
    mine = [share(x, rank, ranks) for x in views]
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(2 if name == "rpm bank" else 1):
        optimiser.zero_grad()
        with pyro.settings.context(module_local_params=True), distributed.joint_batch(group), Replay(rank, ranks):
            loss = objective.differentiable_loss(model, partner, *mine) / N
        loss.backward()
        distributed.sum_gradients(model.parameters(), group)
        optimiser.step()
        losses.append(loss.detach())
    total = torch.stack(losses)
    if ranks > 1:
        torch.distributed.all_reduce(total, group=group)
    found = {"loss": total, **{f"state {k}": v for k, v in model.state_dict().items()}}
    return found | {f"gradient {k}": p.grad for k, p in model.named_parameters() if p.grad is not None}


class Stream:
    """Batches with a position, as the loaders of the package; each process its rows, or all of them."""

    def __init__(self) -> None:
        self.at = 0

    def seek(self, epoch: int, batch: int = 0) -> None:
        self.at = batch

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[list[Tensor]]:
        for k in range(self.at, 6):
            source = torch.Generator().manual_seed(derived_seed(2, k))
            yield [torch.randn(N, INPUTS, generator=source) for _ in range(2)]


def run_fit(name: str, folder: Path | None = None, **options: Any) -> dict[str, Any]:
    """A fit of twelve steps by all processes, or by one; with noise in "sampled" only."""
    torch.manual_seed(distributed.process_rank()[0])  # other weights everywhere: the first process's count
    family = "Delta" if name == "points" else "VonMisesFisher"
    evidence = "exact" if name == "exact" else "elbo"
    model = MC(guide(getattr(guides, family)), concentration=5.0, evidence=evidence)
    settings = {"epochs": 2, "lr": 0.1, "device": "cpu", "log_every": 2, "progress": False, "out": folder}
    if name != "sampled":  # Adam would make steps of the rounding errors of a bias before a batch norm
        settings["optimizer"] = partial(torch.optim.SGD, lr=0.1)
    made = fit(model, model.guide, distributed.BatchShare(Stream()), **(settings | options))
    return {"status": made.status, "message": made.message, "step": made.step, "history": made.history} | {
        f"state {k}": v for k, v in model.state_dict().items()
    }


def fits(rank: int, folder: Path) -> dict[str, Any]:
    """Fits by all processes: from start to end, in two parts, and broken off in three ways."""
    found: dict[str, Any] = {f"fit {name}": run_fit(name) for name in ("exact", "points", "sampled")}
    found["fit part"] = run_fit("sampled", folder / "run", max_seconds=0.0)
    found["fit resumed"] = run_fit("sampled", folder / "run")
    found["fit files"] = sorted(path.name for path in (folder / "run").iterdir())

    class Told(Stream):
        """Tells one process to stop, or gives it something that is not a number."""

        def __init__(self, what: str) -> None:
            super().__init__()
            self.what = what

        def __iter__(self) -> Iterator[list[Tensor]]:
            for k, batch in enumerate(super().__iter__()):
                if k == 3 and rank == 1 and self.what == "signal":
                    signal.raise_signal(signal.SIGINT)
                yield [x.where(torch.tensor(k != 3 or rank != 1 or self.what != "nan"), torch.nan) for x in batch]

    for what in ("signal", "nan"):
        model = MC(guide(DELTA), concentration=5.0, evidence="elbo")
        data = distributed.BatchShare(Told(what))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = fit(model, model.guide, data, epochs=1, device="cpu", log_every=2, progress=False)
        found[f"fit {what}"] = made.status, made.step
    return found


def product(rows: Any, columns: Any, common: Any) -> Tensor:
    return common[0] * rows[0] @ columns[0].mT + columns[1].mT


def run_ring(rank: int = 0, ranks: int = 1, group: Any = None) -> dict[str, Tensor]:
    """Contrasts of a grid of every kind, several of them small tiles, and gradients of an odd function of them."""
    source = torch.Generator().manual_seed(1)
    kinds = [
        (batch, symmetric, shift)
        for batch in ((), (2, 1))
        for symmetric in (False, True)
        for shift in (0.0, 0.7, -math.inf)
    ]
    found = {}
    for k, (batch, symmetric, shift) in enumerate(kinds):
        a, b, c = (torch.randn(*batch, N, m, generator=source, dtype=torch.float64) for m in (4, 4, 1))
        weights = torch.randn(3, N, generator=source, dtype=torch.float64)
        parts = [share(t.movedim(-2, 0), rank, ranks).movedim(0, -2).clone().requires_grad_() for t in (a, b, c)]
        scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        mine = share(weights.mT, rank, ranks).mT
        with distributed.joint_batch(group):
            made = contrast(
                Pairs(product, (parts[0],), tuple(parts[1:]), (scale,)), symmetric=symmetric, shift=shift, tile=3
            )
        value = sum(((w * t) for w, t in zip(mine, made, strict=True) if t is not None), torch.zeros(()))
        value.square().sum().backward()
        if ranks > 1:
            torch.distributed.all_reduce(scale.grad, group=group)
        found |= {f"{k} value": value.detach(), **{f"{k} gradient {j}": p.grad for j, p in enumerate(parts)}}
        found[f"{k} common"] = scale.grad
    return found


def faults(rank: int, group: Any) -> dict[str, str]:
    """Messages of what cannot be spread, or does not go together, on this process."""
    items, z = torch.ones(2 + rank, 1), torch.eye(3)
    model = models.MCInfoNCE(guide(DELTA), concentration=5.0, evidence="elbo", negatives="sum" if rank else "mean")

    def other_options() -> None:
        Trace_ELBO(max_plate_nesting=1).differentiable_loss(model, model.guide, *torch.randn(2, 4, INPUTS))

    def with_plate(size: int, emit: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> None:
            with pyro.plate("pairs", size):
                emit()

        return run

    cases = {
        "sizes": lambda: contrast(Pairs(product, (items,), (items, items), (torch.ones(()),))),
        "sizes of classes": lambda: distributed.gather(items),
        "options": other_options,
        "a grid": with_plate(3, lambda: infonce_factor("f", z, z, torch.inner)),
        "matching": with_plate(3, lambda: matching_factor("m", z)),
        "gradients": lambda: distributed.sum_gradients(model.parameters(), group),
    }
    if rank == 0:
        next(model.parameters()).grad = torch.zeros_like(next(model.parameters()))
    said = {}
    for name, case in cases.items():
        try:
            with distributed.joint_batch(group):
                case()
            said[name] = "nothing"
        except ValueError as error:
            said[name] = str(error)
    return said


def main(rank: int, folder: Path) -> None:
    """Run everything as one of `RANKS` processes; the last one dies in the middle of a contrast."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/meet", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    pair = torch.distributed.new_group([0, 1])
    found: dict[str, Any] = {"ring 3": run_ring(rank, RANKS), "any": distributed.any_process(rank == 1)}
    weights = nn.Linear(2, 2)
    distributed.broadcast(weights)
    found["broadcast"] = weights.weight.detach()
    found |= fits(rank, folder)
    if rank < 2:
        found |= {name: run_case(name, rank, 2, pair) for name in CASES}
        found["ring 2"] = run_ring(rank, 2, pair)
        found["faults"] = faults(rank, pair)
    torch.save(found, folder / f"{rank}.pt")
    if rank == RANKS - 1:
        sys.exit(3)
    try:
        run_ring(rank, RANKS)
    except RuntimeError as error:
        torch.save(str(error), folder / f"{rank} alone.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
