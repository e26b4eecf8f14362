"""One discrete latent for all views: exact by enumeration, against sums written as loops."""

from __future__ import annotations

import itertools
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate, infer_discrete
from torch import nn

from pyro_contrastive import diagnostics, guides, models
from pyro_contrastive.factors import recognition_factor, state_log_ratio
from pyro_contrastive.fit import fit

N, K, DIM = 7, 4, 6
PRIOR = (0.1, 0.2, 0.3, 0.4)


def no_guide(*views):
    """Nothing is left to approximate."""


def make(num_views, *, separate=False, prior=PRIOR, learn_prior=False):
    """A model in float64 whose laws are far from uniform, and views."""
    parts = [guides.Categorical(nn.Linear(DIM, 16), K).double() for _ in range(num_views if separate else 1)]
    with torch.no_grad():
        for part in parts:
            part.logits.weight.mul_(4)
    prior = None if prior is None else torch.tensor(prior, dtype=torch.float64)
    model = models.DiscreteRPM(parts if separate else parts[0], prior=prior, learn_prior=learn_prior)
    return model.double().eval(), list(torch.randn(num_views, N, DIM, dtype=torch.float64))


def tables(model, views):
    """f_j(k|x_n) as nested lists."""
    parts = model.guide if isinstance(model.guide, nn.ModuleList) else [model.guide] * len(views)
    return [part.posterior(x).probs.tolist() for part, x in zip(parts, views, strict=True)]


def brute_force(f, prior, index):
    """prior(k) prod_j f_j(k|x_j,index_j) / F_j(k), a list over k."""
    weights = []
    for k in range(len(prior)):
        weight = prior[k]
        for j, table in enumerate(f):
            if index[j] is not None:
                weight *= table[index[j]][k] / (sum(row[k] for row in table) / len(table))
        weights.append(weight)
    return weights


def enum_elbo(**options):
    return TraceEnum_ELBO(max_plate_nesting=1, **options)


CASES = [(2, False), (2, True), (3, False), (3, True)]


@pytest.mark.parametrize(("num_views", "separate"), CASES)
def test_evidence_and_posterior_are_the_sums_over_states(num_views, separate):
    model, views = make(num_views, separate=separate)
    f = tables(model, views)
    sums = [brute_force(f, PRIOR, [n] * num_views) for n in range(N)]
    evidence = torch.tensor([math.log(sum(row)) for row in sums], dtype=torch.float64)
    posterior = torch.tensor([[w / sum(row) for w in row] for row in sums], dtype=torch.float64)
    torch.testing.assert_close(model.log_evidence(*views), evidence, atol=1e-10, rtol=0)
    torch.testing.assert_close(model.posterior(*views).probs, posterior, atol=1e-10, rtol=0)
    with poutine.trace() as captured:  # the views in another order are another data set, not an error
        model(*reversed(views))
    assert captured.trace.nodes["z"]["value"].shape == (N,)


@pytest.mark.parametrize("num_views", [2, 3])
def test_the_model_is_a_distribution_over_tuples_of_inputs(num_views):
    model, views = make(num_views)
    f = tables(model, views)
    total = sum(sum(brute_force(f, PRIOR, index)) for index in itertools.product(range(N), repeat=num_views))
    assert abs(total / N**num_views - 1) < 1e-10
    if num_views == 2:
        logits = model.partner_logits(*views)
        assert abs(float(logits.detach().exp().mean()) - 1) < 1e-10
        torch.testing.assert_close(logits.diagonal(), model.log_evidence(*views), atol=1e-10, rtol=0)


