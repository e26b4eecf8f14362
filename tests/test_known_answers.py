"""Training recovers what is known: posteriors, pair concentrations, and a learned prior that does not collapse.

Statistical errors of what is measured here (thousands of test pairs) are a few tenths of the tolerances, so these tests
do not fail by chance; the tolerances are for the training, which is kept short.
"""

from __future__ import annotations

import math
import time

import pytest
import torch

from pyro_contrastive import diagnostics, guides, models, nets
from pyro_contrastive.data import SphereWorld
from pyro_contrastive.fit import fit
from pyro_contrastive.ops.bessel import inverse_bessel_ratio

pytestmark = pytest.mark.slow

DIM = 10


def encoder():
    return nets.mlp([32, 128, 128])


def train(model, guide, world, record_property, **options):
    start = time.process_time()
    fit(model, guide, world.batches(256, seed=0), progress=False, device="cpu", **options)
    record_property("CPU seconds", round(time.process_time() - start, 1))


def concentration_of_pairs(z1, z2):
    """Maximum likelihood of kappa for z2 ~ vMF(z1, kappa)."""
    return inverse_bessel_ratio(DIM, (z1 * z2).sum(-1).double().mean()).item()


def test_mcinfonce_recovers_the_posterior(record_property):
    world = SphereWorld(dim=DIM, concentration=(16.0, 64.0), pair_concentration=20.0)
    guide = guides.VonMisesFisher(encoder(), DIM)
    model = models.MCInfoNCE(guide, concentration=20.0)
    train(model, guide, world, record_property, steps=1_200, lr=3e-3)
    test = world.sample(4_000, seed=99)
    with torch.no_grad():
        q = guide.posterior(test.x1)
    score = diagnostics.align_and_score(
        q.mean_direction, q.concentration, test.z1, true_concentration=test.concentration1
    )
    correlation = diagnostics.cosine_correlation(q.mean_direction, test.mean_direction1)
    record_property("Spearman of kappa", score.spearman_concentration)
    record_property("relative error of kappa", score.concentration_error)
    record_property("correlation of cosines", correlation)
    record_property("coverage", score.coverage.empirical.tolist())
    assert score.spearman_concentration >= 0.97
    assert score.concentration_error <= 0.10
    assert correlation >= 0.97
    # 2,000 scored items: the sampling error of a share is at most 0.011
    assert abs(score.coverage.empirical - score.coverage.levels).max() <= 0.06


def test_learned_kernel_recovers_the_concentration_of_injective_views(record_property):
    world = SphereWorld(dim=DIM, concentration=math.inf, pair_concentration=20.0)
    guide = guides.Delta(encoder(), DIM)
    model = models.MCInfoNCE(guide, concentration=10.0, evidence="elbo", learn_concentration=True)
    train(model, guide, world, record_property, steps=1_500, lr=3e-3)
    test = world.sample(4_000, seed=99)
    with torch.no_grad():
        z1 = guide.posterior(test.x1).mean
    kappa = model.concentration.item()
    record_property("learned concentration", kappa)
    assert kappa == pytest.approx(20.0, rel=0.05)
    assert diagnostics.cosine_correlation(z1, test.z1) >= 0.98  # for the right reason: the latents are found


def test_learned_prior_fits_its_latents_and_does_not_collapse(record_property):
    world = SphereWorld(dim=DIM, concentration=(16.0, 64.0), pair_concentration=20.0)
    guide = guides.VonMisesFisher(encoder(), DIM)
    model = models.RPM(guide)
    train(model, guide, world, record_property, steps=1_500, lr=8e-3)
    test = world.sample(8_000, seed=99)
    with torch.no_grad():
        q1, q2 = guide.posterior(test.x1), guide.posterior(test.x2)
        of_pairs = concentration_of_pairs(q1.sample((8,)), q2.sample((8,)))
        logits = model.partner_logits(test.x1[:256], test.x2[:256])
    accuracy = (logits.argmax(-1) == torch.arange(256)).double().mean().item()
    kappa = q1.concentration
    prior = model.concentration.item()
    record_property("prior concentration", prior)
    record_property("concentration of sampled pairs", of_pairs)
    record_property("posterior concentration, mean", kappa.mean().item())
    record_property("partner accuracy among 256", accuracy)
    assert torch.isfinite(kappa).all() and kappa.mean() > 5
    assert accuracy > 10 / 256  # ten times chance
    assert prior == pytest.approx(of_pairs, rel=0.05)


def test_independent_uniform_priors_collapse(record_property):
    """The contrast that gives the test above its meaning: unrelated latents make the posteriors lose their input."""
    world = SphereWorld(dim=DIM, concentration=(16.0, 64.0), pair_concentration=20.0)
    guide = guides.VonMisesFisher(encoder(), DIM)
    model = models.RPM(guide, concentration=1e-3, learn_concentration=False)
    train(model, guide, world, record_property, steps=300, lr=8e-3)
    with torch.no_grad():
        kappa = guide.posterior(world.sample(2_000, seed=99).x1).concentration.mean().item()
    record_property("posterior concentration, mean", kappa)
    assert kappa / DIM < 0.01  # the mean resultant length, from .6 at the start
