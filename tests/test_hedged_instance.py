"""Hedged instances: the factor against a loop over pairs and draws, in both averages; saturation; Pyro's settings."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_contrastive import guides, models
from pyro_contrastive.nets import mlp

DIM, SIZE = 3, 5


def pair(dtype=torch.float64, **options):
    guide = guides.VonMisesFisher(mlp([6, 8, 8]), DIM).to(dtype)
    return models.HedgedInstance(guide, **options).to(dtype), guide


def views(size=SIZE, dtype=torch.float64):
    return torch.randn(size, 6, dtype=dtype), torch.randn(size, 6, dtype=dtype)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def dot(a, b):
    return sum(float(u) * float(v) for u, v in zip(a, b, strict=True))


def log_mean(values):
    return math.log(sum(values) / len(values))


def test_one_draw_is_the_loop_over_pairs():
    model, guide = pair(scale=3.0, offset=-0.5)
    trace = poutine.trace(poutine.replay(model, poutine.trace(guide).get_trace(*(data := views())))).get_trace(*data)
    z1, z2 = trace.nodes["z1"]["value"].detach(), trace.nodes["z2"]["value"].detach()
    factor = trace.nodes["match"]["fn"].log_factor.detach()
    for i in range(SIZE):
        others = [math.log(1 - sigmoid(3 * dot(z1[i], z2[j]) - 0.5)) for j in range(SIZE) if j != i]
        expected = math.log(sigmoid(3 * dot(z1[i], z2[i]) - 0.5)) + sum(others) / len(others)
        assert float(factor[i]) == pytest.approx(expected, abs=1e-12)


def test_k_sample_averages_probabilities_inside_the_log():
    model, guide = pair(scale=3.0, offset=-0.5, evidence="k_sample", num_samples=4)
    drawn = []

    def recording(x):
        posterior = guide.posterior(x)
        draw = posterior.rsample

        def rsample(size=()):
            z = draw(size)
            if len(size):
                drawn.append(z.detach())
            return z

        posterior.rsample = rsample
        return posterior

    class Recorder(nn.Module):
        posterior = staticmethod(recording)

    trace = poutine.trace(models.HedgedInstance(Recorder(), scale=3.0, offset=-0.5, evidence="k_sample", num_samples=4))
    factor = trace.get_trace(*views()).nodes["match"]["fn"].log_factor.detach()
    z1, z2 = drawn
    assert z1.shape == (4, SIZE, DIM)
    for i in range(SIZE):
        p = [[sigmoid(3 * dot(z1[k, i], z2[k, j]) - 0.5) for k in range(4)] for j in range(SIZE)]
        others = [log_mean([1 - value for value in p[j]]) for j in range(SIZE) if j != i]
        expected = log_mean(p[i]) + sum(others) / len(others)
        assert float(factor[i]) == pytest.approx(expected, abs=1e-12)


def test_a_saturated_sigmoid_costs_nothing():
    model, guide = pair(torch.float32, scale=1_000.0)
    loss = Trace_ELBO()(model, guide)(*views(dtype=torch.float32))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in guide.parameters())


@pytest.mark.parametrize("evidence", ["elbo", "k_sample"])
@pytest.mark.parametrize("family", [guides.VonMisesFisher, guides.PowerSpherical, guides.ProjectedNormal])
def test_plain_svi_learns_the_match(evidence, family):
    guide = family(mlp([6, 16, 16]), DIM)
    model = models.HedgedInstance(guide, scale=8.0, offset=-4.0, evidence=evidence)
    x = torch.randn(64, 6)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 5e-3}), Trace_ELBO())
    losses = [svi.step(x, x + 0.1 * torch.randn_like(x)) / 64 for _ in range(50)]
    assert sum(losses[-10:]) / 10 < sum(losses[:10]) / 10 - 0.3


def test_vectorised_particles_average_the_same_factor():
    model, guide = pair()
    data = views()
    elbo = Trace_ELBO(num_particles=100, vectorize_particles=True, max_plate_nesting=1)
    many = float(elbo(model, guide)(*data).detach())
    single = Trace_ELBO()(model, guide)
    one = [float(single(*data).detach()) for _ in range(100)]
    mean, error = sum(one) / 100, float(torch.tensor(one).std()) / 10
    assert many == pytest.approx(mean, abs=5 * math.sqrt(2) * error)  # false alarm below 1e-6 over seeds


def test_state_goes_through_a_state_dict():
    (first, guide1), (second, guide2) = pair(), pair()
    second.load_state_dict(first.state_dict())
    x = views()[0]
    assert torch.equal(guide1.posterior(x).mean_direction, guide2.posterior(x).mean_direction)


def test_the_encoder_runs_once_per_view():
    model, guide = pair()
    calls = []
    guide.encoder.register_forward_hook(lambda *_: calls.append(1))
    SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO()).step(*views())
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, "`scale` must be > 0 and finite, got 0.0"),
        ({"scale": math.nan}, "`scale` must be > 0 and finite, got nan"),
        ({"offset": math.inf}, "`offset` must be finite, got inf"),
        ({"evidence": "exact"}, "one of elbo, k_sample, got 'exact'"),
        ({"num_samples": 0}, "integer >= 1, got 0"),
    ],
)
def test_errors_say_the_rule_and_what_was_got(options, message):
    with pytest.raises(ValueError, match=message):
        pair(**options)


def test_errors_of_a_call():
    model, _ = pair()
    with pytest.raises(ValueError, match=r"N >= 2 .*got \(1, 6\) and \(1, 6\)"):
        model(*views(1))
    with pytest.raises(ValueError, match=r"got \(5, 6\) and \(4, 6\)"):
        model(views()[0], views(4)[0])
    with pytest.raises(TypeError, match=r"posterior\(x\)"):
        models.HedgedInstance(nn.Linear(2, 2))
