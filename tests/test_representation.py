from __future__ import annotations

import numpy as np
import pytest

from pyro_contrastive.diagnostics import representation


def sphere(n: int, d: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((n, d))
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_knn_against_a_double_loop():
    rng = np.random.default_rng(0)
    train, query = rng.standard_normal((60, 4)), rng.standard_normal((25, 4))
    labels, truth = rng.integers(0, 3, 60), rng.integers(0, 3, 25)
    expected = []
    for x, y in zip(query, truth, strict=True):
        cosine = [x @ t / np.linalg.norm(x) / np.linalg.norm(t) for t in train]
        votes = np.bincount(labels[np.argsort(cosine)[::-1][:5]], minlength=3)
        expected.append(votes.argmax() == y)
    np.testing.assert_array_equal(representation.knn_correct(train, labels, query, truth), expected)
    assert representation.knn_accuracy(train, labels, query, truth) == pytest.approx(np.mean(expected))
    # the length of a vector does not matter
    assert representation.knn_accuracy(7 * train, labels, query, truth) == pytest.approx(np.mean(expected))


def test_accuracy_by_quartile():
    kappa = np.array([1.0, np.inf, 3.0, 2.0, 5.0, 6.0, 0.5, 4.0])
    correct = np.array([0, 1, 1, 0, 1, 0, 0, 1], dtype=bool)
    np.testing.assert_array_equal(representation.accuracy_by_quartile(kappa, correct), [0.5, 1.0, 0.5, 0.0])


def test_corruption_correlation_has_the_right_sign():
    level = np.linspace(0, 0.8, 30)
    assert representation.corruption_correlation(np.exp(-level), level) == pytest.approx(1.0)
    assert representation.corruption_correlation(level, level) == pytest.approx(-1.0)
    assert np.isnan(representation.corruption_correlation(np.full(30, np.inf), level))


@pytest.mark.parametrize(("n", "d"), [(200, 2), (500, 10), (300, 64)])
def test_uniform_points_rarely_ring_the_alarm(n, d):
    # nominal false-alarm rate 5 % in 400 trials: the count is binomial, outside these bounds with probability < 1e-4
    pvalues = [representation.aggregate_uniformity(sphere(n, d, seed)) for seed in range(400)]
    for name in ("rayleigh_pvalue", "bingham_pvalue"):
        assert 5 <= sum(getattr(p, name) < 0.05 for p in pvalues) <= 40
    assert np.mean([p.eigenvalue_ratio for p in pvalues]) < 1 + 4 * np.sqrt(d / n)
    assert np.mean([p.mean_resultant_length for p in pvalues]) == pytest.approx(1 / np.sqrt(n), rel=0.2)


def test_each_departure_rings_its_own_alarm():
    z = sphere(1000, 8, 0)
    shifted = z + 0.2 * np.eye(8)[0]
    shifted = representation.aggregate_uniformity(shifted / np.linalg.norm(shifted, axis=-1, keepdims=True))
    assert shifted.rayleigh_pvalue < 1e-6 and shifted.mean_resultant_length > 0.15
    # antipodally symmetric: no preferred direction, but a preferred axis
    stretched = z * np.r_[2.0, np.ones(7)]
    stretched = representation.aggregate_uniformity(stretched / np.linalg.norm(stretched, axis=-1, keepdims=True))
    assert stretched.rayleigh_pvalue > 1e-4  # false-alarm rate 1e-4 (fixed seed)
    assert stretched.bingham_pvalue < 1e-10 and stretched.eigenvalue_ratio > 1.5 and stretched.pvalue < 1e-9
    unused = representation.aggregate_uniformity(np.pad(sphere(1000, 7, 0), ((0, 0), (0, 1))))
    assert unused.bingham_pvalue < 1e-10 and unused.smallest_eigenvalue_ratio == pytest.approx(0.0, abs=1e-12)


def test_effect_sizes_do_not_grow_with_the_number_of_points():
    def effect(n):
        x = sphere(n, 5, 1) + 0.3 * np.eye(5)[0]
        return representation.aggregate_uniformity(x / np.linalg.norm(x, axis=-1, keepdims=True))

    small, large = effect(2000), effect(20_000)
    assert large.rayleigh_pvalue <= small.rayleigh_pvalue
    assert large.mean_resultant_length == pytest.approx(small.mean_resultant_length, rel=0.2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: representation.knn_accuracy(np.eye(3), np.arange(3), np.eye(3), np.arange(3)), "`k` must be in 1..3"),
        (lambda: representation.knn_accuracy(np.eye(3), np.arange(3), np.eye(3), np.arange(2), k=1), "`labels`"),
        (lambda: representation.accuracy_by_quartile(np.ones(3), np.ones(3)), "one length >= 4"),
        (lambda: representation.accuracy_by_quartile(np.full(4, np.nan), np.ones(4)), "without NaN"),
        (lambda: representation.aggregate_uniformity(np.ones((20, 3))), "unit vectors"),
        (lambda: representation.aggregate_uniformity(np.eye(3)), "N >= 10"),
        (lambda: representation.aggregate_uniformity(sphere(20, 3, 0)[None]), "one draw per item"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_neighbour_distance_by_loops():
    generator = np.random.default_rng(0)
    train, queries = generator.normal(size=(20, 4)), 7 * generator.normal(size=(6, 4))
    for k in (1, 3, 20):
        expected = [
            sorted(1 - q @ t / np.linalg.norm(q) / np.linalg.norm(t) for t in train)[k - 1] for q in queries
        ]  # fmt: skip
        np.testing.assert_allclose(representation.neighbour_distance(train, queries, k=k), expected)


@pytest.mark.parametrize("k", [0, 21])
def test_neighbours_that_are_not_there(k):
    with pytest.raises(ValueError, match=rf"`k` must be in 1..20, the number of training items, got {k}"):
        representation.neighbour_distance(np.eye(20), np.eye(20), k=k)
