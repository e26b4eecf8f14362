from __future__ import annotations

from importlib.metadata import version

import numpy as np
import pytest

from pyro_contrastive.diagnostics import pit_band, uniformity_pvalue


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_uniform_samples_stay_inside_with_the_stated_probability(level):
    rng = np.random.default_rng(0)
    band = pit_band(rng.uniform(size=150), level=level, num_points=20)
    samples = np.sort(rng.uniform(size=(4000, 150)), axis=1)
    curves = np.stack([np.searchsorted(row, band.points, side="right") for row in samples]) / 150
    inside = np.all((band.lower <= curves) & (curves <= band.upper), axis=1)
    # counts are discrete, so rather more than less; 4 binomial standard errors of both simulations: rate 6e-5
    error = 4 * np.sqrt(2 * level * (1 - level) / 4000)
    assert level - error < inside.mean() < level + error + 0.01
    pvalues = [pit_band(row, num_points=20, num_simulations=300).pvalue for row in samples[:100]]
    assert 0.5 < np.mean(pvalues) * 2 < 1.5 and min(pvalues) > 1e-3  # uniform; standard error .06


@pytest.mark.skipif(version("arviz")[0] != "0", reason="ArviZ 1.x has no function for this band")
def test_band_is_that_of_arviz():
    from arviz.stats.ecdf_utils import ecdf_confidence_band

    band = pit_band(np.random.default_rng(0).uniform(size=300), num_points=30, num_simulations=20_000)
    lower, upper = ecdf_confidence_band(300, band.points, band.points, prob=0.95, method="optimized")
    np.testing.assert_allclose(band.lower, lower, atol=1 / 300 + 1e-9)
    np.testing.assert_allclose(band.upper, upper, atol=1 / 300 + 1e-9)


def test_it_sees_tails_that_kolmogorov_and_smirnov_do_not():
    rng = np.random.default_rng(2)
    values = rng.uniform(size=1000)
    values[:25] = rng.uniform(0, 0.002, size=25)
    assert uniformity_pvalue(values) > 0.05
    assert pit_band(values).pvalue < 1e-3


def test_ecdf_and_ends():
    values = np.random.default_rng(3).uniform(size=77)
    band = pit_band(values, num_points=9)
    np.testing.assert_allclose(band.points, np.arange(1, 10) / 10)
    np.testing.assert_allclose(band.ecdf, [(values <= p).mean() for p in band.points])
    for one in ([0.5], [0.0], [1.0]):
        band = pit_band(one, num_points=3)
        assert 0 < band.pvalue <= 1 and np.all(band.lower >= 0) and np.all(band.upper <= 1)
    many = pit_band(np.linspace(0, 1, 100_001))
    assert many.pvalue > 0.9
    first, again = pit_band(values), pit_band(values)
    assert first.pvalue == again.pvalue


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pit_band([]), "non-empty vector"),
        (lambda: pit_band([0.5], level=1.0), r"`level` must lie in \(0, 1\)"),
        (lambda: pit_band([0.5], num_points=0), "`num_points` must be >= 1"),
        (lambda: pit_band([0.5], num_simulations=10), "`num_simulations` >= 100"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
