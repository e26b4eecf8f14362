"""The shipped priors against densities written out by hand, and the aggregates against loops."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from scipy import special, stats
from torch import nn

from pyro_contrastive import diagnostics, guides, models, priors
from pyro_contrastive.aggregates import FullData, MemoryBank, aggregate_log_density, law_like, law_parameters
from pyro_contrastive.data import SphereWorld
from pyro_contrastive.distributions import HypersphericalUniform, VonMisesFisher
from pyro_contrastive.factors import recognition_factor
from pyro_contrastive.kernels import VonMisesFisherKernel

DIM = 3
AREA = math.log(4 * math.pi)


class Uniform(nn.Module):
    """The least a model needs of a guide."""

    dim = DIM

    def posterior(self, x):
        return HypersphericalUniform(DIM, (len(x),))


def points(*shape):
    return HypersphericalUniform(DIM, dtype=torch.float64).sample(shape)


def log_vmf(mean, kappa, z):
    return float(stats.vonmises_fisher(mean.numpy() / np.linalg.norm(mean.numpy()), kappa).logpdf(z.numpy()))


def density(prior, *latents):
    return models.RPM(Uniform(), prior).log_prior(*latents)


# --- priors -----------------------------------------------------------------------------------------------------------


def test_chain_is_a_product_of_von_mises_fisher_laws():
    z = points(4, 5)
    got = density(priors.VonMisesFisherChain(DIM, 4, concentration=7.0).double(), *z)
    for i in range(5):
        want = -AREA + sum(log_vmf(z[j, i], 7.0, z[j + 1, i]) for j in range(3))
        assert got[i].item() == pytest.approx(want, abs=1e-5)  # kappa, as a parameter, was made in float32


def test_clusters_sum_the_cluster_out():
    """P(z1, z2, z3) = sum_k pi_k prod_j vMF(z_j; m_k, kappa_k), which the sequential form must give exactly."""
    prior = priors.Clusters(DIM, 4, 3, concentration=6.0).double()
    with torch.no_grad():
        prior.logits.copy_(torch.tensor([0.0, 1.0, -1.0, 0.5]))
        prior.centres.mul_(3.0)  # their length does not matter
    z = points(3, 5)
    got = density(prior, *z)
    log_pi = special.log_softmax(prior.logits.detach().numpy())
    for i in range(5):
        each = [
            log_pi[k]
            + sum(log_vmf(prior.centres[k].detach(), prior.concentration[k].item(), z[j, i]) for j in range(3))
            for k in range(4)
        ]
        assert got[i].item() == pytest.approx(special.logsumexp(each), abs=1e-9)
    share = prior.responsibilities(*z).exp()
    torch.testing.assert_close(share.sum(-1), torch.ones(5, dtype=torch.float64))


def test_clusters_draws_follow_their_cluster():
    """Two far clusters: the views of an item come from one and the same."""
    prior = priors.Clusters(DIM, 2, concentration=200.0)
    with torch.no_grad():
        prior.centres.copy_(torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]]))
        with pyro.plate("pairs", 400):
            z1, z2 = prior()
    assert torch.equal(z1[:, 0] > 0, z2[:, 0] > 0)
    assert 120 < (z1[:, 0] > 0).sum() < 280  # 8 standard deviations of a fair coin


def test_dynamics_are_the_joint_gaussian():
    """Density of the whole path from its covariance, assembled block by block."""
    transition, sigma, steps = np.array([[1.0, 1.0], [0.0, 0.9]]), np.array([0.3, 0.1]), 4
    prior = priors.LinearDynamics(2, steps, transition=torch.as_tensor(transition), noise=sigma.tolist()).double()
    blocks = np.zeros((2 * steps, 2 * steps))
    marginal = np.eye(2)
    for t in range(steps):
        later = marginal
        for s in range(t, steps):
            blocks[2 * s : 2 * s + 2, 2 * t : 2 * t + 2] = later
            blocks[2 * t : 2 * t + 2, 2 * s : 2 * s + 2] = later.T
            later = transition @ later
        marginal = transition @ marginal @ transition.T + np.diag(sigma**2)
    z = torch.randn(steps, 6, 2, dtype=torch.float64)
    want = stats.multivariate_normal(np.zeros(2 * steps), blocks).logpdf(z.transpose(0, 1).reshape(6, -1).numpy())
    np.testing.assert_allclose(density(prior, *z).numpy(), want, rtol=1e-5)


def test_dynamics_learn_how_a_sequence_moves():
    """A fit to rotating points finds a rotation: the phase advances by the true angle (or its mirror image)."""
    angle = 0.7
    generator = torch.Generator().manual_seed(0)
    phase = 2 * math.pi * torch.rand(512, generator=generator)
    data = [
        torch.stack([(phase + t * angle).cos(), (phase + t * angle).sin()], -1)
        + 0.05 * torch.randn(512, 2, generator=generator)
        for t in range(3)
    ]
    guide = guides.Normal(nn.Linear(2, 8), 2, batch_norm=False)
    model = models.RPM(guide, priors.LinearDynamics(2, 3, noise=0.3))
    objective = Trace_ELBO(max_plate_nesting=1)(model, guide)
    optimizer = torch.optim.Adam(objective.parameters(), lr=3e-2)
    for step in range(150):
        rows = torch.arange(step * 128, (step + 1) * 128) % 512
        loss = objective(*(x[rows] for x in data)) / 128
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    eigenvalues = torch.linalg.eigvals(model.prior.transition.detach())
    assert eigenvalues.imag.abs().max() > 0.3  # it turns
    assert eigenvalues.angle().abs().max().item() == pytest.approx(angle, abs=0.1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: priors.VonMisesFisherChain(1), "`dim` of a prior must be an integer >= 2, got 1"),
        (lambda: priors.VonMisesFisherChain(3, 1), "`num_views` of a prior must be an integer >= 2, got 1"),
        (lambda: priors.VonMisesFisherChain(3, concentration=math.inf), "positive and finite, got inf"),
        (lambda: priors.Independent(3, 1), "`num_views` of a prior"),
        (lambda: priors.Clusters(3, 0), "`num_clusters` of a prior must be an integer >= 1, got 0"),
        (lambda: priors.Clusters(3, 2, concentration=-1.0), "positive and finite, got -1.0"),
        (lambda: priors.LinearDynamics(2, 1), "`num_views` of a prior"),
        (lambda: priors.LinearDynamics(2, 3, transition=torch.eye(3)), r"must be a \(2, 2\) matrix for dim=2, got \(3"),
        (lambda: priors.LinearDynamics(2, 3, noise=0.0), "one positive finite number or 2 of them, got 0.0"),
        (lambda: priors.LinearDynamics(2, 3, noise=[1.0] * 3), "one positive finite number or 2 of them, got"),
        (lambda: priors.FlexibleCritic(0), "`dim` of a prior must be an integer >= 1, got 0"),
    ],
)
def test_arguments_of_priors_are_checked(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_infonce_prior_needs_a_kernel():
    with pytest.raises(TypeError, match=r"must be called as kernel\(z1, z2\), got <class"):
        priors.InfoNCE(VonMisesFisherKernel)


def test_flexible_critic_finds_the_mutual_information():
    """Latents of a vMF pair at kappa 20, d = 3: I = log(kappa / sinh kappa) + kappa A(kappa), about 2.0 nats.

    The estimate is a lower bound in expectation. The last 40 batches of 512 give it to about .01.
    """
    kappa = 20.0
    information = math.log(kappa / math.sinh(kappa)) + kappa * (1 / math.tanh(kappa) - 1 / kappa)
    kernel = priors.optimal(DIM, hidden=64, features=32).kernel
    optimizer, values = torch.optim.Adam(kernel.parameters(), lr=3e-3), []
    for _ in range(300):
        z1 = HypersphericalUniform(DIM).sample((512,))
        z2 = VonMisesFisher(z1, torch.tensor(kappa)).sample()
        estimate = (kernel(z1, z2).log_softmax(-1).diagonal() + math.log(512)).mean()
        optimizer.zero_grad()
        (-estimate).backward()
        optimizer.step()
        values.append(estimate.item())
    found = sum(values[-40:]) / 40
    assert information - 0.15 < found < information + 0.05


# --- the Gaussian guide -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
def test_normal_guide_is_a_gaussian_of_every_shape(full):
    guide = guides.Normal(nn.Linear(4, 8), 3, full=full)
    posterior = guide.posterior(torch.randn(5, 4))
    assert posterior.batch_shape == (5,) and posterior.event_shape == (3,)
    scale = torch.linalg.cholesky(posterior.covariance_matrix) if full else posterior.base_dist.scale.diag_embed()
    z = posterior.sample()
    for i in range(5):
        mean, factor = posterior.mean[i].detach().double(), scale[i].detach().double()
        want = stats.multivariate_normal(mean.numpy(), (factor @ factor.T).numpy()).logpdf(z[i].numpy())
        assert posterior.log_prob(z)[i].item() == pytest.approx(float(want), abs=1e-4)
    correlated = (torch.tril(scale, -1).abs() > 0).any().item()
    assert correlated == full
    posterior.rsample().sum().backward()
    assert all(p.grad is not None for p in guide.parameters())


def test_normal_guide_takes_one_dimension_and_no_less():
    assert guides.Normal(nn.Linear(4, 8), 1, full=True).posterior(torch.randn(5, 4)).event_shape == (1,)
    with pytest.raises(ValueError, match=r"`dim` must be an integer >= 1 \(latents in R\^dim\), got 0"):
        guides.Normal(nn.Linear(4, 8), 0)


# --- aggregates -------------------------------------------------------------------------------------------------------


def gaussian(n):
    return guides.Normal(nn.Linear(4, 8), 2).posterior(torch.randn(n, 4))


def full_gaussian(n):
    return guides.Normal(nn.Linear(4, 8), 2, full=True).posterior(torch.randn(n, 4))


def spherical(family):
    return lambda n: family(nn.Linear(4, 8), DIM).posterior(torch.randn(n, 4))


FAMILIES = [gaussian, full_gaussian] + [
    spherical(f) for f in (guides.VonMisesFisher, guides.PowerSpherical, guides.ProjectedNormal)
]
each_family = pytest.mark.parametrize("family", FAMILIES, ids=range(len(FAMILIES)))


@each_family
def test_aggregate_is_the_average_density(family):
    law = family(6)
    z = law.sample()
    each = torch.stack(
        [law_like(law, {k: v[m : m + 1] for k, v in law_parameters(law).items()}).log_prob(z) for m in range(6)]
    )
    torch.testing.assert_close(aggregate_log_density(z, law), each.logsumexp(0) - math.log(6), rtol=0, atol=2e-5)


@each_family
def test_factor_over_the_batch_as_aggregate_is_the_factor_itself(family):
    law = family(6)
    with pyro.plate("pairs", 6):
        z = law.sample((2,))
        values = [recognition_factor(f"x{i}", z, law, aggregate=a) for i, a in enumerate((None, law))]
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-4)


@each_family
def test_bank_keeps_the_newest_items_first_and_detached(family):
    bank, laws = MemoryBank(7), [family(3) for _ in range(4)]
    for law in laws:
        together = bank(1, law, None)
    parameters, newest = law_parameters(together), {}
    for name, value in parameters.items():
        newest[name] = torch.cat([law_parameters(law)[name] for law in laws[::-1]])
        # this batch, and the seven items that were in the bank when it came
        torch.testing.assert_close(value, newest[name][:10])
        kept = bank.state_dict()[f"{name}_1"]
        torch.testing.assert_close(kept, newest[name][:7].detach())
        assert not kept.requires_grad and value.requires_grad
    assert together.batch_shape == (10,) and f"{name}_2" not in bank.state_dict()
    again = bank(1, laws[-1], None)  # a second particle of the same step
    torch.testing.assert_close(law_parameters(again)[name][:7], newest[name][:7])
    assert again.batch_shape == (7,)


def test_bank_learns_in_training_only():
    bank = MemoryBank(8)
    law = VonMisesFisher(torch.eye(3), torch.ones(3))
    bank.eval()
    bank(1, law, None)
    bank.train()
    with torch.no_grad():
        bank(1, law, None)
    assert not bank.state_dict()
    bank(1, law, None)
    other = MemoryBank(8)
    other.load_state_dict(bank.state_dict())
    assert other.state_dict().keys() == {"mean_direction_1", "concentration_1"}
    other.load_state_dict({})
    assert not other.state_dict()


def test_bank_and_full_data_check_their_arguments():
    for size in (0, 2.5):
        with pytest.raises(ValueError, match="`size` of a memory bank must be an integer >= 1"):
            MemoryBank(size)
    with pytest.raises(ValueError, match="got none"):
        FullData()
    x, guide = torch.randn(9, 6), guides.VonMisesFisher(nn.Linear(6, 12), DIM)
    with pytest.raises(
        ValueError, match="got a guide with batch norm in training mode; build it with batch_norm=False"
    ):
        models.RPM(guide, aggregate=FullData(x, x))(x, x)
    guide.eval()
    with pytest.raises(ValueError, match="holds 1 views, and the model has a view 2"):
        models.RPM(guide, aggregate=FullData(x))(x, x)


def test_aggregate_bias_is_half_the_chi_square_over_n():
    """The expansion of the docstring, where it holds: kappa 3 on S^2.

    The z-scores of the biases stay below 5 but for 1 run in 1e6; the next order is chi^4 / N^2.
    """
    kappa = 3.0
    chi_square = kappa / math.tanh(kappa) - 1  # E[R(z|x) / U(z)] = 4 pi times the integral of R^2 = kappa coth(kappa)
    world = SphereWorld(dim=3, concentration=kappa)
    found = diagnostics.aggregate_bias(world.posterior(world.sample(8_192, seed=0)), sizes=(32, 128))
    for size, bias, error in zip(found.size[:2], found.bias, found.error, strict=False):
        assert error < 0.003 < chi_square / 2 / 32
        assert bias == pytest.approx(-chi_square / (2 * size), abs=5 * error + chi_square**2 / size**2)
    assert found.bias[-1] == 0.0


@pytest.mark.parametrize("sizes", [(1,), (4, 33), ()])
def test_aggregate_bias_checks_its_sizes(sizes):
    law = VonMisesFisher(points(32), torch.ones(32, dtype=torch.float64))
    with pytest.raises(ValueError, match="integers in 2..32"):
        diagnostics.aggregate_bias(law, sizes=sizes)
    with pytest.raises(ValueError, match=r"batch shape \(M,\)"):
        diagnostics.aggregate_bias(VonMisesFisher(points(), torch.tensor(1.0, dtype=torch.float64)))
