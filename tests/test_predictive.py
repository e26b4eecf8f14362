from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats
from torch import nn

from pyro_contrastive import diagnostics as diag
from pyro_contrastive import guides, models
from pyro_contrastive.data import SphereWorld
from pyro_contrastive.distributions import HypersphericalUniform, VonMisesFisher

KAPPA, CANDIDATES = 10.0, 10


class Exact(nn.Module):
    """Recognition that reads the natural parameter of the posterior off the view."""

    dim = 3

    def posterior(self, x):
        return VonMisesFisher(nn.functional.normalize(x, dim=-1), x.norm(dim=-1))


def density_ratio(cosine, pair):
    """p(m1, m2) / p(m1) p(m2) on the sphere in three dimensions, without the library: a Legendre series."""
    order = np.arange(40)
    a = [special.spherical_in(order, k) / special.spherical_in(0, k) for k in (KAPPA, pair) if np.isfinite(k)]
    return np.polynomial.legendre.legval(cosine, (2 * order + 1) * a[0] * np.prod(a, axis=0))


def expected_log_score(scale, pair):
    r"""Of logits `scale * log f` among C candidates, f the density ratio, by two quadratures.

    The cosine to a stranger is uniform on [-1, 1], that to the partner has density f / 2, all are independent given the
    first view; and E log S = int (exp(-t) - E exp(-t S)) dt / t with a product in place of the last expectation.
    """
    nodes, weights = np.polynomial.legendre.leggauss(400)
    f = density_ratio(nodes, pair)
    weights, power = weights / 2, np.maximum(f, 1e-300) ** scale
    assert weights @ f == pytest.approx(1.0, abs=1e-9)

    def integrand(log_t):
        t = np.exp(log_t)
        decay = np.exp(-t * power)
        return np.exp(-t) - (weights @ (f * decay)) * (weights @ decay) ** (CANDIDATES - 1)

    log_total = integrate.quad(integrand, -30.0, 30.0, limit=500, epsabs=1e-9)[0]
    return scale * float(weights @ (f * np.log(np.maximum(f, 1e-300)))) - log_total


def pairs_of(world, num, seed):
    batch = world.sample(num, seed)
    return KAPPA * batch.mean_direction1.double(), KAPPA * batch.mean_direction2.double()


@pytest.fixture(scope="module", params=[math.inf, 20.0])
def exact(request):
    """The Bayes-optimal critic of a world, checked on pairs from it, and the same with its logits scaled."""
    model = models.MCInfoNCE(Exact(), concentration=request.param)
    views = pairs_of(SphereWorld(3, KAPPA, request.param), 5_000, 0)
    blocks = []

    def recorded(x1, x2):
        blocks.append(model.partner_logits(x1, x2))
        return blocks[-1]

    def check(scale):
        replay = iter(blocks)
        method = recorded if scale == 1.0 else lambda x1, x2: scale * next(replay)
        return diag.partner_check(method, model.guide, views, num_candidates=CANDIDATES)

    return {scale: check(scale) for scale in (1.0, 2.0, 0.5)}, request.param


def test_exact_evidence_scores_what_the_world_is_worth_and_is_calibrated(exact):
    checks, pair = exact
    check = checks[1.0]
    assert (check.num_blocks, check.num_candidates) == (500, CANDIDATES)
    # false-alarm rate of each z-test 6e-5
    assert abs(check.log_score - expected_log_score(1.0, pair)) < 4 * check.log_score_se < 0.1
    assert abs(check.overconfidence) < 4 * check.overconfidence_se
    # the partner wins where no stranger has a larger cosine
    nodes, weights = np.polynomial.legendre.leggauss(400)
    accuracy = weights / 2 @ (density_ratio(nodes, pair) * ((1 + nodes) / 2) ** (CANDIDATES - 1))
    assert abs(check.accuracy - accuracy) < 4 * check.accuracy_se < 0.05
    # a calibrated forecast: E sum p^2 = E p(partner), so that the Brier score is 1 - E p(partner)
    gap = check.brier - 1 + np.exp(check.pair_log_score).mean()
    assert abs(gap) < 4 * check.brier_se
    curve = check.reliability
    missed = (curve.predicted < curve.lower) | (curve.predicted > curve.upper)
    assert missed[curve.counts > 0].sum() <= 4  # of ten 95 % intervals: false-alarm rate 6e-5
    assert curve.ece < curve.ece_if_calibrated + 4 * curve.ece_se
    assert curve.counts.sum() == 5_000


