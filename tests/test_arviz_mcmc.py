"""from_pyro against arviz.from_pyro of ArviZ 0.x, and by itself on 1.x."""

from __future__ import annotations

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro.infer import HMC, MCMC, NUTS, Predictive
from pyro.infer.mcmc import RandomWalkKernel
from pyro.poutine import mask

from pyro_contrastive.diagnostics import from_pyro

EFFECT = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
SCHOOLS = list("abcdefgh")


def schools(sigma, effect=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(sigma)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        return pyro.sample("obs", dist.Normal(mu + tau * eta, sigma), obs=effect)


def linear(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.deterministic("twice", 2 * w)
    with pyro.plate("data", len(x)), mask(mask=torch.arange(len(x)) != 1):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def sampled(kernel, *args, num_chains=1, num_samples=12, **kwargs):
    pyro.set_rng_seed(0)
    options = {"num_chains": num_chains, "num_samples": num_samples, "warmup_steps": 12, "disable_progbar": True}
    mcmc = MCMC(kernel, **options)
    mcmc.run(*args, **kwargs)
    return mcmc


def groups_of(data) -> list[str]:
    names = data.groups() if callable(data.groups) else data.groups
    return [name.strip("/") for name in names if name.strip("/")]


@pytest.fixture(scope="module")
def runs():
    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning, match="drawn sequentially"):
        patch.setattr("torch.multiprocessing.cpu_count", lambda: 1)
        many = sampled(NUTS(schools), SIGMA, effect=EFFECT, num_chains=3)
    return {1: sampled(NUTS(schools), SIGMA, effect=EFFECT), 3: many}


def options(mcmc) -> dict:
    return {
        "prior": Predictive(schools, num_samples=15)(SIGMA),
        "posterior_predictive": Predictive(schools, mcmc.get_samples())(SIGMA),
        "predictions": {"new": torch.randn(12 * mcmc.num_chains, 3)},
        "pred_dims": {"new": ["county"]},
        "predictions_constant_data": {"size": torch.arange(3)},
        "constant_data": {"sigma": SIGMA},
        "coords": {"school": SCHOOLS},
        "dims": {"eta": ["school"], "obs": ["school"], "sigma": ["school"]},
    }


@pytest.mark.parametrize("chains", [1, 3])
def test_groups_variables_and_values(runs, chains, tmp_path):
    mcmc = runs[chains]
    data = from_pyro(mcmc, **options(mcmc), attrs={"note": "hello"})
    assert data["posterior"]["eta"].dims == ("chain", "draw", "school")
    samples = mcmc.get_samples(group_by_chain=True)
    for name in ("mu", "tau", "eta"):
        np.testing.assert_array_equal(data["posterior"][name], samples[name])
    mu, tau, eta = (samples[name].numpy() for name in ("mu", "tau", "eta"))
    likelihood = scipy.stats.norm.logpdf(EFFECT, mu[..., None] + tau[..., None] * eta, SIGMA)
    np.testing.assert_allclose(data["log_likelihood"]["obs"], likelihood, rtol=1e-4)
    log_p = likelihood.sum(-1) + scipy.stats.norm.logpdf(mu, 0, 5) + scipy.stats.halfcauchy.logpdf(tau, 0, 5)
    log_p += scipy.stats.norm.logpdf(eta).sum(-1)
    np.testing.assert_allclose(data["sample_stats"]["log_p"], log_p, rtol=1e-4)
    reports = mcmc.diagnostics()
    for chain in range(chains):
        assert data["sample_stats"]["acceptance_rate"][chain] == reports["acceptance rate"][f"chain {chain}"]
        where = np.flatnonzero(data["sample_stats"]["diverging"][chain])
        np.testing.assert_array_equal(where, reports["divergences"][f"chain {chain}"])
    assert ("step_size" in data["sample_stats"]) == (chains == 1)
    assert data["prior"]["eta"].shape == (1, 15, 8) and data["prior"]["mu"].shape == (1, 15)
    assert list(data["prior_predictive"].data_vars) == ["obs"]
    assert data.attrs["method"] == "NUTS" and data.attrs["note"] == "hello"
    assert data.attrs["log_likelihood_draws"] == "many in one pass"
    data.to_netcdf(tmp_path / "mcmc.nc")
    back = az.from_netcdf(tmp_path / "mcmc.nc")
    assert set(groups_of(back)) == set(groups_of(data))
    assert {"mu", "tau"} <= set(az.summary(back, var_names=["mu", "tau"]).index)


@pytest.mark.skipif(not hasattr(az, "from_pyro"), reason="ArviZ 1.x has no from_pyro to compare with")
@pytest.mark.parametrize("chains", [1, 3])
def test_same_as_arviz_0(runs, chains):
    mcmc = runs[chains]
    given = options(mcmc)
    ours, theirs = from_pyro(mcmc, **given), az.from_pyro(mcmc, **given)
    assert set(groups_of(ours)) == set(groups_of(theirs))
    for group in groups_of(theirs):
        more = {"sample_stats": {"log_p", "acceptance_rate", "step_size"}}.get(group, set())
        assert set(theirs[group].data_vars) == set(ours[group].data_vars) - more
        for name, variable in theirs[group].data_vars.items():
            assert variable.dims == ours[group][name].dims
            np.testing.assert_allclose(ours[group][name], variable, rtol=1e-5)
            for dim in variable.dims:
                np.testing.assert_array_equal(ours[group][dim], variable[dim])


@pytest.mark.skipif(not hasattr(az, "from_pyro"), reason="ArviZ 1.x has no from_pyro to compare with")
def test_same_as_arviz_0_without_a_posterior():
    prior = Predictive(schools, num_samples=10)(SIGMA)
    given = {"prior": prior, "posterior_predictive": {"obs": prior["obs"]}, "num_chains": 2}
    ours, theirs = from_pyro(**given), az.from_pyro(**given)
    assert set(groups_of(ours)) == set(groups_of(theirs))
    for group in groups_of(theirs):
        for name, variable in theirs[group].data_vars.items():
            assert variable.dims == ours[group][name].dims
            np.testing.assert_array_equal(ours[group][name], variable)


def test_models_that_take_one_draw_at_a_time_masks_and_deterministic_sites():
    x, y = torch.randn(5, 2), torch.randn(5)
    mcmc = sampled(HMC(linear, step_size=0.1, num_steps=3), x, y)
    data = from_pyro(mcmc)
    assert data.attrs["log_likelihood_draws"].startswith("one after the other: ")
    w = mcmc.get_samples()["w"].numpy()
    expected = scipy.stats.norm.logpdf(y, w @ x.numpy().T, 1.0)
    expected[:, 1] = 0.0  # masked
    np.testing.assert_allclose(data["log_likelihood"]["y"].values[0], expected, rtol=1e-4, atol=1e-5)
    assert data["posterior"]["twice"].dims == ("chain", "draw", "twice_dim_0")
    np.testing.assert_allclose(data["posterior"]["twice"].values[0], 2 * w, rtol=1e-6)
    assert set(data["observed_data"].data_vars) == {"y"} and data["observed_data"]["y"].dims == ("y_dim_0",)
    assert float(data["sample_stats"]["step_size"][0]) > 0
    assert "log_likelihood" not in groups_of(from_pyro(mcmc, log_likelihood=False))
    given = from_pyro(mcmc, observed_data={"y": y[:3]}, dims={"y": ["row"]})
    assert given["observed_data"]["y"].shape == (3,)


def test_other_kernels_and_potential_functions():
    data = from_pyro(sampled(RandomWalkKernel(schools), SIGMA, effect=EFFECT))
    assert "diverging" not in data["sample_stats"] and data.attrs["method"] == "RandomWalkKernel"
    assert data["log_likelihood"]["obs"].shape == (1, 12, 8)
    kernel = NUTS(potential_fn=lambda p: (p["a"] ** 2).sum() / 2)
    mcmc = MCMC(kernel, num_samples=6, warmup_steps=6, disable_progbar=True, initial_params={"a": torch.zeros(2)})
    mcmc.run()
    data = from_pyro(mcmc)
    assert set(groups_of(data)) == {"posterior", "sample_stats"}
    assert "potential function" in data.attrs["log_likelihood_skipped"]


def test_sites_that_were_not_kept_leave_the_likelihood_out():
    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(schools), num_samples=6, warmup_steps=6, disable_progbar=True, save_params=["mu"])
    mcmc.run(SIGMA, effect=EFFECT)
    data = from_pyro(mcmc)
    assert "log_likelihood" not in groups_of(data)
    assert data.attrs["log_likelihood_skipped"] == "latent sites without samples: tau, eta"


