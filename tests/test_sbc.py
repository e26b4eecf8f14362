from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as pyro_dist
from scipy import stats
from torch import nn

from pyro_contrastive import distributions as dist
from pyro_contrastive.data import SphereWorld
from pyro_contrastive.diagnostics import _draws as pieces
from pyro_contrastive.diagnostics import (
    adjusted_pvalues,
    angle_to_mean,
    angle_to_reference,
    asymmetry_pvalue,
    coordinates,
    cosine_to,
    default_quantities,
    log_density,
    sbc,
    simulator,
    variational_sbc,
)
from pyro_contrastive.diagnostics.variational_sbc import _asymmetry
from pyro_contrastive.guides import VonMisesFisher
from pyro_contrastive.ops.random import seeded

WORLD = SphereWorld(dim=4, concentration=(4.0, 40.0))


def exact(scale: float = 1.0, turn: torch.Tensor | None = None):
    """The exact posterior with its concentration scaled and its directions turned."""

    def posterior(inputs):
        mean, kappa = inputs
        return dist.VonMisesFisher(mean if turn is None else mean @ turn, scale * kappa)

    return posterior


def simulate(n: int, seed: int):
    batch = WORLD.sample(n, seed)
    return (batch.mean_direction1, batch.concentration1), batch.z1


class Recorded:
    """A law on the line that keeps its draws, to be ranked a second time by hand."""

    batch_shape, event_shape = torch.Size([5]), torch.Size([2])

    def __init__(self, values: int | None = None) -> None:
        self.drawn: list[torch.Tensor] = []
        self.values = values

    def sample(self, shape: torch.Size) -> torch.Tensor:
        z = torch.randn(*shape, 5, 2)
        self.drawn.append(z if self.values is None else z.mul(0).add(self.values))
        return self.drawn[-1]


def test_ranks_are_those_of_a_loop_over_all_draws(monkeypatch):
    monkeypatch.setattr(pieces, "_NUMBERS", 40)  # pieces of 4 draws
    laws = [Recorded(), Recorded()]
    queue: Iterator[Recorded] = iter(laws)
    truths = torch.randn(10, 2)
    batches = iter(truths.split(5))
    quantities = {"first": lambda z: z[..., 0], "product": lambda z, q: z[..., 0] * z[..., 1]}
    result = sbc(
        lambda x: next(queue),
        lambda n, seed: (torch.zeros(n), next(batches)),
        num_simulations=10,
        num_draws=30,
        quantities=quantities,
        batch_size=5,
    )
    assert [len(z) for z in laws[0].drawn] == [4] * 7 + [2]
    for item, law in enumerate(laws[0:1] * 5 + laws[1:] * 5):
        draws = torch.cat(law.drawn)[:, item % 5]
        assert result.ranks["first"][item] == sum(float(z[0]) < float(truths[item, 0]) for z in draws)
        product = float(truths[item, 0] * truths[item, 1])
        assert result.ranks["product"][item] == sum(float(z[0] * z[1]) < product for z in draws)
    for name in quantities:
        u = result.pit[name] * 31 - result.ranks[name]
        assert np.all((u > 0) & (u < 1))
        assert result.pvalues[name] == stats.kstest(result.pit[name], "uniform").pvalue
    assert result.num_draws == 30


def test_ties_are_broken_at_random():
    result = sbc(
        lambda x: Recorded(values=1),
        lambda n, seed: (torch.zeros(n), torch.ones(n, 2)),
        num_simulations=2000,
        num_draws=3,
        quantities={"first": lambda z: z[..., 0]},
        batch_size=5,
    )
    counts = np.bincount(result.ranks["first"], minlength=4)
    assert stats.chisquare(counts).pvalue > 1e-4  # false-alarm rate 1e-4 (fixed seed)


def test_result_depends_on_the_seed_alone_and_touches_no_state():
    net = nn.Sequential(nn.Linear(WORLD.observed_dim, 8), nn.Dropout(0.5))
    guide = VonMisesFisher(net, 4)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = sbc(guide, WORLD, num_simulations=60, num_draws=20, batch_size=25)
    assert torch.equal(before, torch.get_rng_state())
    assert guide.training and net[1].training
    torch.randn(3)
    again = sbc(guide, WORLD, num_simulations=60, num_draws=20, batch_size=25)
    other = sbc(guide, WORLD, num_simulations=60, num_draws=20, batch_size=25, seed=1)
    assert set(first.ranks) == set(default_quantities(4))
    for name in first.ranks:
        np.testing.assert_array_equal(first.pit[name], again.pit[name])
        assert np.any(first.ranks[name] != other.ranks[name])
        assert first.ranks[name].shape == (60,)
        assert np.issubdtype(first.ranks[name].dtype, np.integer)


