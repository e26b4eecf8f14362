"""What every distribution on the sphere owes to Pyro: shapes, gradients, symmetry, limits and clear errors.

Statistical tests: seeds are fixed; each states the rate of false alarms it would have under fresh seeds.
"""

from __future__ import annotations

import copy
import io
import math
import pickle

import numpy as np
import pyro
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from torch.distributions import Independent, kl_divergence

from pyro_contrastive import distributions as dist
from tests.spherical_cases import (
    CASES,
    F64,
    angle_between,
    by_concentrated,
    by_name,
    by_strength,
    unit,
)

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
