"""One conformance suite for every distribution on the sphere.

Statistical tests: seeds are fixed; each states the rate of false alarms it would have under fresh seeds.
"""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyro
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from scipy import stats
from torch import Tensor
from torch.distributions import Independent, kl_divergence

from pyro_contrastive import distributions as dist
from tests import references as ref

F64 = torch.float64


@dataclass(frozen=True)
class Case:
    """A rotationally symmetric family, its construction and its independent references."""

    build: Callable[[Tensor, Tensor], dist.VonMisesFisher]  # (unit mean (*batch, d), strength (*batch,)) -> law
    log_density: Callable  # (dim, strength, cos) -> mpmath number
    angle: Callable  # (dim, strength) -> unnormalised log density of the angle
    strengths: tuple[float, ...]
    symmetric: bool = False  # no mean direction

    @functools.cache  # noqa: B019 (a handful of cases, alive as long as the module)
    def law(self, dim: int, strength: float) -> ref.AngleLaw:
        return ref.AngleLaw(dim, self.angle(dim, strength))

    def make(self, dim: int, strength: float, dtype: torch.dtype = F64, batch: tuple[int, ...] = ()):
        mean = unit(dim, dtype)
        return self.build(mean.expand(*batch, dim), torch.full(batch, strength, dtype=dtype))


def build_uniform(mean: Tensor, strength: Tensor):
    return dist.HypersphericalUniform(mean.shape[-1], mean.shape[:-1], dtype=mean.dtype)


def build_projected_normal(mean: Tensor, strength: Tensor):
    return dist.ProjectedNormal(strength.sqrt().unsqueeze(-1) * mean, torch.ones_like(mean))


STRENGTHS = (0.0, 0.5, 10.5, 128.0, 1e6)
CASES = {
    "uniform": Case(build_uniform, ref.uniform_log_density, lambda d, k: ref.uniform_angle(k), (0.0,), symmetric=True),
    "von_mises_fisher": Case(
        dist.VonMisesFisher, ref.von_mises_fisher_log_density, lambda d, k: ref.von_mises_fisher_angle(k), STRENGTHS
    ),
    "power_spherical": Case(
        dist.PowerSpherical, ref.power_spherical_log_density, lambda d, k: ref.power_spherical_angle(k), STRENGTHS
    ),
    "projected_normal": Case(
        build_projected_normal, ref.isotropic_projected_normal_log_density, ref.projected_normal_angle, STRENGTHS
    ),
}
CONCENTRATED = {name: case for name, case in CASES.items() if not case.symmetric}


def unit(dim: int, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    vector = torch.randn(dim, dtype=F64, generator=torch.Generator().manual_seed(seed + 100 * dim))
    return (vector / vector.norm()).to(dtype)


def at_cosine(mean: Tensor, cos: Tensor) -> Tensor:
    """Points on one meridian with the given cosine to ``mean``."""
    tangent = unit(mean.shape[-1], mean.dtype, seed=1)
    tangent = tangent - (tangent @ mean) * mean
    tangent = tangent / tangent.norm()
    return cos[..., None] * mean + (1 - cos**2).clamp_min(0).sqrt()[..., None] * tangent


def angle_between(z: Tensor, mean: Tensor) -> np.ndarray:
    """Accurate for small angles, unlike acos."""
    return 2 * torch.atan2((z - mean).norm(dim=-1), (z + mean).norm(dim=-1)).numpy()


def over(cases: dict[str, Case], **strengths) -> list:
    return [pytest.param(case, k, id=f"{name}-{k:g}") for name, case in cases.items() for k in case.strengths]


by_name = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
by_concentrated = pytest.mark.parametrize("case", CONCENTRATED.values(), ids=CONCENTRATED)
by_strength = pytest.mark.parametrize(("case", "strength"), over(CASES))


# Density -------------------------------------------------------------------------------------------------------------


@by_strength
@pytest.mark.parametrize("dim", [2, 3, 8, 64, 512])
def test_density(case, strength, dim):
    """Against mpmath, in float64 and float32."""
    cos = torch.tensor([-1.0, -0.5, 0.0, 0.3, 0.999, 1.0], dtype=F64)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        law = case.make(dim, strength, dtype)
        mean = unit(dim, dtype)
        value = at_cosine(mean, cos.to(dtype))
        value = torch.cat([value[1:-1], -mean[None], mean[None]])  # the poles exactly
        got = law.log_prob(value)
        assert got.dtype == dtype
        for y, v in zip(value.double(), got.double().tolist(), strict=True):
            # the reference at the rounded vectors; a strength k turns an error eps of the cosine into k eps
            c = (y @ mean.double() / (y.norm() * mean.double().norm())).clamp(-1, 1).item()
            if c < -1 + 1e-12 and case is CASES["power_spherical"] and strength:
                assert v < float(case.log_density(dim, strength, -1 + 1e-6))  # exactly, (1 + cos)^kappa = 0
                continue
            slack = 4 * torch.finfo(dtype).eps * strength / max(1 + c, 1e-3) ** (case is CASES["power_spherical"])
            reference = float(case.log_density(dim, strength, c))
            assert abs(v - reference) <= tolerance * max(1.0, abs(reference)) + slack, (dtype, c, v, reference)


def test_density_agrees_with_scipy():
    z = torch.nn.functional.normalize(torch.randn(20, 5, dtype=F64, generator=torch.Generator().manual_seed(0)), dim=-1)
    for kappa in (0.5, 20.0, 300.0):
        expected = stats.vonmises_fisher(unit(5).numpy(), kappa).logpdf(z.numpy())
        got = dist.VonMisesFisher(unit(5), torch.tensor(kappa, dtype=F64)).log_prob(z)
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9)
    np.testing.assert_allclose(
        dist.HypersphericalUniform(3).log_prob(z[:, :3] / z[:, :3].norm(dim=-1, keepdim=True)), -math.log(4 * math.pi)
    )


