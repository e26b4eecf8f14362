from __future__ import annotations

import math

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch.nn.functional import normalize

from pyro_contrastive import diagnostics as diag
from pyro_contrastive.distributions import VonMisesFisher

RNG = np.random.default_rng(0)
N, M, DIM = 25, 140, 4
GALLERY = normalize(torch.randn(M, DIM, generator=torch.Generator().manual_seed(1)), dim=-1)
GALLERY_LABELS = RNG.integers(0, 5, M)
GALLERY_LABELS[GALLERY_LABELS == 4] = 9
EXCLUDE = np.where(np.arange(N) % 3 == 0, -1, np.arange(N))
QUERIES = VonMisesFisher(GALLERY[:N], torch.logspace(3, -1, N))
LABELS = GALLERY_LABELS[:N].copy()
LABELS[:2] = 7  # a class that the gallery does not hold
SETS = diag.credible_sets(QUERIES, GALLERY, alpha=0.2, exclude=EXCLUDE)


def test_class_scores_are_those_of_sets():
    scores = diag.class_scores(SETS, LABELS, GALLERY_LABELS, exclude=EXCLUDE)
    assert (SETS.sizes == 0).any()
    for i in range(N):
        found = set(SETS[i].tolist())
        right = {j for j in range(M) if GALLERY_LABELS[j] == LABELS[i] and j != EXCLUDE[i]}
        both, either = len(found & right), len(found) + len(right)
        for got, part, whole in (
            (scores.precision, both, len(found)),
            (scores.recall, both, len(right)),
            (scores.f1, 2 * both, either),
        ):
            np.testing.assert_allclose(got[i], part / whole if whole else math.nan)
    np.testing.assert_array_equal(scores.size, SETS.sizes)


def test_curve_is_the_scores_at_each_alpha():
    curve = diag.credible_curve(QUERIES, GALLERY, LABELS, GALLERY_LABELS, alphas=[0.5, 0.2], exclude=EXCLUDE)
    scores = diag.class_scores(SETS, LABELS, GALLERY_LABELS, exclude=EXCLUDE)
    assert curve.size[1] == SETS.sizes.mean() and curve.empty[1] == (SETS.sizes == 0).mean()
    for got, values in ((curve.precision, scores.precision), (curve.recall, scores.recall), (curve.f1, scores.f1)):
        assert got[1] == pytest.approx(np.nanmean(values))
    for error, values in (
        (curve.size_se, scores.size),
        (curve.precision_se, scores.precision),
        (curve.f1_se, scores.f1),
    ):
        assert error[1] == pytest.approx(stats.sem(values, nan_policy="omit"))
    assert curve.size[0] < curve.size[1] and curve.recall[0] < curve.recall[1]


@pytest.mark.parametrize("entries", [1 << 20, 3 * M])
def test_ranking_scores_are_those_of_a_loop(entries, monkeypatch):
    monkeypatch.setattr(diag.ranking_scores.__globals__["_search"], "ENTRIES", entries)
    mean = QUERIES.mean_direction
    scores = diag.ranking_scores(mean, GALLERY, LABELS, GALLERY_LABELS, exclude=EXCLUDE)
    for i in range(N):
        order = [j for j in np.argsort(-(mean[i].double() @ GALLERY.double().T).numpy()) if j != EXCLUDE[i]]
        hits = [GALLERY_LABELS[j] == LABELS[i] for j in order]
        assert scores.correct[i] == hits[0]
        relevant = sum(hits)
        expected = sum(sum(hits[: k + 1]) / (k + 1) for k in range(relevant) if hits[k])
        np.testing.assert_allclose(scores.average_precision[i], expected / relevant if relevant else math.nan)
    assert scores.recall_at_1 == scores.correct.mean()
    assert scores.map_at_r == pytest.approx(np.nanmean(scores.average_precision))


def test_perfect_ranking_scores_one():
    scores = diag.ranking_scores(GALLERY, GALLERY, range(M), range(M))
    assert scores.recall_at_1 == scores.map_at_r == 1.0


def test_risk_coverage_against_a_loop_and_its_limits():
    confidence, correct = RNG.standard_normal(60), RNG.uniform(size=60) < 0.7
    curve = diag.risk_coverage(confidence, correct)
    order = sorted(range(60), key=lambda i: -confidence[i])
    risks = [sum(not correct[i] for i in order[:k]) / k for k in range(1, 61)]
    np.testing.assert_allclose(curve.risk, risks)
    assert curve.aurc == pytest.approx(np.mean(risks)) and curve.coverage[0] == 1 / 60
    assert diag.risk_coverage(correct.astype(float) + 1e-3 * confidence, correct).excess_aurc == pytest.approx(0)
    assert curve.excess_aurc > 0.01
    # confidence that says nothing: the error rate, whatever the order of the items
    same = diag.risk_coverage(np.full(60, np.inf), correct)
    np.testing.assert_allclose(same.risk, np.mean(~correct))


