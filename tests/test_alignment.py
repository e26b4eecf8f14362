from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from pyro_contrastive.diagnostics import alignment


def sphere(n: int, d: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((n, d))
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def world(n: int, d: int, kappa: float, seed: int):
    """Truths z, and posteriors vMF(m, kappa_i) that are exactly right: z is drawn from them."""
    rng = np.random.default_rng(seed)
    m, concentration = sphere(n, d, seed), np.exp(rng.uniform(np.log(kappa / 2), np.log(kappa * 2), n))
    z = np.stack(
        [stats.vonmises_fisher(a, k).rvs(1, random_state=rng)[0] for a, k in zip(m, concentration, strict=True)]
    )
    return m, concentration, z


@pytest.mark.parametrize("reflect", [False, True])
def test_procrustes_finds_the_orthogonal_map(reflect):
    x = sphere(50, 6, 0)
    rotation = stats.ortho_group.rvs(6, random_state=1)
    if (np.linalg.det(rotation) < 0) != reflect:
        rotation[:, 0] *= -1
    np.testing.assert_allclose(alignment.procrustes(x, x @ rotation), rotation, atol=1e-10)


def test_cosine_correlation_is_the_off_diagonal_pearson_correlation():
    x, y = sphere(40, 5, 0), sphere(40, 7, 1)
    y[:, :5] += 2 * x
    y /= np.linalg.norm(y, axis=-1, keepdims=True)
    rows, columns = np.triu_indices(40, k=1)
    brute = np.corrcoef((x @ x.T)[rows, columns], (y @ y.T)[rows, columns])[0, 1]
    assert alignment.cosine_correlation(x, y) == pytest.approx(brute, abs=1e-10)
    assert alignment.cosine_correlation(x, x @ stats.ortho_group.rvs(5, random_state=0)) == pytest.approx(1.0)
    assert np.isnan(alignment.cosine_correlation(x, np.tile(y[:1], (40, 1))))


def test_a_rotated_right_posterior_scores_as_right():
    m, kappa, z = world(600, 5, 30.0, seed=3)
    rotation = stats.ortho_group.rvs(5, random_state=4)
    score = alignment.align_and_score(m @ rotation, kappa, z, true_mean_direction=m, true_concentration=kappa)
    np.testing.assert_allclose(score.rotation, rotation.T, atol=1e-9)
    assert score.cosine_correlation == pytest.approx(1.0)
    assert score.spearman_concentration == pytest.approx(1.0)
    assert score.concentration_error == 0.0
    assert score.mean_angle < 1e-6
    assert len(score.evaluated) == len(score.pit) == 300
    assert score.pit_pvalue > 1e-4  # false-alarm rate 1e-4 (fixed seed)
    # without the exact directions the rotation is fitted to the truths themselves
    blind = alignment.align_and_score(m @ rotation, kappa, z)
    assert np.abs(blind.rotation - rotation.T).max() < 0.1
    assert np.isnan(blind.spearman_concentration) and np.isnan(blind.concentration_error)
    assert blind.pit_pvalue > 1e-4


def test_wrong_posteriors_are_noticed():
    m, kappa, z = world(600, 5, 30.0, seed=5)
    over = alignment.align_and_score(m, 4 * kappa, z, true_mean_direction=m, true_concentration=kappa)
    assert np.all(over.coverage.upper < over.coverage.levels)
    assert over.concentration_error == pytest.approx(3.0)
    under = alignment.align_and_score(m, kappa / 4, z, true_mean_direction=m, true_concentration=kappa)
    assert np.all(under.coverage.lower > under.coverage.levels)
    # directions that belong to other items cannot be repaired by any rotation
    shuffled = alignment.align_and_score(np.roll(m, 1, axis=0), kappa, z, true_mean_direction=m)
    assert shuffled.pit_pvalue < 1e-10 and abs(shuffled.cosine_correlation) < 0.1
    assert shuffled.mean_angle > 1.0


def test_point_posteriors_are_scored_without_warnings():
    m, kappa, z = world(60, 3, 30.0, seed=6)
    score = alignment.align_and_score(m, np.full(60, np.inf), z, true_concentration=kappa)
    assert np.isnan(score.spearman_concentration) and np.all(score.pit == 1.0)
    assert np.all(score.coverage.empirical == 0.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: alignment.procrustes(sphere(3, 5, 0), sphere(3, 5, 1)), "N >= d"),
        (lambda: alignment.procrustes(sphere(9, 5, 0), sphere(9, 4, 1)), "N >= d"),
        (lambda: alignment.procrustes(2 * sphere(9, 5, 0), sphere(9, 5, 1)), "unit vectors"),
        (lambda: alignment.cosine_correlation(sphere(9, 5, 0), sphere(8, 5, 0)), "same N >= 3"),
        (lambda: alignment.align_and_score(sphere(9, 3, 0), np.ones(8), sphere(9, 3, 1)), "`concentration` \\(N,\\)"),
        (lambda: alignment.spearman_correlation(np.array([1.0, np.nan]), np.ones(2)), "without NaN"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
