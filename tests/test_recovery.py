from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score

from pyro_contrastive import diagnostics as diag
from pyro_contrastive.data import SphereWorld

RNG = np.random.default_rng(0)


def rotation(dim, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))[0]


def test_linear_r2_is_that_of_scikit_learn_on_the_held_out_half():
    x, noise = RNG.normal(size=(200, 5)), RNG.normal(size=(200, 3))
    y = x @ RNG.normal(size=(5, 3)) + [0.1, 1.0, 10.0] * noise + 4.0
    found = diag.linear_r2(torch.from_numpy(x), y, groups={"clear": [0, 1], "noisy": [2]}, seed=3)
    fitted = np.setdiff1d(np.arange(200), found.evaluated)
    assert len(found.evaluated) == 100
    prediction = LinearRegression().fit(x[fitted], y[fitted]).predict(x[found.evaluated])
    truth = y[found.evaluated]
    assert found.r2 == pytest.approx(r2_score(truth, prediction, multioutput="variance_weighted"))
    np.testing.assert_allclose(found.per_axis, r2_score(truth, prediction, multioutput="raw_values"))
    assert found.groups["noisy"] == pytest.approx(found.per_axis[2]) and found.groups["clear"] > 0.7
    assert np.isnan(diag.linear_r2(x, np.c_[y, np.ones(200)]).per_axis[3])


def test_linear_r2_of_a_known_world_and_of_nothing():
    batch = SphereWorld(6, 50.0).sample(4_000, 0)
    z, mean = batch.z1.numpy(), batch.mean_direction1.numpy()
    # E|z - A m|^2 is smallest for the posterior mean rho m: the share explained is rho^2, rho = E m.z
    rho = float((z * mean).sum(-1).mean())
    found = diag.linear_r2(mean @ rotation(6), z)
    assert found.r2 == pytest.approx(rho**2, abs=0.01) and found.r2 > 0.7
    nothing = diag.linear_r2(RNG.normal(size=(4_000, 6)), z)
    assert -0.02 < nothing.r2 < 0.01  # about -m / n, never above 0 by fitting


@pytest.mark.parametrize("correlation", ["pearson", "spearman"])
def test_mcc_finds_permutation_and_signs(correlation):
    z = RNG.normal(size=(300, 5))
    order, sign = np.array([3, 0, 4, 1, 2]), np.array([1, -1, -1, 1, 1])
    learned = (sign * z + 0.1 * RNG.normal(size=z.shape))[:, order]
    found = diag.mcc(learned, z, correlation=correlation)
    np.testing.assert_array_equal(order[found.assignment], np.arange(5))
    np.testing.assert_array_equal(found.sign, sign)
    assert found.mcc > 0.98
    reference = stats.pearsonr if correlation == "pearson" else stats.spearmanr
    for k in range(5):
        expected = reference(learned[found.evaluated, found.assignment[k]], z[found.evaluated, k]).statistic
        assert found.correlations[k] == pytest.approx(sign[k] * expected)
    more = diag.mcc(np.c_[RNG.normal(size=(300, 2)), learned], z)
    np.testing.assert_array_equal(more.assignment, found.assignment + 2)


def test_mcc_needs_the_alignment_that_the_model_leaves_open():
    z = RNG.normal(size=(2_000, 8))
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    turned = z @ rotation(8)
    plain, rotated = (diag.mcc(turned, z, alignment=kind).mcc for kind in ("none", "rotation"))
    assert plain < 0.8 and rotated == pytest.approx(1.0)
    sheared = z @ (rotation(8) * np.geomspace(1, 8, 8))
    assert diag.mcc(sheared, z, alignment="rotation").mcc < 0.99
    assert diag.mcc(sheared[:, :], z, alignment="linear").mcc == pytest.approx(1.0)
    assert diag.mcc(sheared[:, :6], z, alignment="linear").mcc < 0.95