@pytest.mark.parametrize(("scale", "sign"), [(2.0, 1), (0.5, -1)])
def test_scaled_logits_lose_and_reliability_shows_it(exact, scale, sign):
    (right, wrong), pair = (exact[0][1.0], exact[0][scale]), exact[1]
    assert abs(wrong.log_score - expected_log_score(scale, pair)) < 4 * wrong.log_score_se
    assert wrong.accuracy == right.accuracy  # the order is the same: accuracy cannot see it
    assert sign * wrong.overconfidence > 10 * wrong.overconfidence_se
    curve = wrong.reliability
    assert curve.ece > curve.ece_if_calibrated + 5 * curve.ece_se
    full = curve.counts > 200
    assert (sign * (curve.predicted - curve.observed)[full] > 0).all() and full.sum() >= 3
    found = diag.compare({"wrong": wrong, "right": right})
    assert found.names == ("right", "wrong") and found.upper[1] < 0
    truth = expected_log_score(scale, pair) - expected_log_score(1.0, pair)
    assert abs(found.difference[1] - truth) < 4 * found.standard_error[1]
    assert found.standard_error[1] < wrong.log_score_se  # what pairing is for
    assert "right" in str(found) and len(str(found).splitlines()) == 3


def simulated_logits(num, generator):
    z = HypersphericalUniform(3).sample((num,))
    m1, m2 = (VonMisesFisher(z, torch.tensor(KAPPA)).sample() for _ in range(2))
    cosine = np.clip((m1 @ m2.T).double().numpy(), -1, 1)
    length = KAPPA * np.sqrt(2 + 2 * cosine) + 1e-9
    return 2 * np.log(KAPPA / np.sinh(KAPPA)) + np.log(np.sinh(length) / length)


def test_standard_errors_cover_the_known_differences():
    # 95 % intervals from 20 blocks in 300 data sets: misses are binomial(300, .05), outside 2..32 with probability 2e-4
    truth = [expected_log_score(1.0, math.inf)]
    truth += [expected_log_score(scale, math.inf) - truth[0] for scale in (0.7, 1.3)]
    misses = np.zeros(3)
    for repeat in range(300):
        logits = simulated_logits(200, repeat)
        checks = {s: diag.partner_check(s * logits, num_candidates=CANDIDATES, seed=repeat) for s in (1.0, 0.7, 1.3)}
        score = checks[1.0]
        misses[0] += abs(score.log_score - truth[0]) > stats.t.ppf(0.975, 19) * score.log_score_se
        for k, scale in enumerate((0.7, 1.3), 1):
            found = diag.compare({"right": score, "wrong": checks[scale]}, reference="right")
            at = found.names.index("wrong")
            misses[k] += not found.lower[at] <= truth[k] <= found.upper[at]
    assert ((misses >= 2) & (misses <= 32)).all(), misses


