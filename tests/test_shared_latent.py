"""The closed evidence of a shared latent against quadrature, Gaussian algebra and enumeration; the interior bound."""

from __future__ import annotations

import itertools
import math

import mpmath as mp
import numpy as np
import pyro
import pyro.distributions as pyro_dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from scipy import stats
from torch import Tensor, nn

from pyro_contrastive import factors, guides
from pyro_contrastive.distributions import HypersphericalUniform, PowerSpherical, VonMisesFisher
from pyro_contrastive.distributions.exponential import exponential_family
from pyro_contrastive.kernels import shared_latent_log_ratio
from pyro_contrastive.shared_latent import (
    fused_posterior,
    interior_bound,
    shared_latent_factor,
    shared_latent_log_evidence,
)

F64 = torch.float64


def directions(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return nn.functional.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


def vmf(size: int, dim: int, low: float = 0.5, high: float = 30.0, dtype: torch.dtype = F64) -> VonMisesFisher:
    return VonMisesFisher(directions(size, dim, dtype=dtype), torch.empty(size, dtype=dtype).uniform_(low, high))


def diagonal(size: int, dim: int, widest: float = 0.9) -> pyro_dist.Distribution:
    scale = torch.empty(size, dim, dtype=F64).uniform_(0.2, widest)
    return pyro_dist.Normal(torch.randn(size, dim, dtype=F64), scale).to_event(1)


def full(size: int, dim: int, widest: float = 0.9) -> pyro_dist.Distribution:
    rotation = torch.linalg.qr(torch.randn(size, dim, dim, dtype=F64))[0]
    variance = torch.empty(size, 1, dim, dtype=F64).uniform_(0.1, widest)
    covariance = rotation * variance @ rotation.mT
    return pyro_dist.MultivariateNormal(torch.randn(size, dim, dtype=F64), 0.5 * (covariance + covariance.mT))


def categorical(size: int, classes: int) -> pyro_dist.Distribution:
    return pyro_dist.Categorical(logits=1.5 * torch.randn(size, classes, dtype=F64))


FAMILIES = {"vmf": vmf, "diagonal": diagonal, "full": full, "categorical": categorical}
PRIORS = {
    "vmf": lambda dim: VonMisesFisher(directions(dim), torch.tensor(2.0, dtype=F64)),
    "diagonal": lambda dim: pyro_dist.Normal(torch.randn(dim, dtype=F64), 1 + torch.rand(dim, dtype=F64)).to_event(1),
    "full": lambda dim: pyro_dist.MultivariateNormal(
        torch.randn(dim, dtype=F64), 2 * torch.eye(dim, dtype=F64) + 0.3 * torch.ones(dim, dim, dtype=F64)
    ),
    "categorical": lambda dim: pyro_dist.Categorical(logits=torch.randn(dim, dtype=F64)),
}


def formula(posteriors: list, prior: pyro_dist.Distribution) -> Tensor:
    """The closed form as it is written, with its cancellations."""
    family = exponential_family(posteriors[0])
    eta = [family.natural(q) for q in posteriors]
    eta0, extra, phi = family.natural(prior), len(posteriors) - 1, family.log_partition
    return phi(sum(eta) - extra * eta0) - sum(phi(e) for e in eta) + extra * phi(eta0)


# --- the evidence -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("views", [2, 3, 4, 5])
@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_evidence_by_the_chain_rule_is_the_formula(name, with_prior, views):
    posteriors = [FAMILIES[name](7, 4) for _ in range(views)]
    prior = PRIORS[name](4) if with_prior else None
    stated = prior or exponential_family(posteriors[0]).standard(torch.ones((), dtype=F64))
    torch.testing.assert_close(
        shared_latent_log_evidence(posteriors, prior), formula(posteriors, stated), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize("views", [2, 3, 5])
def test_circle_evidence_is_an_integral(views, with_prior):
    laws = [vmf(1, 2) for _ in range(views)]
    prior = PRIORS["vmf"](2) if with_prior else HypersphericalUniform(2, dtype=F64)

    def scipys(law, angle: np.ndarray) -> np.ndarray:
        if isinstance(law, HypersphericalUniform):
            return np.full_like(angle, 1 / (2 * np.pi))
        mean = law.mean_direction.reshape(2)
        return stats.vonmises(law.concentration.item(), loc=math.atan2(mean[1], mean[0])).pdf(angle)

    angle = np.linspace(-np.pi, np.pi, 4001)[:-1]  # a periodic integrand: the rectangle rule converges geometrically
    p = scipys(prior, angle)
    value = np.log((p * np.prod([scipys(law, angle) / p for law in laws], axis=0)).mean() * 2 * np.pi)
    assert shared_latent_log_evidence(laws, prior).item() == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize("views", [2, 3])
def test_sphere_evidence_is_an_integral(views, with_prior):
    laws = [vmf(1, 3, high=12.0) for _ in range(views)]
    prior = PRIORS["vmf"](3) if with_prior else HypersphericalUniform(3, dtype=F64)
    nodes, weights = np.polynomial.legendre.leggauss(80)
    azimuth = np.linspace(0, 2 * np.pi, 161)[:-1]
    c, a = np.meshgrid(nodes, azimuth, indexing="ij")
    z = np.stack([np.sqrt(1 - c**2) * np.cos(a), np.sqrt(1 - c**2) * np.sin(a), c], -1)

    def scipys(law) -> np.ndarray:
        if isinstance(law, HypersphericalUniform):
            return np.full(z.shape[:-1], 1 / (4 * np.pi))
        mean = law.mean_direction.reshape(3).numpy()
        return stats.vonmises_fisher(mean, law.concentration.item()).pdf(z)

    p = scipys(prior)
    integrand = p * np.prod([scipys(law) / p for law in laws], axis=0)
    value = np.log((weights @ integrand).sum() * (azimuth[1] - azimuth[0]))
    assert shared_latent_log_evidence(laws, prior).item() == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("views", [2, 4])
def test_gaussian_evidence_is_that_of_the_joint_normal_law(views):
    """z ~ N(m, S0), x_j = z + noise: the recognition laws are exact, and so is log N(x) - sum log N(x_j)."""
    dim, prior = 3, PRIORS["full"](3)
    noise = [full(1, dim).covariance_matrix[0] for _ in range(views)]
    s0, m0 = prior.covariance_matrix, prior.mean
    x = [m0 + 1.5 * torch.randn(dim, dtype=F64) for _ in range(views)]
    posteriors = []
    for xj, nj in zip(x, noise, strict=True):
        gain = s0 @ torch.linalg.inv(s0 + nj)
        covariance = s0 - gain @ s0
        posteriors.append(
            pyro_dist.MultivariateNormal((m0 + gain @ (xj - m0))[None], 0.5 * (covariance + covariance.T)[None])
        )
    joint = np.kron(np.ones((views, views)), s0.numpy())
    for j, nj in enumerate(noise):
        joint[j * dim : (j + 1) * dim, j * dim : (j + 1) * dim] += nj.numpy()
    value = stats.multivariate_normal(np.tile(m0.numpy(), views), joint).logpdf(torch.cat(x).numpy())
    value -= sum(
        stats.multivariate_normal(m0.numpy(), (s0 + nj).numpy()).logpdf(xj) for xj, nj in zip(x, noise, strict=True)
    )
    assert shared_latent_log_evidence(posteriors, prior).item() == pytest.approx(value, abs=1e-9)


def test_full_gaussians_agree_with_diagonal_ones():
    views = [diagonal(6, 3) for _ in range(3)]
    same = [pyro_dist.MultivariateNormal(q.mean, torch.diag_embed(q.variance)) for q in views]
    torch.testing.assert_close(shared_latent_log_evidence(same), shared_latent_log_evidence(views))
    for one, other in ((fused_posterior(same), fused_posterior(views)),):
        torch.testing.assert_close(one.mean, other.mean)
        torch.testing.assert_close(one.variance, other.variance)


@pytest.mark.parametrize("views", [2, 3, 5])
def test_categorical_evidence_is_a_sum(views):
    posteriors, prior = [categorical(4, 5) for _ in range(views)], PRIORS["categorical"](5)
    for n in range(4):
        total = 0.0
        for k in range(5):
            term = prior.probs[k].item()
            for q in posteriors:
                term *= q.probs[n, k].item() / prior.probs[k].item()
            total += term
        assert shared_latent_log_evidence(posteriors, prior)[n].item() == pytest.approx(math.log(total), abs=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_order_of_the_views_does_not_matter(name):
    posteriors = [FAMILIES[name](5, 3) for _ in range(4)]
    first = shared_latent_log_evidence(posteriors)
    for order in ([3, 1, 0, 2], [1, 3, 2, 0]):
        torch.testing.assert_close(shared_latent_log_evidence([posteriors[j] for j in order]), first)


# --- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("dim", [2, 3, 64])
def test_views_that_say_nothing_change_nothing(dim, dtype):
    sure, nothing = (
        vmf(3, dim, dtype=dtype),
        VonMisesFisher(directions(3, dim, dtype=dtype), torch.zeros(3, dtype=dtype)),
    )
    zero = torch.zeros(3, dtype=dtype)
    torch.testing.assert_close(shared_latent_log_evidence([nothing] * 3), zero, rtol=0, atol=1e-5)
    torch.testing.assert_close(shared_latent_log_evidence([sure, nothing, nothing]), zero, rtol=0, atol=1e-5)
    pair = shared_latent_log_evidence([sure, sure])
    torch.testing.assert_close(shared_latent_log_evidence([nothing, sure, nothing, sure]), pair, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [2, 3, 10])
@pytest.mark.parametrize("kappa", [1e-3, 1.0, 1e3, 1e6])
def test_aligned_and_antipodal_views_of_any_concentration(dim, kappa):
    """mpmath with 50 digits, where the fused length is J kappa, or kappa, or zero."""

    def phi(k: float) -> mp.mpf:
        return (
            mp.log(mp.hyp0f1(mp.mpf(dim) / 2, mp.mpf(k) ** 2 / 4))
            if k < 1e4
            else mp.log(
                mp.gamma(mp.mpf(dim) / 2)
                * (mp.mpf(k) / 2) ** (1 - mp.mpf(dim) / 2)
                * mp.besseli(mp.mpf(dim) / 2 - 1, mp.mpf(k))
            )
        )

    axis = torch.eye(dim, dtype=F64)[:1]
    law = VonMisesFisher(axis, torch.tensor([kappa], dtype=F64))
    against = VonMisesFisher(-axis, torch.tensor([kappa], dtype=F64))
    with mp.workdps(50):
        for views, length in (
            ([law] * 3, 3 * kappa),
            ([law, against], 0.0),
            ([law, law, against], kappa),
            ([law, against, law, against], 0.0),
        ):
            value = float(phi(length) - len(views) * phi(kappa))
            assert shared_latent_log_evidence(views).item() == pytest.approx(value, rel=1e-7, abs=1e-9)


def test_antipodal_views_fuse_to_the_uniform_law_with_finite_gradients():
    mean = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
    kappa = torch.tensor([7.0], requires_grad=True)
    law, against = VonMisesFisher(mean, kappa), VonMisesFisher(-mean, kappa)
    fused = fused_posterior([law, against])
    assert fused.concentration.item() == 0.0
    value = shared_latent_log_evidence([law, against, vmf(1, 3, dtype=torch.float32)]).sum()
    for gradient in torch.autograd.grad(value, [mean, kappa]):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("variance", [1e-12, 1e-6])
@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_gaussian_views_that_are_nearly_points(kind, variance):
    """A point at z and a view q have the evidence q(z) / p(z); two points that agree have 1 / (p(z) * overlap)."""
    z = torch.tensor([[0.3, -1.2]], dtype=F64)
    q = FAMILIES[kind](1, 2)
    if kind == "diagonal":
        point = pyro_dist.Normal(z, torch.full_like(z, math.sqrt(variance))).to_event(1)
    else:
        point = pyro_dist.MultivariateNormal(z, variance * torch.eye(2, dtype=F64)[None])
    p = pyro_dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1)
    expected = q.log_prob(z) - p.log_prob(z)
    for views in ([point, q], [q, point]):
        torch.testing.assert_close(shared_latent_log_evidence(views), expected, rtol=0, atol=100 * variance + 1e-9)
    twice = -2 * 0.5 * math.log(4 * math.pi * variance) - p.log_prob(z)  # N(0; 0, 2 variance) in two dimensions
    torch.testing.assert_close(shared_latent_log_evidence([point, point]), twice, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_gaussian_views_as_wide_as_the_prior_say_nothing(kind):
    prior = PRIORS[kind](3)
    views = [prior.expand((4,))] * 3
    torch.testing.assert_close(shared_latent_log_evidence(views, prior), torch.zeros(4, dtype=F64), rtol=0, atol=1e-12)


def test_classes_that_exclude_each_other_have_no_evidence():
    q = pyro_dist.Categorical(logits=torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]]))
    other = pyro_dist.Categorical(logits=torch.tensor([[0.0, -math.inf], [0.0, -math.inf]]))
    torch.testing.assert_close(shared_latent_log_evidence([q, other]), torch.tensor([math.log(2), -math.inf]))