def test_mcc_of_nothing_is_zero_and_of_constant_axes_too():
    # mean over 40 seeds of a mean of 10 correlations over 100 items: standard error .005, false-alarm rate 6e-5
    values = [diag.mcc(*np.random.default_rng(seed).normal(size=(2, 200, 10)), seed=seed).mcc for seed in range(40)]
    assert abs(np.mean(values)) < 4 * 0.1 / math.sqrt(400)
    z = RNG.normal(size=(50, 2))
    found = diag.mcc(np.c_[z[:, 0], np.ones(50)], z)
    assert found.correlations[1] == 0.0 and found.mcc == pytest.approx(0.5)


def test_concentration_recovery_against_formulas():
    truth, factor = RNG.uniform(10, 50, 200), np.exp(RNG.normal(0.2, 0.1, 200))
    found = diag.concentration_recovery(torch.from_numpy(truth * factor), truth, num_resamples=400)
    for got, expected in (
        (found.relative_error, np.abs(factor - 1).mean()),
        (found.log_ratio_mean, np.log(factor).mean()),
        (found.log_ratio_sd, np.log(factor).std(ddof=1)),
        (found.spearman, stats.spearmanr(truth * factor, truth).statistic),
    ):
        assert got.value == pytest.approx(expected) and got.lower < expected < got.upper and got.level == 0.95
    # the mean has a known standard error; the bootstrap's own noise is 1 / sqrt(800) of it
    assert found.log_ratio_mean.standard_error == pytest.approx(stats.sem(np.log(factor)), rel=0.15)
    assert (found.num_items, found.num_incomparable) == (200, 0)


def test_concentration_recovery_at_the_ends():
    inf = math.inf
    both = diag.concentration_recovery([inf, inf, inf], [inf, inf, inf])
    assert both.relative_error.value == both.log_ratio_mean.value == both.log_ratio_sd.value == 0
    assert np.isnan(both.spearman.value) and np.isnan(both.spearman.lower)
    mixed = diag.concentration_recovery([inf, 2.0, 8.0, 0.0, 0.0], [3.0, 1.0, 4.0, 5.0, 0.0])
    assert mixed.num_incomparable == 2 and mixed.relative_error.value == pytest.approx(2 / 3)
    none = diag.concentration_recovery([inf, inf], [1.0, 2.0])
    assert none.num_incomparable == 2 and np.isnan(none.relative_error.value)
    one = diag.concentration_recovery([1.0, inf], [2.0, 3.0])
    assert one.log_ratio_mean.value == pytest.approx(-math.log(2)) and np.isnan(one.log_ratio_sd.value)


def test_same_seed_same_interval():
    x, y = RNG.uniform(1, 2, (2, 30))
    first, again, other = (diag.concentration_recovery(x, y, seed=s) for s in (0, 0, 1))
    assert first.spearman == again.spearman != other.spearman


Z = RNG.normal(size=(40, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: diag.linear_r2(Z[:9], Z[:9]), r"same N >= 10, got \(9, 3\)"),
        (lambda: diag.linear_r2(Z, Z[:-1]), "same N"),
        (lambda: diag.linear_r2(Z * np.nan, Z), "must be finite"),
        (lambda: diag.linear_r2(Z, Z, groups={"a": [3]}), r"axes in 0..2, got \[3\] for 'a'"),
        (lambda: diag.linear_r2(Z, Z, groups={"a": []}), "axes in 0..2"),
        (lambda: diag.mcc(Z[:, :2], Z), "truth's 3 axes"),
        (lambda: diag.mcc(np.c_[Z, Z], Z, alignment="rotation"), "truth's 3 axes"),
        (lambda: diag.mcc(Z, Z, correlation="kendall"), "`correlation` must be"),
        (lambda: diag.mcc(Z, Z, alignment="affine"), "`alignment` must be"),
        (lambda: diag.concentration_recovery([1.0], [1.0]), "one length >= 2"),
        (lambda: diag.concentration_recovery([1.0, -1.0], [1.0, 1.0]), "must be >= 0"),
        (lambda: diag.concentration_recovery([1.0, math.nan], [1.0, 1.0]), "must be >= 0"),
        (lambda: diag.concentration_recovery([1.0, 2.0], [1.0, 1.0], level=0.0), "`level` must be in"),
        (lambda: diag.concentration_recovery([1.0, 2.0], [1.0, 1.0], num_resamples=1), "`num_resamples` must be"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
