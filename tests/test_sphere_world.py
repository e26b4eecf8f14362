"""The world with a known posterior: that the posterior it states is the right one."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, stats

from pyro_contrastive.data import SphereWorld
from pyro_contrastive.distributions import VonMisesFisher, log_uniform_density
from pyro_contrastive.factors import infonce_log_ratio
from pyro_contrastive.kernels import expected_log_ratio


def small_world(**kwargs):
    return SphereWorld(**{"dim": 3, "observed_dim": 8, **kwargs})


def cosine_cdf(cosine, dim, concentration):
    """P(mu.z <= cosine) under vMF, by quadrature of its one-dimensional density: independent of the library."""

    def density(t):
        return math.exp(concentration * (t - 1)) * (1 - t * t) ** ((dim - 3) / 2)

    return integrate.quad(density, -1, cosine)[0] / integrate.quad(density, -1, 1)[0]


def test_ranks_of_the_truth_under_the_stated_posterior_are_uniform():
    world = SphereWorld()
    batch = world.sample(600, seed=1)
    for z, m, kappa in ((batch.z1, batch.mean_direction1, batch.concentration1),
                        (batch.z2, batch.mean_direction2, batch.concentration2)):  # fmt: skip
        cosine = (z * m).sum(-1).clamp(-1, 1)
        pit = [cosine_cdf(float(c), 10, float(k)) for c, k in zip(cosine, kappa, strict=True)]
        # the seed is fixed; over seeds each of these two tests rings falsely with probability 0.001
        assert stats.kstest(pit, "uniform").pvalue > 1e-3
        wrong = [cosine_cdf(float(c), 10, 2 * float(k)) for c, k in zip(cosine, kappa, strict=True)]
        assert stats.kstest(wrong, "uniform").pvalue < 1e-6  # the check can fail


def test_importance_weights_of_the_generative_model_give_the_stated_posterior():
    """Bayes' rule by brute force: weight uniform prior draws of z1 by p(m1 | z1, kappa1), compare the mean."""
    world = small_world(concentration=(2.0, 8.0))
    batch = world.sample(5, seed=0)
    z = torch.nn.functional.normalize(torch.randn(200_000, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    for i in range(5):
        kappa, m = float(batch.concentration1[i]), batch.mean_direction1[i].numpy().astype(float)
        weight = stats.vonmises_fisher(m / np.linalg.norm(m), kappa).pdf(_unit(z))
        mean = (weight[:, None] * z.numpy()).sum(0) / weight.sum()
        expected = (1 / math.tanh(kappa) - 1 / kappa) * m  # A_3
        # standard error of each entry < 0.004 at 200,000 draws and kappa <= 8; 5 s.e., 15 entries: < 1e-5
        assert np.abs(mean - expected).max() < 0.02
        draws = world.posterior(batch).sample((20_000,))[:, i].mean(0).numpy()
        assert np.abs(draws - expected).max() < 0.02


def _unit(z):
    z = z.numpy().astype(float)
    return z / np.linalg.norm(z, axis=-1, keepdims=True)


def test_fused_posterior_is_the_product_of_the_two():
    world = small_world(pair_concentration=math.inf, concentration=(3.0, 9.0))
    batch = world.sample(4, seed=2)
    assert torch.equal(batch.z1, batch.z2)
    fused = world.fused_posterior(batch)
    grid = torch.nn.functional.normalize(torch.randn(50, 1, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    product = world.posterior(batch, 1).log_prob(grid) + world.posterior(batch, 2).log_prob(grid)
    difference = product - fused.log_prob(grid)  # the log evidence: the same for every z
    assert float(difference.std(0).max()) < 1e-4
    with pytest.raises(ValueError, match="share one latent only"):
        small_world().fused_posterior(batch)


def test_moments_of_latents_pairs_and_concentrations():
    world = SphereWorld()
    batch = world.sample(20_000, seed=3)
    for z in (batch.z1, batch.z2):
        assert torch.allclose(z.norm(dim=-1), torch.ones(()), atol=1e-5)
        # entries have s.d. sqrt(1/10/20000) = 0.0022; 5 s.d., 10 entries: false alarm < 1e-5
        assert float(z.mean(0).abs().max()) < 0.0112
    # E[z1.z2] = A_10(20) = 0.7957 (d = 10: quadrature); s.d. of the cosine < 0.1: 5 s.e. = 0.0035
    expected = integrate.quad(lambda t: t * math.exp(20 * (t - 1)) * (1 - t * t) ** 3.5, -1, 1)[0]
    expected /= integrate.quad(lambda t: math.exp(20 * (t - 1)) * (1 - t * t) ** 3.5, -1, 1)[0]
    assert float((batch.z1 * batch.z2).sum(-1).mean()) == pytest.approx(expected, abs=0.0035)
    log_kappa = torch.cat([batch.concentration1, batch.concentration2]).log().numpy()
    scaled = (log_kappa - math.log(16)) / math.log(4)
    assert stats.kstest(scaled, "uniform").pvalue > 1e-3  # false alarm 0.001 over seeds
    assert abs(np.corrcoef(batch.concentration1, batch.concentration2)[0, 1]) < 0.04  # 5 s.e.


def test_views_determine_direction_and_concentration():
    """The network is injective: invert both layers by hand and find what went in."""
    world = SphereWorld(dim=4, observed_dim=9, seed=3)
    batch = world.sample(64, seed=0)
    hidden = torch.linalg.solve(world.weight2, batch.x1.mT).mT
    hidden = torch.where(hidden < 0, hidden / 0.2, hidden) - world.bias
    features = torch.linalg.lstsq(world.weight1, hidden.mT).solution.mT
    assert torch.allclose(features[:, :4] / 2.0, batch.mean_direction1, atol=1e-4)
    assert torch.allclose((features[:, 4] / 2.0 + math.log(32)).exp(), batch.concentration1, rtol=1e-3)
    assert torch.allclose(world.observe(batch.mean_direction1, batch.concentration1), batch.x1)


def test_injective_views_and_other_laws():
    batch = small_world(concentration=math.inf).sample(6, seed=0)
    assert torch.equal(batch.mean_direction1, batch.z1) and torch.equal(batch.mean_direction2, batch.z2)
    assert bool(batch.concentration1.isinf().all()) and bool(batch.x1.isfinite().all())
    posterior = small_world(concentration=math.inf).posterior(batch, 2)
    assert torch.equal(posterior.sample(), batch.z2)
    assert torch.equal(small_world(concentration=7.0).sample(3, seed=0).concentration2, torch.full((3,), 7.0))
    gamma = small_world(concentration=dist.Gamma(20.0, 1.0)).sample(4_000, seed=0).concentration1
    assert float(gamma.mean()) == pytest.approx(20.0, abs=5 * math.sqrt(20 / 4_000))  # 5 s.e.


def test_it_is_a_pyro_model_with_one_site_per_field():
    world = small_world()
    trace = pyro.poutine.trace(world).get_trace(7)
    batch = trace.nodes["_RETURN"]["value"]
    for field, value in batch._asdict().items():
        assert torch.equal(trace.nodes[field]["value"], value)
    trace.compute_log_prob()
    assert trace.nodes["mean_direction1"]["log_prob"].shape == (7,)
    expected = VonMisesFisher(batch.z1, batch.concentration1).log_prob(batch.mean_direction1)
    assert torch.allclose(trace.nodes["mean_direction1"]["log_prob"], expected)
    with pyro.poutine.trace() as outer:
        world.sample(2, seed=0)
    assert set(outer.trace.nodes) <= {"_INPUT", "_RETURN"}


def test_seeds_repeat_and_leave_the_global_state_alone():
    world = small_world()
    state = torch.get_rng_state()
    first, again, other = world.sample(5, seed=1), world.sample(5, seed=1), world.sample(5, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.z1, other.z1)
    stream = world.batches(4, seed=9)
    batches = [next(stream) for _ in range(4)]
    stream.seek(0, 2)
    assert torch.equal(next(stream)[1], batches[2][1])
    assert not torch.equal(batches[0][0], batches[1][0])
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(small_world(seed=4).weight1, small_world(seed=4).weight1)
    assert not torch.equal(small_world(seed=4).weight1, small_world(seed=5).weight1)
    torch.manual_seed(0)
    unseeded = world.sample(5)
    assert not torch.equal(unseeded.z1, world.sample(5).z1)


def test_the_whole_world_is_in_its_state_dict():
    world, other = small_world(seed=1), small_world(seed=2)
    other.load_state_dict(world.state_dict())
    assert torch.equal(world.sample(3, seed=0).x1, other.sample(3, seed=0).x1)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dim": 1}, ">= 2, got 1"),
        ({"observed_dim": 3}, r">= dim \+ 1 = 4.*got 3"),
        ({"pair_concentration": 0.0}, "must be > 0 .*got 0.0"),
        ({"pair_concentration": math.nan}, "must be > 0 .*got nan"),
        ({"concentration": (64.0, 16.0)}, "0 < low < high < inf"),
        ({"concentration": (1.0, math.inf)}, "0 < low < high < inf"),
        ({"concentration": -1.0}, "> 0 .*got -1.0"),
        ({"concentration": dist.Gamma(torch.ones(3), 1.0)}, "empty batch and"),
        ({"concentration": "high"}, "a pair .*got 'high'"),
        ({"seed": -1}, ">= 0"),
    ],
)
def test_errors_say_the_rule_and_what_was_got(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small_world(**kwargs)


def test_errors_of_methods():
    world = small_world()
    with pytest.raises(ValueError, match="`num_pairs` must be >= 1, got 0"):
        world.sample(0)
    with pytest.raises(ValueError, match="1 or 2, got 3"):
        world.posterior(world.sample(2, seed=0), view=3)
    with pytest.raises(ValueError, match="`batch_size` must be >= 1, got 0"):
        world.batches(0)
    with pytest.raises(ValueError, match="`epoch` must be 0"):
        world.batches(2).seek(1)


def test_double_precision_world():
    batch = small_world().double().sample(4, seed=0)
    assert all(value.dtype == torch.float64 for value in batch)


@pytest.mark.parametrize(("dim", "pair"), [(2, 3.0), (10, 20.0), (64, 128.0)])
def test_information_of_injective_views_is_that_of_the_latents(dim, pair):
    """Minus the entropy of a step against the uniform law; 5 standard errors, exceeded once in two million."""
    step = VonMisesFisher(torch.eye(dim)[0], torch.tensor(pair))
    expected = float(-step.entropy() - log_uniform_density(dim))
    for concentration in (math.inf, 1e7):
        information, error = SphereWorld(dim, concentration, pair).mutual_information()
        assert information == pytest.approx(expected, abs=5 * error + 1e-3) and 0 < error < 0.05


def test_no_infonce_score_exceeds_the_information():
    """Nor does the true density ratio among many candidates fall short of it by much."""
    world = SphereWorld(5, (4.0, 16.0), 10.0)
    information, error = world.mutual_information()
    batch = world.sample(1_000, seed=3)
    ratios = expected_log_ratio(world.posterior(batch, 1), world.posterior(batch, 2), 10.0)
    score = infonce_log_ratio(ratios)
    spread = float(score.std()) / math.sqrt(1_000)
    assert information - 0.1 < float(score.mean()) < information + 5 * math.hypot(error, spread)
    assert SphereWorld(5, 0.01, 10.0).mutual_information()[0] == pytest.approx(0, abs=1e-5)
    assert SphereWorld(5, math.inf, math.inf).mutual_information() == (math.inf, 0.0)


def test_information_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"uniform latents, got prior_concentration=2.0"):
        SphereWorld(3, prior_concentration=2.0).mutual_information()
    with pytest.raises(ValueError, match="`num_pairs` must be >= 2, got 1"):
        SphereWorld(3).mutual_information(1)
