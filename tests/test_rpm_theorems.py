"""The paper's theorem in a world small enough to enumerate, through Pyro's own ELBO: 12 symbols a view, 4 states.

Aitchison and Ganev 2021 (arXiv 2107.02495): the ELBO of a recognition-parametrised model is, up to a constant of the
data, I_R - KL(R(z, z') || P(z, z')). Everything is a table here, so both sides are finite sums: the right one is
written out, the left one comes from `TraceEnum_ELBO` over a plate of all V * V pairs, scaled by their probability.
"""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions import Categorical, Delta
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate

from pyro_contrastive.factors import infonce_log_ratio

V, K = 12, 4
TOLERANCE = 1e-10


class World:
    """P*(x, x'), recognition tables R(z|x), R'(z'|x'), and what follows from them."""

    def __init__(self, seed: int, deterministic: bool = False) -> None:
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        self.pairs = (2 * normal(V * V)).softmax(0).view(V, V)
        self.first, self.second = (1.5 * normal(V, K)).softmax(1), (1.5 * normal(V, K)).softmax(1)
        self.deterministic = deterministic
        self.f = torch.rand(K, K, generator=draw, dtype=torch.float64) + 0.2
        if deterministic:
            self.first, self.second = (torch.eye(K).double()[table.argmax(1)] for table in (self.first, self.second))
        self.joint = self.first.T @ self.pairs @ self.second  # R(z, z')
        self.marginal1, self.marginal2 = self.joint.sum(1), self.joint.sum(0)

    @property
    def information(self) -> float:
        """I_R, from its definition."""
        total = 0.0
        for z in range(K):
            for w in range(K):
                p = self.joint[z, w].item()
                total += p * math.log(p / (self.marginal1[z] * self.marginal2[w]).item()) if p else 0.0
        return total

    def prior(self, kind: str) -> torch.Tensor:
        if kind == "optimal":
            return self.joint
        independent = self.marginal1[:, None] * self.marginal2
        if kind == "independent":
            return independent
        weights = self.marginal2 * self.f  # InfoNCE: P(z) = R(z), P(z'|z) = R(z') f / Z(z)
        return self.marginal1[:, None] * weights / weights.sum(1, keepdim=True)

    def divergence(self, prior: torch.Tensor) -> float:
        """KL(R || P)."""
        return torch.special.xlogy(self.joint, self.joint / prior).nan_to_num(0.0).sum().item()

    def evidence(self, prior: torch.Tensor) -> float:
        """Expected log evidence less the constant, by a loop over the pairs."""
        total = 0.0
        for x in range(V):
            for y in range(V):
                ratio = prior / (self.marginal1[:, None] * self.marginal2)
                likelihood = (self.first[x][:, None] * self.second[y] * ratio).sum()
                total += (self.pairs[x, y] * likelihood.log()).item()
        return total

    def pyro_elbo(self, prior: torch.Tensor, tight: bool = False) -> float:
        """The ELBO less the constant, by Pyro: model and guide enumerate z1 and z2 of each of the V * V pairs."""
        x, y = (t.reshape(-1) for t in torch.meshgrid(torch.arange(V), torch.arange(V), indexing="ij"))
        ratio = prior / (self.marginal1[:, None] * self.marginal2)
        tilted = self.first[x][:, :, None] * self.second[y][:, None, :] * ratio
        tilted = tilted / tilted.sum((1, 2), keepdim=True)  # R R' P / (R R'), normalised: the posterior

        conditional = (prior / prior.sum(1, keepdim=True)).nan_to_num(1 / K)  # a state that is never used has any

        def weighted_plate():
            return pyro.plate("pairs", V * V), poutine.scale(scale=self.pairs.reshape(-1))

        def model():
            plate, scale = weighted_plate()
            with plate as i, scale:
                z1 = pyro.sample("z1", Categorical(prior.sum(1)))
                z2 = pyro.sample("z2", Categorical(conditional[z1]))
                pyro.factor("x1", (self.first[x[i], z1] / self.marginal1[z1]).log())
                pyro.factor("x2", (self.second[y[i], z2] / self.marginal2[z2]).log())

        @config_enumerate
        def guide():
            plate, scale = weighted_plate()
            with plate as i, scale:
                if self.deterministic:  # Categorical would give the impossible states a probability of rounding
                    pyro.sample("z1", Delta(self.first[x].argmax(1)))
                    pyro.sample("z2", Delta(self.second[y].argmax(1)))
                elif tight:
                    z1 = pyro.sample("z1", Categorical(tilted.sum(2)))
                    pyro.sample("z2", Categorical(tilted[i, z1] / tilted[i, z1].sum(-1, keepdim=True)))
                else:
                    pyro.sample("z1", Categorical(self.first[x]))
                    pyro.sample("z2", Categorical(self.second[y]))

        elbo = Trace_ELBO if self.deterministic else TraceEnum_ELBO
        return -elbo(max_plate_nesting=1).loss(model, guide)