@pytest.mark.parametrize("learn_prior", [False, True])
@pytest.mark.parametrize(("num_views", "separate"), CASES)
def test_enum_elbo_without_a_guide_is_the_evidence_and_so_are_its_gradients(num_views, separate, learn_prior):
    model, views = make(num_views, separate=separate, learn_prior=learn_prior)
    expected = model.log_evidence(*views).sum()
    # a linear layer before a frozen batch norm: every parameter has a gradient
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(expected, parameters)
    loss = enum_elbo()(model, no_guide)(*views)
    torch.testing.assert_close(-loss, expected, atol=1e-10, rtol=0)
    for ours, theirs in zip(torch.autograd.grad(-loss, parameters), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
    assert len(parameters) == 4 * (num_views if separate else 1) + learn_prior
    particles = enum_elbo(num_particles=3, vectorize_particles=True).loss(model, no_guide, *views)
    assert abs(particles + float(expected.detach())) < 1e-10


@pytest.mark.parametrize(("num_views", "separate"), CASES)
def test_every_draw_of_the_tight_guide_has_the_evidence_as_its_elbo(num_views, separate):
    model, views = make(num_views, separate=separate)
    evidence = float(model.log_evidence(*views).detach().sum())
    assert abs(enum_elbo().loss(model, model.tight_guide, *views) + evidence) < 1e-10
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Pyro: the site could be enumerated
        for _ in range(5):
            assert abs(Trace_ELBO().loss(model, model.tight_guide, *views) + evidence) < 1e-10


def test_a_guide_of_one_view_is_below_the_evidence_by_its_divergence_from_the_posterior():
    model, views = make(2)

    def guide(x1, x2):
        with pyro.plate("pairs", N):
            pyro.sample("z", model.guide.posterior(x1), infer={"enumerate": "parallel"})

    gap = float(model.log_evidence(*views).detach().sum()) + enum_elbo().loss(model, guide, *views)
    q, p = model.guide.posterior(views[0]), model.posterior(*views)
    assert gap > 0.1 and abs(gap - float((q.probs * (q.logits - p.logits)).detach().sum())) < 1e-10


def test_pyro_finds_the_same_posterior():
    model, views = make(3)
    expected = model.posterior(*views)
    found = enum_elbo().compute_marginals(model, no_guide, *views)["z"]
    torch.testing.assert_close(found.probs, expected.probs, atol=1e-10, rtol=0)
    best = infer_discrete(model, first_available_dim=-2, temperature=0)
    mode = poutine.trace(best).get_trace(*views).nodes["z"]["value"]
    assert torch.equal(mode, expected.probs.argmax(-1))


def test_the_bias_of_an_aggregate_over_a_batch_is_the_stated_one():
    """Views that tell K states apart: -J (K - 1) / 2N. Error of 1,000 batches .0009, so a false alarm is at 5 sigma."""
    states, size, num_views, batches = 5, 100, 2, 1_000
    state = torch.randint(states, (batches, size), generator=torch.Generator().manual_seed(0))
    model = models.DiscreteRPM(Known(states))
    found = torch.stack([model.log_evidence(*[row] * num_views).mean() for row in state]).mean()
    expected = (num_views - 1) * math.log(states) - num_views * (states - 1) / (2 * size)
    assert abs(float(found.detach()) - expected) < 5 * 0.0009
    everything = model.log_aggregate(*[state.flatten()] * num_views)
    exact = model.log_evidence(*[state.flatten()] * num_views, log_aggregate=everything).mean()
    assert abs(float(exact) - (num_views - 1) * math.log(states)) < 1e-3


class Known:
    """Recognises a state that is given as it is."""

    def __init__(self, num_states):
        self.num_states = num_states

    def posterior(self, x):
        return dist.Categorical(logits=40.0 * nn.functional.one_hot(x, self.num_states))


def test_enumeration_makes_no_table_of_pairs():
    model, views = make(2)
    with poutine.trace() as captured, poutine.enum(first_available_dim=-2):
        model(*views)
    shapes = {name: captured.trace.nodes[name]["fn"].log_factor.shape for name in ("x1", "x2")}
    assert shapes == {"x1": (K, N), "x2": (K, N)}


def test_views_that_were_not_seen_and_items_one_by_one():
    model, views = make(3, separate=True)
    f = tables(model, views)
    evidence = [math.log(sum(brute_force(f, PRIOR, [n, None, n]))) for n in range(N)]
    found = model.log_evidence(views[0], None, views[2])
    torch.testing.assert_close(found, torch.tensor(evidence, dtype=torch.float64), atol=1e-10, rtol=0)
    aggregate = model.log_aggregate(*views)
    for n in range(N):
        single = model.posterior(*(x[n : n + 1] for x in views), log_aggregate=aggregate)
        torch.testing.assert_close(single.probs[0], model.posterior(*views).probs[n], atol=1e-10, rtol=0)


def test_partner_logits_take_galleries_of_another_size_with_known_aggregates():
    model, views = make(2, separate=True)
    aggregate = model.log_aggregate(*views)
    part = model.partner_logits(views[0][:3], views[1], log_aggregate=aggregate)
    torch.testing.assert_close(part, model.partner_logits(*views)[:3], atol=1e-10, rtol=0)


class Counter(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize("tight", [False, True])
def test_every_view_is_encoded_once_per_step(tight):
    encoder = Counter(DIM, 16)
    model = models.DiscreteRPM(guides.Categorical(encoder, K))
    svi = SVI(model, model.tight_guide if tight else no_guide, pyro.optim.Adam({"lr": 1e-3}), enum_elbo())
    for step in range(1, 4):
        svi.step(*torch.randn(2, N, DIM))
        assert encoder.calls == 2 * step
        assert int(model.guide.batch_norm.num_batches_tracked) == 2 * step


def clusters(num, seed):
    """Views of one of three well separated groups of unequal size, and the group."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.multinomial(torch.tensor([0.2, 0.3, 0.5]), num, replacement=True, generator=generator)
    centre = 4 * torch.eye(3, DIM)[label]
    return [centre + torch.randn(num, DIM, generator=generator) for _ in range(2)], label


def test_fit_finds_clusters_and_their_weights():
    views, label = clusters(600, seed=1)
    torch.manual_seed(0)
    model = models.DiscreteRPM(guides.Categorical(nn.Linear(DIM, 16), 3), learn_prior=True)
    data = [tuple(x[i : i + 200] for x in views) for i in (0, 200, 400)]
    result = fit(model, no_guide, data, steps=200, lr=2e-2, elbo=enum_elbo(), device="cpu", progress=False)
    assert set(result.history) == {"step", "loss", "lr", "latents"}  # a factor per state is no part of the ELBO
    entropy = -sum(p * math.log(p) for p in (0.2, 0.3, 0.5))
    assert abs(float(model.log_evidence(*views).detach().mean()) - entropy) < 0.1
    test, truth = clusters(400, seed=2)
    state = model.guide.posterior(test[0]).probs.argmax(-1)
    counts = torch.zeros(3, 3).index_put_((state, truth), torch.ones(()), accumulate=True)
    assert int(counts.max(1).values.sum()) > 0.95 * 400 and sorted(counts.argmax(1).tolist()) == [0, 1, 2]
    shares = torch.bincount(label, minlength=3) / 600
    torch.testing.assert_close(model.prior[counts.argmax(1).argsort()], shares, atol=0.05, rtol=0)
    check = diagnostics.partner_check(model, model.guide, test, num_candidates=20)
    assert check.log_score > -math.log(20) + 0.5


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("separate", [False, True])
def test_parameters_live_where_pyro_is_told_to_keep_them(local, separate):
    model, views = make(2, separate=separate, learn_prior=True)
    with pyro.settings.context(module_local_params=local):
        enum_elbo()(model, no_guide)(*views).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert len(pyro.get_param_store()) == (0 if local else len(list(model.parameters())))


def test_a_latent_per_view_with_any_prior_is_a_model_of_five_lines():
    """Two states that a transition matrix links: the ELBO of the recognition pair and the evidence, against loops."""
    guide = guides.Categorical(nn.Linear(DIM, 16), 3).double().eval()
    pair = torch.tensor([[0.2, 0.1, 0.05], [0.05, 0.15, 0.1], [0.05, 0.1, 0.2]], dtype=torch.float64)

    @config_enumerate
    def model(x1, x2):
        with pyro.plate("pairs", N):
            z1 = pyro.sample("z1", dist.Categorical(pair.sum(1)))
            z2 = pyro.sample("z2", dist.Categorical(pair[z1]))
            recognition_factor("x1", z1, guide.posterior(x1))
            recognition_factor("x2", z2, guide.posterior(x2))

    views = list(torch.randn(2, N, DIM, dtype=torch.float64))
    r1, r2 = (guide.posterior(x).probs.tolist() for x in views)
    elbo = evidence = 0.0
    for n in range(N):
        total = 0.0
        for a, b in itertools.product(range(3), repeat=2):
            first = sum(row[a] for row in r1) / N
            second = sum(row[b] for row in r2) / N
            weight = float(pair[a, b]) / (first * second)
            total += r1[n][a] * r2[n][b] * weight
            elbo += r1[n][a] * r2[n][b] * math.log(weight)
        evidence += math.log(total)
    assert abs(-enum_elbo().loss(model, config_enumerate(guide), *views) - elbo) < 1e-10
    assert abs(-enum_elbo().loss(model, no_guide, *views) - evidence) < 1e-10


def test_guide_of_another_family_is_refused():
    with pytest.raises(TypeError, match=r"categorical recognition module with `num_states`, got VonMisesFisher"):
        models.DiscreteRPM(guides.VonMisesFisher(nn.Linear(DIM, 16), K))
    with pytest.raises(TypeError, match=r"`guide` must be a recognition module.*got Linear"):
        models.DiscreteRPM([guides.Categorical(nn.Linear(DIM, 16), K), nn.Linear(DIM, 16)])


@pytest.mark.parametrize("states", [(4,), (4, 5), ()], ids=str)
def test_guides_must_agree_on_the_states(states):
    parts = [guides.Categorical(nn.Linear(DIM, 16), k) for k in states]
    with pytest.raises(ValueError, match="one per view .two or more. with the same number of states, got"):
        models.DiscreteRPM(parts)


@pytest.mark.parametrize("num_states", [1, 0, 2.0])
def test_one_state_is_refused(num_states):
    with pytest.raises(ValueError, match="`num_states` must be an integer >= 2.*got"):
        guides.Categorical(nn.Linear(DIM, 16), num_states)


@pytest.mark.parametrize("prior", [(0.5, 0.5), (0.5, 0.5, 0.0, 0.0), (1.0, 1.0, 1.0, 1.0), (math.nan,) * 4], ids=str)
def test_prior_is_checked(prior):
    with pytest.raises(ValueError, match="`prior` must be 4 positive probabilities that sum to one.*got shape"):
        models.DiscreteRPM(guides.Categorical(nn.Linear(DIM, 16), K), prior=prior)


def test_bad_views_are_refused():
    model, views = make(2, separate=True)
    shared, _ = make(2)
    with pytest.raises(ValueError, match="at least 2 views, got 1: a shared latent"):
        shared(views[0])
    with pytest.raises(ValueError, match="at least 1 view, got 0"):
        shared.posterior(None, None)
    with pytest.raises(ValueError, match=r"one leading dimension N, got \[\(7, 6\), \(5, 6\)\]"):
        shared(views[0], views[1][:5])
    with pytest.raises(ValueError, match="one guide per view, 2, but 3 views"):
        model(*views, views[0])
    with pytest.raises(ValueError, match="needs at least 2, got 1; use a larger batch"):
        shared(views[0][:1], views[1][:1])
    for call in (shared.posterior, shared.log_evidence, shared.partner_logits):
        with pytest.raises(ValueError, match=r"`log_aggregate` must have.*\(2, 4\), got \(3, 4\)"):
            call(*views, log_aggregate=torch.zeros(3, K))


@pytest.mark.parametrize("z", [torch.zeros(N), torch.zeros(5, dtype=torch.long)], ids=["float", "length"])
def test_states_of_a_factor_are_checked(z):
    posterior = dist.Categorical(logits=torch.randn(N, K))
    with pyro.plate("pairs", N), pytest.raises(ValueError, match=r"integer states \(\.\.\., N\).*got"):
        recognition_factor("x", z, posterior)


def test_state_log_ratio_is_at_most_log_n_and_finite_for_sharp_laws():
    logits = torch.full((50, 3), -1e4)
    logits[torch.arange(50), torch.arange(50) % 2] = 0.0  # the third state is far from all
    ratio = state_log_ratio(dist.Categorical(logits=logits))
    assert bool(torch.isfinite(ratio).all()) and float(ratio.max()) <= math.log(50) + 1e-5
