"""The K-sample bound against scipy, hand-written loops, and a conjugate model whose evidence is known."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule, PyroParam
from scipy import special, stats
from torch import nn

from pyro_contrastive import guides, models
from pyro_contrastive.factors import infonce_factor
from pyro_contrastive.kernels import VonMisesFisherKernel
from pyro_contrastive.objectives import KSampleELBO

X = torch.tensor([-1.5, -0.2, 0.4, 1.0, 2.5], dtype=torch.float64)
NOISE = 0.8


class Model(PyroModule):
    """z ~ N(0, 1), x ~ N(z, NOISE): evidence N(x; 0, sqrt(1 + NOISE^2)) per row."""

    def forward(self, x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, NOISE), obs=x)


class Guide(PyroModule):
    """N(slope x, scale), on purpose not the posterior; remembers what it drew."""

    def __init__(self, slope=0.3, scale=0.9):
        super().__init__()
        self.slope = PyroParam(torch.tensor(slope, dtype=torch.float64))
        self.scale = PyroParam(torch.tensor(scale, dtype=torch.float64), constraint=dist.constraints.positive)
        self.draws = []

    def forward(self, x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(self.slope * x, self.scale))
        self.draws.append(z.detach())


def reference(x, z, slope=0.3, scale=0.9):
    """Sum over rows of log-mean-exp over particles, with scipy's densities; z is (K, N)."""
    x, z = np.asarray(x), np.asarray(z)
    log_w = stats.norm.logpdf(z) + stats.norm.logpdf(x, z, NOISE) - stats.norm.logpdf(z, slope * x, scale)
    return float(np.sum(special.logsumexp(log_w, axis=0) - math.log(len(z))))


def seeded(function, seed=3):
    torch.manual_seed(seed)
    return function()


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("particles", [1, 2, 7])
def test_equals_the_log_mean_exp_of_each_row(particles, vectorize):
    guide = Guide()
    elbo = KSampleELBO(particles, vectorize_particles=vectorize)
    loss = elbo.differentiable_loss(Model(), guide, X)
    draws = torch.stack([z.reshape(-1, len(X)) for z in guide.draws]).reshape(particles, len(X))
    assert loss.item() == pytest.approx(-reference(X, draws), rel=1e-12)
    # and that is not the joint log-mean-exp of whole batches, which is what a bound without rows would give
    if particles > 1:
        joint = np.array([reference(X, z[None]) for z in draws])
        assert abs(loss.item() + special.logsumexp(joint) - math.log(particles)) > 0.01


@pytest.mark.parametrize("vectorize", [False, True])
def test_one_particle_is_trace_elbo(vectorize):
    one = KSampleELBO(1, vectorize_particles=vectorize)
    results = []
    for elbo in (one, Trace_ELBO(max_plate_nesting=1)):
        pyro.clear_param_store()  # or the second guide would take over the first one's parameters by name
        guide = Guide()
        loss = seeded(lambda elbo=elbo, guide=guide: elbo.differentiable_loss(Model(), guide, X))
        loss.backward()
        results.append(torch.stack([loss.detach(), guide.slope.grad, guide.scale_unconstrained.grad]))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("vectorize", [False, True])
def test_batch_coupled_factor_equals_replay_by_hand(vectorize):
    """Contrastive factors: row i's weight of particle k holds that particle's whole softmax."""
    torch.manual_seed(1)
    guide = guides.VonMisesFisher(nn.Linear(4, 8), dim=3).double()
    model = models.MCInfoNCE(guide, concentration=5.0, evidence="elbo", symmetric=False).double()
    x1, x2 = torch.randn(6, 4).double(), torch.randn(6, 4).double()
    drawn = []

    def recording(*views):
        with poutine.trace() as capture:
            guide(*views)
        drawn.append([capture.trace.nodes[name]["value"].detach().reshape(-1, 6, 3) for name in ("z1", "z2")])

    loss = KSampleELBO(4, vectorize_particles=vectorize).differentiable_loss(model, recording, x1, x2).item()
    z1, z2 = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    assert z1.shape == (4, 6, 3)
    rows = []
    for i in range(6):
        weights = []
        for k in range(4):
            logits = [5.0 * float(z1[k, i] @ z2[k, j]) for j in range(6)]
            weights.append(math.exp(logits[i]) / (sum(map(math.exp, logits)) / 6))  # R of model and guide cancel
        rows.append(math.log(sum(weights) / 4))
    assert loss == pytest.approx(-sum(rows), rel=1e-9)