def test_a_rotation_is_an_error_unless_the_frame_is_said_to_be_unknown():
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(3)))[0]
    judged = exact(turn=turn)
    options = {"num_simulations": 800, "num_draws": 199}
    assert min(sbc(judged, simulate, **options).pvalues.values()) < 1e-10
    aligned = sbc(judged, simulate, num_alignment=4000, **options)
    assert min(aligned.adjusted_pvalues.values()) > 1e-4  # false-alarm rate 1e-4 (fixed seed)
    sure = sbc(exact(4.0, turn), simulate, num_alignment=4000, **options)
    assert sure.pvalues["angle"] < 1e-10


def test_a_pyro_model_makes_the_simulations():
    inputs, truth = simulator(WORLD, "z1", ("mean_direction1", "concentration1"))(50, 3)
    assert inputs[0].shape == (50, 4) and inputs[1].shape == (50,) and truth.shape == (50, 4)
    again = simulator(WORLD, "z1", "x1")(50, 3)
    torch.testing.assert_close(again[1], truth)
    result = sbc(exact(), simulator(WORLD, "z1", ("mean_direction1", "concentration1")), num_simulations=400)
    assert min(result.adjusted_pvalues.values()) > 1e-4  # false-alarm rate 1e-4 (fixed seed)
    with pytest.raises(ValueError, match="a sample site 'z9', got"):
        simulator(WORLD, "z9", "x1")(5, 0)


def test_a_posterior_that_is_fitted_anew_for_every_data_set():
    def simulate_normal(n, seed):
        with seeded(seed):
            z = torch.randn(n, 1)
            return z + torch.randn(n, 3), z

    def fit(x):
        assert len(x) == 1
        with torch.enable_grad():
            loc, log_scale = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
            optimiser = torch.optim.LBFGS([loc, log_scale], max_iter=12)

            def loss():  # the exact negative ELBO of z ~ N(0, 1), x_k ~ N(z, 1), q = N(loc, scale)
                optimiser.zero_grad()
                variance = (2 * log_scale).exp()
                value = 0.5 * (loc**2 + variance + ((x - loc) ** 2).sum() + 3 * variance) - log_scale
                value.sum().backward()
                return value.sum()

            optimiser.step(loss)
        return pyro_dist.Normal(loc.detach()[None], log_scale.detach().exp()[None]).to_event(1)

    result = variational_sbc(fit, simulate_normal, num_simulations=60, num_draws=99, batch_size=1)
    assert result.pvalues["axis0"] > 1e-4  # false-alarm rate 1e-4 (fixed seed)
    assert stats.kstest(result.probabilities["axis0"], "uniform").pvalue > 1e-4  # the same


def test_arviz_gets_integer_ranks_as_simuk_lays_them_out():
    result = sbc(exact(), simulate, num_simulations=30, num_draws=9)
    data = result.to_arviz()
    ranks, pit = data["prior_sbc"]["axis1"], data["prior_sbc_pit"]["axis1"]
    assert ranks.dims == pit.dims == ("chain", "draw") and ranks.shape == (1, 30)
    assert np.issubdtype(ranks.dtype, np.integer)
    np.testing.assert_array_equal(ranks.values[0], result.ranks["axis1"])
    np.testing.assert_array_equal(pit.values[0], result.pit["axis1"])
    assert data["prior_sbc"].attrs["num_draws"] == 9


# --- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 3, 512])
@pytest.mark.parametrize("kappa", [0.0, 1.0, 1e6])
def test_right_at_every_end(dim, kappa):
    def own(n, seed):
        with seeded(seed):
            mean = nn.functional.normalize(torch.randn(n, dim), dim=-1)
            return mean, dist.VonMisesFisher(mean, torch.full((n,), kappa)).sample()

    def posterior(mean):
        return dist.VonMisesFisher(mean, torch.full((len(mean),), kappa))

    quantities = default_quantities(dim) | {"density": log_density}
    result = sbc(posterior, own, num_simulations=150, num_draws=60, quantities=quantities)
    assert min(result.adjusted_pvalues.values()) > 1e-4  # false-alarm rate 1e-4 (fixed seed)