@by_strength
@pytest.mark.parametrize("dim", [2, 3, 10, 128])
def test_integral_is_one(case, strength, dim):
    """exp(log_prob) over the cosine, on Gauss-Legendre nodes in the range of angles that holds the mass."""
    law = case.law(dim, strength)
    low, high = law.quantile(np.array([1e-12, 1.0 - 1e-12]))
    low, high = max(0.0, low - 0.2 * (high - low)), min(math.pi, high + 0.2 * (high - low))
    nodes, weights = np.polynomial.legendre.leggauss(400)
    angle = 0.5 * (low + high) + 0.5 * (high - low) * nodes
    mean = unit(dim)
    tangent = at_cosine(mean, torch.zeros(1, dtype=F64))
    value = torch.tensor(np.cos(angle))[:, None] * mean + torch.tensor(np.sin(angle))[:, None] * tangent
    log_prob = case.make(dim, strength).log_prob(value).numpy()
    ring = float(ref.log_area(dim - 1)) if dim > 2 else math.log(2.0)
    total = (np.exp(log_prob + ring + (dim - 2) * np.log(np.sin(angle))) * weights).sum() * 0.5 * (high - low)
    assert total == pytest.approx(1, abs=2e-9 * max(1.0, strength * 1e-5))


# Samples -------------------------------------------------------------------------------------------------------------


@by_strength
@pytest.mark.parametrize("dim", [2, 3, 10, 128])
def test_samples_follow_the_density(case, strength, dim):
    """Angle to the mean and direction in the tangent space, by Kolmogorov-Smirnov: false-alarm rate 3 * 1e-5 each."""
    torch.manual_seed(dim)
    law, mean = case.make(dim, strength), unit(dim)
    z = law.sample((10_000,))
    assert z.shape == (10_000, dim)
    assert constraints.sphere.check(z).all()
    angle = angle_between(z, mean)
    assert stats.kstest(angle, case.law(dim, strength).cdf).pvalue > 1e-5
    tangent = z - (z @ mean)[:, None] * mean
    tangent = tangent / tangent.norm(dim=-1, keepdim=True)
    basis = at_cosine(mean, torch.zeros(1, dtype=F64))[0]
    coordinate = (tangent @ basis).numpy()
    if dim == 2:
        assert stats.binomtest(int((coordinate > 0).sum()), len(coordinate)).pvalue > 1e-5
    else:
        half = (dim - 2) / 2
        assert stats.kstest((coordinate + 1) / 2, stats.beta(half, half).cdf).pvalue > 1e-5
    # rounded: for d = 2 it is +-1, and the rounding errors around that do depend on the angle
    assert stats.spearmanr(coordinate.round(9), angle).pvalue > 1e-5