def test_scores_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(23, 23)).round(1)  # ties
    logits[rng.uniform(size=logits.shape) < 0.1] = -np.inf
    np.fill_diagonal(logits, rng.normal(size=23).round(1))
    check = diag.partner_check(torch.from_numpy(logits), num_candidates=7, num_bins=4, seed=3)
    assert check.pairs.shape == (3, 7) and len(set(check.pairs.ravel())) == 21
    log_p, brier, hits, hits5, gaps, sure = (np.zeros((3, 7)) for _ in range(6))
    for b, block in enumerate(check.pairs):
        for i, own in enumerate(block):
            row = [math.exp(logits[own, other]) for other in block]
            p = [value / sum(row) for value in row]
            log_p[b, i] = math.log(p[i])
            brier[b, i] = sum((p[j] - (j == i)) ** 2 for j in range(7))
            better, tied = sum(value > row[i] for value in row), sum(value == row[i] for value in row)
            hits[b, i] = 0 if better else 1 / tied
            hits5[b, i] = sum(better + rank < 5 for rank in range(tied)) / tied
            gaps[b, i] = sum(value * math.log(value) for value in p if value) - log_p[b, i]
            sure[b, i] = max(p)
    np.testing.assert_allclose(check.pair_log_score, log_p)
    for value, error, expected in (
        (check.log_score, check.log_score_se, log_p),
        (check.brier, check.brier_se, brier),
        (check.accuracy, check.accuracy_se, hits),
        (check.top5_accuracy, check.top5_accuracy_se, hits5),
        (check.overconfidence, check.overconfidence_se, gaps),
    ):
        assert value == pytest.approx(expected.mean())
        assert error == pytest.approx(stats.sem(expected.mean(axis=1)))
    curve, ece, chance = check.reliability, 0.0, 0.0
    for k in range(4):
        inside = (sure > k / 4) & (sure <= (k + 1) / 4)
        assert curve.counts[k] == inside.sum()
        if not inside.any():
            assert np.isnan(curve.observed[k]) and np.isnan(curve.lower[k])
            continue
        assert (curve.predicted[k], curve.observed[k]) == pytest.approx((sure[inside].mean(), hits[inside].mean()))
        ece += inside.mean() * abs(sure[inside].mean() - hits[inside].mean())
        chance += math.sqrt(2 / math.pi * sum(sure[inside] * (1 - sure[inside]))) / 21
    assert (curve.ece, curve.ece_if_calibrated) == pytest.approx((ece, chance))


def test_wilson_interval_is_scipys():
    counts = np.array([0, 1, 7, 20])
    lower, upper = diag.predictive.wilson_interval(counts / 20, 20)
    for k, low, high in zip(counts, lower, upper, strict=True):
        assert (low, high) == pytest.approx(tuple(stats.binomtest(int(k), 20).proportion_ci(method="wilson")))


def test_ends():
    one = diag.partner_check(4.0 * np.eye(6), num_candidates=6)  # one block: no standard error
    assert one.accuracy == 1.0 and np.isnan([one.log_score_se, one.accuracy_se, one.reliability.ece_se]).all()
    with np.errstate(all="raise"):
        single = diag.compare({"a": one, "b": diag.partner_check(np.eye(6), num_candidates=6)})
    assert single.names == ("a", "b") and np.isnan(single.standard_error[1]) and single.difference[1] < 0
    # nothing known: guessing, and calibrated in that
    flat = diag.partner_check(np.zeros((40, 40)), num_candidates=8)
    assert flat.log_score == pytest.approx(-math.log(8)) and flat.accuracy == pytest.approx(1 / 8)
    assert flat.top5_accuracy == pytest.approx(5 / 8) and flat.overconfidence == pytest.approx(0)
    assert flat.reliability.ece == pytest.approx(0) and flat.log_score_se == pytest.approx(0, abs=1e-12)
    # certain and right; certain and wrong
    sure = np.where(np.eye(8) > 0, np.inf, 0.0)
    right, wrong = (diag.partner_check(logits, num_candidates=4) for logits in (sure, np.roll(sure, 1, axis=0)))
    assert (right.log_score, right.brier, right.accuracy, right.reliability.ece) == (0, 0, 1, 0)
    assert wrong.log_score == -math.inf and wrong.accuracy < 1 and np.isnan(wrong.log_score_se)
    found = diag.compare({"wrong": wrong, "right": right})
    assert found.names == ("right", "wrong") and found.difference[1] == -math.inf and str(found)
    both = diag.compare({"wrong": wrong, "as wrong": wrong})
    assert np.isnan(both.difference[1])


def test_point_posteriors_are_legal():
    guide = guides.Delta(nn.Linear(4, 3), dim=3)
    model = models.MCInfoNCE(guide, concentration=50.0, evidence="elbo")
    x = torch.randn(30, 4)
    check = diag.partner_check(model, guide, (x, x), num_candidates=10)
    assert check.accuracy == 1.0 and math.isfinite(check.log_score)


