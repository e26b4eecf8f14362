from __future__ import annotations

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats

from pyro_contrastive import distributions as dist
from pyro_contrastive.diagnostics import calibration as cal
from pyro_contrastive.diagnostics._arrays import geodesic_angle

DIMS = [2, 3, 10, 128]
KAPPAS = [0.0, 0.1, 5.0, 100.0, 1e5]


def exact_cap(angle: float, kappa: float, dim: int) -> float:
    with mpmath.workdps(30):
        mode = float(np.arccos(2 * kappa / (dim - 2 + np.hypot(dim - 2, 2 * kappa)))) if kappa or dim > 2 else 1.0

        def density(t):  # relative to the mode: mpmath judges its quadrature error absolutely
            return (mpmath.sin(t) / mpmath.sin(mode or 1.0)) ** (dim - 2) * mpmath.exp(
                kappa * (mpmath.cos(t) - mpmath.cos(mode))
            )

        width = 1 / np.sqrt(kappa + dim)
        cuts = sorted({0.0, np.pi, angle, *(float(np.clip(mode + k * width, 0, np.pi)) for k in range(-12, 13, 2))})
        parts = [(a, mpmath.quad(density, [a, b])) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
        return float(sum(p for a, p in parts if a < angle) / sum(p for _, p in parts))


def draws(kappa: float, dim: int, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Means uniform on the sphere and one vMF truth around each; scipy's sampler, not ours."""
    rng = np.random.default_rng(seed)
    mean = rng.standard_normal((n, dim))
    mean /= np.linalg.norm(mean, axis=-1, keepdims=True)
    pole = np.eye(dim)[0]
    z = stats.vonmises_fisher(pole, kappa).rvs(n, random_state=rng)
    # Householder reflection that takes the pole to each mean
    axis = pole - mean
    axis /= np.linalg.norm(axis, axis=-1, keepdims=True)
    return mean, z - 2 * (z * axis).sum(-1, keepdims=True) * axis


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("kappa", KAPPAS)
def test_cap_probability_is_the_integral(dim, kappa):
    spread = np.sqrt((dim - 1) / (kappa + dim))
    for angle in np.clip(np.array([0.3, 0.7, 1.0, 1.4]) * spread, 0, np.pi):
        assert cal.cap_probability(angle, kappa, dim) == pytest.approx(
            exact_cap(angle, kappa, dim), rel=1e-9, abs=1e-15
        )


@pytest.mark.parametrize("family", ["vmf", "power_spherical"])
@pytest.mark.parametrize("dim", DIMS)
def test_cap_radius_inverts_cap_probability(dim, family):
    level = np.array([1e-3, 0.05, 0.5, 0.8, 0.95, 0.999])[:, None]
    kappa = np.array(KAPPAS)
    radius = cal.cap_radius(level, kappa, dim, family=family)
    back = cal.cap_probability(radius, kappa, dim, family=family)
    np.testing.assert_allclose(back, np.broadcast_to(level, back.shape), rtol=1e-8)


def test_cap_limits():
    assert cal.cap_probability(0.0, 7.0, 5) == 0.0
    assert cal.cap_probability(np.pi, 7.0, 5) == 1.0
    assert cal.cap_probability(0.1, np.inf, 5) == 1.0
    assert cal.cap_radius(0.5, np.inf, 5) == 0.0
    assert cal.cap_probability(1.0, 0.0, 3) == pytest.approx((1 - np.cos(1.0)) / 2)  # area of a cap in three dimensions
    assert cal.cap_probability(1.0, 0.0, 3, family="power_spherical") == pytest.approx((1 - np.cos(1.0)) / 2)
    assert np.all(np.diff(cal.cap_probability(np.linspace(0, np.pi, 500), 40.0, 10)) >= 0)


def test_the_right_posterior_rings_no_alarm_and_wrong_ones_do():
    # false-alarm rate of the first assertion 1e-4 (fixed seed); the alarms must ring far beyond it
    mean, z = draws(30.0, 10, 2000, seed=1)
    angle = geodesic_angle(mean, z)
    right, over, under = (cal.cap_probability(angle, 30.0 * scale, 10) for scale in (1.0, 4.0, 0.25))
    rotated = cal.cap_probability(geodesic_angle(np.roll(mean, 1, axis=-1), z), 30.0, 10)
    assert cal.uniformity_pvalue(right) > 1e-4
    for pit in (over, under, rotated):
        assert cal.uniformity_pvalue(pit) < 1e-10
    levels = cal.coverage(right)
    assert np.all((levels.lower <= levels.levels) & (levels.levels <= levels.upper))
    assert np.all(cal.coverage(over).upper < levels.levels)
    assert np.all(cal.coverage(under).lower > levels.levels)
    assert np.all(cal.coverage(rotated).upper < levels.levels)


@pytest.mark.parametrize("posterior", ["VonMisesFisher", "PowerSpherical"])
def test_cap_pit_of_own_draws_is_uniform(posterior):
    torch.manual_seed(2)
    mean = torch.nn.functional.normalize(torch.randn(1500, 6), dim=-1)
    q = getattr(dist, posterior)(mean, torch.linspace(1.0, 60.0, 1500))
    # false-alarm rate 1e-4 (fixed seed)
    assert cal.uniformity_pvalue(cal.cap_pit(q, q.sample())) > 1e-4
    assert cal.uniformity_pvalue(cal.cap_pit(q, getattr(dist, posterior)(mean, q.concentration / 4).sample())) < 1e-10


def test_cap_pit_by_ranks_and_of_the_uniform():
    torch.manual_seed(3)
    loc = 3.0 * torch.randn(800, 4)
    q = dist.ProjectedNormal(loc, torch.ones(800, 4))
    before = torch.get_rng_state()
    pit = cal.cap_pit(q, q.sample())
    state = torch.get_rng_state()
    pit = cal.cap_pit(q, truth := q.sample(), num_samples=200)
    assert cal.uniformity_pvalue(pit) > 1e-4  # false-alarm rate 1e-4 (fixed seed)
    np.testing.assert_array_equal(pit, cal.cap_pit(q, truth, num_samples=200))
    torch.set_rng_state(state)
    assert not torch.equal(before, state)
    torch.testing.assert_close(q.sample(), truth)  # cap_pit drew nothing from the caller's stream
    uniform = dist.HypersphericalUniform(4)
    assert cal.uniformity_pvalue(cal.cap_pit(uniform, uniform.sample(torch.Size([800])))) > 1e-4


def test_direction_and_concentration_of_families_without_one():
    mean = torch.nn.functional.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    direction, kappa = cal.direction_and_concentration(
        dist.ProjectedNormal(10 * mean, torch.ones(50, 8)), num_samples=4000
    )
    np.testing.assert_allclose(direction, mean.numpy(), atol=1e-6)
    # a normal of unit variance at distance 10 is close to a vMF of concentration 10^2
    assert np.all(np.abs(kappa / 100 - 1) < 0.1)
    import pyro.distributions as pyro_dist

    direction, kappa = cal.direction_and_concentration(pyro_dist.Delta(mean, event_dim=1))
    np.testing.assert_allclose(direction, mean.numpy(), atol=1e-6)
    assert np.all(np.isinf(kappa))


def test_sbc_ranks_and_rank_pit():
    rng = np.random.default_rng(0)
    draw, truth = rng.standard_normal((99, 3000)), rng.standard_normal(3000)
    ranks = cal.sbc_ranks(draw, truth)
    assert ranks[7] == sum(draw[s, 7] < truth[7] for s in range(99))
    # false-alarm rate 1e-4 (fixed seed)
    assert cal.uniformity_pvalue(cal.rank_pit(ranks, 99)) > 1e-4
    assert cal.uniformity_pvalue(cal.rank_pit(cal.sbc_ranks(draw / 2, truth), 99)) < 1e-10


def test_wilson_interval_against_the_formula():
    result = cal.coverage(np.r_[np.full(40, 0.2), np.full(60, 0.9)], levels=[0.5])
    z, p, n = stats.norm.ppf(0.975), 0.4, 100
    centre, half = (
        (p + z**2 / (2 * n)) / (1 + z**2 / n),
        z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n),
    )
    np.testing.assert_allclose([result.lower[0], result.upper[0]], [centre - half, centre + half])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cal.cap_probability(-0.1, 1.0, 3), "`angle` must be in"),
        (lambda: cal.cap_probability(0.1, -1.0, 3), "`concentration` must be >= 0"),
        (lambda: cal.cap_probability(0.1, float("nan"), 3), "`concentration` must be >= 0"),
        (lambda: cal.cap_probability(0.1, 1.0, 1), "`dim` must be >= 2"),
        (lambda: cal.cap_probability(0.1, 1.0, 3, family="vMF"), '"vmf" or "power_spherical"'),
        (lambda: cal.cap_radius(1.5, 1.0, 3), "`level` must be in"),
        (lambda: cal.coverage([0.5], levels=[0.0]), "`levels` must be in"),
        (lambda: cal.coverage([]), "`pit` must be"),
        (lambda: cal.coverage([float("nan")]), "`pit` must be"),
        (lambda: cal.sbc_ranks(np.zeros((3, 4)), np.zeros(3)), "must be \\(S, N\\)"),
        (lambda: cal.rank_pit([5], 4), "`ranks` must be in 0..4"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_cap_pit_rejects_truths_off_the_sphere_or_of_another_shape():
    q = dist.VonMisesFisher(torch.eye(3), torch.ones(3))
    with pytest.raises(ValueError, match="unit vectors"):
        cal.cap_pit(q, 2 * torch.eye(3))
    with pytest.raises(ValueError, match="posterior's shape"):
        cal.cap_pit(q, torch.eye(3)[:2])


@pytest.mark.parametrize("dim", [2, 3, 512])
@pytest.mark.parametrize("kappa", [0.0, 1e-3, 1e6])
def test_ends(dim, kappa):
    torch.manual_seed(4)
    mean = torch.nn.functional.normalize(torch.randn(300, dim), dim=-1)
    for family in (dist.VonMisesFisher, dist.PowerSpherical):
        q = family(mean, torch.full((300,), kappa))
        pit = cal.cap_pit(q, q.sample())
        assert cal.uniformity_pvalue(pit) > 1e-4  # false-alarm rate 1e-4 (fixed seed)
        one = cal.coverage(pit[:1])
        assert np.all((one.lower >= 0) & (one.lower <= one.empirical) & (one.empirical <= one.upper) & (one.upper <= 1))
        assert 0 <= cal.uniformity_pvalue(pit[:1]) <= 1


def test_point_posteriors_that_are_right_ring_no_alarm_and_wrong_ones_do():
    import pyro.distributions as pyro_dist

    torch.manual_seed(5)
    mean = torch.nn.functional.normalize(torch.randn(400, 6), dim=-1)
    point = pyro_dist.Delta(mean, event_dim=1)
    assert cal.uniformity_pvalue(cal.cap_pit(point, mean, num_samples=99)) > 1e-4  # false-alarm rate 1e-4 (fixed seed)
    assert cal.cap_pit(point, mean.roll(1, 0), num_samples=99).min() > 0.98
    assert np.all(cal.sbc_ranks(np.zeros((1, 3)), np.ones(3)) == 1)
    assert np.all((cal.rank_pit(np.array([0, 1]), 1) > 0) & (cal.rank_pit(np.array([0, 1]), 1) < 1))
