"""The divergences of projected normals that are registered for the names of the uniform law."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import kl_divergence

from pyro_contrastive import distributions as dist
from pyro_contrastive import guides
from pyro_contrastive.nets import mlp

F64 = torch.float64
DIM = 3
GRID = [
    (d, length, scale)
    for d in (8, 32, 128)
    for length, scale in (
        (1.0, 1.0), (math.sqrt(d), 1.0), (3 * math.sqrt(d), 1.0), (1.0, 0.1), (1.0, 1 / math.sqrt(d)), (10.0, 0.1)
    )
]  # fmt: skip


def law(d, length, scale, copies=250):
    generator = torch.Generator().manual_seed(d)
    direction = torch.nn.functional.normalize(torch.randn(d, generator=generator, dtype=F64), dim=0)
    sigma = scale * torch.exp(0.15 * torch.randn(d, generator=generator, dtype=F64))
    return dist.ProjectedNormal((length * direction).expand(copies, d), sigma.expand(copies, d))


@pytest.mark.parametrize(("d", "length", "scale"), GRID)
def test_registered_divergences_are_ordered(d, length, scale):
    """exact - 3 s.e. <= scale-free <= Gaussian: were the first two equal, one seed in 40 would ring, in 18 cases."""
    q = law(d, length, scale)
    exact = kl_divergence(q, dist.HypersphericalUniform(d))
    scale_free = kl_divergence(q, dist.ScaleFreeUniform(d))[0]
    gaussian = kl_divergence(q, dist.AmbientUniform(d))[0]
    assert exact.mean() - 3 * exact.std() / math.sqrt(len(exact)) <= scale_free <= gaussian
    reference = torch.distributions.kl_divergence(
        torch.distributions.MultivariateNormal(q.loc[0], torch.diag(q.scale_diag[0] ** 2)),
        torch.distributions.MultivariateNormal(torch.zeros(d, dtype=F64), torch.eye(d, dtype=F64)),
    )
    torch.testing.assert_close(gaussian, reference)


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_only_the_gaussian_divergence_sees_the_scale(factor):
    q = law(8, 2.0, 0.5, copies=1)
    scaled = dist.ProjectedNormal(factor * q.loc, factor * q.scale_diag)
    values = [[kl_divergence(p, prior(8)).item() for prior in (dist.ScaleFreeUniform, dist.AmbientUniform)]
              for p in (q, scaled)]  # fmt: skip
    assert values[0][0] == pytest.approx(values[1][0], rel=1e-12)
    assert abs(values[0][1] - values[1][1]) > 1
    # its minimum over the scale is the scale-free one
    best = math.sqrt(8 / (q.loc.square().sum() + q.scale_diag.square().sum()).item())
    optimum = dist.ProjectedNormal(best * q.loc, best * q.scale_diag)
    assert kl_divergence(optimum, dist.AmbientUniform(8)).item() == pytest.approx(values[0][0], rel=1e-12)


def test_divergence_of_the_uniform_law_is_zero():
    q = dist.ProjectedNormal(torch.zeros(2, 5), torch.full((5,), 3.0))
    assert kl_divergence(q, dist.ScaleFreeUniform(5)).abs().max() < 1e-6
    assert kl_divergence(q, dist.AmbientUniform(5)).min() > 1


@pytest.mark.parametrize("prior", [dist.ScaleFreeUniform, dist.AmbientUniform])
def test_uniform_laws_are_the_uniform_law(prior):
    uniform, expanded = prior(4), prior(4).expand((3, 2))
    assert type(expanded) is prior and expanded.rsample().shape == (3, 2, 4)
    z = uniform.sample((5,))
    torch.testing.assert_close(uniform.log_prob(z), dist.HypersphericalUniform(4).log_prob(z))
    vmf = dist.VonMisesFisher(z, torch.full((5,), 7.0))
    torch.testing.assert_close(kl_divergence(vmf, uniform), kl_divergence(vmf, dist.HypersphericalUniform(4)))
    q = dist.ProjectedNormal(torch.ones(6, 1, 4), torch.ones(4))
    assert kl_divergence(q, prior(4).expand((6, 2))).shape == (6, 2)
    with pytest.raises(ValueError, match="same sphere"):
        kl_divergence(q, prior(5))


def test_free_length_changes_no_law():
    torch.manual_seed(0)
    plain = guides.ProjectedNormal(mlp([6, 16]), DIM)
    free = guides.ProjectedNormal(mlp([6, 16]), DIM, free_length=True)
    free.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(30, 6)
    p, q = plain.posterior(x), free.posterior(x)
    z = p.sample()
    torch.testing.assert_close(q.log_prob(z), p.log_prob(z), rtol=1e-4, atol=1e-4)
    second_moment = (q.loc.square() + q.scale_diag.square()).sum(-1)
    assert second_moment.mean().item() == pytest.approx(DIM, rel=0.1)  # where the Gaussian divergence is least
