"""Factors against double Python loops, inside every handler a factor can meet."""

import math

import pyro
import pyro.distributions as pd
import pytest
import torch
from pyro import poutine
from scipy.optimize import minimize_scalar

from pyro_contrastive.distributions import PowerSpherical, ProjectedNormal, VonMisesFisher
from pyro_contrastive.factors import (
    expected_infonce_factor,
    infonce_factor,
    infonce_log_ratio,
    log_ratio_factor,
    recognition_factor,
)
from pyro_contrastive.kernels import VonMisesFisherKernel, shared_latent_log_ratio


def unit(*shape, dtype=torch.float64):
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


def in_plate(function, size):
    with poutine.trace() as capture, pyro.plate("pairs", size):
        function()
    capture.trace.compute_log_prob()
    return capture.trace


def loop_infonce(z1, z2, kappa):
    """log f_ii - log (1/N) sum_j f_ij by two loops, in float64."""
    out = []
    for i in range(len(z1)):
        f = [math.exp(kappa * float(z1[i] @ z2[j])) for j in range(len(z2))]
        out.append(math.log(f[i]) - math.log(sum(f) / len(f)))
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("symmetric", [False, True])
def test_infonce_factor_equals_the_double_loop(symmetric):
    torch.manual_seed(0)
    z1, z2 = unit(7, 5), unit(7, 5)
    kernel = VonMisesFisherKernel(6.0)
    trace = in_plate(lambda: infonce_factor("positive", z1, z2, kernel, symmetric=symmetric), 7)
    want = loop_infonce(z1, z2, 6.0)
    if symmetric:
        want = 0.5 * (want + loop_infonce(z2, z1, 6.0))
    torch.testing.assert_close(trace.nodes["positive"]["log_prob"], want, rtol=1e-10, atol=1e-10)


