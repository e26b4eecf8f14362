"""The general recognition-parametrised model: any number of views, any prior, shared latents, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as pyro_dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from scipy import stats
from torch import nn

from pyro_contrastive import guides, models, priors
from pyro_contrastive.aggregates import FullData, MemoryBank
from pyro_contrastive.distributions import HypersphericalUniform, VonMisesFisher
from pyro_contrastive.fit import fit
from pyro_contrastive.kernels import VonMisesFisherKernel, shared_latent_log_ratio
from pyro_contrastive.objectives import KSampleELBO
from pyro_contrastive.shared_latent import fused_posterior

DIM, SIZE = 3, 9


def vmf_guide(**kwargs):
    return guides.VonMisesFisher(nn.Linear(6, 12), DIM, **kwargs)


def views(number, size=SIZE, noise=0.3):
    x = torch.randn(size, 6)
    return tuple(x + noise * torch.randn_like(x) for _ in range(number))


def own_prior():
    """A user's prior over three views: two looks at one place, and one at its opposite."""
    z1 = pyro.sample("z1", HypersphericalUniform(DIM))
    z2 = pyro.sample("z2", VonMisesFisher(z1, torch.tensor(9.0)))
    pyro.sample("z3", VonMisesFisher(-z2, torch.tensor(4.0)))


def star(number):
    def prior():
        centre = pyro.sample("z1", HypersphericalUniform(DIM))
        for j in range(2, number + 1):
            pyro.sample(f"z{j}", VonMisesFisher(centre, torch.tensor(9.0)))

    return prior


MODELS = {
    "walk, 3 views": (3, lambda: (guide := vmf_guide(), models.RPM(guide))),
    "chain, 4 views": (4, lambda: (guide := vmf_guide(), models.RPM(guide, priors.VonMisesFisherChain(DIM, 4)))),
    "function, 3 views": (3, lambda: (guide := vmf_guide(), models.RPM(guide, own_prior))),
    "clusters, 2 views": (2, lambda: (guide := vmf_guide(), models.RPM(guide, priors.Clusters(DIM, 4)))),
    "independent": (2, lambda: (guide := vmf_guide(), models.RPM(guide, priors.Independent(DIM)))),
    "InfoNCE": (2, lambda: (g := vmf_guide(), models.RPM(g, priors.InfoNCE(VonMisesFisherKernel(5.0, learn=True))))),
    "optimal": (2, lambda: (guide := vmf_guide(), models.RPM(guide, priors.optimal(DIM, hidden=8)))),
    "bank": (2, lambda: (guide := vmf_guide(), models.RPM(guide, aggregate=MemoryBank(20)))),
    "shared, 3 views": (
        3,
        lambda: (guide := guides.Fused(vmf_guide()), models.RPM(guide, priors.SharedUniform(DIM))),
    ),
    "dynamics, 5 views": (
        5,
        lambda: (guide := guides.Normal(nn.Linear(6, 12), 2), models.RPM(guide, priors.LinearDynamics(2, 5))),
    ),
    "smoothed dynamics": (
        3,
        lambda: (
            p := priors.LinearDynamics(2, 3),
            guide := guides.Smoothed(guides.Normal(nn.Linear(6, 12), 2), p),
            models.RPM(guide, p),
        )[1:],
    ),
    "full Gaussian": (
        2,
        lambda: (g := guides.Normal(nn.Linear(6, 12), 2, full=True), models.RPM(g, priors.LinearDynamics(2, 2))),
    ),
}
each_model = pytest.mark.parametrize("name", MODELS)


def make(name):
    number, build = MODELS[name]
    guide, model = build()
    return model, guide, views(number)


@each_model
def test_svi_moves_every_parameter(name):
    model, guide, data = make(name)
    before = {key: value.clone() for key, value in model.named_parameters()}
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    assert all(math.isfinite(svi.step(*data)) for _ in range(3))
    still = {key for key, value in model.named_parameters() if torch.equal(value, before[key])}
    # unrelated latents make nobody's parameters idle; the InfoNCE factor is blind to a constant of the last bias
    assert still <= ({"prior.kernel.second.4.bias"} if name == "optimal" else set())


@each_model
@pytest.mark.parametrize("elbo", [Trace_ELBO, KSampleELBO])
def test_vectorised_particles_and_one_plate_of_factors(name, elbo):
    model, guide, data = make(name)
    with pyro.settings.context(module_local_params=True):
        loss = elbo(4, vectorize_particles=True, max_plate_nesting=1)(model, guide)(*data)
        loss.backward()
    assert math.isfinite(loss.item())
    trace = poutine.trace(poutine.replay(model, poutine.trace(guide).get_trace(*data))).get_trace(*data)
    trace.compute_log_prob()
    observed = {k: v["log_prob"].shape for k, v in trace.nodes.items() if v["type"] == "sample" and v["is_observed"]}
    names = {"positive"} if name in ("InfoNCE", "optimal") else {f"x{j}" for j in range(1, len(data) + 1)}
    assert observed == dict.fromkeys(names, torch.Size([SIZE]))


