"""to_arviz on pairs that are not ours: autoguides, plates of all kinds, masks, discrete data, keyword arguments."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.contrib.autoname import scope
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, autoguide
from pyro.optim import Adam

from pyro_contrastive import guides, models
from pyro_contrastive.diagnostics import to_arviz

N = 12
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(0))
Y = X @ torch.tensor([1.0, -1.0, 0.5])
GROUP = torch.arange(N) % 4
COUNTS = torch.arange(N) % 3


def regression(x, y=None):
    """A matrix product that a further dimension of w breaks."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    pyro.deterministic("square", w**2)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, s), obs=y)


def regression_for_many(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((w * x).sum(-1), 0.5), obs=y)


def grouped(x, y=None):
    """A hierarchy that is written for any number of leading dimensions."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", 4):
        b = pyro.sample("b", dist.Normal(mu, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(b[..., GROUP], 0.5), obs=y)


def fitted(model, guide, *args, elbo=None, steps=3, **kwargs):
    svi = SVI(model, guide, Adam({"lr": 0.02}), elbo or Trace_ELBO())
    for _ in range(steps):
        svi.step(*args, **kwargs)
    return guide


def groups_of(data) -> set[str]:
    names = data.groups() if callable(data.groups) else data.groups
    return {name.strip("/") for name in names if name.strip("/")}


def normal(x, loc, scale):
    return scipy.stats.norm.logpdf(x, loc, scale)


AUTOGUIDES = [
    autoguide.AutoNormal,
    autoguide.AutoDelta,
    autoguide.AutoDiagonalNormal,
    autoguide.AutoMultivariateNormal,
    autoguide.AutoLowRankMultivariateNormal,
    autoguide.AutoIAFNormal,
    autoguide.AutoStructured,
    autoguide.AutoGaussian,
]


@pytest.mark.parametrize("family", AUTOGUIDES, ids=lambda family: family.__name__)
def test_autoguides_of_a_regression(family, tmp_path):
    guide = fitted(regression, family(regression), X, y=Y)
    data = to_arviz(regression, guide, (X,), kwargs={"y": Y}, num_samples=6, seed=1, dims={"w": ["feature"]})
    posterior = data["posterior"]
    assert posterior["w"].dims == ("chain", "draw", "feature") and posterior["w"].shape == (1, 6, 3)
    w, s = posterior["w"].values[0], posterior["s"].values[0]
    assert s.shape == (6,) and (s > 0).all()
    np.testing.assert_allclose(posterior["square"].values[0], w**2, rtol=1e-6)
    likelihood = normal(Y.numpy(), w @ X.numpy().T, s[:, None])
    np.testing.assert_allclose(data["log_likelihood"]["y"].values[0], likelihood, rtol=1e-3, atol=1e-3)
    log_p = likelihood.sum(-1) + normal(w, 0, 1).sum(-1) + scipy.stats.lognorm.logpdf(s, 1.0)
    np.testing.assert_allclose(data["sample_stats"]["log_p"].values[0], log_p, rtol=1e-3, atol=1e-3)
    assert np.isfinite(data["sample_stats"]["log_q"]).all()
    assert data["posterior_predictive"]["y"].dims == data["prior_predictive"]["y"].dims == ("chain", "draw", "item")
    assert data["prior"]["w"].dims == ("chain", "draw", "feature") and len(np.unique(data["prior"]["s"])) == 6
    np.testing.assert_array_equal(data["observed_data"]["y"], Y)
    np.testing.assert_array_equal(data["constant_data"]["x1"], X)
    assert data.attrs["posterior_draws"].startswith("one after the other: ")  # x @ w does not take a matrix of w
    data.to_netcdf(tmp_path / "posterior.nc")


@pytest.mark.parametrize("vectorize", [True, False])
def test_draws_in_one_pass_have_the_densities_of_draws_made_alone(vectorize):
    guide = fitted(grouped, autoguide.AutoNormal(grouped), X, y=Y)
    data = to_arviz(grouped, guide, (X,), kwargs={"y": Y}, num_samples=9, seed=1, vectorize=vectorize)
    how = "many in one pass" if vectorize else "one after the other: asked for"
    assert data.attrs["posterior_draws"] == data.attrs["prior_draws"] == how
    posterior, stats = data["posterior"], data["sample_stats"]
    assert posterior["b"].dims == ("chain", "draw", "groups")
    mu, b = posterior["mu"].values[0], posterior["b"].values[0]
    likelihood = normal(Y.numpy(), b[:, GROUP], 0.5)
    np.testing.assert_allclose(data["log_likelihood"]["y"].values[0], likelihood, rtol=1e-4)
    log_p = likelihood.sum(-1) + normal(mu, 0, 1) + normal(b, mu[:, None], 1).sum(-1)
    np.testing.assert_allclose(stats["log_p"].values[0], log_p, rtol=1e-4)
    constants = data["constant_data"]
    log_q = sum(
        normal(value, constants[f"AutoNormal.locs.{name}"].values, constants[f"AutoNormal.scales.{name}"].values)
        .reshape(9, -1)
        .sum(-1)
        for name, value in (("mu", mu), ("b", b))
    )
    np.testing.assert_allclose(stats["log_q"].values[0], log_q, rtol=1e-4)
    np.testing.assert_allclose(stats["elbo"].values[0], log_p - log_q, rtol=1e-3)
    assert len(np.unique(data["posterior_predictive"]["y"])) == len(np.unique(data["prior_predictive"]["y"])) == 9 * N


@pytest.mark.parametrize("family", AUTOGUIDES, ids=lambda family: family.__name__)
def test_autoguides_in_one_pass(family):
    guide = fitted(regression_for_many, family(regression_for_many), X, y=Y)
    data = to_arviz(regression_for_many, guide, (X,), kwargs={"y": Y}, num_samples=6, seed=1)
    assert data.attrs["posterior_draws"] == data.attrs["prior_draws"] == "many in one pass"
    w = data["posterior"]["w"].values[0]
    assert len(np.unique(w)) == (3 if family is autoguide.AutoDelta else 18)
    np.testing.assert_allclose(
        data["log_likelihood"]["y"].values[0], normal(Y.numpy(), w @ X.numpy().T, 0.5), rtol=1e-3, atol=1e-3
    )
    alone = guide(X, y=Y)["w"] if family is autoguide.AutoDelta else None
    assert alone is None or np.allclose(w, alone.detach())


@pytest.mark.parametrize("site", ["model", "guide", "deterministic"])
def test_a_program_that_mixes_draws_in_one_pass_is_caught(site):
    def model(x):
        with pyro.plate("pairs", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if site == "deterministic":
                pyro.deterministic("total", z - z.mean(0, keepdim=True))
            mean = z.mean(0, keepdim=True) if site == "model" else z
            pyro.sample("y", dist.Normal(mean, 1.0), obs=x[:, 0])

    def guide(x):
        with pyro.plate("pairs", len(x)):
            z = pyro.sample("z", dist.Normal(x[:, 0], 1.0))
            if site == "guide":
                pyro.sample("more", dist.Normal(z.mean(0, keepdim=True).expand_as(z), 1.0))

    data = to_arviz(model, guide, (X,), num_samples=5, seed=0)
    assert "changes when its draw is made alone" in data.attrs["posterior_draws"]
    z = data["posterior"]["z"].values[0]
    mean = z.mean(-1, keepdims=True) if site == "model" else z
    expected = normal(X[:, 0].numpy(), mean, 1.0)
    np.testing.assert_allclose(data["log_likelihood"]["y"].values[0], expected, rtol=1e-4)
    if site == "deterministic":
        np.testing.assert_allclose(
            data["posterior"]["total"].values[0], z - z.mean(-1, keepdims=True), rtol=1e-4, atol=1e-6
        )


def test_an_evidence_that_samples_is_made_one_draw_at_a_time():
    guide = guides.VonMisesFisher(torch.nn.Linear(3, 8), dim=3)
    model = models.MCInfoNCE(guide, concentration=10.0, evidence="k_sample")
    data = to_arviz(model, guide, (X, X), num_samples=4, seed=0)
    assert "site positive changes" in data.attrs["posterior_draws"]
    data = to_arviz(models.MCInfoNCE(guide), guide, (X, X), num_samples=4, seed=0)
    assert data.attrs["posterior_draws"] == "many in one pass"
    assert np.ptp(data["log_likelihood"]["positive"].values, axis=1).max() == 0.0  # exact: the latents are integrated


def test_large_batches_are_drawn_one_at_a_time(monkeypatch):
    monkeypatch.setattr("pyro_contrastive.diagnostics._passes._GRID_NUMBERS", 2 * N**2 - 1)
    guide = autoguide.AutoNormal(grouped)
    assert "enough work" in to_arviz(grouped, guide, (X,), kwargs={"y": Y}, num_samples=5).attrs["posterior_draws"]
    monkeypatch.setattr("pyro_contrastive.diagnostics._passes._GRID_NUMBERS", 2 * N**2)  # two, two, one
    data = to_arviz(grouped, guide, (X,), kwargs={"y": Y}, num_samples=5)
    assert data.attrs["posterior_draws"] == "many in one pass"
    assert len(np.unique(data["posterior"]["mu"])) == len(np.unique(data["prior"]["mu"])) == 5


def test_nested_plates_by_name_and_items_wherever_their_plate_is():
    def model(x):
        with pyro.plate("features", 3, dim=-1):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            with pyro.plate("rows", len(x), dim=-2):
                z = pyro.sample("z", dist.Normal(a, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    data = to_arviz(model, autoguide.AutoNormal(model), (X,), num_samples=4, seed=0)
    assert data["posterior"]["a"].dims == ("chain", "draw", "features")
    assert data["posterior"]["z"].dims == ("chain", "draw", "item", "features")
    assert data["log_likelihood"]["x"].dims == data["posterior_predictive"]["x"].dims == data["prior"]["z"].dims
    assert data["observed_data"]["x"].dims == ("item", "features")
    z = data["posterior"]["z"].values[0]
    np.testing.assert_allclose(data["log_likelihood"]["x"].values[0], normal(X.numpy(), z, 1.0), rtol=1e-4)


def test_statistics_per_item_sum_over_the_other_plates():
    def model(x):
        with pyro.plate("rows", len(x), dim=-2), pyro.plate("features", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    data = to_arviz(model, autoguide.AutoNormal(model), (X,), num_samples=4, seed=0)
    assert data["sample_stats"]["log_p"].dims == ("chain", "draw", "item")
    z = data["posterior"]["z"].values[0]
    expected = (normal(z, 0, 1) + normal(X.numpy(), z, 1)).sum(-1)
    np.testing.assert_allclose(data["sample_stats"]["log_p"].values[0], expected, rtol=1e-4)


def test_a_plate_as_long_as_the_items_by_chance_keeps_its_name():
    def model(x, y):
        with pyro.plate("topics", N):
            t = pyro.sample("t", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(t, 1.0), obs=y)

    data = to_arviz(model, autoguide.AutoNormal(model), (X,), kwargs={"y": Y}, num_samples=2)
    assert data["posterior"]["t"].dims == ("chain", "draw", "topics")
    assert data["log_likelihood"]["y"].dims == ("chain", "draw", "item")
    assert data["sample_stats"]["log_p"].dims == ("chain", "draw")


@pytest.mark.parametrize("labels", [None, [f"row {k}" for k in range(N)]])
def test_a_subsampling_plate_keeps_one_choice_of_rows(labels):
    def model(x, y=None):
        with pyro.plate("data", len(x), subsample_size=5) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=None if y is None else y[rows])

    def guide(x, y=None):
        with pyro.plate("data", len(x), subsample_size=5) as rows:
            pyro.sample("z", dist.Normal(x[rows, 0], 1.0))

    data = to_arviz(
        model, guide, (X,), kwargs={"y": Y}, num_samples=6, seed=0, coords={"item": labels} if labels else None
    )
    label = data["posterior"]["item"].values
    rows = np.array([labels.index(name) for name in label]) if labels else label
    assert len(set(rows)) == 5 and data["log_likelihood"]["y"].shape == (1, 6, 5)
    np.testing.assert_array_equal(data["observed_data"]["y"], Y.numpy()[rows])
    z = data["posterior"]["z"].values[0]
    np.testing.assert_allclose(data["log_likelihood"]["y"].values[0], normal(Y.numpy()[rows], z, 1.0), rtol=1e-4)
    scaled = (normal(z, 0, 1) + normal(Y.numpy()[rows], z, 1.0)) * N / 5
    np.testing.assert_allclose(data["sample_stats"]["log_p"].values[0], scaled, rtol=1e-4)
    assert data["constant_data"]["x1"].shape == (N, 3) and "data" in data.attrs["subsampled"]


def test_masks_scales_and_discrete_data():
    mask = torch.arange(N) < 5

    def model(x):
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=mask), poutine.scale(scale=3.0):
                pyro.sample("k", dist.Bernoulli(p), obs=(x[:, 0] > 0).float())
            pyro.sample("count", dist.Poisson(rate), obs=COUNTS.float())

    data = to_arviz(model, autoguide.AutoNormal(model), (X,), num_samples=6, seed=0)
    p, rate = (data["posterior"][name].values[0][:, None] for name in ("p", "rate"))
    k = (X[:, 0] > 0).numpy()
    bernoulli = scipy.stats.bernoulli.logpmf(k, p) * mask.numpy()
    poisson = scipy.stats.poisson.logpmf(COUNTS.numpy(), rate)
    np.testing.assert_allclose(data["log_likelihood"]["k"].values[0], bernoulli, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(data["log_likelihood"]["count"].values[0], poisson, rtol=1e-4, atol=1e-5)
    log_p = 3 * bernoulli.sum(-1) + poisson.sum(-1) + scipy.stats.gamma.logpdf(rate[:, 0], 2.0)
    np.testing.assert_allclose(data["sample_stats"]["log_p"].values[0], log_p, rtol=1e-4)
    assert set(np.unique(data["posterior_predictive"]["k"])) == {0.0, 1.0}


def test_replications_follow_the_likelihood():
    """500 x 12 draws at a fixed w: Kolmogorov-Smirnov, false alarm 1e-3 (the seed is fixed)."""

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x[:, 0], 0.7), obs=y)

    guide = fitted(model, autoguide.AutoDelta(model), X, y=Y)
    data = to_arviz(model, guide, (X,), kwargs={"y": Y}, num_samples=500, seed=4)
    assert data.attrs["posterior_draws"] == "many in one pass"
    w = float(data["posterior"]["w"].values.flat[0])
    residual = (data["posterior_predictive"]["y"].values[0] - w * X[:, 0].numpy()) / 0.7
    assert scipy.stats.kstest(residual.ravel(), "norm").pvalue > 1e-3
    spread = np.sqrt(0.7**2 + X[:, 0].numpy() ** 2)  # the prior of w is integrated
    prior = data["prior_predictive"]["y"].values[0] / spread
    assert scipy.stats.kstest(prior[:, 3], "norm").pvalue > 1e-3


def test_missing_values_scoped_names_and_no_arguments():
    def model():
        with scope(prefix="block"):
            m = pyro.sample("m", dist.Normal(0.0, 1.0))
            with pyro.plate("schools", 8):
                pyro.sample("y", dist.Normal(m, 1.0), obs=torch.arange(8.0), obs_mask=torch.arange(8) % 2 == 0)

    data = to_arviz(model, autoguide.AutoNormal(model), num_samples=4, seed=0)
    assert set(data["posterior"].data_vars) == {"block.m", "block.y", "block.y_unobserved"}
    y = data["posterior"]["block.y"]
    assert y.dims[:2] == ("chain", "draw") and y.shape == (1, 4, 8)
    np.testing.assert_array_equal(y.values[0, :, ::2], np.tile(np.arange(0.0, 8.0, 2.0), (4, 1)))
    assert (data["log_likelihood"]["block.y_observed"].values[..., 1::2] == 0).all()
    assert "x1" not in data["constant_data"] and "index" not in data["constant_data"]


def test_latents_without_a_guide_are_drawn_from_the_model():
    def model(x, y):
        with pyro.plate("components", 2):
            m = pyro.sample("m", dist.Normal(torch.tensor([-5.0, 5.0]), 1.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.25), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(torch.where(k > 0, m[..., 1:], m[..., :1]), 0.1), obs=y)

    guide = autoguide.AutoDelta(poutine.block(model, hide=["k"]))
    fitted(model, guide, X, elbo=TraceEnum_ELBO(max_plate_nesting=1), y=Y)
    data = to_arviz(model, guide, (X,), kwargs={"y": Y}, num_samples=200, seed=0)
    assert set(data["posterior"].data_vars) == {"m"} and data.attrs["sites_without_guide"] == "k"
    k, y = (data["posterior_predictive"][name].values for name in "ky")
    np.testing.assert_array_equal(k > 0, y > 0)  # drawn together
    assert abs(k.mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / k.size)
    expected = data["sample_stats"]["elbo"].values
    assert np.isfinite(expected).all() and expected.shape == (1, 200)


def test_concentration_that_depends_on_another_latent_has_draws():
    def model(x):
        k = pyro.sample("k", dist.LogNormal(2.0, 1.0))
        with pyro.plate("pairs", len(x)):
            pyro.sample("z", guides_vmf(torch.tensor([1.0, 0.0, 0.0]), k))

    def guides_vmf(direction, k):
        from pyro_contrastive.distributions import VonMisesFisher

        return VonMisesFisher(direction, k)

    data = to_arviz(model, model, (X,), num_samples=5, seed=0)
    posterior = data["posterior"]
    np.testing.assert_allclose(posterior["concentration"].values[0], np.repeat(posterior["k"].values[0][:, None], N, 1))
    np.testing.assert_allclose(data["constant_data"]["mean_direction"], np.tile([1.0, 0.0, 0.0], (N, 1)), atol=1e-6)
    assert data["sample_stats"]["elbo"].dims == ("chain", "draw")
    np.testing.assert_allclose(data["sample_stats"]["elbo"], 0.0, atol=1e-3)  # the guide is the model


def test_scalar_quantities_of_spherical_sites():
    guide = guides.VonMisesFisher(torch.nn.Linear(3, 8), dim=3)
    data = to_arviz(models.MCInfoNCE(guide), guide, (X, X), num_samples=40, seed=0)
    q = guide.eval().posterior(X)  # as to_arviz does
    posterior, constants = data["posterior"], data["constant_data"]
    assert constants["mean_direction1"].dims == ("item", "axis")
    np.testing.assert_allclose(constants["mean_direction1"], q.mean_direction.detach(), atol=1e-5)
    assert posterior["concentration1"].dims == ("chain", "draw", "item")
    z = torch.as_tensor(posterior["z1"].values[0])
    log_density = q.log_prob(z).detach().numpy()
    np.testing.assert_allclose(posterior["log_density1"].values[0], log_density, atol=1e-4)
    angle = np.arccos(np.clip((z * q.mean_direction).sum(-1).detach().numpy(), -1, 1))
    np.testing.assert_allclose(posterior["angle1"].values[0], angle, atol=1e-3)
    level = [[(log_density[:, i] > log_density[s, i]).mean() + 0.5 / 40 for i in range(N)] for s in range(40)]
    np.testing.assert_allclose(posterior["hpd_level1"].values[0], level, atol=1e-5)
    assert data["prior"]["angle1"].attrs["from"] == "mean_direction1"
    assert constants["site"].dims == ("view",) and list(constants["view"].values) == ["x1", "x2"]
    assert list(constants["site"].values) == ["z1", "z2"]
    assert data.attrs["batch_size"] == N and "positive" in data.attrs["batch_relative"]


def test_unit_norms_that_are_no_directions():
    def program(x):
        pyro.sample("factor", dist.LKJCholesky(3, 1.0))
        with pyro.plate("pairs", len(x)):
            pyro.sample("code", dist.OneHotCategorical(torch.ones(3)))
            w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.deterministic("direction", torch.nn.functional.normalize(w, dim=-1))

    data = to_arviz(program, program, (X,), num_samples=4, seed=0)
    assert {name for name in data["posterior"].data_vars if name.startswith("angle")} == {"angle_direction"}
    assert data["posterior"]["factor"].dims == ("chain", "draw", "factor_dim_0", "factor_dim_1")


def test_parameters_without_network_weights():
    net = torch.nn.Linear(3, 1)

    def model(x):
        pyro.module("net", net)
        scale = pyro.param("scale", torch.ones(()), constraint=dist.constraints.positive)
        table = pyro.param("table", torch.zeros(2, 5))
        pyro.param("huge", torch.zeros(2**20 + 1))
        with pyro.plate("pairs", len(x)):
            pyro.sample("z", dist.Normal(net(x)[:, 0] + table.sum(), scale))

    data = to_arviz(model, model, (X,), num_samples=2)
    assert {"scale", "table", "x1"} == set(data["constant_data"].data_vars)
    assert data["constant_data"]["table"].dims == ("table_dim_0", "table_dim_1")
    assert data["constant_data"]["scale"].dims == () and "huge" in data.attrs["parameters_skipped"]


def test_nan_is_refused_with_its_place():
    def program(x):
        with pyro.plate("pairs", len(x)), pyro.validation_enabled(False):
            pyro.sample("z", dist.Normal(torch.where(torch.arange(len(x)) == 7, torch.nan, 0.0), 1.0))

    with pytest.raises(ValueError, match=r"free of NaN, got NaN at site `z`, item 7, draw 0 \(8.3% of its values\)"):
        to_arviz(program, program, (X,), num_samples=3)


def test_bad_arguments():
    guide = autoguide.AutoNormal(grouped)
    with pytest.raises(ValueError, match="without a dimension for the items in `kwargs`"):
        to_arviz(grouped, guide, (X, Y[:3]))
    with pytest.raises(TypeError, match="other arguments in `kwargs`"):
        to_arviz(grouped, guide, (X, None))
    with pytest.raises(ValueError, match="`dims` must name the 1 dimensions of `b`"):
        to_arviz(grouped, guide, (X,), kwargs={"y": Y}, num_samples=2, dims={"b": ["a", "c"]})
    with pytest.raises(ValueError, match="one label per entry of `groups`, 4 in posterior, got 2"):
        to_arviz(grouped, guide, (X,), kwargs={"y": Y}, num_samples=2, coords={"groups": ["a", "b"]})
    with pytest.raises(ValueError, match="`num_samples` must be an integer >= 1, got 2.5"):
        to_arviz(grouped, guide, (X,), num_samples=2.5)


def test_prior_and_predictive_can_be_left_out():
    data = to_arviz(
        grouped, autoguide.AutoNormal(grouped), (X,), kwargs={"y": Y}, num_samples=2, prior=False, predictive=False
    )
    assert groups_of(data) == {"posterior", "log_likelihood", "sample_stats", "observed_data", "constant_data"}
    assert data.attrs["posterior_predictive_skipped"] == "asked for"