def test_one_simulation_and_one_draw():
    result = sbc(exact(), simulate, num_simulations=1, num_draws=1)
    assert all(ranks.shape == (1,) and ranks[0] in (0, 1) for ranks in result.ranks.values())
    assert all(0 < p[0] < 1 for p in result.pit.values())
    assert all(0 <= p <= 1 for p in result.adjusted_pvalues.values())
    assert variational_sbc(exact(), simulate, num_simulations=1, num_draws=1).pvalues["axis0"] == 1.0


@pytest.mark.parametrize(
    "law",
    [
        lambda m, k: dist.HypersphericalUniform(4),
        lambda m, k: pyro_dist.Delta(m, event_dim=1),
        lambda m, k: dist.PowerSpherical(m, k),
        lambda m, k: dist.ProjectedNormal(m, torch.ones_like(m)),
    ],
)
def test_every_family_can_be_judged(law):
    result = sbc(lambda inputs: law(*inputs), simulate, num_simulations=40, num_draws=19)
    assert all(np.all((p > 0) & (p < 1)) for p in result.pit.values())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sbc(None, simulate), TypeError, "`posterior` must be a function or have a method posterior"),
        (lambda: sbc(exact(), None), TypeError, "`simulate` must be a function or have a method sample"),
        (lambda: sbc(exact(), lambda n, s: torch.zeros(n)), ValueError, "must return .inputs, truth."),
        (lambda: sbc(lambda x: x[0], simulate), TypeError, "must be a distribution"),
        (lambda: sbc(exact(), lambda n, s: (simulate(n, s)[0], torch.zeros(n, 3))), ValueError, "truths of shape"),
        (lambda: sbc(lambda x: exact()(simulate(2, 0)[0]), simulate), ValueError, "must have batch shape"),
        (lambda: sbc(exact(), simulate, num_simulations=0), ValueError, "`num_simulations` must be >= 1"),
        (lambda: sbc(exact(), simulate, num_draws=0), ValueError, "`num_draws` must be >= 1"),
        (lambda: sbc(exact(), simulate, num_alignment=-1), ValueError, "`num_alignment` must be >= 0"),
        (lambda: sbc(exact(), simulate, quantities={}), ValueError, "at least one function"),
        (lambda: sbc(exact(), simulate, quantities=[log_density]), TypeError, "must map names"),
        (lambda: sbc(exact(), simulate, quantities={"a": 3}), TypeError, "quantity 'a' must be a function"),
        (lambda: sbc(exact(), simulate, quantities={"a": lambda z: z}), ValueError, "one number per point"),
        (lambda: sbc(exact(), simulate, quantities={"a": lambda z: z[..., 0] * np.nan}), ValueError, "NaN"),
        (lambda: cosine_to([1.0, 1.0]), ValueError, "unit vectors"),
        (lambda: cosine_to(np.eye(2)), ValueError, "one vector"),
        (lambda: coordinates(0), ValueError, "`dim` must be >= 1"),
        (lambda: asymmetry_pvalue([]), ValueError, "non-empty vector"),
        (lambda: asymmetry_pvalue([1.5]), ValueError, "in .0, 1."),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- quantities -------------------------------------------------------------------------------------------------------


def test_quantities_against_numpy():
    generator = torch.Generator().manual_seed(0)
    z, mean = (nn.functional.normalize(torch.randn(*s, generator=generator), dim=-1) for s in ((6, 5, 4), (5, 4)))
    law = dist.VonMisesFisher(mean, torch.full((5,), 7.0))
    np.testing.assert_allclose(angle_to_mean(z, law), np.arccos(np.einsum("snd,nd->sn", z, mean)), atol=1e-5)
    np.testing.assert_allclose(cosine_to(mean[0])(z), z.numpy() @ mean[0].numpy(), atol=1e-6)
    np.testing.assert_array_equal(coordinates(3, name="c")["c2"](z), z[..., 2])
    np.testing.assert_array_equal(log_density(z, law), law.log_prob(z))
    reference = angle_to_reference(3)
    assert torch.equal(reference(z)[2], reference(z[2]))  # the same references for draws and truths
    assert not torch.equal(reference(z), angle_to_reference(4)(z))
    tiny = torch.tensor([[1.0, 1e-5]])
    torch.testing.assert_close(cosine_to([1.0, 0.0])(tiny), torch.ones(1))
    torch.testing.assert_close(
        angle_to_mean(tiny, dist.VonMisesFisher(torch.tensor([[1.0, 0.0]]), torch.ones(1))), torch.tensor([1e-5])
    )


