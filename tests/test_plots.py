from __future__ import annotations

import sys

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from scipy import stats

from pyro_contrastive.diagnostics import calibration, plots

rng = np.random.default_rng(0)
POINTS = rng.standard_normal((200, 5))
POINTS /= np.linalg.norm(POINTS, axis=-1, keepdims=True)
KAPPA = np.exp(rng.normal(3, 0.5, 300))
CALLS = {
    "coverage": lambda **k: plots.plot_coverage(
        calibration.coverage(rng.uniform(size=400), np.linspace(0.1, 0.9, 9)), **k
    ),
    "pit": lambda **k: plots.plot_pit(rng.uniform(size=400), **k),
    "recovery": lambda **k: plots.plot_concentration_recovery(KAPPA, np.r_[np.inf, KAPPA[1:] * 1.1], **k),
    "corruption": lambda **k: plots.plot_concentration_vs_corruption(1 / KAPPA, torch.from_numpy(KAPPA), **k),
    "quartile": lambda **k: plots.plot_accuracy_by_quartile({"seed 0": [0.9, 0.7, 0.6, 0.4], "seed 1": [0.8] * 4}, **k),
    "neighbours": lambda **k: plots.plot_neighbours(
        rng.uniform(size=(3, 1, 8, 8)),
        rng.uniform(size=(3, 4, 1, 8, 8)),
        [9.0, 3.0, 1.0],
        labels=[0, 1, 2],
        neighbour_labels=[[0, 0, 1, 0]] * 3,
        title="images",
        **k,
    ),  # fmt: skip
    "aggregate": lambda **k: plots.plot_aggregate(POINTS, **k),
    "history": lambda **k: plots.plot_history(
        {"step": np.arange(0, 4000, 10), "loss": 5 + np.exp(-np.arange(400) / 50), "lr": np.full(400, 1e-3)}, **k
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_each_plot_makes_its_own_figure_and_leaves_matplotlib_alone(name, tmp_path):
    before = dict(matplotlib.rcParams)
    ax = CALLS[name]()
    ax.figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000
    assert dict(matplotlib.rcParams) == before
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


@pytest.mark.parametrize("name", CALLS)
def test_each_plot_draws_on_given_axes(name):
    ax = Figure().add_subplot()
    assert CALLS[name](ax=ax) is ax
    assert ax.has_data() and ax.get_title()


@pytest.mark.parametrize("name", CALLS)
def test_each_plot_takes_a_size_and_refuses_other_backends(name):
    assert tuple(CALLS[name](figsize=(4.0, 3.0), backend="matplotlib").figure.get_size_inches()) == (4.0, 3.0)
    with pytest.raises(ValueError, match="`backend` must be \"matplotlib\" for this plot, got 'plotly'"):
        CALLS[name](backend="plotly")


def test_pit_curve_leaves_the_band_when_the_test_rejects():
    def leaves(pit):
        ax = plots.plot_pit(pit)
        curve = ax.lines[1].get_ydata()
        assert np.abs(curve).max() == pytest.approx(stats.kstest(pit, "uniform").statistic, abs=1e-12)
        return np.abs(curve).max() > stats.kstwo.ppf(0.95, len(pit))

    uniform = np.random.default_rng(1).uniform(size=500)
    assert not leaves(uniform)  # false-alarm rate 5 % (fixed seed)
    assert leaves(uniform**2)


def test_bars_and_points_show_the_numbers():
    ax = plots.plot_accuracy_by_quartile([0.9, 0.5, 0.4, 0.1])
    assert [bar.get_height() for bar in ax.patches] == [0.9, 0.5, 0.4, 0.1]
    ax = plots.plot_concentration_recovery([1.0, 2.0, 4.0], [1.0, np.inf, 5.0])
    np.testing.assert_array_equal(ax.collections[0].get_offsets(), [[1.0, 1.0], [4.0, 5.0]])
    assert "1 infinite" in ax.get_title()


def test_history_runs_over_the_steps_and_shows_losses_only():
    ax = plots.plot_history({"step": [10, 20, 30], "loss": [3.0, 2.0, 1.0], "lr": [1e-3, 5e-4, 0.0]})
    assert len(ax.lines) == 1
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), [[10, 3], [20, 2], [30, 1]])


def test_infinite_concentrations_everywhere_leave_an_empty_picture():
    assert plots.plot_concentration_recovery([1.0, 2.0], [np.inf, np.inf]).get_title().count("2 infinite")
    assert plots.plot_concentration_vs_corruption([0.1, 0.2], [np.inf, np.inf]).get_title()


def test_colour_images():
    ax = plots.plot_neighbours(rng.uniform(size=(2, 3, 8, 8)), rng.uniform(size=(2, 3, 3, 8, 8)), [2.0, 1.0])
    assert len(ax.images) == 2 * 4 and ax.images[0].get_array().shape == (8, 8, 3)
