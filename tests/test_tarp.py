from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from pyro_contrastive import distributions as dist
from pyro_contrastive.diagnostics import _draws as pieces
from pyro_contrastive.diagnostics import coordinates, default_quantities, expected_coverage, sbc, tarp


def points(*shape: int, seed: int = 0) -> np.ndarray:
    z = np.random.default_rng(seed).standard_normal(shape)
    return z / np.linalg.norm(z, axis=-1, keepdims=True)


def vmf(n: int, dim: int, kappa: float, seed: int) -> tuple[dist.VonMisesFisher, torch.Tensor]:
    torch.manual_seed(seed)
    law = dist.VonMisesFisher(torch.from_numpy(points(n, dim, seed=seed)).float(), torch.full((n,), kappa))
    return law, law.sample()


def test_fractions_are_those_of_a_loop_with_geodesic_distances(monkeypatch):
    monkeypatch.setattr(pieces, "_NUMBERS", 200)
    draws, truth, reference = points(40, 12, 3, seed=1), points(12, 3, seed=2), points(12, 3, seed=3)
    result = tarp(draws, truth, references=reference)
    for i in range(12):
        own = np.arccos(truth[i] @ reference[i])
        rank = sum(np.arccos(draws[s, i] @ reference[i]) < own for s in range(40))
        assert rank < result.fractions[i] * 41 < rank + 1
    for level, share in zip(result.levels, result.expected_coverage, strict=True):
        assert share == np.mean(result.fractions <= level)
    assert result.pvalue == stats.kstest(result.fractions, "uniform").pvalue


def test_one_reference_for_all_is_the_test_of_a_coordinate():
    draws, truth = points(30, 50, 4, seed=1), points(50, 4, seed=2)
    result = tarp(draws, truth, references=np.eye(4)[1])
    above = (draws[..., 1] > truth[:, 1]).sum(0)
    np.testing.assert_array_equal(np.floor(result.fractions * 31), above)


def test_areas_are_the_integrals_of_the_curve():
    values = np.random.default_rng(0).beta(2, 3, size=400)
    result = expected_coverage(values, levels=np.linspace(0, 1, 100_001), num_bootstrap=1)
    difference = result.expected_coverage - result.levels
    assert result.bias == pytest.approx(np.trapezoid(difference, result.levels), abs=1e-4)
    upper, lower = (
        np.trapezoid(np.where(half, difference, 0), result.levels)
        for half in (result.levels > 0.5, result.levels <= 0.5)
    )
    assert result.confidence == pytest.approx(upper - lower, abs=1e-4)


def test_band_is_the_bootstrap_of_the_items():
    values = np.random.default_rng(0).uniform(size=300)
    result = expected_coverage(values, num_bootstrap=4000)
    rng = np.random.default_rng(1)
    curves = np.array([(values[rng.integers(0, 300, 300)][:, None] <= result.levels).mean(0) for _ in range(4000)])
    lower, upper = np.quantile(curves, [0.025, 0.975], axis=0)
    np.testing.assert_allclose(result.lower, lower, atol=0.008)
    np.testing.assert_allclose(result.upper, upper, atol=0.008)
    assert np.all(result.lower <= result.expected_coverage) and np.all(result.expected_coverage <= result.upper)
    assert result.lower[-1] == result.upper[-1] == 1.0


def test_the_right_law_is_silent_and_wrong_ones_ring():
    law, truth = vmf(1500, 6, 30.0, seed=1)
    mean = law.mean_direction
    right = tarp(law, truth, num_draws=299)
    assert right.pvalue > 1e-4  # false-alarm rate 1e-4 (fixed seed)
    over, under = (tarp(dist.VonMisesFisher(mean, scale * law.concentration), truth) for scale in (4.0, 0.25))
    assert over.pvalue < 1e-10 and over.confidence < -0.05
    assert under.pvalue < 1e-10 and under.confidence > 0.05
    swapped = tarp(dist.VonMisesFisher(mean.roll(1, -1), law.concentration), truth)
    assert swapped.pvalue < 1e-10
    tilted = torch.nn.functional.normalize(mean + 0.2 * torch.eye(6)[0], dim=-1)
    towards = tarp(dist.VonMisesFisher(tilted, law.concentration), truth, references=np.eye(6)[0])
    assert towards.pvalue < 1e-10 and towards.bias < -0.1  # truths are farther from the pole than draws