def test_identical_embeddings_give_zero_and_perfect_ones_log_n():
    z = torch.eye(4, dtype=torch.float64)
    same = z[:1].expand(4, 4)
    kernel = VonMisesFisherKernel(1e3)
    perfect = in_plate(lambda: infonce_factor("f", z, z, kernel), 4).nodes["f"]["log_prob"]
    equal = in_plate(lambda: infonce_factor("f", same, same, kernel), 4).nodes["f"]["log_prob"]
    torch.testing.assert_close(perfect, torch.full((4,), math.log(4), dtype=torch.float64))
    torch.testing.assert_close(equal, torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("tile", [None, 4])
@pytest.mark.parametrize("family", [VonMisesFisher, PowerSpherical, ProjectedNormal])
def test_recognition_factor_equals_the_double_loop(family, tile):
    torch.manual_seed(1)
    mean = unit(6, 4)
    width = torch.rand(6, 4).double() + 0.2 if family is ProjectedNormal else 20 * torch.rand(6).double()
    posterior, z = family(mean, width), unit(6, 4)
    trace = in_plate(lambda: recognition_factor("x1", z, posterior, tile=tile), 6)
    for i in range(6):
        densities = [float(family(mean[j], width[j]).log_prob(z[i]).exp()) for j in range(6)]
        want = math.log(densities[i]) - math.log(sum(densities) / 6)
        assert trace.nodes["x1"]["log_prob"][i].item() == pytest.approx(want, abs=1e-9)


def test_recognition_factor_takes_any_law_with_a_density():
    torch.manual_seed(2)
    posterior, z = pd.Normal(torch.randn(5, 3), 1.0).to_event(1), torch.randn(5, 3)
    value = in_plate(lambda: recognition_factor("x", z, posterior), 5).nodes["x"]["log_prob"]
    grid = torch.stack([posterior.log_prob(z[i]) for i in range(5)])
    torch.testing.assert_close(value, grid.diagonal() - grid.logsumexp(-1) + math.log(5))


def test_vectorised_particles_are_independent_batches():
    torch.manual_seed(3)
    z1, z2, posterior = unit(4, 6, 3), unit(4, 6, 3), VonMisesFisher(unit(6, 3), 10 * torch.rand(6).double())
    kernel = VonMisesFisherKernel(5.0)

    def both(a, b):
        infonce_factor("f", a, b, kernel)
        recognition_factor("r", a, posterior)

    with pyro.plate("particles", 4, dim=-2):
        together = in_plate(lambda: both(z1, z2), 6)
    for p in range(4):
        alone = in_plate(lambda p=p: both(z1[p], z2[p]), 6)
        for name in ("f", "r"):
            assert together.nodes[name]["log_prob"].shape == (4, 6)
            torch.testing.assert_close(together.nodes[name]["log_prob"][p], alone.nodes[name]["log_prob"])


def test_scale_and_subsampling_act_as_on_any_site():
    torch.manual_seed(4)
    z1, z2, kernel = unit(5, 3), unit(5, 3), VonMisesFisherKernel(5.0)
    plain = in_plate(lambda: infonce_factor("f", z1, z2, kernel), 5).nodes["f"]["log_prob_sum"]
    with poutine.scale(scale=0.5):
        scaled = in_plate(lambda: infonce_factor("f", z1, z2, kernel), 5).nodes["f"]["log_prob_sum"]
    with poutine.trace() as capture, pyro.plate("pairs", 50, subsample_size=5):
        infonce_factor("f", z1, z2, kernel)
    capture.trace.compute_log_prob()
    torch.testing.assert_close(scaled, 0.5 * plain)
    torch.testing.assert_close(capture.trace.nodes["f"]["log_prob_sum"], 10 * plain)


@pytest.mark.parametrize("family", [VonMisesFisher, PowerSpherical, ProjectedNormal])
def test_recognition_factor_by_tiles_has_the_gradients_of_the_grid(family):
    torch.manual_seed(10)
    z, mean = (unit(3, 7, 4).requires_grad_(), unit(7, 4).requires_grad_())  # three particles, one law
    width = torch.rand(7, 4).double().add(0.2) if family is ProjectedNormal else 20 * torch.rand(7).double()
    width.requires_grad_()
    gradients = []
    for tile in (None, 3):
        with pyro.plate("particles", 3, dim=-2):
            trace = in_plate(lambda tile=tile: recognition_factor("x", z, family(mean, width), tile=tile), 7)
        gradients.append(torch.autograd.grad(trace.nodes["x"]["log_prob"].square().sum(), (z, mean, width)))
    for whole, tiled in zip(*gradients, strict=True):
        torch.testing.assert_close(tiled, whole, rtol=1e-11, atol=1e-11)


def test_gradients_by_finite_differences():
    torch.manual_seed(5)
    raw, kernel = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True), VonMisesFisherKernel(4.0)

    def value(raw):
        z = torch.nn.functional.normalize(raw, dim=-1)
        posterior = VonMisesFisher(z[1], raw[0].square().sum(-1))
        trace = in_plate(lambda: (infonce_factor("f", z[0], z[1], kernel), recognition_factor("r", z[0], posterior)), 4)
        return trace.nodes["f"]["log_prob"], trace.nodes["r"]["log_prob"]

    assert torch.autograd.gradcheck(value, raw)


def test_logits_beyond_the_range_of_exp_stay_finite():
    z1 = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    far = in_plate(lambda: infonce_factor("f", z1, z1.flip(0), VonMisesFisherKernel(1e6)), 2).nodes["f"]["log_prob"]
    torch.testing.assert_close(far, torch.full((2,), -2e6 + math.log(2)))