# --- gradients --------------------------------------------------------------------------------------------------------


def identified(name: str, gradient: Tensor) -> Tensor:
    """The part of a gradient to natural parameters that their redundancy leaves open to no choice (dimension 3)."""
    if name == "full":  # the two halves of a symmetric precision share it
        matrix = gradient[..., 3:].unflatten(-1, (3, 3))
        return torch.cat([gradient[..., :3], 0.5 * (matrix + matrix.mT).flatten(-2)], -1)
    return gradient - gradient.mean(-1, keepdim=True) if name == "categorical" else gradient  # logits have an offset


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_of_the_evidence_is_the_fused_mean_parameter(name):
    """Phi has E[t] as its gradient: d log p / d eta_j = E_fused[t] - E_j[t], and 1 - J times the like for the prior."""
    family = exponential_family(FAMILIES[name](1, 3))
    eta = [family.natural(q).requires_grad_() for q in (*(FAMILIES[name](4, 3) for _ in range(3)), PRIORS[name](3))]
    *laws, prior = [family.law(e) for e in eta]
    fused = family.mean(fused_posterior(laws, prior))
    gradients = torch.autograd.grad(shared_latent_log_evidence(laws, prior).sum(), eta)
    for law, gradient in zip(laws, gradients, strict=False):
        expected = identified(name, fused - family.mean(law))
        torch.testing.assert_close(identified(name, gradient), expected, rtol=1e-7, atol=1e-7)
    expected = identified(name, -2 * (fused - family.mean(prior)).sum(0))
    torch.testing.assert_close(identified(name, gradients[-1]), expected, rtol=1e-7, atol=1e-7)

    natural = eta[0].detach().requires_grad_()
    (slope,) = torch.autograd.grad(family.log_partition(natural).sum(), natural)
    torch.testing.assert_close(slope, family.mean(family.law(natural)), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_factor_and_bound_by_finite_differences(name, with_prior):
    family = exponential_family(FAMILIES[name](1, 2))
    eta = [family.natural(FAMILIES[name](3, 2, *([0.5, 5.0] if name == "vmf" else []))) for _ in range(3)]
    prior = PRIORS[name](2) if with_prior else None

    def value(*parameters: Tensor) -> Tensor:
        laws = [family.law(e) for e in parameters]
        with pyro.plate("pairs", 3):
            factor = shared_latent_factor("x", laws, prior)
        return torch.stack([factor, interior_bound(laws, prior=prior), shared_latent_log_evidence(laws, prior)])

    assert torch.autograd.gradcheck(value, tuple(e.requires_grad_() for e in eta), eps=1e-6, atol=1e-5, fast_mode=True)


# --- the factor -------------------------------------------------------------------------------------------------------


def emitted(posteriors: list, prior: pyro_dist.Distribution | None = None, **options) -> Tensor:
    with pyro.plate("pairs", posteriors[0].batch_shape[-1]):
        return shared_latent_factor("views", posteriors, prior, **options)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_two_views_on_the_sphere_are_symmetric_infonce(dtype):
    q1, q2 = vmf(40, 10, 5.0, 100.0, dtype), vmf(40, 10, 5.0, 100.0, dtype)
    with pyro.plate("pairs", 40):
        expected = factors.expected_infonce_factor("known", q1, q2, math.inf, symmetric=True)
    # a cosine in float32 is known to 6e-8, which concentrations of 100 multiply
    torch.testing.assert_close(emitted([q1, q2]), expected, rtol=0, atol=3e-5 if dtype == torch.float32 else 1e-11)
    torch.testing.assert_close(
        shared_latent_log_evidence([q1, q2]), shared_latent_log_ratio(q1, q2).diagonal(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("views", [2, 3, 5])
@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_factor_is_its_definition_by_loops(name, with_prior, views):
    size = 4
    posteriors = [FAMILIES[name](size, 3) for _ in range(views)]
    family = exponential_family(posteriors[0])
    prior = PRIORS[name](3) if with_prior else family.standard(torch.ones((), dtype=F64))
    eta, eta0, phi = [family.natural(q) for q in posteriors], family.natural(prior), family.log_partition
    terms = torch.zeros(views, size, dtype=F64)
    for j, n in itertools.product(range(views), range(size)):
        rest = sum(eta[i][n] for i in range(views) if i != j) - (views - 2) * eta0
        log_r = torch.stack(
            [phi(rest + eta[j][m] - eta0) - phi(rest) - phi(eta[j][m]) + phi(eta0) for m in range(size)]
        )
        terms[j, n] = log_r[n] - log_r.logsumexp(0) + math.log(size)
    torch.testing.assert_close(emitted(posteriors, prior), terms.mean(0), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", FAMILIES)
def test_tiles_change_neither_value_nor_gradient(name):
    family = exponential_family(FAMILIES[name](1, 3))
    eta = family.natural(FAMILIES[name](9, 3)).requires_grad_()
    others = [FAMILIES[name](9, 3) for _ in range(2)]
    results = []
    for tile in (None, 4):
        for function in (emitted, interior_bound):
            value = function([family.law(eta), *others], tile=tile)
            results.append((value, *torch.autograd.grad(value.sum(), eta)))
    for whole, tiled in zip(results[:2], results[2:], strict=True):
        for a, b in zip(whole, tiled, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", FAMILIES)
def test_leading_axes_are_batches_of_their_own(name):
    family = exponential_family(FAMILIES[name](1, 3))
    eta = [family.natural(FAMILIES[name](8, 3)).unflatten(0, (2, 4)) for _ in range(3)]
    together, free = [family.law(e) for e in eta], [0.02 * e for e in eta]
    bound, factor = interior_bound(together, nu=free, tile=3), emitted(together)
    for k in range(2):
        alone = [family.law(e[k]) for e in eta]
        torch.testing.assert_close(factor[k], emitted(alone))
        torch.testing.assert_close(bound[k], interior_bound(alone, nu=[e[k] for e in free]))
        torch.testing.assert_close(shared_latent_log_evidence(together)[k], shared_latent_log_evidence(alone))


def test_a_constant_encoder_cheats_the_evidence_and_nothing_else():
    evidences = []
    for kappa in (10.0, 1e2, 1e3, 1e4):
        constant = VonMisesFisher(directions(1, 5).expand(8, 5), torch.tensor(kappa, dtype=F64))
        evidences.append(shared_latent_log_evidence([constant] * 3)[0].item())
        assert emitted([constant] * 3).abs().max() < 1e-6
        assert interior_bound([constant] * 3).max() <= 1e-9
    assert all(later > earlier + 8 for earlier, later in itertools.pairwise(evidences))  # d - 1 = 4: + 4 log 10 each


def test_factor_is_at_most_log_n():
    sure = VonMisesFisher(directions(16, 6), torch.full((16,), 1e4, dtype=F64))
    assert (emitted([sure] * 3) <= math.log(16) + 1e-9).all()
    torch.testing.assert_close(emitted([sure] * 3), torch.full((16,), math.log(16), dtype=F64))


def test_model_of_three_views_runs_in_pyro():
    guide = guides.VonMisesFisher(nn.Sequential(nn.Linear(8, 16), nn.ReLU()), 4)

    def model(*views: Tensor) -> None:
        posteriors = [guide.posterior(x) for x in views]
        with pyro.plate("pairs", len(views[0])):
            for j, q in enumerate(posteriors, start=1):
                pyro.sample(f"z{j}", q)
            shared_latent_factor("views", posteriors)

    views = [torch.randn(9, 8) for _ in range(3)]
    loss = Trace_ELBO()(model, guide)(*views)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in guide.encoder.parameters())


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_told_the_way_out():
    q = vmf(4, 3)
    with pytest.raises(ValueError, match="at least 2 views, got 1"):
        shared_latent_log_evidence([q])
    with pytest.raises(ValueError, match="one batch shape"):
        fused_posterior([q, vmf(5, 3)])
    with pytest.raises(TypeError, match=r"posteriors\[0\] is von Mises-Fisher laws of dimension 3, posteriors\[1\] is"):
        fused_posterior([q, vmf(4, 5)])
    with pytest.raises(TypeError, match="posteriors.0. is von Mises-Fisher.*prior is categorical"):
        fused_posterior([q, q], pyro_dist.Categorical(torch.ones(3)))
    with pytest.raises(ValueError, match=r"`prior` must be one law for all items.*got \(4,\)"):
        fused_posterior([q, q], q)
    with pytest.raises(TypeError, match="need VonMisesFisher.*PowerSpherical"):
        fused_posterior([PowerSpherical(directions(4, 3), torch.ones(4, dtype=F64))] * 2)
    with pytest.raises(ValueError, match=r"needs laws of batch shape \(..., N\)"):
        emitted_alone = VonMisesFisher(directions(3), torch.ones((), dtype=F64))
        shared_latent_factor("views", [emitted_alone] * 2)
    with pytest.raises(ValueError, match="must be emitted inside the plate"):
        shared_latent_factor("views", [q, q])
    with pytest.raises(ValueError, match="one tensor per view, 2 of them, got 1"):
        interior_bound([q, q], nu=[torch.zeros(3)])
    with pytest.raises(ValueError, match="`guide` must be von Mises-Fisher"):
        interior_bound([q, q], vmf(5, 3))


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_gaussians_wider_than_the_prior_are_refused(kind):
    narrow, wide = FAMILIES[kind](3, 2), FAMILIES[kind](3, 2)
    prior = FAMILIES[kind](1, 2)
    prior = (
        pyro_dist.Normal(prior.mean[0], 0.01 * prior.stddev[0]).to_event(1)
        if kind == "diagonal"
        else pyro_dist.MultivariateNormal(prior.mean[0], 1e-4 * prior.covariance_matrix[0])
    )
    with pytest.raises(
        ValueError, match=r"posteriors\[0\] must be at least as narrow as the prior.*positive precision"
    ):
        shared_latent_log_evidence([narrow, wide], prior)
    family = exponential_family(narrow)
    with pytest.raises(ValueError, match="precision must be positive, got"):
        family.log_partition(-family.natural(narrow))
