"""The quantile map behind the draws, deterministically: probabilities before and after it must agree in both tails."""

import numpy as np
import pytest
import torch
from scipy import special

from pyro_contrastive.distributions import PowerSpherical, VonMisesFisher
from pyro_contrastive.ops import radial

NODES, WEIGHTS = np.polynomial.legendre.leggauss(400)
QUANTILES = np.array([1e-6, 1e-3, 0.03, 0.2, 0.5, 0.8, 0.97, 0.999, 1 - 1e-6])
FAMILIES = {"VonMisesFisher": radial.VON_MISES_FISHER, "PowerSpherical": radial.POWER_SPHERICAL}


def log_density(family, dim, kappa, angle):
    """Unnormalised log density of the angle: the law times sin^(d-2)."""
    log_f = -2 * kappa * np.sin(angle / 2) ** 2 if family == "VonMisesFisher" else 2 * kappa * np.log(np.cos(angle / 2))
    return log_f + (dim - 2) * np.log(np.sin(angle))


def angle_mass(family, dim, kappa, low, high, at):
    """Mass of the angles between low and high relative to the density at an angle: Gauss-Legendre."""
    angle = (high + low) / 2 + (high - low) / 2 * NODES
    excess = log_density(family, dim, kappa, angle) - log_density(family, dim, kappa, at)
    return float(np.sum(WEIGHTS * np.exp(excess)) * (high - low) / 2)


def angles_of(family, dim, kappa, s):
    """Angle of the draw that a tangent noise vector of squared length s becomes."""
    mu = torch.zeros(len(s), dim, dtype=torch.float64)
    mu[:, 0] = 1
    noise = torch.zeros_like(mu)
    noise[:, 1] = torch.as_tensor(np.sqrt(s))
    x = radial.draw(FAMILIES[family], mu, torch.full((len(s),), kappa, dtype=torch.float64), noise).numpy()
    return np.arctan2(x[:, 1], x[:, 0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dim", [2, 3, 4, 10, 64, 512])
@pytest.mark.parametrize("kappa", [0.0, 1e-3, 0.7, 10.0, 300.0, 1e6])
def test_probabilities_agree_in_both_tails(family, dim, kappa):
    n = dim - 1
    s = 2 * special.gammaincinv(n / 2, QUANTILES)
    spread = 1 / np.sqrt(kappa + n)
    for angle, s_value in zip(angles_of(family, dim, kappa, s), s, strict=True):
        inner = angle_mass(family, dim, kappa, max(0.0, angle - 12 * spread), angle, angle)
        outer = angle_mass(family, dim, kappa, angle, min(np.pi, angle + 12 * spread), angle)
        below, above = special.gammainc(n / 2, s_value / 2), special.gammaincc(n / 2, s_value / 2)
        got, want = (inner, below) if below < 0.5 else (outer, above)
        assert got / (inner + outer) == pytest.approx(want, rel=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dim", [2, 3, 10, 256])
def test_slopes_are_those_of_the_map(family, dim):
    """Gradients of a fixed draw against central differences of the draw itself."""
    law = {"VonMisesFisher": VonMisesFisher, "PowerSpherical": PowerSpherical}[family]
    torch.manual_seed(0)
    weights = torch.randn(dim, dtype=torch.float64)
    raw = torch.randn(4, dim, dtype=torch.float64, requires_grad=True)
    log_kappa = torch.tensor([-1.0, 1.0, 3.0, 6.0], dtype=torch.float64, requires_grad=True)

    def value(raw, log_kappa):
        torch.manual_seed(1)
        draw = law(torch.nn.functional.normalize(raw, dim=-1), log_kappa.exp()).rsample((3,))
        return draw @ weights

    assert torch.autograd.gradcheck(value, (raw, log_kappa), eps=1e-5, atol=2e-6, rtol=1e-4)


def test_infinite_concentration_draws_the_mean_direction():
    mu = torch.nn.functional.normalize(torch.randn(5, 7), dim=-1)
    kappa = torch.full((5,), float("inf"), requires_grad=True)
    x = radial.draw(radial.VON_MISES_FISHER, mu, kappa, torch.randn(5, 7))
    torch.testing.assert_close(x, mu)
    (grad,) = torch.autograd.grad(x.sum(), kappa)
    assert torch.equal(grad, torch.zeros(5))


def test_nan_comes_out_as_nan():
    mu = torch.eye(3)[:2]
    kappa = torch.tensor([float("nan"), 1.0])
    x = radial.draw(radial.VON_MISES_FISHER, mu, kappa, torch.randn(2, 3))
    assert x[0].isnan().all() and torch.isfinite(x[1]).all()


def test_large_and_small_batches_agree():
    """More draws than one cache-sized chunk give the same numbers as the same draws in pieces."""
    torch.manual_seed(2)
    size = radial._CHUNK + 1000
    mu = torch.nn.functional.normalize(torch.randn(size, 3), dim=-1)
    kappa, noise = 50 * torch.rand(size), torch.randn(size, 3)
    together = radial.draw(radial.VON_MISES_FISHER, mu, kappa, noise.clone())
    pieces = [
        radial.draw(radial.VON_MISES_FISHER, mu[i], kappa[i], noise[i].clone())
        for i in torch.arange(size).split(20_000)
    ]
    torch.testing.assert_close(together, torch.cat(pieces), rtol=0, atol=0)


def test_draws_cannot_be_differentiated_twice_in_silence():
    kappa = torch.tensor([5.0], requires_grad=True)
    x = VonMisesFisher(torch.tensor([[1.0, 0.0, 0.0]]), kappa).rsample()
    (first,) = torch.autograd.grad(x.sum(), kappa, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(first.sum(), kappa)
