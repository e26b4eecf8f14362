"""Fit a posterior on the sphere to pairs of ambiguous views, and compare it with the exact one.

The block between the markers is the README's. Options: ``--out DIR --seed N --device auto|cpu|cuda --small``.
"""

# ruff: noqa: ANN001, ANN201, D103, E402
import runpy
import sys

if __name__ == "__main__" and len(sys.argv) > 1:  # with options: the function below, called with them
    from _options import finish, parse

    args = parse(__doc__)
    function = runpy.run_path(__file__)["quickstart"]
    finish(function(100 if args.small else 2_000, args.seed, args.device, args.out), args.out)
    sys.exit()

# [quickstart]
import pyro

from pyro_contrastive import diagnostics, guides, models, nets
from pyro_contrastive.data import SphereWorld
from pyro_contrastive.fit import fit


def quickstart(steps=2_000, seed=0, device="auto", out=None):
    pyro.set_rng_seed(seed)
    world = SphereWorld(dim=10, concentration=(16.0, 64.0), pair_concentration=20.0)  # its posterior is known
    guide = guides.VonMisesFisher(nets.mlp([32, 128, 128]), dim=10)
    model = models.MCInfoNCE(guide, concentration=20.0, evidence="moment_matched")
    fit(model, guide, world.batches(256, seed), steps=steps, lr=2e-3, seed=seed, device=device, out=out)
    test = world.sample(2_500, seed=1)
    q = guide.cpu().posterior(test.x1)  # one von Mises-Fisher distribution per view
    score = diagnostics.align_and_score(
        q.mean_direction, q.concentration, test.z1, true_concentration=test.concentration1
    )
    figures = {"spearman": score.spearman_concentration, "kappa_error": score.concentration_error}
    shares = zip(score.coverage.levels, score.coverage.empirical, strict=True)
    return figures | {f"coverage_{level:.0%}": float(share) for level, share in shares}


if __name__ == "__main__":
    print(quickstart())
# [/quickstart]