@by_concentrated
def test_samples_of_one_batch_are_independent(case):
    """Every element of a batch follows its own parameters: 6 standard errors, false-alarm rate 1e-8."""
    torch.manual_seed(0)
    mean = torch.stack([unit(6, seed=s) for s in range(4)])
    strength = torch.tensor([0.5, 4.0, 30.0, 500.0], dtype=F64)
    z = case.build(mean, strength).sample((20_000,))
    cos = (z * mean).sum(-1)
    for j, k in enumerate(strength.tolist()):
        expected = case.law(6, k).expect(np.cos)
        assert abs(cos[:, j].mean().item() - expected) < 6 * cos[:, j].std().item() / 20_000**0.5
    residual = cos - cos.mean(0)
    correlation = np.corrcoef(residual.numpy().T)
    assert np.abs(correlation - np.eye(4)).max() < 6 / 20_000**0.5


GRID = [(d, k) for d in (3, 10, 16, 32, 64, 128, 512) for k in (0.0, 1.0, 10.5, 16.0, 32.0, 128.0, 512.0)]
GRID += [(2, 0.0), (2, 1.0), (2, 12.0), (2, 1e4), (3, 1e6), (10, 1e6), (128, 1e4), (1024, 1e3)]


@pytest.mark.parametrize(("dim", "kappa"), GRID)
def test_von_mises_fisher_sampler(dim, kappa):
    """Law and pathwise gradient of the cosine: mean A_d, derivative A_d', and the same for the second moment.

    The public reference sampler draws cosines of mean -.13 instead of .18 at d = 64, kappa = 12, with a gradient of
    the wrong sign. 4.5 standard errors, false-alarm rate 7e-6 for each of four checks in 57 cells; the mean of the
    gradient must also be within 5 per cent of the truth.
    """
    torch.manual_seed(1)
    num = 20_000
    concentration = torch.full((num,), kappa, dtype=F64, requires_grad=True)
    mean = unit(dim)
    z = dist.VonMisesFisher(mean.expand(num, dim), concentration).rsample()
    cos = z @ mean
    (slope,) = torch.autograd.grad(cos.sum(), concentration)
    cos = cos.detach()

    ratio, derivative = (float(f(dim, kappa)) for f in (ref.bessel_ratio, ref.bessel_ratio_derivative))
    curvature = float(ref.bessel_ratio_second_derivative(dim, kappa))
    # E[cos^2] = A' + A^2, so its derivative is A'' + 2 A A'
    checks = [
        (cos, ratio),
        (cos**2, derivative + ratio**2),
        (slope, derivative),
        (2 * cos * slope, curvature + 2 * ratio * derivative),
    ]
    for values, expected in checks:
        error = values.std().item() / num**0.5
        assert abs(values.mean().item() - expected) < 4.5 * error + 1e-12, (values.mean().item(), expected, error)
    assert slope.mean().item() == pytest.approx(derivative, rel=0.05)


@by_concentrated
@pytest.mark.parametrize("dim", [2, 3, 10, 128])
@pytest.mark.parametrize("strength", [1.0, 10.5, 300.0])
def test_pathwise_gradients(case, strength, dim):
    """d/dstrength E[f(cos)] = E[df/dstrength], f = cos and cos^2, against differences of the grid law.

    5 standard errors of 20,000 draws: false-alarm rate 6e-7 for each of 2 checks in 36 cells.
    """
    torch.manual_seed(2)
    num, mean = 20_000, unit(dim)
    parameter = torch.full((num,), strength, dtype=F64, requires_grad=True)
    cos = case.build(mean.expand(num, dim), parameter).rsample() @ mean
    step = 1e-3 * strength
    above, below = case.law(dim, strength + step), case.law(dim, strength - step)
    for power in (1, 2):
        (slope,) = torch.autograd.grad((cos**power).sum(), parameter, retain_graph=True)
        moments = [law.expect(lambda angle, p=power: np.cos(angle) ** p) for law in (above, below)]
        expected = (moments[0] - moments[1]) / (2 * step)
        error = slope.std().item() / num**0.5
        assert abs(slope.mean().item() - expected) < 5 * error + 1e-4 * abs(expected) + 1e-9


