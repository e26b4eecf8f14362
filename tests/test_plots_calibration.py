"""Pictures of calibration and model checks: what is drawn is what was computed."""

from __future__ import annotations

import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from pyro_contrastive import diagnostics
from pyro_contrastive.diagnostics.sbc import SBC

rng = np.random.default_rng(0)
PIT = {"right": rng.uniform(size=400), "too sure": np.sqrt(rng.uniform(size=300))}
KAPPA = np.exp(rng.normal(3.0, 0.5, 200))
ESTIMATE = {"right": KAPPA, "too sure": 4.0 * KAPPA}
LOGITS = rng.normal(size=(400, 400)) + 2.0 * np.eye(400)
CHECKS = {name: diagnostics.partner_check(scale * LOGITS, num_candidates=20)
          for name, scale in {"right": 2.0, "sharp": 8.0, "dull": 0.5}.items()}  # fmt: skip
TARP = {"right": diagnostics.expected_coverage(PIT["right"], num_bootstrap=50),
        "biased": diagnostics.expected_coverage(PIT["too sure"], num_bootstrap=50)}  # fmt: skip
RISK = diagnostics.selective_risk(np.arange(100), np.arange(100) >= 20, num_resamples=50)
CURVE = diagnostics.risk_coverage(np.arange(100), np.arange(100) >= 20)

CALLS = {
    "grid": lambda **k: diagnostics.plot_calibration_grid(PIT, **k),
    "ranks": lambda **k: diagnostics.plot_rank_histogram(PIT, **k),
    "tarp": lambda **k: diagnostics.plot_tarp(TARP, **k),
    "reliability": lambda **k: diagnostics.plot_reliability(CHECKS, **k),
    "comparison": lambda **k: diagnostics.plot_comparison(diagnostics.compare(CHECKS), **k),
    "risk": lambda **k: diagnostics.plot_risk_coverage({"band": RISK, "plain": CURVE}, **k),
}


@pytest.mark.parametrize("name", CALLS)
def test_each_plot_makes_its_own_figure_and_leaves_matplotlib_alone(name, tmp_path):
    before = dict(matplotlib.rcParams)
    drawn = CALLS[name](figsize=(6.0, 5.0))
    figure = np.ravel(np.array(drawn, dtype=object))[0].figure
    assert tuple(figure.get_size_inches()) == (6.0, 5.0)
    figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000
    assert dict(matplotlib.rcParams) == before
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


@pytest.mark.parametrize("name", [name for name in CALLS if name != "grid"])
def test_each_plot_draws_on_given_axes_and_refuses_other_backends(name):
    ax = Figure().add_subplot()
    assert CALLS[name](ax=ax) is ax and ax.has_data() and ax.get_title()
    with pytest.raises(ValueError, match="`backend` must be \"matplotlib\" for this plot, got 'bokeh'"):
        CALLS[name](backend="bokeh")


def line(ax: Axes, start: str) -> np.ndarray:
    """The data of the line whose label begins so."""
    (found,) = [one for one in ax.lines if str(one.get_label()).startswith(start)]
    return found.get_xydata()


def test_grid_has_a_row_per_method_with_its_own_data_and_common_scales():
    grid = diagnostics.plot_calibration_grid(PIT, concentration=ESTIMATE, true_concentration=KAPPA, levels=[0.3, 0.6])
    assert grid.shape == (2, 3)
    for row, name in zip(grid, PIT, strict=True):
        np.testing.assert_allclose(line(row[0], name)[:, 1], diagnostics.coverage(PIT[name], [0.3, 0.6]).empirical)
        np.testing.assert_allclose(np.abs(row[1].lines[1].get_ydata()).max(), stats.kstest(PIT[name], "uniform")[0])
        np.testing.assert_allclose(row[2].collections[0].get_offsets(), np.stack([KAPPA, ESTIMATE[name]], axis=1))
        assert row[0].get_ylabel().startswith(name + "\n")
    for column in (1, 2):
        assert grid[0, column].get_ylim() == grid[1, column].get_ylim()
        assert grid[0, column].get_xlim() == grid[1, column].get_xlim()
    assert all(ax.get_title() for ax in grid[0]) and not any(ax.get_title() for ax in grid[1])
    assert all(ax.get_xlabel() for ax in grid[1]) and not any(ax.get_xlabel() for ax in grid[0])
    shown = grid[0, 2].get_ylim()
    assert shown[0] < KAPPA.min() and shown[1] > 4 * KAPPA.max()  # no row is cut by another's scale


def test_grid_draws_on_given_axes():
    given = Figure().subplots(2, 2)
    assert (diagnostics.plot_calibration_grid(PIT, ax=given) == given).all()