@each_model
def test_predictive_draws_one_latent_per_view(name):
    model, guide, data = make(name)
    wanted = {"z"} if "shared" in name else {f"z{j}" for j in range(1, len(data) + 1)}
    for draws in (
        Predictive(model, guide=guide, num_samples=3, parallel=True)(*data),
        Predictive(model, num_samples=3, parallel=True)(*data),
    ):
        assert {key for key in draws if key.startswith("z")} == wanted
        assert all(draws[key].shape[0] == 3 and draws[key].shape[-2] == SIZE for key in wanted)


def test_fit_trains_three_views_and_resumes(tmp_path):
    def run(steps, out):
        torch.manual_seed(0)
        guide = vmf_guide()
        model = models.RPM(guide, aggregate=MemoryBank(24))
        data = [torch.randn(3, SIZE, 6, generator=torch.Generator().manual_seed(i)).unbind(0) for i in range(4)]
        options = {"num_views": 3, "device": "cpu", "progress": False, "out": out, "schedule": "constant", "lr": 1e-2}
        return fit(model, guide, data, steps=steps, **options)

    at_once = run(6, tmp_path / "one")
    run(3, tmp_path / "two")
    resumed = run(6, tmp_path / "two")
    assert {"x1", "x2", "x3"} < set(at_once.history)
    for key, value in at_once.model.state_dict().items():  # the bank included
        torch.testing.assert_close(resumed.model.state_dict()[key], value, rtol=0, atol=0)


def test_log_prior_is_the_density_of_the_functions_sites():
    model = models.RPM(vmf_guide(), own_prior)
    z = HypersphericalUniform(DIM).sample((3, 5))
    area = math.log(4 * math.pi)
    for i, got in enumerate(model.log_prior(*z).tolist()):
        a, b, c = (row[i].double().numpy() for row in z)
        a, b, c = (v / np.linalg.norm(v) for v in (a, b, c))
        want = -area + stats.vonmises_fisher(a, 9.0).logpdf(b) + stats.vonmises_fisher(-b, 4.0).logpdf(c)
        assert got == pytest.approx(float(want), abs=1e-5)


def test_elbo_of_three_views_by_hand():
    """Sum of log P(z1, z2, z3) - sum of log R(z_j), R the batch average, with scipy's densities."""
    guide = vmf_guide().double()

    def prior():
        z1 = pyro.sample("z1", HypersphericalUniform(DIM, dtype=torch.float64))
        z2 = pyro.sample("z2", VonMisesFisher(z1, torch.tensor(9.0, dtype=torch.float64)))
        pyro.sample("z3", VonMisesFisher(-z2, torch.tensor(4.0, dtype=torch.float64)))

    model = models.RPM(guide, prior)
    data, drawn = [x.double() for x in views(3)], {}

    def recording(*x):
        with poutine.trace() as capture:
            guide(*x)
        drawn.update({f"z{j}": capture.trace.nodes[f"z{j}"]["value"].detach().numpy() for j in (1, 2, 3)})

    elbo = -Trace_ELBO().loss(model, recording, *data)
    want = -SIZE * math.log(4 * math.pi)
    for i in range(SIZE):
        z1, z2, z3 = (drawn[f"z{j}"][i] for j in (1, 2, 3))
        want += stats.vonmises_fisher(z1, 9.0).logpdf(z2) + stats.vonmises_fisher(-z2, 4.0).logpdf(z3)
        for z, x in zip((z1, z2, z3), data, strict=True):
            q = guide.posterior(x)
            rows = zip(q.mean_direction.detach().numpy(), q.concentration.tolist(), strict=True)
            want -= math.log(sum(stats.vonmises_fisher(m, k).pdf(z) for m, k in rows) / SIZE)
    assert elbo == pytest.approx(float(want), rel=1e-9)


def test_fused_guide_is_tight_where_the_aggregate_is_uniform():
    """With R(z) uniform every draw has the same weight, the closed-form evidence of the shared latent."""
    draw = HypersphericalUniform(DIM, dtype=torch.float64).sample
    kappa = 10 * torch.rand(2, 6, dtype=torch.float64) + 1
    q1, q2 = VonMisesFisher(draw((6,)), kappa[0]), VonMisesFisher(draw((6,)), kappa[1])
    fused = fused_posterior([q1, q2])
    z, uniform = fused.sample((50,)), -math.log(4 * math.pi)
    weights = uniform + (q1.log_prob(z) - uniform) + (q2.log_prob(z) - uniform) - fused.log_prob(z)
    torch.testing.assert_close(weights, shared_latent_log_ratio(q1, q2).diagonal().expand(50, 6), rtol=0, atol=1e-9)