@by_concentrated
@pytest.mark.parametrize("dim", [2, 3, 16])
def test_gradient_to_the_mean_direction(case, dim):
    """E[z] = A mean, so the gradient of E[v.z] along a tangent t of the mean is A v.t. 5 standard errors."""
    torch.manual_seed(3)
    num, strength, mean = 20_000, 12.0, unit(dim)
    rows = mean.expand(num, dim).clone().requires_grad_()
    direction = rows / rows.norm(dim=-1, keepdim=True)
    z = case.build(direction, torch.full((num,), strength, dtype=F64)).rsample()
    target = unit(dim, seed=5)
    (gradient,) = torch.autograd.grad((z @ target).sum(), rows)
    tangent = at_cosine(mean, torch.zeros(1, dtype=F64))[0]
    along = gradient @ tangent
    expected = case.law(dim, strength).expect(np.cos) * (target @ tangent).item()
    assert abs(along.mean().item() - expected) < 5 * along.std().item() / num**0.5 + 1e-9


# Moments, entropy, KL ------------------------------------------------------------------------------------------------


@by_strength
@pytest.mark.parametrize("dim", [2, 3, 10, 128])
def test_mean(case, strength, dim):
    law = case.make(dim, strength)
    if case is CASES["projected_normal"]:
        torch.testing.assert_close(law.mean_direction, unit(dim) * (strength > 0))
        return
    expected = 0.0 if case.symmetric else case.law(dim, strength).expect(np.cos)
    torch.testing.assert_close(law.mean, expected * unit(dim), rtol=1e-6, atol=1e-6)
    if not case.symmetric:
        torch.testing.assert_close(law.mode, unit(dim))


@by_strength
@pytest.mark.parametrize("dim", [2, 3, 10, 128])
def test_entropy(case, strength, dim):
    """-E[log p] with E over the grid law and log p from mpmath at one point plus the shape of the law.

    The projected normal's is an estimate: 5 standard errors, false-alarm rate 6e-7.
    """
    torch.manual_seed(4)
    shape = case.angle(dim, strength)
    constant = float(case.log_density(dim, strength, 0.0)) - shape(np.array([0.5 * math.pi]))[0]
    expected = -(case.law(dim, strength).expect(shape) + constant)
    values = case.make(dim, strength, batch=(200,)).entropy()
    assert values.shape == (200,)
    error = 5 * values.std().item() / 200**0.5
    assert abs(values.mean().item() - expected) < error + 1e-5 * max(1.0, abs(expected))


@by_strength
@pytest.mark.parametrize("dim", [2, 3, 10, 128])
def test_kl_to_the_uniform_law(case, strength, dim):
    """KL(p || uniform) = log area - entropy."""
    torch.manual_seed(5)
    law = case.make(dim, strength, batch=(200,))
    kl = kl_divergence(law, dist.HypersphericalUniform(dim))
    assert kl.shape == (200,)
    shape = case.angle(dim, strength)
    constant = float(case.log_density(dim, strength, 0.0)) - shape(np.array([0.5 * math.pi]))[0]
    expected = case.law(dim, strength).expect(shape) + constant + float(ref.log_area(dim))
    error = 5 * kl.std().item() / 200**0.5
    assert abs(kl.mean().item() - expected) < error + 1e-5 * max(1.0, abs(expected))


KL_PAIRS = [
    ("von_mises_fisher", "von_mises_fisher"),
    ("power_spherical", "von_mises_fisher"),
    ("uniform", "von_mises_fisher"),
    ("uniform", "power_spherical"),
    ("uniform", "uniform"),
]


@pytest.mark.parametrize(("first", "second"), KL_PAIRS)
@pytest.mark.parametrize("dim", [2, 3, 10, 64])
def test_kl_between_families(first, second, dim):
    """Closed form against the mean of log p/q over draws: 5 standard errors, false-alarm rate 6e-7."""
    torch.manual_seed(6)
    p = CASES[first].build(unit(dim), torch.tensor(7.0, dtype=F64))
    q = CASES[second].build(unit(dim, seed=2), torch.tensor(3.0, dtype=F64))
    z = p.sample((40_000,))
    ratios = p.log_prob(z) - q.log_prob(z)
    error = ratios.std().item() / len(ratios) ** 0.5
    assert abs(ratios.mean().item() - kl_divergence(p, q).item()) < 5 * error + 1e-9
    assert kl_divergence(p, p).abs().item() < 1e-9 if first == second else True


def test_kl_broadcasts_and_has_a_gradient():
    mean = torch.stack([unit(5), unit(5, seed=1)])
    kappa = torch.tensor([3.0, 50.0], dtype=F64, requires_grad=True)
    kl = kl_divergence(dist.VonMisesFisher(mean, kappa), dist.VonMisesFisher(unit(5), torch.tensor(2.0, dtype=F64)))
    assert kl.shape == (2,)
    assert torch.autograd.grad(kl.sum(), kappa)[0].isfinite().all()
    with pytest.raises(ValueError):
        kl_divergence(dist.VonMisesFisher(unit(5), kappa[0]), dist.HypersphericalUniform(4))