# --- variational SBC --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 6, 11])
def test_symmetry_pvalue_is_the_share_of_coin_tosses(steps):
    size = np.linspace(0.05, 0.45, steps)
    signs = np.array(list(itertools.product([-1, 1], repeat=steps)))
    reach = np.abs(np.cumsum(signs[:, ::-1], axis=1)).max(axis=1)
    for row, own in zip(signs[:: max(len(signs) // 40, 1)], reach[:: max(len(signs) // 40, 1)], strict=True):
        assert asymmetry_pvalue(0.5 + row * size) == pytest.approx(np.mean(reach >= own), abs=1e-12)


def test_symmetry_statistic_is_the_kolmogorov_smirnov_distance_of_the_mirror_image():
    rng = np.random.default_rng(0)
    for n in (1, 7, 200):
        p = rng.beta(2, 3, size=n)
        assert _asymmetry(p) / n == pytest.approx(stats.ks_2samp(p, 1 - p).statistic)


def test_symmetry_pvalue_has_its_size_where_that_of_two_samples_has_not(record_property):
    rng = np.random.default_rng(1)
    samples = rng.uniform(size=(3000, 200))
    exact_share = np.mean([asymmetry_pvalue(p) < 0.05 for p in samples])
    distance = np.array([_asymmetry(p) / 200 for p in samples])
    naive = np.mean(stats.kstwobign.sf(distance * np.sqrt(200 / 2)) < 0.05)  # the textbook's, for two samples of 200
    record_property("share rejected at 5 %, exact and as two samples", (float(exact_share), float(naive)))
    # discrete, so at most .05; binomial standard error .004: 4 of them, false-alarm rate 6e-5
    assert 0.03 < exact_share < 0.066
    assert naive > 0.066


def test_far_tail_of_the_symmetry_pvalue():
    # all values on one side: the walk never turns, and two of all 2^n sequences do that
    assert asymmetry_pvalue(np.linspace(0.6, 0.9, 100)) == pytest.approx(2.0**-99, rel=1e-6)
    assert asymmetry_pvalue(np.linspace(0.6, 0.9, 20)) == pytest.approx(2.0**-19, rel=1e-6)


def test_variational_sbc_sees_bias_and_nothing_else():
    def tilted(inputs):
        mean, kappa = inputs
        return dist.VonMisesFisher(nn.functional.normalize(mean + 0.3 * torch.eye(4)[0], dim=-1), kappa)

    options = {"num_simulations": 800, "num_draws": 199}
    narrow = variational_sbc(exact(8.0), simulate, **options)
    assert min(narrow.adjusted_pvalues.values()) > 1e-4  # false-alarm rate 1e-4 (fixed seed)
    assert min(sbc(exact(8.0), simulate, **options).pvalues.values()) < 1e-10
    biased = variational_sbc(tilted, simulate, **options)
    assert biased.pvalues["axis0"] < 1e-10 and biased.bias["axis0"] < -0.05  # truths are smaller than it says
    assert min(biased.pvalues[f"axis{k}"] for k in (1, 2, 3)) > 1e-4 / 3
    assert list(biased.probabilities) == [f"axis{k}" for k in range(4)]


def test_adjusted_pvalues_by_hand():
    assert adjusted_pvalues({}) == {}
    found = adjusted_pvalues({"a": 0.04, "b": 0.01, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"a": 0.06, "b": 0.03, "c": 0.06, "d": 0.02})
    assert adjusted_pvalues({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_one_site_of_a_user_model_that_is_no_sphere():
    def model(n):
        with pyro.plate("items", n):
            z = pyro.sample("z", pyro_dist.Normal(0.0, 1.0))
            pyro.sample("x", pyro_dist.Normal(z, 0.5))

    def posterior(scale):
        return lambda x: pyro_dist.Normal(0.8 * x, scale * 0.2**0.5)

    quantities = {"z": lambda z: z}
    make = simulator(model, "z", "x")
    assert sbc(posterior(1.0), make, num_simulations=600, quantities=quantities).pvalues["z"] > 1e-4
    assert sbc(posterior(0.5), make, num_simulations=600, quantities=quantities).pvalues["z"] < 1e-6