def test_a_law_and_its_draws_give_the_same_answer_and_so_does_sbc():
    law, truth = vmf(400, 5, 20.0, seed=2)
    before = torch.get_rng_state()
    result = tarp(law, truth, num_draws=100, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_array_equal(result.fractions, tarp(law, truth, num_draws=100, seed=3).fractions)
    torch.manual_seed(0)
    given = tarp(law.sample(torch.Size([100])), truth, seed=3)
    assert np.corrcoef(given.fractions, result.fractions)[0, 1] > 0.95  # the same references, other draws
    ranks = sbc(lambda x: law, lambda n, seed: (None, truth), num_simulations=400, num_draws=99, batch_size=400,
                quantities=default_quantities(5) | coordinates(1))  # fmt: skip
    assert expected_coverage(ranks.pit["reference"]).pvalue == ranks.pvalues["reference"]


def test_fractions_of_the_uniform_law_on_the_ordinary_sphere():
    # the ball of angle t around any point holds (1 - cos t) / 2 of the sphere
    truth, reference = points(3, 3, seed=5), points(3, 3, seed=6)
    result = tarp(dist.HypersphericalUniform(3).expand((3,)), truth, references=reference, num_draws=40_000)
    area = 0.5 * (1 - (truth * reference).sum(-1))
    np.testing.assert_allclose(result.fractions, area, atol=0.01)  # standard error .0025: 4 of them, rate 2e-4


@pytest.mark.parametrize("dim", [2, 512])
@pytest.mark.parametrize("kappa", [0.0, 1e6])
def test_ends(dim, kappa):
    law, truth = vmf(200, dim, kappa, seed=4)
    assert tarp(law, truth, num_draws=50).pvalue > 1e-4  # false-alarm rate 1e-4 (fixed seed)
    one = tarp(law.sample(torch.Size([1]))[:, :1], truth[:1])
    assert one.fractions.shape == (1,) and 0 <= one.pvalue <= 1


def test_draws_that_all_equal_the_truth_are_ties():
    truth = points(500, 3)
    assert tarp(np.repeat(truth[None], 9, axis=0), truth).pvalue > 1e-4  # false-alarm rate 1e-4 (fixed seed)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tarp(points(5, 4, 3), points(4, 2)), r"`truth` must be \(N, d\)"),
        (lambda: tarp(points(5, 4, 3), points(3, 3)), r"`truth` must be \(N, d\)"),
        (lambda: tarp(points(5, 4, 3), 2 * points(4, 3)), "`truth` must hold unit vectors"),
        (lambda: tarp(2 * points(5, 4, 3), points(4, 3)), "`draws` must hold unit vectors"),
        (lambda: tarp(points(5, 4, 3), np.full((4, 3), np.nan)), "`truth` must be finite"),
        (lambda: tarp(points(5, 4, 3), points(4, 3), references=np.ones(3)), "`references` must hold unit vectors"),
        (lambda: tarp(points(5, 4, 3), points(4, 3), references=points(2, 3)), "`references` must have shape"),
        (lambda: tarp(points(0, 4, 3), points(4, 3)), "at least one draw"),
        (lambda: tarp(points(5, 4, 3), points(4, 3), levels=[0.5, 0.4]), "`levels` must increase"),
        (lambda: expected_coverage([0.5], levels=[1.2]), "`levels` must increase"),
        (lambda: expected_coverage([0.5], num_bootstrap=0), "`num_bootstrap` must be >= 1"),
        (lambda: expected_coverage([]), "non-empty"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