# The contract of a Pyro distribution ---------------------------------------------------------------------------------


@by_name
def test_shapes(case):
    law = case.make(4, 10.0, batch=(3, 2))
    assert (law.batch_shape, law.event_shape) == ((3, 2), (4,))
    assert law.rsample((5,)).shape == (5, 3, 2, 4)
    assert law.log_prob(law.sample((5,))).shape == (5, 3, 2)
    assert law.log_prob(unit(4)).shape == (3, 2)
    assert law.entropy().shape == (3, 2)
    assert law.has_rsample
    pairwise = case.make(4, 10.0, batch=(6,))
    z = pairwise.sample((5,))
    grid = pairwise.log_prob(z[:, :, None])
    assert grid.shape == (5, 6, 6)
    if not case.symmetric:
        torch.testing.assert_close(pairwise.cross_log_prob(z), grid)


@by_name
def test_expand(case):
    law = case.make(4, 10.0, batch=(2,))
    wide = law.expand((3, 2))
    assert type(wide) is type(law)
    assert (wide.batch_shape, wide.event_shape) == ((3, 2), (4,))
    z = wide.sample()
    assert z.shape == (3, 2, 4)
    torch.testing.assert_close(wide.log_prob(z), law.log_prob(z))
    assert not torch.equal(z[0], z[1])  # independent draws, not copies
    assert wide.expand((5, 3, 2)).sample().shape == (5, 3, 2, 4)


@by_name
def test_independent_mask_and_to_event(case):
    law = case.make(4, 10.0, batch=(3, 2))
    z = law.sample()
    joint = law.to_event(1)
    assert (joint.batch_shape, joint.event_shape) == ((3,), (2, 4))
    torch.testing.assert_close(joint.log_prob(z), law.log_prob(z).sum(-1))
    torch.testing.assert_close(Independent(law, 2).log_prob(z), law.log_prob(z).sum())
    assert (law.mask(False).log_prob(z) == 0).all()


@by_name
def test_pickle_and_deepcopy(case):
    law = case.make(4, 10.0, batch=(2,))
    buffer = io.BytesIO()
    torch.save(law, buffer)
    buffer.seek(0)
    z = law.sample()
    for other in (pickle.loads(pickle.dumps(law)), copy.deepcopy(law), torch.load(buffer, weights_only=False)):
        assert (other.batch_shape, other.event_shape) == (law.batch_shape, law.event_shape)
        torch.testing.assert_close(other.log_prob(z), law.log_prob(z))


@by_concentrated
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype(case, dtype):
    law = case.make(10, 20.0, dtype, batch=(3,))
    z = law.rsample((2,))
    kl = kl_divergence(law, dist.HypersphericalUniform(10))
    assert {t.dtype for t in (z, law.log_prob(z), law.entropy(), kl)} == {dtype}


@by_strength
@pytest.mark.parametrize("dim", [2, 3, 64, 512])
def test_float32(case, strength, dim):
    """Draws on the sphere to the tolerance of Pyro, of the right law, with finite gradients to both parameters.

    The mean of the angle within 5 standard errors: false-alarm rate 6e-7.
    """
    torch.manual_seed(7)
    mean = unit(dim, torch.float32).expand(2000, dim).clone().requires_grad_()
    parameter = torch.full((2000,), strength, requires_grad=True)
    law = case.build(mean, parameter)
    z = law.rsample()
    assert constraints.sphere.check(z).all()
    angle = angle_between(z.detach(), mean.detach())
    expected = case.law(dim, strength).expect(lambda a: a)
    assert abs(angle.mean() - expected) < 5 * angle.std() / 2000**0.5 + 1e-5
    if case.symmetric:
        return
    with pyro.settings.context(validate_distributions_torch=False):
        loss = (law.log_prob(z) + z @ torch.randn(dim)).sum() + kl_divergence(
            law, dist.HypersphericalUniform(dim)
        ).sum()
    for gradient in torch.autograd.grad(loss, (mean, parameter)):
        if strength or case is not CASES["projected_normal"]:  # d sqrt(strength) at zero is the test's own infinity
            assert gradient.isfinite().all()


