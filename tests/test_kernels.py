"""Closed-form pair evidences against quadrature, Monte Carlo and each other."""

import math

import mpmath
import pytest
import torch

from pyro_contrastive.distributions import HypersphericalUniform, PowerSpherical, VonMisesFisher, log_uniform_density
from pyro_contrastive.kernels import VonMisesFisherKernel, moment_matched_log_ratio, shared_latent_log_ratio


def unit(*shape, dtype=torch.float64):
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


def log_partition(dim, kappa):
    """log of Gamma(d/2) (2/k)^(d/2-1) I_(d/2-1)(k), 40 digits."""
    with mpmath.workdps(40):
        order, k = mpmath.mpf(dim) / 2 - 1, mpmath.mpf(kappa)
        if k == 0:
            return mpmath.mpf(0)
        return mpmath.log(mpmath.gamma(order + 1) * (2 / k) ** order * mpmath.besseli(order, k))


@pytest.mark.parametrize("dim", [2, 3, 10, 64, 512])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 3e-5)])
def test_shared_latent_against_mpmath(dim, dtype, tolerance):
    torch.manual_seed(dim)
    kappa = torch.tensor([0.0, 1e-3, 1.0, 30.0, 1e3, 1e4], dtype=dtype)
    q1, q2 = VonMisesFisher(unit(6, dim, dtype=dtype), kappa), VonMisesFisher(unit(6, dim, dtype=dtype), kappa.flip(0))
    got = shared_latent_log_ratio(q1, q2)
    for i in range(6):
        for j in range(6):
            k1, k2 = q1.concentration[i].item(), q2.concentration[j].item()
            mu1, mu2 = q1.mean_direction[i].double(), q2.mean_direction[j].double()
            cosine = float(mu1 / mu1.norm() @ (mu2 / mu2.norm()))
            fused = mpmath.sqrt(mpmath.mpf(k1) ** 2 + mpmath.mpf(k2) ** 2 + 2 * k1 * k2 * mpmath.mpf(cosine))
            want = float(log_partition(dim, fused) - log_partition(dim, k1) - log_partition(dim, k2))
            # the cosine of rounded directions is known to a few eps, and counts k1 k2 / (k1 + k2) times;
            # the three scaled log-partitions are each rounded to eps
            rounded = sum(abs(float(log_partition(dim, k) - k)) for k in (fused, k1, k2))
            slack = torch.finfo(dtype).eps * (4 * k1 * k2 / max(k1 + k2, 1.0) + 2 * rounded)
            assert got[i, j].item() == pytest.approx(want, rel=tolerance, abs=tolerance + slack)


def test_shared_latent_is_the_integral_of_the_product():
    """E_U[R(z|x) R(z|x')] / U^2 by quadrature on the circle: the definition, not the formula."""
    q1 = VonMisesFisher(torch.tensor([[1.0, 0.0]]).double(), torch.tensor([7.0]).double())
    angle = torch.tensor([0.8]).double()
    q2 = VonMisesFisher(torch.stack([angle.cos(), angle.sin()], -1), torch.tensor([3.0]).double())
    t = torch.arange(4096, dtype=torch.float64) * (2 * math.pi / 4096)
    z = torch.stack([t.cos(), t.sin()], -1)
    integral = (q1.log_prob(z) + q2.log_prob(z) - log_uniform_density(2)).exp().mean() * 2 * math.pi
    torch.testing.assert_close(shared_latent_log_ratio(q1, q2)[0, 0], integral.log(), rtol=0, atol=2.5e-11)


def test_moment_matching_is_exact_where_it_should_be():
    """Two point-like posteriors leave the kernel itself, normalised; an uninformative one leaves nothing."""
    torch.manual_seed(0)
    z = unit(5, 10)
    kappa = torch.tensor(20.0).double()
    sharp = VonMisesFisher(z, torch.full((5,), 1e7).double())
    got = moment_matched_log_ratio(sharp, sharp, kappa)
    want = kappa * (z @ z.mT) - float(log_partition(10, 20.0))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-3)
    vague = VonMisesFisher(z, torch.zeros(5).double())
    torch.testing.assert_close(moment_matched_log_ratio(vague, sharp, kappa), torch.zeros(5, 5).double())


