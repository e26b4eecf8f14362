"""Worlds whose latents are not uniform: the law of accepted pairs, and posteriors under a prior."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn.functional import normalize

from pyro_contrastive.data import AcceptanceWorld, SphereWorld
from pyro_contrastive.diagnostics import aggregate_uniformity


def test_accepted_pairs_have_the_law_of_importance_weighted_independent_pairs():
    """Moments of accepted pairs against self-normalised weights exp(kappa z.z') on independent ones, made here."""
    world = AcceptanceWorld(dim=3, concentration=(4.0, 12.0), pair_concentration=4.0)
    batch = world.sample(20_000, seed=0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 400_000, 3, generator=generator)
    law = world.posterior(x)
    torch.manual_seed(1)  # not the stream that made x
    z = law.sample()
    weight = torch.exp(4.0 * ((z[0] * z[1]).sum(-1) - 1)).double()
    weight = weight / weight.sum()

    def moments(x1, x2, z1, z2, k1, k2):
        return torch.stack([(z1 * z2).sum(-1), (x1 * x2).sum(-1), x1[:, 0], x2[:, 1], z1[:, 0], k1, k2 * z1[:, 1]], -1)

    accepted = moments(batch.x1, batch.x2, batch.z1, batch.z2, batch.concentration1, batch.concentration2).double()
    weighted = moments(*x, *z, *law.concentration).double()
    expected = (weight[:, None] * weighted).sum(0)
    spread = (weight[:, None] * (weighted - expected).square()).sum(0).sqrt()
    error = spread * (1 / 20_000 + weight.square().sum()).sqrt()
    # items are used again in one pair of sixteen, which widens the error a little: 6 s.e., false alarm < 1e-6
    assert bool(((accepted.mean(0) - expected).abs() < 6 * error).all())
    independent = weighted.mean(0)
    assert float(((independent - expected).abs() / error).max()) > 50  # the check can fail


def test_the_stated_posterior_is_what_made_the_pairs():
    world = AcceptanceWorld()
    batch = world.sample(500, seed=1)
    law = world.posterior(batch.x2)
    assert torch.allclose(law.mean_direction, batch.mean_direction2, atol=1e-5)
    assert torch.allclose(law.concentration, batch.concentration2, rtol=1e-4)
    assert torch.allclose(batch.z1.norm(dim=-1), torch.ones(500), atol=1e-5)
    x = torch.randn(20_000, 10, generator=torch.Generator().manual_seed(2))
    kappa = world.posterior(x).concentration.log().numpy()
    quantiles = np.quantile((kappa - math.log(16)) / math.log(4), [0.1, 0.5, 0.9])
    assert np.abs(quantiles - [0.1, 0.5, 0.9]).max() < 0.05  # log-uniform, up to the shape of a network's output


def test_the_offset_sets_how_far_the_aggregate_is_from_uniform():
    x = torch.randn(4_000, 10, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(4)
    lengths = [
        aggregate_uniformity(AcceptanceWorld(offset=offset).posterior(x).sample()).mean_resultant_length
        for offset in (0.0, 0.75, 2.0)
    ]
    assert lengths[0] < 0.1 and 0.4 < lengths[1] < 0.65 and lengths[2] > 0.75


def test_seeds_repeat_and_leave_the_global_state_alone():
    world, state = AcceptanceWorld(dim=4, pair_concentration=3.0), torch.get_rng_state()
    first, again, other = (world.sample(9, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.x1, other.x1)
    stream = world.batches(5, seed=0)
    batches = [next(stream) for _ in range(3)]
    stream.seek(0, 1)
    assert torch.equal(next(stream)[0], batches[1][0])
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(AcceptanceWorld(dim=4, seed=2).direction1, AcceptanceWorld(dim=4, seed=2).direction1)
    assert not torch.equal(AcceptanceWorld(dim=4, seed=2).direction1, AcceptanceWorld(dim=4, seed=3).direction1)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"dim": 1}, "dim"),
        ({"concentration": (0.0, 1.0)}, "concentration"),
        ({"pair_concentration": math.inf}, "pair_concentration"),
        ({"offset": -1.0}, "offset"),
        ({"observed_dim": 0}, "observed_dim"),
    ],
)
def test_wrong_arguments_are_named(arguments, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        AcceptanceWorld(**arguments)
    with pytest.raises(ValueError, match="`num_pairs`"):
        AcceptanceWorld(dim=3, pair_concentration=2.0).sample(0)


def test_posterior_under_a_prior_by_importance_weights():
    """Bayes' rule by brute force, for both views of a shared latent and for the first of two latents."""
    prior = 6.0
    generator = torch.Generator().manual_seed(0)
    for pair in (math.inf, 5.0):
        world = SphereWorld(3, (2.0, 8.0), pair, prior_concentration=prior, observed_dim=8)
        batch = world.sample(4, seed=0)
        z = normalize(torch.randn(300_000, 3, generator=generator, dtype=torch.float64), dim=-1)
        views = ((1, batch.mean_direction1, batch.concentration1), (2, batch.mean_direction2, batch.concentration2))
        for view, mean, kappa in views[: 2 if pair == math.inf else 1]:
            weight = torch.exp(z @ (kappa.unsqueeze(-1) * mean).double().mT + prior * z[:, :1]).mT
            expected = (weight @ z) / weight.sum(-1, keepdim=True)
            posterior = world.posterior(batch, view)
            result = posterior.mean_direction * posterior.mean_resultant_length.unsqueeze(-1)
            # weights are at most e^14 against a mean of about e^10 / 28: s.e. of an entry < 0.004; 5 s.e.
            assert float((result - expected).abs().max()) < 0.02
            flat = world.posterior(batch, view, prior_power=0.0)
            assert torch.equal(flat.mean_direction, mean) and torch.equal(flat.concentration, kappa)
        if pair != math.inf:
            with pytest.raises(ValueError, match="no von Mises-Fisher law"):
                world.posterior(batch, 2)
        else:
            fused = world.fused_posterior(batch)
            product = torch.exp(z @ sum(k.unsqueeze(-1) * m for _, m, k in views).double().mT + prior * z[:, :1]).mT
            expected = (product @ z) / product.sum(-1, keepdim=True)
            result = fused.mean_direction * fused.mean_resultant_length.unsqueeze(-1)
            assert float((result - expected).abs().max()) < 0.02


def test_the_prior_of_the_first_latent():
    z = SphereWorld(3, prior_concentration=6.0, observed_dim=8).sample(5_000, seed=0).z1[:, 0].double().numpy()
    # the cosine of a von Mises-Fisher law at d = 3 is a truncated exponential; false alarm 0.001 over seeds
    pvalue = stats.kstest(z, lambda t: (np.exp(6 * (t - 1)) - math.exp(-12)) / (1 - math.exp(-12))).pvalue
    assert pvalue > 1e-3
    with pytest.raises(ValueError, match="`prior_concentration`"):
        SphereWorld(3, prior_concentration=-1.0)