@by_concentrated
def test_site_of_a_model(case):
    """pyro.sample in a plate, trained by SVI with sequential and vectorised particles: both losses agree.

    4.5 standard errors of 200 evaluations each: false-alarm rate 7e-6.
    """
    pyro.clear_param_store()
    mean = torch.stack([unit(5, torch.float32, seed=s) for s in range(6)])
    parameter = torch.tensor(8.0, requires_grad=True)

    def model():
        with pyro.plate("pairs", 6):
            z = pyro.sample("z", dist.HypersphericalUniform(5))
            pyro.factor("x", 3.0 * (z * mean).sum(-1))

    def guide():
        with pyro.plate("pairs", 6):
            return pyro.sample("z", case.build(mean, parameter.expand(6)))

    trace = pyro.poutine.trace(guide).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["z"]["log_prob"].shape == (6,)
    assert trace.nodes["z"]["value"].shape == (6, 5)

    torch.manual_seed(8)
    sequential = np.array([Trace_ELBO().loss(model, guide) for _ in range(200)])
    vectorised = Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    parallel = np.array([vectorised.loss(model, guide) for _ in range(20)])
    error = math.hypot(sequential.std() / 200**0.5, parallel.std() / 20**0.5)
    assert abs(sequential.mean() - parallel.mean()) < 4.5 * error

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), vectorised)
    assert math.isfinite(svi.step())


# Gradients, symmetry, limits -----------------------------------------------------------------------------------------


@by_concentrated
@pytest.mark.parametrize("dim", [2, 3, 10])
def test_gradients_by_finite_differences(case, dim):
    """log_prob to both parameters and the value, once and twice; entropy and KL to the parameters."""
    raw = torch.stack([1.3 * unit(dim), 0.7 * unit(dim, seed=3)]).requires_grad_()
    log_strength = torch.tensor([0.5, 3.0], dtype=F64, requires_grad=True)
    z = (2.0 * torch.stack([unit(dim, seed=4), unit(dim, seed=5)])).requires_grad_()

    def law(raw, log_strength):
        return case.build(raw / raw.norm(dim=-1, keepdim=True), log_strength.exp())

    def density(raw, log_strength, z):
        return law(raw, log_strength).log_prob(z / z.norm(dim=-1, keepdim=True))

    assert torch.autograd.gradcheck(density, (raw, log_strength, z))
    assert torch.autograd.gradgradcheck(density, (raw, log_strength, z))

    def summaries(raw, log_strength):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(9)
            p = law(raw, log_strength)
            return p.entropy(), kl_divergence(p, dist.HypersphericalUniform(dim))

    assert torch.autograd.gradcheck(summaries, (raw, log_strength))