def test_mistakes_are_named():
    z, kernel = unit(4, 3), VonMisesFisherKernel(5.0)
    posterior = VonMisesFisher(z, torch.ones(4).double())
    with pytest.raises(ValueError, match="inside the plate"):
        infonce_factor("f", z, z, kernel)
    with pytest.raises(ValueError, match=r"plate 'pairs' \(dim -1, size 5\)"):
        in_plate(lambda: infonce_factor("f", z, z, kernel), 5)
    with pytest.raises(ValueError, match="one shape"):
        in_plate(lambda: infonce_factor("f", z, z[:3], kernel), 4)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        in_plate(lambda: infonce_factor("f", z[:1], z[:1], kernel), 1)
    with pytest.raises(ValueError, match="grid"):
        in_plate(lambda: log_ratio_factor("f", torch.zeros(4, 3)), 4)
    with pytest.raises(ValueError, match=r"\(N, d\) and a posterior of batch shape \(N,\)|posterior of batch shape"):
        in_plate(lambda: recognition_factor("r", z[:3], posterior), 4)
    with pytest.raises(ValueError, match="Delta"):
        in_plate(lambda: recognition_factor("r", z, pd.Delta(z, event_dim=1)), 4)
    with pytest.raises(ValueError, match="positive and finite"):
        VonMisesFisherKernel(0.0)


# --- mean or sum of the negatives -------------------------------------------------------------------------------------


def loop_k_sample(r, p, kappa, negatives):
    """-log of the mean over draws of q, by loops: item i, draw s, and the other items' partners m as negatives.

    The published loss with M = B - 1 in-batch negatives, draw s paired with draw s: the negatives averaged ("mean",
    prior 1:1) or summed.
    """
    draws, items, _ = r.shape
    loss = []
    for i in range(items):
        q = 0.0
        for s in range(draws):
            positive = math.exp(kappa * float(r[s, i] @ p[s, i]))
            others = [math.exp(kappa * float(r[s, i] @ p[s, m])) for m in range(items) if m != i]
            q += positive / (positive + sum(others) / (len(others) if negatives == "mean" else 1)) / draws
        loss.append(-math.log(q))
    return torch.tensor(loss, dtype=torch.float64)


@pytest.mark.parametrize("tile", [None, 3])
@pytest.mark.parametrize("negatives", ["mean", "sum"])
def test_both_normalisations_are_the_k_sample_loss_by_loops(negatives, tile):
    torch.manual_seed(6)
    draws, items = 5, 4
    r, p = unit(draws, items, 6), unit(draws, items, 6)
    log_f = VonMisesFisherKernel(8.0).double()(r, p, lazy=True)
    log_ratio = infonce_log_ratio(log_f, negatives=negatives, tile=tile)
    largest = math.log(2) if negatives == "mean" else math.log(items)
    log_q = log_ratio - largest  # q is a probability, the log ratio relative to saying nothing
    got = -(log_q.logsumexp(0) - math.log(draws))
    torch.testing.assert_close(got, loop_k_sample(r, p, 8.0, negatives), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("negatives", "largest"), [("sum", math.log(5)), ("mean", math.log(2))])
def test_both_normalisations_lie_between_nothing_and_their_largest_value(negatives, largest):
    flat, perfect = torch.zeros(5, 5), 100 * torch.eye(5)
    assert infonce_log_ratio(flat, negatives=negatives).abs().max() < 1e-6
    torch.testing.assert_close(infonce_log_ratio(perfect, negatives=negatives), torch.full((5,), largest))


