from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score

from pyro_contrastive import diagnostics as diag
from pyro_contrastive.diagnostics._arrays import derived_seed

RNG = np.random.default_rng(0)


def test_areas_of_resamples_are_those_of_risk_coverage():
    # ties, infinities: the fast areas must be what the plain curve gives on every resample
    confidence = np.r_[RNG.integers(0, 6, 40), math.inf, math.inf].astype(float)
    correct = RNG.uniform(size=42) < 0.6
    found = diag.selective_risk(torch.from_numpy(confidence), correct, num_resamples=200, seed=5)
    curve = diag.risk_coverage(confidence, correct)
    assert found.aurc.value == pytest.approx(curve.aurc)
    assert found.excess_aurc.value == pytest.approx(curve.excess_aurc)
    assert found.gain.value == pytest.approx(1 - correct.mean() - curve.aurc)
    drawn, order = [], np.argsort(-confidence, kind="stable")
    generator = np.random.default_rng(derived_seed(5, "bootstrap"))
    for index in order[generator.integers(42, size=(200, 42))]:
        one = diag.risk_coverage(confidence[index], correct[index])
        drawn.append((one.aurc, one.excess_aurc, one.risk[-1] - one.aurc))
    for got, values in zip((found.aurc, found.excess_aurc, found.gain), np.transpose(drawn), strict=True):
        np.testing.assert_allclose((got.lower, got.upper), np.quantile(values, [0.025, 0.975]), atol=1e-12)
        assert got.standard_error == pytest.approx(values.std(ddof=1))


def test_band_is_wilsons():
    correct = RNG.uniform(size=50) < 0.7
    found = diag.selective_risk(RNG.normal(size=50), correct, level=0.9)
    for k in (0, 9, 49):
        errors = round(found.curve.risk[k] * (k + 1))
        low, high = stats.binomtest(errors, k + 1).proportion_ci(0.9, method="wilson")
        assert (found.lower[k], found.upper[k]) == pytest.approx((low, high))


def test_gain_tells_a_width_that_knows_from_one_that_does_not():
    # false-alarm rate of the one-sided 2.5 % end: at most 8 of 60 silent data sets ring, with probability 2e-4 of more
    rings = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        confidence = rng.uniform(size=200)
        knows = diag.selective_risk(confidence, rng.uniform(size=200) < 0.4 + 0.6 * confidence, num_resamples=200)
        silent = diag.selective_risk(confidence, rng.uniform(size=200) < 0.7, num_resamples=200)
        rings += silent.gain.lower > 0
        assert knows.gain.lower > 0
    assert rings <= 8


def test_selective_risk_at_the_ends():
    perfect = diag.selective_risk(RNG.normal(size=30), np.ones(30, bool))
    assert perfect.aurc.value == perfect.aurc.upper == perfect.excess_aurc.upper == 0
    assert perfect.upper[-1] == pytest.approx(stats.binomtest(0, 30).proportion_ci(method="wilson").high)
    constant = diag.selective_risk(np.full(30, np.inf), np.arange(30) < 20)
    assert constant.gain.value == pytest.approx(0) and constant.gain.lower == pytest.approx(0)
    single = diag.selective_risk([1.0], [False])
    assert single.aurc.value == single.aurc.lower == 1.0 and single.upper[0] == 1.0


def test_auroc_is_scikit_learns_with_ties_and_infinities():
    inside = np.r_[RNG.integers(3, 9, 40), math.inf, math.inf].astype(float)
    outside = np.r_[RNG.integers(0, 7, 25), math.inf].astype(float)
    found = diag.ood_auroc(torch.from_numpy(inside), outside)
    finite = np.where(np.isinf(np.r_[inside, outside]), 1e9, np.r_[inside, outside])
    assert found.value == pytest.approx(roc_auc_score(np.r_[np.ones(42), np.zeros(26)], finite))
    # DeLong's standard error by a double loop
    psi = np.array([[(a > b) + 0.5 * (a == b) for b in outside] for a in inside])
    error = math.sqrt(psi.mean(1).var(ddof=1) / 42 + psi.mean(0).var(ddof=1) / 26)
    assert found.standard_error == pytest.approx(error)
    assert diag.ood_auroc(outside, inside).value == pytest.approx(1 - found.value)
    assert diag.ood_auroc(outside, inside).lower == pytest.approx(1 - found.upper)