@by_concentrated
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    dim=st.integers(2, 40),
    log_strength=st.floats(-3, 8),
    seed=st.integers(0, 10_000),
)
def test_rotation_equivariance(case, dim, log_strength, seed):
    """p(Qz; Q mean) = p(z; mean) for every orthogonal Q, and the summaries rotate with the mean."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(dim, dim, dtype=F64, generator=generator)).Q
    mean, z = torch.nn.functional.normalize(torch.randn(2, dim, dtype=F64, generator=generator), dim=-1)
    strength = torch.tensor(math.exp(log_strength), dtype=F64)
    law = case.build(mean, strength)
    turned_mean, turned = (torch.nn.functional.normalize(rotation @ v, dim=-1) for v in (mean, z))
    rotated = case.build(turned_mean, strength)
    torch.testing.assert_close(rotated.log_prob(turned), law.log_prob(z), rtol=1e-8, atol=1e-8)
    if case is not CASES["projected_normal"]:
        torch.testing.assert_close(rotated.mean, rotation @ law.mean)
        torch.testing.assert_close(rotated.entropy(), law.entropy())


@pytest.mark.parametrize("family", [dist.VonMisesFisher, dist.PowerSpherical])
@pytest.mark.parametrize("dim", [2, 3, 10, 512])
def test_zero_concentration_is_uniform(family, dim):
    law, uniform = family(unit(dim), torch.tensor(0.0, dtype=F64)), dist.HypersphericalUniform(dim)
    z = uniform.expand((7,)).sample().double()
    z = z / z.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(law.log_prob(z), uniform.log_prob(z).double(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(law.entropy(), uniform.entropy().double(), rtol=1e-6, atol=1e-12)
    assert kl_divergence(law, uniform).abs().item() < 1e-12


@pytest.mark.timeout(20)
@pytest.mark.parametrize("family", [dist.VonMisesFisher, dist.PowerSpherical])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kappa", [1e-20, 1e-7, 1e7, 1e10, 1e20])
@pytest.mark.parametrize("dim", [2, 3, 10, 512])
def test_extreme_concentrations_terminate(family, dim, kappa, dtype):
    """Draws on the sphere, finite density and finite gradients, where the public reference sampler loops for ever."""
    concentration = torch.full((50,), kappa, dtype=dtype, requires_grad=True)
    mean = unit(dim, dtype)
    law = family(mean.expand(50, dim), concentration)
    z = law.rsample()
    assert constraints.sphere.check(z).all()
    if kappa >= 1e7:
        assert angle_between(z.detach(), mean).max() < 20 * (dim / kappa) ** 0.5 + 4 * torch.finfo(dtype).eps * dim**0.5
    (gradient,) = torch.autograd.grad(z[:, 0].sum() + law.entropy().sum(), concentration)
    assert gradient.isfinite().all()
    assert law.log_prob(mean.expand(50, dim)).isfinite().all()


@pytest.mark.parametrize("dim", [2, 3, 10, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mean_on_a_coordinate_axis(dim, dtype):
    """The axes, both signs, are where reflections divide zero by zero."""
    for axis in (0, dim - 1):
        for sign in (1.0, -1.0):
            mean = torch.zeros(dim, dtype=dtype)
            mean[axis] = sign
            mean.requires_grad_()
            z = dist.VonMisesFisher(mean, torch.tensor(1e3, dtype=dtype)).rsample((100,))
            assert (z.detach() @ mean.detach()).mean() > 0.5
            (gradient,) = torch.autograd.grad(z[:, 0].sum(), mean)
            assert gradient.isfinite().all()


# Errors --------------------------------------------------------------------------------------------------------------

BAD = [
    (torch.tensor([1.0, 0.0, 0.0]), torch.tensor(math.nan), "concentration"),
    (torch.tensor([1.0, 0.0, 0.0]), torch.tensor(-1.0), "concentration"),
    (torch.tensor([1.0, 0.0, math.nan]), torch.tensor(1.0), "mean_direction"),
    (torch.tensor([3.0, 0.0, 4.0]), torch.tensor(1.0), "mean_direction"),
    (torch.zeros(3), torch.tensor(1.0), "mean_direction"),
    (torch.tensor([1.0]), torch.tensor(1.0), "mean_direction"),
    (torch.tensor(1.0), torch.tensor(1.0), "mean_direction"),
    (torch.eye(3)[:2], torch.ones(3), "concentration"),
]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("family", [dist.VonMisesFisher, dist.PowerSpherical])
@pytest.mark.parametrize(("mean", "kappa", "name"), BAD)
def test_bad_parameters(family, mean, kappa, name):
    """Named, with what was got and the way out."""
    with pytest.raises(ValueError, match=name) as error:
        family(mean, kappa, validate_args=True)
    assert "got" in str(error.value)


@pytest.mark.parametrize("dim", [0, 1, -3])
def test_bad_dimension(dim):
    with pytest.raises(ValueError, match="got"):
        dist.HypersphericalUniform(dim)


@by_name
@pytest.mark.parametrize(
    "value",
    [torch.tensor([2.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, math.nan]), torch.tensor([1.0, 0.0]), torch.eye(3)[:, :1]],
    ids=["length", "nan", "dimension", "shape"],
)
def test_bad_values(case, value):
    law = case.make(3, 10.0, torch.float32, batch=(2,))
    with pytest.raises(ValueError):
        law.log_prob(value)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("family", [dist.VonMisesFisher, dist.PowerSpherical])
def test_nan_without_validation_is_nan_and_not_a_hang(family):
    """Only the bad element of the batch is lost."""
    mean = torch.tensor([1.0, 0.0, 0.0]).expand(2, 3)
    z = family(mean, torch.tensor([math.nan, 5.0]), validate_args=False).rsample()
    assert z[0].isnan().any()
    assert constraints.sphere.check(z[1])


@by_name
def test_draws_come_from_the_generator_of_torch(case):
    law = case.make(10, 10.0, batch=(3,))
    draws = []
    for _ in range(2):
        torch.manual_seed(11)
        draws.append(law.rsample())
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], law.rsample())