@pytest.mark.parametrize(("negatives", "size", "is_maximum"), [("sum", 3, True), ("mean", 2, True), ("mean", 3, False)])
def test_which_normalisation_is_maximal_at_the_true_density_ratio(negatives, size, is_maximum):
    """On a discrete world, over all batches with their probabilities: the sum always, the mean with one negative."""
    torch.manual_seed(7)
    joint = torch.softmax(2 * torch.randn(9).double(), 0).view(3, 3)
    marginals = joint.sum(1, keepdim=True) * joint.sum(0)
    critic = (joint / marginals).log().requires_grad_()
    index = torch.cartesian_prod(*[torch.arange(9)] * size)
    log_f = critic[(index // 3).unsqueeze(-1), (index % 3).unsqueeze(-2)]
    expected = joint.flatten()[index].prod(-1) @ infonce_log_ratio(log_f, negatives=negatives).mean(-1)
    largest = torch.autograd.grad(expected, critic)[0].abs().max().item()
    assert largest < 1e-12 if is_maximum else largest > 1e-3


@pytest.mark.parametrize(
    ("negatives", "log_odds"), [("sum", math.log(3)), ("mean", math.log((4 - 7**0.5) / (7**0.5 - 2)))]
)
def test_the_mean_of_many_negatives_compresses_large_ratios(negatives, log_odds):
    """Two equal classes, partners of one class with probability 3/4: ratios r = 3/2 and 1/2.

    The maximum of E log f / (f + E f) has f (1 + f) proportional to r: f = 1 +- e with (1+e)(2+e) = 3 (1-e)(2-e).
    """
    pairs = torch.tensor([[0, 0]] * 3 + [[0, 1], [1, 0]] + [[1, 1]] * 3).repeat(64, 1)
    same = (pairs[:, :1] == pairs[:, 1]).double()
    best = minimize_scalar(lambda gap: -infonce_log_ratio(gap * same, negatives=negatives).mean().item(), (0.0, 1.0))
    assert best.x == pytest.approx(log_odds, abs=0.005)  # N = 512: the positive is missing from its negatives


def test_options_go_through_every_factor():
    torch.manual_seed(8)
    z1, z2, kernel = unit(6, 4), unit(6, 4), VonMisesFisherKernel(5.0).double()
    posteriors = [VonMisesFisher(z, 30 * torch.rand(6).double()) for z in (z1, z2)]
    grids = {"f": kernel(z1, z2), "e": shared_latent_log_ratio(*posteriors)}
    for options in ({}, {"negatives": "mean", "symmetric": True}):

        def emit(options=options):
            infonce_factor("f", z1, z2, kernel, tile=4, **options)
            infonce_factor("g", z1, z2, lambda a, b: kernel(a, b), **options)
            log_ratio_factor("h", grids["f"], **options)
            expected_infonce_factor("e", *posteriors, tile=4, **options)

        nodes = in_plate(emit, 6).nodes
        for name in "fghe":
            want = infonce_log_ratio(grids["e" if name == "e" else "f"], **options)
            torch.testing.assert_close(nodes[name]["log_prob"], want, rtol=1e-12, atol=1e-12)


def test_expected_factor_trains_a_users_own_model():
    torch.manual_seed(9)
    raw = torch.randn(2, 16, 5, requires_grad=True)
    width = torch.full((2, 16), 3.0, requires_grad=True)

    def loss(concentration):
        q = [VonMisesFisher(torch.nn.functional.normalize(raw[v], dim=-1), width[v]) for v in range(2)]
        value = in_plate(lambda: expected_infonce_factor("f", *q, concentration), 16).nodes["f"]["log_prob"]
        return -value.mean()

    for concentration in (math.inf, 20.0, torch.tensor(20.0)):
        gradients = torch.autograd.grad(loss(concentration), (raw, width))
        with torch.no_grad():
            before, step = loss(concentration), 1e-2 / max(g.abs().max() for g in gradients)
            raw -= step * gradients[0]
            width -= step * gradients[1]
            assert loss(concentration) < before


@pytest.mark.parametrize("concentration", [0.0, -1.0, math.nan])
def test_concentration_of_a_pair_is_checked(concentration):
    q = VonMisesFisher(unit(4, 3), torch.ones(4).double())
    with pytest.raises(ValueError, match=r"`concentration` .*positive.*got"):
        in_plate(lambda: expected_infonce_factor("f", q, q, concentration), 4)


def test_mistakes_in_the_options_are_named():
    z, q = unit(4, 3), VonMisesFisher(unit(4, 3), torch.ones(4).double())
    with pytest.raises(ValueError, match="`negatives` must be one of sum, mean, got 'median'"):
        infonce_log_ratio(torch.zeros(4, 4), negatives="median")
    with pytest.raises(TypeError, match="need VonMisesFisher posteriors, got PowerSpherical"):
        in_plate(lambda: expected_infonce_factor("f", q, PowerSpherical(z, torch.ones(4).double())), 4)
    with pytest.raises(ValueError, match=r"size 5"):
        in_plate(lambda: expected_infonce_factor("f", q, q), 5)
