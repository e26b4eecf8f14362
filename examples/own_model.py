"""A model of your own in plain Pyro: what comes from this library is two distributions, one guide and one factor.

The assumption: the latents of two views of one thing lie close together on the sphere, at a distance that is learned.
Options: ``--out DIR --seed N --device auto|cpu|cuda --small``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyro
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor
from tqdm.auto import trange

from pyro_contrastive import guides, nets
from pyro_contrastive.data import SphereWorld
from pyro_contrastive.distributions import HypersphericalUniform, VonMisesFisher
from pyro_contrastive.factors import recognition_factor
from pyro_contrastive.fit import pick_device


def make_model(guide: torch.nn.Module, dim: int) -> Callable[[Tensor, Tensor], None]:
    """Write down how two views come about, given what the guide says about each."""

    def model(x1: Tensor, x2: Tensor) -> None:
        kappa = pyro.param("kappa", x1.new_tensor(10.0), constraint=constraints.positive)
        with pyro.plate("pairs", len(x1)):
            z1 = pyro.sample("z1", HypersphericalUniform(dim))
            z2 = pyro.sample("z2", VonMisesFisher(z1, kappa))  # the generative assumption
            recognition_factor("x1", z1, guide.posterior(x1))
            recognition_factor("x2", z2, guide.posterior(x2))

    return model


def train(
    steps: int = 1_500, seed: int = 0, device: str = "auto", out: str | Path | None = None, batch_size: int = 256
) -> dict[str, float]:
    """Train with plain SVI, and compare the learned concentration with the one of the sampled latents."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    where = pick_device(device)
    world = SphereWorld(dim=3, concentration=(16.0, 64.0), pair_concentration=20.0, observed_dim=16).to(where)
    guide = guides.VonMisesFisher(nets.mlp([16, 64, 64]), dim=3).to(where)
    model = make_model(guide, dim=3)
    svi = SVI(model, guide, Adam({"lr": 2e-3}), Trace_ELBO())

    losses = []
    batches = world.batches(batch_size, seed)
    with trange(steps, unit="step", desc="own model") as bar:
        for step in bar:
            losses.append(svi.step(*next(batches)) / batch_size)
            if step % 50 == 49:
                bar.set_postfix_str(f"loss {sum(losses[-50:]) / 50:.3f} nats per pair")

    with torch.no_grad():
        test = world.sample(2_000, seed=seed + 1)
        cosine = (guide.posterior(test.x1).sample() * guide.posterior(test.x2).sample()).sum(-1).mean()
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        torch.save({"guide": guide.state_dict(), "kappa": pyro.param("kappa").detach()}, Path(out) / "model.pt")
    last = losses[-min(100, steps) :]
    return {
        "loss": sum(last) / len(last),
        "first_loss": losses[0],
        "kappa": float(pyro.param("kappa").detach()),
        "pair_cosine": float(cosine),
    }


if __name__ == "__main__":
    from _options import finish, parse

    args = parse(__doc__ or "")
    finish(train(30 if args.small else 1_500, args.seed, args.device, args.out), args.out)
