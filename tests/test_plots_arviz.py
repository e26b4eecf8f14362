"""ArviZ's plots through the shim, on whichever line is installed: types, axes, content, traps, global state."""

from __future__ import annotations

import sys
from importlib.metadata import version

import arviz
import matplotlib
import numpy as np
import pytest
import xarray
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyro_contrastive import diagnostics
from pyro_contrastive.diagnostics import KHat, plots_arviz
from pyro_contrastive.diagnostics.sbc import SBC

AZ1 = int(version("arviz").split(".")[0]) >= 1
rng = np.random.default_rng(0)
PIT = rng.uniform(size=300)
RANKS = rng.integers(0, 50, size=300)  # of 49 draws


def container(**groups):
    """Groups {name: {variable: (dims, values)}} as the installed ArviZ holds them."""
    data = {name: xarray.Dataset(variables) for name, variables in groups.items()}
    return xarray.DataTree.from_dict(data) if AZ1 else arviz.InferenceData(**data)


DRAWS = ("chain", "draw")
POSTERIOR = {
    "z1": ((*DRAWS, "item", "axis"), rng.normal(size=(2, 100, 4, 3))),
    "angle1": ((*DRAWS, "item"), rng.normal(size=(2, 100, 4))),
    "kappa": (DRAWS, rng.gamma(3.0, size=(2, 100))),
}
PREDICTIVE = {
    "partner": ((*DRAWS, "item"), rng.integers(0, 50, size=(1, 60, 50))),
    "y": ((*DRAWS, "item"), rng.normal(size=(1, 60, 50))),
}
OBSERVED = {"partner": (("item",), np.arange(50)), "y": (("item",), rng.normal(size=50))}
FITTED = container(posterior=POSTERIOR, posterior_predictive=PREDICTIVE, observed_data=OBSERVED)
KHATS = KHat(rng.normal(0.4, 0.2, 30), 0.63, np.arange(30), 500, False)

CALLS = {  # the plot, and how many axes it needs on each line
    "ecdf": (lambda **k: diagnostics.plot_ecdf_pit(PIT, **k), 1),
    "ecdf of two": (lambda **k: diagnostics.plot_ecdf_pit({"a": PIT, "b": PIT**2}, **k), 2),
    "rank": (lambda **k: diagnostics.plot_rank(FITTED, var_names="kappa", **k), 1),
    "ranks": (lambda **k: diagnostics.plot_rank(FITTED, var_names=["angle1", "kappa"], **k), 5),
    "forest": (lambda **k: diagnostics.plot_forest(FITTED, **k), 2 if AZ1 else 1),
    "ppc": (lambda **k: diagnostics.plot_ppc_pit(FITTED, **k), 1),
    "khat": (lambda **k: diagnostics.plot_khat(KHATS, **k), 1),
}


def axes_of(drawn) -> list[Axes]:
    if not AZ1:
        return list(np.ravel(np.array(drawn, dtype=object)))
    return drawn.viz["figure"].item().axes


def number_of_figures() -> int:
    pyplot = sys.modules.get("matplotlib.pyplot")
    return len(pyplot.get_fignums()) if pyplot else 0


@pytest.mark.parametrize("name", CALLS)
def test_each_returns_what_arviz_returns_and_leaves_matplotlib_alone(name, tmp_path):
    call, _ = CALLS[name]
    before, figures = dict(matplotlib.rcParams), number_of_figures()
    drawn = call()
    assert isinstance(drawn, arviz.PlotCollection if AZ1 else (Axes, np.ndarray))
    figure = axes_of(drawn)[0].figure
    figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000
    assert dict(matplotlib.rcParams) == before and number_of_figures() == figures == 0


@pytest.mark.parametrize("name", CALLS)
def test_each_draws_on_given_axes_and_counts_them(name):
    call, count = CALLS[name]
    given = np.ravel(Figure().subplots(1, count, squeeze=False))
    drawn = call(ax=given[0] if count == 1 else given)
    assert all(ax.has_data() or name == "forest" for ax in given)
    assert axes_of(drawn) == list(given)
    if name != "forest" or AZ1:
        with pytest.raises(ValueError, match=f"got {count + 1}"):
            call(ax=np.ravel(Figure().subplots(1, count + 1)))