def test_model_is_left_as_it_was_and_the_seed_decides():
    guide = guides.VonMisesFisher(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), dim=3)
    model = models.MCInfoNCE(guide, concentration=5.0, evidence="k_sample", num_samples=4)
    views = torch.randn(40, 4), torch.randn(40, 4)
    state, mean = torch.get_rng_state(), guide.state_dict()["encoder.1.running_mean"].clone()
    first, again, other = (diag.partner_check(model, guide, views, num_candidates=10, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state) and guide.training
    assert torch.equal(guide.state_dict()["encoder.1.running_mean"], mean)
    np.testing.assert_array_equal(first.pair_log_score, again.pair_log_score)
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_only_the_same_pairs_and_candidates_compare():
    logits, views = np.eye(12), (torch.randn(12, 2), torch.randn(12, 2))
    base = diag.partner_check(logits, None, views, num_candidates=4)
    same = diag.partner_check(lambda x1, x2: x1 @ x2.T, None, views, num_candidates=4)
    assert diag.compare({"a": base, "b": same}).num_blocks == 3
    for changed in (
        diag.partner_check(logits, None, views, num_candidates=3),
        diag.partner_check(logits, None, views, num_candidates=4, seed=1),
        diag.partner_check(logits, None, (views[0], views[1] + 1), num_candidates=4),
        diag.partner_check(logits, num_candidates=4),
    ):
        with pytest.raises(ValueError, match="same held-out pairs in the same candidate blocks, got .*`ids`"):
            diag.compare({"a": base, "b": changed})
    names = [f"pair {i}" for i in range(12)]
    named = [diag.partner_check(logits, None, v, num_candidates=4, ids=names) for v in (views, (views[0], views[0]))]
    assert named[0].fingerprint == named[1].fingerprint != base.fingerprint


def test_simultaneous_intervals_count_the_comparisons():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(120, 120)) + 2 * np.eye(120)
    checks = {name: diag.partner_check(s * logits, num_candidates=6) for name, s in zip("abc", (2, 1, 3), strict=True)}
    free, fixed, two = (
        diag.compare(checks),
        diag.compare(checks, reference="b"),
        diag.compare(dict(list(checks.items())[:2])),
    )
    at = free.names.index("b")
    assert free.reference == "a" and fixed.reference == "b" and fixed.difference[fixed.names.index("a")] > 0
    reach = (free.upper - free.lower)[at] / (two.upper - two.lower)[1]
    assert reach == pytest.approx(stats.t.ppf(1 - 0.025 / 3, 19) / stats.t.ppf(0.975, 19))


VIEWS = (torch.zeros(6, 2), torch.zeros(6, 2))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: diag.partner_check(np.eye(5), num_candidates=6), ValueError, r"integer in 2..5, the number of pairs"),
        (lambda: diag.partner_check(np.eye(5), num_candidates=1), ValueError, r"integer in 2..5"),
        (lambda: diag.partner_check(np.eye(5)[:3], num_candidates=2), TypeError, r"logits \(N, N\).*shape \(3, 5\)"),
        (lambda: diag.partner_check(np.eye(5), None, VIEWS, num_candidates=2), ValueError, "as many as the logits"),
        (
            lambda: diag.partner_check(np.full((4, 4), np.nan), num_candidates=2),
            ValueError,
            "must not be NaN, got 4 of",
        ),
        (lambda: diag.partner_check(np.full((4, 4), -np.inf), num_candidates=2), ValueError, "at least one candidate"),
        (lambda: diag.partner_check(np.eye(4), num_candidates=2, num_bins=0), ValueError, "`num_bins` must be"),
        (lambda: diag.partner_check(np.eye(4), num_candidates=2, ids=[1]), ValueError, "each of the 4 pairs"),
        (lambda: diag.partner_check(lambda a, b: a @ b.T), ValueError, "`views` must be given"),
        (lambda: diag.partner_check(lambda a, b: None, None, VIEWS, num_candidates=3), TypeError, "got NoneType"),
        (lambda: diag.partner_check(lambda a, b: a, None, VIEWS, num_candidates=3), ValueError, r"got \(3, 2\)"),
        (lambda: diag.partner_check(lambda a, b: a, None, VIEWS[0]), TypeError, "pair of tensors"),
        (lambda: diag.partner_check(lambda a, b: a, None, VIEWS[:1]), ValueError, "two or more of one length"),
        (lambda: diag.compare({}), ValueError, "two methods or more"),
        (lambda: diag.compare({"a": None, "b": None}, level=1.0), ValueError, "`level` must be"),
        (lambda: diag.compare({"a": None, "b": None}, reference="c"), KeyError, "one of"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
