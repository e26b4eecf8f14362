from __future__ import annotations

import random

import arviz as az
import numpy as np
import pyro
import pyro.distributions as pyro_dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import nn

from pyro_contrastive import guides, models, nets
from pyro_contrastive.diagnostics import to_arviz

N, D = 7, 3


class Guide(PyroModule):
    """A minimal recognition module of a user's own, with batch norm and dropout inside."""

    def __init__(self, point: bool = False) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, D))
        self.point = point

    def forward(self, *views):
        with pyro.plate("pairs", len(views[0])):
            for j, x in enumerate(views, start=1):
                w = self.encoder(x)
                direction = nn.functional.normalize(w, dim=-1)
                q = pyro_dist.Delta(direction, event_dim=1) if self.point else pyro_dist.ProjectedNormal(5 * direction)
                pyro.sample(f"z{j}", q)


class Model(PyroModule):
    def __init__(self, guide: Guide) -> None:
        super().__init__()
        self.guide = guide
        self.concentration = PyroParam(torch.tensor(4.0), constraint=constraints.positive)

    def forward(self, *views):
        with pyro.plate("pairs", len(views[0])):
            z = [pyro.sample(f"z{j + 1}", pyro_dist.ProjectedNormal(torch.zeros(D))) for j in range(len(views))]
            logits = self.concentration * z[0] @ z[-1].mT
            pyro.factor("positive", logits.diagonal(dim1=-2, dim2=-1) - logits.logsumexp(-1))

    def partner_logits(self, x1, x2):
        z1, z2 = (nn.functional.normalize(self.guide.encoder(x), dim=-1) for x in (x1, x2))
        return self.concentration * z1 @ z2.mT


@pytest.fixture
def pair():
    torch.manual_seed(0)
    guide = Guide()
    return Model(guide), guide


@pytest.fixture
def views():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 4, generator=generator), torch.randn(N, 4, generator=generator)


def groups(data) -> set[str]:
    return (
        {name.strip("/") for name in data.groups if name.strip("/")}
        if not callable(data.groups)
        else set(data.groups())
    )


def test_every_group_with_named_dimensions(pair, views, tmp_path):
    data = to_arviz(*pair, views, num_samples=5, seed=3, attrs={"note": "hello"}, coords={"axis": ["a", "b", "c"]})
    assert groups(data) == {
        *("posterior", "prior", "posterior_predictive", "log_likelihood", "sample_stats", "observed_data"),
        "constant_data",
    }
    posterior = data["posterior"]
    assert posterior["z1"].dims == ("chain", "draw", "item", "axis")
    assert posterior["z1"].shape == (1, 5, N, D)
    assert posterior["angle1"].dims == posterior["angle2"].dims == ("chain", "draw", "item")
    assert list(posterior["axis"].values) == ["a", "b", "c"]
    assert data["prior"]["z2"].shape == (1, 5, N, D)
    assert data["log_likelihood"]["positive"].dims == ("chain", "draw", "item")
    assert data["posterior_predictive"]["partner"].dims == ("chain", "draw", "item")
    np.testing.assert_array_equal(data["observed_data"]["partner"], np.arange(N))
    np.testing.assert_array_equal(data["constant_data"]["x2"], views[1])
    assert float(data["constant_data"]["pair_concentration"]) == 4.0
    for name in ("log_p", "log_q", "elbo"):
        assert data["sample_stats"][name].dims == ("chain", "draw", "item")
    for source in (data, posterior):
        assert source.attrs["note"] == "hello" and source.attrs["seed"] == 3
        assert source.attrs["model"] == "Model" and source.attrs["guide"] == "Guide"
        assert source.attrs["torch_version"] == torch.__version__
    data.to_netcdf(tmp_path / "posterior.nc")
    back = az.from_netcdf(tmp_path / "posterior.nc")
    np.testing.assert_array_equal(back["posterior"]["z1"].values, posterior["z1"].values)
    assert groups(back) == groups(data) and back.attrs["note"] == "hello"