@pytest.mark.parametrize("name", CALLS)
def test_size_of_a_new_figure(name):
    assert tuple(axes_of(CALLS[name][0](figsize=(7.0, 3.0)))[0].figure.get_size_inches()) == (7.0, 3.0)


@pytest.mark.skipif(not AZ1, reason="only ArviZ 1.x has a backend that needs no library")
@pytest.mark.parametrize("name", CALLS)
def test_other_backends_reach_arviz(name):
    if name in ("rank", "ranks"):
        pytest.skip("ArviZ's backend 'none' has no fill_between for ranks")
    assert CALLS[name][0](backend="none").backend == "none"


def test_curve_of_the_ecdf_is_that_of_the_values():
    ax = axes_of(diagnostics.plot_ecdf_pit(PIT))[0]
    lines = [line.get_xydata() for line in ax.lines if len(line.get_xdata()) > 10]
    x, y = lines[0].T
    inside = (x > 0.01) & (x < 0.99)
    expected = np.searchsorted(np.sort(PIT), x[inside], side="right") / len(PIT) - x[inside]
    assert np.abs(y[inside] - expected).max() <= 1.5 / len(PIT)  # ArviZ 1.x steps on a grid of N points


def test_values_of_the_caller_are_not_sorted_in_place():
    values = PIT.copy()
    diagnostics.plot_ecdf_pit(values)
    np.testing.assert_array_equal(values, PIT)


def test_points_of_khat_are_the_values_and_the_line_is_the_threshold():
    ax = axes_of(diagnostics.plot_khat(KHATS))[0]
    points = np.concatenate([c.get_offsets() for c in ax.collections if len(c.get_offsets()) == 30])
    np.testing.assert_allclose(points[:, 1], KHATS.khat)
    heights = [float(line.get_ydata()[0]) for line in ax.lines]
    heights += [float(path.vertices[0, 1]) for c in ax.collections for path in c.get_paths() if len(path.vertices) == 2]
    assert any(height == pytest.approx(0.63) for height in heights)
    assert diagnostics.plot_khat([0.1, np.inf, -np.inf, 0.5]) is not None


def test_forest_leaves_out_the_coordinates_and_says_when_it_is_too_long():
    texts = {text.get_text() for ax in axes_of(diagnostics.plot_forest(FITTED)) for text in ax.texts}
    texts |= {text.get_text() for ax in axes_of(diagnostics.plot_forest(FITTED)) for text in ax.get_yticklabels()}
    assert any("kappa" in text for text in texts) and not any("z1" in text for text in texts)
    long = container(posterior={"angle1": ((*DRAWS, "item"), rng.normal(size=(1, 10, 100)))})
    with pytest.raises(ValueError, match=r'a forest of 100 rows is not readable, at most 80.*coords=\{"item"'):
        diagnostics.plot_forest(long)
    assert diagnostics.plot_forest(long, coords={"item": range(5)}) is not None
    for combined in (True, False):
        assert number_of_figures() == 0
        diagnostics.plot_forest(FITTED, combined=combined)


# --- traps ------------------------------------------------------------------------------------------------------------


def test_rank_plots_refuse_what_would_look_perfect():
    """A chain of PIT values with a density of 2u is as far from calibrated as one likes; its own ranks are flat."""
    with pytest.raises(ValueError, match=r"need at least 2, got 1.*flat whatever it holds.*plot_ecdf_pit"):
        diagnostics.plot_rank(container(posterior={"pit": (DRAWS, np.sqrt(PIT)[None])}))
    with pytest.raises(ValueError, match="`data` must be an ArviZ container with chains, got SBC.*plot_rank_histogram"):
        diagnostics.plot_rank(SBC({"a": RANKS}, {"a": PIT}, {"a": 0.5}, 49))
    if not AZ1:
        bars = arviz.plot_rank({"pit": np.sqrt(PIT)[None]}, ax=Figure().add_subplot()).patches
        assert np.ptp([bar.get_height() for bar in bars]) <= 1  # the trap


def test_predicted_index_of_a_partner_is_no_quantity():
    """A model that knows nothing, judged by the index: a perfectly uniform PIT."""
    guessing = {"partner": ((*DRAWS, "item"), rng.integers(0, 50, size=(1, 4000, 50)))}
    index = {"partner": (("item",), np.arange(50))}
    guess = container(posterior_predictive=guessing, observed_data=index)
    below = (guessing["partner"][1] < np.arange(50)).mean(axis=(0, 1))
    assert np.abs(np.sort(below) - np.arange(50) / 50).max() < 0.04
    for data, names in ((guess, None), (FITTED, "partner")):
        with pytest.raises(ValueError, match="`partner` is the index of a candidate.*partner_check"):
            diagnostics.plot_ppc_pit(data, var_names=names)


