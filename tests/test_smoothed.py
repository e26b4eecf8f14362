"""The smoothing guide against the joint normal law written as one matrix, and the video against its dynamics."""

from __future__ import annotations

import argparse
import math

import pyro
import pyro.distributions as pyro_dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_contrastive import guides, priors
from pyro_contrastive.data import MovingObject

STEPS, DIM, SIZE = 4, 3, 5
NOISE = (0.3, 0.5, 0.4)


@pytest.fixture
def pair():
    """A prior that is stationary at the standard normal law, its guide with widths on both sides of 1, and views."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator, dtype=torch.float64))[0]
    decay = torch.tensor([math.sqrt(1 - s * s) for s in NOISE], dtype=torch.float64)
    prior = priors.LinearDynamics(DIM, STEPS, transition=decay[:, None] * turn, noise=NOISE).double()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        guide = guides.Normal(nn.Linear(6, 16), DIM, initial_scale=0.6).double()
        nn.init.normal_(guide.scale.output.weight, std=0.3)
    views = torch.randn(STEPS, SIZE, 6, generator=generator, dtype=torch.float64)
    return guides.Smoothed(guide.eval(), prior), list(views)


def dense(smoothed, views, item):
    """Precision and linear term of the joint law of all states, axis by axis of the sum of squares."""
    prior = smoothed.prior
    inverse = torch.diag(prior.noise**-2)
    precision = torch.zeros(STEPS * DIM, STEPS * DIM, dtype=torch.float64)
    linear = torch.zeros(STEPS * DIM, dtype=torch.float64)
    at = [slice(j * DIM, (j + 1) * DIM) for j in range(STEPS)]
    precision[at[0], at[0]] += torch.eye(DIM)
    for a, b in zip(at[:-1], at[1:], strict=True):
        precision[a, a] += prior.transition.T @ inverse @ prior.transition
        precision[b, b] += inverse
        precision[a, b] -= prior.transition.T @ inverse
        precision[b, a] -= inverse @ prior.transition
    for j, x in enumerate(views):
        law = smoothed.posterior(x).base_dist
        scale = law.scale[item].clamp(max=1.0)
        precision[at[j], at[j]] += torch.diag(scale**-2 - 1)
        linear[at[j]] += law.loc[item] / scale**2
    return precision, linear, at


@torch.no_grad()
def test_marginals_and_draws_have_the_joint_law(pair):
    smoothed, views = pair
    scales = torch.stack([smoothed.posterior(x).base_dist.scale for x in views])
    assert scales.min() < 0.7 and scales.max() > 1.0  # both sides of what the aggregate allows
    laws = smoothed.smoothed(*views)
    trace = poutine.trace(smoothed).get_trace(*views)
    drawn = torch.stack([trace.nodes[f"z{j}"]["value"] for j in range(1, STEPS + 1)], 1)
    density = sum(trace.nodes[f"z{j}"]["fn"].log_prob(drawn[:, j - 1]) for j in range(1, STEPS + 1))
    for item in range(SIZE):
        precision, linear, at = dense(smoothed, views, item)
        covariance = torch.linalg.inv(precision)
        mean = covariance @ linear
        joint = pyro_dist.MultivariateNormal(mean, precision_matrix=precision)
        torch.testing.assert_close(density[item], joint.log_prob(drawn[item].flatten()), rtol=1e-9, atol=1e-9)
        for law, rows in zip(laws, at, strict=True):
            torch.testing.assert_close(law.mean[item], mean[rows], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(law.covariance_matrix[item], covariance[rows, rows], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_bound_is_tight_where_the_aggregate_is_standard_normal(pair):
    """log P + sum log R / N(0, I) - log Q is then the evidence, whatever the draw."""
    smoothed, views = pair
    smoothed.guide.scale.forward = lambda features: torch.full((len(features), DIM), 0.7, dtype=torch.float64)
    standard = pyro_dist.Normal(torch.zeros(DIM, dtype=torch.float64), 1.0).to_event(1)
    weights = []
    for seed in range(2):
        pyro.set_rng_seed(seed)
        trace = poutine.trace(smoothed).get_trace(*views)
        trace.compute_log_prob()
        with pyro.plate("pairs", SIZE, dim=-1):
            conditioned = poutine.condition(
                smoothed.prior, {k: v["value"] for k, v in trace.nodes.items() if k[0] == "z"}
            )
            prior = poutine.trace(conditioned).get_trace()
        prior.compute_log_prob()
        weight = torch.zeros(SIZE, dtype=torch.float64)
        for j, x in enumerate(views, start=1):
            z = trace.nodes[f"z{j}"]["value"]
            weight += prior.nodes[f"z{j}"]["log_prob"] - trace.nodes[f"z{j}"]["log_prob"]
            weight += smoothed.posterior(x).log_prob(z) - standard.log_prob(z)
        weights.append(weight)
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-9, atol=1e-9)
    # the evidence again, from the covariance of all states: views are normal around them, up to a factor each
    for item in range(SIZE):
        precision, linear, _ = dense(smoothed, views, item)
        prior_precision = precision - torch.eye(STEPS * DIM, dtype=torch.float64) * (0.7**-2 - 1)
        locs = torch.stack([smoothed.posterior(x).base_dist.loc[item] for x in views]).flatten()
        expected = 0.5 * (
            prior_precision.logdet() - precision.logdet() + linear @ torch.linalg.solve(precision, linear)
        )
        expected = expected - STEPS * DIM * math.log(0.7) - 0.5 * (locs / 0.7) @ (locs / 0.7)
        torch.testing.assert_close(weights[0][item], expected, rtol=1e-9, atol=1e-9)


def test_gradients_reach_the_views_and_the_dynamics(pair):
    smoothed, views = pair
    parameters = dict(smoothed.named_parameters())
    loss = sum(law.mean.square().sum() + law.covariance_matrix.logdet().sum() for law in smoothed.smoothed(*views))
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    assert {name for name, g in zip(parameters, gradients, strict=True) if g.abs().sum() > 0} == set(parameters)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda g, p: guides.Smoothed(nn.Linear(6, 3), p), TypeError, "`guide` must be a guides.Normal, got Linear"),
        (lambda g, p: guides.Smoothed(g, lambda: None), TypeError, "`prior` must be a priors.LinearDynamics, got func"),
        (
            lambda g, p: guides.Smoothed(guides.Normal(nn.Linear(6, 8), 3, full=True), p),
            ValueError,
            "independent axes, got one with full=True",
        ),
        (
            lambda g, p: guides.Smoothed(guides.Normal(nn.Linear(6, 8), 2), p),
            ValueError,
            "one dimension, got dim=2 and dim=3",
        ),
        (lambda g, p: guides.Smoothed(g, p)(torch.zeros(5, 6)), ValueError, "the prior has 4 views, got 1"),
        (lambda g, p: guides.Smoothed(g, p).smoothed(), ValueError, "the prior has 4 views, got 0"),
        (lambda g, p: MovingObject(1), ValueError, "`num_frames` must be >= 2 and `size` >= 8, got 1 and 24"),
        (lambda g, p: MovingObject(angle=4.0), ValueError, r"`angle` must lie in \(0, pi\)"),
        (
            lambda g, p: MovingObject(noise=math.nan),
            ValueError,
            "`background` and `noise` must be >= 0 and finite, got 0.05 and nan",
        ),
        (lambda g, p: MovingObject().sample(0), ValueError, "`num_items` must be >= 1, got 0"),
    ],
)
def test_bad_input(build, error, message):
    guide, prior = guides.Normal(nn.Linear(6, 8), DIM), priors.LinearDynamics(DIM, STEPS)
    with pytest.raises(error, match=message):
        build(guide, prior)


def test_video_moves_as_its_dynamics_say():
    """Means and covariances of 4,000 clips: 60 numbers, each off by 5 standard errors less than once in 10^6."""
    world = MovingObject(3, angle=0.7, damping=0.8)
    video = world.sample(4_000, seed=3)
    state = torch.cat([video.position, video.velocity], -1)
    transition = world.dynamics().transition
    for t in range(3):
        assert state[:, t].mean(0).abs().max() < 5 / math.sqrt(4_000)
        after = state[:, t].T @ state[:, 0] / 4_000
        torch.testing.assert_close(
            after, torch.linalg.matrix_power(transition, t), rtol=0, atol=5 * math.sqrt(2 / 4_000)
        )
    torch.testing.assert_close(transition @ transition.T + (1 - 0.8**2) * torch.eye(4), torch.eye(4))


def test_frames_show_the_position_on_a_texture_of_the_clip():
    world = MovingObject(2, size=25, background=0.3, noise=0.0)
    video = world.sample(3, seed=0)
    blob = world.render(video.position)
    texture = torch.stack(video.frames, 1).squeeze(2) - blob
    torch.testing.assert_close(texture[:, 0], texture[:, 1])
    assert 0.05 < texture.std() < 0.3
    image = world.render(torch.tensor([0.5, -1.25]))
    row, column = divmod(int(image.argmax()), 25)
    assert world.grid[column] == 0.5 and world.grid[row] == -1.25 and image.max() == 1
    again = next(iter(world.batches(3, seed=5))), next(iter(world.batches(3, seed=5)))
    assert len(again[0]) == 2 and all(torch.equal(a, b) for a, b in zip(*again, strict=True))


def test_ceiling_is_what_least_squares_finds(example):
    """No map of the true positions does better; 200,000 clips put the sample's R^2 within .004 (5 standard errors)."""
    world = MovingObject(4, angle=0.5, damping=0.9)
    state = torch.randn(200_000, 4, generator=torch.Generator().manual_seed(0))
    states = [state]
    for step in range(3):
        kick = torch.randn(200_000, 4, generator=torch.Generator().manual_seed(step + 1))
        states.append(states[-1] @ world.transition.T + math.sqrt(1 - 0.81) * kick)
    clips = torch.stack(states, 1)
    position, velocity = clips[..., :2].flatten(1), clips[..., 2:].flatten(1)
    left = velocity - position @ torch.linalg.lstsq(position, velocity).solution
    assert example("moving_object").ceiling(world) == pytest.approx(1 - left.var(0).mean().item(), abs=0.004)


def test_example_runs_and_goes_on(example, tmp_path):
    args = argparse.Namespace(out=tmp_path, seed=3, device="cpu", small=True, background=0.05)
    module = example("moving_object")
    figures = module.main(args)
    names = {"position", "velocity"}
    wanted = {f"{m} {n}, seed 3" for m in module.METHODS for n in names}
    wanted |= {f"dynamics in {level}, seed 3" for level in ("50%", "80%", "95%")} | {"ceiling velocity"}
    assert set(figures) == wanted and all(math.isfinite(value) for value in figures.values())
    assert (tmp_path / "moving_object.png").stat().st_size > 10_000
    assert module.main(args) == figures  # from the checkpoints
