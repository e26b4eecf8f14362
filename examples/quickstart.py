"""Fit a posterior on the sphere to pairs of ambiguous views, and compare it with the exact one.

The block between the markers is the README's, with its constants as options:
``--out DIR --seed N --device auto|cpu|cuda --small``.
"""

# ruff: noqa: E402
from _options import finish, parse

args = parse(__doc__)
args.steps = 100 if args.small else 2_000

# [quickstart]
import pyro

from pyro_contrastive import diagnostics, guides, models, nets
from pyro_contrastive.data import SphereWorld
from pyro_contrastive.fit import fit

pyro.set_rng_seed(args.seed)
world = SphereWorld(dim=10, concentration=(16.0, 64.0), pair_concentration=20.0)  # its exact posterior is known
guide = guides.VonMisesFisher(nets.mlp([32, 128, 128]), dim=10)
model = models.MCInfoNCE(guide, concentration=20.0)  # the latents are integrated exactly
fit(model, guide, world.batches(256, args.seed), steps=args.steps, lr=2e-3, device=args.device, out=args.out)

test = world.sample(2_500, seed=1)
q = guide.cpu().posterior(test.x1)  # one von Mises-Fisher distribution per view
score = diagnostics.align_and_score(q.mean_direction, q.concentration, test.z1, true_concentration=test.concentration1)
print(f"rank correlation of kappa with the truth {score.spearman_concentration:.3f}")
print(f"share of true latents inside 50, 80 and 95 % caps {score.coverage.empirical}")
# [/quickstart]

finish(
    {
        "spearman": score.spearman_concentration,
        "kappa_error": score.concentration_error,
        **{
            f"coverage_{level:.0%}": float(share)
            for level, share in zip(score.coverage.levels, score.coverage.empirical, strict=True)
        },
    },
    args.out,
)