def test_numbers_against_pyro(pair, views):
    model, guide = pair
    data = to_arviz(model, guide, views, num_samples=4, seed=3)
    model.eval()
    z1, z2 = (torch.as_tensor(data["posterior"][name].values[0]) for name in ("z1", "z2"))
    logits = 4.0 * z1 @ z2.mT
    factor = logits.diagonal(dim1=-2, dim2=-1) - logits.logsumexp(-1)
    np.testing.assert_allclose(data["log_likelihood"]["positive"].values[0], factor.detach(), rtol=1e-5, atol=1e-5)
    means = [nn.functional.normalize(guide.encoder(x), dim=-1).detach() for x in views]
    angle = torch.acos((z1 * means[0]).sum(-1))
    # ProjectedNormal has no mean_direction here: the reference is the mean of the draws, close but not equal
    assert np.abs(data["posterior"]["angle1"].values[0] - angle.numpy()).mean() < 0.5
    prior = pyro_dist.ProjectedNormal(torch.zeros(D))
    log_p = prior.log_prob(z1) + prior.log_prob(z2) + factor
    log_q = sum(pyro_dist.ProjectedNormal(5 * m).log_prob(z) for m, z in zip(means, (z1, z2), strict=True))
    np.testing.assert_allclose(data["sample_stats"]["log_p"].values[0], log_p.detach(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(data["sample_stats"]["elbo"].values[0], (log_p - log_q).detach(), rtol=1e-4, atol=1e-4)


def test_nothing_of_the_caller_changes(pair, views):
    model, guide = pair
    model.train()
    guide.encoder[2].eval()  # a mixed state is restored as it was
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    svi.step(*views)
    modes = [module.training for module in model.modules()]
    buffers = {name: value.clone() for name, value in model.state_dict().items()}
    store = dict(pyro.get_param_store().named_parameters())
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    setting = pyro.settings.get("module_local_params")
    first = to_arviz(model, guide, views, num_samples=3, seed=3)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, buffers[name]) for name, value in model.state_dict().items())
    after = dict(pyro.get_param_store().named_parameters())
    assert store.keys() == after.keys() and all(store[name] is after[name] for name in store)
    assert torch.equal(states[0], torch.get_rng_state()) and random.getstate() == states[2]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert pyro.settings.get("module_local_params") is setting
    assert torch.is_grad_enabled()
    second = to_arviz(model, guide, views, num_samples=3, seed=3)
    np.testing.assert_array_equal(first["posterior"]["z1"].values, second["posterior"]["z1"].values)
    svi.step(*views)  # training goes on


def test_the_parameters_are_the_trained_ones_however_they_were_trained(pair, views):
    """Plain SVI leaves them in Pyro's store, the torch way in the modules, whatever another model left in the store."""
    stale = Model(Guide())
    SVI(stale, stale.guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO()).step(*views)
    model, guide = pair
    with torch.no_grad():  # as an optimiser of torch would
        model.concentration_unconstrained.fill_(np.log(9.0))
    data = to_arviz(model, guide, views, num_samples=2, seed=0)
    z1, z2 = (torch.as_tensor(data["posterior"][name].values[0]) for name in ("z1", "z2"))
    logits = 9.0 * z1 @ z2.mT
    expected = logits.diagonal(dim1=-2, dim2=-1) - logits.logsumexp(-1)
    np.testing.assert_allclose(data["log_likelihood"]["positive"].values[0], expected, rtol=1e-4, atol=1e-4)
    assert float(data["constant_data"]["pair_concentration"]) == pytest.approx(9.0)


def test_modules_in_the_local_mode_of_the_caller(views):
    with pyro.settings.context(module_local_params=True):
        guide = Guide()
        model = Model(guide)
        Trace_ELBO()(model, guide)(*views).backward()
        with torch.no_grad():
            model.concentration_unconstrained.fill_(np.log(6.0))
        data = to_arviz(model, guide, views, num_samples=2)
        assert float(data["constant_data"]["pair_concentration"]) == pytest.approx(6.0)
        assert pyro.settings.get("module_local_params") is True


@pytest.mark.parametrize(
    ("family", "method"),
    [
        *[("VonMisesFisher", method) for method in ("shared", "moment_matched", "k_sample", "elbo", "rpm")],
        *[
            (family, method)
            for family in ("PowerSpherical", "ProjectedNormal")
            for method in ("k_sample", "elbo", "rpm")
        ],
        *[("Delta", method) for method in ("k_sample", "elbo")],
    ],
)
def test_the_pairs_of_this_library(family, method, views, tmp_path):
    torch.manual_seed(0)
    guide = getattr(guides, family)(nets.mlp([4, 8], batch_norm=True), D)
    if method == "rpm":
        model, factors = models.RPM(guide), {"x1", "x2"}
    elif method == "shared":
        model, factors = models.MCInfoNCE(guide), {"positive"}
    else:
        model, factors = models.MCInfoNCE(guide, concentration=20.0, evidence=method), {"positive"}
    SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO()).step(*views)
    data = to_arviz(model, guide, views, num_samples=2, seed=0)
    assert data["posterior"]["z1"].dims == ("chain", "draw", "item", "axis")
    assert data["posterior"]["angle2"].dims == data["sample_stats"]["elbo"].dims == ("chain", "draw", "item")
    assert set(data["log_likelihood"].data_vars) == factors
    assert ("concentration1" in data["posterior"]) == (family in ("VonMisesFisher", "PowerSpherical"))
    assert {"posterior_predictive", "prior"} <= groups(data)
    assert float(data["constant_data"]["pair_concentration"]) == float(model.concentration.detach())
    assert np.isfinite(data["sample_stats"]["elbo"].values).all()
    data.to_netcdf(tmp_path / "posterior.nc")