@pytest.mark.parametrize(("shift", "num"), [(0.0, 30), (1.0, 30), (2.5, 200)])
def test_auroc_interval_covers(shift, num):
    # misses of a 95 % interval in 400 data sets are binomial(400, .05): outside 4..40 with probability 2e-5
    truth = stats.norm.cdf(shift / math.sqrt(2))
    misses = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        found = diag.ood_auroc(rng.normal(shift, 1, num), rng.normal(size=num))
        misses += not found.lower <= truth <= found.upper
    assert 4 <= misses <= 40


def test_auroc_of_full_separation_is_not_certain():
    found = diag.ood_auroc([5.0, 6.0, 7.0, 8.0], np.zeros(9))
    assert found.value == found.upper == 1.0
    assert found.lower == pytest.approx(stats.binomtest(4, 4).proportion_ci(method="exact").low)
    turned = diag.ood_auroc(np.zeros(9), [5.0, 6.0, 7.0, 8.0])
    assert (turned.value, turned.lower, turned.upper) == (0.0, 0.0, pytest.approx(1 - found.lower))
    same = diag.ood_auroc(np.full(5, np.inf), np.full(6, np.inf))  # point posteriors know nothing
    assert (same.value, same.lower, same.upper) == (0.5, 0.5, 0.5)


def test_rank_agreement_is_scipys_and_its_interval_covers():
    x = np.r_[RNG.integers(0, 5, 60), math.inf]
    y = RNG.integers(0, 5, 61) + np.minimum(x, 6)
    found = diag.rank_agreement(x, y)
    assert found.value == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found.value == pytest.approx(diag.corruption_correlation(x, -y)) and found.lower < found.value < found.upper
    # Pearson's rho of a bivariate normal law gives Spearman's: misses binomial(200, .05), outside 1..25 with 1e-4
    rho, misses = 0.7, 0
    truth = 6 / math.pi * math.asin(rho / 2)
    for seed in range(200):
        rng = np.random.default_rng(seed)
        a, b = rng.normal(size=(2, 100))
        found = diag.rank_agreement(a, rho * a + math.sqrt(1 - rho**2) * b, num_resamples=200, seed=seed)
        misses += not found.lower <= truth <= found.upper
    assert 1 <= misses <= 25


def test_entropy_agreement_has_the_right_sign():
    share = np.linspace(0.5, 1.0, 30)
    found = diag.entropy_agreement(np.exp(4 * share), np.c_[share, 1 - share])
    assert found.value == pytest.approx(1.0)
    constant = diag.entropy_agreement(np.full(30, np.inf), np.c_[share, 1 - share])
    assert np.isnan([constant.value, constant.lower, constant.upper, constant.standard_error]).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: diag.selective_risk([], []), "one length >= 1"),
        (lambda: diag.selective_risk([math.nan], [True]), "without NaN"),
        (lambda: diag.ood_auroc([1.0], [1.0, 2.0]), "`in_concentration` must be a vector of two or more"),
        (lambda: diag.ood_auroc([1.0, 2.0], [1.0, math.nan]), "`out_concentration`.*without NaN"),
        (lambda: diag.ood_auroc([1.0, 2.0], [1.0, 2.0], level=2.0), "`level` must be in"),
        (lambda: diag.rank_agreement([1.0, 2.0], [1.0, 2.0]), "one length >= 3"),
        (lambda: diag.rank_agreement([1.0, 2.0, math.nan], [1.0, 2.0, 3.0]), "without NaN"),
        (lambda: diag.entropy_agreement([1.0, 2.0, 3.0], np.eye(2)), r"shapes \(3,\) and \(2,\)"),
        (lambda: diag.entropy_agreement([1.0, 2.0], [[0.0, 0.0]] * 2), "positive sums"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