def test_sizes_correlate_with_ambiguity_as_scipy_says():
    ambiguity = RNG.uniform(size=N)
    assert diag.size_correlation(SETS, ambiguity) == pytest.approx(stats.spearmanr(SETS.sizes, ambiguity).statistic)
    assert diag.size_correlation(SETS, -QUERIES.concentration) > 0.9


def test_label_entropy_is_scipys():
    counts = RNG.integers(0, 9, (6, 10)) + np.eye(6, 10)
    np.testing.assert_allclose(diag.label_entropy(counts), stats.entropy(counts, axis=-1))
    assert diag.label_entropy(torch.full((10,), 0.1)) == pytest.approx(math.log(10))


IMAGES = RNG.uniform(size=(M, 1, 8, 8))
PLOTS = {
    "sets": lambda **k: diag.plot_credible_sets(
        SETS, QUERIES.concentration, IMAGES[:N], IMAGES, labels=LABELS, gallery_labels=GALLERY_LABELS, **k
    ),
    "caps": lambda **k: diag.plot_credible_caps(
        SETS, QUERIES.concentration, np.ones(N), labels=LABELS, gallery_labels=GALLERY_LABELS, **k
    ),
    "caps without labels": lambda **k: diag.plot_credible_caps(SETS, QUERIES.concentration, **k),
    "risk": lambda **k: diag.plot_risk_coverage({"a": diag.risk_coverage(RNG.uniform(size=9), np.arange(9) > 2)}, **k),
}


@pytest.mark.parametrize("name", PLOTS)
def test_pictures_draw_on_their_own_figure_or_on_given_axes(name, tmp_path):
    before = dict(matplotlib.rcParams)
    axes = PLOTS[name]()
    axes.figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000 and dict(matplotlib.rcParams) == before
    given = Figure().add_subplot()
    assert PLOTS[name](ax=given) is given and given.has_data() and given.get_title()


def test_picture_shows_every_row_from_sure_to_unsure_and_frames_the_other_labels():
    axes = PLOTS["sets"](num_queries=4, num_items=6)
    chosen = np.unique(np.linspace(0, N - 1, 4).round().astype(int))  # the queries are sorted by concentration
    shown = [min(6, SETS.sizes[i]) for i in chosen]
    assert len(axes.images) == len(chosen) + sum(shown)
    texts = [text.get_text() for text in axes.texts]
    assert texts[0].startswith(f"κ = {QUERIES.concentration[0]:.3g}") and texts[1] == "all 1"
    assert texts[-1] == f"6 of {SETS.sizes[-1]}"
    assert "empty" in [text.get_text() for text in PLOTS["sets"](num_queries=N).texts]
    everything = PLOTS["sets"](num_queries=N, num_items=M)
    wrong = GALLERY_LABELS[SETS.indices] != LABELS[SETS.queries]
    assert len(everything.patches) == wrong.sum()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: diag.class_scores(SETS, LABELS[1:], GALLERY_LABELS), r"`labels` must have shape \(25,\).*got \(24,\)"),
        (lambda: diag.ranking_scores(GALLERY, GALLERY[:, :3], LABELS, LABELS), "one dimension|unit vectors"),
        (lambda: diag.ranking_scores(GALLERY, torch.eye(3), range(M), range(3)), "one dimension, got 4 and 3"),
        (lambda: diag.risk_coverage([], []), "one length >= 1"),
        (lambda: diag.risk_coverage([math.nan], [True]), "without NaN"),
        (lambda: diag.risk_coverage([1.0, 2.0], [True]), r"got shapes \(2,\) and \(1,\)"),
        (lambda: diag.label_entropy([[0.0, 0.0]]), "positive sums"),
        (lambda: diag.label_entropy([-1.0, 2.0]), ">= 0"),
        (lambda: diag.size_correlation(SETS, [1.0]), "one length"),
        (lambda: diag.plot_credible_caps(SETS, [1.0]), r"must have shape \(25,\)"),
        (lambda: diag.plot_credible_sets(SETS, [1.0], IMAGES, IMAGES), "must have 25 entries"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
