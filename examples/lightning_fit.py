"""A model and guide in your own Lightning loop, on one process or several that share every batch.

    python examples/lightning_fit.py [--processes 2] [--steps 500] [--out DIR] [--seed N] [--device auto] [--small]

Needs Lightning: pip install 'pyro-contrastive[lightning]'. With several processes Lightning's DDP averages the
gradients and ``joint_batch`` lets every item be compared with those of all processes, so that the result is that of one
process.
"""

from __future__ import annotations

import sys

import pyro
import torch
from _options import finish, make_parser
from pyro.infer import Trace_ELBO

from pyro_contrastive import diagnostics, guides, models, nets
from pyro_contrastive.data import SphereWorld
from pyro_contrastive.distributed import BatchShare, joint_batch, synchronise_batch_norm

try:
    import lightning
except ImportError:
    sys.exit("this example needs Lightning, which is not installed: pip install 'pyro-contrastive[lightning]'")

BATCH_SIZE = 256


class Pair(lightning.LightningModule):
    """A pair and its ELBO; what is special about several processes are the three marked lines."""

    def __init__(self, world: SphereWorld, seed: int) -> None:
        super().__init__()
        self.world, self.seed = world, seed
        self.guide = guides.VonMisesFisher(nets.mlp([32, 128, 128]), dim=world.dim)
        self.model = models.MCInfoNCE(self.guide, concentration=20.0)
        synchronise_batch_norm(self)  # 1. statistics over the batches of all processes
        self.elbo = Trace_ELBO(max_plate_nesting=1)(self.model, self.guide)

    def training_step(self, batch: tuple[torch.Tensor, ...], batch_idx: int) -> torch.Tensor:
        """The loss in nats per pair; DDP averages its gradient over the processes."""
        x1, x2 = batch[:2]
        with pyro.settings.context(module_local_params=True), joint_batch():  # 2. negatives of all processes
            loss = self.elbo(x1, x2) / len(x1)
        self.log("loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def train_dataloader(self) -> BatchShare:
        """The world's batches: fresh pairs without end, the same on every process."""
        return BatchShare(self.world.batches(BATCH_SIZE, self.seed))  # 3. each process takes its rows

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def main() -> None:
    """Fit, and compare with the exact posterior."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--processes", type=int, default=1, metavar="R", help="default: %(default)s")
    parser.add_argument("--steps", type=int, metavar="N", help="default: 500, 10 with --small")
    args = parser.parse_args()
    steps = args.steps or (10 if args.small else 500)
    pyro.set_rng_seed(args.seed)
    with pyro.settings.context(module_local_params=True):
        pair = Pair(SphereWorld(dim=10, concentration=(16.0, 64.0), pair_concentration=20.0), args.seed)
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator={"cuda": "gpu"}.get(args.device, args.device),
        devices=args.processes,
        strategy="ddp" if args.processes > 1 else "auto",
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(pair)
    loss = trainer.callback_metrics["loss"].item()  # mean over the processes
    if trainer.is_global_zero:
        test = pair.world.cpu().sample(1_000, seed=1)
        q = pair.guide.cpu().eval().posterior(test.x1)
        score = diagnostics.align_and_score(
            q.mean_direction, q.concentration, test.z1, true_concentration=test.concentration1
        )
        finish({"loss": loss, "spearman": score.spearman_concentration}, args.out)


if __name__ == "__main__":
    main()