def test_rank_histogram_counts_and_its_band_is_binomial():
    ranks = rng.integers(0, 100, size=1000)
    ax = diagnostics.plot_rank_histogram(SBC({"a": ranks}, {"a": (ranks + 0.5) / 100}, {"a": 0.5}, 99), num_bins=10)
    (steps,) = [patch for patch in ax.patches if hasattr(patch, "get_data")]
    np.testing.assert_allclose(steps.get_data().values, np.bincount(ranks // 10, minlength=10) * 10 / 1000)
    low, high = stats.binom.ppf([0.0025, 0.9975], 1000, 0.1) / 100
    (band,) = [patch for patch in ax.patches if not hasattr(patch, "get_data")]
    assert (band.get_y(), band.get_y() + band.get_height()) == (pytest.approx(low), pytest.approx(high))
    with pytest.raises(ValueError, match="`num_bins` must be >= 2, got 1"):
        diagnostics.plot_rank_histogram(PIT, num_bins=1)


def test_band_of_the_rank_histogram_holds_all_bins_of_calibrated_ranks():
    """400 histograms of 200 values, level 95 %: fewer than 93 % inside has probability below 5 % (fixed seed)."""
    generator, inside = np.random.default_rng(1), 0
    low, high = stats.binom.ppf([0.025 / 20, 1 - 0.025 / 20], 200, 1 / 20)
    for _ in range(400):
        counts = np.histogram(generator.uniform(size=200), np.linspace(0, 1, 21))[0]
        inside += (counts >= low).all() and (counts <= high).all()
    assert inside >= 0.93 * 400


def test_curves_are_those_of_the_results():
    ax = diagnostics.plot_tarp(TARP)
    np.testing.assert_allclose(line(ax, "biased")[:, 1], TARP["biased"].expected_coverage)
    np.testing.assert_allclose(line(diagnostics.plot_tarp(TARP["right"]), "posterior")[:, 0], TARP["right"].levels)
    ax = diagnostics.plot_risk_coverage({"band": RISK, "plain": CURVE})
    np.testing.assert_allclose(line(ax, "band")[:, 1], RISK.curve.risk)
    np.testing.assert_allclose(line(ax, "plain")[:, 1], CURVE.risk)
    outline = ax.collections[0].get_paths()[0].vertices
    assert outline[:, 1].max() == pytest.approx(RISK.upper.max())
    assert f"{RISK.aurc.lower:.3f} to {RISK.aurc.upper:.3f}" in ax.get_legend().get_texts()[0].get_text()


def test_reliability_shows_the_used_bins_with_their_intervals():
    curve = CHECKS["sharp"].reliability
    used = curve.counts > 0
    assert not used.all()
    for given in (CHECKS["sharp"], curve):
        ax = diagnostics.plot_reliability(given)
        bars = ax.containers[0]
        np.testing.assert_allclose(bars.lines[0].get_xydata(), np.stack([curve.predicted, curve.observed], 1)[used])
        ends = np.array([segment[:, 1] for segment in bars.lines[2][0].get_segments()])
        np.testing.assert_allclose(ends, np.stack([curve.lower, curve.upper], 1)[used], atol=1e-12)
        assert f"ECE {curve.ece:.3f}" in bars.get_label()


def test_comparison_has_the_best_on_top_and_names_what_is_infinite():
    found = diagnostics.compare(CHECKS)
    ax = diagnostics.plot_comparison(found)
    assert [text.get_text() for text in ax.get_yticklabels()] == list(found.names)
    bottom, top = ax.get_ylim()
    assert top < 0 < bottom  # row 0 above
    dots = np.concatenate([one.get_xydata() for one in ax.lines if one.get_marker() == "o"])
    np.testing.assert_allclose(dots, np.stack([found.difference, np.arange(3)], axis=1), atol=1e-12)
    bars = [one.get_xdata() for one in ax.lines if one.get_linewidth() == 2.2]
    np.testing.assert_allclose(bars, np.stack([found.lower, found.upper], axis=1)[1:])
    impossible = LOGITS.copy()
    impossible[0, 0] = -np.inf
    checks = {"right": CHECKS["right"], "excludes a partner": diagnostics.partner_check(impossible, num_candidates=20)}
    ax = diagnostics.plot_comparison(diagnostics.compare(checks))
    assert [text.get_text() for text in ax.texts] == ["-∞"]
    ax.figure.canvas.draw()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (({},), {}, "at least one method"),
        ((PIT["right"],), {}, "must map at least one method to its PIT values, got ndarray"),
        ((PIT,), {"concentration": ESTIMATE}, "go together"),
        ((PIT,), {"concentration": {"right": KAPPA}, "true_concentration": KAPPA}, "must have the methods of `pit`"),
        ((PIT,), {"ax": Figure().subplots(3, 2)}, r"array of \(2, 2\) axes, a row per method, got \(3, 2\)"),
        (({"a": [2.0]},), {}, r"`pit` must be a non-empty vector of values in \[0, 1\]"),
        ((PIT,), {"backend": "plotly"}, '`backend` must be "matplotlib"'),
    ],
)
def test_bad_input_of_the_grid(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        diagnostics.plot_calibration_grid(*arguments, **options)


@pytest.mark.parametrize("draw", [diagnostics.plot_tarp, diagnostics.plot_reliability, diagnostics.plot_risk_coverage])
def test_an_empty_mapping_is_refused(draw):
    with pytest.raises(ValueError, match="at least one result is needed, got an empty mapping"):
        draw({})