@pytest.mark.parametrize("vectorize", [False, True])
def test_gradient_is_that_of_the_bound_at_fixed_noise(vectorize):
    guide, elbo = Guide(), KSampleELBO(5, vectorize_particles=vectorize)

    def loss():
        return seeded(lambda: elbo.differentiable_loss(Model(), guide, X))

    loss().backward()
    for parameter in guide.parameters():
        start, step = parameter.detach().clone(), 1e-5
        values = []
        for sign in (1, -1):
            parameter.data.copy_(start + sign * step)
            values.append(loss().item())
        parameter.data.copy_(start)
        assert parameter.grad.item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6)


def test_gradient_equals_autograd_of_the_loop():
    guide = Guide()
    loss = KSampleELBO(5).differentiable_loss(Model(), guide, X)
    loss.backward()
    noise = (guide.draws[0].reshape(5, -1) - 0.3 * X) / 0.9
    slope, scale = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.3, 0.9))
    total = torch.zeros((), dtype=torch.float64)
    for i, x in enumerate(X):
        weights = torch.zeros((), dtype=torch.float64)
        for k in range(5):
            z = slope * x + scale * noise[k, i]
            log_joint = -0.5 * z**2 - 0.5 * ((x - z) / NOISE) ** 2 - math.log(2 * math.pi * NOISE)
            log_q = -0.5 * noise[k, i] ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)
            weights = weights + (log_joint - log_q).exp() / 5
        total = total - weights.log()
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-12)
    assert guide.slope.grad.item() == pytest.approx(slope.grad.item(), rel=1e-9)
    assert guide.scale_unconstrained.grad.item() == pytest.approx(0.9 * scale.grad.item(), rel=1e-9)  # scale = exp(u)


@pytest.mark.parametrize("vectorize", [False, True])
def test_two_plates_of_rows(vectorize):
    x = torch.randn(3, 4, dtype=torch.float64)

    def model(x):
        with pyro.plate("a", 3, dim=-2), pyro.plate("b", 4, dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, NOISE), obs=x)

    drawn = []

    def guide(x):
        with pyro.plate("a", 3, dim=-2), pyro.plate("b", 4, dim=-1):
            drawn.append(pyro.sample("z", dist.Normal(0.3 * x, 0.9)).reshape(-1, 12))

    elbo = KSampleELBO(5, vectorize_particles=vectorize, max_plate_nesting=2)
    assert elbo.differentiable_loss(model, guide, x).item() == pytest.approx(
        -reference(x.reshape(-1), torch.cat(drawn))
    )


@pytest.mark.parametrize("vectorize", [False, True])
def test_subsampled_rows_are_scaled_up(vectorize):
    data = torch.linspace(-2, 2, 100, dtype=torch.float64)
    seen = []

    def model(x):
        with pyro.plate("rows", 100, subsample_size=10, dim=-1) as index:
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, NOISE), obs=x[index])

    def guide(x):
        with pyro.plate("rows", 100, subsample_size=10, dim=-1) as index:
            seen.append((index, pyro.sample("z", dist.Normal(0.3 * x[index], 0.9)).reshape(-1, 10)))

    loss = KSampleELBO(3, vectorize_particles=vectorize).differentiable_loss(model, guide, data).item()
    if vectorize:
        ((index, z),) = seen
        want = 10 * reference(data[index], z)
        assert loss == pytest.approx(-want, rel=1e-12)
    else:  # every sequential particle would see other rows: they have no common row to average over
        assert math.isfinite(loss)


def test_svi_and_elbo_module_agree_and_train():
    guide = Guide(slope=-0.5)
    elbo = KSampleELBO(4)
    svi = SVI(Model(), guide, pyro.optim.Adam({"lr": 0.02}), elbo)
    number = seeded(lambda: svi.evaluate_loss(X))
    assert isinstance(number, float)
    module = elbo(Model(), guide)
    assert seeded(lambda: module(X)).item() == pytest.approx(number, rel=1e-12)
    first = seeded(lambda: svi.step(X))
    assert first == pytest.approx(number, rel=1e-12)
    for _ in range(500):
        svi.step(X)
    assert seeded(lambda: svi.evaluate_loss(X)) < number - 1.0
    # E[z | x] = x / (1 + NOISE^2): the bound is tight there and nowhere else, for every K
    assert guide.slope.item() == pytest.approx(1 / (1 + NOISE**2), abs=0.15)


def test_evaluate_loss_leaves_no_gradient():
    guide = Guide()
    SVI(Model(), guide, pyro.optim.Adam({}), KSampleELBO(2)).evaluate_loss(X)
    assert all(p.grad is None for p in guide.parameters())


