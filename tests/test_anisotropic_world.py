"""The anisotropic world: its sampler against quadrature and importance weights, its posterior, its views."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn.functional import normalize

from pyro_contrastive import diagnostics
from pyro_contrastive.data import AnisotropicWorld, bimodal_precision, linear_precision
from pyro_contrastive.distributions import VonMisesFisher
from pyro_contrastive.ops.anisotropic import sample_anisotropic
from pyro_contrastive.ops.random import seeded

FALSE_ALARM = 1e-4  # of each test of fit, over seeds


def draw(centre, precision, num, seed=0):
    with seeded(seed):
        return sample_anisotropic(torch.tensor(centre).expand(num, -1), torch.tensor(precision)).double().numpy()


def log_density(u, centre, precision):
    """Unnormalised, with respect to the surface."""
    return -((u - np.asarray(centre)) ** 2 @ np.asarray(precision))


def pvalue_on_the_circle(u, centre, precision):
    """Kolmogorov-Smirnov test of the angles against the integrated density."""
    grid = np.linspace(-math.pi, math.pi, 20_001)
    density = np.exp(log_density(np.stack([np.cos(grid), np.sin(grid)], -1), centre, precision))
    cumulative = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    angles = np.arctan2(u[:, 1], u[:, 0])
    return stats.kstest(angles, lambda a: np.interp(a, grid, cumulative / cumulative[-1])).pvalue


@pytest.mark.parametrize("precision", [[0.3, 0.1], [12.5, 2.5], [1.0, 60.0], [50.0, 0.0], [0.0, 0.0]])
@pytest.mark.parametrize("angle", [0.1, 0.8, 4.0])
def test_on_the_circle_angles_have_the_distribution_function_of_the_quadrature(precision, angle):
    centre = [math.cos(angle), math.sin(angle)]
    assert pvalue_on_the_circle(draw(centre, precision, 20_000), centre, precision) > FALSE_ALARM


def test_on_the_circle_another_precision_is_seen():
    u = draw([0.6, 0.8], [12.5, 2.5], 20_000)
    assert pvalue_on_the_circle(u, [0.6, 0.8], [12.5, 6.0]) < FALSE_ALARM
    assert pvalue_on_the_circle(u, [0.6, 0.8], [16.0, 2.5]) < FALSE_ALARM


@pytest.mark.parametrize("precision", [[0.5, 0.2, 0.1], [12.5, 12.5, 2.5], [1.0, 20.0, 60.0], [50.0, 50.0, 0.0]])
@pytest.mark.parametrize("centre", [[0.0, 0.0, 1.0], [0.48, 0.64, 0.6], [0.0, -0.8, 0.6]])
def test_on_the_sphere_counts_are_those_of_the_quadrature(precision, centre):
    """Chi-square over 12 x 24 cells of equal area, in (height, longitude)."""
    num, fine = 20_000, 20
    u = draw(centre, precision, num)
    height = (np.arange(12 * fine) + 0.5) / (6 * fine) - 1
    longitude = (np.arange(24 * fine) + 0.5) * 2 * math.pi / (24 * fine) - math.pi
    radius = np.sqrt(1 - height**2)[:, None]
    points = np.stack(
        [radius * np.cos(longitude), radius * np.sin(longitude), np.broadcast_to(height[:, None], (240, 480))], -1
    )
    density = np.exp(log_density(points, centre, precision))
    expected = density.reshape(12, fine, 24, fine).sum((1, 3)) / density.sum() * num
    found, *_ = np.histogram2d(
        u[:, 2], np.arctan2(u[:, 1], u[:, 0]), bins=[12, 24], range=[[-1, 1], [-math.pi, math.pi]]
    )
    rare = expected < 5
    observed = np.append(found[~rare], found[rare].sum())
    predicted = np.append(expected[~rare], max(expected[rare].sum(), 1e-9))
    if predicted[-1] < 5:
        observed, predicted = observed[:-1], predicted[:-1]
        predicted *= observed.sum() / predicted.sum()
    assert stats.chisquare(observed, predicted, sum_check=False).pvalue > FALSE_ALARM


@pytest.mark.parametrize("precision", [bimodal_precision(10), bimodal_precision(10, 50.0, 1.0), linear_precision(10)])
def test_moments_in_ten_dimensions_are_those_of_importance_weights(precision):
    """The reference: Gaussians in R^10 restricted to the sphere, by weights on the direction and a thin radius."""
    lam = precision.double().numpy()
    rng = np.random.default_rng(0)
    z = rng.normal(size=10)
    z /= np.linalg.norm(z)
    c = z + rng.normal(size=(150_000, 10)) / np.sqrt(2 * lam)
    r = np.linalg.norm(c, axis=1)
    u = c / r[:, None]
    log_weight = log_density(u, z, lam) - log_density(c, z, lam) - 0.5 * ((r - 1) / 0.1) ** 2 - 9 * np.log(r)
    weight = np.exp(log_weight - log_weight.max())
    weight /= weight.sum()
    drawn = draw(z.tolist(), lam.tolist(), 40_000)

    def moments(x):
        return np.concatenate([x, x**2, x * np.roll(x, 1, axis=1), ((x @ z) ** 3)[:, None]], axis=1)

    expected = weight @ moments(u)
    error_reference = np.sqrt(weight**2 @ (moments(u) - expected) ** 2)
    error = np.sqrt(error_reference**2 + moments(drawn).var(axis=0) / len(drawn))
    assert 1 / (weight**2).sum() > 10_000  # the reference is worth that many draws
    # 31 moments, 5 standard errors: false alarm < 2e-5
    assert np.all(np.abs(moments(drawn).mean(axis=0) - expected) < 5 * error)


def test_equal_precisions_give_a_von_mises_fisher_law_of_twice_the_concentration():
    z = np.eye(5)[1]
    cosine = draw(z.tolist(), [4.0] * 5, 20_000) @ z
    grid = np.linspace(-1, 1, 4_001)
    density = np.exp(8.0 * grid) * np.maximum(1 - grid**2, 0) ** 1.0  # d = 5: exponent (d - 3) / 2
    cumulative = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    assert stats.kstest(cosine, lambda t: np.interp(t, grid, cumulative / cumulative[-1])).pvalue > FALSE_ALARM


def test_precisions_far_apart_and_many_dimensions_are_drawn_without_end_of_patience():
    for precision in (bimodal_precision(10, 1_000.0, 1.0), torch.full((64,), 5.0), torch.full((3,), 1e6)):
        u = sample_anisotropic(normalize(torch.randn(200, len(precision)), dim=-1), precision)
        assert torch.allclose(u.norm(dim=-1), torch.ones(200), atol=1e-5)
    with pytest.raises(RuntimeError, match="no draw was accepted"):
        sample_anisotropic(torch.full((1, 3), math.nan), torch.ones(3))


def test_views_are_what_the_network_makes_of_what_the_latents_show():
    world = AnisotropicWorld([[8.0, 4.0, 1.0], [1.0, 4.0, 8.0]], negative_precision=[1.0, 1.0, 0.0], num_negatives=2)
    batch = world.sample(50, seed=1)
    assert batch.x.shape == batch.z.shape == (5, 50, 3)  # anchor, two families, two hard negatives
    assert torch.equal(batch.mean_direction, batch.z) and bool(batch.concentration.isinf().all())
    assert torch.equal(batch.x2, world.observe(batch.z2, batch.concentration[1]))
    assert all(torch.equal(a, b) for a, b in zip(world.views(batch), batch.x, strict=True))
    first, second = batch.z[1] - batch.z1, batch.z[2] - batch.z1
    assert first[:, 0].std() < first[:, 2].std() and second[:, 2].std() < second[:, 0].std()
    identity = AnisotropicWorld(linear_precision(3), generator="identity").sample(7, seed=1)
    assert torch.equal(identity.x, identity.z)


@pytest.mark.parametrize("dim", [4, 10])
def test_the_network_is_invertible_and_well_conditioned(dim):
    world = AnisotropicWorld(linear_precision(dim), seed=3)
    batch = world.sample(200, seed=0)
    x = batch.x1.double()
    for weight in reversed(world.weights.double()):
        x = x @ torch.linalg.inv(weight)
        x = torch.where(x < 0, x / 0.2, x)
    x = torch.where(x < 0, x * 0.2, x)  # there is no rectifier before the first layer
    assert torch.allclose(x, batch.z1.double(), atol=1e-4)
    condition = torch.linalg.cond(world.weights)
    assert float(condition.max()) < 6 and torch.allclose(world.weights.norm(dim=-2), torch.ones(3, dim))


def test_ambiguous_views_have_the_stated_posterior():
    world = AnisotropicWorld(linear_precision(4), concentration=(8.0, 32.0))
    batch = world.sample(4_000, seed=0)
    assert batch.x.shape == (2, 4_000, 5)
    assert float(batch.concentration.min()) >= 8.0 and float(batch.concentration.max()) <= 32.0
    posterior = world.posterior(batch)
    wrong = VonMisesFisher(posterior.mean_direction, 1.2 * posterior.concentration)
    assert diagnostics.uniformity_pvalue(diagnostics.cap_pit(posterior, batch.z1)) > FALSE_ALARM
    assert diagnostics.uniformity_pvalue(diagnostics.cap_pit(wrong, batch.z1)) < FALSE_ALARM
    injective = AnisotropicWorld(linear_precision(4))
    again = injective.sample(5, seed=0)
    assert torch.equal(injective.posterior(again).mean, again.z1)


def test_seeds_repeat_and_leave_the_global_state_alone():
    world, state = AnisotropicWorld(linear_precision(3)), torch.get_rng_state()
    first, again, other = (world.sample(9, seed=seed).x for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    stream = world.batches(5, seed=0)
    batches = [next(stream) for _ in range(3)]
    stream.seek(0, 1)
    assert torch.equal(next(stream)[1], batches[1][1])
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(world.weights, AnisotropicWorld(linear_precision(3), seed=1).weights)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": [1.0]}, r"`precision` must be \(d,\) or \(K, d\) with d >= 2, got shape \(1, 1\)"),
        ({"precision": [[1.0, 2.0], [1.0]]}, "`precision` must have rows of one length"),
        ({"precision": [1.0, -1.0]}, "`precision` must be >= 0 and finite"),
        ({"negative_precision": [1.0]}, r"`negative_precision` must be \(2,\), got shape \(1,\)"),
        ({"num_negatives": 0}, "`num_negatives` must be an integer >= 1, got 0"),
        ({"concentration": (2.0, math.inf)}, "`concentration` must be > 0"),
        ({"concentration": 0.0}, "`concentration` must be > 0"),
        ({"generator": "none"}, "`generator` must be 'network' or 'identity'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        AnisotropicWorld(**{"precision": [1.0, 2.0], **arguments})


def test_wrong_calls_are_named():
    with pytest.raises(ValueError, match="`num_items` must be >= 1"):
        AnisotropicWorld([1.0, 2.0]).sample(0)
    with pytest.raises(ValueError, match=r"got shapes \(2,\) and \(4, 3\)"):
        sample_anisotropic(torch.ones(4, 3), torch.ones(2))
    with pytest.raises(ValueError, match="must be >= 0 and finite"):
        sample_anisotropic(torch.ones(4, 2), torch.tensor([1.0, math.nan]))