def test_plain_functions(views):
    encoder = nn.Sequential(nn.Linear(4, D), nn.BatchNorm1d(D))

    def model(x1, x2):
        kappa = pyro.param("kappa", torch.tensor(10.0), constraint=constraints.positive)
        with pyro.plate("pairs", len(x1)):
            z1 = pyro.sample("z1", pyro_dist.ProjectedNormal(torch.zeros(D)).mask(False))
            scale = pyro.sample("scale", pyro_dist.LogNormal(0.0, 1.0))
            pyro.sample("y", pyro_dist.Normal(scale * z1[..., 0], kappa), obs=x2[:, 0])
            pyro.deterministic("first", z1[..., 0])

    def guide(x1, x2):
        pyro.module("encoder", encoder)
        with pyro.plate("pairs", len(x1)):
            pyro.sample("z1", pyro_dist.ProjectedNormal(encoder(x1)))
            pyro.sample("scale", pyro_dist.LogNormal(x1[:, 0], 1.0))

    SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO()).step(*views)
    running = encoder[1].running_mean.clone()
    data = to_arviz(model, guide, views, num_samples=6, view_names=("left", "right"))
    assert encoder.training and torch.equal(running, encoder[1].running_mean)
    posterior = data["posterior"]
    assert posterior["scale"].dims == posterior["first"].dims == ("chain", "draw", "item")
    np.testing.assert_array_equal(posterior["first"], posterior["z1"].values[..., 0])
    assert "angle_scale" not in posterior and "angle1" in posterior
    assert set(data["log_likelihood"].data_vars) == {"y"}
    assert set(data["posterior_predictive"].data_vars) == {"y"}  # no partner: the model has no partner_logits
    np.testing.assert_array_equal(data["observed_data"]["y"], views[1][:, 0])
    assert float(data["constant_data"]["kappa"]) == pytest.approx(float(pyro.param("kappa").detach()))
    assert {"left", "right"} <= set(data["constant_data"].data_vars)
    assert data.attrs["seed"] == "state of the caller"


def test_a_model_that_needs_its_guide_has_no_prior(views):
    def model(x):
        with pyro.plate("pairs", len(x)):
            pyro.sample("z", pyro_dist.ImproperUniform(constraints.sphere, (), (D,)))

    def guide(x):
        with pyro.plate("pairs", len(x)):
            pyro.sample("z", pyro_dist.ProjectedNormal(x[:, :D]))

    data = to_arviz(model, guide, views[:1], num_samples=2)
    assert "prior" not in groups(data) and "NotImplementedError" in data.attrs["prior_skipped"]
    assert "angle" in data["posterior"]
    assert "prior" not in groups(to_arviz(model, guide, views[:1], num_samples=2, prior=False))


def test_point_guide_and_large_views(views):
    guide = Guide(point=True)
    data = to_arviz(Model(guide), guide, views, num_samples=3, store_views=False)
    assert float(np.abs(data["posterior"]["angle1"]).max()) < 1e-3
    assert "x1" not in data["constant_data"] and data["constant_data"]["index"].dims == ("item",)


def test_statistics_that_are_not_per_item_are_summed(views):
    def model(x):
        w = pyro.sample("w", pyro_dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("pairs", len(x)):
            pyro.sample("y", pyro_dist.Normal(w.sum(-1), 1.0), obs=x[:, 0])

    def guide(x):
        pyro.sample("w", pyro_dist.Normal(torch.zeros(2), 2.0).to_event(1))

    data = to_arviz(model, guide, views[:1], num_samples=3, seed=0)
    assert data["sample_stats"]["elbo"].dims == ("chain", "draw")
    assert data["posterior"]["w"].dims == ("chain", "draw", "axis")
    w = torch.as_tensor(data["posterior"]["w"].values[0])
    expected = pyro_dist.Normal(0.0, 1.0).log_prob(w).sum(-1) + pyro_dist.Normal(w.sum(-1)[:, None], 1.0).log_prob(
        views[0][:, 0]
    ).sum(-1)
    np.testing.assert_allclose(data["sample_stats"]["log_p"].values[0], expected, rtol=1e-5)


def test_pit_values_are_laid_out_for_the_plots_of_arviz(pair, views, tmp_path):
    pit = np.random.default_rng(0).uniform(size=60)
    data = to_arviz(*pair, views, num_samples=2, sbc={"angle1": pit})
    data.to_netcdf(tmp_path / "posterior.nc")
    data = az.from_netcdf(tmp_path / "posterior.nc")
    np.testing.assert_array_equal(data["prior_sbc"]["angle1"].values, pit[None])
    if hasattr(az, "plot_ecdf_pit"):
        az.plot_ecdf_pit(data, backend="none")


def test_errors(pair, views):
    with pytest.raises(TypeError, match="tuple of tensors"):
        to_arviz(*pair, views[0])
    with pytest.raises(ValueError, match="one length"):
        to_arviz(*pair, (views[0], views[1][:3]))
    with pytest.raises(ValueError, match="`num_samples` must be an integer >= 1"):
        to_arviz(*pair, views, num_samples=0)
    with pytest.raises(ValueError, match="`view_names` must name"):
        to_arviz(*pair, views, view_names=["a"])
    with pytest.raises(ValueError, match="at least one latent"):
        to_arviz(lambda x: None, lambda x: None, views[:1])