def test_partner_logits_of_a_given_prior_agree_with_the_default_one():
    """The same chain, once built in and once given, where the average of the posteriors is exactly uniform."""
    q = VonMisesFisher(torch.eye(DIM), torch.zeros(DIM))

    class Fixed(nn.Module):
        dim = DIM

        def posterior(self, x):
            return q

    x = torch.zeros(DIM, 1)
    chain, values = priors.VonMisesFisherChain(DIM, concentration=3.0), []
    for model in (models.RPM(Fixed(), concentration=3.0), models.RPM(Fixed(), chain)):
        torch.manual_seed(1)
        values.append(model.partner_logits(x, x, num_samples=16))
    torch.testing.assert_close(*values)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_one_view_is_refused():
    guide = vmf_guide()
    with pytest.raises(ValueError, match=r"J >= 2 views, got 1; pass model\(x1, x2"):
        models.RPM(guide)(torch.randn(SIZE, 6))


def test_views_of_unequal_length_are_both_named():
    guide = vmf_guide()
    with pytest.raises(ValueError, match=r"one leading dimension N, got x1 \(6, 6\), x2 \(6, 6\), x3 \(5, 6\)"):
        models.RPM(guide)(torch.randn(6, 6), torch.randn(6, 6), torch.randn(5, 6))


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (priors.VonMisesFisherChain(4), r"'z1' has event shape \(4,\) and the guide's posterior of x1 has \(3,\)"),
        (priors.LinearDynamics(2, 2), r"'z1' has event shape \(2,\) and the guide's posterior of x1 has \(3,\)"),
        (priors.SharedUniform(5), r"'z' has event shape \(5,\) and the guide's posterior of every view has \(3,\)"),
        (
            lambda: pyro.sample("z1", pyro_dist.Normal(torch.zeros(DIM), 1.0)),
            r"'z1' has event shape \(\) and the guide's posterior of x1 has \(3,\); .*to_event\(1\)",
        ),
        (star(3), "one latent per view, z1, z2 for 2 views, .*got z1, z2, z3"),
        (lambda: pyro.sample("z1", HypersphericalUniform(DIM)), "z1, z2 for 2 views, or one shared latent z, got z1"),
        (lambda: None, "got none of them"),
        (lambda: (pyro.sample("z", HypersphericalUniform(DIM)), star(2)()), "got z, z1, z2"),
    ],
)
@pytest.mark.parametrize("replayed", [False, True])
def test_a_prior_that_does_not_fit_names_both_sides(prior, message, replayed):
    guide, data = vmf_guide(), views(2)
    model = models.RPM(guide, prior)
    program = poutine.replay(model, poutine.trace(guide).get_trace(*data)) if replayed else model
    with pytest.raises(ValueError, match=message):
        program(*data)


@pytest.mark.parametrize("wrong", [3.0, priors.VonMisesFisherChain], ids=["number", "class"])
def test_a_prior_that_cannot_be_called_is_refused(wrong):
    with pytest.raises(TypeError, match="must be a Pyro function that samples"):
        models.RPM(vmf_guide(), wrong)


def test_options_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="that of the default prior, got 5.0 together with a prior"):
        models.RPM(vmf_guide(), own_prior, concentration=5.0)
    infonce = priors.InfoNCE(VonMisesFisherKernel(5.0))
    with pytest.raises(ValueError, match="cancels under the InfoNCE prior, got MemoryBank"):
        models.RPM(vmf_guide(), infonce, aggregate=MemoryBank(8))
    model = models.RPM(vmf_guide(), infonce)
    with pytest.raises(ValueError, match="relates two views, got 3"):
        model(*views(3))
    with pytest.raises(ValueError, match="no density of its own"):
        model.log_prior(torch.zeros(3), torch.zeros(3))


def test_fused_guide_refuses_what_it_cannot_fuse():
    with pytest.raises(TypeError, match="must be a recognition module of this package, got Linear"):
        guides.Fused(nn.Linear(6, 3))
    guide = guides.Fused(guides.PowerSpherical(nn.Linear(6, 12), DIM))
    with pytest.raises(TypeError, match="shared latent need VonMisesFisher.*got PowerSpherical"):
        guide(*views(2))


def test_full_data_aggregate_is_the_batch_aggregate_on_the_full_batch():
    guide = guides.VonMisesFisher(nn.Linear(6, 12), DIM, batch_norm=False)
    data, losses, gradients = views(2), [], []
    for aggregate in (None, FullData(*data)):
        torch.manual_seed(0)
        losses.append(Trace_ELBO()(models.RPM(guide, aggregate=aggregate), guide)(*data))
        gradients.append(torch.autograd.grad(losses[-1], list(guide.parameters())))
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)
