from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats

from pyro_contrastive.data import SphereWorld
from pyro_contrastive.diagnostics import calibration, partner
from pyro_contrastive.distributions import HypersphericalUniform, PowerSpherical, VonMisesFisher

LEVELS = (0.05, 0.5, 0.95, 0.999)


def exact_probability(angles: list[float], kappa1: float, kappa2: float, dim: int) -> list[float]:
    """The convolution integrated by mpmath with 20 digits: sin^(d-2) times I_v(r) / r^v, with the pieces around it."""
    with mpmath.workdps(20):
        order = mpmath.mpf(dim) / 2 - 1

        def density(t):
            r = mpmath.sqrt(mpmath.mpf(kappa1) ** 2 + kappa2**2 + 2 * kappa1 * kappa2 * mpmath.cos(t))
            bessel = mpmath.besseli(order, r) * mpmath.exp(-kappa1 - kappa2) / r**order
            return bessel * mpmath.sin(t) ** (dim - 2)

        spread, centre = (angles[-2] - angles[0]) / 3.3, angles[1]
        steps = [centre + sign * k * spread for k in (1, 2, 3, 5, 8, 14) for sign in (-1, 1)]
        cuts = sorted({min(max(t, 0.0), math.pi) for t in [*steps, *angles]})
        scale = density(centre)
        pieces = [
            (a, mpmath.quad(lambda t: density(t) / scale, [a, b])) for a, b in zip(cuts[:-1], cuts[1:], strict=True)
        ]
        total = sum(mass for _, mass in pieces)
        return [float(sum(mass for a, mass in pieces if a < angle) / total) for angle in angles]


@pytest.mark.parametrize("dim", [2, 3, 10, 64, 512])
@pytest.mark.parametrize(("kappa1", "kappa2"), [(1e-3, 1.0), (16.0, 64.0), (1e6, 3.0)])
def test_radius_holds_the_stated_probability(dim, kappa1, kappa2):
    radius = partner.partner_radius(LEVELS, kappa1, kappa2, dim)
    np.testing.assert_allclose(exact_probability(radius.tolist(), kappa1, kappa2, dim), LEVELS, atol=1e-11)
    np.testing.assert_allclose(partner.partner_probability(radius, kappa1, kappa2, dim), LEVELS, atol=1e-12)
    np.testing.assert_allclose(partner.partner_radius(LEVELS, kappa2, kappa1, dim), radius, rtol=1e-12)


@pytest.mark.parametrize("dim", [2, 10, 64])
def test_partner_of_infinite_concentration_is_the_latent(dim):
    kappa = np.array([0.5, 20.0, 1e3])
    np.testing.assert_allclose(
        partner.partner_radius(0.95, kappa, 1e13, dim), calibration.cap_radius(0.95, kappa, dim), rtol=1e-8
    )


def test_law_is_that_of_two_scipy_draws():
    # false-alarm rate 1e-4 (fixed seed); the alarm must ring for another concentration
    rng, dim, n = np.random.default_rng(0), 3, 4_000
    z = np.eye(dim)[0]
    first, second = (stats.vonmises_fisher(z, kappa).rvs(n, random_state=rng) for kappa in (2.0, 6.0))
    angle = np.arccos(np.clip((first * second).sum(-1), -1, 1))
    assert calibration.uniformity_pvalue(partner.partner_probability(angle, 2.0, 6.0, dim)) > 1e-4
    assert calibration.uniformity_pvalue(partner.partner_probability(angle, 2.0, 12.0, dim)) < 1e-8


@pytest.mark.parametrize("dim", [2, 10, 512])
@pytest.mark.parametrize(("low", "high"), [(16.0, 64.0), (20.0, 20.0), (1.0, 1000.0)])
def test_interpolated_radii_are_the_solved_ones(dim, low, high):
    rng = np.random.default_rng(1)
    kappa1, kappa2 = np.exp(rng.uniform(np.log(low), np.log(high), (2, 40)))
    kappa1[0], kappa2[0] = low, high
    radii = partner.PartnerRadii(0.95, kappa1, kappa2, dim)
    versine = np.exp(radii.rows(kappa1) @ radii.columns(kappa2).T)
    solved = partner.partner_radius(0.95, kappa1[:, None], kappa2, dim)
    np.testing.assert_allclose(versine, 2 * np.sin(0.5 * solved) ** 2, rtol=1e-8)


def test_interpolation_says_when_it_cannot():
    with pytest.raises(ValueError, match="span too much to interpolate.*split"):
        partner.PartnerRadii(1 - 1e-8, [1e-3, 1e6], [1e-3, 1e6], 2)


@pytest.mark.parametrize("dim", [3, 10])
def test_partners_of_a_known_world_are_reached_as_often_as_stated(dim):
    # false-alarm rates: 1e-4 for the uniformity test, 6e-5 (4 standard errors) for each of 3 levels; fixed seed
    batch = (world := SphereWorld(dim, pair_concentration=math.inf)).sample(2500, seed=3)
    first, second = world.posterior(batch, 1), world.posterior(batch, 2)
    pit = partner.partner_pit(first, second)
    assert calibration.uniformity_pvalue(pit) > 1e-4
    for level in (0.5, 0.8, 0.95):
        error = math.sqrt(level * (1 - level) / len(pit))
        assert abs((pit <= level).mean() - level) < 4 * error
    wrong = VonMisesFisher(first.mean_direction, 1.5 * first.concentration)
    assert calibration.uniformity_pvalue(partner.partner_pit(wrong, second)) < 1e-10
    # the same caps without the partner's width hold far fewer
    cap = calibration.cap_pit(first, second.mean_direction)
    assert (cap <= 0.95).mean() < 0.8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: partner.partner_probability(-0.1, 1.0, 1.0, 3), "`angle` must be in"),
        (lambda: partner.partner_probability(0.1, 0.0, 1.0, 3), "`concentration` must be > 0 and finite, got 0"),
        (
            lambda: partner.partner_probability(0.1, 1.0, math.inf, 3),
            "`partner_concentration` must .* use `cap_radius`",
        ),
        (lambda: partner.partner_probability(0.1, 1.0, math.nan, 3), "got nan"),
        (lambda: partner.partner_radius(1.0, 1.0, 1.0, 3), "`level` must be in"),
        (lambda: partner.partner_radius(0.5, 1.0, 1.0, 1), "`dim` must be >= 2"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_partner_pit_takes_von_mises_fisher_posteriors_of_one_shape():
    q = VonMisesFisher(torch.eye(3), torch.ones(3))
    with pytest.raises(TypeError, match="`partners` must be VonMisesFisher posteriors, got HypersphericalUniform"):
        partner.partner_pit(q, HypersphericalUniform(3))
    with pytest.raises(TypeError, match="`queries` must be"):
        partner.partner_pit(PowerSpherical(torch.eye(3), torch.ones(3)), q)
    with pytest.raises(ValueError, match="one batch and event shape"):
        partner.partner_pit(q, VonMisesFisher(torch.eye(3)[:2], torch.ones(2)))