@pytest.mark.skipif(torch.multiprocessing.get_start_method() != "fork", reason="a spawned chain imports torch anew")
def test_chains_in_processes(monkeypatch):
    monkeypatch.setattr("torch.multiprocessing.cpu_count", lambda: 3)
    mcmc = sampled(NUTS(schools), SIGMA, effect=EFFECT, num_chains=2)
    data = from_pyro(mcmc)
    assert data["sample_stats"]["diverging"].shape == (2, 12) and data["sample_stats"]["acceptance_rate"].shape == (2,)
    assert not np.array_equal(data["posterior"]["mu"][0], data["posterior"]["mu"][1])
    assert data["log_likelihood"]["obs"].shape == (2, 12, 8)


def test_nothing_of_the_caller_changes(runs):
    state, store = torch.get_rng_state(), dict(pyro.get_param_store().named_parameters())
    from_pyro(runs[1])
    assert torch.equal(state, torch.get_rng_state()) and store == dict(pyro.get_param_store().named_parameters())


def test_bad_input(runs):
    with pytest.raises(TypeError, match="must be a pyro.infer.MCMC run, got dict; .* diagnostics.to_arviz"):
        from_pyro({"mu": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"must have been run, got no samples; call posterior.run"):
        from_pyro(MCMC(NUTS(schools), num_samples=5))
    with pytest.raises(ValueError, match="got none"):
        from_pyro()
    with pytest.raises(ValueError, match="`dims` must name at most 0 dimensions of `mu`"):
        from_pyro(runs[1], dims={"mu": ["school"]})
    with pytest.raises(ValueError, match="one label per entry of `school`, 8 in posterior, got 2"):
        from_pyro(runs[1], dims={"eta": ["school"]}, coords={"school": ["a", "b"]})
