"""A loop with Accelerate, run by test_accelerate.py: ``torchrun --nproc-per-node R accelerate_loop.py``."""

from __future__ import annotations

import itertools
import json
import sys

import pyro
import torch
from pyro.infer import Trace_ELBO

from pyro_contrastive import guides, models, nets
from pyro_contrastive.data import SphereWorld
from pyro_contrastive.distributed import BatchShare, joint_batch, synchronise_batch_norm


def main() -> None:
    from accelerate import Accelerator  # which need not be installed

    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    guide = guides.VonMisesFisher(nets.mlp([32, 64, 64]), dim=10)
    model = models.MCInfoNCE(guide, concentration=20.0)
    model.double()  # in single precision Adam makes signs of gradients out of rounding
    synchronise_batch_norm(model)
    with pyro.settings.context(module_local_params=True):
        elbo = Trace_ELBO(max_plate_nesting=1)(model, guide)
    optimiser = torch.optim.Adam(elbo.parameters(), lr=2e-3)
    elbo, optimiser = accelerator.prepare(elbo, optimiser)
    losses = []
    world = SphereWorld(dim=10, pair_concentration=20.0)
    for x1, x2, *_ in itertools.islice(BatchShare(world.batches(64, seed=1)), 10):
        optimiser.zero_grad()
        with pyro.settings.context(module_local_params=True), joint_batch():
            loss = elbo(x1.double(), x2.double()) / len(x1)
        accelerator.backward(loss)
        optimiser.step()
        losses.append(accelerator.gather(loss.detach().reshape(1)).mean().item())
    if accelerator.is_main_process:
        json.dump({"losses": losses, "processes": accelerator.num_processes}, sys.stdout)


if __name__ == "__main__":
    main()
