"""Width of predictions against what came true, and the spectrum of embeddings: known laws, loops and mpmath."""

from __future__ import annotations

import math

import mpmath as mp
import numpy as np
import pytest
import torch
from torch import nn

from pyro_contrastive import diagnostics
from pyro_contrastive.distributions import HypersphericalUniform, PowerSpherical, ProjectedNormal, VonMisesFisher

NUM = 8_000


def directions(num, dim):
    return nn.functional.normalize(torch.randn(num, dim, dtype=torch.float64), dim=-1)


def laws(family, num, dim, low=5.0, high=80.0):
    return family(directions(num, dim), torch.linspace(low, high, num, dtype=torch.float64))


@pytest.mark.parametrize("family", [PowerSpherical, VonMisesFisher])
def test_right_laws_pass_both_checks(family):
    law = laws(family, NUM, 6)
    points = law.sample()
    # level 0.9999: 4 + 4 intervals and 2 families, false alarm below 2e-3 in all
    lengths = diagnostics.resultant_length_check(law, points, level=0.9999)
    assert ((lengths.lower <= lengths.predicted) & (lengths.predicted <= lengths.upper)).all()
    assert lengths.largest_gap < 0.02 and (np.diff(lengths.predicted) < 0).all()
    found = diagnostics.stationarity_check(law, points, level=0.9999)
    assert ((found.lower <= 0) & (found.upper >= 0)).all()
    assert found.common_factor == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("family", [PowerSpherical, VonMisesFisher])
@pytest.mark.parametrize(("dim", "kappa"), [(2, 3.0), (16, 30.0)])
def test_the_concentration_alone_is_recovered(family, dim, kappa):
    """From laws that state another one; 5 % is 4 standard errors or more (Fisher information): 4 times 6e-5."""
    mean = directions(NUM, dim)
    draws = family(mean, torch.full((NUM,), kappa, dtype=torch.float64)).sample()
    stated = family(mean, torch.full((NUM,), 7.0, dtype=torch.float64))
    found = diagnostics.stationarity_check(stated, draws, num_groups=2)
    assert 7.0 * found.common_factor == pytest.approx(kappa, rel=0.05)
    assert (np.sign(found.score) == np.sign(kappa - 7.0)).all()  # over-confident: negative


def test_score_of_the_power_spherical_law_is_the_identity():
    law = laws(PowerSpherical, 40, 5)
    points = directions(40, 5)
    want = []
    for mu, kappa, z in zip(law.mean_direction, law.concentration, points, strict=True):
        alpha, beta = mp.mpf(2) + float(kappa), mp.mpf(2)
        expected = mp.log(2) + mp.digamma(alpha) - mp.digamma(alpha + beta)
        want.append(float(kappa * float(mp.log(1 + float(mu @ z)) - expected)))
    found = diagnostics.stationarity_check(law, points, num_groups=1)
    assert found.score[0] == pytest.approx(np.mean(want), rel=1e-9)
    half = 1.959964 * np.std(want, ddof=1) / math.sqrt(40)
    assert found.upper[0] - found.score[0] == pytest.approx(half, rel=1e-6)


def test_likelihoods_without_a_maximum():
    law = laws(PowerSpherical, 20, 4)
    assert diagnostics.stationarity_check(law, law.mean_direction, num_groups=1).common_factor == math.inf
    assert diagnostics.stationarity_check(law, -law.mean_direction, num_groups=1).common_factor == 0.0


def test_gaps_have_a_sign_and_groups_an_order():
    """Half of the items are as sure as stated, the other half claim more than is true."""
    mean = directions(NUM, 5)
    stated = torch.full((NUM,), 10.0, dtype=torch.float64)
    stated[: NUM // 2] = 100.0
    points = PowerSpherical(mean, torch.full((NUM,), 10.0, dtype=torch.float64)).sample()
    found = diagnostics.resultant_length_check(PowerSpherical(mean, stated), points, num_groups=2)
    np.testing.assert_allclose(found.predicted, [100 / 104, 10 / 14])
    # the mean cosine of 4,000 draws has a standard error of about .004; 5 of them: false alarm 6e-7 each
    np.testing.assert_allclose(found.gap, [100 / 104 - 10 / 14, 0.0], atol=0.02)
    assert found.largest_gap == pytest.approx(found.gap[0]) and found.counts.tolist() == [NUM // 2, NUM // 2]
    assert diagnostics.stationarity_check(PowerSpherical(mean, stated), points, num_groups=2).factor[0] < 0.12


def test_projected_normal_by_draws():
    law = ProjectedNormal(directions(2_000, 4), torch.full((2_000, 4), 0.4, dtype=torch.float64))
    found = diagnostics.resultant_length_check(law, law.sample(), num_groups=1)
    # 2,000 cosines of sd .2, and 256 draws per item: 5 standard errors are .025
    assert found.largest_gap < 0.025
    with pytest.raises(TypeError, match="got ProjectedNormal; use resultant_length_check"):
        diagnostics.stationarity_check(law, law.sample())


@pytest.mark.parametrize("check", [diagnostics.resultant_length_check, diagnostics.stationarity_check])
def test_checks_refuse_what_does_not_fit(check):
    law = laws(PowerSpherical, 10, 4)
    with pytest.raises(ValueError, match=r"one per law of a batch of shape \(N,\), got \(9, 4\) for \(10, 4\)"):
        check(law, directions(9, 4))
    with pytest.raises(ValueError, match="`level` must be in"):
        check(law, directions(10, 4), level=1.0)
    with pytest.raises(ValueError, match="two items per group or more, got 10 items for 6 groups"):
        check(law, directions(10, 4), num_groups=6)
    with pytest.raises(ValueError, match="unit vectors"):
        check(law, 2 * directions(10, 4))


# --- spectrum ---------------------------------------------------------------------------------------------------------


def test_spectrum_of_uniform_points_is_flat():
    found = diagnostics.embedding_spectrum(HypersphericalUniform(8).sample((20_000,)))
    assert found.spread == pytest.approx(1.0, abs=0.02)
    np.testing.assert_allclose(found.singular_values, 1 / math.sqrt(8), atol=0.02)  # Marchenko-Pastur: within 2 %
    assert found.effective_rank == pytest.approx(8.0, abs=0.02)
    assert (found.num_items, found.dim) == (20_000, 8)


def test_spectrum_by_hand():
    points = np.array([[1.0, 0.0, 0.0]] * 4 + [[0.0, 1.0, 0.0]] * 4)
    found = diagnostics.embedding_spectrum(points)
    np.testing.assert_allclose(found.singular_values, [math.sqrt(0.5), 0, 0], atol=1e-12)
    assert found.effective_rank == pytest.approx(1.0)
    assert found.spread == pytest.approx(math.sqrt(3) * (0.5 + 0.5 + 0.0) / 3)


def test_a_line_has_full_spread_and_no_rank():
    """Why the standard deviation alone does not tell: every axis of this line has that of uniform points."""
    line = np.ones(16) / 4.0
    points = np.concatenate([np.tile(line, (50, 1)), np.tile(-line, (50, 1))])
    found = diagnostics.embedding_spectrum(points)
    assert found.spread == pytest.approx(1.0) and found.effective_rank == pytest.approx(1.0, abs=1e-3)
    assert diagnostics.judge_dimensions(points).status == "fail"


def test_one_point_has_neither():
    found = diagnostics.embedding_spectrum(np.tile(np.eye(4)[:1], (30, 1)))
    assert found.spread == 0.0 and found.effective_rank == 0.0
    with pytest.raises(ValueError, match="more items than axes, got"):
        diagnostics.embedding_spectrum(np.eye(4))