def test_moment_matching_against_monte_carlo():
    """d = 10, (k1, k2, kappa) = (16, 64, 20) at cos 1: the exact log ratio is 4.977, moment matching is .246 above."""
    torch.manual_seed(1)
    mu = torch.eye(10, dtype=torch.float64)[:1]
    q1, q2 = VonMisesFisher(mu, torch.tensor([16.0]).double()), VonMisesFisher(mu, torch.tensor([64.0]).double())
    z1, z2 = q1.sample((200_000,)), q2.sample((200_000,))
    log_f = 20 * (z1 * z2).sum(-1) - float(log_partition(10, 20.0))
    sampled = log_f.logsumexp(0) - math.log(200_000)
    got = moment_matched_log_ratio(q1, q2, torch.tensor(20.0).double())
    assert sampled.item() == pytest.approx(4.977, abs=0.01)  # standard error .002
    assert (got - sampled).item() == pytest.approx(0.246, abs=0.01)


@pytest.mark.parametrize("evidence", ["shared", "moment"])
def test_gradients_by_finite_differences(evidence):
    torch.manual_seed(2)
    raw = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    log_kappa = torch.randn(2, 4, dtype=torch.float64).mul(2).requires_grad_()
    pair = torch.tensor(8.0, dtype=torch.float64, requires_grad=True)

    def value(raw, log_kappa, pair):
        mu = torch.nn.functional.normalize(raw, dim=-1)
        q = [VonMisesFisher(mu[j], log_kappa[j].exp()) for j in range(2)]
        return shared_latent_log_ratio(*q) if evidence == "shared" else moment_matched_log_ratio(*q, pair)

    assert torch.autograd.gradcheck(
        lambda *a: value(*a), (raw, log_kappa, pair) if evidence == "moment" else (raw, log_kappa, pair.detach())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_badly_placed_pairs_keep_a_finite_gradient(dtype):
    """Antipodal and equally sure: the fused vector vanishes; the gradient must pull the pair together all the same."""
    mu = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=dtype)
    for kappa in (1e-6, 1.0, 1e3, 1e6):
        other = (-mu).clone().requires_grad_()
        k = torch.full((2,), kappa, dtype=dtype, requires_grad=True)
        q1, q2 = VonMisesFisher(mu, k), VonMisesFisher(other, k)
        for grid in (
            shared_latent_log_ratio(q1, q2),
            moment_matched_log_ratio(q1, q2, torch.tensor(20.0, dtype=dtype)),
        ):
            assert torch.isfinite(grid).all()
            grad_mu, grad_k = torch.autograd.grad(grid.diagonal().sum(), (other, k), retain_graph=True)
            assert torch.isfinite(grad_mu).all() and torch.isfinite(grad_k).all()
            assert (grad_mu * mu).sum() > 0


def test_shared_latent_prefers_the_surer_of_two_good_matches():
    """No temperature: the concentrations weigh each item."""
    mu = torch.eye(8, dtype=torch.float64)[:1].expand(2, 8)
    query = VonMisesFisher(mu[:1], torch.tensor([20.0]).double())
    got = shared_latent_log_ratio(query, VonMisesFisher(mu, torch.tensor([5.0, 50.0]).double()))
    assert got[0, 1] > got[0, 0] > 0


def test_uniform_posteriors_say_nothing():
    z = HypersphericalUniform(5, dtype=torch.float64).sample((3,))
    vague = VonMisesFisher(z, torch.zeros(3).double())
    torch.testing.assert_close(shared_latent_log_ratio(vague, vague), torch.zeros(3, 3).double(), atol=1e-9, rtol=0)


def test_kernel_grid_and_learned_concentration():
    torch.manual_seed(3)
    z1, z2, kernel = (
        unit(2, 4, 5, dtype=torch.float32),
        unit(2, 6, 5, dtype=torch.float32),
        VonMisesFisherKernel(3.0, learn=True),
    )
    torch.testing.assert_close(kernel(z1, z2)[1, 2, 5], 3 * z1[1, 2] @ z2[1, 5])
    assert [name for name, _ in kernel.named_parameters()] == ["concentration_unconstrained"]


def test_other_families_are_refused_with_the_way_out():
    z = unit(2, 3)
    with pytest.raises(TypeError, match="k_sample"):
        shared_latent_log_ratio(PowerSpherical(z, torch.ones(2).double()), PowerSpherical(z, torch.ones(2).double()))