def test_bound_grows_with_k_towards_the_known_evidence():
    rows = 2_000
    x = torch.ones(rows, dtype=torch.float64)
    evidence = stats.norm.logpdf(1.0, 0, math.sqrt(1 + NOISE**2))
    # guide = prior, so w = p(x|z); K = 1 by hand: E log N(1; z, NOISE) = -log(NOISE sqrt(2 pi)) - 2 / (2 NOISE^2)
    exact_elbo = -math.log(NOISE * math.sqrt(2 * math.pi)) - 1 / NOISE**2
    second = stats.norm.pdf(1.0, 0, math.sqrt(1 + NOISE**2 / 2)) / (2 * NOISE * math.sqrt(math.pi))  # E[w^2]
    spread = math.sqrt(second / math.exp(2 * evidence) - 1)  # coefficient of variation of w
    bounds = {}
    for k in (1, 4, 16, 64, 1024):
        bounds[k] = -KSampleELBO(k).loss(Model(), Guide(slope=0.0, scale=1.0), x) / rows
    # sd of log w at K = 1 is (z - 1)^2 / (2 NOISE^2) with variance (2 + 4) / (4 NOISE^4); 5 sigma: false alarm 6e-7
    assert abs(bounds[1] - exact_elbo) < 5 * math.sqrt(1.5) / NOISE**2 / math.sqrt(rows)
    values = list(bounds.values())
    assert all(a < b for a, b in zip(values[:3], values[1:4], strict=True))  # gaps of many sigma
    # delta method: bias -spread^2 / (2 K), sd spread / sqrt(K rows); 5 sigma
    want = evidence - spread**2 / 2 / 1024
    assert abs(bounds[1024] - want) < 5 * spread / math.sqrt(1024 * rows)


@pytest.mark.parametrize("particles", [0, -3])
def test_number_of_particles_is_checked(particles):
    with pytest.raises(ValueError, match=f"num_particles.*>= 1, got {particles}"):
        KSampleELBO(particles)


def test_site_outside_every_plate_is_refused():
    def model(x):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(shift, 1.0), obs=x)

    def guide(x):
        pyro.sample("shift", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="'shift' is outside every plate"):
        KSampleELBO(2).differentiable_loss(model, guide, X)


def test_site_in_fewer_plates_is_refused():
    def model(x):
        with pyro.plate("a", 3, dim=-2):
            pyro.sample("u", dist.Normal(torch.zeros(3, 1), 1.0))
            with pyro.plate("b", 4, dim=-1):
                pyro.sample("x", dist.Normal(torch.zeros(3, 4), 1.0), obs=x)

    def guide(x):
        with pyro.plate("a", 3, dim=-2):
            pyro.sample("u", dist.Normal(torch.zeros(3, 1), 1.0))

    with pytest.raises(ValueError, match="every site in the plates of the rows"):
        KSampleELBO(2, max_plate_nesting=2).differentiable_loss(model, guide, torch.zeros(3, 4))


def test_latent_without_pathwise_gradient_is_refused():
    def model(x):
        with pyro.plate("rows", len(x)):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x.float())

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)))

    with pytest.raises(NotImplementedError, match="'k' is Bernoulli"):
        KSampleELBO(2).differentiable_loss(model, guide, X)


def test_factor_in_the_guide_enters_with_the_other_sign():
    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, NOISE), obs=x)

    drawn = []

    def guide(x):
        with pyro.plate("rows", len(x)):
            drawn.append(pyro.sample("z", dist.Normal(0.3 * x, 0.9)).reshape(-1, len(x)))
            pyro.factor("extra", 0.1 * torch.arange(len(x)), has_rsample=True)

    loss = KSampleELBO(3).differentiable_loss(model, guide, X).item()
    assert loss == pytest.approx(-reference(X, drawn[0]) + 0.1 * (0 + 1 + 2 + 3 + 4), rel=1e-6)


def test_contrastive_model_of_a_user_with_a_plain_function():
    torch.manual_seed(2)
    guide = guides.PowerSpherical(nn.Linear(4, 8), dim=3)
    kernel = VonMisesFisherKernel(5.0)

    def model(x1, x2):
        q1, q2 = guide.posterior(x1), guide.posterior(x2)
        with pyro.plate("pairs", len(x1)):
            infonce_factor("positive", pyro.sample("z1", q1), pyro.sample("z2", q2), kernel)

    x = torch.randn(8, 4)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), KSampleELBO(4))
    losses = [svi.step(x, x) for _ in range(60)]
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
