"""The authors' generator: its posteriors, the law of partners, its seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from pyro_contrastive.data import PairWorld


def small_world(**kwargs):
    return PairWorld(**{"dim": 3, "smoothing_steps": 100, "candidates": 2_048, **kwargs})


WORLD = small_world()


def test_concentrations_span_the_stated_range_and_directions_are_spread():
    world = PairWorld(seed=4, smoothing_steps=500)
    batch = world.sample(1_000, seed=0)
    assert torch.allclose(batch.mean_direction1.norm(dim=-1), torch.ones(1_000), atol=1e-5)
    # set on 1,000 other inputs to span 16 to 32: the middle of 1,000 new ones lies inside, their ends near the ends
    low, *_, high = batch.concentration1.sort().values[50:-50]
    assert 16 < low < 20 and 24 < high < 32
    cosine = batch.mean_direction1 @ batch.mean_direction1.mT
    assert cosine.min() <= 0.5
    assert batch.mean_direction1.mean(0).norm() < 0.25  # spread out: 0.08 to 0.13 at four seeds after 5,000 steps
    assert batch.x1.min() >= 0 and batch.x1.max() <= 1


def test_the_truth_is_a_function_of_the_view():
    batch = WORLD.sample(50, seed=1)
    for x, mean, kappa in (
        (batch.x1, batch.mean_direction1, batch.concentration1),
        (batch.x2, batch.mean_direction2, batch.concentration2),
    ):
        again = WORLD.truth(x)
        assert torch.allclose(again[0], mean, atol=1e-5) and torch.allclose(again[1], kappa, rtol=1e-4)


def test_latents_follow_the_stated_posterior():
    batch = WORLD.sample(2_000, seed=2)
    cosine = (batch.z1 * batch.mean_direction1).sum(-1).double().numpy()
    kappa = batch.concentration1.double().numpy()
    # in three dimensions the cosine has a density proportional to exp(kappa t): a closed distribution function
    pit = np.expm1(kappa * (cosine + 1)) / np.expm1(2 * kappa)
    assert stats.kstest(pit, "uniform").pvalue > 1e-3  # false alarm over seeds 0.001
    wrong = np.expm1(2 * kappa * (cosine + 1)) / np.expm1(4 * kappa)
    assert stats.kstest(wrong, "uniform").pvalue < 1e-6  # the check can fail


def log_normaliser(kappa):
    """log C_3(0)/C_3(kappa) by quadrature."""
    return math.log(integrate.quad(lambda t: 0.5 * math.exp(kappa * t), -1, 1)[0])


@pytest.mark.parametrize("partners", ["kernel", "labelled"])
def test_partners_follow_the_stated_law(partners):
    """Against rejection one candidate at a time, in NumPy: the mean cosine of pairs, and how it is spread."""
    kappa = 4.0
    world = small_world(pair_concentration=kappa, partners=partners)
    batch = world.sample(4_000, seed=3)
    got = (batch.z1 * batch.z2).sum(-1).double().numpy()

    with torch.random.fork_rng():
        torch.manual_seed(5)
        x = torch.rand(60_000, world.observed_dim)
        z = world.latent(*world.truth(x)).double().numpy()
    uniform = np.random.default_rng(0).random(60_000)
    constant = log_normaliser(kappa)
    expected, reference = [], 0
    for candidate in range(3_000, 60_000):  # the first 3,000 rows are the references
        cosine = float(z[reference] @ z[candidate])
        if partners == "kernel":
            accept = math.exp(kappa * (cosine - 1))
        else:
            accept = 1 / (1 + math.exp(constant - kappa * cosine))
        if uniform[candidate] < accept:
            expected.append(cosine)
            reference += 1
        if reference == 3_000:
            break
    assert len(expected) == 3_000
    # Kolmogorov-Smirnov of two samples; pairs share a pool of 2,048, so the nominal false-alarm rate, 0.001 over seeds,
    # is a lower bound
    assert stats.ks_2samp(got, expected).pvalue > 1e-3
    other = (batch.z1 * batch.z2.roll(1, 0)).sum(-1).double().numpy()
    assert stats.ks_2samp(other, expected).pvalue < 1e-12  # the check can fail


def test_partners_are_inputs_in_their_own_right():
    """A stream gives the same law as `sample`, and its references recur in other batches only."""
    stream = WORLD.batches(64, seed=0)
    batches = [next(stream) for _ in range(64)]
    x1, x2 = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    for first, _ in batches:
        assert len(first.unique(dim=0)) == 64
    batch = WORLD.sample(4_096, seed=7)
    for mine, other in ((x1, batch.x1), (x2, batch.x2)):
        for column in range(3):
            assert stats.ks_2samp(mine[:, column], other[:, column]).pvalue > 1e-4  # 6 tests: false alarm < 0.001


@pytest.mark.parametrize("family", ["normal", "laplace"])
def test_other_families_scatter_as_stated(family):
    world = small_world(family=family)
    mean, kappa = torch.tensor([0.0, 0.0, 1.0]), torch.tensor(2_000.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = world.latent(mean, kappa, 20_000)
    assert torch.allclose(draws.norm(dim=-1), torch.ones(20_000), atol=1e-5)
    # at this concentration the tangent coordinates are the noise itself: variance 1/kappa, or 2/kappa^2 for Laplace
    variance = 1 / 2_000 if family == "normal" else 2 / 2_000**2
    spread = draws[:, :2].double().square().mean().item() / variance
    assert spread == pytest.approx(1.0, abs=0.06)  # 5 s.e. at 40,000 values of kurtosis <= 6 is 0.056


def test_injective_world():
    batch = small_world(concentration=math.inf).sample(6, seed=0)
    assert torch.equal(batch.z1, batch.mean_direction1) and torch.equal(batch.z2, batch.mean_direction2)
    assert bool(batch.concentration1.isinf().all())


def test_seeds_repeat_and_leave_the_global_state_alone():
    state = torch.get_rng_state()
    first, again, other = WORLD.sample(5, seed=1), WORLD.sample(5, seed=1), WORLD.sample(5, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.x1, other.x1)
    stream = WORLD.batches(4_096, seed=9)
    batches = [next(stream) for _ in range(10)]
    assert stream.batches_per_chunk == 8
    for position in (9, 2, 3):
        stream.seek(0, position)
        assert torch.equal(next(stream)[1], batches[position][1])
    worlds = [small_world(seed=s) for s in (4, 4, 5)]
    assert torch.equal(worlds[0].direction[0].weight, worlds[1].direction[0].weight)
    assert not torch.equal(worlds[0].direction[0].weight, worlds[2].direction[0].weight)
    assert torch.equal(state, torch.get_rng_state())
    assert not any(p.requires_grad for p in WORLD.parameters())
    torch.manual_seed(0)
    unseeded = WORLD.sample(5)
    assert not torch.equal(unseeded.x1, WORLD.sample(5).x1)


def test_the_whole_world_is_in_its_state_dict():
    other = small_world(seed=2)
    other.load_state_dict(WORLD.state_dict())
    assert torch.equal(WORLD.sample(3, seed=0).z2, other.sample(3, seed=0).z2)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dim": 1}, "`dim` must be >= 2, got 1"),
        ({"candidates": 1}, "`candidates` must be >= 2, got 1"),
        ({"smoothing_steps": -1}, ">= 0, got -1"),
        ({"observed_dim": 0}, ">= 1, got 0"),
        ({"concentration": (64.0, 16.0)}, "0 < low < high < inf"),
        ({"concentration": 16.0}, "0 < low < high < inf"),
        ({"pair_concentration": math.inf}, "> 0 and finite, got inf"),
        ({"pair_concentration": math.nan}, "> 0 and finite, got nan"),
        ({"family": "cauchy"}, "`family` must be one of vmf, normal, laplace, got 'cauchy'"),
        ({"partners": "all"}, "`partners` must be one of kernel, labelled, got 'all'"),
        ({"seed": -1}, ">= 0"),
    ],
)
def test_errors_say_the_rule_and_what_was_got(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small_world(**kwargs)


def test_errors_of_methods_and_of_an_unlucky_network():
    with pytest.raises(ValueError, match="`num_pairs` must be >= 1, got 0"):
        WORLD.sample(0)
    with pytest.raises(ValueError, match="`batch_size` must be >= 1, got 0"):
        WORLD.batches(0)
    with pytest.raises(RuntimeError, match="raise `smoothing_steps`, got 0"):
        PairWorld(dim=32, smoothing_steps=0)


def test_double_precision_world():
    batch = small_world(smoothing_steps=20).double().sample(4, seed=0)
    assert all(value.dtype == torch.float64 for value in batch)