def test_predictive_pit_is_randomised_where_values_tie():
    truth = rng.poisson(2.0, 400)
    draws = rng.poisson(2.0, (1, 300, 400))
    data = container(posterior_predictive={"n": ((*DRAWS, "item"), draws)}, observed_data={"n": (("item",), truth)})
    seen = {}
    if AZ1:
        assert isinstance(diagnostics.plot_ppc_pit(data, method="prit_c"), arviz.PlotCollection)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots_arviz, "plot_ecdf_pit", lambda values, **_: seen.update(values))
        diagnostics.plot_ppc_pit(data)
    assert diagnostics.uniformity_pvalue(seen["n"]) > 0.001  # false-alarm rate 1 in 1000 (fixed seed)


# --- what comes in ----------------------------------------------------------------------------------------------------


def test_pit_values_from_every_form():
    result = SBC({"a": RANKS}, {"a": PIT}, {"a": 0.5}, 49)
    for data in (result, {"a": PIT}, result.to_arviz(), container(prior_sbc={"a": (DRAWS, PIT[None])})):
        np.testing.assert_array_equal(diagnostics.pit_values(data)["a"], PIT)
    (alone,) = diagnostics.pit_values(PIT).values()
    np.testing.assert_array_equal(alone, PIT)
    with_draws = container(prior_sbc={"a": (DRAWS, RANKS[None])})
    for data, draws in ((with_draws, 49), ({"a": RANKS}, 49)):
        found = diagnostics.pit_values(data, num_draws=draws)["a"]
        np.testing.assert_array_equal(np.floor(found * 50), RANKS)


def test_ranks_are_never_scaled_by_the_largest_one_observed():
    low = RANKS // 2  # at most 24 of 49: over-confident to one side, and perfect if 24 is taken for S
    for data in ({"a": low}, container(prior_sbc={"a": (DRAWS, low[None])}), low.astype(float)):
        with pytest.raises(ValueError, match=r"holds ranks .*largest observed rank is not S.*num_draws=S"):
            diagnostics.plot_ecdf_pit(data)
    ax = axes_of(diagnostics.plot_ecdf_pit({"a": low}, num_draws=49))[0]
    assert max(np.max(line.get_ydata()) for line in ax.lines if len(line.get_xdata()) > 10) > 0.4


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ({"a": [0.5, -0.1]}, {}, r"in \[0, 1\]; `a` has shape \(2,\) and 1 other"),
        ({"a": [0.5, np.nan]}, {}, r"in \[0, 1\]; `a` has shape \(2,\) and 1 other"),
        ([], {}, "at least one number"),
        ({}, {}, "`var_names` must be among"),
        ({"a": PIT}, {"var_names": "b"}, r"`var_names` must be among \['a'\], got \['b'\]"),
        ({"a": PIT, "b": PIT[1:]}, {}, "one length"),
        (FITTED, {}, 'no group "prior_sbc", only'),
        ({"a": [3, 60]}, {"num_draws": 49}, "is `num_draws` right"),
    ],
)
def test_bad_input_is_told_the_way_out(data, options, message):
    with pytest.raises(ValueError, match=message):
        diagnostics.plot_ecdf_pit(data, **options)


def test_other_bad_input():
    with pytest.raises(ValueError, match="`data` must be an ArviZ container, got dict; `to_arviz` makes one"):
        diagnostics.plot_forest({"a": PIT})
    with pytest.raises(ValueError, match="more than 24 panels; choose by `var_names` or `coords`"):
        many = container(posterior={"a": ((*DRAWS, "item"), rng.normal(size=(2, 10, 30)))})
        diagnostics.plot_rank(many)
    with pytest.raises(ValueError, match=r"`khat` must hold at least one value in a vector \(N,\), got shape \(2, 2\)"):
        diagnostics.plot_khat(np.zeros((2, 2)))
    with pytest.raises(ValueError, match='no group "observed_data"'):
        diagnostics.plot_ppc_pit(container(posterior_predictive=PREDICTIVE))
