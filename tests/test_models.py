"""Every model/guide pair in every setting Pyro can put it in."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import nn

from pyro_contrastive import guides, models
from pyro_contrastive.distributions import HypersphericalUniform, VonMisesFisher
from pyro_contrastive.factors import recognition_factor
from pyro_contrastive.nets import mlp
from pyro_contrastive.objectives import KSampleELBO

DIM, SIZE = 3, 10
STOCHASTIC = [guides.VonMisesFisher, guides.PowerSpherical, guides.ProjectedNormal]


def mcinfonce(evidence, **kwargs):
    options = {"concentration": math.inf if evidence == "exact" else 8.0, "evidence": evidence, "num_samples": 6}
    return lambda guide: models.MCInfoNCE(guide, **options | kwargs)


PAIRS = {
    "exact": (mcinfonce("exact"), guides.VonMisesFisher),
    "exact, one direction": (mcinfonce("exact", symmetric=False), guides.VonMisesFisher),
    "exact, latents apart": (mcinfonce("exact", concentration=8.0), guides.VonMisesFisher),
    "exact, mean of negatives": (mcinfonce("exact", concentration=8.0, negatives="mean"), guides.VonMisesFisher),
    "moment matched": (mcinfonce("moment_matched"), guides.VonMisesFisher),
    "Delta, elbo": (mcinfonce("elbo"), guides.Delta),
    "Delta, learned": (mcinfonce("elbo", learn_concentration=True), guides.Delta),
    "RPM, fixed prior": (lambda guide: models.RPM(guide, learn_concentration=False), guides.VonMisesFisher),
}
for _family in STOCHASTIC:
    PAIRS[f"{_family.__name__}, k_sample"] = (mcinfonce("k_sample"), _family)
    PAIRS[f"{_family.__name__}, elbo"] = (mcinfonce("elbo"), _family)
    PAIRS[f"{_family.__name__}, RPM"] = (models.RPM, _family)

each_pair = pytest.mark.parametrize("name", PAIRS)


def make(name, dtype=torch.float32):
    build, family = PAIRS[name]
    guide = family(mlp([6, 16, 12]), DIM).to(dtype)
    return build(guide).to(dtype), guide


def views(size=SIZE, dtype=torch.float32):
    """Two noisy looks at one thing."""
    x = torch.randn(size, 6, dtype=dtype)
    return x + 0.3 * torch.randn_like(x), x + 0.3 * torch.randn_like(x)


def latent_sites(trace):
    return [k for k, v in trace.nodes.items() if v["type"] == "sample" and k.startswith("z")]


@each_pair
def test_svi_trains_every_parameter_and_the_loss_falls(name):
    model, guide = make(name)
    data = views(64)

    def loss():
        torch.manual_seed(1)
        return sum(svi.evaluate_loss(*data) for _ in range(8)) / 8

    before = {k: v.clone() for k, v in model.state_dict().items()}
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 5e-3}), Trace_ELBO())
    first = loss()
    for _ in range(60):
        assert math.isfinite(svi.step(*data))
    assert loss() < first - 0.1 * 64  # a tenth of a nat per pair, far beyond the noise of 8 x 64 draws
    learned = {k for k, _ in model.named_parameters()}
    unmoved = {k for k in learned if torch.equal(model.state_dict()[k], before[k])}
    # exact and sampled losses depend on widths and directions alike; a Delta guide has directions only
    assert unmoved == set()
    fixed = {k for k in before if k not in learned and "batch_norm" not in k}  # its running statistics follow the data
    assert all(torch.equal(model.state_dict()[k], before[k]) for k in fixed)


@each_pair
@pytest.mark.parametrize("elbo", [Trace_ELBO, KSampleELBO])
@pytest.mark.parametrize("vectorize", [False, True])
def test_elbo_module_with_particles(name, elbo, vectorize):
    model, guide = make(name)
    with pyro.settings.context(module_local_params=True):
        objective = elbo(5, vectorize_particles=vectorize, max_plate_nesting=1)(model, guide)
        loss = objective(*views())
        loss.backward()
    assert loss.shape == () and torch.isfinite(loss)
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert torch.isfinite(p.grad).all() and (p.grad != 0).any(), key
    assert list(pyro.get_param_store().keys()) == []


@each_pair
def test_vectorised_and_sequential_particles_have_one_mean(name):
    model, guide = make(name)
    data = views(20)
    means, errors = [], []
    with torch.no_grad():
        for vectorize in (False, True):
            objective = Trace_ELBO(10, vectorize_particles=vectorize, max_plate_nesting=1)(model, guide)
            values = torch.stack([objective(*data) for _ in range(8)])
            means.append(values.mean().item())
            errors.append(values.var().item() / 8)
    # t-test on at least 7 degrees of freedom, 8 standard errors: false alarm below 1e-4; exact pairs agree to rounding
    assert abs(means[0] - means[1]) <= 8 * math.sqrt(sum(errors)) + 1e-4 * abs(means[0])


@each_pair
def test_trace_condition_and_replay(name):
    model, guide = make(name)
    data = views()
    guide_trace = poutine.trace(guide).get_trace(*data)
    replayed = poutine.trace(poutine.replay(model, guide_trace)).get_trace(*data)
    assert latent_sites(replayed) == latent_sites(guide_trace) == ["z1", "z2"]
    for site in ("z1", "z2"):
        assert replayed.nodes[site]["value"] is guide_trace.nodes[site]["value"]
    replayed.compute_log_prob()
    factors = {"x1", "x2"} if "RPM" in name else {"positive"}
    observed = {k for k, v in replayed.nodes.items() if v["type"] == "sample" and v["is_observed"]}
    assert observed == factors
    assert all(replayed.nodes[f]["log_prob"].shape == (SIZE,) for f in factors)
    assert all((replayed.nodes[f]["log_prob"] <= math.log(SIZE) + 1e-4).all() for f in factors)

    z1 = nn.functional.normalize(torch.randn(SIZE, DIM), dim=-1)
    conditioned = poutine.trace(poutine.condition(model, {"z1": z1})).get_trace(*data)
    assert conditioned.nodes["z1"]["value"] is z1 and conditioned.nodes["z1"]["is_observed"]
    if PAIRS[name][1] is not guides.Delta:
        assert math.isfinite(conditioned.log_prob_sum().item())


@each_pair
@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(name, parallel):
    model, guide = make(name)
    data = views()
    for predictive in (
        Predictive(model, guide=guide, num_samples=7, parallel=parallel),
        Predictive(model, num_samples=7, parallel=parallel),
    ):
        draws = predictive(*data)
        for site in ("z1", "z2"):
            z = draws[site].reshape(7, SIZE, DIM)
            torch.testing.assert_close(z.norm(dim=-1), torch.ones(7, SIZE))
            assert (PAIRS[name][1] is guides.Delta) or not torch.equal(z[0], z[1])


@each_pair
def test_predictive_with_the_guide_draws_from_the_posterior(name):
    model, guide = make(name)
    x1, x2 = views()
    with torch.no_grad():
        z = Predictive(model, guide=guide, num_samples=4_000, parallel=True)(x1, x2)["z2"].reshape(4_000, SIZE, DIM)
        reference = guide.posterior(x2).sample((4_000,))
    # components in [-1, 1]: the difference of two means has sd at most 0.0224; 30 comparisons at 5 sd: below 2e-5
    assert (z.mean(0) - reference.mean(0)).abs().max() < 5 * math.sqrt(2 / 4_000)


@each_pair
def test_state_dict_of_the_model_is_everything(name):
    source, _ = make(name)
    target, guide = make(name)
    target.load_state_dict(source.state_dict())
    data, losses = views(), []
    for model in (source, target):
        torch.manual_seed(4)
        losses.append(Trace_ELBO()(model, model.guide)(*data).item())
    assert losses[0] == losses[1]
    assert target.guide is guide


@each_pair
def test_double_agrees_with_single(name):
    """The same closed form in both precisions; sampled pairs are only finite and of the right type."""
    single, guide = make(name)
    data = views()
    expected = Trace_ELBO()(single, guide)(*data).item()
    double = single.double()
    loss = Trace_ELBO()(double, double.guide)(*(x.double() for x in data))
    loss.backward()
    assert loss.dtype == torch.float64 and math.isfinite(loss.item())
    assert all(p.grad.dtype == torch.float64 for p in double.parameters())
    if name in ("exact", "exact, one direction", "moment matched", "Delta, elbo"):
        assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_two_models_share_one_guide():
    guide = guides.VonMisesFisher(mlp([6, 16, 12]), DIM)
    first, second = models.RPM(guide), models.MCInfoNCE(guide)
    data = views()
    alone = Trace_ELBO()(second, guide)(*data).item()
    loss = Trace_ELBO()(first, guide)(*data) + Trace_ELBO()(second, guide)(*data)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in guide.parameters())
    assert Trace_ELBO()(second, guide)(*data).item() == pytest.approx(alone, rel=1e-5)
    for model in (first, second):
        before = guide.concentration.output.bias.clone()
        SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO()).step(*data)
        assert not torch.equal(guide.concentration.output.bias, before)


def test_model_of_a_user_trains_with_plain_svi():
    guide = guides.VonMisesFisher(mlp([6, 16, 12]), DIM)

    def model(x1, x2):
        kappa = pyro.param("kappa", torch.tensor(10.0), constraint=constraints.positive)
        with pyro.plate("pairs", len(x1)):
            z1 = pyro.sample("z1", HypersphericalUniform(DIM))
            z2 = pyro.sample("z2", VonMisesFisher(z1, kappa))
            recognition_factor("x1", z1, guide.posterior(x1))
            recognition_factor("x2", z2, guide.posterior(x2))

    data = views(64)
    torch.manual_seed(3)
    own = -Trace_ELBO().loss(model, guide, *data)
    torch.manual_seed(3)
    assert own == pytest.approx(-Trace_ELBO().loss(models.RPM(guide, concentration=10.0), guide, *data), rel=1e-5)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 5e-3}), Trace_ELBO())
    losses = [svi.step(*data) for _ in range(80)]
    assert sum(losses[-10:]) < sum(losses[:10])
    assert pyro.param("kappa").item() != 10.0


@each_pair
def test_batch_of_one_is_refused(name):
    model, guide = make(name)
    with pytest.raises(ValueError, match="needs at least 2, got 1; use a larger batch"):
        Trace_ELBO()(model, guide)(*views(1))


def test_views_of_different_length_are_refused():
    for name in ("exact", "Delta, elbo", "VonMisesFisher, RPM"):
        model, guide = make(name)
        with pytest.raises(ValueError, match="one leading dimension"):
            Trace_ELBO()(model, guide)(torch.randn(6, 6), torch.randn(5, 6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evidence": "exakt"}, "one of exact, moment_matched, k_sample, elbo, got 'exakt'"),
        ({"negatives": "all"}, "one of sum, mean, got 'all'"),
        ({"evidence": "k_sample"}, "finite `concentration`"),
        ({"evidence": "elbo"}, "finite `concentration`"),
        ({"learn_concentration": True}, "nothing to learn"),
        ({"concentration": 0.0}, "positive and finite, got 0.0"),
        ({"concentration": -1.0}, "positive and finite, got -1.0"),
        ({"concentration": -math.inf}, "positive and finite, got -inf"),
        ({"concentration": math.nan}, "positive and finite, got nan"),
        ({"concentration": 5.0, "evidence": "k_sample", "num_samples": 0}, "must be an integer >= 1, got 0"),
    ],
)
def test_arguments_of_mcinfonce_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        models.MCInfoNCE(guides.VonMisesFisher(nn.Linear(6, 12), DIM), **options)


@pytest.mark.parametrize("concentration", [0.0, -1.0, math.inf, math.nan])
def test_arguments_of_rpm_are_checked(concentration):
    with pytest.raises(ValueError, match="positive and finite"):
        models.RPM(guides.VonMisesFisher(nn.Linear(6, 12), DIM), concentration=concentration)


@pytest.mark.parametrize("evidence", ["exact", "moment_matched"])
@pytest.mark.parametrize("family", [guides.PowerSpherical, guides.ProjectedNormal, guides.Delta])
def test_closed_forms_name_the_guide_they_need(evidence, family):
    guide = family(mlp([6, 16, 12]), DIM)
    with pytest.raises(TypeError, match="guides.VonMisesFisher, or evidence='k_sample'"):
        Trace_ELBO()(mcinfonce(evidence)(guide), guide)(*views())


def test_rpm_refuses_point_embeddings():
    guide = guides.Delta(mlp([6, 16, 12]), DIM)
    with pytest.raises(ValueError, match="needs a recognition law with a density, got Delta"):
        Trace_ELBO()(models.RPM(guide), guide)(*views())


def test_concentration_is_readable_whatever_the_evidence():
    guide = guides.VonMisesFisher(nn.Linear(6, 12), DIM)
    assert models.MCInfoNCE(guide).concentration.item() == math.inf
    assert models.MCInfoNCE(guide, concentration=8.0).concentration.item() == 8.0
    assert models.RPM(guide, concentration=8.0).concentration.item() == pytest.approx(8.0)
    learned = {k for k, _ in models.RPM(guide).named_parameters() if "guide" not in k}
    assert learned == {"concentration_unconstrained"}
    assert not {k for k, _ in models.RPM(guide, learn_concentration=False).named_parameters() if "guide" not in k}