@pytest.fixture(params=[0, 1, 2])
def world(request):
    return World(request.param)


@pytest.mark.parametrize("kind", ["optimal", "infonce", "independent"])
def test_elbo_is_the_information_less_the_divergence_of_the_prior(world, kind):
    prior = world.prior(kind)
    assert world.pyro_elbo(prior) == pytest.approx(world.information - world.divergence(prior), abs=TOLERANCE)


def test_optimal_prior_makes_the_elbo_the_mutual_information(world):
    elbo = world.pyro_elbo(world.prior("optimal"))
    assert elbo == pytest.approx(world.information, abs=TOLERANCE)
    assert elbo > 0.01


def test_infonce_prior_makes_the_elbo_infinite_sample_infonce(world):
    by_definition = (world.joint * world.f.log()).sum() - world.marginal1 @ (world.f @ world.marginal2).log()
    elbo = world.pyro_elbo(world.prior("infonce"))
    assert elbo == pytest.approx(by_definition.item(), abs=TOLERANCE)
    assert elbo < world.information - 0.01  # loose as a bound on the information, exact as an ELBO


def test_independent_prior_makes_it_zero(world):
    prior = world.prior("independent")
    assert world.pyro_elbo(prior) == pytest.approx(0.0, abs=TOLERANCE)
    assert world.evidence(prior) == pytest.approx(0.0, abs=TOLERANCE)


@pytest.mark.parametrize("kind", ["optimal", "infonce"])
def test_tight_guide_closes_the_gap_that_the_product_guide_leaves(world, kind):
    prior = world.prior(kind)
    evidence = world.evidence(prior)
    assert world.pyro_elbo(prior, tight=True) == pytest.approx(evidence, abs=TOLERANCE)
    assert world.pyro_elbo(prior) < evidence - 0.01


def test_without_noise_the_product_guide_is_tight():
    world = World(0, deterministic=True)
    prior = world.prior("optimal")
    assert world.pyro_elbo(prior) == pytest.approx(world.evidence(prior), abs=TOLERANCE)
    assert world.pyro_elbo(prior) == pytest.approx(world.information, abs=TOLERANCE)


@pytest.mark.parametrize("size", [2, 4, 64])
def test_finite_sample_infonce_is_at_most_log_n_and_the_information(world, size):
    """I_N <= min(log N, I_R) for any f, the true ratio (its best) included, in expectation over batches.

    The mean over 2,000 batches has a standard error e; it exceeds the bound by 5 e with probability below 1e-6.
    """
    generator = torch.Generator().manual_seed(size)
    ratio = world.joint / (world.marginal1[:, None] * world.marginal2)
    cells = torch.multinomial(world.joint.reshape(-1), 2_000 * size, replacement=True, generator=generator)
    z, w = (cells // K).view(2_000, size), (cells % K).view(2_000, size)
    for f in (world.f, ratio, ratio**3):
        values = infonce_log_ratio(f.log()[z[:, :, None], w[:, None, :]])
        assert (values <= math.log(size) + 1e-12).all()
        estimate = values.mean(1)
        assert estimate.mean() <= world.information + 5 * estimate.std() / math.sqrt(2_000)
        if f is ratio and size == 64:  # and it reaches the information
            assert estimate.mean().item() == pytest.approx(world.information, abs=0.05)


def test_deterministic_world_attains_log_n_only_as_a_bound():
    """Two views that determine each other carry more than log 2 nats, of which batches of two see at most log 2."""
    positives = 50.0 * torch.eye(2, dtype=torch.float64)
    assert infonce_log_ratio(positives).mean().item() == pytest.approx(math.log(2), abs=TOLERANCE)
